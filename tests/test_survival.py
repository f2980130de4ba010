"""Runs that are killed, stopped, starved and spread over ranks keep their curve and their checkpoint."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import MACHINE, PLACE, ROOT, SMALL, children, wait_for
from reference import points, read_wandb_runs

slow = pytest.mark.slow
posix = pytest.mark.skipif(os.name != 'posix', reason='signals and locks of POSIX systems')
LONG = [
    *SMALL,
    '--max_iters=24',
    '--eval_interval=12',
    '--checkpoint_interval=5',
    '--dropout=0.2',
    '--gradient_accumulation_steps=4',
]


def load(folder, name='ckpt.pt'):
    return torch.load(folder / name, 'cpu', weights_only=True)


def newest(folder):
    """The checkpoint that resume takes."""
    found = [load(folder, path.name) for path in folder.glob('*.pt') if path.name in ('ckpt.pt', 'last.pt')]
    return max(found, key=lambda checkpoint: checkpoint['iter_num'])


def names(folder):
    return {path.name for path in folder.iterdir()} - {'.lock'}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != '.lock'}


def assert_same_state(a, b):
    """Weights, moments, scaler: equal to the bit."""
    assert a['iter_num'] == b['iter_num'] and a['best_val_loss'] == b['best_val_loss']
    assert a['scaler'] == b['scaler']
    assert all(torch.equal(p, b['model'][name]) for name, p in a['model'].items())
    assert a['optimizer']['state'].keys() == b['optimizer']['state'].keys()
    for i, state in a['optimizer']['state'].items():
        assert all(torch.equal(v, b['optimizer']['state'][i][k]) for k, v in state.items())


def metrics(folder):
    """The lines of metrics.jsonl for training and evaluation, without their timings."""
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    timings = ('ms', 'tokens_per_second', 'mfu')
    return [{k: v for k, v in line.items() if k not in timings} for line in lines if line['kind'] != 'run']


def assert_close(a, b):
    """Metrics of two runs with other numbers of ranks, which sum in another order."""
    assert [line['iter'] for line in a] == [line['iter'] for line in b]
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys() and one['kind'] == other['kind']
        for key in one.keys() - {'kind'}:
            accuracy = 1e-4 if key == 'grad_norm' else 1e-5
            assert other[key] == pytest.approx(one[key], rel=accuracy), (one['iter'], key)


# -----------------------------------------------------------------------------
# the curve


@posix
@slow
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_killed_and_resumed(run, start, tmp_path, dtype):
    """With dropout and accumulation, killed anywhere: weights, moments, metrics of the run left alone."""
    run('train.py', *LONG, f'--dtype={dtype}', '--out_dir=a')
    process = start(*LONG, f'--dtype={dtype}', '--out_dir=b', real=dtype == 'float32')
    wait_for(process, 'iter 11:')
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 0 < newest(tmp_path / 'b')['iter_num'] < 24
    run('train.py', '--out_dir=b', '--init_from=resume', *MACHINE, f'--dtype={dtype}')
    assert_same_state(load(tmp_path / 'a'), load(tmp_path / 'b'))
    lines = metrics(tmp_path / 'a')
    assert lines == metrics(tmp_path / 'b') and len(lines) == 24 + 3
    assert lines[1].keys() == {'kind', 'iter', 'loss', 'smoothed_loss', 'lr', 'grad_norm', 'tokens'}
    assert lines[-1]['tokens'] == 24 * 4 * 4 * 16


@slow
def test_number_of_ranks(run, tmp_path):
    """One process, two ranks and four follow one curve: epochs, dropout, evaluations whose batches do not
    divide, and one of all of val.bin in order. So does a run that changes their number on the way.
    """
    how = [
        *SMALL,
        '--gradient_accumulation_steps=4',
        '--dropout=0.2',
        '--sampler=epoch',
        '--eval_iters=3',
        '--max_iters=25',
        '--eval_interval=10',
        '--learning_rate=1e-3',
    ]
    more = ['--init_from=resume', *MACHINE, '--eval_iters=None', '--max_iters=40']
    run('train.py', *how, '--out_dir=one')
    out = run('train.py', *how, '--out_dir=two', ranks=2).stdout
    assert 'tokens per iteration will be: 256\n' in out and f'; {PLACE}, 2 processes\n' in out
    assert out.count('step 10:') == out.count('iter 9:') == out.count('best val loss') == 1
    shutil.copytree(tmp_path / 'two', tmp_path / 'two-one')
    perplexities = []
    for out_dir, ranks in (('one', 0), ('two-one', 0), ('two', 4)):
        out = run('train.py', *more, f'--out_dir={out_dir}', ranks=ranks).stdout
        found = re.findall(r'^val.bin once through: perplexity ([\d.]+) per token', out, re.M)
        perplexities.append([float(perplexity) for perplexity in found])
        assert len(found) == 2 and perplexities[-1] == pytest.approx(perplexities[0], abs=0.02)
        assert_close(metrics(tmp_path / 'one'), metrics(tmp_path / out_dir))
    # an evaluation at the end of the first half, which the whole run would not make, is not in there
    assert len(metrics(tmp_path / 'one')) == 40 + 5


@slow
def test_three_ranks_resume_exactly(run, tmp_path):
    """DistributedDataParallel sums in another order in the first iteration of a process than in the others:
    a resumed run of three ranks once had other bits than one that went through.
    """
    how = [*SMALL, '--gradient_accumulation_steps=3', '--eval_interval=4']
    run('train.py', *how, '--max_iters=8', '--out_dir=whole', ranks=3)
    run('train.py', *how, '--max_iters=4', ranks=3)
    run('train.py', '--init_from=resume', *MACHINE, '--max_iters=8', ranks=3)
    assert_same_state(load(tmp_path / 'out'), load(tmp_path / 'whole'))


@slow
def test_float16_on_four_ranks(run, altered, tmp_path):
    """Gradients overflow at the same scale of the GradScaler whatever the number of ranks: one curve, but for
    float16's rounding.
    """
    script = altered(
        "import functools, torch\ntorch.amp.GradScaler = functools.partial("
        "torch.amp.GradScaler, init_scale=2.0 ** 22)"
    )
    how = [*SMALL, '--gradient_accumulation_steps=4', '--dtype=float16', '--max_iters=4']
    losses = []
    for out_dir, ranks in (('one', 0), ('four', 4)):
        run(script, *how, f'--out_dir={out_dir}', ranks=ranks)
        losses.append([line['loss'] for line in metrics(tmp_path / out_dir) if line['kind'] == 'train'])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


# -----------------------------------------------------------------------------
# kills and stops


@posix
@slow
def test_kills(run, start, tmp_path, request):
    """SIGKILL at random moments, most of them inside a save: there is always a whole checkpoint, nothing is
    lost beyond the last save, and the end is that of the run left alone. More with --kills=200.
    """
    # large for its 4 tokens an iteration, so that nearly all of the time goes into saving
    kills = request.config.getoption('--kills')
    how = [
        *SMALL,
        '--n_embd=192',
        '--n_layer=3',
        '--batch_size=1',
        '--block_size=4',
        '--eval_interval=1000',
        '--gradient_accumulation_steps=1',
        '--checkpoint_interval=1',
        '--init_from=auto',
    ]
    delays, out, seen = random.Random(0), tmp_path / 'out', 0
    for _ in range(kills):
        process = start(*how, f'--max_iters={50 * kills}')
        read = wait_for(process, 'iter ')
        time.sleep(delays.uniform(0, 0.3))
        process.kill()
        read += process.stdout.read()
        assert process.wait() == -signal.SIGKILL
        printed = [int(i) for i in re.findall(r'^iter (\d+): .* left$', read, re.M)]
        saved = newest(out)['iter_num'] if (out / 'last.pt').exists() else 0
        assert saved >= printed[-1]  # iteration i is printed after the checkpoint that stands before it
        assert printed[0] == seen
        seen = saved
    assert seen
    run('train.py', *how, f'--max_iters={seen + 3}')
    # .old: of first runs that were killed before their first save
    left = {name for name in names(out) if not name.startswith('metrics.jsonl.old')}
    assert left == {'ckpt.pt', 'metrics.jsonl'}
    run('train.py', *how, f'--max_iters={seen + 3}', '--out_dir=alone', '--checkpoint_interval=0')
    assert_same_state(load(out), load(tmp_path / 'alone'))
    assert metrics(out) == metrics(tmp_path / 'alone')


@posix
@pytest.mark.parametrize(
    'name', ['SIGINT', *(pytest.param(name, marks=slow) for name in ('SIGTERM', 'SIGHUP', 'SIGUSR1'))]
)
def test_polite_stop(run, start, tmp_path, name):
    """The unfinished iteration is dropped, the state at its start saved. The command that is printed goes on
    as it stands, bit for bit. The status is 0, but Ctrl-C ends a shell's loop of runs too.
    """
    how = [*SMALL, '--gradient_accumulation_steps=60', '--max_iters=4', '--eval_interval=4', '--dropout=0.2']
    number = getattr(signal, name)
    real = name == 'SIGTERM'
    run('train.py', *how, '--out_dir=a')
    process = start(*how, '--out_dir=b b', real=real)
    wait_for(process, 'iter 1:')
    time.sleep(0.03)  # inside an iteration, which takes a sixth of a second
    process.send_signal(number)
    out = process.stdout.read()
    assert process.wait() == (-number if name == 'SIGINT' else 0)
    stopped, command = re.search(r'^stopped before iteration (\d): go on with `(.*)`\n\Z', out, re.M).groups()
    assert 1 < load(tmp_path / 'b b', 'last.pt')['iter_num'] == int(stopped) < 4
    assert names(tmp_path / 'b b') == {'last.pt', 'metrics.jsonl'}  # nothing was evaluated for it
    words = shlex.split(command)
    assert words[0] == 'python' and Path(words[1]).name == 'train.py'
    assert words[2:4] == ['--init_from=resume', '--out_dir=b b']
    if real:
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ['PATH']])
        done = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env={**os.environ, 'PATH': path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    else:
        run('train.py', *words[2:])
    assert_same_state(load(tmp_path / 'a'), load(tmp_path / 'b b'))
    assert metrics(tmp_path / 'a') == metrics(tmp_path / 'b b')


@posix
@pytest.mark.parametrize('ranks', [0, pytest.param(2, marks=slow)])
def test_stop_in_an_evaluation(run, start, tmp_path, ranks):
    """SIGTERM while an evaluation of a minute runs: it counts for nothing, and the state is saved at once.
    Slurm and torchrun kill half a minute behind the signal.
    """
    run('train.py', *SMALL)
    again = ['--init_from=resume', *MACHINE, '--max_iters=20', '--eval_interval=8', '--eval_iters=200000']
    process = start(*again, ranks=ranks, torchrun=ranks > 0)
    wait_for(process, 'iter 7:')
    time.sleep(0.5)  # inside the evaluation
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out = process.stdout.read()
    assert process.wait(20) == (1 if ranks else 0)  # torchrun says 1
    assert time.monotonic() - began < 10 and out.count('stopped before iteration 8: go on with') == 1
    assert load(tmp_path / 'out', 'last.pt')['iter_num'] == 8 and load(tmp_path / 'out')['iter_num'] == 5
    assert metrics(tmp_path / 'out')[-1]['iter'] == 7


@posix
@slow
def test_signals_that_are_ignored(start, altered, tmp_path):
    """nohup has SIGHUP ignored, and a shell's `&` SIGINT: the run goes on through them."""
    script = altered("import signal\nfor n in (1, 2):\n    signal.signal(n, signal.SIG_IGN)")
    process = start(*SMALL, '--max_iters=100000', script=script)
    wait_for(process, 'iter 3:')
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    wait_for(process, 'iter 200:')
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0 and 'stopped before iteration' in process.stdout.read()


