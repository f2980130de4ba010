"""What a newcomer gets wrong: status 1 and one line that says what to do, no traceback, nothing harmed."""

import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
from contextlib import suppress

import numpy as np
import pytest
import torch
from conftest import DEVICE, MACHINE, SMALL

slow = pytest.mark.slow


@pytest.fixture
def trained(run):
    """out/ckpt.pt of a tiny run."""
    run('train.py', *SMALL, '--max_iters=1')


def cases(quick, *more):
    """Parameters of a test: the quick ones, and those that only the whole suite tries."""
    return [*quick, *(pytest.param(*case, marks=slow) for case in more)]


@pytest.mark.parametrize(
    'arguments, words',
    cases(
        [
            (['--batchsize=3'], "unknown key 'batchsize', did you mean 'batch_size'?"),
            (
                ['--dataset=data/tiny'],
                "data/data/tiny/train.bin: --dataset=tiny is the name of a folder of data/",
            ),
            (['--optimizer=mun'], "optimizer takes adamw or muon, not 'mun'"),
            (
                ['--dataset=shakespeare_char'],
                'train.bin: run `python {house}/data/shakespeare_char/prepare.py`',
            ),
            (
                ['--init_from=resume'],
                'no checkpoint at out/ckpt.pt: train first, or name the folder with --out_dir',
            ),
            (['--init_from=gpt2', '--dataset=bare'], "cannot read GPT-2 from 'gpt2'"),
            (['--seed=-1'], 'seed must be at least 0, not -1'),
            (['--block_size=5000'], 'a sequence takes block_size + 1 = 5001: use a smaller --block_size'),
        ],
        (['bench'], 'bench: no such config file, did you mean config/bench.py?'),
        (['--config=config/bench.py'], "unknown key 'config', write the name of a config file alone"),
        (['--no-compile'], 'write --compile=False'),
        (['--eval_only'], 'write --eval_only=True'),
        (['--rewind=True'], "unknown key 'rewind', go around a bad stretch with another --seed"),
        (['--batch_size=many'], "batch_size takes int, not 'many'"),
        (['--dataset=shakespear'], "data/shakespear/train.bin: dataset 'shakespear' is none of "),
        (['--lr_schedule=step'], "lr_schedule takes cosine or linear or wsd, not 'step'"),
        (['--sampler=all'], "sampler takes random or epoch, not 'all'"),
        (['--dtype=float8'], "dtype takes float32 or bfloat16 or float16 or None, not 'float8'"),
        (['--init_from=resum'], "init_from 'resum' is no folder"),
        (['--eval_iters=0'], 'eval_iters must be at least 1, not 0'),
        (['--batch_size=0'], 'batch_size must be at least 1, not 0'),
        (['--max_iters=-1'], 'max_iters must be at least 0, not -1'),
        (['--device=tpu'], "device 'tpu' is none of cuda, cuda:0, cuda:1"),
        (['--n_embd=31'], 'n_embd 31 is not divisible by n_head 2'),
        (['--beta1=1.5'], 'beta'),
        (['--init_std=0'], 'init_std must be above 0'),
        (['--peak_flops=x'], "peak_flops takes float or None, not 'x'"),
    ),
)
def test_train(run, house, tmp_path, arguments, words):
    assert words.format(house=house) in run('train.py', *SMALL, *arguments, status=1)
    assert {path.name for path in tmp_path.glob('out/*')} <= {'.lock'}


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has CUDA')
@pytest.mark.parametrize('script', [pytest.param('train.py', marks=slow), 'sample.py'])
def test_cuda_without_cuda(run, trained, script):
    words = "device 'cuda:0': PyTorch finds 0 here; --device=cpu runs anywhere\n"
    assert run(script, *(SMALL if script == 'train.py' else []), '--device=cuda', status=1) == words


