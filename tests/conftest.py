"""
The tests run a copy of the project in a temporary folder: they touch neither your data nor your checkpoints.
Some need files that a machine without a network gets by hand:
    TINYSHAKESPEARE=…/input.txt         tiny Shakespeare
    TIKTOKEN_CACHE_DIR=…                GPT-2's BPE files as tiktoken caches them
    WIKITEXT=…                          a folder with valid.txt and test.txt of WikiText-2
`pytest -m "not slow"` runs a minute's selection. `pytest --machines tests/test_machines.py` makes two hosts.
`pytest --device=cuda` runs the scripts on a GPU. `pytest --walk=3000 tests/test_walk.py` takes half an hour.
"""

import atexit
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing import connection, forkserver
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

os.environ['HF_HUB_OFFLINE'] = '1'  # a test that reaches for the hub fails at once, not after half a minute
os.environ['OMP_NUM_THREADS'] = '1'  # the networks are tiny, and threads of several processes fight for cores

FORKS = multiprocessing.get_context('forkserver' if os.name == 'posix' else 'spawn')
if os.name == 'posix':
    FORKS.set_forkserver_preload(
        ['torch', 'numpy', 'pytest', 'wandb', 'datasets', 'transformers.models.gpt2.modeling_gpt2']
    )

# 4,686 characters that are easy to learn
TEXT = ''.join(
    f"the {a} {b} over the {c}, and {n} more.\n"
    for n, (a, b, c) in enumerate(
        (a, b, c)
        for a in ('quick', 'lazy', 'small', 'green')
        for b in ('fox jumps', 'dog walks', 'bird flies', 'cat runs')
        for c in ('fence', 'river', 'house', 'hill', 'bridge', 'meadow')
    )
)

# where scripts run, whatever the machine prefers
MACHINE = ['--device=cpu', '--dtype=float32']
DEVICE, PLACE = 'cpu', 'cpu, float32'

# code for `altered`: torch.compile without a compiler, which says whenever it makes a graph
TRACED = """import torch
torch_compile, aot_eager = torch.compile, torch._dynamo.lookup_backend('aot_eager')
def backend(module, inputs):
    print('a graph')
    return aot_eager(module, inputs)
torch.compile = lambda method, **how: torch_compile(method, backend=backend, fullgraph=True)"""

# a network that trains in a second, and its run
SMALL = [
    *MACHINE,
    '--dataset=tiny',
    '--n_layer=2',
    '--n_head=2',
    '--n_embd=32',
    '--block_size=16',
    '--batch_size=4',
    '--gradient_accumulation_steps=2',
    '--eval_iters=2',
    '--eval_interval=5',
    '--sample_tokens=0',
    '--max_iters=5',
    '--warmup_iters=0',
    '--learning_rate=1e-2',
    '--lr_decay_iters=100',
]


def pytest_addoption(parser):
    parser.addoption('--device', default='cpu', choices=('cpu', 'cuda'), help='where the scripts run')
    parser.addoption('--kills', type=int, default=8, help='how often test_kills kills a run')
    parser.addoption('--walk', type=int, default=20, help='how many steps test_walk takes')
    parser.addoption('--walk_seed', type=int, default=0, help='which steps test_walk takes')
    parser.addoption('--machines', action='store_true', help='two hosts as network namespaces, 80 seconds')


def pytest_ignore_collect(collection_path, config):
    return True if collection_path.name == 'test_machines.py' and not config.getoption('--machines') else None


