"""train.py as a subprocess on tiny data: its figures against tests/reference.py, its files against nanoGPT's."""
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT, SMALL
from model import GPT, GPTConfig, Tokenizer, read_checkpoint, read_tokenizer
from reference import adamw, gpt_logits, gpt_loss, random_parameters, write_nanogpt_checkpoint

SHAPE = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=False, vocab_size=None, dropout=0.0)


def windows(house, stream, iteration, micro_step, seed=1337, batch_size=4, block_size=16):
    """The batch that train.py documents: a pure function of (seed, stream, iteration, micro-step)."""
    data = np.fromfile(house / 'data' / 'tiny' / ('val.bin' if stream == 2 else 'train.bin'), dtype='<u2').astype(np.int64)
    starts = np.random.default_rng((seed, stream, iteration, micro_step)).integers(len(data) - block_size, size=batch_size)
    x = torch.stack([torch.from_numpy(data[i:i + block_size]) for i in starts])
    y = torch.stack([torch.from_numpy(data[i + 1:i + 1 + block_size]) for i in starts])
    return x, y


def losses(output):
    """{iteration: (train, val)} of the step lines, {iteration: loss} of the iter lines."""
    steps = {int(i): (float(a), float(b)) for i, a, b in re.findall(r'^step (\d+): train loss ([\d.]+), val loss ([\d.]+)', output, re.M)}
    iters = {int(i): float(a) for i, a in re.findall(r'^iter (\d+): loss ([\d.]+), time [\d.]+ms, mfu (?:n/a|[\d.]+%)', output, re.M)}
    return steps, iters


def test_a_run(run, tmp_path):
    """Exactly max_iters steps, evaluations at 0, at every interval and at the end, nanoGPT's lines and nanoGPT's file."""
    out = run('train.py', *SMALL, '--max_iters=12').stdout
    steps, iters = losses(out)
    assert 'tokens per iteration will be: 128\n' in out
    assert list(steps) == [0, 5, 10, 12] and list(iters) == list(range(12))
    assert steps[12][1] < steps[0][1] - 0.3
    saved = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= saved.keys()
    assert saved['model_args'] == {**SHAPE, 'vocab_size': saved['model_args']['vocab_size']} and saved['iter_num'] == 12
    assert saved['config']['dataset'] == 'tiny' and saved['best_val_loss'] == pytest.approx(min(v for _, v in steps.values()), abs=1e-4)
    expected = random_parameters(saved['model_args'])
    expected['lm_head.weight'] = expected['transformer.wte.weight']
    assert {name: p.shape for name, p in saved['model'].items()} == {name: p.shape for name, p in expected.items()}
    theirs = adamw({name: p for name, p in expected.items() if name != 'lm_head.weight'})  # nanoGPT's load_state_dict takes it
    theirs.load_state_dict(saved['optimizer'])
    assert all(theirs.state[p]['exp_avg'].shape == p.shape for group in theirs.param_groups for p in group['params'])
    tokenizer = Tokenizer(saved['tokenizer'])
    assert tokenizer.decode(tokenizer.encode('the lazy dog')) == 'the lazy dog'
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'ckpt.pt', 'metrics.jsonl'}


