"""
OpenWebText, the open copy of GPT-2's training text, in GPT-2's byte-pair encoding: writes train.bin and
val.bin beside this file.

    python data/openwebtext/prepare.py                              # the first 10,000 documents
    python data/openwebtext/prepare.py --corpus=full                # all 8,013,769
    python data/openwebtext/prepare.py --files="texts/*.jsonl.gz"   # documents of your own
"""

import glob
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

corpus = '10k'  # 10k or full
files = ''  # or a glob of .parquet, .jsonl (field "text") or .txt; .gz, .zst … too
num_workers = os.cpu_count() or 1  # threads that encode
exec((HERE.parents[1] / 'configurator.py').read_text(encoding='utf-8'))
sys.path.insert(0, str(HERE.parents[1]))
from data.common import check_texts, excepthook, in_batches, split_documents, unreadable, write_documents
from data.tokenizer import Tokenizer

sys.excepthook = excepthook
if corpus not in ('10k', 'full'):
    sys.exit(f"corpus {corpus!r} is neither 10k nor full")
if num_workers < 1:
    sys.exit(f"num_workers must be at least 1, not {num_workers}")

import datasets
from pyarrow.dataset import ParquetFragmentScanOptions

KINDS = {'.parquet': 'parquet', '.jsonl': 'json', '.json': 'json', '.txt': 'text'}
OPTIONS = {
    'text': {'sample_by': 'document'},
    # read a Parquet file piece by piece instead of whole
    'parquet': {'fragment_scan_options': ParquetFragmentScanOptions(pre_buffer=False)},
}
FULL = 'hf://datasets/Skylion007/openwebtext@79d93d786212f7344586290adb811d4ae6a1762c/plain_text/*.parquet'
ROWS = 8_013_769  # of the full corpus: older copies on the hub hold a tenth of it and do not say so

tokenizer = Tokenizer({'kind': 'gpt2'}, ordinary=True)
paths = sorted({path for path in [files, *glob.glob(files, recursive=True)] if os.path.isfile(path)})
kind = 'parquet'
if files:
    if not paths:
        sys.exit(f"--files={files}: no such files")
    suffixes = [Path(path.lower()).suffixes[-2:] for path in paths]  # two, because of .jsonl.gz
    kinds = {next((KINDS[suffix] for suffix in reversed(pair) if suffix in KINDS), None) for pair in suffixes}
    kind = kinds.pop()
    if kinds or not kind:
        sys.exit(f"--files={files}: the files must all be .parquet, all .jsonl or all .txt")
try:
    if files:
        data_files = [glob.escape(path) for path in paths]
        documents = datasets.load_dataset(kind, data_files=data_files, split='train', **OPTIONS.get(kind, {}))
        check_texts(f"--files={files}", documents, 'text')
    elif corpus == '10k':
        # main holds a loading script, which datasets 4 and later refuse; the hub's own Parquet copy has none
        revision = 'refs/convert/parquet'
        documents = datasets.load_dataset('stas/openwebtext-10k', revision=revision, split='train')
    else:
        documents = datasets.load_dataset('parquet', data_files=FULL, split='train', **OPTIONS['parquet'])
except (OSError, ValueError, EOFError, StopIteration, datasets.exceptions.DatasetsError) as error:
    # StopIteration comes from an empty file
    if files:
        sys.exit(f"--files={files}: cannot be read as {kind}: {unreadable(paths, kind, error)}")
    source, where = {
        '10k': ('stas/openwebtext-10k', "plain_text/train/0000.parquet of its branch refs/convert/parquet"),
        'full': ('Skylion007/openwebtext', "the 80 files plain_text/*.parquet, revision 79d93d786212"),
    }[corpus]
    sys.exit(
        f"cannot download https://huggingface.co/datasets/{source} ({type(error).__name__}): "
        f"fetch {where} where there is a network, then run this with --files=\"FOLDER/*.parquet\""
    )
if corpus == 'full' and not files and len(documents) != ROWS:
    sys.exit(
        f"OpenWebText came with {len(documents):,} documents instead of {ROWS:,}: "
        "delete it from the cache of datasets and fetch it again"
    )

train, val = split_documents(documents, test_size=0.005 if corpus == '10k' and not files else 0.0005)
write_documents(
    HERE,
    tokenizer,
    num_workers,
    train=(len(train), (rows['text'] for rows in in_batches(train))),
    val=(len(val), (rows['text'] for rows in in_batches(val))),
)

# corpus=full: train.bin and val.bin have 9,040,017,095 tokens together, as nanoGPT's. There they have
# 9,035,582,198 and 4,434,897; the split moves by some hundreds between versions of the shuffling libraries.
