"""
Train a GPT from scratch, resume a run, or fine-tune GPT-2.

One process, on whatever the machine has:
    python train.py config/train_shakespeare_char.py --batch_size=32
One machine with 8 GPUs (for several machines see assets/notes.md):
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""

from __future__ import annotations  # the configurator reads annotations as text

import ctypes
import json
import math
import os
import shlex
import signal
import sys
import time
import traceback
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import Literal

ROOT = Path(__file__).resolve().parent

# -----------------------------------------------------------------------------
# The keys and their defaults: GPT-2 124M on OpenWebText, half a million tokens an iteration
out_dir = 'out'  # folder of the checkpoints, relative to the working directory
eval_interval = 2000  # iterations between evaluations, after which a checkpoint is saved
checkpoint_interval = 0  # iterations between further checkpoints, 0 for none
log_interval = 1  # iterations between log lines
eval_iters: int | None = 200  # micro-batches per evaluation and split; None: val.bin once, in order
eval_only = False  # evaluate once and exit
always_save_checkpoint = True  # False: ckpt.pt is the best model so far, last.pt the newest state
keep_checkpoints = 1  # ckpt.pt and, as ckpt-ITERATION.pt, those that were it before
rewind = False  # go back to ckpt.pt and on with other batches if the loss explodes
init_from = 'scratch'  # resume, auto (resume if possible), gpt2 … gpt2-xl, or a folder
seed = 1337  # of weights, batches and dropout
wandb_log = False  # report to Weights & Biases too
wandb_project = 'owt'
wandb_run_name = 'gpt2'
dataset: str | None = 'openwebtext'  # a folder of data/; None: random tokens, to time the loop
sampler: Literal['random', 'epoch'] = 'random'  # windows at random places, or every block once an epoch
gradient_accumulation_steps = 5 * 8  # micro-batches per iteration, over all processes together
batch_size = 12  # sequences per micro-batch
block_size = 1024  # tokens per sequence
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 for pretraining; for fine-tuning and small data try 0.1 and up
bias = False  # biases in the linear layers and norms
optimizer: Literal['adamw', 'muon'] = 'adamw'  # muon: for the matrices of the blocks, adamw for the rest
learning_rate = 6e-4  # peak
max_iters = 600000  # the run takes exactly this many iterations
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient, 0 for no limit
# learning rate schedule
decay_lr = True  # False: learning_rate throughout
lr_schedule: Literal['cosine', 'linear', 'wsd'] = 'cosine'  # wsd: constant until the last fifth, then linear
warmup_iters = 2000  # iterations of linear warm-up
lr_decay_iters = 600000  # where the learning rate arrives at min_lr, usually max_iters
min_lr = 6e-5  # usually learning_rate / 10
# the machine; None: what is there
backend: str | None = None  # of torch.distributed: nccl or gloo
dist_timeout = 600  # seconds that a process waits for the others
device: str | None = None  # cpu, cuda, cuda:1, mps
dtype: Literal['float32', 'bfloat16', 'float16'] | None = None  # float16 scales its gradients
compile: bool | None = None  # torch.compile; by default on CUDA
peak_flops: float | None = None  # FLOP/s that mfu is measured against
activation_checkpointing = False  # compute the blocks twice instead of storing them: less memory
profile = False  # profile one iteration: a table, and out_dir/trace.json
config, given_keys, key_types = {}, set(), {}  # of the configurator; given: by a file or by --key
exec((ROOT / 'configurator.py').read_text(encoding='utf-8'))
# -----------------------------------------------------------------------------
# these imports take seconds: --help and most mistakes are answered before
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.common import atomic_write, link, set_aside
from data.tokenizer import Tokenizer, read_tokenizer_spec
from model import GPT, GPTConfig, choose_device, compile_method, one_line, peak_flops_of, read_checkpoint

# ---------- The process: its place among the ranks, what it prints and records, how it ends ----------
PROJECT = os.path.dirname(sys.argv[0])  # this folder as the user typed it, for commands that we print
distributed = {'RANK', 'LOCAL_RANK', 'WORLD_SIZE'} <= set(os.environ)  # set by torchrun
rank, local_rank, world_size = (
    int(os.environ[name]) if distributed else alone
    for name, alone in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1))
)
master_process = rank == 0  # prints and saves
saving = dataset is not None and not eval_only  # whether this run leaves files
ckpt_path, last_path, metrics_path = (
    os.path.join(out_dir, name) for name in ('ckpt.pt', 'last.pt', 'metrics.jsonl')
)
stop_requested = False  # by SIGTERM or Ctrl-C; the loop stops where the state is complete


class Log:
    """What a run tells: lines on the screen, a progress bar under them, metrics.jsonl, Weights & Biases."""

    def __init__(self):
        self.bar, self.wandb_run = tqdm(disable=True), None
        self.metrics_path = metrics_path
        self.timings = []  # seconds per iteration, one for each log line
        tqdm.set_lock(RLock())  # the default is a lock between processes, which os._exit leaks

    def line(self, text):
        if master_process:
            tqdm.write(text)

    def start_clock(self, iter_num):
        """Times training from this iteration on. Called again after everything that is not training."""
        if self.bar.total is None:
            self.bar = tqdm(
                total=max_iters,
                initial=iter_num,
                leave=False,
                dynamic_ncols=True,
                disable=None if master_process and not eval_only else True,
                bar_format='{n_fmt}/{total_fmt} {bar:20} {desc}',
            )
        self.bar.update(iter_num - self.bar.n)
        self.clock, self.clock_iter = time.perf_counter(), iter_num
        if iter_num == start_iter:
            self.run_start = self.clock

    def step(self, iter_num, loss, grad_norm):
        """An iteration's log line and record. The time left follows from the mean speed of the whole run."""
        now, done = time.perf_counter(), iter_num + 1
        seconds = (now - self.clock) / (done - self.clock_iter)
        left = round((now - self.run_start) / (done - start_iter) * (max_iters - done))
        mfu = model.estimate_mfu(tokens_per_iter / block_size / world_size, seconds, peak_flops)
        speed = (
            f"{tokens_per_iter / seconds:,.0f} tok/s, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )
        self.bar.set_description_str(f"loss {loss:.4f}, {speed}", refresh=False)
        self.line(
            f"iter {iter_num}: loss {loss:.4f}, time {seconds * 1000:.2f}ms, "
            f"mfu {'n/a' if mfu is None else f'{mfu:.2%}'}, {speed}, {peak_memory():.2f} GB"
        )
        self.record(
            'train',
            iter_num,
            loss=loss,
            grad_norm=grad_norm if math.isfinite(grad_norm) else None,
            mfu=mfu,
            ms=seconds * 1000,
            tokens_per_second=tokens_per_iter / seconds,
        )
        self.timings.append(seconds)
        self.start_clock(done)

    def record(self, kind, it, **values):
        """A line of metrics.jsonl, of kind 'train' or 'eval', and the same to wandb."""
        values = {'iter': it, 'tokens': earlier_tokens + it * tokens_per_iter, 'lr': get_lr(it), **values}
        if master_process and saving:
            with open(self.metrics_path, 'a', encoding='utf-8') as f:
                f.write(json.dumps({'kind': kind, **values}) + '\n')
            self.to_wandb('log', values)

    def open_metrics(self, metrics_bytes):
        """A resumed run drops what came after its checkpoint, a new one leaves an earlier file alone."""
        Path(f'{metrics_path}.part').unlink(missing_ok=True)  # of a run that never saved
        if saved_iter is None and any(map(os.path.exists, (ckpt_path, last_path, metrics_path))):
            self.metrics_path = f'{metrics_path}.part'  # until the first save
        with open(self.metrics_path, 'wb+' if saved_iter is None else 'ab+') as f:
            f.truncate(min(f.tell(), metrics_bytes))
            f.seek(0)
            f.truncate(f.read().rfind(b'\n') + 1)  # a line that somebody has torn

    def open_wandb(self, run_id):
        """Starts a run of Weights & Biases, or goes on with the one of run_id."""
        try:
            from wandb import init  # an error too for the folder `wandb` that its runs leave

            self.wandb_run = init(
                project=wandb_project,
                name=wandb_run_name,
                config=config,
                id=run_id,
                resume='allow' if run_id else None,
            )
            self.wandb_run.define_metric('*', step_metric='iter')  # so that a repeated point replaces itself
        except Exception as error:  # of many kinds
            fail(
                f"wandb does not start ({one_line(error)}): `pip install wandb` if that is what it lacks, "
                "WANDB_MODE=offline without a login or a server; or --wandb_log=False"
            )

    def to_wandb(self, method, *arguments):
        """Calls a method of wandb's run, if there is one. A failure is a line, and training goes on."""
        try:
            if self.wandb_run:
                getattr(self.wandb_run, method)(*arguments)
        except Exception as error:  # of many kinds, and never worth a run
            self.line(f"wandb has stopped ({one_line(error)}): {metrics_path} has all")
            self.wandb_run = None
            with suppress(Exception):  # else wandb prints the same again when Python exits
                sys.modules['wandb'].teardown()


log = Log()


def fail(message):
    """Ends the run in one line."""
    if local_rank:  # rank 0 prints first and torchrun then ends the others, unless this one fails alone
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    log.bar.close()
    if distributed:
        print(message, file=sys.__stderr__, flush=True)  # the wrapped sys.stderr puts the rank in front
        os._exit(1)  # gloo's threads abort one teardown of the interpreter in twelve
    sys.exit(str(message))


def excepthook(kind, error, trace):
    """One line for what is not a bug: what our own files raise, the file system, lost ranks, no memory."""
    sys.stdout = None  # else Python would try once more to write to a full disk or a closed pipe
    if kind is RuntimeError and isinstance(error.__context__, OSError):  # of torch.save
        error = error.__context__
    last = traceback.extract_tb(trace)[-1]
    ours = Path(last.filename).resolve().parent in (ROOT, ROOT / 'data') and last.line.startswith('raise ')
    if distributed and (isinstance(error, dist.DistError) or 'gloo' in str(error)):
        fail(f"rank {rank}: lost the other ranks, go on with --init_from=resume ({one_line(error)})")
    elif isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        fail(f"out of memory on {device}: halve --batch_size, double --gradient_accumulation_steps")
    elif isinstance(error, BrokenPipeError):  # python train.py … | head
        fail("nobody reads this run's output any more: go on with --init_from=auto")
    elif isinstance(error, OSError) or ours and isinstance(error, ValueError):
        fail(f"{error.filename or out_dir}: {error.strerror}" if getattr(error, 'strerror', None) else error)
    else:
        default_excepthook(kind, error, error.__traceback__)


def request_stop(number, frame):
    global stop_requested
    stop_requested = True
    if not distributed:  # torchrun repeats the first Ctrl-C; here a second one ends the run at once
        signal.signal(signal.SIGINT, signal.default_int_handler)


default_excepthook, sys.excepthook = sys.excepthook, excepthook


def all_reduce(values, operation=dist.ReduceOp.SUM):
    """The sum, or another reduction, of a tensor over all ranks."""
    if distributed:
        dist.all_reduce(values, operation)
    return values


# ---------- The run and the machine: folder, checkpoint to resume, settings, device ----------
# Keys that are never taken from a checkpoint; a resumed run takes all others unless they are given
NOT_TAKEN = 'out_dir init_from eval_only profile device dtype compile backend dist_timeout peak_flops'.split()


def set_keys(**values):
    """Rebinds keys that were left open. A key is a global and an entry of config, always the same."""
    globals().update(values)
    config.update(values)


def lock_out_dir():
    """Makes out_dir and locks it for this process, for as long as the returned file is open."""
    os.makedirs(out_dir, exist_ok=True)
    lock = open(os.path.join(out_dir, '.lock'), 'a')
    with suppress(ImportError):  # on Windows
        import fcntl

        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a notebook may lock again what it has locked
        except (BlockingIOError, PermissionError):
            fail(f"another run is writing to {out_dir}: give this one another --out_dir")
        except OSError as error:  # some network file systems
            log.line(f"{out_dir} cannot be locked ({error.strerror}): do not start another run there")
    return lock


def kept_checkpoints():
    """The paths of ckpt-ITERATION.pt, newest first."""
    kept = [path for path in Path(out_dir).glob('ckpt-*.pt') if path.stem[5:].isdecimal()]
    return [str(path) for path in sorted(kept, key=lambda path: -int(path.stem[5:]))]


def newest_checkpoint():
    """(checkpoint, its path, iteration of ckpt.pt) of ckpt.pt or last.pt, whichever is newer and has not
    exploded; where neither will do, of the newest one that was kept. Damaged ones are named."""
    needed = ('iter_num', 'config') if eval_only else ('iter_num', 'config', 'optimizer')
    read, paths = {}, found or [ckpt_path]
    for path in paths:
        try:
            if path == last_path or all(checkpoint.get('exploded') for checkpoint in read.values()):
                read[path] = read_checkpoint(path, needed)
        except ValueError as error:
            if path == paths[-1] and not read:
                raise
            log.line(str(error))
    path = max(read, key=lambda path: (not read[path].get('exploded'), read[path]['iter_num']))
    return read[path], path, read.get(ckpt_path, {}).get('iter_num')


folder_lock = lock_out_dir() if master_process and (saving or profile) else None
found = [path for path in (ckpt_path, last_path, *kept_checkpoints()) if os.path.exists(path)]
if init_from == 'auto':
    set_keys(init_from='resume' if found else 'scratch')
checkpoint, resume_path, ckpt_iter = newest_checkpoint() if init_from == 'resume' else ({}, None, None)
start_iter, saved_iter = checkpoint.get('iter_num', 0), checkpoint.get('iter_num')  # saved: in a file
saved_config = {
    key: float(value) if type(value) is int and float in key_types[key] else value
    for key, value in checkpoint.get('config', {}).items()
    if key in config and key not in NOT_TAKEN
}
for key in saved_config.keys() - given_keys:
    if type(saved_config[key]) not in key_types[key] and saved_config[key] not in key_types[key]:
        fail(f"{resume_path} has {key}={saved_config[key]!r}: set it to what --help lists")
    set_keys(**{key: saved_config[key]})

for least, keys in (
    (1, 'eval_interval log_interval eval_iters gradient_accumulation_steps batch_size block_size'),
    (0, 'seed max_iters warmup_iters grad_clip checkpoint_interval learning_rate weight_decay'),
):
    for key in keys.split():
        if config[key] is not None and config[key] < least:
            fail(f"{key} must be at least {least}, not {config[key]}")
if dataset is None and (eval_only or resume_path or max_iters <= log_interval):
    fail("dataset=None only times training, for more than log_interval iterations: name a --dataset")
if gradient_accumulation_steps % world_size:
    fail(
        f"gradient_accumulation_steps {gradient_accumulation_steps} is not divisible by the world size "
        f"{world_size}: try {math.ceil(gradient_accumulation_steps / world_size) * world_size}"
    )

device, dtype = choose_device(device, dtype, local_rank)
device_type = torch.device(device).type
set_keys(
    device=device,
    dtype=dtype,
    peak_flops=peak_flops or peak_flops_of(device, dtype),
    backend=backend or ('nccl' if device_type == 'cuda' else 'gloo'),
    compile=device_type == 'cuda' and os.name == 'posix' if compile is None else compile,
)
if distributed and (device_type == 'mps' or not dist.is_backend_available(backend)):
    fail(f"backend {backend!r} on {device}: this PyTorch has none; --device=cpu --backend=gloo runs anywhere")
if dropout and activation_checkpointing and (device_type == 'mps' or compile and device_type == 'cuda'):
    fail("backward would draw other dropout: leave off activation_checkpointing or, on CUDA, compile")
if device_type == 'cuda':
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision('high')  # TF32 where float32 remains
with suppress(AttributeError, OSError, TypeError):  # glibc only: saves up to a third of a step
    ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: no pages of its own for a large block
    ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing goes back to the system
autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')


def peak_memory():
    """The most memory that this process has used on its device, in GB; 0 where the system does not tell."""
    if device_type == 'cuda':
        return torch.cuda.max_memory_allocated() / 1e9
    if device_type == 'mps' or os.name != 'posix':
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1e-9 if sys.platform == 'darwin' else 1.024e-6)  # bytes on macOS, KiB elsewhere


