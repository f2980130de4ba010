"""Models and tokenizers that people bring: other languages, other files, other libraries."""

import io
import json
import re
import runpy
import shutil
import sys

import huggingface_hub.constants
import numpy as np
import pytest
import tokenizers
import torch
from conftest import MACHINE, SMALL, TEXT
from tokenizers import models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertTokenizerFast,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
)

from data.tokenizer import EOT, Tokenizer, UserError, read_tokenizer_spec, same_texts
from model import GPT, GPTConfig

END = '---------------\n'
GERMAN = ['Wer länger schläft, den weckt die Kuh; »ja«, sagt sie.\n', 'Übung macht den Meister.\n'] * 30
ENGLISH = ["My lord is here, and I don't know what it's for.\n", 'What is the matter?\n'] * 30


def spec_of(tokenizer):
    return {'kind': 'bpe', 'json': tokenizer.to_str()}


def byte_level(texts, vocab_size=300, specials=(EOT,)):
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size, special_tokens=list(specials), show_progress=False)
    return tokenizer


def word_piece():
    tokenizer = tokenizers.BertWordPieceTokenizer(lowercase=False)
    tokenizer.train_from_iterator(ENGLISH, vocab_size=60, min_frequency=9, show_progress=False)
    return tokenizer


def unigram(specials=('<unk>', '<s>', '</s>')):
    tokenizer = tokenizers.SentencePieceUnigramTokenizer()
    tokenizer.train_from_iterator(
        ENGLISH, vocab_size=60, special_tokens=list(specials), unk_token='<unk>', show_progress=False
    )
    return tokenizer


def sentence_piece():
    tokenizer = tokenizers.SentencePieceBPETokenizer()
    lines = [text.strip() for text in ENGLISH]  # with a newline in a token, merges.txt cannot be read
    tokenizer.train_from_iterator(lines, vocab_size=90, show_progress=False)
    return tokenizer


def character_bpe():
    tokenizer = tokenizers.CharBPETokenizer()
    tokenizer.train_from_iterator(ENGLISH, vocab_size=90, show_progress=False)
    return tokenizer


def word_level():
    tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token='[UNK]'))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=['[UNK]'], show_progress=False)
    tokenizer.train_from_iterator(ENGLISH, trainer)
    return tokenizer


def hf_gpt2(folder, vocab_size, seed=0):
    """Saves a small GPT-2 of transformers, without a tokenizer, and returns it."""
    torch.manual_seed(seed)
    sizes = dict(n_positions=16, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    net = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **sizes)).eval()
    net.save_pretrained(folder)
    return net


# -----------------------------------------------------------------------------
# Which tokenizer


@pytest.mark.parametrize('rows', [300, 50257])
def test_another_language(tmp_path, rows):
    """A GPT-2 with vocab.json and merges.txt has these tokens, as in transformers, whatever its size. It was
    once read with English GPT-2's, and its text was silently wrong, or it was refused.
    """
    hf_gpt2(tmp_path, rows)
    byte_level(GERMAN, 290).save_model(str(tmp_path))
    (tmp_path / 'added_tokens.json').write_text('{"<|b|>": 291, "<|a|>": 290}')
    ours, theirs = GPT.from_pretrained(str(tmp_path)).tokenizer(), GPT2TokenizerFast.from_pretrained(tmp_path)
    for text in (*GERMAN[:2], f'ja{EOT}nein', '  数学 🦊\n\n\tx', 'a<|a|>b<|b|>'):
        ids = ours.encode(text)
        assert ids == theirs(text)['input_ids'] and ours.decode(ids) == text
    assert (ours.vocab_size, ours.eot) == (292, theirs.convert_tokens_to_ids(EOT))

    # A data set is the same with them, or with them in a folder of its own.
    shutil.copytree(tmp_path, tmp_path / 'data' / 'tokenizer', ignore=shutil.ignore_patterns('*.safetensors'))
    assert read_tokenizer_spec(tmp_path / 'data') == ours.spec
    (tmp_path / 'added_tokens.json').write_text('{"<|a|>": 291}')
    with pytest.raises(UserError, match='added_tokens.json leaves out some ids'):
        read_tokenizer_spec(tmp_path)