@posix
def test_terminal_that_is_closed(start, tmp_path):
    """Nobody reads the lines any more, and every write is an error: the state is saved nevertheless."""
    ours, theirs = os.openpty()
    process = start(*SMALL, '--max_iters=100000', '--eval_interval=100000', stdout=theirs, stderr=theirs)
    os.close(theirs)
    read = b''
    while b'iter 5:' not in read:
        read += os.read(ours, 10000)
    os.close(ours)
    time.sleep(0.2)
    process.send_signal(signal.SIGHUP)
    assert process.wait(20) == 0 and load(tmp_path / 'out', 'last.pt')['iter_num'] > 5


@posix
@slow
def test_polite_stop_of_ranks(run, start, tmp_path):
    """SIGTERM to one worker: both agree on an iteration and end with 0. To torchrun: the same, though it
    reports 1 itself. The curve is that of one process left alone, and wandb has each of its points.
    """
    env = {'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true'}
    how = [*SMALL, '--dropout=0.2', '--gradient_accumulation_steps=4', '--learning_rate=1e-3']
    process = start(
        *how, '--max_iters=2000', '--eval_interval=20', '--wandb_log=True', ranks=2, torchrun=True, env=env
    )
    wait_for(process, 'iter 25:')
    os.kill(children(process)[0], signal.SIGTERM)
    out = process.stdout.read()
    assert process.wait() == 0 and out.count('stopped before iteration') == 1 and '`torchrun … ' in out
    first = newest(tmp_path / 'out')['iter_num']
    process = start('--init_from=resume', *MACHINE, ranks=2, torchrun=True, env=env)
    wait_for(process, f'iter {first + 25}:')
    process.send_signal(signal.SIGTERM)
    out = process.stdout.read()
    assert process.wait() == 1 and out.count('stopped before iteration') == 1
    assert str(Path('train.py", line')) not in out
    second = newest(tmp_path / 'out')['iter_num']
    assert 25 < first < first + 25 < second < 200
    assert names(tmp_path / 'out') <= {'ckpt.pt', 'last.pt', 'metrics.jsonl'}
    run('train.py', *how, f'--max_iters={second}', '--eval_interval=20', '--out_dir=alone')
    alone, lines = metrics(tmp_path / 'alone'), metrics(tmp_path / 'out')
    assert_close(alone[: len(lines)], lines)
    assert len(lines) >= len(alone) - 1  # nobody has evaluated where the second stop came
    (name, history), (again, more) = read_wandb_runs(tmp_path)
    assert name == again and history and more
    for key in ('val/loss', 'loss', 'grad_norm'):
        assert points(history + more, key) == points(lines, key)


