"""
Train a GPT from scratch, go on from a checkpoint, or fine-tune GPT-2.

One process, on whatever the machine has:
    python train.py config/train_shakespeare_char.py
    python train.py config/train_shakespeare_char.py --device=cpu --batch_size=12
One machine with 8 GPUs:
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
Two machines with 8 GPUs each, the first at 10.0.0.1 (put NCCL_IB_DISABLE=1 before it without InfiniBand):
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=29500 train.py
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 --master_port=29500 train.py
"""
from __future__ import annotations  # the configurator reads `int | None` as text

import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from model import GPT, GPTConfig, choose_device, peak_flops_of, read_checkpoint, read_tokenizer, Tokenizer

ROOT = Path(__file__).resolve().parent

# -----------------------------------------------------------------------------
# The keys and their defaults: GPT-2 124M on OpenWebText, half a million tokens an iteration
# where things go
out_dir = 'out'                         # checkpoints land here, relative to the working directory
eval_interval = 2000                    # iterations between evaluations, each of which saves a checkpoint
log_interval = 1                        # iterations between log lines
eval_iters = 200                        # micro-batches per evaluation, of each split
eval_only = False                       # evaluate once and leave
always_save_checkpoint = True           # False: only when the validation loss has improved
init_from = 'scratch'                   # scratch, resume, auto (resume if there is a checkpoint), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder that transformers saved
seed = 1337                             # of weights, batches and dropout
# wandb
wandb_log = False                       # report to Weights & Biases too
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext'                 # a folder of data/
gradient_accumulation_steps = 5 * 8     # micro-batches per iteration, over all processes together
batch_size = 12                         # sequences per micro-batch
block_size = 1024                       # tokens per sequence
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0                           # 0 for pretraining; for fine-tuning and small data try 0.1 and up
bias = False                            # biases in the linear layers and norms
# AdamW
learning_rate = 6e-4                    # the highest
max_iters = 600000                      # the run takes exactly this many iterations
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0                         # largest norm of the gradient, 0 for no limit
# learning rate schedule
decay_lr = True                         # False: learning_rate throughout
warmup_iters = 2000                     # iterations of linear warm-up
lr_decay_iters = 600000                 # where the cosine arrives at min_lr, usually max_iters
min_lr = 6e-5                           # usually learning_rate / 10
# the machine; None: what is there
backend: str | None = None              # of torch.distributed: nccl or gloo
device: str | None = None               # cpu, cuda, cuda:1, mps
dtype: str | None = None                # float32, bfloat16, or float16, which scales its gradients
compile: bool | None = None             # torch.compile; by itself on CUDA only
peak_flops: float | None = None         # FLOP/s that mfu is measured against
exec((ROOT / 'configurator.py').read_text(encoding='utf-8'))
# -----------------------------------------------------------------------------
# The machine: which process of how many this is, on which device, in which precision

