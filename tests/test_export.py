"""To transformers and back: what a stranger's AutoModelForCausalLM, AutoTokenizer and pipeline make of an exported folder."""
import math
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from conftest import SMALL, TEXT
from model import GPT, GPTConfig

END = '---------------\n'


@pytest.mark.parametrize('bias', (True, False))
@pytest.mark.parametrize('activation', ('gelu', 'gelu_tanh'))
def test_same_logits_and_back(tmp_path, bpe, activation, bias):
    """In float32 to the last bit; the way back gives the same state dict and the same shape."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=48, vocab_size=50304, n_layer=3, n_head=4, n_embd=64, bias=bias, activation=activation)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # no bias and no gain at its first value
    model.save_pretrained(tmp_path / 'deep' / 'out')
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'deep' / 'out').eval()
    idx = torch.randint(50257, (3, 48))
    with torch.no_grad():
        ours = model.lm_head(model.hidden(idx))
        assert theirs.dtype == torch.float32 and torch.equal(theirs(idx).logits, ours)
        other = {'gelu': 'gelu_pytorch_tanh', 'gelu_tanh': 'gelu'}[activation]
        wrong = AutoModelForCausalLM.from_pretrained(tmp_path / 'deep' / 'out', activation_function=other).eval()
        assert not torch.equal(wrong(idx).logits, ours)
    back = GPT.from_pretrained(str(tmp_path / 'deep' / 'out'))
    assert back.config == model.config
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(p, back.state_dict()[name]) for name, p in model.state_dict().items())


def test_tuned_there(tmp_path):
    """Biases that were zero when a model left and no longer are come back."""
    model = GPT(GPTConfig(block_size=8, vocab_size=50257, n_layer=1, n_head=1, n_embd=8, bias=False))
    model.save_pretrained(tmp_path / 'out')
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
    torch.nn.init.normal_(theirs.transformer.h[0].mlp.c_fc.bias)
    theirs.save_pretrained(tmp_path / 'tuned')
    back = GPT.from_pretrained(str(tmp_path / 'tuned')).eval()
    idx = torch.arange(8)[None]
    with torch.no_grad():
        assert back.config.bias and torch.allclose(back.lm_head(back.hidden(idx)), theirs(idx).logits, atol=1e-6)


@pytest.fixture(scope='module')
def data(house, tmp_path_factory):
    """data/NAME for each kind of tokenizer: characters, GPT-2's, and one that was trained."""
    import runpy
    import sys
    book = tmp_path_factory.mktemp('books') / 'book.txt'
    book.write_text(TEXT + 'naïve 数学 🙂\ttab\r<|endoftext|> \\ "quoted" \u3000 \x7f\n', encoding='utf-8')
    for kind in ('char', 'gpt2', 'bpe'):
        argv, sys.argv = sys.argv, ['prepare.py', f'--input={book}', f'--tokenizer={kind}', '--vocab_size=300', '--num_workers=1', f'--name=x{kind}']
        try:
            runpy.run_path(str(house / 'data' / 'custom' / 'prepare.py'), run_name='__main__')
        finally:
            sys.argv = argv
    return book.read_bytes().decode()


@pytest.mark.parametrize('kind', ('char', 'gpt2', 'bpe'))
def test_a_trained_model(run, house, data, bpe, tmp_path, kind):
    """The documented one-liner; the tokenizer's ids and texts, the pipeline's greedy text and sample.py's are ours, from the export too."""
    run('train.py', *SMALL, f'--dataset=x{kind}', '--max_iters=20', '--eval_interval=20', '--eval_iters=1', '--block_size=48', '--n_layer=1', '--batch_size=1')
    model = GPT.from_checkpoint(tmp_path / 'out')
    model.save_pretrained(tmp_path / 'export')
    ours, theirs = model.tokenizer(), AutoTokenizer.from_pretrained(tmp_path / 'export')
    assert theirs(data)['input_ids'] == ours.encode(data) and theirs.decode(ours.encode(data)) == data
    assert theirs.eos_token_id == ours.end and len(theirs) == ours.size
    generate = pipeline('text-generation', str(tmp_path / 'export'), device='cpu')
    start = 'the lazy '
    there = generate(start, do_sample=False, max_new_tokens=20, return_full_text=True)[0]['generated_text']
    how = [f'--start={start}', '--temperature=0', '--num_samples=1', '--max_new_tokens=20', '--device=cpu', '--stop=<|endoftext|>']
    assert run('sample.py', *how).stdout == there + '\n' + END
    assert run('sample.py', *how, '--init_from=export').stdout == there + '\n' + END
    if kind == 'char':
        assert 'cannot read' in run('sample.py', '--init_from=export', '--start=Ω', status=1)
        with pytest.raises(Exception, match='UNK'):  # said, not dropped
            theirs('Ω')


