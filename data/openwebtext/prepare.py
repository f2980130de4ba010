"""
OpenWebText, the open copy of GPT-2's training text, in GPT-2's byte-pair encoding: writes train.bin and val.bin beside this file.

    python data/openwebtext/prepare.py                              # the first 10,000 documents
    python data/openwebtext/prepare.py --corpus=full                # all 8,013,769
    python data/openwebtext/prepare.py --files="texts/*.jsonl.gz"   # documents of your own
"""
import glob
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import check_texts, gpt2_bpe, in_batches, split_documents, unreadable, write_documents  # noqa: E402

corpus = '10k'                      # 10k or full
files = ''                          # instead: a glob of .parquet or .jsonl files with a field "text", or of .txt files, one document each; .gz, .zst … are fine
num_workers = os.cpu_count() or 1   # threads that encode
exec((HERE.parents[1] / 'configurator.py').read_text(encoding='utf-8'))

if corpus not in ('10k', 'full'):
    sys.exit(f"corpus {corpus!r} is neither 10k nor full")
if num_workers < 1:
    sys.exit(f"num_workers must be at least 1, not {num_workers}")

import datasets  # noqa: E402
from pyarrow.dataset import ParquetFragmentScanOptions  # noqa: E402

KINDS = {'.parquet': 'parquet', '.jsonl': 'json', '.json': 'json', '.txt': 'text'}
ROWS = 8_013_769  # of the whole corpus: older copies on the hub hold a tenth of it and do not say so

encode, end = gpt2_bpe()
how = {'text': {'sample_by': 'document'}, 'parquet': {'fragment_scan_options': ParquetFragmentScanOptions(pre_buffer=False)}}  # no whole file in memory
paths, kind = sorted({path for path in [files, *glob.glob(files, recursive=True)] if os.path.isfile(path)}), 'parquet'
if files:
    kinds = {next((KINDS[suffix] for suffix in reversed(Path(path.lower()).suffixes[-2:]) if suffix in KINDS), None) for path in paths}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        sys.exit(f"--files={files}: " + ("the files must all be .parquet, all .jsonl or all .txt" if paths else "no such files"))
try:
    if files:
        documents = datasets.load_dataset(kind, data_files=[glob.escape(path) for path in paths], split='train', **how.get(kind, {}))
        check_texts(f"--files={files}", documents, 'text')  # before any older data goes
    elif corpus == '10k':  # main holds a loading script, which datasets 4 and later refuse; the hub's own parquet copy does not
        documents = datasets.load_dataset('stas/openwebtext-10k', revision='refs/convert/parquet', split='train')
    else:
        documents = datasets.load_dataset('parquet', split='train', **how['parquet'], data_files='hf://datasets/Skylion007/openwebtext@'
                                          '79d93d786212f7344586290adb811d4ae6a1762c/plain_text/*.parquet')
except (OSError, ValueError, EOFError, StopIteration, datasets.exceptions.DatasetsError) as error:  # StopIteration: an empty file
    if files:
        sys.exit(f"--files={files}: cannot be read as {kind}: {unreadable(paths, kind, error)}")
    name, where = {'10k': ('stas/openwebtext-10k', "plain_text/train/0000.parquet of its branch refs/convert/parquet"),
                   'full': ('Skylion007/openwebtext', "the 80 files plain_text/*.parquet, revision 79d93d786212")}[corpus]
    sys.exit(f"cannot download https://huggingface.co/datasets/{name} ({type(error).__name__}): fetch {where} "
             "where there is a network, then run this with --files=\"FOLDER/*.parquet\"")
if corpus == 'full' and not files and len(documents) != ROWS:
    sys.exit(f"OpenWebText came with {len(documents):,} documents instead of {ROWS:,}: delete it from the cache of datasets and fetch it again")

train, val = split_documents(documents, test_size=0.005 if corpus == '10k' and not files else 0.0005)
write_documents(HERE, encode, end, num_workers, **{
    name: (len(part), (rows['text'] for rows in in_batches(part))) for name, part in (('train', train), ('val', val))})

# corpus=full: train.bin and val.bin have 9,040,017,095 tokens together, as nanoGPT's: 9,035,582,198 and 4,434,897
# there, and up to some hundreds to and fro between versions of the libraries that shuffle