def pytest_configure(config):
    if (device := config.getoption('--device')) != 'cpu':  # before any test_*.py imports these names
        globals().update(
            MACHINE=[f'--device={device}', '--dtype=float32', '--compile=False'],
            DEVICE=f'{device}:0',
            PLACE=f'{device}:0, float32',
        )
        globals().update(SMALL=[*MACHINE, *SMALL[2:]])
    config.addinivalue_line('markers', 'slow: left out by -m "not slow"')
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background job, and inherited
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope='session')
def house(tmp_path_factory):
    """A copy of the project with data sets 'tiny', in characters, and 'bare', in GPT-2's encoding."""
    from data.common import write_characters

    if os.name == 'posix':
        forkserver.ensure_running()  # it imports while the first test does something else
    house = tmp_path_factory.mktemp('project') / 'house'
    house.mkdir()
    for name in ('model.py', 'train.py', 'sample.py', 'configurator.py'):
        shutil.copy(ROOT / name, house)
    made = shutil.ignore_patterns('*.bin', '*.pkl', '*.part', 'input.txt', '__pycache__')
    for name in ('config', 'data'):
        shutil.copytree(ROOT / name, house / name, ignore=made)
    (house / 'data' / 'tiny').mkdir()
    write_characters(house / 'data' / 'tiny', TEXT[:3000], TEXT[3000:])
    (house / 'data' / 'bare').mkdir()  # the same ids, which without a meta.pkl are GPT-2's
    for name in ('train.bin', 'val.bin'):
        shutil.copy(house / 'data' / 'tiny' / name, house / 'data' / 'bare')
    return house


# -----------------------------------------------------------------------------
# Scripts as processes


def command(script, arguments, cwd, env, streams, file_size=None):
    """Runs a script in this process, as `python script arguments…` would."""
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno() if hasattr(stream, 'fileno') else os.open(stream, os.O_RDWR), number)
    if file_size is not None:
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.stdin = open(0, encoding='utf-8', closefd=False)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(script))
    try:
        runpy.run_path(script, run_name='__main__')
    except (Exception, KeyboardInterrupt) as error:  # multiprocessing would print it itself
        sys.excepthook(*sys.exc_info())
        if isinstance(error, KeyboardInterrupt):  # as Python does
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # neither does it call these


class Forked(FORKS.Process):
    """A process with the methods of subprocess.Popen that the tests use."""

    def wait(self, timeout=300):
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.name, timeout)
        return self.exitcode

    def poll(self):
        return self.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)


class Ranks:
    """Processes that are the ranks of one run, where torchrun itself is not what a test is about."""

    def __init__(self, processes):
        self.processes = processes

    def wait(self, timeout=300):
        return max(process.wait(timeout) for process in self.processes)

    def poll(self):
        codes = [process.poll() for process in self.processes]
        return None if None in codes else max(codes)

    def kill(self):
        for process in self.processes:
            process.kill()


