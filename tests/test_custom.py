"""data/custom/prepare.py: texts, rows and conversations, what it makes of them and what it says."""

import codecs
import csv
import gzip
import json
import math
import pickle
import random
import re
import shlex
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

POEM = '《静夜思》\r\n床前明月光，疑是地上霜。\r\n举头望明月，低头思故乡。🦊𠀀\n'
EOT = '<|endoftext|>'
QUESTIONS = [{'question': f' what is {n}+1? ', 'answer': f'{n + 1}\n'} for n in range(40)]
TEMPLATE = 'Question: {question}\nAnswer: {answer}'


@pytest.fixture
def prepare(run, house):
    """prepare('--key=value', …): runs it for data/mytext; returns what it prints."""

    def prepare(*arguments, name='mytext', **how):
        out = run('data/custom/prepare.py', *arguments, f'--name={name}', **how)
        return out if how else out.stdout

    return prepare


def bins(house, name='mytext'):
    return [np.fromfile(house / 'data' / name / f'{split}.bin', '<u2') for split in ('train', 'val')]


def masks(house, name='mytext'):
    return [np.fromfile(house / 'data' / name / f'{split}.mask', 'u1') for split in ('train', 'val')]


def texts(house, name='mytext'):
    """The texts of train.bin and val.bin."""
    from data.tokenizer import Tokenizer, read_tokenizer_spec

    tokenizer = Tokenizer(read_tokenizer_spec(house / 'data' / name))
    return [tokenizer.decode(ids.tolist()) for ids in bins(house, name)]


def counted(house, name='mytext'):
    """The texts of the tokens of train.bin and of val.bin that count."""
    from data.tokenizer import Tokenizer, read_tokenizer_spec

    tokenizer = Tokenizer(read_tokenizer_spec(house / 'data' / name))
    pairs = zip(bins(house, name), masks(house, name), strict=True)
    return [tokenizer.decode(ids[mask == 1].tolist()) for ids, mask in pairs]


# -----------------------------------------------------------------------------
# Reading


def odd_text(chance, count):
    """A text with many kinds of spaces, in runs, and of everything else that GPT-2's pattern knows."""
    parts = [
        *"'s 't word 7 . !? 数 ， 。 _ e\u0301 🦊 \x1c \x85 \u2028 \u3000 \xa0".split(' '),
        *' \n' * 8,
        '\t',
        '\r',
        EOT,
    ]
    return ''.join(chance.choices(parts, k=count))


def test_pieces_have_the_ids_of_the_whole(bpe, monkeypatch):
    """A text is encoded piece by piece, and comes in blocks: neither changes an id of GPT-2's encoding or of
    a trained one, whatever the spaces at the cuts.
    """
    import data.common
    from data.tokenizer import train_bpe

    chance = random.Random(0)
    trained = train_bpe([odd_text(chance, 3000)] * 2, 500)
    monkeypatch.setattr(data.common, 'PIECE', 20)
    for _ in range(1000):
        text = odd_text(chance, chance.randrange(200))
        blocks = []
        position = 0
        while position < len(text):
            size = chance.choice([1, 3, 19, 20, 21, 100])
            blocks.append(text[position : position + size])
            position += size
        pieces = list(data.common.pieces(blocks))
        assert ''.join(pieces) == text and '' not in pieces
        assert len(pieces) >= len(text) // 250
        assert sum(map(bpe.encode_ordinary, pieces), []) == bpe.encode_ordinary(text)
        assert sum(map(trained.encode, pieces), []) == trained.encode(text)

    # Without a space it is cut somewhere, though not at once.
    assert max(map(len, data.common.pieces(['x' * 1000]))) <= 240


