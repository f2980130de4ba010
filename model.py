"""
GPT-2, all of it: the network, its loss, the KV cache, sampling, weights and tokenizers in and out.

The architecture is that of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"
(https://github.com/openai/gpt-2), with parameter names as in nanoGPT, so that checkpoints go both ways.

Letters in shapes: B batch, T time (tokens), C n_embd, H n_head, D = C / H, V vocab_size.
Errors that a user can cause are ValueErrors (or OSErrors) whose text is one line and says what to do.
"""
import json
import math
import pickle
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute_in_backward

ACTIVATIONS = {'gelu': 'none', 'gelu_tanh': 'tanh'}  # our name -> F.gelu's `approximate`
THEIR_ACTIVATIONS = {'gelu': 'gelu', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_new': 'gelu_tanh'}  # transformers' names -> ours; the first of two rounds as ours does
CONV1D = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # matrices of which transformers, like OpenAI, keeps the transpose


@dataclass
class GPTConfig:
    """Shape of a GPT. Raises ValueError where the numbers cannot make a network."""
    block_size: int = 1024    # longest context, in tokens
    vocab_size: int = 50304   # GPT-2's 50257 rounded up to a multiple of 64, which GPUs multiply faster
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True         # biases in the linear layers and norms: True is GPT-2, False trains a little better
    activation: str = 'gelu'  # 'gelu' is the exact erf form, 'gelu_tanh' the approximation OpenAI's weights grew up with

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: every head gets n_embd / n_head channels")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}")


# -----------------------------------------------------------------------------
# the network

