"""model.py against transformers, tests/reference.py in float64, and itself without shortcuts."""

import copy
import ctypes
import importlib.util
import math
import os
import pickle
import shutil
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import ROOT
from reference import adamw, gpt_logits, gpt_loss, random_parameters
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model as ours
from data.tokenizer import Tokenizer, char_tokenizer, read_tokenizer_spec, same_texts, train_bpe
from model import (
    GPT,
    ChunkedCrossEntropy,
    GPTConfig,
    HalfLinear,
    PackedLinear,
    UserError,
    read_checkpoint,
    sample_next_token,
)

ARGS = dict(n_layer=3, n_head=2, n_embd=16, block_size=12, bias=True, vocab_size=29, dropout=0.0)


def tiny(seed=0, **changes):
    """A model of random weights none of which is at its initial value, the same as a dict, its arguments."""
    args = {**ARGS, **changes}
    net = GPT(GPTConfig(**args))
    p = random_parameters(args, seed)
    net.load_state_dict({**p, 'lm_head.weight': p['transformer.wte.weight']})
    return net.eval(), p, args


def tokens(*shape, seed=0, high=29):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def all_logits(net, x):
    return net.lm_head(net.hidden(x))


# -----------------------------------------------------------------------------
# The network


@pytest.mark.slow
@pytest.mark.parametrize('layers, heads, width, context, vocab', [(2, 2, 32, 16, 61), (3, 4, 64, 32, 500)])
def test_transformers_gpt2(tmp_path, layers, heads, width, context, vocab):
    """Logits within 1e-5 and gradients within 1e-4 of transformers' GPT-2, read from a folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            n_layer=layers,
            n_head=heads,
            n_embd=width,
            n_positions=context,
            vocab_size=vocab,
            bos_token_id=None,
            eos_token_id=None,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            initializer_range=0.1,
        )
    )
    for name, q in theirs.named_parameters():  # biases and gains that matter
        if name.endswith('bias') or '.ln_' in name:
            torch.nn.init.normal_(q, mean=float('ln_' in name and name.endswith('weight')), std=0.1)
    theirs.save_pretrained(tmp_path)
    net = GPT.from_pretrained(str(tmp_path))
    x, y = tokens(3, context, seed=1, high=vocab), tokens(3, context, seed=2, high=vocab)
    want = theirs(x).logits
    assert not net.training and (net(x)[0] - want[:, -1:]).abs().max() < 1e-5
    theirs_loss = F.cross_entropy(want.flatten(0, 1), y.flatten())
    theirs_loss.backward()
    expected = {name: q.grad for name, q in theirs.named_parameters()}
    for return_logits in (True, False):
        logits, loss = net(x, y, return_logits=return_logits)
        assert logits is None if not return_logits else (logits - want).abs().max() < 1e-5
        assert abs(loss.item() - theirs_loss.item()) < 1e-5
        net.zero_grad()
        loss.backward()
        for name, q in net.named_parameters():
            grad = expected[name.replace('lm_head', 'transformer.wte')]
            grad = grad.T if name.endswith(ours.HF_TRANSPOSED) else grad
            assert (q.grad - grad).norm() < 1e-4 * grad.norm(), name


@pytest.fixture(scope='module')
def erf_gpt2(tmp_path_factory):
    """A GPT-2 of transformers whose activation is erf's GELU, and the folder where it is saved."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            n_layer=1,
            n_head=1,
            n_embd=8,
            n_positions=8,
            vocab_size=11,
            bos_token_id=None,
            eos_token_id=None,
            activation_function='gelu',
        )
    )
    theirs.save_pretrained(folder := tmp_path_factory.mktemp('erf'))
    return theirs.eval(), folder


@pytest.mark.slow
def test_pretrained_variants(tmp_path, erf_gpt2):
    """The erf activation is taken over. An incomplete file (transformers would fill it with random weights)
    and a folder that is none get one line.
    """
    from safetensors.torch import load_file, save_file

    theirs, folder = erf_gpt2
    net, x = GPT.from_pretrained(str(folder)), tokens(2, 8, high=11)
    assert net.config.activation == 'gelu' and (all_logits(net, x) - theirs(x).logits).abs().max() < 1e-5
    for name in ('partial', 'shapes', 'empty'):
        shutil.copytree(folder, tmp_path / name)
    weights = load_file(folder / 'model.safetensors')
    del weights['transformer.h.0.mlp.c_fc.weight']
    save_file(weights, tmp_path / 'partial' / 'model.safetensors', metadata={'format': 'pt'})
    weights['transformer.h.0.mlp.c_fc.weight'] = torch.zeros(8, 16)
    save_file(weights, tmp_path / 'shapes' / 'model.safetensors', metadata={'format': 'pt'})
    (tmp_path / 'empty' / 'model.safetensors').unlink()
    for name, words in (
        ('partial', 'not complete: transformer.h.0.mlp.c_fc.weight is missing'),
        ('shapes', 'not complete: transformer.h.0.mlp.c_fc.weight is missing or of another'),
        ('empty', 'is all there'),
        ('missing', 'no name such as resume, gpt2, gpt2-medium'),
    ):
        with pytest.raises(ValueError, match=words) as error:
            GPT.from_pretrained(str(tmp_path / name))
        assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'field, value',
    [
        ('layer_norm_epsilon', 1e-6),
        ('n_inner', 16),
        ('scale_attn_weights', False),
        ('scale_attn_by_inverse_layer_idx', True),
        ('tie_word_embeddings', False),
        ('add_cross_attention', True),
        ('activation_function', 'relu'),
        ('activation_function', 'silu'),
    ],
)
def test_fields_that_are_not_built(tmp_path, field, value):
    """A GPT-2 that computes something else is refused, and the field of config.json that says so is named."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(
        GPT2Config(
            n_layer=1,
            n_head=1,
            n_embd=8,
            n_positions=8,
            vocab_size=11,
            bos_token_id=None,
            eos_token_id=None,
            **{field: value},
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f'config.json: {field} is {value!r}, and model.py builds') as error:
        GPT.from_pretrained(str(tmp_path))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'config, words',
    [
        (
            '{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}',
            'holds a LlamaForCausalLM: model.py',
        ),
        (
            '{"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}',
            'holds a GPTNeoXForCausalLM: ',
        ),
        ('{"model_type": "llama"}', 'holds a llama: '),
        ('{"model_type": "gpt_neox"}', 'holds a gpt_neox: '),
        ('{"architectures": null, "model_type": "llama"}', 'holds a llama: '),
        ('{', 'cannot read GPT-2 from .*JSONDecodeError'),
        ('[1]', 'cannot read GPT-2 from '),
        ('', 'cannot read GPT-2 from '),
        ('caf\udce9', 'cannot read GPT-2 from '),
        ('{"model_type": "gpt2"}', 'cannot read GPT-2 from .*: is all there'),
    ],
)
def test_other_models(tmp_path, config, words):
    """Folders of other models, and a config.json that is none: one line says what the folder holds."""
    (tmp_path / 'config.json').write_bytes(config.encode(errors='surrogateescape'))
    with pytest.raises(ValueError, match=words) as error:
        GPT.from_pretrained(str(tmp_path))
    assert '\n' not in str(error.value)


def test_other_heads(tmp_path):
    """A GPT-2 with another head is refused: transformers itself would read it and drop the head. One without
    any is GPT-2. An adapter, which has no weights of its own, is to be merged first.
    """
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2Model

    config = GPT2Config(
        n_layer=1,
        n_head=1,
        n_embd=8,
        n_positions=8,
        vocab_size=11,
        bos_token_id=None,
        eos_token_id=None,
        num_labels=2,
        initializer_range=1.0,
    )
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / 'classes')
    with pytest.raises(ValueError, match='classes holds a GPT2ForSequenceClassification: model.py builds'):
        GPT.from_pretrained(str(tmp_path / 'classes'))
    theirs, x = GPT2Model(config).eval(), tokens(2, 8, high=11)
    theirs.save_pretrained(tmp_path / 'base')
    net = GPT.from_pretrained(str(tmp_path / 'base'))
    assert (net.hidden(x) - theirs(x).last_hidden_state).abs().max() < 1e-5
    assert torch.equal(net.lm_head.weight, theirs.wte.weight)
    for folder in ('base', 'adapter'):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / 'adapter_config.json').write_text('{}')
        with pytest.raises(ValueError, match=f'{folder} holds an adapter of peft: merge it first'):
            GPT.from_pretrained(str(tmp_path / folder))


@pytest.mark.parametrize('name', list(ours.HF_ACTIVATIONS))
@torch.no_grad()
def test_names_of_gelu(tmp_path, name):
    """transformers has six names for two functions; each gives its own logits here."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            n_layer=2,
            n_head=1,
            n_embd=8,
            n_positions=8,
            vocab_size=11,
            bos_token_id=None,
            eos_token_id=None,
            activation_function=name,
            initializer_range=0.5,
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    net, x = GPT.from_pretrained(str(tmp_path)), tokens(4, 8, high=11)
    erf = name in ('gelu', 'gelu_python')
    assert net.config.activation == ('gelu' if erf else 'gelu_tanh')
    assert (all_logits(net, x) - theirs(x).logits).abs().max() < 1e-5
    for block in net.transformer.h:
        block.mlp.gelu = torch.nn.GELU('tanh' if erf else 'none')
    assert (all_logits(net, x) - theirs(x).logits).abs().max() > 1e-5  # else this test shows nothing


