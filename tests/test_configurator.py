"""configurator.py, executed in a fresh dict as a script's globals."""

import io
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

SOURCE = (ROOT / 'configurator.py').read_text(encoding='utf-8')
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
seed = 1337                 # of weights and batches
out_dir = 'out'
start = "hello"
compile: bool | None = None
device: str | None = None
top_k: int | None = 200
optimizer: Literal['adamw', 'muon'] = 'adamw'                      # muon for matrices
dtype: Literal['float32', 'bfloat16', 'float16'] | None = None
plain = None
'''


def configure(monkeypatch, *arguments, script=SCRIPT, **names):
    names = {'__name__': '__main__', '__file__': 'folder/script.py', **names}
    exec(script, names)
    monkeypatch.setattr(sys, 'argv', ['script.py', *map(str, arguments)])
    monkeypatch.setattr(sys, 'excepthook', sys.__excepthook__)
    monkeypatch.setattr(sys, 'stdout', sys.stdout)
    exec(SOURCE, names)
    return names


def printed(monkeypatch, error):
    """What the excepthook prints."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, 'stderr', stderr)  # for a traceback
    monkeypatch.setattr(sys, '__stderr__', stderr)
    sys.excepthook(type(error), error, error.__traceback__)
    return stderr.getvalue()


def error(monkeypatch, *arguments, **names):
    """The line that ends the script."""
    with pytest.raises(ValueError) as failure:
        configure(monkeypatch, *arguments, **names)
    text = printed(monkeypatch, failure.value)
    assert text.endswith('\n') and len(text.splitlines()) == 1 and 'Traceback' not in text
    return text.removesuffix('\n')


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
        ('--batch_size=+3', 'batch_size', 3),
        ('--batch_size=1_000', 'batch_size', 1000),
        ('--batch_size=010', 'batch_size', 10),
        ('--batch_size=9223372036854775807', 'batch_size', 2**63 - 1),
        ('--learning_rate=1', 'learning_rate', 1.0),
        ('--learning_rate=1e-3', 'learning_rate', 1e-3),
        ('--learning_rate=1e18', 'learning_rate', 1e18),
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
        ('--batch_size', "--batch_size: write --batch_size=value, with no space around '='"),
        ('--compile', "--compile: write --compile=True, with no space around '='"),
        ('--=3', "unknown key '', --help lists the keys"),
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
    assert error(monkeypatch, '--key=c', script=script) == "--key=c: key takes a or b or None, not 'c'"


@pytest.mark.parametrize(
    'argument, words',
    [
        ('--batchsize=3', "unknown key 'batchsize', did you mean 'batch_size'?"),
        ('--batch-size=3', "unknown key 'batch-size', did you mean 'batch_size'?"),
        ('--batchsize', "unknown key 'batchsize', did you mean 'batch_size'?"),
        ('--batch=3', "unknown key 'batch', did you mean 'batch_size'?"),
        ('--n_embed=3', "unknown key 'n_embed', did you mean 'n_embd'?"),
        ('--lr=3', "unknown key 'lr', did you mean 'learning_rate'?"),
        ('--opt=muon', "unknown key 'opt', --help lists the keys"),
        ('--no-compile', "unknown key 'no-compile', write --compile=False"),
        ('--config=x.py', "unknown key 'config', write the name of a config file alone"),
        ('--config', "unknown key 'config', write the name of a config file alone"),
        ('--rewind=True', "unknown key 'rewind', go around a bad stretch with another --seed"),
    ],
)
def test_hints(monkeypatch, argument, words):
    assert error(monkeypatch, argument) == f'{argument}: {words}'


@pytest.mark.parametrize(
    'value, words',
    [
        ('{[]:1}', 'batch_size takes int'),
        ('9' * 20, 'batch_size takes int, finite and within 64 bits'),
        ('9' * 400, '64 bits'),
        ('-' + '9' * 20, 'batch_size must be at least 0, not -9999'),
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


def test_files_then_arguments(monkeypatch, config_file):
    """Config files run in their order, each sees the defaults and the files before it, and a key on the
    command line wins wherever it stands: `--max_iters=100 config/x.py` ran 2,200 iterations. Modules,
    callables and _names are no keys.
    """
    first = config_file(
        "import time\nfrom math import sqrt\n_half = batch_size // 2\nbatch_size = _half\n"
        "n_embd = int(sqrt(16)) * 8\n",
        'first.py',
    )
    second = config_file("learning_rate = 1\nn_embd *= 2\nbatch_size += 1\nseed = batch_size\n", 'second.py')
    names = configure(
        monkeypatch, '--learning_rate=3', '--batch_size=40', first, '--start=x', second, '--learning_rate=2'
    )
    assert (names['n_embd'], names['learning_rate'], names['start']) == (64, 2.0, 'x')
    assert (names['seed'], names['batch_size']) == (7, 40)  # the files had the default, then 6, then 7
    assert configure(monkeypatch, second, first)['n_embd'] == 32


def test_arguments_are_checked_first(monkeypatch, config_file, tmp_path):
    """A typo on the command line is told before a config file has run."""
    path = config_file(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "unknown key 'batchsize'" in error(monkeypatch, path, '--batchsize=3')
    assert '--compile=True' in error(monkeypatch, '--compile', 'False', path)
    assert not (tmp_path / 'ran').exists()


def test_namespace_of_files(monkeypatch, config_file):
    """nanoGPT's: the script's names, with its modules, __name__ and __file__. Users' files need them."""
    path = config_file(
        "assert __name__ == '__main__'\nstart = __file__\n"
        "out_dir = os.path.join('runs', str(int(time.time() > 0)))\n"
        "class Sizes:\n    width = math.ceil(n_embd / 3)\n"
        "n_embd = Sizes.width\nseed = sum(seed for _ in range(batch_size))\n"
    )
    names = configure(
        monkeypatch, path, script='import math, os, time\n' + SCRIPT.split('annotations\n', 1)[1]
    )
    assert (names['out_dir'], names['n_embd']) == (os.path.join('runs', '1'), 2)
    assert (names['start'], names['seed']) == ('folder/script.py', 12 * 1337)


def test_nothing_else_is_left(monkeypatch, config_file):
    """The script's globals are its own: neither the configurator's names nor those of a file come in."""
    path = config_file("import json\nhelper = 3\ndef function():\n    pass\nseed = 2\n")
    before = {'__name__': '__main__', '__file__': 'x.py'}
    exec(SCRIPT, before)
    names = configure(monkeypatch, path)
    assert names.keys() - before.keys() == {'config', 'given_keys', 'check_value'}
    assert names['__doc__'] == before['__doc__'] and names['seed'] == 2


def test_home(monkeypatch, config_file):
    """`--out_dir=~/x`, which the shell does not expand, made a folder named `~`. Other keys keep their ~."""
    monkeypatch.setenv('HOME', '/home/me')
    monkeypatch.setenv('USERPROFILE', '/home/me')
    names = configure(monkeypatch, '--out_dir=~/x', '--start=~/x')
    assert names['out_dir'] == names['config']['out_dir'] == '/home/me/x' and names['start'] == '~/x'
    assert configure(monkeypatch, config_file("out_dir = '~/y'\n"))['out_dir'] == '/home/me/y'
    script = "input = ''\nfiles = ''\ninit_from = 'resume'\n"
    names = configure(monkeypatch, '--input=~', '--files=~/*.txt', '--init_from=~/x', script=script)
    assert list(names['config'].values()) == ['/home/me', '/home/me/*.txt', '/home/me/x']


def test_check_value(monkeypatch):
    """train.py asks it about what a checkpoint says of a key."""
    check_value = configure(monkeypatch)['check_value']
    for key, value, taken in (
        ('learning_rate', 1, 1.0),
        ('top_k', None, None),
        ('batch_size', 3, 3),
        ('optimizer', 'muon', 'muon'),
        ('plain', 1, 1),
    ):
        found = check_value('ckpt.pt', key, value)
        assert found == taken and type(found) is type(taken)
    for key, value in (('batch_size', 3.0), ('batch_size', True), ('optimizer', 'mun'), ('seed', [3])):
        with pytest.raises(ValueError, match=f'^ckpt.pt: {key} takes '):
            check_value('ckpt.pt', key, value)


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
        ("base_learning_rate = 1\n", "unknown key 'base_learning_rate', did you mean 'learning_rate'?"),
        ("\nbatch_size = 1 / 0\n", 'mine.py, line 2: ZeroDivisionError'),
        ("def f():\n    return 1 / 0\n\nseed = f()\n", 'mine.py, line 4: ZeroDivisionError'),
        ("seed = 1\nbatch_size = (\n", "SyntaxError: '(' was never closed (mine.py, line 2)"),
        ("seed = 1\0\n", 'null byte'),
        ("raise ValueError('two\\nlines' * 999)\n", 'line 1: ValueError: two lines'),
    ],
)
def test_mistakes_in_files(monkeypatch, config_file, text, words):
    """nanoGPT lets a typo in a config file pass in silence."""
    path = config_file(text)
    monkeypatch.chdir(path.parent)
    line = error(monkeypatch, path.name)
    assert words in line and line.startswith('mine.py') and len(line) < 600


def test_name_of_a_deep_file_is_whole(monkeypatch, tmp_path):
    path = tmp_path / ('folder' * 30) / 'mine.py'
    path.parent.mkdir()
    path.write_text("batch_size = 'x'\n")
    assert error(monkeypatch, path).startswith(f'{path}: batch_size takes int')


def test_ignored_names(monkeypatch, config_file, capsys):
    """Names that are neither keys nor close to one: one line for the whole run, and no keys."""
    first = config_file(
        "import math\nfoo = 1\nn_layer = [2]\n_hidden = 3\nbatch_size = foo\ndef function():\n    pass\n",
        'first.py',
    )
    second = config_file("foo = 2\nbar = None\nclass Class:\n    pass\n", 'second.py')
    names = configure(monkeypatch, first, second)
    assert names['batch_size'] == 1 and not {'foo', 'n_layer', 'bar'} & set(names)
    assert not {'foo', 'n_layer', 'bar'} & (set(names['config']) | names['given_keys'])
    streams = capsys.readouterr()
    assert streams.err == 'ignored, no keys of script.py: bar, foo, n_layer\n'
    assert streams.out == ''
    configure(monkeypatch, config_file("import math\n_hidden = 3\nbatch_size = 2\n"))
    assert capsys.readouterr().err == ''


def test_names_beside_a_key(monkeypatch, config_file, capsys):
    """A helper whose name is like a key's is no typo where the file sets that key too: two users' files."""
    path = config_file(
        "base_learning_rate = 1e-3\nlearning_rate = base_learning_rate * 2\n"
        "eval_batch_size = 3\nbatch_size = 4\n"
    )
    names = configure(monkeypatch, path)
    assert (names['learning_rate'], names['batch_size']) == (2e-3, 4)
    assert capsys.readouterr().err.endswith(': base_learning_rate, eval_batch_size\n')


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
    """A config file is looked for in the working directory, then in the project, and nowhere else."""
    for folder in ('here', 'project'):
        (tmp_path / folder / 'config').mkdir(parents=True)
        (tmp_path / folder / 'config' / f'{folder}.py').write_text("batch_size = 5\n")
        (tmp_path / folder / 'config' / 'both.py').write_text(f"start = '{folder}'\n")
    (tmp_path / 'above.py').write_text("seed = 1\n")
    monkeypatch.chdir(tmp_path / 'here')
    names = configure(monkeypatch, 'config/project.py', 'config/both.py', ROOT=tmp_path / 'project')
    assert (names['batch_size'], names['start']) == (5, 'here')
    assert 'above.py: no such config file' in error(monkeypatch, 'above.py', ROOT=tmp_path / 'project')


@pytest.mark.parametrize(
    'argument', ['bench', 'bench.py', 'config/bench', 'elsewhere/bench.py', 'bench.yaml']
)
def test_name_of_a_config_file(monkeypatch, tmp_path, argument):
    """One without .py or without its folder: the line says the whole name."""
    monkeypatch.chdir(tmp_path)
    words = f'{argument}: no such config file, did you mean config/bench.py?'
    assert error(monkeypatch, argument, ROOT=ROOT) == words
    assert configure(monkeypatch, 'config/bench.py', ROOT=ROOT)['batch_size'] == 12


def test_other_files_are_not_run(monkeypatch, tmp_path):
    """`prepare.py book.txt` ran the book as Python."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'book.txt').write_text("open('ran', 'w')\n")
    words = f'no such config file here or in {ROOT} (its name ends in .py); a key is written --key=value'
    assert error(monkeypatch, 'book.txt', ROOT=ROOT) == f'book.txt: {words}'
    assert not (tmp_path / 'ran').exists()


def test_help(monkeypatch, tmp_path, capsys):
    """The docstring, then each key with its default, its choices and the whole comment beside it."""
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT + "exec(…)\nseed = 0  # later in the script\n", encoding='utf-8')
    with pytest.raises(SystemExit) as stop:
        configure(monkeypatch, '--batch_size=3', '--help', __file__=str(path))
    out = capsys.readouterr().out
    words = [line.split() for line in out.splitlines() if line.startswith('  --')]
    lines = {key: ' '.join(comment) for key, *comment in words}
    assert not stop.value.code and out.startswith('What the script does.\n\nkeys and their defaults; ')
    assert lines['--batch_size=12'] == 'sequences'
    assert lines['--seed=1337'] == 'of weights and batches'
    assert lines["--optimizer='adamw'"] == '(adamw or muon) muon for matrices'
    assert lines['--dtype=None'] == '(float32 or bfloat16 or float16 or None)'
    assert lines['--top_k=200'] == '' and len(lines) == len(words) == len(configure(monkeypatch)['config'])


GROUPED = '''"""What it does."""
FOLDER = here()  # no key

