"""
GPT-2 (Radford et al. 2019, https://github.com/openai/gpt-2) in one file: the network, its loss, optimizers,
the KV cache and sampling, weights in and out, with nanoGPT's parameter names: checkpoints go both ways.

Letters in shapes: B batch, T time (tokens), C n_embd, H n_head, D = C / H, V vocab_size.
Errors that a user can cause are ValueErrors or OSErrors whose text is one line and says what to do.
"""

import json
import math
import os
import re
import sys
import zipfile
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint as recompute_in_backward

ACTIVATIONS = {'gelu': 'none', 'gelu_tanh': 'tanh'}  # our name -> F.gelu's `approximate`
# transformers' name -> ours; of several names for one function the first rounds as ours does
HF_ACTIVATIONS = {
    'gelu': 'gelu',
    'gelu_python': 'gelu',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'gelu_new': 'gelu_tanh',
    'gelu_fast': 'gelu_tanh',
    'gelu_accurate': 'gelu_tanh',
}
HF_TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # in transformers, as in OpenAI's files
GPT2_SIZES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')  # 124M, 350M, 774M, 1558M parameters
LOSS_CHUNK = 2**26  # logits in a chunk of the loss, twice 256 MiB in float32; on a GPU 4 times as many
PACKED = WeakKeyDictionary()  # of GPT.packed; not in the model, which is copied and saved without it
register_optimizer_step_post_hook(lambda *_: PACKED.clear())  # fused AdamW changes no weight's _version


@dataclass
class GPTConfig:
    """Shape of a GPT. Raises ValueError where the numbers cannot make a network."""

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64, which GPUs multiply faster
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and norms: True is GPT-2, False trains a little better
    activation: str = 'gelu'  # the exact erf form, or 'gelu_tanh', which GPT-2 was trained with

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}")


