"""
How runs are started elsewhere: by launchers that set only a part of the environment, by launchers that call
train.py in their own process, by a Python that does not look beside the script, with wandb and no network, on
a full disk.
"""

import errno
import os
import re
import signal
import socket
import sys
import time

import pytest
import torch
from conftest import SMALL, wait_for
from reference import wandb_exit_codes

from data.common import naming

posix = pytest.mark.skipif(os.name != 'posix', reason='signals and limits of POSIX systems')
needs_dev_full = pytest.mark.skipif(not os.path.exists('/dev/full'), reason='a disk that is always full')
LAUNCHER = {
    'RANK': '0',
    'LOCAL_RANK': '0',
    'WORLD_SIZE': '2',
    'MASTER_ADDR': '127.0.0.1',
    'MASTER_PORT': '29400',
}


# -----------------------------------------------------------------------------
# The environment of a launcher


@pytest.mark.parametrize(
    ('given', 'problem'),
    [
        ({'LOCAL_RANK': ''}, 'no LOCAL_RANK'),  # Kubernetes sets none
        ({'RANK': '', 'LOCAL_RANK': '', 'WORLD_SIZE': ''}, 'no RANK, no LOCAL_RANK, no WORLD_SIZE'),
        ({'MASTER_ADDR': '', 'MASTER_PORT': 'http'}, 'MASTER_PORT=http, no MASTER_ADDR'),
        ({'RANK': '2'}, 'RANK=2 with WORLD_SIZE=2'),
        ({'MASTER_PORT': '99999'}, 'MASTER_PORT=99999'),
    ],
)
def test_a_launcher_in_part(run, tmp_path, given, problem):
    """One line, before anything is written. Each process trained the whole run alone, or had a traceback."""
    words = run('train.py', *SMALL, status=1, env={**LAUNCHER, **given})
    assert words.startswith(f'the environment has {problem}: start the ranks by torchrun, or set RANK, ')
    assert list(tmp_path.iterdir()) == []


def test_a_stray_world_size(run):
    """A cluster has left it behind, or RANK alone: whether that is a launcher's, only the user knows."""
    words = run('train.py', *SMALL, status=1, env={'WORLD_SIZE': '2'})
    assert words.startswith('the environment has no RANK, no LOCAL_RANK, no MASTER_PORT, no MASTER_ADDR: ')
    assert words.endswith('or none for one process\n')


def test_no_launcher(run):
    """What names no rank is not a launcher's."""
    stray = {'MASTER_ADDR': 'node0', 'SLURM_PROCID': '1', 'SLURM_NTASKS': '2'}
    assert ', 2 processes' not in run('train.py', *SMALL, '--max_iters=1', env=stray).stdout


@pytest.mark.parametrize(
    ('place', 'reason'),
    [
        ({'RANK': '0', 'MASTER_ADDR': 'nowhere.invalid'}, 'gaierror'),
        ({'RANK': '1', 'MASTER_ADDR': 'nowhere.invalid'}, 'gaierror'),
        ({'RANK': '1', 'MASTER_ADDR': 'no..where'}, 'UnicodeError'),
        ({'RANK': '1'}, 'ConnectionRefusedError'),  # nobody listens
        ({'RANK': '0'}, 'DistStoreError'),  # nobody comes
    ],
)
def test_ranks_that_do_not_meet(run, place, reason):
    """One line on each rank. PyTorch printed the stack of its C++ code, and retried beyond dist_timeout."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = str(server.getsockname()[1])  # free
    began = time.monotonic()
    env = {**LAUNCHER, 'MASTER_PORT': port, **place}
    words = run('train.py', *SMALL, '--dist_timeout=1', status=1, env=env)
    assert time.monotonic() - began < 30
    assert words.startswith(f"rank {place['RANK']}: the 2 ranks did not meet at MASTER_ADDR:MASTER_PORT, ")
    assert f':{port}, within --dist_timeout=1 ({reason}: ' in words


@posix
def test_launcher_in_one_process(run, altered):
    """As submitit does, a launcher calls train.py and goes on, with its own handlers. It was ended within."""
    state = '(sys.excepthook, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))'
    launcher = altered(f'import signal, sys\nfound = {state}', after=f'print("completed", found == {state})')
    assert run(launcher, *SMALL, '--max_iters=1', ranks=2).stdout.count('completed True') == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason='this Python looks beside the script always')
def test_safe_path(run):
    """`python -P` and `python -I`, here as a variable, do not look beside the script."""
    run('train.py', *SMALL, '--max_iters=1', real=True, env={'PYTHONSAFEPATH': '1'})
    how = ['--device=cpu', '--num_samples=1', '--max_new_tokens=1']
    run('sample.py', *how, real=True, env={'PYTHONSAFEPATH': '1'})


# -----------------------------------------------------------------------------
# Weights & Biases

# It takes four seconds to find no network.
SLOW_WANDB = """import os, sys, time, types
def init(**how):
    time.sleep(4)
    raise OSError(f"no network after {os.environ['WANDB_INIT_TIMEOUT']} seconds")