@pytest.mark.slow
def test_trainable():
    """The trainer's memory grows with the different words, which in Chinese are whole clauses."""
    from data.common import trainable

    chance = random.Random(0)
    characters = [chr(0x4E00 + n) for n in range(3000)]
    clauses = [''.join(chance.choices(characters, k=20)) for _ in range(5000)]
    assert trainable([clauses] * 100) == math.inf
    chinese = (
        [''.join(chance.choices([*characters, '，'], k=1000, weights=[1] * 3000 + [200]))]
        for _ in range(9999)
    )
    assert 1_600_000 < trainable(chinese) < 1_900_000
    assert trainable([['the same few words ' * 5000]] * 300) == math.inf


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'gb18030'])
def test_text_comes_in_blocks(tmp_path, monkeypatch, encoding):
    """Characters and ends of lines may lie across the borders of blocks. .gz and .zst are unpacked."""
    import pyarrow

    from data.common import read_text

    text = ('ab\r\n\r\r\né数🦊\r' * 99 if encoding != 'gb18030' else 'ab\r\n\r\r\n数字\r' * 99) + '\r'
    path = tmp_path / 'text.txt'
    path.write_bytes(text.encode(encoding))
    (tmp_path / 'text.txt.gz').write_bytes(gzip.compress(path.read_bytes()))
    with pyarrow.CompressedOutputStream(str(tmp_path / 'text.txt.zst'), 'zstd') as f:
        f.write(path.read_bytes())
    given = encoding if encoding == 'gb18030' else ''
    for name in ('text.txt', 'text.txt.gz', 'text.txt.zst'):
        assert ''.join(read_text(str(tmp_path / name), given)) == text.replace('\r\n', '\n')

    def small_blocks(path):
        content = open(path, 'rb').read()
        return (content[i : i + 3] for i in range(0, len(content), 3))

    monkeypatch.setattr('data.common.read_blocks', small_blocks)
    assert ''.join(read_text(str(path), given)) == text.replace('\r\n', '\n')


@pytest.mark.parametrize(
    'content, words',
    [
        (
            '床前明月光\n'.encode('gb18030'),
            "byte 0, 0xb4, is not utf-8; --encoding=gb18030 would read '床前明月光",
        ),
        (
            'a\n床前明月光，疑是地上霜'.encode('gb18030'),
            "byte 2, 0xb4, is not utf-8; --encoding=gb18030 would",
        ),
        (
            'Le café était fermé, déjà'.encode('cp1252'),
            "byte 6, 0xe9, is not utf-8; --encoding=cp1252 would read 'é était",
        ),
        (
            'Grüße und Küsse'.encode('cp1252'),
            "byte 2, 0xfc, is not utf-8; --encoding=cp1252 would read 'üße und",
        ),
        (b'x' * 1_000_000 + b'yz\xff', 'byte 1000002, 0xff, is not utf-8'),
        ('数'.encode()[:2], 'byte 0, 0xe6, is not utf-8'),
        (codecs.BOM_UTF16_LE + b'a\0\0\xd8b\0', 'is not utf-16'),
    ],
)
def test_other_encodings(tmp_path, content, words):
    """File and byte, and advice that fits what stands there: the text is never skipped."""
    from data.common import read_text

    (tmp_path / 'a.txt').write_bytes(content)
    with pytest.raises(SystemExit) as error:
        list(read_text(str(tmp_path / 'a.txt')))
    assert str(error.value).startswith(f"{tmp_path / 'a.txt'}: byte ") and words in str(error.value)