# neither is this a heading
# ----------------------------
# Introduction to all that follows.
# files
out_dir = 'out'  # folder
stop: str | None = None  # where a text ends; it is a long comment, of which some words stand on a second line
# model
n_layer=12
# what comes last, size = 3
a_key_with_a_name_that_fills_the_column = 'as micro-batches do'  # it has micro-batches
exec(…)
'''
HELP = '''What it does.

keys and their defaults; a config file or --key=value sets them:

files:
  --out_dir='out'           folder
  --stop=None               where a text ends; it is a long comment, of which
                            some words stand on a second line

model:
  --n_layer=12

what comes last, size = 3:
  --a_key_with_a_name_that_fills_the_column='as micro-batches do'  it has
                            micro-batches
'''


@pytest.mark.parametrize('source, out', [(GROUPED, HELP), ('"""A script without keys."""\nexec()', None)])
def test_help_in_groups(monkeypatch, tmp_path, capsys, source, out):
    """A comment right above a key begins a group, in the order of the source; long ones are wrapped below
    their column, and not at a hyphen. Of a script without keys, the docstring is all.
    """
    path = tmp_path / 'script.py'
    path.write_text(source, encoding='utf-8')
    with pytest.raises(SystemExit):
        script = source.partition('exec')[0]
        configure(monkeypatch, '--help', script=script, here=object, __file__=str(path))
    assert capsys.readouterr().out == (out or 'A script without keys.\n')


def test_one_process_prints(monkeypatch, config_file, capsys):
    """Under torchrun."""
    path = config_file("foo = 1\n")
    monkeypatch.setenv('LOCAL_RANK', '1')
    configure(monkeypatch, path)
    assert capsys.readouterr().err == ''
    monkeypatch.setenv('LOCAL_RANK', '0')
    configure(monkeypatch, path)
    assert 'ignored' in capsys.readouterr().err


# -----------------------------------------------------------------------------
# How a script ends that the configurator has configured

TRAIN, SAMPLE, PREPARE = 'max_iters = 1\ndevice = None\n', 'num_samples = 1\ndevice = "cpu"\n', 'input = ""\n'
NOBODY_READS = "nobody reads this run's output any more: go on with --init_from=auto\n"
NOT_COMPLETE = 'interrupted: the data is not complete\n'


class UserError(ValueError):
    """As model.py and data/tokenizer.py have it: not the configurator's own class."""


class OfUsers(UserError):
    pass


class OutOfMemoryError(RuntimeError):
    """As torch has it."""


class _ArrayMemoryError(MemoryError):
    """As numpy has it."""


@pytest.mark.parametrize(
    'script, raised, words',
    [
        (PREPARE, UserError('one\ntwo  three'), 'one two  three\n'),
        (PREPARE, OfUsers('a mistake'), 'a mistake\n'),
        (TRAIN, KeyboardInterrupt(), ''),
        (TRAIN, BrokenPipeError(32, 'Broken pipe'), NOBODY_READS),
        (SAMPLE, KeyboardInterrupt(), ''),
        (SAMPLE, BrokenPipeError(32, 'Broken pipe'), ''),
        (PREPARE, KeyboardInterrupt(), NOT_COMPLETE),
        (PREPARE, BrokenPipeError(32, 'Broken pipe'), NOT_COMPLETE),
        (
            PREPARE,
            OSError(28, 'No space left on device'),
            'cannot write: No space left on device; make room and run it again\n',
        ),
        (PREPARE, OSError(13, 'Permission denied', 'x/y.bin'), 'x/y.bin: Permission denied\n'),
        (PREPARE, ConnectionError('cannot download it'), 'cannot download it\n'),
        (
            TRAIN,
            OutOfMemoryError('a long story'),
            'out of memory on this machine: halve --batch_size, double --gradient_accumulation_steps\n',
        ),
        (
            SAMPLE,
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            'out of memory on cpu: fewer --num_samples or --max_new_tokens\n',
        ),
        (SAMPLE, MemoryError(), 'out of memory on cpu: fewer --num_samples or --max_new_tokens\n'),
        (PREPARE, _ArrayMemoryError('shape'), 'out of memory on this machine: prepare less text\n'),
        (
            PREPARE,
            ModuleNotFoundError("No module named 'x'", name='x'),
            "No module named 'x': pip install -r requirements.txt\n",
        ),
        (TRAIN, ImportError("cannot import name 'y'"), "ImportError: cannot import name 'y'\n"),
        (TRAIN, RuntimeError('a bug'), 'RuntimeError: a bug\n'),
        (PREPARE, ValueError('a bug'), 'ValueError: a bug\n'),
    ],
)
def test_excepthook(monkeypatch, script, raised, words):
    """One line for everything but a bug, and a bug has its traceback (which is empty here)."""
    configure(monkeypatch, script=script)
    assert printed(monkeypatch, raised) == words


def test_device_in_the_excepthook(monkeypatch):
    """The one that the script has found, not the one that was asked for."""
    names = configure(monkeypatch, script=TRAIN)
    names['device'] = 'cuda:1'
    assert printed(monkeypatch, MemoryError()).startswith('out of memory on cuda:1: ')


@pytest.fixture
def process(tmp_path):
    """process(code): a script with an empty key `input` that runs `code`; its status, stdout and stderr."""

    def process(code, stdout=subprocess.PIPE, env={}):  # noqa: B006
        head = "import os, signal, sys, time\ninput = ''\n"
        configurator = f"exec(open({str(ROOT / 'configurator.py')!r}, encoding='utf-8').read())\n"
        (tmp_path / 'script.py').write_text(head + configurator + code)
        done = subprocess.run(
            [sys.executable, tmp_path / 'script.py'],
            stdout=stdout,
            stderr=subprocess.PIPE,
            env={**os.environ, **env},
            encoding='utf-8',
        )
        return done.returncode, done.stdout, done.stderr

    return process


FAILS = "class UserError(ValueError): pass\nraise UserError('a mistake')\n"


def test_status(process):
    """1 for a mistake, and for Ctrl-C what Python has."""
    assert process(FAILS) == (1, '', 'a mistake\n')
    status, out, words = process("raise KeyboardInterrupt")
    assert (out, words) == ('', NOT_COMPLETE)
    assert os.name != 'posix' or status == -signal.SIGINT
    status, out, words = process("1 / 0")
    assert (status, out) == (1, '') and words.startswith('Traceback') and 'ZeroDivisionError' in words


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='a disk that is always full')
@pytest.mark.parametrize('end', ['', '\\n'])
def test_stdout_that_is_full(process, end):
    """One line. Python wrote what was left in stdout once more when it exited, with a traceback."""
    with open('/dev/full', 'w') as full:
        found = process(f"print('x' * 99, end='{end}')\nprint('y' * 99999)", stdout=full)
    assert found == (1, None, 'stdout: No space left on device; make room and run it again\n')


@pytest.mark.skipif(os.name != 'posix', reason='pipes')
def test_stdout_that_nobody_reads(process):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, 'w') as pipe:
        found = process("print('x' * 99, end='')\nprint('y' * 99999)", stdout=pipe)
    assert found == (1, None, NOT_COMPLETE)


@pytest.mark.skipif(os.name != 'posix', reason='signals')
def test_ranks_that_fail(process):
    """Rank 0 speaks at once. Another waits for torchrun to end it, whatever the script does about SIGTERM,
    and speaks if nobody does. Both leave without the interpreter's teardown, which gloo's threads may abort.
    """
    leave = "import atexit\natexit.register(os.write, 2, b'teardown')\n"
    assert process(leave + FAILS, env={'LOCAL_RANK': '0'}) == (1, '', 'a mistake\n')
    wait = leave + "time.sleep = lambda s: print(s, 'seconds', file=sys.stderr)\n"
    assert process(wait + FAILS, env={'LOCAL_RANK': '1'}) == (1, '', '10 seconds\na mistake\n')
    ended = (
        "signal.signal(signal.SIGTERM, print)\ntime.sleep = lambda s: os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    assert process(ended + FAILS, env={'LOCAL_RANK': '1'}) == (-signal.SIGTERM, '', '')


def test_line_behind_a_replaced_stderr(process):
    """torch.distributed calls the hook with a sys.stderr that it reads when the hook returns."""
    wrapped = (
        "import io\nhook = sys.excepthook\n"
        "def wrap(*error):\n    sys.stderr = io.StringIO()\n    hook(*error)\n"
        "sys.excepthook = wrap\n"
    )
    assert process(wrapped + FAILS, env={'LOCAL_RANK': '0'}) == (1, '', 'a mistake\n')