# Randomness is a function of (seed, stream, iteration, micro-step): nothing of it needs saving, and a
# micro-batch is the same whichever rank draws it. (The ranks take the micro-steps in turn.)
STREAMS = {'train': 0, 'eval-train': 1, 'eval-val': 2, 'dropout': 3, 'epoch': 4}

rewinds = checkpoint.get('rewinds', 0)  # how often the run went back since its best model: other batches


def rng(stream, iteration, micro_step=0):
    shift = 0 if stream.startswith('eval') else rewinds << 32
    return np.random.default_rng((seed, STREAMS[stream], iteration + shift, micro_step))


# ---------- The model and its optimizer ----------
data_dir = ROOT / 'data' / (dataset or '')
prepare_command = f"python {os.path.join(PROJECT, 'data', dataset or '', 'prepare.py')}"
for path in (data_dir / 'train.bin', data_dir / 'val.bin') if dataset else ():
    if not path.is_file():
        known = {p.parent.name for name in ('prepare.py', 'train.bin') for p in ROOT.glob(f'data/*/{name}')}
        fail(
            f"there is no {path}: "
            + (
                f"run `{prepare_command}` first"
                if (data_dir / 'prepare.py').exists()
                else f"dataset {dataset!r} is none of {', '.join(sorted(known))}"
            )
        )
