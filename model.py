"""
GPT-2 (Radford et al. 2019, https://github.com/openai/gpt-2) in one file: the network, its loss, its
optimizers, sampling with a KV cache, and reading and writing weights. Parameters have nanoGPT's names, so
that checkpoints go both ways.

Letters in shapes: B batch, T time (tokens), C n_embd, H n_head, D = C / H, V vocab_size.
"""

import json
import math
import os
import re
import shlex
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute_in_backward

# The loss makes this many logits at a time: 256 MiB in float32, and their log_softmax as much again. On a GPU
# it makes four times as many.
LOSS_CHUNK = 2**26

# Each activation, and what torch.nn.GELU calls it.
ACTIVATIONS = {'gelu': 'none', 'gelu_tanh': 'tanh'}

# GPT-2's sizes on the Hugging Face hub have 124M, 350M, 774M and 1558M parameters.
GPT2_SIZES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')

# transformers has six names for our two activations. Where one has several, the first rounds as ours does.
HF_ACTIVATIONS = {
    'gelu': 'gelu',
    'gelu_python': 'gelu',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'gelu_new': 'gelu_tanh',
    'gelu_fast': 'gelu_tanh',
    'gelu_accurate': 'gelu_tanh',
}

# transformers keeps these weights transposed, as OpenAI's files do.
HF_TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')

MISFIT = "the checkpoint does not fit this model.py"


class UserError(ValueError):
    """A mistake of the user. Its text is one line that says what to do."""


