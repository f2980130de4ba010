"""What the prepare.py scripts share, and atomic writes for train.py too."""

import hashlib
import json
import os
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.tokenizer import char_tokenizer, one_line

TINY_SHAKESPEARE = (  # address, SHA-256
    'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
    '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed',
)


def excepthook(kind, error, trace, default=sys.excepthook):
    """For the prepare.py scripts: one line for Ctrl-C and for errors of files and networks."""
    sys.stdout = None  # else Python would try once more to write the rest to a full disk or a closed pipe
    if issubclass(kind, (KeyboardInterrupt, BrokenPipeError)):
        print("interrupted: the data is not complete", file=sys.stderr)
    elif issubclass(kind, OSError):
        print(
            f"{error.filename or 'cannot write'}: {error.strerror}" if error.strerror else error,
            file=sys.stderr,
        )
    else:
        default(kind, error, trace)


@contextmanager
def atomic_write(path):
    """Opens path.part for writing bytes and renames it to path once everything is on the disk."""
    part = Path(f"{path}.part")
    try:
        with open(part, 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def link(path, name):
    """Gives the file at path a second name. A file system without links renames it."""
    Path(name).unlink(missing_ok=True)
    try:
        os.link(path, name)
    except OSError:
        os.replace(path, name)


def set_aside(paths, replaced):
    """Renames files to NAME.old, or .old1 …, and returns {path: new path}. `replaced` stays until it is."""
    paths = [path for path in paths if os.path.exists(path)]
    suffix = next(
        f".old{n or ''}"
        for n in range(10**6)
        if not any(os.path.exists(f"{path}.old{n or ''}") for path in paths)
    )
    for path in paths:
        (link if path == replaced else os.replace)(path, path + suffix)
    return {path: path + suffix for path in paths}


def download(url, sha256, path):
    """Returns the bytes of the file at path, fetched from url if it is not there. Checks their SHA-256."""
    is_here = path.is_file()
    try:
        with open(path, 'rb') if is_here else urllib.request.urlopen(url, timeout=60) as source:
            body = source.read()
    except Exception as error:  # of the network, of HTTP …
        sys.exit(
            f"cannot download {url} ({getattr(error, 'reason', error)}): "
            f"fetch it where there is a network and put it at {path}"
        )
    if (found := hashlib.sha256(body).hexdigest()) != sha256:
        sys.exit(
            f"{path if is_here else url} is damaged: {len(body)} bytes with SHA-256 {found}, "
            f"expected {sha256}"
        )
    if not is_here:
        with atomic_write(path) as f:
            f.write(body)
    return body


def check_vocab_size(vocab_size):
    if not 257 <= vocab_size <= 65536:
        sys.exit(f"vocab_size must be from 257 (bytes, <|endoftext|>) to 65536 (uint16), not {vocab_size}")


def split_documents(documents, test_size):
    """Splits a datasets.Dataset into train and val as nanoGPT splits OpenWebText."""
    if len(documents) == 1:
        print("a single document: it goes to train.bin, and val.bin stays empty")
        return documents, documents.select([])
    split = documents.train_test_split(test_size=test_size, seed=2357, shuffle=True)
    return split['train'], split['test']


def check_texts(source, documents, *fields):
    """Exits unless every row has a text in each of the fields. Raises ValueError if a text is not Unicode."""
    for field in fields:
        kind = getattr(documents.features.get(field), 'dtype', 'missing')
        missing = documents.data[field].null_count if kind in ('string', 'large_string') else len(documents)
        if missing or not len(documents):
            sys.exit(
                f"{source}: {len(documents)} documents with the fields {', '.join(documents.features)}, "
                f"but each must have a text in the field \"{field}\" ({kind}; {missing} have none)"
            )
        documents.data[field].validate(full=True)


def in_batches(documents):
    """Yields the rows of a datasets.Dataset as dicts of lists, about a megabyte at a time."""
    return documents.iter(max(1, min(64, 1_000_000 * len(documents.data) // (documents.data.nbytes + 1))))


def unreadable(paths, kind, error):
    """Names the first row without a text in Unicode; the `error` that datasets raised does not name it."""
    import fsspec
    import pyarrow.parquet

    for path in paths:
        where = path
        try:
            with fsspec.filesystem('file').open(path, compression='infer') as rows:
                if kind == 'parquet':
                    rows = pyarrow.parquet.read_table(rows, columns=['text'])['text']
                for row, text in enumerate(rows, 1):
                    where = f"{path}, row {row}"
                    text = text.as_py() if kind == 'parquet' else text.decode()
                    if kind == 'json' and text.strip():
                        json.loads(text)['text'].encode()
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError) as found:
            return f"{where} ({one_line(found)})"
        if where == path:
            return f"{path} is empty"
    return one_line(error.__cause__ or error)


def write_bins(folder, tokenizer, train, val):
    """Writes the tokenizer's file, and ids, given as iterables of arrays, as little-endian uint16."""
    if tokenizer.vocab_size > 65536:
        sys.exit(f"{tokenizer.vocab_size} different tokens are more than uint16 can count")
    with ExitStack() as stack:  # renames at its end, train.bin last, so that it never has other data's files
        files = {
            name: stack.enter_context(atomic_write(folder / name))
            for name in ('train.bin', 'val.bin', *tokenizer.files())
        }
        for name, content in tokenizer.files().items():
            files[name].write(content)
        for name, pieces in (('val.bin', val), ('train.bin', train)):
            tokens = sum(files[name].write(np.asarray(ids, dtype='<u2').tobytes()) // 2 for ids in pieces)
            files[name].flush()
            print(f"{name} has {tokens:,} tokens")
        for stale in ('train.bin', 'meta.pkl', 'tokenizer.json'):  # nothing can fail any more
            (folder / stale).unlink(missing_ok=True)


def write_characters(folder, train, val):
    """Writes two texts as character ids to train.bin and val.bin, and their alphabet to meta.pkl."""
    alphabet = sorted(set(train) | set(val))
    print(f"{len(train) + len(val):,} characters, {len(alphabet)} different: {''.join(alphabet)[:200]!r}")
    codes = [np.frombuffer(text.encode('utf-32-le'), '<u4') for text in (''.join(alphabet), train, val)]
    write_bins(folder, char_tokenizer(alphabet), *([np.searchsorted(codes[0], text)] for text in codes[1:]))


def write_documents(folder, tokenizer, num_workers, train, val):
    """Writes documents, each ended by eot; train and val are (number of texts, iterable of lists of texts).
    Threads suffice, since tokenizers release the GIL. Few lists are in flight, so memory stays bounded."""

    def encode(texts):
        pieces = [ids for text in texts for ids in (tokenizer.encode(text), [tokenizer.eot])]
        return len(texts), sum(map(len, texts)), np.concatenate(pieces, dtype='<u2', casting='unsafe')

    def encoded(name, count, lists):
        tokens = characters = 0
        with ThreadPoolExecutor(num_workers) as pool, tqdm(total=count, desc=name, unit=' documents') as bar:
            submitted = (pool.submit(encode, texts) for texts in lists)
            running = list(islice(submitted, min(num_workers, 256) + 2))
            while running:
                documents, length, ids = running.pop(0).result()
                running.extend(islice(submitted, 1))
                yield ids
                tokens, characters = tokens + len(ids), characters + length
                bar.set_postfix_str(f"{tokens / max(1, characters):.3f} tokens a character", refresh=False)
                bar.update(documents)

    with closing(encoded('train', *train)) as train_ids, closing(encoded('val', *val)) as val_ids:
        write_bins(folder, tokenizer, train_ids, val_ids)  # closing ends the bars before an error is printed