tokenizer_spec = read_tokenizer_spec(data_dir) if dataset else {'kind': 'gpt2'}


def make_model(checkpoint):
    """The model of a checkpoint to go on from, or a new one, or the one that init_from names."""
    source = checkpoint.get('tokenizer', tokenizer_spec)  # nanoGPT's checkpoints have none
    if checkpoint:
        model = GPT.from_checkpoint(checkpoint, dropout)
    elif init_from == 'scratch':
        n = 50257 if source['kind'] == 'gpt2' else source.get('vocab_size') or Tokenizer(source).vocab_size
        vocab_size = n if source['kind'] == 'char' else math.ceil(n / 64) * 64  # GPUs like multiples of 64
        model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias))
    else:
        model = GPT.from_pretrained(init_from, dict(dropout=dropout))
        source = model.tokenizer_source
    if dataset and source != tokenizer_spec and not model.tokenizer().reads_like(Tokenizer(tokenizer_spec)):
        raise ValueError(f"{data_dir} was prepared with another tokenizer than {resume_path or init_from}")
    model.crop_block_size(min(block_size, model.config.block_size))
    return model.to(device).train()


def make_optimizer(checkpoint):
    """On resume the moments are the checkpoint's; learning rate, weight decay and betas those of the keys."""
    optim = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type, optimizer)
    if not checkpoint or eval_only:
        return optim
    try:
        saved, groups = checkpoint['optimizer'], optim.state_dict()['param_groups']
        for ours, theirs in zip(groups, saved['param_groups'], strict=True):
            ours['params'] = theirs['params']
        optim.load_state_dict({'state': saved['state'], 'param_groups': groups})
        wpe = optim.state.get(model.transformer.wpe.weight, {})
        wpe.update({name: m[:block_size].clone() for name, m in wpe.items() if m.dim()})  # cropped like wpe
        for p, state in optim.state.items():
            names = ('momentum',) if 'momentum' in state else ('exp_avg', 'exp_avg_sq')
            shapes = {name: m.shape for name, m in state.items() if m.is_contiguous()}
            if shapes != {'step': (), **dict.fromkeys(names, p.shape)}:  # fused AdamW writes by memory order
                raise ValueError("moments that are missing or of other shapes")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{resume_path} has the state of another --optimizer than {optimizer}") from error
    return optim


