"""assets/plot.py: its table and its curves against plain sums over files that the tests write."""

import json
import os
import re
import runpy
import struct
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip('matplotlib')

from assets import plot  # noqa: E402

SETTINGS = {
    'out_dir': 'out',
    'wandb_run_name': 'gpt2',
    'device': 'cpu',
    'init_from': 'scratch',
    'dataset': 'tiny',
    'n_layer': 2,
    'learning_rate': 1e-3,
    'seed': 1337,
}
TOKENS = 100  # of an iteration


def run_line(iteration=0, parameters=1234567, **settings):
    return {
        'kind': 'run',
        'iter': iteration,
        'settings': {**SETTINGS, **settings},
        'parameters': parameters,
        'versions': {'python': '3'},
    }


def train_line(iteration, loss=2.0, ms=100.0, **more):
    timing = {'ms': ms, 'tokens_per_second': TOKENS * 1000 / ms, 'mfu': None}
    line = {'kind': 'train', 'iter': iteration, 'tokens': iteration * TOKENS, 'lr': 1e-3, 'loss': loss}
    return {**line, 'grad_norm': None, **timing, **more}


def eval_line(iteration, loss):
    line = {'kind': 'eval', 'iter': iteration, 'tokens': iteration * TOKENS, 'lr': 1e-3}
    return {**line, 'train/loss': loss, 'val/loss': loss, 'sample': 'naïve 文\n'}