class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key and value in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, pos=None, mask=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)      # (3, B, H, T, D)
        q, k, v = qkv                                                                   # each (B, H, T, D)
        if cache is not None and pos is None:                                           # prefill: x is all there is so far
            cache[..., :T, :] = qkv[1:]
        elif cache is not None:                                                         # decode: x sees the cache and itself
            k, v = cache.index_copy_(3, pos, qkv[1:])                                   # (B, H, length, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=pos is None,
                                           dropout_p=self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)                                          # (B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate=ACTIVATIONS[config.activation])
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))  # (B, T, C) -> (B, T, 4C) -> (B, T, C)


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, pos=None, mask=None):
        x = x + self.attn(self.ln_1(x), cache, pos, mask)  # norms before the branches: GPT-2's change to GPT
        return x + self.mlp(self.ln_2(x))


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    Mean cross-entropy of x @ weight.T against targets, without ever holding all the logits: at GPT-2's
    vocabulary they would be the largest tensor of the whole step. Each chunk of rows yields its loss and,
    while its logits are still there, its gradients; backward only scales them.

    x (N, C), weight (V, C), targets (N,) with -1 for positions that do not count -> loss (), float32 or wider.
    `dtype` is that of the products, `with_grad` says whether the gradients will be wanted.
    """
    CHUNK = 2 ** 26  # logits held at a time: 256 MiB in float32

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, with_grad):
        N, V = x.size(0), weight.size(0)
        rows = math.ceil(N / math.ceil(N * V / ChunkedCrossEntropy.CHUNK))
        wide = torch.promote_types(dtype, torch.float32)
        # In float16 the gradient of a logit, at most 1, goes down by 16 before the products: their sums over
        # thousands of rows would overflow, and no GradScaler sees them here. 16 is small enough for 1/V to survive.
        shrink = 1 / 16 if dtype == torch.float16 else 1.0
        total = torch.zeros((), dtype=wide, device=x.device)
        counted = targets != -1                                                     # (N,)
        if with_grad:
            grad_x = torch.empty_like(x, dtype=dtype)
            grad_w = torch.zeros_like(weight, dtype=wide)
        with torch.autocast(x.device.type, enabled=False):
            w = weight.to(dtype)
            for i in range(0, N, rows):
                xc, keep = x[i:i + rows].to(dtype), counted[i:i + rows]             # (n, C), (n,)
                target = targets[i:i + rows].clamp(min=0)[:, None]                  # (n, 1)
                logits = (xc @ w.T).to(wide)                                        # (n, V)
                lse = logits.logsumexp(-1, keepdim=True)                            # (n, 1)
                total += ((lse - logits.gather(1, target))[:, 0] * keep).sum()
                if with_grad:  # d loss / d logits = softmax - one_hot, and zero where nothing counts
                    lse = lse.masked_fill(~keep[:, None], math.inf) - math.log(shrink)
                    d = logits.sub_(lse).exp_()                                     # (n, V)
                    d.scatter_add_(1, target, -shrink * keep[:, None].to(wide))
                    d = d.to(dtype)
                    grad_x[i:i + rows] = d @ w
                    if dtype == wide:
                        grad_w.addmm_(d.T, xc)
                    else:
                        grad_w += d.T @ xc
        count = counted.sum().clamp(min=1)
        if with_grad:
            ctx.save_for_backward(grad_x, grad_w, count * shrink)
            ctx.dtypes = x.dtype, weight.dtype
        return total / count

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_w, divisor = ctx.saved_tensors
        scale = grad_loss / divisor
        # grad_w in place: this is when memory is fullest. A second backward through here is an error of autograd's.
        return grad_x.to(ctx.dtypes[0]) * scale, grad_w.mul_(scale).to(ctx.dtypes[1]), None, None, None


class Muon(torch.optim.AdamW):
    """
    Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) for groups with `parts`, AdamW for the others. A matrix moves
    along the orthogonal factor of its momentum: by as much in its weak directions as in its strong ones. The step is
    scaled to the size of AdamW's, so both share one learning rate and one weight decay (Liu et al. 2025, arXiv:2502.16982).
    A parameter of such a group is `parts` matrices one above the other, each with a factor of its own.
    """
    MOMENTUM = 0.95
    # Quintics a x + b x^3 + c x^5, each the nearest to 1 on what the one before leaves of [0.002, 1] (Polar Express, Amsel et al. 2025,
    # arXiv:2505.16932), computed with 2 % of room above at every step: without it bfloat16's roundings explode. They end in [0.97, 1.03].
    QUINTICS = (8.0925, -22.1470, 15.6075), (3.9801, -2.7677, 0.4956), (3.6855, -2.6515, 0.4964), (2.8199, -2.0352, 0.4319), (2.0068, -1.3610, 0.3665)

    def __init__(self, groups, **how):
        super().__init__([{'parts': 0, **group} for group in groups], **how)
        self._step_supports_amp_scaling = False  # fused AdamW leaves a step with infinities undone itself, Muon lets the GradScaler see to it

    @torch.no_grad()
    def step(self):
        stacks = {}                                                                  # shape -> all matrices of it
        for group in self.param_groups:
            for p in group['params'] if group['parts'] else ():
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(momentum=torch.zeros_like(p), step=torch.zeros(()))  # a step, because AdamW looks for one when it is loaded
                momentum = state['momentum'].lerp_(p.grad, 1 - self.MOMENTUM)
                ahead, p.grad = p.grad.lerp(momentum, self.MOMENTUM), None           # Nesterov's; without a gradient AdamW passes by
                p.mul_(1 - group['lr'] * group['weight_decay'])
                for weight, update in zip(p.chunk(group['parts']), ahead.chunk(group['parts'])):
                    if weight.size(0) > weight.size(1):
                        weight, update = weight.mT, update.mT                        # (n, m), n <= m
                    stacks.setdefault(weight.shape, []).append((weight, update, group['lr']))
        for (_, m), stack in stacks.items():
            weights, updates, rates = zip(*stack)
            updates = torch.stack(updates)                                           # (matrices, n, m)
            if updates.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False):
                updates = updates.bfloat16()                                         # precise enough, and elsewhere slow
            for weight, update, lr in zip(weights, self.orthogonal(updates), rates):
                weight.add_(update, alpha=-lr * 0.2 * math.sqrt(m))                  # 0.2 is about the root mean square of AdamW's steps
        super().step()

    @classmethod
    def orthogonal(cls, x):
        """Of matrices x (k, n, m), n <= m, near enough the orthogonal factors U V' of their decompositions U S V', by matrix products alone."""
        x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-30)           # so that nothing under- or overflows below
        gram = x @ x.mT                                                              # (k, n, n)
        size = torch.linalg.matrix_norm(gram, keepdim=True).sqrt().clamp(min=1e-3)            # no singular value is larger; 1e-3 for zeros
        x, gram = x / size, gram / size ** 2
        for i, (a, b, c) in enumerate(cls.QUINTICS):
            gram = x @ x.mT if i else gram
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # (k, n, m)
        return x


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # one matrix reads tokens and writes them (Press & Wolf 2017)
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):  # 2 n_layer branches add to the residual stream: keep its variance (GPT-2, section 2.3)
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
        self.activation_checkpointing = False  # True: backward has the blocks' inputs and computes the rest again (Chen et al. 2016)
        self.tokens = {'kind': 'gpt2'}         # how they read: what read_tokenizer returns, or the folder to ask it about

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def get_num_params(self, non_embedding=True):
        """Number of parameters; non_embedding leaves out wpe (wte stays in, it is also the output layer)."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def hidden(self, idx, cache=None, pos=None, mask=None):
        """
        The network up to its last norm: idx (B, T) token ids -> (B, T, C). model.lm_head(hidden) are the logits of every position.
        A cache keeps their keys and values. pos (T,): idx stands at these positions, behind what the cache holds, and sees of
        the cache what mask (T, length) lets through, None for all of it.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size {self.config.block_size}")
        at = torch.arange(T, device=idx.device) if pos is None else pos              # (T,)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(at))  # (B, T, C)
        for layer, block in enumerate(self.transformer.h):
            inputs = x, None if cache is None else cache[layer], pos, mask
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = recompute_in_backward(block, *inputs, use_reentrant=False)       # (B, T, C)
            else:
                x = block(*inputs)                                                   # (B, T, C)
        return self.transformer.ln_f(x)                                              # (B, T, C)

    def forward(self, idx, targets=None):
        """
        idx (B, T) -> (logits of the last position (B, 1, V), None), or with targets (B, T),
        -1 where nothing is to be predicted, -> (None, mean loss in nats per token).
        """
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        return None, ChunkedCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(),
                                               dtype, torch.is_grad_enabled())

    def crop_block_size(self, block_size):
        """Shortens the context for good, for example of GPT-2's 1024 tokens to what fits into memory."""
        if not 0 < block_size <= self.config.block_size:
            raise ValueError(f"block_size {block_size} is beyond the model's {self.config.block_size}, which can only be cropped")
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())

    # -------------------------------------------------------------------------
    # training

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, optimizer='adamw'):
        """
        'adamw': decays matrices and embeddings but no bias and no norm gain; fused into one kernel where PyTorch has one.
        'muon': the same but for the matrices of the blocks, which Muon takes.
        """
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]
        how = dict(lr=learning_rate, betas=betas, fused=device_type in ('cuda', 'cpu', 'mps'))
        if optimizer == 'adamw':
            return torch.optim.AdamW(groups, **how)
        parts = {p: 3 if name.endswith('c_attn.weight') else 1 for name, p in self.transformer.h.named_parameters() if p.dim() == 2}
        groups[0]['params'] = [p for p in groups[0]['params'] if p not in parts]
        return Muon([{'params': [p for p in params if parts.get(p) == n], 'weight_decay': weight_decay, 'parts': n} for n in (3, 1)] + groups, **how)

    def estimate_flops(self):
        """FLOPs per token, forward and backward: 6 N for the weights + 12 L C T for attention (PaLM, appendix B)."""
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, tokens_per_second, peak_flops):
        """Model FLOPs utilisation: the fraction of peak_flops (FLOP/s) that the model's arithmetic needs, None if no peak is known."""
        return tokens_per_second * self.estimate_flops() / peak_flops if peak_flops else None

    # -------------------------------------------------------------------------
    # sampling

    def for_sampling(self, device, dtype, pack=True):
        """
        Takes the model to `device` for sampling, no longer for training. The weights of products are cast to `dtype` once instead
        of at every step. `pack` lays them out as oneDNN wants them, on a CPU in float32: a step of 124M with 10 rows
        spent 74 ms in its products before and 24 after; and a row's bits no longer depend on the number of rows.
        """
        self.eval().to(device)
        pack = pack and torch.device(device).type == 'cpu' and dtype == torch.float32 and torch.backends.mkldnn.is_available()
        for module in self.modules():
            if not isinstance(module, nn.Linear) or module.weight is None:
                continue
            if pack:
                weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), 16)  # for some 16 rows; fewer and more work too
                module.forward = partial(packed_linear, weight, module.bias)
                module.weight = None                                                 # not kept twice
            elif dtype != torch.float32:
                module.weight = nn.Parameter(module.weight.to(dtype))                # lm_head no longer shares it with wte
                module.bias = None if module.bias is None else nn.Parameter(module.bias.to(dtype))
        return self

    def new_cache(self, batch, length):
        """Room for the keys and values of `length` tokens in `batch` rows: for each layer (2, batch, H, length, D). The caller owns it."""
        c, weight = self.config, self.transformer.wte.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        return [torch.zeros(2, batch, c.n_head, length, c.n_embd // c.n_head, device=weight.device, dtype=dtype) for _ in range(c.n_layer)]

    def prefill(self, idx, cache):
        """Reads idx (B, T) into an empty cache, or one row into all rows of it; logits of what follows (B, V)."""
        return self.lm_head(self.hidden(idx, cache)[:, -1])

    def decode(self, token, pos, cache, mask=None):
        """One step: token (B, 1) at position pos (1,), behind what the cache holds -> logits of the next (B, V)."""
        return self.lm_head(self.hidden(token, cache, pos, mask)[:, -1])

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, draws=None, vocab_size=None, cache=None, static=False):
        """
        Yields max_new_tokens times the next token of every row, (B, 1), to follow idx (B, T) or (1, T), T >= 1.

        temperature 0 takes the likeliest token; top_k keeps that many tokens (None or 0: all), top_p the
        fewest whose probability reaches it (Holtzman et al. 2020). draws (B, max_new_tokens), uniform in [0, 1), is all
        the randomness there is. vocab_size leaves out the ids above it, which only pad the vocabulary.
        A cache from new_cache(B, min(block_size, T + max_new_tokens)) can be brought along. static: every step attends to all of
        it through a mask, so that no shape ever changes.
        Up to block_size tokens each step costs one position. Positions are absolute, so a full window voids the
        cache: its later half is read anew and the window grows from there.
        """
        if draws is None:
            draws = torch.rand(idx.size(0), max_new_tokens, device=idx.device)
        (B, T), block_size = (draws.size(0), idx.size(1)), self.config.block_size
        if cache is None:
            cache = self.new_cache(B, min(block_size, T + max_new_tokens))
        positions = torch.arange(cache[0].size(-2), device=idx.device)                  # (length,)
        tokens = torch.cat((idx.expand(B, T), idx.new_zeros(B, max_new_tokens)), dim=1)  # (B, T + max_new_tokens)
        unread, pos = idx[:, -block_size:], 0                                        # pos: how far the cache is filled
        for t in range(T, T + max_new_tokens):
            if pos in (0, block_size):
                logits, pos = self.prefill(unread, cache), unread.size(1)            # (B, V) or, from one prompt, (1, V)
            else:
                here, last = positions[pos:pos + 1], tokens[:, t - 1:t]
                if static:
                    logits = self.decode(last, here, cache, (positions <= here)[None])   # (B, V)
                else:
                    logits = self.decode(last, here, [kv[..., :pos + 1, :] for kv in cache])
                pos += 1
            logits = logits[:, :vocab_size].float().expand(B, -1)
            tokens[:, t:t + 1] = draw(logits, draws[:, t - T:t - T + 1], temperature, top_k, top_p)
            yield tokens[:, t:t + 1]
            unread = tokens[:, t + 1 - max(1, block_size // 2):t + 1]                # read anew when the window is full

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **more):
        """idx (B, T) with max_new_tokens more, (B, T + max_new_tokens); the arguments are stream's."""
        new = torch.cat(list(self.stream(idx, max_new_tokens, temperature, top_k, **more)), dim=1)
        return torch.cat((idx.expand(new.size(0), -1), new), dim=1)

    # -------------------------------------------------------------------------
    # weights in

    @classmethod
    def from_weights(cls, config, weights):
        """The model around existing tensors, taken over rather than copied, as float32. Raises RuntimeError where they do not fit."""
        with NoInit():
            model = cls(config)
        model.load_state_dict(weights, assign=True)
        model.transformer.wte.weight = model.lm_head.weight
        return model.float()

    @classmethod
    def from_checkpoint(cls, checkpoint, dropout=None):
        """The model in a folder with a ckpt.pt, in such a file, or in what read_checkpoint returned, nanoGPT's or ours; on the CPU. Raises ValueError."""
        if not isinstance(checkpoint, dict):
            path = Path(checkpoint)
            checkpoint = read_checkpoint(path if path.is_file() else path / 'ckpt.pt')
        args = dict(checkpoint['model_args'])
        if dropout is not None:
            args['dropout'] = dropout
        try:
            # torch.compile prefixes the names; models before PyTorch 2 kept their masks as buffers
            model = cls.from_weights(GPTConfig(**args), {name.removeprefix('_orig_mod.'): p for name, p in checkpoint['model'].items()
                                                         if not name.endswith(('.attn.bias', '.attn.masked_bias'))})
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"the checkpoint does not fit this model.py: {one_line(error)}") from error
        # nanoGPT's checkpoints name their data set, ours hold the tokenizer itself
        model.tokens = checkpoint.get('tokenizer') or Path(__file__).resolve().parent / 'data' / (checkpoint.get('config') or {}).get('dataset', 'NAME')
        return model

    @classmethod
    def from_pretrained(cls, source, dropout=0.0):
        """
        A GPT-2 of transformers: 'gpt2' (124M), 'gpt2-medium' (350M), 'gpt2-large' (774M), 'gpt2-xl' (1558M),
        or a folder that save_pretrained wrote. The logits are transformers' own. Raises ValueError or OSError.
        """
        from transformers import GPT2LMHeadModel, logging  # seconds to import, so only here
        if source not in GPT2_SIZES and not (Path(source) / 'config.json').is_file():
            raise ValueError(f"init_from {source!r} is no word that --help lists for it (resume, {', '.join(GPT2_SIZES)} …) "
                             "and no folder with a GPT-2 that transformers saved")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            theirs, found = GPT2LMHeadModel.from_pretrained(f'openai-community/{source}' if source in GPT2_SIZES else source, output_loading_info=True)
        except Exception as error:  # many libraries speak here, each with errors of its own
            where = ("download it where there is a network (it lands in ~/.cache/huggingface, or HF_HOME) and copy it here"
                     if source in GPT2_SIZES else 'is the folder whole?')
            raise ValueError(f"cannot read GPT-2 weights from {source!r} ({one_line(error)}): {where}") from error
        wrong = set(found['missing_keys']) - {'lm_head.weight'} | set(map(str, found['mismatched_keys']))
        if wrong:  # transformers fills them with random numbers
            raise ValueError(f"the weights in {source!r} are not whole: {min(wrong)} is missing or of another shape")
        hf = theirs.float().config
        activation = THEIR_ACTIVATIONS.get(hf.activation_function)
        if (activation is None or hf.n_inner not in (None, 4 * hf.n_embd) or hf.layer_norm_epsilon != 1e-5 or not hf.scale_attn_weights
                or hf.scale_attn_by_inverse_layer_idx or hf.add_cross_attention or not hf.tie_word_embeddings):
            raise ValueError(f"{source}/config.json describes a variant of GPT-2 that model.py does not build")
        weights = {name: p.T.contiguous() if name.endswith(CONV1D) else p for name, p in theirs.state_dict().items()}
        biases = {name for name in weights if name.endswith('.bias')}
        bias = getattr(hf, 'bias', True) or any(weights[name].any() for name in biases)  # fine-tuned there, save_pretrained's zeros have moved
        config = GPTConfig(hf.n_positions, hf.vocab_size, hf.n_layer, hf.n_head, hf.n_embd, dropout, bias, activation)
        model = cls.from_weights(config, {name: p for name, p in weights.items() if bias or name not in biases})
        model.tokens = model.tokens if source in GPT2_SIZES else Path(source)
        return model

    # -------------------------------------------------------------------------
    # and out

    def tokenizer(self):
        """The Tokenizer of the texts that the model knows. Raises ValueError where its weights came without one."""
        spec = self.tokens if isinstance(self.tokens, dict) else read_tokenizer(self.tokens)
        tokenizer = Tokenizer(spec) if spec['kind'] != 'gpt2' or self.config.vocab_size >= 50257 else None
        if tokenizer is None or tokenizer.size > self.config.vocab_size:
            raise ValueError(f"the model has {self.config.vocab_size} tokens, but which? "
                             + ("Set model.tokens to the folder of its data set" if self.tokens is spec else
                                f"Put the meta.pkl or tokenizer.json of its data set into {self.tokens}"))
        return tokenizer

    def save_pretrained(self, folder):
        """
        Writes the model and its tokenizer as a GPT-2 of transformers, with the same logits to the last bit in float32. Without
        biases it gets zeros there and a word in config.json, by which from_pretrained finds the same state dict again. Raises ValueError.
        """
        if any(module.weight is None for module in self.modules() if isinstance(module, nn.Linear)):
            raise ValueError("for_sampling has laid out the weights for this CPU: save the model before it")
        from safetensors.torch import save_file
        c, tokenizer, folder = self.config, self.tokenizer(), Path(folder)
        weights = {}
        for name, p in self.transformer.state_dict(prefix='transformer.').items():
            p = p.cpu().float()
            weights[name] = (p.T if name.endswith(CONV1D) else p).contiguous()
            if '.h.' in name or '.ln_f.' in name:
                weights.setdefault(name.replace('.weight', '.bias'), torch.zeros(p.size(0)))
        activation = next(theirs for theirs, ours in THEIR_ACTIVATIONS.items() if ours == c.activation)
        ends = {'bos_token_id': tokenizer.end, 'eos_token_id': tokenizer.end}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / 'model.safetensors', {'format': 'pt'})
        for name, content in {
                'config.json': {'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'dtype': 'float32', 'vocab_size': c.vocab_size,
                                'n_positions': c.block_size, 'n_layer': c.n_layer, 'n_head': c.n_head, 'n_embd': c.n_embd, 'bias': c.bias,
                                'activation_function': activation, 'layer_norm_epsilon': 1e-5, 'tie_word_embeddings': True,
                                **dict.fromkeys(('attn_pdrop', 'embd_pdrop', 'resid_pdrop'), c.dropout), **ends},
                'generation_config.json': {**ends, 'suppress_tokens': list(range(tokenizer.size, c.vocab_size)) or None},  # ids that only pad the vocabulary
                'tokenizer_config.json': {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': c.block_size, 'clean_up_tokenization_spaces': False,
                                          **({'bos_token': '<|endoftext|>', 'eos_token': '<|endoftext|>'} if tokenizer.end is not None else {})}}.items():
            (folder / name).write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
        tokenizer.for_transformers().save(str(folder / 'tokenizer.json'))


