"""
Train a GPT from scratch, resume a run, or fine-tune GPT-2.

One process, on whatever the machine has:
    python train.py config/train_shakespeare_char.py --batch_size=32
One machine with 8 GPUs (for several machines see assets/notes.md):
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""

from __future__ import annotations  # configurator.py, run below, reads annotations as text

import ctypes
import errno
import hashlib
import json
import math
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, lru_cache
from pathlib import Path
from threading import Event, RLock, Thread, Timer
from typing import Literal

ROOT = Path(__file__).resolve().parent
earlier_excepthook = sys.excepthook  # which is put back at the end

# -----------------------------------------------------------------------------
# The keys and their defaults: GPT-2 124M on OpenWebText, half a million tokens an iteration.
# --help prints the comments beside them and, as headings, those right above one.

# the run and its files
out_dir = 'out'  # folder of the checkpoints, relative to the working directory
eval_interval = 2000  # iterations between evaluations, after which ckpt.pt is saved
checkpoint_interval = 0  # iterations between saves to last.pt, 0 for none
log_interval = 1  # iterations between log lines
eval_iters: int | None = 200  # micro-batches per evaluation and split; None: all of val.bin once, in order
sample_tokens = 100  # tokens of text that each evaluation writes, 0: none
eval_only = False  # evaluate once and exit
always_save_checkpoint = True  # False: ckpt.pt is the best model, not the newest
keep_checkpoints = 1  # 1: ckpt.pt alone; N above 1: the newest N are kept as ckpt-ITERATION.pt too
init_from = 'scratch'  # resume, auto (resume if possible), gpt2 … gpt2-xl, or a folder with weights
seed = 1337  # of weights, batches and dropout

# Weights & Biases (wandb.ai)
wandb_log = False  # report the run there too
wandb_project = 'owt'  # the project that it belongs to
wandb_run_name = 'gpt2'  # the name of the run

# data and batches
dataset: str | None = 'openwebtext'  # a folder of data/, or its whole path; None: random tokens, for timing
sampler: Literal['random', 'epoch'] = 'random'  # windows at random places, or every block once an epoch
gradient_accumulation_steps = 5 * 8  # micro-batches per iteration, over all processes together
batch_size = 12  # sequences per micro-batch
block_size = 1024  # tokens per sequence

# model
n_layer = 12  # transformer blocks
n_head = 12  # attention heads of each
n_embd = 768  # width of the network, a multiple of n_head
dropout = 0.0  # 0 for pretraining; for fine-tuning and small data try 0.1 and up
bias = False  # biases in the linear layers and norms
init_std = 0.02  # standard deviation of a new model's weights (c_proj's have less)

# optimizer
optimizer: Literal['adamw', 'muon'] = 'adamw'  # muon: for the matrices of the blocks, adamw for the rest
learning_rate = 6e-4  # its peak, after the warm-up
max_iters = 600000  # the run takes exactly this many iterations
weight_decay = 1e-1  # of matrices and embeddings, not of norms and biases
beta1 = 0.9  # decay of the gradient's running mean, for muon too
beta2 = 0.95  # adamw: decay of its square's running mean
grad_clip = 1.0  # largest norm of the gradient, 0 for no limit

# learning rate schedule
decay_lr = True  # False: learning_rate throughout, without warm-up
lr_schedule: Literal['cosine', 'linear', 'wsd'] = 'cosine'  # wsd: constant until the last fifth, then linear
warmup_iters = 2000  # iterations of linear warm-up
lr_decay_iters = 600000  # the iteration that reaches min_lr, usually max_iters
min_lr = 6e-5  # usually learning_rate / 10

# the machine (None: what is there)
backend: str | None = None  # of torch.distributed: nccl or gloo
dist_timeout = 600  # seconds that a process waits for the others
device: str | None = None  # cpu, cuda, cuda:1, mps
dtype: Literal['float32', 'bfloat16', 'float16'] | None = None  # float16 scales its gradients
compile: bool | None = None  # torch.compile; by default on CUDA
peak_flops: float | None = None  # FLOP/s that count as an mfu of 100 %
activation_checkpointing = False  # less memory: blocks are computed twice
profile = False  # profile one iteration: a table, and out_dir/trace.json

# The configurator turns config files and --key=value into these globals. It leaves `config` (all keys and
# their values), `given_keys` (those that a file or the command line has set) and `check_value`, and installs
# the excepthook that prints a mistake as one line.
exec((ROOT / 'configurator.py').read_text(encoding='utf-8'))
# -----------------------------------------------------------------------------
# These imports take seconds: --help and most mistakes are answered before. An import may swallow the
# exception that Ctrl-C raises, so meanwhile Ctrl-C ends the process without one.
raises_on_interrupt = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if raises_on_interrupt:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.path.insert(0, str(ROOT))  # `python -P` does not look beside the script
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.common import atomic_write, check_bin, keep_as_old, link, naming
from data.tokenizer import (
    Tokenizer,
    needs_download,
    one_line,
    read_tokenizer_spec,
    same_texts,
    template_fields,
)
from model import (
    GPT,
    GPTConfig,
    UserError,
    choose_device,
    compile_method,
    no_checkpoint,
    peak_flops_of,
    read_checkpoint,
)

if raises_on_interrupt:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# ---------- The process: its place among the ranks, its files, what it prints, how it is stopped ----------
def read_launcher():
    """(rank, local rank, world size) as torchrun or another launcher has set them; None without a launcher.
    Raises UserError if only a part is set: every process would then train the whole run alone."""
    names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')
    # MASTER_ADDR and MASTER_PORT alone do not come from a launcher, and neither do Slurm's variables.
    if not any(name in os.environ for name in names):
        return None

    # All of them are whole numbers within 16 bits, but for the address.
    problems = []
    for name in (*names, 'MASTER_PORT', 'MASTER_ADDR'):
        value = os.environ.get(name)
        if not value:
            problems.append(f"no {name}")
        elif name != 'MASTER_ADDR' and not (value.isdecimal() and int(value) < 65536):
            problems.append(f"{name}={value:.40}")

    # A complete environment is used, unless it contradicts itself.
    if not problems:
        rank, local_rank, world_size = (int(os.environ[name]) for name in names)
        if rank < world_size:
            return rank, local_rank, world_size
        problems.append(f"RANK={rank} with WORLD_SIZE={world_size}")
    raise UserError(
        f"the environment has {', '.join(problems)}: start the ranks by torchrun, or set RANK, LOCAL_RANK (0 "
        "where a machine has one rank), WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or none for one process"
    )


launched = read_launcher()
distributed = launched is not None
rank, local_rank, world_size = launched or (0, 0, 1)
master_process = rank == 0  # prints and saves

# A checkpoint may replace keys further down, but nothing that is derived here: no checkpoint has
# dataset=None, and out_dir and eval_only are never taken from one.
has_data = dataset is not None
saving = has_data and not eval_only  # whether this run writes checkpoints and metrics
ckpt_path = os.path.join(out_dir, 'ckpt.pt')
last_path = os.path.join(out_dir, 'last.pt')
metrics_path = os.path.join(out_dir, 'metrics.jsonl')

# By default tqdm takes a lock that processes share. A distributed run ends by os._exit, and Python would
# report that lock as leaked.
tqdm.set_lock(RLock())


def say(text):
    """Prints a line above the progress bar, on rank 0."""
    if not master_process:
        return
    try:
        # Only the handlers above the loop set stop_requested, and `log` exists by then.
        if stop_requested == signal.SIGINT and not log.bar.disable:
            print('\r\033[K', end='', file=sys.stderr, flush=True)  # erases the bar and the ^C behind it
        tqdm.write(text)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        # The terminal was closed. From here on the output goes nowhere.
        sys.stdout = sys.stderr = open(os.devnull, 'w')


stop_requested = 0  # the number of the signal that asks the run to end; the loop then saves and leaves


def request_stop(number, frame):
    """Handles the signals that ask a run to end."""
    global stop_requested
    stop_requested = number


answered = Event()  # set when the first Ctrl-C has its answer; report_stop waits for it


def answer_ctrl_c(arrived):
    """Answers the first Ctrl-C, and ends the process at the second: a thread, started above the loop.

    request_stop is called only when a call of PyTorch returns, and a backward pass may take many seconds. But
    Python writes the number of each signal to a socket at once; `arrived` is its other end."""
    presses = 0
    while number := arrived.recv(1):  # empty when the run has ended
        if number[0] != signal.SIGINT:
            continue
        presses += 1
        if presses == 2:
            print(file=sys.stderr)  # ends the line of the ^C that the terminal writes
            os._exit(128 + signal.SIGINT)
        request_stop(signal.SIGINT, None)  # at once, because the handler itself may come much later
        time.sleep(0.05)  # until the terminal has written its ^C, which say erases
        say("stopping after this micro-batch, again to quit")
        log.bar.close()
        answered.set()


def all_reduce(tensor):
    """Replaces the tensor by its sum over all ranks, and returns it."""
    if distributed:
        dist.all_reduce(tensor)
    return tensor


# ---------- The folder: the checkpoint to go on from, and the commands that we print ----------
# ckpt.pt       the newest evaluated model or, with always_save_checkpoint=False, the best one
# last.pt       the newest state, as long as it is newer than ckpt.pt: after a stop, after
#               checkpoint_interval, and after an evaluation that was not the best
# ckpt-N.pt     what ckpt.pt was after N iterations, if keep_checkpoints is above 1
# NAME.old      a file of an earlier run, or what this run had before it went on with other data. Where .old
#               is taken, it is .old1, then .old2 …; what is set aside together gets the same ending
#
# A resumed run takes all settings from its checkpoint, but for those that were given, and for these.
MACHINE_KEYS = ('device', 'dtype', 'compile', 'backend', 'dist_timeout', 'peak_flops')
KEYS_NOT_RESUMED = ('out_dir', 'init_from', 'eval_only', 'profile', *MACHINE_KEYS)
machine_arguments = [f'--{key}={config[key]}' for key in MACHINE_KEYS if key in given_keys]


def resume_command(folder, *arguments):
    """The command that goes on with the run in `folder`, on this machine."""
    python = 'torchrun …' if distributed else 'python'
    script = [sys.argv[0], '--init_from=resume', f'--out_dir={folder}']
    return f"{python} {shlex.join([*script, *machine_arguments, *arguments])}"


def restore_command(old_names):
    """The command that goes on with a run that was set aside, {'out/ckpt.pt': 'out/ckpt.pt.old', …}. It moves
    the run into a folder of its own."""
    folder = f'{os.path.normpath(out_dir)}-old'
    while os.path.exists(folder):
        folder += '-old'
    commands = [['mkdir', folder]]
    for name, old_name in old_names.items():
        commands.append(['mv', old_name, os.path.join(folder, os.path.basename(name))])
    return ' && '.join([*map(shlex.join, commands), resume_command(folder)])


def lock_out_dir():
    """Makes out_dir and locks it for this process, for as long as the returned file is open."""
    os.makedirs(out_dir, exist_ok=True)
    lock = open(os.path.join(out_dir, '.lock'), 'a')
    with suppress(ImportError):  # Windows has no such locks
        import fcntl

        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f"another run is writing to {out_dir}: give this one another --out_dir"
            ) from error
        except OSError as error:  # some network file systems
            say(f"{out_dir} cannot be locked ({error.strerror}): do not start another run there")
    return lock


def kept_checkpoints():
    """The paths of ckpt-ITERATION.pt, newest first."""
    kept = [path for path in Path(out_dir).glob('ckpt-*.pt') if path.stem[5:].isdecimal()]
    return [str(path) for path in sorted(kept, key=lambda path: -int(path.stem[5:]))]


def newest_old_files():
    """The run that was set aside last in out_dir, as {name: NAME.old}. Empty if there is none."""
    old_checkpoints = [path for path in Path(out_dir).glob('*.pt.old*') if path.suffix.startswith('.old')]
    # The newest file by its age belongs to the run that was set aside last. Two may have one age: a file gets
    # its second name before it loses the first, so a kill in between leaves both, and the next new run gives
    # the same file a third name, .old1. Of these the greater number was given later.
    if not old_checkpoints:
        return {}
    newest = max(old_checkpoints, key=lambda path: (os.path.getmtime(path), len(path.suffix), path.suffix))
    ending = newest.suffix  # .old, or .old1 …
    old_paths = [*Path(out_dir).glob(f'*.pt{ending}'), *Path(out_dir).glob(f'metrics.jsonl{ending}')]
    return {str(path.with_suffix('')): str(path) for path in old_paths}


def read_newest_checkpoint(paths):
    """Reads the newer of ckpt.pt and last.pt, or the newest ckpt-N.pt if these are damaged. `paths` has them
    in this order. Names what is damaged, and raises UserError if all are. An evaluation needs no optimizer.

    Returns the checkpoint, its path, and {path: iteration} of all that were read; nothing for no paths."""
    if not paths:
        return {}, None, {}
    needed = ('iter_num', 'config') if eval_only else ('iter_num', 'config', 'optimizer')
    checkpoints = {}
    problems = []
    for path in paths:
        if checkpoints and path not in (ckpt_path, last_path):
            break  # one of these two is whole: no ckpt-N.pt is needed
        try:
            checkpoint = read_checkpoint(path, needed)
        except UserError as error:
            problems.append(str(error))
            continue
        if checkpoint.get('exploded'):  # earlier versions of train.py wrote such a last.pt
            problems.append(f"{path} holds a model that has exploded, and is left out")
            continue
        checkpoints[path] = checkpoint

    if not checkpoints:
        raise UserError('; '.join(problems))
    for problem in problems:
        say(problem)
    iterations = {path: checkpoint['iter_num'] for path, checkpoint in checkpoints.items()}
    newest = max(iterations, key=iterations.get)
    return checkpoints[newest], newest, iterations


found = [path for path in (ckpt_path, last_path, *kept_checkpoints()) if os.path.exists(path)]
set_aside = {} if found else newest_old_files()

# Where only .old files are left, a new run was killed before its first save. There `auto` is refused, as
# `resume` is: to begin anew in silence would be a surprise.
if init_from == 'auto':
    init_from = 'resume' if found or set_aside else 'scratch'
    config['init_from'] = init_from
if init_from == 'resume' and set_aside:
    command = restore_command(set_aside)
    raise UserError(
        f"no checkpoint at {ckpt_path}: bring back the run that was set aside by `{command}`, or begin anew "
        "with --init_from=scratch"
    )
if init_from == 'resume' and not found:
    raise no_checkpoint(ckpt_path)

folder_lock = lock_out_dir() if master_process and (saving or profile) else None
to_resume = found if init_from == 'resume' else []
# saved_iter has the iteration of each whole checkpoint, {path: iteration}. save_checkpoint updates it.
checkpoint, resume_path, saved_iter = read_newest_checkpoint(to_resume)

# ---------- The settings: those of the checkpoint, then what the machine and the keys leave open ----------
# check_value returns a value in the key's type, or raises UserError.
for key, value in checkpoint.get('config', {}).items():
    if key in config and key not in given_keys and key not in KEYS_NOT_RESUMED:
        globals()[key] = config[key] = check_value(resume_path, key, value)

for key in 'eval_interval log_interval eval_iters gradient_accumulation_steps batch_size block_size'.split():
    if config[key] == 0:
        raise UserError(f"{key} must be at least 1, not 0")
if init_std == 0:
    raise UserError("init_std must be above 0: weights of zero never learn")
if not has_data and (eval_only or resume_path or max_iters <= log_interval):
    raise UserError(
        "dataset=None only times training, for more than log_interval iterations: name a --dataset"
    )
if gradient_accumulation_steps % world_size:
    possible = math.ceil(gradient_accumulation_steps / world_size) * world_size
    raise UserError(
        f"gradient_accumulation_steps {gradient_accumulation_steps} is not divisible by the world size "
        f"{world_size}: try {possible}"
    )

device, dtype = choose_device(device, dtype, local_rank)
device_type = torch.device(device).type
if backend is None:
    backend = 'nccl' if device_type == 'cuda' else 'gloo'
if compile is None:
    compile = device_type == 'cuda' and os.name == 'posix'
if peak_flops is None:
    peak_flops = peak_flops_of(device, dtype)
config.update(device=device, dtype=dtype, backend=backend, compile=compile, peak_flops=peak_flops)

# No backend knows mps.
backend_is_there = device_type != 'mps' and dist.is_available() and dist.is_backend_available(backend)
if distributed and not backend_is_there:
    raise UserError(
        f"backend {backend!r} on {device}: this PyTorch has none; --device=cpu --backend=gloo runs anywhere"
    )
# Backward computes the blocks again, and must draw the same dropout: on mps and in compiled code for CUDA,
# PyTorch does not.
draws_differ = device_type == 'mps' or (compile and device_type == 'cuda')
if dropout and activation_checkpointing and draws_differ:
    raise UserError(
        "backward would draw other dropout: leave off activation_checkpointing or, on CUDA, compile"
    )

if device_type == 'cuda':
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision('high')  # TF32 where float32 remains
# By default glibc gives large blocks back to the system, and a third of a CPU's step is spent on getting them
# again: -4 is M_MMAP_MAX, -1 is M_TRIM_THRESHOLD. Other systems lack mallopt and need none.
with suppress(AttributeError, OSError, TypeError):
    ctypes.CDLL(None).mallopt(-4, 0)
    ctypes.CDLL(None).mallopt(-1, -1)
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
    return peak / 1e9 if sys.platform == 'darwin' else peak * 1024 / 1e9  # Linux counts in KiB


# Randomness is a function of (seed, stream, iteration, micro-step). Nothing of it needs saving, and a
# micro-batch is the same whichever rank draws it: rank r of W runs the micro-steps r, r + W, r + 2 W …
# A stream's number is its place, so new ones go to the end.
STREAMS = ('train', 'eval-train', 'eval-val', 'dropout', 'epoch', 'sample')


def rng(stream, iteration, micro_step=0):
    return np.random.default_rng((seed, STREAMS.index(stream), iteration, micro_step))


# ---------- The model, its optimizer, and the state of the run ----------
# shown_data_dir is for messages, data_dir for reading. Path drops what stands before a whole path, so
# --dataset=/data/mytext is itself in both.
shown_data_dir = Path('data', dataset or '')
data_dir = ROOT / shown_data_dir
project = os.path.dirname(sys.argv[0])  # this folder as the user typed it, for commands that we print


def command_for(script, *arguments):
    """The command that runs a script of this folder, quoted for the shell."""
    return f"python {shlex.join([os.path.join(project, script), *arguments])}"


sample_command = command_for('sample.py', f'--out_dir={out_dir}')

# The script that makes a data set is in its folder, or in the one above: data/python_qa/prepare.py also makes
# data/python_qa/source. Any other data set comes from data/custom/prepare.py.
folders = (shown_data_dir, shown_data_dir.parent)
own_scripts = [folder / 'prepare.py' for folder in folders if (ROOT / folder / 'prepare.py').exists()]
custom_script = os.path.join('data', 'custom', 'prepare.py')
from_text = command_for(custom_script, '--input=TEXT', f'--name={dataset}')
prepare_command = command_for(own_scripts[0]) if own_scripts else from_text


def check_data_files():
    """Raises UserError if a file of the data is missing, with what there is instead."""
    names = {'train.bin', 'val.bin'}
    template_names = {'train.mask', 'val.mask', 'template.txt'}  # all three, or none
    there = {path.name for path in data_dir.glob('*')}
    if there & template_names:
        names |= template_names
    missing = sorted(names - there)
    if not missing:
        return
    problem = f"there is no {data_dir / missing[0]}"
    if own_scripts:
        raise UserError(f"{problem}: run `{prepare_command}` first")
    if there:
        raise UserError(f"{problem}, only {', '.join(sorted(there)[:9])}: run `{prepare_command}`")
    if resume_path and 'dataset' not in given_keys:
        raise UserError(
            f"{problem}, which {resume_path} was trained on: bring the folder {data_dir}, or only sample by "
            f"`{sample_command}`"
        )

    # The data sets of data/, prepared or not, are named.
    files = [path for path in ROOT.glob('data/*/*') if path.name in ('prepare.py', 'train.bin')]
    known = sorted({path.parent.name for path in files})
    if data_dir.name in known:  # behind another folder, as in --dataset=data/NAME
        hint = shlex.quote(f'--dataset={data_dir.name}')
        raise UserError(f"{problem}: {hint} is the name of a folder of data/")
    whole_path = os.path.abspath(dataset)
    if os.path.exists(os.path.join(whole_path, 'train.bin')):
        hint = shlex.quote(f'--dataset={whole_path}')
        raise UserError(f"{problem}: {hint} is the whole path of that folder")
    if os.path.isabs(dataset):
        raise UserError(f"{problem}: run `{prepare_command}`")
    raise UserError(f"{problem}: dataset {dataset!r} is none of {', '.join(known)}, and no whole path")


if has_data:
    check_data_files()
tokenizer_spec = read_tokenizer_spec(data_dir) if has_data else {'kind': 'gpt2'}
# Where the data are documents made by a template, their masks say which tokens count in the loss.
has_mask = has_data and (data_dir / 'template.txt').exists()
template = (data_dir / 'template.txt').read_bytes().decode() if has_mask else None
if has_mask:
    template_fields(template)  # raises UserError if it is none


def new_vocab_size():
    """The tokenizer's, filled up to a multiple of 64, which GPUs multiply faster; of characters as it is."""
    if tokenizer_spec['kind'] == 'gpt2':
        return 50304  # 50257 tokens
    tokens = tokenizer_spec.get('vocab_size') or Tokenizer(tokenizer_spec).vocab_size
    return tokens if tokenizer_spec['kind'] == 'char' else math.ceil(tokens / 64) * 64