@pytest.mark.slow
def test_override_args(erf_gpt2):
    """Dropout reaches all of its places; what the weights decide cannot be overridden, as in nanoGPT."""
    folder = str(erf_gpt2[1])
    net = GPT.from_pretrained(folder, dict(dropout=0.25))
    places = [m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)]
    assert {*places, net.transformer.h[0].attn.dropout, net.config.dropout} == {0.25} and len(places) == 3
    for args in (None, {}, dict(dropout=0.0)):
        assert GPT.from_pretrained(folder, args).config.dropout == 0
    for args in (dict(bias=False), dict(dropout=0.1, block_size=4)):
        with pytest.raises(ValueError, match='override_args takes dropout only'):
            GPT.from_pretrained(folder, args)


@pytest.mark.parametrize('changes', [{}, dict(bias=False), dict(activation='gelu_tanh', n_layer=1, n_head=4)])
def test_plain_reference(changes):
    """Logits, both losses and their gradients in float64."""
    net, p, args = tiny(**changes)
    net.double()
    p = {name: q.double().requires_grad_() for name, q in p.items()}
    x, y = tokens(4, 12), tokens(4, 12, seed=1)
    y[0, :5] = -1
    want = gpt_loss(p, args, x, y)
    want.backward()
    for return_logits in (True, False):
        logits, loss = net(x, y, return_logits=return_logits)
        assert loss.dtype == torch.float64 and abs(loss - want) < 1e-10
        net.zero_grad()
        loss.backward()
        for name, q in net.named_parameters():
            grad = p[name.replace('lm_head', 'transformer.wte')].grad
            torch.testing.assert_close(q.grad, grad, rtol=1e-9, atol=1e-10)
        if return_logits:
            torch.testing.assert_close(logits, gpt_logits(p, args, x), rtol=1e-10, atol=1e-10)
    assert logits is None
    last, loss = net(x)
    torch.testing.assert_close(last, gpt_logits(p, args, x)[:, -1:], rtol=1e-10, atol=1e-10)
    assert loss is None


def test_impossible_shapes():
    for changes, words in (
        (dict(n_embd=15), 'n_embd 15 is not divisible by n_head 2'),
        (dict(n_layer=0), 'n_layer'),
        (dict(dropout=1.0), 'dropout'),
        (dict(activation='relu'), 'activation'),
    ):
        with pytest.raises(ValueError, match=words):
            GPTConfig(**{**ARGS, **changes})
    with pytest.raises(ValueError, match='13 tokens do not fit into block_size 12'):
        tiny()[0](tokens(1, 13))


def test_initialisation():
    """0.02 throughout, less on the branches that end in the residual stream; a loss near ln V."""
    torch.manual_seed(0)
    net = GPT(GPTConfig(block_size=64, vocab_size=512, n_layer=4, n_head=4, n_embd=128))
    p = dict(net.named_parameters())
    assert net.lm_head.weight is net.transformer.wte.weight
    assert abs(p['transformer.h.1.mlp.c_fc.weight'].std() - 0.02) < 0.001
    assert abs(p['transformer.h.1.mlp.c_proj.weight'].std() - 0.02 / math.sqrt(8)) < 0.001
    assert p['transformer.h.1.attn.c_attn.bias'].abs().max() == 0
    loss = net(tokens(4, 64, high=512), tokens(4, 64, seed=1, high=512))[1]
    assert abs(loss.item() - math.log(512)) < 0.1


def test_vocabulary_of_another_size():
    """Cut, left alone, or filled up with the mean row, whose logit is never the largest: no id of the padding
    is ever the likeliest.
    """
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(11, 8, generator=g)

    def resized(n):
        weights = ours.convert_hf({'lm_head.weight': rows, 'transformer.wte.weight': rows}, n)
        assert weights['lm_head.weight'] is weights['transformer.wte.weight']
        return weights['lm_head.weight']

    assert torch.equal(resized(7), rows[:7]) and torch.equal(resized(11), rows)
    filled = resized(14)
    assert filled.shape == (14, 8) and torch.equal(filled[:11], rows)
    assert torch.equal(filled[11:], rows.mean(0).expand(3, 8))
    filled[0] = 9.0  # a copy, not the model's own weights
    assert rows[0].max() < 9
    logits = torch.randn(10_000, 8, generator=g) @ resized(14).T
    assert (logits[:, :11].max(-1).values > logits[:, 11:].max(-1).values).all()