def test_files_of_a_folder(tmp_path, capsys):
    """All files that are text, by their content: not pictures, nor what begins with a dot. Rows are of one
    kind, but a .json beside other text is text.
    """
    from data.common import find_files

    (tmp_path / 'sub' / '.git').mkdir(parents=True)
    for name in ('a.md', 'sub/b.py', 'sub/c [1]', 'sub/.git/x', '.hidden', 'settings.json'):
        (tmp_path / name).write_text('text')
    (tmp_path / 'wide.txt').write_text('text', encoding='utf-16')
    (tmp_path / 'picture.png').write_bytes(b'\x89PNG\r\n\0\0')
    (tmp_path / 'a.docx').write_bytes(b'PK\x03\x04\x14\0\0')
    (tmp_path / 'a.pdf').write_bytes(b'%PDF-1.4 text')
    paths, kind = find_files(str(tmp_path))
    assert [path.removeprefix(f'{tmp_path}/') for path in paths] == [
        'a.md',
        'settings.json',
        'sub/b.py',
        'sub/c [1]',
        'wide.txt',
    ]
    assert kind == '.txt' and 'no text are left out: 3, such as' in capsys.readouterr().out
    assert find_files(str(tmp_path / 'sub' / 'c [1]'))[0] == [str(tmp_path / 'sub' / 'c [1]')]
    assert find_files(f'{tmp_path}/*.json') == ([str(tmp_path / 'settings.json')], '.json')
    with pytest.raises(SystemExit, match=r'a.docx: no text \(export it'):
        find_files(f'{tmp_path}/*.docx')
    with pytest.raises(SystemExit, match='no such text'):
        find_files(f'{tmp_path}/*.c')
    (tmp_path / 'data').mkdir()  # a data set beside its text, and its older files
    for name in ('book.txt', 'tokenizer.json', 'template.txt', 'tokenizer.json.old', 'template.txt.old1'):
        (tmp_path / 'data' / name).write_text('text')
    assert find_files(str(tmp_path / 'data')) == ([str(tmp_path / 'data' / 'book.txt')], '.txt')
    (tmp_path / 'faq').mkdir()  # rows beside a picture are rows
    (tmp_path / 'faq' / 'faq.json').write_text('{"text": "a"}')
    (tmp_path / 'faq' / 'picture.png').write_bytes(b'\x89PNG\r\n\0\0')
    assert find_files(str(tmp_path / 'faq')) == ([str(tmp_path / 'faq' / 'faq.json')], '.json')
    (tmp_path / 'sub' / 'rows.csv.gz').write_bytes(gzip.compress(b'a,b\n'))
    with pytest.raises(SystemExit, match='several kinds, .csv, .json, .txt'):
        find_files(str(tmp_path))


@pytest.mark.parametrize('name, most', [('a.txt', 25_000_000), ('a.jsonl', 90_000_000)])
def test_memory(tmp_path, name, most):
    """A text is read, counted and encoded in pieces: nothing holds it, however large. A row is held."""
    from data.common import Documents, write_documents
    from data.tokenizer import char_tokenizer

    text = 'some words that take place\n' * 400_000  # 11 MB
    (tmp_path / name).write_text(text if name == 'a.txt' else json.dumps({'text': text}))
    tracemalloc.start()
    try:
        documents = Documents(str(tmp_path / name))
        lengths = documents.lengths
        cuts = lengths * 9 // 10
        parts = documents.stream('train', 0 * cuts, cuts), documents.stream('val', cuts, lengths)
        write_documents(tmp_path, char_tokenizer(sorted(documents.alphabet)), 2, *parts)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / 'train.bin').stat().st_size > 18_000_000
    assert peak < most


def write_rows(folder, rows):
    """Writes rows in each format; returns the paths."""
    import pyarrow
    import pyarrow.parquet

    lines = ''.join(json.dumps(row) + '\n' for row in rows)
    (folder / 'a.jsonl').write_text(lines)
    (folder / 'b.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
    (folder / 'c.json').write_text(json.dumps(rows, indent=1))
    (folder / 'd.json').write_text(lines)
    with open(folder / 'e.csv', 'w', newline='', encoding='utf-8-sig') as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / 'f.parquet')
    return sorted(str(path) for path in folder.iterdir())


def test_rows_of_all_formats(tmp_path):
    """They are the same from each, numbers in a .csv and commas and newlines in fields too."""
    from data.common import read_rows

    rows = [{'text': f'7{n}', 'other': f'a, "b"\n{n}' if n else ''} for n in range(200)]
    paths = write_rows(tmp_path, rows)
    assert len(paths) == 6
    for path in paths:
        assert list(read_rows(path)) == rows, path


