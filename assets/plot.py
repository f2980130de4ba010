"""
Draws training runs, and prints a table of them, from the metrics.jsonl in their folders.

    python assets/plot.py out-a                         the picture is out-a/loss.png
    python assets/plot.py out-a out-b … [PICTURE.png]   one picture of several runs, by default runs.png

train.py starts it as a process of its own after evaluations.
"""

import json
import logging
import math
import os
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from textwrap import fill

# A run may be training on the same cores, and it goes first. The imports below alone take a second of a core.
if __name__ == '__main__' and hasattr(os, 'nice'):
    os.nice(10)
try:
    import numpy as np
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter
except ModuleNotFoundError as error:
    sys.exit(f"{error}: pip install -r requirements.txt")

# Folders may have any name: $ is a character, and Chinese ones need a font of the system's.
rcParams['text.parse_math'] = False
rcParams['font.family'] = ['DejaVu Sans', 'Noto Sans CJK JP', 'PingFang SC', 'Microsoft YaHei', 'SimHei']
logging.getLogger('matplotlib').setLevel('ERROR')  # it warns of each font that is missing

# The settings that shape a curve. Those that differ between runs are columns of the table, and the first of
# the others are the title of the picture.
FOR_TITLE = (
    'dataset parameters n_layer n_head n_embd block_size batch_size gradient_accumulation_steps optimizer '
    'learning_rate max_iters dropout seed'
).split()
SETTINGS = [
    *FOR_TITLE,
    *'init_from init_std sampler bias weight_decay beta1 beta2 grad_clip decay_lr lr_schedule'.split(),
    *'warmup_iters lr_decay_iters min_lr dtype eval_iters'.split(),
]


def read_run(folder):
    """What the metrics.jsonl of a folder tells: (row, curves).

    `row` is a dict of the settings and the results. `curves` has arrays (n, 3) of tokens, seconds of training
    and losses: 'train', the smoothed loss of each log line, and 'eval', the validation loss."""
    row = {'folder': folder}
    points = {'train': [], 'eval': []}
    speeds = []  # tokens per second
    best = (math.inf, 0)  # validation loss, iteration
    tokens = seconds = 0
    for text in Path(folder, 'metrics.jsonl').read_bytes().splitlines():
        line = {}
        with suppress(ValueError):  # torn by a kill, or not yet all there
            line = json.loads(text)
        kind = line.get('kind')
        if kind == 'run':  # the last one counts: a resumed run may have other settings
            row.update(line['settings'], parameters=f"{line['parameters'] / 1e6:.2f}M")
        if kind not in points:
            continue

        if kind == 'train':
            loss = line.get('smoothed_loss', line['loss'])  # earlier versions of train.py did not smooth
            speeds.append(line['tokens_per_second'])
        else:
            loss = line['val/loss']
            best = min(best, (loss, line['iter']))
        if speeds:  # that of the last log line serves for an evaluation too
            seconds += (line['tokens'] - tokens) / speeds[-1]
        tokens = line['tokens']
        points[kind].append((tokens, seconds, loss))

    row['best val loss'] = f"{best[0]:.4f} at {best[1]}" if points['eval'] else 'none'
    row['tokens'] = f"{tokens:,}"
    row['time'] = str(timedelta(seconds=round(seconds)))
    row['tok/s'] = f"{np.median(speeds):,.0f}" if speeds else 'none'
    return row, {kind: np.reshape(found, (-1, 3)) for kind, found in points.items()}


def print_table(rows, names):
    """Prints a line for each run, with these entries of its row."""
    table = [names]
    for row in rows:
        table.append([str(row.get(name)) for name in names])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print(*map(str.rjust, line, widths), sep='  ')


def draw(runs, title, picture):
    """Writes the picture of what read_run has returned: losses against tokens, and against time."""
    figure = Figure((4.6, 4 + len(runs) / 5), dpi=200, layout='constrained')
    figure.suptitle(fill(title, 56), size=9)
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    longest = max(curve[:, 1].max(initial=0) for _, curves in runs for curve in curves.values())
    unit, unit_seconds = ('hours', 3600) if longest > 2 * 3600 else ('minutes', 60)
    late_losses = []
    for number, (row, curves) in enumerate(runs):
        label = f"{row['folder'][-32:]}: best {row['best val loss']}"
        for kind, style in (('train', '-'), ('eval', 'o')):
            tokens, seconds, losses = curves[kind].T
            how = dict(color=f'C{number}', markersize=4, label=label if kind == 'train' else None)
            by_tokens.plot(tokens, losses, style, **how)
            by_time.plot(seconds / unit_seconds, losses, style, **how)
            late_losses.extend(losses[tokens >= tokens.max(initial=0) / 10])

    # Losses fall so far in the first tenth of a curve that this would press the rest flat.
    if late_losses and np.isfinite(late_losses).all():
        by_tokens.set_ylim(min(late_losses) - 0.05, max(late_losses) + 0.05)
    by_tokens.set(xlabel='tokens', ylabel='loss (dots: validation, line: training, smoothed)')
    by_tokens.xaxis.set_major_formatter(EngFormatter(sep=''))
    by_time.set_xlabel(unit)
    figure.legend(handles=by_tokens.lines[::2], loc='outside lower left')

    # Whoever looks meanwhile sees the old picture or the new one.
    part = f'{picture}.{os.getpid()}.part'
    figure.savefig(part, format='png')
    os.replace(part, picture)


def main(arguments):
    """Prints the table and writes the picture of the runs that the command line names."""
    pictures = [argument for argument in arguments if argument.endswith('.png')]
    folders = [argument for argument in arguments if argument not in pictures]
    if not folders or folders[0].startswith('--'):
        sys.exit("name the folders of runs: python assets/plot.py OUT_DIR… [PICTURE.png]")
    default = Path(folders[0], 'loss.png') if len(folders) == 1 else 'runs.png'
    picture = pictures[0] if pictures else default

    runs = [read_run(folder) for folder in folders]
    rows = [row for row, _ in runs]
    differing = [key for key in SETTINGS if len({row.get(key) for row in rows}) > 1]
    print_table(rows, ['folder', *differing, 'best val loss', 'tokens', 'time', 'tok/s'])
    common = [key for key in FOR_TITLE if key in rows[0] and key not in differing]
    draw(runs, ', '.join(f"{key}={rows[0][key]}" for key in common), picture)
    print(f"the curves: {picture}")


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except OSError as error:
        sys.exit(f"{error.filename or 'stdout'}: {error.strerror}")