def test_crop_block_size():
    net, p, args = tiny()
    net.crop_block_size(5)
    x = tokens(2, 5)
    torch.testing.assert_close(all_logits(net, x), gpt_logits(p, args, x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="block_size 6 is not within the model's 5"):
        net.crop_block_size(6)


def test_without_wpe(tmp_path):
    """Somebody builds RoPE, with its table as a buffer: training, cropping, sampling, checkpoints ask for no
    wpe. A new field of the config gets into the checkpoint by itself.
    """

    @dataclass
    class Config(GPTConfig):
        rope_theta: float = 100.0

    class Rope(GPT):
        def __init__(self, config):
            super().__init__(config)
            del self.transformer['wpe']
            frequencies = config.rope_theta ** -(torch.arange(config.n_embd) / config.n_embd)
            table = torch.outer(torch.arange(config.block_size), frequencies).cos()
            self.register_buffer('table', table, persistent=False)

        def hidden(self, idx, cache=None, pos=None, mask=None):
            positions = torch.arange(idx.size(1)) if pos is None else pos
            x = self.transformer.wte(idx) * self.table[positions]
            for i, block in enumerate(self.transformer.h):
                x = block(x, cache and cache[i], pos, mask)
            return self.transformer.ln_f(x)

    config = Config(**{**ARGS, 'rope_theta': 50.0})
    net = Rope(config)
    assert net.get_num_params() == net.get_num_params(non_embedding=False) and net.estimate_mfu(1, 1) > 0
    optim = net.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu', 'muon')
    losses = []
    for _ in range(5):
        losses.append(net(tokens(4, 12), tokens(4, 12), return_logits=False)[1])
        losses[-1].backward()
        optim.step()
        optim.zero_grad()
    assert losses[-1] < losses[0]
    assert net.eval().generate(tokens(2, 5), 4).shape == (2, 9)
    args = config.model_args()
    assert args == {**ARGS, 'rope_theta': 50.0} and Config(**ARGS).model_args() == ARGS
    again = Rope.from_weights(Config(**args), net.state_dict())
    assert torch.equal(again(tokens(2, 12))[0], net(tokens(2, 12))[0])
    net.crop_block_size(5)
    assert net.config.block_size == 5


# -----------------------------------------------------------------------------
# nanoGPT's scripts


@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_scripts_of_nanogpt(compiled):
    """What nanoGPT's train.py, bench.py and sample.py do with a model: each of 20 losses is that of the
    plain reference in float64. Once model(X, Y) returned no logits, and every script written for nanoGPT
    failed.
    """
    model_args = dict(n_layer=2, n_head=2, n_embd=16, block_size=12, bias=False, vocab_size=29, dropout=0.0)
    torch.manual_seed(0)
    net = raw = GPT(GPTConfig(**model_args))
    p = {name: q.detach().double().requires_grad_() for name, q in net.named_parameters()}
    p = {name.replace('lm_head', 'transformer.wte'): q for name, q in p.items()}
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    if compiled:
        optim = net.configure_optimizers(
            weight_decay=0.1, learning_rate=1e-2, betas=(0.9, 0.95), device_type='cpu'
        )
        net = torch.compile(net, backend='eager')
    else:
        optim = net.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    reference_optim = adamw(p, 0.1, 1e-2, (0.9, 0.95))
    losses = []
    for iter_num in range(20):
        lr = 1e-2 * (1 - iter_num / 25)
        for group in [*optim.param_groups, *reference_optim.param_groups]:
            group['lr'] = lr
        for micro_step in range(2):
            X = tokens(4, 12, seed=2 * iter_num + micro_step)
            Y = (X + 1) % 29  # something to learn
            logits, loss = net(X, Y)
            want = gpt_loss(p, model_args, X, Y)
            assert logits.shape == (4, 12, 29) and abs(loss.item() - want.item()) < 1e-5, iter_num
            scaler.scale(loss / 2).backward()
            (want / 2).backward()
        losses.append(loss.item())
        scaler.unscale_(optim)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        assert abs(norm - torch.nn.utils.clip_grad_norm_(p.values(), 1.0)) < 1e-4
        scaler.step(optim)
        scaler.update()
        optim.zero_grad(set_to_none=True)
        reference_optim.step()
        reference_optim.zero_grad()
    assert losses[-1] < losses[0] - 0.5

    # its mfu of 40 x 12 sequences in half a second, on an A100
    n = sum(q.numel() for q in p.values())
    assert raw.get_num_params(non_embedding=False) == n and net.get_num_params() == n - 12 * 16
    flops_per_sequence = (6 * (n - 12 * 16) + 12 * 2 * 2 * (16 // 2) * 12) * 12
    mfu = net.estimate_mfu(12 * 40, 0.5)
    assert 0 < mfu < 1 and mfu == pytest.approx(flops_per_sequence * 12 * 40 / 0.5 / 312e12, rel=1e-12)

    # its checkpoint, which a compiled model writes under prefixed names; its evaluation
    state_dict = {name.removeprefix('_orig_mod.'): q for name, q in net.state_dict().items()}
    assert compiled == any(name.startswith('_orig_mod.') for name in net.state_dict())
    again = GPT(GPTConfig(**model_args))
    again.load_state_dict(state_dict)
    again.eval()
    with torch.no_grad():
        logits, loss = again(X, Y)
        net.eval()
        assert torch.equal(logits, net(X, Y)[0])
        assert loss == F.cross_entropy(logits.flatten(0, 1), Y.flatten())

    # its sample.py, after a crop
    net.crop_block_size(8)
    assert net.config.block_size == 8 and net.transformer.wpe.weight.shape == (8, 16)
    start = torch.tensor([[3, 4, 5]])
    ctx = torch.amp.autocast(device_type='cpu', dtype=torch.bfloat16) if compiled else nullcontext()
    with torch.no_grad(), ctx:
        for how in (dict(temperature=0.8, top_k=5), dict(temperature=1.0), dict(top_k=200)):
            torch.manual_seed(1)
            text = net.generate(start, 20, **how)
            torch.manual_seed(1)
            assert text.shape == (1, 23) and text.dtype == torch.int64 and text[0, :3].tolist() == [3, 4, 5]
            assert torch.equal(text, net.generate(start, 20, **how)) and 0 <= text.min() <= text.max() < 29
        greedy = net.generate(start, 20, temperature=0.8, top_k=1)
        assert torch.equal(net.generate(start, 20, temperature=0), greedy)
        assert net.generate(start, 0) is start


def test_sizes_of_nanogpt(monkeypatch):
    """GPTConfig's defaults; nanoGPT's counts of parameters and FLOPs for 124M at T = 1024; a peak only for
    chips whose data sheet is known.
    """
    with torch.device('meta'):
        net = GPT(GPTConfig(bias=False))
    assert vars(GPTConfig()) == dict(
        block_size=1024,
        vocab_size=50304,
        n_layer=12,
        n_head=12,
        n_embd=768,
        dropout=0.0,
        bias=True,
        activation='gelu',
    )
    assert net.config.model_args() == dict(
        block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False
    )
    assert GPTConfig(activation='gelu_tanh').model_args()['activation'] == 'gelu_tanh'
    assert round(net.get_num_params() / 1e6, 2) == 123.59 and round(net.estimate_mfu(1, 1024, 1) / 1e6) == 855
    assert net.estimate_mfu(1, 1.024, None) is None
    assert net.estimate_mfu(1, 1.024, 1e12) == pytest.approx(0.855, rel=1e-3)
    assert net.estimate_mfu(480, 3.0) == pytest.approx(0.449, abs=1e-3)  # nanoGPT's on one A100
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    for name, peak in (
        ('NVIDIA A100-SXM4-80GB', 312e12),
        ('NVIDIA H100 80GB HBM3', 989.4e12),
        ('NVIDIA L4', 121e12),
        ('NVIDIA H100 PCIe', 756e12),
        ('NVIDIA H200', 989.4e12),
        ('NVIDIA L40S', 362e12),
        ('NVIDIA L40', None),
        ('Tesla T4', 65e12),
        ('NVIDIA T400', None),
        ('Tesla V100-SXM2-32GB', 125e12),
        ('NVIDIA GeForce RTX 3090', 71e12),
        ('NVIDIA GeForce RTX 3090 Ti', None),
        ('NVIDIA GeForce RTX 4090 Laptop GPU', None),
        ('NVIDIA A100-SXM4-80GB MIG 1g.10gb', None),
        ('NVIDIA B200', 2250e12),
        ('NVIDIA GB200', None),
    ):
        assert ours.peak_flops_of('cuda', 'bfloat16') == peak, name
        assert ours.peak_flops_of('cuda', 'float32') is ours.peak_flops_of('cpu', 'bfloat16') is None


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """model.py imported from a folder with nothing else of the project, and no tokenizers installed."""
    shutil.copy(ROOT / 'model.py', tmp_path / 'alone.py')
    monkeypatch.setattr(sys, 'path', [path for path in sys.path if path not in (str(ROOT), '')])
    for name in [name for name in sys.modules if name.split('.')[0] == 'data']:
        monkeypatch.delitem(sys.modules, name)
    for name in ('data', 'tiktoken', 'datasets', 'model', 'configurator'):
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an ImportError
    spec = importlib.util.spec_from_file_location('alone', tmp_path / 'alone.py')
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, 'alone', module)
    spec.loader.exec_module(module)
    return module


def test_model_py_alone(alone, tmp_path, monkeypatch):
    """The one file without the project trains, generates and reads checkpoints. Once from_checkpoint
    imported the tokenizers' module, which who copies only model.py, as nanoGPT's users do, does not have.
    """
    for name in ('transformers', 'tokenizers'):
        monkeypatch.setitem(sys.modules, name, None)
    net = alone.GPT(alone.GPTConfig(**ARGS))
    optim = net.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    before = net(tokens(4, 12), tokens(4, 12))[1]
    before.backward()
    optim.step()
    assert net(tokens(4, 12), tokens(4, 12), return_logits=False)[1] < before
    state = {'model': net.state_dict(), 'model_args': ARGS, 'config': {'dataset': 'elsewhere'}}
    for tokenizer in ({}, {'tokenizer': {'kind': 'char', 'stoi': {}, 'itos': {}}}):
        torch.save({**state, **tokenizer}, tmp_path / 'ckpt.pt')
        read = alone.GPT.from_checkpoint(tmp_path)
        texts = [model.generate(tokens(2, 5), 9, temperature=0) for model in (net, read)]
        assert type(read) is alone.GPT and torch.equal(*texts)
    with pytest.raises(ImportError, match='data'):  # or it was not alone
        read.tokenizer()


@pytest.mark.slow
def test_pretrained_alone(erf_gpt2, alone):
    """It reads GPT-2's weights too, with transformers and none of our tokenizers."""
    theirs, folder = erf_gpt2
    net, x = alone.GPT.from_pretrained(str(folder)), tokens(2, 8, high=11)
    assert (all_logits(net, x) - theirs(x).logits).abs().max() < 1e-5


# -----------------------------------------------------------------------------
# The chunked loss


class CountProducts(TorchDispatchMode):
    """Counts the products of matrices that are computed within its block."""

    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def test_evaluation_computes_no_gradients():
    """The loss without logits takes one product a chunk under no_grad, not three: forward of an
    autograd.Function cannot see that.
    """
    net = GPT(GPTConfig(block_size=8, vocab_size=29, n_layer=1, n_head=2, n_embd=16))
    x, y = tokens(2, 8), tokens(2, 8)
    counts = []
    for with_grad in (True, False):
        with CountProducts() as counted, torch.set_grad_enabled(with_grad):
            net(x, y, return_logits=False)
        counts.append(counted.products)
    assert counts[0] - counts[1] == 2


@pytest.mark.parametrize('chunk', [1, 29 * 3, 29 * 7, 10**6])
@pytest.mark.parametrize('ignored', ['none', 'some', 'all'])
def test_chunked_loss(monkeypatch, chunk, ignored):
    """Value and gradients of plain cross-entropy in float64, for one chunk, ragged ones and single rows."""
    monkeypatch.setattr(ours, 'LOSS_CHUNK', chunk)
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 8, generator=g, dtype=torch.float64).requires_grad_() for n in (19, 29))
    y = tokens(19)
    y[{'none': slice(0), 'some': slice(0, 19, 3), 'all': slice(None)}[ignored]] = -1
    loss = ChunkedCrossEntropy.apply(x, w, y, True)
    got = torch.autograd.grad(3 * loss, (x, w))
    if ignored == 'all':
        assert loss == 0 and not any(q.any() for q in got)
        return
    want = F.cross_entropy(x @ w.T, y, ignore_index=-1)
    assert abs(loss - want) < 1e-12
    for a, b in zip(got, torch.autograd.grad(3 * want, (x, w)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert ChunkedCrossEntropy.apply(x, w, y, False) == loss.detach()


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_chunked_loss_used_twice(dtype):
    """The gradients of two backward passes are equal, and a loss may stand twice in one formula. Once the
    first pass scaled the saved gradients in place, and the second one failed for it, as no plain loss does.
    """
    net, x, y = tiny()[0].to(dtype), tokens(4, 12), tokens(4, 12, seed=1)

    def grads(of, **how):
        return [q.clone() for q in torch.autograd.grad(of, [*net.parameters()], **how)]

    loss = net(x, y, return_logits=False)[1]
    first = grads(loss, retain_graph=True)
    again = grads(loss, retain_graph=True)
    tripled = grads(3 * loss, retain_graph=True)
    in_formula = grads(loss + loss**2)
    plain = net(x, y)[1]
    tolerance = dict(rtol=1e-9, atol=1e-12) if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-6)
    for a, b, c in zip(first, again, tripled, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, 3 * a, **tolerance)
    for a, b in zip(first, grads(plain, retain_graph=True), strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    for a, b in zip(in_formula, grads(plain + plain**2), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_chunked_loss_differentiates_once():
    """A gradient of its gradient is an error: the saved gradients are constants, and it came out wrong."""
    x = torch.randn(5, 8, requires_grad=True)
    loss = ChunkedCrossEntropy.apply(x, torch.randn(7, 8), tokens(5, high=7), True)
    (grad,) = torch.autograd.grad(loss**2, x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_chunked_loss_in_half_precision(dtype, tolerance):
    """The loss stays float32; float16's gradients survive 20,000 classes and a loss scale of 65,536."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=g).requires_grad_()
    w = (0.1 * torch.randn(20000, 32, generator=g)).requires_grad_()
    y = tokens(64, high=20000)
    with torch.autocast('cpu', dtype):
        loss = ChunkedCrossEntropy.apply(x, w, y, True)
    want = F.cross_entropy(x @ w.T, y)
    assert loss.dtype == torch.float32 and abs(loss - want) < tolerance
    for a, b in zip(*(torch.autograd.grad(65536 * of, (x, w)) for of in (loss, want)), strict=True):
        assert (a - b).norm() < tolerance * b.norm()


def test_float16_sums_do_not_overflow():
    """The gradient of a weight sums over all rows, and before any GradScaler sees it: here it is 0.875 of
    80,000 in the product, beyond float16, and small again after the division by the number of rows.
    """
    x, w = torch.full((8000, 4), 10.0), torch.zeros(8, 4, requires_grad=True)
    y = torch.zeros(8000, dtype=torch.long)
    with torch.autocast('cpu', torch.float16):
        loss = ChunkedCrossEntropy.apply(x, w, y, True)
    (grad,) = torch.autograd.grad(loss, w)
    (want,) = torch.autograd.grad(F.cross_entropy(x @ w.T, y), w)
    torch.testing.assert_close(grad, want, rtol=1e-2, atol=1e-3)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        made = [
            t.numel()
            for t in (out if isinstance(out, (tuple, list)) else (out,))
            if isinstance(t, torch.Tensor)
        ]
        self.numel = max([self.numel, *made])
        return out


@pytest.mark.parametrize('training', [True, False])
def test_logits_are_never_complete(monkeypatch, training):
    """return_logits=False makes no tensor larger than a chunk, in both passes: that is what it is for."""
    monkeypatch.setattr(ours, 'LOSS_CHUNK', 5000)
    net = GPT(GPTConfig(**{**ARGS, 'vocab_size': 500}))
    x = tokens(4, 12, high=500)
    sizes = []
    for return_logits in (True, False):
        with Largest() as largest, torch.set_grad_enabled(training):
            loss = net(x, x, return_logits=return_logits)[1]
            if training:
                loss.backward()
        sizes.append(largest.numel)
    assert sizes == [4 * 12 * 500, 500 * 16]  # the weight itself


# -----------------------------------------------------------------------------
# torch.compile


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['train', 'eval'])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_compiled_without_a_break(monkeypatch, mode, checkpointing):
    """Dynamo traces the whole of forward and the chunked loss, with the bits of eager. Once it could not
    read an attribute of the autograd.Function inside its forward, and the loss silently ran eager on every
    GPU.
    """
    monkeypatch.setattr(ours, 'LOSS_CHUNK', 29 * 20)  # three chunks, the last one ragged
    half = not checkpointing  # dropout and bfloat16 together round in another way
    net = tiny(n_layer=1, dropout=0.0 if half else 0.2)[0].train(mode == 'train')
    net.activation_checkpointing = checkpointing
    torch._dynamo.reset()
    compiled = torch.compile(net, backend='aot_eager', fullgraph=True)
    seen, x, y = [], tokens(4, 12), tokens(4, 12, seed=1)
    for call in (net, compiled):
        net.zero_grad()
        torch.manual_seed(1)  # of dropout
        with torch.set_grad_enabled(mode == 'train'), torch.autocast('cpu', torch.bfloat16, enabled=half):
            loss = call(x, y, return_logits=False)[1]
        if mode == 'train':
            loss.backward()
        seen.append([loss.detach(), *(q.grad for q in net.parameters() if q.grad is not None)])
    assert len(seen[0]) == (1 + len([*net.parameters()]) if mode == 'train' else 1)
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def static(monkeypatch):
    """Within `with static():` eager code on a CPU decodes as compiled code and a GPU do, through a mask."""

    @contextmanager
    def static():
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, 'is_compiling', lambda: True)
            yield

    return static


@pytest.mark.slow
@pytest.mark.parametrize('dtype, length', [(None, 12), (torch.float32, 64), (torch.bfloat16, 64)])
@torch.inference_mode()
def test_compiled_decode(static, dtype, length):
    """Compiled, one graph serves for every position: each new one would cost seconds. So it does after
    for_sampling, whose logits are in float32, and with a cache that is longer than the context.
    """
    net, _, _ = tiny(n_layer=1)
    if dtype:
        net.for_sampling('cpu', dtype, pack=False)
    torch._dynamo.reset()
    x, positions = tokens(2, 12), torch.arange(length)
    decode = torch.compile(net.decode, backend='aot_eager', fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        cache = net.new_cache(2, length)
        net.prefill(x[:, :4], cache)
        want = [kv.clone() for kv in cache]
        for t in range(4, 12):
            call = x[:, t : t + 1], positions[t : t + 1]
            logits = decode(*call, cache)
            with static():
                assert torch.equal(logits, net.decode(*call, want)) and logits.dtype == torch.float32
        assert all(map(torch.equal, cache, want))


def test_compile_method(monkeypatch):
    """A compiler that fails leaves the method eager and says so in one line."""
    net, _, _ = tiny(n_layer=1)
    want = net(tokens(2, 5))[0]

    def compile_nothing(function, **options):
        def failing(*args):
            raise RuntimeError('no\ncompiler')

        return failing

    monkeypatch.setattr(torch, 'compile', compile_nothing)
    problem = ours.compile_method(net, 'forward', lambda: net(tokens(2, 5)))
    assert problem == 'torch.compile does not work here, running eager (RuntimeError: no compiler)'
    assert torch.equal(net(tokens(2, 5))[0], want)
    monkeypatch.setattr(torch, 'compile', lambda function, mode: lambda *args: (function(*args)[0] + 1, None))
    assert ours.compile_method(net, 'forward', lambda: net(tokens(2, 5)), mode='default') is None
    assert torch.equal(net(tokens(2, 5))[0], want + 1)

    def too_large():
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):  # which eager would meet as well
        ours.compile_method(net, 'forward', too_large, mode='default')


# -----------------------------------------------------------------------------
# CUDA without a GPU: fake tensors have a shape, a dtype and a device, and refuse to mix devices


@pytest.fixture
def fake_cuda(monkeypatch):
    """Within it torch.empty(…, device='cuda') works anywhere, and PyTorch believes in a GPU with bfloat16."""
    guards = None
    if not torch.backends.cuda.is_built():  # then CUDA has no device guard: the meta device's does as well
        try:
            guards = (ctypes.c_void_p * 15).in_dll(
                ctypes.CDLL('libc10.so'), '_ZN3c104impl26device_guard_impl_registryE'
            )
        except (OSError, ValueError):
            pytest.skip("this build of PyTorch hides its device guards")
        guards[1] = guards[14]
    monkeypatch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: True)
    monkeypatch.setattr(GPT, 'to', lambda net, device: net)  # fake parameters cannot move, and need not
    with FakeTensorMode(allow_non_fake_inputs=False):
        yield
    if guards:
        guards[1] = None


def fake_gpt(**changes):
    with torch.device('cuda'):
        return GPT(GPTConfig(**{**ARGS, **changes}))


def facts(*tensors):
    return [(t.device.type, t.dtype, *t.shape) for t in tensors]


@pytest.mark.slow
@pytest.mark.parametrize('checkpointing', [False, True])
def test_training_on_fake_cuda(fake_cuda, monkeypatch, checkpointing):
    """Forward under autocast and both losses, the chunked one with its backward, and a step of each
    optimizer. Autograd's engine itself needs a GPU: everything in backward but our own is PyTorch's.
    """
    monkeypatch.setattr(ours, 'LOSS_CHUNK', 29 * 5)  # four times as much on a GPU: two chunks
    net = fake_gpt(dropout=0.1)
    net.activation_checkpointing = checkpointing
    x = torch.zeros(3, 12, dtype=torch.long, device='cuda')
    with torch.autocast('cuda', torch.bfloat16):
        logits, loss = net(x, x)
        assert facts(logits, loss) == [('cuda', torch.bfloat16, 3, 12, 29), ('cuda', torch.float32)]
        assert facts(net(x)[0]) == [('cuda', torch.bfloat16, 3, 1, 29)]
        with torch.no_grad():
            assert facts(net(x, x, return_logits=False)[1]) == [('cuda', torch.float32)]
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, 'is_compiling', lambda compiling=compiling: compiling)
        with torch.autocast('cuda', torch.bfloat16):
            loss = net(x, x, return_logits=False)[1]
        assert facts(loss) == [('cuda', torch.float32)]
        grads = loss.grad_fn.apply(torch.ones((), device='cuda'))
        assert facts(*grads[:2]) == [('cuda', torch.float32, 36, 16), ('cuda', torch.float32, 29, 16)]
    for optimizer in ('adamw', 'muon'):
        optim = net.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cuda', optimizer)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        assert facts(torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)) == [('cuda', torch.float32)]
        optim.step()
        for p in net.parameters():
            moments = [m for name, m in optim.state[p].items() if name != 'step']
            assert moments and set(facts(*moments)) == set(facts(p)) == {('cuda', torch.float32, *p.shape)}


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_sampling_on_fake_cuda(fake_cuda, dtype):
    """As sample.py does it: the cache in the dtype of the weights, logits in float32, past the window too. So
    does a script of nanoGPT, whose plain model stands in an autocast.
    """
    x, positions = torch.zeros(1, 5, dtype=torch.long, device='cuda'), torch.arange(64, device='cuda')
    for plain in (False, True):
        net = fake_gpt(n_layer=1)
        if not plain:
            net.for_sampling('cuda:0', dtype)
            assert (type(net.transformer.h[0].mlp.c_fc) is HalfLinear) == (dtype != torch.float32)
            assert type(net.lm_head) is torch.nn.Linear
        autocast = torch.autocast('cuda', dtype, enabled=plain and dtype != torch.float32)
        with autocast, torch.inference_mode():
            logits_dtype = dtype if plain else torch.float32
            cache = net.new_cache(3, 64)
            assert facts(*cache) == [('cuda', dtype, 2, 3, 2, 64, 8)]
            assert facts(net.prefill(x, cache)) == [('cuda', logits_dtype, 1, 29)]
            logits = net.decode(x[:, :1].expand(3, 1), positions[5:6], cache)
            assert facts(logits) == [('cuda', logits_dtype, 3, 29)]
            for top_k, top_p in ((None, None), (9, None), (9, 0.5)):
                draws = torch.rand(3, 10, device='cuda')
                new = [*net.stream(x, 10, 0.8, top_k, top_p, draws, 20, net.new_cache(3, 64))]
                assert facts(*new) == [('cuda', torch.int64, 3, 1)] * 10
            assert facts(*net.stream(x, 3)) == [('cuda', torch.int64, 1, 1)] * 3


# -----------------------------------------------------------------------------
# The KV cache and sampling

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='needs oneDNN')
# float16 is packed as float32 where FBGEMM is missing; bfloat16 is not packed, and slow without units for it
DTYPES = [torch.float32, torch.float16, *[torch.bfloat16] * ours.has_bfloat16('cpu')]
of_each_dtype = pytest.mark.parametrize('dtype', DTYPES)


@pytest.mark.parametrize(
    'shape, dtype, tolerance',
    [
        ({}, torch.float64, 1e-12),
        ({}, torch.float32, 1e-5),
        (dict(n_layer=1), torch.bfloat16, 0.1),
        (dict(n_layer=1, n_head=1, n_embd=8, bias=False), torch.float64, 1e-12),
        (dict(n_head=4, n_embd=32, activation='gelu_tanh'), torch.float64, 1e-12),
    ],
)
@torch.no_grad()
def test_cache_is_exact(static, shape, dtype, tolerance):
    """Whatever the prompt's length, 1 … block_size, cached logits are the uncached ones; so they are through
    the mask of static shapes, and for several tokens at a time behind a cache.
    """
    net, p, args = tiny(**shape)
    net.to(dtype)
    x = tokens(2, 12)
    whole = all_logits(net, x)
    positions = torch.arange(12)
    for prompt in range(1, 13):
        sliced, whole_cache = net.new_cache(2, 12), net.new_cache(2, 12)
        for cache in (sliced, whole_cache):
            assert (net.prefill(x[:, :prompt], cache) - whole[:, prompt - 1]).abs().max() < tolerance
        for t in range(prompt, 12):
            step = x[:, t : t + 1], positions[t : t + 1]
            logits = [net.decode(*step, sliced)]
            with static():
                logits.append(net.decode(*step, whole_cache))
            assert max((found - whole[:, t]).abs().max() for found in logits) < tolerance
    for first, last in ((1, 5), (5, 7), (5, 12), (11, 12)):
        sliced, whole_cache = net.new_cache(2, 12), net.new_cache(2, 12)
        for cache in (sliced, whole_cache):
            net.prefill(x[:, :first], cache)
        several = x[:, first:last], positions[first:last]
        logits = [net.decode(*several, sliced)]
        with static():
            logits.append(net.decode(*several, whole_cache))
        assert max((found - whole[:, last - 1]).abs().max() for found in logits) < tolerance
        for a, b in zip(sliced, whole_cache, strict=True):
            assert (a - b).abs().max() < tolerance
    assert not any('cache' in name or 'kv' in name for name in net.state_dict())


@of_each_dtype
@pytest.mark.parametrize('pack', [True, False])
@torch.no_grad()
def test_for_sampling(dtype, pack):
    """Visible modules do the products: float32 within rounding, float16 as near as its weights are, logits in
    float32. A copy of the model gives the same bits, packing twice changes nothing, and saving is refused.
    """
    x = tokens(2, 12)
    want = all_logits(tiny()[0], x)
    net = tiny()[0].for_sampling('cpu', dtype, pack)
    kinds = {type(module) for module in net.modules()} & {torch.nn.Linear, HalfLinear, PackedLinear}
    if pack and torch.backends.mkldnn.is_available():
        assert kinds == {PackedLinear, *[HalfLinear] * (dtype == torch.bfloat16)}
        assert f'(lm_head): PackedLinear((29, 16), half={net.lm_head.half})' in str(net)
        assert net.lm_head.half == (dtype != torch.float32 and ours.has_fbgemm())
    else:
        assert kinds == {torch.nn.Linear, *[HalfLinear] * (dtype != torch.float32)}
    found = net.prefill(x, net.new_cache(2, 12))
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert found.dtype == torch.float32
    assert (found - want[:, -1]).abs().max() < tolerance * want.abs().max()
    again = copy.deepcopy(net)
    assert torch.equal(again.prefill(x, again.new_cache(2, 12)), found)
    net.for_sampling('cpu', dtype, pack)
    assert torch.equal(net.prefill(x, net.new_cache(2, 12)), found)
    if PackedLinear in kinds or HalfLinear in kinds:
        with pytest.raises(UserError, match='too late to save'):
            net.save_pretrained('nowhere')


@needs_onednn
@pytest.mark.parametrize('factor, fits', [(1.0, True), (1e-3, True), (1e-6, False), (1e6, False)])
def test_weights_beyond_float16(monkeypatch, factor, fits):
    """Weights that float16 cannot hold stay in float32, and so do all where there is no FBGEMM."""
    linear, x = torch.nn.Linear(64, 32), torch.randn(5, 64)
    with torch.no_grad():
        linear.weight *= factor
        linear.bias *= factor
    for fbgemm in {ours.has_fbgemm(), False}:
        monkeypatch.setattr(ours, 'has_fbgemm', lambda has=fbgemm: has)
        packed = PackedLinear(linear, torch.float16)
        assert packed.half == (fits and fbgemm)
        assert (packed(x) - linear(x)).norm() < (1e-3 if packed.half else 1e-6) * linear(x).norm()
    monkeypatch.undo()
    linear.weight.data[3, 4] = math.inf
    assert not PackedLinear(linear, torch.float16).half


@needs_onednn
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('width', [64, 3072])
def test_packed_linear(width, dtype):
    """The bits of a row for any number of rows: oneDNN adds up 3072 products of one row in another order, and
    with AVX2 FBGEMM those of a row that is left over.
    """
    torch.manual_seed(0)
    x = torch.randn(33, 1, width)
    for bias in (False, True):
        linear = torch.nn.Linear(width, 96, bias)
        torch.nn.init.normal_(linear.weight)
        packed = PackedLinear(linear, dtype)
        y, want = packed(x), linear(x)
        assert y.shape == want.shape and y.dtype == torch.float32
        assert (y - want).norm() < (1e-3 if packed.half else 2e-6) * want.norm()
        for n in range(1, 33):
            assert torch.equal(packed(x[:n]), y[:n])


@needs_onednn
@of_each_dtype
def test_a_row_is_its_own(static, dtype):
    """The bits of a row do not depend on the others or on their number; one prompt serves for all."""
    torch.manual_seed(0)
    net = GPT(GPTConfig(block_size=20, vocab_size=96, n_layer=2, n_head=2, n_embd=64))
    net.for_sampling('cpu', dtype)
    draws, x = torch.rand(33, 24, generator=torch.Generator().manual_seed(0)), tokens(1, 5)

    def rows(n, first=0, x=x):
        return torch.cat([*net.stream(x, 24, top_k=50, draws=draws[first : first + n])], dim=1)

    all_rows = rows(33)
    assert len(set(map(tuple, all_rows.tolist()))) == 33
    for n in (1, 2, 3, 10, 16):
        assert torch.equal(rows(n), all_rows[:n]) and torch.equal(rows(n, 33 - n), all_rows[33 - n :])
    with static():
        assert torch.equal(rows(7, x=x.expand(7, -1)), all_rows[:7])


def average(net):
    """Weights averaged with others through .data, as of Polyak: nothing in PyTorch counts such a change."""
    for p, q in zip(net.parameters(), tiny(5)[0].parameters(), strict=True):
        p.data = 0.1 * p.data + 0.9 * q.data
    return net


def step(net):
    """A step of fused AdamW, which leaves the version counters of its tensors alone."""
    optim = net.configure_optimizers(0.1, 0.1, (0.9, 0.95), 'cpu')
    net(tokens(2, 5), tokens(2, 5))[1].backward()
    optim.step()
    return net


def another_head(net):
    """A head that is no nn.Linear and not tied."""
    torch.manual_seed(0)
    net.lm_head = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Linear(8, 29))
    return net


def quantized(net):
    from torch.ao.quantization import quantize_dynamic

    return quantize_dynamic(net, {torch.nn.Linear})


@pytest.mark.filterwarnings('ignore:torch.ao.quantization is deprecated')
@pytest.mark.parametrize('change', [average, step, another_head, quantized])
def test_generate_is_plain(change):
    """What was done to a model counts at once, before the first text and after it. Once generate ran on a
    packed copy: these ended in an error, or gave the old text without a word.
    """
    x = tokens(2, 5)
    for used_before in (False, True):
        net = tiny()[0]
        old = net.generate(x, 7, temperature=0)
        if not used_before:
            net = tiny()[0]
        net = change(net)
        want = x
        with torch.no_grad():
            for _ in range(7):
                logits = net.lm_head(net.hidden(want))[:, -1]
                want = torch.cat((want, logits.argmax(-1, keepdim=True)), dim=1)
        got = net.generate(x, 7, temperature=0)
        assert torch.equal(got, want)
        assert change is quantized or not torch.equal(got, old)


def test_generate_leaves_the_model_alone():
    """It may be called in the middle of training: the next step, and what is saved, is as without it."""
    net, twin = tiny()[0].train(), tiny()[0].train()
    net.generate(tokens(2, 5), 7)
    assert str(net) == str(twin) and net.training
    for model in (net, twin):
        model(tokens(2, 5), tokens(2, 5))[1].backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p.grad, q.grad)


@pytest.mark.parametrize('prompt', [1, 4, 12, 20])
def test_greedy_is_the_plain_loop(static, prompt):
    """Token for token what running the whole window for each token gives, up to block_size; beyond it, the
    window goes on from its later half.
    """
    net, p, args = tiny()
    x = tokens(3, prompt)
    got = net.generate(x, 20, temperature=0)
    with static():
        assert torch.equal(got, net.generate(x, 20, temperature=0))
    for length in (12, 64):  # as long as the context, or longer, as CUDA's attention likes it
        for how in (nullcontext, static):
            with how():
                assert torch.equal(got, net.generate(x, 20, temperature=0, cache=net.new_cache(3, length)))
    packed = tiny()[0].for_sampling('cpu', torch.float32)
    assert torch.equal(got, packed.generate(x, 20, temperature=0))
    window, out = x[:, -12:], x
    for _ in range(20):
        if window.size(1) > 12:
            window = out[:, -6:]
        out = torch.cat((out, gpt_logits(p, args, window)[:, -1].argmax(-1, keepdim=True)), dim=1)
        window = torch.cat((window, out[:, -1:]), dim=1)
    assert torch.equal(got, out)


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[2.0, -1.0, 0.5, 1.0, -30.0]])
    u = (torch.arange(20000) + 0.5)[:, None] / 20000

    def shares(**how):
        ids = sample_next_token(logits.expand(20000, -1), u, **how)
        return torch.bincount(ids[:, 0], minlength=5) / 20000

    def close(found, want):
        torch.testing.assert_close(found, want, atol=2e-4, rtol=0)

    for t in (1.0, 0.5, 2.0):
        close(shares(temperature=t), (logits[0] / t).softmax(-1))
    top2 = logits[0].softmax(-1) * torch.tensor([1, 0, 0, 1, 0])
    close(shares(top_k=2), top2 / top2.sum())
    # probabilities 0.60, 0.22, 0.13, 0.03: 0.7 is reached by two tokens, 0.5 by one, and never by none
    close(shares(top_p=0.7), top2 / top2.sum())
    for how in (
        dict(top_p=0.5),
        dict(top_p=1e-6),
        dict(top_k=1),
        dict(temperature=1e-30),
        dict(temperature=1e-300),
        dict(temperature=0),
    ):
        assert shares(**how)[0] == 1, how
    close(shares(top_k=0), shares(top_k=99))
    assert torch.equal(shares(top_p=1.0), shares())


@of_each_dtype
@torch.no_grad()
def test_samples_against_float64(dtype):
    """100,000 draws of a model as sample.py has it, by a chi-square test against the probabilities that the
    plain model has in float64: 29.6 is exceeded by one fair sample in a thousand where 11 tokens can come.
    """
    torch.manual_seed(0)
    net = GPT(GPTConfig(block_size=16, vocab_size=29, n_layer=2, n_head=2, n_embd=16))
    net.lm_head.weight *= 20  # which is wte as well
    x, top_k, rows = tokens(1, 9), 11, 100_000
    logits, ids = (copy.deepcopy(net).double()(x)[0][0, -1] / 0.8).topk(top_k)
    expected = logits.softmax(-1) * rows
    net.for_sampling('cpu', dtype)
    draws = torch.rand(rows, 1, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(next(net.stream(x, 1, 0.8, top_k, draws=draws))[:, 0], minlength=29)
    assert counts[ids].sum() == rows and expected.min() > 100
    assert ((counts[ids] - expected) ** 2 / expected).sum() < 29.6


def test_padded_ids_are_never_sampled():
    """nanoGPT can sample one of the 47 ids that only pad GPT-2's vocabulary, and decoding it fails."""
    net, _, _ = tiny()
    for temperature in (0, 1.0, 100.0):
        assert net.generate(tokens(8, 3, high=5), 9, temperature=temperature, vocab_size=5).max() < 5
    assert net.generate(tokens(8, 3, high=5), 9, temperature=100.0).max() >= 5


# -----------------------------------------------------------------------------
# Optimizers


def test_optimizer_groups():
    net, p, _ = tiny()
    decay, rest = net.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu').param_groups
    names = {id(q): name for name, q in net.named_parameters()}
    assert [names[id(q)] for q in decay['params']] == [name for name in p if p[name].dim() == 2]
    assert [names[id(q)] for q in rest['params']] == [name for name in p if p[name].dim() == 1]
    assert (decay['weight_decay'], rest['weight_decay']) == (0.1, 0.0) and decay['fused'] and rest['fused']


def with_muon():
    """A small network with gradients from one batch, its Muon, and the names of its parameters."""
    net, _, args = tiny()
    net(tokens(4, 8), tokens(4, 8))[1].backward()
    muon = net.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu', 'muon')
    return net, muon, {q: name for name, q in net.named_parameters()}


def test_muon_groups():
    """Every parameter in one group: c_attn as three matrices, the other matrices of the blocks as one, the
    rest with AdamW.
    """
    net, muon, names = with_muon()
    groups = [[names[q] for q in group['params']] for group in muon.param_groups]
    assert sorted(sum(groups, [])) == sorted(names.values())
    kinds = [
        lambda n: n.endswith('c_attn.weight'),
        lambda n: n.endswith(('c_proj.weight', 'c_fc.weight')),
        lambda n: n.endswith(('wte.weight', 'wpe.weight')),
        lambda n: n.endswith('bias') or '.ln_' in n,
    ]
    assert all(group and all(map(kind, group)) for group, kind in zip(groups, kinds, strict=True))
    settings = [(group.get('parts', 0), group['weight_decay']) for group in muon.param_groups]
    assert settings == [(3, 0.1), (1, 0.1), (0, 0.1), (0, 0.0)]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_muon_is_orthogonal(dtype):
    """Singular values near 1 and the singular vectors of a float64 decomposition, however badly the matrix
    is conditioned or scaled.
    """
    g = torch.Generator().manual_seed(0)

    def orthogonal(x):
        return ours.Muon.orthogonal(x.to(dtype)).double()

    def matrix(n, m, values):
        u, v = (torch.linalg.qr(torch.randn(k, n, generator=g, dtype=torch.float64))[0] for k in (n, m))
        return u @ torch.diag(values) @ v.T, u @ v.T

    for n, m, least in ((64, 64, 1e-2), (64, 256, 1e-2), (1, 7, 1.0)):
        for scale in (1e-12, 1.0, 1e12):
            values = torch.logspace(0, math.log10(least), n, dtype=torch.float64) * scale
            x, want = matrix(n, m, values)
            got = orthogonal(x[None])[0]
            values = torch.linalg.svdvals(got)
            assert 0.95 < values.min() and values.max() < 1.05
            assert (got * want).sum() / got.norm() / want.norm() > 0.99
    assert 0.95 < torch.linalg.svdvals(orthogonal(torch.randn(3, 96, 384, generator=g))).min()
    line = torch.outer(torch.randn(64, generator=g), torch.randn(256, generator=g))  # of rank 1
    assert 0.95 < torch.linalg.svdvals(orthogonal(line[None]))[0, 0] < 1.05
    assert not orthogonal(torch.zeros(1, 4, 4)).any()


def test_muon_steps(monkeypatch):
    """Three steps against Muon written out with float64 decompositions, one matrix at a time, and PyTorch's
    AdamW for the rest.
    """
    monkeypatch.setattr(ours, 'has_bfloat16', lambda kind: False)
    net, muon, names = with_muon()
    p = {name: q.detach().clone().requires_grad_() for q, name in names.items()}
    hidden = [names[q] for group in muon.param_groups[:2] for q in group['params']]
    theirs = adamw({name: q for name, q in p.items() if name not in hidden}, lr=1e-2)
    momentum = dict.fromkeys(hidden, 0)
    for step in range(3):
        muon.zero_grad()
        net(tokens(4, 8, seed=step), tokens(4, 8, seed=step + 9))[1].backward()
        for q, name in names.items():
            p[name].grad = q.grad.clone()
        muon.step()
        theirs.step()
        for name in hidden:
            grad = p[name].grad.double()
            momentum[name] = 0.9 * momentum[name] + 0.1 * grad
            factors = []
            for part in (0.9 * momentum[name] + 0.1 * grad).chunk(3 if 'c_attn' in name else 1):
                u, s, v = torch.linalg.svd(part, full_matrices=False)
                s = s / (s**4).sum() ** 0.25
                for a, b, c in muon.QUINTICS:  # not quite 1 afterwards, and 0 where s was
                    s = a * s + b * s**3 + c * s**5
                factors.append(0.2 * math.sqrt(max(grad.shape)) * u * s @ v)
            p[name].data = ((1 - 1e-2 * 0.1) * p[name] - 1e-2 * torch.cat(factors)).detach().float()
    for q, name in names.items():
        torch.testing.assert_close(q, p[name], rtol=0, atol=1e-5)


def test_muon_under_float16():
    """An infinite gradient: the GradScaler skips the whole step, Muon's half too. Fused AdamW asks it to
    leave that to the kernel, which knows nothing of Muon.
    """
    net, muon, _ = with_muon()
    before = {name: q.clone() for name, q in net.named_parameters()}
    scaler = torch.amp.GradScaler('cpu')
    for bad in (True, False):
        muon.zero_grad()
        scaler.scale(net(tokens(4, 8), tokens(4, 8))[1]).backward()
        if bad:
            net.lm_head.weight.grad[0, 0] = math.inf
        scaler.step(muon)
        scaler.update()
        assert all(torch.equal(q, before[name]) for name, q in net.named_parameters()) == bad
        assert scaler.get_scale() == 2**15


def test_activation_checkpointing():
    """Computed again, not otherwise: the same loss and the same gradients, dropout included."""
    net = GPT(GPTConfig(block_size=16, vocab_size=32, n_layer=3, n_head=2, n_embd=16, dropout=0.3))
    seen, calls = [], []
    net.transformer.h[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        net.activation_checkpointing = checkpointing
        torch.manual_seed(1)
        loss = net(tokens(4, 8), tokens(4, 8), return_logits=False)[1]
        net.zero_grad()
        loss.backward()
        seen.append([loss, *(p.grad for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True)) and len(calls) == 3  # once, and twice
    net.eval()
    cached = net.hidden(tokens(4, 8), net.new_cache(4, 8))
    assert (cached - net.hidden(tokens(4, 8))).abs().max() < 1e-6


def test_devices(monkeypatch):
    """A GPU always gets its number, which torch.cuda.set_device demands; precision follows the GPU."""
    assert ours.choose_device('cpu', 'bfloat16') == ('cpu', 'bfloat16')
    assert ours.choose_device('cpu', 'float32') == ('cpu', 'float32')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    for has_bf16, dtype in ((True, 'bfloat16'), (False, 'float16')):
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation, has=has_bf16: has)
        assert ours.choose_device(None, None) == ('cuda:0', dtype)
        assert ours.choose_device('cuda', None, 1) == ('cuda:1', dtype)
        assert ours.choose_device('cuda:1', 'float32') == ('cuda:1', 'float32')
        for avx512, onednn in ((True, True), (True, False), (False, True)):  # the CPU, what oneDNN may use
            monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda has=avx512: has)
            monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda has=onednn: has)
            best = 'bfloat16' if avx512 and onednn else 'float32'  # whatever the GPU can do
            assert ours.choose_device('cpu', None) == ('cpu', best)
            for fbgemm, sampling in ((True, 'float16'), (False, best)):
                monkeypatch.setattr(ours, 'has_fbgemm', lambda has=fbgemm: has)
                assert ours.choose_device('cpu', None, sampling=True) == ('cpu', sampling)
                assert ours.choose_device('cuda', None, sampling=True) == ('cuda:0', dtype)
    for device in ('cuda:2', 'mps', 'tpu', 'cuda:x'):
        with pytest.raises(ValueError, match=f"device '{device}'"):
            ours.choose_device(device, None)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert ours.choose_device(None, None) == ('mps', 'float32')


# -----------------------------------------------------------------------------
# Checkpoints and tokenizers


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


def test_poisoned_files_run_nothing(tmp_path):
    """A pickle can call any function when it is read: ours are read as plain values."""
    target = tmp_path / 'ran'
    torch.save({'model': {}, 'model_args': {}, 'config': Bomb(str(target))}, tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match='cannot read'):
        read_checkpoint(tmp_path / 'ckpt.pt')
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'stoi': Bomb(str(target))}))
    with pytest.raises(ValueError, match='cannot read'):
        read_tokenizer_spec(tmp_path)
    assert not target.exists()