class NoInit(torch.overrides.TorchFunctionMode):
    """Leaves out torch.nn.init's random numbers, a second for 124M weights, where others are about to take their place."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, '__module__', None) == 'torch.nn.init':
            return args[0] if args else kwargs['tensor']
        return func(*args, **kwargs or {})


def packed_linear(weight, bias, x):
    """nn.Linear's product with a weight that oneDNN has laid out for itself; torch.compile's CPU backend uses the same two operators."""
    rows = x.view(-1, x.size(-1))
    n = rows.size(0)
    if n < 4:  # 4 rows are no slower than 1 (124M: 17 ms against 20), and few rows take kernels that round otherwise than those of many
        rows = F.pad(rows, (0, 0, 0, 4 - n))
    y = torch.ops.mkldnn._linear_pointwise.default(rows, weight, bias, 'none', [], '')
    return (y[:n] if n < 4 else y).view(*x.shape[:-1], -1)


GPT2_SIZES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')


def draw(logits, u, temperature=1.0, top_k=None, top_p=None):
    """
    One token a row from logits (B, V), by inverting the cumulative distribution at u (B, 1), uniform in [0, 1).
    The row's own u alone decides, whatever stands in the other rows. Returns ids (B, 1).
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    top_k = min(top_k or logits.size(-1), logits.size(-1))
    ids, ranked = None, top_p is not None and top_p < 1
    if ranked or top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)                                             # (B, K), descending
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)      # smaller ones are 0 in float32
    cdf = logits.softmax(-1).cumsum(-1)                                              # (B, K)
    mass = cdf[:, -1:]                                                               # (B, 1)
    if ranked:  # the tokens up to the first at which the distribution reaches top_p
        mass = cdf.gather(1, (cdf < top_p).sum(-1, keepdim=True).clamp(max=cdf.size(-1) - 1))
    choice = torch.searchsorted(cdf, u * mass, right=True).clamp(max=cdf.size(-1) - 1)  # (B, 1)
    return choice if ids is None else ids.gather(1, choice)