sys.modules['wandb'] = types.SimpleNamespace(init=init)"""


@pytest.mark.slow
def test_wandb_that_takes_its_time(run, altered):
    """The wait is bounded, unless the user has set a bound, and a line says what it is for. It was silent."""
    for timeout, env in (('20', {}), ('99', {'WANDB_INIT_TIMEOUT': '99'})):
        out = run(altered(SLOW_WANDB), *SMALL, '--max_iters=1', '--wandb_log=True', env=env).stdout
        lines = [line for line in out.splitlines() if 'wandb' in line]
        assert lines[0].startswith('wandb is connecting: half a minute at most') and len(lines) == 2
        assert f'does not start (OSError: no network after {timeout} seconds)' in lines[1]


@pytest.mark.slow
@posix
def test_ctrl_c_while_wandb_connects(start, tmp_path):
    """It ends the run at once, without a word. wandb printed a traceback, after 1 minute 46."""
    with socket.create_server(('127.0.0.1', 0)) as silent:  # a server that never answers
        env = {
            'WANDB_API_KEY': '0123456789' * 4,
            'WANDB_BASE_URL': f'http://127.0.0.1:{silent.getsockname()[1]}',
        }
        errors = tmp_path / 'errors'
        errors.write_text('')
        process = start(*SMALL, '--wandb_log=True', env=env, stderr=errors, real=True)
        wait_for(process, 'wandb is connecting')
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == -signal.SIGINT
    assert 'Traceback' not in errors.read_text() and process.stdout.read() == ''


@pytest.mark.slow
def test_mistake_beside_wandb(run, tmp_path):
    """One line, and wandb knows that the run has failed. It printed a traceback before our line."""
    env = {'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true'}
    how = ['--wandb_log=True', '--learning_rate=1e18', '--grad_clip=0.0']
    words = run('train.py', *SMALL, *how, status=1, real=True, env=env)
    assert re.match(r'iteration \d: .* is not finite', words)
    assert wandb_exit_codes(tmp_path) == [1]


# -----------------------------------------------------------------------------
# Full disks


@needs_dev_full
@pytest.mark.parametrize(
    ('script', 'arguments', 'hint'),
    [
        ('train.py', ['--help'], ''),
        ('train.py', [*SMALL], '; make room and go on with --init_from=auto'),
        ('data/shakespeare_char/prepare.py', [], '; make room and run it again'),
    ],
)
def test_stdout_on_a_full_disk(start, with_text, tmp_path, script, arguments, hint):
    """It is named. The line was `cannot write`, which is said of out_dir too."""
    errors = tmp_path / 'errors'
    errors.write_text('')
    process = start(*arguments, script=script, stdout='/dev/full', stderr=errors)
    assert process.wait(60) == 1
    assert errors.read_text() == f'stdout: No space left on device{hint}\n'


@needs_dev_full
def test_file_on_a_full_disk():
    """Python's error names no file once that is open. Another error stays as it is."""
    with pytest.raises(OSError) as caught, naming('out/metrics.jsonl'), open('/dev/full', 'w') as f:
        f.write('x')
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, 'out/metrics.jsonl')
    with pytest.raises(OSError) as caught, naming('out/ckpt.pt'), open('/dev/full', 'wb', 0) as f:
        torch.save(torch.zeros(9), f)  # it raises an error of its own on top of the system's
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, 'out/ckpt.pt')
    with pytest.raises(RuntimeError, match='a bug'), naming('out/metrics.jsonl'):
        raise RuntimeError('a bug')
    with pytest.raises(OSError) as caught, naming('train.bin'):
        os.read(os.open(os.curdir, os.O_RDONLY), 1)
    assert caught.value.filename is None