def test_strides_of_a_file(tmp_path):
    """Weights become contiguous. Fused AdamW on a CPU writes numel elements behind the data pointer whatever
    the strides, so that an expanded tensor of a checkpoint made it write into memory of others.
    """
    net, p, args = tiny()
    weights = {**net.state_dict(), 'transformer.wpe.weight': torch.ones(1, 16).expand(12, 16)}
    torch.save({'model': weights, 'model_args': args}, tmp_path / 'ckpt.pt')
    for q in GPT.from_checkpoint(tmp_path).parameters():
        assert q.is_contiguous() and q.untyped_storage().nbytes() >= 4 * q.numel()


def test_checkpoints_of_nanogpt(tmp_path):
    """The prefix of torch.compile and the mask buffers of old checkpoints are accepted; the model is in eval
    mode, as transformers' are; dropout may be another one.
    """
    net, p, args = tiny()
    state = {f'_orig_mod.{name}': q for name, q in net.state_dict().items()}
    state['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 12, 12).tril()
    torch.save({'model': state, 'model_args': args}, tmp_path / 'some.pt')
    for dropout in (None, 0.5):
        read = GPT.from_checkpoint(tmp_path / 'some.pt', dropout)
        assert not read.training and read.config.dropout == (dropout or 0)
        assert torch.equal(read(tokens(2, 12))[0], net(tokens(2, 12))[0])
        assert read.lm_head.weight is read.transformer.wte.weight
    assert read.tokenizer_source == ROOT / 'data' / 'NAME'


def test_which_file_of_a_folder(tmp_path, monkeypatch, capsys):
    """ckpt.pt, which is the best model; last.pt only where no other is; or the file that is named. A line on
    stderr, of the first process of torchrun, says which. One line where there is none.
    """
    monkeypatch.delenv('RANK', raising=False)
    with pytest.raises(ValueError, match='no checkpoint at .*ckpt.pt: train first'):
        GPT.from_checkpoint(tmp_path / 'runs' / 'out')
    models = {}
    best, last = (tmp_path / name for name in ('ckpt.pt', 'last.pt'))
    for path, seed in ((last, 1), (best, 2)):
        models[path], p, args = tiny(seed)
        torch.save({'model': models[path].state_dict(), 'model_args': args, 'iter_num': seed}, path)
        for folder in (tmp_path, str(tmp_path)):
            read = GPT.from_checkpoint(folder)
            assert torch.equal(read(tokens(2, 3))[0], models[path](tokens(2, 3))[0])
            newer = f'; {last} is newer' if path == best else ''
            assert capsys.readouterr() == ('', f'{path}: weights of iteration {seed}{newer}\n')
    for path, says in ((last, '1'), (best, f'2; {last} is newer')):
        assert torch.equal(GPT.from_checkpoint(path)(tokens(2, 3))[0], models[path](tokens(2, 3))[0])
        assert capsys.readouterr().err == f'{path}: weights of iteration {says}\n'
    for rank, lines in (('1', 0), ('0', 1)):
        monkeypatch.setenv('RANK', rank)
        GPT.from_checkpoint(tmp_path)
        assert capsys.readouterr().err.count('\n') == lines
    GPT.from_checkpoint(read_checkpoint(best))  # whoever has read it knows which it was
    assert capsys.readouterr() == ('', '')


def test_folders_beside(tmp_path, monkeypatch):
    """The line where there is no checkpoint names up to three folders beside that have one, newest first, by
    their path from here: `python sample.py` beside an out-python-char did not name it. A folder counts once,
    and files of other names, further down, or that link to nothing do not count.
    """
    names = ('oldest/ckpt.pt', 'my out/last.pt', 'mine/ckpt.pt', 'mine/last.pt', 'qa/ckpt.pt')
    for age, name in enumerate([*names, 'text/input.txt', 'above/below/ckpt.pt', 'bert/model.pt']):
        path = tmp_path / 'runs' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'')
        os.utime(path.parent, (age, age))
    (tmp_path / 'runs' / 'gone').mkdir()
    (tmp_path / 'runs' / 'gone' / 'ckpt.pt').symlink_to('elsewhere')

    def words(folder):
        with pytest.raises(ValueError) as error:
            GPT.from_checkpoint(folder)
        return str(error.value)

    monkeypatch.chdir(tmp_path)
    there = "runs/qa, runs/mine, 'runs/my out' (newest first): add --out_dir=runs/qa"
    assert words('runs/out') == f'no checkpoint at runs/out/ckpt.pt, but in {there}'
    assert words(tmp_path / 'runs' / 'out').endswith(f' add --out_dir={tmp_path}/runs/qa')
    monkeypatch.chdir(tmp_path / 'runs')
    assert words('out').endswith(", but in qa, mine, 'my out' (newest first): add --out_dir=qa")
    shutil.rmtree('qa')
    shutil.rmtree('mine')
    assert words('./out').endswith(", but in 'my out', oldest (newest first): add --out_dir='my out'")
    assert words('nowhere/out').endswith('/ckpt.pt: train first, or name the folder with --out_dir')


