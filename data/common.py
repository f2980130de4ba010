"""What the prepare.py scripts share, and atomic writes for train.py too."""

import hashlib
import json
import os
import shutil
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


@contextmanager
def atomic_write(path):
    """Opens path.part for writing bytes and renames it to `path` once everything is on the disk.

    A process that is killed meanwhile leaves the old file, or the new one, whole."""
    part = Path(f"{path}.part")
    try:
        with open(part, 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
        flush_folder(part.parent)
    finally:
        part.unlink(missing_ok=True)


def flush_folder(folder):
    """Waits until the names of a folder's files are on the disk. Windows cannot be asked for that."""
    if os.name == 'posix':
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def link(path, name):
    """Gives the file at `path` a second name, at once. Copies it where the file system has no links."""
    part = Path(f"{name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)
    except OSError:
        with open(path, 'rb') as source, atomic_write(name) as copy:
            shutil.copyfileobj(source, copy)
    else:
        os.replace(part, name)


def keep_as_old(paths):
    """Gives each file a second name, NAME.old, or .old1, .old2 … where one of these is taken.

    Returns {path: second name} of the files that exist. An error, such as a full disk, leaves none."""
    paths = [path for path in paths if os.path.exists(path)]
    suffix = '.old'
    tried = 0
    while any(os.path.exists(path + suffix) for path in paths):
        tried += 1
        suffix = f'.old{tried}'

    second_names = {path: path + suffix for path in paths}
    try:
        for path, name in second_names.items():
            link(path, name)
    except OSError:
        for name in second_names.values():
            Path(name).unlink(missing_ok=True)
        raise
    return second_names


def download(url, sha256, path):
    """Returns the bytes of the file at path, fetched from url if it is not there. Checks their SHA-256."""
    is_here = path.is_file()
    if is_here:
        content = path.read_bytes()
    else:
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                content = response.read()
        except Exception as error:  # of the network, or of HTTP
            sys.exit(
                f"cannot download {url} ({getattr(error, 'reason', error)}): "
                f"fetch it where there is a network and put it at {path}"
            )

    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        sys.exit(
            f"{path if is_here else url} is damaged: {len(content)} bytes with SHA-256 {found}, "
            f"expected {sha256}"
        )

    if not is_here:
        with atomic_write(path) as f:
            f.write(content)
    return content


def check_vocab_size(vocab_size):
    """Exits if a BPE cannot be trained to that size."""
    if not 257 <= vocab_size <= 65536:
        sys.exit(f"vocab_size must be from 257 (bytes, <|endoftext|>) to 65536 (uint16), not {vocab_size}")


# -----------------------------------------------------------------------------
# Documents, as a datasets.Dataset


def split_documents(documents, test_size):
    """Splits documents into train and val as nanoGPT splits OpenWebText."""
    if len(documents) == 1:
        print("a single document: it goes to train.bin, and val.bin stays empty")
        return documents, documents.select([])
    split = documents.train_test_split(test_size=test_size, seed=2357, shuffle=True)
    return split['train'], split['test']


def check_texts(source, documents, *fields):
    """Exits unless every document has a text in each field. Raises ValueError if a text is not Unicode."""
    for field in fields:
        # A field that is missing, or of numbers, is a text in none of the documents.
        kind = getattr(documents.features.get(field), 'dtype', 'missing')
        without_text = len(documents)
        if kind in ('string', 'large_string'):
            without_text = documents.data[field].null_count
        if without_text > 0 or len(documents) == 0:
            sys.exit(
                f"{source}: {len(documents)} documents with the fields {', '.join(documents.features)}, "
                f"but each must have a text in the field \"{field}\" ({kind}; {without_text} have none)"
            )

        # This reads every text, and raises the ValueError.
        documents.data[field].validate(full=True)


def in_batches(documents):
    """Yields documents as dicts of lists, in batches of about a megabyte and of at most 64 documents."""
    table = documents.data
    batch_size = 1_000_000 * len(table) // (table.nbytes + 1)
    return documents.iter(min(max(batch_size, 1), 64))


def texts_of(path, kind):
    """Yields the texts of a file row by row. Raises an error at a row that is not a text in Unicode."""
    import fsspec
    import pyarrow.parquet

    with fsspec.filesystem('file').open(path, compression='infer') as f:
        if kind == 'parquet':
            for text in pyarrow.parquet.read_table(f, columns=['text'])['text']:
                yield text.as_py()
        else:
            for line in f:
                text = line.decode()
                if kind == 'json' and text.strip():
                    text = json.loads(text)['text']
                    text.encode()  # raises an error if half of a surrogate pair is in it
                yield text


def unreadable(paths, kind, error):
    """Says which row datasets could not read, and why. The `error` that it raised does not name the row, so
    the files are read once more here.
    """
    for path in paths:
        rows = 0
        try:
            for _ in texts_of(path, kind):
                rows += 1
        except Exception as found:
            return f"{path}, row {rows + 1} ({one_line(found)})"
        if rows == 0:
            return f"{path} is empty"
    return one_line(error.__cause__ or error)


# -----------------------------------------------------------------------------
# train.bin and val.bin


def write_ids(f, pieces):
    """Writes arrays of ids as little-endian uint16. Returns how many ids they hold."""
    count = 0
    for ids in pieces:
        ids = np.asarray(ids, dtype='<u2')
        f.write(ids.tobytes())
        count += len(ids)
    return count


def write_bins(folder, tokenizer, train, val):
    """Writes train.bin, val.bin and the tokenizer's file; train and val are iterables of arrays of ids.

    At every instant, even if this process is killed then, a train.bin that exists stands beside the val.bin
    and the tokenizer that belong to it. The old data set stays whole until the new one is on the disk. Then
    the old train.bin is deleted first, and the new train.bin appears last.
    """
    if tokenizer.vocab_size > 65536:
        sys.exit(f"{tokenizer.vocab_size} different tokens are more than uint16 can count")

    # When the block ends, atomic_write gives the files their names: the last one opened comes first, and
    # train.bin, which is opened first, comes last.
    names = ['train.bin', 'val.bin', *tokenizer.files()]
    with ExitStack() as stack:
        files = {name: stack.enter_context(atomic_write(folder / name)) for name in names}
        for name, content in tokenizer.files().items():
            files[name].write(content)
        print(f"val.bin has {write_ids(files['val.bin'], val):,} tokens")
        print(f"train.bin has {write_ids(files['train.bin'], train):,} tokens")

        # A full disk is noticed here at the latest, while the old data set is still whole.
        for f in files.values():
            f.flush()
            os.fsync(f.fileno())

        # The tokenizer's old file may have another name than the new one, so nothing would replace it.
        for name in ('train.bin', 'meta.pkl', 'tokenizer.json'):
            (folder / name).unlink(missing_ok=True)


def write_characters(folder, train, val):
    """Writes two texts as character ids to train.bin and val.bin, and their alphabet to meta.pkl."""
    alphabet = sorted(set(train) | set(val))
    print(f"{len(train) + len(val):,} characters, {len(alphabet)} different: {''.join(alphabet)[:200]!r}")
    tokenizer = char_tokenizer(alphabet)
    write_bins(folder, tokenizer, train=[tokenizer.encode(train)], val=[tokenizer.encode(val)])


def encode_documents(name, tokenizer, num_workers, count, lists):
    """Yields an array of ids for each list of texts; the lists have `count` texts in all.

    Threads encode them. Processes would not be faster, since tokenizers release the GIL. Few lists are in
    flight at a time, so memory stays bounded.
    """

    def encode(texts):
        """Returns the texts themselves too, because their lengths are counted below."""
        pieces = []
        for text in texts:
            pieces += [tokenizer.encode(text), [tokenizer.eot]]
        # uint16 holds every id, as write_bins checks.
        return texts, np.concatenate(pieces, dtype='<u2', casting='unsafe')

    tokens = characters = 0
    with ThreadPoolExecutor(num_workers) as pool, tqdm(total=count, desc=name, unit=' documents') as bar:
        # This reads a list, and hands it to a thread, only when the next of its elements is asked for.
        submitted = (pool.submit(encode, texts) for texts in lists)

        # Two lists more than threads are in flight. For each one that is finished, another one is submitted.
        running = list(islice(submitted, min(num_workers, 256) + 2))
        while running:
            texts, ids = running.pop(0).result()
            running.extend(islice(submitted, 1))
            yield ids

            tokens += len(ids)
            characters += sum(map(len, texts))
            bar.set_postfix_str(f"{tokens / max(1, characters):.3f} tokens a character", refresh=False)
            bar.update(len(texts))


def write_documents(folder, tokenizer, num_workers, train, val):
    """Writes documents, each ended by eot. train and val are pairs: the number of texts, an iterable of lists
    of texts.
    """
    train_ids = encode_documents('train', tokenizer, num_workers, *train)
    val_ids = encode_documents('val', tokenizer, num_workers, *val)
    with closing(train_ids), closing(val_ids):  # an error ends the threads and the bars before it is printed
        write_bins(folder, tokenizer, train_ids, val_ids)