rank, local_rank, world_size = (int(os.environ.get(name, default))
                                for name, default in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
distributed = 'RANK' in os.environ  # set by torchrun
master = rank == 0                  # the one that prints and saves


def fail(message):
    """Ends the run for a mistake of its user; all ranks meet the same one, and one a machine says it."""
    sys.exit(str(message) if local_rank == 0 else 1)


for key in ('eval_interval', 'log_interval', 'eval_iters', 'gradient_accumulation_steps', 'batch_size', 'block_size'):
    if config[key] < 1:
        fail(f"{key} must be at least 1, not {config[key]}")
for key in ('seed', 'max_iters', 'warmup_iters', 'grad_clip'):
    if config[key] < 0:
        fail(f"{key} must not be negative, but is {config[key]}")
if gradient_accumulation_steps % world_size:
    fail(f"gradient_accumulation_steps {gradient_accumulation_steps} is not divisible by the world size {world_size}: "
         f"the processes share them; try --gradient_accumulation_steps={math.ceil(gradient_accumulation_steps / world_size) * world_size}")
try:
    if distributed and device in (None, 'cuda') and torch.cuda.is_available():
        device = f'cuda:{local_rank}'
    device, dtype = choose_device(device, dtype)
except ValueError as error:
    fail(error)
device_type = torch.device(device).type
if backend is None:
    backend = 'nccl' if device_type == 'cuda' else 'gloo'
if distributed and not dist.is_backend_available(backend):
    fail(f"backend {backend!r}: this PyTorch has none of that name; on CPUs use --backend=gloo")
if compile is None:
    compile = device_type == 'cuda' and sys.platform != 'win32'
if device_type == 'cuda':
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision('high')  # TF32 where float32 remains
autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')

# -----------------------------------------------------------------------------
# Randomness is a function of (seed, stream, iteration, micro-step): nothing of it needs saving, and
# a micro-batch is the same one whichever rank draws it.

STREAMS = {'train': 0, 'eval-train': 1, 'eval-val': 2, 'dropout': 3}


def randomness(stream, iteration, micro_step):
    return np.random.default_rng((seed, STREAMS[stream], iteration, micro_step))


# -----------------------------------------------------------------------------
# Data

data_dir = ROOT / 'data' / dataset
prepare = f"python {os.path.relpath(data_dir / 'prepare.py')}"


def open_bin(path):
    """The tokens of a .bin file, (n,) uint16, read from disk as they are used."""
    if not path.is_file():
        known = ', '.join(sorted(p.parent.name for p in ROOT.glob('data/*/prepare.py')))
        fail(f"there is no {path}: " + (f"run `{prepare}` first" if (data_dir / 'prepare.py').is_file()
                                        else f"dataset '{dataset}' is none of {known}"))
    if path.stat().st_size % 2:
        fail(f"{path} holds {path.stat().st_size} bytes, an odd number, but a token takes two: write it anew with `{prepare}`")
    return np.asarray(np.memmap(path, dtype='<u2', mode='r')) if path.stat().st_size else np.zeros(0, '<u2')


train_data, val_data = open_bin(data_dir / 'train.bin'), open_bin(data_dir / 'val.bin')


def get_batch(stream, iteration, micro_step):
    """X, Y (B, T) int64 on the device: windows at random places and the same one token later."""
    data = val_data if stream == 'eval-val' else train_data
    starts = randomness(stream, iteration, micro_step).integers(len(data) - block_size, size=batch_size)
    tokens = data[starts[:, None] + window]                       # (B, T + 1) uint16
    if tokens.max() >= model_args['vocab_size']:
        name = 'val.bin' if stream == 'eval-val' else 'train.bin'
        sys.exit(f"{data_dir / name} holds the token id {tokens.max()}, but the model's vocabulary ends at {model_args['vocab_size'] - 1}: "
                 f"was the data prepared with another tokenizer?")
    tokens = torch.from_numpy(tokens.view(np.int16))              # two bytes a token on the way, widened there
    if device_type == 'cuda':
        tokens = tokens.pin_memory()
    tokens = tokens.to(device, non_blocking=True).long() & 0xFFFF  # (B, T + 1)
    return tokens[:, :-1], tokens[:, 1:]


# -----------------------------------------------------------------------------
# The model: anew, from a checkpoint, or GPT-2

ckpt_path = os.path.join(out_dir, 'ckpt.pt')
if init_from == 'auto':
    init_from = 'resume' if os.path.exists(ckpt_path) else 'scratch'
shape = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, bias=bias, dropout=dropout)
iter_num, best_val_loss, checkpoint = 0, math.inf, None
torch.manual_seed(seed)
try:
    spec = read_tokenizer(data_dir)
    if init_from == 'scratch':
        vocab_size = 50257 if spec['kind'] == 'gpt2' else Tokenizer(spec).size
        if spec['kind'] != 'char':
            vocab_size = math.ceil(vocab_size / 64) * 64  # GPUs multiply by 50304 faster than by 50257
        model = GPT(GPTConfig(vocab_size=vocab_size, **shape))
    elif init_from == 'resume':
        checkpoint = read_checkpoint(ckpt_path)
        model = GPT.from_checkpoint(checkpoint, dropout=dropout)
        iter_num, best_val_loss = checkpoint['iter_num'], float(checkpoint['best_val_loss'])
    else:
        model = GPT.from_pretrained(init_from, dropout=dropout)
    if block_size < model.config.block_size:
        model.crop_block_size(block_size)
    model.to(device)
    optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type)
    if checkpoint:  # moments from the checkpoint; learning rate, decay and betas from the command line
        optimizer.load_state_dict({**checkpoint['optimizer'], 'param_groups': optimizer.state_dict()['param_groups']})
        for p, moments in optimizer.state.items():  # of a cropped wpe they are cropped too
            moments.update({k: m[:len(p)].clone() for k, m in moments.items() if m.dim() and len(m) > len(p)})
        scaler.load_state_dict(checkpoint.get('scaler') or scaler.state_dict())