# -----------------------------------------------------------------------------
# checkpoints and tokenizers

def read_checkpoint(path):
    """ckpt.pt as a dict of plain values and CPU tensors. Nothing in the file is executed. Raises ValueError."""
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}: train first, or name the folder with --out_dir")
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # a damaged file fails in a dozen ways
        raise ValueError(f"cannot read {path}, truncated or not a checkpoint ({one_line(error)})") from error
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(key), dict) for key in ('model', 'model_args')):
        raise ValueError(f"{path} is no checkpoint of train.py: it lacks 'model' or 'model_args'")
    return checkpoint


def one_line(error):
    """What an exception says, shortened to a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class PlainUnpickler(pickle.Unpickler):
    """Admits containers, strings and numbers: a pickle can call any function by name, this one finds none."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_tokenizer(folder):
    """
    How the tokens in data/NAME were made, as a dict that a checkpoint can hold: meta.pkl -> kind 'char',
    tokenizer.json -> kind 'bpe', neither -> kind 'gpt2'. Raises ValueError.
    """
    meta, trained = Path(folder) / 'meta.pkl', Path(folder) / 'tokenizer.json'
    if meta.is_file():
        try:
            with open(meta, 'rb') as f:
                found = PlainUnpickler(f).load()
            return {'kind': 'char', **{key: found[key] for key in ('vocab_size', 'stoi', 'itos') if key in found}}
        except Exception as error:  # a damaged pickle fails in a dozen ways
            raise ValueError(f"cannot read {meta} ({one_line(error)}): it must hold a plain dict with vocab_size, stoi and itos") from error
    if trained.is_file():
        return {'kind': 'bpe', 'json': trained.read_text(encoding='utf-8')}
    return {'kind': 'gpt2'}


