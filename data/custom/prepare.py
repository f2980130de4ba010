"""
Your own text as a data set: writes train.bin, val.bin and the tokenizer into
data/NAME, for --dataset=NAME. Both also take a whole path like /data/mytext.

    python data/custom/prepare.py --input=book.txt --name=mytext
    python data/custom/prepare.py --input="texts/**/*.md" --tokenizer=bpe
    python data/custom/prepare.py --input=faq.jsonl \\
        --template="Question: {question}\\nAnswer: {answer}"
"""

from __future__ import annotations  # the configurator reads annotations as text

import codecs
import itertools
import math
import os
import shlex
import shutil
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

input = ''  # a file, a folder or a glob: texts, or rows in .jsonl, .json, .csv or .parquet; .gz, .zst too
name = 'custom'  # folder below data/ to write to, or a whole path
tokenizer = 'char'  # char, gpt2, bpe (trained on this text), or the path of a data set or model that has one
vocab_size = 4096  # of bpe, at most 65536; a small text yields fewer
val: float | str = 0.1  # share of the text for validation, or the path of another text for it
template = ''  # how a row makes a document, like "Question: {question}\nAnswer: {answer}"; {text} by default
encoding = ''  # of texts that are neither UTF-8 nor marked UTF-16, such as gb18030 or cp1252
end_of_text = False  # whether <|endoftext|> in a text (not in a row) ends a document, instead of being text
num_workers = os.cpu_count() or 1  # threads that encode
exec((ROOT / 'configurator.py').read_text(encoding='utf-8'))
sys.path.insert(0, str(ROOT))
import numpy as np

from data.common import Documents, check_vocab_size, in_lists, trainable, write_documents
from data.tokenizer import (
    CONVERSATIONS,
    DOCUMENTS,
    EOT,
    Tokenizer,
    char_tokenizer,
    read_tokenizer_json,
    read_tokenizer_spec,
    train_bpe,
    unescape,
    user_errors,
)

# For a text of at least so many tokens: layers, channels, iterations, and minutes on two CPU cores. What was
# measured is in the readme.
SIZES = [
    (0, 3, 160, 200, 0.2),
    (150_000, 3, 160, 1000, 1),
    (700_000, 3, 160, 2200, 2),
    (5_000_000, 4, 192, 6000, 10),
    (20_000_000, 4, 256, 8000, 30),
]

folder = HERE.parent / name  # Path drops what stands before a whole path, so that one is itself
if not input:
    sys.exit("which text? --input=FILE, a folder or a glob")
is_name = name not in ('', '..') and Path(name).name == name
if not is_name and not Path(name).is_absolute():
    whole = shlex.quote(f'--name={os.path.abspath(name)}')
    sys.exit(f"name {name!r} is a path: give it as a whole, {whole}, or a name alone, for a folder of data/")
if name != 'custom' and (folder / 'prepare.py').exists():
    sys.exit(f"{folder} is a data set of its own: choose another --name")
if num_workers < 1:
    sys.exit(f"num_workers must be at least 1, not {num_workers}")
if tokenizer == 'bpe':
    check_vocab_size(vocab_size)
if type(val) is float and not 0 < val < 1:
    sys.exit(f"val must be a share between 0 and 1, or a path, not {val}")
try:
    codecs.lookup(encoding or 'utf-8')
except LookupError:
    sys.exit(f"--encoding={encoding}: Python knows no such encoding")


# -----------------------------------------------------------------------------
# Read once: how much there is, and which characters


def cut_points(documents, share):
    """Returns where the characters for validation begin in each document, which go on to its end."""
    lengths = documents.lengths
    if documents.template == DOCUMENTS and len(lengths) < 20:
        return np.array([int((1 - share) * length) for length in lengths])

    # Whole documents are taken by chance until they make up the share. One that is larger than all of it is
    # not taken; if all are larger, the smallest is. At least one document is left for training.
    wanted = share * lengths.sum()
    candidates = np.flatnonzero(lengths <= max(wanted, lengths[lengths > 0].min()))
    candidates = np.random.default_rng(1337).permutation(candidates)[: len(lengths) - 1]
    cuts = lengths.copy()
    taken = 0
    for i in candidates:
        if taken >= wanted:
            break
        cuts[i] = 0
        taken += lengths[i]
    return cuts


