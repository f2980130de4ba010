"""
Continue a text with a trained model, or with GPT-2.

    python sample.py --out_dir=out-shakespeare-char --num_samples=3
    python sample.py --init_from=gpt2-xl --start="What is the answer to life, the universe, and everything?"
    python sample.py --start=FILE:prompt.txt --stream=True
    echo "def main(" | python sample.py --start=- --temperature=0

The text goes to stdout, everything else to stderr.
"""
from __future__ import annotations  # the configurator reads `int | None` as text

import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from model import GPT, GPT2_SIZES, Tokenizer, choose_device, compile_forward, read_checkpoint, read_tokenizer

ROOT = Path(__file__).resolve().parent

# -----------------------------------------------------------------------------
init_from = 'resume'         # resume (out_dir/ckpt.pt), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder that transformers saved
out_dir = 'out'              # where train.py put its checkpoint
start = "\n"                 # the prompt; FILE:path reads a file, - reads standard input, nothing starts at <|endoftext|>
num_samples = 10             # texts to draw, all in one batch
max_new_tokens = 500         # length of each, in tokens
temperature = 0.8            # 1 as trained, below 1 safer, above 1 wilder, 0 always the likeliest token
top_k: int | None = 200      # draw among that many likeliest tokens; 0 or None for all
top_p: float | None = None   # draw among the fewest tokens whose probabilities reach this sum
stop: str | None = None      # a text that ends a sample and is not printed, such as "<|endoftext|>"
stream = False               # print as the text comes, one sample after the other
seed = 1337                  # sample i depends on (seed, i) alone
device: str | None = None    # cpu, cuda, cuda:1, mps; None: what is there
dtype: str | None = None     # float32, bfloat16, float16; None: what the device is good at
compile = False              # torch.compile: slow to start
exec((ROOT / 'configurator.py').read_text(encoding='utf-8'))
# -----------------------------------------------------------------------------

for name in ('SIGINT', 'SIGPIPE'):  # Ctrl-C, or a reader such as head that has seen enough: leave without a traceback
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
sys.stdout.reconfigure(errors='replace')  # a console that lacks a character
for wrong, rule in ((num_samples < 1, 'num_samples must be at least 1'), (max_new_tokens < 1, 'max_new_tokens must be at least 1'),
                    (temperature < 0, 'temperature must not be negative'), ((top_k or 0) < 0, 'top_k must not be negative'),
                    (not 0 < (1 if top_p is None else top_p) <= 1, 'top_p must be in (0, 1]'), (seed < 0, 'seed must not be negative')):
    if wrong:
        key = rule.split()[0]
        sys.exit(f"{rule}, not {config[key]}")

# the model, its tokenizer and the prompt
try:
    device, dtype = choose_device(device, dtype)
    if init_from == 'resume':
        checkpoint = read_checkpoint(Path(out_dir) / 'ckpt.pt')
        model = GPT.from_checkpoint(checkpoint)
        # nanoGPT's checkpoints name their data set, ours hold the tokenizer itself
        folder = ROOT / 'data' / (checkpoint.get('config') or {}).get('dataset', 'NAME')
        spec = checkpoint.get('tokenizer') or read_tokenizer(folder)
    else:
        model = GPT.from_pretrained(init_from)
        folder = Path(init_from)
        spec = {'kind': 'gpt2'} if init_from in GPT2_SIZES else read_tokenizer(folder)
    tokenizer = Tokenizer(spec) if spec['kind'] != 'gpt2' or model.config.vocab_size >= 50257 else None
    if tokenizer is None or tokenizer.size > model.config.vocab_size:
        sys.exit(f"the model has {model.config.vocab_size} tokens, but which? Put the meta.pkl or tokenizer.json of its data set into {folder}")
    if start.startswith('FILE:'):
        start = Path(start.removeprefix('FILE:')).read_text(encoding='utf-8')
    elif start == '-':
        start = sys.stdin.read()
    prompt = tokenizer.encode(start) or [tokenizer.start]
except (ValueError, OSError) as error:
    sys.exit(f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error))

model.eval().to(device)
autocast = torch.autocast(torch.device(device).type, getattr(torch, dtype), enabled=dtype != 'float32')
if compile:
    trial = torch.tensor([prompt], device=device)
    with autocast:
        failed = compile_forward(model, lambda: model.generate(trial, 2), dynamic=True)
    if failed:
        print(failed, file=sys.stderr)


def cut(ids):
    """The text of one sample's new tokens, up to `stop`; and whether that came."""
    text, found, _ = tokenizer.decode(ids).partition(stop) if stop else (tokenizer.decode(ids), '', '')
    return text, bool(found)


started, drawn = time.perf_counter(), 0
for batch in ([i] for i in range(num_samples)) if stream else [range(num_samples)]:
    draws = np.stack([np.random.default_rng((seed, i)).random(max_new_tokens, dtype=np.float32) for i in batch])
    ids = torch.tensor([prompt] * len(batch), device=device)                         # (B, T)
    new, shown = [], 0
    if stream:
        print(start, end='', flush=True)
    with autocast:
        for column in model.stream(ids, max_new_tokens, temperature, top_k, top_p,
                                   torch.from_numpy(draws).to(device), tokenizer.size):
            new.append(column)
            drawn += len(batch)
            if not stream and not stop:
                continue                                                             # nothing to look at yet, so no wait for the device
            rows = [cut(row) for row in torch.cat(new, dim=1).tolist()]
            if stream:  # hold back half a character, and what may be the beginning of `stop`
                text, ended = rows[0]
                whole = len(text) if ended else max(shown, len(text.rstrip('\ufffd')) - (len(stop) - 1 if stop else 0))
                print(text[shown:whole], end='', flush=True)
                shown = whole
            if all(ended for _, ended in rows):
                break
    for row in torch.cat(new, dim=1).tolist():
        print(cut(row)[0][shown:] if stream else start + cut(row)[0])
        print('---------------', flush=True)
seconds = time.perf_counter() - started
print(f"{drawn} tokens in {seconds:.1f} s, {drawn / seconds:.1f} tok/s; {device}, {dtype}", file=sys.stderr)