except ValueError as error:
    fail(error)
except KeyError as error:
    fail(f"cannot resume {ckpt_path}: it lacks {error}")
# What a checkpoint says of its model: nanoGPT's seven keys, one more only where we depart from nanoGPT
model_args = {key: getattr(model.config, key) for key in (*shape, 'vocab_size')}
if model.config.activation != 'gelu':
    model_args['activation'] = model.config.activation
for key, value in model_args.items():
    if key in config and config[key] != value:
        if master:
            print(f"{key} is {value!r}, as the weights have it, not {config[key]!r}")
        config[key] = value
block_size = model.config.block_size
window = np.arange(block_size + 1)
for name, data in (('train.bin', train_data), ('val.bin', val_data)):
    if len(data) <= block_size:
        fail(f"{data_dir / name} holds {len(data)} tokens, but a sequence takes block_size + 1 = {block_size + 1}: "
             f"use a smaller --block_size or more text")

if master:
    print(f"tokens per iteration will be: {gradient_accumulation_steps * batch_size * block_size:,}")
    print({'scratch': "a new model", 'resume': f"resuming {ckpt_path} at iteration {iter_num}"}.get(init_from, f"GPT-2 weights from {init_from}")
          + f": {model.get_num_params() / 1e6:.2f}M parameters, vocabulary {model_args['vocab_size']}; {device}, {dtype}"
          + (f", {world_size} processes" if distributed else ''))
    for key, old in (checkpoint or {}).get('config', {}).items():
        if key in config and config[key] != old and key != 'init_from':
            print(f"{key} was {old!r} in the checkpoint, is {config[key]!r} now")

checkpoint = None  # frees its memory
if master and not eval_only:
    try:
        os.makedirs(out_dir, exist_ok=True)
    except OSError as error:
        fail(f"cannot write to out_dir {out_dir!r}: {error.strerror}")

# -----------------------------------------------------------------------------
# compile, then spread over the processes

raw_model = model
if compile:
    from torch._dynamo.exc import TorchDynamoException  # seconds to import
    started = time.perf_counter()
    try:  # a compiler fails at the first call, so make that here, where eager is still a way out
        model = torch.compile(raw_model)
        with autocast:
            model(*get_batch('train', 0, 0))[1].backward()
        if master:
            print(f"compiled in {time.perf_counter() - started:.0f} s")
    except TorchDynamoException as error:
        model = raw_model
        if master:
            print(f"torch.compile does not work here, running eager ({type(error).__name__}: {str(error).strip().splitlines()[0]})")
    raw_model.zero_grad(set_to_none=True)
if distributed:
    dist.init_process_group(backend)
    ddp_model = DistributedDataParallel(model, device_ids=[local_rank] if device_type == 'cuda' else None)
else:
    ddp_model = model

# -----------------------------------------------------------------------------
# evaluating, saving, scheduling


def all_sum(values):
    """Sums a tensor over all ranks."""
    if distributed:
        dist.all_reduce(values)
    return values


@torch.no_grad()
def estimate_loss():
    """Mean loss of eval_iters micro-batches of each split, the same ones every time, shared among the ranks."""
    model.eval()
    losses = torch.zeros(2, device=device)
    for split, stream in enumerate(('eval-train', 'eval-val')):
        for k in range(rank, eval_iters, world_size):
            X, Y = get_batch(stream, 0, k)
            with autocast:
                losses[split] += model(X, Y)[1]
    model.train()
    return (all_sum(losses) / eval_iters).tolist()


