"""
How text becomes token ids and back. There are three kinds of tokenizers, and a file in the folder of the data
set tells which one it was prepared with:

    meta.pkl         CharTokenizer: one token per character. It is nanoGPT's file, a dict with vocab_size,
                     stoi (character to id) and itos (id to character)
    tokenizer.json   TrainedBPE: a byte-pair encoding (BPE) that was trained on the text, in the format of the
                     tokenizers library
    neither          GPT2BPE: GPT-2's own byte-pair encoding, from tiktoken

All three have the same attributes and methods:

    kind                 'char', 'bpe' or 'gpt2'
    spec                 a dict of plain values, which checkpoints hold; Tokenizer(spec) makes it again
    vocab_size           every id is smaller than it
    eot                  the id that ends a document; None if the tokens are characters
    bos                  the id that a sample begins with if there is no prompt
    encode(text)         returns the ids of a text
    decode(ids)          returns the text of a list of ids
    reads_like(other)    returns whether both tokenizers have the same text for every id
    files()              returns the file that read_tokenizer_spec reads, as {name: bytes}
    for_transformers()   returns the same tokenizer as an object of the tokenizers library, with <|endoftext|>
                         added if it is missing, because other tools ask for it
"""

import json
import pickle
from contextlib import contextmanager
from pathlib import Path

EOT = '<|endoftext|>'

# This pattern cuts a text into the same words as GPT-2's own, in half the time: tiktoken's engine is fast
# where a part has no look-ahead, so the first four stand in a group of their own. At the end of a text
# `\s++$` finds what `\s+(?!\S)` finds.
WORDS = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"


# model.py, which works alone, has a UserError and a one_line of its own. configurator.py knows both by their
# name.
class UserError(ValueError):
    """A mistake of the user. Its text is one line that says what to do."""


def one_line(error):
    """Returns the type and the message of an exception as one line of at most some 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextmanager
def user_errors(message):
    """Turns whatever its block raises into a UserError that begins with `message`."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the Rust code in tokenizers is not an Exception
        raise UserError(f"{message} ({one_line(error)})") from None


# -----------------------------------------------------------------------------
# The three kinds


def texts_of_ids(tokenizer):
    return [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]


def same_texts(tokenizer, other):
    """Returns whether both tokenizers have the same text for every id. Each class calls it reads_like."""
    return texts_of_ids(tokenizer) == texts_of_ids(other)


class CharTokenizer:
    kind = 'char'
    eot = None
    reads_like = same_texts

    def __init__(self, spec):
        if 'stoi' not in spec or 'itos' not in spec:
            raise UserError("meta.pkl counts the tokens but does not name them: it lacks stoi or itos")
        self.spec = spec
        self.itos = spec['itos']
        self.vocab_size = len(self.itos)

        # stoi must be the inverse of itos, but may know further characters, such as capitals that are read as
        # small letters. Its ids may be floats, which equal the ints that replace them here.
        inverse = {self.itos[i]: i for i in range(self.vocab_size)}
        self.stoi = {**spec['stoi'], **inverse}
        if self.stoi != spec['stoi']:  # it gives a character of itos another id, or none
            raise UserError("stoi and itos disagree, or an id is missing")
        if ''.join(self.stoi) == '':  # join raises an error where a key is no text
            raise UserError("stoi and itos disagree, or have no character")

        self.bos = self.stoi.get('\n', 0)

    def encode(self, text):
        unknown = set(text) - self.stoi.keys()
        if unknown:
            raise UserError(
                f"the model does not know the character {min(unknown)!r}: "
                f"its {self.vocab_size} characters are {''.join(self.stoi)[:100]!r}"
            )
        return [self.stoi[character] for character in text]

    def decode(self, ids):
        return ''.join(self.itos[i] for i in ids)

    def files(self):
        meta = dict(self.spec)
        del meta['kind']
        return {'meta.pkl': pickle.dumps(meta)}

    def for_transformers(self):
        import tokenizers

        # Each character is a word of its own, and Fuse joins the words without spaces. An unknown character
        # is an error, because it would be read as the word '', which does not exist.
        result = tokenizers.Tokenizer(tokenizers.models.WordLevel(self.stoi, unk_token=''))
        result.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'), 'isolated')
        result.decoder = tokenizers.decoders.Fuse()
        result.add_special_tokens([EOT])
        return result


class TrainedBPE:
    kind = 'bpe'
    reads_like = same_texts

    def __init__(self, spec, ordinary):
        import tokenizers

        self.spec = spec
        with user_errors("cannot read tokenizer.json"):
            self.bpe = tokenizers.Tokenizer.from_str(spec['json'])
            # A vocabulary may leave out some ids, so its size follows from the largest.
            self.vocab_size = 1 + max(self.bpe.get_vocab().values())

        # The file may ask for padding and for truncation. Neither suits a stream of tokens.
        self.bpe.no_padding()
        self.bpe.no_truncation()

        # True means that special tokens in a text are encoded as any other text.
        self.bpe.encode_special_tokens = ordinary
        self.eot = self.bpe.token_to_id(EOT)
        self.bos = self.eot or 0

    def encode(self, text):
        with user_errors(f"the tokenizer cannot read {text[:60]!r}"):
            return self.bpe.encode(text).ids

    def decode(self, ids):
        return self.bpe.decode(ids, skip_special_tokens=False)

    def files(self):
        return {'tokenizer.json': self.spec['json'].encode()}

    def for_transformers(self):
        result = TrainedBPE(self.spec, ordinary=False).bpe  # another one, because EOT is added to it
        result.add_special_tokens([EOT])
        return result