def make_model():
    """The model of the checkpoint, or a new one, or the one that init_from names."""
    if resume_path:
        model = GPT.from_checkpoint(checkpoint, dropout)
        if 'tokenizer' not in checkpoint:  # nanoGPT's have none: it is that of the data
            model.tokenizer_source = tokenizer_spec
    elif init_from == 'scratch':
        sizes = dict(block_size=block_size, vocab_size=new_vocab_size())
        sizes.update(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        model = GPT(GPTConfig(**sizes, dropout=dropout, bias=bias))
        for p in model.parameters():
            if p.dim() > 1:  # GPT has drawn its matrices for 0.02
                p.data *= init_std / 0.02
        model.tokenizer_source = tokenizer_spec
    else:
        model = GPT.from_pretrained(init_from, {'dropout': dropout})
    return model


torch.manual_seed(seed)
model = make_model()


def check_tokenizer():
    """Raises UserError if the data have other tokens than the model, with what to do."""
    if model.tokenizer_source == tokenizer_spec:
        return
    # Two tokenizers may come from different files and still be the same, as GPT-2's and that of an export.
    model_spec = model.tokenizer_spec()
    if same_texts(model_spec, tokenizer_spec):
        return
    # prepare.py takes the tokenizer's name, or the path of a model that has it.
    if model_spec['kind'] == 'gpt2':
        name = 'gpt2'
    else:
        name = out_dir if resume_path else init_from
    command = command_for(custom_script, '--input=TEXT', '--name=NAME', f'--tokenizer={name}')
    raise UserError(
        f"{data_dir} was prepared with another tokenizer than {resume_path or init_from}: "
        f"`{command}` prepares a text with that one"
    )


if has_data:
    check_tokenizer()
model.template = template

# The weights decide the sizes. Where a key says otherwise, a line tells it; on resume a key that was given is
# an error instead. Only block_size may be smaller, which crops the context.
for key in ('n_layer', 'n_head', 'n_embd', 'bias', 'block_size'):
    size = getattr(model.config, key)
    if config[key] == size or (key == 'block_size' and block_size < size):
        continue
    if resume_path and key in given_keys:
        raise UserError(
            f"{resume_path} has {key} {size}, not {config[key]}: leave --{key} off, or start a new run in "
            "another --out_dir"
        )
    say(f"{key} is {size!r}, as the weights have it, not {config[key]!r}")
    globals()[key] = config[key] = size

context_was_cropped = block_size < model.config.block_size
model.crop_block_size(block_size)
model.to(device).train()
model.activation_checkpointing = activation_checkpointing
vocab_size = model.config.vocab_size


# What AdamW keeps for a parameter, and what Muon does.
OPTIMIZER_STATES = ({'step', 'exp_avg', 'exp_avg_sq'}, {'step', 'momentum'})


def check_moments(optim):
    """Raises ValueError unless the moments fit their parameters. Where the context was cropped, those of the
    positions are cropped too."""
    if not optim.state:
        raise ValueError("moments are missing")
    for p, moments in optim.state.items():
        if set(moments) not in OPTIMIZER_STATES:
            raise ValueError("moments are missing")
        moments['step'] = moments['step'].reshape(())  # an error if it is no single number
        for name in set(moments) - {'step'}:
            moment = moments[name][: p.size(0)]
            if moment.shape != p.shape:
                raise ValueError("moments have another shape")
            # Fused AdamW takes tensors for contiguous, and a file may hold others.
            moments[name] = moment.clone(memory_format=torch.contiguous_format)


def make_optimizer():
    """The optimizer, on resume with the checkpoint's moments. Its rates and betas are those of the keys."""
    optim = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type, optimizer)
    if not resume_path or eval_only:
        return optim
    settings = [dict(group) for group in optim.param_groups]
    try:
        # This takes the checkpoint's rates, betas and decay too, so those of the keys are put back.
        optim.load_state_dict(checkpoint['optimizer'])
        for group, own in zip(optim.param_groups, settings, strict=True):
            group.update(own)
        check_moments(optim)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{resume_path} has the state of another --optimizer than {optimizer}") from error
    return optim