torch.manual_seed(seed)
model = make_model(checkpoint)
model.activation_checkpointing = activation_checkpointing
optim = make_optimizer(checkpoint)
scaler.load_state_dict(checkpoint.get('scaler') or scaler.state_dict())  # {} if the scaler was off
iter_num, best_val_loss = start_iter, checkpoint.get('best_val_loss', math.inf)
# What a checkpoint tells of its model: nanoGPT's seven keys, and one more only where we depart from nanoGPT
model_args = {
    key: getattr(model.config, key)
    for key in (
        'n_layer',
        'n_head',
        'n_embd',
        'block_size',
        'bias',
        'dropout',
        'vocab_size',
        *(('activation',) if model.config.activation != 'gelu' else ()),
    )
}
for key in model_args:
    if key in config and config[key] != model_args[key]:
        log.line(f"{key} is {model_args[key]!r}, as the weights have it, not {config[key]!r}")
        set_keys(**{key: model_args[key]})
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
earlier_tokens = checkpoint.get('tokens', start_iter * tokens_per_iter) - start_iter * tokens_per_iter


# ---------- The data ----------
def open_bin(path):
    """The tokens of a .bin file, (n,) uint16, read from disk as they are used."""
    size = path.stat().st_size
    if size % 2:
        fail(f"{path} is cut off in the middle of a token: run `{prepare_command}` again")
    if size // 2 <= block_size:
        fail(
            f"{path} holds {size // 2} tokens, but a sequence takes block_size + 1 = {block_size + 1}: "
            "use a smaller --block_size or more text"
        )
    return np.asarray(np.memmap(path, dtype='<u2', mode='r'))


