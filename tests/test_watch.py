"""What a person sees of a run while it trains: its lines, a smoothed loss, texts, a picture, warnings."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import tempfile
import time

import numpy as np
import pytest
import torch
from conftest import MACHINE, ROOT, SMALL, TRACED, wait_for
from test_survival import load, metrics
from test_talk import FAKE_WANDB, on_screen

from data.common import encode_parts, write_bins, write_characters
from data.tokenizer import EOT, char_tokenizer, needs_download
from model import GPT, sample_next_token

slow = pytest.mark.slow
posix = pytest.mark.skipif(os.name != 'posix', reason="signals and pseudo-terminals are POSIX's")

# a schedule that fits SMALL's length, so that no line speaks of it
FITTING = ['--max_iters=5', '--lr_decay_iters=5']


# code for `altered`: a clock by which every micro-batch takes so many seconds, and nothing else any time
def hurried(seconds):
    return f"""
import model, time
forward, now = model.GPT.forward, 0.0
def slow_forward(self, *arguments, **how):
    global now
    now += {seconds}
    return forward(self, *arguments, **how)
model.GPT.forward = slow_forward
time.perf_counter = lambda: now
"""


def beginnings(out):
    """What the lines of a run begin with, up to their first figure or colon; not those of texts."""
    return [re.split(r'[:\d]', line)[0] for line in out.splitlines() if line[:1].strip()]


def records(folder, kind):
    """The lines of metrics.jsonl of one kind."""
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [line for line in lines if line['kind'] == kind]


# -----------------------------------------------------------------------------
# the lines


def test_lines_fit(run, altered):
    """No line of a terminal with 80 columns wraps, also not the longest log line. Log lines of 81 and 82
    characters did, from iteration 100 on. An ordinary run has no line but these.
    """
    longest = altered(
        '',
        after="""
run = scope['duration'].__globals__  # runpy returns a copy of it
print(*map(run['duration'], (0, 59.6, 3599.7, 5025, 86399.7, 600000)))
log, now, done = run['log'], 1e6, 600000
run['time'] = type('time', (), {'perf_counter': lambda: now})
run.update(max_iters=650000, tokens_per_iter=489000 * 12.34567)
log.clock, log.clock_iter = now - 12.34567, done - 1
log.first_clock = now - 600000 * done / 50000
run['state'].iter_num = done - 1
for utilization in (None, 0.411):
    sequences = run['tokens_per_iter'] / run['block_size']
    flops = run['model'].estimate_mfu(sequences, 12.34567, 1.0)
    run['peak_flops'] = utilization and flops / utilization
    log.step(10.9873, 1.0)
    log.clock, log.clock_iter = now - 12.34567, done - 1