def test_english_gpt2(bpe, house, tmp_path, monkeypatch, run):
    """GPT-2 as older versions of transformers saved it has GPT-2's tokens, also where tiktoken has no files
    and no network, and is fine-tuned on data in GPT-2's encoding.
    """
    hf_gpt2(tmp_path / 'gpt2', 50257)
    tokenizer = Tokenizer({'kind': 'gpt2'}).for_transformers()
    tokenizer.model.save(str(tmp_path / 'gpt2'))
    (tmp_path / 'gpt2' / 'vocab.json').write_text(json.dumps(tokenizer.get_vocab()))  # with its end, as there
    spec = read_tokenizer_spec(tmp_path / 'gpt2')

    def offline(name):
        raise OSError

    monkeypatch.setattr('tiktoken.get_encoding', offline)
    text = f"It's 7 o'clock,  says naïve 数学 🦊\n\n{EOT}"
    assert Tokenizer(spec).encode(text) == bpe.encode(text, allowed_special='all')
    assert spec['kind'] == 'bpe' and same_texts(spec, {'kind': 'gpt2'})
    assert not same_texts(spec_of(byte_level(GERMAN)), {'kind': 'gpt2'})
    how = [*SMALL, '--dataset=bare', '--init_from=gpt2/', '--max_iters=1']
    run('train.py', *how, env={'TIKTOKEN_CACHE_DIR': str(tmp_path / 'empty')})

    # A model without tokenizer files has GPT-2's, unless it is too small for them.
    hf_gpt2(tmp_path / 'bare', 50257)
    assert GPT.from_pretrained(str(tmp_path / 'bare')).tokenizer_spec() == {'kind': 'gpt2'}
    hf_gpt2(tmp_path / 'bare', 300)
    with pytest.raises(
        ValueError, match='300 tokens, but no tokenizer.json .* .the one of kind gpt2 has 50257.: put it'
    ):
        GPT.from_pretrained(str(tmp_path / 'bare')).tokenizer_spec()


@pytest.mark.parametrize('make', [character_bpe, sentence_piece])
def test_merges_of_others(tmp_path, make):
    """vocab.json and merges.txt that are not byte-level are refused: their spaces would be lost."""
    make().save_model(str(tmp_path))
    with pytest.raises(UserError, match=r'cannot read .*merges.txt \(ValueError: it is not byte-level'):
        read_tokenizer_spec(tmp_path)


UNREAD = (
    'tokenizer.model spiece.model m.model vocab.txt vocab.json o200k.tiktoken tokenizer.pkl my-vocab.json'
)


@pytest.mark.parametrize('place', ['.', 'tokenizer'])
@pytest.mark.parametrize('name', UNREAD.split())
def test_tokenizers_that_are_not_read(tmp_path, place, name):
    """A tokenizer's file that only other programs read was taken for none, so that the tokens were GPT-2's.
    Where tokenizer.json or meta.pkl says what they are, it may stand there.
    """
    path = tmp_path / place / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b'\n\x0e\n\x05<unk>')
    with pytest.raises(UserError) as error:
        read_tokenizer_spec(tmp_path)
    message = str(error.value)
    assert message.startswith(f'{path} is a tokenizer that is not read as it is: ') and '\n' not in message
    byte_level(GERMAN).save(str(tmp_path / 'tokenizer.json'))
    assert read_tokenizer_spec(tmp_path)['kind'] == 'bpe'


def test_other_files(tmp_path):
    """What people keep in the folder of a data set is no tokenizer."""
    for name in (
        'input.txt',
        'README.md',
        'words.txt',
        'model.pkl',
        'config.json',
        'word2vec.model',
        'x.json',
    ):
        (tmp_path / name).write_text('{}')
    (tmp_path / 'tokenizer').write_text('GPT-2')
    assert read_tokenizer_spec(tmp_path) == {'kind': 'gpt2'}