# ---------- the network ----------


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, pos=None, mask=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        if x.device.type == 'cpu':  # under autocast float32: decoding in bfloat16 takes CPUs 5 times as long
            qkv = qkv.to(x.dtype)
        q, k, v = qkv  # each (B, H, T, D)
        if cache is not None and pos is None:  # prefill: x is all there is
            cache[..., :T, :] = qkv[1:]
        elif cache is not None:  # decode: x behind the cache
            k, v = cache.index_copy_(3, pos, qkv[1:])  # (B, H, length, D)
        dropout = self.dropout if self.training else 0.0
        with torch.autocast('cpu', enabled=False):
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=pos is None)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate=ACTIVATIONS[config.activation])
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.gelu(self.c_fc(x))  # (B, T, 4C)
        return self.dropout(self.c_proj(x))  # (B, T, C)


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


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied: Press & Wolf 2017
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):  # 2 n_layer branches add up: keep the variance (GPT-2, 2.3)
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
        self.activation_checkpointing = False  # True: backward computes the blocks again (Chen et al. 2016)
        self.tokenizer_source = {'kind': 'gpt2'}  # a tokenizer_spec, or the folder of a data set

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def get_num_params(self, non_embedding=True):
        """Number of parameters; non_embedding leaves out wpe (wte stays in, it is also the output layer)."""
        return sum(p.numel() for p in self.parameters()) - non_embedding * self.transformer.wpe.weight.numel()

    def hidden(self, idx, cache=None, pos=None, mask=None):
        """The network up to its last norm: idx (B, T) token ids -> (B, T, C). lm_head makes logits of it.
        A cache from new_cache keeps keys and values. Without pos idx is read into an empty cache. With pos
        (T,) idx stands there, behind what the cache holds, and sees what mask (T, length) lets through."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size {self.config.block_size}")
        positions = torch.arange(T, device=idx.device) if pos is None else pos  # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for i, block in enumerate(self.transformer.h):
            inputs = x, None if cache is None else cache[i], pos, mask
            x = recompute_in_backward(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        return self.transformer.ln_f(x)  # (B, T, C)

    def forward(self, idx, targets=None, return_logits=True):
        """idx (B, T) -> logits of the last position (B, 1, V), None. With targets (B, T), -1 where there is
        none -> all logits (B, T, V), mean loss in nats (). return_logits=False gives None and the same loss.
        """
        x = self.hidden(idx)  # (B, T, C)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        if return_logits:
            logits = self.lm_head(x)  # (B, T, V)
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return None, ChunkedCrossEntropy.apply(
            x.flatten(0, 1),
            self.lm_head.weight,
            targets.flatten(),
            autocast_dtype(x),
            torch.is_grad_enabled(),
        )

    def crop_block_size(self, block_size):
        """Shortens the context for good, for example of GPT-2's 1024 tokens to what fits into memory."""
        if not 0 < block_size <= self.config.block_size:
            raise ValueError(f"block_size {block_size} is not within the model's {self.config.block_size}")
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())

    # ---------- training ----------

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, optimizer='adamw'):
        """'adamw' decays matrices and embeddings but no bias and no norm; with 'muon' Muon updates the
        matrices of the blocks."""
        if optimizer not in ('adamw', 'muon'):
            raise ValueError(f"optimizer must be adamw or muon, not {optimizer!r}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"beta1 and beta2 must be in [0, 1), not {betas[0]} and {betas[1]}")
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
            {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0},
        ]
        settings = dict(lr=learning_rate, betas=betas, fused=device_type in ('cuda', 'cpu', 'mps'))
        if optimizer == 'adamw':
            return torch.optim.AdamW(groups, **settings)
        parts = {
            p: 3 if name.endswith('c_attn.weight') else 1
            for name, p in self.transformer.h.named_parameters()
            if p.dim() == 2
        }
        groups[0]['params'] = [p for p in groups[0]['params'] if p not in parts]
        matrices = [
            {'params': [p for p in params if parts.get(p) == n], 'weight_decay': weight_decay, 'parts': n}
            for n in (3, 1)
        ]
        return Muon([*matrices, *groups], **settings)

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops=312e12):
        """Model FLOPs utilization: the share of peak_flops (FLOP/s, by default an A100's in bfloat16) used if
        fwdbwd_per_iter sequences of block_size tokens take dt seconds. None if no peak is known."""
        c = self.config
        flops_per_token = 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size  # PaLM, app. B
        return fwdbwd_per_iter * c.block_size / dt * flops_per_token / peak_flops if peak_flops else None

    # ---------- sampling ----------

    def for_sampling(self, device, dtype, pack=True):
        """Takes the model to `device` for sampling, no longer for training. Weights of products are cast to
        dtype once, except lm_head's: logits in bfloat16 would tie. pack: a CPU that multiplies dtype itself
        gets them in oneDNN's layout, three times as fast for 10 rows, and rows do not change each other."""
        self.eval().to(device)
        kind, packable = torch.device(device).type, (torch.float32, *[torch.bfloat16] * has_bfloat16('cpu'))
        pack = pack and kind == 'cpu' and dtype in packable and torch.backends.mkldnn.is_available()
        for module in self.modules():
            if type(module) is not nn.Linear or module.weight is None:
                continue
            if pack:
                weight = module.weight.detach().to(torch.float32 if module is self.lm_head else dtype)
                weight = torch.ops.mkldnn._reorder_linear_weight(weight, 16)  # for 16 rows
                module.forward = lambda x, w=weight, b=module.bias: packed_linear(x, w, b)
                module.weight = None  # not kept twice
            elif module is self.lm_head:
                module.forward = torch.autocast(kind, enabled=False)(module.forward)
            elif dtype != torch.float32:
                module.weight = nn.Parameter(module.weight.to(dtype))
                module.bias = None if module.bias is None else nn.Parameter(module.bias.to(dtype))
        return self

    def packed(self):
        """This model as for_sampling makes it on a CPU, kept until a weight changes; elsewhere the model."""
        weight = self.lm_head.weight
        patched = any(
            m._forward_hooks or m._forward_pre_hooks or {'forward', 'decode'} & vars(m).keys()
            for m in self.modules()
        )  # a copy would not do the same
        if patched or self.training or (weight.device.type, weight.dtype) != ('cpu', torch.float32):
            return self
        # a change through p.data alone is not seen
        state = (
            autocast_dtype(weight),
            [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.parameters()],
        )
        if PACKED.get(self, (None,))[0] != state:
            shared = deepcopy(self, {id(p): p for p in self.parameters()})  # new modules, the same weights
            PACKED[self] = state, shared.for_sampling('cpu', state[0])
        return PACKED[self][1]

    def new_cache(self, batch, length):
        """Empty keys and values of `length` tokens in `batch` rows: (2, B, H, length, D) per layer."""
        c, weight = self.config, self.transformer.wte.weight
        dtype = weight.dtype if weight.device.type == 'cpu' else autocast_dtype(weight)
        shape = 2, batch, c.n_head, length, c.n_embd // c.n_head
        return [torch.zeros(shape, device=weight.device, dtype=dtype) for _ in range(c.n_layer)]

    def decode(self, token, pos, cache, mask=None):
        """One step: token (B, 1) at position pos (1,), behind what the cache holds -> logits (B, V)."""
        return self.lm_head(self.hidden(token, cache, pos, mask)[:, -1])

    @torch.no_grad()
    def stream(
        self,
        idx,
        max_new_tokens,
        temperature=1.0,
        top_k=None,
        top_p=None,
        draws=None,
        vocab_size=None,
        cache=None,
        static=False,
    ):
        """Yields the next token of every row (B, 1), max_new_tokens times, after idx (B, T) or (1, T).

        temperature 0 takes the likeliest token; top_k keeps that many tokens (None or 0: all), top_p the
        fewest whose probability reaches it (Holtzman et al. 2020). draws (B, max_new_tokens) in [0, 1) is
        all the randomness. Ids from vocab_size on, which only pad the vocabulary, are left out. cache can be
        one from new_cache(B, min(block_size, T + max_new_tokens)). static: every step attends to all of the
        cache through a mask, so that no shape ever changes. Positions are absolute, so a window of block_size
        tokens voids the cache: its later half is read anew and grows from there."""
        draws = torch.rand(idx.size(0), max_new_tokens, device=idx.device) if draws is None else draws
        (B, T), block_size = (draws.size(0), idx.size(1)), self.config.block_size
        cache = cache or self.new_cache(B, min(block_size, T + max_new_tokens))
        positions = torch.arange(cache[0].size(-2), device=idx.device)  # (length,)
        tokens = torch.cat((idx.expand(B, T), idx.new_zeros(B, max_new_tokens)), 1)  # (B, T + max_new_tokens)
        unread, filled = idx[:, -block_size:], 0
        for t in range(T, T + max_new_tokens):
            if filled in (0, block_size):
                logits = self.lm_head(self.hidden(unread, cache)[:, -1])  # (B, V), or (1, V) for all rows
                filled = unread.size(1)
            else:
                pos, last = positions[filled : filled + 1], tokens[:, t - 1 : t]  # (1,), (B, 1)
                filled += 1
                read = cache if static else [kv[..., :filled, :] for kv in cache]
                logits = self.decode(last, pos, read, (positions <= pos)[None] if static else None)  # (B, V)
            logits = logits[:, :vocab_size].float().expand(B, -1)
            u = draws[:, t - T : t - T + 1]  # (B, 1)
            tokens[:, t : t + 1] = sample_next_token(logits, u, temperature, top_k, top_p)
            yield tokens[:, t : t + 1]
            unread = tokens[:, t + 1 - max(1, block_size // 2) : t + 1]  # for when the window is full

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **more):
        """idx (B, T) -> (B, T + max_new_tokens). Further arguments are those of stream. In eval mode on a CPU
        the first call copies the weights into a faster layout, and later calls take that."""
        new = [*self.packed().stream(idx, max_new_tokens, temperature, top_k, **more)]
        return torch.cat((idx.expand(new[0].size(0), -1), *new), dim=1) if new else idx

    # ---------- weights in and out ----------

    @classmethod
    def from_weights(cls, config, weights):
        """A model with copies of these tensors, in float32 and eval mode. Errors where they do not fit."""
        if config.n_layer > len(weights):  # before building takes its time
            raise ValueError(f"{config.n_layer} layers, but {len(weights)} weights")
        with NoInit():
            model = cls(config)
        model.load_state_dict(weights)
        return model.eval()

    @classmethod
    def from_checkpoint(cls, checkpoint, dropout=None):
        """The model of nanoGPT's or our train.py, on the CPU and in eval mode, from a folder with a ckpt.pt
        (or only a last.pt), from such a file, or from what read_checkpoint returned. Raises ValueError."""
        if not isinstance(checkpoint, dict):
            path = Path(checkpoint)
            if not path.is_file():
                path /= 'last.pt' if (path / 'last.pt').exists() > (path / 'ckpt.pt').exists() else 'ckpt.pt'
            checkpoint, last = read_checkpoint(path), path.with_name('last.pt')
            newer = f"; {last} is newer" if path.name == 'ckpt.pt' and last.exists() else ''
            if os.environ.get('RANK', '0') == '0':  # of torchrun's processes one speaks
                print(f"{path}: weights of iteration {checkpoint.get('iter_num')}{newer}", file=sys.stderr)
        try:
            args = {**checkpoint['model_args'], **({} if dropout is None else {'dropout': dropout})}
            # torch.compile prefixes the names; models before PyTorch 2 kept their causal masks as buffers
            weights = {
                name.removeprefix('_orig_mod.'): p
                for name, p in checkpoint['model'].items()
                if not name.endswith(('.attn.bias', '.attn.masked_bias'))
            }
            model = cls.from_weights(GPTConfig(**args), weights)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ValueError(f"the checkpoint does not fit this model.py: {one_line(error)}") from error
        # nanoGPT's checkpoints name their data set, ours hold the tokenizer itself
        dataset = checkpoint.get('config', {}).get('dataset') or 'NAME'
        model.tokenizer_source = checkpoint.get('tokenizer') or Path(__file__).parent / 'data' / dataset
        return model

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """A GPT-2 of transformers, one of GPT2_SIZES or a folder that save_pretrained wrote, or a checkpoint.
        The logits are transformers' own. override_args may hold a dropout. Eval mode. Raises ValueError."""
        override_args, folder, hub = override_args or {}, Path(model_type), model_type in GPT2_SIZES
        if override_args.keys() - {'dropout'}:
            raise ValueError(f"override_args takes dropout only, not {', '.join(override_args)}")
        if (folder / 'adapter_config.json').exists():
            raise ValueError(f"{folder} holds an adapter of peft: merge it first, with merge_and_unload()")
        if folder.is_file() or (folder / 'ckpt.pt').exists() or (folder / 'last.pt').exists():
            return cls.from_checkpoint(folder, **override_args)
        if not hub and not (folder / 'config.json').is_file():
            raise ValueError(
                f"init_from '{model_type}' is no folder with a checkpoint or a GPT-2 of "
                f"transformers, and no name such as resume, {', '.join(GPT2_SIZES)}"
            )
        from transformers import GPT2LMHeadModel, logging  # takes seconds to import, so only here

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            config = {} if hub else json.loads((folder / 'config.json').read_bytes())
            kind = (config.get('architectures') or [config.get('model_type') or 'gpt2'])[0]
            readable = kind in ('gpt2', 'GPT2Model', 'GPT2LMHeadModel')
            if readable:
                hf_model, info = GPT2LMHeadModel.from_pretrained(
                    f'openai-community/{model_type}' if hub else folder,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                )
        except Exception as error:  # many libraries speak here, each with errors of its own
            hint = "fetch it where there is a network, copy ~/.cache/huggingface" if hub else "is all there?"
            raise ValueError(f"cannot read GPT-2 from '{model_type}' ({one_line(error)}): {hint}") from error
        if not readable:
            raise ValueError(f"{folder} holds a {kind}: model.py builds GPT-2's language model only")
        wrong = {*info['missing_keys'], *(name for name, *_ in info['mismatched_keys'])} - {'lm_head.weight'}
        if wrong:  # transformers fills them with random numbers
            raise ValueError(f"{model_type} is not complete: {min(wrong)} is missing or of another shape")
        hf = hf_model.float().config
        for field, builds in {
            'activation_function': HF_ACTIVATIONS,
            'n_inner': (None, 4 * hf.n_embd),
            'layer_norm_epsilon': [1e-5],
            'scale_attn_weights': [True],
            'tie_word_embeddings': [True],
            'scale_attn_by_inverse_layer_idx': [False],
            'add_cross_attention': [False],
        }.items():
            if getattr(hf, field) not in builds:
                raise ValueError(
                    f"{folder}/config.json: {field} is {getattr(hf, field)!r}, and model.py "
                    f"builds {', '.join(map(str, builds))} only"
                )
        weights = {
            name: p.T.contiguous() if name.endswith(HF_TRANSPOSED) else p
            for name, p in hf_model.state_dict().items()
        }
        # save_pretrained leaves out the padding, and gives characters one token more
        vocab_size = config.get('checkpoint_vocab_size', {}).get(str(hf.vocab_size), hf.vocab_size)
        rows = resize_vocabulary(weights['lm_head.weight'], vocab_size)
        weights['lm_head.weight'] = weights['transformer.wte.weight'] = rows
        biases = [name for name in weights if name.endswith('.bias')]
        # save_pretrained writes zeros for biases that the model lacks; fine-tuning may have moved them
        bias = getattr(hf, 'bias', True) or any(weights[name].any() for name in biases)
        weights = {name: p for name, p in weights.items() if bias or name not in biases}
        model = cls.from_weights(
            GPTConfig(
                hf.n_positions,
                vocab_size,
                hf.n_layer,
                hf.n_head,
                hf.n_embd,
                bias=bias,
                activation=HF_ACTIVATIONS[hf.activation_function],
                **override_args,
            ),
            weights,
        )
        if (folder / 'tokenizer.json').exists() or vocab_size < 50257:
            model.tokenizer_source = folder
        return model

    def tokenizer(self):
        """The model's Tokenizer (data/tokenizer.py). Raises ValueError where its weights came without one."""
        from data.tokenizer import Tokenizer, read_tokenizer_spec  # here, so that model.py also works alone

        source, vocab_size = self.tokenizer_source, self.config.vocab_size
        spec = source if isinstance(source, dict) else read_tokenizer_spec(source)
        tokenizer = Tokenizer(spec) if spec['kind'] != 'gpt2' or vocab_size >= 50257 else None
        if tokenizer is None or tokenizer.vocab_size > vocab_size:
            where = "set model.tokenizer_source to its folder" if source is spec else f"put it into {source}"
            raise ValueError(f"{vocab_size} tokens, but no tokenizer.json or meta.pkl of that size: {where}")
        return tokenizer

    def save_pretrained(self, folder):
        """Writes the model and its tokenizer as a GPT-2 of transformers with the same logits. The vocabulary
        has no padding there; from_pretrained pads it again, with other values. Raises ValueError."""
        if self.lm_head.weight is not self.transformer.wte.weight:
            raise ValueError("lm_head and wte are not one weight; after for_sampling it is too late to save")
        forms = {getattr(getattr(block.mlp, 'gelu', 0), 'approximate', 0) for block in self.transformer.h}
        if len(forms) > 1 or 0 in forms:
            raise ValueError("an MLP has another activation than GELU: transformers' GPT-2 cannot compute it")
        from transformers import GPT2Config, GPT2LMHeadModel, logging

        logging.disable_progress_bar()
        from data.tokenizer import EOT

        c, tokenizer, folder = self.config, self.tokenizer(), Path(folder)
        hf_tokenizer = tokenizer.for_transformers()
        eot, vocab_size = hf_tokenizer.token_to_id(EOT), hf_tokenizer.get_vocab_size()
        hf_model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size,
                n_positions=c.block_size,
                n_ctx=c.block_size,
                n_layer=c.n_layer,
                n_head=c.n_head,
                n_embd=c.n_embd,
                bias=c.bias,
                attn_pdrop=c.dropout,
                embd_pdrop=c.dropout,
                resid_pdrop=c.dropout,
                bos_token_id=eot,
                eos_token_id=eot,
                activation_function='gelu' if 'none' in forms else 'gelu_pytorch_tanh',
                checkpoint_vocab_size={vocab_size: c.vocab_size},
            )
        )
        weights = {name: p.T if name.endswith(HF_TRANSPOSED) else p for name, p in self.state_dict().items()}
        rows = resize_vocabulary(weights['lm_head.weight'], vocab_size)
        weights['lm_head.weight'] = weights['transformer.wte.weight'] = rows
        hf_model.load_state_dict(weights, strict=c.bias)  # its biases are zero already
        # <|endoftext|>, which other tools need, is no token of characters
        hf_model.generation_config.suppress_tokens = [eot] if tokenizer.eot is None else None
        hf_model.save_pretrained(folder)
        for path in folder.glob('*.safetensors'):  # they have 0600, whatever the umask
            path.chmod((folder / 'config.json').stat().st_mode)
        hf_tokenizer.save(str(folder / 'tokenizer.json'))
        # transformers 5 would name a class of its own here, which 4 does not know
        special = dict.fromkeys(('bos_token', 'eos_token', 'unk_token', 'pad_token'), EOT)
        (folder / 'tokenizer_config.json').write_text(
            json.dumps(
                {
                    'tokenizer_class': 'PreTrainedTokenizerFast',
                    'model_max_length': c.block_size,
                    'clean_up_tokenization_spaces': False,
                    **special,
                },
                indent=2,
            )
            + '\n',
            encoding='utf-8',
        )


