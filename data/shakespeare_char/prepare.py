"""
Tiny Shakespeare, one token per character: writes train.bin, val.bin and
meta.pkl beside this file.

    python data/shakespeare_char/prepare.py
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

exec((ROOT / 'configurator.py').read_text(encoding='utf-8'))
sys.path.insert(0, str(ROOT))
from data.common import TINY_SHAKESPEARE, download, write_characters

text = download(*TINY_SHAKESPEARE, HERE / 'input.txt').decode()
cut = int(len(text) * 0.9)
write_characters(HERE, text[:cut], text[cut:])

# 1,115,394 characters, 65 different
# train.bin has 1,003,854 tokens
# val.bin has 111,540 tokens
