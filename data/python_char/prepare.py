"""
Python's own standard library, one token per character: several MB of good text that is on every machine
that can run this. Writes train.bin, val.bin and meta.pkl beside this file.

    python data/python_char/prepare.py
"""

import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

exec((ROOT / 'configurator.py').read_text(encoding='utf-8'))
sys.path.insert(0, str(ROOT))
from data.common import write_characters

# These hold what was installed, tests, and what not every Python has.
SKIPPED = {'site-packages', 'dist-packages', 'test', 'tests', 'idlelib', 'lib2to3', 'turtledemo', 'ensurepip'}

stdlib = Path(sysconfig.get_path('stdlib'))
files = [path.relative_to(stdlib) for path in stdlib.rglob('*.py')]
modules = []
for path in sorted(file for file in files if not SKIPPED.intersection(file.parts)):
    text = (stdlib / path).read_bytes()
    if text.isascii():
        modules.append(text.decode().replace('\r\n', '\n'))
if not modules:
    sys.exit(f"{stdlib} holds no modules in source form: this Python was stripped, use another one")
cut = int(len(modules) * 0.9)
print(f"{len(modules)} modules of {stdlib}, the last {len(modules) - cut} for validation")
write_characters(HERE, '\n'.join(modules[:cut]), '\n'.join(modules[cut:]))