optim = make_optimizer()
if checkpoint.get('scaler'):  # {} where float16 was not used
    scaler.load_state_dict(checkpoint['scaler'])
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size


@dataclass
class State:
    """All that changes while a run runs, beside weights and moments. Checkpoints have these names too."""

    iter_num: int = 0  # the iteration that comes next
    best_val_loss: float = math.inf
    tokens: int = 0  # that training has read so far
    smoothed_loss: float | None = None  # what the bar shows, see Log.smooth; None before the first log line


state = State()
if resume_path:
    state.iter_num = checkpoint['iter_num']
    state.best_val_loss = checkpoint['best_val_loss']  # read_checkpoint has made a float of nanoGPT's tensor
    state.tokens = checkpoint.get('tokens', state.iter_num * tokens_per_iter)  # nanoGPT's have none
    state.smoothed_loss = checkpoint.get('smoothed_loss')
first_iter = state.iter_num  # of this process


# ---------- The data ----------
if not has_data:  # tokens of no meaning: the loop is only to be timed
    length = max(2**20, 2 * block_size)
    random_tokens = rng('train', 0).integers(min(vocab_size, 50257), size=length, dtype='<u2')


def open_bin(split):
    """The tokens of train.bin or val.bin, (n,) uint16, read from disk as they are used.

    It is opened anew for every batch: until a map is closed, what was read through it counts as memory."""
    return np.memmap(data_dir / f'{split}.bin', dtype='<u2', mode='r') if has_data else random_tokens


