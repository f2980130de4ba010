"""
OpenWebText, the open copy of GPT-2's training text, in GPT-2's byte-pair
encoding: writes train.bin and val.bin beside this file.

The first 10,000 documents:
    python data/openwebtext/prepare.py
All 8,013,769:
    python data/openwebtext/prepare.py --corpus=full
Files that were brought from a machine with a network:
    python data/openwebtext/prepare.py --files="owt/*.parquet"
"""

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

corpus = '10k'  # 10k or full
files = ''  # the corpus in files of your own: a glob of .parquet, or of .jsonl (field "text"; .gz too)
num_workers = os.cpu_count() or 1  # threads that encode
exec((ROOT / 'configurator.py').read_text(encoding='utf-8'))
sys.path.insert(0, str(ROOT))
from data.common import find_files, load_rows, split_documents, text_parts, write_documents
from data.tokenizer import Tokenizer

if corpus not in ('10k', 'full'):
    sys.exit(f"corpus {corpus!r} is neither 10k nor full")
if num_workers < 1:
    sys.exit(f"num_workers must be at least 1, not {num_workers}")

import datasets
from pyarrow.dataset import ParquetFragmentScanOptions

FULL = 'hf://datasets/Skylion007/openwebtext@79d93d786212f7344586290adb811d4ae6a1762c/plain_text/*.parquet'
ROWS = 8_013_769  # of the full corpus: older copies on the hub hold a tenth of it and do not say so

if corpus == '10k':
    # The main branch holds a loading script, which datasets 4 and later refuse. The hub's own copy of it in
    # Parquet has none.
    source = 'stas/openwebtext-10k'
    request = {'path': source, 'revision': 'refs/convert/parquet'}
    where = "plain_text/train/0000.parquet of its branch refs/convert/parquet"
else:
    # The files are read piece by piece instead of whole.
    source = 'Skylion007/openwebtext'
    options = ParquetFragmentScanOptions(pre_buffer=False)
    request = {'path': 'parquet', 'data_files': FULL, 'fragment_scan_options': options}
    where = "the 80 files plain_text/*.parquet, revision 79d93d786212"

tokenizer = Tokenizer({'kind': 'gpt2'}, ordinary=True)
copy = TemporaryDirectory(dir=HERE)  # of the rows in --files, until this script ends
if files:
    paths, kind = find_files(files)
    if kind not in ('.parquet', '.jsonl', '.json'):
        sys.exit(
            f"--files={files}: the files must all be .parquet or all .jsonl, as OpenWebText's are; "
            "data/custom/prepare.py takes other texts"
        )
    documents = load_rows(paths, ['text'], copy.name)
else:
    try:
        documents = datasets.load_dataset(**request, split='train')
    except Exception as error:  # of many kinds
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
    train=text_parts('train', (row['text'] for row in train), len(train)),
    val=text_parts('val', (row['text'] for row in val), len(val)),
)

# corpus=full: train.bin and val.bin have 9,040,017,095 tokens together, as nanoGPT's. There they have
# 9,035,582,198 and 4,434,897; the split moves by some hundreds between versions of the shuffling libraries.
