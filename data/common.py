"""What the prepare.py scripts share: downloads and files that appear whole or not at all, GPT-2's BPE, characters."""
import hashlib
import http.client
import os
import pickle
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np

TINY_SHAKESPEARE = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
                    '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')  # address, SHA-256


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
    """GPT-2's tokenizer; tiktoken downloads its two files on first use."""
    import tiktoken
    try:
        return tiktoken.get_encoding('gpt2')
    except OSError as error:
        sys.exit(f"cannot download GPT-2's BPE files ({type(error).__name__}): where there is a network run python -c \"import tiktoken; "
                 "tiktoken.get_encoding('gpt2')\" with TIKTOKEN_CACHE_DIR=FOLDER, then bring the folder here and set the same")


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
    alphabet = sorted(set(train) | set(val))
    stoi = {c: i for i, c in enumerate(alphabet)}
    print(f"{len(train) + len(val):,} characters, {len(alphabet)} different: {''.join(alphabet)!r}")
    with whole(folder / 'meta.pkl') as f:
        pickle.dump({'vocab_size': len(alphabet), 'stoi': stoi, 'itos': dict(enumerate(alphabet))}, f)
    write_bins(folder, train=[stoi[c] for c in train], val=[stoi[c] for c in val])