@pytest.mark.parametrize(
    'name, content, template, words',
    [
        ('a.jsonl', '{"text": "a"}\n{"text"', '', "a.jsonl, row 2: Expecting ':' delimiter"),
        ('a.jsonl', '{"text": "a"}\n{"text": 5}', '', 'a.jsonl, row 2: the field "text" is no text, but 5'),
        ('a.jsonl', '{"text": "a"}\n{"text": null}', '', 'a.jsonl, row 2: the field "text" is missing'),
        ('a.jsonl', '{"text": "a"}\n{"text": "\\ud800"}', '', 'a.jsonl, row 2: .* surrogates not allowed'),
        ('a.jsonl', '{"text": "a"}\n"b"', '', "a.jsonl, row 2: it has no fields, or more .* 'b'"),
        (
            'a.jsonl',
            '{"prompt": "a", "answer": "b"}',
            '',
            'a.jsonl, row 1: it has the fields prompt, answer, but no text: .*'
            r'--template="Prompt: {prompt}\\nAnswer: {answer}"',
        ),
        (
            'a.jsonl',
            '{"id": 7, "instruction": "a", "input": "", "output": "b"}',
            '',
            r'--template="Instruction: {instruction}\\nOutput: {output}"',
        ),
        ('a.jsonl', '{"question": "a"}', TEMPLATE, 'row 1: it has the fields question, but no answer$'),
        ('a.csv', 'question,answer\na,b\nc\n', TEMPLATE, 'a.csv, row 2: the field "answer" is missing'),
        (
            'a.csv',
            'question,answer\na,b,c\n',
            TEMPLATE,
            'a.csv, row 1: it has no fields, or more than the first',
        ),
        ('a.csv', 'question,answer\na,"b\n', TEMPLATE, 'a.csv, row 1: unexpected end of data'),
        (
            'a.jsonl',
            '{"messages": [{"role": "tool", "content": "a"}]}',
            '',
            "row 1: the role 'tool' is none of",
        ),
        (
            'a.jsonl',
            '{"messages": [{"role": "user", "content": 5}]}',
            '',
            'row 1: the field "content" is no text',
        ),
        ('a.parquet', 'text', '', 'a.parquet, row 1: '),
        ('a.txt', 'text', TEMPLATE, 'a.txt is text, and --template is for rows: .jsonl'),
    ],
)
def test_rows_with_mistakes(tmp_path, name, content, template, words):
    """One line with file and row."""
    from data.common import Documents

    (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit, match=words):
        Documents(str(tmp_path / name), template)


# -----------------------------------------------------------------------------
# What it makes of them


def test_one_text(prepare, house, tmp_path, bpe):
    """Characters, GPT-2's encoding and a trained one: nine tenths and one, and the whole text comes back."""
    import tokenizers

    (tmp_path / 'book.txt').write_bytes((POEM * 40).encode())
    text = POEM.replace('\r\n', '\n') * 40
    parts = [text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]]
    folder = house / 'data' / 'mytext'

    out = prepare('--input=book.txt', '--tokenizer=gpt2')
    assert [ids.tolist() for ids in bins(house)] == [bpe.encode_ordinary(part) + [50256] for part in parts]
    assert 'config/finetune_shakespeare.py --init_from=gpt2 --dataset=mytext --out_dir=out-mytext' in out
    out = prepare('--input=book.txt')
    assert texts(house) == parts
    meta = pickle.loads((folder / 'meta.pkl').read_bytes())
    assert meta['stoi']['🦊'] < meta['vocab_size'] == len(set(text))
    assert f'1 documents, 1.000 tokens a character, vocabulary {len(set(text))}\na document:\n' in out
    assert f'python {house}/train.py config/train_' in out
    assert f'python {house}/sample.py --out_dir=out-mytext' in out
    prepare('--input=book.txt', '--tokenizer=bpe', '--vocab_size=300')
    assert not (folder / 'meta.pkl').exists()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
    assert texts(house) == [part + EOT for part in parts]
    assert max(bins(house)[0]) < tokenizer.get_vocab_size() <= 300
    prepare('--input=book.txt')
    assert not (folder / 'tokenizer.json').exists()


def test_several_texts(prepare, house, tmp_path):
    """The last tenth of each of a few texts is for validation, so that no language is left out of it; empty
    ones are left out. --val is another share, or another text.
    """
    (tmp_path / 'four').mkdir()
    for name in 'abcd':
        (tmp_path / 'four' / f'{name}.md').write_text(name * 100)
    (tmp_path / 'four' / 'empty.md').write_text('')
    prepare('--input=four')
    assert texts(house) == ['\n'.join(name * 90 for name in 'abcd'), '\n'.join(name * 10 for name in 'abcd')]
    prepare('--input=four', '--val=0.5')
    assert texts(house) == ['\n'.join(name * 50 for name in 'abcd')] * 2
    (tmp_path / 'other.txt').write_text('efg')
    prepare('--input=four', '--val=other.txt')
    assert texts(house) == ['\n'.join(name * 100 for name in 'abcd'), 'efg']