@posix
@pytest.mark.parametrize('real', [False, pytest.param(True, marks=slow)])
def test_second_interrupt_leaves_at_once(start, altered, real):
    """A run that cannot heed the first Ctrl-C, here inside a call of PyTorch that takes long, answers it at
    once, and ends at the second.
    """
    stuck = altered(
        "import model, torch\n"
        "large = torch.ones(6000, 6000, dtype=torch.float64)\n"
        "model.GPT.forward = lambda *a, **b: print('forward', flush=True) or large @ large"
    )
    process = start(*SMALL, script=stuck, real=real)
    wait_for(process, 'forward')
    process.send_signal(signal.SIGINT)
    wait_for(process, 'stopping after this micro-batch, again to quit')
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert (process.wait(20), process.stdout.read()) == (128 + signal.SIGINT, '\n')
    assert time.monotonic() - began < 3


@posix
@slow
@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
@pytest.mark.parametrize(
    'module',
    [
        'numpy.exceptions',
        'numpy.linalg',
        'torch._C',
        'torch.nn',
        'torch.distributed',
        'torch.utils.checkpoint',
    ],
)
def test_interrupt_while_importing(start, tmp_path, script, module):
    """Ctrl-C in the seconds before the first line, here once a module has been imported: not a word. What
    train.py leaves behind is at most its empty folder.
    """
    process = start(
        *(SMALL if script == 'train.py' else []),
        script=script,
        real=True,
        env={'PYTHONPROFILEIMPORTTIME': '1'},
    )  # a line when an import is complete
    for line in process.stdout:
        if line.split('|')[-1].strip() == module:
            break
    else:
        raise AssertionError(f'{script} does not import {module}')
    process.send_signal(signal.SIGINT)
    rest = [line for line in process.stdout if not line.startswith('import time:')]
    assert process.wait(20) == -signal.SIGINT
    assert ''.join(rest) == ''
    assert [path for path in tmp_path.rglob('*') if path.is_file() and path.name != '.lock'] == []