def resize_vocabulary(rows, n):
    """rows (V, C) cut to (n, C), or filled up with their mean, whose logit is never the largest."""
    return torch.cat((rows[:n], rows.mean(0, keepdim=True).expand(max(0, n - len(rows)), -1)))


class NoInit(torch.overrides.TorchFunctionMode):
    """Skips the functions of torch.nn.init, two seconds for 124M weights, where other weights follow."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, '__module__', None) == 'torch.nn.init':
            return args[0] if args else kwargs['tensor']
        return func(*args, **kwargs or {})


# ---------- the loss, Muon, sampling ----------


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits x @ weight.T, which are never held as a whole: of GPT-2 they would be
    the largest tensor of training. Each chunk of rows yields its loss and its gradients while its logits are
    still there; backward only scales them.

    x (N, C), weight (V, C), targets (N,) with -1 for positions that do not count -> loss (), float32 or
    wider. dtype is that of the products, with_grad tells whether gradients will be needed."""

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, with_grad):
        N, V = x.size(0), weight.size(0)
        rows = math.ceil(N / math.ceil(N * V / (LOSS_CHUNK if x.device.type == 'cpu' else 4 * LOSS_CHUNK)))
        wide = torch.promote_types(dtype, torch.float32)
        # float16: the sums over thousands of rows in grad_w would overflow, and no GradScaler sees them here
        shrink = 1 / 16 if dtype == torch.float16 else 1.0
        total = torch.zeros((), dtype=wide, device=x.device)
        counted = targets != -1  # (N,)
        if with_grad:
            grad_x = torch.empty_like(x, dtype=dtype)
            grad_w = torch.zeros_like(weight, dtype=wide)
        with torch.autocast(x.device.type, enabled=False):
            w = weight.to(dtype)
            for i in range(0, N, rows):
                xc, keep = x[i : i + rows].to(dtype), counted[i : i + rows]  # (n, C), (n,)
                target = targets[i : i + rows].where(keep, 0)[:, None]  # (n, 1)
                log_p = (xc @ w.T).to(wide).log_softmax(-1)  # (n, V)
                total -= (log_p.gather(1, target)[:, 0] * keep).sum()
                if with_grad:  # d loss / d logits = softmax - one_hot, and zero where nothing counts
                    d = log_p.exp_()  # (n, V)
                    if torch.compiler.is_compiling():  # Inductor fuses this with exp, but not scatter_add_
                        d -= (torch.arange(V, device=d.device) == target).to(wide)
                    else:
                        d.scatter_add_(1, target, d.new_full(target.shape, -1))
                    d, keep = d.to(dtype), keep[:, None].to(dtype)  # (n, V), (n, 1)
                    grad_x[i : i + rows] = (d @ w) * keep
                    grad_w += d.T @ (xc * (keep * shrink))
        count = counted.sum().clamp(min=1)
        if with_grad:
            ctx.save_for_backward(grad_x, grad_w, count)
            ctx.dtypes, ctx.shrink = (x.dtype, weight.dtype), shrink
        return total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        grad_x, grad_w, count = ctx.saved_tensors
        scale = grad_loss / count
        grad_w = grad_w * (scale / ctx.shrink)
        return grad_x.to(ctx.dtypes[0]) * scale, grad_w.to(ctx.dtypes[1]), None, None, None