def launch(script, arguments, cwd, env, streams, ranks=0, torchrun=False, real=False, file_size=None):
    """Starts a script; returns the process. `streams` are its stdin, stdout and stderr, each a path or a
    file descriptor. With ranks=N it is N processes, under torchrun if that is said. Without torchrun, and
    unless `real`, each is forked off a process that has imported torch, datasets and transformers already,
    which saves seconds; its files may then be limited to file_size bytes.
    """
    script, arguments = str(script), [str(argument) for argument in arguments]
    if '--device=cuda' in arguments and ranks > torch.cuda.device_count():
        pytest.skip(f"needs {ranks} GPUs")
    if ranks and not torchrun:
        with socket.create_server(('127.0.0.1', 0)) as server:
            port = server.getsockname()[1]  # free, and ours as long as nobody else is given it
        place = {'WORLD_SIZE': str(ranks), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
        processes = []
        for rank in range(ranks):
            rank_env = {**env, **place, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}
            processes.append(launch(script, arguments, cwd, rank_env, streams, file_size=file_size))
        return Ranks(processes)
    env = {**os.environ, 'PYTHONIOENCODING': 'utf-8', **env}
    if ranks or real:
        python = [sys.executable]
        if ranks:
            python += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
        fds = [
            os.dup(stream) if isinstance(stream, int) else os.open(stream, os.O_RDWR) for stream in streams
        ]
        process = subprocess.Popen(
            [*python, script, *arguments], cwd=cwd, env=env, stdin=fds[0], stdout=fds[1], stderr=fds[2]
        )
        for fd in fds:
            os.close(fd)
    else:  # a Connection is how multiprocessing passes a file descriptor on
        streams = [
            connection.Connection(os.dup(stream)) if isinstance(stream, int) else stream for stream in streams
        ]
        process = Forked(target=command, args=(script, arguments, cwd, env, streams, file_size))
        process.start()
    return process


def children(process):
    """The process ids of torchrun's workers, where /proc tells."""
    tasks = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    return [int(pid) for pid in tasks.read_text().split()] if tasks.exists() else []


def end(process):
    if process.poll() is None:
        for child in children(process) if isinstance(process, subprocess.Popen) else []:
            os.kill(child, signal.SIGKILL)
        process.kill()
    return process.wait()


@pytest.fixture
def run(house, tmp_path):
    """run('train.py', '--key=value', …) as a user would, from an empty folder; fails unless the exit status
    is `status`. With status 1 there must be one line on stderr, beside that of the weights, and no
    traceback; it is returned. For ranks, real and file_size see launch.
    """

    def run(script, *arguments, status=0, env={}, stdin='', cwd=tmp_path, timeout=300, **how):  # noqa: B006
        with tempfile.TemporaryDirectory() as folder:
            streams = [Path(folder) / name for name in ('stdin', 'stdout', 'stderr')]
            for path in streams:
                path.write_text(stdin if path.name == 'stdin' else '', encoding='utf-8')
            process = launch(house / script, arguments, cwd, env, streams, **how)
            try:
                returned = process.wait(timeout)
            finally:
                end(process)
                out, errors = (path.read_text(encoding='utf-8') for path in streams[1:])
        assert returned == status, out + errors
        if status == 0:
            return subprocess.CompletedProcess([script, *arguments], returned, out, errors)
        if how.get('torchrun'):  # it adds a report of its own
            assert f'File "{house / script}"' not in errors, errors
        else:  # datasets' progress bars stand there too, and which weights were read
            errors = re.sub(r'^.*: weights of iteration .*\n', '', errors, flags=re.M)
            lines = [line for line in errors.splitlines() if line and 'examples/s]' not in line]
            assert len(lines) == 1 and 'Traceback' not in errors, errors
        return errors

    return run


@pytest.fixture
def start(house, tmp_path):
    """start('--key=value', …): train.py in the background. Its stdout, and stderr if that is given no path
    or file descriptor of its own, come line by line from process.stdout. It is killed at the end of the
    test. For ranks, real and file_size see launch.
    """
    started = []

    def start(*arguments, script='train.py', stdout=None, stderr=None, env={}, **how):  # noqa: B006
        reader, writer = os.pipe()
        out = writer if stdout is None else stdout
        streams = [os.devnull, out, out if stderr is None else stderr]
        process = launch(house / script, arguments, tmp_path, env, streams, **how)
        os.close(writer)
        process.stdout = open(reader, encoding='utf-8')
        started.append(process)
        return process

    yield start
    for process in started:
        end(process)
        process.stdout.close()


@pytest.fixture
def altered(house):
    """altered(code, after=''): the name of a script that executes `code`, then train.py or another script,
    and then `after`, where `scope` has the globals that the script has left.
    """

    def altered(code, script='train.py', after=''):
        path = house / f"altered_{len(list(house.glob('altered_*')))}.py"
        script = str(house / script)
        path.write_text(
            f"import runpy\n{code}\nscope = runpy.run_path({script!r}, run_name='__main__')\n{after}\n"
        )
        return path.name

    return altered


def wait_for(process, beginning):
    """Reads on until a line of the process begins so; returns what was read."""
    read = []
    for line in process.stdout:
        read.append(line)
        if line.startswith(beginning):
            return ''.join(read)
    raise AssertionError(f'it ended without {beginning!r}: ' + ''.join(read))


# -----------------------------------------------------------------------------
# Files that tests need


@pytest.fixture
def with_text(house):
    """Tiny Shakespeare where its two prepare.py scripts would download it; the text."""
    path = Path(os.environ.get('TINYSHAKESPEARE', ROOT / 'data' / 'shakespeare_char' / 'input.txt'))
    if not path.is_file():
        pytest.skip(
            "needs tiny Shakespeare: TINYSHAKESPEARE=…/input.txt, or "
            "data/shakespeare_char/prepare.py where there is a network"
        )
    for name in ('shakespeare', 'shakespeare_char'):
        shutil.copy(path, house / 'data' / name / 'input.txt')
    return path.read_text(encoding='utf-8')


@pytest.fixture(scope='session')
def bpe():
    """GPT-2's encoding."""
    import tiktoken

    try:
        return tiktoken.get_encoding('gpt2')
    except OSError:
        pytest.skip("needs GPT-2's BPE files: TIKTOKEN_CACHE_DIR=…, or a network")