@posix
@slow
@pytest.mark.parametrize('delay', [0.6, 0.9, 1.2, 1.6])
def test_interrupt_at_any_time(start, tmp_path, delay):
    """Ctrl-C so many seconds after the start, in the imports or behind them: no file, and no traceback but
    Python's own of the few imports that stand above the keys.
    """
    process = start(*SMALL, '--eval_iters=100000', real=True)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    out = process.stdout.read()
    first_imports = (ROOT / 'train.py').read_text(encoding='utf-8').partition('\nROOT =')[0].count('\n')
    lines = re.findall(r'train.py", line (\d+)', out)
    assert process.wait(20) == -signal.SIGINT and all(int(line) <= first_imports + 1 for line in lines)
    assert {path.name for path in tmp_path.rglob('*') if path.is_file()} <= {'metrics.jsonl', '.lock'}


@posix
@slow
def test_early_stop_harms_nothing(run, start, tmp_path):
    """A run stopped before its first step, new in the folder of an older one or resumed: nothing is lost."""
    run('train.py', *SMALL)
    before = contents(tmp_path / 'out')
    again = ['--init_from=resume', *MACHINE, '--max_iters=9']
    for how, iteration, says in ((SMALL, 0, 'nothing was learned'), (again, 5, 'go on with')):
        process = start(*how, '--eval_iters=100000')
        wait_for(process, 'data/tiny: ')
        time.sleep(0.5)  # inside the first evaluation
        process.send_signal(signal.SIGTERM)
        out = process.stdout.read()
        assert process.wait(20) == 0 and 'step ' not in out
        assert f'stopped before iteration {iteration}: {says}' in out
        assert contents(tmp_path / 'out') == before
    # no checkpoint knows what was asked for now, so the command repeats it
    command = re.search('go on with `(.*)`', out)[1]
    assert '--max_iters=9' in command and '--eval_iters=100000' in command