documents = Documents(input, unescape(template), encoding, end_of_text)
lengths = documents.lengths
is_plain = documents.template == DOCUMENTS  # without a template every token counts
if documents.template == CONVERSATIONS and not template:
    print("the rows have messages: they are conversations, in which the assistant's answers count")
if documents.ends and documents.kind != '.txt':
    print(f"{EOT} is in the rows {documents.ends:,} times, as text")
elif documents.ends and not end_of_text:
    print(f"{EOT} is in the text {documents.ends:,} times, as text: --end_of_text=True ends documents there")

# Document i is for training up to character train_stops[i]. The text for validation is all behind that, or of
# files of its own, and begins at character val_starts[i].
if type(val) is str:
    val_documents = Documents(val, documents.template, encoding, end_of_text)
    train_stops = lengths
    val_starts = np.zeros_like(val_documents.lengths)
else:
    val_documents = documents
    train_stops = val_starts = cut_points(documents, val)
train_size = train_stops.sum()


# -----------------------------------------------------------------------------
# The tokenizer


def given_tokenizer():
    """Returns the tokenizer of a tokenizer.json, or of the folder of a data set, checkpoint or export.

    ordinary=True: <|endoftext|> in a text is text, as always in training data."""
    path = Path(tokenizer)
    if path.suffix == '.pt' or any(path.glob('*.pt')):
        from model import GPT

        return Tokenizer(GPT.from_checkpoint(path).tokenizer().spec, ordinary=True)
    if path.is_file():
        with user_errors(f"cannot read {path}"):
            return Tokenizer(read_tokenizer_json(path), ordinary=True)
    spec = read_tokenizer_spec(path)
    if spec['kind'] != 'gpt2' or (path / 'train.bin').is_file():  # a train.bin alone has GPT-2's tokens
        return Tokenizer(spec, ordinary=True)
    sys.exit(
        f"tokenizer {tokenizer!r} is none of char, gpt2, bpe, nor a tokenizer.json, "
        "nor a folder with a data set, a checkpoint or an export"
    )


def check_characters(encoder):
    """Exits if there are characters that a given tokenizer does not know."""
    needed = alphabet if encoder.eot is not None else alphabet | between_documents
    unknown = needed - encoder.tokens
    if not unknown:
        return
    counts = Counter()
    for source in {documents, val_documents}:
        for parts in source:
            for text, _ in parts:
                counts.update(character for character in text or '' if character in unknown)
    names = [f'{character!r} ({count:,} times)' for character, count in counts.most_common(10)]
    if '\n' in unknown - counts.keys():
        names.append("the newline between documents")
    left = len(unknown) - len(names)
    more = f" and {left} more" if left > 0 else ''
    sys.exit(
        f"the tokenizer of {tokenizer} does not know {', '.join(names)}{more}: replace these characters, "
        "or make a tokenizer of this text, with --tokenizer=char or bpe"
    )


def sample(step):
    """Yields lists of texts of about 100,000 characters for training, one in `step`, spread over the text."""
    parts = documents.stream('sample', np.zeros_like(lengths), train_stops)
    for batch in itertools.islice(in_lists(parts), 0, None, step):
        yield [text for text, _ in batch if text]


alphabet = documents.alphabet | val_documents.alphabet
# A newline stands between documents where no <|endoftext|> ends them.
several = max(len(lengths), len(val_documents.lengths)) > 1
between_documents = {'\n'} if is_plain and several else set()

if tokenizer == 'char':
    characters = sorted(alphabet | between_documents)
    print(f"{lengths.sum():,} characters, {len(characters)} different: {''.join(characters)[:200]!r}")
    encoder = char_tokenizer(characters if is_plain else [*characters, EOT])
elif tokenizer == 'bpe':
    # At most 100 million characters, and of these no more than the trainer has memory for (trainable returns
    # inf if it has enough, and then the second step is 0).
    step = 1 + train_size // 100_000_000
    step = max(step, math.ceil(train_size / trainable(sample(step))))
    if step > 1:
        print(f"the tokenizer is trained on one in {step} pieces of 100,000 characters")
    encoder = train_bpe(sample(step), vocab_size)