""",
    )
    out = run(longest, *SMALL, *FITTING, '--sample_tokens=9').stdout
    *lines, command, durations, without, extreme = out.splitlines()
    assert durations == '0m00s 1m00s 1h00m 1h23m 1d00h 6d22h'
    assert extreme == ('iter 599999: loss 10.9873, time 12345.67ms, mfu 41.10%, 489k tok/s, 6d22h left')
    assert without == extreme.replace('mfu 41.10%, ', '')
    assert max(map(len, [*lines, extreme])) <= 79, out
    assert command.startswith('sample from it: python ')  # its length is that of the folder's name
    assert beginnings('\n'.join(lines)) == [
        'tokens per iteration will be',
        'a new model',
        'data/tiny',
        '',  # a number of iterations
        'step ',
        *5 * ['iter '],
        'step ',
        'best val loss ',
    ]


# -----------------------------------------------------------------------------
# the smoothed loss


@pytest.mark.parametrize('log_interval', [1, pytest.param(3, marks=slow)])
def test_smoothed_loss(run, tmp_path, log_interval):
    """The mean of all logged losses so far, each with half the weight of one five log lines later. A stop
    changes no digit of it, whether or not it comes at a log line.
    """
    how = [*SMALL, f'--log_interval={log_interval}', '--eval_interval=1000', '--eval_iters=1']
    how += ['--n_layer=1', '--gradient_accumulation_steps=1']
    run('train.py', *how, '--max_iters=47', '--out_dir=whole')
    lines = records(tmp_path / 'whole', 'train')
    assert [line['iter'] for line in lines] == list(range(0, 47, log_interval))
    for line in lines:
        past = [other for other in lines if other['iter'] <= line['iter']]
        weights = [0.5 ** ((line['iter'] - other['iter']) / log_interval / 5) for other in past]
        want = np.average([other['loss'] for other in past], weights=weights)
        assert line['smoothed_loss'] == pytest.approx(want, abs=1e-9)
    assert load(tmp_path / 'whole')['smoothed_loss'] == lines[-1]['smoothed_loss']

    run('train.py', *how, '--max_iters=26')
    run('train.py', '--init_from=resume', *MACHINE, '--max_iters=47')
    smoothed = [line['smoothed_loss'] for line in records(tmp_path / 'out', 'train')]
    assert smoothed == [line['smoothed_loss'] for line in lines]


@slow
def test_checkpoint_without_a_smoothed_loss(run, tmp_path):
    """Those of nanoGPT and of earlier versions have none: it begins with the first loss of the resumed run,
    and goes on with the usual weights.
    """
    run('train.py', *SMALL)
    saved = load(tmp_path / 'out')
    for key in ('smoothed_loss', 'tokens', 'scaler', 'tokenizer', 'data_digest'):
        del saved[key]
    torch.save(saved, tmp_path / 'out' / 'ckpt.pt')
    run('train.py', '--init_from=resume', *MACHINE, '--max_iters=12')
    lines = records(tmp_path / 'out', 'train')[5:]
    assert lines[0]['smoothed_loss'] == lines[0]['loss']
    for before, line in zip(lines, lines[1:], strict=False):
        low, high = sorted((before['smoothed_loss'], line['loss']))
        assert low < line['smoothed_loss'] < high


# -----------------------------------------------------------------------------
# texts


@pytest.fixture
def ended(house):
    """The data set 'ended', of short documents: nine characters, <|endoftext|> as the tenth token."""
    folder = house / 'data' / 'ended'
    folder.mkdir(exist_ok=True)
    tokenizer = char_tokenizer([*'abcdefghi', EOT])
    parts = [(text, True) for text in ['bad', None, 'cafe', None, 'high', None, 'idea', None] * 100]
    ids = encode_parts(tokenizer, parts)
    write_bins(folder, tokenizer, [ids], [ids])


def plain_text(checkpoint, count, seed=1337):
    """What the model of a checkpoint writes, without a cache: all of the window is read for every token."""
    model = GPT.from_checkpoint(checkpoint)
    tokenizer, block_size = model.tokenizer(), model.config.block_size
    draws = np.random.default_rng((seed, 5, 0, 0)).random((1, count), dtype=np.float32)
    ids, first = [tokenizer.bos], 0
    for u in torch.from_numpy(draws[0]):
        if len(ids) - first > block_size:  # the window is full, and moves on by half its size
            first = len(ids) - block_size // 2
        with torch.no_grad():
            logits, _ = model(torch.tensor([ids[first:]]))
        logits = logits[:, -1, : tokenizer.vocab_size]
        token = sample_next_token(logits, u.view(1, 1), temperature=0.8, top_k=200).item()
        if token == tokenizer.eot:
            break
        ids.append(token)
    return tokenizer.decode(ids[1:])


def printed_texts(out):
    """{iteration: the text that stands behind its step line}, without the two spaces of each line."""
    texts = {}
    for piece in re.split('^step ', out, flags=re.M)[1:]:
        iteration, *lines = re.split('\n', piece)
        count = next(i for i, line in enumerate(lines) if not line.startswith('  '))
        texts[int(iteration.partition(':')[0])] = '\n'.join(line[2:] for line in lines[:count])
    return texts


@pytest.mark.parametrize('dataset', ['tiny', 'ended', pytest.param('bare', marks=slow)])
def test_texts(run, altered, tmp_path, request, dataset, ended):
    """Behind each evaluation stands what the model of that moment writes, to its <|endoftext|>; metrics.jsonl
    and wandb have the same text.
    """
    if dataset == 'bare':  # in GPT-2's encoding
        request.getfixturevalue('bpe')
    out = run(
        altered(FAKE_WANDB),
        *SMALL,
        f'--dataset={dataset}',
        '--eval_interval=10',
        '--max_iters=20',
        '--keep_checkpoints=9',
        '--sample_tokens=50',
        '--wandb_log=True',
    ).stdout
    texts = {line['iter']: line['sample'] for line in records(tmp_path / 'out', 'eval')}
    assert list(texts) == [0, 10, 20] and printed_texts(out) == texts
    assert len(set(texts.values())) == 3
    for iteration in (10, 20):
        assert texts[iteration] == plain_text(tmp_path / 'out' / f'ckpt-{iteration}.pt', 50)
    if dataset == 'tiny':
        assert all(len(text) == 50 for text in texts.values())
    if dataset == 'ended':
        assert all(0 < len(text) < 50 and EOT not in text for text in texts.values())
    logged = [json.loads(line) for line in re.findall('^logged (.*)$', out, re.M)]
    assert {line['iter']: line['sample'] for line in logged if 'sample' in line} == texts


@pytest.mark.parametrize(
    'how',
    [
        ['--dropout=0.2'],
        pytest.param(['--dtype=bfloat16', '--dropout=0.2'], marks=slow),
        pytest.param(['--compile=True'], marks=slow),
        pytest.param(['ranks'], marks=slow),
    ],
)
def test_texts_change_no_digit(run, altered, tmp_path, how):
    """A run that writes texts has the losses and the weights of one without, and compiles nothing more."""
    script = altered(TRACED)
    ranks = 2 if how == ['ranks'] else 0
    keys = [key for key in how if key != 'ranks']
    if how == ['--compile=True']:
        keys += ['--n_layer=1', '--max_iters=2']
    graphs = []
    for count in (0, 50):
        out = run(script, *SMALL, *keys, f'--out_dir={count}', f'--sample_tokens={count}', ranks=ranks).stdout
        graphs.append(out.count('a graph\n'))
    lines = metrics(tmp_path / '50')
    texts = [line.pop('sample') for line in lines if line['kind'] == 'eval']
    assert lines == metrics(tmp_path / '0') and graphs[0] == graphs[1]
    assert (graphs[0] > 0) == (how == ['--compile=True'])
    assert texts == list(printed_texts(out).values()) and len(texts) == 2
    assert texts[1] == plain_text(tmp_path / '50', 50)
    weights, others = (load(tmp_path / name)['model'] for name in ('0', '50'))
    assert all(torch.equal(p, others[name]) for name, p in weights.items())


@slow
def test_no_texts(run, house, tmp_path):
    """None where nobody asked for them or only for an evaluation, for a model without the token that a text
    begins with, and for one that is ruined. No line speaks of it.
    """
    run('train.py', *SMALL)
    saved = load(tmp_path / 'out')
    for key in ('tokenizer', 'data_digest'):  # as nanoGPT's, and its meta.pkl was lost
        del saved[key]
    (tmp_path / 'old').mkdir()
    torch.save(saved, tmp_path / 'old' / 'ckpt.pt')

    how = '--sample_tokens=50'
    again = ['--init_from=resume', *MACHINE, how]
    nowhere = {'TIKTOKEN_CACHE_DIR': str(tmp_path / 'empty')}
    outs = [
        run('train.py', *SMALL, '--dataset=bare', '--max_iters=1', '--out_dir=a', env=nowhere).stdout,
        run('train.py', *SMALL, how, '--dataset=None', '--max_iters=2', env=nowhere).stdout,
        run('train.py', *again, '--eval_only=True').stdout,
        run('train.py', *again, '--dataset=bare', '--max_iters=7', '--out_dir=old').stdout,
    ]
    for out in outs:
        assert not re.search('^(  |no sample)', out, re.M), out
    lines = [line for name in ('a', 'old') for line in records(tmp_path / name, 'eval')]
    assert len(lines) == 4 and not any('sample' in line for line in lines)

    ruin = ['--learning_rate=1e18', '--min_lr=1e18', '--max_iters=60', '--log_interval=40']
    words = run('train.py', *again, *ruin, '--eval_interval=7', status=1)
    assert words.startswith('iteration 7: the loss is not finite')


def test_no_network_for_texts(run, altered, tmp_path):
    """GPT-2's files are not downloaded for them: where they are missing, one line says so at the start."""
    script = altered("""
import socket
def reach(*arguments, **how):
    print('reaches for the network')
    raise OSError('no network')
socket.getaddrinfo = reach""")
    env = {'TIKTOKEN_CACHE_DIR': str(tmp_path / 'empty')}
    how = ['--dataset=bare', '--max_iters=1', '--lr_decay_iters=1', '--n_layer=1', '--eval_iters=1']
    out = run(script, *SMALL, *how, '--sample_tokens=50', env=env).stdout
    line = "no samples while it trains: GPT-2's BPE files are not here; `python sample.py` downloads them\n"
    assert out.count(line) == 1 and out.index(line) < out.index('step 0:')
    assert 'network' not in out and printed_texts(out) == {0: '', 1: ''} and 'best val loss' in out
    assert not any('sample' in line for line in records(tmp_path / 'out', 'eval'))