def one_line(error):
    """The type and the message of an exception, shortened to one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@dataclass
class GPTConfig:
    """The shape of a GPT. Raises UserError where its numbers cannot make a network."""

    block_size: int = 1024  # the longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64, which GPUs multiply faster
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and norms: GPT-2 has them, without them it trains a little better
    activation: str = 'gelu'  # the exact erf form, or 'gelu_tanh', which GPT-2 was trained with

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}")

    def model_args(self):
        """The shape as a checkpoint holds it. nanoGPT accepts no more than its own seven fields, so another
        one is only there if it is not at its default."""
        nanogpt = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
        args = {}
        for name, value in vars(self).items():
            if name in nanogpt or value != getattr(type(self), name):
                args[name] = value
        return args


# ---------- the network ----------


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, pos=None, mask=None):
        """x (B, T, C) -> (B, T, C). cache (2, B, H, length, D) holds the keys and values of up to `length`
        tokens, or is None. pos (T,) are the positions of x in it, None if x begins the text. mask (T, length)
        tells what each token sees. One row of x may fill a cache of B rows."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)

        # Autocast may have made bfloat16 of it. x is float32, as the norm leaves it, and so is attention on a
        # CPU: in bfloat16 it would take five times as long, with one query and in short backward passes.
        if x.device.type == 'cpu':
            qkv = qkv.to(x.dtype)
        q, k, v = qkv  # (B, H, T, D) each

        if cache is not None:
            if pos is None:  # x is the beginning of the text
                cache[..., :T, :] = qkv[1:]
            else:  # x stands behind what the cache holds
                k, v = cache.index_copy_(3, pos, qkv[1:])  # (B, H, length, D) each

        dropout = self.dropout if self.training else 0.0
        with torch.autocast('cpu', enabled=False):
            # With pos, the mask decides what is seen.
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
        x = x + self.attn(self.ln_1(x), cache, pos, mask)  # GPT-2 moved the norms before the branches
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

        # Every layer adds two branches to the residual stream. Smaller weights at their ends keep its
        # variance independent of the number of layers (GPT-2's paper, section 2.3).
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))

        # If it is set, backward computes the blocks again instead of keeping their inside (Chen et al. 2016).
        self.activation_checkpointing = False
        # tokenizer() is built from this: the spec of a tokenizer, or the folder of a data set.
        self.tokenizer_source = {'kind': 'gpt2'}
        # What a checkpoint tells of its training, for the model card of an export.
        self.origin = "Data and loss: unknown."
        # How the documents it was trained on were made of fields, such as "Question: {question}\nAnswer:
        # {answer}". None if they were plain text.
        self.template = None

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def get_num_params(self, non_embedding=True):
        """The number of parameters. non_embedding leaves out wpe, the embedding of positions; that of tokens
        counts, because it is the output layer as well."""
        count = sum(p.numel() for p in self.parameters())
        if non_embedding and 'wpe' in self.transformer:
            count -= self.transformer.wpe.weight.numel()
        return count

    def hidden(self, idx, cache=None, pos=None, mask=None):
        """The network up to its last norm: token ids idx (B, T) -> (B, T, C), of which lm_head makes logits.

        A cache of new_cache keeps the keys and values. Without pos, the tokens are the beginning of a text,
        and fill the cache from its first position on. With pos (T,), they stand at these positions, behind
        what the cache holds, and mask (T, length) says which positions each of them sees: without it, all."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise UserError(f"{T} tokens do not fit into block_size {self.config.block_size}")

        positions = torch.arange(T, device=idx.device) if pos is None else pos  # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)

        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for i, block in enumerate(self.transformer.h):
            kv = None if cache is None else cache[i]  # (2, B, H, length, D)
            if recompute:
                x = recompute_in_backward(block, x, kv, pos, mask, use_reentrant=False)
            else:
                x = block(x, kv, pos, mask)
        return self.transformer.ln_f(x)  # (B, T, C)

    def forward(self, idx, targets=None, return_logits=True):
        """Without targets: idx (B, T) -> the logits of the last position (B, 1, V), None.
        With targets (B, T), -1 where nothing counts: -> all logits (B, T, V), the mean loss in nats.
        With return_logits=False as well: -> None, the same loss, in much less memory."""
        x = self.hidden(idx)  # (B, T, C)
        if targets is None:
            return self.lm_head(x[:, -1:]), None

        if return_logits:
            logits = self.lm_head(x)  # (B, T, V)
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

        x, targets, weight = x.flatten(0, 1), targets.flatten(), self.lm_head.weight
        return None, ChunkedCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled())

    def crop_block_size(self, block_size):
        """Shortens the context for good, for example from GPT-2's 1024 tokens to what fits into memory."""
        if not 0 < block_size <= self.config.block_size:
            raise UserError(f"block_size {block_size} is not within the model's {self.config.block_size}")
        self.config.block_size = block_size
        if 'wpe' in self.transformer:
            wpe = self.transformer.wpe
            wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())

    # ---------- training ----------

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, optimizer='adamw'):
        """AdamW, which decays matrices and embeddings but no bias and no norm. With optimizer='muon' the
        matrices of the blocks are left to Muon."""
        if optimizer not in ('adamw', 'muon'):
            raise UserError(f"optimizer must be adamw or muon, not {optimizer!r}")
        if not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"beta1 and beta2 must be in [0, 1), not {betas[0]} and {betas[1]}")
        settings = dict(lr=learning_rate, betas=betas, fused=device_type in ('cuda', 'cpu', 'mps'))

        c_attn, matrices, decayed, vectors = [], [], [], []
        for name, p in self.named_parameters():
            if not p.requires_grad:
                continue
            in_block = name.startswith('transformer.h.')
            if p.dim() < 2:
                vectors.append(p)
            elif optimizer == 'adamw' or not in_block:
                decayed.append(p)
            elif name.endswith('c_attn.weight'):
                c_attn.append(p)
            else:
                matrices.append(p)

        groups = [
            {'params': decayed, 'weight_decay': weight_decay},
            {'params': vectors, 'weight_decay': 0.0},
        ]
        if optimizer == 'adamw':
            return torch.optim.AdamW(groups, **settings)
        # The weight of c_attn stacks three matrices, those of query, key and value.
        muon_groups = [
            {'params': c_attn, 'weight_decay': weight_decay, 'parts': 3},
            {'params': matrices, 'weight_decay': weight_decay, 'parts': 1},
        ]
        return Muon(muon_groups + groups, **settings)

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops=312e12):
        """Model FLOPs utilization: the share of peak_flops (FLOP/s, by default an A100's in bfloat16) that is
        used if fwdbwd_per_iter sequences of block_size tokens take dt seconds. None if no peak is known."""
        if not peak_flops:
            return None
        c = self.config
        flops_per_token = 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size  # PaLM, app. B
        return fwdbwd_per_iter * c.block_size / dt * flops_per_token / peak_flops

    # ---------- sampling ----------

    def for_sampling(self, device, dtype, pack=True):
        """Moves the model to `device` and replaces its linear layers by faster modules. After that it can
        neither be trained nor saved. Raises UserError if dtype is none of torch's.

                             float32        float16        bfloat16
            CPU with pack    PackedLinear   PackedLinear   HalfLinear, lm_head PackedLinear
            all else         nn.Linear      HalfLinear     HalfLinear

        In "all else" lm_head stays an nn.Linear, because logits in a half precision would tie."""
        if not isinstance(dtype, torch.dtype):
            raise UserError(f"for_sampling takes a dtype such as torch.float16, not {dtype!r}")
        self.eval().to(device)
        on_cpu = torch.device(device).type == 'cpu' and torch.backends.mkldnn.is_available()
        names = [name for name, module in self.named_modules() if type(module) is nn.Linear]

        def replace(name):
            linear = self.get_submodule(name)
            is_head = linear is self.lm_head
            if pack and on_cpu and (is_head or dtype != torch.bfloat16):
                self.set_submodule(name, PackedLinear(linear, dtype))
            elif dtype != torch.float32 and not is_head:
                self.set_submodule(name, HalfLinear(linear, dtype))

        if pack and on_cpu:
            with ThreadPoolExecutor() as pool:  # on one thread FBGEMM packs no more than 85M numbers a second
                list(pool.map(replace, names))
        else:
            for name in names:
                replace(name)
        return self.requires_grad_(False)

    def new_cache(self, batch, length):
        """Empty keys and values of `length` tokens in `batch` rows: (2, B, H, length, D) per layer."""
        c = self.config
        weight = self.transformer.wte.weight
        dtype = weight.dtype  # of attention on a CPU; elsewhere it is that of c_attn's products
        if weight.device.type != 'cpu':
            dtype = autocast_dtype(self.transformer.h[0].attn.c_attn.weight)
        shape = (2, batch, c.n_head, length, c.n_embd // c.n_head)
        return [torch.zeros(shape, device=weight.device, dtype=dtype) for _ in range(c.n_layer)]

    def prefill(self, idx, cache):
        """Reads the beginning of a text, idx (B, T), into an empty cache -> the next logits (B, V)."""
        return self.lm_head(self.hidden(idx, cache)[:, -1])

    def decode(self, tokens, pos, cache):
        """Reads tokens (B, T) at positions pos (T,), one behind the other and behind what the cache holds ->
        the next logits (B, V)."""
        eager_cpu = tokens.device.type == 'cpu' and not torch.compiler.is_compiling()
        if eager_cpu:
            # The part of the cache that is still empty is left out. A GPU or compiled code would have to
            # prepare for every new shape.
            end = int(pos[-1]) + 1
            cache = [kv[..., :end, :] for kv in cache]
        mask = None
        if not eager_cpu or tokens.size(1) > 1:  # where something in the cache is not to be seen
            mask = torch.arange(cache[0].size(-2), device=pos.device) <= pos[:, None]  # (T, length)
        return self.lm_head(self.hidden(tokens, cache, pos, mask)[:, -1])

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
    ):
        """Yields the next token of every row (B, 1), max_new_tokens times, after idx (B, T) or (1, T).

        temperature 0 takes the likeliest token; top_k keeps that many tokens (None or 0: all), top_p the
        fewest whose probability reaches it (Holtzman et al. 2020). draws (B, max_new_tokens) in [0, 1) is
        all the randomness, and says how many rows there are. Ids from vocab_size on, which only pad the
        vocabulary, are left out. cache can be one from new_cache(B, length), where length is at least
        min(block_size, T + max_new_tokens)."""
        if draws is None:
            draws = torch.rand(idx.size(0), max_new_tokens, device=idx.device)
        B, T = draws.size(0), idx.size(1)
        block_size = self.config.block_size
        cache = cache or self.new_cache(B, min(block_size, T + max_new_tokens))
        positions = torch.arange(block_size, device=idx.device)
        tokens = torch.cat((idx.expand(B, T), idx.new_zeros(B, max_new_tokens)), 1)  # (B, T + max_new_tokens)

        # Token t - 1 is the newest, at position t - 1 - first. The last position is block_size - 1, so the
        # window is full once t - first is greater than block_size.
        first = max(0, T - block_size)  # the index of the token that stands at position 0
        for t in range(T, T + max_new_tokens):
            if t == T:
                logits = self.prefill(idx[:, first:], cache)  # (B, V), or (1, V) for all rows
            elif t - first <= block_size:
                pos = positions[t - 1 - first : t - first]  # (1,)
                logits = self.decode(tokens[:, t - 1 : t], pos, cache)  # (B, V)
            else:
                # The window is full. Positions are absolute, so every shift of the window makes the cache
                # useless: it moves on by half its size, and that half is read anew.
                first = t - max(1, block_size // 2)
                logits = self.prefill(tokens[:, first:t], cache)  # (B, V)

            logits = logits[:, :vocab_size].float().expand(B, -1)
            u = draws[:, t - T : t - T + 1]  # (B, 1)
            tokens[:, t : t + 1] = sample_next_token(logits, u, temperature, top_k, top_p)
            yield tokens[:, t : t + 1]

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **more):
        """idx (B, T) -> (B, T + max_new_tokens). Further arguments are those of stream."""
        new = list(self.stream(idx, max_new_tokens, temperature, top_k, **more))
        if not new:
            return idx
        return torch.cat((idx.expand(new[0].size(0), -1), *new), dim=1)

    # ---------- weights in and out ----------

    @classmethod
    def from_weights(cls, config, weights):
        """A model with copies of these tensors, in float32 and eval mode. Raises UserError where they do not
        fit."""
        if config.n_layer > len(weights):  # a damaged file may ask for a million layers
            raise UserError(f"{MISFIT}: {config.n_layer} layers, but {len(weights)} weights")
        with NoInit():
            model = cls(config)

        needed = {f"{name} {tuple(p.shape)}" for name, p in model.state_dict().items()}
        found = {f"{name} {tuple(p.shape)}" for name, p in weights.items()}
        if needed != found:
            missing, others = sorted(needed - found), sorted(found - needed)
            raise UserError(
                f"{MISFIT}: it lacks {len(missing)} tensors ({', '.join(missing[:4])}) "
                f"and has {len(others)} others ({', '.join(others[:4])})"
            )

        model.load_state_dict(weights)
        return model.eval()

    @classmethod
    def from_checkpoint(cls, checkpoint, dropout=None):
        """The model of nanoGPT's or our train.py, on the CPU and in eval mode, from a folder with a ckpt.pt
        (or only a last.pt), from such a file, or from what read_checkpoint returned. Raises UserError."""
        if not isinstance(checkpoint, dict):
            path = Path(checkpoint)
            if not path.is_file():
                path = path / 'ckpt.pt'
            last = path.with_name('last.pt')
            if last.exists() and not path.exists():
                path = last
            checkpoint = read_checkpoint(path)

            # ckpt.pt is the newest evaluated model, or the best one. last.pt exists only while it is newer.
            newer = f"; {last} is newer" if path.name == 'ckpt.pt' and last.exists() else ''
            if os.environ.get('RANK', '0') == '0':  # one of torchrun's processes speaks
                print(f"{path}: weights of iteration {checkpoint.get('iter_num')}{newer}", file=sys.stderr)

        args = dict(checkpoint['model_args'])
        if dropout is not None:
            args['dropout'] = dropout
        try:
            # torch.compile prefixes names. Old models of nanoGPT keep their causal masks as buffers.
            weights = {
                name.removeprefix('_orig_mod.'): p
                for name, p in checkpoint['model'].items()
                if not name.endswith(('.attn.bias', '.attn.masked_bias'))
            }
            model = cls.from_weights(GPTConfig(**args), weights)
        except (TypeError, RuntimeError, AttributeError) as error:  # a field or a value of another kind
            raise UserError(f"{MISFIT}: {one_line(error)}") from error

        # Our checkpoints hold the tokenizer, nanoGPT's the name of the data set. Without either, tokenizer()
        # finds nothing in data/NAME: then it is GPT-2's, or an error that names this folder.
        dataset = checkpoint.get('config', {}).get('dataset') or 'NAME'
        model.tokenizer_source = checkpoint.get('tokenizer') or Path(__file__).parent / 'data' / dataset
        model.template = checkpoint.get('template')
        model.origin = (
            f"Data: {dataset}. {checkpoint.get('iter_num')} iterations, best validation loss "
            f"{float(checkpoint.get('best_val_loss', math.nan)):.4f} nats a token."
        )
        return model

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """A GPT-2 of transformers, one of GPT2_SIZES or a folder that save_pretrained wrote, or a checkpoint.
        The logits are transformers' own. override_args may hold a dropout. Eval mode. Raises UserError."""
        override_args = override_args or {}
        folder = Path(model_type).expanduser()
        if override_args.keys() - {'dropout'}:
            raise UserError(f"override_args takes dropout only, not {', '.join(override_args)}")
        if (folder / 'adapter_config.json').exists():
            raise UserError(f"{folder} holds an adapter of peft: merge it first, with merge_and_unload()")
        if folder.is_file() or (folder / 'ckpt.pt').exists() or (folder / 'last.pt').exists():
            return cls.from_checkpoint(folder, **override_args)
        hf_model = read_hf_gpt2(model_type)

        # transformers builds many variants of GPT-2. This one has these values in its config.
        hf = hf_model.config
        for field, built in {
            'activation_function': tuple(HF_ACTIVATIONS),
            'n_inner': (None, 4 * hf.n_embd),
            'layer_norm_epsilon': (1e-5,),
            'scale_attn_weights': (True,),
            'tie_word_embeddings': (True,),
            'scale_attn_by_inverse_layer_idx': (False,),
            'add_cross_attention': (False,),
        }.items():
            value = getattr(hf, field)
            if value not in built:
                only = ', '.join(map(str, built))
                raise UserError(
                    f"{folder}/config.json: {field} is {value!r}, and model.py builds {only} only"
                )

        # save_pretrained writes another vocabulary than ours: without padding, and with <|endoftext|> for
        # characters. It notes ours in the config, as {size that it writes: our size}, so that the note does
        # not hold any more once another tool has resized the vocabulary. In JSON the key is a text.
        noted = getattr(hf, 'checkpoint_vocab_size', {})
        vocab_size = noted.get(str(hf.vocab_size), hf.vocab_size)
        weights = convert_hf(hf_model.state_dict(), vocab_size)

        # It also notes if the model has no biases, and writes zeros. Fine-tuning may have moved these.
        biases = [name for name in weights if name.endswith('.bias')]
        bias = getattr(hf, 'bias', True) or any(weights[name].any() for name in biases)
        if not bias:
            weights = {name: p for name, p in weights.items() if name not in biases}

        config = GPTConfig(
            block_size=hf.n_positions,
            vocab_size=vocab_size,
            n_layer=hf.n_layer,
            n_head=hf.n_head,
            n_embd=hf.n_embd,
            bias=bias,
            activation=HF_ACTIVATIONS[hf.activation_function],
            **override_args,
        )
        model = cls.from_weights(config, weights)
        model.template = getattr(hf, 'template', None)
        if model_type not in GPT2_SIZES:
            model.tokenizer_source = folder
        return model

    def tokenizer_spec(self):
        """The spec of the model's Tokenizer (data/tokenizer.py). Raises UserError where its weights came
        without one that fits."""
        from data.tokenizer import Tokenizer, read_tokenizer_spec  # here, so that model.py also works alone

        spec = self.tokenizer_source
        where = "set model.tokenizer_source to its folder"
        if not isinstance(spec, dict):
            where = f"put it into {spec}"
            spec = read_tokenizer_spec(spec)

        # GPT-2's tokenizer is assumed where there is no file, but it may be too large for the model. Its size
        # is known without its files.
        tokens = 50257 if spec['kind'] == 'gpt2' else Tokenizer(spec).vocab_size
        vocab_size = self.config.vocab_size
        if tokens > vocab_size:
            raise UserError(
                f"{vocab_size} tokens, but no tokenizer.json or meta.pkl of that size "
                f"(the one of kind {spec['kind']} has {tokens}): {where}"
            )
        return spec

    def tokenizer(self):
        """The model's Tokenizer. Raises UserError as tokenizer_spec does."""
        from data.tokenizer import Tokenizer

        return Tokenizer(self.tokenizer_spec())

    def save_pretrained(self, folder):
        """Writes the model and its tokenizer as a GPT-2 of transformers with the same logits. The vocabulary
        has no padding there; from_pretrained pads it again, with other values. Raises UserError."""
        c = self.config
        if any(isinstance(module, (PackedLinear, HalfLinear)) for module in self.modules()):
            raise UserError("after for_sampling it is too late to save")
        from transformers import GPT2Config, GPT2LMHeadModel, logging

        from data.tokenizer import CHAT_TEMPLATE, CONVERSATIONS, user_errors

        logging.disable_progress_bar()
        tokenizer = self.tokenizer()
        hf_tokenizer = tokenizer.for_transformers()
        with user_errors("this tokenizer cannot be written for transformers"):
            compare_tokenizers(tokenizer, hf_tokenizer)
        eot = hf_tokenizer.token_to_id(tokenizer.eot_text)
        vocab_size = hf_tokenizer.get_vocab_size()
        # Where only <|endoftext|> is added, a tokenizer.json is read with it, and characters without.
        checkpoint_vocab_size = c.vocab_size
        if tokenizer.kind == 'bpe':
            checkpoint_vocab_size = max(c.vocab_size, vocab_size)
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
                activation_function='gelu' if c.activation == 'gelu' else 'gelu_pytorch_tanh',
                checkpoint_vocab_size={vocab_size: checkpoint_vocab_size},
                template=self.template,
            )
        )
        # Other tools need an end token. Beside characters it is a token more, which must never be drawn.
        hf_model.generation_config.suppress_tokens = [eot] if tokenizer.eot is None else None

        # What a changed network has beside GPT-2's weights would be left out without a word. So the logits of
        # a few tokens are compared before anything is written.
        ids = torch.arange(min(16, c.block_size))[None] % tokenizer.vocab_size  # (1, T)
        model = deepcopy(self).cpu().float().eval()
        try:
            weights = convert_hf(model.state_dict(), vocab_size)
            hf_model.load_state_dict(weights, strict=False)
        except (KeyError, RuntimeError) as error:
            raise UserError(f"transformers' GPT-2 has other weights ({one_line(error)})") from error
        with torch.no_grad():
            ours = model(ids, targets=ids)[0][..., : tokenizer.vocab_size]
            theirs = hf_model.eval()(ids).logits[..., : tokenizer.vocab_size]
        difference, largest = (ours - theirs).abs().max().item(), ours.abs().max().item()
        if not difference <= 1e-4 * largest:  # so that nan does not pass
            raise UserError(
                f"transformers' GPT-2 would compute other logits, by {difference:.2g} where the largest is "
                f"{largest:.2g}: it cannot express how this network was changed"
            )

        folder = Path(folder).expanduser()
        hf_model.save_pretrained(folder)
        for path in folder.glob('*.safetensors'):  # they have 0600, whatever the umask
            path.chmod((folder / 'config.json').stat().st_mode)
        hf_tokenizer.save(str(folder / 'tokenizer.json'))
        # transformers 5 would name a class here that 4 does not know. Without model_input_names 4 would make
        # token_type_ids, whose embeddings GPT-2 adds.
        tokenizer_config = {
            'tokenizer_class': 'PreTrainedTokenizerFast',
            'model_input_names': ['input_ids', 'attention_mask'],
            'model_max_length': c.block_size,
            'clean_up_tokenization_spaces': False,
            **dict.fromkeys(('bos_token', 'eos_token', 'unk_token', 'pad_token'), tokenizer.eot_text),
        }
        if self.template == CONVERSATIONS:
            tokenizer_config['chat_template'] = CHAT_TEMPLATE
        text = json.dumps(tokenizer_config, indent=2) + '\n'
        (folder / 'tokenizer_config.json').write_text(text, encoding='utf-8')

        title = "# A GPT-2 from model.py"
        counted = f"answers in {self.template!r} count" if self.template else "every token counts"
        command = shlex.join(['python', 'sample.py', f'--init_from={folder}'])
        card = [
            f"{title}, {self.get_num_params() / 1e6:.2f}M parameters",
            self.origin,
            f"In the loss {counted}.",
            f"Use: AutoModelForCausalLM and AutoTokenizer, or `{command}`.",
            f"Context: {c.block_size} tokens. Beyond them `generate` ends in transformers' own IndexError.",
        ]
        path = folder / 'README.md'
        if not path.exists() or path.read_bytes().startswith(title.encode()):
            path.write_text('\n'.join(card) + '\n', encoding='utf-8')


