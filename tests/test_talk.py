"""What a run says: to a person at a terminal, to a file, and to Weights & Biases."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MACHINE, PLACE, SMALL, wait_for
from reference import points, read_wandb_runs

from data.common import write_characters
from model import GPT

slow = pytest.mark.slow
posix = pytest.mark.skipif(os.name != 'posix', reason="pipes and pseudo-terminals are POSIX's")
ITER = re.compile(
    r'^iter (\d+): loss [\d.]+, time ([\d.]+)ms, ([\d.]+)(k?) tok/s, (\d+)([dhm])(\d\d)[hms] left$',
    re.M,
)


def test_before_and_after(run, house, tmp_path):
    """What the run will be, before it begins; at the end the best loss and the command that samples."""
    train, val = ((house / 'data' / 'tiny' / f'{name}.bin').stat().st_size // 2 for name in ('train', 'val'))
    out = run('train.py', *SMALL, '--max_iters=20', '--eval_interval=10', '--out_dir=out of it').stdout
    head, rest = out.split('step 0:', 1)
    assert head == (
        "tokens per iteration will be: 128\n"
        f"a new model: 0.03M parameters, vocabulary 40; {PLACE}\n"
        f"data/tiny: {train:,} tokens to train on, {val:,} to validate on\n"
        f"20 iterations are {20 * 128 / train:.2f} epochs\n"
        "lr_decay_iters 100 is behind max_iters 20: the learning rate ends at 0.0091, not at min_lr; usually "
        "--lr_decay_iters=20\n"
    )
    found = ITER.findall(rest)
    assert [int(i) for i, *_ in found] == list(range(20))
    for _, ms, speed, thousand, *_ in found:
        speed = float(speed) * (1000 if thousand else 1)
        assert speed == pytest.approx(128 / float(ms) * 1000, rel=0.01)
    evaluations = re.findall(r'val loss ([\d.]+), peak ([\d.]+) GB$', rest, re.M)
    assert len(evaluations) == 3 and all(0.1 < float(peak) < 3 for _, peak in evaluations)
    best = min(float(loss) for loss, _ in evaluations)
    *_, last, command = out.splitlines()
    python, script, *arguments = shlex.split(command.removeprefix('sample from it: '))
    assert last == f'best val loss {best:.4f}' and (python, script) == ('python', str(house / 'sample.py'))
    assert run('sample.py', *arguments, '--num_samples=1', '--max_new_tokens=5').stdout


@posix
@slow
@pytest.mark.parametrize('encoding, name', [('ascii', 'out-中文-🦊'), ('utf-8', os.fsdecode(b'out-\xff'))])
def test_console_without_a_character(run, tmp_path, encoding, name):
    """A console that cannot show out_dir shows '?' there. The run ended in a traceback, a new one in an old
    folder while it was saving.
    """
    how = [*SMALL, '--max_iters=1', f'--out_dir={name}']
    for _ in range(2):
        out = run('train.py', *how, env={'PYTHONIOENCODING': encoding}, real=True).stdout
    assert "sample from it: python " in out and '--out_dir=out-?' in out and 'is kept as out-?' in out
    assert {path.name for path in (tmp_path / name).glob('ckpt*')} == {'ckpt.pt', 'ckpt.pt.old'}
    if encoding == 'ascii':
        how = [*how, '--init_from=resume']
        out = run('train.py', *how, env={'PYTHONIOENCODING': encoding}, real=True).stdout
        assert 'resuming out-?' in out


@posix
@slow
def test_closed_streams(house, tmp_path):
    """`>&- 2>&-`, as some supervisors start a process: the run is the same, without its words."""
    command = shlex.join([sys.executable, str(house / 'train.py'), *SMALL])
    assert subprocess.run(f'{command} >&- 2>&-', shell=True, cwd=tmp_path).returncode == 0
    lines = (tmp_path / 'out' / 'metrics.jsonl').read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == 1 + 7 and (tmp_path / 'out' / 'ckpt.pt').is_file()


def test_finished_run(run, tmp_path):
    """Resuming a run that has all its iterations trains nothing, and says what to raise."""
    run('train.py', *SMALL, '--lr_decay_iters=5')
    before = torch.load(tmp_path / 'out' / 'ckpt.pt', 'cpu', weights_only=True)
    resume = ['--init_from=resume', '--out_dir=out', *MACHINE]
    out = run('train.py', *resume).stdout
    line = 'max_iters 5 is reached: to go on, raise --max_iters and --lr_decay_iters\n'
    assert out.count(line) == 1 and 'iter ' not in out and out.index(line) < out.index('step 5:')
    after = torch.load(tmp_path / 'out' / 'ckpt.pt', 'cpu', weights_only=True)
    assert after['iter_num'] == before['iter_num'] == 5
    assert all(torch.equal(p, after['model'][name]) for name, p in before['model'].items())
    out = run('train.py', *resume, '--max_iters=7', '--lr_decay_iters=7').stdout
    assert 'is reached' not in out and [int(i) for i, *_ in ITER.findall(out)] == [5, 6]


WARM = 'the run never leaves its warm-up: warmup_iters {}, max_iters {}\n'
DECAYED = 'lr_decay_iters {} is before max_iters {}: the rest runs at min_lr\n'
LATE = (
    'lr_decay_iters {} is behind max_iters {}: the learning rate ends at {}, not at min_lr; '
    'usually --lr_decay_iters={}\n'
)


@pytest.mark.parametrize(
    'keys, line',
    [
        (dict(warmup_iters=3, max_iters=3), WARM.format(3, 3)),
        (dict(warmup_iters=2000, max_iters=2, lr_decay_iters=1), WARM.format(2000, 2)),
        (dict(lr_decay_iters=2, max_iters=3), DECAYED.format(2, 3)),
        (dict(lr_decay_iters=6, max_iters=3), LATE.format(6, 3, '0.0075', 3)),
        (dict(warmup_iters=2, max_iters=3, lr_decay_iters=3), None),
        (dict(warmup_iters=3, max_iters=3, lr_decay_iters=2, decay_lr=False), None),
    ],
)
def test_odd_schedules(run, keys, line):
    """A schedule that does not fit the run's length is a line before the training starts; others are not."""
    out = run('train.py', *SMALL, *(f'--{key}={value}' for key, value in keys.items())).stdout
    said = re.findall('^(?:the run never|lr_decay_iters).*\n', out, re.M)
    assert said == ([] if line is None else [line])
    assert line is None or out.index(line) < out.index('step 0:')


