"""model.py against transformers, against tests/reference.py in float64, and against itself without shortcuts."""
import math
import pickle

import pytest
import torch
from torch.nn import functional as F

import model as ours
from model import GPT, ChunkedCrossEntropy, GPTConfig, Tokenizer, draw, read_checkpoint, read_tokenizer
from reference import adamw, gpt_logits, gpt_loss, random_parameters

ARGS = dict(n_layer=3, n_head=2, n_embd=16, block_size=12, bias=True, vocab_size=29, dropout=0.0)


def tiny(seed=0, **changes):
    args = {**ARGS, **changes}
    net = GPT(GPTConfig(**args))
    p = random_parameters(args, seed)
    net.load_state_dict({**p, 'lm_head.weight': p['transformer.wte.weight']})
    return net.eval(), p, args


def tokens(*shape, seed=0, high=29):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


# -----------------------------------------------------------------------------
# the network

@pytest.mark.parametrize('layers, heads, width, context, vocab', [(2, 2, 32, 16, 61), (3, 4, 64, 32, 500), (1, 1, 48, 8, 1000)])
def test_transformers_gpt2(tmp_path, layers, heads, width, context, vocab):
    """Logits within 1e-5 and gradients within 1e-4 of transformers' GPT-2, read from a folder."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_head=heads, n_embd=width, n_positions=context, vocab_size=vocab,
                                        bos_token_id=None, eos_token_id=None, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
                                        initializer_range=0.1))
    for name, q in theirs.named_parameters():  # biases and gains that matter
        if name.endswith('bias') or '.ln_' in name:
            torch.nn.init.normal_(q, mean=float('ln_' in name and name.endswith('weight')), std=0.1)
    theirs.save_pretrained(tmp_path)
    net = GPT.from_pretrained(str(tmp_path))
    x, y = tokens(3, context, seed=1, high=vocab), tokens(3, context, seed=2, high=vocab)
    logits = theirs(x).logits
    assert (net.lm_head(net.hidden(x)) - logits).abs().max() < 1e-5
    assert (net(x)[0] - logits[:, -1:]).abs().max() < 1e-5
    theirs_loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    loss = net(x, y)[1]
    assert abs(loss.item() - theirs_loss.item()) < 1e-5
    theirs_loss.backward()
    loss.backward()
    expected = {name: q.grad for name, q in theirs.named_parameters()}
    for name, q in net.named_parameters():
        want = expected[name.replace('lm_head', 'transformer.wte')]
        want = want.T if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')) else want
        assert (q.grad - want).norm() < 1e-4 * want.norm(), name


def test_pretrained_variants(tmp_path):
    """erf activation is taken over, what model.py cannot build is refused, a folder that is none gets one line."""
    from transformers import GPT2Config, GPT2LMHeadModel
    small = dict(n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=11, bos_token_id=None, eos_token_id=None)
    erf = GPT2LMHeadModel(GPT2Config(**small, activation_function='gelu')).eval()
    erf.save_pretrained(tmp_path / 'erf')
    net = GPT.from_pretrained(str(tmp_path / 'erf'))
    x = tokens(2, 8, high=11)
    assert net.config.activation == 'gelu' and (net.lm_head(net.hidden(x)) - erf(x).logits).abs().max() < 1e-5
    GPT2LMHeadModel(GPT2Config(**small, activation_function='relu')).save_pretrained(tmp_path / 'relu')
    from safetensors.torch import load_file, save_file
    erf.save_pretrained(tmp_path / 'partial')
    weights = load_file(tmp_path / 'partial' / 'model.safetensors')
    del weights['transformer.h.0.mlp.c_fc.weight']
    save_file(weights, tmp_path / 'partial' / 'model.safetensors', metadata={'format': 'pt'})
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'config.json').write_text('{')
    for folder, words in (('relu', 'a variant of GPT-2'), ('partial', 'are not whole: transformer.h.0.mlp.c_fc.weight'), ('broken', 'cannot read'), ('missing', 'is no word that --help lists')):
        with pytest.raises(ValueError, match=words) as error:
            GPT.from_pretrained(str(tmp_path / folder))
        assert '\n' not in str(error.value)


@pytest.mark.parametrize('changes', [{}, dict(bias=False), dict(activation='gelu_tanh'), dict(n_layer=1, n_head=4)])
def test_plain_reference(changes):
    """Logits, loss and gradients in float64."""
    net, p, args = tiny(**changes)
    net.double()
    p = {name: q.double().requires_grad_() for name, q in p.items()}
    x, y = tokens(4, 12), tokens(4, 12, seed=1)
    y[0, :5] = -1
    torch.testing.assert_close(net.lm_head(net.hidden(x)), gpt_logits(p, args, x), rtol=1e-10, atol=1e-10)
    want, loss = gpt_loss(p, args, x, y), net(x, y)[1]
    assert loss.dtype == torch.float64 and abs(loss - want) < 1e-10
    want.backward()
    loss.backward()
    for name, q in net.named_parameters():
        torch.testing.assert_close(q.grad, p[name.replace('lm_head', 'transformer.wte')].grad, rtol=1e-9, atol=1e-10)


def test_impossible_shapes():
    for changes, words in ((dict(n_embd=15), 'n_embd 15 is not divisible by n_head 2'), (dict(n_layer=0), 'n_layer'),
                           (dict(dropout=1.0), 'dropout'), (dict(activation='relu'), 'activation')):
        with pytest.raises(ValueError, match=words):
            GPTConfig(**{**ARGS, **changes})
    net, _, _ = tiny()
    with pytest.raises(ValueError, match='block_size'):
        net(tokens(1, 13))


def test_initialisation():
    """0.02 throughout, less on the branches that end in the residual stream; a loss near ln V."""
    torch.manual_seed(0)
    net = GPT(GPTConfig(block_size=64, vocab_size=512, n_layer=4, n_head=4, n_embd=128))
    p = dict(net.named_parameters())
    assert net.lm_head.weight is net.transformer.wte.weight
    assert abs(p['transformer.h.1.mlp.c_fc.weight'].std() - 0.02) < 0.001
    assert abs(p['transformer.h.1.mlp.c_proj.weight'].std() - 0.02 / math.sqrt(8)) < 0.001
    assert p['transformer.h.1.attn.c_attn.bias'].abs().max() == 0
    assert abs(net(tokens(4, 64, high=512), tokens(4, 64, seed=1, high=512))[1].item() - math.log(512)) < 0.1


def test_crop_block_size():
    net, p, args = tiny()
    net.crop_block_size(5)
    x = tokens(2, 5)
    torch.testing.assert_close(net.lm_head(net.hidden(x)), gpt_logits(p, args, x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match='only be cropped'):
        net.crop_block_size(6)


# -----------------------------------------------------------------------------
# the chunked loss

@pytest.mark.parametrize('chunk', [1, 29 * 3, 29 * 7, 10 ** 6])
@pytest.mark.parametrize('ignored', ['none', 'some', 'all'])
def test_chunked_loss(monkeypatch, chunk, ignored):
    """Value and both gradients of plain cross-entropy in float64, for one chunk, ragged ones and single rows."""
    monkeypatch.setattr(ChunkedCrossEntropy, 'CHUNK', chunk)
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 8, generator=g, dtype=torch.float64).requires_grad_() for n in (19, 29))
    y = tokens(19)
    y[{'none': slice(0), 'some': slice(0, 19, 3), 'all': slice(None)}[ignored]] = -1
    loss = ChunkedCrossEntropy.apply(x, w, y, torch.float64, True)
    got = torch.autograd.grad(3 * loss, (x, w))
    if ignored == 'all':
        assert loss == 0 and not any(q.any() for q in got)
        return
    want = F.cross_entropy(x @ w.T, y, ignore_index=-1)
    assert abs(loss - want) < 1e-12
    for a, b in zip(got, torch.autograd.grad(3 * want, (x, w))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert ChunkedCrossEntropy.apply(x, w, y, torch.float64, False) == loss.detach()


@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_chunked_loss_in_half_precision(dtype, tolerance):
    """The loss stays float32; float16's gradients survive 20,000 classes and a loss scale of 65,536."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 32, generator=g).requires_grad_(), (0.1 * torch.randn(20000, 32, generator=g)).requires_grad_()
    y = tokens(64, high=20000)
    loss = ChunkedCrossEntropy.apply(x, w, y, dtype, True)
    want = F.cross_entropy(x @ w.T, y)
    assert loss.dtype == torch.float32 and abs(loss - want) < tolerance
    for a, b in zip(torch.autograd.grad(65536 * loss, (x, w)), torch.autograd.grad(65536 * want, (x, w))):
        assert (a - b).norm() < tolerance * b.norm()


