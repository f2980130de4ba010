"""
Continue a text with a trained model, or with GPT-2. The text goes to stdout, everything else to stderr.

    python sample.py --out_dir=out-shakespeare-char --num_samples=3
    python sample.py --init_from=gpt2-xl --start="What is the answer to life, the universe, and everything?"
    echo "def main(" | python sample.py --start=- --temperature=0 --stream=True
"""

from __future__ import annotations  # the configurator reads annotations as text

import itertools
import math
import os
import sys
import time
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent

# -----------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir/ckpt.pt), gpt2 … gpt2-xl, or a folder that transformers saved
out_dir = 'out'  # where train.py put its checkpoint
start = "\n"  # the prompt; FILE:path reads a file, - reads stdin, empty: <|endoftext|>
num_samples = 10  # texts to write, as one batch where memory allows
max_new_tokens = 500  # length of each, in tokens
temperature = 0.8  # 1 as trained, below 1 safer, above 1 wilder, 0 always the likeliest token
top_k: int | None = 200  # sample from that many likeliest tokens; 0 or None for all
top_p: float | None = None  # sample from the fewest tokens whose probabilities reach this sum
stop: str | None = None  # a text that ends a sample and is not printed, such as "<|endoftext|>"
stream = False  # print as the text comes, one sample after the other
seed = 1337  # sample i depends on (seed, i) alone
device: str | None = None  # cpu, cuda, cuda:1, mps; None: what is there
dtype: Literal['float32', 'bfloat16', 'float16'] | None = None  # None: what the device is good at
compile = False  # torch.compile: half a minute at the start, for many tokens on a GPU
exec((ROOT / 'configurator.py').read_text(encoding='utf-8'))
# -----------------------------------------------------------------------------
# The configurator has left `config`, a dict of the keys, and refuses negative numbers. It prints a UserError
# as one line. The imports take seconds: --help and most mistakes are answered before.
import numpy as np
import torch

from model import GPT, choose_device, compile_method

for key in ('num_samples', 'max_new_tokens'):
    if config[key] == 0:
        sys.exit(f"{key} must be at least 1, not 0")
if top_p is not None and not 0 < top_p <= 1:
    sys.exit(f"top_p must be in (0, 1], not {top_p}")

# The model, its tokenizer and the prompt. Packed weights, which a CPU has in float16, cannot be compiled.
device, dtype = choose_device(device, dtype, sampling=not compile)
device_type = torch.device(device).type
model = GPT.from_checkpoint(out_dir) if init_from == 'resume' else GPT.from_pretrained(init_from)
tokenizer = model.tokenizer()
try:
    if start.startswith('FILE:'):
        start = Path(start.removeprefix('FILE:')).expanduser().read_text(encoding='utf-8')
    elif start == '-':
        start = sys.stdin.read() if sys.stdin else ''
except UnicodeDecodeError as error:
    sys.exit(f"--start={start}: the prompt is not UTF-8 ({error.reason}, byte {error.start})")
start = start.encode(errors='replace').decode()  # for bytes of the command line that are not UTF-8

# An empty prompt becomes bos: <|endoftext|>, or of characters the newline or, where there is none, the first
# one. So does the default prompt, a newline, where the tokens are characters.
text = '' if start == '\n' and tokenizer.kind == 'char' else start
prompt = tokenizer.encode(text) or [tokenizer.bos]

model.for_sampling(device, getattr(torch, dtype), pack=not compile)

# Attention on CUDA wants a cache whose length is a multiple of 64: else it pads its mask in every step.
c = model.config
length = 64 * math.ceil(min(c.block_size, len(prompt) + max_new_tokens) / 64)

# What a sample takes for a while beside its cache: 40 bytes for each token and channel, when a full window is
# read anew, and 20 for each token of the vocabulary, whose logits are sorted and made probabilities.
WINDOW_BYTES = 40
LOGITS_BYTES = 20