def test_command_for_word_pieces(tmp_path, monkeypatch):
    """The command that is printed for a vocab.txt makes a tokenizer.json with the same ids."""
    tokenizer = word_piece()
    tokenizer.save_model(str(tmp_path))
    with pytest.raises(UserError) as error:
        read_tokenizer_spec(tmp_path)
    code = re.search(r'in its folder run `python -c "(.*?)"`; ', str(error.value))[1]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    ours = Tokenizer(read_tokenizer_spec(tmp_path))
    theirs = BertTokenizerFast(str(tmp_path / 'tokenizer.json'), tokenizer_object=ours.bpe)
    text = 'what is the matter'
    assert ours.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids
    assert theirs.unk_token_id not in ours.encode(text)


# -----------------------------------------------------------------------------
# The hub's cache


def put_into_cache(cache, name, files):
    """Lays out files as huggingface_hub does: a snapshot of links to blobs, and the ref that names it."""
    repository = cache / f'models--{name.replace("/", "--")}'
    snapshot = repository / 'snapshots' / '607a30d7'
    for folder in (snapshot, repository / 'refs', repository / 'blobs'):
        folder.mkdir(parents=True)
    (repository / 'refs' / 'main').write_text('607a30d7')
    for path in files:
        shutil.copy(path, repository / 'blobs' / path.name)
        (snapshot / path.name).symlink_to(repository / 'blobs' / path.name)


@pytest.mark.parametrize(
    'new, old, found',
    [('whole', 'none', 'new'), ('none', 'whole', 'old'), ('part', 'whole', 'old'), ('whole', 'whole', 'new')],
)
def test_both_names_of_gpt2(tmp_path, monkeypatch, new, old, found):
    """The hub calls it openai-community/gpt2 and once called it gpt2: whichever is whole in the cache is
    read, without a network. A folder `gpt2` in the working directory is neither.
    """
    cache = tmp_path / 'cache'
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(cache))
    monkeypatch.chdir(tmp_path)
    hf_gpt2(tmp_path / 'gpt2', 300, seed=3)
    nets = {}
    for seed, (name, state) in enumerate((('openai-community/gpt2', new), ('gpt2', old))):
        folder = tmp_path / f'saved{seed}'
        nets['new' if seed == 0 else 'old'] = hf_gpt2(folder, 50257, seed)
        if state != 'none':
            files = [folder / 'config.json', folder / 'model.safetensors']
            put_into_cache(cache, name, files if state == 'whole' else files[:1])
    net = GPT.from_pretrained('gpt2')
    want = nets[found].state_dict()['transformer.wte.weight']
    assert torch.equal(net.transformer.wte.weight, want) and net.tokenizer_source == {'kind': 'gpt2'}


def test_no_gpt2_in_the_cache(tmp_path, monkeypatch):
    """Neither is whole: one line says what to do."""
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    hf_gpt2(tmp_path / 'saved', 300)
    put_into_cache(tmp_path, 'gpt2', [tmp_path / 'saved' / 'config.json'])
    with pytest.raises(
        ValueError, match="cannot read GPT-2 from 'gpt2' .*: fetch it where there is a network"
    ):
        GPT.from_pretrained('gpt2')


# -----------------------------------------------------------------------------
# Texts that are not the sum of their pieces' texts

MAKERS = [word_piece, unigram, sentence_piece, word_level]


def saying(folder, spec, ids, template=None):
    """Saves a checkpoint of a model that writes these ids, whatever stands before: the token at position
    p + 1 follows from position p alone.
    """
    torch.manual_seed(0)
    vocab_size = Tokenizer(spec).vocab_size
    net = GPT(GPTConfig(64, vocab_size, 1, 1, 64))
    with torch.no_grad():
        net.transformer.h[0].attn.c_proj.weight.zero_()
        net.transformer.h[0].mlp.c_proj.weight.zero_()
        for i, target in enumerate(ids[1:]):
            net.transformer.wpe.weight[i] = 9 * net.lm_head.weight[target]
    checkpoint = {
        'model': net.state_dict(),
        'model_args': vars(net.config),
        'iter_num': 1,
        'tokenizer': spec,
        'template': template,
    }
    folder.mkdir(exist_ok=True)
    torch.save(checkpoint, folder / 'ckpt.pt')
    return net


