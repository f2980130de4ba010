"""
OpenWebText-10k, the first 10,000 documents of the open copy of GPT-2's training text, in GPT-2's
byte-pair encoding: writes train.bin and val.bin beside this file.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --files="texts/*.jsonl"
"""
import glob
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import gpt2_bpe, whole  # noqa: E402

files = ''                          # documents of your own instead: a glob of .parquet or .jsonl files with a field "text", or of .txt files
num_threads = os.cpu_count() or 1   # that encode
exec((HERE.parents[1] / 'configurator.py').read_text(encoding='utf-8'))

import numpy as np  # noqa: E402
from datasets import load_dataset  # noqa: E402
from datasets.exceptions import DatasetGenerationError  # noqa: E402
from tqdm import tqdm  # noqa: E402

bpe = gpt2_bpe()
if files:
    paths = sorted(glob.glob(files, recursive=True))
    suffixes = {Path(path).suffix for path in paths}
    kind = {'.parquet': 'parquet', '.jsonl': 'json', '.txt': 'text'}.get(suffixes.pop() if len(suffixes) == 1 else None)
    if kind is None:
        sys.exit(f"--files={files}: " + ("the files must all be .parquet, all .jsonl or all .txt" if paths else "no such files"))
    try:
        documents = load_dataset(kind, data_files=paths, split='train', **({'sample_by': 'document'} if kind == 'text' else {}))
    except (OSError, DatasetGenerationError) as error:
        sys.exit(f"--files={files}: cannot be read as {kind}: {error.__cause__ or error}")
    if len(documents) < 2 or 'text' not in documents.column_names or None in documents.unique('text'):
        sys.exit(f"--files={files}: {len(documents)} documents with the fields {', '.join(documents.column_names)}, but it takes two or more, each with a text in the field \"text\"")
else:
    try:
        # main holds a loading script, which datasets 4 and later refuse; the hub's own parquet copy does not
        documents = load_dataset('stas/openwebtext-10k', revision='refs/convert/parquet', split='train')
    except OSError as error:
        sys.exit(f"cannot download https://huggingface.co/datasets/stas/openwebtext-10k ({type(error).__name__}): fetch plain_text/train/0000.parquet "
                 "of its branch refs/convert/parquet where there is a network, then run this with --files=0000.parquet")

split = documents.train_test_split(test_size=0.0005 if files else 0.005, seed=2357, shuffle=True)
(HERE / 'train.bin').unlink(missing_ok=True)  # never a new val.bin beside an old train.bin
for name, part in (('val', split['test']), ('train', split['train'])):
    tokens = 0
    with whole(HERE / f'{name}.bin') as f, tqdm(total=len(part), desc=name, unit=' documents') as progress:
        for i in range(0, len(part), 256):
            for ids in bpe.encode_ordinary_batch(part[i:i + 256]['text'], num_threads=num_threads):
                np.array(ids + [bpe.eot_token], dtype='<u2').tofile(f)
                tokens += len(ids) + 1
            progress.update(min(256, len(part) - i))
    print(f"{name}.bin has {tokens:,} tokens in {len(part):,} documents")
