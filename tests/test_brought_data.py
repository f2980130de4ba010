"""What people bring as data: a meta.pkl of any kind, bins in other formats, ids that are no text."""

import collections
import datetime
import gzip
import io
import os
import pathlib
import pickle
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import MACHINE, ROOT, SMALL, TEXT

from data.common import check_bin
from data.tokenizer import Tokenizer, UserError, char_tokenizer, read_tokenizer_spec, same_texts

ALPHABET = sorted(set(TEXT))
STOI = {c: i for i, c in enumerate(ALPHABET)}
ITOS = dict(enumerate(ALPHABET))
SIZE = len(ALPHABET)
FROM_ONE = {c: i + 1 for c, i in STOI.items()}
BYTES = {bytes([i]): i for i in range(256)}


class Vocabulary(dict):
    """A dict of a user's own module, with attributes."""

    def __init__(self, items, title):
        super().__init__(items)
        self.title = title


class Own:
    """Any other object of a user's own module."""

    def __init__(self):
        self.values = [1, 2]

    def __setstate__(self, state):
        raise AssertionError("this was executed")


def encode(text):
    return [STOI[c] for c in text]


def meta(vocab_size=SIZE, stoi=STOI, itos=ITOS, **others):
    return {'vocab_size': vocab_size, 'stoi': stoi, 'itos': itos, **others}


def inverse(table):
    return {value: key for key, value in table.items()}


