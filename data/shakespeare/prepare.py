"""
Tiny Shakespeare in GPT-2's byte-pair encoding: writes train.bin and val.bin
beside this file.

    python data/shakespeare/prepare.py
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

exec((ROOT / 'configurator.py').read_text(encoding='utf-8'))
sys.path.insert(0, str(ROOT))
from data.common import TINY_SHAKESPEARE, download, write_bins
from data.tokenizer import Tokenizer, encode_parts

text = download(*TINY_SHAKESPEARE, HERE / 'input.txt').decode()
cut = int(len(text) * 0.9)
tokenizer = Tokenizer({'kind': 'gpt2'}, ordinary=True)
train = encode_parts(tokenizer, [(text[:cut], True)])
val = encode_parts(tokenizer, [(text[cut:], True)])
write_bins(HERE, tokenizer, [train], [val])

# train.bin has 301,966 tokens
# val.bin has 36,059 tokens