def test_the_arithmetic(run, house, tmp_path):
    """
    A checkpoint of nanoGPT resumes with its optimizer: losses, clipped gradients, schedule and steps are those of
    plain PyTorch on the documented windows. The logged loss is the mean over the iteration.
    """
    args = {**SHAPE, 'vocab_size': Tokenizer(read_tokenizer(house / 'data' / 'tiny')).size}
    p = {name: q.requires_grad_() for name, q in random_parameters(args).items()}
    optimizer = adamw(p)

    def step(lr, batches):
        total = 0
        for x, y in batches:
            loss = gpt_loss(p, args, x, y) / len(batches)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
        for group in optimizer.param_groups:
            group['lr'] = lr
        optimizer.step()
        optimizer.zero_grad()
        return total

    for i in range(3):
        step(1e-3, [windows(house, 0, 1000 + i, 0)])
    (tmp_path / 'out').mkdir()
    path = tmp_path / 'out' / 'ckpt.pt'
    write_nanogpt_checkpoint(path, p, optimizer, args, 3, 'tiny')
    x, y = windows(house, 2, 0, 0)
    assert abs(GPT.from_checkpoint(read_checkpoint(path))(x, y)[1] - gpt_loss(p, args, x, y)) < 1e-6

    out = run('train.py', *SMALL, '--init_from=resume', '--eval_interval=3', '--max_iters=6', '--warmup_iters=5', '--lr_decay_iters=8',
              '--learning_rate=1e-3', '--min_lr=1e-4').stdout
    steps, iters = losses(out)
    with torch.no_grad():
        val = [sum(gpt_loss(p, args, *windows(house, stream, 0, k)).item() for k in range(2)) / 2 for stream in (1, 2)]
    for i, lr in ((3, 1e-3 * 4 / 6), (4, 1e-3 * 5 / 6), (5, 1e-3)):
        want = step(lr, [windows(house, 0, i, m) for m in range(2)])
        assert iters[i] == pytest.approx(want, abs=1.01e-4)
    assert list(iters) == [3, 4, 5] and list(steps) == [3, 6] and steps[3] == pytest.approx(tuple(val), abs=1.01e-4)
    saved = read_checkpoint(path)
    for name, q in p.items():
        torch.testing.assert_close(saved['model'][name], q.detach(), rtol=1e-4, atol=1e-5)
    # evaluation of the untouched checkpoint, the same windows at any time; it saves nothing
    write_nanogpt_checkpoint(path, {n: q for n, q in saved['model'].items() if n != 'lm_head.weight'}, optimizer, args, 6, 'tiny')
    before = path.read_bytes()
    out = run('train.py', *SMALL, '--init_from=resume', '--eval_only=True').stdout
    again, iters = losses(out)
    assert not iters and list(again) == [6] and again[6] == pytest.approx(steps[6], abs=1.01e-4) and path.read_bytes() == before


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_resume_is_exact(run, tmp_path, optimizer):
    """6 iterations, and 3 followed by 3: every weight and every moment equal, with dropout and accumulation."""
    long = [*SMALL, '--dropout=0.2', '--eval_interval=3', f'--optimizer={optimizer}']
    run('train.py', *long, '--max_iters=6', '--out_dir=a')
    run('train.py', *long, '--max_iters=3', '--out_dir=b')
    resumed = run('train.py', *long, '--max_iters=6', '--out_dir=b', '--init_from=auto').stdout
    assert 'max_iters was 3 in the checkpoint, is 6 now' in resumed
    a, b = (torch.load(tmp_path / name / 'ckpt.pt', weights_only=True) for name in 'ab')
    assert all(torch.equal(p, b['model'][name]) for name, p in a['model'].items())
    for i, state in a['optimizer']['state'].items():
        assert all(torch.equal(v, b['optimizer']['state'][i][k]) for k, v in state.items())
    assert a['best_val_loss'] == b['best_val_loss']
    other = {'adamw': 'muon', 'muon': 'adamw'}[optimizer]
    run('train.py', *long, '--out_dir=b', '--init_from=resume', f'--optimizer={other}', '--eval_only=True')  # evaluating needs none
    assert f'another --optimizer than {other}' in run('train.py', *long, '--out_dir=b', '--init_from=resume', f'--optimizer={other}', status=1)


def test_resume_obeys_the_command_line(run, tmp_path):
    """The weights keep their shape, a smaller block_size crops them with their moments, the rest is what is asked for now."""
    run('train.py', *SMALL)
    out = run('train.py', *SMALL, '--init_from=resume', '--n_embd=64', '--block_size=8', '--weight_decay=0.3', '--beta2=0.9', '--max_iters=7').stdout
    assert 'n_embd is 32, as the weights have it, not 64' in out and 'block_size was 16 in the checkpoint, is 8 now' in out
    saved = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    assert saved['model']['transformer.wpe.weight'].shape == saved['optimizer']['state'][1]['exp_avg'].shape == (8, 32)
    assert saved['optimizer']['param_groups'][0]['weight_decay'] == 0.3 and saved['optimizer']['param_groups'][0]['betas'][1] == 0.9
    assert saved['config']['n_embd'] == 32 and saved['model_args']['block_size'] == 8