def spec_of(folder, content, protocol=None):
    """The spec of a meta.pkl, which a checkpoint keeps as it is."""
    if not isinstance(content, bytes):
        content = pickle.dumps(content, protocol)
    (folder / 'meta.pkl').write_bytes(content)
    spec = read_tokenizer_spec(folder)
    file = io.BytesIO()
    torch.save(spec, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == spec
    return spec


numpy_tables = {
    'stoi': {np.str_(c): np.int64(i) for c, i in STOI.items()},
    'itos': {np.int32(i): np.str_(c) for i, c in ITOS.items()},
}
extras = {
    'encode': encode,
    'time': datetime.datetime(2024, 1, 1),
    'path': pathlib.PurePosixPath('a/b'),
    'pattern': re.compile('a'),
    'tensor': torch.ones(2),
    'masked': np.ma.masked_array([1, 2], [True, False]),
    'record': np.zeros(2, dtype=[('a', 'i4'), ('b', 'O')]),
    'moment': np.datetime64('2024-01-01'),
    'generator': np.random.default_rng(0),
    'matrix': np.eye(2).view(np.matrix),
    'own': Own(),
    'chars': set(ALPHABET),
    'counts': collections.Counter(TEXT),
    'kind': np.uint16,
    'complex': 1j,
    'frozen': {frozenset('ab'): Own()},
}


@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize(
    'content',
    [
        meta(),
        meta(vocab_size=np.int64(SIZE)),
        meta(vocab_size=np.uint16(SIZE)),
        meta(**numpy_tables),
        meta(itos=ALPHABET),
        meta(itos=''.join(ALPHABET)),
        meta(itos=tuple(ALPHABET)),
        meta(stoi=collections.OrderedDict(STOI), itos=collections.OrderedDict(ITOS)),
        meta(stoi=collections.defaultdict(int, STOI), itos=collections.defaultdict(Own, ITOS)),
        meta(stoi=collections.Counter(STOI)),
        meta(stoi={**STOI, 'Q': 0}),
        meta(stoi={c: float(i) for c, i in STOI.items()}),
        meta(itos={str(i): c for i, c in ITOS.items()}),
        meta(extra=extras, **extras),
        collections.OrderedDict(meta()),
        {'stoi': STOI, 'itos': ITOS},
    ],
)
def test_alphabets(tmp_path, content, protocol):
    """Harmless types of every protocol are read as the plain dicts that they stand for."""
    spec = spec_of(tmp_path, content, protocol)
    assert spec == {'kind': 'char', 'vocab_size': SIZE, 'stoi': spec['stoi'], 'itos': ITOS}
    assert type(spec['vocab_size']) is int and {type(i) for i in spec['stoi'].values()} == {int}
    tokenizer = Tokenizer(spec)
    assert tokenizer.encode(TEXT[:99]) == encode(TEXT[:99])
    assert tokenizer.decode(encode(TEXT[:99])) == TEXT[:99]


def test_dict_of_its_own(tmp_path):
    """A class of the user's own that is a dict: its items are kept, its state is not."""
    stoi = Vocabulary(STOI, 'characters')
    assert spec_of(tmp_path, meta(stoi=stoi)) == spec_of(tmp_path, meta())
    # in the pickle its items come one by one, and it has a state
    assert b'characters' in pickle.dumps(stoi)


@pytest.mark.parametrize('protocol', range(6))
def test_ids_from_one(tmp_path, protocol):
    """0 has no text; a size that leaves no room for the last id is corrected, as nanoGPT would only crash."""
    for size in (SIZE, SIZE + 1):
        spec = spec_of(tmp_path, meta(size, FROM_ONE, inverse(FROM_ONE)), protocol)
        tokenizer = Tokenizer(spec)
        assert spec['vocab_size'] == tokenizer.vocab_size == SIZE + 1
        assert tokenizer.encode('the fox') == [FROM_ONE[c] for c in 'the fox']
        assert tokenizer.decode([0, *tokenizer.encode('the fox')]) == 'the fox'
    exported = tokenizer.for_transformers()
    assert exported.encode('the fox').ids == tokenizer.encode('the fox')
    with pytest.raises(Exception, match='UNK'):  # and not the id that has no text
        exported.encode('the Q')
    assert spec_of(tmp_path, meta(99))['vocab_size'] == 99
    assert Tokenizer(spec_of(tmp_path, meta(99))).vocab_size == SIZE


@pytest.mark.parametrize('protocol', range(6))
def test_tokens_of_bytes(tmp_path, protocol):
    """Bytes are decoded together, half a character as a replacement, and the file comes back."""
    merged = {**BYTES, 'é'.encode(): 256, b'the ': 257, b'<|endoftext|>': 258}
    for stoi in (BYTES, merged):
        spec = spec_of(tmp_path, meta(len(stoi), stoi, inverse(stoi)), protocol)
        tokenizer = Tokenizer(spec)
        for text in ('the café 数\n', 'the ', '', '🦊'):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode([*'数'.encode()][:2]) == '\ufffd'
        (tmp_path / 'meta.pkl').write_bytes(tokenizer.files()['meta.pkl'])
        assert read_tokenizer_spec(tmp_path) == spec
    assert tokenizer.encode('the <|endoftext|>é') == [257, 258, 256] and tokenizer.eot == 258
    ordinary = Tokenizer(spec, ordinary=True).encode('数é<|').tolist()
    assert ordinary == [*'数'.encode(), 256, *b'<|']


hugging_face = {'Ġthe': 0, 'Ġfox': 1, 'é': 2}, {0: ' the', 1: ' fox', 2: '\ufffd'}


@pytest.mark.parametrize(
    'content, size',
    [
        ({'vocab_size': 90}, 90),
        ({'vocab_size': np.int32(65536)}, 65536),
        ({'vocab_size': 90, 'own': Own()}, 90),
        ({'stoi': STOI}, SIZE),
        ({'itos': ITOS, 'stoi': None}, SIZE),
        ({'stoi': {'e2e4': 7, 'e7e5': 9}}, 10),
        (meta(3, *hugging_face), 3),
        (meta(3, {'a': 0, 'b': 1, 'c': 2}, {0: 'b', 1: 'a', 2: 'c'}), 3),
        (meta(3, {0: 0, 1: 1}, {0: 0, 1: 1}), 3),
        (meta(3, {'a': 0, b'b': 1}, {0: 'a', 1: b'b'}), 3),
        (meta(3, {(1, 2): 0}, {0: (1, 2)}), 3),
        (meta(3, {'a': 'x'}, {'x': 'a'}), 3),
        (meta(3, {}, {}), 3),
        (meta(3, [], 'abc'), 3),
        (meta(3, {'a': 0}, {0: 'a', 10**9: 'b'}), 3),
        (meta(3, {'a': 0}, {0: 'a', -1: 'b'}), 3),
        (meta(3, Own(), encode), 3),
        (meta(itos=np.array(ALPHABET)), SIZE),
        (meta(3, {'a': torch.tensor(0)}, {0: 'a'}), 3),
        (meta(3, {Own: 0}, {0: Own}), 3),
    ],
)
def test_ids(tmp_path, content, size):
    """Where stoi and itos are missing or do not fit, training needs no more than the size, and sampling says
    why it has no text.
    """
    for protocol in (0, 2, 5):
        spec = spec_of(tmp_path, content, protocol)
        has_tables = 'stoi' in content or 'itos' in content
        assert spec.keys() - {'problem'} == {'kind', 'vocab_size'} and spec['vocab_size'] == size
        assert ('problem' in spec) == has_tables
        if has_tables:
            assert re.fullmatch('stoi and itos of meta.pkl do not make an alphabet .*', spec['problem'])
    tokenizer = Tokenizer(spec)
    assert tokenizer.kind == 'ids' and tokenizer.eot is None and tokenizer.bos == 0
    assert tokenizer.decode([1, 12]) == '1 12' and tokenizer.decode([]) == '' and tokenizer.encode('') == []
    assert pickle.loads(tokenizer.files()['meta.pkl']) == {'vocab_size': size}
    with pytest.raises(UserError, match='--start="ids:12 7 99"'):
        tokenizer.encode('e2e4')
    with pytest.raises(UserError, match='transformers'):
        tokenizer.for_transformers()
    assert same_texts(spec, dict(spec)) and not same_texts(spec, char_tokenizer('abc').spec)


@pytest.mark.parametrize(
    'content, words',
    [
        ([1, 2], 'it holds no dict'),
        (Own(), 'vocab_size is 0'),
        (np.int64, 'it holds no dict'),
        (encode, 'it holds no dict'),
        ({}, 'vocab_size is 0'),
        (meta('3'), "vocab_size is '3'"),
        (meta(-5), 'vocab_size is -5'),
        (meta(0), 'vocab_size is 0'),
        (meta(10**12), 'vocab_size is 1000000000000'),
        (meta(3.0), 'vocab_size is 3.0'),
        (meta(np.float32(3)), 'vocab_size is 3.0'),
        (meta(True), 'vocab_size is True'),
        (meta(None), 'vocab_size is None'),
        (pickle.dumps(meta())[:-9], ''),
        (b'', 'EOFError'),
        (b'\x80\x04garbage', 'UnpicklingError'),
    ],
)
def test_refused_meta(tmp_path, content, words):
    with pytest.raises(UserError, match='cannot read .*meta.pkl .*' + re.escape(words)) as error:
        spec_of(tmp_path, content)
    assert '\n' not in str(error.value)


class Call:
    """Something that is made by calling a function when it is unpickled."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments, state)

    def __reduce__(self):
        return self.call


def test_nothing_is_executed(tmp_path):
    """Neither what a file asks for nor its states, while what it has beside them is read."""
    target = tmp_path / 'executed'
    touch = f'touch {target}'
    write = f'open({str(target)!r}, "w")'
    bombs = [
        Call(os.system, touch),
        Call(eval, write),
        Call(exec, write),
        Call(open, str(target), 'w'),
        Call(pathlib.Path.touch, target),
        Call(subprocess.getoutput, touch),
        Call(getattr, os, 'system'),
        Call(__import__, 'this'),
        Call(getattr, Call(__import__, 'os'), 'system'),
        Own(),
        Call(collections.defaultdict, Call(os.system, touch)),
        Call(collections.OrderedDict, Call(os.system, touch)),
        Call(map, eval, [write]),
    ]
    bombs = [bomb for bomb in bombs if not (isinstance(bomb, Call) and bomb.call[1][:1] == (os,))]
    for bomb in bombs:
        for protocol in range(6):
            assert spec_of(tmp_path, meta(extra=bomb), protocol)['stoi'] == STOI
            assert (
                spec_of(tmp_path, {'vocab_size': 3, 'stoi': bomb, 'itos': bomb}, protocol)['vocab_size'] == 3
            )
            for content in (bomb, {'vocab_size': bomb}):
                with pytest.raises(UserError, match='cannot read'):
                    spec_of(tmp_path, content, protocol)
    # each way of calling that a pickle has; the result is what the whole file is
    for program in (
        b'cos\nsystem\n(S"%b"\ntR.',
        b'cposix\nsystem\n(S"%b"\ntR.',
        b'cbuiltins\neval\n(S"__import__(\'os\').system(\'%b\')"\ntR.',
        b'(S"%b"\nios\nsystem\n.',
        b'(cos\nsystem\nS"%b"\no.',
        b'\x80\x02cos\nsystem\n(S"%b"\nt\x81.',
        b'\x80\x04S"os"\nS"system"\n\x93(S"%b"\ntR.',
        b'\x80\x04S"os"\nS"system"\n\x93)\x81}S"a"\nS"%b"\nsb.',
    ):
        with pytest.raises(UserError, match='cannot read'):
            spec_of(tmp_path, program % touch.encode())
    assert not target.exists()


def test_states_change_no_class(tmp_path):
    """A state that is set on a class or function itself, not on an object: it would last in this process."""
    state = b'(N}S"marked"\nS"x"\nst'
    for name in (b'os\nsystem', b'collections\nCounter', b'numpy\ndtype', b'builtins\ndict', b'any\nthing'):
        with pytest.raises(UserError, match='cannot read'):
            spec_of(tmp_path, b'\x80\x02c' + name + b'\n' + state + b'b.')
    assert not any(hasattr(thing, 'marked') for thing in (os.system, collections.Counter, np.dtype, dict))
    assert spec_of(tmp_path, meta(**numpy_tables)) == spec_of(tmp_path, meta())

    # numpy's own dtype takes a state by which an array of objects is read from bytes, as addresses
    array = np.array([None, None], dtype=object)
    array.__reduce__()
    forged = Call(np.dtype, 'O8', False, True, state=(3, '|', None, None, None, -1, -1, 0))
    content = Call(array.__reduce__()[0], np.ndarray, (0,), b'b', state=(1, (2,), forged, False, b'A' * 16))
    assert 'problem' in spec_of(tmp_path, meta(stoi=content))


# -----------------------------------------------------------------------------
# Bins


CHARACTERS = np.array(encode(TEXT))  # 4,686 ids below 40
LARGE = np.random.default_rng(0).zipf(1.2, 20_000) % 50257  # as of GPT-2
UTF8 = '今天天气很好, we go — ' * 300


def saved(function, *arguments):
    file = io.BytesIO()
    function(file, *arguments)
    return file.getvalue()


def shard(ids, magic, dtype):
    header = np.zeros(256, '<i4')
    header[:3] = magic, 1, len(ids)
    return header.tobytes() + ids.astype(dtype).tobytes()


def parquet():
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({'text': [TEXT[:1000], TEXT[1000:2000], TEXT[2000:3000]]})
    return saved(lambda file: parquet.write_table(table, file))


def zstd(content):
    import pyarrow

    return pyarrow.compress(content, 'zstd', asbytes=True)


U2 = LARGE.astype('<u2').tobytes()
FOREIGN = {
    'int64': (CHARACTERS.astype('<i8').tobytes(), SIZE, '64-bit ids', CHARACTERS),
    'uint64, large': (LARGE.astype('<u8').tobytes(), 50304, '64-bit ids', LARGE),
    'int64, from 1': ((1 + CHARACTERS).astype('<i8').tobytes(), SIZE + 1, '64-bit ids', 1 + CHARACTERS),
    'uint32': (CHARACTERS.astype('<u4').tobytes(), SIZE, '32-bit ids', CHARACTERS),
    'int32, large': (LARGE.astype('<i4').tobytes(), 50304, '32-bit ids', LARGE),
    'int32, bytes': (
        np.frombuffer(TEXT.encode(), 'u1').astype('<i4').tobytes(),
        256,
        '32-bit ids',
        [*TEXT.encode()],
    ),
    'int32, few': (CHARACTERS[:60].astype('<i4').tobytes(), 50304, '32-bit ids', CHARACTERS[:60]),
    'big-endian': (CHARACTERS.astype('>u2').tobytes(), SIZE, 'big-endian ids', CHARACTERS),
    'big-endian, no meta.pkl': (CHARACTERS.astype('>u2').tobytes(), 50304, 'big-endian ids', CHARACTERS),
    'uint8': (CHARACTERS.astype('u1').tobytes(), SIZE, '8-bit ids', CHARACTERS),
    'uint8, odd': (CHARACTERS[:4685].astype('u1').tobytes(), SIZE, '8-bit ids', CHARACTERS[:4685]),
    'uint8, bytes': (TEXT.encode(), 256, '8-bit ids', [*TEXT.encode()]),
    'uint8, no meta.pkl': (CHARACTERS.astype('u1').tobytes(), 50304, '8-bit ids', CHARACTERS),
    'uint8, two ids': ((CHARACTERS % 2).astype('u1').tobytes(), 2, '8-bit ids', CHARACTERS % 2),
    'llm.c': (shard(LARGE, 20240520, '<u2'), 50304, "uint16 ids behind llm.c's header", LARGE),
    'llm.c, Llama': (shard(LARGE, 20240801, '<u4'), 50304, "uint32 ids behind llm.c's header", LARGE),
    'npy': (saved(np.save, CHARACTERS), SIZE, 'a .npy file', CHARACTERS),
    'npy, (n, 2)': (saved(np.save, CHARACTERS.reshape(-1, 2)), SIZE, 'a .npy file', CHARACTERS),
}
OTHERS = {
    'npz': (saved(np.savez, CHARACTERS), 'a zip archive, as numpy.savez and torch.save write it'),
    'torch': (saved(lambda file: torch.save(torch.ones(3), file)), 'a zip archive'),
    'gzip': (gzip.compress(U2), 'a file of gzip'),
    'zstd': (zstd(U2), 'a file of zstd'),
    'parquet': (parquet(), 'a parquet file'),
    'pickle 5': (pickle.dumps(CHARACTERS.tolist(), 5), 'a pickle'),
    'pickle 4': (pickle.dumps(CHARACTERS, 4), 'a pickle'),
}
PREPARE = f'python {shlex.quote(str(ROOT / "data/custom/prepare.py"))}'


def pasted(command, folder='.'):
    """Runs a command as a user's shell would, where `python` is this Python."""
    script = f'python() {{ {sys.executable} "$@"; }}; {command}'
    return subprocess.run(['bash', '-c', script], capture_output=True, text=True, cwd=folder)


def command_for(path, vocab_size=50304, prepare=PREPARE):
    """The command that check_bin prints."""
    with pytest.raises(UserError) as error:
        check_bin(path, vocab_size, prepare)
    return re.search('run `(.*)`(, or if every second|$)', str(error.value))[1]


@pytest.mark.parametrize('name', FOREIGN)
def test_foreign_bins(tmp_path, name):
    """Each is named, with a command that makes a .bin of it that is let pass and has the same ids."""
    content, vocab_size, what, ids = FOREIGN[name]
    path = tmp_path / "it's a folder" / 'train.bin'
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        check_bin(path, vocab_size, PREPARE)
    assert str(error.value).startswith(f'{path} looks like {what}') and '\n' not in str(error.value)
    assert path.read_bytes() == content

    pathlib.Path(f'{path}.part').write_bytes(b'half of it, from a kill')
    done = pasted(command_for(path, vocab_size))
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.fromfile(path, '<u2'), ids)
    assert sorted(file.name for file in path.parent.iterdir()) == ['train.bin', 'train.bin.original']
    assert path.with_suffix('.bin.original').read_bytes() == content
    check_bin(path, vocab_size, PREPARE)