def test_flipped_bits(tmp_path):
    """Not a bit of what is read can flip unnoticed: torch.load alone reads most such files in silence."""
    net, path = GPT(GPTConfig(8, 40, 1, 2, 16)), tmp_path / 'ckpt.pt'
    torch.save({'model': net.state_dict(), 'model_args': vars(net.config), 'iter_num': 7}, path)
    whole, rng, noticed = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(60):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        try:
            found = read_checkpoint(path)
        except ValueError:
            noticed += 1
        else:  # between the members, or a date or an attribute of one
            assert found['iter_num'] == 7 and found['model_args'] == vars(net.config)
            assert all(torch.equal(p, found['model'][name]) for name, p in net.state_dict().items())
    assert noticed >= 30
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match='cannot read .*damaged or not a checkpoint'):
            read_checkpoint(path)


def test_optimizers_as_of_pytorch():
    """Muon takes a closure and further groups as every optimizer does. There are two of them."""
    net, x = GPT(GPTConfig(8, 40, 1, 2, 16)), tokens(2, 8, high=40)
    with pytest.raises(ValueError, match="adamw or muon, not 'adam'"):
        net.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu', 'adam')
    optim = net.configure_optimizers(0.0, 1e-3, (0.9, 0.95), 'cpu', 'muon')
    more = torch.nn.Parameter(torch.ones(3))
    optim.add_param_group({'params': [more], 'weight_decay': 0.0})

    def closure():
        optim.zero_grad()
        loss = net(x, x)[1] + more.sum()
        loss.backward()
        return loss

    losses = [optim.step(closure).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[4] + 0.01 and more.max() < 1


def test_targets_that_are_none():
    """-1 is no target; another negative number is an error, as in F.cross_entropy, not class 0."""
    net, x = GPT(GPTConfig(8, 40, 1, 2, 16)), tokens(2, 8, high=40)
    for return_logits in (True, False):
        with pytest.raises((IndexError, RuntimeError), match='out of bounds'):
            net(x, torch.full_like(x, -100), return_logits=return_logits)


def test_empty_batch():
    net = GPT(GPTConfig(8, 40, 1, 2, 16)).eval()
    assert net.generate(torch.zeros(0, 3, dtype=torch.long), 7).shape == (0, 10)


def test_damaged_checkpoints(tmp_path):
    """Each gets one line that names the file or what is wrong in it."""
    net, p, args = tiny()
    good = {'model': net.state_dict(), 'model_args': args}
    torch.save(good, path := tmp_path / 'ckpt.pt')
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match='cannot read .*ckpt.pt, damaged') as error:
        GPT.from_checkpoint(path)
    assert '\n' not in str(error.value)
    for content, words in (
        (net.state_dict(), "ckpt.pt, damaged or .* it lacks 'model'"),
        ({**good, 'model_args': {**args, 'n_head': 3}}, 'n_embd 16 is not divisible'),
        ({**good, 'model_args': {**args, 'rope': True}}, 'rope'),
        ({**good, 'model_args': {**args, 'n_layer': 4}}, 'does not fit this model.py'),
        ({**good, 'model': {**good['model'], 'lm_head.weight': 7}}, 'has no attribute'),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=words) as error:
            GPT.from_checkpoint(path)
        assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match="it lacks 'optimizer'"):
        read_checkpoint(path, ('model', 'optimizer'))


