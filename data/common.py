"""
What the prepare.py scripts share, and atomic writes for train.py too. From top to bottom: files that appear
whole; reading files of text and of rows; documents; train.bin and val.bin.

A document is made of parts, pairs (text, counts), as data/tokenizer.py has them under "Templates": `counts`
says whether the tokens of the text count in the loss, and a text of None is <|endoftext|>. The bins are
written from a stream of parts, so memory does not grow with the text.
"""

import codecs
import csv
import errno
import filecmp
import glob
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
import sysconfig
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.tokenizer import (
    CONVERSATIONS,
    DOCUMENTS,
    EOT,
    UserError,
    char_tokenizer,
    encode_parts,
    template_fields,
    template_parts,
    text_in,
)

TINY_SHAKESPEARE = (  # address, SHA-256
    'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
    '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed',
)


@contextmanager
def naming(path):
    """Names the file in the error of a full disk, which Python leaves without a name once a file is open."""
    try:
        yield
    except Exception as error:
        # torch.save raises an error of its own on top of the system's.
        for cause in (error, error.__context__):
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                cause.filename = cause.filename or str(path)
                raise cause from None
        raise


@contextmanager
def atomic_write(path):
    """Opens path.part for writing bytes and renames it to `path` once everything is on the disk.

    A process that is killed meanwhile leaves the old file, or the new one, whole."""
    part = Path(f"{path}.part")
    part.unlink(missing_ok=True)  # after a kill it may be a second name of a good file, which link has made
    try:
        with naming(path), open(part, 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
        flush_folder(part.parent)
    finally:
        part.unlink(missing_ok=True)


def flush_folder(folder):
    """Waits until the names of a folder's files are on the disk. Windows cannot be asked for that."""
    if os.name == 'posix':
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def link(path, name):
    """Gives the file at `path` a second name, at once. Copies it where the file system has no links."""
    part = Path(f"{name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)
    except OSError:
        with open(path, 'rb') as source, atomic_write(name) as copy:
            shutil.copyfileobj(source, copy)
    else:
        os.replace(part, name)


def keep_as_old(paths):
    """Gives each file a second name, NAME.old, or .old1, .old2 … where one of these is taken.

    Returns {path: second name} of the files that exist. An error, such as a full disk, leaves none."""
    paths = [path for path in paths if os.path.exists(path)]
    suffix = '.old'
    tried = 0
    while any(os.path.exists(path + suffix) for path in paths):
        tried += 1
        suffix = f'.old{tried}'

    second_names = {path: path + suffix for path in paths}
    try:
        for path, name in second_names.items():
            link(path, name)
    except OSError:
        for name in second_names.values():
            Path(name).unlink(missing_ok=True)
        raise
    return second_names


def download(url, sha256, path):
    """Returns the bytes of the file at path, fetched from url if it is not there. Checks their SHA-256."""
    is_here = path.is_file()
    if is_here:
        content = path.read_bytes()
    else:
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                content = response.read()
        except Exception as error:  # of the network, or of HTTP
            sys.exit(
                f"cannot download {url} ({getattr(error, 'reason', error)}): "
                f"fetch it where there is a network and put it at {path}"
            )

    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        sys.exit(
            f"{path if is_here else url} is damaged: {len(content)} bytes with SHA-256 {found}, "
            f"expected {sha256}"
        )

    if not is_here:
        with atomic_write(path) as f:
            f.write(content)
    return content


def library_modules():
    """Returns the modules of Python's own standard library, {path: text}, sorted by path: those in ASCII,
    without what was installed, tests, and what not every Python has.
    """
    skipped = set('site-packages dist-packages test tests idlelib lib2to3 turtledemo ensurepip'.split())
    stdlib = Path(sysconfig.get_path('stdlib'))
    modules = {}
    for path in sorted(path.relative_to(stdlib) for path in stdlib.rglob('*.py')):
        if skipped.isdisjoint(path.parts):
            text = (stdlib / path).read_bytes()
            if text.isascii():
                modules[path] = text.decode().replace('\r\n', '\n')
    if not modules:
        sys.exit(f"{stdlib} holds no modules in source form: this Python was stripped, use another one")
    return modules


def check_vocab_size(vocab_size):
    """Exits if a BPE cannot be trained to that size."""
    if not 257 <= vocab_size <= 65536:
        sys.exit(f"vocab_size must be from 257 (bytes, <|endoftext|>) to 65536 (uint16), not {vocab_size}")


# -----------------------------------------------------------------------------
# Files of text and of rows

ROWS = '.jsonl', '.json', '.csv', '.parquet'

# All files of a data set, and those that would be read as its tokenizer. write_bins deletes those of an old
# one in this order.
FILES = (
    'train.bin val.bin train.mask val.mask template.txt meta.pkl tokenizer.json words.json '
    'vocab.json merges.txt added_tokens.json'
).split()


def kind_of(path):
    """Returns the suffix of a file of rows, and .txt for any other file. x.csv.gz is of the kind of x.csv."""
    suffixes = [suffix for suffix in Path(path.lower()).suffixes if suffix not in ('.gz', '.zst')]
    last = suffixes[-1] if suffixes else ''
    return last if last in ROWS else '.txt'


def read_blocks(path):
    """Yields the bytes of a file in blocks, decompressed where its name ends in .gz or .zst."""
    import pyarrow

    try:
        with pyarrow.input_stream(path) as f:
            while block := f.read(1_000_000):
                yield block
    except OSError as error:
        sys.exit(f"{path}: {error.strerror or error}")


def encoding_of(path, encoding=''):
    """Returns how a text is encoded: in UTF-16 if it begins with that mark, else as `encoding` says."""
    block = next(read_blocks(path), b'')
    if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return 'utf-16'
    name = codecs.lookup(encoding or 'utf-8').name
    if name == 'utf-16':
        return 'utf-16-le'  # for 'utf-16' Python wants the mark
    if name == 'utf-8':
        return 'utf-8-sig'  # which reads UTF-8 with and without a mark
    return name


def is_text(path, encoding):
    """Returns whether a file looks like text. Pictures, programs and .docx have zero bytes; a PDF may not."""
    block = next(read_blocks(path), b'')
    text = block.decode(encoding_of(path, encoding), errors='replace')
    return '\0' not in text and not text.startswith('%PDF')


def find_files(source, encoding=''):
    """Returns the files that a path or a glob names, sorted, and their kind. A folder means all its files.

    What is no text is left out, which a line says, and so are the files of a data set and names that begin
    with a dot."""
    # A path may look like a glob, such as "notes [1].txt".
    pattern = f'{glob.escape(source)}/**' if os.path.isdir(source) else source
    found = {path for path in [source, *glob.glob(pattern, recursive=True)] if os.path.isfile(path)}
    # Where a data set stands beside its text, its own files are left out, and so are those with .old.
    names = {path: os.path.basename(path).partition('.old')[0] for path in found}
    paths = sorted(path for path in found if path == source or names[path] not in FILES)
    if not paths:
        sys.exit(f"{source}: no such text")

    others = [path for path in paths if kind_of(path) == '.txt' and not is_text(path, encoding)]
    paths = [path for path in paths if path not in others]
    if not paths:
        sys.exit(f"{others[0]}: no text (export it as text if it is from a word processor, or a PDF)")
    if others:
        print(f"files that are no text are left out: {len(others)}, such as {', '.join(others[:3])}")

    # Where there is other text, a .json is most likely settings of a program, so it is text too.
    kinds = {kind_of(path) for path in paths}
    if kinds == {'.txt', '.json'}:
        kinds = {'.txt'}
    if len(kinds) > 1:
        sys.exit(
            f"{source}: files of several kinds, {', '.join(sorted(kinds))}: name those of one kind, "
            "such as \"FOLDER/**/*.txt\""
        )
    return paths, kinds.pop()


def encoding_advice(data, encoding):
    """Returns what to do about bytes that are not of this encoding; `data` begins with the first of them."""
    # In GB18030, the encoding of much Chinese text, more than half of the bytes above 127 are in pairs like
    # these. In cp1252, of Western Europe, they are accented letters between others.
    pairs = re.findall(rb'[\xa1\xa3\xb0-\xd7][\xa1-\xfe]', data)
    is_chinese = 2 * len(pairs) > sum(byte > 127 for byte in data) / 2
    guess = 'gb18030' if is_chinese else 'cp1252'
    if guess == encoding:
        return "name the encoding that it has by --encoding"
    return f"--encoding={guess} would read {data[:20].decode(guess, 'replace')!r} there"


def read_text(path, encoding=''):
    """Yields a text in blocks, with \\n for \\r\\n. Exits at the first byte that is not of its encoding."""
    encoding = encoding_of(path, encoding)
    # This keeps the bytes of half a character, and half of \r\n, until the next block comes.
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=False)
    size = 0  # of the blocks so far
    was_ascii = True  # whether all before was, which says nothing about the encoding
    for block in chain(read_blocks(path), [b'']):  # the empty block is the end
        size += len(block)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            # error.object is what the decoder has kept and this block, so it ends at byte `size`.
            bad = error.object[error.start :]
            advice = "all text before it is, so the file may be damaged there"
            if was_ascii and error.object[: error.start].isascii():
                advice = encoding_advice(bad[:1000], encoding)
            place = f"{path}: byte {size - len(bad)}, {bad[0]:#x}"
            sys.exit(f"{place}, is not {encoding.removesuffix('-sig')}; {advice}")
        was_ascii = was_ascii and text.isascii()
        yield text.replace('\r\n', '\n')


def read_rows(path, encoding=''):
    """Yields the rows of a file, as dicts. Raises ValueError or csv.Error where one cannot be read."""
    import pyarrow.parquet

    kind = kind_of(path)
    if kind == '.parquet':
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(64):
            for i in range(len(batch)):
                yield batch.slice(i, 1).to_pylist()[0]
        return

    lines = io.TextIOWrapper(pyarrow.input_stream(path), encoding_of(path, encoding), newline='')
    if kind == '.csv':
        csv.field_size_limit(2**31 - 1)
        yield from csv.DictReader(lines, strict=True)
        return
    for line in lines:
        if line.lstrip().startswith('['):  # not a row, but a list of all rows
            yield from json.loads(line + lines.read())
        elif line.strip():
            yield json.loads(line)


def each_row(paths, function, encoding=''):
    """Yields function(row) for the rows of files. Exits with file and row where one has a mistake."""
    for path in paths:
        number = 1
        try:
            for row in read_rows(path, encoding):
                # If a row has more fields than the first line, csv.DictReader puts the rest under None.
                if type(row) is not dict or None in row:
                    raise ValueError(f"it has no fields, or more than the first line: {row!r:.60}")
                yield function(row)
                number += 1
        except (ValueError, OSError, csv.Error) as error:
            # Lines are decoded many at a time, so the row of a wrong byte is not known. read_text exits and
            # names the byte.
            if isinstance(error, UnicodeDecodeError) and kind_of(path) != '.parquet':
                for _ in read_text(path, encoding):
                    pass
            sys.exit(f"{path}, row {number}: {' '.join(str(error).split())}")


# -----------------------------------------------------------------------------
# Documents

PIECE = 100_000  # characters that are encoded at once

# Where a text may be cut: before its last newline, or else before its last space or behind its last Chinese
# mark, but not before white space, and behind a mark only before a letter or a digit.
AT_NEWLINE = re.compile(r'(?s).+(?=\n\S)')
AT_SPACE = re.compile(r'(?s).+((?=[ \t\u3000]\S)|(?<=[，。])(?=[^\W_]))')


def pieces(texts):
    """Cuts a text, which comes in texts of any length, into pieces of about 100,000 characters.

    A cut falls before the last character of some white space, as in "a ", " b". GPT-2's pattern, and that of
    every byte-level BPE, leaves that one to the word behind it anyway: the tokens are "a", " ", " b" with and
    without the cut. So the pieces have the ids of the whole. Only a text that has no such place in a million
    characters is cut anywhere.
    """
    held = ''
    for text in texts:
        for start in range(0, len(text), PIECE):
            held += text[start : start + PIECE]
            if len(held) < PIECE:
                continue
            place = AT_NEWLINE.match(held) or AT_SPACE.match(held)
            if place or len(held) > 10 * PIECE:
                end = place.end() if place else len(held)
                yield held[:end]
                held = held[end:]
    if held:
        yield held


def text_parts(name, texts, count):
    """Yields the parts of `count` plain documents. A bar with this name shows the progress."""
    for text in tqdm(texts, desc=name, total=count, unit=' documents', disable=None):
        yield text, True
        yield None, True


def without_surrogates(text):
    """Returns a text. Raises ValueError if half of a surrogate pair, as JSON may hold it, is in it."""
    text.encode()
    return text


def load_rows(paths, fields, cache_dir):
    """Returns the rows of files as a datasets.Dataset with these fields, which must be texts."""
    import datasets

    def texts_of(row):
        return {field: without_surrogates(text_in(row, field)) for field in fields}

    def rows():
        yield from each_row(paths, texts_of)

    if next(rows(), None) is None:
        sys.exit(f"there are no rows in {', '.join(paths[:3])}")
    features = datasets.Features({field: datasets.Value('large_string') for field in fields})
    return datasets.Dataset.from_generator(rows, features, str(cache_dir))


def split_documents(documents, test_size):
    """Splits a datasets.Dataset into train and val as nanoGPT splits OpenWebText."""
    if len(documents) < 2:
        sys.exit("one document cannot be divided into train and val here: data/custom/prepare.py can do that")
    split = documents.train_test_split(test_size=test_size, seed=2357, shuffle=True)
    return split['train'], split['test']


class Documents:
    """The documents of files. They are read once when this is made, and again whenever it is iterated.

    It yields lists of parts: those of a row, which is a document, or a piece of a text. The list that ends a
    document has <|endoftext|> as its last part. Exits where something cannot be read.
    """

    def __init__(self, source, template='', encoding='', end_of_text=False):
        """end_of_text: whether <|endoftext|> in a text ends a document."""
        self.paths, self.kind = find_files(source, encoding)
        self.encoding = encoding
        self.end_of_text = end_of_text
        self.template = template or DOCUMENTS
        if self.kind == '.txt' and self.template != DOCUMENTS:
            sys.exit(f"{source} is text, and --template is for rows: {', '.join(ROWS)}")
        if self.kind != '.txt' and not template:
            first_row = next(each_row(self.paths, dict, encoding), {})
            if 'messages' in first_row:
                self.template = CONVERSATIONS

        lengths = [0]
        occurs = np.zeros(0x110000, dtype=bool)  # by code point
        self.ends = 0  # how often <|endoftext|> stands in the texts
        self.lists = 0  # how many lists there are
        for parts in tqdm(self, desc='reading', unit=' pieces', disable=None):
            text = ''.join(text for text, _ in parts if text)
            lengths[-1] += len(text)
            occurs[np.frombuffer(text.encode('utf-32-le'), dtype='<u4')] = True
            self.ends += text.count(EOT)
            self.lists += 1
            if parts[-1][0] is None:
                lengths.append(0)
        self.lengths = np.array(lengths[:-1])  # of each document, in characters
        self.alphabet = set(map(chr, np.flatnonzero(occurs)))
        if self.lengths.sum() == 0:
            sys.exit(f"{source}: nothing but empty files")

    def __iter__(self):
        if self.kind == '.txt':
            return self.texts()
        return each_row(self.paths, self.parts_of, self.encoding)

    def texts(self):
        for path in self.paths:
            has_text = False  # whether the document has, perhaps in earlier pieces; without any it is none
            for piece in pieces(read_text(path, self.encoding)):
                texts = piece.split(EOT) if self.end_of_text else [piece]
                for number, text in enumerate(texts):
                    if number > 0 and has_text:  # behind an <|endoftext|>
                        yield [(None, True)]
                        has_text = False
                    if self.end_of_text and not has_text:
                        text = text.lstrip('\n')  # it stands between the documents
                    if text:
                        yield [(text, True)]
                        has_text = True
            if has_text:
                yield [(None, True)]

    def parts_of(self, row):
        """Returns the parts of a row. Raises ValueError."""
        missing = set(template_fields(self.template)) - row.keys()
        if missing:
            problem = f"it has the fields {', '.join(row)}, but no {', '.join(sorted(missing))}"
            texts = [field for field, value in row.items() if type(value) is str and value.strip()]
            if self.template == DOCUMENTS and texts:  # a question may come first, and its answer last
                names = dict.fromkeys([texts[0], texts[-1]])
                example = '\\n'.join(f'{field.capitalize()}: {{{field}}}' for field in names)
                problem += f": say how they make a document, such as --template=\"{example}\""
            raise ValueError(problem)
        parts = template_parts(self.template, row)
        without_surrogates(''.join(text for text, _ in parts if text))
        return parts

    def stream(self, name, starts, stops):
        """Yields all parts, but of document i only the characters from starts[i] to stops[i]. A bar with this
        name shows the progress."""
        i = 0
        position = 0  # in document i
        for parts in tqdm(self, desc=name, total=self.lists, unit=' pieces', disable=None):
            for text, counts in parts:
                if text is not None:
                    selected = text[max(starts[i] - position, 0) : max(stops[i] - position, 0)]
                    position += len(text)
                    if selected:
                        yield selected, counts
                elif starts[i] < stops[i]:
                    yield None, counts
            if parts[-1][0] is None:
                i += 1
                position = 0


# -----------------------------------------------------------------------------
# What else may be called train.bin

# How files begin that are something else, what they are, and the Python expression that gives the ids of
# `path`, None where there is none. The first two are magic numbers of llm.c and modded-nanogpt, whose header
# is 256 int32, or 1024 bytes.
SIGNATURES = {
    b'\x88\xd8\x34\x01': ("uint16 ids behind llm.c's header", 'np.memmap(path, "<u2", "r", 1024)'),
    b'\xa1\xd9\x34\x01': ("uint32 ids behind llm.c's header", 'np.memmap(path, "<u4", "r", 1024)'),
    b'\x93NUMPY': ("a .npy file", 'np.load(path, "r").ravel()'),
    b'PK\x03\x04': ("a zip archive, as numpy.savez and torch.save write it", None),
    b'\x1f\x8b\x08': ("a file of gzip", None),
    b'\x28\xb5\x2f\xfd': ("a file of zstd", None),
    b'PAR1': ("a parquet file", None),
    b'\x80\x04\x95': ("a pickle", None),
    b'\x80\x05\x95': ("a pickle", None),
}

# A program for `python -c`; {} is such an expression. The new file is written beside the old one, which keeps
# another name, so that a kill harms neither. Windows renames no file that is still mapped, so both maps are
# let go first.
CONVERSION = (
    'import os, sys, numpy as np; path = sys.argv[1]; ids = {}; '
    '0 <= ids.min() and ids.max() <= 65535 or sys.exit("ids beyond 65,535 do not fit uint16"); '
    'new = np.memmap(path + ".part", "<u2", "w+", shape=ids.shape); new[:] = ids; new.flush(); '
    'ids = new = None; os.replace(path, path + ".original"); os.replace(path + ".part", path)'
)


def is_utf8(data):
    """Returns whether bytes are text in UTF-8 without control characters. The last character may be cut."""
    control = bytes(set(range(32)) - set(b'\t\n\f\r'))
    if len(data.translate(None, control)) < len(data):  # it deletes them
        return False
    try:
        codecs.getincrementaldecoder('utf-8')().decode(data)
    except UnicodeDecodeError:
        return False
    return True


def has_wide_ids(head, dtype, largest):
    """Returns whether bytes (n,) uint8 are ids of this type. They are if, read as such, none is beyond
    `largest`, because their upper bytes are zero."""
    values = head[: len(head) // 8 * 8].view(dtype)
    if values.max() > largest:
        return False
    # Almost only zeros, or one repeated value, tell nothing.
    if np.count_nonzero(values) < 32 or len(np.unique(values)) == 1:
        return False
    # There is one exception: uint16 ids of a text with one character on each line. The newline is id 0, so a
    # character and a newline look like one 32-bit id. Then no value is zero, and few differ.
    may_be_lines = dtype == '<u4' and values.min() > 0 and values.max() < 32
    return not may_be_lines


def what_it_is(path, vocab_size):
    """Returns what a .bin looks like by its first megabyte, and the Python that gives its ids, or None. Both
    are None for uint16 ids below vocab_size, and for what cannot be told."""
    head = np.fromfile(path, dtype='u1', count=2**20)
    data = head.tobytes()
    for beginning, found in SIGNATURES.items():
        if data.startswith(beginning):
            return found
    if len(head) < 64:
        return None, None

    # What cannot be uint16 ids may be wider ones of a vocabulary that is larger than theirs.
    ids = head[: len(head) // 2 * 2].view('<u2')
    is_beyond = ids.max() >= vocab_size
    largest = 2**20 if is_beyond else 65535
    for bits, dtype in ((64, '<u8'), (32, '<u4')):
        if has_wide_ids(head, dtype, largest):
            return f"{bits}-bit ids", f'np.memmap(path, "{dtype}", "r")'
    if not head[0::2].any() and np.count_nonzero(head) >= 32:
        return "big-endian ids", 'np.memmap(path, ">u2", "r")'

    # In 8-bit ids of a small vocabulary every byte is an id, and two bytes read as one are mostly beyond it.
    # Of 256 ids every byte is one, so only text is told.
    kinds = len(set(data))
    is_text = kinds > 3 and is_utf8(data)
    may_be_bytes = head.max() < vocab_size < 256 or (is_text and vocab_size == 256)
    if may_be_bytes and is_beyond:
        return "8-bit ids", 'np.memmap(path, "u1", "r")'
    if is_text:
        return "text", None

    # Without a meta.pkl the vocabulary is GPT-2's, whose ids have bytes above 127. 8-bit ids of an alphabet
    # have none, and few zeros, while small uint16 ids are zero at every second place. It takes a thousand.
    is_dense = np.count_nonzero(head[1::2]) > len(ids) / 2
    if len(ids) >= 1000 and kinds > 2 and head.max() < 128 and is_dense:
        return "8-bit ids", 'np.memmap(path, "u1", "r")'
    return None, None


def check_bin(path, vocab_size, prepare_command):
    """Raises UserError if a .bin looks like something else than uint16 ids, with what to do about it.
    prepare_command is the command that makes bins of a text, without its --input."""
    what, expression = what_it_is(path, vocab_size)
    if what is None:
        return
    advice = "write its ids there by numpy.array(ids, dtype='<u2').tofile"
    if what == 'text':
        advice = f"run `{prepare_command} {shlex.quote(f'--input={path}')}`"
    elif expression:
        advice = f"run `{shlex.join(['python', '-c', CONVERSION.format(expression), str(path)])}`"
    if what in ('64-bit ids', '32-bit ids'):
        advice += ", or if every second id is meant to be 0, put one id more in front, to say so"
    raise UserError(f"{path} looks like {what}, not uint16 ids: {advice}")


# -----------------------------------------------------------------------------
# train.bin and val.bin


def replace_files(folder, new):
    """Moves the files in `new` to `folder`, where those of an older data set are kept under second names.
    Returns these names."""
    old_names = [name for name in FILES if (folder / name).is_file()]
    if set(old_names) == set(os.listdir(new)):
        if all(filecmp.cmp(folder / name, new / name, shallow=False) for name in old_names):
            return []  # they are the same

    second_names = keep_as_old([str(folder / name) for name in old_names]).values()
    # The old train.bin goes first, and the new one comes last: FILES begins with it.
    for name in old_names:
        (folder / name).unlink()
    for name in reversed(FILES):
        if (new / name).exists():
            os.replace(new / name, folder / name)
    flush_folder(folder)
    return [Path(name).name for name in second_names]


def write_split(new, split, pairs, has_masks):
    """Writes pairs (ids, mask) to SPLIT.bin and, if there are masks, SPLIT.mask in the folder `new`. Returns
    what to say about it."""
    tokens = 0
    counted = 0
    bin_path, mask_path = new / f'{split}.bin', new / f'{split}.mask'
    with atomic_write(mask_path) as mask_file, atomic_write(bin_path) as bin_file:
        for ids, mask in pairs:
            bin_file.write(np.asarray(ids, dtype='<u2').tobytes())
            if has_masks:
                mask_file.write(mask.tobytes())
            tokens += len(ids)
            counted += int(mask.sum())
    if not has_masks:
        mask_path.unlink()

    if tokens < 2:
        sys.exit(f"there is not enough text for {split}.bin: it would have {tokens} tokens")
    if counted == 0:
        sys.exit(f"no token of {split}.bin would count in the loss")
    count = f", {counted:,} of them count" if has_masks else ''
    words = f"{split}.bin has {tokens:,} tokens{count}"
    if split == 'val' and tokens < 1025:
        words += (
            "\nthat is less than a sequence of train.py's default --block_size=1024: "
            "data/custom/prepare.py takes a larger share with --val"
        )
    return words


def write_bins(folder, tokenizer, train, val, files=None):
    """Writes train.bin, val.bin, the tokenizer's file and `files`, {name: bytes}; train and val are iterables
    of pairs (ids, mask). With a template.txt among the files it writes train.mask and val.mask too.

    At every instant, even if this process is killed then, a train.bin that exists stands beside the val.bin
    and the other files that belong to it. The old data set stays whole until the new one is on the disk.
    """
    if tokenizer.vocab_size > 65536:
        sys.exit(f"{tokenizer.vocab_size} different tokens are more than uint16 can count")
    contents = {**tokenizer.files(), **(files or {})}

    new = folder / 'new.part'
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    new.mkdir()
    try:
        for name, content in contents.items():
            with atomic_write(new / name) as f:
                f.write(content)
        val_words = write_split(new, 'val', val, 'template.txt' in contents)
        train_words = write_split(new, 'train', train, 'template.txt' in contents)
        old_names = replace_files(folder, new)  # now that all is on the disk
    finally:
        shutil.rmtree(new)

    # Only now, because whoever reads this may leave, as `| head` does.
    print(f"{val_words}\n{train_words}")
    if old_names:
        print(f"{folder} had other data: kept as {', '.join(old_names)}")


def write_characters(folder, train, val):
    """Writes two texts as character ids to train.bin and val.bin, and their alphabet to meta.pkl."""
    alphabet = sorted(set(train) | set(val))
    print(f"{len(train) + len(val):,} characters, {len(alphabet)} different: {''.join(alphabet)[:200]!r}")
    tokenizer = char_tokenizer(alphabet)
    train_ids, val_ids = (encode_parts(tokenizer, [(text, True)]) for text in (train, val))
    write_bins(folder, tokenizer, [train_ids], [val_ids])


def in_lists(parts):
    """Yields parts in lists of about 100,000 characters, for which longer ones are cut."""
    batch = []
    size = 0
    for text, counts in parts:
        texts = [None] if text is None else pieces([text])
        for piece in texts:
            batch.append((piece, counts))
            size += len(piece or '')
            if size >= PIECE:
                yield batch
                batch = []
                size = 0
    if batch:
        yield batch


def trainable(lists):
    """Returns how many characters of lists of texts a BPE can be trained on in about 500 MB: inf if all.

    The trainer takes some 100 times the memory of all different words. English has few. In Chinese, without
    spaces, whole clauses are words, and hardly two of them are the same.
    """
    words = set()
    size = 0  # of the words, in bytes
    characters = 0
    for texts in lists:
        text = '\n'.join(texts)
        new = set(re.findall(r'\w+', text)) - words
        words |= new
        size += len(''.join(new).encode())
        characters += len(text)
        if size > 5_000_000:
            return characters
    return math.inf


def joined(parts):
    """Yields parts with a newline between documents, for a tokenizer without <|endoftext|>."""
    at_end = False
    for text, counts in parts:
        if text is not None:
            if at_end:
                yield '\n', True
            yield text, counts
        at_end = text is None


def encode_documents(tokenizer, num_workers, parts):
    """Yields pairs (ids, mask) of parts.

    Threads encode them. Processes would not be faster, since tokenizers release the GIL. Few lists of parts
    are in flight at a time, so memory stays bounded.
    """
    with ThreadPoolExecutor(num_workers) as pool:
        # This reads a list, and hands it to a thread, only when the next of its elements is asked for.
        submitted = (pool.submit(encode_parts, tokenizer, batch) for batch in in_lists(parts))

        # Two lists more than threads are in flight. For each one that is finished, another one is submitted.
        running = list(islice(submitted, min(num_workers, 256) + 2))
        while running:
            pair = running.pop(0).result()
            running.extend(islice(submitted, 1))
            yield pair


def write_documents(folder, tokenizer, num_workers, train, val, files=None):
    """Writes two streams of parts with write_bins."""
    if tokenizer.eot is None:
        train = joined(train)
        val = joined(val)
    train_pairs = encode_documents(tokenizer, num_workers, train)
    val_pairs = encode_documents(tokenizer, num_workers, val)
    with closing(train_pairs), closing(val_pairs):  # an error ends the threads before it is printed
        write_bins(folder, tokenizer, train_pairs, val_pairs, files)