# -----------------------------------------------------------------------------
# the KV cache and sampling

@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize('shape', [dict(), dict(n_layer=1, n_head=1, n_embd=8, bias=True), dict(n_head=4, n_embd=32, activation='gelu_tanh', bias=True)])
@torch.no_grad()
def test_cache_is_exact(shape, dtype, tolerance):
    """Whatever the prompt's length, 1 … block_size, cached logits are the uncached ones; so they are through the mask of static shapes."""
    net, p, args = tiny(**shape)
    net.to(dtype)
    x = tokens(2, 12)
    whole = net.lm_head(net.hidden(x))
    positions = torch.arange(12)
    for prompt in range(1, 13):
        sliced, static = net.new_cache(2, 12), net.new_cache(2, 12)
        for cache in (sliced, static):
            assert (net.prefill(x[:, :prompt], cache) - whole[:, prompt - 1]).abs().max() < tolerance
        for t in range(prompt, 12):
            here = positions[t:t + 1]
            logits = (net.decode(x[:, t:t + 1], here, [kv[..., :t + 1, :] for kv in sliced]),
                      net.decode(x[:, t:t + 1], here, static, (positions <= here)[None]))
            assert max((found - whole[:, t]).abs().max() for found in logits) < tolerance
    cache = net.new_cache(2, 12)  # several tokens at a time behind a cache
    net.prefill(x[:, :5], cache)
    found = net.lm_head(net.hidden(x[:, 5:], cache, positions[5:], positions <= positions[5:, None]))
    assert (found - whole[:, 5:]).abs().max() < tolerance
    assert not any('cache' in name or 'kv' in name for name in net.state_dict())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_for_sampling(dtype):
    """Weights cast or packed in advance change no logit by more than rounding: float32 as nothing, halves as autocast does it."""
    x = tokens(2, 12)
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        want = tiny(bias=True)[0].prefill(x, tiny(bias=True)[0].new_cache(2, 12))
        net = tiny(bias=True)[0].for_sampling('cpu', dtype)
        assert (net.prefill(x, net.new_cache(2, 12)) - want).abs().max() < (1e-5 if dtype == torch.float32 else 1e-6)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_a_row_is_its_own():
    """The bits of a row do not depend on the others or on their number; one prompt serves for all."""
    net = GPT(GPTConfig(block_size=24, vocab_size=96, n_layer=2, n_head=2, n_embd=64)).for_sampling('cpu', torch.float32)
    draws = torch.rand(33, 40, generator=torch.Generator().manual_seed(0))
    x = tokens(1, 5)
    def rows(n, first=0):
        return torch.cat([*net.stream(x, 40, top_k=50, draws=draws[first:first + n])], dim=1)
    everything = rows(33)
    assert len(set(map(tuple, everything.tolist()))) == 33
    for n in (1, 2, 3, 7, 16):
        assert torch.equal(rows(n), everything[:n]) and torch.equal(rows(n, 33 - n), everything[33 - n:])
    assert torch.equal(torch.cat([*net.stream(x.expand(7, -1), 40, top_k=50, draws=draws[:7], static=True)], dim=1), everything[:7])


