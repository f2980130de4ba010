"""What a newcomer gets wrong: exit status 1, one line on stderr that says what to do, no traceback, nothing harmed."""
import random
import shutil
import socket

import numpy as np
import pytest
import torch

from conftest import SMALL


@pytest.fixture(scope='module')
def trained(house, tmp_path_factory):
    """A folder with out/ckpt.pt of a tiny run."""
    import subprocess
    import sys
    folder = tmp_path_factory.mktemp('trained')
    subprocess.run([sys.executable, str(house / 'train.py'), *SMALL, '--max_iters=1'], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize('arguments, words', [
    (['--batchsize=3'], "unknown key 'batchsize', did you mean 'batch_size'?"),
    (['--batch_size=many'], 'batch_size takes int'),
    (['--dataset=shakespeare_char'], 'shakespeare_char/prepare.py` first'),
    (['--dataset=shakespear'], "dataset 'shakespear' is none of custom, openwebtext, python_char, shakespeare, shakespeare_char, wiki_zh, wikitext"),
    (['--optimizer=mun'], "optimizer 'mun' is none of adamw, muon"),
    (['--lr_schedule=step'], "lr_schedule 'step' is none of cosine, linear, wsd"),
    (['--init_from=resume'], 'no checkpoint at out/ckpt.pt'),
    (['--init_from=resum'], "init_from 'resum' is no word that --help lists for it (resume, gpt2, gpt2-medium"),
    (['--init_from=gpt2', '--dataset=bare'], "cannot read GPT-2 weights from 'gpt2'"),
    (['--init_from=gpt2'], "data/tiny is not in the encoding that gpt2 reads"),
    (['--eval_iters=0'], 'eval_iters must be at least 1'),
    (['--device=tpu'], "device 'tpu' is none of"),
    (['--dtype=float8'], "dtype 'float8' is none of"),
    (['--n_embd=31'], 'n_embd 31 is not divisible by n_head 2'),
    (['--block_size=5000'], 'use a smaller --block_size'),
    (['--batch_size=0'], 'batch_size must be at least 1'),
    (['--seed=-1'], 'seed must not be negative'),
    (['--beta1=1.5'], 'Invalid beta parameter'),
    (['--out_dir=taken/out'], 'cannot write taken/out: Not a directory'),
    (['--peak_flops=x'], 'peak_flops takes float or None')])
def test_train(run, tmp_path, arguments, words):
    (tmp_path / 'taken').write_text('a file')
    assert words in run('train.py', *SMALL, *arguments, status=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has CUDA')
def test_cuda_without_cuda(run):
    for script in (['train.py', *SMALL], ['sample.py']):
        assert "device 'cuda:0': PyTorch sees 0 CUDA devices here; --device=cpu runs anywhere" in run(*script, '--device=cuda', status=1)


@pytest.mark.parametrize('split, ids, words', [
    ('train', np.arange(100) % 64, "holds the token id 63, but the model's vocabulary ends at"),
    ('val', np.arange(100) % 64, "val.bin holds the token id 63"),
    ('val', np.zeros(10, int), 'val.bin holds 10 tokens, but a sequence takes block_size + 1 = 17'),
    ('train', None, 'train.bin holds 201 bytes, an odd number')])
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


def test_meta(run, house):
    bad = house / 'data' / 'badmeta'
    shutil.copytree(house / 'data' / 'tiny', bad)
    (bad / 'meta.pkl').write_bytes(b'\x80\x04garbage')
    assert 'cannot read' in run('train.py', *SMALL, '--dataset=badmeta', status=1)


@pytest.mark.parametrize('damage, words', [
    (lambda path: path.write_bytes(path.read_bytes()[:-2000]), 'truncated or not a checkpoint'),
    (lambda path: path.write_bytes(b''), 'truncated or not a checkpoint'),
    (lambda path: path.write_text('not a checkpoint at all'), 'truncated or not a checkpoint'),
    (lambda path: path.write_bytes(random.Random(7).randbytes(1000)), 'truncated or not a checkpoint'),
    (lambda path: torch.save({'weights': 1}, path), "is no checkpoint of train.py"),
    (lambda path: torch.save({'model': [1], 'model_args': None}, path), "is no checkpoint of train.py"),
    (lambda path: torch.save({'model': {}, 'model_args': {'n_layer': 1}, 'iter_num': 0}, path), 'the checkpoint does not fit this model.py')])
def test_checkpoint(run, trained, tmp_path, damage, words):
    path = tmp_path / 'out' / 'ckpt.pt'
    path.parent.mkdir()
    shutil.copy(trained / 'out' / 'ckpt.pt', path)
    damage(path)
    damaged = path.read_bytes()
    assert words in run('train.py', *SMALL, '--init_from=resume', status=1)
    assert words in run('sample.py', status=1)
    assert path.read_bytes() == damaged


def test_checkpoint_for_sampling_only(run, trained, tmp_path):
    """One whose optimizer was thrown away samples, but does not resume."""
    checkpoint = torch.load(trained / 'out' / 'ckpt.pt', weights_only=True)
    del checkpoint['optimizer']
    (tmp_path / 'out').mkdir()
    torch.save(checkpoint, tmp_path / 'out' / 'ckpt.pt')
    run('sample.py', '--num_samples=1', '--max_new_tokens=2')
    assert "cannot resume from out: the checkpoint lacks 'optimizer'" in run('train.py', *SMALL, '--init_from=resume', status=1)


@pytest.mark.parametrize('arguments, words', [
    (['--out_dir=nowhere'], 'no checkpoint at nowhere/ckpt.pt'),
    (['--start=日'], "never seen the character '日'"),
    (['--start=FILE:missing.txt'], 'missing.txt: No such file'), (['--start=FILE:out/ckpt.pt'], 'out/ckpt.pt: the prompt is not UTF-8'),
    (['--temperature=-1'], 'temperature must not be negative, not -1.0'),
    (['--top_p=0'], 'top_p must be in (0, 1], not 0.0'),
    (['--top_p=nan'], 'top_p takes float or None'),
    (['--num_samples=0'], 'num_samples must be at least 1'), (['--temperature=nan'], 'temperature takes float'),
    (['--max_new_tokens=0'], 'max_new_tokens must be at least 1'),
    (['--init_from=gpt2'], "cannot read GPT-2 weights from 'gpt2'")])
def test_sample(run, trained, arguments, words):
    assert words in run('sample.py', *arguments, status=1, cwd=trained)


def test_bpe_files_out_of_reach(run, tmp_path):
    """No network and no cache: tiktoken's long ConnectionError becomes one line."""
    with socket.socket() as closed:  # a proxy that refuses, so that no machine reaches the download
        closed.bind(('127.0.0.1', 0))
        offline = {'TIKTOKEN_CACHE_DIR': str(tmp_path), 'HTTPS_PROXY': f'http://127.0.0.1:{closed.getsockname()[1]}'}
        words = run('data/shakespeare/prepare.py', status=1, env=offline)
        assert 'cannot download' in words  # the text comes first; either line names what is missing
        assert "cannot download GPT-2's BPE files" in run('data/openwebtext/prepare.py', status=1, env=offline)


def test_ranks(run):
    """One rank speaks; torchrun reports behind it."""
    for arguments, words in ((['--backend=mpi'], "backend 'mpi'"),
                             (['--gradient_accumulation_steps=3'], 'gradient_accumulation_steps 3 is not divisible by the world size 2'),
                             (['--batchsize=3'], "unknown key 'batchsize'")):
        assert run('train.py', *SMALL, *arguments, status=1, ranks=2).count(words) == 1
