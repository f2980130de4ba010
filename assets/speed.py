"""
The table of speed and memory in README.md: runs nanoGPT's train.py and ours in turns on this machine.
    git clone https://github.com/karpathy/nanoGPT /tmp/nanoGPT
    python assets/speed.py /tmp/nanoGPT             # every group that suits this machine, three rounds
    python assets/speed.py /tmp/nanoGPT 4x1024 5    # the groups with 4x1024 in their title, five rounds
    python assets/speed.py /tmp/nanoGPT growth      # how cost grows with layers, context, rows, documents ...
A row shows medians over the rounds: milliseconds per iteration, their ratio to the first row, tokens per
second, and mfu by nanoGPT's formula. The memory is the highest peak of the GPU, or of the process on a CPU.
"""

import json
import os
import pickle
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from model import GPT, GPTConfig, has_bfloat16, peak_flops_of  # noqa: E402

CUDA = torch.cuda.is_available()
BATCH = 64 if CUDA else 16  # nanoGPT's for 6 x 384, and what a CPU has done within seconds
SCRIPTS = 'model.py', 'train.py', 'configurator.py'
OUR_SCRIPTS = *SCRIPTS, 'data/__init__.py', 'data/common.py', 'data/tokenizer.py'
CHARACTERS = (
    '--dataset=characters --log_interval=1 --dropout=0.0 --gradient_accumulation_steps=1 --learning_rate=1e-3'
)
GPT2 = '--dataset=gpt2 --gradient_accumulation_steps=1 --log_interval=1'


def micro_batches(number, size):
    return f'--gradient_accumulation_steps={number} --batch_size={size}'


# title: (iterations, arguments of all rows, {row: further arguments}).
# Rows whose name begins with nanoGPT run nanoGPT's code, the others ours.
GROUPS = {
    'characters, 4 x 128, 12x64': (
        200,
        f'{CHARACTERS} --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12',
        {'nanoGPT': '', 'ours': '', 'ours, float32': '--dtype=float32', 'ours, Muon': '--optimizer=muon'},
    ),
    f'characters, 6 x 384, {BATCH}x256': (
        100 if CUDA else 7,
        f'{CHARACTERS} --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size={BATCH}',
        {'nanoGPT': '', 'ours': '', 'ours, float32': '--dtype=float32', 'ours, Muon': '--optimizer=muon'},
    ),
    'GPT-2 124M, 1x1024': (
        7,
        f'{GPT2} --batch_size=1',
        {'nanoGPT': '', 'ours': '', 'ours, float32': '--dtype=float32'},
    ),
    'GPT-2 124M, 4x1024': (
        4,
        f'{GPT2} --batch_size=4',
        {'nanoGPT': '', 'ours': '', 'ours, activation checkpointing': '--activation_checkpointing=True'},
    ),
}
if CUDA:
    GROUPS['GPT-2 124M, 480x1024'] = (
        12,
        GPT2,
        {
            'nanoGPT, as shipped, 40 x 12': micro_batches(40, 12),
            'nanoGPT, 20 x 24': micro_batches(20, 24),
            'nanoGPT, 10 x 48': micro_batches(10, 48),
            'nanoGPT, 5 x 96': micro_batches(5, 96),
            'ours, faithful, 40 x 12': micro_batches(40, 12),
            'ours, 10 x 48': micro_batches(10, 48),
            'ours, 8 x 60': micro_batches(8, 60),
            'ours, fast, 8 x 60': f'{micro_batches(8, 60)} --optimizer=muon',
        },
    )
# How an iteration grows: a small network, and one key at a time
SMALL = '--n_layer=4 --n_head=4 --n_embd=256 --block_size=256 --batch_size=4'
for key, values in {
    'n_layer': (2, 4, 8),
    'n_embd': (128, 256, 512),
    'block_size': (128, 256, 512),
    'batch_size': (2, 4, 8),
}.items():
    rows = {}
    for value in values:
        rows[f'nanoGPT, {value}'] = rows[f'ours, {value}'] = f'--{key}={value}'
    GROUPS[f'growth with {key}'] = (12, f'{CHARACTERS} {SMALL}', rows)