class GPT2BPE:
    kind = 'gpt2'
    spec = {'kind': 'gpt2'}
    reads_like = same_texts

    def __init__(self, ordinary):
        import tiktoken

        try:
            gpt2 = tiktoken.get_encoding('gpt2')
        except OSError as error:
            raise UserError(
                "cannot download GPT-2's BPE files: elsewhere run "
                "python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\" "
                "with TIKTOKEN_CACHE_DIR=FOLDER, then bring FOLDER and set it here"
            ) from error

        # This is GPT-2's encoding with the faster pattern.
        self.bpe = tiktoken.Encoding(
            'gpt2',
            pat_str=WORDS,
            mergeable_ranks=gpt2._mergeable_ranks,
            special_tokens=gpt2._special_tokens,
        )
        self.ordinary = ordinary
        self.vocab_size = self.bpe.n_vocab
        self.eot = self.bos = self.bpe.eot_token

    def encode(self, text):
        # A special token in a text is an error for tiktoken unless it is allowed, or nothing is disallowed.
        if self.ordinary:
            return self.bpe.encode_to_numpy(text, disallowed_special=())
        return self.bpe.encode(text, allowed_special={EOT})

    def decode(self, ids):
        return self.bpe.decode(ids)

    def files(self):
        return {}

    def for_transformers(self):
        from transformers.convert_slow_tokenizer import TikTokenConverter

        # The converter would read the ranks from a file. They are in memory already.
        converter = TikTokenConverter(pattern=WORDS)
        converter.load_tiktoken_bpe = lambda path: self.bpe._mergeable_ranks
        result = converter.converted()
        result.add_special_tokens([EOT])
        return result


def Tokenizer(spec, ordinary=False):
    """Returns the tokenizer that `spec` describes.

    In a prompt <|endoftext|> is the token that ends a document. With ordinary=True, as for training data, it
    is a text of 13 characters like any other.
    """
    if spec['kind'] == 'char':
        return CharTokenizer(spec)
    if spec['kind'] == 'bpe':
        return TrainedBPE(spec, ordinary)
    return GPT2BPE(ordinary)


# -----------------------------------------------------------------------------
# Where tokenizers come from: a data set's folder, an alphabet, or training


class PlainUnpickler(pickle.Unpickler):
    """Reads containers, strings and numbers only, so that loading a file cannot call functions."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}: plain values only")


def read_meta(path):
    """Returns the spec of a CharTokenizer from meta.pkl."""
    with open(path, 'rb') as f:
        meta = PlainUnpickler(f).load()
    spec = {'kind': 'char'}
    for key in ('vocab_size', 'stoi', 'itos'):
        if key in meta:
            spec[key] = meta[key]

    # True and 3.0 are no sizes, although they compare like numbers.
    vocab_size = meta.get('vocab_size', 1)
    if type(vocab_size) is not int or not 0 < vocab_size <= 65536:
        raise ValueError(f"vocab_size is {vocab_size!r:.40}")

    # The meta.pkl of some data sets only counts the tokens, which is enough for training.
    if 'stoi' in spec and 'itos' in spec:
        CharTokenizer(spec)  # raises an error where it cannot be one
    return spec


def read_tokenizer_json(path):
    """Returns the spec of a TrainedBPE, or of a CharTokenizer that was exported for transformers."""
    text = path.read_text('utf-8')
    model = json.loads(text)['model']
    vocab = model['vocab']

    # CharTokenizer.for_transformers makes a word of each character. Here they are characters again.
    if model['type'] == 'WordLevel' and max(map(len, vocab)) == 1:
        return char_tokenizer(sorted(vocab, key=vocab.get)).spec
    return {'kind': 'bpe', 'json': text}


def read_tokenizer_spec(folder):
    """Returns the spec of the tokenizer that the data set in `folder` was prepared with. Raises UserError."""
    for name, read in (('meta.pkl', read_meta), ('tokenizer.json', read_tokenizer_json)):
        path = Path(folder) / name
        if path.is_file():
            with user_errors(f"cannot read {path}"):
                return read(path)
    return {'kind': 'gpt2'}


def char_tokenizer(alphabet):
    """Returns a tokenizer whose id i is the i-th character of `alphabet`."""
    itos = dict(enumerate(alphabet))
    stoi = {character: i for i, character in itos.items()}
    return CharTokenizer({'kind': 'char', 'vocab_size': len(stoi), 'stoi': stoi, 'itos': itos})


def train_bpe(texts, vocab_size):
    """Trains a byte-level BPE like GPT-2's on an iterable of texts or of lists of texts.

    The tokenizer that it returns is for training data: <|endoftext|> in a text is ordinary text.
    """
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size, special_tokens=[EOT])
    return TrainedBPE({'kind': 'bpe', 'json': bpe.to_str()}, ordinary=True)