def test_padded_ids(tmp_path, bpe):
    """Ids that only pad the vocabulary are not drawn there either, however likely."""
    model = GPT(GPTConfig(block_size=32, vocab_size=50304, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[50257:] = 9.0
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    idx = torch.tensor([[5, 6]])
    assert theirs(idx).logits[0, -1].argmax() >= 50257
    assert theirs.generate(idx, attention_mask=torch.ones_like(idx), do_sample=True, max_new_tokens=20).max() < 50257


def test_another_tokenizer(run, house, data, bpe, tmp_path):
    """Fine-tuning an export on tokens that mean something else is refused, on its own it goes on."""
    run('train.py', *SMALL, '--dataset=xchar', '--max_iters=1')
    GPT.from_checkpoint(tmp_path / 'out' / 'ckpt.pt').save_pretrained(tmp_path / 'export')
    for dataset in ('tiny', 'xbpe', 'xgpt2'):
        error = run('train.py', *SMALL, f'--dataset={dataset}', '--init_from=export', status=1)
        assert 'was prepared with another tokenizer than the one in export' in error or 'cannot read' in error
    run('train.py', *SMALL, '--dataset=xchar', '--init_from=export', '--out_dir=more', '--max_iters=1')


def test_no_tokenizer(house, tmp_path):
    """A model whose tokens nobody explained says so."""
    model = GPT(GPTConfig(block_size=8, vocab_size=65, n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(ValueError, match='the model has 65 tokens, but which'):
        model.save_pretrained(tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    model.tokens = house / 'data' / 'tiny'
    model.save_pretrained(tmp_path / 'out')
    with pytest.raises(ValueError, match='save the model before'):
        model.for_sampling('cpu', torch.float32).save_pretrained(tmp_path / 'packed')
    with pytest.raises(ValueError, match='no checkpoint at'):
        GPT.from_checkpoint(tmp_path)


def test_wikitext_perplexity(run, house, tmp_path, bpe):
    """config/eval_wikitext.py on a folder of transformers' gives its loss over the whole of val.bin, and the perplexities that follow from it."""
    for name in ('valid', 'test'):
        (tmp_path / f'{name}.txt').write_text(''.join(f' = Title {n} = \n \n One , two ( {n} ) @-@ three . \n' for n in range(9)), encoding='utf-8')
    run('data/wikitext/prepare.py', f'--input={tmp_path}')
    torch.manual_seed(0)
    GPT(GPTConfig(block_size=24, vocab_size=50257, n_layer=2, n_head=2, n_embd=16)).save_pretrained(tmp_path / 'gpt')
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'gpt').eval()
    out = run('train.py', 'config/eval_wikitext.py', f'--init_from={tmp_path / "gpt"}', '--block_size=24', '--batch_size=3', '--device=cpu').stdout
    tokens = torch.from_numpy(np.fromfile(house / 'data' / 'wikitext' / 'val.bin', dtype='<u2').astype(np.int64))
    total = 0.0
    for i in range(0, len(tokens) - 1, 24):
        window = tokens[i:i + 25]
        with torch.no_grad():
            logits = theirs(window[None, :-1]).logits[0].double()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction='sum').item()
    words = 9 * (4 + 9 + 3)
    found = re.search(r'^val.bin once through: perplexity ([\d.]+) per token \(([\d,]+)\), ([\d.]+) per word \((\d+)\)$', out, re.M).groups()
    assert int(found[1]) == len(tokens) - 1 and int(found[3]) == words
    assert float(found[0]) == pytest.approx(math.exp(total / (len(tokens) - 1)), rel=1e-3)
    assert float(found[2]) == pytest.approx(math.exp(total / words), rel=1e-3)