@posix
@slow
def test_rank_that_dies(start, tmp_path):
    """kill -9 of one rank of two: the other says so and ends, nothing hangs, the checkpoint is whole."""
    process = start(*LONG, '--max_iters=100000', ranks=2, torchrun=True)
    wait_for(process, 'iter 20:')
    os.kill(children(process)[1], signal.SIGKILL)
    out = process.stdout.read()
    assert process.wait(60) == 1 and out.count('rank 0: lost the other ranks') == 1
    assert newest(tmp_path / 'out')['iter_num'] >= 15


# -----------------------------------------------------------------------------
# what stands in the folder


@slow
def test_best_and_last(run, start, tmp_path):
    """always_save_checkpoint=False: ckpt.pt stays the best model, last.pt is the newest state while that is
    another one, resume takes the newer and says which, and sample.py reads the best. A new run in the folder
    keeps all of the old one under other names.
    """
    how = ['--decay_lr=False', '--eval_interval=2', '--always_save_checkpoint=False']
    out = run('train.py', *SMALL, *how, '--max_iters=4').stdout
    assert 'resume' not in out and names(tmp_path / 'out') == {'ckpt.pt', 'metrics.jsonl'}
    best = load(tmp_path / 'out')
    again = ['--init_from=auto', *MACHINE, '--learning_rate=0.1']
    out = run('train.py', *again, '--max_iters=6').stdout
    assert 'resuming out/ckpt.pt at iteration 4' in out
    last = load(tmp_path / 'out', 'last.pt')
    assert_same_state(best, load(tmp_path / 'out'))
    assert last['iter_num'] == 6 and last['best_val_loss'] == best['best_val_loss']
    out = run('train.py', *again, '--max_iters=8').stdout
    assert 'resuming out/last.pt at iteration 6' in out and load(tmp_path / 'out', 'last.pt')['iter_num'] == 8
    assert_same_state(best, load(tmp_path / 'out'))
    text = run('sample.py', *MACHINE, '--num_samples=1', '--max_new_tokens=20').stdout
    old = contents(tmp_path / 'out')
    for suffix in ('.old', '.old1'):
        out = run('train.py', *SMALL, *how, '--max_iters=2').stdout
        assert [name for name in old if f'out/{name}{suffix}' not in out] == []
        found = contents(tmp_path / 'out')
        assert {name: found[f'{name}{suffix}'] for name in old} == old
        old = {name: found[name] for name in ('ckpt.pt', 'metrics.jsonl')}
        assert len(found) == (5 if suffix == '.old' else 7) and metrics(tmp_path / 'out')[-1]['iter'] == 2
    process = start(*SMALL, *how, '--max_iters=100000', '--eval_interval=100000', '--out_dir=worse')
    wait_for(process, 'iter 2:')
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    assert names(tmp_path / 'worse') == {'last.pt', 'metrics.jsonl'}  # it was not evaluated
    worse = ['--out_dir=worse', *MACHINE, '--num_samples=1', '--max_new_tokens=20']
    assert run('sample.py', *worse).stdout != text
    out = run('train.py', *again, '--out_dir=worse', '--max_iters=3').stdout
    assert 'resuming worse/last.pt at iteration ' in out


