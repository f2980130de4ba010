"""The prepare.py scripts and the tokenizers: their figures, and what they leave behind if something fails."""

import gzip
import io
import json
import os
import pickle
import random
import re
import runpy
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import MACHINE
from tqdm import tqdm


def read(house, name, split):
    return np.fromfile(house / 'data' / name / f'{split}.bin', dtype='<u2')


def decoded(bpe, house, name):
    """The texts of train.bin and val.bin, of GPT-2's or another encoding."""
    return [bpe.decode(read(house, name, split).tolist()) for split in ('train', 'val')]


def write_json_lines(path, texts):
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))


def decoded_characters(house, name):
    itos = pickle.loads((house / 'data' / name / 'meta.pkl').read_bytes())['itos']
    codes = np.array([ord(itos[i]) for i in range(len(itos))], dtype='<u4')
    return [codes[read(house, name, split)].tobytes().decode('utf-32-le') for split in ('train', 'val')]


def test_shakespeare_char(run, house, with_text):
    out = run('data/shakespeare_char/prepare.py').stdout
    assert 'train.bin has 1,003,854 tokens' in out and 'val.bin has 111,540 tokens' in out
    meta = pickle.loads((house / 'data' / 'shakespeare_char' / 'meta.pkl').read_bytes())
    assert meta.keys() == {'vocab_size', 'stoi', 'itos'} and meta['vocab_size'] == 65 and type(meta) is dict
    assert all(meta['stoi'][c] == i for i, c in meta['itos'].items())
    text = ''.join(decoded_characters(house, 'shakespeare_char'))
    assert text == with_text and len(text) == 1115394


def test_shakespeare(run, house, with_text, bpe):
    out = run('data/shakespeare/prepare.py').stdout
    assert 'train.bin has 301,966 tokens' in out and 'val.bin has 36,059 tokens' in out
    assert ''.join(decoded(bpe, house, 'shakespeare')) == with_text


@pytest.mark.slow
def test_python_char(run, house):
    """ASCII modules of this Python, whole, the last tenth for validation, and none of those left out."""
    run('data/python_char/prepare.py')
    train, val = decoded_characters(house, 'python_char')
    assert len(train) + len(val) > 5e6 and (train + val).isascii() and 0.02 < len(val) / len(train) < 0.3
    import argparse
    import ensurepip
    import weakref

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
    """Without a network one line names the address and the place. A damaged file is refused, whether it is
    there or has been fetched. Neither leaves anything behind.
    """
    from data.common import download

    folder = house / 'data' / 'shakespeare_char'
    for path in folder.glob('*.*'):
        if path.suffix in ('.txt', '.bin', '.pkl'):
            path.unlink()
    before = sorted(folder.iterdir())
    with socket.socket() as closed:  # a proxy that refuses, so that no machine reaches the address
        closed.bind(('127.0.0.1', 0))
        proxy = {'HTTPS_PROXY': f'http://127.0.0.1:{closed.getsockname()[1]}'}
        words = run('data/shakespeare_char/prepare.py', status=1, env=proxy)
    assert 'https://raw.githubusercontent.com/karpathy/char-rnn' in words
    assert f'put it at {folder / "input.txt"}' in words
    assert sorted(folder.iterdir()) == before
    with pytest.raises(SystemExit, match='cannot download http://127.0.0.1:.*put it at'):
        with cut_off_server() as address:
            download(address, '', tmp_path / 'input.txt')
    (tmp_path / 'source').write_text('First Citizen')
    with pytest.raises(SystemExit, match='source is damaged: 13 bytes'):
        download((tmp_path / 'source').as_uri(), 'another', tmp_path / 'input.txt')
    assert [path.name for path in tmp_path.iterdir()] == ['source']
    (folder / 'input.txt').write_text('First Citizen')
    assert 'is damaged: 13 bytes' in run('data/shakespeare_char/prepare.py', status=1)
    (folder / 'input.txt').unlink()