elif tokenizer == 'gpt2':
    encoder = Tokenizer({'kind': 'gpt2'}, ordinary=True)
else:
    encoder = given_tokenizer()
    if encoder.kind == 'char' and not encoder.has_words:  # of words, any character may be known or not
        check_characters(encoder)
    if encoder.eot is None and not is_plain:
        sys.exit(
            f"the tokenizer of {tokenizer} has no {EOT} or other end, in which a document of a template ends"
        )

    # A tokenizer.json may lose capitals, spaces, or what it does not know, or put a space before what it
    # encodes, which would then stand in the middle of the text.
    beginning = ''.join(text for text, _ in next(iter(documents)) if text)
    middle = len(beginning) // 2
    if encoder.kind == 'bpe':
        ids = encoder.encode(beginning[:middle]) + encoder.encode(beginning[middle:])
        if encoder.decode(ids) != beginning:
            sys.exit(
                f"the tokenizer of {tokenizer} does not give a text back: {beginning[:40]!r} comes back as "
                f"{encoder.decode(ids)[:40]!r}; --tokenizer=bpe makes one that does"
            )

# -----------------------------------------------------------------------------
# The bins. An older data set stays as it is until everything that can fail has succeeded.

folder.mkdir(parents=True, exist_ok=True)
write_documents(
    folder,
    encoder,
    num_workers,
    train=documents.stream('train', np.zeros_like(lengths), train_stops),
    val=val_documents.stream('val', val_starts, val_documents.lengths),
    files={} if is_plain else {'template.txt': documents.template.encode()},
)
tokens = (folder / 'train.bin').stat().st_size // 2
print(
    f"{len(lengths):,} documents, {tokens / train_size:.3f} tokens a character, "
    f"vocabulary {encoder.vocab_size:,}"
)

# The first list of parts is a document, or the beginning of one.
print("a document:\n" if is_plain else "a document, with brackets around what counts:\n")
for counts, parts in itertools.groupby(next(iter(documents)), key=lambda part: part[1]):
    end = '' if encoder.eot is None else encoder.eot_text
    text = ''.join(end if text is None else text for text, _ in parts)
    if len(text) > 200:
        text = f'{text[:120]} … {text[-60:]}'
    print(f'[{text}]' if counts and not is_plain else text, end='')

# -----------------------------------------------------------------------------
# What to do next

out_dir = f'out-{folder.name}'
keys = [f'--dataset={name}', f'--out_dir={out_dir}']
block_size = 128  # of the config
# --tokenizer may name a model, which is then trained further.
has_weights = any(Path(tokenizer).glob('*.pt')) or Path(tokenizer, 'config.json').exists()
is_model = tokenizer.endswith('.pt') or has_weights
if is_model and tokenizer not in ('char', 'gpt2', 'bpe'):
    keys = ['config/train_python_char.py', f'--init_from={tokenizer}', *keys]
elif encoder.kind == 'gpt2':
    keys = ['config/finetune_shakespeare.py', '--init_from=gpt2', *keys]
    block_size = 1024
elif shutil.which('nvidia-smi'):  # a new model, on a GPU
    keys = ['config/train_shakespeare_char.py', *keys]
    block_size = 256
else:  # or on a CPU
    _, n_layer, n_embd, iterations, minutes = [size for size in SIZES if size[0] <= tokens][-1]
    keys = ['config/train_python_char.py', *keys, f'--n_layer={n_layer}', f'--n_embd={n_embd}']
    keys += [f'--max_iters={iterations}', f'--lr_decay_iters={iterations}']
    print(f"\n\nabout {minutes} min on two CPU cores:", end='')
# A sequence and its last target must fit into either split.
fits = min(tokens, (folder / 'val.bin').stat().st_size // 2) - 1
if fits < block_size:
    keys.append(f'--block_size={fits}')
talk = [] if is_plain else ['--chat=True']


def command_for(script, *arguments):
    """Returns the command that runs a script of the project, which is named as the user has named it here."""
    path = os.path.join(os.path.dirname(sys.argv[0]), '..', '..', script)
    return shlex.join(['python', os.path.normpath(path), *arguments])


print(f"\n\ntrain on it: {command_for('train.py', *keys)}")
print(f"then:        {command_for('sample.py', f'--out_dir={out_dir}', *talk)}")