def test_weights_of_another_shape(tmp_path):
    """The line names the parameters and both shapes, whole: once it was 200 characters cut in the middle."""
    net, p, args = tiny()
    name = 'transformer.wpe.weight'
    for weights, there, here in (
        ({**net.state_dict(), name: torch.zeros(9, 16)}, f'{name} (9, 16)', f'{name} (12, 16)'),
        ({**net.state_dict(), 'mine': torch.zeros(3)}, 'mine (3,)', ''),
        ({k: q for k, q in net.state_dict().items() if k != name}, '', f'{name} (12, 16)'),
        ({**net.state_dict(), name: torch.zeros(1).expand(40000, 40000)}, f'{name} (40000, 40000)', ''),
    ):
        torch.save({'model': weights, 'model_args': args}, tmp_path / 'ckpt.pt')
        with pytest.raises(UserError, match='does not fit this model.py') as error:
            GPT.from_checkpoint(tmp_path)
        assert there in str(error.value) and here in str(error.value) and '\n' not in str(error.value)
    torch.save({'model': net.state_dict(), 'model_args': {**args, 'n_embd': 32}}, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError) as error:
        GPT.from_checkpoint(tmp_path)
    assert len(str(error.value)) < 500 and 'lm_head.weight (29, 32)' in str(error.value)


