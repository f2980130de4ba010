"""configurator.py, executed in a fresh dict as a script's globals."""
import sys
from pathlib import Path

import pytest

SOURCE = (Path(__file__).resolve().parents[1] / 'configurator.py').read_text()
DEFAULTS = """
from __future__ import annotations
import math
batch_size = 12
n_embd = 4
learning_rate = 6e-4
start = "hello"
compile: bool | None = None
device: str | None = None
top_k: int | None = 200
plain = None
"""


def configure(monkeypatch, *arguments, defaults=DEFAULTS):
    script = {}
    exec(defaults, script)
    monkeypatch.setattr(sys, 'argv', ['script.py', *map(str, arguments)])
    exec(SOURCE, script)
    return script


@pytest.mark.parametrize('argument, key, value', [
    ('--batch_size=3', 'batch_size', 3), ('--batch_size=-3', 'batch_size', -3), ('--learning_rate=1', 'learning_rate', 1.0),
    ('--learning_rate=1e-3', 'learning_rate', 1e-3), ('--start=a=b', 'start', 'a=b'), ('--start=42', 'start', '42'),
    ('--start=', 'start', ''), ('--start=None', 'start', 'None'), ('--start=--x', 'start', '--x'), ('--start=True', 'start', 'True'),
    ('--compile=False', 'compile', False), ('--compile=None', 'compile', None), ('--device=None', 'device', None),
    ('--device=cpu', 'device', 'cpu'), ('--top_k=None', 'top_k', None), ('--top_k=5', 'top_k', 5), ('--plain=5', 'plain', 5),
    ('--plain=x', 'plain', 'x')])
def test_values(monkeypatch, argument, key, value):
    script = configure(monkeypatch, argument)
    assert script[key] == value and type(script[key]) is type(value)
    assert script['config'][key] == value and 'math' not in script['config']


@pytest.mark.parametrize('argument, words', [
    ('--batchsize=3', "unknown key 'batchsize', did you mean 'batch_size'?"), ('--batch_size=3.0', 'batch_size takes int'),
    ('--batch_size=x', 'batch_size takes int'), ('--batch_size=None', 'batch_size takes int'), ('--batch_size=True', 'batch_size takes int'),
    ('--learning_rate=fast', 'learning_rate takes float'), ('--learning_rate=1e999', 'finite'), ('--compile=yes', 'True or False'),
    ('--top_k=2.5', 'top_k takes int or None'), ('--batch_size', '--batch_size=value'), ('batch_size=3', 'no such config file'),
    ('missing.py', 'no such config file'), ('--math=3', "unknown key 'math'")])
def test_mistakes_are_one_line(monkeypatch, argument, words):
    with pytest.raises(SystemExit) as stop:
        configure(monkeypatch, argument)
    assert words in stop.value.code and '\n' not in stop.value.code


def test_files_and_arguments_in_order(monkeypatch, tmp_path):
    """Later arguments win; a file sees what stands above it; modules, callables and _names are no keys."""
    first, second = tmp_path / 'first.py', tmp_path / 'second.py'
    first.write_text("import time\nfrom math import sqrt\n_half = batch_size // 2\nbatch_size = _half\nn_embd = int(sqrt(16)) * 8\n")
    second.write_text("learning_rate = 1\nn_embd = n_embd * 2\n")
    script = configure(monkeypatch, '--batch_size=40', first, '--start=x', second, '--learning_rate=2')
    assert (script['batch_size'], script['n_embd'], script['learning_rate'], script['start']) == (20, 64, 2.0, 'x')


@pytest.mark.parametrize('text, words', [
    ("bach_size = 3\n", "unknown key 'bach_size', did you mean 'batch_size'?"), ("batch_size = 'x'\n", 'batch_size takes int'),
    ("\nbatch_size = 1 / 0\n", 'line 2: ZeroDivisionError'), ("batch_size = (\n", 'line 1: SyntaxError'), ("batch_size = [1]\n", 'takes int')])
def test_mistakes_in_files(monkeypatch, tmp_path, text, words):
    """nanoGPT lets a typo in a config file pass in silence."""
    path = tmp_path / 'mine.py'
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        configure(monkeypatch, path)
    assert words in stop.value.code and 'mine.py' in stop.value.code and '\n' not in stop.value.code


def test_one_process_speaks(monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '1')
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    with pytest.raises(SystemExit) as stop:
        configure(monkeypatch, '--batchsize=3')
    assert stop.value.code == 1
