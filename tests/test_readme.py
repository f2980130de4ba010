"""
Every command and every snippet of README.md and README.zh-CN.md: its files exist, its keys are real, and what
needs neither network nor GPUs nor a package of its own is run, shortened.
"""

import ast
import json
import re
import shlex
from importlib.util import find_spec

import pytest
from conftest import ROOT, TEXT
from test_config import configured

# Not run here, each for its reason; the keys of all of them are checked nevertheless
NOT_RUN = {
    r'python3 -m venv|^\. \.venv|pip install': 'makes an environment: .ci/run does',
    r'-m pytest': 'these tests themselves',
    r'prepare.py --files|wiki[-_]zh': 'the data of its user: tests/test_data.py runs them on its own',
    r'openwebtext/prepare.py': 'network',
    r'finetune_shakespeare|out-shakespeare$|out-mybook|out-faq|gpt2-xl|eval_gpt2|wikitext': (
        "network: GPT-2's weights, WikiText; tests/test_export.py has the latter's config"
    ),
    r'--nproc_per_node=8': 'eight GPUs',
}
# Added at the end, where it wins: seconds instead of hours, and a data set that is always here
TINY = '--device=cpu --n_layer=1 --n_head=2 --n_embd=16 --block_size=64 --batch_size=2 --eval_iters=1'
TINY_GPT2 = f'{TINY} --dataset=tiny --wandb_log=False --max_iters=1 --gradient_accumulation_steps=2'
SHORT = {
    'train_gpt2.py': TINY_GPT2,
    'train_gpt2_fast.py': TINY_GPT2,
    'bench.py': f'{TINY} --max_iters=3',
    'train.py': f'{TINY} --max_iters=2',
    'sample.py': '--device=cpu --num_samples=1 --max_new_tokens=5',
}


PAGES = {name: (ROOT / name).read_text(encoding='utf-8') for name in ('README.md', 'README.zh-CN.md')}


def blocks(language, page='README.md'):
    return re.findall(rf'^```{language}\n(.*?)^```', PAGES[page], re.M | re.S)


def commands(page='README.md'):
    """The commands of all sh blocks, in order, those joined by && apart, those on several lines joined."""
    lines = [line for block in blocks('sh', page) for line in block.replace('\\\n', ' ').splitlines()]
    return [part.strip() for line in lines for part in line.split('&&')]


def parse(command):
    """(stdin, ranks, script, arguments) of a command that runs one of our scripts, else None."""
    before, bar, after = command.rpartition(' | ')
    words = shlex.split(after)
    stdin = ' '.join(shlex.split(before)[1:]) + '\n' if bar else ''
    ranks = next((int(word.split('=')[1]) for word in words if word.startswith('--nproc_per_node')), 0)
    at = next((i for i, word in enumerate(words) if word.endswith('.py')), None)
    return None if at is None else (stdin, ranks, words[at], words[at + 1 :])


@pytest.mark.parametrize(
    'command', dict.fromkeys(command for page in PAGES for command in commands(page) if parse(command))
)
def test_keys(monkeypatch, command):
    _, _, script, arguments = parse(command)
    assert command.startswith(('python ', 'torchrun ', 'echo ')) and (ROOT / script).is_file()
    for argument in arguments:
        assert argument.startswith('--') or (ROOT / argument).is_file()
    if '--help' not in arguments:
        configured(monkeypatch, script, *arguments)


@pytest.mark.slow
def test_commands_run(run, house, with_text, bpe):
    """In the order of the page, in one folder: what a command needs, an earlier one has made."""
    (house / 'prompt.txt').write_text('import os\n')
    (house / 'book.txt').write_text(TEXT)
    row = json.dumps({'question': "Who?", 'answer': "The fox."})
    (house / 'faq.jsonl').write_text(f'{row}\n' * 30)
    done = []
    for command in commands():
        if any(re.search(pattern, command) for pattern in NOT_RUN):
            continue
        if command.startswith('python -c '):
            (house / 'one_liner.py').write_text(shlex.split(command)[2], encoding='utf-8')
            stdin, ranks, script, arguments = '', 0, 'one_liner.py', []
        else:  # a command of another kind would need a line in NOT_RUN
            stdin, ranks, script, arguments = parse(command)
        extra = next((words.split() for name, words in SHORT.items() if name in command), [])
        extra = [] if '--help' in arguments or script == 'one_liner.py' else extra
        out = run(script, *arguments, *extra, ranks=ranks, torchrun=ranks > 0, stdin=stdin, cwd=house).stdout
        assert out or 'save_pretrained' in command, command
        assert out.startswith('class ') or 'pipeline' not in command
        done.append(script)
    assert done.count('train.py') >= 6 and done.count('sample.py') >= 5 and done.count('one_liner.py') == 2
    assert 'data/python_char/prepare.py' in done
    ran = 0
    for snippet in blocks('python'):  # in the same folder, where the commands have trained and exported
        imported = [
            name
            for node in ast.walk(ast.parse(snippet))
            for name in (
                [node.module]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
        ]
        packages = [name.split('.')[0] for name in imported]
        if 'torch.onnx' in snippet:
            packages.append('onnxscript')
        if all(name == 'model' or find_spec(name) for name in packages):
            (house / 'snippet.py').write_text(snippet, encoding='utf-8')
            out = run('snippet.py', cwd=house, env={'MPLBACKEND': 'agg'}).stdout
            assert out.startswith('class ') or 'print' not in snippet
            ran += 1
    assert ran >= 2 and (house / 'out-python-char' / 'loss.png').stat().st_size > 1000


def test_pages_agree():
    """The Chinese page has the same commands, the same tables and the same figures as the English one."""
    english, chinese = PAGES.values()
    assert commands('README.md') == commands('README.zh-CN.md')
    assert blocks('python') == blocks('python', 'README.zh-CN.md')
    number = r'\d+(?:[.,]\d+)*'
    tables = [
        [
            (line.count('|'), sorted(re.findall(number, line)))
            for line in page.splitlines()
            if line.startswith('|')
        ]
        for page in (english, chinese)
    ]
    assert tables[0] == tables[1]
    assert set(re.findall(number, english)) == set(re.findall(number, chinese))


def test_line_count():
    """The first figure of the first table counts the lines of the four scripts."""
    lines = sum(
        (ROOT / name).read_text(encoding='utf-8').count('\n')
        for name in ('model.py', 'train.py', 'sample.py', 'configurator.py')
    )
    assert f'| lines in the four scripts | 845 | {lines:,} |' in PAGES['README.md']


@pytest.mark.parametrize('page', PAGES)
def test_links(page):
    """Files and headings that a page links to are there, and every figure has been filled in."""
    text = PAGES[page]
    assert not re.search(r'@[A-Z_]+@', text)
    links = re.findall(r'\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)', text)
    headings = {
        re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-')  # as GitHub names them
        for heading in re.findall(r'^##+ (.*)$', text, re.M)
    }
    assert links and all((ROOT / link).exists() if link else anchor in headings for link, anchor in links)
