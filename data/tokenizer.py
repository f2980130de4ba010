"""
How text becomes token ids and back. There are four kinds of tokenizers, and a file in the folder of the data
set, or in its folder `tokenizer`, tells which one it was prepared with:

    meta.pkl         nanoGPT's file, a dict with vocab_size, stoi (token to id) and itos (id to token).
                     If stoi and itos fit together: CharTokenizer. Each token is a character, a byte or a
                     word of a fixed list. Otherwise: IdTokenizer. The ids are chess moves, notes or the
                     like, and are read and written as numbers
    tokenizer.json   TrainedBPE: a byte-pair encoding (BPE) that was trained on the text, or any other
                     tokenizer, in the format of the tokenizers library
    merges.txt       TrainedBPE: a byte-level BPE as GPT-2's own, with its tokens in vocab.json
    none of them     GPT2BPE: GPT-2's own byte-pair encoding, from tiktoken

All four have the same attributes and methods:

    kind                 'char', 'ids', 'bpe' or 'gpt2'
    spec                 a dict of plain values, which checkpoints hold; Tokenizer(spec) makes it again
    vocab_size           every id is smaller than it
    eot                  the id of the token that ends a document; None where no token does
    eot_text             its text: <|endoftext|>, unless the tokenizer has an end token of its own
    bos                  the id that a sample begins with if there is no prompt
    encode(text)         returns the ids of a text
    decode(ids)          returns the text of a list of ids
    files()              returns the file to write beside a data set, as {name: bytes}; none for GPT-2's
    for_transformers()   returns the same tokenizer as an object of the tokenizers library, with <|endoftext|>
                         added if nothing ends a document, because other tools ask for it

In a prompt, the text of a special token such as <|endoftext|> is that token. A tokenizer that is made with
ordinary=True takes it for a text like any other, as training data need it.

A template says how a document is made of texts, and which of its tokens count in the loss: see "Templates".
"""

import hashlib
import json
import os
import pickle
import re
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

EOT = '<|endoftext|>'

# What digest_of_texts returns for GPT-2's tokenizer. Written here, it can be compared without a download.
GPT2_TEXTS = '99962601cb1c72a654f5a895927c4ebb2ce73480b173db83caba9f853e616fec'

# What ends a document in other people's tokenizers. The first that is there counts.
END_TOKENS = (EOT, '<|end_of_text|>', '</s>', '<eos>', '<EOS>', '[EOS]', '<|eos|>', '<|im_end|>')

# GPT-2's own pattern is
#     '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
# and this one cuts a text into the same words in half the time. tiktoken's engine is fast where a group has
# no look-ahead, so the first four alternatives stand in one of their own. At the end of a text `\s++$` finds
# what `\s+(?!\S)` finds. What that leaves is always a single character, so `\s` does what `\s+` did.
WORDS = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"


# model.py defines both of these a second time, because it must work alone. So configurator.py compares the
# name of the class, not the class.
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
# The four kinds


def longest_first(tokens):
    """Returns a pattern that matches the longest token that fits, and where none does, any character."""
    words = [re.escape(token) for token in sorted(tokens, key=len, reverse=True) if len(token) > 1]
    return '|'.join([*words, r'[\s\S]'])