def test_tokenizers(tmp_path, bpe):
    """A text comes back from its ids, a tokenizer from its file, and <|endoftext|> in a text is special only
    where the text is not ordinary. Files and texts that a tokenizer cannot read are the user's mistakes.
    """
    from data.tokenizer import Tokenizer, UserError, char_tokenizer, read_tokenizer_spec, train_bpe

    text = 'abc 数学 🦊<|endoftext|>'
    gpt2 = Tokenizer({'kind': 'gpt2'})
    tokenizers = char_tokenizer(sorted(set(text))), train_bpe([[text], [text]], 300), gpt2
    for tokenizer in tokenizers:
        folder = tmp_path / tokenizer.kind
        folder.mkdir()
        for name, content in tokenizer.files().items():
            (folder / name).write_bytes(content)
        assert read_tokenizer_spec(folder) == tokenizer.spec
        for ordinary in (False, True):
            again = Tokenizer(tokenizer.spec, ordinary)
            ids = list(again.encode(text))
            assert again.decode(ids) == text and max(ids) < again.vocab_size == tokenizer.vocab_size
            assert (again.eot in ids) == (not ordinary and again.kind != 'char')
    assert [tokenizer.eot for tokenizer in tokenizers] == [None, 0, 50256]
    with pytest.raises(UserError, match="character '日'"):
        tokenizers[0].encode('日')

    # the meta.pkl of some data sets only counts
    (tmp_path / 'char' / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 65, 'other': 1}))
    assert read_tokenizer_spec(tmp_path / 'char') == {'kind': 'char', 'vocab_size': 65}
    assert Tokenizer({'kind': 'char', 'vocab_size': 65}).kind == 'ids'
    assert char_tokenizer('ab').files().keys() == {'meta.pkl'}
    without = {key: value for key, value in char_tokenizer('ab').spec.items() if key != 'vocab_size'}
    assert pickle.loads(Tokenizer(without).files()['meta.pkl']).keys() == {'stoi', 'itos'}
    for damaged in (b'', b'\x80\x04', pickle.dumps(np.int64)):
        (tmp_path / 'char' / 'meta.pkl').write_bytes(damaged)
        with pytest.raises(UserError, match='cannot read .*meta.pkl'):
            read_tokenizer_spec(tmp_path / 'char')
    with pytest.raises(UserError, match='cannot read tokenizer.json'):
        Tokenizer({'kind': 'bpe', 'json': '{}'})


def test_gpt2_pattern(bpe):
    """Tokenizer words GPT-2's pattern for speed: it must cut every text as tiktoken's own does, above all at
    runs of spaces, contractions, marks and digits of other scripts, for training data and prompts alike.
    """
    from data.tokenizer import EOT, Tokenizer

    chance = random.Random(0)
    ordinary, special = Tokenizer({'kind': 'gpt2'}, ordinary=True), Tokenizer({'kind': 'gpt2'})
    spaces = [c for c in map(chr, range(0x110000)) if c.isspace()]
    parts = [
        *"'s 't 've 'll 're 'd 'm 'S ' a word 7 \u0663 ½ Ⅷ . !? _ 数 e\u0301 🦊 \u200d \x00".split(' '),
        *spaces,
        *' \n' * 9,
        EOT,
    ]
    texts = [''.join(chance.choices(parts, k=chance.randrange(12))) for _ in range(20_000)]
    texts += [f"a {c}{c}'s  {c}\n\n{c} " for c in map(chr, range(0x3000))]
    texts += [text * 100_000 for text in (' ', 'x', '7', '! ', '\n x')]
    for text in texts:
        assert ordinary.encode(text).tolist() == bpe.encode_ordinary(text), text[:60]
        assert special.encode(text) == bpe.encode(text, allowed_special={EOT}), text[:60]


def bpe_file(model={}, **parts):  # noqa: B006
    """A tokenizer.json with other parts."""
    from data.tokenizer import train_bpe

    spec = json.loads(train_bpe(['the quick brown fox'] * 2, 300).spec['json'])
    return {**spec, 'model': {**spec['model'], **model}, **parts}


def test_panics(capfd):
    """Of the Rust code in tokenizers, which are no Exceptions: they become errors like any other."""
    from data.tokenizer import Tokenizer, UserError

    with pytest.raises(UserError, match='cannot read tokenizer.json .PanicException: '):
        Tokenizer({'kind': 'bpe', 'json': json.dumps(bpe_file({'continuing_subword_prefix': '#' * 9}))})
    replace = {'type': 'Replace', 'pattern': {'String': ''}, 'content': 'x'}
    tokenizer = Tokenizer({'kind': 'bpe', 'json': json.dumps(bpe_file(normalizer=replace))})
    with pytest.raises(UserError, match="the tokenizer cannot read 'the 🦊' .PanicException: "):
        tokenizer.encode('the 🦊')
    assert 'panicked' in capfd.readouterr().err  # Rust's own words, which Python cannot stop


def test_vocabulary_with_holes():
    """vocab_size is above the largest id, not the number of the ids: else a model would be too small."""
    from data.tokenizer import Tokenizer

    vocab = {token: i + 1000 * (i > 270) for token, i in bpe_file()['model']['vocab'].items()}
    tokenizer = Tokenizer({'kind': 'bpe', 'json': json.dumps(bpe_file({'vocab': vocab}))})
    ids = tokenizer.encode('the quick')
    assert 1270 < max(ids) < tokenizer.vocab_size == 1 + max(vocab.values())
    assert tokenizer.decode(ids) == 'the quick'


def reference(bpe, texts, test_size=0.0005):
    """train and val as nanoGPT's pipeline makes them: load, split, encode each, concatenate."""
    from datasets import Dataset

    documents = Dataset.from_dict({'text': texts})
    split = documents.train_test_split(test_size=test_size, seed=2357, shuffle=True)
    splits = {'train': split['train']['text'], 'val': split['test']['text']}
    return {
        name: [i for text in part for i in bpe.encode_ordinary(text) + [50256]]
        for name, part in splits.items()
    }


ODD = [
    '',
    'a',
    '<|endoftext|> inside <|endoftext|>',
    '\x00\x01 control \x7f\u0085',
    '  \n\n\t ',
    '👨‍👩‍👧 𠀀 é\u0301 日本',
    'x' * 5000,
    '\ufffd',
]


