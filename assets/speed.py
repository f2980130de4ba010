"""
The table of speed and memory in README.md: nanoGPT's train.py and ours, in turns, on the machine at hand.
    git clone https://github.com/karpathy/nanoGPT /tmp/nanoGPT
    python assets/speed.py /tmp/nanoGPT             # every group that suits this machine, three rounds
    python assets/speed.py /tmp/nanoGPT 4x1024 5    # one group, five rounds
Each row has medians over the rounds, of milliseconds an iteration, their ratio to the first row's, tokens a second and
mfu by nanoGPT's formula; and the highest peak memory, of the GPU or else of the process.
"""
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from model import GPT, GPTConfig, peak_flops_of

CUDA = torch.cuda.is_available()
CHARACTERS = '--dataset=characters --log_interval=1 --dropout=0.0 --gradient_accumulation_steps=1 --learning_rate=1e-3'
GPT2 = '--dataset=gpt2 --gradient_accumulation_steps=1 --log_interval=1'
GROUPS = {  # name: iterations, arguments of all rows, {row: more arguments}; the rows that begin with nanoGPT are its own
    'characters, 4 x 128, 12x64': (200, f'{CHARACTERS} --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12', {
        'nanoGPT': '', 'ours': '', 'ours, Muon': '--optimizer=muon'}),
    'characters, 6 x 384, 64x256': (100 if CUDA else 5, f'{CHARACTERS} --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=64', {
        'nanoGPT': '', 'ours': '', 'ours, Muon': '--optimizer=muon'}),
    'GPT-2 124M, 1x1024': (7, f'{GPT2} --batch_size=1', {'nanoGPT': '', 'ours': ''}),
    'GPT-2 124M, 4x1024': (4, f'{GPT2} --batch_size=4', {'nanoGPT': '', 'ours': '', 'ours, activation checkpointing': '--activation_checkpointing=True'}),
}
if CUDA:
    GROUPS['GPT-2 124M, 480x1024'] = (12, GPT2, {
        'nanoGPT, as shipped, 40 x 12': '--gradient_accumulation_steps=40 --batch_size=12', 'nanoGPT, 20 x 24': '--gradient_accumulation_steps=20 --batch_size=24',
        'nanoGPT, 10 x 48': '--gradient_accumulation_steps=10 --batch_size=48', 'nanoGPT, 5 x 96': '--gradient_accumulation_steps=5 --batch_size=96',
        'ours, faithful, 40 x 12': '--gradient_accumulation_steps=40 --batch_size=12', 'ours, 8 x 60': '--gradient_accumulation_steps=8 --batch_size=60',
        'ours, 4 x 120': '--gradient_accumulation_steps=4 --batch_size=120', 'ours, fast, 8 x 60': '--gradient_accumulation_steps=8 --batch_size=60 --optimizer=muon'})
LOSS_TITLE = 'the loss alone, 4096 tokens, 768 x 50304'
# a script that prints its times as train.py does
LOSS = '''
import sys, time, torch
from torch.nn import functional as F
from model import ChunkedCrossEntropy
device, dtype = ('cuda', torch.bfloat16) if torch.cuda.is_available() else ('cpu', torch.float32)
x, w, y = torch.randn(4096, 768, device=device, requires_grad=True), torch.randn(50304, 768, device=device).mul_(0.02).requires_grad_(), torch.randint(50257, (4096,), device=device)
loss = {'plain': lambda: F.cross_entropy(F.linear(x, w).float(), y), 'ours': lambda: ChunkedCrossEntropy.apply(x, w, y, dtype, True),
        'built-in': lambda: F.linear_cross_entropy(x, w, y, options=torch.nn.LinearCrossEntropyOptions())}[sys.argv[1]]
for i in range(6):
    started = time.perf_counter()
    x.grad, w.grad = None, None
    with torch.autocast(device, dtype, enabled=device == 'cuda'):
        value = loss()
    value.backward()
    value = value.item()
    print(f'iter {i}: loss {value:.4f}, time {(time.perf_counter() - started) * 1000:.2f}ms')
'''
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