def test_best_checkpoint(run, tmp_path):
    """With always_save_checkpoint=False ckpt.pt is the best model, and best_val_loss never gets worse (in nanoGPT it can)."""
    worse = [*SMALL, '--learning_rate=3', '--min_lr=3', '--decay_lr=False', '--eval_interval=1', '--max_iters=4']
    steps, _ = losses(run('train.py', *worse, '--always_save_checkpoint=False').stdout)
    best = min(steps, key=lambda i: steps[i][1])
    assert best < 4  # else this test shows nothing
    saved = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    assert saved['iter_num'] == best and saved['best_val_loss'] == pytest.approx(steps[best][1], abs=1e-4)
    run('train.py', *worse, '--out_dir=all')
    saved = torch.load(tmp_path / 'all' / 'ckpt.pt', weights_only=True)
    assert saved['iter_num'] == 4 and saved['best_val_loss'] == pytest.approx(steps[best][1], abs=1e-4)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_mixed_precision_on_cpu(run, tmp_path, dtype):
    """Weights stay float32, the loss follows float32's, float16 goes through the GradScaler and resumes with its state."""
    plain, _ = losses(run('train.py', *SMALL, '--out_dir=plain').stdout)
    mixed, _ = losses(run('train.py', *SMALL, f'--dtype={dtype}').stdout)
    assert mixed != plain and mixed[5] == pytest.approx(plain[5], abs=0.03)
    saved = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    assert {p.dtype for p in saved['model'].values()} == {torch.float32}
    assert saved['scaler'] == {} if dtype == 'bfloat16' else saved['scaler']['_growth_tracker'] == 5 and saved['scaler']['scale'] == 65536
    run('train.py', *SMALL, f'--dtype={dtype}', '--init_from=resume', '--max_iters=7')
    saved = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    assert dtype == 'bfloat16' or saved['scaler']['_growth_tracker'] == 7


def test_two_ranks(run, tmp_path):
    """Under torchrun with gloo the curve is that of one process, and one rank speaks and saves. Muon here, AdamW in test_number_of_ranks."""
    one = losses(run('train.py', *SMALL, '--dropout=0.2', '--optimizer=muon', '--out_dir=one').stdout)
    both = run('train.py', *SMALL, '--dropout=0.2', '--optimizer=muon', ranks=2).stdout
    assert 'tokens per iteration will be: 128\n' in both and both.count('step 5:') == 1
    for a, b in zip(one, losses(both)):
        assert a.keys() == b.keys()
        for i in a:
            assert b[i] == pytest.approx(a[i], abs=2e-4)
    a, b = (torch.load(tmp_path / name / 'ckpt.pt', weights_only=True)['model'] for name in ('one', 'out'))
    assert all(torch.allclose(p, b[name], atol=1e-4) for name, p in a.items())
    # an odd number of evaluation batches is shared too
    steps, _ = losses(run('train.py', *SMALL, '--eval_iters=3', '--eval_only=True', ranks=2).stdout)
    assert steps[0] == pytest.approx(losses(run('train.py', *SMALL, '--eval_iters=3', '--eval_only=True').stdout)[0][0], abs=1.01e-4)


def test_finetune_transformers_folder(run, house, tmp_path):
    """init_from=FOLDER: the first evaluation is transformers' own loss; training goes on from there; the result samples."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=24, vocab_size=64, bos_token_id=None,
                                        eos_token_id=None, initializer_range=0.2)).eval()
    theirs.save_pretrained(tmp_path / 'gpt2')
    steps, _ = losses(run('train.py', *SMALL, '--init_from=gpt2', f'--init_from={tmp_path / "gpt2"}', '--max_iters=20').stdout)
    with torch.no_grad():
        want = [sum(theirs(x, labels=y, shift_labels=y).loss.item() for x, y in (windows(house, stream, 0, k) for k in range(2))) / 2 for stream in (1, 2)]
    assert steps[0] == pytest.approx(tuple(want), abs=1.01e-4) and steps[20][1] < steps[0][1] - 0.3
    saved = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    assert saved['model_args'] == {**SHAPE, 'bias': True, 'vocab_size': 64, 'activation': 'gelu_tanh'}
    text = run('sample.py', '--device=cpu', '--num_samples=2', '--max_new_tokens=30', '--start=the').stdout
    assert text.count('the') >= 2 and text.count('---------------') == 2


def test_every_block_once_an_epoch(run, house, tmp_path):
    """sampler=epoch on tokens that are their own positions: each block once an epoch, at another offset each time; the same on 3 ranks and after a resume."""
    from common import write_characters
    (house / 'data' / 'positions').mkdir(exist_ok=True)
    characters = ''.join(map(chr, range(1000)))
    write_characters(house / 'data' / 'positions', characters, characters)
    source = (house / 'train.py').read_text(encoding='utf-8')
    spying = source.replace('    X, Y = tokens[:, :-1]', "    if stream == 'train' and iteration < 16:\n        print(' '.join(map(str, ['drew', iteration, micro_step, *tokens[:, 0].tolist()])) + '\\n', end='')\n    X, Y = tokens[:, :-1]")
    assert spying != source
    (house / 'spying.py').write_text(spying, encoding='utf-8')

    def draws(*arguments, **how):
        out = run('spying.py', *SMALL, '--dataset=positions', '--sampler=epoch', '--gradient_accumulation_steps=3', *arguments, **how).stdout
        return {tuple(map(int, words[1:3])): tuple(map(int, words[3:])) for words in (line.split() for line in out.splitlines()) if words[:1] == ['drew']}
    whole = draws('--max_iters=16', '--out_dir=a')
    starts = [start for _, batch in sorted(whole.items()) for start in batch]
    blocks = 1000 // 16 - 1
    epochs = [starts[i:i + blocks] for i in range(0, 3 * blocks, blocks)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(min(epoch), min(epoch) + blocks * 16, 16)) and epoch != sorted(epoch) and min(epoch) < 1000 - blocks * 16
    assert len({min(epoch) for epoch in epochs}) > 1
    both = {**draws('--max_iters=7', '--out_dir=b'), **draws('--max_iters=16', '--out_dir=b', '--init_from=resume')}
    assert both == whole
    assert draws('--max_iters=16', '--out_dir=c', ranks=3) == whole
    assert "sampler 'all' is none of random, epoch" in run('train.py', *SMALL, '--sampler=all', status=1)


def test_compile(run):
    """The compiled run has the eager one's curve, and compiles before the first iteration."""
    eager, _ = losses(run('train.py', *SMALL).stdout)
    out = run('train.py', *SMALL, '--compile=True', '--out_dir=compiled').stdout
    assert re.search(r'^compiled in \d+ s$', out, re.M)
    for i, pair in losses(out)[0].items():
        assert pair == pytest.approx(eager[i], abs=2e-4)


