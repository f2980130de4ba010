"""Runs that are killed, stopped, starved and spread over ranks: the curve and the checkpoint stay what they would have been."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import SMALL

posix = pytest.mark.skipif(os.name != 'posix', reason='signals and locks of POSIX systems')
LONG = [*SMALL, '--max_iters=150', '--eval_interval=50', '--dropout=0.2', '--gradient_accumulation_steps=4', '--checkpoint_interval=20']


@pytest.fixture
def start(house, tmp_path):
    """start('--key=value', …, ranks=0): train.py in the background, stdout and stderr in one pipe; killed at the end of the test."""
    started = []

    def start(*arguments, ranks=0, **how):
        launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'] if ranks else []
        process = subprocess.Popen([sys.executable, *launch, str(house / 'train.py'), *arguments], cwd=tmp_path, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, encoding='utf-8', **how)
        started.append(process)
        return process
    yield start
    for process in started:
        if process.poll() is None:
            for child in children(process):
                os.kill(child, signal.SIGKILL)
            process.kill()
            process.wait()
        process.stdout.close()


def children(process):
    return [int(pid) for pid in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]


def wait_for(process, beginning):
    """Reads on until a line of the process begins so; returns what was read."""
    read = []
    for line in process.stdout:
        read.append(line)
        if line.startswith(beginning):
            return ''.join(read)
    raise AssertionError(f'it ended without {beginning!r}: ' + ''.join(read))


def load(folder, name='ckpt.pt'):
    return torch.load(folder / name, weights_only=True)


def assert_same_state(a, b):
    """Weights, moments, scaler: equal to the bit."""
    assert a['iter_num'] == b['iter_num'] and a['best_val_loss'] == b['best_val_loss'] and a['scaler'] == b['scaler']
    assert all(torch.equal(p, b['model'][name]) for name, p in a['model'].items())
    assert a['optimizer']['state'].keys() == b['optimizer']['state'].keys()
    for i, state in a['optimizer']['state'].items():
        assert all(torch.equal(v, b['optimizer']['state'][i][k]) for k, v in state.items())


def metrics(folder):
    """The lines of metrics.jsonl without their timings."""
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ('ms', 'tokens_per_second', 'mfu')} for line in lines]


# -----------------------------------------------------------------------------
# the curve

@posix
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_killed_and_resumed(run, start, tmp_path, dtype):
    """With dropout and accumulation, killed anywhere: every weight, moment and metric of the run that was left alone."""
    run('train.py', *LONG, f'--dtype={dtype}', '--out_dir=a')
    process = start(*LONG, f'--dtype={dtype}', '--out_dir=b')
    wait_for(process, 'iter 50:')
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 0 < load(tmp_path / 'b')['iter_num'] < 150
    run('train.py', *LONG, f'--dtype={dtype}', '--out_dir=b', '--init_from=resume')
    assert_same_state(load(tmp_path / 'a'), load(tmp_path / 'b'))
    lines = metrics(tmp_path / 'a')
    assert lines == metrics(tmp_path / 'b') and len(lines) == 154
    assert lines[1].keys() == {'iter', 'loss', 'lr', 'grad_norm', 'tokens'} and lines[-1]['tokens'] == 150 * 4 * 4 * 16


def test_number_of_ranks(run, tmp_path):
    """1, 2 and 4 ranks follow one curve, and so does a run that changes their number on the way."""
    how = [*SMALL, '--gradient_accumulation_steps=4', '--eval_iters=3', '--eval_interval=25', '--max_iters=50']
    for ranks in (0, 2, 4):  # 0: without torchrun
        run('train.py', *how, f'--out_dir={ranks}', ranks=ranks)
    run('train.py', *how, '--out_dir=half', '--max_iters=25', ranks=2)
    one = metrics(tmp_path / '0')
    for ranks in (4, 0):
        shutil.copytree(tmp_path / 'half', tmp_path / f'2-{ranks}')
        run('train.py', *how, f'--out_dir=2-{ranks}', '--init_from=resume', ranks=ranks)
    for other in ('2', '4', '2-4', '2-0'):
        lines = metrics(tmp_path / other)
        assert len(lines) == len(one) == 53
        for a, b in zip(one, lines):
            assert a.keys() == b.keys()
            for key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-4 if key == 'grad_norm' else 1e-5), (other, a['iter'], key)


# -----------------------------------------------------------------------------
# kills and stops

@posix
def test_kills(run, start, tmp_path, request):
    """
    SIGKILL at random moments, most of them inside a save: there is always a whole checkpoint, nothing is lost beyond the
    last completed save, and the end is that of the run left alone. More with --kills=200.
    """
    # large for its 4 tokens an iteration, so that nearly all of the time goes into saving
    how = [*SMALL, '--n_embd=192', '--n_layer=3', '--batch_size=1', '--block_size=4', '--gradient_accumulation_steps=1', '--eval_interval=1000',
           '--checkpoint_interval=1', '--init_from=auto', f'--max_iters={50 * request.config.getoption("--kills")}']
    delays = random.Random(0)
    seen = 0
    for _ in range(request.config.getoption('--kills')):
        process = start(*how)
        read = wait_for(process, 'iter ')
        time.sleep(delays.uniform(0, 0.3))
        process.kill()
        read += process.stdout.read()
        assert process.wait() == -signal.SIGKILL
        printed = [int(i) for i in re.findall(r'^iter (\d+): .* left$', read, re.M)]
        saved = load(tmp_path / 'out')['iter_num']
        assert saved >= printed[-1] >= seen  # iteration i is printed after the checkpoint that stands before it
        assert printed[0] == seen
        seen = saved
    end = seen + 3
    run('train.py', *how, f'--max_iters={end}')
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'ckpt.pt', 'metrics.jsonl'}
    run('train.py', *how, f'--max_iters={end}', '--out_dir=alone', '--checkpoint_interval=0')
    assert_same_state(load(tmp_path / 'out'), load(tmp_path / 'alone'))
    assert [line for line in metrics(tmp_path / 'out') if 'loss' in line] == [line for line in metrics(tmp_path / 'alone') if 'loss' in line]


@posix
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_polite_stop(run, start, tmp_path, number):
    """The unfinished iteration is dropped, the state at its start saved, status 0, and 'auto' goes on bit for bit."""
    how = [*SMALL, '--gradient_accumulation_steps=100', '--max_iters=6', '--eval_interval=6', '--dropout=0.2']
    run('train.py', *how, '--out_dir=a')
    process = start(*how, '--out_dir=b')
    wait_for(process, 'iter 2:')
    time.sleep(0.05)  # inside an iteration, of a quarter of a second
    process.send_signal(number)
    out = process.stdout.read()
    assert process.wait() == 0 and 'asked to leave before iteration' in out and '--init_from=resume' in out
    assert 2 < load(tmp_path / 'b')['iter_num'] < 6
    run('train.py', *how, '--out_dir=b', '--init_from=auto')
    assert_same_state(load(tmp_path / 'a'), load(tmp_path / 'b'))
    assert metrics(tmp_path / 'a') == metrics(tmp_path / 'b')


@posix
def test_polite_stop_of_ranks(run, start, tmp_path):
    """SIGTERM to one worker: both agree on an iteration and end with 0. To torchrun: the same, though it reports 1 itself."""
    how = [*LONG, '--max_iters=2000', '--checkpoint_interval=0', '--eval_interval=5000']
    process = start(*how, ranks=2)
    wait_for(process, 'iter 30:')
    os.kill(children(process)[0], signal.SIGTERM)
    out = process.stdout.read()
    assert process.wait() == 0 and out.count('asked to leave before iteration') == 1
    first = load(tmp_path / 'out')['iter_num']
    process = start(*how, '--init_from=auto', ranks=2)
    wait_for(process, f'iter {first + 30}:')
    process.send_signal(signal.SIGTERM)
    out = process.stdout.read()
    assert process.wait() == 1 and out.count('asked to leave before iteration') == 1 and str(Path('train.py", line')) not in out
    second = load(tmp_path / 'out')['iter_num']
    assert 30 < first < first + 30 < second < 2000
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'ckpt.pt', 'metrics.jsonl'}
    how[-2:] = ['--eval_interval=5000', f'--max_iters={second + 5}']
    run('train.py', *how, '--init_from=auto', ranks=2)
    run('train.py', *how, '--out_dir=alone', ranks=2)
    assert_same_state(load(tmp_path / 'out'), load(tmp_path / 'alone'))


@posix
def test_second_interrupt_leaves_at_once(start):
    process = start(*SMALL, '--gradient_accumulation_steps=4', '--eval_iters=100000')
    wait_for(process, 'a new model')
    time.sleep(1)
    os.kill(process.pid, signal.SIGSTOP)  # so that both are there before it can act on the first
    process.send_signal(signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) in (0, 130, -signal.SIGINT) and 'Traceback' not in process.stdout.read()


def test_best_and_last(run, tmp_path):
    """
    always_save_checkpoint=False: ckpt.pt stays the best model, last.pt is the newest state while that is another one,
    resume takes the newer and says which, and sample.py reads the best.
    """
    how = [*SMALL, '--always_save_checkpoint=False', '--decay_lr=False', '--eval_interval=2']
    run('train.py', *how, '--max_iters=4')
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'ckpt.pt', 'metrics.jsonl'}
    best = load(tmp_path / 'out')
    out = run('train.py', *how, '--init_from=resume', '--max_iters=6', '--learning_rate=3').stdout
    assert 'resuming out/ckpt.pt at iteration 4' in out
    last = load(tmp_path / 'out', 'last.pt')
    assert_same_state(best, load(tmp_path / 'out'))
    assert last['iter_num'] == 6 and last['best_val_loss'] == best['best_val_loss']
    out = run('train.py', *how, '--init_from=auto', '--max_iters=8', '--learning_rate=3').stdout
    assert 'resuming out/last.pt at iteration 6' in out and load(tmp_path / 'out', 'last.pt')['iter_num'] == 8
    run('sample.py', '--device=cpu', '--num_samples=1', '--max_new_tokens=2')
    out = run('train.py', *how, '--max_iters=2').stdout  # anew: nothing of the old run may come back
    assert 'out/ckpt.pt and out/last.pt of an earlier run will be overwritten' in out
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'ckpt.pt', 'metrics.jsonl'} and metrics(tmp_path / 'out')[-1]['iter'] == 2


# -----------------------------------------------------------------------------
# guards

@pytest.mark.parametrize('ranks', [0, 2])
def test_loss_that_is_not_finite(run, tmp_path, ranks):
    """One line that names the first such iteration, whenever it is looked at, and the good checkpoint untouched."""
    how = [*SMALL, '--learning_rate=1e38', '--min_lr=1e38', '--max_iters=60', '--eval_interval=50']
    words = run('train.py', *how, '--log_interval=1', '--out_dir=a', status=1, ranks=ranks)
    first = int(re.search(r'iteration (\d+): the loss or the norm of the gradient is not finite', words)[1])
    assert words.count('not finite') == 1 and metrics(tmp_path / 'a')[-1]['iter'] == first - 1
    words = run('train.py', *how, '--log_interval=40', '--out_dir=b', status=1, ranks=ranks)
    assert f'iteration {first}: the loss' in words
    for out_dir in 'ab':
        saved = load(tmp_path / out_dir)
        assert saved['iter_num'] == 0 and all(p.isfinite().all() for p in saved['model'].values())


def test_float16_overflow_is_the_scalers(run, tmp_path):
    """A loss scale that is too large skips steps and shrinks; it neither stops the run nor touches a weight."""
    run('train.py', *SMALL, '--dtype=float16', '--max_iters=2')
    saved = load(tmp_path / 'out')
    saved['scaler']['scale'] = 2.0 ** 40
    torch.save(saved, tmp_path / 'out' / 'ckpt.pt')
    run('train.py', *SMALL, '--dtype=float16', '--init_from=resume', '--max_iters=4')
    after = load(tmp_path / 'out')
    assert after['scaler']['scale'] == 2.0 ** 38 and after['iter_num'] == 4
    assert all(torch.equal(p, after['model'][name]) for name, p in saved['model'].items())


@posix
def test_disk_full(run, start, tmp_path):
    """One line, the old checkpoint whole, nothing left behind."""
    run('train.py', *SMALL)
    before = (tmp_path / 'out' / 'ckpt.pt').read_bytes()
    limit = len(before) // 2

    def small_disk():
        import resource  # not on Windows
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    process = start(*SMALL, '--init_from=resume', '--max_iters=9', preexec_fn=small_disk)
    out = process.stdout.read()
    assert process.wait() == 1 and 'Traceback' not in out
    assert out.splitlines()[-1].startswith('cannot write out/ckpt.pt: ') and out.endswith('the checkpoint before it is whole\n')
    assert (tmp_path / 'out' / 'ckpt.pt').read_bytes() == before
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'ckpt.pt', 'metrics.jsonl'}


@posix
def test_out_dir_that_cannot_be_written(run, tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'read-only').mkdir(mode=0o555)
    forbidden = 'read-only' if os.getuid() else '/proc/read-only'  # root may write to the first
    for out_dir in ('file', 'file/below', forbidden):
        assert f'cannot write {out_dir}' in run('train.py', *SMALL, f'--out_dir={out_dir}', status=1)


@posix
def test_rank_that_dies(start, tmp_path):
    """kill -9 of one rank of two: the other says so and ends, nothing hangs, the checkpoint is whole."""
    process = start(*LONG, '--max_iters=100000', ranks=2)
    wait_for(process, 'iter 50:')
    os.kill(children(process)[1], signal.SIGKILL)
    out = process.stdout.read()
    assert process.wait(60) == 1 and 'rank 0: lost the other ranks' in out
    assert load(tmp_path / 'out')['iter_num'] >= 40


@posix
def test_early_stop_harms_nothing(run, start, tmp_path):
    """A run from scratch over an older one, stopped before its first checkpoint: checkpoint and metrics of the older one stay."""
    run('train.py', *SMALL)
    before = [(tmp_path / 'out' / name).read_bytes() for name in ('ckpt.pt', 'metrics.jsonl')]
    process = start(*SMALL, '--eval_iters=100000')
    wait_for(process, 'out/ckpt.pt of an earlier run will be overwritten')
    time.sleep(1)  # inside the first evaluation
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) in (0, -signal.SIGTERM)
    assert before == [(tmp_path / 'out' / name).read_bytes() for name in ('ckpt.pt', 'metrics.jsonl')]


@posix
def test_two_runs_in_one_folder(run, start, tmp_path):
    """The second refuses; the lock dies with its process and leaves no file."""
    process = start(*LONG, '--max_iters=100000')
    wait_for(process, 'iter 20:')
    assert 'another run is writing to out' in run('train.py', *LONG, status=1)
    process.kill()
    process.wait()
    run('train.py', *SMALL, '--max_iters=1')


def test_torn_metrics(run, tmp_path):
    """A line that a kill cut in half is dropped with the lines past the checkpoint."""
    run('train.py', *SMALL)
    whole = (tmp_path / 'out' / 'metrics.jsonl').read_text()
    (tmp_path / 'out' / 'metrics.jsonl').write_text(whole + '{"iter": 5, "loss": 1.0}\n{"iter": 6, "lo')
    run('train.py', *SMALL, '--init_from=resume')
    kept = metrics(tmp_path / 'out')
    assert [line['iter'] for line in kept] == [0, 0, 1, 2, 3, 4, 5] and 'val/loss' in kept[-1]
