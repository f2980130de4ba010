"""
Continue a text with a trained model, or with GPT-2. The text goes to stdout, everything else to stderr.

    python sample.py --out_dir=out-shakespeare-char --num_samples=3
    python sample.py --init_from=gpt2-xl --start="What is the answer to life, the universe, and everything?"
    echo "def main(" | python sample.py --start=- --temperature=0 --stream=True
"""

from __future__ import annotations  # the configurator reads annotations as text

import math
import os
import sys
import time
from pathlib import Path
from typing import Literal

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
config = {}  # the configurator fills it with all keys
exec((Path(__file__).resolve().parent / 'configurator.py').read_text(encoding='utf-8'))
# -----------------------------------------------------------------------------
# these imports take seconds: --help and most mistakes are answered before
import numpy as np
import torch

from model import GPT, choose_device, compile_method

for key, least in (('num_samples', 1), ('max_new_tokens', 1), ('temperature', 0), ('top_k', 0), ('seed', 0)):
    if (config[key] or 0) < least:
        sys.exit(f"{key} must be at least {least}, not {config[key]}")
if top_p is not None and not 0 < top_p <= 1:
    sys.exit(f"top_p must be in (0, 1], not {top_p}")


def excepthook(kind, error, trace):
    """One line where memory or the disk is full, and none where a reader such as head has read enough."""
    sys.stdout = None  # else Python would try to write the rest once more when it exits
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        print(f"out of memory on {device}: fewer --num_samples or --max_new_tokens", file=sys.stderr)
    elif isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        print(f"{error.filename or 'cannot write the text'}: {error.strerror}", file=sys.stderr)
    else:
        default_excepthook(kind, error, trace)


default_excepthook, sys.excepthook = sys.excepthook, excepthook

# the model, its tokenizer and the prompt
try:
    device, dtype = choose_device(device, dtype)
    model = GPT.from_checkpoint(out_dir) if init_from == 'resume' else GPT.from_pretrained(init_from)
    tokenizer = model.tokenizer()
    if start.startswith('FILE:'):
        start = Path(start.removeprefix('FILE:')).read_text(encoding='utf-8')
    elif start == '-':
        start = sys.stdin.read() if sys.stdin else ''
    start = start.encode(errors='replace').decode()  # for bytes of the command line that are not UTF-8
    prompt = tokenizer.encode(start if start != '\n' or tokenizer.kind != 'char' else '') or [tokenizer.bos]
except UnicodeDecodeError as error:
    sys.exit(f"--start={start}: the prompt is not UTF-8 ({error.reason}, byte {error.start})")
except (ValueError, ConnectionError) as error:
    sys.exit(str(error))

kind = torch.device(device).type
model.for_sampling(device, getattr(torch, dtype), pack=not compile)
autocast = torch.autocast(kind, getattr(torch, dtype), enabled=dtype != 'float32')

# one batch if the caches of all samples fit into half the memory, else several of one size
c, number_size = model.config, 4 if kind == 'cpu' or dtype == 'float32' else 2
length = 64 * math.ceil(min(c.block_size, len(prompt) + max_new_tokens) / 64)  # else CUDA pads every mask
memory = torch.cuda.mem_get_info(device)[0] if kind == 'cuda' else 2**33
if kind != 'cuda' and hasattr(os, 'sysconf'):
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
per_row = c.n_embd * length * (2 * c.n_layer * number_size + 40) + 20 * c.vocab_size  # cache, prompt, logits
rows = math.ceil(num_samples / math.ceil(num_samples / max(1, memory // 2 // per_row)))


def new_tokens(first):
    """The new tokens of samples first … first + rows - 1, as the model's stream of columns (rows, 1)."""
    draws = np.stack(
        [
            np.random.default_rng((seed, i)).random(max_new_tokens, dtype=np.float32)
            for i in range(first, first + rows)
        ]
    )
    idx, draws = torch.tensor([prompt], device=device), torch.from_numpy(draws).to(device)
    return model.stream(
        idx,
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        draws,
        tokenizer.vocab_size,
        cache,
        static=compile or kind == 'cuda',
    )


def text_of(ids, complete):
    """A sample's text up to `stop`, and whether it has ended."""
    text = tokenizer.decode(ids)
    if stop and stop in text:
        return start + text.partition(stop)[0], True
    if not complete:  # the next token may complete a character, or what is the beginning of `stop`
        text = text.rstrip('\ufffd')
        text = text[: max(0, len(text) - len(stop) + 1)] if stop else text
    return start + text, complete


seconds, tokens = {'prefill': 0.0, 'decode': 0.0}, {'prefill': 0, 'decode': 0}
with autocast:
    cache = model.new_cache(rows, length)
with autocast, torch.inference_mode():
    if compile:
        for kv in cache:
            torch._dynamo.mark_static_address(kv)  # CUDA graphs need it
        problem = compile_method(
            model,
            'decode',
            lambda: [*zip(range(5), new_tokens(0), strict=False)],
            mode='reduce-overhead',
            fullgraph=True,
        )
        if problem:
            print(problem, file=sys.stderr)
            model.for_sampling(device, getattr(torch, dtype))
    for first in range(0, num_samples, rows):
        ids, columns = [[] for _ in range(rows)], []
        row = printed = 0  # the sample that is being printed, and how many of its characters are
        began = time.perf_counter()
        for n, column in enumerate(new_tokens(first), 1):
            columns.append(column)
            complete = n == max_new_tokens
            if n > 1 and not (stream or complete or stop and n % 16 == 0):
                continue  # nothing to print yet, so no wait for the device
            for known, new in zip(ids, torch.cat(columns, dim=1).tolist(), strict=True):
                known += new
            columns.clear()
            if n == 1:
                prefilled = time.perf_counter()
            while row < min(rows, num_samples - first):
                text, ended = text_of(ids[row], complete)
                if stream or ended:
                    print(text[printed:], end='', flush=True)
                    printed = max(printed, len(text))
                if not ended:
                    break
                print('\n---------------\n', end='', flush=True)
                row, printed = row + 1, 0
            else:
                break  # all samples have ended
        seconds['prefill'] += prefilled - began
        seconds['decode'] += time.perf_counter() - prefilled
        tokens['prefill'] += min(len(prompt), c.block_size)
        tokens['decode'] += row * (n - 1)

speeds = [
    f"{name} {tokens[name]} tokens in {took:.2f} s, {tokens[name] / max(took, 1e-9):.0f} tok/s"
    for name, took in seconds.items()
]
print('; '.join([*speeds, f"{device}, {dtype}"]), file=sys.stderr)