LOSS_TITLE = 'the loss alone, 4096 tokens, 768 x 50304'
# A script that times one way to compute the loss, and prints its times in the format of train.py
LOSS_SCRIPT = '''
import sys, time, torch
from torch.nn import functional as F
from model import ChunkedCrossEntropy
device, dtype = ('cuda', torch.bfloat16) if torch.cuda.is_available() else ('cpu', torch.float32)
x = torch.randn(4096, 768, device=device, requires_grad=True)
w = torch.randn(50304, 768, device=device).mul_(0.02).requires_grad_()
y = torch.randint(50257, (4096,), device=device)
loss = {'plain': lambda: F.cross_entropy(F.linear(x, w).float(), y),
        'ours': lambda: ChunkedCrossEntropy.apply(x, w, y, True),
        'built-in': lambda: F.linear_cross_entropy(x, w, y, options=torch.nn.LinearCrossEntropyOptions()),
        }[sys.argv[1]]
for i in range(6):
    started = time.perf_counter()
    x.grad, w.grad = None, None
    with torch.autocast(device, dtype, enabled=device == 'cuda'):
        value = loss()
    value.backward()
    value = value.item()
    print(f'iter {i}: loss {value:.4f}, time {(time.perf_counter() - started) * 1000:.2f}ms')
'''
SAMPLING_TITLE = 'growth of sampling, a token of each row of GPT-2 124M'
# A script that samples behind a prompt of so many tokens, in so many rows. nanoGPT has no cache: for it, the
# first token behind the prompt is timed again and again.
SAMPLING_SCRIPT = '''
import sys, time, torch
from model import GPT, GPTConfig
length, rows = int(sys.argv[1]), int(sys.argv[2])
device = 'cuda' if torch.cuda.is_available() else 'cpu'
model = GPT(GPTConfig()).eval().to(device)
idx = torch.randint(50257, (rows, length), device=device)
if hasattr(model, 'stream'):
    tokens = model.for_sampling(device, torch.float16).stream(idx, 12, 0.8, 200)
for i in range(12 if hasattr(model, 'stream') else 4):
    started = time.perf_counter()
    token = next(tokens) if hasattr(model, 'stream') else model.generate(idx, 1, 0.8, 200)
    token.tolist()
    print(f'iter {i}: loss 0, time {(time.perf_counter() - started) * 1000:.2f}ms')
'''
DOCUMENTS_TITLE = 'growth of prepare.py, documents of 4,700 characters'
DOCUMENTS = 2500, 5000, 10000

# A script that runs another one and then prints the peak memory in bytes
RUNNER = '''
import runpy, sys, torch
sys.argv = sys.argv[1:]
sys.path.insert(0, '')
runpy.run_path(sys.argv[0], run_name='__main__')
try:
    import resource
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
except ImportError:
    rss = 0
print('peak memory', torch.cuda.max_memory_allocated() if torch.cuda.is_available() else rss)
'''


