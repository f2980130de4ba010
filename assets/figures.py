"""
The pictures of README.md, from runs of nanoGPT's code and ours on this machine. The runs take five minutes
on two CPU cores.
    git clone https://github.com/karpathy/nanoGPT /tmp/nanoGPT
    python data/shakespeare_char/prepare.py
    python assets/figures.py /tmp/nanoGPT
The runs leave their results in out-figures/, and the next call draws these. Delete it to measure again.
"""

import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from plot import read_run

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import model as ours  # noqa: E402

OUT = ROOT / 'out-figures'
# nanoGPT's run for a CPU, as in README.md, but with more evaluations and more batches in each
CPU = (
    '--device=cpu --compile=False --eval_interval=100 --eval_iters=100 --log_interval=1 '
    '--always_save_checkpoint=False --batch_size=12 --block_size=64 '
    '--n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0'
).split()
ADAMW = 'config/train_shakespeare_char.py --max_iters={0} --lr_decay_iters={0}'
MUON = (
    'config/train_shakespeare_char_fast.py --learning_rate=1.2e-2 --warmup_iters=20 '
    '--max_iters={0} --lr_decay_iters={0}'
)
RUNS = {  # name in the legend: whose code, arguments
    'nanoGPT': ('nanoGPT', ADAMW.format(2000)),
    'ours, AdamW': ('ours', ADAMW.format(2000)),
    'ours, Muon, 500 iterations': ('ours', MUON.format(500)),
    'ours, Muon, 2000 iterations': ('ours', MUON.format(2000)),
}
COLORS = {
    'nanoGPT': 'tab:red',
    'ours, AdamW': 'tab:blue',
    'ours, Muon, 500 iterations': 'tab:cyan',
    'ours, Muon, 2000 iterations': 'tab:green',
    'transformers': 'tab:orange',
    'ours': 'tab:blue',
}
LENGTHS = 8, 64, 128, 256, 512, 768, 1000


def train(nanogpt, name):
    """Runs one of RUNS, unless its results exist. Returns points (tokens, seconds, validation loss)."""
    code, words = RUNS[name]
    folder = OUT / re.sub(r'\W+', '-', name)
    if not (folder / 'metrics.jsonl').is_file():
        print(f"{name}: {words}", flush=True)
        done = subprocess.run(
            [sys.executable, 'train.py', *words.split(), *CPU, f'--out_dir={folder}'],
            cwd={'nanoGPT': nanogpt, 'ours': ROOT}[code],
            capture_output=True,
            text=True,
            check=True,
        )
        if code == 'nanoGPT':
            folder.mkdir(exist_ok=True)
            (folder / 'metrics.jsonl').write_text(nanogpt_metrics(done.stdout))
    return read_run(folder)[1]['eval']


def nanogpt_metrics(output):
    """What nanoGPT has printed as the lines of a metrics.jsonl, which it does not write."""
    evaluations = re.findall(r'^step (\d+): train loss .*, val loss ([\d.]+)', output, re.M)
    iterations = re.findall(r'^iter (\d+): loss ([\d.]+), time ([\d.]+)ms', output, re.M)
    lines = [{'kind': 'eval', 'iter': int(i), 'val/loss': float(loss)} for i, loss in evaluations]
    for i, loss, ms in iterations[:-1]:  # the last one is nanoGPT's step beyond max_iters
        # The time of every 100th iteration includes an evaluation: take that of the next iteration.
        ms = float(iterations[int(i) + 1][2] if int(i) % 100 == 0 else ms)
        line = {'kind': 'train', 'iter': int(i), 'loss': float(loss), 'ms': ms}
        lines.append({**line, 'tokens_per_second': 768000 / ms})
    lines.sort(key=lambda line: line['iter'])  # an evaluation stays before the iteration of its number
    return ''.join(json.dumps({**line, 'tokens': line['iter'] * 768}) + '\n' for line in lines)