@pytest.mark.parametrize(
    'count, workers',
    [
        (7, 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3, 3), (1000, 1), (1000, 3))),
    ],
)
def test_openwebtext(run, house, tmp_path, bpe, count, workers):
    """Byte for byte nanoGPT's bins for any number of documents and workers, odd and empty texts included."""
    texts = [ODD[i % len(ODD)] + f' document {i}' * (i % 5) for i in range(count)]
    write_json_lines(tmp_path / 'mine.jsonl', texts)
    (house / 'data' / 'openwebtext' / 'meta.pkl').write_text('stale')  # would make the ids characters
    out = run('data/openwebtext/prepare.py', '--files=mine.jsonl', f'--num_workers={workers}').stdout
    for name, want in reference(bpe, texts).items():
        assert read(house, 'openwebtext', name).tolist() == want
        assert f'{name}.bin has {len(want):,} tokens\n' in out
    assert ('data/custom/prepare.py takes a larger share' in out) == (len(want) < 1025)
    assert not (house / 'data' / 'openwebtext' / 'meta.pkl').exists()


@pytest.mark.slow
def test_large_documents_and_formats(run, house, tmp_path, bpe):
    """Documents larger than a batch or a piece; parquet and compressed JSON lines give the same bins."""
    import pyarrow
    import pyarrow.parquet

    texts = [' '.join(f'{i * n}' for n in range(300_000)) if i < 2 else f'small one {i}' for i in range(5)]
    assert len(texts[1]) > 1_900_000
    want = reference(bpe, texts)
    table = pyarrow.table({'text': texts, 'other': list(range(5))})
    pyarrow.parquet.write_table(table, tmp_path / 'a.parquet')
    write_json_lines(tmp_path / 'd [1].jsonl', texts)
    (tmp_path / 'b.jsonl.gz').write_bytes(gzip.compress((tmp_path / 'd [1].jsonl').read_bytes(), 1))
    for files in ('a.parquet', 'b.jsonl.gz', 'd [1].jsonl', 'd ?1?.jsonl'):
        run('data/openwebtext/prepare.py', f'--files={files}')
        assert all(read(house, 'openwebtext', name).tolist() == want[name] for name in want), files


@pytest.mark.slow
def test_bad_documents(run, house, tmp_path, bpe):
    """One line says what is wrong, with file and row where a text is not Unicode; mistakes harm no data."""
    import pyarrow
    import pyarrow.parquet

    write_json_lines(tmp_path / 'good.jsonl', 'abc')
    run('data/openwebtext/prepare.py', '--files=good.jsonl')
    before = [read(house, 'openwebtext', name).tolist() for name in ('train', 'val')]
    for name, text, words in (
        ('two.jsonl', b'{"a": 1}\n{"a": 2}', 'two.jsonl, row 1: the field "text" is missing'),
        ('null.jsonl', b'{"text": "a"}\n{"text": null}', 'row 2: the field "text" is missing'),
        ('bad.jsonl', b'{"text": "a"}\n{"text', 'bad.jsonl, row 2'),
        ('x.csv', b'text', 'must all be .parquet'),
        ('x.txt', b'text', 'data/custom/prepare.py takes other texts'),
        ('one.jsonl', b'{"text": "a"}', 'data/custom/prepare.py can do that'),
        ('numbers.jsonl', b'{"text": 1}\n{"text": 2}', 'row 1: the field "text" is no text, but 1'),
        ('none.jsonl', b'', 'there are no rows'),
        ('a.txt.jsonl', b'{"a": 1}', 'the field "text" is missing'),
        ('cut.jsonl.gz', gzip.compress(b'{"text": "a"}\n' * 99)[:-9], 'cut.jsonl.gz: Truncated'),
        (
            'bad.jsonl.gz',
            gzip.compress(b'{"text": "a"}\n')[:10] + b'damaged' * 9,
            'bad.jsonl.gz: zlib inflate failed',
        ),
        ('lone.jsonl', b'{"text": "a"}\n{"text": "\\ud800"}', 'lone.jsonl, row 2'),
        ('latin.jsonl', b'{"text": "a"}\n\n{"text": "caf\xe9"}', 'latin.jsonl: byte 28, 0xe9'),
    ):
        (tmp_path / name).write_bytes(text)
        assert words in run('data/openwebtext/prepare.py', f'--files={name}', status=1)
    for wrong, words in (
        ('--files=*.tsv', 'no such text'),
        ('--files=*.jsonl*', 'jsonl, row '),
        ('--files=*.[jt][sx]*', 'files of several kinds'),
        ('--corpus=half', 'neither 10k nor full'),
        ('--num_workers=0', 'num_workers must be'),
    ):
        assert words in run('data/openwebtext/prepare.py', wrong, status=1)
    broken = pyarrow.array([b'fine', b'caf\xe9', b'fine'] * 20, pyarrow.binary())
    broken = pyarrow.StringArray.from_buffers(len(broken), broken.buffers()[1], broken.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({'text': broken}), tmp_path / 'broken.parquet')
    words = run('data/openwebtext/prepare.py', '--files=broken.parquet', status=1)
    assert 'broken.parquet, row 2' in words
    assert before == [read(house, 'openwebtext', name).tolist() for name in ('train', 'val')]