def run_once(folder, words):
    """Runs a script in `folder`. Returns the median seconds of an iteration and the peak memory in bytes.
    The first quarter of the iterations warms up and does not count. A prepare.py has none: for it these are
    the seconds of the whole command. Returns None if the run fails.
    """
    command = [sys.executable, '-c', RUNNER, *words]
    started = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as cache
    ):  # else nanoGPT's prepare.py would find what it has done before
        environment = {**os.environ, 'HF_DATASETS_CACHE': cache}
        done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
        seconds = time.perf_counter() - started
    if done.returncode:  # too little memory, for example
        print((done.stderr.strip().splitlines() or ['no reason given'])[-1][:150], file=sys.stderr)
        return None
    times = re.findall(r'^iter \d+: loss [\d.]+, time ([\d.]+)ms', done.stdout, re.M)
    times = [float(ms) / 1000 for ms in times]
    if not words[0].endswith('prepare.py'):
        seconds = statistics.median(times[max(1, len(times) // 4) :])
    return seconds, int(done.stdout.split()[-1])


def tokens_and_flops(words):
    """The tokens per iteration and the FLOPs per token of a command line."""
    given = {key: int(value) for key, value in re.findall(r'--(\w+)=(\d+)(?!\S)', words)}
    keys = {'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'block_size': 1024, **given}
    vocab_size = 65 if 'characters' in words else 50304
    with torch.device('meta'):
        model = GPT(
            GPTConfig(
                keys['block_size'], vocab_size, keys['n_layer'], keys['n_head'], keys['n_embd'], bias=False
            )
        )
    tokens = keys['batch_size'] * keys['gradient_accumulation_steps'] * keys['block_size']
    return tokens, model.estimate_mfu(1, keys['block_size'], 1)  # one sequence, at one token a second


def compare(title, rounds, rows):
    """Runs the rows of a group in turns and prints a table. rows: {name: (folder, words of the command,
    tokens per iteration, FLOPs per token or None)}
    """
    runs = {name: [] for name in rows}
    for _ in range(int(rounds)):
        for name, (folder, words, _, _) in rows.items():
            runs[name].append(run_once(folder, words))
    print(f"\n| {title} | ms | ratio | tok/s | mfu | peak |\n|---|---|---|---|---|---|")
    first = next(iter(runs.values()))
    peak = peak_flops_of('cuda', 'bfloat16') if CUDA else None
    for name, (_, _, tokens, flops) in rows.items():
        if not all(runs[name]):
            print(f"| {name} | failed | | | | |")
            continue
        seconds = statistics.median(time for time, _ in runs[name])
        memory = max(peak_bytes for _, peak_bytes in runs[name])
        ratio = mfu = ''
        if all(first):
            ratios = [a / b for (a, _), (b, _) in zip(runs[name], first, strict=True)]
            ratio = f'{statistics.median(ratios):.3f}'
        if flops and peak:
            mfu = f'{tokens / seconds * flops / peak:.1%}'
        print(
            f"| {name} | {seconds * 1000:,.1f} | {ratio} | {tokens / seconds:,.0f} | {mfu} "
            f"| {memory / 1e9:.2f} GB |",
            flush=True,
        )


def make_folder(folder, source, scripts):
    """Puts the scripts and two data sets of random tokens into a folder."""
    for dataset, vocab_size in (('characters', 65), ('gpt2', 50257)):
        data = folder / 'data' / dataset
        data.mkdir(parents=True)
        for split in ('train', 'val'):
            tokens = np.random.default_rng(0).integers(vocab_size, size=2**21, dtype='<u2')
            tokens.tofile(data / f'{split}.bin')
    (folder / 'data' / 'characters' / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 65}))
    for name in scripts:
        shutil.copy(source / name, folder / name)
    return folder


def prepare_commands(theirs, ours, nanogpt):
    """Writes documents into both folders. Returns the rows that encode them with GPT-2's BPE."""
    text, rng = ' '.join(topics.values()), random.Random(0)
    lines = []
    for _ in range(max(DOCUMENTS)):
        start = rng.randrange(len(text) - 4700)
        lines.append(json.dumps({'text': text[start : start + 4700]}) + '\n')

    # nanoGPT's script for OpenWebText reads a file here, with two workers; ours has a thread a core. The
    # pieces of a split, 1024, become as many as it has documents, or it would fail.
    source = (nanogpt / 'data' / 'openwebtext' / 'prepare.py').read_text()
    for old, new in (
        (
            'load_dataset("openwebtext", num_proc=num_proc_load_dataset)',
            'load_dataset("json", data_files=sys.argv[1])',
        ),
        ('import os', 'import os, sys'),
        ('num_proc = 8', 'num_proc = 2'),
        ('total_batches = 1024', 'total_batches = min(1024, len(dset))'),
    ):
        assert old in source, old
        source = source.replace(old, new, 1)
    (theirs / 'prepare.py').write_text(source)
    shutil.copytree(ROOT / 'data' / 'custom', ours / 'data' / 'custom')

    rows = {}
    for number in DOCUMENTS:
        name = f'{number}.jsonl'
        for folder in (theirs, ours):
            (folder / name).write_text(''.join(lines[:number]))
        tokens = number * 1000  # about
        options = [f'--input={name}', '--tokenizer=gpt2', '--val=0.0005', f'--name={ours}/documents']
        rows[f'nanoGPT, {number:,}'] = theirs, ['prepare.py', name], tokens, None
        rows[f'ours, {number:,}'] = ours, ['data/custom/prepare.py', *options], tokens, None
    return rows


def main(nanogpt, only='', rounds=3):
    isa = torch.backends.cpu.get_cpu_capability() + ', bfloat16 units' * has_bfloat16('cpu')
    device = torch.cuda.get_device_name() if CUDA else f'CPU ({isa}), {torch.get_num_threads()} threads'
    with tempfile.TemporaryDirectory() as temporary:
        theirs = make_folder(Path(temporary) / 'nanoGPT', Path(nanogpt), SCRIPTS)
        ours = make_folder(Path(temporary) / 'ours', ROOT, OUR_SCRIPTS)
        print(f"{device}, torch {torch.__version__}, {rounds} rounds in turns")
        for title, (iterations, shared, rows) in GROUPS.items():
            if only not in title:
                continue
            last = f"--max_iters={iterations} --eval_iters=1 --eval_interval=1000000"
            last += '' if CUDA else ' --device=cpu --compile=False'
            commands = {}
            for name, further in rows.items():
                folder, words = theirs, f'{shared} {further} {last}'
                if not name.startswith('nanoGPT'):  # ours saves nothing with dataset=None
                    folder, words = ours, words.replace('--dataset=gpt2', '--dataset=None')
                commands[name] = (folder, ['train.py', *words.split()], *tokens_and_flops(words))
            compare(title, rounds, commands)
        if only in SAMPLING_TITLE:
            rows = {}
            for length, number in ((8, 1), (250, 1), (1000, 1), (100, 1), (100, 4), (100, 16)):
                for folder, name in ((theirs, 'nanoGPT'), (ours, 'ours')):
                    (folder / 'sampling.py').write_text(SAMPLING_SCRIPT)
                    words = ['sampling.py', str(length), str(number)]
                    rows[f'{name}, {length} tokens, {number} rows'] = folder, words, number, None
            compare(SAMPLING_TITLE, rounds, rows)
        if only in DOCUMENTS_TITLE:
            compare(DOCUMENTS_TITLE, rounds, prepare_commands(theirs, ours, Path(nanogpt)))
        if only in LOSS_TITLE:
            (ours / 'loss.py').write_text(LOSS_SCRIPT)
            compare(
                LOSS_TITLE,
                rounds,
                {name: (ours, ['loss.py', name], 4096, None) for name in ('plain', 'ours', 'built-in')},
            )


if __name__ == '__main__':
    main(*sys.argv[1:])
