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

import json
import math
import os
import shlex
import signal
import sys
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from threading import RLock

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import GPT, GPT2_SIZES, GPTConfig, Tokenizer, choose_device, compile_method, one_line, peak_flops_of, read_checkpoint, read_tokenizer

ROOT = Path(__file__).resolve().parent

# -----------------------------------------------------------------------------
# The keys and their defaults: GPT-2 124M on OpenWebText, half a million tokens an iteration
# where things go
out_dir = 'out'                         # checkpoints land here, relative to the working directory
eval_interval = 2000                    # iterations between evaluations, each of which saves a checkpoint
checkpoint_interval = 0                 # iterations between further checkpoints, 0 for none
log_interval = 1                        # iterations between log lines
eval_iters: int | None = 200            # micro-batches per evaluation, of each split; None: as many as go once through val.bin, in order
eval_only = False                       # evaluate once and leave
always_save_checkpoint = True           # False: ckpt.pt is the best model, and last.pt beside it the newest
init_from = 'scratch'                   # scratch, resume, auto (resume if there is a checkpoint), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder that transformers saved
seed = 1337                             # of weights, batches and dropout
# wandb
wandb_log = False                       # report to Weights & Biases too
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset: str | None = 'openwebtext'     # a folder of data/; None: random tokens, to time the loop: nothing is evaluated or kept, and the last line is JSON
sampler = 'random'                      # windows at random places, or epoch: every block of tokens once an epoch, in random order
gradient_accumulation_steps = 5 * 8     # micro-batches per iteration, over all processes together
batch_size = 12                         # sequences per micro-batch
block_size = 1024                       # tokens per sequence
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0                           # 0 for pretraining; for fine-tuning and small data try 0.1 and up
bias = False                            # biases in the linear layers and norms
# optimizer
optimizer = 'adamw'                     # adamw, or muon for the matrices of the blocks and adamw for the rest
learning_rate = 6e-4                    # the highest
max_iters = 600000                      # the run takes exactly this many iterations
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0                         # largest norm of the gradient, 0 for no limit
# learning rate schedule
decay_lr = True                         # False: learning_rate throughout
lr_schedule = 'cosine'                  # cosine, linear, or wsd: at learning_rate until the last fifth, which is linear
warmup_iters = 2000                     # iterations of linear warm-up
lr_decay_iters = 600000                 # where the learning rate arrives at min_lr, usually max_iters
min_lr = 6e-5                           # usually learning_rate / 10
# the machine; None: what is there
backend: str | None = None              # of torch.distributed: nccl or gloo
dist_timeout = 600                      # seconds that a process waits for the others
device: str | None = None               # cpu, cuda, cuda:1, mps
dtype: str | None = None                # float32, bfloat16, or float16, which scales its gradients
compile: bool | None = None             # torch.compile; by itself on CUDA only
peak_flops: float | None = None         # FLOP/s that mfu is measured against
activation_checkpointing = False        # keep only the inputs of the blocks for the backward pass and compute the rest again: less memory, more time
profile = False                         # print the ten costliest operations of one iteration, and write out_dir/trace.json for chrome://tracing
exec((ROOT / 'configurator.py').read_text(encoding='utf-8'))
# -----------------------------------------------------------------------------
# The machine: which process of how many this is, on which device, in which precision