@pytest.mark.parametrize(
    'split, ids, words',
    cases(
        [
            (
                'train',
                np.arange(100) % 64,
                "train.bin holds the token id 63, but the model's vocabulary ends at 39: "
                "was the data prepared with another tokenizer?",
            ),
            ('val', np.zeros(10, int), 'val.bin holds 10 tokens, but a sequence takes block_size + 1 = 17'),
        ],
        ('val', np.arange(100) % 64, "val.bin holds the token id 63, but the model's vocabulary ends at 39"),
        ('train', None, 'data/bad/train.bin is cut off in the middle of a token'),
    ),
)
def test_data(run, house, split, ids, words):
    """Truncated, short or foreign data, found before a GPU would stop with a device-side assertion."""
    bad = house / 'data' / 'bad'
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(house / 'data' / 'tiny', bad)
    if ids is None:
        (bad / f'{split}.bin').write_bytes(bytes(201))
    else:
        ids.astype('<u2').tofile(bad / f'{split}.bin')
    assert words in run('train.py', *SMALL, '--dataset=bad', status=1)


def test_missing_data(run, house, tmp_path):
    """A folder that lacks a file is told apart from none at all. Where a run has moved without its data, the
    line names what to bring: it once said that the data set was none of those that there are.
    """
    moved = house / 'data' / 'moved_here'
    shutil.copytree(house / 'data' / 'tiny', moved)
    run('train.py', *SMALL, '--dataset=moved_here', '--max_iters=1')
    (moved / 'val.bin').rename(moved / 'valid.bin')
    prepare = f'`python {house}/data/custom/prepare.py --input=TEXT --name=moved_here`'
    words = f'there is no {moved}/val.bin, only meta.pkl, train.bin, valid.bin: run {prepare}\n'
    assert run('train.py', *SMALL, '--dataset=moved_here', '--out_dir=new', status=1) == words

    shutil.rmtree(moved)
    resume = ['train.py', *MACHINE, '--init_from=resume', '--max_iters=2']
    words = (
        f'there is no {moved}/train.bin, which out/ckpt.pt was trained on: bring the folder {moved}, '
        f'or only sample by `python {house}/sample.py --out_dir=out`\n'
    )
    assert run(*resume, status=1) == words
    assert "'moved_here' is none of " in run(*resume, '--dataset=moved_here', status=1)


@slow
def test_meta(run, house):
    bad = house / 'data' / 'badmeta'
    shutil.copytree(house / 'data' / 'tiny', bad)
    (bad / 'meta.pkl').write_bytes(b'\x80\x04garbage')
    words = run('train.py', *SMALL, '--dataset=badmeta', status=1)
    assert words.startswith(f"cannot read {bad / 'meta.pkl'}")


@pytest.mark.parametrize(
    'damage, words',
    cases(
        [(lambda path: path.write_bytes(path.read_bytes()[:-2000]), 'damaged or not a checkpoint')],
        (lambda path: path.write_bytes(b''), 'damaged or not a checkpoint'),
        (lambda path: path.write_text('not a checkpoint at all'), 'damaged or not a checkpoint'),
        (lambda path: path.write_bytes(random.Random(7).randbytes(1000)), 'damaged or not a checkpoint'),
        (
            lambda path: torch.save({'weights': 1}, path),
            "not a checkpoint (ValueError: it lacks 'model')",
        ),
        (
            lambda path: torch.save([1], path),
            "not a checkpoint (AttributeError: 'list' object has no attribute",
        ),
        (lambda path: torch.save({'model': [1], 'model_args': None}, path), 'checkpoint '),
        (
            lambda path: torch.save(
                {
                    **dict.fromkeys(('optimizer', 'config', 'model'), {}),
                    'iter_num': 0,
                    'model_args': {'n_layer': 1},
                },
                path,
            ),
            'the checkpoint does not fit this model.py',
        ),
    ),
)
def test_checkpoint(run, trained, tmp_path, damage, words):
    path = tmp_path / 'out' / 'ckpt.pt'
    damage(path)
    damaged = path.read_bytes()
    for script in (
        ['train.py', *SMALL, '--init_from=resume'],
        ['train.py', *SMALL, '--init_from=out'],
        ['sample.py'],
    ):
        assert words in run(*script, status=1)
    assert path.read_bytes() == damaged


