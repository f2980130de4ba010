"""configurator.py, executed in a fresh dict as a script's globals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = (Path(__file__).resolve().parents[1] / 'configurator.py').read_text(encoding='utf-8')
SCRIPT = '''"""What the script does."""
from __future__ import annotations
import math
from typing import Literal
batch_size = 12             # sequences
n_embd = 4
learning_rate = 6e-4
min_lr = 6e-5
lr_schedule = "cosine"
temperature = 0.8
seed = 1337                 # of weights and batches,
                            # and of dropout
start = "hello"
compile: bool | None = None
device: str | None = None
top_k: int | None = 200
optimizer: Literal['adamw', 'muon'] = 'adamw'                      # muon for matrices
dtype: Literal['float32', 'bfloat16', 'float16'] | None = None
plain = None
'''


def configure(monkeypatch, *arguments, script=SCRIPT, **names):
    names |= {'__name__': '__main__'}
    exec(script, names)
    monkeypatch.setattr(sys, 'argv', ['script.py', *map(str, arguments)])
    monkeypatch.setattr(sys, 'excepthook', sys.__excepthook__)
    monkeypatch.setattr(sys, 'stdout', sys.stdout)
    exec(SOURCE, names)
    return names


def error(monkeypatch, *arguments):
    """The line that ends the script."""
    with pytest.raises(SystemExit) as stop:
        configure(monkeypatch, *arguments)
    line = stop.value.code
    assert isinstance(line, str) and len(line.splitlines()) == 1  # which makes Python's exit status 1
    return line


@pytest.fixture
def config_file(tmp_path):
    def write(text, name='mine.py'):
        (tmp_path / name).write_text(text, encoding='utf-8')
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    'argument, key, value',
    [
        ('--batch_size=3', 'batch_size', 3),
        ('--batch_size=-3', 'batch_size', -3),
        ('--batch_size=1_000', 'batch_size', 1000),
        ('--batch_size=0x10', 'batch_size', 16),
        ('--batch_size=9223372036854775807', 'batch_size', 2**63 - 1),
        ('--learning_rate=1', 'learning_rate', 1.0),
        ('--learning_rate=1e-3', 'learning_rate', 1e-3),
        ('--learning_rate=1e30', 'learning_rate', 1e30),
        ('--start=a=b', 'start', 'a=b'),
        ('--start=42', 'start', '42'),
        ('--start=', 'start', ''),
        ('--start=None', 'start', 'None'),
        ('--start=--x', 'start', '--x'),
        ('--start=True', 'start', 'True'),
        ('--start=nan', 'start', 'nan'),
        ('--start=' + '9' * 30, 'start', '9' * 30),
        ('--compile=False', 'compile', False),
        ('--compile=None', 'compile', None),
        ('--device=None', 'device', None),
        ('--device=cpu', 'device', 'cpu'),
        ('--top_k=None', 'top_k', None),
        ('--top_k=5', 'top_k', 5),
        ('--optimizer=muon', 'optimizer', 'muon'),
        ('--dtype=float16', 'dtype', 'float16'),
        ('--dtype=None', 'dtype', None),
        ('--plain=5', 'plain', 5),
        ('--plain=5.0', 'plain', 5.0),
        ('--plain=True', 'plain', True),
        ('--plain=x', 'plain', 'x'),
    ],
)
def test_values(monkeypatch, argument, key, value):
    names = configure(monkeypatch, argument)
    assert names[key] == value and type(names[key]) is type(value)
    assert names['config'][key] == value and not {'math', 'Literal'} & set(names['config'])
    assert '_configure' not in names


@pytest.mark.parametrize(
    'argument, words',
    [
        ('--batch_size=3.0', 'batch_size takes int'),
        ('--batch_size=x', 'batch_size takes int'),
        ('--batch_size=None', 'batch_size takes int'),
        ('--batch_size=True', 'batch_size takes int'),
        ('--learning_rate=fast', "learning_rate takes float, not 'fast'"),
        ('--learning_rate=1e999', 'finite'),
        ('--learning_rate=nan', 'finite'),
        ('--learning_rate=True', 'learning_rate takes float'),
        ('--compile=yes', 'True or False'),
        ('--top_k=2.5', 'top_k takes int or None'),
        ('--optimizer=mun', "--optimizer=mun: optimizer takes adamw or muon, not 'mun'"),
        ('--optimizer=None', 'optimizer takes adamw or muon'),
        ('--optimizer=5', 'optimizer takes adamw or muon'),
        ('--dtype=float8', "dtype takes float32 or bfloat16 or float16 or None, not 'float8'"),
        ('--batch_size', '--batch_size=value'),
        ('--=3', '--key=value'),
        ('batch_size=3', 'no such config file'),
        ('missing.py', 'no such config file'),
        ('', 'no such config file'),
        ('--math=3', "unknown key 'math'"),
        ('--Literal=3', "unknown key 'Literal'"),
    ],
)
def test_mistakes(monkeypatch, argument, words):
    assert words in error(monkeypatch, argument)


def test_choices_without_future_annotations(monkeypatch):
    """A script whose annotations are objects instead of strings."""
    script = "from typing import Literal\nkey: Literal['a', 'b'] | None = 'a'\nother: int | None = 3\n"
    names = configure(monkeypatch, '--key=b', '--other=None', script=script)
    assert names['config'] == {'key': 'b', 'other': None}
    with pytest.raises(SystemExit, match="key takes a or b or None, not 'c'"):
        configure(monkeypatch, '--key=c', script=script)


@pytest.mark.parametrize(
    'name, key',
    [
        ('batchsize', 'batch_size'),
        ('batch', 'batch_size'),
        ('bs', 'batch_size'),
        ('lr', 'learning_rate'),
        ('lr_s', 'lr_schedule'),
        ('temp', 'temperature'),
        ('opt', 'optimizer'),
        ('n_embed', 'n_embd'),
    ],
)
def test_hints(monkeypatch, name, key):
    """Initials first, then beginnings, then similar names: lr is not lr_schedule."""
    assert error(monkeypatch, f'--{name}=3').endswith(f"unknown key '{name}', did you mean '{key}'?")


def test_no_hint(monkeypatch):
    assert error(monkeypatch, '--verbose=3').endswith("unknown key 'verbose', --help lists the keys")


@pytest.mark.parametrize(
    'value, words',
    [
        ('{[]:1}', 'batch_size takes int'),
        ('9' * 20, 'batch_size takes int, finite and within 64 bits'),
        ('9' * 400, '64 bits'),
        ('-' + '9' * 20, '64 bits'),
        ('9' * 5000, 'batch_size takes int'),
        ('[' * 300, 'batch_size takes int'),
        ('(' * 100_000, 'batch_size takes int'),
        ('-' * 100_000 + '1', 'batch_size takes int'),
        ('1+' * 10_000 + '1', 'batch_size takes int'),
        ('3\n4\r5\u20286', 'batch_size takes int'),
        ('\udcff', 'batch_size takes int'),
    ],
)
def test_hostile_values(monkeypatch, value, words):
    """Each was a traceback or a line that filled the terminal."""
    line = error(monkeypatch, f'--batch_size={value}')
    assert words in line and len(line) < 300


@pytest.mark.parametrize(
    'argument',
    ['--' + 'x' * 5000, '--' + 'x' * 5000 + '=1', 'x' * 5000, '--seed=' + 'x' * 300, '--lr=' + 'x' * 300],
)
def test_long_arguments(monkeypatch, argument):
    """os.stat raises on a file name of more than 255 bytes."""
    line = error(monkeypatch, argument)
    assert len(line) < 300 and line.count('x') <= 200


def test_zeros(monkeypatch):
    assert configure(monkeypatch, '--seed=' + '0' * 400)['seed'] == 0


def test_files_and_arguments_in_order(monkeypatch, config_file):
    """Later arguments win; a file sees what stands above it; modules, callables and _names are no keys."""
    first = config_file(
        "import time\nfrom math import sqrt\n_half = batch_size // 2\nbatch_size = _half\n"
        "n_embd = int(sqrt(16)) * 8\n",
        'first.py',
    )
    second = config_file("learning_rate = 1\nn_embd *= 2\n", 'second.py')
    names = configure(monkeypatch, '--batch_size=40', first, '--start=x', second, '--learning_rate=2')
    values = names['batch_size'], names['n_embd'], names['learning_rate'], names['start']
    assert values == (20, 64, 2.0, 'x')


def test_functions_in_files(monkeypatch, config_file):
    """They read the keys, those that the file itself has assigned too, and assign them with `global`."""
    path = config_file(
        "batch_size = 7\ndef double():\n    global n_embd, seed\n    n_embd = batch_size * 2\n"
        "    seed = 1337\n    return top_k * 2\ntop_k = double()\n"
        "class Helper:\n    width = n_embd\n"
    )
    names = configure(monkeypatch, path)
    assert (names['n_embd'], names['top_k']) == (14, 400) and 'Helper' not in names
    assert names['given_keys'] == {'batch_size', 'n_embd', 'top_k', 'seed'}


def test_given_keys(monkeypatch, config_file):
    """Every key that was assigned, also to its default, and none that was only read."""
    path = config_file(
        "learning_rate = 6e-4\nmin_lr = learning_rate / 10\ndevice = None\n"
        "if batch_size > 99:\n    seed = 1\nhelper = n_embd\n"
    )
    assert configure(monkeypatch)['given_keys'] == set()
    assert configure(monkeypatch, '--start=hello')['given_keys'] == {'start'}
    names = configure(monkeypatch, path, '--batch_size=12')
    assert names['given_keys'] == {'learning_rate', 'min_lr', 'device', 'batch_size'}
    assert names['config'] == {**configure(monkeypatch)['config'], 'min_lr': 6e-4 / 10}


@pytest.mark.parametrize(
    'text, words',
    [
        ("bach_size = 3\n", "unknown key 'bach_size', did you mean 'batch_size'?"),
        ("N_EMBD = 3\n", "unknown key 'N_EMBD', did you mean 'n_embd'?"),
        ("batch_size = 'x'\n", "batch_size takes int, not 'x'"),
        ("batch_size = [1]\n", 'batch_size takes int'),
        ("optimizer = 'mun'\n", "optimizer takes adamw or muon, not 'mun'"),
        ("from time import time\nseed = time\n", 'seed takes int, not <built-in function time>'),
        ("def seed():\n    pass\n", 'seed takes int, not <function seed'),
        ("plain = print\n", 'plain takes'),
        ("import time\nseed = time\n", "seed takes int, not <module 'time'"),
        ("import numpy\nseed = numpy.zeros(2)\n", 'seed takes int, not array([0., 0.])'),
        ("seed = 10 ** 5000\n", '64 bits'),
        ("start = 10 ** 5000\n", '64 bits'),
        ("learning_rate = 10 ** 400\n", '64 bits'),
        ("learning_rate = float('inf')\n", 'finite'),
        ("\nbatch_size = 1 / 0\n", 'mine.py, line 2: ZeroDivisionError'),
        ("def f():\n    return 1 / 0\n\nseed = f()\n", 'mine.py, line 4: ZeroDivisionError'),
        ("seed = 1\nbatch_size = (\n", 'mine.py, line 2: SyntaxError'),
        ("raise ValueError('two\\nlines' * 999)\n", 'line 1: ValueError: two lines'),
    ],
)
def test_mistakes_in_files(monkeypatch, config_file, text, words):
    """nanoGPT lets a typo in a config file pass in silence."""
    line = error(monkeypatch, config_file(text))
    assert words in line and 'mine.py' in line and len(line) < 600


def test_name_of_a_deep_file_is_whole(monkeypatch, tmp_path):
    path = tmp_path / ('folder' * 30) / 'mine.py'
    path.parent.mkdir()
    path.write_text("batch_size = 'x'\n")
    assert error(monkeypatch, path).startswith(f'{path}: batch_size takes int')


def test_ignored_names(monkeypatch, config_file, capsys):
    """Names that are neither keys nor close to one: one line for the whole run, and no keys."""
    first = config_file(
        "from __future__ import annotations\nimport math\nfoo = 1\nn_layer = [2]\n"
        "_hidden = 3\nbatch_size = foo\ndef function():\n    pass\n",
        'first.py',
    )
    second = config_file("foo = 2\nbar = None\nclass Class:\n    pass\n", 'second.py')
    names = configure(monkeypatch, first, second)
    assert names['batch_size'] == 1 and not {'foo', 'n_layer', 'bar'} & set(names)
    assert not {'foo', 'n_layer', 'bar'} & (set(names['config']) | names['given_keys'])
    streams = capsys.readouterr()
    assert streams.err == 'ignored, no keys of script.py: foo, n_layer, bar\n'
    assert streams.out == ''
    configure(monkeypatch, config_file("import math\n_hidden = 3\nbatch_size = 2\n"))
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_help_into_a_closed_pipe(house, unbuffered):
    """`python train.py --help | head -1`: no word, and no `Exception ignored`."""
    process = subprocess.Popen(
        [sys.executable, house / 'train.py', '--help'],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, 'PYTHONUNBUFFERED': unbuffered},
    )
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait() == 1
    process.stderr.close()


@pytest.mark.skipif(os.name != 'posix', reason='a POSIX shell')
@pytest.mark.parametrize(
    'streams, out, err', [('', '日?', 'err'), ('>&-', '', 'err'), ('2>&-', '日?', ''), ('>&- 2>&-', '', '')]
)
def test_closed_streams(tmp_path, streams, out, err):
    """Streams that the shell has closed, which Python makes None, swallow what a script writes, and no file
    that it opens becomes its stdout. A text or a path that UTF-8 cannot write has question marks.
    """
    (tmp_path / 'configurator.py').write_text(SOURCE, encoding='utf-8')
    (tmp_path / 'script.py').write_text(
        "import sys\nexec(open('configurator.py', encoding='utf-8').read())\nfile = open('out.txt', 'wb')\n"
        "print('日\\udcff')\nprint('err', file=sys.stderr)\nassert file.fileno() > 2\n",
        encoding='utf-8',
    )
    done = subprocess.run(
        f'"{sys.executable}" -X utf8 script.py {streams}',
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        encoding='utf-8',
    )
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (0, out, err)
    assert (tmp_path / 'out.txt').read_bytes() == b''


def test_help_on_an_old_console(house):
    """One without `…`: --help was a traceback."""
    for script in ('train.py', 'data/wiki_zh/prepare.py'):
        done = subprocess.run(
            [sys.executable, house / script, '--help'],
            capture_output=True,
            env={**os.environ, 'PYTHONIOENCODING': 'ascii'},
        )
        assert done.returncode == 0 and b'?' in done.stdout and not done.stderr


def test_project_files(monkeypatch, tmp_path):
    """A config file is looked for in the working directory, then in the project, and not above that."""
    for folder in ('here', 'project'):
        (tmp_path / folder / 'config').mkdir(parents=True)
        (tmp_path / folder / 'config' / f'{folder}.py').write_text("batch_size = 5\n")
        (tmp_path / folder / 'config' / 'both.py').write_text(f"start = '{folder}'\n")
    (tmp_path / 'project' / 'configurator.py').touch()
    (tmp_path / 'above.py').write_text("seed = 1\n")
    monkeypatch.chdir(tmp_path / 'here')
    script = str(tmp_path / 'project' / 'data' / 'x' / 'prepare.py')
    names = configure(monkeypatch, 'config/project.py', 'config/both.py', __file__=script)
    assert (names['batch_size'], names['start']) == (5, 'here')
    with pytest.raises(SystemExit, match='above.py: no such config file'):
        configure(monkeypatch, 'above.py', __file__=script)


def test_help(monkeypatch, tmp_path, capsys):
    """The docstring, then each key with its default, its choices and the whole comment beside it."""
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT + "seed = 0  # later in the script\n")
    with pytest.raises(SystemExit) as stop:
        configure(monkeypatch, '--batch_size=3', '--help', __file__=str(path))
    out = capsys.readouterr().out
    words = [line.split() for line in out.splitlines() if line.startswith('  --')]
    lines = {key: ' '.join(comment) for key, *comment in words}
    assert not stop.value.code and out.startswith('What the script does.\n')
    assert lines['--batch_size=12'] == 'sequences'
    assert lines['--seed=1337'] == 'of weights and batches, and of dropout'
    assert lines["--optimizer='adamw'"] == '(adamw or muon) muon for matrices'
    assert lines['--dtype=None'] == '(float32 or bfloat16 or float16 or None)'
    assert lines['--top_k=200'] == '' and len(lines) == len(configure(monkeypatch)['config'])


def test_one_process_prints(monkeypatch, config_file, capsys):
    """Under torchrun."""
    waited = []
    monkeypatch.setattr('time.sleep', waited.append)
    monkeypatch.setenv('LOCAL_RANK', '1')
    with pytest.raises(SystemExit) as stop:
        configure(monkeypatch, '--batchsize=3')
    assert stop.value.code == 1 and sum(waited) > 1
    path = config_file("foo = 1\n")
    configure(monkeypatch, path)
    assert capsys.readouterr().err == ''
    monkeypatch.setenv('LOCAL_RANK', '0')
    configure(monkeypatch, path)
    assert 'ignored' in capsys.readouterr().err
    waited.clear()
    assert 'batch_size' in error(monkeypatch, '--batchsize=3') and sum(waited) == 0


def test_errors_behind_it(monkeypatch, capsys):
    """Of the script that it has configured: a missing package is a line that says what to do, Ctrl-C says
    nothing, and a bug has its traceback.
    """
    configure(monkeypatch)
    for raised, words in (
        (
            ModuleNotFoundError("No module named 'x'"),
            "No module named 'x': pip install -r requirements.txt\n",
        ),
        (KeyboardInterrupt(), ''),
        (ImportError("cannot import name 'y'"), "ImportError: cannot import name 'y'\n"),
        (ValueError('a bug'), 'ValueError: a bug\n'),
    ):
        sys.excepthook(type(raised), raised, None)
        assert capsys.readouterr() == ('', words)
