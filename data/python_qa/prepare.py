"""
Questions about Python's standard library, answered from its docstrings: "What
does textwrap.indent(text, prefix, predicate) do?" Writes train.bin, val.bin,
their masks, template.txt and tokenizer.json beside this file, and the text of
the library, for a model to learn first, into source/.

    python data/python_qa/prepare.py
"""

import ast
import os
import random
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

vocab_size = 4096  # of the BPE that is trained on the library
num_workers = os.cpu_count() or 1  # threads that encode
exec((ROOT / 'configurator.py').read_text(encoding='utf-8'))
sys.path.insert(0, str(ROOT))
from data.common import check_vocab_size, library_modules, text_parts, write_documents
from data.tokenizer import template_parts, train_bpe

TEMPLATE = 'Question: {question}\nAnswer: {answer}'

check_vocab_size(vocab_size)


def functions_in(node, name):
    """Yields the functions and methods in a module or class, with their full names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child, f'{name}.{child.name}'
        elif isinstance(child, ast.ClassDef):
            yield from functions_in(child, f'{name}.{child.name}')
        else:
            yield from functions_in(child, name)  # into `if` and `try`, for example


def question_about(function, full_name):
    groups = function.args.posonlyargs, function.args.args, function.args.kwonlyargs
    names = [argument.arg for group in groups for argument in group]
    arguments = ', '.join(name for name in names if name not in ('self', 'cls'))
    return f"What does {full_name}({arguments}) do?"


def first_sentence(docstring):
    """Returns the first sentence of a docstring as one line that ends in a full stop."""
    first_paragraph = ' '.join(docstring.partition('\n\n')[0].split())
    sentence = re.split(r'(?<=[.!?]) (?=[A-Z])', first_paragraph)[0]
    return sentence if sentence.endswith('.') else f'{sentence}.'


def is_good(full_name, answer):
    """Returns whether a function is public and its answer a sentence, neither too short nor a signature."""
    is_private = '._' in f'.{full_name}'
    is_sentence = re.match('[A-Z]', answer) and '->' not in answer
    return not is_private and is_sentence and 20 <= len(answer) <= 150


def without_docstrings(text, functions):
    """Returns the text of a module without the docstrings of these functions."""
    lines = text.splitlines(keepends=True)
    for function in functions:
        docstring = function.body[0]
        lines[docstring.lineno - 1 : docstring.end_lineno] = [''] * (
            docstring.end_lineno - docstring.lineno + 1
        )
    return ''.join(lines)


# -----------------------------------------------------------------------------
# The pairs, each one once. A row knows the name of its function, without those of module and class.

modules = library_modules()
functions = {}  # of each module: those with a docstring
rows = {}
for path, text in modules.items():
    module = '.'.join(path.with_suffix('').parts).removesuffix('.__init__')
    functions[path] = []
    for function, full_name in functions_in(ast.parse(text), module):
        docstring = ast.get_docstring(function)
        if not docstring:
            continue
        functions[path].append(function)
        answer = first_sentence(docstring)
        if is_good(full_name, answer):
            row = {'name': function.name, 'question': question_about(function, full_name), 'answer': answer}
            rows.setdefault((function.name, answer), row)

# A tenth of the names, and of the modules, is for validation.
shuffled = random.Random(1337)
names = sorted({row['name'] for row in rows.values()})
val_names = set(shuffled.sample(names, len(names) // 10))
val_paths = set(shuffled.sample(list(modules), len(modules) // 10))

# What the library says about a function for validation is no text to learn from.
sources = {}
for path, text in modules.items():
    sources[path] = without_docstrings(text, [f for f in functions[path] if f.name in val_names])
train_texts = [text for path, text in sources.items() if path not in val_paths]
val_texts = [text for path, text in sources.items() if path in val_paths]

# Some answers stand in the text, or in an answer about another function, all the same. They are left out.
train_rows = [row for row in rows.values() if row['name'] not in val_names]
known = ' '.join(' '.join(train_texts).split()) + ' '.join(row['answer'] for row in train_rows)
val_rows = []
for row in rows.values():
    if row['name'] in val_names and row['answer'].removesuffix('.') not in known:
        val_rows.append(row)

# -----------------------------------------------------------------------------
# The bins


def parts_of(rows):
    for row in rows:
        yield from template_parts(TEMPLATE, row)


print(f"{len(modules)} modules, {len(train_rows):,} questions to learn, {len(val_rows):,} to validate on")
tokenizer = train_bpe(train_texts, vocab_size)
source = HERE / 'source'
source.mkdir(exist_ok=True)
write_documents(
    source,
    tokenizer,
    num_workers,
    train=text_parts('train', train_texts, len(train_texts)),
    val=text_parts('val', val_texts, len(val_texts)),
)
write_documents(
    HERE,
    tokenizer,
    num_workers,
    train=parts_of(train_rows),
    val=parts_of(val_rows),
    files={'template.txt': TEMPLATE.encode()},
)