class Muon(torch.optim.AdamW):
    """Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) for groups with `parts`, AdamW for the
    others. A matrix moves along the orthogonal factor of its momentum, as far in weak directions as in strong
    ones. The step has the size of AdamW's, so that both share one learning rate and weight decay (Liu et al.
    2025, arXiv:2502.16982). A parameter stacks `parts` matrices: c_attn three."""

    MOMENTUM = 0.95
    # Quintics a x + b x^3 + c x^5, each the nearest to 1 on the range that the one before maps [0.002, 1] to
    # (Polar Express, Amsel et al. 2025, arXiv:2505.16932), with 2 % of room: bfloat16 explodes without.
    QUINTICS = (
        (8.0925, -22.1470, 15.6075),
        (3.9801, -2.7677, 0.4956),
        (3.6855, -2.6515, 0.4964),
        (2.8199, -2.0352, 0.4319),
        (2.0068, -1.3610, 0.3665),
    )

    def __init__(self, groups, **settings):
        super().__init__(groups, **settings)
        # fused AdamW skips a step with infinite gradients by itself; here the GradScaler has to
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        by_shape = {}  # shape -> all matrices of it
        for group in self.param_groups:
            for p in (p for p in group['params'] if group.get('parts') and p.grad is not None):
                state = self.state[p]
                if not state:  # AdamW looks for a step when it is loaded
                    state.update(momentum=torch.zeros_like(p), step=torch.zeros((), device=p.device))
                momentum = state['momentum'].lerp_(p.grad, 1 - self.MOMENTUM)
                update = p.grad.lerp(momentum, self.MOMENTUM)  # Nesterov
                p.grad = None  # so that AdamW passes it by
                p.mul_(1 - group['lr'] * group['weight_decay'])
                for w, u in zip(p.chunk(group['parts']), update.chunk(group['parts']), strict=True):
                    if w.size(0) > w.size(1):
                        w, u = w.mT, u.mT  # (n, m), n <= m
                    by_shape.setdefault((*w.shape, group['lr']), []).append((w, u))
        for (_, m, lr), matrices in by_shape.items():
            weights, updates = zip(*matrices, strict=True)
            updates = torch.stack(updates)  # (k, n, m)
            if has_bfloat16(updates.device.type):
                updates = updates.bfloat16()  # precise enough, elsewhere slow
            for w, u in zip(weights, self.orthogonal(updates), strict=True):
                w.add_(u, alpha=-lr * 0.2 * math.sqrt(m))  # 0.2 is about AdamW's RMS
        super().step()
        return loss

    @classmethod
    def orthogonal(cls, x):
        """The orthogonal factors U V' of matrices U S V' (k, n, m), n <= m, to 3 %, by matrix products."""
        x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-30)  # no under- or overflow below
        gram = x @ x.mT  # (k, n, n)
        # no singular value is larger than the root of this norm; 1e-3 is for matrices of zeros
        size = torch.linalg.matrix_norm(gram, keepdim=True).sqrt().clamp(min=1e-3)  # (k, 1, 1)
        x, gram = x / size, gram / size**2
        for i, (a, b, c) in enumerate(cls.QUINTICS):
            gram = x @ x.mT if i else gram
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # (k, n, m)
        return x