@pytest.fixture
def sample(house, tmp_path, monkeypatch, capsys):
    """sample('--key=value', …) runs sample.py in this process on tmp_path/out, greedily; returns what it
    prints.
    """

    def sample(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # the configurator has one
        how = [*MACHINE, '--temperature=0', '--num_samples=1', *arguments]
        monkeypatch.setattr(sys, 'argv', ['sample.py', *how])
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'My lord?\n'), encoding='utf-8'))
        runpy.run_path(str(house / 'sample.py'), run_name='__main__')
        return capsys.readouterr().out

    return sample


@pytest.mark.parametrize('make', MAKERS)
def test_texts_join(sample, tmp_path, make):
    """Behind a prompt stands what the tokenizers library writes for all ids together, at once or streamed,
    with its spaces: sample.py once printed `My lordis here`. A text that stops a sample is found with them.
    """
    tokenizer = make()
    prompt = 'My lord'
    ids = tokenizer.encode("My lord is here, and I don't know what it's for.", add_special_tokens=False).ids
    n = len(ids) - len(tokenizer.encode(prompt, add_special_tokens=False).ids)
    want = tokenizer.decode(ids, skip_special_tokens=False)
    assert want.startswith('My lord is here') and "lord" not in want[7:]
    saying(tmp_path / 'out', spec_of(tokenizer), ids)
    how = [f'--start={prompt}', f'--max_new_tokens={n}']
    assert sample(*how) == f'{want}\n{END}'
    assert sample(*how, '--stream=True') == f'{want}\n{END}'
    assert sample(*how, '--stop= I don') == f'{want.partition(" I don")[0]}\n{END}'

    # A space behind the prompt is there once. Without a prompt nothing stands before.
    if make in (word_piece, word_level):
        assert sample('--start=My lord ', how[1]) == f'{want}\n{END}'
    saying(tmp_path / 'out', spec_of(tokenizer), [0, *ids])
    assert sample('--start=', f'--max_new_tokens={len(ids)}') == f'{want}\n{END}'


def test_small_letters(sample, tmp_path):
    """A tokenizer that changes the prompt: it stands there as it was typed."""
    tokenizer = tokenizers.BertWordPieceTokenizer()
    tokenizer.train_from_iterator(ENGLISH, vocab_size=60, min_frequency=9, show_progress=False)
    ids = tokenizer.encode('MY   LORD is here', add_special_tokens=False).ids
    saying(tmp_path / 'out', spec_of(tokenizer), ids)
    n = len(ids) - len(tokenizer.encode('my lord', add_special_tokens=False).ids)
    assert sample('--start=MY   LORD', f'--max_new_tokens={n}') == f'MY   LORD is here\n{END}'


@pytest.mark.parametrize('make', MAKERS)
def test_answers_join(sample, tmp_path, make):
    """Answers too, of a chat and line by line, so that a text with a space stops them at their beginning."""
    tokenizer = make()
    answer = "it's for the lord."
    ids = tokenizer.encode('My lord?', add_special_tokens=False).ids
    new = tokenizer.encode(answer, add_special_tokens=False).ids
    before = tokenizer.decode(ids, skip_special_tokens=False)
    want = tokenizer.decode(ids + new, skip_special_tokens=False)[len(before) :].strip()
    saying(tmp_path / 'out', spec_of(tokenizer), ids + new, '{question}{answer}')
    how = [f'--max_new_tokens={len(new)}']
    assert sample(*how, '--chat=True') == f'{want}\n'
    (tmp_path / 'asked.txt').write_text('My lord?\n')
    assert sample(*how, '--each_line=True', '--start=FILE:asked.txt') == f'{want}\n'
    assert sample(*how, '--chat=True', '--stop= it') == '\n'


# -----------------------------------------------------------------------------
# End tokens


@pytest.mark.parametrize(
    'specials, end',
    [
        (['<s>', '</s>'], '</s>'),
        (['<|im_start|>', '<|im_end|>'], '<|im_end|>'),
        (['<|im_end|>', EOT], EOT),
        (['<pad>', '[EOS]'], '[EOS]'),
        (['<s>'], None),
    ],
)
def test_its_own_end(specials, end):
    """<|endoftext|> ends a document, or what a tokenizer has for that; as a word among others it does not."""
    ours = Tokenizer(spec_of(byte_level(ENGLISH, 300, specials)))
    assert (ours.eot, ours.eot_text) == ((None, EOT) if end is None else (specials.index(end), end))
    assert ours.bos == (0 if end is None else ours.eot)
    assert ours.encode(f'a{end}')[-1] == ours.eot or end is None
    plain = tokenizers.Tokenizer(models.WordLevel({'</s>': 0, 'a': 1}, unk_token='a'))
    assert Tokenizer(spec_of(plain)).eot is None


