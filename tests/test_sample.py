"""sample.py: what it prints, and what decides it."""

import io
import os
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import DEVICE, MACHINE, PLACE, TRACED
from reference import gpt_logits

from data.tokenizer import EOT, Tokenizer, char_tokenizer, read_tokenizer_spec, train_bpe
from model import GPT, GPTConfig, read_checkpoint

END = '---------------\n'


@pytest.fixture(scope='module')
def trained(house, tmp_path_factory):
    """A folder with out/ckpt.pt, a model that has learnt the words of the data set 'tiny'."""
    spec = read_tokenizer_spec(house / 'data' / 'tiny')
    ids = torch.from_numpy(np.fromfile(house / 'data' / 'tiny' / 'train.bin', dtype='<u2').astype(np.int64))
    windows = ids.unfold(0, 17, 1)
    torch.manual_seed(0)
    net = GPT(GPTConfig(16, len(spec['itos']), 2, 2, 32, bias=False))
    optim = net.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    for _ in range(60):
        batch = windows[torch.randint(len(windows), (8,))]
        net(batch[:, :-1], batch[:, 1:])[1].backward()
        optim.step()
        optim.zero_grad()
    folder = tmp_path_factory.mktemp('trained')
    (folder / 'out').mkdir()
    torch.save(
        {
            'model': net.state_dict(),
            'model_args': vars(net.config),
            'iter_num': 60,
            'config': {'dataset': 'tiny'},
            'tokenizer': spec,
        },
        folder / 'out' / 'ckpt.pt',
    )
    return folder


def texts(out):
    assert out.endswith(END)
    return [text.removesuffix('\n') for text in out.split(END)[:-1]]


@pytest.fixture
def sample(house, trained, monkeypatch, capsys):
    """sample('--key=value', …) runs sample.py in this process, which starts no other, in the folder
    `trained`; returns its texts. sample.out and sample.err are what it has written.
    """

    def sample(*arguments, script='sample.py', stdin='', cwd=trained):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # the configurator has one
        monkeypatch.setattr(sys, 'argv', [script, *MACHINE, *arguments])
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding='utf-8'))
        runpy.run_path(str(house / script), run_name='__main__')
        sample.out, sample.err = capsys.readouterr()
        return texts(sample.out)

    return sample


def test_greedy_text(sample, trained):
    """temperature 0 is the plain argmax loop, up to block_size."""
    checkpoint = read_checkpoint(trained / 'out' / 'ckpt.pt')
    tokenizer = Tokenizer(checkpoint['tokenizer'])
    ids = tokenizer.encode('the ')
    for _ in range(12):
        logits = gpt_logits(checkpoint['model'], checkpoint['model_args'], torch.tensor([ids]))
        ids.append(logits[0, -1].argmax().item())
    got = sample('--start=the ', '--temperature=0', '--max_new_tokens=12', '--num_samples=2')
    assert got == [tokenizer.decode(ids)] * 2


def test_sample_i_is_its_own(sample):
    """The text of sample i depends on (seed, i): not on num_samples, not on streaming."""
    three = sample('--num_samples=3', '--max_new_tokens=30')
    # the newline of the default start, then 30 characters
    assert len(set(three)) == 3 and all(len(text) == 31 and text[0] == '\n' for text in three)
    assert sample('--num_samples=2', '--max_new_tokens=30') == three[:2]
    assert sample('--num_samples=3', '--max_new_tokens=30', '--stream=True') == three
    assert sample('--num_samples=3', '--max_new_tokens=30', '--seed=7') != three
    greedy = sample('--num_samples=1', '--max_new_tokens=30', '--temperature=0')
    for how in (['--top_k=1'], ['--top_p=0.0001', '--top_k=None']):
        assert sample('--num_samples=1', '--max_new_tokens=30', *how) == greedy != three[:1]


@pytest.mark.slow
def test_memory_splits_the_batch(sample, house):
    """Where memory is short the samples come in several batches, and are the same."""
    source = (house / 'sample.py').read_text(encoding='utf-8')
    short = source.replace('memory // 2 // row_bytes', '480_000 // row_bytes')  # room for 4 samples
    assert short != source
    (house / 'short.py').write_text(short, encoding='utf-8')
    for how in (['--num_samples=9'], ['--num_samples=9', '--stop=the', '--stream=True'], ['--num_samples=1']):
        n = int(how[0].split('=')[1])
        got = sample('--max_new_tokens=30', *how)
        assert len(got) == n and sample('--max_new_tokens=30', *how, script='short.py') == got
        assert f"prefill {3 if n == 9 else 1} tokens in" in sample.err  # of one token each


