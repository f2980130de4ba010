"""What the prepare.py scripts share: downloads and files that appear whole or not at all, tokenizers, documents and characters."""
import bz2
import gzip
import hashlib
import http.client
import json
import lzma
import os
import pickle
import sys
import urllib.request
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

TINY_SHAKESPEARE = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
                    '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')  # address, SHA-256


def last_words(kind, error, trace):
    """What the file system says becomes one line, and so does Ctrl-C."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted: the data is not complete", file=sys.stderr)
    elif issubclass(kind, OSError):
        print(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = last_words


@contextmanager
def whole(path):
    """Opens path.part for writing bytes and gives it its name only once all is on the disk."""
    part = Path(f"{path}.part")
    try:
        with open(part, 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def download(url, sha256, path):
    """The bytes of the file at path, fetched from url if it is not there; either must have the given SHA-256."""
    if not path.is_file():
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                body = response.read()
        except (OSError, http.client.HTTPException) as error:
            sys.exit(f"cannot download {url} ({getattr(error, 'reason', error)}): fetch it where there is a network and put it at {path}")
        check(body, sha256, url)
        with whole(path) as f:
            f.write(body)
    body = path.read_bytes()
    check(body, sha256, path)
    return body


def check(body, sha256, source):
    found = hashlib.sha256(body).hexdigest()
    if found != sha256:
        sys.exit(f"{source} is damaged: {len(body)} bytes with SHA-256 {found}, expected {sha256}")


def gpt2_bpe():
    """GPT-2's encoding as encode(text) -> ids, and its <|endoftext|>; tiktoken downloads its two files on first use."""
    import tiktoken
    try:
        bpe = tiktoken.get_encoding('gpt2')
    except OSError as error:
        sys.exit(f"cannot download GPT-2's BPE files ({type(error).__name__}): where there is a network run python -c \"import tiktoken; "
                 "tiktoken.get_encoding('gpt2')\" with TIKTOKEN_CACHE_DIR=FOLDER, then bring the folder here and set the same")
    return lambda text: bpe.encode_to_numpy(text, disallowed_special=()), bpe.eot_token


def check_vocab_size(vocab_size):
    if not 257 <= vocab_size <= 65536:
        sys.exit(f"vocab_size must be from 257, the bytes and <|endoftext|>, to 65536, what two bytes a token can count; not {vocab_size}")


