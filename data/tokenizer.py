"""
How text becomes token ids and back, in three kinds. A file in the folder of the data set tells which:

    meta.pkl         one token per character, in nanoGPT's format: a plain dict with vocab_size, stoi, itos
    tokenizer.json   a byte-pair encoding (BPE) trained on the text, in the format of the tokenizers library
    neither          GPT-2's BPE, from tiktoken
"""

import io
import json
import pickle
from pathlib import Path

EOT = '<|endoftext|>'
# GPT-2's pattern, the first four parts in a group that needs no backtracking: tiktoken takes half the time
WORDS = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"


class PlainUnpickler(pickle._Unpickler):  # the one in C allocates what 48 bytes of a file tell it to: 5 GB
    """Reads containers, strings and numbers only, so that loading a file cannot call functions."""

    dispatch = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: None}  # would allocate before it reads

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}: plain values only")


def one_line(error):
    """The type and the message of an exception, shortened to one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def attempt(message, call, *arguments):
    """Returns call(*arguments). What it raises, panics of Rust code too, becomes a ValueError of one line."""
    try:
        return call(*arguments)
    except BaseException as error:  # a damaged file fails in a dozen ways, and a panic is no Exception
        mistake = ValueError(f"{message} ({one_line(error)})")
        raise (error if isinstance(error, KeyboardInterrupt) else mistake) from None


def read_tokenizer_spec(folder):
    """The tokenizer of the data set in `folder` as plain values, for a checkpoint too. Raises ValueError."""
    path = next(filter(Path.is_file, (Path(folder) / name for name in ('meta.pkl', 'tokenizer.json'))), None)
    return attempt(f"cannot read {path}", read_spec, path) if path else {'kind': 'gpt2'}


def read_spec(path):
    if path.name == 'meta.pkl':
        found = PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        spec = {'kind': 'char', **{k: found[k] for k in ('vocab_size', 'stoi', 'itos') if k in found}}
        if type(size := found.get('vocab_size', 1)) is not int or not 0 < size <= 65536:
            raise ValueError(f"vocab_size is {size!r:.40}")
        return Tokenizer(spec).spec if spec.keys() >= {'stoi', 'itos'} else spec
    text = path.read_text('utf-8', errors='replace')
    model = json.loads(text)['model']
    if model['type'] == 'WordLevel' and max(map(len, model['vocab'])) == 1:  # of for_transformers, below
        return char_tokenizer(sorted(model['vocab'], key=model['vocab'].get)).spec
    return {'kind': 'bpe', 'json': text}


class Tokenizer:
    """encode(text) returns ids below vocab_size, decode(ids) a text. eot ends a document (not of characters),
    bos begins without a text. ordinary=True, as for training data: <|endoftext|> is text of 13 characters."""

    def __init__(self, spec, ordinary=False):
        self.spec, self.kind, self.ordinary = spec, spec['kind'], ordinary
        if self.kind == 'char':
            if not spec.keys() >= {'stoi', 'itos'}:
                raise ValueError("meta.pkl counts the tokens but does not name them: it lacks stoi or itos")
            self.itos, self.vocab_size = spec['itos'], len(spec['itos'])
            self.stoi = {**spec['stoi'], **{self.itos[i]: i for i in range(self.vocab_size)}}
            if not ''.join(self.stoi) or self.stoi != spec['stoi']:
                raise ValueError("stoi and itos disagree, or an id is missing")
            self.eot, self.bos = None, self.stoi.get('\n', 0)
        elif self.kind == 'bpe':
            import tokenizers

            self.bpe = attempt("cannot read tokenizer.json", tokenizers.Tokenizer.from_str, spec['json'])
            self.bpe.encode_special_tokens = ordinary
            self.bpe.no_padding()  # whatever the file asks for
            self.bpe.no_truncation()
            self.eot = self.bpe.token_to_id(EOT)
            self.bos, self.vocab_size = self.eot or 0, 1 + max(self.bpe.get_vocab().values(), default=0)
        else:
            import tiktoken

            try:
                gpt2 = tiktoken.get_encoding('gpt2')
            except OSError as error:
                raise ConnectionError(
                    "cannot download GPT-2's BPE files: elsewhere run python -c \"import "
                    "tiktoken; tiktoken.get_encoding('gpt2')\" with TIKTOKEN_CACHE_DIR="
                    "FOLDER, then bring FOLDER and set it here"
                ) from error
            self.bpe = tiktoken.Encoding(
                'gpt2',
                pat_str=WORDS,
                mergeable_ranks=gpt2._mergeable_ranks,
                special_tokens=gpt2._special_tokens,
            )
            self.vocab_size, self.eot, self.bos = self.bpe.n_vocab, self.bpe.eot_token, self.bpe.eot_token

    def encode(self, text):
        if self.kind == 'char':
            if unknown := set(text) - self.stoi.keys():
                raise ValueError(
                    f"the model does not know the character {min(unknown)!r}: "
                    f"its {self.vocab_size} characters are {''.join(self.stoi)[:100]!r}"
                )
            return [self.stoi[c] for c in text]
        if self.kind == 'bpe':
            return attempt(f"the tokenizer cannot read {text[:60]!r}", lambda: self.bpe.encode(text).ids)
        if self.ordinary:
            return self.bpe.encode_to_numpy(text, disallowed_special=())
        return self.bpe.encode(text, allowed_special={EOT})

    def decode(self, ids):
        if self.kind == 'char':
            return ''.join(self.itos[i] for i in ids)
        return self.bpe.decode(ids, **({'skip_special_tokens': False} if self.kind == 'bpe' else {}))

    def reads_like(self, other):
        """Whether every id has the same text in both tokenizers."""
        return len({tuple(t.decode([i]) for i in range(t.vocab_size)) for t in (self, other)}) == 1

    def files(self):
        """The file that read_tokenizer_spec reads, as {name: bytes}; empty for GPT-2's BPE."""
        if self.kind == 'char':
            return {'meta.pkl': pickle.dumps({key: self.spec[key] for key in self.spec if key != 'kind'})}
        return {'tokenizer.json': self.spec['json'].encode()} if self.kind == 'bpe' else {}

    def for_transformers(self):
        """The same as an object of the tokenizers library, with <|endoftext|>, which other tools ask for."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        if self.kind == 'bpe':
            result = Tokenizer.from_str(self.spec['json'])
        elif self.kind == 'char':
            result = Tokenizer(models.WordLevel(self.stoi, unk_token=''))  # '' makes unknown ones errors
            result.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
            result.decoder = decoders.Fuse()
        else:
            from transformers.convert_slow_tokenizer import TikTokenConverter

            hf = TikTokenConverter(pattern=self.bpe._pat_str, extra_special_tokens=self.bpe._special_tokens)
            hf.load_tiktoken_bpe = lambda path: self.bpe._mergeable_ranks  # in memory already
            result = hf.converted()
        result.add_special_tokens([EOT])  # nothing where it is one already
        return result


def char_tokenizer(alphabet):
    """Returns a Tokenizer whose id i is the i-th character of `alphabet`."""
    stoi, itos = {c: i for i, c in enumerate(alphabet)}, dict(enumerate(alphabet))
    return Tokenizer({'kind': 'char', 'vocab_size': len(stoi), 'stoi': stoi, 'itos': itos})


def train_bpe(texts, vocab_size):
    """Trains a byte-level BPE like GPT-2's on an iterable of texts or of lists of texts. It is ordinary."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size, min_frequency=2, special_tokens=[EOT])
    return Tokenizer({'kind': 'bpe', 'json': bpe.to_str()}, ordinary=True)
