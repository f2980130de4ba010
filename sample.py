"""
Continue a text with a trained model, or with GPT-2, or talk to a model that
was trained on answers. The text goes to stdout, everything else to stderr.

    python sample.py --out_dir=out-shakespeare-char --num_samples=3
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?"
    echo "def main(" | python sample.py --start=- --temperature=0 --stream=True
    python sample.py --out_dir=out-chat --chat=True
    python sample.py --out_dir=out-qa --start=FILE:asked.txt --each_line=True
"""

from __future__ import annotations  # the configurator reads annotations as text

import io
import itertools
import math
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent

# -----------------------------------------------------------------------------
# the model
init_from = 'resume'  # resume (out_dir/ckpt.pt), gpt2 … gpt2-xl, or a folder that transformers saved
out_dir = 'out'  # where train.py put its checkpoint

# what it is asked
start = "\n"  # the prompt; FILE:path is a file, - stdin, "ids:12 7 99" tokens, empty: <|endoftext|>
chat = False  # answer each line that is typed or piped
each_line = False  # answer each line of the prompt, in one line
template: str | None = None  # how a line is asked, such as "Q: {question}\nA: {answer}"; None: as in training

# what it writes
num_samples = 10  # texts to write, as one batch where memory allows
max_new_tokens = 500  # length of each, in tokens
temperature = 0.8  # 1 as trained, below 1 safer, above 1 wilder, 0 always the likeliest token
top_k: int | None = 200  # sample from that many likeliest tokens; 0 or None for all
top_p: float | None = None  # sample from the fewest tokens whose probabilities reach this sum
stop: str | None = None  # a text that ends a sample and is not printed, as the token <|endoftext|> does
ignore_eos = False  # go on behind <|endoftext|>, and print it
stream = False  # print as the text comes, one sample after the other
seed = 1337  # another seed, other texts; sample i depends on (seed, i) alone

# the machine (None: what is there)
device: str | None = None  # cpu, cuda, cuda:1, mps
dtype: Literal['float32', 'bfloat16', 'float16'] | None = None  # None: what the device is good at
compile = False  # torch.compile, for many tokens on a GPU: half a minute at the start
exec((ROOT / 'configurator.py').read_text(encoding='utf-8'))
# -----------------------------------------------------------------------------
# The configurator has left `config`, a dict of the keys, and `given_keys`, those that were given. It refuses
# negative numbers and prints a UserError as one line. The imports take seconds: --help and most mistakes are
# answered before.
sys.path.insert(0, str(ROOT))  # `python -P` does not look beside the script
# An import may swallow the exception that Ctrl-C raises, so meanwhile Ctrl-C ends the process without one.
raises_on_interrupt = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if raises_on_interrupt:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import numpy as np
import torch

from data.tokenizer import CONVERSATIONS, Tokenizer, UserError, template_prompt, unescape
from model import GPT, choose_device, compile_method, sample_next_token

if raises_on_interrupt:
    signal.signal(signal.SIGINT, signal.default_int_handler)

for key in ('num_samples', 'max_new_tokens'):
    if config[key] == 0:
        sys.exit(f"{key} must be at least 1, not 0")
if top_p is not None and not 0 < top_p <= 1:
    sys.exit(f"top_p must be in (0, 1], not {top_p}")
if each_line and 'start' not in given_keys:
    sys.exit("--each_line=True answers the lines of --start=FILE:path, or of --start=- for stdin")
if chat and each_line:
    sys.exit("--chat=True remembers what was said, --each_line=True does not: choose one")
if chat and 'start' in given_keys:
    sys.exit("--chat=True answers what is typed or piped: leave --start off, or take --each_line=True")
if (chat or each_line) and compile:
    sys.exit("--compile=True is for samples: leave it off with --chat or --each_line")


def read_ids():
    """Returns the ids of --start=ids:12 7 99. Exits where the tokenizer has no such ids."""
    words = start.removeprefix('ids:').replace(',', ' ').split()
    known = {str(i): i for i in range(tokenizer.vocab_size)}
    unknown = [word for word in words if word not in known]
    if unknown or not words:
        sys.exit(
            f"--start={start:.60}: {' '.join(unknown)[:40] or 'nothing'} is no id from 0 to "
            f"{tokenizer.vocab_size - 1}"
        )
    return [known[word] for word in words]