def rows_that_fit():
    """How many samples half of the memory has room for."""
    memory = 2**33  # assumed where the system does not tell
    if device_type == 'cuda':
        memory = torch.cuda.mem_get_info(device)[0]
    elif hasattr(os, 'sysconf'):
        memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    cache_bytes = sum(kv.nbytes for kv in model.new_cache(1, 1))  # for each token
    row_bytes = length * (cache_bytes + WINDOW_BYTES * c.n_embd) + LOGITS_BYTES * c.vocab_size
    return max(1, memory // 2 // row_bytes)


# If not all samples fit, they are drawn in several batches of one size.
batches = math.ceil(num_samples / rows_that_fit())
rows = math.ceil(num_samples / batches)
cache = model.new_cache(rows, length)


def new_tokens(first):
    """Yields the next token of each of the samples first … first + rows - 1, as a column (rows, 1)."""
    draws = [
        np.random.default_rng((seed, i)).random(max_new_tokens, dtype=np.float32)
        for i in range(first, first + rows)
    ]
    draws = torch.from_numpy(np.stack(draws)).to(device)  # (rows, max_new_tokens)
    idx = torch.tensor([prompt], device=device)  # (1, T)
    return model.stream(idx, max_new_tokens, temperature, top_k, top_p, draws, tokenizer.vocab_size, cache)


def new_ids(first):
    """Yields all new ids of these samples so far, a list for each sample, whenever there may be something to
    print. Between these moments nothing waits for the device."""
    columns = []
    for n, column in enumerate(new_tokens(first), 1):
        columns.append(column)
        may_stop = stop and n % 16 == 0
        if stream or may_stop or n in (1, max_new_tokens):
            columns = [torch.cat(columns, dim=1)]  # one column of shape (rows, n)
            yield columns[0].tolist()


def text_of(ids):
    """The text of a sample up to `stop`, and whether it has ended."""
    text = tokenizer.decode(ids)
    if stop and stop in text:
        return start + text.partition(stop)[0], True
    if len(ids) == max_new_tokens:
        return start + text, True

    # The next token may complete a character, or what is the beginning of `stop`.
    text = text.rstrip('\ufffd')
    if stop:
        text = text[: max(0, len(text) - len(stop) + 1)]
    return start + text, False


def compile_decode():
    """Compiles the step of sampling, or says why it stays eager."""
    for kv in cache:
        torch._dynamo.mark_static_address(kv)  # CUDA graphs need it
    five_tokens = itertools.islice(new_tokens(0), 5)
    problem = compile_method(
        model, 'decode', lambda: list(five_tokens), mode='reduce-overhead', fullgraph=True
    )
    if problem:
        print(problem, file=sys.stderr)


seconds = {'prefill': 0.0, 'decode': 0.0}
tokens = {'prefill': 0, 'decode': 0}


def print_samples(first):
    """Prints a batch of samples. Each is printed until it ends, and meanwhile those behind it grow too."""
    began = time.perf_counter()
    growing = new_ids(first)
    ids = next(growing)
    prefilled = time.perf_counter()

    samples = min(rows, num_samples - first)
    for row in range(samples):
        printed = 0
        while True:
            text, ended = text_of(ids[row])
            if stream or ended:
                print(text[printed:], end='', flush=True)
                printed = max(printed, len(text))
            if ended:
                break
            ids = next(growing)
        print('\n---------------\n', end='', flush=True)

    seconds['prefill'] += prefilled - began
    seconds['decode'] += time.perf_counter() - prefilled
    tokens['prefill'] += min(len(prompt), c.block_size)
    tokens['decode'] += samples * (len(ids[0]) - 1)


with torch.inference_mode():
    if compile:
        compile_decode()
    for first in range(0, num_samples, rows):
        print_samples(first)

speeds = [
    f"{name} {tokens[name]} tokens in {took:.2f} s, {tokens[name] / max(took, 1e-9):.0f} tok/s"
    for name, took in seconds.items()
]
print('; '.join([*speeds, f"{device}, {dtype}"]), file=sys.stderr)