def test_alphabet_without_a_newline(run, tmp_path):
    """The command that train.py prints has the default prompt, a newline: such a model starts from id 0."""
    net = GPT(GPTConfig(16, 3, 1, 1, 8))
    torch.save(
        {
            'model': net.state_dict(),
            'model_args': vars(net.config),
            'iter_num': 1,
            'config': {},
            'tokenizer': char_tokenizer('abc').spec,
        },
        tmp_path / 'ckpt.pt',
    )
    how = ['--out_dir=.', *MACHINE, '--num_samples=1', '--max_new_tokens=9']
    assert re.fullmatch(r'\n[abc]{9}\n-+\n', run('sample.py', *how).stdout)
    assert "does not know the character '\\n'" in run('sample.py', *how, '--start=a\nb', status=1)


def test_folder_with_a_checkpoint(run, tmp_path, trained):
    """--init_from takes a folder with a checkpoint, or the file, as --out_dir does; no other folder."""
    how = [*MACHINE, '--num_samples=1', '--max_new_tokens=20']
    want = run('sample.py', *how, cwd=trained).stdout
    for path in ('out', 'out/ckpt.pt'):
        assert run('sample.py', *how, f'--init_from={path}', cwd=trained).stdout == want
    words = run('sample.py', *how, '--init_from=nowhere', status=1)
    assert words.startswith("init_from 'nowhere' is no folder with a checkpoint or a GPT-2 of transformers")


def test_speeds(sample):
    """Prefill and decode apart, on stderr; the first new token comes out of prefill."""
    sample('--num_samples=3', '--start=the ', '--max_new_tokens=11')
    speed = r'tokens in [\d.]+ s, \d+ tok/s; '
    assert re.search(rf'^prefill 4 {speed}decode 30 {speed}{PLACE}\n\Z', sample.err, re.M)


def test_stop(sample):
    """A sample ends before the stop text, streamed or not; one that never meets it has its full length."""
    plain = sample('--num_samples=4', '--max_new_tokens=40')
    want = [text[0] + text[1:].partition('the')[0] for text in plain]
    assert want != plain
    for stream in ('False', 'True'):
        how = ['--num_samples=4', '--max_new_tokens=40', f'--stream={stream}']
        assert sample(*how, '--stop=the') == want
        assert sample(*how, '--stop=<|endoftext|>') == plain
    sample('--num_samples=4', '--max_new_tokens=2000', '--stop=the')  # the batch ends when all samples have
    assert int(re.search(r'decode (\d+) tokens', sample.err)[1]) < 4 * 1000


@pytest.fixture
def ending(trained, tmp_path):
    """A folder with the model of `trained`, whose character ' ' is the end token now. Its name is ' '."""
    checkpoint = torch.load(trained / 'out' / 'ckpt.pt', 'cpu', weights_only=True)
    stoi = {{' ': EOT}.get(c, c): i for c, i in checkpoint['tokenizer']['stoi'].items()}
    checkpoint['tokenizer'].update(stoi=stoi, itos={i: c for c, i in stoi.items()})
    (tmp_path / 'out').mkdir()
    torch.save(checkpoint, tmp_path / 'out' / 'ckpt.pt')
    return tmp_path


def test_end_token(sample, ending):
    """A sample ends at the end token, which is not printed; that of the prompt does not count. With
    ignore_eos=True it goes on. The batch ends with its last sample.
    """
    how = ['--num_samples=4', '--max_new_tokens=40', f'--start=the{EOT}']
    plain = sample(*how, '--ignore_eos=True', cwd=ending)
    assert all(text.count(EOT) > 2 for text in plain)
    want = [EOT.join(text.split(EOT)[:2]) for text in plain]
    assert sample(*how, cwd=ending) == sample(*how, '--stream=True', cwd=ending) == want
    assert sample(*how[::2], '--max_new_tokens=2000', cwd=ending) == want
    assert int(re.search(r'decode (\d+) tokens', sample.err)[1]) < 4 * 100

    # Whatever comes first ends a sample. The end token is a text for `stop` too.
    stopped = [text[: 16 + (text[16:] + 'e').index('e')] for text in want]
    assert sample(*how, '--stop=e', cwd=ending) == stopped != want
    assert sample(*how, '--ignore_eos=True', f'--stop={EOT}', cwd=ending) == want


