"""
The pictures of README.md, from runs of nanoGPT's code and ours on the machine at hand: eleven minutes on two cores of a CPU.
    git clone https://github.com/karpathy/nanoGPT /tmp/nanoGPT
    python data/shakespeare_char/prepare.py
    python assets/figures.py /tmp/nanoGPT
What the runs leave in out-figures/ is drawn again without running; delete the folder to measure anew.
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
# nanoGPT's run for a CPU, as README.md has it, with more evaluations of more batches than there
CPU = ('--device=cpu --compile=False --eval_interval=100 --eval_iters=100 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 '
       '--n_embd=128 --dropout=0.0 --always_save_checkpoint=False').split()
RUNS = {  # picture's legend: who runs it, with what
    'nanoGPT': ('nanoGPT', 'config/train_shakespeare_char.py --max_iters=2000 --lr_decay_iters=2000'),
    'ours, AdamW': ('ours', 'config/train_shakespeare_char.py --max_iters=2000 --lr_decay_iters=2000'),
    'ours, Muon, 666 iterations': ('ours', 'config/train_shakespeare_char_fast.py --learning_rate=8e-3 --max_iters=666 --lr_decay_iters=666'),
    'ours, Muon, 2000 iterations': ('ours', 'config/train_shakespeare_char_fast.py --learning_rate=8e-3 --max_iters=2000 --lr_decay_iters=2000'),
}
COLORS = dict(zip([*RUNS, 'transformers', 'ours'], ('tab:red', 'tab:blue', 'tab:cyan', 'tab:green', 'tab:orange', 'tab:blue')))
LENGTHS = 8, 64, 128, 256, 512, 768, 1000


def train(nanogpt, name):
    """Runs one of RUNS, unless it was, and returns the lines of its metrics.jsonl."""
    who, words = RUNS[name]
    folder = OUT / re.sub(r'\W+', '-', name)
    if not (folder / 'metrics.jsonl').is_file():
        print(f"{name}: {words}", flush=True)
        done = subprocess.run([sys.executable, 'train.py', *words.split(), *CPU, f'--out_dir={folder}'], cwd={'nanoGPT': nanogpt, 'ours': ROOT}[who],
                              capture_output=True, text=True, check=True)
        if who == 'nanoGPT':  # which prints only
            lines = [{'iter': int(i), 'tokens': int(i) * 768, 'val/loss': float(loss)} for i, loss in re.findall(r'^step (\d+): .*val loss ([\d.]+)', done.stdout, re.M)]
            # an iteration that evaluates counts that in, so it gets its neighbour's time
            times = re.findall(r'^iter (\d+): .*time ([\d.]+)ms', done.stdout, re.M)
            lines += [{'iter': int(i), 'tokens': int(i) * 768, 'ms': float(times[int(i) + 1][1] if int(i) % 100 == 0 else ms)} for i, ms in times[:-1]]
            folder.mkdir(exist_ok=True)
            (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


@torch.no_grad()
def time_sampling(nanogpt):
    """{who: milliseconds of one more token behind each of LENGTHS}, GPT-2 124M with random weights, float32, one sample; medians of three rounds in turn."""
    kept = OUT / 'sampling.json'
    if kept.is_file():
        return json.loads(kept.read_text())
    from transformers import GPT2Config, GPT2LMHeadModel
    spec = importlib.util.spec_from_file_location('nanogpt', nanogpt / 'model.py')
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    nano = theirs.GPT(theirs.GPTConfig(bias=False)).eval()
    hugging = GPT2LMHeadModel(GPT2Config(eos_token_id=None, bos_token_id=None)).eval()
    gpt = ours.GPT(ours.GPTConfig(bias=False)).for_sampling('cpu', torch.float32)

    def seconds(call):
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    def one_more(idx):  # the steps behind the first, which reads the prompt
        stream = gpt.stream(idx, 9)
        next(stream)
        return statistics.median(seconds(lambda: next(stream)) for _ in range(8))

    def hugging_more(idx):
        of = {n: seconds(lambda: hugging.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, do_sample=True, top_k=None)) for n in (1, 9)}
        return (of[9] - of[1]) / 8

    ways = {'nanoGPT': lambda idx: seconds(lambda: nano.generate(idx, 1)), 'transformers': hugging_more, 'ours': one_more}
    times = {who: [[] for _ in LENGTHS] for who in ways}
    for i, length in enumerate(LENGTHS):
        print(f"sampling behind {length} tokens", flush=True)
        idx = torch.randint(50257, (1, length))
        for _ in range(4):
            for who, way in ways.items():
                times[who][i].append(1000 * way(idx))
    times = {who: [statistics.median(rounds[1:]) for rounds in found] for who, found in times.items()}  # the first round warms up
    kept.write_text(json.dumps(times))
    return times


def main(nanogpt):
    OUT.mkdir(exist_ok=True)
    theirs = OUT / 'nanoGPT'
    if not theirs.exists():
        shutil.copytree(nanogpt, theirs, ignore=shutil.ignore_patterns('.git'))
        for name in ('train.bin', 'val.bin', 'meta.pkl'):
            shutil.copy(ROOT / 'data' / 'shakespeare_char' / name, theirs / 'data' / 'shakespeare_char' / name)

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout='constrained')
    for name in RUNS:
        lines = train(theirs, name)
        clock = {0: 0.0}  # seconds of training before each iteration
        for line in lines:
            if 'ms' in line:
                clock[line['iter'] + 1] = clock[line['iter']] + line['ms'] / 1000
        points = [(line['tokens'] / 1e6, clock[line['iter']], line['val/loss']) for line in lines if 'val/loss' in line]
        print(f"{name}: {points[-1][2]:.3f} after {points[-1][1]:.0f} s and {points[-1][0]:.2f}M tokens; lowest {min(loss for *_, loss in points):.3f}")
        for panel, x in zip(panels, (0, 1)):
            panel.plot([point[x] for point in points], [point[2] for point in points], label=name, color=COLORS[name])
    panels[0].set(xlabel='million tokens (characters)', ylabel='validation loss, nats a character', ylim=(1.5, 3))
    panels[1].set(xlabel='seconds of training')
    panels[0].legend(frameon=False)
    finish(figure, 'loss.png')

    figure, panel = plt.subplots(figsize=(6, 3.8), layout='constrained')
    for who, times in time_sampling(theirs).items():
        print(f"{who}: " + ', '.join(f"{ms:.0f} ms behind {length}" for length, ms in zip(LENGTHS, times)))
        panel.plot(LENGTHS, times, marker='o', label=who, color=COLORS[who])
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