def test_compile_falls_back(run, house, tmp_path):
    """No C++ compiler: one line, and the run goes on in eager mode with the same figures."""
    def without_compiler(script, *arguments):  # a process of its own: the compiler's settings are read when it is imported
        return subprocess.run([sys.executable, str(house / script), *arguments, '--compile=True'], cwd=tmp_path, capture_output=True, text=True, check=True,
                              env={**os.environ, 'CXX': '/nonexistent/c++', 'TORCHINDUCTOR_FORCE_DISABLE_CACHES': '1'})
    eager = losses(run('train.py', *SMALL).stdout)
    out = without_compiler('train.py', *SMALL, '--out_dir=compiled').stdout
    assert len(re.findall('^torch.compile does not work here, running eager', out, re.M)) == 1
    assert losses(out) == eager
    text = run('sample.py', '--num_samples=1', '--max_new_tokens=9').stdout
    done = without_compiler('sample.py', '--num_samples=1', '--max_new_tokens=9')
    assert done.stdout == text and done.stderr.count('torch.compile does not work here, running eager') == 1


def test_schedule(run):
    """Linear warm-up to learning_rate, then the shape that lr_schedule names down to min_lr, and no division by zero where the two meet."""
    source = (ROOT / 'train.py').read_text()
    scope = {'math': math, 'decay_lr': True, 'learning_rate': 1.0, 'warmup_iters': 9, 'lr_decay_iters': 109, 'min_lr': 0.1, 'lr_schedule': 'cosine'}
    exec(source[source.index('def get_lr'):source.index('def save_checkpoint')], scope)
    lr = scope['get_lr']
    assert [lr(i) for i in (0, 4, 9, 59, 109, 1000)] == pytest.approx([0.1, 0.5, 1.0, 0.55, 0.1, 0.1])
    for scope['lr_schedule'], there in (('linear', [0.1, 0.775, 0.55, 0.28, 0.1, 0.1]), ('wsd', [0.1, 1.0, 1.0, 1.0, 0.1, 0.1])):
        assert [lr(i) for i in (0, 34, 59, 89, 109, 1000)] == pytest.approx(there)
    assert lr(99) == pytest.approx(0.55)
    scope['warmup_iters'] = 109
    assert lr(109) == 0.1


def test_resume_with_another_alphabet(run, house):
    """Other data under the old weights would be read as other text: refused, and the checkpoint keeps its tokenizer."""
    import shutil
    run('train.py', *SMALL)
    shutil.copytree(house / 'data' / 'tiny', house / 'data' / 'moved', dirs_exist_ok=True)
    run('train.py', *SMALL, '--dataset=moved', '--init_from=resume', '--max_iters=6')
    (house / 'data' / 'moved' / 'meta.pkl').unlink()
    assert 'was prepared with another tokenizer' in run('train.py', *SMALL, '--dataset=moved', '--init_from=resume', status=1)
    run('sample.py', '--num_samples=1', '--max_new_tokens=2')


def test_old_optimizer_layout(run, tmp_path):
    """nanoGPT of 2022 sorted its parameters by name: its moments belong to others, so no step is taken with them."""
    run('train.py', *SMALL)
    saved = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    decay, rest = saved['optimizer']['param_groups']
    rest['params'].insert(0, decay['params'].pop())
    torch.save(saved, tmp_path / 'out' / 'ckpt.pt')
    assert 'laid out for another list of parameters' in run('train.py', *SMALL, '--init_from=resume', status=1)