class CharTokenizer:
    kind = 'char'
    eot_text = EOT

    def __init__(self, spec, ordinary=False):
        self.spec = spec
        self.itos = spec['itos']
        self.vocab_size = len(self.itos)
        known = spec['stoi']

        # Tokens of bytes become texts here: Latin-1 has one character for each byte.
        self.of_bytes = any(type(token) is bytes for token in known)
        if self.of_bytes:
            self.itos = {i: token.decode('latin-1') for i, token in self.itos.items()}
            known = {token.decode('latin-1'): i for token, i in known.items()}

        # If putting the inverse of itos over stoi changes nothing, the two agree. stoi may hold more than
        # itos, such as capitals that are read as small letters.
        inverse = {self.itos[i]: i for i in range(self.vocab_size)}
        self.stoi = {**known, **inverse}
        if self.stoi != known:
            raise UserError("stoi and itos disagree, or an id is missing")
        if ''.join(self.stoi) == '':  # join raises an error where a key is no text
            raise UserError("stoi and itos have no character")

        self.eot = self.stoi.get(EOT)
        self.bos = self.stoi.get('\n', 0) if self.eot is None else self.eot
        self.ordinary = ordinary
        self.tokens = set(self.stoi) - {''}
        if ordinary:
            self.tokens.discard(EOT)

        # Single characters are looked up in a table, by their code points. An unknown one has -1 there.
        self.table = np.full(0x110000, -1, dtype=np.int32)
        for token in self.tokens:
            if len(token) == 1:
                self.table[ord(token)] = self.stoi[token]

        # Where tokens have several characters, or characters several bytes, a text is cut into the longest
        # tokens that fit.
        self.has_words = self.of_bytes or max(map(len, self.tokens)) > 1
        self.pattern = longest_first(self.tokens)

    def encode(self, text):
        if self.of_bytes:
            text = text.encode(errors='replace').decode('latin-1')
        if self.has_words:
            pieces = re.findall(self.pattern, text)
            ids = np.array([self.stoi.get(piece, -1) for piece in pieces], dtype=np.int32)
        else:
            # UTF-32 has four bytes for each character: its code point.
            codes = np.frombuffer(text.encode('utf-32-le', errors='surrogatepass'), dtype='<u4')
            ids = self.table[codes]

        if (ids < 0).any():
            unknown = min(set(re.findall(self.pattern, text)) - self.tokens)
            raise UserError(
                f"the model does not know the character {unknown!r}: "
                f"its {self.vocab_size} characters are {''.join(self.stoi)[:100]!r}"
            )
        return ids if self.ordinary else ids.tolist()

    def decode(self, ids):
        text = ''.join(self.itos[i] for i in ids)
        if self.of_bytes:
            text = text.encode('latin-1').decode(errors='replace')
        return text

    def files(self):
        meta = dict(self.spec)
        del meta['kind']
        return {'meta.pkl': pickle.dumps(meta)}

    def for_transformers(self):
        import tokenizers

        # Each token is a word of its own, and Fuse joins the words without spaces. An unknown character is an
        # error, because it would be read as U+FFFF, which is no character and so no word.
        result = tokenizers.Tokenizer(tokenizers.models.WordLevel(self.stoi, unk_token='\uffff'))
        pattern = tokenizers.Regex(self.pattern)
        result.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, 'isolated')
        result.decoder = tokenizers.decoders.Fuse()
        result.add_special_tokens([EOT])
        return result


class IdTokenizer:
    kind = 'ids'
    eot_text = EOT
    eot = None
    bos = 0

    def __init__(self, spec):
        self.spec = spec
        self.vocab_size = spec['vocab_size']

    def encode(self, text):
        if text:
            raise UserError(
                f"the tokens of this model are numbers, without a text: not {text[:40]!r}, but ids begin a "
                "sample, as in --start=\"ids:12 7 99\""
            )
        return []

    def decode(self, ids):
        return ' '.join(map(str, ids))

    def files(self):
        return {'meta.pkl': pickle.dumps({'vocab_size': self.vocab_size})}

    def for_transformers(self):
        raise UserError(
            "the tokens of this model are numbers, without a text: transformers has no tokenizer for that"
        )


class TrainedBPE:
    kind = 'bpe'

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

        # </s> may be a piece of HTML. So a token ends documents only if the file lists it among the added
        # tokens. <|endoftext|> always may.
        added = self.bpe.get_added_tokens_decoder().values()
        may_end = {EOT, *(token.content for token in added)}
        ends = [end for end in END_TOKENS if end in may_end and self.bpe.token_to_id(end) is not None]
        self.eot_text = ends[0] if ends else EOT
        self.eot = self.bpe.token_to_id(self.eot_text)
        self.bos = 0 if self.eot is None else self.eot

    def encode(self, text):
        with user_errors(f"the tokenizer cannot read {text[:60]!r}"):
            return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.bpe.decode(ids, skip_special_tokens=False)

    def files(self):
        return {'tokenizer.json': self.spec['json'].encode()}

    def for_transformers(self):
        result = TrainedBPE(self.spec, ordinary=False).bpe  # another one, because a token may be added to it
        result.add_special_tokens([self.eot_text])
        return result