W = 'transformer.h.0.attn.c_attn.weight'


@pytest.mark.parametrize(
    'path, value',
    cases(
        [(['optimizer', 'state', 0, 'exp_avg'], lambda m: m.T)],
        *((['optimizer', 'state', 0, 'exp_avg'], value) for value in (None, torch.zeros(()))),
        (['optimizer', 'state', 0], lambda state: {'step': state['step']}),
        (['optimizer', 'state', 0, 'step'], torch.zeros(3)),
        (['optimizer', 'param_groups', 0, 'params'], 5),
        (['optimizer', 'param_groups'], None),
        (['optimizer'], {}),
        (['optimizer'], None),
        (['config'], None),
        (['config', 'seed'], [1]),
        (['iter_num'], None),
        (['iter_num'], -3),
        (['best_val_loss'], 'low'),
        (['best_val_loss'], torch.zeros(2)),
        (['scaler'], []),
        (['tokenizer'], 5),
        (['model', W], None),
        (['model', W], torch.zeros(7)),
        (['model', W], torch.zeros(1).expand(40000, 40000)),
        (['model_args', 'n_layer'], 10**9),
        (['model_args', 'n_embd'], '32'),
        (['model_args', 'vocab_size'], 10**12),
    ),
)
def test_wrong_values_in_a_checkpoint(run, trained, tmp_path, path, value):
    """None is used, whatever its type or shape: one line, and nothing happens to the memory."""
    checkpoint = torch.load(tmp_path / 'out' / 'ckpt.pt', 'cpu', weights_only=True)
    *folders, name = path
    place = checkpoint
    for folder in folders:
        place = place[folder]
    place[name] = value(place[name]) if callable(value) else value
    torch.save(checkpoint, tmp_path / 'out' / 'ckpt.pt')
    words = run('train.py', '--init_from=resume', *MACHINE, '--max_iters=9', status=1)
    assert 'out/ckpt.pt' in words or 'the checkpoint does not fit this model.py' in words or 'memory' in words


@slow
def test_moments_that_share_memory(run, trained, tmp_path):
    """Fused AdamW writes to memory in order, whatever the strides say, so the run copies them."""
    checkpoint = torch.load(tmp_path / 'out' / 'ckpt.pt', 'cpu', weights_only=True)
    moments = checkpoint['optimizer']['state'][0]
    moments['exp_avg'] = moments['exp_avg'][:1].expand(moments['exp_avg'].shape)
    torch.save(checkpoint, tmp_path / 'out' / 'ckpt.pt')
    run('train.py', '--init_from=resume', *MACHINE, '--max_iters=2')
    rows = torch.load(tmp_path / 'out' / 'ckpt.pt', 'cpu', weights_only=True)['optimizer']['state'][0][
        'exp_avg'
    ]
    assert rows.is_contiguous() and not torch.equal(rows[0], rows[1])


@slow
def test_checkpoint_for_sampling_only(run, trained, tmp_path):
    """One whose optimizer was thrown away samples and evaluates, but does not resume."""
    path = tmp_path / 'out' / 'ckpt.pt'
    checkpoint = torch.load(path, 'cpu', weights_only=True)
    del checkpoint['optimizer']
    torch.save(checkpoint, path)
    run('sample.py', '--num_samples=1', '--max_new_tokens=2')
    run('train.py', *SMALL, '--init_from=resume', '--eval_only=True')
    words = run('train.py', *SMALL, '--init_from=resume', status=1)
    assert "out/ckpt.pt, damaged or not a checkpoint (ValueError: it lacks 'optimizer')" in words


