"""What a run says: to a person at a terminal, to a file, and to Weights & Biases."""
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT, SMALL
from model import GPT, read_checkpoint


def test_before_and_after(run, house, tmp_path):
    """What to expect before it begins, the time left while it runs, and at the end the best loss and the command that samples."""
    tokens = {name: (house / 'data' / 'tiny' / f'{name}.bin').stat().st_size // 2 for name in ('train', 'val')}
    out = run('train.py', *SMALL, '--max_iters=60', '--eval_interval=20', '--out_dir=out of it').stdout
    head, rest = out.split('step 0:', 1)
    assert 'tokens per iteration will be: 128\n' in head and 'a new model: 0.03M parameters' in head and '; cpu, float32\n' in head
    assert f"data/tiny: {tokens['train']:,} tokens to train on, {60 * 128 / tokens['train']:.2f} epochs in 60 iterations; {tokens['val']:,} to validate on\n" in head
    memory, *left = re.search(r'^estimated: ([\d.]+) GB of memory, (\d+):(\d\d):(\d\d) to the end$', head, re.M).groups()
    assert 0.1 < float(memory) < 3 and left < ['0', '02', '00']
    times = re.findall(r'^iter (\d+): loss [\d.]+, time ([\d.]+)ms, mfu n/a, ([\d,]+) tok/s, (\d):(\d\d):(\d\d) left$', rest, re.M)
    assert len(times) == 60
    for i, ms, speed, *left in times:
        hours, minutes, seconds = map(int, left)
        assert float(speed.replace(',', '')) == pytest.approx(128 / float(ms) * 1000, rel=0.01)
        assert (59 - int(i)) * float(ms) / 1000 - 1 <= hours * 3600 + minutes * 60 + seconds
    best = min(float(loss) for loss in re.findall(r'val loss ([\d.]+)$', rest, re.M))
    words = re.search(r"^best val loss ([\d.]+), in out of it/ckpt\.pt\nsample from it: python (\S+sample\.py) --out_dir='out of it'\n$", out, re.M)
    assert float(words[1]) == best and words[2] == str(house / 'sample.py')


def test_time_left():
    """Iterations and evaluations, those at the interval and the last one, as hours, minutes and seconds, for runs of weeks too."""
    source = (ROOT / 'train.py').read_text(encoding='utf-8')
    start = source.index('def time_left(')
    scope = {'math': math, 'eval_seconds': 7.0, 'max_iters': 100, 'eval_interval': 30, 'keeps': True}
    exec(source[start:source.index('\n\n\n', start)], scope)
    for seconds, done, left in ((1.0, 0, 100 + 5 * 7), (1.0, 1, 99 + 4 * 7), (1.0, 30, 70 + 4 * 7), (1.0, 91, 9 + 7), (0.1, 100, 7), (36.5, 10, 90 * 36.5 + 4 * 7)):
        hours, minutes, rest = map(int, scope['time_left'](seconds, done).split(':'))
        assert abs(hours * 3600 + minutes * 60 + rest - left) <= 0.5 and minutes < 60 and rest < 60
    scope.update(max_iters=600000, keeps=False)
    assert scope['time_left'](3.0, 0) == '500:00:00' and scope['time_left'](0.001, 599000) == '0:00:01'
    scope.update(max_iters=10 ** 21)
    assert scope['time_left'](1, 0).endswith(':40')


def test_best_is_not_the_last(run, tmp_path):
    """Where ckpt.pt is not the best model, the last words say so; of a file that an earlier run wrote they say nothing."""
    worse = ['--max_iters=2', '--learning_rate=1.0', '--grad_clip=0.0', '--decay_lr=False']
    for keep, says in ((True, r'^best val loss ([\d.]+), but out/ckpt\.pt is the last model, of ([\d.]+): --always_save_checkpoint=False keeps the best$'),
                       (False, r'^best val loss ([\d.]+), in out/ckpt\.pt$')):
        out = run('train.py', *SMALL, *worse, f'--always_save_checkpoint={keep}').stdout
        losses = [float(loss) for loss in re.findall(r'val loss ([\d.]+)$', out, re.M)[:2]]
        found = [float(loss) for loss in re.search(says, out, re.M).groups()]
        assert min(losses) < losses[-1] and found == [min(losses), losses[-1]][:len(found)]
    run('train.py', *SMALL, *worse)
    out = run('train.py', *SMALL, *worse, '--max_iters=3', '--always_save_checkpoint=False', '--init_from=resume').stdout
    assert re.search(r'^best val loss [\d.]+$', out, re.M)


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
            lines[row] = lines[row].ljust(column)[:column] + piece + lines[row][column + len(piece):]
            column += len(piece)
    return '\n'.join(line.rstrip() for line in lines)


@pytest.mark.skipif(os.name != 'posix', reason="pseudo-terminals are POSIX's")
@pytest.mark.parametrize('how', ('terminal', 'pipe', 'lines to a pipe'))
def test_progress_bar(house, tmp_path, how):
    """At a terminal a bar stands under the same lines that a pipe gets alone; with stdout elsewhere the terminal has the bar only."""
    import fcntl
    import pty
    import struct
    import termios
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 30, 120, 0, 0))
    arguments = [sys.executable, str(house / 'train.py'), *SMALL, '--max_iters=40', '--eval_interval=20', '--eval_iters=30', '--log_interval=10']
    process = subprocess.Popen(arguments, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=theirs if how == 'terminal' else subprocess.PIPE,
                               stderr=subprocess.PIPE if how == 'pipe' else theirs)
    os.close(theirs)
    seen = b''
    if how == 'pipe':
        os.close(ours)
    else:
        while True:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
        os.close(ours)
    out, errors = process.communicate()
    assert process.returncode == 0 and not errors
    screen, out = seen.decode(), (out or b'').decode()
    if how == 'terminal':
        out = on_screen(screen)
    lines = [re.split(r'[:\d]', line)[0] for line in out.splitlines() if line.strip()]
    assert lines == ['tokens per iteration will be', 'a new model', 'data/tiny', 'estimated', 'step ', 'iter ', 'iter ', 'step ', 'iter ', 'iter ', 'step ',
                     'best val loss ', 'sample from it'], screen
    bars = [int(n) for n in re.findall(r'\r(\d+)/40 [█▏▎▍▌▋▊▉ #\d]{20} ', screen)]
    if how == 'pipe':
        assert '\r' not in out
    else:
        assert bars == sorted(bars) and {0, 40} <= set(bars), screen
        assert re.search(r'\r40/40 .{20} loss [\d.]+, [\d,]+ tok/s, 0:\d\d:\d\d left\r', screen)
        assert re.search(r'\reval-val: +\d+%\|.*\| \d+/30', screen)  # evaluations show how far they are