class GPT2BPE:
    kind = 'gpt2'
    spec = {'kind': 'gpt2'}
    eot_text = EOT

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

        # The converter would read the ranks from a file, and they are in memory already. In its engine `$`
        # matches before a last newline too, but behind `\s++` none can follow.
        converter = TikTokenConverter(pattern=WORDS)
        converter.load_tiktoken_bpe = lambda path: self.bpe._mergeable_ranks
        result = converter.converted()
        result.add_special_tokens([EOT])
        return result


def Tokenizer(spec, ordinary=False):
    """Returns the tokenizer that `spec` describes.

    In a prompt <|endoftext|> is the token that ends a document. With ordinary=True, as for training data, it
    is a text of 13 characters like any other, and ids may come as an array instead of a list.
    """
    if spec['kind'] == 'char' and 'stoi' in spec and 'itos' in spec:
        return CharTokenizer(spec, ordinary)
    if spec['kind'] == 'char':  # both come from a meta.pkl, and this one has no alphabet
        return IdTokenizer(spec)
    if spec['kind'] == 'bpe':
        return TrainedBPE(spec, ordinary)
    return GPT2BPE(ordinary)


def digest_of_texts(spec):
    """Returns a digest of the texts of all ids. That of GPT-2's is known without its files."""
    if spec['kind'] == 'gpt2':
        return GPT2_TEXTS
    tokenizer = Tokenizer(spec)
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    return hashlib.sha256(ascii(texts).encode()).hexdigest()


def same_texts(spec, other):
    """Returns whether both tokenizers have the same text for every id, as GPT-2's and that of its export."""
    return spec == other or digest_of_texts(spec) == digest_of_texts(other)


def needs_download(spec):
    """Returns whether Tokenizer(spec) would have to download GPT-2's two files."""
    if spec['kind'] != 'gpt2':
        return False
    # tiktoken keeps them in one of these folders, named by a hash of the address.
    folder = os.environ.get('DATA_GYM_CACHE_DIR', os.path.join(tempfile.gettempdir(), 'data-gym-cache'))
    folder = os.environ.get('TIKTOKEN_CACHE_DIR', folder)
    addresses = [
        f'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}'
        for name in ('vocab.bpe', 'encoder.json')
    ]
    names = [hashlib.sha1(address.encode()).hexdigest() for address in addresses]
    return not all(os.path.exists(os.path.join(folder, name)) for name in names)


# -----------------------------------------------------------------------------
# Where tokenizers come from: a data set's folder, an alphabet, or training


class StandIn(dict):
    """Stands for any class or function that a pickle names, and runs nothing. It keeps its arguments, and the
    items of a dict, as an OrderedDict has them."""

    __hash__ = object.__hash__  # a dict has none, and could not be a key

    def __init__(self, *arguments):
        self.arguments = arguments

    def __call__(self, *arguments):
        return self

    # Unpickling calls these for the items of a list and for a state, and the object itself where it stands
    # for a function.
    append = extend = __setstate__ = __call__


def numpy_scalar(dtype, data=b''):
    """Returns a number or text of numpy as Python's own.

    numpy pickles it as scalar(dtype('i8', …), bytes), so the first argument of the stand-in is 'i8'. The
    dtype itself is not made, because by its state a file could make numpy read anywhere in memory."""
    with suppress(TypeError, ValueError, IndexError, AttributeError):
        return np.frombuffer(data, dtype.arguments[0])[0].item()
    return StandIn()


# What a pickle may name that has a value for us. Everything else is a StandIn.
PLAIN = {
    '_codecs.encode': lambda text, encoding: text.encode('latin-1'),  # how protocol 2 writes bytes
    'collections.Counter': dict,  # its items are an argument
    'numpy.core.multiarray.scalar': numpy_scalar,
}


class PlainUnpickler(pickle.Unpickler):
    """Reads containers, strings and numbers. It calls nothing else, whatever a file asks for."""

    def find_class(self, module, name):
        full_name = f'{module}.{name}'.replace('numpy._core', 'numpy.core')  # numpy 2 and before it
        return PLAIN.get(full_name, StandIn)