NOTEBOOK = """
import os, runpy, sys

class Stdout:  # as Jupyter's: no reconfigure, no buffer, no file descriptor
    encoding = 'UTF-8'
    def write(self, text):
        return terminal.write(text)
    def flush(self):
        terminal.flush()
    def isatty(self):
        return False

terminal, sys.stdout, arguments = sys.stdout, Stdout(), sys.argv[1:]
for script, how in (('train.py', [*arguments, '--batch_size=0']), ('train.py', [*arguments, '--dropout=2']),
                    ('train.py', arguments), ('sample.py', ['--device=cpu', '--max_new_tokens=9']),
                    ('train.py', [*arguments, '--init_from=resume', '--max_iters=7'])):
    sys.argv = [script, *how]
    print('running', script)
    try:
        runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), script), run_name='__main__')
    except BaseException as error:
        print(error)
"""


@pytest.mark.parametrize('real', [False, pytest.param(True, marks=slow)])
def test_notebook(run, house, tmp_path, real):
    """In one process, one after the other, with a stdout that only writes: neither a run that ended well
    nor one that failed locks the next one out.
    """
    (house / 'notebook.py').write_text(NOTEBOOK)
    out = run('notebook.py', *SMALL, real=real).stdout
    _, mistake, another, first, sampled, second = out.split('running ')
    assert 'batch_size must be' in mistake and 'dropout must be in' in another
    assert first.startswith('train.py\n') and [int(i) for i, *_ in ITER.findall(first)] == [*range(5)]
    assert sampled.startswith('sample.py\n') and sampled.count('---------------\n') == 10
    assert second.startswith('train.py\n') and [int(i) for i, *_ in ITER.findall(second)] == [5, 6]
    assert torch.load(tmp_path / 'out' / 'ckpt.pt', 'cpu', weights_only=True)['iter_num'] == 7