@pytest.mark.parametrize('make', [lambda: byte_level(ENGLISH, 300, ['<s>', '</s>']), unigram])
def test_export_of_its_own_end(sample, tmp_path, make):
    """An export ends texts with the tokenizer's own token, and has no token more. Samples end there too."""
    tokenizer = make()
    ids = tokenizer.encode('My lord is here', add_special_tokens=False).ids
    end = tokenizer.token_to_id('</s>')
    net = saying(tmp_path / 'out', spec_of(tokenizer), [*ids, end, *ids])
    net.tokenizer_source, net.template = spec_of(tokenizer), '{messages}'
    net.save_pretrained(tmp_path / 'export')
    theirs = AutoTokenizer.from_pretrained(tmp_path / 'export')
    hf_model = AutoModelForCausalLM.from_pretrained(tmp_path / 'export')
    assert len(theirs) == tokenizer.get_vocab_size() == hf_model.config.vocab_size
    assert {theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id, theirs.unk_token_id} == {end}
    assert hf_model.config.eos_token_id == hf_model.config.bos_token_id == end
    assert hf_model.generation_config.suppress_tokens is None
    talk = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'My lord'}]
    assert theirs.apply_chat_template(talk, tokenize=False) == 'User: Hi\nAssistant: My lord</s>'
    for how in ([], ['--init_from=export']):
        assert sample('--start=My lord', '--max_new_tokens=20', *how) == f'My lord is here\n{END}'


def test_documents_end_in_it(run, house, tmp_path):
    """prepare.py ends documents with it, also where a template asks for an end, and shows it."""
    byte_level([TEXT], 300, ['<s>', '</s>']).save(str(tmp_path / 'tokenizer.json'))
    rows = [{'question': f'{n}+1?', 'answer': str(n + 1)} for n in range(30)]
    (tmp_path / 'qa.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    how = ['--input=qa.jsonl', '--tokenizer=.', r'--template=Q: {question}\nA: {answer}', '--name=ends']
    out = run('data/custom/prepare.py', *how).stdout
    assert 'Q: 0+1?\nA:[ 1</s>]\n' in out
    ids = np.fromfile(house / 'data' / 'ends' / 'train.bin', dtype='<u2')
    assert (ids == 1).sum() == 27 and ids[-1] == 1
    assert Tokenizer(read_tokenizer_spec(house / 'data' / 'ends')).decode(ids).count('</s>Q: ') == 26


def test_another_tokenizer_gives_way(run, house, tmp_path, bpe):
    """Data in GPT-2's encoding are not read with the vocab.json that stood in their folder before."""
    folder = tmp_path / 'x'
    folder.mkdir()
    (tmp_path / 'book.txt').write_text('Some words, and more.\n' * 90)
    for name in ('vocab.json', 'merges.txt'):
        (folder / name).write_text('{}')
    run('data/custom/prepare.py', '--input=book.txt', '--tokenizer=gpt2', f'--name={folder}')
    assert read_tokenizer_spec(folder) == {'kind': 'gpt2'}
    assert (folder / 'merges.txt.old').read_text() == '{}'


def test_export_without_an_end_comes_back(tmp_path):
    """Where a tokenizer has no end token, an export gets <|endoftext|>, and a model that fits it when it is
    read again, with the same logits for all other tokens.
    """
    tokenizer = byte_level(GERMAN, 300, ['<s>'])
    net = GPT(GPTConfig(8, tokenizer.get_vocab_size(), 1, 1, 8)).eval()
    net.tokenizer_source = spec_of(tokenizer)
    net.save_pretrained(tmp_path)
    again = GPT.from_pretrained(str(tmp_path))
    assert again.tokenizer().vocab_size == again.config.vocab_size == net.config.vocab_size + 1
    ids = torch.arange(8)[None]
    assert torch.allclose(again(ids)[0][..., :-1], net(ids)[0], atol=1e-6)