def once(folder, words):
    """Median seconds of an iteration after the first quarter, which warms up, and peak bytes, of one run of a script in `folder`."""
    done = subprocess.run([sys.executable, '-c', RUNNER, *words], cwd=folder, text=True, capture_output=True)
    times = [float(ms) / 1000 for ms in re.findall(r'^iter \d+: loss [\d.]+, time ([\d.]+)ms', done.stdout, re.M)]
    if done.returncode:  # too little memory, for example
        print((done.stderr.strip().splitlines() or ['no reason given'])[-1][:150], file=sys.stderr)
        return None
    return statistics.median(times[max(1, len(times) // 4):]), int(done.stdout.split()[-1])


def work(words):
    """Tokens an iteration and FLOPs a token of a command line."""
    keys = {'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'block_size': 1024, **{key: int(value) for key, value in re.findall(r'--(\w+)=(\d+)(?!\S)', words)}}
    with torch.device('meta'):
        net = GPT(GPTConfig(keys['block_size'], 65 if 'characters' in words else 50304, keys['n_layer'], keys['n_head'], keys['n_embd'], bias=False))
    return keys['batch_size'] * keys['gradient_accumulation_steps'] * keys['block_size'], net.estimate_flops()


def in_turns(title, rounds, rows):
    """Prints a group as a table. rows: {name: (folder, words of the command, tokens an iteration, FLOPs a token or None)}"""
    runs = {name: [] for name in rows}
    for _ in range(int(rounds)):
        for name, (folder, words, _, _) in rows.items():
            runs[name].append(once(folder, words))
    print(f"\n| {title} | ms | ratio | tok/s | mfu | peak |\n|---|---|---|---|---|---|")
    first = next(iter(runs.values()))
    peak = peak_flops_of('cuda', 'bfloat16') if CUDA else None
    for name, (_, _, tokens, flops) in rows.items():
        if not all(runs[name]):
            print(f"| {name} | failed | | | | |")
            continue
        seconds, memory = statistics.median(time for time, _ in runs[name]), max(most for _, most in runs[name])
        ratio = f'{statistics.median(a / b for (a, _), (b, _) in zip(runs[name], first)):.3f}' if all(first) else ''
        mfu = f'{tokens / seconds * flops / peak:.1%}' if flops and peak else ''
        print(f"| {name} | {seconds * 1000:,.1f} | {ratio} | {tokens / seconds:,.0f} | {mfu} | {memory / 1e9:.2f} GB |", flush=True)


def main(nanogpt, only='', rounds=3):
    with tempfile.TemporaryDirectory() as temporary:
        folders = {'nanoGPT': Path(temporary) / 'nanoGPT', 'ours': Path(temporary) / 'ours'}
        for folder, source in zip(folders.values(), (Path(nanogpt), ROOT)):
            for dataset, vocab_size in (('characters', 65), ('gpt2', 50257)):
                (folder / 'data' / dataset).mkdir(parents=True)
                for split in ('train', 'val'):
                    np.random.default_rng(0).integers(vocab_size, size=2 ** 21, dtype='<u2').tofile(folder / 'data' / dataset / f'{split}.bin')
            (folder / 'data' / 'characters' / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 65}))
            for name in ('model.py', 'train.py', 'configurator.py'):
                shutil.copy(source / name, folder)
        print(f"{torch.cuda.get_device_name() if CUDA else f'CPU, {torch.get_num_threads()} threads'}, torch {torch.__version__}, {rounds} rounds in turns")
        for title, (iterations, shared, rows) in GROUPS.items():
            if only not in title:
                continue
            rows = {name: f"{shared} {more} --max_iters={iterations} --eval_iters=1 --eval_interval=1000000{'' if CUDA else ' --device=cpu --compile=False'}"
                    for name, more in rows.items()}
            rows = {name: words if name.startswith('nanoGPT') else words.replace('--dataset=gpt2', '--dataset=None') for name, words in rows.items()}  # saves nothing
            in_turns(title, rounds, {name: (folders['nanoGPT' if name.startswith('nanoGPT') else 'ours'], ['train.py', *words.split()], *work(words))
                                     for name, words in rows.items()})
        if only in LOSS_TITLE:
            (folders['ours'] / 'loss.py').write_text(LOSS)
            in_turns(LOSS_TITLE, rounds, {name: (folders['ours'], ['loss.py', name], 4096, None) for name in ('plain', 'ours', 'built-in')})


if __name__ == '__main__':
    main(*sys.argv[1:])