class Tokenizer:
    """
    encode(text) -> ids and decode(ids) -> text for one of read_tokenizer's dicts. `size` counts the ids
    in use, `start` is the id that begins an empty text, `end` the one that ends a document (None for characters).
    """

    def __init__(self, spec):
        self.kind = spec['kind']
        if self.kind == 'char':
            if not spec.keys() >= {'stoi', 'itos'}:
                raise ValueError("meta.pkl says how many tokens there are, but not how they read: it lacks stoi or itos")
            self.stoi, self.itos = spec['stoi'], spec['itos']
            self.size, self.end = len(self.itos), None
            self.start = self.stoi.get('\n', 0)
        elif self.kind == 'bpe':
            import tokenizers
            try:
                self.bpe = tokenizers.Tokenizer.from_str(spec['json'])
            except Exception as error:  # the library raises nothing more special
                raise ValueError(f"tokenizer.json is not one of the tokenizers library ({one_line(error)})") from error
            self.size = self.bpe.get_vocab_size()
            self.end = self.bpe.token_to_id('<|endoftext|>')
            self.start = self.end or 0
        else:
            import tiktoken
            try:
                self.bpe = tiktoken.get_encoding('gpt2')
            except OSError as error:
                raise ValueError("cannot download GPT-2's BPE files: where there is a network run python -c \"import tiktoken; "
                                 "tiktoken.get_encoding('gpt2')\" with TIKTOKEN_CACHE_DIR=FOLDER, then bring the folder here and set the same") from error
            self.size = self.bpe.n_vocab
            self.start = self.end = self.bpe.eot_token

    def encode(self, text):
        if self.kind == 'char':
            unknown = sorted(set(text) - self.stoi.keys())
            if unknown:
                raise ValueError(f"the model has never seen the character {unknown[0]!r}: its {self.size} characters are {''.join(self.stoi)!r}")
            return [self.stoi[c] for c in text]
        if self.kind == 'bpe':
            try:
                return self.bpe.encode(text).ids
            except Exception as error:  # of an alphabet that lacks a character
                raise ValueError(f"the model's tokenizer cannot read {text[:60]!r} ({one_line(error)})") from error
        return self.bpe.encode(text, allowed_special={'<|endoftext|>'})

    def decode(self, ids):
        if self.kind == 'char':
            return ''.join(self.itos[i] for i in ids)
        return self.bpe.decode(ids) if self.kind == 'gpt2' else self.bpe.decode(ids, skip_special_tokens=False)

    def for_transformers(self):
        """The same as a Tokenizer of the tokenizers library, which transformers opens. A character it does not know is an error there too."""
        if self.kind == 'bpe':
            return self.bpe
        if self.kind == 'char':
            from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
            characters = Tokenizer(models.WordLevel(self.stoi, unk_token=''))
            characters.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
            characters.decoder = decoders.Fuse()
            return characters
        from transformers.convert_slow_tokenizer import TikTokenConverter
        converter = TikTokenConverter(pattern=self.bpe._pat_str, extra_special_tokens=self.bpe._special_tokens)
        converter.load_tiktoken_bpe = lambda path: self.bpe._mergeable_ranks  # at hand already
        return converter.converted()