@slow
def test_time_left(start):
    """By the mean speed of this run, evaluations included, those before its first step left out."""
    for how in ([*SMALL, '--eval_interval=25'], ['--init_from=resume', *MACHINE, '--eval_interval=50']):
        process = start(*how, '--max_iters=5000000', '--eval_iters=150')
        first = 0 if how[0] == SMALL[0] else 25
        out = wait_for(process, f'iter {first + 30}:')
        process.kill()
        process.wait()
        total = 0.0
        units = {'d': (86400, 3600), 'h': (3600, 60), 'm': (60, 1)}
        for i, ms, _, _, larger, unit, smaller in ITER.findall(out):
            done, total = int(i) - first + 1, total + float(ms) / 1000
            left = int(larger) * units[unit][0] + int(smaller) * units[unit][1]
            by_steps = total / done * (5000000 - int(i) - 1)
            # the evaluation took longer than the 30 steps
            assert 0.95 < left / by_steps < 1.5 if done <= 25 else left / by_steps > 2, (i, left, by_steps)
        assert done == 31


def test_best_is_not_the_last(run):
    """Where ckpt.pt is not the best model that was saved, the last line says so. A new run's evaluation
    before its first step does not count: that model is in no file.
    """
    worse = [
        *SMALL,
        '--max_iters=4',
        '--eval_interval=2',
        '--learning_rate=1.0',
        '--grad_clip=0.0',
        '--decay_lr=False',
    ]
    for keep, says in (
        (
            True,
            'best val loss {}; out/ckpt.pt is the last, of {}: always_save_checkpoint=False keeps the best\n',
        ),
        (False, 'best val loss {}\n'),
    ):
        out = run('train.py', *worse, f'--always_save_checkpoint={keep}').stdout
        before, *losses = re.findall(r'val loss ([\d.]+), ', out)[:3]
        assert float(before) < float(losses[0]) < float(losses[1]) and says.format(*losses) in out


def on_screen(written):
    """The lines that stand on a terminal after all this was written to it."""
    lines, row, column = [''], 0, 0
    for piece in re.findall(r'\x1b\[A|[\r\n]|[^\x1b\r\n]+', written):
        if piece == '\r':
            column = 0
        elif piece == '\n':
            row += 1
            lines += [''] * (row == len(lines))
        elif piece == '\x1b[A':
            row -= 1
        else:
            lines[row] = lines[row].ljust(column)[:column] + piece + lines[row][column + len(piece) :]
            column += len(piece)
    return '\n'.join(line.rstrip() for line in lines)


@posix
@pytest.mark.parametrize(
    'how', (pytest.param('terminal', marks=slow), pytest.param('pipe', marks=slow), 'lines to a pipe')
)
def test_progress_bar(start, tmp_path, how):
    """At a terminal a bar stands under the same lines that a pipe gets alone. With stdout elsewhere the
    terminal has the bar only.
    """
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 30, 120, 0, 0))
    errors = tmp_path / 'errors'
    errors.write_text('')
    process = start(
        *SMALL,
        '--max_iters=40',
        '--eval_interval=20',
        '--eval_iters=30',
        '--log_interval=10',
        stdout=theirs if how == 'terminal' else None,
        stderr=errors if how == 'pipe' else theirs,
        real=how == 'terminal',
    )
    os.close(theirs)
    seen, out = b'', process.stdout.read()
    if how != 'pipe':
        while True:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
    os.close(ours)
    assert process.wait() == 0 and not errors.read_text()
    screen = seen.decode()
    if how == 'terminal':
        out = on_screen(screen)
    lines = [re.split(r'[:\d]', line)[0] for line in out.splitlines() if line.strip()]
    assert lines == [
        'tokens per iteration will be',
        'a new model',
        'data/tiny',
        '',
        'lr_decay_iters ',
        *2 * ['step ', 'iter ', 'iter '],
        'step ',
        'best val loss ',
        'sample from it',
    ], screen
    bars = [int(n) for n in re.findall(r'\r(\d+)/40 [█▏▎▍▌▋▊▉ #\d]{20} ', screen)]
    if how == 'pipe':
        assert '\r' not in out
    else:
        assert bars == sorted(bars) and {0, 40} <= set(bars), screen
        assert re.search(r'\r\d+/40 .{20} smoothed loss [\d.]+, micro-step [12]/2\r', screen)
        assert re.search(r'\r\d+/40 .{20} (smoothed loss [\d.]+, )?eval-val \d+/30', screen)