def test_stream(sample, monkeypatch):
    """The text comes token by token; without stream a sample comes in one piece."""
    pieces, write = [], io.TextIOWrapper.write
    for stream in ('True', 'False'):
        seen = []

        class Stdout(io.TextIOWrapper):
            def write(self, text, seen=seen):
                seen.append(text)
                return write(self, text)

        monkeypatch.setattr(sys, 'stdout', Stdout(io.BytesIO(), encoding='utf-8'))
        with pytest.raises(AssertionError):  # nothing reached the stdout that is captured
            sample('--num_samples=2', '--max_new_tokens=9', '--start=the ', f'--stream={stream}')
        monkeypatch.undo()
        pieces.append([text for text in seen if text and not text.endswith(END)])
    assert [len(text) for text in pieces[0]] == [5, *[1] * 8, 13]  # the second sample was ready by then
    assert [len(text) for text in pieces[1]] == [13, 13] and ''.join(pieces[0]) == ''.join(pieces[1])


def test_prompts(sample, tmp_path):
    """Text, FILE:path, standard input, nothing (a newline for characters), one longer than the window."""
    (tmp_path / 'prompt.txt').write_text('the lazy dog ')
    common = ['--num_samples=1', '--max_new_tokens=8', '--temperature=0']
    text = sample('--start=the lazy dog ', *common)
    assert text[0].startswith('the lazy dog ') and len(text[0]) == 21
    assert sample(f'--start=FILE:{tmp_path / "prompt.txt"}', *common) == text
    assert sample('--start=-', *common, stdin='the lazy dog ') == text
    assert sample('--start=', *common)[0] == sample(*common)[0].removeprefix('\n')

    # Backslashes are for the command line: a newline, a tab and a backslash.
    assert sample(r'--start=the\nlazy', *common)[0].startswith('the\nlazy')
    assert sample(r'--start=the\nlazy', *common) == sample('--start=-', *common, stdin='the\nlazy\n')
    (tmp_path / 'prompt.txt').write_text(r'the\n')
    for how, stdin in ((f'--start=FILE:{tmp_path / "prompt.txt"}', ''), ('--start=-', r'the\n')):
        with pytest.raises(ValueError, match=r"does not know the character '\\\\'"):
            sample(how, *common, stdin=stdin)
    line, *_ = sample('--start=the lazy dog ', *common[:1], '--max_new_tokens=60')[0].split('\n')
    assert sample('--start=the lazy dog ', *common[:1], '--max_new_tokens=60', r'--stop=\n') == [line]

    long = 'the quick fox jumps over the fence, and '
    assert sample(f'--start={long}', *common)[0].startswith(long)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_dtypes(sample, dtype):
    """Every precision runs and still writes words."""
    assert 'the' in sample(f'--dtype={dtype}', '--num_samples=1', '--max_new_tokens=60')[0]
    assert sample.err.endswith(f'; {DEVICE}, {dtype}\n')


def test_last_checkpoint(sample, trained, tmp_path, monkeypatch):
    """A run that was ended before its first ckpt.pt left a last.pt alone; it can be sampled from. Beside a
    ckpt.pt it is taken where it is named. stderr tells which file it was, and of which iteration.
    """
    monkeypatch.delenv('RANK', raising=False)
    best, last = (tmp_path / 'out' / name for name in ('ckpt.pt', 'last.pt'))
    best.parent.mkdir()
    last.write_bytes((trained / 'out' / 'ckpt.pt').read_bytes())
    how = ['--num_samples=1', '--max_new_tokens=20']
    text = sample(*how)

    def line():
        return sample.err.splitlines()[0]

    assert line() == 'out/ckpt.pt: weights of iteration 60'
    assert sample(*how, cwd=tmp_path) == text
    assert line() == 'out/last.pt: weights of iteration 60' and 'newer' not in sample.err
    other = torch.load(last, 'cpu', weights_only=True)
    other['model'] = {name: p * 0.5 for name, p in other['model'].items()}
    torch.save({**other, 'iter_num': 40}, best)
    assert sample(*how, cwd=tmp_path) != text
    assert line() == 'out/ckpt.pt: weights of iteration 40; out/last.pt is newer'
    assert sample(*how, '--out_dir=out/last.pt', cwd=tmp_path) == text
    assert line() == 'out/last.pt: weights of iteration 60'
    monkeypatch.setenv('RANK', '1')
    assert sample(*how, '--out_dir=out/last.pt', cwd=tmp_path) == text and line().startswith('prefill')