def read_start():
    """Returns the text that --start stands for."""
    if prompt_ids:
        return tokenizer.decode(prompt_ids)
    if start.startswith('FILE:'):
        text = Path(start.removeprefix('FILE:')).expanduser().read_text(encoding='utf-8')
    elif start == '-':
        if at_terminal:
            print("type the prompt, then Enter and Ctrl-D", file=sys.stderr)
        text = sys.stdin.read()
        if not each_line:
            text = text.removesuffix('\n')
    else:
        text = unescape(start)
    # Bytes of the command line that are not UTF-8 become question marks.
    return text.encode(errors='replace').decode()


# On a CPU, for_sampling keeps the weights packed, for which choose_device prefers float16. Packed weights
# cannot be compiled. Elsewhere `pack` changes nothing.
pack = not compile
device, dtype = choose_device(device, dtype, sampling=pack)
model = GPT.from_checkpoint(out_dir) if init_from == 'resume' else GPT.from_pretrained(init_from)
block_size = model.config.block_size
tokenizer = model.tokenizer()

sys.stdin = sys.stdin or open(os.devnull)  # the shell may have closed it
at_terminal = sys.stdin.isatty()
prompt_ids = read_ids() if start.startswith('ids:') else []
if prompt_ids and each_line:
    sys.exit(f"--start={start:.60}: ids are no lines to answer, leave --each_line off")
if 'problem' in tokenizer.spec:  # of the meta.pkl, which had an alphabet that cannot be used
    print(f"ids instead of a text: {tokenizer.spec['problem']}", file=sys.stderr)
try:
    prompt_text = '' if chat else read_start()
except UnicodeDecodeError as error:
    sys.exit(f"--start={start}: the prompt is not UTF-8 ({error.reason}, byte {error.start})")

# Lines are asked as the template says. It raises UserError where it cannot ask one.
template = unescape(template) if template else model.template
if chat or each_line:
    if not template:
        sys.exit(
            "this model was not trained on answers: say how it should be asked, as "
            "--template=\"Question: {question}\\nAnswer: {answer}\" does"
        )
    template_prompt(template, '')

# What ends a sample or an answer: a token, and a text.
end_token = None if ignore_eos else tokenizer.eot
stop = unescape(stop or '')

model.for_sampling(device, getattr(torch, dtype), pack)


def draws_of(samples):
    """Returns the random numbers in [0, 1) of these samples or answers, (samples, max_new_tokens)."""
    draws = [np.random.default_rng((seed, i)).random(max_new_tokens, dtype=np.float32) for i in samples]
    return torch.from_numpy(np.stack(draws)).to(device)


def text_of(before, ids_before, ids):
    """Returns (text, ended): the text of ids, which follow the text `before` and its ids, up to end_token or
    stop, and whether they have come to their end."""
    ended = len(ids) == max_new_tokens
    if end_token in ids:
        ids = ids[: ids.index(end_token)]
        ended = True

    # In many tokenizers the ids before decide whether a space stands between two texts, so all are decoded.
    # Usually the result begins with the text before. A tokenizer may change that one, for example to small
    # letters: then its own version is cut off.
    text = tokenizer.decode([*ids_before, *ids])
    if not text.startswith(before):
        before = tokenizer.decode(ids_before)
    text = text[len(before) :]

    if stop and stop in text:
        return text.partition(stop)[0], True
    if ended:
        return text, True

    # What the next token may change is not shown yet: U+FFFD may be half of a character, and some decoders
    # join " '" to the letters that come. The last characters may be the beginning of `stop`.
    text = text.rstrip('\ufffd').removesuffix(" '")
    if stop:
        text = text[: max(0, len(text) - len(stop) + 1)]
    return text, False


# -----------------------------------------------------------------------------
# Samples of one prompt

# What a sample takes for a while beside its cache: 40 bytes for each token and channel, when a full window is
# read anew, and 20 for each token of the vocabulary, whose logits are sorted and made probabilities.
WINDOW_BYTES = 40
LOGITS_BYTES = 20