@pytest.mark.parametrize('name', OTHERS)
def test_bins_without_a_command(tmp_path, name):
    content, what = OTHERS[name]
    (tmp_path / 'train.bin').write_bytes(content)
    with pytest.raises(UserError, match=f'looks like {what}.*, not uint16 ids: write its ids there by numpy'):
        check_bin(tmp_path / 'train.bin', 50304, PREPARE)


def test_conversion_of_ids_that_do_not_fit(tmp_path):
    """They may stand behind the first megabyte: the command stops, and the file stays."""
    path = tmp_path / 'train.bin'
    for content in (
        saved(np.save, np.append(LARGE, 70_000)),
        saved(np.save, np.append(LARGE, -1)),
        shard(np.append(LARGE, 128_000), 20240801, '<u4'),
        (LARGE * 2).astype('<u4').tobytes(),
        (LARGE * 2).astype('<i8').tobytes(),
    ):
        path.write_bytes(content)
        done = pasted(command_for(path))
        assert (done.returncode, done.stderr) == (1, 'ids beyond 65,535 do not fit uint16\n')
        assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('text', [TEXT, UTF8], ids=['English', 'Chinese'])
def test_text_as_a_bin(house, tmp_path, text):
    """data/custom/prepare.py makes ids of it, and keeps the text as .old."""
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    path = folder / 'train.bin'
    path.write_text(text, encoding='utf-8')
    with pytest.raises(UserError) as error:
        check_bin(path, 50304, PREPARE)
    assert str(error.value).startswith(f'{path} looks like text, not uint16 ids: run `python ')
    done = pasted(command_for(path, prepare=f'{PREPARE} {shlex.quote(f"--name={folder}")}'))
    assert done.returncode == 0, done.stderr
    check_bin(path, 50304, PREPARE)
    ids = np.fromfile(path, '<u2').tolist()
    assert Tokenizer(read_tokenizer_spec(folder)).decode(ids)[:500] == text[:500]
    assert (folder / 'train.bin.old').read_text(encoding='utf-8') == text