@pytest.mark.parametrize(
    'keys, caches',
    [
        (dict(TIKTOKEN_CACHE_DIR='a'), True),
        (dict(DATA_GYM_CACHE_DIR='b'), True),
        (dict(TIKTOKEN_CACHE_DIR='a', DATA_GYM_CACHE_DIR='b'), True),
        ({}, True),
        (dict(TIKTOKEN_CACHE_DIR=''), False),  # then tiktoken keeps nothing
        (dict(DATA_GYM_CACHE_DIR=''), False),
    ],
)
def test_where_tiktoken_looks(monkeypatch, tmp_path, keys, caches):
    """needs_download says that GPT-2's files are missing where tiktoken would download them, and not where it
    finds what it has downloaded.
    """
    tiktoken = pytest.importorskip('tiktoken')
    from tiktoken_ext import openai_public

    downloaded = []
    monkeypatch.setattr(tiktoken.load, 'read_file', lambda path: downloaded.append(path) or b'a file')
    addresses = {}
    monkeypatch.setattr(openai_public, 'data_gym_to_mergeable_bpe_ranks', lambda **how: addresses.update(how))
    openai_public.gpt2()
    addresses = [address for address in addresses.values() if '://' in address]
    assert len(addresses) == 2

    def reads():
        downloaded.clear()
        for address in addresses:
            tiktoken.load.read_file_cached(address)
        return len(downloaded)

    for name in ('TIKTOKEN_CACHE_DIR', 'DATA_GYM_CACHE_DIR'):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / 'tmp').mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'tmp'))
    if not caches:
        assert reads() == 2 and reads() == 0  # so the files lie in the folder that is not asked
    for name, folder in keys.items():
        monkeypatch.setenv(name, folder and str(tmp_path / folder))
    gpt2 = {'kind': 'gpt2'}
    assert needs_download(gpt2) and reads() == 2
    assert needs_download(gpt2) == (not caches) and reads() == (0 if caches else 2)
    if caches:
        one = sorted(path for path in tmp_path.rglob('*') if path.is_file())[0]
        one.unlink()
        assert needs_download(gpt2) and reads() == 1
    assert not needs_download({'kind': 'char'}) and not needs_download({'kind': 'bpe'})