distributed = 'RANK' in os.environ  # set by torchrun
rank, local_rank, world_size, local_world_size = (int(os.environ[name]) if distributed else alone for name, alone in
                                                  (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_WORLD_SIZE', 1)))
master = rank == 0                  # the one that prints and saves
asked_to_leave = False              # by SIGTERM or Ctrl-C; obeyed where the state is whole
bar = None                          # the progress bar, once the loop runs


def leave(status, words=''):
    """Ends this process, with a line on stderr."""
    if bar is not None:
        bar.close()
    if words:
        print(words, file=sys.__stderr__, flush=True)  # init_process_group lends its hook another sys.stderr
    if not distributed:
        sys.exit(status)
    sys.stdout.flush()
    os._exit(status)  # the threads of gloo abort one teardown of the interpreter in twelve


def fail(message):
    """Ends the run in one line, which one rank a machine says, whether all ranks have met the mistake or that one alone."""
    if local_rank:  # torchrun ends them all when one has ended: let that be the one that speaks
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    leave(1, message if local_rank == 0 else '')


def all_reduce(values, operation=dist.ReduceOp.SUM):
    """The sum, or another reduction, of a tensor over all ranks."""
    if distributed:
        dist.all_reduce(values, operation)
    return values


@contextmanager
def writing(path):
    """Turns what the file system says while path is written into one line."""
    try:
        yield
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror or error}" + ("; the checkpoint before it is whole" if keeps and iter_num else ""))


def ask_to_leave(number, frame):
    global asked_to_leave
    if asked_to_leave and number == signal.SIGINT and not distributed:  # torchrun repeats the first Ctrl-C itself
        os._exit(130)
    asked_to_leave = True


def last_words(kind, error, trace):
    """What nobody can mend here ends in one line too: a lost peer, too little memory. The rest is a bug, with its traceback."""
    if distributed and (isinstance(error, dist.DistError) or 'gloo' in str(error)):
        fail(f"rank {rank}: lost the other ranks, or cannot reach them ({' '.join(str(error).split())[:200]}): nothing saved, go on with --init_from=resume")
    elif isinstance(error, torch.OutOfMemoryError):
        leave(1, f"rank {rank}: out of memory on {device}: halve --batch_size and double --gradient_accumulation_steps, or shorten --block_size")
    elif isinstance(error, BrokenPipeError):  # python train.py … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        leave(1, "nobody reads this run's output any more; go on with --init_from=resume")
    elif kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = last_words
sys.stdout.reconfigure(line_buffering=True)  # a log file too grows line by line

for key in ('eval_interval', 'log_interval', 'eval_iters', 'gradient_accumulation_steps', 'batch_size', 'block_size'):
    if config[key] is not None and config[key] < 1:
        fail(f"{key} must be at least 1, not {config[key]}")
for key in ('seed', 'max_iters', 'warmup_iters', 'grad_clip', 'checkpoint_interval'):
    if config[key] < 0:
        fail(f"{key} must not be negative, but is {config[key]}")
for key, words in (('sampler', ('random', 'epoch')), ('optimizer', ('adamw', 'muon')), ('lr_schedule', ('cosine', 'linear', 'wsd'))):
    if config[key] not in words:
        fail(f"{key} {config[key]!r} is none of {', '.join(words)}")
if dataset is None and (eval_only or init_from in ('resume', 'auto') or max_iters <= log_interval):
    fail(f"dataset=None only times training: name a --dataset for eval_only={eval_only}, init_from={init_from}, max_iters={max_iters} of log_interval={log_interval}")
if gradient_accumulation_steps % world_size:
    fail(f"gradient_accumulation_steps {gradient_accumulation_steps} is not divisible by the world size {world_size}: "
         f"the processes share them; try --gradient_accumulation_steps={math.ceil(gradient_accumulation_steps / world_size) * world_size}")
if device in (None, 'cuda') and 0 < torch.cuda.device_count() < local_world_size:
    fail(f"--nproc_per_node={local_world_size}, but PyTorch sees {torch.cuda.device_count()} CUDA devices here: one process each")
try:
    device, dtype = choose_device(device, dtype, local_rank)
except ValueError as error:
    fail(error)
device_type = torch.device(device).type
if distributed and device_type == 'mps':
    fail("torchrun cannot spread a run over an Apple GPU: --device=cpu, or plain python")
if backend is None:
    backend = 'nccl' if device_type == 'cuda' else 'gloo'
if distributed and not dist.is_backend_available(backend):
    fail(f"backend {backend!r}: this PyTorch has none of that name; on CPUs use --backend=gloo")
if compile is None:
    compile = device_type == 'cuda' and sys.platform != 'win32'
if activation_checkpointing and dropout and device_type == 'mps':  # PyTorch keeps the random numbers of CUDA and CPU only
    fail("activation_checkpointing on mps would compute again with another dropout: add --dropout=0.0, or leave it off")
if device_type == 'cuda':
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision('high')  # TF32 where float32 remains
autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')

# -----------------------------------------------------------------------------
# Randomness is a function of (seed, stream, iteration, micro-step): nothing of it needs saving, and
# a micro-batch is the same one whichever rank draws it.

STREAMS = {'train': 0, 'eval-train': 1, 'eval-val': 2, 'dropout': 3, 'epoch': 4}


def randomness(stream, iteration, micro_step=0):
    return np.random.default_rng((seed, STREAMS[stream], iteration, micro_step))


# -----------------------------------------------------------------------------
# Data

def typed(path):
    """A path of the project as a user in this folder would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


data_dir = ROOT / 'data' / (dataset or '')
prepare = typed(data_dir / 'prepare.py')


def open_bin(path):
    """The tokens of a .bin file, (n,) uint16, read from disk as they are used."""
    if not path.is_file():
        known = ', '.join(sorted(p.parent.name for p in ROOT.glob('data/*/prepare.py')))
        fail(f"there is no {path}: " + (f"run `python {prepare}` first" if prepare.is_file()
                                        else f"dataset '{dataset}' is none of {known}"))
    if path.stat().st_size % 2:
        fail(f"{path} holds {path.stat().st_size} bytes, an odd number, but a token takes two: write it anew with `python {prepare}`")
    return np.asarray(np.memmap(path, dtype='<u2', mode='r')) if path.stat().st_size else np.zeros(0, '<u2')


if dataset is None:
    train_data = val_data = randomness('train', 0).integers(50257, size=max(2 ** 20, 2 * block_size), dtype='<u2')
else:
    train_data, val_data = open_bin(data_dir / 'train.bin'), open_bin(data_dir / 'val.bin')


def foreign_id(name, tokens):
    return (f"{data_dir / name} holds the token id {tokens.max()}, but the model's vocabulary ends at {model_args['vocab_size'] - 1}: "
            f"was the data prepared with another tokenizer?")


blocks = max(1, len(train_data) // block_size - 1)  # of an epoch: one less than there are leaves room for their offset


@lru_cache(maxsize=2)
def blocks_of_epoch(epoch):
    """Where each block of train.bin begins, (blocks,), in the order of this epoch and at its own offset."""
    random = randomness('epoch', epoch)
    offset = random.integers(len(train_data) - blocks * block_size)  # so that over the epochs every token has its turn
    return offset + block_size * random.permutation(blocks)


def get_batch(stream, iteration, micro_step):
    """X, Y (B, T) int64 on the device: windows at random places and the same one token later, -1 behind the last."""
    data, in_order = val_data if stream == 'eval-val' else train_data, stream == 'eval-val' and config['eval_iters'] is None
    if in_order:
        starts = (micro_step * batch_size + np.arange(batch_size)) * block_size
    elif sampler == 'epoch' and stream == 'train':
        first = (iteration * gradient_accumulation_steps + micro_step) * batch_size
        starts = np.array([blocks_of_epoch(i // blocks)[i % blocks] for i in range(first, first + batch_size)])
    else:
        starts = randomness(stream, iteration, micro_step).integers(len(data) - block_size, size=batch_size)
    places = starts[:, None] + window                             # (B, T + 1)
    tokens = data[np.minimum(places, len(data) - 1) if in_order else places]  # (B, T + 1) uint16
    if tokens.max() >= model_args['vocab_size']:
        leave(1, foreign_id('val.bin' if stream == 'eval-val' else 'train.bin', tokens))
    tokens = torch.from_numpy(tokens.view(np.int16))              # two bytes a token on the way, widened there
    if device_type == 'cuda':
        tokens = tokens.pin_memory()
    tokens = tokens.to(device, non_blocking=True).long() & 0xFFFF  # (B, T + 1)
    X, Y = tokens[:, :-1], tokens[:, 1:]
    return X, Y.masked_fill(torch.from_numpy(places[:, 1:] >= len(data)).to(device), -1) if in_order else Y


# -----------------------------------------------------------------------------
# The model: anew, from a checkpoint, or GPT-2

ckpt_path, last_path, metrics_path = (os.path.join(out_dir, name) for name in ('ckpt.pt', 'last.pt', 'metrics.jsonl'))
iter_num, best_val_loss, wandb_id, checkpoint, source = 0, math.inf, None, None, None
keeps = dataset is not None and not eval_only  # whether this run leaves files
if master and keeps:
    with writing(out_dir):
        os.makedirs(out_dir, exist_ok=True)
        if os.name == 'posix':
            import fcntl
            folder = os.open(out_dir, os.O_RDONLY)
            try:  # the lock is the folder's own and ends with this process, whatever ends it
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fail(f"another run is writing to {out_dir}: give this one another --out_dir")
            except OSError as error:  # some network file systems
                print(f"{out_dir} cannot be locked ({error.strerror}): nothing keeps another run from writing there")
        for path in (ckpt_path, last_path, metrics_path):
            Path(f'{path}.part').unlink(missing_ok=True)  # of a run that was killed while it wrote
found = [path for path in (ckpt_path, last_path) if os.path.exists(path)]
if init_from == 'auto':
    init_from = 'resume' if found else 'scratch'
shape = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, bias=bias, dropout=dropout)
torch.manual_seed(seed)
try:
    spec = read_tokenizer(data_dir) if dataset else {'kind': 'gpt2'}
    if init_from == 'scratch':
        # GPUs multiply by 50304 faster than by 50257, so all but characters are rounded up to a multiple of 64
        vocab_size = (spec.get('vocab_size') or len(spec['itos']) if spec['kind'] == 'char' else
                      50304 if spec['kind'] == 'gpt2' else math.ceil(Tokenizer(spec).size / 64) * 64)
        model = GPT(GPTConfig(vocab_size=vocab_size, **shape))
    elif init_from == 'resume':
        checkpoint, source = max(((read_checkpoint(path), path) for path in found or [ckpt_path]), key=lambda pair: pair[0]['iter_num'])
        model = GPT.from_checkpoint(checkpoint, dropout=dropout)
        if checkpoint.setdefault('tokenizer', spec) != spec:
            raise ValueError(f"{data_dir} was prepared with another tokenizer than the data that {source} was trained on")
        iter_num, best_val_loss, wandb_id = checkpoint['iter_num'], float(checkpoint['best_val_loss']), checkpoint.get('wandb_id')
    else:
        if init_from in GPT2_SIZES and spec['kind'] != 'gpt2':
            raise ValueError(f"{data_dir} is not in the encoding that {init_from} reads: prepare it with GPT-2's, or start with --init_from=scratch")
        model = GPT.from_pretrained(init_from, dropout=dropout)
        if (Path(init_from) / 'tokenizer.json').is_file():
            theirs, ours = model.tokenizer(), Tokenizer(spec) if spec['kind'] != 'gpt2' else None
            every = ours.decode(list(range(ours.size))) if ours else ''
            if ours and theirs.encode(every) != ours.encode(every) or not ours and theirs.size != 50257:
                raise ValueError(f"{data_dir} was prepared with another tokenizer than the one in {init_from}")
    if block_size < model.config.block_size:
        model.crop_block_size(block_size)
    model.to(device).activation_checkpointing = activation_checkpointing
    optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type, optimizer)  # no longer its name
    if checkpoint and not eval_only:  # moments from the checkpoint; learning rate, decay and betas from the command line
        groups = optimizer.state_dict()['param_groups']
        same = [len(group['params']) for group in groups] == [len(group['params']) for group in checkpoint['optimizer']['param_groups']]
        if same:
            optimizer.load_state_dict({**checkpoint['optimizer'], 'param_groups': groups})
            wpe = optimizer.state.get(model.transformer.wpe.weight, {})
            wpe.update({key: m[:block_size].clone() for key, m in wpe.items() if m.dim()})  # cropped with it
            same = all(m.shape == p.shape for p, moments in optimizer.state.items() for m in moments.values() if m.dim())
        if not same:  # nanoGPT sorted its parameters otherwise before 2023
            raise ValueError(f"the optimizer state in {source} is laid out for another list of parameters, or for another --optimizer than {config['optimizer']}")
        scaler.load_state_dict(checkpoint.get('scaler') or scaler.state_dict())
except ValueError as error:
    fail(error)
except KeyError as error:
    fail(f"cannot resume from {out_dir}: the checkpoint lacks {error}")
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
if dataset is None:
    train_data %= min(model_args['vocab_size'], 50257)  # and with it val_data, which is the same
for name, data in (('train.bin', train_data), ('val.bin', val_data)):
    if len(data) <= block_size:
        fail(f"{data_dir / name} holds {len(data)} tokens, but a sequence takes block_size + 1 = {block_size + 1}: "
             f"use a smaller --block_size or more text")
    if data[:2 ** 27].max() >= model_args['vocab_size']:  # here for most data sets, for what lies behind in get_batch
        fail(foreign_id(name, data[:2 ** 27]))
eval_iters = eval_iters or math.ceil((len(val_data) - 1) / (batch_size * block_size))

if master:
    print(f"tokens per iteration will be: {gradient_accumulation_steps * batch_size * block_size:,}")
    print({'scratch': "a new model", 'resume': f"resuming {source} at iteration {iter_num}" if checkpoint else ""}.get(init_from, f"GPT-2 weights from {init_from}")
          + f": {model.get_num_params() / 1e6:.2f}M parameters, vocabulary {model_args['vocab_size']}; {device}, {dtype}"
          + (f", {world_size} processes" if distributed else ''))
    if keeps:
        epochs = max_iters * gradient_accumulation_steps * batch_size * block_size / len(train_data)
        print(f"data/{dataset}: {len(train_data):,} tokens to train on, {epochs:.2f} epochs in {max_iters:,} iterations; {len(val_data):,} to validate on")
    for key, old in (checkpoint or {}).get('config', {}).items():
        if key in config and config[key] != old and key != 'init_from':
            print(f"{key} was {old!r} in the checkpoint, is {config[key]!r} now")

    if found and not checkpoint and keeps:
        print(f"{' and '.join(found)} of an earlier run will be overwritten")
checkpoint = None  # frees its memory

# -----------------------------------------------------------------------------
# compile, then spread over the processes

def trial():
    """A micro-step of which only the gradients remain; how long it took, in seconds."""
    started = time.perf_counter()
    with autocast:
        loss = model(*get_batch('train', iter_num, rank))[1]
    loss.backward()
    loss.item()  # waits for the device
    return time.perf_counter() - started


def peak_memory():
    """The most memory that this process has had so far, on its device, in GB; None where the system does not tell."""
    if device_type == 'cuda':
        return torch.cuda.max_memory_allocated() / 1e9
    if device_type == 'cpu' and os.name == 'posix':
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1e-9 if sys.platform == 'darwin' else 1.024e-6)


def time_left(seconds, done):
    """What remains after `done` iterations of so many seconds each, evaluations included, as h:mm:ss."""
    evaluations = math.ceil(max_iters / eval_interval) - math.ceil(done / eval_interval) + 1 if keeps else 0
    minutes, seconds = divmod(round((max_iters - done) * seconds + evaluations * eval_seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


if compile:
    started = time.perf_counter()
    failed = compile_method(model, 'forward', trial)  # compilers fail at the first call, so make that here
    compile = not failed
    model.zero_grad(set_to_none=True)
    if master:
        print(failed or f"compiled in {time.perf_counter() - started:.0f} s")
eval_seconds = 0.0                  # how long an evaluation and its checkpoint take
if keeps and iter_num < max_iters:  # what to expect, before anybody waits for it
    trial()                         # warms up
    if gradient_accumulation_steps == world_size:
        model.zero_grad(set_to_none=True)  # else the gradients stand beside the next micro-step
    seconds = trial()
    model.zero_grad(set_to_none=True)
    eval_seconds = seconds / 3 * 2 * math.ceil(eval_iters / world_size)  # a forward pass is a third of a micro-step
    moments = 0 if optimizer.state else (8e-9 + 4e-9 * distributed) * model.get_num_params(False)  # GB, of AdamW in float32; DDP copies the gradients
    if master:
        print("estimated: " + (f"{peak_memory() + moments:.1f} GB of memory{' in each process' * distributed}, " if peak_memory() else '')
              + f"{time_left(seconds * gradient_accumulation_steps / world_size, iter_num)} to the end")
ddp_model = model
if distributed:
    dist.init_process_group(backend, timeout=timedelta(seconds=dist_timeout))
    first, last = (all_reduce(torch.tensor(iter_num, device=device), operation).item() for operation in (dist.ReduceOp.MIN, dist.ReduceOp.MAX))
    if first != last:
        fail(f"some ranks found a checkpoint of iteration {last} and others of {first}: {out_dir} must be one folder, shared by all machines")
    ddp_model = DistributedDataParallel(model)
    voters = dist.new_group(backend='gloo', timeout=timedelta(seconds=dist_timeout))  # for the flags of vote(), away from the gradients

# -----------------------------------------------------------------------------
# evaluating, scheduling, recording, saving


@torch.no_grad()
def estimate_loss():
    """Mean loss of eval_iters micro-batches of each split, the same ones every time, shared among the ranks; None when asked to leave."""
    model.eval()
    losses = torch.zeros(2, 2, device=device)  # sum and weight of each split
    for (total, weight), stream in zip(losses, ('eval-train', 'eval-val')):
        for k in tqdm(range(rank, math.ceil(eval_iters / world_size) * world_size, world_size), stream, leave=False, disable=None if master else True):
            if asked_to_leave and not distributed:
                return None
            X, Y = get_batch(stream, 0, k)
            with autocast:
                loss = model(X, Y)[1]
            if k < eval_iters:  # every rank runs as many, so that none is waited for
                share = (Y >= 0).float().mean()  # 1 but for the last ones of a val.bin gone through in order
                total += loss * share
                weight += share
    model.train()
    totals, weights = all_reduce(losses).T
    return (totals / weights).tolist()


def perplexity(loss):
    """The loss of all of val.bin as papers state it: per token, and per word where the data set's prepare.py has counted them."""
    tokens = len(val_data) - 1
    try:
        words = json.loads((data_dir / 'words.json').read_text())['val']
    except (OSError, ValueError, KeyError, TypeError):
        words = 0

    def per(count, unit):
        nats = loss * tokens / count
        return f"{math.exp(nats) if nats < 99 else math.inf:.2f} per {unit} ({count:,})"
    return f"val.bin once through: perplexity {per(tokens, 'token')}" + (f", {per(words, 'word')}" if words else '')


def get_lr(it):
    """Linear warm-up, then down to min_lr: half a cosine (Loshchilov & Hutter 2017), a line, or a level and a line (Hu et al. 2024, MiniCPM)."""
    if not decay_lr:
        return learning_rate
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it >= lr_decay_iters:
        return min_lr
    progress = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    height = {'cosine': 0.5 * (1 + math.cos(math.pi * progress)), 'linear': 1 - progress, 'wsd': min(1, 5 * (1 - progress))}[lr_schedule]
    return min_lr + height * (learning_rate - min_lr)


def open_metrics():
    """metrics.jsonl, to go on behind the lines that stand before the checkpoint: a resumed run repeats the others, and wandb has them."""
    kept = []
    if source and os.path.exists(metrics_path):
        with open(metrics_path, encoding='utf-8') as f:
            for line in f:
                try:
                    old = json.loads(line)
                    if old['iter'] < iter_num:
                        kept.append(line)
                    else:
                        repeated.add((old['iter'], 'loss' in old))
                except (ValueError, KeyError, TypeError):
                    say(f"{metrics_path}: dropped a line that is torn: {line.strip()[:60]!r}")
    with open(f'{metrics_path}.part', 'w', encoding='utf-8') as f:
        f.writelines(kept)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f'{metrics_path}.part', metrics_path)
    return open(metrics_path, 'a', encoding='utf-8', buffering=1)