chance = np.random.default_rng(0)
SOUND = {
    'characters': (CHARACTERS, SIZE),
    'characters, no meta.pkl': (CHARACTERS, 50304),
    'as of GPT-2': (LARGE, 50304),
    'all ids of GPT-2': (np.arange(50257), 50304),
    'bytes': (np.frombuffer(TEXT.encode(), 'u1'), 256),
    'bytes, no meta.pkl': (np.frombuffer(TEXT.encode(), 'u1'), 50304),
    'one id': (np.zeros(5000), 1),
    'all zeros': (np.zeros(600_000), 50304),
    'one large id': (np.full(5000, 50000), 50304),
    'one id of two equal bytes': (np.full(5000, 0x2020), 50304),
    'two ids': (chance.integers(2, size=5000), 2),
    'two ids in turn': (np.arange(5000) % 2, 2),
    'two ids in turn, the other first': (1 - np.arange(5000) % 2, 2),
    'many zeros': (np.where(chance.random(50_000) < 0.05, chance.integers(300, size=50_000), 0), 300),
    'nearly all zeros': (np.append(np.zeros(50_000), [7]), 50304),
    'a digit on each line': (np.stack([chance.integers(1, 11, 5000), np.zeros(5000)], axis=1).ravel(), 11),
    'DNA': (chance.integers(4, size=5000), 4),
    'all of uint16': (chance.integers(65536, size=50_000), 65536),
    'ids of another tokenizer': (LARGE, 256),
    'a small BPE': (LARGE % 512, 512),
    'three tokens': ([1, 0, 0], 5),
    'no token': ([], 5),
}