def test_lines_of_texts(run, house, tmp_path):
    """A text may have any line ends. None of its lines begins in the first column, where parsers take it for
    one of the run.
    """
    folder = house / 'data' / 'ends'
    folder.mkdir(exist_ok=True)
    ends = '\n\r\x0b\x0c\x1c\x85\u2028\u2029'
    write_characters(folder, f'x{ends}' * 100, f'x{ends}' * 100)
    out = run('train.py', *SMALL, *FITTING, '--dataset=ends', '--sample_tokens=99').stdout
    texts = [line['sample'] for line in records(tmp_path / 'out', 'eval')]
    assert len(texts) == 2 and all(set(ends) < set(text) for text in texts)
    for piece, text in zip(re.split('^step ', out, flags=re.M)[1:], texts, strict=True):
        lines = piece.split('\n')[1 : 1 + len(text.splitlines())]
        assert [line[:2] for line in lines] == ['  '] * len(lines)
        assert all(len(line.splitlines()) == 1 for line in lines)
        assert [line[2:] for line in lines] == text.splitlines()
    assert beginnings(out)[4:-2] == ['step ', *5 * ['iter '], 'step ']


@posix
@slow
def test_stop_while_it_writes(start, tmp_path):
    """A text that takes long is no reason to wait."""
    process = start(*SMALL, '--eval_iters=1', '--sample_tokens=1000000')
    wait_for(process, 'data/tiny')
    time.sleep(1)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0 and time.monotonic() - began < 10
    assert 'stopped before iteration 0: nothing was learned' in process.stdout.read()


