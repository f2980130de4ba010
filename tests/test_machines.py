"""
Several machines: two network namespaces that a veth pair joins are hosts, node0 and node1, each with its
name, its address and its torchrun. They share the disk, as several machines must share out_dir.

Making them takes Linux, root and `ip`. It is tried once, when this file is imported. Where it does not work,
the tests of two hosts are not collected, and a warning says why: a skip, which CI refuses, is for what
somebody can bring along. The Slurm script is tested there too, as a job of one node.
"""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import MACHINE, PLACE, ROOT, SMALL, launch, wait_for
from test_survival import assert_close, load, metrics

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != 'posix', reason='signals of POSIX systems')]
LONG = [*SMALL, '--max_iters=200', '--eval_interval=100', '--checkpoint_interval=10', '--learning_rate=1e-3']
TIMEOUT = 3  # dist_timeout where a host falls silent
STATIC = ['--nnodes=2', '--master_addr=10.77.0.1', '--master_port=29500']
C10D = ['--nnodes=2', '--rdzv-id=job', '--rdzv-backend=c10d', '--rdzv-endpoint=10.77.0.1:29500']
# the dead are found within 2 seconds, not 15, and a group that could do waits 1 second for more, not 30
QUICK = '--rdzv-conf=keep_alive_interval=1,keep_alive_max_attempt=2,last_call_timeout=1'