@pytest.mark.parametrize(
    'arguments, source',
    [
        pytest.param(['openwebtext', '--corpus=10k'], 'stas/openwebtext-10k', marks=pytest.mark.slow),
        pytest.param(['openwebtext', '--corpus=full'], 'Skylion007/openwebtext', marks=pytest.mark.slow),
        (['wikitext'], 'Salesforce/wikitext'),
    ],
)
def test_hub_out_of_reach(run, bpe, arguments, source):
    name, *arguments = arguments
    words = run(f'data/{name}/prepare.py', *arguments, status=1, env={'HF_HUB_OFFLINE': '1'})
    assert f'cannot download https://huggingface.co/datasets/{source}' in words
    assert 'then run this with --' in words


def test_documents_in_flight(tmp_path):
    """Whatever the corpus, no more lists of texts are held than keep the threads busy."""
    from data.common import PIECE, write_documents

    pulled, encoded, ahead, lock = 0, 0, [], threading.Lock()

    def parts():
        nonlocal pulled
        for i in range(300):
            pulled += 1
            ahead.append(pulled - encoded)
            yield str(i).ljust(PIECE - 1, 'x'), True
            yield None, True

    def encode(text):
        nonlocal encoded
        with lock:
            encoded += 1
        return [int(text.rstrip('x'))]

    tokenizer = SimpleNamespace(encode=encode, eot=999, vocab_size=1000, files=dict)
    val = [('7', True), (None, True)]
    write_documents(tmp_path, tokenizer, 2, train=parts(), val=val)
    assert max(ahead) <= 8
    assert np.fromfile(tmp_path / 'train.bin', '<u2').tolist() == [i for n in range(300) for i in (n, 999)]
    assert np.fromfile(tmp_path / 'val.bin', '<u2').tolist() == [7, 999]


