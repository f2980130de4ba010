"""
Chinese Wikipedia with a byte-level BPE trained on it: writes train.bin,
val.bin and tokenizer.json beside this file.

    python data/wiki_zh/prepare.py --input=wiki_zh

中文维基百科（wiki_zh_2019），分词器在其上训练。
"""

import glob
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

input = ''  # folder of files AA/wiki_00 …, JSON lines with title and text; else wiki_zh beside this script
vocab_size = 16384  # of the tokenizer, at most 65536
num_workers = os.cpu_count() or 1  # threads that encode
exec((ROOT / 'configurator.py').read_text(encoding='utf-8'))
sys.path.insert(0, str(ROOT))
from data.common import check_vocab_size, load_rows, split_documents, text_parts, write_documents
from data.tokenizer import train_bpe

folder = input or str(HERE / 'wiki_zh')
paths = sorted(glob.glob(f'{glob.escape(folder)}/*/wiki_*'))
if not paths:
    sys.exit(
        f"no {folder}/AA/wiki_00 …: unpack wiki2019zh.zip there, see {HERE / 'readme.md'}, "
        "or name its folder with --input"
    )
if num_workers < 1:
    sys.exit(f"num_workers must be at least 1, not {num_workers}")
check_vocab_size(vocab_size)
copy = TemporaryDirectory(dir=HERE)  # of the rows, until this script ends
documents = load_rows(paths, ['title', 'text'], copy.name)


def articles(part):
    """Yields the texts, each with its title on top, where wiki_zh_2019 has it already."""
    for row in part:
        title = row['title']
        text = row['text']
        yield text if text.startswith(title) else f'{title}\n\n{text}'


train, val = split_documents(documents, test_size=0.005)
# Chinese has no spaces, so whole clauses count as words and the trainer's memory grows with the text. About
# 50,000 articles are enough for it.
sample = train.select(range(0, len(train), len(train) // 50_000 + 1))
tokenizer = train_bpe(articles(sample), vocab_size)
write_documents(
    HERE,
    tokenizer,
    num_workers,
    train=text_parts('train', articles(train), len(train)),
    val=text_parts('val', articles(val), len(val)),
)