def a_run(**settings):
    """300 iterations from 4 to 1, logged every 10th, evaluated every 100th."""
    lines = [run_line(**settings)]
    for i in range(0, 301, 10):
        loss = 1 + 3 * 0.5 ** (i / 20)
        if i % 100 == 0:
            lines.append(eval_line(i, loss))
        if i < 300:
            lines.append(train_line(i, loss, ms=100 + i, smoothed_loss=loss))
    return lines


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(lines, folder='out-a', end=b''): writes a metrics.jsonl into a folder here."""
    monkeypatch.chdir(tmp_path)

    def write(lines, folder='out-a', end=b''):
        (tmp_path / folder).mkdir()
        text = ''.join(json.dumps(line) + '\n' for line in lines)
        (tmp_path / folder / 'metrics.jsonl').write_bytes(text.encode() + end)
        return folder

    return write


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    saved = []
    savefig = plot.Figure.savefig

    def save(figure, *arguments, **how):
        saved.append(figure)
        savefig(figure, *arguments, **how)

    monkeypatch.setattr(plot.Figure, 'savefig', save)
    return saved


def table(capsys):
    """The printed table as dicts. Columns are at least two blanks apart."""
    *out, last = capsys.readouterr().out.splitlines()
    assert last.startswith('the curves: ')
    names, *rows = [re.split(' {2,}', line.strip()) for line in out]
    assert len({len(line) for line in out}) == 1  # aligned
    return [dict(zip(names, row, strict=True)) for row in rows]


def png_size(path):
    data = path.read_bytes()
    assert data.startswith(b'\x89PNG\r\n\x1a\n') and data.endswith(b'IEND\xaeB`\x82')
    return struct.unpack('>II', data[16:24])


def test_table_and_picture_of_one_run(write, tmp_path, capsys, figures):
    write(a_run())
    plot.main(['out-a'])
    # Log lines at 0, 10 … 290, each with the speed of the ten iterations before; the last ten have no line.
    seconds = (sum(10 * (100 + i) for i in range(10, 300, 10)) + 10 * 390) / 1000
    assert table(capsys) == [
        {
            'folder': 'out-a',
            'best val loss': '1.0001 at 300',
            'tokens': '30,000',
            'time': f'0:01:{round(seconds) - 60:02}',
            'tok/s': f'{(TOKENS * 1000 / 240 + TOKENS * 1000 / 250) / 2:,.0f}',
        }
    ]
    assert png_size(tmp_path / 'out-a' / 'loss.png')[0] == 920
    assert {path.name for path in (tmp_path / 'out-a').iterdir()} == {'metrics.jsonl', 'loss.png'}
    (figure,) = figures
    title = figure.get_suptitle().replace('\n', ' ')
    assert title.startswith('dataset=tiny, parameters=1.23M, n_layer=2,') and 'seed=1337' in title
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['out-a: best 1.0001 at 300']


def test_axes(write, figures):
    """Tokens and minutes; few evaluations are dots, which draw no trend."""
    write(a_run())
    plot.main(['out-a'])
    left, right = figures[0].axes
    assert (left.get_xlabel(), right.get_xlabel()) == ('tokens', 'minutes')
    for panel in (left, right):
        line, dots = panel.lines
        assert line.get_marker() == 'None' and dots.get_linestyle() == 'None'
        assert len(line.get_xdata()) == 30 and len(dots.get_xdata()) == 4
        assert list(dots.get_ydata()) == [4, 1.09375, 1 + 3 / 2**10, 1 + 3 / 2**15]
    assert list(left.lines[1].get_xdata()) == [0, 10_000, 20_000, 30_000]
    assert left.xaxis.get_major_formatter()(20_000) == '20k'
    # Up to iteration 100: nine times ten iterations, and ten more without a line, at the last speed
    at_100 = (sum(10 * (100 + i) for i in range(10, 100, 10)) + 10 * 190) / 1000
    assert right.lines[1].get_xdata()[:2] == pytest.approx([0, at_100 / 60])


@pytest.mark.parametrize(
    'ms, unit, last',
    [(10, 'minutes', 0.05), (1000, 'minutes', 5), (1e5, 'hours', 8.333)],
)
def test_units_of_time(write, figures, ms, unit, last):
    write([run_line(), *(train_line(i, ms=ms) for i in range(300))])
    plot.main(['out-a'])
    right = figures[0].axes[1]
    assert right.get_xlabel() == unit and right.lines[0].get_xdata()[-1] == pytest.approx(last, rel=5e-3)


def test_resumed(write, capsys):
    """Time and tokens go on behind a resume, and the settings are those of the last start."""
    lines = [run_line(), *(train_line(i) for i in range(0, 50, 10)), eval_line(50, 1.5)]
    lines += [run_line(50, learning_rate=5e-4, init_from='resume'), eval_line(50, 1.5)]
    lines += [*(train_line(i, ms=300) for i in range(50, 100, 10)), eval_line(100, 1.25)]
    write(lines)
    row, curves = plot.read_run('out-a')
    assert row['learning_rate'] == 5e-4 and row['best val loss'] == '1.2500 at 100'
    assert curves['train'][5] == pytest.approx((5000, 50 * 0.1, 2.0))
    assert row['time'] == '0:00:20' and row['tokens'] == '10,000'


def test_smoothed_loss_is_taken(write):
    """The loss itself where an earlier version of train.py has written no smoothed_loss."""
    write([run_line(), train_line(0, 4.0), train_line(1, 1.0, smoothed_loss=3.5)])
    assert [loss for _, _, loss in plot.read_run('out-a')[1]['train']] == [4.0, 3.5]


@pytest.mark.parametrize(
    'end',
    [b'{"kind": "eval", "iter": 400, "val/lo', b'\0' * 50, '{"kind": "eval", "sample": "文'.encode()[:-1]],
)
def test_torn_line(write, tmp_path, capsys, end):
    """A kill tears the last line, in the middle of a character too; a crash may leave zeros."""
    write(a_run(), end=end)
    plot.main(['out-a'])
    assert table(capsys)[0]['best val loss'] == '1.0001 at 300'
    assert png_size(tmp_path / 'out-a' / 'loss.png')


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize(
    'lines, row',
    [
        ([], ('none', '0', '0:00:00', 'none')),
        ([run_line()], ('none', '0', '0:00:00', 'none')),
        ([run_line(), eval_line(0, 4.5)], ('4.5000 at 0', '0', '0:00:00', 'none')),
        ([run_line(), eval_line(0, 4.5), eval_line(9, 4)], ('4.0000 at 9', '900', '0:00:00', 'none')),
        ([run_line(), train_line(0), train_line(10)], ('none', '1,000', '0:00:01', '1,000')),
        ([run_line(500, init_from='resume'), train_line(500)], ('none', '50,000', '0:00:50', '1,000')),
    ],
)
def test_little(write, tmp_path, capsys, lines, row):
    """A run that has just begun, one without log lines, one without evaluations, one that has lost its
    beginning: a picture, and no warning of numpy or matplotlib."""
    write(lines)
    plot.main(['out-a'])
    assert tuple(table(capsys)[0].values())[1:] == row
    assert png_size(tmp_path / 'out-a' / 'loss.png')


def test_range(write, figures):
    """The fall of the first iterations is cut off. An explosion is not, nor is the whole of a first tenth
    that has no more."""
    write(a_run())
    exploded = [train_line(i, 7.0, smoothed_loss=7.0) for i in range(300, 320)]
    write([*a_run(), *exploded], 'out-b')
    plot.main(['out-a'])
    plot.main(['out-b'])
    low, high = figures[0].axes[0].get_ylim()
    assert 0.9 < low < 1 and 2 < high < 2.2  # at iteration 30 of 300 the loss is 2.06
    assert 7 < figures[1].axes[0].get_ylim()[1] < 7.1


def test_several_runs(write, tmp_path, capsys, figures):
    """Ten runs: the settings that differ are columns, but for names and machines; ten colours."""
    folders = []
    for i in range(10):
        other = {'out_dir': f'out-{i}', 'wandb_run_name': f'{i}', 'device': f'cuda:{i}', 'eval_interval': i}
        folders.append(write(a_run(learning_rate=i * 1e-3, seed=1337 + i, **other), f'out-{i}'))
    plot.main(folders)
    rows = table(capsys)
    results = ['best val loss', 'tokens', 'time', 'tok/s']
    assert list(rows[0]) == ['folder', 'learning_rate', 'seed', *results]
    assert [(row['folder'], row['learning_rate'], row['seed']) for row in rows] == [
        (f'out-{i}', str(i * 1e-3), str(1337 + i)) for i in range(10)
    ]
    assert png_size(tmp_path / 'runs.png') and not list(tmp_path.glob('*/*.png'))
    left, right = figures[0].axes
    assert len({line.get_color() for line in left.lines}) == 10
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == [f'out-{i}: best 1.0001 at 300' for i in range(10)]
    assert figures[0].get_suptitle() == 'dataset=tiny, parameters=1.23M, n_layer=2'


def test_other_lengths(write, figures):
    """The units fit the longest of the runs, and a run without points is drawn beside others."""
    write([run_line()], 'out-a')
    write([run_line(), *(train_line(i, ms=60000) for i in range(0, 9))], 'out-b')
    plot.main(['both.png', 'out-a', 'out-b'])
    assert figures[0].axes[1].get_xlabel() == 'minutes'


def test_old_picture_stays_whole(write, tmp_path, monkeypatch):
    """A disk that fills up while the picture is written leaves the old one."""
    write(a_run())
    old = tmp_path / 'out-a' / 'loss.png'
    old.write_bytes(b'old')

    def savefig(figure, path, **how):
        with open(path, 'wb') as f:
            f.write(b'\x89PNG')
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(plot.Figure, 'savefig', savefig)
    with pytest.raises(OSError, match="No space"):
        plot.main(['out-a'])
    assert old.read_bytes() == b'old'


def mistake(monkeypatch, *arguments):
    """What the script says, in one line, before it ends with status 1."""
    monkeypatch.setattr(sys, 'argv', ['plot.py', *arguments])
    monkeypatch.setattr(os, 'nice', lambda increment: 0, raising=False)
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(ROOT / 'assets' / 'plot.py'), run_name='__main__')
    line = error.value.code  # Python prints a text on stderr, and ends with status 1
    assert isinstance(line, str) and '\n' not in line
    return line


def test_mistakes(write, monkeypatch):
    write(a_run())
    write(a_run(), 'out-b')
    assert 'python assets/plot.py OUT_DIR' in mistake(monkeypatch)
    assert 'python assets/plot.py OUT_DIR' in mistake(monkeypatch, 'picture.png')
    line = mistake(monkeypatch, 'out-a', 'out-c')
    assert line == f"{os.path.join('out-c', 'metrics.jsonl')}: No such file or directory"
    assert re.match(
        r'nowhere.+: No such file', mistake(monkeypatch, 'out-a', os.path.join('nowhere', 'a.png'))
    )
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert mistake(monkeypatch, 'out-a').endswith(': pip install -r requirements.txt')


def test_process(write, tmp_path):
    """As train.py calls it: matplotlib is imported at a low priority, torch and pyplot never."""
    write(a_run())
    code = '''if True:
        import os, runpy, sys

        before = os.nice(0) if hasattr(os, 'nice') else None

        class Finder:
            def find_spec(self, name, *arguments):
                if name == 'matplotlib':
                    print('lower' if before is None or os.nice(0) > before else 'same')

        sys.meta_path.insert(0, Finder())
        runpy.run_path(sys.argv[0], run_name='__main__')
        print({'torch', 'matplotlib.pyplot', 'train', 'data'} & set(sys.modules))
    '''
    script = str(ROOT / 'assets' / 'plot.py')
    code = code.replace('sys.meta_path', f'sys.argv = [{script!r}, *sys.argv[1:]]\n        sys.meta_path', 1)
    done = subprocess.run(
        [sys.executable, '-W', 'error', '-c', code, 'out-a', 'picture.png'], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, *rows, curves, last = done.stdout.splitlines()
    assert first == 'lower' and last == 'set()' and len(rows) == 2 and curves == 'the curves: picture.png'
    assert png_size(tmp_path / 'picture.png')[0] == 920
