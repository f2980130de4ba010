"""The prepare.py scripts: their figures, and what they leave behind when something goes wrong."""
import json
import pickle
import socket
import threading
from contextlib import contextmanager

import numpy as np
import pytest


def read(house, name, split):
    return np.fromfile(house / 'data' / name / f'{split}.bin', dtype='<u2')


def test_shakespeare_char(run, house, with_text):
    out = run('data/shakespeare_char/prepare.py').stdout
    assert 'train.bin has 1,003,854 tokens' in out and 'val.bin has 111,540 tokens' in out
    meta = pickle.loads((house / 'data' / 'shakespeare_char' / 'meta.pkl').read_bytes())
    assert meta.keys() == {'vocab_size', 'stoi', 'itos'} and meta['vocab_size'] == 65 and type(meta) is dict
    ids = np.concatenate([read(house, 'shakespeare_char', split) for split in ('train', 'val')])
    assert ''.join(meta['itos'][i] for i in ids.tolist()) == with_text and len(ids) == 1115394


def test_shakespeare(run, house, with_text, bpe):
    out = run('data/shakespeare/prepare.py').stdout
    assert 'train.bin has 301,966 tokens' in out and 'val.bin has 36,059 tokens' in out
    assert bpe.decode(read(house, 'shakespeare', 'train').tolist()) + bpe.decode(read(house, 'shakespeare', 'val').tolist()) == with_text


def test_python_char(run, house):
    """ASCII modules of this Python, whole, the last tenth for validation, and none of those left out."""
    run('data/python_char/prepare.py')
    itos = pickle.loads((house / 'data' / 'python_char' / 'meta.pkl').read_bytes())['itos']
    train, val = (''.join(itos[i] for i in read(house, 'python_char', split).tolist()) for split in ('train', 'val'))
    assert len(train) + len(val) > 5e6 and (train + val).isascii() and 0.02 < len(val) / len(train) < 0.3
    import argparse, ensurepip, weakref  # noqa: E401
    for module, text in ((argparse, train), (weakref, val)):
        assert open(module.__file__).read() in text
    assert open(ensurepip.__file__).read() not in train + val


@contextmanager
def cut_off_server():
    """The address of a server that promises 1000 bytes and hangs up after 4."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        def serve():
            peer, _ = server.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b'HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nhalf')
        thread = threading.Thread(target=serve)
        thread.start()
        yield f'http://127.0.0.1:{server.getsockname()[1]}/input.txt'
        thread.join()


def test_download(run, house, tmp_path):
    """Without a network one line names the address and the place; a damaged file is refused; neither leaves anything behind."""
    from common import download
    folder = house / 'data' / 'shakespeare_char'
    for path in folder.glob('*.*'):
        if path.suffix in ('.txt', '.bin', '.pkl'):
            path.unlink()
    before = sorted(folder.iterdir())
    with socket.socket() as closed:  # a proxy that refuses, so that no machine reaches the address
        closed.bind(('127.0.0.1', 0))
        words = run('data/shakespeare_char/prepare.py', status=1, env={'HTTPS_PROXY': f'http://127.0.0.1:{closed.getsockname()[1]}'})
    assert 'https://raw.githubusercontent.com/karpathy/char-rnn' in words and f'put it at {folder / "input.txt"}' in words
    assert sorted(folder.iterdir()) == before
    with pytest.raises(SystemExit, match='cannot download http://127.0.0.1:.*put it at'):
        with cut_off_server() as address:
            download(address, '', tmp_path / 'input.txt')
    assert not list(tmp_path.iterdir())
    (folder / 'input.txt').write_text('First Citizen')
    assert 'is damaged: 13 bytes' in run('data/shakespeare_char/prepare.py', status=1)
    (folder / 'input.txt').unlink()


def test_openwebtext_out_of_reach(run, house, bpe):
    words = run('data/openwebtext/prepare.py', status=1)
    assert 'cannot download https://huggingface.co/datasets/stas/openwebtext-10k' in words and '--files=' in words


def test_openwebtext(run, house, tmp_path, bpe):
    """The split, the encoding and the end of each document are those of nanoGPT's pipeline."""
    from datasets import Dataset
    texts = [f'Document {i}. ' + 'words and more — ' * (i % 7) + ('<|endoftext|>' if i == 5 else '') for i in range(2500)]
    (tmp_path / 'mine.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    out = run('data/openwebtext/prepare.py', '--files=mine.jsonl').stdout
    split = Dataset.from_dict({'text': texts}).train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    for name, part in (('train', split['train']), ('val', split['test'])):
        want = [i for text in part['text'] for i in bpe.encode_ordinary(text) + [50256]]
        assert read(house, 'openwebtext', name).tolist() == want
        assert f'{name}.bin has {len(want):,} tokens in {len(part):,} documents' in out
    before = [read(house, 'openwebtext', name).tolist() for name in ('train', 'val')]
    for name, text, words in (('one.jsonl', '{"text": "alone"}', '1 documents'), ('two.jsonl', '{"a": 1}\n{"a": 2}', 'with the fields a'),
                              ('null.jsonl', '{"text": "a"}\n{"text": null}', 'each with a text'), ('bad.jsonl', '{"text', 'cannot be read as json'),
                              ('x.csv', 'text', 'must all be .parquet')):
        (tmp_path / name).write_text(text)
        assert words in run('data/openwebtext/prepare.py', f'--files={name}', status=1)
    assert 'no such files' in run('data/openwebtext/prepare.py', '--files=*.tsv', status=1)
    assert before == [read(house, 'openwebtext', name).tolist() for name in ('train', 'val')]  # mistakes harm no data


def test_bins_appear_whole(tmp_path, monkeypatch):
    """A writer that fails leaves no file, and a new val.bin never stands beside an old train.bin."""
    from common import whole, write_bins
    with pytest.raises(RuntimeError):
        with whole(tmp_path / 'x.bin') as f:
            f.write(b'half')
            raise RuntimeError
    assert not list(tmp_path.iterdir())
    write_bins(tmp_path, train=[1, 2, 3], val=[4])
    with pytest.raises(OverflowError):
        write_bins(tmp_path, train=[1, 70000], val=[5])  # no 16-bit id: fails after val.bin
    assert [path.name for path in tmp_path.iterdir()] == ['val.bin']