def test_tokens_with_another_batch_size(run, tmp_path):
    """The count of tokens in metrics.jsonl goes on where it was, twice."""
    run('train.py', *SMALL, '--max_iters=3')
    run('train.py', '--init_from=resume', *MACHINE, '--max_iters=5', '--batch_size=6')
    run('train.py', '--init_from=resume', *MACHINE, '--max_iters=6', '--gradient_accumulation_steps=1')
    tokens = [line['tokens'] for line in metrics(tmp_path / 'out') if line['kind'] == 'train']
    assert tokens == [0, 128, 256, 384, 384 + 192, 384 + 2 * 192]
    assert load(tmp_path / 'out')['tokens'] == 384 + 2 * 192 + 96


def test_torn_metrics(run, tmp_path):
    """What a killed run wrote behind its last checkpoint, half a line at the end of it, comes again: the
    lines are those of a run that was left alone. Each start leaves a line with its settings.
    """
    run('train.py', *SMALL, '--max_iters=7', '--out_dir=alone')
    run('train.py', *SMALL)
    path = tmp_path / 'out' / 'metrics.jsonl'
    with path.open('ab') as f:
        f.write(b'{"kind": "train", "iter": 5, "loss": 1.0}\n\xff\n{"kind": "train", "iter": 6, "lo')
    run('train.py', '--init_from=resume', '--max_iters=7', *MACHINE)
    assert metrics(tmp_path / 'out') == metrics(tmp_path / 'alone')
    path.write_bytes(path.read_bytes()[:2500])  # by somebody, in the middle of a line
    run('train.py', '--init_from=resume', '--max_iters=8', *MACHINE)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line['iter'] for line in lines if line['kind'] == 'train'][-1] == 7
    starts = [(line['iter'], line['settings']['max_iters']) for line in lines if line['kind'] == 'run']
    assert starts[0] == (0, 5) and starts[-1] == (7, 8)
    assert lines[0]['versions']['torch'] == torch.__version__ and lines[0]['train_tokens'] == 3000


@posix
def test_two_runs_in_one_folder(run, start, tmp_path):
    """The second refuses; the lock dies with its process and leaves no file."""
    process = start(*SMALL, '--max_iters=100000')
    wait_for(process, 'iter 5:')
    words = run('train.py', *SMALL, status=1)
    assert words == 'another run is writing to out: give this one another --out_dir\n'
    run('train.py', *SMALL, '--init_from=resume', '--eval_only=True')  # reads only
    process.kill()
    process.wait()
    run('train.py', *SMALL, '--max_iters=1')
    assert {name.partition('.')[0] for name in names(tmp_path / 'out')} == {'ckpt', 'metrics'}


def test_damaged_checkpoint(run, tmp_path):
    """resume leaves out a damaged file and says so; if there is no other, that is the error."""
    how = ['--decay_lr=False', '--eval_interval=2', '--always_save_checkpoint=False']
    run('train.py', *SMALL, *how, '--max_iters=4')
    again = ['--init_from=auto', *MACHINE, '--learning_rate=0.1']
    run('train.py', *again, '--max_iters=6')
    last = tmp_path / 'out' / 'last.pt'
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 4
    last.write_bytes(data)
    out = run('train.py', *again, '--max_iters=6').stdout
    assert out.startswith('cannot read out/last.pt, damaged or not a checkpoint (')
    assert 'resuming out/ckpt.pt at iteration 4' in out
    (tmp_path / 'out' / 'ckpt.pt').write_bytes(data)
    last.unlink(missing_ok=True)
    words = run('train.py', *again, status=1)
    assert words.startswith('cannot read out/ckpt.pt, damaged or not a checkpoint')
    assert (tmp_path / 'out' / 'ckpt.pt').read_bytes() == data


