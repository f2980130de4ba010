"""data/python_qa: its questions against Python's own introspection, and that nothing of the answers for
validation can be learned."""

import importlib
import inspect
import re
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest

MODULES = (
    'pprint textwrap queue calendar tokenize random socketserver difflib copy shlex tarfile mailbox ipaddress'
).split()
QUESTION = re.compile(r'Question: What does (\w+)\.((?:\w+\.)*(\w+))\((.*)\) do\?\nAnswer:')


@pytest.fixture
def library(tmp_path):
    """A folder with some modules of Python's library."""
    library = tmp_path / 'library'
    library.mkdir()
    for name in MODULES:
        shutil.copy(Path(sysconfig.get_path('stdlib')) / f'{name}.py', library)
    return library


def pairs_of(tokenizer, ids, mask):
    """The texts of the documents, as pairs: what does not count, and what does."""
    ends = np.flatnonzero(ids == tokenizer.eot) + 1
    assert ends[-1] == len(ids) == len(mask)
    start = 0
    for end in ends:
        # What counts is one piece, at the end of the document.
        counts = mask[start:end].astype(int)
        assert (np.diff(counts) >= 0).all() and counts[0] == 0 and counts[-1] == 1
        middle = end - counts.sum()
        yield tokenizer.decode(ids[start:middle].tolist()), tokenizer.decode(ids[middle:end].tolist())
        start = end


@pytest.mark.slow
def test_python_qa(run, altered, house, library):
    """The masks cover the answers and their ends. Each answer begins what Python says about that function,
    with these arguments. No name is in both splits, and no answer for validation can be read elsewhere."""
    from data.tokenizer import Tokenizer, read_tokenizer_spec

    replaced = f"import sysconfig\nsysconfig.get_path = lambda name: {str(library)!r}"
    run(altered(replaced, 'data/python_qa/prepare.py'), '--vocab_size=600')
    folder = house / 'data' / 'python_qa'
    tokenizer = Tokenizer(read_tokenizer_spec(folder))

    names = {}
    answers = {}
    for split in ('train', 'val'):
        names[split] = set()
        answers[split] = set()
        ids = np.fromfile(folder / f'{split}.bin', dtype='<u2')
        mask = np.fromfile(folder / f'{split}.mask', dtype='u1')
        for prompt, counted in pairs_of(tokenizer, ids, mask):
            module, path, name, arguments = QUESTION.fullmatch(prompt).groups()
            function = importlib.import_module(module)
            for attribute in path.split('.'):
                function = inspect.getattr_static(function, attribute)
            function = inspect.unwrap(getattr(function, '__func__', getattr(function, 'fget', function)))
            code = function.__code__
            expected = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            assert arguments == ', '.join(a for a in expected if a not in ('self', 'cls'))

            answer = counted.removesuffix('<|endoftext|>')
            assert answer != counted and answer.startswith(' ')
            sentence = answer.strip().removesuffix('.')
            assert ' '.join(inspect.getdoc(function).split()).startswith(sentence)
            names[split].add(name)
            answers[split].add(sentence)
    assert len(names['train']) > 100 and len(names['val']) > 5
    assert not names['train'] & names['val'] and not answers['train'] & answers['val']
    assert (folder / 'template.txt').read_bytes() == b'Question: {question}\nAnswer: {answer}'

    # The source is the modules themselves, but for the docstrings that would tell.
    assert (folder / 'source' / 'tokenizer.json').read_bytes() == (folder / 'tokenizer.json').read_bytes()
    source = {}
    for split in ('train', 'val'):
        ids = np.fromfile(folder / 'source' / f'{split}.bin', dtype='<u2')
        source[split] = tokenizer.decode(ids.tolist())
    assert not [answer for answer in answers['val'] if answer in ' '.join(source['train'].split())]
    originals = [path.read_text() for path in library.iterdir() if path.read_bytes().isascii()]
    lines = ''.join(source.values()).replace('<|endoftext|>', '').splitlines()
    original_lines = ''.join(originals).splitlines()
    assert set(lines) <= set(original_lines)
    assert 0.9 < len(lines) / len(original_lines) < 1
