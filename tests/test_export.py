"""
To transformers and back: what the AutoModelForCausalLM, AutoTokenizer and pipeline of people without this
project make of an exported folder.
"""
import math
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import SMALL, TEXT
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from data.tokenizer import char_tokenizer
from model import GPT, GPTConfig

END = '---------------\n'
CHARACTERS = char_tokenizer(sorted(set(TEXT)))  # 40


def small(**changes):
    """A model with a tokenizer of 40 characters, which costs less to save than GPT-2's."""
    args = dict(block_size=48, vocab_size=64, n_layer=1, n_head=1, n_embd=8, **changes)
    net = GPT(GPTConfig(**args)).eval()
    net.tokenizer_source = CHARACTERS.spec
    return net


def all_logits(net, x):
    return net.lm_head(net.hidden(x))


@pytest.mark.parametrize('activation, bias', [('gelu', False), ('gelu_tanh', True)])
@torch.no_grad()
def test_same_logits_and_back(tmp_path, activation, bias):
    """In float32 to the last bit; the way back gives the same state dict and the same shape."""
    torch.manual_seed(0)
    net = GPT(GPTConfig(48, 512, 3, 4, 64, bias=bias, activation=activation)).eval()
    net.tokenizer_source = CHARACTERS.spec
    for p in net.parameters():
        p += torch.randn_like(p) * 0.1  # no bias and no gain at its first value
    folder = tmp_path / 'deep' / 'out'
    net.save_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    idx = torch.randint(512, (3, 48))
    assert theirs.dtype == torch.float32 and torch.equal(theirs(idx).logits, all_logits(net, idx))
    assert theirs.config.n_ctx == 48  # llama.cpp's converter dies of a KeyError without it
    other = {'gelu': 'gelu_pytorch_tanh', 'gelu_tanh': 'gelu'}[activation]
    wrong = AutoModelForCausalLM.from_pretrained(folder, activation_function=other).eval()
    assert not torch.equal(wrong(idx).logits, all_logits(net, idx))
    back = GPT.from_pretrained(str(folder))
    assert back.config == net.config and back.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(p, back.state_dict()[name]) for name, p in net.state_dict().items())
    assert back.tokenizer().reads_like(CHARACTERS)


@torch.no_grad()
def test_tuned_there(tmp_path):
    """Biases that were zero when a model left and no longer are come back."""
    small(bias=False).save_pretrained(tmp_path / 'out')
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
    torch.nn.init.normal_(theirs.transformer.h[0].mlp.c_fc.bias)
    theirs.save_pretrained(tmp_path / 'tuned')
    back, idx = GPT.from_pretrained(str(tmp_path / 'tuned')), torch.arange(8)[None]
    assert back.config.bias and torch.allclose(all_logits(back, idx), theirs(idx).logits, atol=1e-6)


@torch.no_grad()
def test_padded_ids(tmp_path):
    """Ids that only pad the vocabulary are not sampled there either, however likely."""
    net = small()
    net.transformer.ln_f.bias.fill_(1.0)
    net.lm_head.weight[40:] = 9.0
    net.save_pretrained(tmp_path)
    theirs, idx = AutoModelForCausalLM.from_pretrained(tmp_path), torch.tensor([[5, 6]])
    assert theirs(idx).logits[0, -1].argmax() >= 40
    text = theirs.generate(idx, attention_mask=torch.ones_like(idx), do_sample=True, max_new_tokens=20)
    assert text.max() < 40


def test_no_tokenizer(house, tmp_path):
    """A model whose tokens nothing explains, or explains too many, gets one line and leaves no files."""
    net = GPT(GPTConfig(8, 65, 1, 1, 8))
    for source, words in ((net.tokenizer_source, "the model's 65 tokens: set model.tokenizer_source"),
                          (tmp_path, f"put the meta.pkl or tokenizer.json of its data set into {tmp_path}"),
                          (char_tokenizer(''.join(map(chr, range(66)))).spec, 'no tokenizer found')):
        net.tokenizer_source = source
        with pytest.raises(ValueError, match=words):
            net.save_pretrained(tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    net.tokenizer_source = house / 'data' / 'tiny'
    net.save_pretrained(tmp_path / 'out')
    assert (tmp_path / 'out' / 'tokenizer.json').is_file()
    with pytest.raises(ValueError, match='save the model before'):
        net.for_sampling('cpu', torch.float32).save_pretrained(tmp_path / 'packed')


# -----------------------------------------------------------------------------
# Models that train.py has trained

@pytest.fixture(scope='module')
def text(house, tmp_path_factory):
    """data/xKIND of one text for each kind of tokenizer: characters, GPT-2's, and one trained on it."""
    path = tmp_path_factory.mktemp('books') / 'book.txt'
    path.write_text(TEXT + 'naïve 数学 🙂\ttab\r<|endoftext|> \\ "quoted" \u3000 \x7f\n', encoding='utf-8')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'path', sys.path[:])
        for kind in ('char', 'gpt2', 'bpe'):
            arguments = [f'--input={path}', f'--tokenizer={kind}', '--vocab_size=300', '--num_workers=1']
            patch.setattr(sys, 'argv', ['prepare.py', *arguments, f'--name=x{kind}'])
            runpy.run_path(str(house / 'data' / 'custom' / 'prepare.py'), run_name='__main__')
    return path.read_bytes().decode()