def record(**line):
    """A line of metrics.jsonl, and the same to wandb."""
    global metrics
    with writing(metrics_path):
        metrics = metrics or open_metrics()
        metrics.write(json.dumps(line) + '\n')
    if run and not (wandb_resumes and (line['iter'], 'loss' in line) in repeated):
        to_wandb('log', line, step=line['iter'])


def to_wandb(method, *arguments, **more):
    """Calls a method of the run at Weights & Biases, if there is one. Should wandb fail, a line says so and the training goes on."""
    global run
    try:
        if run:
            getattr(run, method)(*arguments, **more)
    except Exception as error:  # of many kinds, and never worth a run
        say(f"wandb has stopped ({one_line(error)}): {metrics_path} has all")
        run = None
        with suppress(Exception):  # the same again, at length, which would otherwise come when Python ends
            wandb.teardown()


def stop_if_not_finite():
    """Ends the run on all ranks, with its files as they are, if any iteration so far went wrong. Waits for the device."""
    first = all_reduce(first_bad.clone(), dist.ReduceOp.MIN).item()
    if first < math.inf:
        fail(f"iteration {first:.0f}: the loss or the norm of the gradient is not finite. Nothing was saved since; "
             "resume from the last checkpoint with a lower --learning_rate, or with another --seed")