def test_whole_validation(run, house, tmp_path):
    """eval_iters=None: each token of val.bin but the first is predicted once, whatever the batch size or the number of ranks; words as counted."""
    from common import write_characters
    import torch
    folder = house / 'data' / 'counted'
    folder.mkdir(exist_ok=True)
    alphabet = 'abcdefghij'
    write_characters(folder, alphabet * 30, alphabet * 9 + 'abc')
    (folder / 'words.json').write_text(json.dumps({'train': 60, 'val': 31}))
    run('train.py', *SMALL, '--dataset=counted', '--max_iters=3')
    checkpoint = read_checkpoint(tmp_path / 'out' / 'ckpt.pt')
    model = GPT.from_checkpoint(checkpoint).eval().double()
    tokens = torch.from_numpy(np.fromfile(folder / 'val.bin', dtype='<u2').astype(np.int64))
    total = 0.0
    for i in range(0, len(tokens) - 1, 16):
        x, y = tokens[i:i + 16][:len(tokens) - 1 - i], tokens[i + 1:i + 17]
        total += torch.nn.functional.cross_entropy(model.lm_head(model.hidden(x[None]))[0], y, reduction='sum').item()
    loss = total / 92
    for batch_size, ranks in ((1, 0), (4, 0), (100, 0), (1, 3)):
        out = run('train.py', *SMALL, '--dataset=counted', '--init_from=resume', '--eval_only=True', '--eval_iters=None', f'--batch_size={batch_size}',
                  f'--gradient_accumulation_steps={max(1, ranks)}', ranks=ranks).stdout
        assert float(re.search(r'val loss ([\d.]+)', out)[1]) == pytest.approx(loss, abs=6e-5)
        found = re.search(r'^val.bin once through: perplexity ([\d.]+) per token \(92\), ([\d.]+) per word \(31\)$', out, re.M)
        assert [float(p) for p in found.groups()] == pytest.approx([math.exp(loss), math.exp(total / 31)], rel=2e-3)


