"""
WikiText (Merity et al. 2016, arXiv:1609.07843), articles of the English
Wikipedia, to measure GPT-2 on: writes train.bin, val.bin and words.json, the
numbers of words, beside this file.

    python data/wikitext/prepare.py
    python data/wikitext/prepare.py --input=wikitext-2
"""

import json
import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

corpus = 'wikitext-2-raw-v1'  # or wikitext-103-raw-v1; without -raw rare words are <unk>
split = 'test'  # what val.bin holds: test, as papers report it, or valid
input = ''  # a folder with test.txt or wiki.test.raw …; without train.txt, train.bin holds the other split
num_workers = os.cpu_count() or 1  # threads that encode
exec((ROOT / 'configurator.py').read_text(encoding='utf-8'))
sys.path.insert(0, str(ROOT))
from data.common import text_parts, write_documents
from data.tokenizer import Tokenizer

CORPORA = 'wikitext-2-raw-v1', 'wikitext-2-v1', 'wikitext-103-raw-v1', 'wikitext-103-v1'
if corpus not in CORPORA:
    sys.exit(f"corpus {corpus!r} is none of {', '.join(CORPORA)}")
if split not in ('test', 'valid'):
    sys.exit(f"split {split!r} is neither test nor valid")
if num_workers < 1:
    sys.exit(f"num_workers must be at least 1, not {num_workers}")


def prose(text):
    """Turns WikiText, with spaces around its punctuation, into English as people write it, which GPT-2
    knows. Removes nothing but spaces and the @ around - , . in numbers and words, so the text stays the
    same.
    """
    text = re.sub(r' @([-,.])@ ', r'\1', text)  # 1 @,@ 000, role @-@ playing
    text = re.sub(
        r'(?m)^ ((?:= )+)(.*?)((?: =)+) ?$',  # headings
        lambda m: f"{m[1].replace(' ', '')} {m[2].strip()} {m[3].replace(' ', '')}",
        text,
    )
    text = re.sub(r'(?m)^ | $', '', text)
    text = re.sub(r'" (.*?) "', r'"\1"', text)  # in pairs, within a line
    text = re.sub(r"(?<=[\w>]) (?='(?:s|d|t|m|ll|re|ve)\b)|(?<=s) (?=' )", '', text)  # Teddy 's, the actors '
    text = re.sub(r'([(\[{]) ', r'\1', text)
    text = re.sub(r'(?<=\d) – (?=\d)', '–', text.replace(' $ ', ' $'))
    return re.sub(r' (?=[)\]},.;:!?%](?:\W|$))', '', text)


def articles(lines):
    """Yields the texts between the headings ` = Title = `."""
    text = ''
    for line in lines:
        if re.fullmatch(r' = [^=].* = \n', line) and text.strip():
            yield prose(text)
            text = ''
        text += line
    yield prose(text)


def lines_in_folder(*names):
    """Returns the lines of a file in --input: of the first of these splits that has one."""
    paths = [
        path
        for name in names
        for path in sorted(Path(input).glob('*'))
        if re.fullmatch(rf'(wiki\.)?{name}\.(txt|raw|tokens)', path.name)
    ]
    if not paths:
        sys.exit(
            f"--input={input}: no {' or '.join(f'{name}.txt' for name in names)} in there, "
            f"nor wiki.{names[0]}.raw or .tokens"
        )
    try:
        with open(paths[0], encoding='utf-8') as f:
            return list(f)
    except UnicodeDecodeError as error:
        sys.exit(f"{paths[0]}: not UTF-8 ({error.reason}, byte {error.start})")


def lines_of(documents):
    """Returns the lines of a split on the hub as WikiText's files have them: an empty one holds a space."""
    return [line or ' \n' for line in documents['text']]


def count_words(lines):
    """Counts as Merity et al. do, who take the end of a line for a word."""
    return sum(len(line.split()) + 1 for line in lines)


if input:
    train_lines = lines_in_folder('train', 'valid' if split == 'test' else 'test')
    val_lines = lines_in_folder(split)
else:
    import datasets

    try:
        splits = datasets.load_dataset('Salesforce/wikitext', corpus)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        sys.exit(
            f"cannot download https://huggingface.co/datasets/Salesforce/wikitext, {corpus} "
            f"({type(error).__name__}): fetch its texts where there is a network, then run this with "
            "--input=FOLDER"
        )
    train_lines = lines_of(splits['train'])
    val_lines = lines_of(splits['validation' if split == 'valid' else 'test'])

words = {'train': count_words(train_lines), 'val': count_words(val_lines)}
if 0 in words.values():
    sys.exit(f"--input={input}: an empty text")

tokenizer = Tokenizer({'kind': 'gpt2'}, ordinary=True)
train, val = list(articles(train_lines)), list(articles(val_lines))
write_documents(
    HERE,
    tokenizer,
    num_workers,
    train=text_parts('train', train, len(train)),
    val=text_parts('val', val, len(val)),
    files={'words.json': json.dumps(words).encode()},
)
print(f"words: {words['train']:,} in train.bin, {words['val']:,} in val.bin")

# wikitext-2: 2,088,628 words in train, 217,646 in valid, 245,569 in test, as Merity et al. count them
