"""
Every command and every snippet of README.md, assets/notes.md and data/custom/readme.md, and of the Chinese
pages: its files exist, its keys are real. What of the first two needs neither network nor GPUs nor a package
of its own is run, shortened.
"""

import ast
import json
import re
import shlex
import shutil
from importlib.util import find_spec
from itertools import pairwise

import pytest
from conftest import ROOT, TEXT
from test_config import configured

# Not run here, each for its reason; the keys of all of them are checked nevertheless
NOT_RUN = {
    r'^: |git clone|^cd |python3 -m venv|^\. \.venv|pip install': 'makes an environment: .ci/run does',
    r'^ruff |-m pytest': 'these tests themselves: .ci/run does',
    r'openwebtext/prepare.py': 'network',
    r'finetune_shakespeare|out-shakespeare(-cpu)?$|out-mybook|out-faq|gpt2-xl|eval_gpt2|wikitext': (
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


TRANSLATIONS = {
    'README.md': 'README.zh-CN.md',
    'data/custom/readme.md': 'data/custom/readme.zh-CN.md',
}
PAGES = {name: (ROOT / name).read_text(encoding='utf-8') for pair in TRANSLATIONS.items() for name in pair}
SOURCES = PAGES | {
    name: (ROOT / name).read_text(encoding='utf-8') for name in ('assets/notes.md', 'data/wiki_zh/readme.md')
}


def blocks(language, page='README.md'):
    return re.findall(rf'^```{language}\n(.*?)^```', SOURCES[page], re.M | re.S)


def unrolled(block):
    """The block with each `for name in values; do … done` written out."""

    def repeat(loop):
        name, values, body = loop.groups()
        return '\n'.join(body.replace(f'${name}', value) for value in values.split())

    return re.sub(r'^for (\w+) in (.*?); do\n(.*?)^done$', repeat, block, flags=re.M | re.S)


def commands(page='README.md'):
    """The commands of all sh blocks, in order, those joined by && apart, those on several lines joined."""
    joined = [unrolled(block).replace('\\\n', ' ') for block in blocks('sh', page)]
    parts = [part.strip() for block in joined for line in block.splitlines() for part in line.split('&&')]
    return [part for part in parts if part]


def parse(command):
    """(stdin, ranks, script, arguments) of a command that runs one of our scripts, else None."""
    before, bar, after = command.rpartition(' | ')
    words = shlex.split(after)
    stdin = ' '.join(shlex.split(before)[1:]) + '\n' if bar else ''
    ranks = next((int(word.split('=')[1]) for word in words if word.startswith('--nproc_per_node')), 0)
    at = next((i for i, word in enumerate(words) if word.endswith('.py')), None)
    return None if at is None else (stdin, ranks, words[at], words[at + 1 :])


@pytest.mark.parametrize(
    'command', dict.fromkeys(command for page in SOURCES for command in commands(page) if parse(command))
)
def test_keys(monkeypatch, command):
    _, _, script, arguments = parse(command)
    assert command.startswith(('python ', 'torchrun ', 'echo ')) and (ROOT / script).is_file()
    if script == 'assets/plot.py':
        return
    for argument in arguments:
        assert argument.startswith('--') or (ROOT / argument).is_file()
    if '--help' not in arguments:
        configured(monkeypatch, script, *arguments)


@pytest.mark.slow
def test_commands_run(run, house, with_text, bpe, request):
    """In the order of the page, in one folder: what a command needs, an earlier one has made."""
    (house / 'prompt.txt').write_text('import os\n')
    (house / 'book.txt').write_text(TEXT)
    row = json.dumps({'question': "Who?", 'answer': "The fox."})
    (house / 'faq.jsonl').write_text(f'{row}\n' * 30)
    # Without it, as in the other tests, train.py draws no picture, which would take seconds each time.
    (house / 'assets').mkdir()
    shutil.copy(ROOT / 'assets' / 'plot.py', house / 'assets')
    request.addfinalizer(lambda: shutil.rmtree(house / 'assets'))
    done = []
    for command in commands() + commands('assets/notes.md'):
        if any(re.search(pattern, command) for pattern in NOT_RUN):
            continue
        if command.startswith('python -c '):
            (house / 'one_liner.py').write_text(shlex.split(command)[2], encoding='utf-8')
            stdin, ranks, script, arguments = '', 0, 'one_liner.py', []
        else:  # a command of another kind would need a line in NOT_RUN
            stdin, ranks, script, arguments = parse(command)
            if script == 'assets/plot.py':
                arguments = sorted(path.name for argument in arguments for path in house.glob(argument))
        extra = next((words.split() for name, words in SHORT.items() if name in command), [])
        extra = [] if '--help' in arguments or script == 'one_liner.py' else extra
        out = run(script, *arguments, *extra, ranks=ranks, torchrun=ranks > 0, stdin=stdin, cwd=house).stdout
        assert out or 'save_pretrained' in command, command
        assert out.startswith('class ') or 'pipeline' not in command
        done.append(script)
    assert done.count('train.py') >= 6 and done.count('sample.py') >= 5 and done.count('one_liner.py') == 2
    assert 'data/python_char/prepare.py' in done
    ran = 0
    # In the same folder, where the commands have trained and exported
    for snippet in blocks('python') + blocks('python', 'assets/notes.md'):
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
        if 'torch.utils.tensorboard' in snippet:
            packages.append('tensorboard')
        if all(name == 'model' or find_spec(name) for name in packages):
            (house / 'snippet.py').write_text(snippet, encoding='utf-8')
            out = run('snippet.py', cwd=house, env={'MPLBACKEND': 'agg'}).stdout
            assert out.startswith('class ') or 'print' not in snippet
            ran += 1
    assert ran >= 1 and (house / 'out-python-char' / 'loss.png').stat().st_size > 1000


def test_own_ids(run, house):
    """The snippet and the two commands of data/custom/readme.md for ids that are no text, in this order."""
    page = 'data/custom/readme.md'
    (house / 'chess.py').write_text(*blocks('python', page), encoding='utf-8')
    run('chess.py', cwd=house)
    train, sample = [command for command in commands(page) if 'chess' in command]
    _, _, script, arguments = parse(train)
    out = run(script, *arguments, *SHORT['train.py'].split(), cwd=house).stdout
    assert 'vocabulary 8; ' in out and "GPT-2's" not in out
    _, _, script, arguments = parse(sample)
    out = run(script, *arguments, *SHORT['sample.py'].split(), cwd=house).stdout
    assert re.fullmatch(r'2 3( [0-7]){5}\n---------------\n', out)


@pytest.mark.parametrize('name', TRANSLATIONS)
def test_pages_agree(name):
    """The Chinese page has the same commands, the same tables and the same figures as the English one. What
    it needs for itself, such as mirrors, stands in bash blocks.
    """
    translation = TRANSLATIONS[name]
    assert commands(name) == commands(translation)
    assert blocks('python', name) == blocks('python', translation)
    english, chinese = (
        re.sub(r'^```bash\n.*?^```', '', PAGES[page], flags=re.M | re.S) for page in (name, translation)
    )
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


def test_length():
    """README.md stays a page that a person reads: what is new there takes the place of something."""
    assert len(PAGES['README.md'].split()) <= 2400


def anchors(text):
    """The names of the headings of a page, as GitHub makes them."""
    return {
        re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-')
        for heading in re.findall(r'^##+ (.*)$', text, re.M)
    }


@pytest.mark.parametrize('page', PAGES)
def test_links(page):
    """Files and headings that a page links to are there, and every figure has been filled in."""
    text = PAGES[page]
    assert not re.search(r'@[A-Z_]+@', text)
    folder = (ROOT / page).parent
    links = re.findall(r'\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)', text)
    assert links
    for link, anchor in links:
        assert not link or (folder / link).exists()
        assert not anchor or anchor in anchors((folder / link).read_text(encoding='utf-8') if link else text)


@pytest.mark.parametrize('page', TRANSLATIONS.values())
def test_one_line(page):
    """A paragraph of Chinese is one line: browsers show its end as a blank, which Chinese has not."""
    text = re.sub(r'^```.*?^```', '', PAGES[page], flags=re.M | re.S)
    lines = text.splitlines()
    continued = [line for before, line in pairwise(lines) if before and re.match(r'[^|#-]', line)]
    assert not continued


def test_mirrors():
    """The block for networks in China has the commands of the first block, with downloads from elsewhere."""
    first, *_ = blocks('sh', 'README.zh-CN.md')
    mirrored, *_ = blocks('bash', 'README.zh-CN.md')

    def steps(block):
        lines = [line.strip(' &\\') for line in block.splitlines()]
        return [line for line in lines if not re.match(r': #|export |pip install torch==', line)]

    assert steps(first) == steps(mirrored) and 'python train.py' in mirrored
