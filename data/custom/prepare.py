"""
Any plain text as a data set: writes train.bin, val.bin and the tokenizer into data/NAME, for --dataset=NAME.

    python data/custom/prepare.py --input=book.txt --name=mytext
    python data/custom/prepare.py --input="texts/**/*.txt" --tokenizer=bpe --vocab_size=8192 --name=mytext
"""

import glob
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

input = ''  # a text file in UTF-8, a folder of .txt files, or a glob
name = 'custom'  # folder below data/ to write to
tokenizer = 'char'  # char: one token per character; gpt2: GPT-2's; bpe: trained on this text
vocab_size = 4096  # of bpe, at most 65536; a small text yields fewer
num_workers = os.cpu_count() or 1  # threads that encode
exec((ROOT / 'configurator.py').read_text(encoding='utf-8'))
sys.path.insert(0, str(ROOT))
from data.common import check_vocab_size, write_characters, write_documents
from data.tokenizer import Tokenizer, train_bpe

folder = HERE.parent / name

# The input may be the path of a file although it looks like a glob, such as "notes [1].txt".
pattern = f'{glob.escape(input)}/**/*.txt' if os.path.isdir(input) else input
paths = sorted({path for path in [input, *glob.glob(pattern, recursive=True)] if os.path.isfile(path)})

if not input:
    sys.exit("which text? --input=FILE, a folder or a glob")
if not paths:
    sys.exit(f"--input={input}: no such text")
if tokenizer not in ('char', 'gpt2', 'bpe'):
    sys.exit(f"tokenizer {tokenizer!r} is none of char, gpt2, bpe")
if tokenizer == 'bpe':
    check_vocab_size(vocab_size)
if num_workers < 1:
    sys.exit(f"num_workers must be at least 1, not {num_workers}")
if name in ('', '..') or Path(name).name != name:
    sys.exit(f"name {name!r} must be the name of a folder, without a path")
if name != 'custom' and (folder / 'prepare.py').exists():
    sys.exit(f"data/{name} is a data set of its own: choose another --name")

texts = []
for path in paths:
    data = Path(path).read_bytes()
    try:
        texts.append(data.decode('utf-8-sig').replace('\r\n', '\n'))
    except UnicodeDecodeError as error:
        row = data[: error.start].count(b'\n') + 1
        sys.exit(
            f"{path}, row {row}: not UTF-8 ({error.reason}, byte {data[error.start]:#x}); "
            "iconv -f GB18030 -t UTF-8 converts Chinese text of old"
        )
texts = [text for text in texts if text]
if not texts:
    sys.exit(f"--input={input}: {len(paths)} empty files")

# The first nine tenths of all characters are for training, the rest for validation. `left` is how many of the
# nine tenths are still to come, so a text that is longer is cut in two there.
train, val = [], []
left = int(0.9 * sum(map(len, texts)))
for text in texts:
    if left > 0:
        train.append(text[:left])
    if left < len(text):
        val.append(text[max(left, 0) :])
    left -= len(text)

# An older data set stays as it is until everything that can fail has succeeded.
folder.mkdir(exist_ok=True)
if tokenizer == 'char':
    write_characters(folder, '\n'.join(train), '\n'.join(val))
else:
    if tokenizer == 'bpe':
        bpe = train_bpe(train, vocab_size)
    else:
        bpe = Tokenizer({'kind': 'gpt2'}, ordinary=True)
    write_documents(
        folder,
        bpe,
        num_workers,
        train=(len(train), [[text] for text in train]),
        val=(len(val), [[text] for text in val]),
    )
print(f"train on it with --dataset={name}")
