"""
Continue a text with a trained model, or with GPT-2.

    python sample.py --out_dir=out-shakespeare-char --num_samples=3
    python sample.py --init_from=gpt2-xl --start="What is the answer to life, the universe, and everything?"
    python sample.py --start=FILE:prompt.txt --stream=True
    echo "def main(" | python sample.py --start=- --temperature=0

The text goes to stdout, everything else to stderr.
"""
from __future__ import annotations  # the configurator reads `int | None` as text

import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from model import GPT, choose_device, compile_method

ROOT = Path(__file__).resolve().parent

# -----------------------------------------------------------------------------
init_from = 'resume'         # resume (out_dir/ckpt.pt), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder that transformers saved
out_dir = 'out'              # where train.py put its checkpoint
start = "\n"                 # the prompt; FILE:path reads a file, - reads standard input, nothing starts at <|endoftext|>
num_samples = 10             # texts to draw, as one batch where memory allows
max_new_tokens = 500         # length of each, in tokens
temperature = 0.8            # 1 as trained, below 1 safer, above 1 wilder, 0 always the likeliest token
top_k: int | None = 200      # draw among that many likeliest tokens; 0 or None for all
top_p: float | None = None   # draw among the fewest tokens whose probabilities reach this sum
stop: str | None = None      # a text that ends a sample and is not printed, such as "<|endoftext|>"
stream = False               # print as the text comes, one sample after the other
seed = 1337                  # sample i depends on (seed, i) alone
device: str | None = None    # cpu, cuda, cuda:1, mps; None: what is there
dtype: str | None = None     # float32, bfloat16, float16; None: what the device is good at
compile = False              # torch.compile: half a minute at the start, for many tokens on a GPU
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
    model = GPT.from_checkpoint(out_dir) if init_from == 'resume' else GPT.from_pretrained(init_from)
    tokenizer = model.tokenizer()
    if start.startswith('FILE:'):
        start = Path(start.removeprefix('FILE:')).read_text(encoding='utf-8')
    elif start == '-':
        start = sys.stdin.read()
    start = start.encode(errors='replace').decode()                                  # bytes of the command line that are no UTF-8
    prompt = tokenizer.encode(start) or [tokenizer.start]
except UnicodeDecodeError as error:
    sys.exit(f"--start={start}: the prompt is not UTF-8 ({error.reason}, byte {error.start})")
except (ValueError, OSError) as error:
    sys.exit(f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error))

kind = torch.device(device).type
model.for_sampling(device, getattr(torch, dtype), pack=not compile)
autocast = torch.autocast(kind, getattr(torch, dtype), enabled=dtype != 'float32')

# one batch if the caches of all samples fit into half the memory, else several of one size
c = model.config
length = min(c.block_size, len(prompt) + max_new_tokens)
if kind == 'cuda':
    memory = torch.cuda.mem_get_info(device)[0]
else:
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') if hasattr(os, 'sysconf') else 2 ** 33
per_row = 2 * c.n_layer * c.n_embd * length * (4 if dtype == 'float32' else 2) + 20 * c.vocab_size + 40 * c.n_embd * length  # cache, logits, a window's activations
fit = max(1, memory // 2 // per_row)
rows = math.ceil(num_samples / math.ceil(num_samples / fit))
with autocast:
    cache = model.new_cache(rows, length)
prompt_ids = torch.tensor([prompt], device=device)                                   # (1, T)


def tokens_of(first):
    """The new tokens of samples first, first + 1 … as the model's stream of columns (rows, 1)."""
    draws = np.stack([np.random.default_rng((seed, i)).random(max_new_tokens, dtype=np.float32) for i in range(first, first + rows)])
    return model.stream(prompt_ids, max_new_tokens, temperature, top_k, top_p, torch.from_numpy(draws).to(device),
                        tokenizer.size, cache, static=compile or kind == 'cuda')


def put(text):
    try:
        print(text, end='', flush=True)
    except OSError as error:
        print(f"cannot write the text: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(1)  # or Python would try once more to write what is left, and complain


def text_of(ids, last):
    """
    A sample's text up to `stop`, and whether that came. Before its last token it holds back what the next may change:
    half a character, and what may be the beginning of `stop`.
    """
    text = tokenizer.decode(ids)
    if stop and stop in text:
        return start + text.partition(stop)[0], True
    if not last:
        text = text.rstrip('\ufffd')
        if stop:
            text = text[:max(0, len(text) - len(stop) + 1)]
    return start + text, last


with autocast, torch.inference_mode():
    if compile:  # CUDA graphs need the same cache at the same address every time
        started = time.perf_counter()
        for kv in cache:
            torch._dynamo.mark_static_address(kv)
        failed = compile_method(model, 'decode', lambda: [*zip(range(5), tokens_of(0))], mode='reduce-overhead', fullgraph=True)
        if failed:
            model.for_sampling(device, getattr(torch, dtype))
        print(failed or f"compiled in {time.perf_counter() - started:.0f} s", file=sys.stderr)

    reading = writing = 0.0                                                          # seconds
    written = 0                                                                      # tokens
    for first in range(0, num_samples, rows):
        ids, unseen = [[] for _ in range(rows)], []
        row, printed = 0, 0                                                          # the sample being printed, its characters already out
        started = time.perf_counter()
        for n, column in enumerate(tokens_of(first), 1):
            unseen.append(column)
            last = n == max_new_tokens
            if n > 1 and not (stream or last or stop and n % 16 == 0):
                continue                                                             # nothing to look at yet: no wait for the device
            for known, new in zip(ids, torch.cat(unseen, dim=1).tolist()):
                known += new
            unseen.clear()
            if n == 1:
                reading += time.perf_counter() - started
                started = time.perf_counter()
            while first + row < num_samples and row < rows:
                text, done = text_of(ids[row], last)
                if stream or done:
                    put(text[printed:])
                    printed = max(printed, len(text))
                if not done:
                    break
                put('\n---------------\n')
                row, printed = row + 1, 0
            else:
                break
        writing += time.perf_counter() - started
        written += row * (n - 1)


def speed(what, tokens, seconds):
    return f"{what} {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tok/s" if seconds else f"{what} nothing"


batches = math.ceil(num_samples / rows)
print(f"{speed('prefill', min(len(prompt), c.block_size) * batches, reading)}; {speed('decode', written, writing)}; {device}, {dtype}", file=sys.stderr)