@posix
@slow
def test_new_run_that_never_saves(start, altered, run, tmp_path):
    """A new run in an old folder, killed before its first save: the old run is all there, under other names.
    resume and auto do not begin anew, and the command that they print goes on with it.
    """
    run('train.py', *SMALL)
    old = contents(tmp_path / 'out')
    slow = altered(
        "import os, time\nfsync = os.fsync\n"
        "os.fsync = lambda *a: print('fsync', flush=True) or time.sleep(60)"
    )
    for signals, status in (
        ([signal.SIGKILL], -signal.SIGKILL),
        ([signal.SIGINT, signal.SIGINT], 128 + signal.SIGINT),
    ):
        process = start(*SMALL, '--seed=1', script=slow, real=True)
        wait_for(process, 'fsync')
        for number in signals:
            process.send_signal(number)
            time.sleep(0.3)
        assert process.wait() == status and 'Traceback' not in process.stdout.read()
        found = contents(tmp_path / 'out')
        assert 'ckpt.pt' not in found and all(found[f'{name}.old'] == old[name] for name in old)
        for how in ('resume', 'auto'):
            words = run('train.py', f'--init_from={how}', *MACHINE, status=1)
            assert words.startswith(
                'no checkpoint at out/ckpt.pt: bring back the run that was set aside by `'
            )
        moves, goes_on = words.split('`')[1].rsplit(' && ', 1)
        subprocess.run(moves, shell=True, cwd=tmp_path, check=True)
        run('train.py', *shlex.split(goes_on)[2:], '--max_iters=6')
        assert load(tmp_path / 'out-old')['iter_num'] == 6
        shutil.rmtree(tmp_path / 'out')
        shutil.rmtree(tmp_path / 'out-old')
        run('train.py', *SMALL)
        old = contents(tmp_path / 'out')


@posix
def test_no_links(run, altered, tmp_path):
    """A file system without hard links: the old checkpoint is copied. Without space, all stays as it is."""
    run('train.py', *SMALL)
    old = contents(tmp_path / 'out')
    without = "import os\ndef link(*a):\n    raise OSError({}, 'no')\nos.link = link\n"
    full = altered(without.format(28) + "import shutil\nshutil.copyfileobj = link")
    assert 'no' in run(full, *SMALL, '--seed=1', status=1)
    assert contents(tmp_path / 'out') == old
    run(altered(without.format(95)), *SMALL, '--seed=1')
    found = contents(tmp_path / 'out')
    assert found['ckpt.pt.old'] == old['ckpt.pt'] != found['ckpt.pt']


# -----------------------------------------------------------------------------
# guards


def test_loss_that_is_not_finite(run, tmp_path):
    """One line where it is seen: in the log, at an evaluation, or in the weights before a save. The good
    checkpoint stays, and the command that is printed goes on from it.
    """
    run('train.py', *SMALL)
    good = (tmp_path / 'out' / 'ckpt.pt').read_bytes()
    ruin = ['--init_from=resume', *MACHINE, '--learning_rate=1e18', '--min_lr=1e18', '--max_iters=60']
    how = [*ruin, '--eval_interval=50']
    words = run('train.py', *how, '--log_interval=40', status=1)
    assert words.startswith(
        'iteration 40: the loss is not finite. Go on from out/ckpt.pt of iteration 5 with '
    )
    words = run('train.py', *how, '--log_interval=1', status=1)
    first = int(re.match(r'iteration (\d+): the loss is not finite', words)[1])
    assert first > 5 and metrics(tmp_path / 'out')[-1]['iter'] == first - 1
    for save, what in (('--eval_interval=7', 'the loss'), ('--checkpoint_interval=7', 'a weight')):
        words = run('train.py', *how, save, '--log_interval=40', status=1)
        assert words.startswith(f'iteration 7: {what} is not finite')
    assert (tmp_path / 'out' / 'ckpt.pt').read_bytes() == good
    assert names(tmp_path / 'out') == {'ckpt.pt', 'metrics.jsonl'}
    words = run('train.py', *SMALL, *how[2:], '--out_dir=new', status=1)
    assert 'is not finite. Start again with a lower --learning_rate' in words
    assert names(tmp_path / 'new') == {'metrics.jsonl'}


@slow
def test_loss_of_one_rank_that_is_not_finite(run, altered, tmp_path):
    """All ranks end, in one line, before rank 0, whose losses are fine, could save."""
    poisoned = altered('''
import os, model
forward, calls = model.GPT.forward, 0

def poisoned(self, *arguments, **how):
    global calls
    calls += self.training
    logits, loss = forward(self, *arguments, **how)
    return logits, loss * float('nan') if os.environ['RANK'] == '1' and calls == 8 else loss

model.GPT.forward = poisoned
''')
    how = [
        *SMALL,
        '--gradient_accumulation_steps=4',
        '--eval_interval=50',
        '--checkpoint_interval=6',
        '--max_iters=20',
    ]
    words = run(poisoned, *how, '--log_interval=50', status=1, ranks=2, torchrun=True)
    assert words.count('iteration 6: a weight is not finite') == 1
    words = run(poisoned, *how, '--out_dir=new', status=1, ranks=2, torchrun=True)
    assert words.count('not finite') == 1 and 'iteration 3: the loss is not finite' in words
    assert names(tmp_path / 'out') == names(tmp_path / 'new') == {'metrics.jsonl'}