def train_bpe(texts, vocab_size, path):
    """
    A byte-level BPE as GPT-2's, trained on an iterable of texts and saved at path: every text comes back from its ids as it was.
    Returns encode(text) -> ids and the id of <|endoftext|>.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, special_tokens=['<|endoftext|>'],
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.encode_special_tokens = True  # in a text <|endoftext|> is thirteen characters like others
    with whole(path) as f:
        f.write(bpe.to_str().encode())
    return lambda text: bpe.encode(text).ids, bpe.token_to_id('<|endoftext|>')


def split_documents(documents, test_size):
    """A datasets.Dataset in two, train and val, as nanoGPT splits OpenWebText."""
    if len(documents) == 1:
        print("a single document: it goes to train.bin, and val.bin stays empty")
        return documents, documents.select([])
    split = documents.train_test_split(test_size=test_size, seed=2357, shuffle=True)
    return split['train'], split['test']


def check_texts(source, documents, *fields):
    """Leaves unless every row of a datasets.Dataset has a text, in Unicode, in each of the fields. Raises ValueError where it is not Unicode."""
    for field in fields:
        kind = getattr(documents.features.get(field), 'dtype', 'missing')
        missing = documents.data[field].null_count if kind in ('string', 'large_string') else len(documents)
        if missing or not len(documents):
            sys.exit(f"{source}: {len(documents)} documents with the fields {', '.join(documents.column_names)}, but each must have a text "
                     f"in the field \"{field}\" ({kind}; {missing} have none)")
        documents.data[field].validate(full=True)


def in_batches(documents):
    """The rows of a datasets.Dataset as dicts of lists, about a megabyte at a time."""
    return documents.iter(max(1, min(64, 1_000_000 * len(documents.data) // (documents.data.nbytes + 1))))


def write_documents(folder, encode, end, num_workers, **splits):
    """
    folder/NAME.bin for each NAME=(number of texts, iterable of lists of them): the ids of each text, encode(text), and `end` behind them.
    Threads, since tokenizers work outside Python's lock; no more lists in flight than keep the threads busy, so
    that memory does not grow with the corpus. The first split's file goes first and comes last.
    """
    def piece(texts):
        return np.concatenate([ids for text in texts for ids in (encode(text), [end])], dtype='<u2', casting='unsafe').tobytes()

    def pieces(pool, lists):
        running = deque()
        for texts in lists:
            running.append((len(texts), sum(map(len, texts)), pool.submit(piece, texts)))
            if len(running) > num_workers + 1:
                yield running.popleft()
        yield from running

    from tqdm import tqdm
    names = list(splits)
    (folder / f'{names[0]}.bin').unlink(missing_ok=True)
    with ThreadPoolExecutor(num_workers) as pool:
        for name in reversed(names):
            count, lists = splits[name]
            tokens = characters = 0
            with whole(folder / f'{name}.bin') as f, tqdm(total=count, desc=name, unit=' documents') as progress:
                for n, length, done in pieces(pool, lists):
                    tokens += f.write(done.result()) // 2
                    characters += length
                    progress.set_postfix_str(f"{tokens / max(progress.format_dict['elapsed'], 1e-9):,.0f} tokens/s", refresh=False)
                    progress.update(n)
            print(f"{name}.bin has {tokens:,} tokens in {count:,} documents" + (f", {tokens / characters:.3f} tokens a character" if characters else ''))


def unreadable(paths, kind, error):
    """Where the first row stands that is not JSON, not Unicode or no text: 'FILE, row N (why)'; if all seems well, what `error` of datasets says."""
    for path in paths:
        row, opener = 0, {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open}.get(Path(path).suffix, open)
        try:
            with opener(path, 'rb') as data:
                if kind == 'parquet':
                    import pyarrow.parquet
                    for batch in pyarrow.parquet.ParquetFile(data).iter_batches(64, columns=['text']):
                        for row, text in enumerate(batch['text'], row + 1):
                            text.as_py().encode()
                for row, line in enumerate(data if kind != 'parquet' else [], 1):
                    line = line.decode()
                    (json.loads(line)['text'] if kind == 'json' and line.strip() else line).encode()
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError) as found:
            return f"{path}, row {row} ({type(found).__name__}: {' '.join(str(found).split())[:200]})"
        if not row:
            return f"{path} is empty"
    return ' '.join(str(error.__cause__ or error).split())


def write_bins(folder, **splits):
    """folder/NAME.bin for each NAME=ids, as uint16. The first one goes first and comes last, so it never stands beside a stale one."""
    names = list(splits)
    (folder / f'{names[0]}.bin').unlink(missing_ok=True)
    for name in reversed(names):
        with whole(folder / f'{name}.bin') as f:
            np.asarray(splits[name], dtype='<u2').tofile(f)
        print(f"{name}.bin has {len(splits[name]):,} tokens")


def write_characters(folder, train, val):
    """Two texts as character ids in train.bin and val.bin, and their alphabet in meta.pkl."""
    codes = {name: np.frombuffer(text.encode('utf-32-le'), dtype='<u4') for name, text in (('train', train), ('val', val))}
    known = np.unique(np.concatenate([np.unique(ids) for ids in codes.values()]))
    alphabet = [chr(code) for code in known]
    print(f"{len(train) + len(val):,} characters, {len(alphabet)} different: {''.join(alphabet)!r}")
    if len(alphabet) > 65536:
        sys.exit(f"{len(alphabet)} different characters are more than two bytes a token can count")
    with whole(folder / 'meta.pkl') as f:
        pickle.dump({'vocab_size': len(alphabet), 'stoi': {c: i for i, c in enumerate(alphabet)}, 'itos': dict(enumerate(alphabet))}, f)
    write_bins(folder, **{name: np.searchsorted(known, ids) for name, ids in codes.items()})