def get_lr(it):
    """Linear warm-up, then half a cosine down to min_lr (Loshchilov & Hutter 2017)."""
    if not decay_lr:
        return learning_rate
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it >= lr_decay_iters:
        return min_lr
    progress = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def save_checkpoint():
    """Writes ckpt.pt beside its place and renames it, so that there is a whole one at every instant."""
    state = {'model': raw_model.state_dict(), 'optimizer': optimizer.state_dict(), 'model_args': model_args,
             'iter_num': iter_num, 'best_val_loss': best_val_loss, 'config': config, 'scaler': scaler.state_dict(), 'tokenizer': spec}
    with open(ckpt_path + '.part', 'wb') as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(ckpt_path + '.part', ckpt_path)


# -----------------------------------------------------------------------------
# The loop

if wandb_log and master:
    try:
        import wandb
    except ImportError:
        fail("wandb_log=True needs wandb: pip install wandb, or --wandb_log=False")
    offline = 'WANDB_MODE' not in os.environ and not wandb.login(prompt=False)  # nobody answers a prompt in a batch job
    run = wandb.init(project=wandb_project, name=wandb_run_name, config=config, mode='offline' if offline else None)
    if offline:
        print(f"wandb: not logged in, so this run stays on disk; later: wandb login && wandb sync {os.path.dirname(run.dir)}")

peak = peak_flops or peak_flops_of(device, dtype)
loss_sum = torch.zeros((), device=device)        # of this rank's micro-batches of one iteration
clock, iterations = time.perf_counter(), 0       # since the last log line; evaluations stop the clock
model.train()
while True:
    if iter_num % eval_interval == 0 or iter_num >= max_iters or eval_only:
        if device_type == 'cuda':
            torch.cuda.synchronize()
        paused = time.perf_counter()
        train_loss, val_loss = estimate_loss()
        if master:
            print(f"step {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}", flush=True)
            if wandb_log:
                wandb.log({'iter': iter_num, 'train/loss': train_loss, 'val/loss': val_loss, 'lr': get_lr(iter_num)})
        improved = val_loss < best_val_loss
        if not eval_only:
            best_val_loss = min(best_val_loss, val_loss)
            if master and (improved or always_save_checkpoint):
                save_checkpoint()
        clock += time.perf_counter() - paused
    if eval_only or iter_num >= max_iters:
        break

    lr = get_lr(iter_num)
    for group in optimizer.param_groups:
        group['lr'] = lr
    for micro_step in range(rank, gradient_accumulation_steps, world_size):
        X, Y = get_batch('train', iter_num, micro_step)
        if distributed:  # gradients are averaged over the ranks once, in the last backward pass
            ddp_model.require_backward_grad_sync = micro_step + world_size >= gradient_accumulation_steps
        if dropout:
            torch.manual_seed(int(randomness('dropout', iter_num, micro_step).integers(2 ** 63)))
        with autocast:
            _, loss = ddp_model(X, Y)
        scaler.scale(loss * (world_size / gradient_accumulation_steps)).backward()
        loss_sum += loss.detach()
    if grad_clip:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)

    iterations += 1
    if iter_num % log_interval == 0:
        train_loss = all_sum(loss_sum).item() / gradient_accumulation_steps  # of this iteration, on all ranks; waits for the device
        seconds = (time.perf_counter() - clock) / iterations
        tokens_per_second = gradient_accumulation_steps * batch_size * block_size / seconds
        mfu = raw_model.estimate_mfu(tokens_per_second / world_size, peak)
        if master:
            print(f"iter {iter_num}: loss {train_loss:.4f}, time {seconds * 1000:.2f}ms, mfu {'n/a' if mfu is None else f'{mfu:.2%}'}, "
                  f"{tokens_per_second:,.0f} tok/s", flush=True)
            if wandb_log:
                wandb.log({'iter': iter_num, 'iter/loss': train_loss, 'lr': lr, 'mfu': mfu, 'tokens_per_second': tokens_per_second})
        clock, iterations = time.perf_counter(), 0
    loss_sum.zero_()
    iter_num += 1

if distributed:
    dist.destroy_process_group()
