"""
How text becomes token ids and back, in three kinds. A file in the folder of the data set tells which:

    meta.pkl         one token per character, in nanoGPT's format: a plain dict with vocab_size, stoi, itos
    tokenizer.json   a byte-pair encoding (BPE) trained on the text, in the format of the tokenizers library
    neither          GPT-2's BPE, from tiktoken

A tokenizer_spec says the same in a dict of plain values, so that a checkpoint can hold it.
"""
import io
import json
import pickle
from pathlib import Path

EOT = '<|endoftext|>'

class PlainUnpickler(pickle._Unpickler):  # the one in C allocates what 48 bytes of a file tell it to: 5 GB
    """Reads containers, strings and numbers only, so that loading a file cannot call functions."""
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}: plain values only")

def one_line(error):
    """The type and the message of an exception, shortened to one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

def read_tokenizer_spec(folder):
    """Returns the tokenizer_spec of the data set in `folder`. Raises ValueError if its file is damaged."""
    path = next(filter(Path.is_file, (Path(folder) / name for name in ('meta.pkl', 'tokenizer.json'))), None)
    if path is None:
        return {'kind': 'gpt2'}
    try:
        if path.name == 'meta.pkl':
            found = PlainUnpickler(io.BytesIO(path.read_bytes())).load()
            return {'kind': 'char', **{k: found[k] for k in ('vocab_size', 'stoi', 'itos') if k in found}}
        text = path.read_text('utf-8', errors='replace')
        model = json.loads(text)['model']
        if model['type'] == 'WordLevel' and max(map(len, model['vocab'])) == 1:  # of for_transformers, below
            return char_tokenizer(sorted(model['vocab'], key=model['vocab'].get)).spec
        return {'kind': 'bpe', 'json': text}
    except Exception as error:  # a damaged file fails in a dozen ways
        raise ValueError(f"cannot read {path} ({one_line(error)})") from error

class Tokenizer:
    """encode(text) returns ids, decode(ids) returns text. `vocab_size` counts the ids in use, `eot` is the
    id that ends a document (None for characters), `bos` the one to start from without a text. ordinary=True,
    as for training data: <|endoftext|> in a text is thirteen characters. Raises ValueError, ConnectionError.
    """
    def __init__(self, spec, ordinary=False):
        self.spec, self.kind, self.ordinary = spec, spec['kind'], ordinary
        if self.kind == 'char':
            if not spec.keys() >= {'stoi', 'itos'}:
                raise ValueError("meta.pkl counts the tokens but does not name them: it lacks stoi or itos")
            self.stoi, self.itos = spec['stoi'], spec['itos']
            self.vocab_size, self.eot, self.bos = len(self.itos), None, self.stoi.get('\n', 0)
        elif self.kind == 'bpe':
            import tokenizers
            try:
                self.bpe = tokenizers.Tokenizer.from_str(spec['json'])
            except Exception as error:  # the library raises plain Exception
                raise ValueError(f"cannot read tokenizer.json ({one_line(error)})") from error
            self.bpe.encode_special_tokens = ordinary
            self.bpe.no_padding()  # whatever the file asks for
            self.bpe.no_truncation()
            self.vocab_size, self.eot = self.bpe.get_vocab_size(), self.bpe.token_to_id(EOT)
            self.bos = self.eot or 0
        else:
            import tiktoken
            try:
                self.bpe = tiktoken.get_encoding('gpt2')
            except OSError as error:
                raise ConnectionError(
                    "cannot download GPT-2's BPE files: elsewhere run python -c \"import tiktoken; tiktoken."
                    "get_encoding('gpt2')\" with TIKTOKEN_CACHE_DIR=FOLDER, then bring FOLDER and set it here"
                ) from error
            self.vocab_size, self.eot, self.bos = self.bpe.n_vocab, self.bpe.eot_token, self.bpe.eot_token

    def encode(self, text):
        if self.kind == 'char':
            if unknown := set(text) - self.stoi.keys():
                raise ValueError(f"the model does not know the character {min(unknown)!r}: "
                                 f"its {self.vocab_size} characters are {''.join(self.stoi)[:100]!r}")
            return [self.stoi[c] for c in text]
        if self.kind == 'bpe':
            try:
                return self.bpe.encode(text).ids
            except Exception as error:  # a foreign tokenizer.json may lack bytes
                raise ValueError(f"the tokenizer cannot read {text[:60]!r} ({one_line(error)})") from error
        if self.ordinary:
            return self.bpe.encode_to_numpy(text, disallowed_special=())
        return self.bpe.encode(text, allowed_special={EOT})

    def decode(self, ids):
        if self.kind == 'char':
            return ''.join(self.itos[i] for i in ids)
        options = {'skip_special_tokens': False} if self.kind == 'bpe' else {}
        return self.bpe.decode(ids, **options)

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
    from tokenizers import Tokenizer as Trained
    from tokenizers import decoders, models, pre_tokenizers, trainers
    bpe = Trained(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return Tokenizer({'kind': 'bpe', 'json': bpe.to_str()}, ordinary=True)