def test_every_second_id_is_zero(tmp_path):
    """It looks like 32-bit ids. The way past is what the line says: one id more in front."""
    path = tmp_path / 'train.bin'
    notes = chance.choice([0, 36, 38, 42], 20_000)
    ids = np.stack([notes, np.zeros_like(notes)], axis=1).ravel().astype('<u2')
    ids.tofile(path)
    with pytest.raises(UserError, match='32-bit ids, .* meant to be 0, put one id more in front, to say so$'):
        check_bin(path, 47, PREPARE)
    np.append(np.uint16(0), ids).tofile(path)
    check_bin(path, 47, PREPARE)


@pytest.mark.parametrize('name', SOUND)
def test_no_false_alarm(tmp_path, name):
    ids, vocab_size = SOUND[name]
    for count in (10**9, 1000, 100, 31):
        np.array(ids[:count]).astype('<u2').tofile(tmp_path / 'train.bin')
        check_bin(tmp_path / 'train.bin', vocab_size, PREPARE)


def test_no_false_alarm_by_gpt2(tmp_path, bpe, with_text):
    """Tiny Shakespeare and Python, from every token on: no beginning looks like another format's."""
    for text in (with_text[:200_000], (ROOT / 'train.py').read_text(encoding='utf-8')):
        ids = np.array(bpe.encode_ordinary(text), dtype='<u2')
        for start in range(0, len(ids), 97):
            ids[start : start + 2000].tofile(tmp_path / 'train.bin')
            check_bin(tmp_path / 'train.bin', 50304, PREPARE)