def open_mask(split):
    """Which tokens of a .bin file count as targets, (n,) uint8, 0 where one does not."""
    return np.memmap(data_dir / f'{split}.mask', dtype='u1', mode='r')


def count_tokens(split):
    """The length of a .bin file in tokens. Raises UserError if it is of another format, cut off, or too
    short."""
    if not has_data:
        return len(random_tokens)
    path = data_dir / f'{split}.bin'
    check_bin(path, vocab_size, prepare_command=command_for(custom_script, f'--name={dataset}'))
    count, rest = divmod(path.stat().st_size, 2)  # two bytes a token
    if rest:
        raise UserError(f"{path} is cut off in the middle of a token: run `{prepare_command}` again")
    if count <= block_size:
        raise UserError(
            f"{path} holds {count} tokens, but a sequence takes block_size + 1 = {block_size + 1}: "
            "use a smaller --block_size or more text"
        )
    return count


def count_targets(split, token_count):
    """How many tokens of a .bin file count as targets: without a mask all but the first. Raises UserError if
    the mask does not fit."""
    if not has_mask:
        return token_count - 1
    path = data_dir / f'{split}.mask'
    size = path.stat().st_size
    if size != token_count:
        raise UserError(
            f"{path} is for {size:,} tokens, but {split}.bin has {token_count:,}: "
            f"run `{prepare_command}` again"
        )
    step = 2**24
    pieces = (open_mask(split)[start : start + step] for start in range(1, token_count, step))
    count = sum(map(np.count_nonzero, pieces))
    if count == 0:
        raise UserError(f"{path} counts no token: run `{prepare_command}` on documents that have answers")
    return int(count)


train_count = count_tokens('train')
val_count = count_tokens('val')
train_targets = count_targets('train', train_count)
val_targets = count_targets('val', val_count)


def digest_of_data():
    """Tells these data from others, in milliseconds: the lengths, all of val.bin, 64 pages of train.bin; of
    masks as much, and the template."""
    digest = hashlib.sha256(f'{train_count} {val_count}'.encode())
    pairs = [(open_bin('train'), open_bin('val'))]
    if has_mask:
        digest.update(template.encode())
        pairs.append((open_mask('train'), open_mask('val')))
    for train, val in pairs:
        digest.update(val)
        for start in np.linspace(0, train_count, num=64, endpoint=False, dtype=np.int64):
            digest.update(train[start : start + 2048])  # of tokens a page of 4 KiB
    return digest.hexdigest()


data_digest = digest_of_data() if has_data else None
# On other data, or with a shorter context, the best loss of the checkpoint is no measure any more.
data_changed = checkpoint.get('data_digest', data_digest) != data_digest  # nanoGPT's have none: the same data
best_starts_anew = resume_path is not None and (data_changed or context_was_cropped)
if best_starts_anew:
    state.best_val_loss = math.inf
eval_batches = eval_iters or math.ceil((val_count - 1) / (batch_size * block_size))


def tokenizer_for_samples():
    """The tokenizer for the texts that evaluations write, on rank 0; None where there are to be none."""
    if not (sample_tokens and saving and master_process):
        return None
    if needs_download(tokenizer_spec):
        say("no samples while it trains: GPT-2's BPE files are not here; `python sample.py` downloads them")
        return None
    if 'problem' in tokenizer_spec:  # why meta.pkl gives no text
        say(f"samples are ids: {tokenizer_spec['problem']}")
    tokenizer = Tokenizer(tokenizer_spec)
    # Without its meta.pkl a data set counts as GPT-2's, but its model may have fewer tokens: then there is
    # none for a text to begin with.
    return tokenizer if tokenizer.bos < vocab_size else None


sample_tokenizer = tokenizer_for_samples()


# A terminal obeys these, and an untrained model may write any. The tab stays, and lines are split before.
CONTROL_CHARACTERS = dict.fromkeys([*range(9), *range(10, 32), *range(127, 160)], '\ufffd')


def sample_text():
    """What the model writes now: a text of sample_tokens tokens, or shorter if it ends there. None where
    there is no tokenizer for it.

    Its random numbers are the same every time, so that the texts of a run differ by its training alone."""
    if sample_tokenizer is None:
        return None
    draws = rng('sample', 0).random((1, sample_tokens), dtype=np.float32)
    prompt = torch.tensor([[sample_tokenizer.bos]], device=device)
    settings = dict(temperature=0.8, top_k=200, vocab_size=sample_tokenizer.vocab_size)  # as sample.py's
    ids = []
    model.eval()
    # stream yields one token after the other, (1, 1), without gradients.
    for token in model.stream(prompt, sample_tokens, draws=torch.from_numpy(draws).to(device), **settings):
        if stop_requested or token.item() == sample_tokenizer.eot:
            break
        ids.append(token.item())
    model.train()
    return sample_tokenizer.decode(ids)