def autocast_dtype(x):
    """The dtype of products with the tensor x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def packed_linear(x, weight, bias):
    """nn.Linear with a weight in oneDNN's own layout, by the operator that torch.compile uses on CPUs."""
    rows = x.reshape(-1, x.size(-1)).to(weight.dtype)
    n = rows.size(0)
    # 4 rows are no slower than 1 (124M: 17 ms against 20), and fewer take kernels that round in another way
    if n < 4:
        rows = F.pad(rows, (0, 0, 0, 4 - n))
    y = torch.ops.mkldnn._linear_pointwise.default(rows, weight, bias, 'none', [], '')
    return y[:n].view(*x.shape[:-1], y.size(-1))


def sample_next_token(logits, u, temperature=1.0, top_k=None, top_p=None):
    """One token a row from logits (B, V), by inverting the cumulative distribution at u (B, 1), uniform in
    [0, 1). A row's token depends on its own u alone, whatever stands in the other rows. Returns ids (B, 1).
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    top_k = min(top_k or logits.size(-1), logits.size(-1))
    ids, use_top_p = None, top_p is not None and top_p < 1
    if use_top_p or top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)  # (B, K), descending
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # less is 0 in float32
    cdf = logits.softmax(-1).cumsum(-1)  # (B, K)
    mass = cdf[:, -1:]  # (B, 1)
    if use_top_p:  # the tokens up to the first at which the distribution reaches top_p
        last = (cdf < top_p).sum(-1, keepdim=True).clamp(max=cdf.size(-1) - 1)  # (B, 1)
        mass = cdf.gather(1, last)
    choice = torch.searchsorted(cdf, u * mass, right=True).clamp(max=cdf.size(-1) - 1)  # (B, 1)
    return choice if ids is None else ids.gather(1, choice)


# ---------- checkpoints and the machine at hand ----------

CHECKPOINT_TYPES = {
    'model': dict,
    'model_args': dict,
    'optimizer': dict,
    'config': dict,
    'tokenizer': dict,
    'scaler': dict,
    'iter_num': int,
    'rewinds': int,
    'metrics_bytes': int,
    'tokens': int,
}


def read_checkpoint(path, needed=()):
    """ckpt.pt as a dict of plain values and CPU tensors. Executes nothing in the file. Raises ValueError."""
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}: train first, or name the folder with --out_dir")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        checkpoint = {key: value for key, value in checkpoint.items() if value is not None}
        for key, kind in CHECKPOINT_TYPES.items():
            value = checkpoint.get(key, None if key in ('model', 'model_args', *needed) else kind())
            if not isinstance(value, kind) or kind is int and value < 0:
                raise TypeError(f"it lacks {key!r}, or has {value!r:.40} there")
        checkpoint['best_val_loss'] = float(checkpoint.get('best_val_loss', math.inf))  # nanoGPT: a tensor
        weights = checkpoint['model'].values()
        if sum(p.nbytes for p in weights) > 2 * os.path.getsize(path) or any(p.is_complex() for p in weights):
            raise ValueError("weights that are complex, or views of a few numbers")
    except Exception as error:  # a damaged file fails in a dozen ways
        raise ValueError(f"cannot read {path}, damaged or not a checkpoint ({one_line(error)})") from error
    return checkpoint


def one_line(error):
    """What an exception says, shortened to a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# Peak FLOP/s of dense bfloat16 or float16 products with float32 sums, from the vendor's data sheets