def ip(*arguments):
    done = subprocess.run(['ip', *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


class Hosts:
    """node0 and node1, at 10.77.0.1 and 10.77.0.2. As in a cluster they know each other by name."""

    def __init__(self, folder):
        self.folder, self.names, self.started = folder, [f'node{n}-{os.getpid()}' for n in range(2)], []
        try:
            for name in self.names:
                ip('netns', 'add', name)
            ip(
                'link',
                'add',
                'wire',
                'netns',
                self.names[0],
                'type',
                'veth',
                'peer',
                'name',
                'wire',
                'netns',
                self.names[1],
            )
            for n, name in enumerate(self.names):
                ip('-n', name, 'link', 'set', 'lo', 'up')
                ip('-n', name, 'addr', 'add', f'10.77.0.{n + 1}/24', 'dev', 'wire')
                ip('-n', name, 'link', 'set', 'wire', 'up')
                self.write_hosts(n, ['10.77.0.1', '10.77.0.2'])
        except OSError:
            self.close()
            raise

    def write_hosts(self, n, addresses):
        """The /etc/hosts of node n."""
        lines = ['127.0.0.1 localhost', *(f'{address} node{m}' for m, address in enumerate(addresses))]
        (self.folder / f'hosts{n}').write_text('\n'.join(lines) + '\n')

    def link(self, state):
        ip('-n', self.names[1], 'link', 'set', 'wire', state)

    def on(self, n, *command):
        """The command that runs another one on node n, in the same process."""
        inside = f'echo node{n} > /proc/sys/kernel/hostname; mount --bind {self.folder}/hosts{n} /etc/hosts'
        return [
            'ip',
            'netns',
            'exec',
            self.names[n],
            'unshare',
            '--uts',
            '--mount',
            'sh',
            '-ec',
            f'{inside}; exec "$@"',
            'sh',
            *map(str, command),
        ]

    def kill(self, n):
        """SIGKILL of all processes there."""
        pids = [int(pid) for pid in ip('netns', 'pids', self.names[n]).split()]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)

    def close(self):
        for n, name in enumerate(self.names):
            with suppress(OSError):  # it was never made
                self.kill(n)
                ip('netns', 'del', name)
        for process in self.started:
            process.wait(20)
            process.stdout.close()


def problem_with_hosts():
    """Why there can be no such hosts here, or None: tries it."""
    if sys.platform != 'linux' or os.getuid() or not shutil.which('ip') or not shutil.which('unshare'):
        return 'they take Linux, root, and the commands ip and unshare'
    with tempfile.TemporaryDirectory() as folder:
        try:
            hosts = Hosts(Path(folder))
        except OSError as error:
            return str(error)
        try:
            done = subprocess.run(hosts.on(1, 'cat', '/etc/hosts'), capture_output=True, text=True)
            return None if 'node1' in done.stdout else done.stderr.strip()
        finally:
            hosts.close()


problem = problem_with_hosts()
if problem:
    warnings.warn(f'the tests of two hosts are not collected: {problem}', stacklevel=1)


def two_hosts(test):
    test.__test__ = not problem
    return test


@pytest.fixture
def hosts(tmp_path):
    hosts = Hosts(tmp_path)
    yield hosts
    hosts.close()


@pytest.fixture
def torchrun(house, tmp_path, hosts):
    """torchrun(n, options, '--key=value', …): train.py on node n, in the background. Its output comes line by
    line from process.stdout.
    """

    def torchrun(n, options, *arguments, env={}):  # noqa: B006
        command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=1', *options]
        command += [f'--node_rank={n}'] * ('--master_port=29500' in options)
        process = subprocess.Popen(
            hosts.on(n, *command, house / 'train.py', *arguments),
            cwd=tmp_path,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding='utf-8',
        )
        hosts.started.append(process)
        return process

    return torchrun


def rest(processes, status=0):
    """What they still print; they must end with this status."""
    outs = [process.stdout.read() for process in processes]
    assert [process.wait() for process in processes] == [status] * len(outs), '\n'.join(outs)
    return outs


@pytest.fixture(scope='module')
def alone(house, tmp_path_factory):
    """The folder of one process that was left alone."""
    folder = tmp_path_factory.mktemp('alone')
    assert launch(house / 'train.py', LONG, folder, {}, [os.devnull] * 3).wait() == 0
    return folder / 'out'


@pytest.fixture
def assert_followed(alone, tmp_path):
    """assert_followed(): the run in out has all metrics of the process that was left alone."""

    def assert_followed():
        assert_close(metrics(alone), metrics(tmp_path / 'out'))
        assert load(tmp_path / 'out')['iter_num'] == 200

    return assert_followed


@two_hosts
def test_curve(torchrun, assert_followed):
    """README's command, without another word: the curve of one process."""
    out, nothing = rest([torchrun(n, STATIC, *LONG) for n in range(2)])
    assert f'; {PLACE}, 2 processes\n' in out and out.count('iter 9:') == 1 and 'iter' not in nothing
    assert_followed()


@two_hosts
def test_name_of_loopback(torchrun, assert_followed, hosts):
    """Debian's /etc/hosts has 127.0.1.1 for the machine's own name. gloo, which on GPUs too takes the votes
    about stopping, then has to be told the interface, and c10d the addresses and who is the host.
    """
    hosts.write_hosts(0, ['127.0.1.1', '10.77.0.2'])
    hosts.write_hosts(1, ['10.77.0.1', '127.0.1.1'])
    nodes = [
        torchrun(
            n,
            [*C10D, f'--rdzv-conf=is_host={1 - n}', f'--local-addr=10.77.0.{n + 1}'],
            *LONG,
            env={'GLOO_SOCKET_IFNAME': 'wire'},
        )
        for n in range(2)
    ]
    rest(nodes)
    assert_followed()


@two_hosts
def test_host_killed(torchrun, assert_followed, hosts):
    """The second host is killed and started again by the same command: the first, which nobody touched, goes
    on with it. When the first is killed, the rendezvous is gone and the second ends: both are started again.
    """
    # torch 2.13 shares a store whose address the first one tells in the first round only: who joins later
    # waits for it (next_rendezvous in elastic/rendezvous/dynamic_rendezvous.py)
    env = {'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}
    options, keys = [*C10D, '--max-restarts=3', QUICK], [*LONG, '--init_from=auto', '--dist_timeout=20']
    first, second = (torchrun(n, options, *keys, env=env) for n in range(2))
    wait_for(first, 'iter 40:')
    assert hosts.kill(1) == 2
    wait_for(first, 'rank 0: lost the other ranks')
    second = torchrun(1, options, *keys, env=env)
    wait_for(first, 'resuming out/last.pt at iteration ')
    wait_for(first, 'iter 120:')
    assert hosts.kill(0) == 2
    assert rest([second], 1)[0].count('rank 1: lost the other ranks') == 1
    out, _ = rest([torchrun(n, options, *keys, env=env) for n in range(2)])
    assert re.search(r'resuming out/last.pt at iteration 1\d\d: ', out)
    assert_followed()


@two_hosts
def test_link_cut(torchrun, run, hosts):
    """A cut link tells nobody. Both hosts end after dist_timeout, each in the line that names its rank. (With
    c10d too, but there the second torchrun, whose rendezvous is beyond the link, stays for minutes.)
    """
    nodes = [torchrun(n, STATIC, *LONG, f'--dist_timeout={TIMEOUT}', '--max_iters=100000') for n in range(2)]
    wait_for(nodes[0], 'iter 40:')
    hosts.link('down')
    cut = time.monotonic()
    for n, node in enumerate(nodes):
        wait_for(node, f'rank {n}: lost the other ranks, go on with --init_from=resume (')
        assert TIMEOUT - 1 < time.monotonic() - cut < TIMEOUT + 3
    rest(nodes, 1)
    assert time.monotonic() - cut < TIMEOUT + 6
    out = run('train.py', '--init_from=resume', *MACHINE, '--max_iters=60').stdout
    assert 'resuming out/last.pt at iteration ' in out


@two_hosts
def test_elastic(torchrun, assert_followed, hosts):
    """--nnodes=1:2 loses a host to a power cut, which tells nobody: the other goes on alone, on one curve."""
    options = ['--nnodes=1:2', *C10D[1:], '--max-restarts=3', QUICK]
    first, second = (
        torchrun(n, options, *LONG, '--init_from=auto', f'--dist_timeout={TIMEOUT}') for n in range(2)
    )
    assert ', 2 processes\n' in wait_for(first, 'iter 40:')
    hosts.link('down')
    assert hosts.kill(1) == 2
    wait_for(first, 'rank 0: lost the other ranks')
    (out,) = rest([first])
    assert re.search(r'resuming out/last.pt at iteration \d+: .*, 1 processes\n', out)
    assert_followed()


# Stand-ins for Slurm's commands. NODE is the command in front of a task on a node, PYTHON this Python.
STAND_INS = {
    'torchrun': 'exec PYTHON -m torch.distributed.run "$@"',
    # src/srun/signals.c: a SIGTERM that srun gets is SIGKILL for its tasks, whatever its manual says
    'srun': """
        trap 'for pid in "${pids[@]}"; do kill -KILL $(cat "/proc/$pid/task/$pid/children") "$pid"; done' TERM
        for node in NODES; do
            if [ $node = node1 ]; then NODE1 "$@" & else NODE0 "$@" & fi
            pids+=($!)
        done
        echo "${pids[@]}" > tasks
        status=0
        for pid in "${pids[@]}"; do wait "$pid" || status=1; done
        exit $status""",
    # without --batch a signal is for all processes of all steps, not for the script
    'scancel': """
        echo scancel "$@" >> calls
        for task in $(cat tasks); do kill -TERM "$task" $(cat "/proc/$task/task/$task/children"); done""",
    'scontrol': """
        if [ "$1" = show ]; then printf '%s\\n' NODES; exit; fi
        echo scontrol "$@" >> calls
        for task in $(cat tasks); do ! kill -0 "$task" 2> /dev/null || echo "$task runs" >> calls; done""",
}


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='the stand-in for scancel reads /proc')
def test_slurm_script(house, request, tmp_path, assert_followed):
    """The script of assets/notes.md. SIGTERM comes to it alone, as --signal=B:TERM says: the ranks save, it
    waits for them and asks for the queue, out of which the same script goes on to the end.
    """
    notes = (ROOT / 'assets' / 'notes.md').read_text(encoding='utf-8')
    script = re.search(r'## Slurm\n.*?```bash\n(.*?)```', notes, re.S)[1]
    subprocess.run(['bash', '-n', '-c', script], check=True)
    assert script.startswith('#!/bin/bash\n') and '--signal=B:TERM@' in script
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    for old, new in (
        ('--nproc_per_node=8', '--nproc_per_node=1'),
        (':29500', f':{port}'),
        ('torchrun --nnodes=2', f'torchrun --nnodes={1 if problem else 2}'),
        ('train.py config/train_gpt2.py', shlex.join([str(house / 'train.py'), *LONG])),
    ):
        assert old in script
        script = script.replace(old, new)
    (tmp_path / 'job.sh').write_text(script)
    nodes = [[], []] if problem else [request.getfixturevalue('hosts').on(n) for n in range(2)]
    (tmp_path / 'bin').mkdir()
    for name, text in STAND_INS.items():
        for word, value in (
            ('NODE0', shlex.join(nodes[0])),
            ('NODE1', shlex.join(nodes[1])),
            ('NODES', 'localhost' if problem else 'node0 node1'),
            ('PYTHON', sys.executable),
        ):
            text = re.sub(rf'\b{word}\b', lambda _, value=value: value, text)
        (tmp_path / 'bin' / name).write_text(f'#!/bin/bash\n{text}\n')
        (tmp_path / 'bin' / name).chmod(0o755)
    env = {
        **os.environ,
        'PATH': f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        'SLURM_JOB_ID': '4711',
        'SLURM_JOB_NODELIST': 'node[0-1]',
    }
    for stopping in (True, False):
        job = subprocess.Popen(
            ['bash', 'job.sh'],
            cwd=tmp_path,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding='utf-8',
            start_new_session=True,
        )
        try:
            read = wait_for(job, 'iter 40:' if stopping else 'resuming')
            if stopping:
                job.send_signal(signal.SIGTERM)
            read += job.stdout.read()
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
        status = job.wait()
        if stopping:
            found = re.search(r'^stopped before iteration (\d+): ', read, re.M)
            assert found and 40 < load(tmp_path / 'out', 'last.pt')['iter_num'] == int(found[1]) < 200, read
        else:
            assert status == 0 and f'resuming out/last.pt at iteration {found[1]}: ' in read, read
        calls = (tmp_path / 'calls').read_text()
        assert calls == 'scancel --signal=TERM 4711\nscontrol requeue 4711\n', read
    assert_followed()