# An epoch has one block fewer than would fit, so that its blocks can begin at a random offset. So over many
# epochs a token is seen at every position of a block.
blocks_per_epoch = max(1, train_count // block_size - 1)


@lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
def blocks_of_epoch(epoch):
    """Where the blocks of train.bin begin, (blocks_per_epoch,), in the random order of this epoch."""
    random = rng('epoch', epoch)
    # Behind the blocks one token more is needed, the last target: the offset is less than what is left over.
    offset = random.integers(train_count - blocks_per_epoch * block_size)
    return offset + block_size * random.permutation(blocks_per_epoch)


def window_starts(stream, iteration, micro_step):
    """Where the sequences of a micro-batch begin in their .bin file, (B,)."""
    if stream == 'eval-val' and eval_iters is None:  # once through, in order
        return (micro_step * batch_size + np.arange(batch_size)) * block_size
    if stream == 'train' and sampler == 'epoch':
        first = (iteration * gradient_accumulation_steps + micro_step) * batch_size
        epochs, indices = divmod(first + np.arange(batch_size), blocks_per_epoch)
        starts = [blocks_of_epoch(epoch)[i] for epoch, i in zip(epochs, indices, strict=True)]
        return np.array(starts)
    # Otherwise they are drawn at random, for an evaluation always the same.
    count = val_count if stream == 'eval-val' else train_count
    return rng(stream, iteration, micro_step).integers(count - block_size, size=batch_size)


@lru_cache(maxsize=1)  # so that train_step can ask for the next batch while the device works on this one
def get_batch(stream, iteration, micro_step):
    """X, Y (B, T) int64 on the device: windows of tokens, and their targets, -1 where one does not count."""
    split = 'val' if stream == 'eval-val' else 'train'
    data = open_bin(split)
    starts = window_starts(stream, iteration, micro_step)
    positions = starts[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    # What lies beyond the end, in the last batch of a val.bin that is read in order, becomes any token, whose
    # target is masked below.
    is_ignored = positions >= len(data)  # (B, T + 1)
    positions[is_ignored] = 0
    tokens = np.asarray(data[positions])  # (B, T + 1) uint16
    if has_mask:
        is_ignored |= open_mask(split)[positions] == 0
    if tokens.max() >= vocab_size:
        raise UserError(
            f"{data_dir / split}.bin holds the token id {tokens.max()}, but the model's vocabulary ends at "
            f"{vocab_size - 1}: was the data prepared with another tokenizer?"
        )

    tokens = torch.from_numpy(tokens.astype(np.int64))
    if device_type == 'cuda':
        tokens = tokens.pin_memory()  # so that the copy can run beside the computation
    tokens = tokens.to(device, non_blocking=True)  # (B, T + 1)
    X = tokens[:, :-1]  # (B, T)
    Y = tokens[:, 1:].contiguous()  # (B, T), which the loss wants flat

    if is_ignored.any():
        Y = Y.masked_fill(torch.from_numpy(is_ignored[:, 1:]).to(device), -1)
    return X, Y


def loss_shares(iteration):
    """One weight for each micro-step, such that the mean over micro-steps of weight * loss is the mean loss
    over all targets of the iteration that count: the number of its own over their mean number, 1 where all
    count alike.

    None if nothing counts. Every rank counts all micro-steps, from the mask alone."""
    if not has_mask:
        return [1.0] * gradient_accumulation_steps
    mask = open_mask('train')
    counts = []
    for micro_step in range(gradient_accumulation_steps):
        targets = window_starts('train', iteration, micro_step)[:, None] + np.arange(1, block_size + 1)
        counts.append(int(np.count_nonzero(mask[targets])))
    total = sum(counts)
    return [count * gradient_accumulation_steps / total for count in counts] if total else None


# ---------- The learning rate ----------
def get_lr(iteration):
    """Linear warm-up to learning_rate, then down to min_lr in the shape that lr_schedule names."""
    if not decay_lr:
        return learning_rate
    if iteration < warmup_iters:
        return learning_rate * (iteration + 1) / (warmup_iters + 1)
    if iteration >= lr_decay_iters:
        return min_lr

    progress = (iteration - warmup_iters) / (lr_decay_iters - warmup_iters)
    if lr_schedule == 'cosine':  # Loshchilov & Hutter 2017
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    elif lr_schedule == 'linear':
        factor = 1 - progress
    else:  # wsd: Hu et al. 2024, MiniCPM
        factor = min(1, 5 * (1 - progress))
    return min_lr + factor * (learning_rate - min_lr)


# ---------- The files of the run in out_dir ----------
def set_aside_earlier_run():
    """Renames the files of an earlier run in out_dir to NAME.old, and says what they are."""
    # keep_as_old gives every file a second name (a hard link), and then the first names go, in this order. A
    # kill leaves a run that can be resumed as long as ckpt.pt or last.pt is there, and then only .old files.
    old_names = keep_as_old([*kept_checkpoints(), ckpt_path, last_path, metrics_path])
    for name in old_names:
        os.unlink(name)
    if not old_names:
        return

    description = f"an earlier run is kept as {', '.join(old_names.values())}"
    old_checkpoint = old_names.get(ckpt_path) or old_names.get(last_path)
    if old_checkpoint:
        with suppress(UserError, KeyError):  # a damaged one is kept all the same
            old = read_checkpoint(old_checkpoint)
            description += f", of iteration {old['iter_num']} and best val loss {old['best_val_loss']:.4f}"
        description += f"; to go on with it: `{restore_command(old_names)}`"
    say(description)


def begin_metrics():
    """Cuts metrics.jsonl off where this process begins, and adds a line with the settings.

    An evaluation at this very iteration goes too, because it is run again."""
    lines = []
    if os.path.exists(metrics_path):
        for line in Path(metrics_path).read_bytes().splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a line that a kill has torn
                if json.loads(line)['iter'] < first_iter:
                    lines.append(line + b'\n')
    run = {
        'kind': 'run',
        'iter': first_iter,
        'settings': config,
        'parameters': model.get_num_params(),
        'train_tokens': train_count,
        'val_tokens': val_count,
        'processes': world_size,
        'gpu': torch.cuda.get_device_name() if device_type == 'cuda' else None,
        'versions': {'python': platform.python_version(), 'torch': torch.__version__},
    }
    with atomic_write(metrics_path) as f:
        f.writelines([*lines, json.dumps(run).encode() + b'\n'])


@cache  # it runs once: before the first line of metrics.jsonl and before the first save
def claim_out_dir():
    """Makes the folder this run's. A run that is stopped before that leaves it as it was."""
    if resume_path is None:
        set_aside_earlier_run()
    elif best_starts_anew:
        # The first names stay: the run goes on from these files, and its saves replace them.
        old_names = keep_as_old([*kept_checkpoints(), ckpt_path, last_path])
        say(f"kept: {', '.join(old_names.values())}")
    begin_metrics()


# ---------- The log ----------
def perplexity(loss):
    """The loss of all of val.bin as papers give it: per token, and per word where prepare.py counted them."""
    counts = {'token': val_targets}
    with suppress(OSError, ValueError, KeyError, TypeError):
        counts['word'] = int(json.loads((data_dir / 'words.json').read_text())['val'])
    nats = loss * counts['token']  # of all of val.bin
    texts = [f"{np.exp(nats / count):.2f} per {unit} ({count:,})" for unit, count in counts.items()]
    return f"val.bin once through: perplexity {', '.join(texts)}"


def way_back():
    """What to do about a model that has exploded, with the command."""
    evaluated = [path for path in saved_iter if path != last_path]
    if not evaluated:
        return "Start again with a lower --learning_rate or another --seed"
    path = max(evaluated, key=saved_iter.get)
    command = resume_command(out_dir, f'--seed={seed + 1}')
    if last_path in saved_iter:  # it is newer, and would be resumed instead: it is moved out of the way
        unwanted = os.path.join(out_dir, f'last-{saved_iter[last_path]}.pt')
        command = f"{shlex.join(['mv', last_path, unwanted])} && {command}"
    return (
        f"Go on from {path} of iteration {saved_iter[path]} with other batches by `{command}`, or with "
        f"--learning_rate={learning_rate / 2:g} in the place of --seed"
    )


def check_finite(finite, what):
    """Ends the run, before it saves, if a loss or a weight is not finite: it can only get worse."""
    if not finite:
        raise UserError(f"iteration {state.iter_num}: {what} is not finite. {way_back()}")


def duration(seconds):
    """The two largest units: 56 -> '0m56s', 5025 -> '1h23m', 600000 -> '6d22h'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


class Log:
    """What a run tells as it goes: lines, a progress bar below them, metrics.jsonl, a picture, and Weights &
    Biases."""

    def __init__(self):
        self.bar = tqdm(disable=True)  # start opens it
        self.wandb_run = None
        self.wandb_id = checkpoint.get('wandb_id')
        self.timings = []  # seconds per iteration, one for each log line
        self.clock = self.first_clock = 0.0  # when the last log line came, and when training began
        self.clock_iter = first_iter  # the iterations that were done then
        self.eval_began = 0.0  # when the last evaluation began
        self.eval_seconds = 0.0  # what it took
        self.drawn_at = time.perf_counter()  # when the last picture was begun

    def start(self):
        """Opens the progress bar, where training begins."""
        self.bar = tqdm(
            total=max_iters,
            initial=first_iter,
            leave=False,
            dynamic_ncols=True,
            miniters=0,  # so that it is drawn anew when only its text has changed
            disable=None if master_process else True,  # None shows a bar, but on terminals only
            bar_format='{n_fmt}/{total_fmt} {bar:20} {desc}',
        )
        self.start_clock()

    def start_clock(self):
        """Times training from here on. Called again after everything that is not training."""
        self.clock = time.perf_counter()
        self.clock_iter = state.iter_num
        if self.clock_iter == first_iter:
            # The time left counts from here, behind the first evaluation, and so includes the later ones.
            self.first_clock = self.clock

    def show(self, stage, number, total):
        """Moves the bar within an iteration or an evaluation, whose micro-batches are counted."""
        texts = []
        if state.smoothed_loss is not None:
            texts.append(f"smoothed loss {state.smoothed_loss:.4f}")
        if total > 1:
            texts.append(f"{stage} {number}/{total}")
        self.bar.set_description_str(', '.join(texts), refresh=False)
        self.bar.update(state.iter_num - self.bar.n)  # it is drawn anew for its text too, ten times a second

    def smooth(self, loss):
        """Takes a loss into state.smoothed_loss, a mean in which its weight halves every 5 log lines.

        The first losses have no others behind them. This is corrected as Adam corrects its means."""
        decay = 0.5**0.2
        count = state.iter_num // log_interval + 1  # of log lines so far
        if state.smoothed_loss is None:
            state.smoothed_loss = loss
        state.smoothed_loss += (loss - state.smoothed_loss) * (1 - decay) / (1 - decay**count)

    def step(self, loss, grad_norm):
        """An iteration's log line and record. The time left follows from the mean speed of this process."""
        now = time.perf_counter()
        done = state.iter_num + 1
        seconds = (now - self.clock) / (done - self.clock_iter)
        seconds_left = (now - self.first_clock) / (done - first_iter) * (max_iters - done)
        tokens_per_second = tokens_per_iter / seconds
        sequences = tokens_per_iter / block_size / world_size  # of one process
        mfu = model.estimate_mfu(sequences, seconds, peak_flops)
        mfu_text = '' if mfu is None else f"mfu {mfu:.2%}, "
        say(
            f"iter {state.iter_num}: loss {loss:.4f}, time {seconds * 1000:.2f}ms, {mfu_text}"
            f"{tqdm.format_sizeof(tokens_per_second)} tok/s, {duration(seconds_left)} left"
        )

        self.smooth(loss)
        if not math.isfinite(grad_norm):
            grad_norm = None  # in float16, where the scaler skips such a step; JSON has no word for it
        self.record(
            'train',
            loss=loss,
            smoothed_loss=state.smoothed_loss,
            grad_norm=grad_norm,
            ms=seconds * 1000,
            tokens_per_second=tokens_per_second,
            mfu=mfu,
        )
        self.timings.append(seconds)
        if len(self.timings) == 2 and saving:  # the first is no measure: everything is slower there
            self.announce_times(seconds)
        self.clock = now
        self.clock_iter = done

    def announce_times(self, seconds_per_iter):
        """Says how long the run takes if that is more than an hour, and how far checkpoints are apart if that
        is more than some minutes."""
        iterations = max_iters - state.iter_num
        evaluations = self.eval_seconds * (iterations // eval_interval)
        seconds = iterations * seconds_per_iter + evaluations
        if seconds > 3600:
            say(
                f"the run takes about {duration(seconds)}, its evaluations {duration(evaluations)} of that: "
                "--max_iters and a smaller model shorten it, --eval_iters and --eval_interval these"
            )
        interval = min(eval_interval, checkpoint_interval or eval_interval, max_iters)
        seconds = interval * seconds_per_iter
        if seconds > 300:
            say(
                f"a checkpoint comes every {interval} iterations, {duration(seconds)} apart: "
                "--checkpoint_interval saves more often, and Ctrl-C saves and leaves"
            )

    def evaluating(self, stream, number):
        """Moves the bar before an evaluation's micro-batch. Says after three whether they take an hour."""
        self.show(stream, number + 1, eval_batches)
        if stream == 'eval-train' and number == 3 * world_size:
            seconds = (time.perf_counter() - self.eval_began) / number * eval_batches * 2  # for both splits
            if seconds > 3600:
                fewer = math.ceil(eval_batches * 600 / seconds)
                say(f"an evaluation takes {duration(seconds)}: --eval_iters={fewer} makes it ten minutes")

    def evaluation(self, train_loss, val_loss):
        """An evaluation's log line, text and record. A loss that is not finite ends the run."""
        self.eval_seconds = time.perf_counter() - self.eval_began
        peak = peak_memory()
        memory = f", peak {peak:.2f} GB" if peak else ''
        say(f"step {state.iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}{memory}")
        if eval_iters is None:
            say(perplexity(val_loss))
        check_finite(math.isfinite(train_loss + val_loss), "the loss")

        # ln_f leaves a variance of 1, so the logits have n_embd times that of the weights. Half of it adds to
        # the loss.
        expected = math.log(vocab_size) + 0.5 * init_std**2 * n_embd
        if init_from == 'scratch' and state.iter_num == 0 and abs(val_loss - expected) > 0.5:
            say(f"a new model should have a loss near ln(vocabulary) = {expected:.2f}: is its start right?")

        values = {'train/loss': train_loss, 'val/loss': val_loss}
        text = sample_text()
        if text:
            say('\n'.join(f"  {line.translate(CONTROL_CHARACTERS)}" for line in text.splitlines()))
            values['sample'] = text
        self.record('eval', **values)
        if state.iter_num < max_iters:  # the last picture is report_end's
            self.draw()

    def draw(self, is_last=False):
        """Draws the picture of the run, at most once a minute, and at its end, where a line names it.

        assets/plot.py does so in a process of its own. Nobody waits for it before the end, and a failure is
        a line there."""
        script = ROOT / 'assets' / 'plot.py'
        can_draw = master_process and saving and script.exists()
        is_too_soon = time.perf_counter() - self.drawn_at < 60 and not is_last
        if not can_draw or is_too_soon:
            return
        self.drawn_at = time.perf_counter()
        silent = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.DEVNULL)
        drawn = False  # and waited for
        with suppress(OSError, subprocess.TimeoutExpired):  # no memory for a process, or no time for it
            # Ctrl-C does not reach it in a session of its own.
            process = subprocess.Popen([sys.executable, script, out_dir], start_new_session=True, **silent)
            drawn = is_last and process.wait(timeout=120) == 0
        if drawn:
            say(f"its curves: {os.path.join(out_dir, 'loss.png')}")
        elif is_last:
            command = command_for(os.path.join('assets', 'plot.py'), out_dir)
            say(f"its curves are not drawn: {command}")

    def record(self, kind, **values):
        """Adds a line to metrics.jsonl, of kind 'train' or 'eval', and the same to wandb."""
        if not (master_process and saving):
            return
        line = {'iter': state.iter_num, 'tokens': state.tokens, 'lr': get_lr(state.iter_num), **values}
        claim_out_dir()
        with naming(metrics_path), open(metrics_path, 'a', encoding='utf-8') as f:
            f.write(json.dumps({'kind': kind, **line}) + '\n')
        self.to_wandb('log', line)

    def start_wandb(self):
        """Starts a run of Weights & Biases, or goes on with that of the checkpoint."""
        earlier_run = {'id': self.wandb_id, 'resume': 'allow'} if self.wandb_id else {}
        stdin = sys.stdin
        sys.stdin = open(os.devnull)  # wandb asks questions on a terminal, so it gets none while it starts
        # By default wandb tries to connect for 90 seconds, and gives up ten seconds later.
        os.environ.setdefault('WANDB_INIT_TIMEOUT', '20')
        waiting = Timer(3, say, ["wandb is connecting: half a minute at most, not with WANDB_MODE=offline"])
        waiting.daemon = True
        try:
            import wandb

            waiting.start()
            self.wandb_run = wandb.init(
                config=config, project=wandb_project, name=wandb_run_name, **earlier_run
            )
            # Libraries that stand in for wandb may lack an id and define_metric. The iteration is the x axis,
            # so a resumed run overwrites the points that it repeats.
            self.wandb_id = getattr(self.wandb_run, 'id', None)
            if hasattr(self.wandb_run, 'define_metric'):
                self.wandb_run.define_metric('*', step_metric='iter')
        except Exception as error:  # of many kinds, and never worth a run
            say(
                f"training goes on without wandb, which does not start ({one_line(error)}): "
                "`pip install wandb`, `wandb login` or WANDB_MODE=offline may help"
            )
        finally:
            waiting.cancel()
            sys.stdin = stdin
            sys.excepthook = excepthook  # ours, below: wandb's prints a traceback even for Ctrl-C

    def to_wandb(self, method, *arguments):
        """Calls a method of wandb's run, if there is one. A failure is a line, and training goes on."""
        if self.wandb_run is None:
            return
        try:
            getattr(self.wandb_run, method)(*arguments)
        except Exception as error:  # of many kinds, and never worth a run
            say(f"wandb has stopped ({one_line(error)}): {metrics_path} has all")
            self.wandb_run = None
            with suppress(Exception):  # without this, wandb prints the same again when Python exits
                sys.modules['wandb'].teardown()


log = Log()
configured_excepthook = sys.excepthook  # the one that configurator.py has installed


def excepthook(kind, error, trace):
    """Clears the bar away, and tells lost ranks in one line. configurator.py's excepthook does all else."""
    log.bar.close()
    from_gloo = kind is RuntimeError and 'gloo' in str(error)  # it has no exception of its own
    if distributed and (from_gloo or isinstance(error, dist.DistError)):
        error = UserError(
            f"rank {rank}: lost the other ranks, go on with --init_from=resume ({one_line(error)})"
        )
    configured_excepthook(type(error), error, trace)  # which does not return where there are ranks
    # When Python ends, wandb would call this a success. There may be no run, or its finish may fail: the
    # error has been told already.
    with suppress(Exception):
        log.wandb_run.finish(exit_code=1)


sys.excepthook = excepthook


# ---------- The first lines of a run ----------
def announce():
    """The first lines of a run: what it is, what differs from its checkpoint, and what may be a mistake."""
    say(f"tokens per iteration will be: {tokens_per_iter:,}")
    if resume_path:
        origin = f"resuming {resume_path} at iteration {first_iter}"
    elif init_from == 'scratch':
        origin = "a new model"
    else:
        origin = f"weights from {init_from}"
    machine = f"{device}, {dtype}"
    if device == 'cpu' and dtype == 'bfloat16' and 'dtype' not in given_keys:
        machine += " (this CPU has units for it)"  # it is not every CPU's default
    if distributed:
        machine += f", {world_size} processes"
    size = f"{model.get_num_params() / 1e6:.2f}M parameters, vocabulary {vocab_size}"
    say(f"{origin}: {size}; {machine}")

    # The keys that were given are compared, and dtype, which follows from the machine and changes results.
    compared = given_keys.difference(KEYS_NOT_RESUMED) | {'dtype'}
    for key, value in checkpoint.get('config', {}).items():
        if key in compared and config[key] != value:
            say(f"{key} was {value!r} in the checkpoint, is {config[key]!r} now")
    if checkpoint.get('rewinds'):
        say(f"{resume_path} is of a run with --rewind, which is gone: from here on its batches are others")
    if best_starts_anew:
        say(f"the best val loss starts anew: other data than {resume_path}'s, or a shorter context")

    if not saving:
        return
    say(
        f"{shown_data_dir}: {train_count:,} tokens to train on, {val_count:,} to validate on\n"
        f"{max_iters:,} iterations are {max_iters * tokens_per_iter / train_count:,.2f} epochs"
    )
    if has_mask:
        say(f"of these, {train_targets:,} and {val_targets:,} count in the loss: train.mask, val.mask")

    # Without a meta.pkl ids count as GPT-2's. A text of ten thousand tokens has some above 4096 there.
    largest = open_bin('train')[: 2**19].max()
    is_doubtful = tokenizer_spec['kind'] == 'gpt2' and train_count >= 10_000 and largest < 4096
    if is_doubtful and init_from == 'scratch':
        say(
            f"without a meta.pkl these ids are GPT-2's, but the first end at {largest}: if they are others, "
            "put a meta.pkl there that holds {'vocab_size': n}, and the model gets n rows instead of 50304"
        )

    if state.iter_num >= max_iters:
        say(f"max_iters {max_iters} is reached: to go on, raise --max_iters and --lr_decay_iters")
    elif decay_lr and warmup_iters >= max_iters:
        say(f"the run never leaves its warm-up: warmup_iters {warmup_iters}, max_iters {max_iters}")
    elif decay_lr and lr_decay_iters < max_iters:
        say(f"lr_decay_iters {lr_decay_iters} is before max_iters {max_iters}: the rest runs at min_lr")
    elif decay_lr and lr_decay_iters > max_iters:
        say(
            f"lr_decay_iters {lr_decay_iters} is behind max_iters {max_iters}: the learning rate ends at "
            f"{get_lr(max_iters - 1):.2g}, not at min_lr; usually --lr_decay_iters={max_iters}"
        )
    in_blocks = 12 * n_layer * n_embd**2
    if init_from == 'scratch' and in_blocks > 80 * train_count:
        say(
            f"{in_blocks / 1e6:.2f}M parameters for {train_count:,} tokens: it will know them by heart; "
            "a smaller one (--n_layer, --n_embd) or more text is better"
        )


announce()


# ---------- torch.compile, then DistributedDataParallel ----------
def loss_of(network, X, Y):
    """The mean loss of a micro-batch."""
    with autocast:
        return network(X, Y, return_logits=False)[1]


def spend_a_pass(network):
    """A forward and a backward pass that change nothing."""
    loss_of(network, *get_batch('train', first_iter, rank)).backward()
    model.zero_grad(set_to_none=True)


def try_compiled():
    """Runs what has been compiled, once in evaluation and once in training."""
    with torch.no_grad():
        model.eval()
        loss_of(model, *get_batch('train', first_iter, rank))
    model.train()
    spend_a_pass(model)


def meet_the_ranks():
    """Starts torch.distributed, and returns a group on the CPU, in which any_rank_stops votes. Raises
    UserError if the ranks have not met after dist_timeout."""
    host, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
    deadline = time.monotonic() + dist_timeout
    timeout = timedelta(seconds=dist_timeout)
    try:
        # Every other rank waits here until somebody listens at the address. Rank 0 waits for the host's name
        # only, because init_process_group listens there. PyTorch would wait by itself, but twice as long, and
        # print a stack of C++ calls.
        while True:
            try:
                if rank == 0:
                    socket.getaddrinfo(host, port)
                else:
                    socket.create_connection((host, port), timeout=min(5, dist_timeout)).close()
                break
            except OSError:  # there is no such host yet, or nobody listens there
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)
        dist.init_process_group(backend, timeout=timeout)
        return dist.new_group(backend='gloo', timeout=timeout)
    except (OSError, RuntimeError, ValueError) as error:  # a ValueError for what cannot be an address
        raise UserError(
            f"rank {rank}: the {world_size} ranks did not meet at MASTER_ADDR:MASTER_PORT, {host}:{port}, "
            f"within --dist_timeout={dist_timeout} ({one_line(error)})"
        ) from error


def wrap_in_ddp():
    """DistributedDataParallel around the model, ready to sum its gradients in the same order in every run."""
    iterations = [None] * world_size
    dist.all_gather_object(iterations, first_iter)
    if len(set(iterations)) > 1:
        found = f"checkpoints of iterations {min(iterations)} and {max(iterations)} were found"
        raise UserError(f"{found}: {out_dir} must be one shared folder")

    # The first backward pass of a process makes DDP sort the gradients into other buckets, and with three
    # ranks another order of sums is another rounding. It is spent here, before training: so new and resumed
    # runs sum alike.
    ddp_model = DistributedDataParallel(model)
    spend_a_pass(ddp_model)
    return ddp_model


if compile:
    problem = compile_method(model, 'forward', try_compiled)  # None, or why it does not work
    compile = not problem
    config['compile'] = compile
    model.train()  # it may have failed while it evaluated
    say(problem or "compiled")
if distributed:
    cpu_group = meet_the_ranks()
ddp_model = wrap_in_ddp() if distributed else model


def any_rank_stops():
    """Whether a stop was requested of any rank. All get the same answer, and so they leave together."""
    votes = torch.tensor(float(stop_requested))
    if distributed:
        dist.all_reduce(votes, group=cpu_group)
    return votes.item() > 0


# ---------- Evaluating ----------
@torch.no_grad()
def estimate_loss():
    """Mean losses (train, val) over the same micro-batches every time, or None if a stop was requested.

    The ranks take the micro-batches in turn. In what they do there, no rank waits for another."""
    model.eval()
    log.eval_began = time.perf_counter()
    losses = torch.zeros(2, device=device)  # sums for train and val
    counts = torch.zeros(2, device=device)
    for split, stream in enumerate(('eval-train', 'eval-val')):
        for k in range(rank, eval_batches, world_size):
            if stop_requested:
                break
            log.evaluating(stream, k)
            X, Y = get_batch(stream, 0, k)
            loss = loss_of(model, X, Y)
            # The share of the targets that count is below 1 with a mask, and at the end of val.bin.
            share = (Y >= 0).float().mean()
            losses[split] += loss * share
            counts[split] += share
    model.train()

    if any_rank_stops():
        return None
    losses, counts = all_reduce(losses), all_reduce(counts)
    if not counts.all():
        raise UserError(
            f"no token counts in {eval_batches} micro-batches of an evaluation: raise --eval_iters"
        )
    return (losses / counts).tolist()


def has_exploded(train_loss, val_loss):
    """Whether both losses are far above the best, which is infinite at first. Overfitting raises one of them,
    and noise is smaller."""
    exploded = min(train_loss, val_loss) > state.best_val_loss + 0.5
    if exploded and saving:
        say(f"iteration {state.iter_num}: the loss has exploded, and nothing is saved. {way_back()}")
    return exploded


# ---------- One iteration ----------
def train_step(iteration):
    """One iteration -> (this rank's sum of losses, norm of the gradient), or (None, None) if it was left.

    An iteration in which nothing counts has zeros for both. (A micro-step without targets has a loss of 0.) A
    single process leaves at once when it is to stop, and its weights are as they were. Ranks wait for each
    other, and go through with it."""
    loss_sum = torch.zeros((), device=device)
    shares = loss_shares(iteration)
    if shares is None:
        grad_norm = torch.zeros(())
        return loss_sum, grad_norm
    for group in optim.param_groups:
        group['lr'] = get_lr(iteration)
    for micro_step in range(rank, gradient_accumulation_steps, world_size):
        log.show('micro-step', micro_step + 1, gradient_accumulation_steps)
        X, Y = get_batch('train', iteration, micro_step)
        is_last = micro_step + world_size >= gradient_accumulation_steps
        following = (iteration + 1, rank) if is_last else (iteration, micro_step + world_size)
        if distributed:  # the ranks' gradients meet once, in the last backward pass
            ddp_model.require_backward_grad_sync = is_last
        if dropout:
            torch.manual_seed(int(rng('dropout', iteration, micro_step).integers(2**63)))
        loss = loss_of(ddp_model, X, Y)
        scaler.scale(loss * (shares[micro_step] / gradient_accumulation_steps)).backward()
        loss_sum += loss.detach() * shares[micro_step]
        get_batch('train', *following)  # into its cache, while the device works
        if stop_requested and not distributed:
            return None, None  # nobody reads the gradients so far

    # DDP gives the mean over the ranks, and the mean over all micro-steps is the sum. (Losses times
    # world_size would give the same, and overflow float16 sooner.)
    if distributed:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(world_size)
    scaler.unscale_(optim)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    scaler.step(optim)
    scaler.update()
    optim.zero_grad(set_to_none=True)
    return loss_sum, grad_norm


def report_profile(profiler):
    """A table of an iteration's costliest operations, and a trace of it all."""
    order = 'self_device_time_total' if device_type == 'cuda' else 'self_cpu_time_total'
    say(profiler.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=50))
    trace = os.path.join(out_dir, 'trace.json')
    profiler.export_chrome_trace(trace)
    say(f"{trace} has all of the iteration: open it with chrome://tracing or ui.perfetto.dev")