@pytest.mark.parametrize('prompt', [1, 4, 12, 20])
def test_greedy_is_the_plain_loop(prompt):
    """Token for token what running the whole window for each token gives, up to block_size; beyond it as documented."""
    net, p, args = tiny()
    x = tokens(3, prompt)
    got = net.generate(x, 20, temperature=0)
    assert torch.equal(got, net.generate(x, 20, temperature=0, static=True))
    assert torch.equal(got, net.generate(x, 20, temperature=0, cache=net.new_cache(3, 12)))
    assert torch.equal(got, tiny()[0].for_sampling('cpu', torch.float32).generate(x, 20, temperature=0))
    window, out = x[:, -12:], x
    for _ in range(20):
        if window.size(1) > 12:  # full: go on from its later half
            window = out[:, -6:]
        out = torch.cat((out, gpt_logits(p, args, window)[:, -1].argmax(-1, keepdim=True)), dim=1)
        window = torch.cat((window, out[:, -1:]), dim=1)
    assert torch.equal(got, out)


def test_draw_follows_the_distribution():
    logits = torch.tensor([[2.0, -1.0, 0.5, 1.0, -30.0]])
    u = (torch.arange(20000) + 0.5)[:, None] / 20000
    def shares(**how):
        ids = draw(logits.expand(20000, -1), u, **how)
        return torch.bincount(ids[:, 0], minlength=5) / 20000
    for t in (1.0, 0.5, 2.0):
        torch.testing.assert_close(shares(temperature=t), (logits[0] / t).softmax(-1), atol=2e-4, rtol=0)
    top2 = torch.where(torch.tensor([1, 0, 0, 1, 0], dtype=torch.bool), logits[0].softmax(-1), torch.zeros(5))
    torch.testing.assert_close(shares(top_k=2), top2 / top2.sum(), atol=2e-4, rtol=0)
    # probabilities 0.60, 0.22, 0.13, 0.03: 0.7 is reached by two tokens, 0.5 by one, and never by none
    torch.testing.assert_close(shares(top_p=0.7), top2 / top2.sum(), atol=2e-4, rtol=0)
    assert shares(top_p=0.5)[0] == 1 and shares(top_p=1e-6)[0] == 1 and shares(top_k=1)[0] == 1
    assert shares(temperature=1e-30)[0] == 1 and shares(temperature=1e-300)[0] == 1 and shares(temperature=0)[0] == 1
    torch.testing.assert_close(shares(top_k=0), shares(top_k=99), atol=2e-4, rtol=0)
    torch.testing.assert_close(shares(top_p=1.0), shares())