@pytest.mark.skipif(os.name != 'posix', reason='pipes of POSIX systems')
def test_nobody_reads(start, trained, tmp_path):
    """python sample.py … | head: it ends, and says no word about that."""
    errors = tmp_path / 'errors'
    errors.write_text('')
    process = start(
        *MACHINE,
        f'--out_dir={trained / "out"}',
        '--num_samples=1',
        '--max_new_tokens=100000',
        '--stream=True',
        script='sample.py',
        stderr=errors,
    )
    assert process.stdout.read(10)
    process.stdout.close()
    assert process.wait(60) == 1
    assert errors.read_text() == f'{trained / "out" / "ckpt.pt"}: weights of iteration 60\n'


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='a disk that is always full')
def test_full_disk_and_memory(run, start, trained, tmp_path):
    """Both are one line and status 1. A traceback came with the second."""
    errors = tmp_path / 'errors'
    errors.write_text('')
    how = [*MACHINE, f'--out_dir={trained / "out"}', '--num_samples=1']
    process = start(*how, script='sample.py', stdout='/dev/full', stderr=errors, real=True)
    assert process.wait(60) == 1
    assert errors.read_text().splitlines()[1:] == [
        'stdout: No space left on device; make room and run it again'
    ]
    words = run('sample.py', *how, f'--max_new_tokens={10**14}', status=1)  # 400 TB: beyond any address
    assert words == f'out of memory on {DEVICE}: fewer --num_samples or --max_new_tokens\n'


@pytest.mark.slow
@pytest.mark.skipif(os.name != 'posix', reason='a POSIX shell')
def test_closed_streams(house, trained):
    """`>&-` and `<&-`: nothing to write to or to read from is no error."""
    command = f'"{sys.executable}" "{house / "sample.py"}" --device=cpu --num_samples=1 --max_new_tokens=3'
    for streams in ('--start=- <&- >&-', '2>&-'):
        done = subprocess.run(f'{command} {streams}', shell=True, cwd=trained, capture_output=True, text=True)
        assert done.returncode == 0 and 'Traceback' not in done.stderr
        assert len(done.stdout) == (21 if streams == '2>&-' else 0)


def test_console_without_a_character(sample, trained, tmp_path, monkeypatch):
    """An old console that has no Chinese shows '?' in its place, and the text goes on."""
    checkpoint = torch.load(trained / 'out' / 'ckpt.pt', 'cpu', weights_only=True)
    stoi = {{'q': '日'}.get(c, c): i for c, i in checkpoint['tokenizer']['stoi'].items()}
    checkpoint['tokenizer'].update(stoi=stoi, itos={i: c for c, i in stoi.items()})
    (tmp_path / 'out').mkdir()
    torch.save(checkpoint, tmp_path / 'out' / 'ckpt.pt')
    how = ['--start=the 日uick ', '--num_samples=1', '--max_new_tokens=20', '--temperature=0']
    (want,) = sample(*how, cwd=tmp_path)
    console = io.TextIOWrapper(io.BytesIO(), encoding='cp437')
    monkeypatch.setattr(sys, 'stdout', console)
    with pytest.raises(AssertionError):  # nothing reached the stdout that is captured
        sample(*how, cwd=tmp_path)
    assert console.buffer.getvalue().decode('cp437') == want.replace('日', '?') + '\n' + END