def pairs(table):
    """Returns stoi or itos as a dict. Of a list or a text, the keys are the positions."""
    if isinstance(table, (list, tuple, str)):
        return dict(enumerate(table))
    return dict(table) if isinstance(table, dict) else {}


def alphabet_of(stoi, itos):
    """Returns stoi and itos as a CharTokenizer wants them. Raises an error where they do not make one."""
    # Ids may be floats, as 1.0 is 1.
    itos = {int(i): token for i, token in itos.items()}
    stoi = {token: int(i) for token, i in stoi.items()}
    if not itos:
        raise UserError("itos is missing")
    if max(itos) > 65535:
        raise UserError(f"itos has the id {max(itos)}, which is beyond 65,535")

    # Ids that are left out, as 0 often is, get an empty text, of bytes where the other tokens are bytes.
    nothing = type(itos[max(itos)])()
    for i in range(max(itos)):
        if i not in itos:
            itos[i] = nothing
            stoi[nothing] = i
    CharTokenizer({'stoi': stoi, 'itos': itos})  # only a try: it raises an error if the two disagree
    return stoi, itos


def read_meta(path):
    """Returns the spec of a CharTokenizer from meta.pkl, or of an IdTokenizer where stoi and itos make none.

    For training, nanoGPT reads nothing but vocab_size, and so the rest is no reason not to train.
    """
    with open(path, 'rb') as f:
        meta = PlainUnpickler(f).load()
    if not isinstance(meta, dict):
        raise ValueError("it holds no dict")
    stoi = pairs(meta.get('stoi'))
    itos = pairs(meta.get('itos'))

    # Without vocab_size, the largest id tells.
    ids = [i for i in (*stoi.values(), *itos) if type(i) is int]
    vocab_size = meta.get('vocab_size', 1 + max(ids, default=-1))
    # True and 3.0 are no sizes, although they compare like numbers.
    if type(vocab_size) is not int or not 0 < vocab_size <= 65536:
        raise ValueError(f"vocab_size is {vocab_size!r:.40}, not a number from 1 to 65,536")

    spec = {'kind': 'char', 'vocab_size': vocab_size}
    if 'stoi' in meta or 'itos' in meta:
        try:
            spec['stoi'], spec['itos'] = alphabet_of(stoi, itos)
            spec['vocab_size'] = max(vocab_size, len(spec['itos']))
        except Exception as error:  # tables may fail in any way; train.py and sample.py print the problem
            spec['problem'] = f"stoi and itos of meta.pkl do not make an alphabet ({one_line(error)})"
    return spec


def read_tokenizer_json(path):
    """Returns the spec of a TrainedBPE, or of a CharTokenizer that was exported for transformers."""
    text = path.read_text('utf-8')
    content = json.loads(text)
    model, decoder = content['model'], content.get('decoder') or {}

    # A WordLevel model whose words are joined without spaces, and counted without gaps, is what
    # CharTokenizer.for_transformers has made: the words are its tokens.
    vocab = model['vocab']
    if model.get('type') == 'WordLevel' and decoder.get('type') == 'Fuse':
        if sorted(vocab.values()) == list(range(len(vocab))):
            return char_tokenizer(sorted(vocab, key=vocab.get)).spec
    return {'kind': 'bpe', 'json': text}


def read_merges(path):
    """Returns the spec of a TrainedBPE from merges.txt and the vocab.json beside it, as GPT-2 has them."""
    from tokenizers import ByteLevelBPETokenizer, pre_tokenizers

    vocab_path = path.with_name('vocab.json')
    vocab = json.loads(vocab_path.read_text('utf-8'))
    bpe = ByteLevelBPETokenizer.from_file(str(vocab_path), str(path))

    # A byte-level BPE has a character for each byte, Ġ for the space. Others would lose spaces or letters.
    merges = json.loads(bpe.to_str())['model']['merges']  # pairs of texts
    characters = {character for merge in merges for character in ''.join(merge)}
    is_byte_level = 'Ġ' in vocab and characters <= set(pre_tokenizers.ByteLevel.alphabet())
    if not is_byte_level:
        raise ValueError("it is not byte-level, as GPT-2's is: put its tokenizer.json beside it")

    # Tokens of the vocabulary that end a document are marked as special, and keep their ids.
    # added_tokens.json has further tokens, which get the ids that follow.
    added_path = path.with_name('added_tokens.json')
    added = json.loads(added_path.read_text('utf-8')) if added_path.is_file() else {}
    bpe.add_special_tokens([end for end in END_TOKENS if end in vocab])
    bpe.add_special_tokens(sorted(added, key=added.get))
    if any(bpe.token_to_id(token) != i for token, i in added.items()):
        raise ValueError("added_tokens.json leaves out some ids")
    return {'kind': 'bpe', 'json': bpe.to_str()}