# -----------------------------------------------------------------------------
# The scripts


def data_set(house, name, content, ids, dtype='<u2'):
    folder = house / 'data' / name
    folder.mkdir()
    for split in ('train', 'val'):
        np.array(ids).astype(dtype).tofile(folder / f'{split}.bin')
    if content is not None:
        (folder / 'meta.pkl').write_bytes(pickle.dumps(content))
    return folder


def test_train_and_sample_ids(run, house, tmp_path):
    """Own ids: texts while it trains are ids, prompts are ids, and why is said where there is a reason."""
    data_set(house, 'chess', meta(90, *hugging_face, own=Own()), np.arange(600) % 90)
    out = run('train.py', *SMALL, '--dataset=chess', '--sample_tokens=5').stdout
    assert 'vocabulary 90;' in out and len(re.findall(r'^  \d+( \d+){4}$', out, re.M)) == 2
    assert out.count('samples are ids: stoi and itos of meta.pkl do not make an alphabet') == 1

    how = [*MACHINE, '--num_samples=1', '--max_new_tokens=4', '--temperature=0']
    done = run('sample.py', *how, '--start=ids:12, 7 89')
    assert re.fullmatch(r'12 7 89( \d+){4}\n---------------\n', done.stdout)
    assert 'ids instead of a text: stoi and itos of meta.pkl do not make an alphabet' in done.stderr
    for start, words in (
        ('ids:12 90', '--start=ids:12 90: 90 is no id from 0 to 89\n'),
        ('ids:', '--start=ids:: nothing is no id from 0 to 89'),
    ):
        assert words in run('sample.py', *how, f'--start={start}', status=1)