@pytest.mark.slow
def test_whole_characters(sample, tmp_path):
    """A character of several tokens appears whole in a stream, and broken bytes as without streaming."""
    torch.manual_seed(0)
    net = GPT(GPTConfig(block_size=64, vocab_size=320, n_layer=1, n_head=1, n_embd=8))
    (tmp_path / 'out').mkdir()
    torch.save(
        {'model': net.state_dict(), 'model_args': vars(net.config), 'tokenizer': train_bpe([], 257).spec},
        tmp_path / 'out' / 'ckpt.pt',
    )
    how = ['--start=日本🦊', '--num_samples=2', '--max_new_tokens=200', '--temperature=1', '--top_k=0']
    plain = sample(*how, cwd=tmp_path)
    assert any(127 < ord(c) != 0xFFFD for text in plain for c in text[3:])  # two bytes made a character
    assert sample(*how, '--stream=True', cwd=tmp_path) == plain


@pytest.mark.slow
def test_compile(run, trained):
    """Compiled with static shapes, the text stays. (It would if decode failed to compile and ran eager.)"""
    how = [*MACHINE, '--num_samples=2', '--max_new_tokens=20', '--start=the lazy dog ']
    plain, compiled = (run('sample.py', *how, f'--compile={value}', cwd=trained) for value in (False, True))
    assert 'running eager' not in compiled.stderr or not shutil.which('g++')
    assert len(texts(compiled.stdout)) == 2 and compiled.stdout == plain.stdout


@pytest.mark.slow
def test_one_graph(run, trained, altered):
    """One graph of decode serves all positions, batches and windows, with a cache of 64 positions or a
    multiple: CUDA's attention would pad a mask of another length anew at every step.
    """
    script = altered(
        TRACED
        + """
import model
new_cache = model.GPT.new_cache
model.GPT.new_cache = lambda net, *shape: print('cache', *shape) or new_cache(net, *shape)""",
        'sample.py',
    )
    for dtype in ('float32', 'bfloat16'):
        out = run(
            script,
            '--device=cpu',
            f'--dtype={dtype}',
            '--num_samples=2',
            '--max_new_tokens=40',
            '--compile=True',
            cwd=trained,
        ).stdout
        assert 'cache 2 64\na graph\n' in out and out.count('a graph') == 1 and out.count(END) == 2


@pytest.mark.slow
def test_process(run, sample, trained):
    """As a process of its own: the text alone on stdout, as UTF-8, from a prompt on stdin."""
    how = ['--num_samples=2', '--max_new_tokens=20', '--start=-']
    done = run('sample.py', *MACHINE, *how, stdin='the lazy ', cwd=trained)
    assert texts(done.stdout) == sample(*how, stdin='the lazy ')
    first, second = done.stderr.splitlines()
    assert first == 'out/ckpt.pt: weights of iteration 60' and second.startswith('prefill 9 tokens')


@pytest.mark.slow
def test_nanogpt_checkpoint(run, sample, trained, tmp_path):
    """One without a tokenizer finds it in data/NAME/meta.pkl, and without that names what to do."""
    checkpoint = torch.load(trained / 'out' / 'ckpt.pt', 'cpu', weights_only=True)
    del checkpoint['tokenizer']
    (tmp_path / 'out').mkdir()
    torch.save(checkpoint, tmp_path / 'out' / 'ckpt.pt')
    how = ['--num_samples=1', '--max_new_tokens=20']
    assert texts(run('sample.py', *MACHINE, *how, cwd=tmp_path).stdout) == sample(*how)
    checkpoint['config']['dataset'] = 'elsewhere'
    torch.save(checkpoint, tmp_path / 'out' / 'ckpt.pt')
    error = run('sample.py', status=1, cwd=tmp_path)
    assert re.search('no tokenizer.json or meta.pkl of that size .*: put it into .*elsewhere$', error)


@pytest.mark.slow
def test_transformers_folder(sample, tmp_path, bpe):
    """GPT-2's encoding for a folder without a tokenizer; greedy text as transformers' own, from
    <|endoftext|> where nothing is given.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=32, initializer_range=1.0)
    theirs = GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / 'gpt2')
    for start in ('Hello, world', ''):
        ids = torch.tensor([bpe.encode(start) or [50256]])
        want = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=50256,
        )
        got = sample(
            f'--init_from={tmp_path / "gpt2"}',
            f'--start={start}',
            '--temperature=0',
            '--num_samples=1',
            '--max_new_tokens=12',
        )
        assert got == [start + bpe.decode(want[0, ids.size(1) :].tolist())]