@pytest.mark.slow
@pytest.mark.parametrize('kind', ('char', 'gpt2', 'bpe'))
def test_a_trained_model(run, text, bpe, tmp_path, kind):
    """
    README's one-liner. The ids and texts of the tokenizer, the greedy text of the pipeline and of sample.py
    from the export are ours.
    """
    run('train.py', *SMALL, f'--dataset=x{kind}', '--max_iters=15', '--eval_interval=15', '--eval_iters=1',
        '--block_size=48', '--n_layer=1', '--batch_size=1', '--gradient_accumulation_steps=1')
    net = GPT.from_checkpoint(tmp_path / 'out')
    net.save_pretrained(tmp_path / 'export')
    ours, theirs = net.tokenizer(), AutoTokenizer.from_pretrained(tmp_path / 'export')
    assert theirs(text)['input_ids'] == ours.encode(text) and theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.eot and len(theirs) == ours.vocab_size
    generate = pipeline('text-generation', str(tmp_path / 'export'), device='cpu')
    start = 'the lazy '
    there = generate(start, do_sample=False, max_new_tokens=20, return_full_text=True)[0]['generated_text']
    how = [f'--start={start}', '--temperature=0', '--num_samples=1', '--max_new_tokens=20', '--device=cpu',
           '--stop=<|endoftext|>']
    assert run('sample.py', *how).stdout == there + '\n' + END
    assert run('sample.py', *how, '--init_from=export').stdout == there + '\n' + END
    if kind == 'char':  # an unknown character is an error in both, not dropped
        error = run('sample.py', '--init_from=export', '--start=Ω', status=1)
        assert "cannot read 'Ω'" in error
        with pytest.raises(Exception, match='UNK'):
            theirs('Ω')


@pytest.mark.slow
def test_another_tokenizer(run, text, bpe, tmp_path):
    """Fine-tuning an export on tokens that mean something else is refused; on its own it goes on."""
    run('train.py', *SMALL, '--dataset=xchar', '--max_iters=1')
    GPT.from_checkpoint(tmp_path / 'out' / 'ckpt.pt').save_pretrained(tmp_path / 'export')
    for dataset in ('tiny', 'xbpe', 'xgpt2'):
        error = run('train.py', *SMALL, f'--dataset={dataset}', '--init_from=export', status=1)
        assert 'was prepared with another tokenizer than the one of export' in error
    run('train.py', *SMALL, '--dataset=xchar', '--init_from=export', '--out_dir=more', '--max_iters=1')


@pytest.mark.slow
def test_wikitext_perplexity(run, house, tmp_path, bpe):
    """
    config/eval_wikitext.py on a folder of transformers gives its loss over the whole of val.bin, the end that
    does not fill a batch included, and the perplexities that follow from it.
    """
    lines = [f' = Title {n} = \n \n One , two ( {n} ) @-@ three . \n' for n in range(9)]
    for name in ('valid', 'test'):
        (tmp_path / f'{name}.txt').write_text(''.join(lines), encoding='utf-8')
    run('data/wikitext/prepare.py', f'--input={tmp_path}')
    torch.manual_seed(0)
    GPT(GPTConfig(24, 50257, 2, 2, 16)).save_pretrained(tmp_path / 'gpt')
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'gpt').eval()
    out = run('train.py', 'config/eval_wikitext.py', f'--init_from={tmp_path / "gpt"}', '--block_size=24',
              '--batch_size=3', '--device=cpu').stdout
    ids = np.fromfile(house / 'data' / 'wikitext' / 'val.bin', dtype='<u2').astype(np.int64)
    ids = torch.from_numpy(ids)
    total, words = 0.0, 9 * (4 + 9 + 3)
    for i in range(0, len(ids) - 1, 24):
        window = ids[i:i + 25]
        with torch.no_grad():
            logits = theirs(window[None, :-1]).logits[0].double()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction='sum').item()
    assert (len(ids) - 1) % (24 * 3)
    line = r'^val.bin once through: perplexity ([\d.]+) per token \(([\d,]+)\), ([\d.]+) per word \((\d+)\)$'
    found = re.search(line, out, re.M).groups()
    assert int(found[1]) == len(ids) - 1 and int(found[3]) == words
    assert float(found[0]) == pytest.approx(math.exp(total / (len(ids) - 1)), rel=1e-3)
    assert float(found[2]) == pytest.approx(math.exp(total / words), rel=1e-3)