@posix
@slow
def test_nobody_reads(start, tmp_path):
    """python train.py … | head: one line, status 1."""
    errors = tmp_path / 'errors'
    errors.write_text('')
    process = start(*SMALL, '--max_iters=1000000', stderr=errors, real=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 1
    assert errors.read_text() == "nobody reads this run's output any more: go on with --init_from=auto\n"


def test_whole_validation(run, house, tmp_path):
    """eval_iters=None: each token of val.bin but the first is predicted once, whatever the batch size; words
    as prepare.py has counted them. The number of ranks: test_number_of_ranks.
    """
    folder = house / 'data' / 'counted'
    folder.mkdir(exist_ok=True)
    write_characters(folder, 'abcdefghij' * 30, 'abcdefghij' * 9 + 'abc')
    (folder / 'words.json').write_text(json.dumps({'train': 60, 'val': 31}))
    run('train.py', *SMALL, '--dataset=counted', '--max_iters=3')
    model = GPT.from_checkpoint(tmp_path / 'out').double()
    tokens = torch.from_numpy(np.fromfile(folder / 'val.bin', dtype='<u2').astype(np.int64))
    total = 0.0
    for i in range(0, len(tokens) - 1, 16):
        x, y = tokens[i : i + 16][: len(tokens) - 1 - i], tokens[i + 1 : i + 17]
        logits = model.lm_head(model.hidden(x[None]))[0]
        total += torch.nn.functional.cross_entropy(logits, y, reduction='sum').item()
    for batch_size in (1, 4, 100):
        out = run(
            'train.py',
            '--init_from=resume',
            *MACHINE,
            '--eval_only=True',
            '--eval_iters=None',
            f'--batch_size={batch_size}',
        ).stdout
        assert float(re.search(r'val loss ([\d.]+)', out)[1]) == pytest.approx(total / 92, abs=6e-5)
        found = re.search(
            r'^val.bin once through: perplexity ([\d.]+) per token \(92\), '
            r'([\d.]+) per word \(31\)$',
            out,
            re.M,
        )
        want = [math.exp(total / 92), math.exp(total / 31)]
        assert [float(p) for p in found.groups()] == pytest.approx(want, rel=2e-3)


# -----------------------------------------------------------------------------
# Weights & Biases, the real one, offline


def is_core_of(parent, path):
    """Whether /proc/N/cmdline is that of the wandb process that `parent` has started."""
    try:
        status = (path.parent / 'status').read_text()
        return b'wandb-core' in path.read_bytes() and f'PPid:\t{parent}\n' in status
    except OSError:  # it has ended meanwhile
        return False


FAKE_WANDB = """
import json, sys, types

class Run:
    id, dir = 'abc', 'nowhere'
    def define_metric(self, *arguments, **how):
        pass
    def log(self, values):
        print('logged', json.dumps(values))
    def finish(self):
        print('finished')

sys.modules['wandb'] = types.SimpleNamespace(init=lambda **how: Run())
"""


def test_kinds_of_metrics(run, altered, tmp_path):
    """Every line of metrics.jsonl begins with its kind: 'train' for a log line, 'eval' for an evaluation.
    wandb gets the same values, without the kind.
    """
    out = run(altered(FAKE_WANDB), *SMALL, '--max_iters=7', '--wandb_log=True').stdout
    lines = (tmp_path / 'out' / 'metrics.jsonl').read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert all(list(record)[0] == 'kind' for record in records)
    assert records.pop(0)['kind'] == 'run'
    found = [(record['kind'], record['iter']) for record in records]
    assert found == [
        ('eval', 0),
        *(('train', i) for i in range(5)),
        ('eval', 5),
        ('train', 5),
        ('train', 6),
        ('eval', 7),
    ]
    for record in records:
        assert ('val/loss' in record) == (record['kind'] == 'eval') == ('loss' not in record)
    logged = [json.loads(line) for line in re.findall('^logged (.*)$', out, re.M)]
    assert logged == [{key: value for key, value in record.items() if key != 'kind'} for record in records]
    assert out.endswith('finished\n')


@posix
@slow
def test_wandb_history(run, start, tmp_path, monkeypatch):
    """Offline, after a polite stop and a resume the two files of the one run hold every evaluation and every
    log line; what is there twice is the same.
    """
    for name in [name for name in os.environ if name.startswith('WANDB')]:
        monkeypatch.delenv(name)
    env = {'HOME': str(tmp_path / 'home'), 'WANDB_SILENT': 'true'}
    how = ['--wandb_log=True', '--init_from=auto']
    env['WANDB_MODE'] = 'offline'
    process = start(*SMALL, *how, '--eval_interval=10', '--log_interval=2', '--max_iters=1000000', env=env)
    out = wait_for(process, 'step 20:')
    process.send_signal(signal.SIGTERM)
    out += process.stdout.read()
    assert process.wait() == 0, out
    end = int(re.search(r'^stopped before iteration (\d+)', out, re.M)[1]) + 25
    run('train.py', *how, *MACHINE, f'--max_iters={end}', env=env)
    (name, first), (again, second) = read_wandb_runs(tmp_path)
    assert name == again and first and second
    lines = [json.loads(line) for line in (tmp_path / 'out' / 'metrics.jsonl').read_text().splitlines()]
    history = first + second
    assert not any('kind' in item for item in history)
    assert set(points(history, 'val/loss')) == {*range(0, end, 10), end}
    assert list(points(history, 'loss')) == list(range(0, end, 2))
    for key in ('val/loss', 'train/loss', 'loss', 'lr', 'grad_norm', 'tokens_per_second'):
        assert points(history, key) == points(lines, key)


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason="finds wandb's process in /proc")
@slow
@pytest.mark.parametrize('moment', ('iter 20:', 'best val loss'))
def test_wandb_dies(start, tmp_path, moment):
    """Its process is killed in mid-run, or before it could finish: one line, and the training goes on."""
    early = moment == 'iter 20:'
    process = start(
        *SMALL,
        f'--max_iters={10**6 if early else 40}',
        '--eval_interval=1000000',
        '--wandb_log=True',
        env={'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true'},
    )
    out = wait_for(process, moment)
    cores = [
        int(path.parent.name)
        for path in Path('/proc').glob('[0-9]*/cmdline')
        if is_core_of(process.pid, path)
    ]
    assert cores or not early
    for core in cores:
        with suppress(ProcessLookupError):  # at the end of a run it may have ended by itself
            os.kill(core, signal.SIGKILL)
    if early:
        out += wait_for(process, 'wandb has stopped')
        out += wait_for(process, 'iter ')
        process.send_signal(signal.SIGTERM)
    out += process.stdout.read()
    # a kill between wandb's last call of ours and its own at Python's exit leaves the word to wandb
    spoken = out if early else out.partition('Exception ignored in atexit callback: <function _start_and_')[0]
    assert process.wait() == 0 and 'Traceback' not in spoken, out
    stops = re.findall(r'^wandb has stopped \(\w+.*\): out/metrics.jsonl has all$', out, re.M)
    assert len(stops) == 1 if early else len(stops) <= 1  # at the end it may be quicker than the kill
    assert re.search('^stopped before' if early else '^sample from it', out, re.M)
    assert early or len((tmp_path / 'out' / 'metrics.jsonl').read_text().splitlines()) == 43