# -----------------------------------------------------------------------------
# the picture


@pytest.fixture
def plot(house):
    """plot(code): writes an assets/plot.py, which the copy of the project lacks otherwise."""
    folder = house / 'assets'

    def plot(code):
        folder.mkdir(exist_ok=True)
        (folder / 'plot.py').write_text(code, encoding='utf-8')
        return folder / 'plot.py'

    yield plot
    shutil.rmtree(folder, ignore_errors=True)


@slow
def test_picture(run, altered, plot, tmp_path):
    """At the end out_dir/loss.png is there, and a line names it. train.py imports no matplotlib for it. Where
    there is none, the run ends as well, and the line has the command.
    """
    path = ROOT / 'assets' / 'plot.py'
    if not path.exists():
        pytest.skip("needs assets/plot.py")
    plot(path.read_text(encoding='utf-8'))
    imported = altered('', after="import sys\nprint('imported', 'matplotlib' in sys.modules)")
    out = run(imported, *SMALL, *FITTING).stdout
    *_, best, curves, command, last = out.splitlines()
    assert curves == 'its curves: out/loss.png' and last == 'imported False'
    assert best.startswith('best val loss') and command.startswith('sample from it: ')
    assert (tmp_path / 'out' / 'loss.png').read_bytes().startswith(b'\x89PNG\r\n\x1a\n')

    (tmp_path / 'matplotlib.py').write_text('')  # shadows the package, and has no matplotlib.figure
    out = run('train.py', *SMALL, '--out_dir=without', env={'PYTHONPATH': str(tmp_path)}).stdout
    assert re.search('^its curves are not drawn: python .*plot.py without\nsample from it', out, re.M)
    assert not (tmp_path / 'without' / 'loss.png').exists()


@slow
def test_picture_that_fails(run, plot, tmp_path):
    """Not a word of it, status 0, and one line at the end with the command that a shell understands."""
    script = plot("import sys\nprint('words')\nprint('words', file=sys.stderr)\nsys.exit(1)")
    done = run('train.py', *SMALL, '--out_dir=out of it')
    assert 'words' not in done.stdout + done.stderr
    *_, curves, command = done.stdout.splitlines()
    assert command.startswith('sample from it: ')
    words = shlex.split(curves.removeprefix('its curves are not drawn: '))
    assert words == ['python', str(script), 'out of it']


@slow
def test_when_it_draws(run, altered, plot, tmp_path):
    """At most once a minute, and once at the end. The run waits for the last picture only, and a Ctrl-C does
    not reach the process.
    """
    plot("""
import os, sys, time
def tell(text):
    with open(os.path.join(sys.argv[1], 'told'), 'a') as f:
        f.write(text)
tell(f'begun, {os.getsid(0) == os.getpid()}\\n')
for _ in range(100):
    if '"kind": "eval", "iter": 6' in open(os.path.join(sys.argv[1], 'metrics.jsonl')).read():
        tell('seen\\n')
        break
    time.sleep(0.1)
""")
    script = altered(f"""{hurried(7)}
import subprocess
class Popen(subprocess.Popen):
    def __init__(self, *arguments, **how):
        print('draws at', now)
        super().__init__(*arguments, **how)
subprocess.Popen = Popen""")
    out = run(script, *SMALL, '--eval_interval=1', '--max_iters=6').stdout
    # An evaluation has four micro-batches, an iteration two: evaluations end at 28, 70, 112, 154 …
    assert re.findall('^draws at (.*)$', out, re.M) == ['70.0', '154.0', '238.0', '280.0']
    assert out.count('its curves: out/loss.png\n') == 1
    for _ in range(50):
        told = (tmp_path / 'out' / 'told').read_text().splitlines()
        if len(told) == 8:
            break
        time.sleep(0.1)
    assert sorted(told) == [*4 * ['begun, True'], *4 * ['seen']]