def test_many_documents(prepare, house, tmp_path):
    """From 20 on whole documents, in their order, chosen by a fixed seed, until a tenth of the characters."""
    rows = [{'text': f'document {n}: {"x" * (n % 7)}'} for n in range(200)]
    (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    how = ['--input=rows.jsonl', '--tokenizer=bpe', '--vocab_size=300']
    prepare(*how)
    train, val = (text.split(EOT)[:-1] for text in texts(house))
    number = [int(text.split()[1][:-1]) for text in train + val]
    assert number[: len(train)] == sorted(number[: len(train)]) and sorted(number) == list(range(200))
    assert val == sorted(val, key=lambda text: int(text.split()[1][:-1]))
    assert 0.1 <= sum(map(len, val)) / sum(len(row['text']) for row in rows) < 0.11
    before = (house / 'data' / 'mytext' / 'train.bin').stat()
    assert 'kept as' not in prepare(*how)
    assert (house / 'data' / 'mytext' / 'train.bin').stat().st_size == before.st_size


def test_tokenizers_that_lose_text(prepare, tmp_path):
    """A tokenizer.json that does not give the text back is refused: one that drops capitals and spaces, and
    one that puts a space before all that it encodes, which would stand in the middle of the text.
    """
    import tokenizers

    trainer = tokenizers.trainers.WordPieceTrainer(special_tokens=['[UNK]', EOT], show_progress=False)
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token='[UNK]'))
    words.normalizer = tokenizers.normalizers.BertNormalizer()
    words.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    words.train_from_iterator(['some words'] * 9, trainer)
    spaces = tokenizers.ByteLevelBPETokenizer(add_prefix_space=True)
    spaces.train_from_iterator(['some words'] * 9, 300, special_tokens=[EOT])
    (tmp_path / 'book.txt').write_text('Some words, and more.\n' * 90)
    for tokenizer in (words, spaces):
        tokenizer.save(str(tmp_path / 'foreign.json'))
        out = prepare('--input=book.txt', '--tokenizer=foreign.json', status=1)
        assert "does not give a text back: 'Some words, and more." in out


