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

import matplotlib
import torch

matplotlib.use('agg')
import matplotlib.pyplot as plt  # noqa: E402

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
MUON = 'config/train_shakespeare_char_fast.py --learning_rate=8e-3 --max_iters={0} --lr_decay_iters={0}'
RUNS = {  # name in the legend: whose code, arguments
    'nanoGPT': ('nanoGPT', ADAMW.format(2000)),
    'ours, AdamW': ('ours', ADAMW.format(2000)),
    'ours, Muon, 666 iterations': ('ours', MUON.format(666)),
    'ours, Muon, 2000 iterations': ('ours', MUON.format(2000)),
}
COLORS = {
    'nanoGPT': 'tab:red',
    'ours, AdamW': 'tab:blue',
    'ours, Muon, 666 iterations': 'tab:cyan',
    'ours, Muon, 2000 iterations': 'tab:green',
    'transformers': 'tab:orange',
    'ours': 'tab:blue',
}
LENGTHS = 8, 64, 128, 256, 512, 768, 1000


def train(nanogpt, name):
    """Runs one of RUNS, unless its results exist, and returns the lines of its metrics.jsonl."""
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
        if code == 'nanoGPT':  # nanoGPT has no metrics.jsonl, so its output becomes one
            steps = re.findall(r'^step (\d+): .*val loss ([\d.]+)', done.stdout, re.M)
            lines = [{'iter': int(i), 'tokens': int(i) * 768, 'val/loss': float(loss)} for i, loss in steps]
            times = re.findall(r'^iter (\d+): .*time ([\d.]+)ms', done.stdout, re.M)
            for i, (_, ms) in enumerate(times[:-1]):  # the last one is nanoGPT's step beyond max_iters
                # nanoGPT's time of every 100th iteration includes an evaluation: take the next iteration's
                ms = times[i + 1][1] if i % 100 == 0 else ms
                lines.append({'iter': i, 'tokens': i * 768, 'ms': float(ms)})
            folder.mkdir(exist_ok=True)
            (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


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

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout='constrained')
    for name in RUNS:
        lines = train(theirs, name)
        clock = {0: 0.0}  # seconds of training before each iteration
        for line in lines:
            if 'ms' in line:
                clock[line['iter'] + 1] = clock[line['iter']] + line['ms'] / 1000
        evaluations = [line for line in lines if 'val/loss' in line]
        tokens = [line['tokens'] / 1e6 for line in evaluations]
        seconds = [clock[line['iter']] for line in evaluations]
        losses = [line['val/loss'] for line in evaluations]
        print(
            f"{name}: {losses[-1]:.3f} after {seconds[-1]:.0f} s and {tokens[-1]:.2f}M tokens; "
            f"lowest {min(losses):.3f}"
        )
        for panel, x in zip(panels, (tokens, seconds), strict=True):
            panel.plot(x, losses, label=name, color=COLORS[name])
    panels[0].set(
        xlabel='million tokens (characters)', ylabel='validation loss, nats a character', ylim=(1.5, 3)
    )
    panels[1].set(xlabel='seconds of training')
    panels[0].legend(frameon=False)
    finish(figure, 'loss.png')

    figure, panel = plt.subplots(figsize=(6, 3.8), layout='constrained')
    for code, times in time_sampling(theirs).items():
        print(
            f"{code}: "
            + ', '.join(f"{ms:.0f} ms behind {length}" for length, ms in zip(LENGTHS, times, strict=True))
        )
        panel.plot(LENGTHS, times, marker='o', label=code, color=COLORS[code])
    panel.set(xlabel='tokens before it', ylabel='ms for one more token', yscale='log')
    panel.legend(frameon=False)
    finish(figure, 'sampling.png')


def finish(figure, name):
    for panel in figure.axes:
        panel.grid(alpha=0.3)
        panel.spines[['top', 'right']].set_visible(False)
    figure.savefig(ROOT / 'assets' / name, dpi=120)


if __name__ == '__main__':
    main(Path(sys.argv[1]))