PEAK_FLOPS = {
    r'V100-SXM2': 125e12,
    r'V100-PCIE': 112e12,
    r'T4$': 65e12,
    r'A100': 312e12,
    r'L4$': 121e12,
    r'L40S$': 362e12,
    r'RTX 3090$': 71e12,
    r'RTX 4090$': 165.2e12,
    r'B200$': 2250e12,
    r'H100 PCIe$': 756e12,
    r'H100 NVL$': 835.5e12,
    r'H100 80GB HBM3$': 989.4e12,
    r'H200$': 989.4e12,
    r'H200 NVL$': 835.5e12,
}


def peak_flops_of(device, dtype):
    """Peak of a CUDA device in FLOP/s; None where unknown: other chips, slices of one, float32."""
    known = torch.device(device).type == 'cuda' and dtype != 'float32'
    name = torch.cuda.get_device_name(device) if known else ''
    return next(
        (peak for chip, peak in PEAK_FLOPS.items() if re.search(rf'\b{chip}', name) and 'MIG' not in name),
        None,
    )


def has_bfloat16(kind):
    """Whether 'cuda' or 'cpu' multiplies bfloat16 in hardware; of CPUs those with AVX512-BF16 or AMX."""
    if kind == 'cpu':
        return torch.cpu._is_avx512_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return kind == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)