# Files of tokenizers that are not read, and what to do with them. CONVERT writes a tokenizer.json beside one.
CONVERT = (
    'in its folder run `{}python -c "'
    "from transformers import {} as T; T.from_pretrained('.').save_pretrained('.')"
    '"`'
)
BY_ITS_LIBRARY = "make a tokenizer.json of it by the library that made it"
OTHER_TOKENIZERS = {
    'vocab.txt': CONVERT.format('', 'BertTokenizerFast'),
    'tokenizer.model': CONVERT.format('pip install sentencepiece && ', 'PreTrainedTokenizerFast'),
    'vocab.json': "its merges.txt is missing",
    '*-vocab.json': "name the two files of this tokenizer vocab.json and merges.txt",
    '*.model': BY_ITS_LIBRARY,
    '*.tiktoken': BY_ITS_LIBRARY,
    'tokenizer.pkl': BY_ITS_LIBRARY,
}


def read_tokenizer_spec(folder):
    """Returns the spec of the tokenizer of the data set or the model in `folder`. Raises UserError."""
    places = [Path(folder), Path(folder) / 'tokenizer']
    readers = {'meta.pkl': read_meta, 'tokenizer.json': read_tokenizer_json, 'merges.txt': read_merges}
    for place in places:
        for name, read in readers.items():
            path = place / name
            if path.is_file():
                with user_errors(f"cannot read {path}"):
                    return read(path)

    # No file means GPT-2's tokenizer, but not where there is another one.
    for place in places:
        for pattern, advice in OTHER_TOKENIZERS.items():
            for path in place.glob(pattern):
                # Those of SentencePiece begin with <unk>. Other programs have a NAME.model too.
                if path.suffix == '.model' and b'<unk>' not in path.read_bytes()[:100]:
                    continue
                raise UserError(
                    f"{path} is a tokenizer that is not read as it is: {advice}; if the tokens are not of "
                    "this file, move it away"
                )
    return {'kind': 'gpt2'}


def char_tokenizer(alphabet):
    """Returns a tokenizer for training data whose id i is the i-th character, or token, of `alphabet`."""
    itos = dict(enumerate(alphabet))
    stoi = {token: i for i, token in itos.items()}
    spec = {'kind': 'char', 'vocab_size': len(stoi), 'stoi': stoi, 'itos': itos}
    return CharTokenizer(spec, ordinary=True)


def train_bpe(texts, vocab_size):
    """Trains a byte-level BPE like GPT-2's on an iterable of texts or of lists of texts.

    The tokenizer that it returns is for training data: <|endoftext|> in a text is ordinary text.
    """
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size, special_tokens=[EOT])
    return TrainedBPE({'kind': 'bpe', 'json': bpe.to_str()}, ordinary=True)


# -----------------------------------------------------------------------------
# Templates
#
# A template such as "Question: {question}\nAnswer: {answer}" makes a document of a row, which is a dict of
# texts. A document is a list of parts, pairs (text, counts). `counts` says whether the tokens of the text are
# targets in the loss; a text of None is the token <|endoftext|>. Each part is encoded for itself, so the ids
# of a prompt, which ends where a part ends, are those that training saw.

DOCUMENTS = '{text}'  # the template of plain documents, in which every token counts
CONVERSATIONS = '{messages}'  # the template of rows with a list of messages, each with a role and a content
FIELD = re.compile(r'\{([^{}]+)\}')


def unescape(text):
    """Returns a text of the command line with \\n, \\t and \\\\ as a newline, a tab and a backslash."""
    characters = {'n': '\n', 't': '\t', '\\': '\\'}
    return re.sub(r'\\([nt\\])', lambda match: characters[match[1]], text)