@torch.no_grad()
def time_sampling(nanogpt):
    """{code: milliseconds of one more token behind each of LENGTHS}, for one sample of GPT-2 124M with
    random weights: theirs in float32, their default, ours in this CPU's. Medians of three rounds in turns.
    """
    results = OUT / 'sampling.json'
    if results.is_file():
        return json.loads(results.read_text())
    from transformers import GPT2Config, GPT2LMHeadModel

    spec = importlib.util.spec_from_file_location('nanogpt', nanogpt / 'model.py')
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    nanogpt_model = theirs.GPT(theirs.GPTConfig(bias=False)).eval()
    hf_model = GPT2LMHeadModel(GPT2Config(eos_token_id=None, bos_token_id=None)).eval()
    dtype = getattr(torch, ours.choose_device('cpu', None, sampling=True)[1])
    our_model = ours.GPT(ours.GPTConfig(bias=False)).for_sampling('cpu', dtype)

    def seconds(call):
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    def time_nanogpt(idx):
        return seconds(lambda: nanogpt_model.generate(idx, 1))

    def time_transformers(idx):  # nine tokens less one: the first also reads the prompt
        def generate(n):
            hf_model.generate(
                idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, do_sample=True, top_k=None
            )

        one, nine = seconds(lambda: generate(1)), seconds(lambda: generate(9))
        return (nine - one) / 8

    def time_ours(idx):  # the eight steps behind the first, which also reads the prompt
        stream = our_model.stream(idx, 9)
        next(stream)
        return statistics.median(seconds(lambda: next(stream)) for _ in range(8))

    timers = {'nanoGPT': time_nanogpt, 'transformers': time_transformers, 'ours': time_ours}
    times = {code: [[] for _ in LENGTHS] for code in timers}
    for i, length in enumerate(LENGTHS):
        print(f"sampling behind {length} tokens", flush=True)
        idx = torch.randint(50257, (1, length))
        for _ in range(4):
            for code, timer in timers.items():
                times[code][i].append(1000 * timer(idx))
    # the first round warms up
    times = {code: [statistics.median(rounds[1:]) for rounds in found] for code, found in times.items()}
    results.write_text(json.dumps(times))
    return times


def main(nanogpt):
    OUT.mkdir(exist_ok=True)
    theirs = OUT / 'nanoGPT'
    if not theirs.exists():
        shutil.copytree(nanogpt, theirs, ignore=shutil.ignore_patterns('.git'))
        data = Path('data') / 'shakespeare_char'
        for name in ('train.bin', 'val.bin', 'meta.pkl'):
            shutil.copy(ROOT / data / name, theirs / data / name)

    figure = Figure((4.6, 4.3), layout='constrained')
    panels = figure.subplots(1, 2, sharey=True)
    for name in RUNS:
        tokens, seconds, losses = zip(*train(theirs, name), strict=True)
        print(
            f"{name}: {losses[-1]:.3f} after {seconds[-1]:.0f} s and {tokens[-1] / 1e6:.2f}M tokens; "
            f"lowest {min(losses):.3f}"
        )
        panels[0].plot([count / 1e6 for count in tokens], losses, label=name, color=COLORS[name])
        panels[1].plot(seconds, losses, color=COLORS[name])
    panels[0].set(xlabel='million characters', ylabel='validation loss', ylim=(1.5, 3))
    panels[1].set(xlabel='seconds of training')
    finish(figure, 'loss.png')

    figure = Figure((4.6, 4), layout='constrained')
    panel = figure.subplots()
    for code, times in time_sampling(theirs).items():
        print(
            f"{code}: "
            + ', '.join(f"{ms:.0f} ms behind {length}" for length, ms in zip(LENGTHS, times, strict=True))
        )
        panel.plot(LENGTHS, times, marker='o', label=code, color=COLORS[code])
    panel.set(xlabel='tokens before it', ylabel='ms for one more token', yscale='log')
    panel.set_yticks([10, 100, 1000], ['10', '100', '1000'])
    finish(figure, 'sampling.png')


def finish(figure, name):
    """Writes a picture whose words can be read where it is 400 pixels wide, on a phone."""
    for panel in figure.axes:
        panel.grid(alpha=0.3)
        panel.spines[['top', 'right']].set_visible(False)
    figure.legend(loc='outside lower left', frameon=False)
    figure.savefig(ROOT / 'assets' / name, dpi=200)


if __name__ == '__main__':
    main(Path(sys.argv[1]))