def test_next_command_of_a_small_set(prepare, house, tmp_path, run):
    """The command that is printed runs as it stands, also where a sequence of the config would not fit."""
    rows = [{'question': f'{n}+1?', 'answer': str(n + 1)} for n in range(12)]
    (tmp_path / 'qa.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    out = prepare('--input=qa.jsonl', r'--template=Q: {question}\nA: {answer}', name='small')
    command = re.search(r'^train on it: python \S*train.py (.*)', out, re.M)[1]
    assert ' --block_size=' in command
    how = '--device=cpu', '--max_iters=1', '--eval_iters=1', '--n_layer=1', '--n_embd=16', '--n_head=2'
    assert '--chat=True' in run('train.py', *shlex.split(command), *how).stdout.splitlines()[-1]


@pytest.mark.parametrize(
    'lengths, share', [([10, 1000], 0.1), ([9] * 5, 0.1), ([0] + [50] * 24, 0.01), ([7, 7], 0.9)]
)
def test_few_rows(prepare, house, tmp_path, lengths, share):
    """However few rows there are and however long, each split has one; they are whole. Empty ones are left
    out.
    """
    rows = [{'question': '', 'answer': 'x' * length} for length in lengths]
    (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    prepare('--input=rows.jsonl', f'--val={share}', '--template={question}{answer}', name='few')
    splits = [text.split(EOT)[:-1] for text in texts(house, 'few')]
    assert min(map(len, splits)) > 0 and max(map(len, splits[1])) > 0
    assert sorted(map(len, splits[0] + splits[1])) == sorted(filter(None, lengths))


def test_end_of_text(prepare, house, tmp_path):
    """<|endoftext|> in a text is text, which a line says, or with a key the end of a document."""
    (tmp_path / 'stories.txt').write_text(''.join(f'Story {n}.\n{EOT}\n' for n in range(30)))
    out = prepare('--input=stories.txt', '--tokenizer=gpt2')
    assert f'{EOT} is in the text 30 times, as text: --end_of_text=True ends' in out
    assert [np.count_nonzero(ids == 50256) for ids in bins(house)] == [1, 1]
    out = prepare('--input=stories.txt', '--tokenizer=gpt2', '--end_of_text=True')
    assert 'as text' not in out
    train, val = texts(house)
    stories = (train + val).split(EOT)
    assert sorted(stories) == sorted([''] + [f'Story {n}.\n' for n in range(30)]) and val


@pytest.mark.parametrize('kind', ['char', pytest.param('bpe', marks=pytest.mark.slow)])
def test_template(prepare, house, tmp_path, kind):
    """A row is a document, of which the answer and its <|endoftext|> count. The masks are as long as the
    bins, and template.txt holds the template. They go when plain text comes.
    """
    folder = house / 'data' / f'qa-{kind}'
    (tmp_path / 'qa.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in QUESTIONS))
    how = [f'--tokenizer={kind}', '--vocab_size=300']
    out = prepare(
        '--input=qa.jsonl', r'--template=Question: {question}\nAnswer: {answer}', *how, name=f'qa-{kind}'
    )
    assert 'Question: what is 0+1?\nAnswer:[ 1<|endoftext|>]\n' in out
    assert (folder / 'template.txt').read_bytes() == TEMPLATE.encode()

    train, val = texts(house, f'qa-{kind}')
    documents = [document for document in (train + val).split(EOT) if document]
    want = [f"Question: {row['question'].strip()}\nAnswer: {row['answer'].strip()}" for row in QUESTIONS]
    assert sorted(documents) == sorted(want) and 0.1 <= len(val) / len(train + val) < 0.2
    for text, answers in zip((train, val), counted(house, f'qa-{kind}'), strict=True):
        assert answers == ''.join(document.partition('Answer:')[2] + EOT for document in text.split(EOT)[:-1])
    if kind == 'char':
        meta = pickle.loads((folder / 'meta.pkl').read_bytes())
        assert meta['itos'][meta['vocab_size'] - 1] == EOT == max(meta['stoi'], key=len)

    (tmp_path / 'plain.txt').write_text('plain text ' * 200)
    assert 'train.mask.old, val.mask.old, template.txt.old' in prepare('--input=plain.txt', name=f'qa-{kind}')
    assert {path.name for path in folder.iterdir() if '.old' not in path.name} == {
        'train.bin',
        'val.bin',
        'meta.pkl',
    }


def test_conversations(prepare, house, tmp_path):
    """Rows with messages need no key. Each answer counts and ends in <|endoftext|>, a role's name in a
    content is text, and {text} is what it was.
    """
    turns = [
        ('system', 'Be brief. '),
        ('user', 'Hi'),
        ('assistant', ' Hello\n'),
        ('user', f'{EOT} Assistant: x'),
    ]
    messages = [{'role': role, 'content': content} for role, content in [*turns, ('assistant', 'User: y')]]
    (tmp_path / 'chat.jsonl').write_text((json.dumps({'messages': messages}) + '\n') * 30)
    out = prepare('--input=chat.jsonl', name='chat')
    assert 'they are conversations' in out and f'{EOT} is in the rows 30 times, as text' in out
    document = (
        f'Be brief.\nUser: Hi\nAssistant: Hello{EOT}\nUser: {EOT} Assistant: x\nAssistant: User: y{EOT}'
    )
    assert texts(house, 'chat') == [document * 27, document * 3]
    assert counted(house, 'chat') == [f' Hello{EOT} User: y{EOT}' * 27, f' Hello{EOT} User: y{EOT}' * 3]
    assert (house / 'data' / 'chat' / 'template.txt').read_text() == '{messages}'
    assert 'Assistant:[ Hello<|endoftext|>]\nUser:' in out


def test_given_tokenizer(prepare, house, tmp_path, run):
    """The text is encoded by the tokenizer of a data set; characters that it does not know are an error with
    their number, a template needs its <|endoftext|>, and nothing else is one.
    """
    (tmp_path / 'a.txt').write_text('abcdefgh\n' * 99)
    (tmp_path / 'b.txt').write_text('hgfedcba\n' * 99)
    (tmp_path / 'c.txt').write_text('abc' + ''.join(chr(200 + n) * (20 - n) for n in range(12)))
    (tmp_path / 'qa.jsonl').write_text('{"question": "a", "answer": "b"}\n' * 30)
    prepare('--input=a.txt', name='first')
    folder = house / 'data' / 'first'
    prepare('--input=b.txt', f'--tokenizer={folder}')
    assert (house / 'data' / 'mytext' / 'meta.pkl').read_bytes() == (folder / 'meta.pkl').read_bytes()
    assert ''.join(texts(house)) == 'hgfedcba\n' * 99
    words = prepare('--input=c.txt', f'--tokenizer={folder}', status=1)
    assert f"the tokenizer of {folder} does not know 'È' (20 times), 'É' (19 times)" in words
    assert "'Ñ' (11 times) and 2 more: " in words
    how = ['--input=qa.jsonl', '--template={question}\\n{answer}', f'--tokenizer={folder}']
    assert f'has no {EOT}' in prepare(*how, status=1)
    words = prepare('--input=a.txt', f'--tokenizer={tmp_path}', status=1)
    assert 'none of char, gpt2, bpe, nor a tokenizer.json, nor a folder with a data set' in words


@pytest.mark.slow
def test_tokenizer_of_a_model(prepare, house, tmp_path, run):
    """A checkpoint's and an export's, and its tokenizer.json alone: training goes on with the model's own."""
    from conftest import SMALL

    (tmp_path / 'a.txt').write_text('abcdefgh\n' * 99)
    run('train.py', *SMALL, '--max_iters=1', '--dataset=tiny')
    run('sample.py', '--num_samples=1', '--max_new_tokens=1')
    known = (house / 'data' / 'tiny' / 'meta.pkl').read_bytes()
    out = prepare('--input=a.txt', '--tokenizer=out')
    assert '--init_from=out --dataset=mytext' in out
    assert (house / 'data' / 'mytext' / 'meta.pkl').read_bytes() == known
    run('train.py', *SMALL, '--dataset=mytext', '--init_from=out', '--out_dir=out-b')


@pytest.mark.slow
def test_mistakes(prepare, house, tmp_path, bpe):
    """A mistake is one line and leaves the data set as it was."""
    (tmp_path / 'book.txt').write_text(POEM * 40)
    (tmp_path / 'empty.txt').write_text('')
    (tmp_path / 'one.txt').write_text('x')
    (tmp_path / 'gbk.txt').write_bytes('明月\n故乡'.encode('gb18030'))
    prepare('--input=book.txt', name='folder')
    before = {path: path.read_bytes() for path in (house / 'data' / 'folder').iterdir()}
    for arguments, words in (
        (['--input=gbk.txt'], 'gbk.txt: byte 0, 0xc3, is not utf-8; --encoding=gb18030'),
        (['--input=book.txt', '--encoding=klingon'], 'Python knows no such encoding'),
        ([], 'which text?'),
        (['book.txt'], 'book.txt: no such config file; a text is named by --input=book.txt'),
        (['--input=none.txt'], 'no such text'),
        (['--input=empty.txt'], 'empty'),
        (['--input=one.txt'], 'not enough text for val.bin'),
        (['--input=book.txt', '--val=none.txt'], 'none.txt: no such text'),
        (['--input=book.txt', '--val=1.5'], 'val must be a share between 0 and 1, or a path, not 1.5'),
        (['--input=book.txt', '--num_workers=0'], 'num_workers must be at least 1'),
        (['--input=book.txt', '--tokenizer=word'], 'none of char, gpt2, bpe'),
        (['--input=book.txt', '--tokenizer=bpe', '--vocab_size=70000'], 'vocab_size must be'),
    ):
        assert words in prepare(*arguments, name='folder', status=1)
    for name, words in (
        ('shakespeare', 'a data set of its own'),
        ('../x', 'is a path: give it as a whole'),
        ('..', 'is a path'),
    ):
        assert words in prepare('--input=book.txt', name=name, status=1)
    taken = subprocess.run(
        [sys.executable, str(house / 'data/custom/prepare.py'), '--input=book.txt', '--name=common.py'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert taken.returncode == 1  # what the file system says is one line
    assert taken.stderr == f"{house / 'data' / 'common.py'}: File exists\n"
    assert before == {path: path.read_bytes() for path in (house / 'data' / 'folder').iterdir()}
