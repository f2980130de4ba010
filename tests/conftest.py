"""
The tests run a copy of the project in a temporary folder, so they touch neither your data nor your checkpoints.
Some need files that a machine without a network gets by hand:
    TINYSHAKESPEARE=…/input.txt         tiny Shakespeare
    TIKTOKEN_CACHE_DIR=…                GPT-2's BPE files as tiktoken caches them
    WIKITEXT=…                          a folder with valid.txt and test.txt of WikiText-2
"""
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'data')]

os.environ['HF_HUB_OFFLINE'] = '1'  # a test that reaches for the hub fails at once instead of retrying for half a minute
os.environ['OMP_NUM_THREADS'] = '1'  # the networks are tiny, and threads of several processes fight for cores

FORKS = multiprocessing.get_context('forkserver' if os.name == 'posix' else 'spawn')
if os.name == 'posix':
    FORKS.set_forkserver_preload(['torch', 'numpy', 'datasets', 'transformers.models.gpt2.modeling_gpt2'])

TEXT = ''.join(f"the {a} {b} over the {c}, and {n} more.\n" for n, (a, b, c) in enumerate(
    (a, b, c) for a in ('quick', 'lazy', 'small', 'green') for b in ('fox jumps', 'dog walks', 'bird flies', 'cat runs')
    for c in ('fence', 'river', 'house', 'hill', 'bridge', 'meadow')))  # 4,686 characters that are easy to learn

# a network that trains in a second, and its run
SMALL = ['--dataset=tiny', '--device=cpu', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=16', '--batch_size=4',
         '--gradient_accumulation_steps=2', '--eval_iters=2', '--eval_interval=5', '--max_iters=5', '--warmup_iters=0',
         '--learning_rate=1e-2', '--lr_decay_iters=100']



def pytest_addoption(parser):
    parser.addoption('--kills', type=int, default=8, help='how often test_kills kills a run')


@pytest.fixture(scope='session')
def house(tmp_path_factory):
    """A copy of the project with data sets 'tiny', in characters, and 'bare', in GPT-2's encoding."""
    from common import write_characters
    house = tmp_path_factory.mktemp('project') / 'house'
    house.mkdir()
    for name in ('model.py', 'train.py', 'sample.py', 'configurator.py'):
        shutil.copy(ROOT / name, house)
    shutil.copytree(ROOT / 'config', house / 'config')
    shutil.copytree(ROOT / 'data', house / 'data', ignore=shutil.ignore_patterns('*.bin', '*.pkl', '*.part', 'input.txt', '__pycache__'))
    (house / 'data' / 'tiny').mkdir()
    write_characters(house / 'data' / 'tiny', TEXT[:3000], TEXT[3000:])
    (house / 'data' / 'bare').mkdir()  # the same ids, which without a meta.pkl are GPT-2's
    for name in ('train.bin', 'val.bin'):
        shutil.copy(house / 'data' / 'tiny' / name, house / 'data' / 'bare')
    return house


def command(script, arguments, cwd, env, streams):
    """Runs a script in this process, as `python script arguments…` would."""
    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDWR), number)
    sys.stdin = open(0, encoding='utf-8', closefd=False)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name='__main__')


@pytest.fixture
def run(house, tmp_path):
    """
    run('train.py', '--key=value', …) as a user would, from an empty folder; fails unless the exit status is `status`.
    With status 1 there must be one line on stderr and no traceback; it is returned. With ranks=N under torchrun.
    Otherwise the process is forked off one that has imported torch, datasets and transformers already, which saves seconds each.
    """
    def run(script, *arguments, status=0, ranks=0, env={}, stdin='', cwd=tmp_path, timeout=300):
        script, arguments, env = str(house / script), [str(argument) for argument in arguments], {**os.environ, 'PYTHONIOENCODING': 'utf-8', **env}
        if ranks:
            launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
            done = subprocess.run([*launch, script, *arguments], cwd=cwd, input=stdin, text=True, encoding='utf-8', capture_output=True, timeout=timeout, env=env)
        else:
            with tempfile.TemporaryDirectory() as folder:
                streams = [Path(folder) / name for name in ('stdin', 'stdout', 'stderr')]
                for path in streams:
                    path.write_text(stdin if path.name == 'stdin' else '', encoding='utf-8')
                process = FORKS.Process(target=command, args=(script, arguments, cwd, env, streams))
                process.start()
                process.join(timeout)
                process.kill()
                done = subprocess.CompletedProcess([script, *arguments], process.exitcode, *(path.read_text(encoding='utf-8') for path in streams[1:]))
        assert done.returncode == status, done.stdout + done.stderr
        if status == 0:
            return done
        if ranks:  # torchrun adds a report of its own
            assert f'File "{script}"' not in done.stderr, done.stderr
        else:
            lines = [line for line in done.stderr.splitlines() if line and 'examples/s]' not in line]  # datasets' progress bars
            assert len(lines) == 1 and 'Traceback' not in done.stderr, done.stderr
        return done.stderr
    return run


@pytest.fixture
def with_text(house):
    """Tiny Shakespeare where its two prepare.py scripts would download it; the text."""
    path = Path(os.environ.get('TINYSHAKESPEARE', ROOT / 'data' / 'shakespeare_char' / 'input.txt'))
    if not path.is_file():
        pytest.skip("needs tiny Shakespeare: TINYSHAKESPEARE=…/input.txt, or data/shakespeare_char/prepare.py where there is a network")
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