def test_start_of_ids_for_text(run, house, monkeypatch):
    """Ids as a prompt are those of the text, for a model of characters."""
    run('train.py', *SMALL, '--dataset=tiny')
    how = [*MACHINE, '--num_samples=1', '--max_new_tokens=9']
    texts = [
        run('sample.py', *how, f'--start={start}').stdout
        for start in ('the', 'ids:' + ' '.join(map(str, encode('the'))))
    ]
    assert texts[0] == texts[1] and texts[0].startswith('the')


def test_bins_are_looked_at(run, house, tmp_path):
    """By train.py, both, before a step. Where ids without a meta.pkl are small, a line says what to do."""
    for split in ('train', 'val'):
        folder = data_set(house, f'wide-{split}', meta(), CHARACTERS)
        CHARACTERS.astype('<i8').tofile(folder / f'{split}.bin')
        error = run('train.py', *SMALL, f'--dataset=wide-{split}', status=1)
        assert error.startswith(
            f'{folder}/{split}.bin looks like 64-bit ids, not uint16 ids: run `python -c '
        )
    assert not (tmp_path / 'out' / 'ckpt.pt').exists()

    folder = data_set(house, 'moves', None, np.arange(12_000) % 77)
    out = run('train.py', *SMALL, '--dataset=moves', '--max_iters=1').stdout
    assert "\nwithout a meta.pkl these ids are GPT-2's, but the first end at 76: if they are others, " in out