if dataset is None:
    train_data = val_data = rng('train', 0).integers(
        min(model_args['vocab_size'], 50257), dtype='<u2', size=max(2**20, 2 * block_size)
    )
else:
    train_data, val_data = open_bin(data_dir / 'train.bin'), open_bin(data_dir / 'val.bin')
eval_batches = eval_iters or math.ceil((len(val_data) - 1) / (batch_size * block_size))
blocks = max(1, len(train_data) // block_size - 1)  # per epoch, one fewer than fit: room for the offset


@lru_cache(maxsize=2)
def blocks_of_epoch(epoch, rewinds):
    """Where the blocks of train.bin begin, (blocks,), in the random order and at the offset of this epoch."""
    random = rng('epoch', epoch)
    offset = random.integers(len(train_data) - blocks * block_size)  # in the end every token has its turn
    return offset + block_size * random.permutation(blocks)


@lru_cache(maxsize=1)  # so that the next batch can be read ahead
def get_batch(stream, iteration, micro_step):
    """X, Y (B, T) int64 on the device: windows of tokens, and the same shifted by one, -1 past the end."""
    name, data = ('val.bin', val_data) if stream == 'eval-val' else ('train.bin', train_data)
    in_order = stream == 'eval-val' and eval_iters is None
    if in_order:
        starts = (micro_step * batch_size + np.arange(batch_size)) * block_size
    elif stream == 'train' and sampler == 'epoch':
        first = (iteration * gradient_accumulation_steps + micro_step) * batch_size
        epochs, indices = divmod(first + np.arange(batch_size), blocks)
        starts = np.array([blocks_of_epoch(n, rewinds)[i] for n, i in zip(epochs, indices, strict=True)])
    else:
        starts = rng(stream, iteration, micro_step).integers(len(data) - block_size, size=batch_size)
    positions = starts[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    tokens = data[np.minimum(positions, len(data) - 1)]  # (B, T + 1) uint16
    if tokens.max() >= model_args['vocab_size']:
        fail(
            f"{data_dir / name} holds the token id {tokens.max()}, but the model's vocabulary ends at "
            f"{model_args['vocab_size'] - 1}: was the data prepared with another tokenizer?"
        )
    tokens = torch.from_numpy(tokens.view(np.int16))  # uint16 is rarely supported
    tokens = tokens.pin_memory() if device_type == 'cuda' else tokens
    tokens = tokens.to(device, non_blocking=True).long() & 0xFFFF  # (B, T + 1), unsigned again
    X, Y = tokens[:, :-1], tokens[:, 1:].contiguous()
    if in_order:
        Y = Y.masked_fill(torch.from_numpy(positions[:, 1:] >= len(data)).to(device), -1)
    return X, Y


# ---------- torch.compile, then DistributedDataParallel ----------
log.line(f"tokens per iteration will be: {tokens_per_iter:,}")
log.line(
    (
        f"resuming {resume_path} at iteration {start_iter}"
        if resume_path
        else "a new model"
        if init_from == 'scratch'
        else f"weights from {init_from}"
    )
    + f": {model.get_num_params() / 1e6:.2f}M parameters, vocabulary {model_args['vocab_size']}; "
    f"{device}, {dtype}"
    + " (this CPU has units for it)" * ((device, dtype) == ('cpu', 'bfloat16') and 'dtype' not in given_keys)
    + f", {world_size} processes" * distributed
)
if saving:
    log.line(
        f"data/{dataset}: {len(train_data):,} tokens to train on, "
        f"{max_iters * tokens_per_iter / len(train_data):.2f} epochs in {max_iters:,} iterations; "
        f"{len(val_data):,} to validate on"
    )
for key, saved in {'dtype': dtype, **checkpoint.get('config', {})}.items():
    if key in (*saved_config, 'dtype') and config[key] != saved:
        log.line(f"{key} was {saved!r} in the checkpoint, is {config[key]!r} now")
if saving and iter_num >= max_iters:
    log.line(f"max_iters {max_iters} is reached: to go on, raise --max_iters and --lr_decay_iters")
elif saving and decay_lr and warmup_iters >= max_iters:
    log.line(f"the run never leaves its warm-up: warmup_iters {warmup_iters}, max_iters {max_iters}")
elif saving and decay_lr and lr_decay_iters < max_iters:
    log.line(f"lr_decay_iters {lr_decay_iters} is before max_iters {max_iters}: the rest runs at min_lr")


def try_compiled():
    for training in (False, True):  # evaluation is compiled too
        with autocast, torch.set_grad_enabled(training):
            loss = model.train(training)(*get_batch('train', start_iter, rank), return_logits=False)[1]
    loss.backward()
    model.zero_grad(set_to_none=True)


if compile:
    problem = compile_method(model, 'forward', try_compiled)
    set_keys(compile=not problem)
    log.line(problem or "compiled")
ddp_model = model.train()  # compiling may have failed while it evaluated
if distributed:
    dist.init_process_group(backend, timeout=timedelta(seconds=dist_timeout))
    last, first = all_reduce(torch.tensor([start_iter, -start_iter], device=device), dist.ReduceOp.MAX)
    if first + last:
        fail(f"checkpoints of iterations {-first} and {last} were found: {out_dir} must be one shared folder")
    ddp_model = DistributedDataParallel(model)


# ---------- Evaluating, the schedule, one iteration, saving, stopping ----------
@torch.no_grad()
def estimate_loss(batches):
    """Mean losses (train, val) over the same micro-batches every time; None if a stop was requested."""
    model.eval()
    losses = torch.zeros(2, 2, device=device)  # sum and weight per split; += below writes here
    rounds = math.ceil(batches / world_size)  # the same number on every rank
    for (total, weight), stream in zip(losses, ('eval-train', 'eval-val'), strict=True):
        steps = range(rank, rounds * world_size, world_size)
        for k in tqdm(steps, stream, leave=False, disable=None if master_process else True):
            if stop_requested and not (stopping or distributed):
                return None
            X, Y = get_batch(stream, 0, k)
            with autocast:
                loss = model(X, Y, return_logits=False)[1]
            if k < batches:
                share = (Y >= 0).float().mean()  # below 1 at the end of a val.bin that is read in order
                total += loss * share
                weight += share
    model.train()
    totals, weights = all_reduce(losses).T
    return (totals / weights).tolist()


def perplexity(loss):
    """The loss of all of val.bin as papers do: per token, and per word where prepare.py counted them."""
    counts = {'token': len(val_data) - 1}
    with suppress(OSError, ValueError, KeyError, TypeError):
        counts['word'] = int(json.loads((data_dir / 'words.json').read_text())['val'])
    return "\nval.bin once through: perplexity " + ', '.join(
        f"{np.exp(loss * counts['token'] / n):.2f} per {unit} ({n:,})" for unit, n in counts.items()
    )


def get_lr(it):
    """Linear warm-up to learning_rate, then down to min_lr in the shape that lr_schedule names."""
    if not decay_lr:
        return learning_rate
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it >= lr_decay_iters:
        return min_lr
    progress = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    factor = {
        'cosine': 0.5 * (1 + math.cos(math.pi * progress)),  # Loshchilov & Hutter 2017
        'linear': 1 - progress,
        'wsd': min(1, 5 * (1 - progress)),
    }[lr_schedule]  # Hu et al. 2024, MiniCPM
    return min_lr + factor * (learning_rate - min_lr)


def train_step(iter_num):
    """One iteration -> (this rank's sum of losses, gradient norm), or (None, None) if a stop came before."""
    for group in optim.param_groups:
        group['lr'] = get_lr(iter_num)
    loss_sum = torch.zeros((), device=device)
    for micro_step in range(rank, gradient_accumulation_steps, world_size):
        X, Y = get_batch('train', iter_num, micro_step)
        if distributed:  # gradients are averaged over the ranks once, in the last backward pass
            ddp_model.require_backward_grad_sync = micro_step + world_size >= gradient_accumulation_steps
        if dropout:
            torch.manual_seed(int(rng('dropout', iter_num, micro_step).integers(2**63)))
        with autocast:
            loss = ddp_model(X, Y, return_logits=False)[1]
        scaler.scale(loss * (1 / gradient_accumulation_steps)).backward()
        loss_sum += loss.detach()
        following = iter_num * gradient_accumulation_steps + micro_step + world_size
        get_batch('train', *divmod(following, gradient_accumulation_steps))  # while the device works
        if stop_requested and not distributed:
            return None, None
    if distributed:  # DDP has averaged; losses times world_size would have overflowed float16 sooner
        torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], world_size)
    scaler.unscale_(optim)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    scaler.step(optim)
    scaler.update()
    optim.zero_grad(set_to_none=True)
    return loss_sum, grad_norm