@pytest.mark.slow
def test_killed_prepare(house, tmp_path, bpe, request):
    """Whenever prepare.py is killed, every .bin is whole, and a new val.bin never has an old train.bin with
    it. In the middle of writing the old data set is still there.
    """
    corpora = []
    for n in (0, 1):
        texts = [f'corpus {n}: ' + 'words and words ' * 300 + str(i) for i in range(1500)]
        write_json_lines(tmp_path / f'{n}.jsonl', texts)
        corpora.append({name: np.array(ids, '<u2').tobytes() for name, ids in reference(bpe, texts).items()})
    folder, chance, caught = house / 'data' / 'openwebtext', random.Random(0), 0

    def start(n):
        command = [sys.executable, str(folder / 'prepare.py'), f'--files={tmp_path / f"{n}.jsonl"}']
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(0).wait() == 0
    for kill in range(max(4, request.config.getoption('--kills') // 2)):
        process = start(1 - kill % 2)
        part = folder / 'new.part' / ('val.bin.part' if kill % 3 == 2 else 'train.bin.part')
        size = 0 if kill % 3 == 2 else chance.uniform(0, 0.9 * len(corpora[0]['train']))
        part.unlink(missing_ok=True)  # of the kill before
        while process.poll() is None and not (part.is_file() and part.stat().st_size >= size):
            time.sleep(0.001)
        time.sleep(chance.choice([0, 0.01, 0.1]))
        process.kill()
        process.wait()
        found = {
            name: (folder / f'{name}.bin').read_bytes()
            for name in ('train', 'val')
            if (folder / f'{name}.bin').is_file()
        }
        caught += part.is_file() and found in corpora
        assert all(body in [corpus[name] for corpus in corpora] for name, body in found.items())
        assert 'train' not in found or found in corpora
    assert caught >= 2  # in the middle of writing


POEM = '《静夜思》\r\n床前明月光，疑是地上霜。\r\n举头望明月，低头思故乡。🦊𠀀\n'


@pytest.mark.slow
def test_failed_training_harms_no_data(run, house, tmp_path, bpe, monkeypatch):
    """Until a new tokenizer is trained, nothing of an older data set is deleted."""
    import data.tokenizer

    (tmp_path / 'book.txt').write_text(POEM)
    wiki = tmp_path / 'wiki' / 'AA'
    wiki.mkdir(parents=True)
    (wiki / 'wiki_00').write_text('{"title": "a", "text": "b"}\n{"title": "c", "text": "d"}\n')

    def fail(texts, vocab_size):
        raise RuntimeError("no memory")

    for name, arguments in (
        ('custom', ['--input=book.txt', '--tokenizer=bpe']),
        ('wiki_zh', ['--input=wiki']),
    ):
        folder = house / 'data' / name
        run(f'data/{name}/prepare.py', *arguments, '--vocab_size=300')
        before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        assert {folder / file for file in ('train.bin', 'val.bin', 'tokenizer.json')} <= before.keys()
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='no memory'):
            patch.setattr(data.tokenizer, 'train_bpe', fail)
            patch.setattr(sys, 'argv', ['prepare.py', *arguments])
            patch.setattr(sys, 'path', [*sys.path])
            patch.chdir(tmp_path)
            runpy.run_path(str(folder / 'prepare.py'), run_name='__main__')
        assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


ARTICLES = [
    ('数学', '数学\n\n数学是研究数量、结构以及空间等概念的学科。'),
    ('狐狸', '🦊是一种动物。𠀀𪚥<|endoftext|>'),
    ('空', ''),
] * 70


@pytest.fixture
def wiki(tmp_path):
    """ARTICLES in two files as wiki_zh_2019 has them, one of them escaped; their folder is 'wiki'."""
    for n, part in enumerate((ARTICLES[:100], ARTICLES[100:])):
        folder = tmp_path / 'wiki' / ('AA', 'AB')[n]
        folder.mkdir(parents=True)
        rows = [{'id': '1', 'url': '', 'title': title, 'text': text} for title, text in part]
        lines = ''.join(json.dumps(row, ensure_ascii=n == 0) + '\n' for row in rows)
        (folder / 'wiki_00').write_text(lines, encoding='utf-8')


def test_wiki_zh(run, house, tmp_path, wiki):
    """Every article comes back whole, title on top, emoji and rare ideographs included."""
    import tokenizers

    run('data/wiki_zh/prepare.py', '--input=wiki', '--vocab_size=400')
    tokenizer = tokenizers.Tokenizer.from_file(str(house / 'data' / 'wiki_zh' / 'tokenizer.json'))
    end = tokenizer.token_to_id('<|endoftext|>')
    found = []
    for split in ('train', 'val'):
        ids = read(house, 'wiki_zh', split)
        parts = np.split(ids, np.flatnonzero(ids == end) + 1)[:-1]
        found += [tokenizer.decode(part.tolist()) for part in parts]
    want = [text if text.startswith(title) else f'{title}\n\n{text}' for title, text in ARTICLES]
    assert sorted(found) == sorted(want)
    assert 'unpack wiki2019zh.zip there' in run('data/wiki_zh/prepare.py', status=1)
    (tmp_path / 'wiki' / 'AB' / 'wiki_00').write_text('{"title": "a", "text": "b"}\n{"ti')
    words = run('data/wiki_zh/prepare.py', f'--input={tmp_path}/wiki', status=1)
    assert f'{tmp_path}/wiki/AB/wiki_00, row 2' in words


@pytest.mark.slow
def test_trained_tokenizers_in_training(run, tmp_path, wiki):
    """train.py takes the vocabulary of a trained tokenizer, and sample.py reads and writes with it."""
    small = [
        *MACHINE,
        '--n_layer=1',
        '--n_head=1',
        '--n_embd=8',
        '--block_size=8',
        '--batch_size=2',
        '--gradient_accumulation_steps=1',
        '--max_iters=1',
        '--eval_iters=1',
    ]
    sample = ['--num_samples=2', '--max_new_tokens=5', *MACHINE]
    (tmp_path / 'book.txt').write_bytes((POEM * 40).encode())
    run('data/custom/prepare.py', '--input=book.txt', '--tokenizer=bpe', '--vocab_size=300', '--name=mytext')
    # 300 rounded up to a multiple of 64
    assert 'vocabulary 320' in run('train.py', '--dataset=mytext', *small).stdout
    run('sample.py', '--start=明月<|endoftext|>', *sample)
    run('data/wiki_zh/prepare.py', '--input=wiki', '--vocab_size=400')
    run('train.py', 'config/train_wiki_zh.py', *small)
    run('sample.py', '--out_dir=out-wiki-zh', '--start=数学', *sample)


# code that writes a data set anew and is killed before its n-th change of the folder, for every n
KILLER = """
import os, pathlib, sys
import numpy as np
from data.common import write_bins
from data.tokenizer import char_tokenizer, train_bpe

def write(folder, tokenizer, train, val, files=None):
    pairs = [[(np.array(ids), np.ones(len(ids), dtype='u1'))] for ids in (train, val)]
    write_bins(folder, tokenizer, *pairs, files)

folder, bpe = pathlib.Path(sys.argv[1]), train_bpe(['abc'], 300)
template = {'template.txt': b'{a}'}
for n in range(1, 40):
    copy = folder / str(n)
    copy.mkdir()
    if sys.argv[2] == 'with masks':
        write(copy, char_tokenizer('abc'), [0, 1, 2], [1, 0, 0, 0], template)
    else:
        write(copy, char_tokenizer('abc'), [0, 1, 2], [1, 0, 0, 0])
    if os.fork() == 0:
        changes = []
        def kill(event, arguments):
            if event in ('os.rename', 'os.remove'):
                changes.append(event)
                if len(changes) == n:
                    os._exit(9)
        sys.addaudithook(kill)
        if sys.argv[2] == 'with masks':
            write(copy, bpe, [10, 20, 30, 40], [20, 10])
        else:
            write(copy, bpe, [10, 20, 30, 40], [20, 10], template)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.wait()[1]) == 0:
        break
"""


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='kills forks')
@pytest.mark.parametrize('old', ['without masks', pytest.param('with masks', marks=pytest.mark.slow)])
def test_killed_before_each_change(house, tmp_path, old):
    """Whenever write_bins is killed, a train.bin stands beside its own val.bin, tokenizer, masks and
    template: else a model would train on ids that mean other characters. And the old data set is whole, too:
    in its place or, once something new is there, beside it.
    """
    subprocess.run(
        [sys.executable, '-c', KILLER, tmp_path, old], cwd=house, check=True, stdout=subprocess.DEVNULL
    )
    masks = {'train.mask': 3, 'val.mask': 4, 'template.txt': 3}
    first = {'train.bin': 6, 'val.bin': 8}
    second = {'train.bin': 8, 'val.bin': 4}
    if old == 'with masks':
        first |= masks
    else:
        second |= {**masks, 'train.mask': 4, 'val.mask': 2}

    found = []
    for copy in sorted(tmp_path.iterdir(), key=lambda path: int(path.name)):
        sizes = {path.name: path.stat().st_size for path in copy.iterdir() if path.suffix != '.part'}
        kept = {name.removesuffix('.old') for name in sizes if name.endswith('.old')}
        found.append({name: size for name, size in sizes.items() if not name.endswith('.old')})
        assert kept >= {*first, 'meta.pkl'} or found[-1].items() >= first.items()
    tokenizers = [{name: state.pop(name, None) for name in ('meta.pkl', 'tokenizer.json')} for state in found]
    assert found[0] == first and found[-1] == second and len(found) >= 8
    for state, tokenizer in zip(found, tokenizers, strict=True):
        if 'train.bin' in state:
            assert state in (first, second)
            assert (tokenizer['meta.pkl'] is None) == (state == second)
            assert (tokenizer['tokenizer.json'] is None) == (state == first)