def test_sample(run, trained):
    for arguments, words in (
        (
            ['--out_dir=nowhere'],
            'no checkpoint at nowhere/ckpt.pt, but in out (newest first): add --out_dir=out',
        ),
        (['--start=日'], "the model does not know the character '日'"),
        (['--start=FILE:missing.txt'], 'missing.txt: No such file'),
        (['--start=FILE:out/ckpt.pt'], 'out/ckpt.pt: the prompt is not UTF-8'),
        (['--temperature=-1'], 'temperature must be at least 0, not -1.0'),
        (['--top_p=0'], 'top_p must be in (0, 1], not 0.0'),
        (['--top_p=nan'], 'top_p takes float or None'),
        (['--num_samples=0'], 'num_samples must be at least 1'),
        (['--temperature=nan'], 'temperature takes float'),
        (['--max_new_tokens=0'], 'max_new_tokens must be at least 1'),
        (['--init_from=gpt2'], "cannot read GPT-2 from 'gpt2'"),
    ):
        assert words in run('sample.py', *arguments, status=1), arguments


@pytest.mark.parametrize(
    'script, package, arguments',
    cases(
        [
            ('train.py', 'torch', SMALL),
            ('sample.py', 'torch', []),
            ('data/custom/prepare.py', 'numpy', []),
            ('train.py', 'transformers', [*SMALL, '--dataset=bare', '--init_from=gpt2']),
        ],
        ('train.py', 'numpy', SMALL),
        ('train.py', 'tqdm', SMALL),
        ('sample.py', 'transformers', ['--init_from=gpt2']),
        ('sample.py', 'tiktoken', ['--out_dir=bare']),
        ('data/openwebtext/prepare.py', 'datasets', []),
        ('data/shakespeare/prepare.py', 'tqdm', []),
    ),
)
def test_missing_package(run, altered, tmp_path, script, package, arguments):
    """One that is not installed, at the start or later where it is needed: one line says how to get it."""
    if arguments == ['--out_dir=bare']:  # with GPT-2's encoding
        run('train.py', *SMALL, '--dataset=bare', '--max_iters=1', *arguments)
    before = [path for path in sorted(tmp_path.rglob('*.*')) if path.name != '.lock']
    without = altered(f'import sys\nsys.modules[{package!r}] = None', script)
    words = run(without, *arguments, status=1)
    assert words == f'import of {package} halted; None in sys.modules: pip install -r requirements.txt\n'
    assert [path for path in sorted(tmp_path.rglob('*.*')) if path.name != '.lock'] == before


def test_no_packages_at_all(run, altered):
    """As a process of its own, with a Python that has nothing installed."""
    without = altered("import sys\nsys.path = [p for p in sys.path if 'packages' not in p]")
    words = run(without, *SMALL, status=1, real=True)
    assert words == "No module named 'numpy': pip install -r requirements.txt\n"


@slow
def test_bpe_files_out_of_reach(run, tmp_path):
    """No network and no cache: tiktoken's long ConnectionError becomes one line."""
    with socket.socket() as closed:  # a proxy that refuses, so that no machine reaches the download
        closed.bind(('127.0.0.1', 0))
        offline = {
            'TIKTOKEN_CACHE_DIR': str(tmp_path),
            'HTTPS_PROXY': f'http://127.0.0.1:{closed.getsockname()[1]}',
        }
        words = run('data/openwebtext/prepare.py', status=1, env=offline)
        assert "cannot download GPT-2's BPE files" in words
        (tmp_path / 'input.txt').write_text('To be')
        words = run('data/shakespeare/prepare.py', status=1, env=offline)
        assert 'cannot download' in words  # the text comes first; either line names what is missing


@slow
def test_ranks(run, start):
    """Where all ranks fail one speaks, torchrun reports behind it. Where one alone fails it speaks too."""
    alone = start(*SMALL, '--seed=-1', env={'RANK': '1', 'LOCAL_RANK': '1', 'WORLD_SIZE': '2'})
    with pytest.raises(subprocess.TimeoutExpired):
        alone.wait(5)  # it gives the others 10 seconds
    for arguments, words in (
        (
            ['--gradient_accumulation_steps=3'],
            'gradient_accumulation_steps 3 is not divisible by the world size 2: try 4',
        ),
        (['--batchsize=3'], "unknown key 'batchsize'"),
    ):
        assert run('train.py', *SMALL, *arguments, status=1, ranks=2, torchrun=True).count(words) == 1
    assert alone.stdout.read() == '--seed=-1: seed must be at least 0, not -1\n'
    assert alone.wait() == 1