def test_padded_ids_are_never_drawn():
    """nanoGPT can draw one of the 47 ids that only pad GPT-2's vocabulary, and decoding it fails."""
    net, _, _ = tiny()
    for temperature in (0, 1.0, 100.0):
        assert net.generate(tokens(8, 3, high=5), 9, temperature=temperature, vocab_size=5).max() < 5


# -----------------------------------------------------------------------------
# optimizer and FLOPs

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
    return net, net.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu', 'muon'), {q: name for name, q in net.named_parameters()}


def test_muon_groups():
    """Every parameter in one group: c_attn as three matrices, the other matrices of the blocks as one, the rest with AdamW."""
    net, muon, names = with_muon()
    groups = [[names[q] for q in group['params']] for group in muon.param_groups]
    assert sorted(sum(groups, [])) == sorted(names.values())
    kinds = [lambda n: n.endswith('c_attn.weight'), lambda n: n.endswith(('c_proj.weight', 'c_fc.weight')),
             lambda n: n.endswith(('wte.weight', 'wpe.weight')), lambda n: n.endswith('bias') or '.ln_' in n]
    assert all(group and all(map(kind, group)) for group, kind in zip(groups, kinds))
    assert [(group['parts'], group['weight_decay']) for group in muon.param_groups] == [(3, 0.1), (1, 0.1), (0, 0.1), (0, 0.0)]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_muon_is_orthogonal(dtype):
    """Singular values near 1 and the singular vectors of a float64 decomposition, however badly the matrix is conditioned or scaled."""
    g = torch.Generator().manual_seed(0)
    def matrix(n, m, values):
        u, v = (torch.linalg.qr(torch.randn(k, n, generator=g, dtype=torch.float64))[0] for k in (n, m))
        return u @ torch.diag(values) @ v.T, u @ v.T
    for n, m, least in ((64, 64, 1e-2), (64, 256, 1e-2), (1, 7, 1.0)):
        for scale in (1e-12, 1.0, 1e12):
            x, want = matrix(n, m, torch.logspace(0, math.log10(least), n, dtype=torch.float64) * scale)
            got = ours.Muon.orthogonal(x[None].to(dtype))[0].double()
            values = torch.linalg.svdvals(got)
            assert 0.95 < values.min() and values.max() < 1.05
            assert (got * want).sum() / got.norm() / want.norm() > 0.99
    assert 0.95 < torch.linalg.svdvals(ours.Muon.orthogonal(torch.randn(3, 96, 384, generator=g).to(dtype)).double()).min()
    line = torch.outer(torch.randn(64, generator=g), torch.randn(256, generator=g))  # of rank 1: nothing but the largest singular value
    values = torch.linalg.svdvals(ours.Muon.orthogonal(line[None].to(dtype)).double())[0]
    assert 0.95 < values[0] < 1.05
    assert not ours.Muon.orthogonal(torch.zeros(1, 4, 4, dtype=dtype)).any()