def pair(*ids):
    """Ids of which all count, as write_bins takes them."""
    return [(np.array(ids, dtype=np.int64), np.ones(len(ids), dtype=np.uint8))]


def test_old_data_is_kept(tmp_path, capsys):
    """What would change is set aside as a whole, in one line; the same data again changes nothing."""
    from data.common import write_bins
    from data.tokenizer import char_tokenizer

    def files():
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def write(*how):
        write_bins(tmp_path, char_tokenizer('abc'), *how)
        return [line for line in capsys.readouterr().out.splitlines() if 'kept as' in line]

    template = {'template.txt': b'{a}'}
    first = pair(0, 1, 2), pair(1, 2), template
    assert write(*first) == []
    before = files()
    assert write(*first) == [] and files() == before
    second = pair(0, 1, 1), pair(1, 2)
    names = ['train.bin', 'val.bin', 'train.mask', 'val.mask', 'template.txt', 'meta.pkl']
    kept = ', '.join(f'{name}.old' for name in names)
    assert write(*second) == [f'{tmp_path} had other data: kept as {kept}']
    assert {name: files()[f'{name}.old'] for name in names} == before
    assert files().keys() - {f'{name}.old' for name in names} == {'train.bin', 'val.bin', 'meta.pkl'}
    assert len(write(*first)) == 1 and before.items() <= files().items()
    assert (tmp_path / 'train.bin.old1').read_bytes() == bytes([0, 0, 1, 0, 1, 0])


def test_too_little_text(tmp_path, capsys):
    """An empty bin, or one in which nothing counts, is an error that harms nothing; a short one is said."""
    from data.common import write_bins
    from data.tokenizer import char_tokenizer

    tokenizer = char_tokenizer('abc')
    for train, val, files, words in (
        (pair(0, 1), [], {}, 'not enough text for val.bin: it would have 0 tokens'),
        (pair(0, 1), pair(1), {}, 'not enough text for val.bin: it would have 1 tokens'),
        (pair(0), pair(1, 2), {}, 'not enough text for train.bin'),
        ([(np.zeros(9), np.zeros(9, np.uint8))], pair(1, 2), {}, 'no token of train.bin would count'),
    ):
        with pytest.raises(SystemExit, match=words):
            write_bins(tmp_path, tokenizer, train, val, files)
    assert not list(tmp_path.iterdir())
    for count, is_short in ((1024, True), (1025, False)):
        capsys.readouterr()
        write_bins(tmp_path, tokenizer, pair(0, 1), pair(*[1] * count))
        assert ('data/custom/prepare.py takes a larger share' in capsys.readouterr().out) == is_short