def rows_that_fit(length):
    """Returns how many samples of `length` tokens half of the memory has room for."""
    memory = 2**33  # assumed where the system does not tell
    if device.startswith('cuda'):
        memory = torch.cuda.mem_get_info(device)[0]
    elif hasattr(os, 'sysconf'):
        memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    cache_bytes = sum(kv.nbytes for kv in model.new_cache(1, 1))  # for each token
    c = model.config
    row_bytes = length * (cache_bytes + WINDOW_BYTES * c.n_embd) + LOGITS_BYTES * c.vocab_size
    return max(1, memory // 2 // row_bytes)


def new_tokens(prompt, first, cache):
    """Returns an iterator over the new tokens of one batch, columns (rows, 1). The batch has as many samples
    as the cache has rows, and `first` is the number of the first one."""
    rows = cache[0].size(1)  # of (2, rows, n_head, length, head size)
    draws = draws_of(range(first, first + rows))
    idx = torch.tensor([prompt], device=device)  # (1, T)
    return model.stream(idx, max_new_tokens, temperature, top_k, top_p, draws, tokenizer.vocab_size, cache)


def compile_decode(prompt, cache):
    """Compiles the step of sampling, or says why it stays eager."""
    for kv in cache:
        torch._dynamo.mark_static_address(kv)  # CUDA graphs need it
    # compile_method compiles model.decode and calls the function once, to try it. If that fails, it restores
    # decode and returns the reason. The first few of the five tokens record the graph.
    five_tokens = itertools.islice(new_tokens(prompt, 0, cache), 5)
    problem = compile_method(
        model, 'decode', lambda: list(five_tokens), mode='reduce-overhead', fullgraph=True
    )
    if problem:
        print(problem, file=sys.stderr)


def growing_samples(prompt, first, cache):
    """Yields all new ids of these samples so far, a list for each sample, whenever there may be something to
    print. Between these moments nothing waits for the device."""
    may_end_early = stop or end_token is not None
    columns = []
    for n, column in enumerate(new_tokens(prompt, first, cache), 1):
        columns.append(column)
        # Reading the ids waits for the device. To see that all have ended, every 16th token is often enough.
        reads_now = stream or (may_end_early and n % 16 == 0)
        if reads_now or n in (1, max_new_tokens):  # 1 ends the prefill, which is timed
            columns = [torch.cat(columns, dim=1)]  # (rows, n), so that each is joined only once
            yield columns[0].tolist()


def print_samples():
    """Prints num_samples texts, drawn in as few batches of one size as memory allows, and their speed."""
    # An empty prompt becomes bos: <|endoftext|>, or where no token is that, a newline. The default prompt, a
    # newline, becomes bos too where it may not be among the tokens: characters, or ids.
    no_prompt = prompt_text == '\n' and tokenizer.kind in ('char', 'ids')
    ids_before = prompt_ids or tokenizer.encode('' if no_prompt else prompt_text)  # of the text, or none
    text_before = prompt_text if ids_before else ''
    prompt = ids_before or [tokenizer.bos]  # what the model reads, at least one token

    # Attention on CUDA wants a cache whose length is a multiple of 64: else it pads its mask in every step.
    length = 64 * math.ceil(min(block_size, len(prompt) + max_new_tokens) / 64)
    batches = math.ceil(num_samples / rows_that_fit(length))
    rows = math.ceil(num_samples / batches)
    cache = model.new_cache(rows, length)
    if compile:
        compile_decode(prompt, cache)

    seconds = {'prefill': 0.0, 'decode': 0.0}
    tokens = {'prefill': 0, 'decode': 0}
    for first in range(0, num_samples, rows):
        began = time.perf_counter()
        growing = growing_samples(prompt, first, cache)
        ids = next(growing)
        prefilled = time.perf_counter()

        # Each sample is printed until it ends, and meanwhile those behind it grow too.
        samples = min(rows, num_samples - first)
        for row in range(samples):
            printed = 0
            while True:  # after max_new_tokens every sample has ended
                text, ended = text_of(text_before, ids_before, ids[row])
                text = prompt_text + text
                if stream or ended:
                    print(text[printed:], end='', flush=True)
                    printed = max(printed, len(text))  # the text may lose a last character for a while
                if ended:
                    break
                ids = next(growing)
            print('\n---------------\n', end='', flush=True)

        seconds['prefill'] += prefilled - began
        seconds['decode'] += time.perf_counter() - prefilled
        tokens['prefill'] += min(len(prompt), block_size)
        tokens['decode'] += samples * (len(ids[0]) - 1)

    speeds = [
        f"{name} {tokens[name]} tokens in {took:.2f} s, {tokens[name] / max(took, 1e-9):.0f} tok/s"
        for name, took in seconds.items()
    ]
    print('; '.join([*speeds, f"{device}, {dtype}"]), file=sys.stderr)


# -----------------------------------------------------------------------------
# Answers, one by one. A conversation is a list of turns, each the token ids of a question and its answer.

if chat or each_line:
    plain_tokenizer = Tokenizer(tokenizer.spec, ordinary=True)  # for what people type
    cache = model.new_cache(1, block_size)
in_cache = []  # the ids whose keys and values stand in the cache


def ask(turns, line):
    """Adds a turn that begins with the question in `line`. Returns its text as the model reads it. Raises
    UserError for an unknown character."""
    question = template_prompt(template, line)
    if turns:
        question = f'\n{question}'  # as conversation_parts has it between turns
    ids = [int(i) for i in plain_tokenizer.encode(question)]  # it may return an array

    # If the last answer was cut short, its end is added now. Some tokenizers have no token for that.
    if turns and tokenizer.eot is not None and turns[-1][-1] != tokenizer.eot:
        turns[-1].append(tokenizer.eot)
    turns.append(ids)
    return question


def make_room(turns):
    """Once a conversation is longer than the window, its oldest turns go until half of the window is free.

    The last turn stays. If it is too long by itself, all but its last half window of tokens goes."""
    half = max(1, block_size // 2)
    if sum(map(len, turns)) <= block_size:
        return
    while len(turns) > 1 and sum(map(len, turns)) > half:
        del turns[0]
    if len(turns[0]) > block_size:
        turns[0] = turns[0][-half:]


def next_token(turns, draw):
    """Reads a conversation and adds the next token, which it returns. `draw` (1, 1) is its random number."""
    make_room(turns)
    ids = [i for turn in turns for i in turn]

    # The cache serves as far as it holds the same ids; the last one is always read, for its logits.
    known = 0
    while known < min(len(ids) - 1, len(in_cache)) and ids[known] == in_cache[known]:
        known += 1
    del in_cache[known:]  # before the cache changes, because Ctrl-C may come in between
    new = torch.tensor([ids[known:]], device=device)  # (1, T)
    pos = torch.arange(known, len(ids), device=device)  # (T,)
    logits = model.decode(new, pos, cache)[:, : tokenizer.vocab_size].float()  # (1, V)
    in_cache.extend(ids[known:])

    token = sample_next_token(logits, draw, temperature, top_k, top_p).item()
    turns[-1].append(token)
    return token


def print_answer(turns, line, i):
    """Prints the answer to line i while it grows, without the white space around it."""
    question = ask(turns, line)
    question_ids = [*turns[-1]]
    ids = []
    printed = 0
    for draw in draws_of([i]).view(-1, 1, 1):
        ids.append(next_token(turns, draw))
        text, ended = text_of(question, question_ids, ids)
        text = text.strip()
        if each_line:
            text = text.replace('\n', '\\n')
        print(text[printed:], end='', flush=True)
        printed = max(printed, len(text))
        if ended:
            return


def print_answers(lines):
    """Answers each line, in one conversation or as a document of its own. An empty line has no answer."""
    is_conversation = chat and template == CONVERSATIONS
    turns = []
    for i, line in enumerate(lines):
        if not is_conversation:
            turns = []
        try:
            if line.strip():
                print_answer(turns, line, i)
        except UserError as error:  # a character that the tokenizer does not know
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            if not (chat and at_terminal):
                raise
        print(flush=True)


def typed_line():
    """Returns a line that a person types, '' after Ctrl-C, None after Ctrl-D."""
    # input writes its sign to stdout, which is for answers alone if it is not the terminal.
    try:
        return input('> ' if sys.stdout.isatty() else '')
    except KeyboardInterrupt:
        return ''
    except EOFError:
        print(file=sys.stderr)
        return None


def chat_lines():
    """Returns an iterator over the lines of a person or a pipe."""
    sys.stdin.reconfigure(errors='replace')  # what is not UTF-8 is no reason to end a chat
    if not at_terminal:
        return sys.stdin
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  # with it input lets a person edit a line
    print("Ctrl-C ends an answer, Ctrl-D the chat", file=sys.stderr)
    return iter(typed_line, None)  # calls it until it returns None


with torch.inference_mode():
    if chat:
        print_answers(chat_lines())
    elif each_line:
        print_answers(io.StringIO(prompt_text))  # its lines
    else:
        print_samples()