def save_checkpoint(path):
    """Writes a checkpoint beside its place and renames it, so that there is a whole one at every instant."""
    stop_if_not_finite()
    if not master:
        return
    state = {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'model_args': model_args, 'iter_num': iter_num,
             'best_val_loss': best_val_loss, 'config': config, 'scaler': scaler.state_dict(), 'tokenizer': spec, 'wandb_id': wandb_id}
    with writing(path):
        try:
            with open(f'{path}.part', 'wb') as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
            if metrics:
                os.fsync(metrics.fileno())
            if saved_at is None and not source:
                Path(last_path).unlink(missing_ok=True)  # of another run, and perhaps further on than this one
            os.replace(f'{path}.part', path)
        except RuntimeError as error:  # torch.save's own, behind which the file system's stands
            raise (error.__context__ if isinstance(error.__context__, OSError) else error)
        finally:
            Path(f'{path}.part').unlink(missing_ok=True)
        if path == ckpt_path:
            Path(last_path).unlink(missing_ok=True)  # older now
        if os.name == 'posix':
            with suppress(OSError):  # the new name too survives a power cut, where the file system can promise it
                os.fsync(folder)


def vote():
    """
    Whether to leave before this iteration. Ranks may get SIGTERM in different iterations, so each posts its flag
    now and all read the sum an iteration later: they agree, and nobody has waited.
    """
    global ballot
    if not distributed:
        return asked_to_leave
    agreed = ballot is not None and ballot[0].wait() and ballot[1].item() > 0
    flag = torch.tensor(float(asked_to_leave))
    ballot = dist.all_reduce(flag, group=voters, async_op=True), flag
    return agreed