def save_checkpoint(to_ckpt, exploded):
    """Saves ckpt.pt or, where that is to stay, last.pt, which resume takes if it is newer and sound."""
    global saved_iter, ckpt_iter
    path = ckpt_path if to_ckpt and not exploded else last_path
    first_save, old_iter, saved_iter = saved_iter is None, ckpt_iter, iter_num
    ckpt_iter = iter_num if path == ckpt_path else old_iter
    if not master_process:
        return
    state = {
        'model': model.state_dict(),
        'optimizer': optim.state_dict(),
        'model_args': model_args,
        'iter_num': iter_num,
        'best_val_loss': best_val_loss,
        'tokenizer': tokenizer_spec,
        'config': config,
        'scaler': scaler.state_dict(),
        'wandb_id': log.wandb_run and log.wandb_run.id,
        'exploded': exploded,
        'rewinds': rewinds,
        'tokens': earlier_tokens + iter_num * tokens_per_iter,
        'metrics_bytes': os.path.getsize(log.metrics_path) if os.path.exists(log.metrics_path) else 0,
    }
    with atomic_write(path) as f:  # a kill leaves the old or the new one, complete
        torch.save(state, f)
        if first_save:  # files of an earlier run in this folder are kept
            earlier = {ckpt_path, last_path, metrics_path, *kept_checkpoints()} - {log.metrics_path}
            for old, kept in set_aside(sorted(earlier), path).items():
                log.line(f"{old} of an earlier run is kept as {kept}")
            if log.metrics_path != metrics_path:
                os.replace(log.metrics_path, metrics_path)
            log.metrics_path = metrics_path
        elif path == ckpt_path and keep_checkpoints > 1 and old_iter is not None and os.path.exists(path):
            link(ckpt_path, os.path.join(out_dir, f'ckpt-{old_iter}.pt'))
            for old in kept_checkpoints()[keep_checkpoints - 1 :]:
                os.unlink(old)
    if path == ckpt_path:
        Path(last_path).unlink(missing_ok=True)  # older now


