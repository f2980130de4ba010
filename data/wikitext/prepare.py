"""
WikiText (Merity et al. 2016, arXiv:1609.07843), articles of the English Wikipedia, to measure GPT-2 on: writes train.bin, val.bin
and words.json, the numbers of words, beside this file.

    python data/wikitext/prepare.py
    python data/wikitext/prepare.py --input=wikitext-2     # a folder with {train,valid,test}.txt, or wiki.test.raw and so on
"""
import json
import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import gpt2_bpe, whole, write_documents  # noqa: E402

corpus = 'wikitext-2-raw-v1'        # or wikitext-103-raw-v1; without -raw rare words are <unk>
split = 'test'                      # what val.bin holds: test, as papers report it, or valid
input = ''                          # instead of the download: a folder with the texts; without one to train on it takes the other of valid and test
num_workers = os.cpu_count() or 1   # threads that encode
exec((HERE.parents[1] / 'configurator.py').read_text(encoding='utf-8'))

if corpus not in ('wikitext-2-raw-v1', 'wikitext-2-v1', 'wikitext-103-raw-v1', 'wikitext-103-v1'):
    sys.exit(f"corpus {corpus!r} is none of wikitext-2-raw-v1, wikitext-2-v1, wikitext-103-raw-v1, wikitext-103-v1")
if split not in ('test', 'valid'):
    sys.exit(f"split {split!r} is neither test nor valid")
if num_workers < 1:
    sys.exit(f"num_workers must be at least 1, not {num_workers}")


def prose(text):
    """
    English as people write it, from WikiText's words with spaces between: GPT-2 never saw such spaces. Nothing but spaces and
    the @ around - , . inside numbers and words is taken away, so the probability is that of the same text.
    """
    text = re.sub(r' @([-,.])@ ', r'\1', text)                             # 1 @,@ 000, role @-@ playing
    text = re.sub(r'(?m)^ ((?:= )+)(.*?)((?: =)+) ?$', lambda m: m[1].replace(' ', '') + ' ' + m[2].strip() + ' ' + m[3].replace(' ', ''), text)  # headings
    text = re.sub(r'(?m)^ | $', '', text)
    text = re.sub(r'" (.*?) "', r'"\1"', text)                             # in pairs, within a line
    text = re.sub(r"(?<=[\w>]) (?='(?:s|d|t|m|ll|re|ve)\b)|(?<=s) (?=' )", '', text)  # Teddy 's, the actors '
    text = re.sub(r'([(\[{]) ', r'\1', text)
    text = re.sub(r'(?<=\d) – (?=\d)', '–', text.replace(' $ ', ' $'))
    return re.sub(r' (?=[)\]},.;:!?%](?:\W|$))', '', text)


def articles(lines):
    """The texts between the headings ` = Title = `, one string each."""
    text = ''
    for line in lines:
        if re.fullmatch(r' = [^=].* = \n', line) and text.strip():
            yield prose(text)
            text = ''
        text += line
    yield prose(text)


def lines_of(*names):
    """The lines, each with its end, of the first of these splits that is there."""
    if not input:
        return [line or ' \n' for line in documents[names[0].replace('valid', 'validation')]['text']]
    paths = [path for name in names for path in sorted(Path(input).glob('*')) if re.fullmatch(rf'(wiki\.)?{name}\.(txt|raw|tokens)', path.name)]
    if not paths:
        sys.exit(f"--input={input}: no {' or '.join(f'{name}.txt' for name in names)} in there, nor wiki.{names[0]}.raw or .tokens")
    try:
        with open(paths[0], encoding='utf-8') as f:
            return list(f)
    except UnicodeDecodeError as error:
        sys.exit(f"{paths[0]}: not UTF-8 ({error.reason}, byte {error.start})")


if not input:
    import datasets
    try:
        documents = datasets.load_dataset('Salesforce/wikitext', corpus)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        sys.exit(f"cannot download https://huggingface.co/datasets/Salesforce/wikitext, {corpus} ({type(error).__name__}): fetch its texts "
                 "where there is a network, then run this with --input=FOLDER")
encode, end = gpt2_bpe()
texts = {'train': lines_of('train', 'valid' if split == 'test' else 'test'), 'val': lines_of(split)}
words = {name: sum(len(line.split()) + 1 for line in lines) for name, lines in texts.items()}  # with the ends of lines, as Merity et al. count
if not all(words.values()):
    sys.exit(f"--input={input}: an empty text")
(HERE / 'words.json').unlink(missing_ok=True)
texts = {name: list(articles(lines)) for name, lines in texts.items()}
write_documents(HERE, encode, end, num_workers, **{name: (len(found), ([text] for text in found)) for name, found in texts.items()})
with whole(HERE / 'words.json') as f:
    f.write(json.dumps(words).encode())
print(f"words: {words['train']:,} in train.bin, {words['val']:,} in val.bin")

# wikitext-2: 2,088,628 words to train on, 217,646 to validate on and 245,569 to test on, as Merity et al. count them