def test_muon_steps():
    """Three steps against Muon written out with float64 decompositions, one matrix at a time, and PyTorch's AdamW for the rest."""
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
            momentum[name] = 0.95 * momentum[name] + 0.05 * grad
            factors = []
            for part in (0.95 * momentum[name] + 0.05 * grad).chunk(3 if 'c_attn' in name else 1):
                u, s, v = torch.linalg.svd(part, full_matrices=False)
                s = s / (s ** 4).sum() ** 0.25
                for a, b, c in muon.QUINTICS:  # not quite 1 afterwards, and 0 where s was
                    s = a * s + b * s ** 3 + c * s ** 5
                factors.append(0.2 * math.sqrt(max(part.shape)) * u * s @ v)
            p[name].data = ((1 - 1e-2 * 0.1) * p[name] - 1e-2 * torch.cat(factors)).detach().float()
    for q, name in names.items():
        torch.testing.assert_close(q, p[name], rtol=0, atol=1e-5)


def test_muon_under_float16():
    """An infinite gradient: the GradScaler skips the whole step, Muon's half too (fused AdamW asks it to look the other way)."""
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
        assert all(torch.equal(q, before[name]) for name, q in net.named_parameters()) == bad and scaler.get_scale() == 2 ** 15


def test_activation_checkpointing():
    """Computed again, not otherwise: the same loss and the same gradients, dropout included."""
    net = GPT(GPTConfig(block_size=16, vocab_size=32, n_layer=3, n_head=2, n_embd=16, dropout=0.3))
    seen, calls = [], []
    net.transformer.h[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for net.activation_checkpointing in (False, True):
        torch.manual_seed(1)
        loss = net(tokens(4, 8), tokens(4, 8))[1]
        net.zero_grad()
        loss.backward()
        seen.append([loss, *(p.grad for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*seen)) and len(calls) == 3  # once, and twice
    net.eval()
    assert (net.hidden(tokens(4, 8), net.new_cache(4, 8)) - net.hidden(tokens(4, 8))).abs().max() < 1e-6


def test_devices(monkeypatch):
    """A GPU always gets its number, which torch.cuda.set_device demands; precision follows the GPU, not the command line's order."""
    assert ours.choose_device('cpu', None) == ('cpu', 'float32') and ours.choose_device('cpu', 'bfloat16') == ('cpu', 'bfloat16')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    for has_bf16, dtype in ((True, 'bfloat16'), (False, 'float16')):
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: has_bf16)
        assert ours.choose_device(None, None) == ('cuda:0', dtype) and ours.choose_device('cuda', None, 1) == ('cuda:1', dtype)
        assert ours.choose_device('cuda:1', 'float32') == ('cuda:1', 'float32') and ours.choose_device('cpu', None) == ('cpu', 'float32')
    for device in ('cuda:2', 'mps', 'tpu', 'cuda:x'):
        with pytest.raises(ValueError, match=f"device '{device}'"):
            ours.choose_device(device, None)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert ours.choose_device(None, None) == ('mps', 'float32')


def test_flops_and_mfu(monkeypatch):
    """nanoGPT's count for 124M at T = 1024, and a peak only for chips whose data sheet is known."""
    with torch.device('meta'):
        net = GPT(GPTConfig(bias=False))
    assert round(net.estimate_flops() / 1e6) == 855
    assert net.estimate_mfu(1000, None) is None
    assert net.estimate_mfu(1000, 1e12) == pytest.approx(0.855, rel=1e-3)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    for name, peak in (('NVIDIA A100-SXM4-80GB', 312e12), ('NVIDIA H100 80GB HBM3', 989.4e12), ('NVIDIA H100 PCIe', 756e12),
                       ('NVIDIA L4', 121e12), ('NVIDIA L40S', 362e12), ('NVIDIA L40', None), ('Tesla T4', 65e12),
                       ('NVIDIA T400', None), ('Tesla V100-SXM2-32GB', 125e12), ('NVIDIA GeForce RTX 3090', 71e12),
                       ('NVIDIA GeForce RTX 3090 Ti', None), ('NVIDIA GeForce RTX 4090 Laptop GPU', None), ('NVIDIA H200', 989.4e12),
                       ('NVIDIA A100-SXM4-80GB MIG 1g.10gb', None), ('NVIDIA B200', 2250e12), ('NVIDIA GB200', None)):
        assert ours.peak_flops_of('cuda', 'bfloat16') == peak, name
        assert ours.peak_flops_of('cuda', 'float32') is None and ours.peak_flops_of('cpu', 'bfloat16') is None


# -----------------------------------------------------------------------------
# checkpoints and tokenizers

class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


def test_poisoned_files_run_nothing(tmp_path):
    target = tmp_path / 'ran'
    torch.save({'model': {}, 'model_args': {}, 'config': Bomb(str(target))}, tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match='cannot read'):
        read_checkpoint(tmp_path / 'ckpt.pt')
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'stoi': Bomb(str(target))}))
    with pytest.raises(ValueError, match='cannot read'):
        read_tokenizer(tmp_path)
    assert not target.exists()