def go_back(problem):
    """Goes on from ckpt.pt with other batches if `rewind` is set, else ends the run and keeps its files."""
    global iter_num, start_iter, saved_iter, rewinds, earlier_tokens
    if not rewind or ckpt_iter is None or rewinds == 3:
        fail(
            f"iteration {iter_num}: {problem}" + f" after {rewinds} rewinds" * (rewinds > 0) + ". Go on from"
            " the last checkpoint, or start again, with a lower --learning_rate"
        )
    checkpoint = read_checkpoint(ckpt_path)
    if checkpoint['iter_num'] != ckpt_iter:
        fail(f"{ckpt_path} is not the one that was saved (rank {rank}): out_dir must be one shared folder")
    model.load_state_dict(make_model(checkpoint).state_dict())
    optim.load_state_dict(make_optimizer(checkpoint).state_dict())
    scaler.load_state_dict(checkpoint.get('scaler') or scaler.state_dict())
    rewinds += 1
    log.line(f"iteration {iter_num}: {problem}, back to {ckpt_iter} and other batches ({rewinds} of 3 times)")
    iter_num = start_iter = saved_iter = ckpt_iter
    earlier_tokens = checkpoint.get('tokens', iter_num * tokens_per_iter) - iter_num * tokens_per_iter
    if master_process:
        log.open_metrics(checkpoint.get('metrics_bytes', math.inf))


def stop_votes():
    """Yields before each iteration whether all ranks stop there. Each posts its flag, and all read the sum an
    iteration later: they agree, and nobody has waited."""
    group, agreed = dist.new_group(backend='gloo', timeout=timedelta(seconds=dist_timeout)), False
    while True:
        votes = torch.tensor(float(stop_requested))
        work = dist.all_reduce(votes, group=group, async_op=True)
        yield agreed
        work.wait()
        agreed = votes.item() > 0


def report_profile(profiler):
    """A table of an iteration's costliest operations, and a trace of it all."""
    order = f"self_{'device' if device_type == 'cuda' else 'cpu'}_time_total"
    log.line(profiler.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=50))
    trace = os.path.join(out_dir, 'trace.json')
    profiler.export_chrome_trace(trace)
    log.line(f"{trace} has all of the iteration: open it with chrome://tracing or ui.perfetto.dev")
    log.start_clock(iter_num + 1)


