"""
Chinese Wikipedia with a byte-level BPE trained on it: writes train.bin, val.bin and tokenizer.json beside
this file.

    python data/wiki_zh/prepare.py --input=wiki_zh

中文维基百科（wiki_zh_2019），分词器在其上训练。
"""

import glob
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

input = str(HERE / 'wiki_zh')  # folder of files AA/wiki_00 …, JSON lines with the fields title and text
vocab_size = 16384  # of the tokenizer, at most 65536
num_workers = os.cpu_count() or 1  # threads that encode
exec((ROOT / 'configurator.py').read_text(encoding='utf-8'))
sys.path.insert(0, str(ROOT))
import datasets

from data.common import (
    check_texts,
    check_vocab_size,
    in_batches,
    split_documents,
    unreadable,
    write_documents,
)
from data.tokenizer import train_bpe

paths = sorted(glob.glob(f'{glob.escape(input)}/*/wiki_*'))
if not paths:
    sys.exit(
        f"no {input}/AA/wiki_00 …: unpack wiki2019zh.zip there, see {HERE / 'readme.md'}, "
        "or name its folder with --input"
    )
if num_workers < 1:
    sys.exit(f"num_workers must be at least 1, not {num_workers}")
check_vocab_size(vocab_size)
try:
    documents = datasets.load_dataset('json', data_files=[glob.escape(path) for path in paths], split='train')
    check_texts(input, documents, 'title', 'text')
except Exception as error:  # an empty file raises StopIteration, a damaged one whatever datasets meets
    sys.exit(f"{input}: {unreadable(paths, 'json', error)}")


def articles(part):
    """Yields lists of texts, each with its title on top, where wiki_zh_2019 has it already."""
    for rows in in_batches(part):
        yield [
            text if text.startswith(title) else f'{title}\n\n{text}'
            for title, text in zip(rows['title'], rows['text'], strict=True)
        ]


train, val = split_documents(documents, test_size=0.005)
# Chinese has no spaces, so whole clauses count as words and the trainer's memory grows with the text. About
# 50,000 articles are enough for it.
sample = train.select(range(0, len(train), len(train) // 50_000 + 1))
tokenizer = train_bpe(articles(sample), vocab_size)
write_documents(
    HERE, tokenizer, num_workers, train=(len(train), articles(train)), val=(len(val), articles(val))
)