# ---------- Saving ----------
def needs_saving(path):
    """Whether there is a step to save that neither ckpt.pt nor `path` holds yet."""
    held = (saved_iter.get(ckpt_path), saved_iter.get(path))
    return saving and state.iter_num > 0 and state.iter_num not in held


def save_checkpoint(path):
    """Writes all of the run to ckpt.pt or last.pt."""
    check_finite(all(p.isfinite().all() for p in model.parameters()), "a weight")
    saved_iter[path] = state.iter_num  # on all ranks, which decide alike
    if path == ckpt_path:
        saved_iter.pop(last_path, None)
    if not master_process:
        return
    claim_out_dir()

    contents = {
        'model': model.state_dict(),
        'optimizer': optim.state_dict(),
        'model_args': model.config.model_args(),
        **vars(state),
        'best_val_loss': torch.tensor(state.best_val_loss),  # as in nanoGPT's
        'config': config,
        'scaler': scaler.state_dict(),
        'tokenizer': tokenizer_spec,
        'template': template,
        'data_digest': data_digest,
        'wandb_id': log.wandb_id,
    }
    with atomic_write(path) as f:
        torch.save(contents, f)
    if path == ckpt_path:
        Path(last_path).unlink(missing_ok=True)  # it is not the newest state any more
        if keep_checkpoints > 1:
            link(ckpt_path, os.path.join(out_dir, f'ckpt-{state.iter_num}.pt'))
            for old in kept_checkpoints()[keep_checkpoints:]:
                os.unlink(old)