# ---------- The loop ----------
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, request_stop)
if saving and master_process:
    log.open_metrics(checkpoint.get('metrics_bytes', math.inf))
    if wandb_log:
        log.open_wandb(checkpoint.get('wandb_id'))
del checkpoint  # frees its memory
votes = stop_votes() if distributed else None
log.start_clock(iter_num)

while True:
    stopping = next(votes) if distributed else stop_requested
    finished = eval_only or iter_num >= max_iters
    at_evaluation = dataset and not stopping and (finished or iter_num % eval_interval == 0)
    at_checkpoint = (
        saving
        and iter_num
        and (
            iter_num == start_iter
            or iter_num != saved_iter
            and (stopping or checkpoint_interval and iter_num % checkpoint_interval == 0)
        )
    )
    if at_evaluation or at_checkpoint:  # at a checkpoint between evaluations a few batches will do
        losses = estimate_loss(eval_batches if at_evaluation else min(10, eval_batches))
        if losses is None:
            continue
        train_loss, val_loss = losses
        # overfitting parts these losses, an explosion lifts both, and by more than noise
        exploded = saving and not (sum(losses) < math.inf and min(losses) <= best_val_loss + 0.5)
        if exploded and iter_num == start_iter > 0:  # other data than those the best was measured on
            exploded, best_val_loss = False, math.inf
        log.line(
            f"{'step' if at_evaluation else 'checkpoint'} {iter_num}: train loss {train_loss:.4f}, "
            f"val loss {val_loss:.4f}"
            + f"; exploded, no new {ckpt_path}" * exploded
            + (perplexity(val_loss) if at_evaluation and eval_iters is None else '')
        )
        if exploded and (ckpt_iter is None or not stopping and (rewind or not math.isfinite(sum(losses)))):
            go_back("the loss has exploded")
            continue
        improved = at_evaluation and val_loss < best_val_loss and iter_num > 0  # a new model is in no file
        if improved:
            best_val_loss, rewinds = val_loss, 0
        if saving and (iter_num > start_iter or improved) and (saved_iter == ckpt_iter or not exploded):
            save_checkpoint(improved or always_save_checkpoint and (at_evaluation or not rewind), exploded)
        if at_evaluation:
            log.record('eval', iter_num, **{'train/loss': train_loss, 'val/loss': val_loss})
        log.start_clock(iter_num)
    if stopping:
        launch = 'torchrun …' if distributed else 'python'
        machine = [f'--{key}={config[key]}' for key in ('device', 'dtype', 'compile') if key in given_keys]
        command = shlex.join([sys.argv[0], '--init_from=resume', f'--out_dir={out_dir}', *machine])
        log.line(
            f"stopped before iteration {iter_num}: "
            + (f"go on with `{launch} {command}`" if saved_iter else "nothing has changed, nothing is saved")
        )
        break
    if finished:
        if saving and iter_num:
            log.line(
                f"best val loss {best_val_loss:.4f}"
                + (
                    f"; {ckpt_path} is the last, of {val_loss:.4f}: "
                    "always_save_checkpoint=False keeps the best"
                    if always_save_checkpoint and val_loss > best_val_loss and not exploded
                    else ''
                )
            )
            arguments = shlex.join([os.path.join(PROJECT, 'sample.py'), f'--out_dir={out_dir}'])
            log.line(f"sample from it: python {arguments}")
        break

    profiling = profile and master_process and iter_num == min(start_iter + 7, max_iters - 1)  # warm then
    with torch.profiler.profile(acc_events=True) if profiling else nullcontext() as profiler:
        loss_sum, grad_norm = train_step(iter_num)
    if loss_sum is None:
        continue
    if iter_num % log_interval == 0:
        loss = all_reduce(loss_sum).item() / gradient_accumulation_steps
        if not math.isfinite(loss):
            go_back("the loss is not finite")
            continue
        log.step(iter_num, loss, grad_norm.item())
    if profiling:
        report_profile(profiler)
    iter_num += 1

log.bar.close()
if dataset is None and master_process and log.timings:
    ms = 1000 * np.array(log.timings[-max(1, len(log.timings) * 3 // 4) :])  # the first quarter warms up
    speed = tokens_per_iter * 1000 / np.median(ms)
    print(
        json.dumps(
            {
                'device': torch.cuda.get_device_name() if device_type == 'cuda' else device,
                'processes': world_size,
                'threads': torch.get_num_threads(),
                'torch': torch.__version__,
                'peak_memory_gb': peak_memory(),
                'tokens_per_second': speed,
                'ms': {'median': np.median(ms), 'min': ms.min(), 'max': ms.max()},
                'mfu': model.estimate_mfu(speed / block_size / world_size, 1, peak_flops),
                'settings': config,
            }
        )
    )
del folder_lock  # a notebook goes on
if distributed:
    dist.barrier()  # until the last checkpoint is saved
    dist.destroy_process_group()
log.to_wandb('finish')  # may take its time: no rank waits for it any more
if distributed:
    os._exit(0)