@slow
@pytest.mark.skipif(os.name != 'posix', reason='symbolic links')
def test_other_ways_to_the_script(run, house, trained, tmp_path):
    """Started through `..` or a link, train.py took its own errors for bugs and printed a traceback."""
    (house / 'data' / 'link').symlink_to(house)
    for script in ('data/../train.py', 'data/link/train.py'):
        words = run(script, *SMALL, '--init_from=resume', '--optimizer=muon', status=1)
        assert 'another --optimizer than muon' in words
    (house / 'data' / 'link').unlink()


@slow
@pytest.mark.parametrize(
    'key, value',
    [('lr_schedule', 'step'), ('sampler', 'blocks'), ('seed', 'x'), ('batch_size', 4.0), ('max_iters', [3])],
)
def test_settings_of_a_checkpoint(run, trained, tmp_path, key, value):
    """What a resumed run takes from a checkpoint is checked like the command line. A given key wins."""
    path = tmp_path / 'out' / 'ckpt.pt'
    checkpoint = torch.load(path, 'cpu', weights_only=True)
    good, checkpoint['config'][key] = checkpoint['config'][key], value
    torch.save(checkpoint, path)
    words = run('train.py', '--init_from=resume', *MACHINE, status=1)
    assert words.startswith(f'out/ckpt.pt: {key} takes ') and words.endswith(f', not {value!r}\n')
    run('train.py', '--init_from=resume', *MACHINE, f'--{key}={good}', '--eval_only=True')


@slow
def test_tokenizer_files(run, house, trained, tmp_path):
    """A meta.pkl without a size, a tokenizer.json that is not UTF-8, an empty optimizer: one line each."""
    for name, file, content, words in (
        ('half', 'meta.pkl', pickle.dumps({'stoi': {}}), 'vocab_size is 0'),
        ('latin', 'tokenizer.json', b'{"caf\xe9"}', 'data/latin/tokenizer.json (UnicodeDecodeError: '),
    ):
        folder = house / 'data' / name
        shutil.copytree(house / 'data' / 'bare', folder)
        (folder / file).write_bytes(content)
        assert words in run('train.py', *SMALL, f'--dataset={name}', status=1)
    checkpoint = torch.load(tmp_path / 'out' / 'ckpt.pt', 'cpu', weights_only=True)
    torch.save({**checkpoint, 'optimizer': {}}, tmp_path / 'out' / 'ckpt.pt')
    assert 'another --optimizer' in run('train.py', *SMALL, '--init_from=resume', status=1)


@slow
@pytest.mark.skipif(os.name != 'posix', reason='signals')
def test_stopped_while_it_starts(start):
    """SIGTERM at moments from Python's start to the first iterations: no traceback, and status 0 only where
    the run says how it has stopped.
    """
    for tenths in (1, 6, 12, 18, 24):
        process = start(*SMALL, '--max_iters=1000000', real=True)
        with suppress(subprocess.TimeoutExpired):
            process.wait(tenths / 10)
        process.send_signal(signal.SIGTERM)
        out, status = process.stdout.read(), process.wait(60)
        assert 'Traceback' not in out and status in (0, -signal.SIGTERM)
        assert ('stopped before iteration' in out) == (status == 0)


def test_no_memory(run):
    """On a CPU too it is one line."""
    words = run('train.py', *SMALL, '--batch_size=10000000000000', status=1)
    assert words.startswith(f'out of memory on {DEVICE}: halve --batch_size')


def test_compiled_dropout_on_cuda(run, altered):
    """With checkpointing backward drew other masks than forward (H200, torch 2.11): refused at once."""
    script = altered("from torch import cuda\ncuda.is_available, cuda.device_count = lambda: True, lambda: 1")
    how = [*SMALL, '--device=cuda', '--dropout=0.1', '--compile=True', '--activation_checkpointing=True']
    words = run(script, *how, status=1)
    assert words.startswith('backward would draw other dropout: leave off activation_checkpointing')