@pytest.mark.parametrize(
    'module, error',
    (
        ("None", 'ModuleNotFoundError: import of wandb halted; None in sys.modules'),  # not installed
        # like the folder that runs leave, where there is no package
        (
            "types.ModuleType('wandb')",
            "AttributeError: module 'wandb' has no attribute 'init'",
        ),
        (
            "types.SimpleNamespace(init=lambda **_: 1 / 0, login=lambda **_: True)",
            'ZeroDivisionError: division by zero',
        ),
    ),
)
def test_wandb_absent(run, altered, module, error):
    """Not installed, or broken: one line before training starts."""
    broken = altered(f"import sys, types\nsys.modules['wandb'] = {module}")
    out = run(broken, *SMALL, '--wandb_log=True').stdout
    line = f'training goes on without wandb, which does not start ({error}): `pip install wandb`, '
    assert out.count(line) == 1 and 'best val loss' in out


@slow
def test_wandb_is_silent(run, tmp_path):
    """Runs that leave nothing behind open no wandb run either."""
    run('train.py', *SMALL)
    run('train.py', *SMALL, '--wandb_log=True', '--eval_only=True', '--init_from=resume')
    run('train.py', *SMALL, '--dataset=None', '--wandb_log=True', '--max_iters=2')
    assert not (tmp_path / 'wandb').exists()