# -----------------------------------------------------------------------------
# Weights & Biases, the real one, offline


def offline_runs(folder):
    """[(run id, [history items])] of wandb's files, oldest first: leveldb's log format around protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record
    runs = []
    for path in sorted(folder.glob('wandb/offline-run-*/*.wandb'), key=lambda path: path.stat().st_mtime_ns):
        data, at, record, name, history = path.read_bytes(), 7, b'', None, []
        while at + 7 <= len(data):
            room = 2 ** 15 - at % 2 ** 15
            if room < 7:  # a record's header never straddles two blocks
                at += room
                continue
            size, kind = int.from_bytes(data[at + 4:at + 6], 'little'), data[at + 6]
            record += data[at + 7:at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # whole, or the last piece
                found, record = Record.FromString(record), b''
                name = found.run.run_id or name
                if found.WhichOneof('record_type') == 'history':
                    history.append({item.key or '.'.join(item.nested_key): json.loads(item.value_json) for item in found.history.item})
        runs.append((name, history))
    return runs


def is_core_of(parent, path):
    """Whether /proc/N/cmdline is that of the wandb process that `parent` has started."""
    try:
        return b'wandb-core' in path.read_bytes() and f'PPid:\t{parent}\n' in (path.parent / 'status').read_text()
    except OSError:  # it has ended meanwhile
        return False


def points(history, key):
    return [(line['iter'], line[key]) for line in history if key in line]


@pytest.mark.parametrize('ranks, stop_at', ((0, 'step 40:'), (2, 'iter 36:')))
def test_wandb_history(house, tmp_path, ranks, stop_at):
    """Not logged in: offline, and said. After a polite stop and a resume the two files of the one run hold every evaluation and every log line once."""
    home = tmp_path / 'home'
    home.mkdir()
    env = {**{key: value for key, value in os.environ.items() if not key.startswith('WANDB')}, 'HOME': str(home), 'WANDB_SILENT': 'true'}
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'] if ranks else [sys.executable]
    arguments = [*launch, str(house / 'train.py'), *SMALL, '--wandb_log=True', '--init_from=auto', '--eval_interval=10', '--log_interval=2']
    process = subprocess.Popen([*arguments, '--max_iters=1000000'], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(stop_at):
            process.send_signal(signal.SIGTERM)
    errors = process.stderr.read()
    assert process.wait() == (1 if ranks else 0), errors
    said = re.search(r'^wandb: not logged in, so this run stays on disk; later: wandb login && wandb sync (\S+)$', ''.join(lines), re.M)
    assert os.path.isdir(said[1])
    end = int(re.search(r'^asked to leave before iteration (\d+)', ''.join(lines), re.M)[1]) + 25
    done = subprocess.run([*arguments, f'--max_iters={end}'], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    (name, first), (again, second) = offline_runs(tmp_path)
    assert name == again and first and second
    metrics = [json.loads(line) for line in (tmp_path / 'out' / 'metrics.jsonl').read_text().splitlines()]
    history = first + second
    assert [i for i, _ in points(history, 'val/loss')] == sorted({*range(0, end, 10), end})
    assert [i for i, _ in points(history, 'loss')] == list(range(0, end, 2))
    for key in ('val/loss', 'train/loss', 'loss', 'lr', 'grad_norm', 'tokens_per_second'):
        found, expected = points(history, key), points(metrics, key)
        assert dict(found) == dict(expected) and (key == 'lr' or found == expected)  # lr stands in both lines of an iteration
    assert [line['_step'] for line in history] == sorted(line['iter'] for line in history)


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason="finds wandb's process in /proc")
@pytest.mark.parametrize('moment', ('iter 20:', 'best val loss'))
def test_wandb_dies(house, tmp_path, moment):
    """Its process is killed in mid-run, or before it could finish: one line, and the training goes on."""
    env = {**os.environ, 'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true'}
    process = subprocess.Popen([sys.executable, str(house / 'train.py'), *SMALL, '--wandb_log=True', '--eval_interval=1000000',
                                f"--max_iters={10 ** 6 if moment == 'iter 20:' else 40}"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(moment):
            cores = [int(path.parent.name) for path in Path('/proc').glob('[0-9]*/cmdline') if is_core_of(process.pid, path)]
            assert cores or moment != 'iter 20:'
            for core in cores:
                os.kill(core, signal.SIGKILL)
        if 'wandb has stopped' in line and moment == 'iter 20:':
            process.send_signal(signal.SIGTERM)
    errors = process.stderr.read()
    assert process.wait() == 0, errors
    assert 'Traceback' not in errors, errors
    stops = [line for line in lines if re.fullmatch(r'wandb has stopped \(\w+.*\): out/metrics.jsonl has all\n', line)]
    assert len(stops) == 1 if moment == 'iter 20:' else len(stops) <= 1  # at the end it may be quicker than the kill
    assert any(line.startswith('asked to leave' if moment == 'iter 20:' else 'sample from it') for line in lines)
    assert len((tmp_path / 'out' / 'metrics.jsonl').read_text().splitlines()) == 42 or moment == 'iter 20:'


@pytest.mark.parametrize('module, says', (
    ("raise ImportError('as if it were not installed')", 'wandb_log=True needs wandb: pip install wandb, or --wandb_log=False\n'),
    ("", 'wandb_log=True needs wandb: pip install wandb, or --wandb_log=False\n'),  # like the folder that runs leave, where there is no package
    ("def init(**how):\n    raise TypeError('no.')\nlogin = init", 'wandb does not start (TypeError: no): --wandb_log=False trains without it\n')))
def test_wandb_absent(house, tmp_path, module, says):
    """Not installed, or broken: one line before training starts."""
    (tmp_path / 'wandb.py').write_text(module)
    done = subprocess.run([sys.executable, str(house / 'train.py'), *SMALL, '--wandb_log=True'], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(tmp_path)})
    assert done.returncode == 1 and done.stderr == says and 'step 0' not in done.stdout


@pytest.mark.skipif(os.name != 'posix', reason="pipes are POSIX's")
def test_nobody_reads(house, tmp_path):
    """python train.py … | head: one line, status 1."""
    process = subprocess.Popen([sys.executable, str(house / 'train.py'), *SMALL, '--max_iters=1000000'], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 1 and errors == "nobody reads this run's output any more; go on with --init_from=resume\n"


def test_wandb_is_silent(run, tmp_path):
    """Runs that leave nothing behind open no wandb run either."""
    run('train.py', *SMALL)
    run('train.py', *SMALL, '--wandb_log=True', '--eval_only=True', '--init_from=resume')
    run('train.py', 'config/bench.py', *SMALL, '--dataset=None', '--wandb_log=True', '--max_iters=2')
    assert not (tmp_path / 'wandb').exists()