def template_fields(template):
    """Returns the names in braces, in their order. Raises UserError where there are none, or other braces."""
    fields = FIELD.findall(template)
    rest = FIELD.sub('', template)
    if not fields or '{' in rest or '}' in rest:
        raise UserError(
            f"the template {template!r} does not name its fields in braces, as "
            "--template=\"Question: {question}\\nAnswer: {answer}\" does"
        )
    return fields


def text_in(row, field):
    """Returns the text of a field. Raises UserError."""
    value = row.get(field)
    if value is None:
        raise UserError(f"the field \"{field}\" is missing")
    if type(value) is not str:
        raise UserError(f"the field \"{field}\" is no text, but {value!r:.40}")
    return value


def conversation_parts(messages):
    """Returns the parts of a conversation. The assistant's answers count, each with an <|endoftext|>."""
    if type(messages) is not list or not all(type(message) is dict for message in messages):
        raise UserError("the field \"messages\" is no list of messages with a role and a content")
    parts = []
    prompt = ''  # what comes next and does not count
    for message in messages:
        role = text_in(message, 'role')
        content = text_in(message, 'content').strip()
        if role == 'system':
            prompt += f'{content}\n'
        elif role == 'user':
            prompt += f'User: {content}\n'
        elif role == 'assistant':
            parts += [(f'{prompt}Assistant:', False), (f' {content}', True), (None, True)]
            prompt = '\n'
        else:
            raise UserError(f"the role {role!r} is none of system, user, assistant")

    # The <|endoftext|> of a last answer ends the document too. Behind another message it does not count.
    if not messages or role != 'assistant':
        parts += [(prompt, False), (None, False)]
    return parts


# The same in the language of transformers, for exports.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% set content = message.content | trim %}"
    "{% if message.role == 'system' %}{{ content + '\\n' }}"
    "{% elif message.role == 'user' %}{{ 'User: ' + content + '\\n' }}"
    "{% else %}{{ 'Assistant: ' + content + eos_token }}"
    "{% if add_generation_prompt or not loop.last %}{{ '\\n' }}{% endif %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}"
    "{% elif messages[-1].role != 'assistant' %}{{ eos_token }}{% endif %}"
)


def template_parts(template, row):
    """Returns the parts of the document that a template makes of a row. Raises UserError.

    What stands before the last field does not count; that field and all behind it do."""
    if template == DOCUMENTS:
        return [(text_in(row, 'text'), True), (None, True)]
    if template == CONVERSATIONS:
        return conversation_parts(row.get('messages'))

    def filled(text):
        return FIELD.sub(lambda match: text_in(row, match[1]).strip(), text)

    *_, last_field = FIELD.finditer(template)
    prompt = filled(template[: last_field.start()])
    answer = filled(template[last_field.start() :])

    # A space before the answer is part of its first token.
    if prompt.endswith(' '):
        prompt = prompt[:-1]
        answer = f' {answer}'
    return [(prompt, False), (answer, True), (None, True)]


def template_prompt(template, line):
    """Returns what a model reads before it answers a line. Raises UserError where a template has not exactly
    one field to fill."""
    if template == CONVERSATIONS:
        question = {'role': 'user', 'content': line}
        answer = {'role': 'assistant', 'content': ''}
        row = {'messages': [question, answer]}
    else:
        *others, last = template_fields(template)
        to_fill = set(others) - {last}
        if len(to_fill) != 1:
            raise UserError(
                f"the template {template!r} has {len(to_fill)} fields for a line to fill, instead of one: "
                "name another with --template"
            )
        row = {to_fill.pop(): line, last: ''}

    # The first part is all that stands before the answer.
    prompt, _ = template_parts(template, row)[0]
    return prompt


def encode_parts(tokenizer, parts):
    """Encodes each part for itself. Returns ids and mask, (n,) each: the mask is 1 where a token counts.

    For a tokenizer without <|endoftext|> there may be no None among them: write_documents drops it."""
    ids, mask = [], []
    for text, counts in parts:
        tokens = [tokenizer.eot] if text is None else tokenizer.encode(text)
        ids.append(np.asarray(tokens, dtype='<u2'))
        mask.append(np.full(len(tokens), counts, dtype=np.uint8))
    return np.concatenate(ids), np.concatenate(mask)