@slow
def test_who_draws(run, altered, plot, tmp_path):
    """One of the ranks; nobody where a run leaves no files."""
    plot("import pathlib, sys\npathlib.Path(sys.argv[1], 'told').open('a').write('drawn\\n')")
    out = run('train.py', *SMALL, ranks=2).stdout
    assert (tmp_path / 'out' / 'told').read_text() == 'drawn\n' and out.count('its curves: ') == 1
    evaluating = [*SMALL, '--init_from=resume', '--eval_only=True']
    after = 'import time\ntime.sleep(1)'  # a picture that nobody waits for would be there
    out = run(altered(hurried(100), after=after), *evaluating).stdout
    out += run('train.py', *SMALL, '--dataset=None').stdout
    assert (tmp_path / 'out' / 'told').read_text() == 'drawn\n' and 'its curves' not in out


# -----------------------------------------------------------------------------
# warnings. Schedules that do not fit: test_talk.py; the first checkpoint: test_train.py


@pytest.mark.parametrize('seconds', [100, pytest.param(80, marks=slow)])
def test_long_evaluation(run, altered, seconds):
    """One of more than an hour is announced in its first micro-batches, with a key that helps; one of less is
    not.
    """
    script = altered(hurried(seconds))
    out = run(script, *SMALL, '--eval_iters=20', '--max_iters=1', '--lr_decay_iters=1').stdout
    said = re.findall(r'^an evaluation takes (.*): --eval_iters=(\d+) makes it ten minutes$', out, re.M)
    assert out.count('an evaluation') == len(said) and 'the run takes' not in out
    if seconds * 40 <= 3600:
        assert said == []
    else:
        assert said == 2 * [('1h06m', '3')] and out.index('an evaluation') < out.index('step 0:')


@slow
@pytest.mark.parametrize('seconds', [100, 60])
def test_long_run(run, altered, seconds):
    """A run of more than an hour is announced behind its second iteration, once, and resumed runs as well;
    one of less is not.
    """
    script = altered(hurried(seconds))
    out = run(script, *SMALL, '--max_iters=20', '--lr_decay_iters=20').stdout
    said = re.findall(r'^the run takes about (\d+)h(\d+)m, its evaluations (\d+)m(\d+)s of that: ', out, re.M)
    if seconds == 60:  # 18 iterations of 120 seconds, 4 evaluations of 240
        assert said == [] and 'the run takes' not in out
        return
    hours, minutes, evaluation_minutes, evaluation_seconds = map(int, *said)
    total = hours * 3600 + minutes * 60
    assert total == pytest.approx(18 * 200 + 4 * 400, rel=0.1)
    assert evaluation_minutes * 60 + evaluation_seconds == pytest.approx(4 * 400, abs=400)
    assert re.search('^iter 1: .*\nthe run takes .*--max_iters.*--eval_iters.*--eval_interval', out, re.M)


@slow
def test_new_model(run, altered, tmp_path):
    """One that knows its text by heart, or that does not begin with even chances, is a line each. A trained
    model, resumed or fine-tuned, is as it is.
    """
    script = altered("""
import model
def init(self, module, original=model.GPT._init_weights):
    original(self, module)
    if hasattr(module, 'weight'):
        module.weight.data *= 8
model.GPT._init_weights = init""")
    how = [*SMALL, '--n_embd=128', '--learning_rate=1e-5', '--min_lr=1e-6']
    out = run(script, *how).stdout
    heart = re.findall('^.*parameters for.*$', out, re.M)
    first = re.findall('^a new model should.*$', out, re.M)
    line = 'M parameters for 3,000 tokens: it will know them by heart'
    assert len(heart) == 1 and line in heart[0]
    assert f'= {math.log(40) + 0.0002 * 128:.2f}: ' in first[0] and len(first) == 1
    assert out.index(heart[0]) < out.index('step 0:') < out.index(first[0]) < out.index('iter 0:')

    for again in (['--init_from=resume', '--max_iters=7'], ['--init_from=out', '--out_dir=tuned']):
        out = run(script, *how, *again).stdout
        losses = [line['val/loss'] for line in records(tmp_path / 'out', 'eval')]
        assert min(losses) > math.log(40) + 1  # still far off
        assert 'by heart' not in out and 'a new model should' not in out and 'best val loss' in out


