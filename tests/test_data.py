"""The prepare.py scripts: their figures, and what they leave behind when something goes wrong."""
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest


def read(house, name, split):
    return np.fromfile(house / 'data' / name / f'{split}.bin', dtype='<u2')


def test_shakespeare_char(run, house, with_text):
    out = run('data/shakespeare_char/prepare.py').stdout
    assert 'train.bin has 1,003,854 tokens' in out and 'val.bin has 111,540 tokens' in out
    meta = pickle.loads((house / 'data' / 'shakespeare_char' / 'meta.pkl').read_bytes())
    assert meta.keys() == {'vocab_size', 'stoi', 'itos'} and meta['vocab_size'] == 65 and type(meta) is dict
    ids = np.concatenate([read(house, 'shakespeare_char', split) for split in ('train', 'val')])
    assert ''.join(meta['itos'][i] for i in ids.tolist()) == with_text and len(ids) == 1115394


def test_shakespeare(run, house, with_text, bpe):
    out = run('data/shakespeare/prepare.py').stdout
    assert 'train.bin has 301,966 tokens' in out and 'val.bin has 36,059 tokens' in out
    assert bpe.decode(read(house, 'shakespeare', 'train').tolist()) + bpe.decode(read(house, 'shakespeare', 'val').tolist()) == with_text


def test_python_char(run, house):
    """ASCII modules of this Python, whole, the last tenth for validation, and none of those left out."""
    run('data/python_char/prepare.py')
    itos = pickle.loads((house / 'data' / 'python_char' / 'meta.pkl').read_bytes())['itos']
    train, val = (''.join(itos[i] for i in read(house, 'python_char', split).tolist()) for split in ('train', 'val'))
    assert len(train) + len(val) > 5e6 and (train + val).isascii() and 0.02 < len(val) / len(train) < 0.3
    import argparse, ensurepip, weakref  # noqa: E401
    for module, text in ((argparse, train), (weakref, val)):
        assert open(module.__file__).read() in text
    assert open(ensurepip.__file__).read() not in train + val


@contextmanager
def cut_off_server():
    """The address of a server that promises 1000 bytes and hangs up after 4."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        def serve():
            peer, _ = server.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b'HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nhalf')
        thread = threading.Thread(target=serve)
        thread.start()
        yield f'http://127.0.0.1:{server.getsockname()[1]}/input.txt'
        thread.join()


def test_download(run, house, tmp_path):
    """Without a network one line names the address and the place; a damaged file is refused; neither leaves anything behind."""
    from common import download
    folder = house / 'data' / 'shakespeare_char'
    for path in folder.glob('*.*'):
        if path.suffix in ('.txt', '.bin', '.pkl'):
            path.unlink()
    before = sorted(folder.iterdir())
    with socket.socket() as closed:  # a proxy that refuses, so that no machine reaches the address
        closed.bind(('127.0.0.1', 0))
        words = run('data/shakespeare_char/prepare.py', status=1, env={'HTTPS_PROXY': f'http://127.0.0.1:{closed.getsockname()[1]}'})
    assert 'https://raw.githubusercontent.com/karpathy/char-rnn' in words and f'put it at {folder / "input.txt"}' in words
    assert sorted(folder.iterdir()) == before
    with pytest.raises(SystemExit, match='cannot download http://127.0.0.1:.*put it at'):
        with cut_off_server() as address:
            download(address, '', tmp_path / 'input.txt')
    assert not list(tmp_path.iterdir())
    (folder / 'input.txt').write_text('First Citizen')
    assert 'is damaged: 13 bytes' in run('data/shakespeare_char/prepare.py', status=1)
    (folder / 'input.txt').unlink()


def test_openwebtext_out_of_reach(run, house, bpe):
    words = run('data/openwebtext/prepare.py', status=1)
    assert 'cannot download https://huggingface.co/datasets/stas/openwebtext-10k' in words and '--files=' in words


def reference(bpe, texts, test_size=0.0005):
    """train and val as nanoGPT's pipeline makes them: load, split, encode each, concatenate."""
    from datasets import Dataset
    if len(texts) == 1:
        splits = {'train': texts, 'val': []}
    else:
        split = Dataset.from_dict({'text': texts}).train_test_split(test_size=test_size, seed=2357, shuffle=True)
        splits = {'train': split['train']['text'], 'val': split['test']['text']}
    return {name: [i for text in part for i in bpe.encode_ordinary(text) + [50256]] for name, part in splits.items()}