def test_a_stray_world_size(run):
    """WORLD_SIZE that a cluster left behind, without torchrun, divides nothing."""
    plain = losses(run('train.py', *SMALL).stdout)
    assert losses(run('train.py', *SMALL, env={'WORLD_SIZE': '2', 'LOCAL_RANK': '0'}).stdout) == plain


def test_ids_without_text(run, house):
    """A meta.pkl with nothing but vocab_size is enough to train on, as in nanoGPT."""
    import pickle
    folder = house / 'data' / 'music'
    folder.mkdir(exist_ok=True)
    for name in ('train', 'val'):
        (np.arange(200) % 90).astype('<u2').tofile(folder / f'{name}.bin')
    (folder / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 90}))
    run('train.py', *SMALL, '--dataset=music')
    assert 'lacks stoi or itos' in run('sample.py', status=1)


def test_big_ids(run, house, tmp_path):
    """Ids above 32,767 arrive as they are, although they travel as 16 bits with a sign."""
    folder = house / 'data' / 'big'
    folder.mkdir(exist_ok=True)
    for name in ('train', 'val'):
        np.full(64, 50000, dtype='<u2').tofile(folder / f'{name}.bin')
    steps, _ = losses(run('train.py', *SMALL, '--dataset=big', '--max_iters=30', '--eval_interval=30', '--log_interval=30').stdout)
    assert steps[0][1] > 9 and steps[30][1] < 1
    p = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    assert gpt_logits(p['model'], p['model_args'], torch.full((1, 4), 50000)).argmax(-1).unique().item() == 50000


def test_bench(run, tmp_path):
    """config/bench.py: no data, no files, and one JSON object at the end with the figures of the lines above it."""
    small = ['--device=cpu', '--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=32', '--batch_size=2', '--gradient_accumulation_steps=2']
    out = run('train.py', 'config/bench.py', *small, '--max_iters=8').stdout
    assert 'step ' not in out and not list(tmp_path.iterdir())
    result = json.loads(out.splitlines()[-1])
    times = sorted(float(ms) for ms in re.findall(r'^iter \d+: loss [\d.]+, time ([\d.]+)ms', out, re.M)[2:])
    assert len(times) == 6 and result['ms'] == pytest.approx({'median': (times[2] + times[3]) / 2, 'min': times[0], 'max': times[-1]}, abs=0.01)
    assert result['tokens_per_second'] == pytest.approx(128 / result['ms']['median'] * 1000)
    assert result['settings']['compile'] is False and result['mfu'] is None and 0.1 < result['peak_memory_gb'] < 10 and result['torch'] == torch.__version__
    assert result['settings']['optimizer'] == 'adamw' and result['settings']['batch_size'] == 2 and result['settings']['dtype'] == 'float32'
    # the first iteration, which is cold, never counts
    out = run('train.py', 'config/bench.py', *small, '--max_iters=3', '--log_interval=2').stdout
    assert json.loads(out.splitlines()[-1])['ms']['max'] == pytest.approx(float(re.search(r'^iter 2: .* time ([\d.]+)ms', out, re.M)[1]), abs=0.01)
    # a peak that is known makes an mfu
    out = run('train.py', 'config/bench.py', *small, '--max_iters=2', '--peak_flops=1e9', '--optimizer=muon', '--activation_checkpointing=True').stdout
    result = json.loads(out.splitlines()[-1])
    net = GPT(GPTConfig(32, 50304, 1, 2, 16, bias=False))
    assert result['mfu'] == pytest.approx(result['tokens_per_second'] * net.estimate_flops() / 1e9)
    assert 'only times training' in run('train.py', 'config/bench.py', '--init_from=resume', status=1)


def test_profile(run, tmp_path):
    """The ten costliest operations, and a trace that the viewers open; the run itself is no other."""
    plain = losses(run('train.py', *SMALL, '--out_dir=plain').stdout)
    out = run('train.py', *SMALL, '--profile=True').stdout
    assert losses(out) == plain
    table = out[out.index('Self CPU'):out.index('Self CPU time total')]
    assert len(re.findall(r'^ .*::', table, re.M)) >= 5 and len(table.splitlines()) < 16
    names = {event['name'] for event in json.loads((tmp_path / 'out' / 'trace.json').read_text())['traceEvents'] if 'name' in event}
    assert {'aten::mm', 'ChunkedCrossEntropy'} <= names