def test_tokenizers(tmp_path, bpe):
    """Each kind reads back what it has written, and knows the ids that begin and end a text."""
    text = 'naïve — 日本\n'
    meta = {
        'vocab_size': 11,
        'stoi': {c: i for i, c in enumerate(sorted(set(text)))},
        'itos': dict(enumerate(sorted(set(text)))),
    }
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(meta))
    char = Tokenizer(read_tokenizer_spec(tmp_path))
    assert char.decode(char.encode(text)) == text and char.decode([char.bos]) == '\n'
    assert char.vocab_size == len(set(text)) and char.eot is None
    with pytest.raises(ValueError, match="does not know the character 'x'"):
        char.encode('ax')
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 11}))
    counted = Tokenizer(read_tokenizer_spec(tmp_path))
    assert counted.decode([3, 10]).split() == ['3', '10'] and counted.vocab_size == 11
    (tmp_path / 'meta.pkl').unlink()
    gpt2 = Tokenizer(read_tokenizer_spec(tmp_path))
    assert gpt2.encode(text) == bpe.encode(text) and gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.encode('<|endoftext|>') == [gpt2.eot] == [gpt2.bos] == [50256] and gpt2.vocab_size == 50257
    with pytest.raises(ValueError, match='cannot read tokenizer.json'):
        Tokenizer({'kind': 'bpe', 'json': '{}'})
    (tmp_path / 'tokenizer.json').write_bytes(train_bpe([text * 20], 300).files()['tokenizer.json'])
    own = Tokenizer(read_tokenizer_spec(tmp_path))
    assert own.decode(own.encode(text + '🦊𠀀')) == text + '🦊𠀀'
    assert own.encode('<|endoftext|>') == [own.eot] == [own.bos]


def test_same_texts():
    """Two tokenizers are alike if every id has the same text. A model trained on the ids of one must not go
    on with those of another, as nanoGPT would: they are only numbers to it.
    """
    abc, trained = char_tokenizer('abc\n'), train_bpe(['abc abc'], 260)
    assert same_texts(abc.spec, char_tokenizer('abc\n').spec) and same_texts(trained.spec, dict(trained.spec))
    others = [char_tokenizer(alphabet) for alphabet in ('acb\n', 'abc', 'abc\nd')]
    for one, other in [
        *((abc, other) for other in others),
        (abc, trained),
        (trained, train_bpe(['abd abd'], 260)),
    ]:
        assert not same_texts(one.spec, other.spec) and not same_texts(other.spec, one.spec)


@pytest.mark.slow
def test_same_texts_as_gpt2(bpe):
    """GPT-2's BPE is the same as tiktoken's and in the tokenizer.json of an export."""
    gpt2 = Tokenizer({'kind': 'gpt2'})
    exported = {'kind': 'bpe', 'json': gpt2.for_transformers().to_str()}
    assert same_texts(exported, gpt2.spec) and not same_texts(gpt2.spec, train_bpe(['abc abc'], 260).spec)