def test_bins_appear_whole(tmp_path, monkeypatch):
    """A writer that fails leaves no new file, and an older data set as it was."""
    from data.common import atomic_write, write_bins, write_characters, write_documents
    from data.tokenizer import char_tokenizer

    with pytest.raises(RuntimeError):
        with atomic_write(tmp_path / 'x.bin') as f:
            f.write(b'half')
            raise RuntimeError
    assert not list(tmp_path.iterdir())
    tokenizer = char_tokenizer('abc')
    write_bins(tmp_path, tokenizer, pair(0, 1, 2), pair(1, 2))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert {path.name for path in before} == {'train.bin', 'val.bin', 'meta.pkl'}
    many = ''.join(map(chr, range(0x20000, 0x30001)))
    with pytest.raises(SystemExit, match='65537 different tokens are more than uint16 can count'):
        write_characters(tmp_path, many, many)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OverflowError):
        train = [([1], np.ones(1)), ([70000], np.ones(1))]  # no 16-bit id: fails after val.bin
        write_bins(tmp_path, tokenizer, train, pair(2, 2))
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(fd):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch, pytest.raises(OSError, match='No space left'):
        patch.setattr(os, 'fsync', full)  # as where the file system finds room only at the end
        write_bins(tmp_path, char_tokenizer('abcd'), pair(1, 3), pair(2, 2))
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}

    @contextmanager
    def full_disk(path):
        def write(content):
            raise OSError(28, 'No space left on device')

        yield SimpleNamespace(write=write)

    list(tqdm([0, 1], disable=False, file=io.StringIO()))  # it starts a thread of its own, once
    threads = threading.active_count()
    fake = SimpleNamespace(encode=lambda text: [1], eot=0, vocab_size=2, files=dict)
    monkeypatch.setattr('data.common.atomic_write', full_disk)
    with pytest.raises(OSError, match='No space left') as failure:  # `failure` keeps the frames alive
        write_documents(tmp_path, fake, 2, train=[('a', True)] * 9, val=[('b', True)] * 9)
    assert threading.active_count() == threads, failure


ARTICLE = ''.join(
    f' {line} \n' if line else ' \n'
    for line in (
        '',
        '= Valkyria <unk> III =',
        '',
        'Senjō no <unk> 3 : <unk> , " commonly referred " to as Teddy \'s game , is a role @-@ playing game '
        'of 1 @,@ 000 @.@ 5 points ( 32 ha ) ; was it ?',
        "The actors ' play , 1987 – 90 , cost $ 5 ! ( see [ 1 ] )",
        '',
        '= = Game <unk> = =',
        '',
        'A – B .',
    )
)
PROSE = '''
= Valkyria <unk> III =

Senjō no <unk> 3: <unk>, "commonly referred" to as Teddy's game, is a role-playing game of 1,000.5 points \
(32 ha); was it?
The actors' play, 1987–90, cost $5! (see [1])

== Game <unk> ==

A – B.
'''


@pytest.fixture
def wikitext(tmp_path):
    """Folders '{}.t' and 'wiki' with WikiText's files under both kinds of names; the texts."""
    texts = {'train': ARTICLE * 3, 'valid': ARTICLE, 'test': ARTICLE.replace('Teddy', 'Freddy') * 2}
    for layout in ('{}.txt', 'wiki.{}.raw'):
        folder = tmp_path / layout[:4]
        folder.mkdir()
        for name, text in texts.items():
            (folder / layout.format(name)).write_text(text, encoding='utf-8')
    return texts


def test_wikitext(run, house, tmp_path, bpe, wikitext):
    """Spaces that people do not write are gone, words are counted as they stood, each article is a document.
    test becomes val.bin, or valid.
    """
    words = len(ARTICLE.split()) + ARTICLE.count('\n')
    run('data/wikitext/prepare.py', f"--input={tmp_path / '{}.t'}")
    train, val = ('\n' + '\n<|endoftext|>'.join([PROSE[1:]] * n) + '<|endoftext|>' for n in (3, 2))
    assert decoded(bpe, house, 'wikitext') == [train, val.replace('Teddy', 'Freddy')]
    counts = json.loads((house / 'data' / 'wikitext' / 'words.json').read_text())
    assert counts == {'train': 3 * words, 'val': 2 * words}
    (tmp_path / 'wiki' / 'wiki.train.raw').unlink()  # the perplexity needs none
    run('data/wikitext/prepare.py', f"--input={tmp_path / 'wiki'}", '--split=valid')
    assert decoded(bpe, house, 'wikitext') == [val.replace('Teddy', 'Freddy'), PROSE + '<|endoftext|>']


@pytest.mark.slow
def test_wikitext_mistakes(run, house, tmp_path, bpe, wikitext):
    """A mistake is one line, and the bins before it stay whole. Line ends of Windows are fine."""
    for arguments, says in (
        (['--split=dev'], "split 'dev' is neither test nor valid"),
        (['--corpus=3'], "corpus '3' is none of wikitext-2-raw-v1, wikitext-2-v1"),
        ([f'--input={tmp_path}'], 'no train.txt or valid.txt in there, nor wiki.tr'),
        (['--num_workers=0'], 'num_workers must be at least 1'),
    ):
        assert says in run('data/wikitext/prepare.py', *arguments, status=1)
    test, folder = tmp_path / 'wiki' / 'wiki.test.raw', f"--input={tmp_path / 'wiki'}"
    (tmp_path / 'wiki' / 'wiki.train.raw').unlink()
    test.write_bytes(wikitext['test'].replace('\n', '\r\n').encode())
    run('data/wikitext/prepare.py', folder)
    train, val = decoded(bpe, house, 'wikitext')
    assert train == PROSE + '<|endoftext|>' and val.count('<|endoftext|>') == 2
    test.write_text('')
    assert 'an empty text' in run('data/wikitext/prepare.py', folder, status=1)
    test.write_bytes(b' = \xff = \n')
    assert 'wiki.test.raw: not UTF-8' in run('data/wikitext/prepare.py', folder, status=1)
    assert decoded(bpe, house, 'wikitext')[1].count('Freddy') == 2
    assert (house / 'data' / 'wikitext' / 'words.json').is_file()