def report_stop():
    """The last line of a run that was stopped."""
    if stop_requested == signal.SIGINT and not distributed:
        answered.wait(timeout=1)  # so that its line is the last
    if state.iter_num == 0 or not saving:
        rest = "nothing was learned, nothing is saved"
    elif exploded:
        rest = f"the model has exploded and is not saved. {way_back()}"
    else:
        # Before it has taken a step, this process saves nothing, and no checkpoint knows its keys.
        unknown = sorted(given_keys.difference(KEYS_NOT_RESUMED)) if state.iter_num == first_iter else []
        arguments = [f'--{key}={config[key]}' for key in unknown]
        rest = f"go on with `{resume_command(out_dir, *arguments)}`"
    say(f"stopped before iteration {state.iter_num}: {rest}")


def report_end(val_loss):
    """The last lines of a run that has come to its end."""
    best = f"best val loss {state.best_val_loss:.4f}"
    ckpt_is_last = saved_iter.get(ckpt_path) == state.iter_num
    if always_save_checkpoint and ckpt_is_last and val_loss > state.best_val_loss:
        best += f"; {ckpt_path} is the last, of {val_loss:.4f}: always_save_checkpoint=False keeps the best"
    say(best)
    log.draw(is_last=True)
    chat = ' --chat=True' if template else ''
    say(f"sample from it: {sample_command}{chat}")