def cached_gpt2(model_type):
    """The folder in which the hub's cache has one of GPT2_SIZES; None if it is not there, or not whole."""
    from huggingface_hub import try_to_load_from_cache

    # The hub has renamed GPT-2. What was fetched under its old name stays there.
    for name in (f'openai-community/{model_type}', model_type):
        config = try_to_load_from_cache(name, 'config.json')
        for file in ('model.safetensors', 'pytorch_model.bin'):
            weights = try_to_load_from_cache(name, file)
            if isinstance(config, str) and isinstance(weights, str):  # where it is no path, it is no file
                return Path(weights).parent
    return None


def read_hf_gpt2(model_type):
    """A GPT-2 of transformers in float32. Raises UserError."""
    hub, folder = model_type in GPT2_SIZES, Path(model_type).expanduser()
    if not hub and not (folder / 'config.json').is_file():
        raise UserError(
            f"init_from '{model_type}' is no folder with a checkpoint or a GPT-2 of "
            f"transformers, and no name such as resume, {', '.join(GPT2_SIZES)}"
        )
    from transformers import GPT2LMHeadModel, logging  # takes seconds to import, so only here

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = {} if hub else json.loads((folder / 'config.json').read_bytes())
        architectures = config.get('architectures') or [config.get('model_type', 'gpt2')]
        kind = architectures[0]
        if kind not in ('gpt2', 'GPT2Model', 'GPT2LMHeadModel'):
            raise UserError(f"{folder} holds a {kind}: model.py builds GPT-2's language model only")
        source = folder
        if hub:
            source = cached_gpt2(model_type) or f'openai-community/{model_type}'
        hf_model, info = GPT2LMHeadModel.from_pretrained(
            source,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except UserError:
        raise
    except Exception as error:  # many libraries speak here, each with errors of its own
        hint = "fetch it where there is a network, copy ~/.cache/huggingface" if hub else "is all there?"
        raise UserError(f"cannot read GPT-2 from '{model_type}' ({one_line(error)}): {hint}") from error

    # transformers fills what is missing with random numbers.
    mismatched = {name for name, *shapes in info['mismatched_keys']}
    wrong = mismatched.union(info['missing_keys']) - {'lm_head.weight'}
    if wrong:
        raise UserError(f"{model_type} is not complete: {min(wrong)} is missing or of another shape")
    return hf_model.float()


def compare_tokenizers(tokenizer, hf_tokenizer):
    """Raises an error unless the other one has our text for every id, and our ids for the texts of a
    thousand tokens."""
    vocab = hf_tokenizer.get_vocab()
    if len(set(vocab.values())) < len(vocab):
        raise ValueError("two texts have one id, of which a file keeps one")
    ids = list(range(tokenizer.vocab_size))
    if hf_tokenizer.decode(ids, skip_special_tokens=False) != tokenizer.decode(ids):
        raise ValueError("ids have other texts there")
    for i in ids[:: 1 + len(ids) // 1000]:
        text = tokenizer.decode([i])
        if hf_tokenizer.encode(text).ids != tokenizer.encode(text):
            raise ValueError(f"{text!r} has other ids there")


def convert_hf(weights, vocab_size):
    """Our weights as transformers keeps them, or the other way round, with vocab_size rows in wte and
    lm_head. The padding of a vocabulary is filled with the mean of all rows: its logit is the mean of theirs,
    so never the largest."""
    weights = {name: p.T.contiguous() if name.endswith(HF_TRANSPOSED) else p for name, p in weights.items()}
    rows = weights['lm_head.weight']  # (V, C)
    padding = rows.mean(0, keepdim=True).expand(max(0, vocab_size - len(rows)), -1)
    weights['lm_head.weight'] = weights['transformer.wte.weight'] = torch.cat((rows[:vocab_size], padding))
    return weights


class NoInit(torch.overrides.TorchFunctionMode):
    """Skips the functions of torch.nn.init, two seconds for 124M weights, where other weights follow."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, '__module__', None) == 'torch.nn.init':
            return args[0] if args else kwargs['tensor']
        return func(*args, **kwargs or {})


# ---------- linear layers for sampling ----------


class PackedLinear(nn.Module):
    """An nn.Linear for a CPU. Inputs, outputs and sums are in float32, and a row of the output has the same
    bits whatever the number of rows. If dtype is a half precision, FBGEMM keeps the weight in float16, else
    oneDNN keeps it in float32, each in a layout of its own."""

    def __init__(self, linear, dtype):
        super().__init__()
        self.bias = linear.bias
        self.shape = tuple(linear.weight.shape)
        weight = linear.weight.detach()

        # float16 ends at 65504, and rounds small numbers by up to 3e-8. The weight stays in float32 if one of
        # its numbers is too large, or if their root mean square is less than 1000 times 3e-8.
        rms = weight.norm() / math.sqrt(weight.numel())
        fits = bool(weight.abs().max() <= 65504 and rms >= 3e-5)
        self.half = dtype != torch.float32 and has_fbgemm() and fits
        # Without AVX512, FBGEMM sums up a row that it takes alone in another order. Of a multiple of 3 rows
        # it takes none alone, so rows are filled up to that. With AVX512 all rows are alike.
        self.multiple = 1 if 'AVX512' in torch.backends.cpu.get_cpu_capability() else 3
        if self.half:
            self.packed = torch.ops.quantized.linear_prepack_fp16(weight, self.bias)
        else:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)  # laid out for 16 rows

    def forward(self, x):
        n = math.prod(x.shape[:-1])  # rows
        if self.half:
            missing = -n % self.multiple
        else:  # With fewer than 4 rows oneDNN sums in another order, and 4 take the same time.
            missing = max(0, 4 - n)
        if missing:
            rows = F.pad(x.flatten(0, -2), (0, 0, 0, missing))
            return self.product(rows)[:n].unflatten(0, x.shape[:-1])
        return self.product(x)

    def product(self, x):
        """The product alone, whose sums may depend on the number of rows."""
        if self.half:
            return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        # The last arguments say that no activation follows.
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, 'none', [], '')

    def extra_repr(self):
        return f"{self.shape}, half={self.half}"

    def __deepcopy__(self, memo):
        return self  # nothing in it ever changes, so copies of a model share it


class HalfLinear(nn.Linear):
    """An nn.Linear with its weight in a half precision, to which it casts its input as autocast does."""

    def __init__(self, linear, dtype):
        has_bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, has_bias, linear.weight.device, dtype)
        self.load_state_dict(linear.state_dict())

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


# ---------- the loss, Muon, the choice of a token ----------


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits x @ weight.T, which are never held as a whole: of GPT-2 they would be
    the largest tensor of training. Each chunk of rows yields its loss and its gradients while its logits are
    still there; backward only scales them.

    x (N, C), weight (V, C), targets (N,) with -1 for positions that do not count -> loss (), float32 or
    wider. Products are in the dtype that autocast would choose. with_grad tells whether gradients will be
    needed, which cannot be seen in here."""

    @staticmethod
    def forward(ctx, x, weight, targets, with_grad):
        dtype = autocast_dtype(x)
        N, V = x.size(0), weight.size(0)
        # The chunks are of one size, so that none is small and slow.
        largest_chunk = LOSS_CHUNK if x.device.type == 'cpu' else 4 * LOSS_CHUNK
        n_chunks = math.ceil(N * V / largest_chunk)
        rows = math.ceil(N / n_chunks)

        wide = torch.promote_types(dtype, torch.float32)

        total = torch.zeros((), dtype=wide, device=x.device)
        counted = targets != -1  # (N,)
        if with_grad:
            grad_x = torch.empty_like(x, dtype=dtype)
            grad_w = torch.zeros_like(weight, dtype=wide)
        with torch.autocast(x.device.type, enabled=False):
            w = weight.to(dtype)
            for i in range(0, N, rows):
                xc = x[i : i + rows].to(dtype)  # (n, C)
                keep = counted[i : i + rows]  # (n,)
                target = targets[i : i + rows].where(keep, 0)[:, None]  # (n, 1)
                log_p = (xc @ w.T).to(wide).log_softmax(-1)  # (n, V)
                total -= (log_p.gather(1, target)[:, 0] * keep).sum()
                if not with_grad:
                    continue

                # The gradient of the logits is softmax - one_hot, and zero where a position does not count.
                d = log_p.exp_()  # (n, V)
                if torch.compiler.is_compiling():  # Inductor fuses this with exp, but not scatter_add_
                    d -= (torch.arange(V, device=d.device) == target).to(wide)
                else:
                    d.scatter_add_(1, target, d.new_full(target.shape, -1))
                d = d.to(dtype)
                keep = keep[:, None].to(dtype)  # (n, 1)
                grad_x[i : i + rows] = (d @ w) * keep
                # Sums over thousands of rows would overflow float16. Backward takes the 1/16 back.
                grad_w += d.T @ (xc * (keep / 16))

        count = counted.sum().clamp(min=1)
        if with_grad:
            ctx.save_for_backward(grad_x, grad_w, count)
            ctx.dtypes = x.dtype, weight.dtype
        return total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        grad_x, grad_w, count = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        scale = grad_loss / count
        return grad_x.to(x_dtype) * scale, (grad_w * (16 * scale)).to(weight_dtype), None, None


class Muon(torch.optim.AdamW):
    """Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) for groups with `parts`, AdamW for the
    others. A matrix moves along the orthogonal factor of its momentum, as far in weak directions as in strong
    ones. The step is about as large as AdamW's, so that both share one learning rate and weight decay (Liu et
    al. 2025, arXiv:2502.16982). They share beta1 too: it is the decay of the momentum. A parameter stacks
    `parts` matrices: c_attn three."""

    # The quintics a x + b x^3 + c x^5 map [0.002, 1] step by step to 1. Each is the one nearest to 1 on the
    # range that those before it leave (Polar Express, Amsel et al. 2025, arXiv:2505.16932). They leave 2 % of
    # room above 1, without which bfloat16 explodes.
    QUINTICS = (
        (8.0925, -22.1470, 15.6075),
        (3.9801, -2.7677, 0.4956),
        (3.6855, -2.6515, 0.4964),
        (2.8199, -2.0352, 0.4319),
        (2.0068, -1.3610, 0.3665),
    )

    def __init__(self, groups, **settings):
        super().__init__(groups, **settings)
        # With this flag, which fused AdamW sets, a GradScaler leaves infinite gradients to the step. Without
        # it, the GradScaler skips the step itself.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()

        # Matrices of one shape are collected, so that one product serves for all of them.
        by_shape = {}
        for group in self.param_groups:
            if 'parts' not in group:
                continue
            beta1, _ = group['betas']
            for p in group['params']:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:  # Muon needs no step, but load_state_dict expects one
                    state.update(momentum=torch.zeros_like(p), step=torch.zeros((), device=p.device))
                momentum = state['momentum'].lerp_(p.grad, 1 - beta1)
                update = p.grad.lerp(momentum, beta1)  # Nesterov
                p.grad = None  # so that AdamW passes it by
                p.mul_(1 - group['lr'] * group['weight_decay'])
                # Numbers of an orthogonal matrix (n, m) have a root mean square of 1 / sqrt(m). This makes
                # it 0.2, as AdamW's steps have it. c_attn counts as one matrix (3C, C), so its steps are
                # sqrt(3) times larger: 1.5 times was better than once (assets/notes.md).
                length = group['lr'] * 0.2 * math.sqrt(max(p.shape))
                for w, u in zip(p.chunk(group['parts']), update.chunk(group['parts']), strict=True):
                    if w.size(0) > w.size(1):
                        w, u = w.mT, u.mT  # (n, m), n <= m
                    by_shape.setdefault(w.shape, []).append((w, u, length))

        for matrices in by_shape.values():
            weights, updates, lengths = zip(*matrices, strict=True)
            updates = torch.stack(updates)  # (k, n, m)
            if has_bfloat16(updates.device.type):  # which is precise enough, but elsewhere slow
                updates = updates.bfloat16()
            for w, u, length in zip(weights, self.orthogonal(updates), lengths, strict=True):
                w.add_(u, alpha=-length)
        super().step()
        return loss

    @classmethod
    def orthogonal(cls, x):
        """The orthogonal factors U V' of matrices U S V' (k, n, m), n <= m, to 3 %, by matrix products."""
        # With a Frobenius norm of 1 nothing below under- or overflows. Both minima are for matrices of zeros.
        x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-30)
        # The norm of X X' is at least the square of the largest singular value, which becomes 1 at most.
        gram = x @ x.mT  # (k, n, n)
        size = torch.linalg.matrix_norm(gram, keepdim=True).sqrt().clamp(min=1e-3)  # (k, 1, 1)
        x, gram = x / size, gram / size**2
        for i, (a, b, c) in enumerate(cls.QUINTICS):
            if i > 0:
                gram = x @ x.mT
            # baddbmm adds a product to a sum: x becomes a x + (b G + c G G) x, with G = X X'.
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # (k, n, n)
            x = torch.baddbmm(x, polynomial, x, beta=a)  # (k, n, m)
        return x


def autocast_dtype(x):
    """The dtype of products with the tensor x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def sample_next_token(logits, u, temperature=1.0, top_k=None, top_p=None):
    """One token a row, as ids (B, 1), from logits (B, V): the cumulative distribution is inverted at u (B,
    1), uniform in [0, 1). A row's token depends on its own u alone, whatever stands in the other rows."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)

    V = logits.size(-1)
    top_k = min(top_k or V, V)
    use_top_p = top_p is not None and top_p < 1
    ids = None  # until the logits are sorted, an index is an id
    if use_top_p or top_k < V:
        logits, ids = logits.topk(top_k)  # (B, K), descending

    # The largest logit becomes 0 first, so that a tiny temperature makes -inf of the others, and no nan.
    # Below 1e-30 it could be 0 in float32.
    logits = logits - logits.amax(-1, keepdim=True)
    cdf = (logits / max(temperature, 1e-30)).softmax(-1).cumsum(-1)  # (B, K)
    mass = cdf[:, -1:]  # (B, 1)
    if use_top_p:  # the tokens up to the first at which the distribution reaches top_p
        last = (cdf < top_p).sum(-1, keepdim=True).clamp(max=cdf.size(-1) - 1)  # (B, 1)
        mass = cdf.gather(1, last)

    # u is below 1, so nothing beyond the mass is found; the clamp is for logits that are nan.
    choice = torch.searchsorted(cdf, u * mass, right=True).clamp(max=cdf.size(-1) - 1)  # (B, 1)
    return choice if ids is None else ids.gather(1, choice)


# ---------- checkpoints and the machine at hand ----------

CHECKPOINT_TYPES = {
    'model': dict,
    'model_args': dict,
    'optimizer': dict,
    'config': dict,
    'tokenizer': dict,
    'template': str,
    'scaler': dict,
    'iter_num': int,
    'tokens': int,
}


def no_checkpoint(path):
    """The UserError for a ckpt.pt that is not there. It names the folders beside its own that have one."""
    beside = Path(path).parent.parent
    folders = {file.parent for name in ('ckpt.pt', 'last.pt') for file in beside.glob(f'*/{name}')}
    newest = sorted(folders, key=os.path.getmtime, reverse=True)
    names = [shlex.quote(str(folder)) for folder in newest]
    advice = ": train first, or name the folder with --out_dir"
    if names:
        advice = f", but in {', '.join(names[:3])} (newest first): add --out_dir={names[0]}"
    return UserError(f"no checkpoint at {path}{advice}")


def read_checkpoint(path, needed=()):
    """ckpt.pt as a dict of plain values and CPU tensors, without keys whose value is None. It must have the
    keys in `needed`, model and model_args. Executes nothing in the file. Raises UserError."""
    if not Path(path).is_file():
        raise no_checkpoint(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        checkpoint = {key: value for key, value in checkpoint.items() if value is not None}

        for key in ('model', 'model_args', *needed):
            if key not in checkpoint:
                raise ValueError(f"it lacks {key!r}")
        for key, value in checkpoint.items():
            kind = CHECKPOINT_TYPES.get(key, object)
            if not isinstance(value, kind) or (kind is int and value < 0):
                raise TypeError(f"{key} is {value!r:.40}")
        checkpoint['best_val_loss'] = float(checkpoint.get('best_val_loss', math.inf))  # nanoGPT: a tensor
    except Exception as error:  # damaged files fail in a dozen ways
        raise UserError(f"cannot read {path}, damaged or not a checkpoint ({one_line(error)})") from error
    return checkpoint


# Peak FLOP/s of dense bfloat16 or float16 products with float32 sums, from the vendor's data sheets. The keys
# are patterns for the names that CUDA gives to its devices.
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
    r'(H100|H200) NVL$': 835.5e12,
    r'(H100 80GB HBM3|H200)$': 989.4e12,
}


def peak_flops_of(device, dtype):
    """Peak of a CUDA device in FLOP/s; None where it is unknown: other chips, slices of one, float32."""
    if torch.device(device).type != 'cuda' or dtype == 'float32':
        return None
    name = torch.cuda.get_device_name(device)
    for chip, peak in PEAK_FLOPS.items():
        if re.search(rf'\b{chip}', name) and 'MIG' not in name:
            return peak
    return None


def has_bfloat16(kind):
    """Whether 'cuda' or 'cpu' multiplies bfloat16 in hardware; of CPUs those with AVX512-BF16 or AMX."""
    if kind == 'cpu':
        return torch.cpu._is_avx512_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return kind == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)