@pytest.mark.slow
def test_wikitext_2(run, house, bpe):
    """The published numbers of words, and a text that differs from the original only in spaces and @."""
    folder = os.environ.get('WIKITEXT')
    if not folder:
        pytest.skip("needs WikiText-2: WIKITEXT=…, a folder with valid.txt and test.txt")
    out = run('data/wikitext/prepare.py', f'--input={folder}').stdout
    assert 'words: 217,646 in train.bin, 245,569 in val.bin' in out
    for split, text in zip(('valid', 'test'), decoded(bpe, house, 'wikitext'), strict=True):
        original = open(os.path.join(folder, f'{split}.txt'), encoding='utf-8').read()
        ours = text.replace('<|endoftext|>', '')
        squeezed = [re.sub(r'\s', '', re.sub(r' @(.)@ ', r'\1', text)) for text in (original, ours)]
        assert squeezed[0] == squeezed[1] and ours.count('\n') == original.count('\n')
        assert len(ours) < 0.97 * len(original)


def test_padding_and_truncation():
    """A tokenizer.json may ask for both, as those of other models do: neither touches a text."""
    from data.tokenizer import Tokenizer

    spec = bpe_file()
    spec['padding'] = {
        'strategy': {'Fixed': 1000},
        'direction': 'Right',
        'pad_to_multiple_of': None,
        'pad_id': 0,
        'pad_type_id': 0,
        'pad_token': '<|endoftext|>',
    }
    spec['truncation'] = {'direction': 'Right', 'max_length': 2, 'strategy': 'LongestFirst', 'stride': 0}
    tokenizer = Tokenizer({'kind': 'bpe', 'json': json.dumps(spec)})
    assert tokenizer.decode(tokenizer.encode('the quick')) == 'the quick'


def test_console_without_the_alphabet(run, house, tmp_path):
    """A console that cannot print some characters gets '?' for them, and the data set is whole."""
    (tmp_path / 'book.txt').write_text('床前明月光，疑是地上霜。' * 99, encoding='utf-8')
    how = ['--input=book.txt', '--name=moon']
    out = run('data/custom/prepare.py', *how, env={'PYTHONIOENCODING': 'ascii'}, real=True).stdout
    assert '1,188 characters, 12 different: ' in out and '?' in out
    assert len(np.fromfile(house / 'data' / 'moon' / 'train.bin', '<u2')) == 1069


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='a disk that is always full')
@pytest.mark.parametrize('how', ['full', 'nobody reads', 'full of data'])
def test_output_that_fails(run, start, house, tmp_path, how):
    """One line, and the data set from before is as it was, whether the terminal's output or the data finds
    no place. It was deleted before anything was written.
    """
    folder = house / 'data' / 'fails'
    (tmp_path / 'book.txt').write_text('床前明月光' * 2000, encoding='utf-8')
    arguments = ['--input=book.txt', '--name=fails']
    run('data/custom/prepare.py', *arguments)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / 'book.txt').write_text('疑是地上霜' * 2000, encoding='utf-8')
    if how == 'full of data':
        words = run('data/custom/prepare.py', *arguments, status=1, file_size=3000)
        assert words == f'{folder}/new.part/train.bin: File too large\n'
    else:
        errors = tmp_path / 'errors'
        errors.write_text('')
        stdout = '/dev/full' if how == 'full' else None
        process = start(
            *arguments,
            script='data/custom/prepare.py',
            stdout=stdout,
            stderr=errors,
            real=True,
            env={'PYTHONUNBUFFERED': ''},
        )
        process.stdout.close()
        assert process.wait() == 1
        full = 'stdout: No space left on device; make room and run it again\n'
        nobody_reads = 'interrupted: the data is not complete\n'
        assert errors.read_text() == (full if how == 'full' else nobody_reads)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_many_workers(run, house, tmp_path, bpe):
    """No more lists of texts are in flight than 256 threads need."""
    write_json_lines(tmp_path / 'mine.jsonl', ['a', 'b', 'c'])
    run('data/openwebtext/prepare.py', '--files=mine.jsonl', f'--num_workers={2**63 - 1}')
    assert len(read(house, 'openwebtext', 'train')) > 2


def test_part_that_is_a_second_name(tmp_path):
    """A kill inside `link` may leave NAME.part as a second name of a good file, which stays whole."""
    from data.common import atomic_write

    (tmp_path / 'good').write_text('good')
    os.link(tmp_path / 'good', tmp_path / 'new.part')
    with atomic_write(tmp_path / 'new') as f:
        f.write(b'new')
    assert (tmp_path / 'good').read_text() == 'good' and (tmp_path / 'new').read_text() == 'new'