# ---------- The loop ----------
if wandb_log and master_process and saving:
    log.start_wandb()  # before the handlers, so that Ctrl-C ends it at once: there is nothing to save yet

# A closed terminal sends SIGHUP, and Slurm the signal that the job asks for, such as SIGUSR1; Windows has
# neither. What the process was started to ignore stays ignored: nohup ignores SIGHUP, a shell's `&` SIGINT.
earlier_handlers = {}
for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1'):
    number = getattr(signal, name, None)
    if number is not None and signal.getsignal(number) != signal.SIG_IGN:
        earlier_handlers[number] = signal.signal(number, request_stop)
if not distributed:  # torchrun answers by itself, and sends each rank the first Ctrl-C twice
    arrived, written_to = socket.socketpair()
    written_to.setblocking(False)
    earlier_wakeup = signal.set_wakeup_fd(written_to.fileno())
    Thread(target=answer_ctrl_c, args=(arrived,), daemon=True).start()
checkpoint.clear()  # frees its memory; nothing below reads it
profiled_iter = min(first_iter + 7, max_iters - 1)  # when everything is warm
exploded = False  # whether the last evaluation said so; until the next one nothing is saved then
log.start()

# Each round evaluates if it is time, saves if there is a reason, and leaves or trains for one iteration.
while True:
    stopping = any_rank_stops()
    finished = eval_only or state.iter_num >= max_iters
    save_to = None

    # ckpt.pt changes at an evaluation only. What is saved in between goes to last.pt, and so does what a stop
    # saves, also one that comes during an evaluation.
    if has_data and not stopping and (finished or state.iter_num % eval_interval == 0):
        losses = estimate_loss()
        stopping = losses is None
        if not stopping:
            train_loss, val_loss = losses
            log.evaluation(train_loss, val_loss)
            exploded = has_exploded(train_loss, val_loss)
            improved = val_loss < state.best_val_loss and state.iter_num > 0
            if improved:
                state.best_val_loss = val_loss
            save_to = ckpt_path if improved or always_save_checkpoint else last_path
    elif checkpoint_interval and state.iter_num % checkpoint_interval == 0:
        save_to = last_path
    if stopping:
        save_to = last_path

    if save_to and not exploded and needs_saving(save_to):
        save_checkpoint(save_to)
    if stopping:
        report_stop()
        break
    if save_to:
        log.start_clock()  # evaluating and saving is no training
    if finished:
        if saving and state.iter_num > 0:
            report_end(val_loss)  # a finished run has just been evaluated
        break

    profiling = profile and master_process and state.iter_num == profiled_iter
    context = torch.profiler.profile(acc_events=True) if profiling else nullcontext()
    with context as profiler:
        loss_sum, grad_norm = train_step(state.iter_num)
    if loss_sum is None:  # it was left, because a stop is requested
        continue
    if state.iter_num % log_interval == 0:
        loss = all_reduce(loss_sum).item() / gradient_accumulation_steps
        check_finite(math.isfinite(loss), "the loss")
        log.step(loss, grad_norm.item())
    state.iter_num += 1
    state.tokens += tokens_per_iter
    if profiling:
        report_profile(profiler)
        log.start_clock()

# ---------- The end ----------
log.bar.close()
if not has_data and master_process and log.timings:
    # The first quarter is warm-up. A single timing is kept.
    warm_up = math.ceil(len(log.timings) / 4)
    ms = 1000 * np.array(log.timings[warm_up:] or log.timings)
    tokens_per_second = tokens_per_iter * 1000 / np.median(ms)
    result = {
        'device': torch.cuda.get_device_name() if device_type == 'cuda' else device,
        'processes': world_size,
        'threads': torch.get_num_threads(),
        'torch': torch.__version__,
        'peak_memory_gb': peak_memory(),
        'tokens_per_second': tokens_per_second,
        'ms': {'median': np.median(ms), 'min': ms.min(), 'max': ms.max()},
        'mfu': model.estimate_mfu(tokens_per_second / block_size / world_size, 1, peak_flops),
        'settings': config,
    }
    say(json.dumps(result))

del folder_lock  # closing the file unlocks out_dir: a notebook goes on, and may start another run
if distributed:
    dist.barrier()  # until the last checkpoint is saved
    dist.destroy_process_group()
log.to_wandb('finish')  # it may take its time: no rank waits any more

# A notebook goes on, and so does a launcher that runs this script within its own process, as submitit does.
for number, handler in earlier_handlers.items():
    signal.signal(number, handler)
if not distributed:
    signal.set_wakeup_fd(earlier_wakeup)
    written_to.close()
    if stopping and stop_requested == signal.SIGINT:
        raise KeyboardInterrupt  # prints nothing, but a shell that runs a loop of runs ends it as well

# gloo's threads abort one teardown of the interpreter in twelve, so there is none if nobody has called this
# script.
if distributed and sys._getframe().f_back is None:
    os._exit(0)
sys.excepthook = earlier_excepthook
