"""
Python's own standard library, one token per character: several MB of good
text that is on every machine that can run this. Writes train.bin, val.bin and
meta.pkl beside this file.

    python data/python_char/prepare.py
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

exec((ROOT / 'configurator.py').read_text(encoding='utf-8'))
sys.path.insert(0, str(ROOT))
from data.common import library_modules, write_characters

modules = list(library_modules().values())
cut = int(len(modules) * 0.9)
print(f"{len(modules)} modules of Python's library, the last {len(modules) - cut} for validation")
write_characters(HERE, '\n'.join(modules[:cut]), '\n'.join(modules[cut:]))