def has_fbgemm():
    """Whether FBGEMM runs here: it needs an x86 processor with AVX2."""
    return 'fbgemm' in torch.backends.quantized.supported_engines


def choose_device(device, dtype, local_rank=0, sampling=False):
    """Fills in what the user left None: cuda, else mps, else cpu; bfloat16 where the hardware has it, float16
    on older CUDA, and float16 for sampling on a CPU that has FBGEMM; else float32. Each local rank gets its
    own GPU. Returns texts. Raises UserError."""
    counts = {
        'cuda': torch.cuda.device_count(),
        'mps': int(torch.backends.mps.is_available()),
        'cpu': 1,
    }
    best = next(kind for kind, count in counts.items() if count)
    kind, _, number = (device or best).partition(':')
    if not number:
        number = str(local_rank) if kind == 'cuda' else '0'
    if kind not in counts or not number.isdecimal():
        raise UserError(f"device {device!r} is none of cuda, cuda:0, cuda:1 …, mps, cpu")
    device = f'cuda:{number}' if kind == 'cuda' else kind
    if int(number) >= counts[kind]:
        raise UserError(f"device {device!r}: PyTorch finds {counts[kind]} here; --device=cpu runs anywhere")

    if dtype is None:
        dtype = 'float32'
        if sampling and kind == 'cpu' and has_fbgemm():
            dtype = 'float16'
        elif has_bfloat16(kind):
            dtype = 'bfloat16'
        elif kind == 'cuda':
            dtype = 'float16'
    return device, dtype


def compile_method(model, name, call, **options):
    """Compiles a method in place and tries it by call(). Returns None, or the line why it is eager again."""
    try:
        setattr(model, name, torch.compile(getattr(model, name), **options))
        call()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing or failing compiler has errors of many kinds; eager always works
        model.__dict__.pop(name, None)  # so that the method of the class is called again
        return f"torch.compile does not work here, running eager ({one_line(error)})"