def choose_device(device, dtype, local_rank=0):
    """Fills in what the user left None: cuda, else mps, else cpu; bfloat16 where the hardware has it, float16
    on older CUDA, float32 elsewhere. Each local rank gets its own GPU. Returns texts. Raises ValueError."""
    count = {
        'cuda': torch.cuda.is_available() * torch.cuda.device_count(),
        'mps': int(torch.backends.mps.is_available()),
        'cpu': 1,
    }
    kind, _, number = (device or next(kind for kind in count if count[kind])).partition(':')
    number = number or str(local_rank if kind == 'cuda' else 0)
    if kind not in count or not number.isdecimal():
        raise ValueError(f"device {device!r} is none of cuda, cuda:0, cuda:1 …, mps, cpu")
    device = f'cuda:{number}' if kind == 'cuda' else kind
    if int(number) >= count[kind]:
        raise ValueError(f"device {device!r}: PyTorch finds {count[kind]} here; --device=cpu runs anywhere")
    if dtype is None:
        dtype = 'bfloat16' if has_bfloat16(kind) else 'float16' if kind == 'cuda' else 'float32'
    return device, dtype


def compile_method(model, name, call, **options):
    """Compiles a method in place and tries it by call(). Returns None, or the line why it is eager again."""
    try:
        setattr(model, name, torch.compile(getattr(model, name), **options))
        call()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing or failing compiler has errors of many kinds; eager always works
        model.__dict__.pop(name, None)
        return f"torch.compile does not work here, running eager ({one_line(error)})"