ODD = ['', 'a', '<|endoftext|> inside <|endoftext|>', '\x00\x01 control \x7f\u0085', '  \n\n\t ', '👨‍👩‍👧 𠀀 é\u0301 日本', 'x' * 5000, '\ufffd']


@pytest.mark.parametrize('count, workers', [(1, 1), (2, 3), (7, 1), (7, 3), (3000, 1), (3000, 3)])
def test_openwebtext(run, house, tmp_path, bpe, count, workers):
    """Byte for byte nanoGPT's bins for any number of documents and workers, odd texts and empty ones included."""
    texts = [ODD[i % len(ODD)] + f' document {i}' * (i % 5) for i in range(count)]
    (tmp_path / 'mine.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    out = run('data/openwebtext/prepare.py', '--files=mine.jsonl', f'--num_workers={workers}').stdout
    for name, want in reference(bpe, texts).items():
        assert read(house, 'openwebtext', name).tolist() == want
        assert f'{name}.bin has {len(want):,} tokens in' in out
    assert ('val.bin stays empty' in out) == (count == 1)


def test_large_documents_and_formats(run, house, tmp_path, bpe):
    """Documents of 5 MB; parquet, compressed JSON lines and text files, all the same documents, all the same bins."""
    import gzip
    import pyarrow
    import pyarrow.parquet
    texts = [' '.join(f'{i * n}' for n in range(700_000)) if i < 2 else f'small one {i}' for i in range(5)]
    assert min(map(len, texts[1:2])) > 4_500_000
    want = reference(bpe, texts)
    pyarrow.parquet.write_table(pyarrow.table({'text': texts, 'other': list(range(5))}), tmp_path / 'a.parquet')
    with gzip.open(tmp_path / 'b.jsonl.gz', 'wt') as f:
        f.writelines(json.dumps({'text': text}) + '\n' for text in texts)
    (tmp_path / 'c').mkdir()
    for i, text in enumerate(texts):
        (tmp_path / 'c' / f'{i}.txt').write_text(text)
    (tmp_path / 'd [1].jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    for files in ('a.parquet', 'b.jsonl.gz', 'c/*.txt', 'd [1].jsonl', 'd ?1?.jsonl'):
        run('data/openwebtext/prepare.py', f'--files={files}')
        assert all(read(house, 'openwebtext', name).tolist() == want[name] for name in want), files


def test_bad_documents(run, house, tmp_path, bpe):
    """One line that names what is wrong, with file and row where it is not Unicode; and mistakes harm no data."""
    import gzip
    import pyarrow
    import pyarrow.parquet
    (tmp_path / 'good.jsonl').write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n')
    run('data/openwebtext/prepare.py', '--files=good.jsonl')
    before = [read(house, 'openwebtext', name).tolist() for name in ('train', 'val')]
    for name, text, words in (('two.jsonl', b'{"a": 1}\n{"a": 2}', 'with the fields a'), ('null.jsonl', b'{"text": "a"}\n{"text": null}', 'each must have a text'),
                              ('bad.jsonl', b'{"text": "a"}\n{"text', 'bad.jsonl, row 2'), ('x.csv', b'text', 'must all be .parquet'),
                              ('numbers.jsonl', b'{"text": 1}\n{"text": 2}', 'each must have a text'), ('empty.jsonl', b'', 'empty'),
                              ('a.txt.jsonl', b'{"a": 1}', 'with the fields a'), ('cut.jsonl.gz', gzip.compress(b'{"text": "a"}\n' * 99)[:-9], 'cut.jsonl.gz'),
                              ('lone.jsonl', b'{"text": "a"}\n{"text": "\\ud800"}', 'lone.jsonl, row 2'),
                              ('latin.jsonl', b'{"text": "a"}\n\n{"text": "caf\xe9"}', 'latin.jsonl, row 3'), ('latin.txt', b'a\nb\ncaf\xe9', 'latin.txt, row 3')):
        (tmp_path / name).write_bytes(text)
        assert words in run('data/openwebtext/prepare.py', f'--files={name}', status=1)
    for wrong, words in (('--files=*.tsv', 'no such files'), ('--corpus=half', 'neither 10k nor full'), ('--num_workers=0', 'num_workers must be')):
        assert words in run('data/openwebtext/prepare.py', wrong, status=1)
    assert before == [read(house, 'openwebtext', name).tolist() for name in ('train', 'val')]
    broken = pyarrow.array([b'fine', b'caf\xe9', b'fine'] * 20, pyarrow.binary())
    broken = pyarrow.StringArray.from_buffers(len(broken), broken.buffers()[1], broken.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({'text': broken}), tmp_path / 'broken.parquet')
    assert 'broken.parquet, row 2' in run('data/openwebtext/prepare.py', '--files=broken.parquet', status=1)


def test_whole_openwebtext_out_of_reach(run, house, bpe):
    words = run('data/openwebtext/prepare.py', '--corpus=full', status=1)
    assert 'cannot download https://huggingface.co/datasets/Skylion007/openwebtext' in words and '--files=' in words


def test_documents_in_flight(tmp_path):
    """Whatever the corpus, no more lists of texts are held than keep the threads busy."""
    from common import write_documents
    pulled, encoded, ahead, lock = 0, 0, [], threading.Lock()

    def lists():
        nonlocal pulled
        for i in range(300):
            pulled += 1
            ahead.append(pulled - encoded)
            yield [str(i)]

    def encode(text):
        nonlocal encoded
        with lock:
            encoded += 1
        return [int(text)]
    write_documents(tmp_path, encode, 999, 2, train=(300, lists()))
    assert max(ahead) <= 5
    assert np.fromfile(tmp_path / 'train.bin', '<u2').tolist() == [i for n in range(300) for i in (n, 999)]


def test_killed_prepare(house, tmp_path, bpe, request):
    """Whenever prepare.py is killed, every .bin under its name is whole, and a new val.bin never has an old train.bin beside it."""
    import random
    import time
    corpora = []
    for n in (0, 1):
        texts = [f'corpus {n}: ' + 'words and words ' * 300 + str(i) for i in range(4000)]
        (tmp_path / f'{n}.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
        corpora.append({name: np.array(ids, '<u2').tobytes() for name, ids in reference(bpe, texts).items()})
    folder, chance, caught = house / 'data' / 'openwebtext', random.Random(0), 0

    def start(n):
        return subprocess.Popen([sys.executable, str(folder / 'prepare.py'), f'--files={tmp_path / f"{n}.jsonl"}'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert start(0).wait() == 0
    for kill in range(max(6, request.config.getoption('--kills') // 2)):
        process = start(kill % 2)
        part = folder / chance.choice(['val.bin.part', 'train.bin.part', 'train.bin.part'])
        size = chance.uniform(0, len(corpora[0]['train']))
        part.unlink(missing_ok=True)  # of the kill before
        while process.poll() is None and not (part.is_file() and part.stat().st_size >= size * part.name.startswith('train')):
            time.sleep(0.001)
        time.sleep(chance.choice([0, 0.01, 0.1]))
        process.kill()
        process.wait()
        found = {name: (folder / f'{name}.bin').read_bytes() for name in ('train', 'val') if (folder / f'{name}.bin').is_file()}
        caught += 'train' not in found
        assert all(body in [corpus[name] for corpus in corpora] for name, body in found.items())
        assert 'train' not in found or found in corpora
    assert caught >= 2  # in the middle of writing


def test_custom(run, house, tmp_path, bpe):
    """Characters, GPT-2's encoding and a trained one of the same text: nine tenths and one, and it all comes back; train and sample run on it."""
    import tokenizers
    text = '《静夜思》\r\n床前明月光，疑是地上霜。\r\n举头望明月，低头思故乡。🦊𠀀\n' * 40
    (tmp_path / 'book.txt').write_bytes(text.encode())
    text = text.replace('\r\n', '\n')
    cut = int(0.9 * len(text))

    def texts(kind):
        out = run('data/custom/prepare.py', '--input=book.txt', f'--tokenizer={kind}', '--vocab_size=300', '--name=mytext').stdout
        assert 'train on it with --dataset=mytext' in out
        return [read(house, 'mytext', split).tolist() for split in ('train', 'val')]
    train, val = texts('gpt2')
    assert [train, val] == [bpe.encode_ordinary(part) + [50256] for part in (text[:cut], text[cut:])]
    trained = texts('bpe')
    tokenizer = tokenizers.Tokenizer.from_file(str(house / 'data' / 'mytext' / 'tokenizer.json'))
    assert [tokenizer.decode(ids, skip_special_tokens=False) for ids in trained] == [part + '<|endoftext|>' for part in (text[:cut], text[cut:])]
    assert max(trained[0]) < tokenizer.get_vocab_size() <= 300
    small = ['--dataset=mytext', '--device=cpu', '--n_layer=1', '--n_head=1', '--n_embd=8', '--block_size=8', '--batch_size=2', '--gradient_accumulation_steps=1',
             '--max_iters=1', '--eval_iters=1']
    assert 'vocabulary 320' in run('train.py', *small).stdout  # 300 rounded up to a multiple of 64
    run('sample.py', '--start=明月<|endoftext|>', '--num_samples=2', '--max_new_tokens=5', '--device=cpu')
    train, val = texts('char')
    meta = pickle.loads((house / 'data' / 'mytext' / 'meta.pkl').read_bytes())
    assert ''.join(meta['itos'][i] for i in train + val) == text and meta['stoi']['🦊'] < meta['vocab_size'] == len(set(text))
    assert not (house / 'data' / 'mytext' / 'tokenizer.json').exists()

    (tmp_path / 'more').mkdir()
    for name, part in (('1 [x].txt', text), ('2.txt', 'short'), ('3.txt', '')):
        (tmp_path / 'more' / name).write_text(part)
    run('data/custom/prepare.py', '--input=more', '--tokenizer=gpt2', '--name=mytext')  # a folder: every text is ended
    both = np.concatenate([read(house, 'mytext', split) for split in ('train', 'val')])
    assert bpe.decode(both.tolist()) == text[:int(0.9 * (len(text) + 5))] + '<|endoftext|>' + text[int(0.9 * (len(text) + 5)):] + '<|endoftext|>short<|endoftext|>'
    (tmp_path / 'gbk.txt').write_bytes('明月\n故乡'.encode('gb18030'))
    for arguments, words in ((['--input=gbk.txt'], 'gbk.txt, row 1: not UTF-8'), ([], 'which text?'), (['--input=none.txt'], 'no such text'), (['--input=more/3.txt'], 'empty'),
                             (['--input=book.txt', '--name=shakespeare'], 'a data set of its own'), (['--input=book.txt', '--name=../x'], 'without a path'), (['--input=book.txt', '--name=..'], 'without a path'),
                             (['--input=book.txt', '--tokenizer=word'], 'none of char, gpt2, bpe'), (['--input=book.txt', '--tokenizer=bpe', '--vocab_size=70000', '--name=mytext'], 'vocab_size must be')):
        assert words in run('data/custom/prepare.py', *arguments, status=1)
    taken = subprocess.run([sys.executable, str(house / 'data' / 'custom' / 'prepare.py'), '--input=book.txt', '--name=common.py'], cwd=tmp_path, capture_output=True, text=True)
    assert taken.returncode == 1 and taken.stderr == f"{house / 'data' / 'common.py'}: File exists\n"  # what the file system says is a line
    assert both.tolist() == [i for split in ('train', 'val') for i in read(house, 'mytext', split).tolist()]


def test_wiki_zh(run, house, tmp_path):
    """Every article comes back whole, title on top, emoji and rare ideographs included; its config trains and samples whole characters."""
    import tokenizers
    articles = [('数学', '数学\n\n数学是研究数量、结构以及空间等概念的学科。'), ('狐狸', '🦊是一种动物。𠀀𪚥<|endoftext|>'), ('空', '')] * 70
    for n, part in enumerate((articles[:100], articles[100:])):
        folder = tmp_path / 'wiki' / ('AA', 'AB')[n]
        folder.mkdir(parents=True)
        (folder / 'wiki_00').write_text(''.join(json.dumps({'id': '1', 'url': '', 'title': title, 'text': text}, ensure_ascii=n == 0) + '\n' for title, text in part), encoding='utf-8')
    run('data/wiki_zh/prepare.py', '--input=wiki', '--vocab_size=400')
    tokenizer = tokenizers.Tokenizer.from_file(str(house / 'data' / 'wiki_zh' / 'tokenizer.json'))
    end = tokenizer.token_to_id('<|endoftext|>')
    found = []
    for split in ('train', 'val'):
        ids = read(house, 'wiki_zh', split)
        found += [tokenizer.decode(part.tolist()) for part in np.split(ids, np.flatnonzero(ids == end) + 1)[:-1]]
    assert sorted(found) == sorted(text if text.startswith(title) else f'{title}\n\n{text}' for title, text in articles)
    run('train.py', 'config/train_wiki_zh.py', '--device=cpu', '--n_layer=1', '--n_head=1', '--n_embd=8', '--block_size=8', '--batch_size=2', '--max_iters=1', '--eval_iters=1')
    run('sample.py', '--out_dir=out-wiki-zh', '--start=数学', '--num_samples=1', '--max_new_tokens=9', '--device=cpu')
    assert 'unpack wiki_zh_2019.zip there' in run('data/wiki_zh/prepare.py', status=1)
    (tmp_path / 'wiki' / 'AB' / 'wiki_00').write_text('{"title": "a", "text": "b"}\n{"ti')
    assert f'{tmp_path}/wiki/AB/wiki_00, row 2' in run('data/wiki_zh/prepare.py', f'--input={tmp_path}/wiki', status=1)


def test_bins_appear_whole(tmp_path, monkeypatch):
    """A writer that fails leaves no file, and a new val.bin never stands beside an old train.bin."""
    from common import whole, write_bins
    with pytest.raises(RuntimeError):
        with whole(tmp_path / 'x.bin') as f:
            f.write(b'half')
            raise RuntimeError
    assert not list(tmp_path.iterdir())
    write_bins(tmp_path, train=[1, 2, 3], val=[4])
    with pytest.raises(OverflowError):
        write_bins(tmp_path, train=[1, 70000], val=[5])  # no 16-bit id: fails after val.bin
    assert [path.name for path in tmp_path.iterdir()] == ['val.bin']


ARTICLE = ''' 
 = Valkyria <unk> III = 
 
 Senjō no <unk> 3 : <unk> , " commonly referred " to as Teddy 's game , is a role @-@ playing game of 1 @,@ 000 @.@ 5 points ( 32 ha ) ; was it ? 
 The actors ' play , 1987 – 90 , cost $ 5 ! ( see [ 1 ] ) 
 
 = = Game <unk> = = 
 
 A – B . 
'''
PROSE = '''
= Valkyria <unk> III =

Senjō no <unk> 3: <unk>, "commonly referred" to as Teddy's game, is a role-playing game of 1,000.5 points (32 ha); was it?
The actors' play, 1987–90, cost $5! (see [1])

== Game <unk> ==

A – B.
'''


def test_wikitext(run, house, tmp_path, bpe):
    """Spaces that people do not write are gone, words counted as they stood, each article a document; test becomes val.bin, or valid."""
    texts = {'train': ARTICLE * 3, 'valid': ARTICLE, 'test': ARTICLE.replace('Teddy', 'Freddy') * 2}
    words = len(ARTICLE.split()) + ARTICLE.count('\n')
    for layout in ('{}.txt', 'wiki.{}.raw'):
        folder = tmp_path / layout[:4]
        folder.mkdir()
        for name, text in texts.items():
            (folder / layout.format(name)).write_text(text, encoding='utf-8')
    run('data/wikitext/prepare.py', f"--input={tmp_path / '{}.t'}")
    assert bpe.decode(read(house, 'wikitext', 'train').tolist()) == '\n' + '\n<|endoftext|>'.join([PROSE[1:]] * 3) + '<|endoftext|>'
    assert bpe.decode(read(house, 'wikitext', 'val').tolist()) == ('\n' + '\n<|endoftext|>'.join([PROSE[1:]] * 2) + '<|endoftext|>').replace('Teddy', 'Freddy')
    assert json.loads((house / 'data' / 'wikitext' / 'words.json').read_text()) == {'train': 3 * words, 'val': 2 * words}
    run('data/wikitext/prepare.py', f"--input={tmp_path / 'wiki'}", '--split=valid')
    assert bpe.decode(read(house, 'wikitext', 'val').tolist()) == PROSE + '<|endoftext|>'
    (tmp_path / 'wiki' / 'wiki.train.raw').unlink()  # the perplexity needs none
    run('data/wikitext/prepare.py', f"--input={tmp_path / 'wiki'}")
    assert bpe.decode(read(house, 'wikitext', 'train').tolist()) == PROSE + '<|endoftext|>'
    for arguments, says in ((['--split=dev'], "split 'dev' is neither test nor valid"), (['--corpus=3'], "corpus '3' is none of"),
                            ([f'--input={tmp_path}'], 'no train.txt or valid.txt in there, nor wiki.train.raw'), (['--num_workers=0'], 'num_workers must be at least 1')):
        assert says in run('data/wikitext/prepare.py', *arguments, status=1)
    (tmp_path / 'wiki' / 'wiki.test.raw').write_bytes(texts['test'].replace('\n', '\r\n').encode())  # as Windows saves it
    run('data/wikitext/prepare.py', f"--input={tmp_path / 'wiki'}")
    assert bpe.decode(read(house, 'wikitext', 'val').tolist()).count('<|endoftext|>') == 2
    (tmp_path / 'wiki' / 'wiki.test.raw').write_text('')
    assert 'an empty text' in run('data/wikitext/prepare.py', f"--input={tmp_path / 'wiki'}", status=1)
    (tmp_path / 'wiki' / 'wiki.test.raw').write_bytes(b' = \xff = \n')
    assert 'wiki.test.raw: not UTF-8' in run('data/wikitext/prepare.py', f"--input={tmp_path / 'wiki'}", status=1)
    assert bpe.decode(read(house, 'wikitext', 'val').tolist()).count('Freddy') == 2  # the bins before are whole


def test_wikitext_2(run, house, bpe):
    """The published numbers of words, and a text that differs from the original in nothing but spaces and @."""
    folder = os.environ.get('WIKITEXT')
    if not folder:
        pytest.skip("needs WikiText-2: WIKITEXT=…, a folder with valid.txt and test.txt")
    out = run('data/wikitext/prepare.py', f'--input={folder}').stdout
    assert 'words: 217,646 in train.bin, 245,569 in val.bin' in out
    for name, split in (('train', 'valid'), ('val', 'test')):
        original = open(os.path.join(folder, f'{split}.txt'), encoding='utf-8').read()
        ours = bpe.decode(read(house, 'wikitext', name).tolist()).replace('<|endoftext|>', '')
        squeezed = [re.sub(r'\s', '', re.sub(r' @(.)@ ', r'\1', text)) for text in (original, ours)]
        assert squeezed[0] == squeezed[1] and ours.count('\n') == original.count('\n') and len(ours) < 0.97 * len(original)


def test_wikitext_out_of_reach(run, house, bpe):
    assert 'cannot download https://huggingface.co/datasets/Salesforce/wikitext' in run('data/wikitext/prepare.py', status=1, env={'HF_HUB_OFFLINE': '1'})