# -----------------------------------------------------------------------------
# the machine at hand

# Peak FLOP/s of dense bfloat16 or float16 products with float32 sums, from the vendor's data sheets
PEAK_FLOPS = {
    r'V100-SXM2': 125e12, r'V100-PCIE': 112e12, r'T4$': 65e12, r'A100': 312e12, r'L4$': 121e12, r'L40S$': 362e12,
    r'RTX 3090$': 71e12, r'RTX 4090$': 165.2e12, r'H100 PCIe$': 756e12, r'H100 NVL$': 835.5e12, r'H100 80GB HBM3$': 989.4e12,
    r'H200$': 989.4e12, r'H200 NVL$': 835.5e12, r'B200$': 2250e12,
}


def peak_flops_of(device, dtype):
    """Peak of a CUDA device in FLOP/s, None where it is not known for sure: other chips, slices of one, float32."""
    if torch.device(device).type != 'cuda' or dtype == 'float32':
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for chip, peak in PEAK_FLOPS.items() if re.search(rf'\b{chip}', name) and 'MIG' not in name), None)


def choose_device(device, dtype, local_rank=0):
    """
    Fills in what the user left None: cuda, else mps, else cpu; bfloat16 where CUDA has it, float16 on
    older CUDA, float32 elsewhere. Of several GPUs each local rank gets its own.
    Returns (device, dtype) as text. Raises ValueError for what this machine lacks.
    """
    have = {'cuda': torch.cuda.is_available() * torch.cuda.device_count(), 'mps': int(torch.backends.mps.is_available()), 'cpu': 1}
    kind, _, number = (device or next(kind for kind in have if have[kind])).partition(':')
    number = number or str(local_rank if kind == 'cuda' else 0)
    if kind not in have or not number.isdecimal():
        raise ValueError(f"device {device!r} is none of cuda, cuda:0, cuda:1 …, mps, cpu")
    device = f'cuda:{number}' if kind == 'cuda' else kind
    if int(number) >= have[kind]:
        raise ValueError(f"device {device!r}: PyTorch sees {have[kind]} {kind.upper()} devices here; --device=cpu runs anywhere")
    if dtype is None:
        has_bf16 = kind == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = 'float32' if kind != 'cuda' else 'bfloat16' if has_bf16 else 'float16'
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise ValueError(f"dtype {dtype!r} is none of float32, bfloat16, float16")
    return device, dtype


def compile_method(model, name, call, **how):
    """
    Compiles a method of the model in place and tries it by call(). Returns None, or where the compiler is missing or fails
    the line that says so, with the method eager again.
    """
    try:
        setattr(model, name, torch.compile(getattr(model, name), **how))
        call()
    except Exception as error:  # compilers and their absence have errors of many kinds, and eager is always a way on
        model.__dict__.pop(name, None)
        return f"torch.compile does not work here, running eager ({one_line(error)})"
