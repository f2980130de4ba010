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
ROOT = HERE.parents[1]

corpus = '10k'  # 10k or full
files = ''  # or a glob of .parquet, .jsonl (field "text") or .txt; .gz, .zst … too
num_workers = os.cpu_count() or 1  # threads that encode
exec((ROOT / 'configurator.py').read_text(encoding='utf-8'))
sys.path.insert(0, str(ROOT))
from data.common import check_texts, in_batches, split_documents, unreadable, write_documents
from data.tokenizer import Tokenizer

if corpus not in ('10k', 'full'):
    sys.exit(f"corpus {corpus!r} is neither 10k nor full")
if num_workers < 1:
    sys.exit(f"num_workers must be at least 1, not {num_workers}")

import datasets
from pyarrow.dataset import ParquetFragmentScanOptions

KINDS = {'.parquet': 'parquet', '.jsonl': 'json', '.json': 'json', '.txt': 'text'}
OPTIONS = {
    'json': {},
    'text': {'sample_by': 'document'},
    # Parquet files are read piece by piece instead of whole.
    'parquet': {'fragment_scan_options': ParquetFragmentScanOptions(pre_buffer=False)},
}
FULL = 'hf://datasets/Skylion007/openwebtext@79d93d786212f7344586290adb811d4ae6a1762c/plain_text/*.parquet'
ROWS = 8_013_769  # of the full corpus: older copies on the hub hold a tenth of it and do not say so


def kind_of(path):
    """Returns the kind of a file in the words of datasets, or None. It is the same for x.jsonl.gz as for
    x.jsonl.
    """
    for suffix in reversed(Path(path.lower()).suffixes[-2:]):
        if suffix in KINDS:
            return KINDS[suffix]
    return None


tokenizer = Tokenizer({'kind': 'gpt2'}, ordinary=True)

if files:
    # --files may be the path of a file although it looks like a glob, such as "texts [1].jsonl".
    paths = sorted({path for path in [files, *glob.glob(files, recursive=True)] if os.path.isfile(path)})
    if not paths:
        sys.exit(f"--files={files}: no such files")
    kinds = {kind_of(path) for path in paths}
    kind = kinds.pop()
    if kind is None or kinds:
        sys.exit(f"--files={files}: the files must all be .parquet, all .jsonl or all .txt")

    request = {'path': kind, 'data_files': [glob.escape(path) for path in paths], **OPTIONS[kind]}
elif corpus == '10k':
    # The main branch holds a loading script, which datasets 4 and later refuse. The hub's own copy of it in
    # Parquet has none.
    request = {'path': 'stas/openwebtext-10k', 'revision': 'refs/convert/parquet'}
else:
    request = {'path': 'parquet', 'data_files': FULL, **OPTIONS['parquet']}

try:
    documents = datasets.load_dataset(**request, split='train')
    if files:
        check_texts(f"--files={files}", documents, 'text')
except Exception as error:  # an empty file raises StopIteration, a damaged .gz zlib.error, and so on
    if files:
        sys.exit(f"--files={files}: cannot be read as {kind}: {unreadable(paths, kind, error)}")
    if corpus == '10k':
        source = 'stas/openwebtext-10k'
        where = "plain_text/train/0000.parquet of its branch refs/convert/parquet"
    else:
        source = 'Skylion007/openwebtext'
        where = "the 80 files plain_text/*.parquet, revision 79d93d786212"
    sys.exit(
        f"cannot download https://huggingface.co/datasets/{source} ({type(error).__name__}): "
        f"fetch {where} where there is a network, then run this with --files=\"FOLDER/*.parquet\""
    )
if corpus == 'full' and not files and len(documents) != ROWS:
    sys.exit(
        f"OpenWebText came with {len(documents):,} documents instead of {ROWS:,}: "
        "delete it from the cache of datasets and fetch it again"
    )

# Of 10,000 documents, nanoGPT's 0.05 % would leave five for validation.
test_size = 0.005 if corpus == '10k' and not files else 0.0005
train, val = split_documents(documents, test_size)
write_documents(
    HERE,
    tokenizer,
    num_workers,
    train=(len(train), (rows['text'] for rows in in_batches(train))),
    val=(len(val), (rows['text'] for rows in in_batches(val))),
)

# corpus=full: train.bin and val.bin have 9,040,017,095 tokens together, as nanoGPT's. There they have
# 9,035,582,198 and 4,434,897; the split moves by some hundreds between versions of the shuffling libraries.