@slow
def test_float16_overflow_is_the_scalers(run, tmp_path):
    """A loss scale that is too large skips steps and shrinks: it neither stops the run nor moves a weight."""
    run('train.py', *SMALL, '--dtype=float16', '--max_iters=2')
    saved = load(tmp_path / 'out')
    saved['scaler']['scale'] = 2.0**40
    torch.save(saved, tmp_path / 'out' / 'ckpt.pt')
    run('train.py', *SMALL, '--dtype=float16', '--init_from=resume', '--max_iters=4')
    after = load(tmp_path / 'out')
    assert after['scaler']['scale'] == 2.0**38 and after['iter_num'] == 4
    assert all(torch.equal(p, after['model'][name]) for name, p in saved['model'].items())


@posix
def test_disk_full(run, tmp_path):
    """One line, the old checkpoint whole, nothing left behind. A new run sets it aside first."""
    run('train.py', *SMALL)
    before = (tmp_path / 'out' / 'ckpt.pt').read_bytes()
    for how, name in ((['--init_from=resume', '--max_iters=9'], 'ckpt.pt'), (SMALL, 'ckpt.pt.old')):
        words = run('train.py', *how, *MACHINE, status=1, file_size=len(before) // 2)
        assert words == 'out/ckpt.pt: File too large\n'
        assert (tmp_path / 'out' / name).read_bytes() == before
        assert names(tmp_path / 'out') - {'metrics.jsonl.old'} == {name, 'metrics.jsonl'}


@posix
def test_out_dir_that_cannot_be_written(run, tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'read-only').mkdir(mode=0o555)
    forbidden = 'read-only/new' if os.getuid() else '/proc/read-only'  # root may write to the first
    for out_dir, reason in (
        ('file', 'File exists'),
        ('file/below', 'Not a directory'),
        (forbidden, 'Permission denied' if os.getuid() else 'No such file or directory'),
    ):
        assert run('train.py', *SMALL, f'--out_dir={out_dir}', status=1) == f'{out_dir}: {reason}\n'


@posix
@slow
def test_metrics_of_others(run, start, tmp_path):
    """A metrics.jsonl that is removed costs no checkpoint."""
    process = start(*SMALL, '--max_iters=100000', '--eval_interval=100000', '--log_interval=20')
    wait_for(process, 'iter 20:')
    (tmp_path / 'out' / 'metrics.jsonl').unlink()
    wait_for(process, 'iter 60:')  # then the line of 40 is written
    (tmp_path / 'out' / 'metrics.jsonl').unlink()
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0 and load(tmp_path / 'out', 'last.pt')['iter_num'] > 40


@slow
def test_better_after_a_stop(run, tmp_path):
    """A run that was stopped before an evaluation, finds its best loss there when resumed, and saves it."""
    how = [*SMALL, '--always_save_checkpoint=False', '--decay_lr=False', '--eval_interval=4']
    run('train.py', *how, '--max_iters=4')
    saved = load(tmp_path / 'out')
    assert saved['best_val_loss'] < 5
    saved['best_val_loss'] = 5.0  # as it was when SIGTERM came in the middle of the evaluation
    torch.save(saved, tmp_path / 'out' / 'last.pt')
    (tmp_path / 'out' / 'ckpt.pt').unlink()
    run('train.py', *how, '--init_from=resume', '--max_iters=4')
    assert load(tmp_path / 'out')['best_val_loss'] < 5 and not (tmp_path / 'out' / 'last.pt').exists()


@slow
def test_folders_that_are_not_shared(run, altered, tmp_path):
    """Ranks that find checkpoints of different iterations, each in a folder of its own machine, say so."""
    run('train.py', *SMALL, '--max_iters=2')
    (tmp_path / '1').mkdir()
    shutil.copytree(tmp_path / 'out', tmp_path / '1' / 'out')
    run('train.py', *SMALL, '--max_iters=3', '--init_from=resume')
    script = altered("import os\nif os.environ['RANK'] == '1':\n    os.chdir('1')")
    words = run(script, *SMALL, '--init_from=resume', '--max_iters=9', status=1, ranks=2, torchrun=True)
    assert 'iterations 2 and 3 were found: out must be one shared folder' in words