# -----------------------------------------------------------------------------
# Ctrl-C


@posix
def test_signals_are_given_back(run, altered):
    """A run in a notebook leaves the signals as it has found them: Ctrl-C is the notebook's again."""
    script = altered(
        """
import os, signal, socket, time
ours, theirs = socket.socketpair()
theirs.setblocking(False)
ours.settimeout(9)
signal.set_wakeup_fd(theirs.fileno())
numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
for number in numbers:
    signal.signal(number, lambda number, frame: print('heard', number.real))
handlers = [signal.getsignal(number) for number in numbers]""",
        after="""
print('handlers', handlers == [signal.getsignal(number) for number in numbers])
for _ in range(2):
    os.kill(os.getpid(), signal.SIGINT)
print('numbers', *ours.recv(9))
time.sleep(0.1)
print('wakeup', signal.set_wakeup_fd(-1) == theirs.fileno())""",
    )
    done = run(script, *SMALL, '--max_iters=1')
    *_, last = done.stdout.partition('sample from it')
    assert last.splitlines()[1:] == ['handlers True', 'heard 2', 'heard 2', 'numbers 2 2', 'wakeup True']
    assert done.stderr == ''


@pytest.fixture
def terminal(start, altered):
    """terminal('--key=value', …): train.py at a terminal of its own, 100 columns wide. Returns the process,
    write, which types bytes, and read, which returns what has been written to the screen up to a pattern,
    or up to its end.
    """
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 30, 100, 0, 0))
    seen = ''

    def read(pattern=None):
        nonlocal seen
        while not (pattern and re.search(pattern, seen)):
            try:
                seen += os.read(ours, 65536).decode()
            except OSError:  # the other end is closed
                assert pattern is None, seen
                break
        return seen

    def terminal(*arguments, code=''):
        own = "import fcntl, os, termios\nos.setsid()\nfcntl.ioctl(1, termios.TIOCSCTTY, 0)\n"
        process = start(*arguments, script=altered(own + code), stdout=theirs, stderr=theirs)
        os.close(theirs)
        return process, lambda keys: os.write(ours, keys), read

    yield terminal
    os.close(ours)


def left_on_screen(written):
    """The lines of a terminal after all this, where '\\r\\x1b[K' has emptied a line."""
    return on_screen(written.replace('\r\x1b[K', '\r' + ' ' * 200 + '\r')).splitlines()


@posix
@slow
@pytest.mark.parametrize('where', ['evaluation', 'iteration', 'short iteration'])
def test_ctrl_c_at_a_terminal(terminal, where):
    """The bar moves within an evaluation and an iteration. Ctrl-C is answered at once, also where the run
    ends as soon; and neither the bar nor the ^C that the terminal writes is left. The shell learns of it.
    """
    long = """
import model, time
forward = model.GPT.forward
model.GPT.forward = lambda *arguments, **how: time.sleep(0.1) or forward(*arguments, **how)"""
    how = [*SMALL, '--eval_iters=1']
    if where == 'evaluation':
        process, write, read = terminal(*how, '--eval_iters=200', code=long)
        read(r'eval-train \d/200')
    elif where == 'iteration':
        process, write, read = terminal(*how, '--gradient_accumulation_steps=20', code=long)
        written = read(r'\r1/5 .{20} smoothed loss \d\.\d{4}, micro-step ([2-9]|1\d)/20')
        assert re.search(r'\r0/5 .{20} micro-step \d+/20', written)  # no loss is known yet
    else:
        process, write, read = terminal(*how, '--max_iters=100000', '--log_interval=100000')
        read(r'\r[1-9]\d+/100000 .{20} smoothed loss \d\.\d{4}, micro-step')
    write(b'\x03')
    written = read()
    assert process.wait(20) == -signal.SIGINT and 'Traceback' not in written
    assert '^C' in written  # the terminal has written it
    *lines, answer, stopped = left_on_screen(written)
    assert answer == 'stopping after this micro-batch, again to quit'
    assert re.match('stopped before iteration (0: nothing was learned|[1-9].*: go on with `)', stopped)
    assert not re.search(r'\^C|█|micro-step|eval-', '\n'.join([*lines, answer, stopped])), lines