# -----------------------------------------------------------------------------
# The loop

run, repeated = None, set()                           # repeated: (iteration, whether it is of a log line) that an earlier part of the run has recorded
if wandb_log and keeps and master:
    try:
        import wandb
        wandb.init  # the folder of that name, which its runs leave, can be imported too
    except (ImportError, AttributeError):
        fail("wandb_log=True needs wandb: pip install wandb, or --wandb_log=False")
    why = ''
    for mode in (None, 'offline'):
        try:
            if not mode and os.environ.get('WANDB_MODE', 'online') == 'online' and not wandb.login(prompt=False):  # nobody answers a prompt in a batch job
                why = 'not logged in'
                continue
            run = wandb.init(project=wandb_project, name=wandb_run_name, config=config, id=wandb_id, resume='allow' if wandb_id else None, mode=mode)
            break
        except Exception as error:  # of many kinds
            why = one_line(error).rstrip('.')
    if not run:
        fail(f"wandb does not start ({why}): --wandb_log=False trains without it")
    if mode:
        print(f"wandb: {why}, so this run stays on disk; later: wandb login && wandb sync {shlex.quote(os.path.dirname(run.dir))}")
    wandb_resumes, wandb_id = run.id == wandb_id, run.id

peak = peak_flops or peak_flops_of(device, dtype)
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
batch = None                                          # the next one, read ahead
loss_sum = torch.zeros((), device=device)             # of this rank's micro-batches of one iteration
first_bad = torch.full((), math.inf, device=device)   # the first iteration with a loss or gradient that is not finite
profiled = max(iter_num, min(iter_num + 10, max_iters - 1))  # the iteration that `profile` looks into: warm by then
timings = []                                          # seconds per iteration, one for each log line
clock, iterations = time.perf_counter(), 0            # since the last log line; evaluations and checkpoints stop the clock
start_iter, ballot, metrics = iter_num, None, None
saved_at = iter_num if source == ckpt_path else None  # the iteration of the newest checkpoint of this run
held = None                                           # the validation loss of what it has written to ckpt.pt
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, ask_to_leave)
model.train()
# A person who watches gets a bar under the lines; a file or a pipe, the lines alone
tqdm.set_lock(RLock())  # its own is one for several processes, which Python misses when they end by os._exit
bar = tqdm(total=max_iters, initial=iter_num, leave=False, disable=None if master and not eval_only else True, dynamic_ncols=True, bar_format='{n_fmt}/{total_fmt} {bar:20} {desc}')
say = tqdm.write
while True:
    if vote():
        moved = keeps and iter_num > start_iter
        if moved and saved_at != iter_num:
            save_checkpoint(ckpt_path if always_save_checkpoint else last_path)
        if master:
            say(f"asked to leave before iteration {iter_num}: " + (f"all is in {out_dir}, go on with --init_from=resume" if moved
                                                                    else "nothing has changed, nothing is saved"))
        break

    at_evaluation = eval_only or keeps and (iter_num % eval_interval == 0 or iter_num >= max_iters)
    if at_evaluation or (keeps and checkpoint_interval and iter_num % checkpoint_interval == 0):
        if device_type == 'cuda':
            torch.cuda.synchronize()
        paused = time.perf_counter()
        improved = False
        if at_evaluation:
            losses = estimate_loss()
            if losses is None:
                continue
            train_loss, val_loss = losses
            improved = val_loss < best_val_loss
            if master:
                say(f"step {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
                if config['eval_iters'] is None:
                    say(perplexity(val_loss))
            if keeps and not math.isfinite(train_loss + val_loss):
                stop_if_not_finite()
                fail(f"iteration {iter_num}: the evaluated loss is not finite. Resume from the last checkpoint with a lower --learning_rate")
        if keeps:
            best_val_loss = min(best_val_loss, val_loss) if improved else best_val_loss
            if master and at_evaluation:
                record(**{'iter': iter_num, 'train/loss': train_loss, 'val/loss': val_loss, 'lr': get_lr(iter_num), 'tokens': iter_num * tokens_per_iter})
            if iter_num != saved_at:
                save_checkpoint(ckpt_path if improved or always_save_checkpoint else last_path)
                saved_at = iter_num
                held = val_loss if improved or at_evaluation and always_save_checkpoint else held
            eval_seconds = time.perf_counter() - paused if at_evaluation else eval_seconds
        clock += time.perf_counter() - paused
    if eval_only or iter_num >= max_iters:
        if keeps and master:
            say(f"best val loss {best_val_loss:.4f}" + ('' if held is None else f", in {ckpt_path}" if held <= best_val_loss else
                                                        f", but {ckpt_path} is the last model, of {held:.4f}: --always_save_checkpoint=False keeps the best"))
            say(f"sample from it: python {shlex.quote(str(typed(ROOT / 'sample.py')))} --out_dir={shlex.quote(out_dir)}")
        break

    profiler = None
    if profile and master and iter_num == profiled:
        paused = time.perf_counter()
        profiler = torch.profiler.profile()
        profiler.start()
        clock += time.perf_counter() - paused
    lr = get_lr(iter_num)
    for group in optimizer.param_groups:
        group['lr'] = lr
    for micro_step in range(rank, gradient_accumulation_steps, world_size):
        X, Y = batch or get_batch('train', iter_num, micro_step)
        if distributed:  # gradients are averaged over the ranks once, in the last backward pass
            ddp_model.require_backward_grad_sync = micro_step + world_size >= gradient_accumulation_steps
        if dropout:
            torch.manual_seed(int(randomness('dropout', iter_num, micro_step).integers(2 ** 63)))
        with autocast:
            _, loss = ddp_model(X, Y)
        scaler.scale(loss * (world_size / gradient_accumulation_steps)).backward()
        loss_sum += loss.detach()
        batch = get_batch('train', *divmod(iter_num * gradient_accumulation_steps + micro_step + world_size, gradient_accumulation_steps))  # while the device works
        if asked_to_leave and not distributed:
            break
    if asked_to_leave and not distributed:
        continue  # the parameters have not moved: leave with them as they were
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    # under float16 an infinite gradient is the scaler's business: it skips the step and scales down
    healthy = torch.isfinite(loss_sum if dtype == 'float16' else loss_sum + grad_norm)
    first_bad = torch.where(healthy, first_bad, first_bad.clamp(max=iter_num))

    iterations += 1
    if iter_num % log_interval == 0:
        stop_if_not_finite()
        train_loss = all_reduce(loss_sum).item() / gradient_accumulation_steps  # of this iteration, on all ranks
        seconds = (time.perf_counter() - clock) / iterations
        tokens_per_second = tokens_per_iter / seconds
        mfu = model.estimate_mfu(tokens_per_second / world_size, peak)
        norm = grad_norm.item()
        if not profiler:
            timings.append(seconds)
        if master:
            speed = f"{tokens_per_second:,.0f} tok/s, {time_left(seconds, iter_num + 1)} left"
            bar.set_description_str(f"loss {train_loss:.4f}, {speed}", refresh=False)
            say(f"iter {iter_num}: loss {train_loss:.4f}, time {seconds * 1000:.2f}ms, mfu {'n/a' if mfu is None else f'{mfu:.2%}'}, {speed}")
            if keeps:
                record(iter=iter_num, loss=train_loss, lr=lr, grad_norm=norm if math.isfinite(norm) else None, ms=seconds * 1000,
                       tokens_per_second=tokens_per_second, mfu=mfu, tokens=iter_num * tokens_per_iter)
        clock, iterations = time.perf_counter(), 0
    if profiler:
        paused = time.perf_counter()
        profiler.stop()
        say(profiler.key_averages().table(sort_by=f"self_{'device' if device_type == 'cuda' else 'cpu'}_time_total", row_limit=10, max_name_column_width=50))
        trace = os.path.join(out_dir, 'trace.json')
        with writing(trace):
            os.makedirs(out_dir, exist_ok=True)
            profiler.export_chrome_trace(trace)
        say(f"the whole of iteration {iter_num} is in {trace}: open it with chrome://tracing or ui.perfetto.dev")
        clock += time.perf_counter() - paused
    loss_sum.zero_()
    iter_num += 1
    bar.update()

bar.close()
if dataset is None and master and timings:
    timings = 1000 * np.array(timings[-max(1, len(timings) * 3 // 4):])  # the first quarter warms up
    speed = tokens_per_iter * 1000 / np.median(timings)
    print(json.dumps({
        'device': torch.cuda.get_device_name() if device_type == 'cuda' else f'{device}, {torch.get_num_threads()} threads', 'torch': torch.__version__,
        'ms': {'median': np.median(timings), 'min': timings.min(), 'max': timings.max()}, 'tokens_per_second': speed,
        'mfu': model.estimate_mfu(speed / world_size, peak), 'peak_memory_gb': peak_memory(),
        'settings': {**config, 'device': device, 'dtype': dtype, 'compile': compile, 'processes': world_size}}))
if distributed:
    if ballot:
        ballot[0].wait()
    dist.barrier(group=voters)  # until the last checkpoint is written
    dist.destroy_process_group()
to_wandb('finish')  # which may take its time: nobody waits for it any more
if distributed:
    leave(0)