def test_tokenizers(tmp_path, bpe):
    text = 'naïve — 日本\n'
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 11, 'stoi': {c: i for i, c in enumerate(sorted(set(text)))},
                                                      'itos': dict(enumerate(sorted(set(text))))}))
    char = Tokenizer(read_tokenizer(tmp_path))
    assert char.decode(char.encode(text)) == text and char.size == len(set(text)) and char.decode([char.start]) == '\n'
    with pytest.raises(ValueError, match="never seen the character 'x'"):
        char.encode('ax')
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 11}))
    with pytest.raises(ValueError, match='lacks stoi or itos'):
        Tokenizer(read_tokenizer(tmp_path))
    (tmp_path / 'meta.pkl').unlink()
    gpt2 = Tokenizer(read_tokenizer(tmp_path))
    assert gpt2.encode(text) == bpe.encode(text) and gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.encode('<|endoftext|>') == [gpt2.end] == [gpt2.start] == [50256] and gpt2.size == 50257
    import tokenizers
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator([text * 20], vocab_size=300, special_tokens=['<|endoftext|>'])
    trained.save(str(tmp_path / 'tokenizer.json'))
    with pytest.raises(ValueError, match='tokenizer.json is not one'):
        Tokenizer({'kind': 'bpe', 'json': '{}'})
    own = Tokenizer(read_tokenizer(tmp_path))
    assert own.decode(own.encode(text + '🦊𠀀')) == text + '🦊𠀀' and own.encode('<|endoftext|>') == [own.end] == [own.start]
