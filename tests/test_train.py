"""train.py on tiny data: its figures against tests/reference.py, its files against nanoGPT's."""

import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import DEVICE, MACHINE, PLACE, SMALL, TRACED
from reference import adamw, gpt_logits, gpt_loss, random_parameters, write_nanogpt_checkpoint

from data.common import write_characters
from data.tokenizer import Tokenizer, read_tokenizer_spec
from model import GPT, GPTConfig, read_checkpoint

slow = pytest.mark.slow
SHAPE = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=False, vocab_size=None, dropout=0.0)


def load(folder, name='ckpt.pt'):
    return torch.load(folder / name, 'cpu', weights_only=True)


def windows(house, stream, iteration, micro_step, seed=1337, batch_size=4, block_size=16):
    """The batch that train.py documents: a pure function of (seed, stream, iteration, micro-step)."""
    name = 'val.bin' if stream == 2 else 'train.bin'
    data = np.fromfile(house / 'data' / 'tiny' / name, dtype='<u2').astype(np.int64)
    rng = np.random.default_rng((seed, stream, iteration, micro_step))
    starts = rng.integers(len(data) - block_size, size=batch_size)
    x = torch.stack([torch.from_numpy(data[i : i + block_size]) for i in starts])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block_size]) for i in starts])
    return x, y


def losses(output):
    """{iteration: (train, val)} of the step lines, {iteration: loss} of the iter lines."""
    steps = re.findall(r'^step (\d+): train loss ([\d.]+), val loss ([\d.]+), peak', output, re.M)
    iters = re.findall(r'^iter (\d+): loss ([\d.]+), time [\d.]+ms, [\d.]+k? tok/s, ', output, re.M)
    return (
        {int(i): (float(train), float(val)) for i, train, val in steps},
        {int(i): float(loss) for i, loss in iters},
    )


# -----------------------------------------------------------------------------
# a run, and a run that goes on


def test_a_run(run, tmp_path):
    """Exactly max_iters steps; evaluations at 0, at the interval and at the end; nanoGPT's lines and file."""
    out = run('train.py', *SMALL, '--max_iters=12', real=True).stdout
    steps, iters = losses(out)
    assert 'tokens per iteration will be: 128\n' in out
    assert list(steps) == [0, 5, 10, 12] and list(iters) == list(range(12))
    assert steps[12][1] < steps[0][1] - 0.3
    saved = load(tmp_path / 'out')
    assert saved.keys() >= {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'}
    assert saved['model_args'] == {**SHAPE, 'vocab_size': saved['model_args']['vocab_size']}
    assert saved['iter_num'] == 12 and saved['config']['dataset'] == 'tiny'
    assert saved['best_val_loss'] == pytest.approx(min(v for _, v in steps.values()), abs=1e-4)
    expected = random_parameters(saved['model_args'])
    expected['lm_head.weight'] = expected['transformer.wte.weight']
    shapes, found = ({name: p.shape for name, p in model.items()} for model in (expected, saved['model']))
    assert shapes == found
    # nanoGPT's load_state_dict takes it
    theirs = adamw({name: p for name, p in expected.items() if name != 'lm_head.weight'})
    theirs.load_state_dict(saved['optimizer'])
    for p in (p for group in theirs.param_groups for p in group['params']):
        assert theirs.state[p]['exp_avg'].shape == p.shape
    tokenizer = Tokenizer(saved['tokenizer'])
    assert tokenizer.decode(tokenizer.encode('the lazy dog')) == 'the lazy dog'
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'ckpt.pt', 'metrics.jsonl', '.lock'}
    out = run('train.py', *SMALL, '--eval_only=True', '--out_dir=none').stdout
    assert losses(out) == ({0: steps[0]}, {}) and not (tmp_path / 'none').exists()


def test_the_arithmetic(run, house, tmp_path):
    """A checkpoint of nanoGPT resumes with its optimizer: losses, clipped gradients, schedule and steps are
    those of plain PyTorch on the documented windows. The logged loss is the mean over the iteration.
    """
    args = {**SHAPE, 'vocab_size': Tokenizer(read_tokenizer_spec(house / 'data' / 'tiny')).vocab_size}
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
    assert abs(GPT.from_checkpoint(tmp_path / 'out')(x, y)[1] - gpt_loss(p, args, x, y)) < 1e-6

    out = run(
        'train.py',
        *SMALL,
        '--init_from=resume',
        '--eval_interval=3',
        '--max_iters=6',
        '--warmup_iters=5',
        '--lr_decay_iters=8',
        '--learning_rate=1e-3',
        '--min_lr=1e-4',
    ).stdout
    steps, iters = losses(out)
    with torch.no_grad():
        val = [
            sum(gpt_loss(p, args, *windows(house, stream, 0, k)).item() for k in range(2)) / 2
            for stream in (1, 2)
        ]
    for i, lr in ((3, 1e-3 * 4 / 6), (4, 1e-3 * 5 / 6), (5, 1e-3)):
        want = step(lr, [windows(house, 0, i, m) for m in range(2)])
        assert iters[i] == pytest.approx(want, abs=1.01e-4)
    assert list(iters) == [3, 4, 5] and list(steps) == [3, 6]
    assert steps[3] == pytest.approx(val, abs=1.01e-4)
    saved = read_checkpoint(path)
    for name, q in p.items():
        torch.testing.assert_close(saved['model'][name], q.detach(), rtol=1e-4, atol=1e-5)
    # evaluation of the untouched checkpoint, the same windows at any time; it saves nothing
    weights = {name: q for name, q in saved['model'].items() if name != 'lm_head.weight'}
    write_nanogpt_checkpoint(path, weights, optimizer, args, 6, 'tiny')
    before = path.read_bytes()
    again, iters = losses(run('train.py', *SMALL, '--init_from=resume', '--eval_only=True').stdout)
    assert not iters and list(again) == [6] and again[6] == pytest.approx(steps[6], abs=1.01e-4)
    assert path.read_bytes() == before


@pytest.mark.parametrize('optimizer', ['adamw', pytest.param('muon', marks=slow)])
def test_resume_is_exact(run, tmp_path, optimizer):
    """6 iterations, and 3 followed by 3: every weight and moment equal, with dropout and accumulation. The
    resumed run needs no key again but the one that changes.
    """
    long = [*SMALL, '--dropout=0.2', '--eval_interval=3', f'--optimizer={optimizer}']
    run('train.py', *long, '--max_iters=6', '--out_dir=a')
    run('train.py', *long, '--max_iters=3', '--out_dir=b')
    how = ['--init_from=auto', '--out_dir=b', *MACHINE]
    out = run('train.py', *how, '--max_iters=6').stdout
    assert re.findall('^.* was .* now$', out, re.M) == ['max_iters was 3 in the checkpoint, is 6 now']
    a, b = (load(tmp_path / name) for name in 'ab')
    assert all(torch.equal(p, b['model'][name]) for name, p in a['model'].items())
    for i, state in a['optimizer']['state'].items():
        assert all(torch.equal(v, b['optimizer']['state'][i][k]) for k, v in state.items())
    assert a['best_val_loss'] == b['best_val_loss']
    assert {**a['config'], 'out_dir': 'b', 'init_from': 'resume'} == b['config']
    other = {'adamw': 'muon', 'muon': 'adamw'}[optimizer]
    run('train.py', *how, f'--optimizer={other}', '--eval_only=True')  # evaluating needs none
    words = run('train.py', *how, f'--optimizer={other}', status=1)
    assert f'has the state of another --optimizer than {other}' in words


def test_init_std(run, tmp_path):
    """Twice the standard deviation makes twice every matrix of a new model, and leaves norms and biases."""
    run(
        'train.py',
        *SMALL,
        '--bias=True',
        '--init_std=0.04',
        '--learning_rate=0',
        '--min_lr=0',
        '--max_iters=1',
    )
    checkpoint = load(tmp_path / 'out')
    torch.manual_seed(1337)
    for name, p in GPT(GPTConfig(**checkpoint['model_args'])).named_parameters():
        assert torch.equal(checkpoint['model'][name], p * (2 if p.dim() > 1 else 1)), name


def test_resume_obeys_the_command_line(run, tmp_path):
    """What is asked for now holds, a smaller block_size crops the weights with their moments, and the rest is
    the checkpoint's: the command line's defaults once ran instead. Sizes that the weights contradict are an
    error; such a line once scrolled by.
    """
    run('train.py', *SMALL, '--beta1=0.85', '--sampler=epoch')
    resume = [*MACHINE, '--init_from=resume', '--max_iters=7']
    for key, value, found in (
        ('n_embd', 64, 32),
        ('n_layer', 1, 2),
        ('n_head', 4, 2),
        ('bias', True, False),
        ('block_size', 32, 16),
    ):
        words = run('train.py', *resume, f'--{key}={value}', status=1)
        assert words.startswith(f'out/ckpt.pt has {key} {found}, not {value}: leave --{key} off, or start ')
    out = run(
        'train.py', *resume, '--block_size=8', '--n_embd=32', '--weight_decay=0.3', '--beta2=0.9'
    ).stdout
    assert 'block_size was 16 in the checkpoint, is 8 now\n' in out
    assert 'tokens per iteration will be: 64\n' in out and 'n_layer' not in out
    saved = load(tmp_path / 'out')
    wpe = saved['model']['transformer.wpe.weight']
    assert wpe.shape == saved['optimizer']['state'][1]['exp_avg'].shape == (8, 32)
    group = saved['optimizer']['param_groups'][0]
    assert group['weight_decay'] == 0.3 and group['betas'] == (0.85, 0.9)
    assert saved['config']['n_embd'] == 32 and saved['config']['sampler'] == 'epoch'
    assert saved['model_args']['block_size'] == 8


def test_bfloat16_by_default(run, altered):
    """Where the CPU multiplies it, and the line at the start says why."""
    script = altered("import model\nmodel.has_bfloat16 = lambda kind: True")
    how = [word for word in SMALL if 'dtype' not in word]
    assert '; cpu, bfloat16 (this CPU has units for it)\n' in run(script, *how, '--device=cpu').stdout


def test_keys_of_the_machine_are_not_resumed(run, tmp_path):
    """A compiled run of a GPU goes on on a laptop: device, dtype and compile are not the checkpoint's."""
    run('train.py', *SMALL)
    saved = load(tmp_path / 'out')
    saved['config'].update(
        device='cuda:7',
        dtype='bfloat16',
        compile=True,
        backend='nccl',
        eval_only=True,
        profile=True,
        out_dir='elsewhere',
        init_from='scratch',
    )
    torch.save(saved, tmp_path / 'out' / 'ckpt.pt')
    out = run('train.py', '--init_from=resume', *MACHINE, '--max_iters=6').stdout
    assert f'; {PLACE}\n' in out and 'compile' not in out and 'iter 5:' in out and 'device' not in out
    assert load(tmp_path / 'out')['config']['device'] == DEVICE and not (tmp_path / 'elsewhere').exists()


@slow
def test_best_checkpoint(run, tmp_path):
    """always_save_checkpoint=False: ckpt.pt is the best model, and last.pt the newest until there is a
    better one. best_val_loss never rises; in nanoGPT it does.
    """
    worse = [*SMALL, '--learning_rate=0.03', '--decay_lr=False', '--eval_interval=1']
    steps, _ = losses(run('train.py', *worse, '--always_save_checkpoint=False').stdout)
    lowest, best = min((val, i) for i, (_, val) in steps.items())
    assert 0 < best < 5, steps  # else this test shows nothing
    saved = load(tmp_path / 'out')
    assert saved['iter_num'] == best and saved['best_val_loss'] == pytest.approx(lowest, abs=1e-4)
    assert load(tmp_path / 'out', 'last.pt')['iter_num'] == 5
    steps, _ = losses(run('train.py', '--init_from=resume', *MACHINE, '--max_iters=12').stdout)
    assert min(steps, key=lambda i: steps[i][1]) == 12, steps  # likewise
    assert load(tmp_path / 'out')['iter_num'] == 12 and not (tmp_path / 'out' / 'last.pt').exists()
    run('train.py', *worse, '--out_dir=all')
    saved = load(tmp_path / 'all')
    assert saved['iter_num'] == 5 and saved['best_val_loss'] == pytest.approx(lowest, abs=1e-4)


@slow
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_mixed_precision_on_cpu(run, tmp_path, dtype):
    """Weights stay float32, the loss follows float32's, float16 resumes with the state of its GradScaler."""
    calm = [*SMALL, '--learning_rate=4e-3']  # at the other tests' rate the loss rises, and roundings with it
    plain, _ = losses(run('train.py', *calm, '--out_dir=plain').stdout)
    mixed, _ = losses(run('train.py', *calm, f'--dtype={dtype}').stdout)
    assert mixed != plain and mixed[5] == pytest.approx(plain[5], abs=0.03)
    saved = load(tmp_path / 'out')
    assert {p.dtype for p in saved['model'].values()} == {torch.float32}
    if dtype == 'bfloat16':
        assert saved['scaler'] == {}
    else:
        assert saved['scaler']['_growth_tracker'] == 5 and saved['scaler']['scale'] == 65536
        run('train.py', *SMALL, f'--dtype={dtype}', '--init_from=resume', '--max_iters=7')
        assert load(tmp_path / 'out')['scaler']['_growth_tracker'] == 7


def test_schedule(run, altered):
    """Linear warm-up, then the shape that lr_schedule names, and no division by zero where the two meet."""
    script = altered(
        '',
        after="""
get_lr = scope['get_lr']
shapes = [{'lr_schedule': shape} for shape in ('cosine', 'linear', 'wsd')]
for change in (*shapes, {'warmup_iters': 109}, {'decay_lr': False}):
    get_lr.__globals__.update(change)
    print('rates', *[get_lr(i) for i in (0, 4, 9, 34, 59, 89, 99, 109, 1000)])
""",
    )
    how = [
        '--learning_rate=1',
        '--warmup_iters=9',
        '--lr_decay_iters=109',
        '--min_lr=0.1',
        '--eval_only=True',
    ]
    out = run(script, *SMALL, *how).stdout
    cosine, linear, wsd, all_warm_up, constant = (
        [float(word) for word in line.split()] for line in re.findall('^rates (.*)$', out, re.M)
    )
    assert cosine[:3] == linear[:3] == wsd[:3] == pytest.approx([0.1, 0.5, 1.0])
    assert cosine[7:] == linear[7:] == wsd[7:] == all_warm_up[7:] == [0.1, 0.1]
    assert cosine[4] == pytest.approx(0.55)
    assert linear[3:6] == pytest.approx([0.775, 0.55, 0.28])
    assert wsd[3:7] == pytest.approx([1.0, 1.0, 1.0, 0.55])
    assert constant == [1.0] * 9


# -----------------------------------------------------------------------------
# other people's weights


@slow
def test_finetune_transformers_folder(run, house, tmp_path, bpe):
    """init_from=FOLDER: the first evaluation is transformers' own loss; it trains on; the result samples."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=24, vocab_size=50257, initializer_range=0.2)
    ).eval()
    theirs.save_pretrained(tmp_path / 'gpt2')  # without a tokenizer.json: in GPT-2's encoding
    steps, _ = losses(
        run('train.py', *SMALL, '--dataset=bare', f'--init_from={tmp_path / "gpt2"}', '--max_iters=20').stdout
    )
    with torch.no_grad():
        want = [
            sum(
                theirs(x, labels=y, shift_labels=y).loss.item()
                for x, y in (windows(house, stream, 0, k) for k in range(2))
            )
            / 2
            for stream in (1, 2)
        ]
    assert steps[0] == pytest.approx(want, abs=1.01e-4) and steps[20][1] < steps[0][1] - 0.3
    saved = load(tmp_path / 'out')
    assert saved['model_args'] == {**SHAPE, 'bias': True, 'vocab_size': 50257, 'activation': 'gelu_tanh'}
    text = run('sample.py', *MACHINE, '--num_samples=2', '--max_new_tokens=9', '--start=the').stdout
    assert text.count('the') >= 2 and text.count('---------------') == 2
    words = run('train.py', *SMALL, f'--init_from={tmp_path / "gpt2"}', '--max_iters=6', status=1)
    assert 'data/tiny was prepared with another tokenizer than ' in words


@pytest.mark.parametrize('origin', ['ours', pytest.param('nanogpt', marks=slow)])
def test_from_a_folder_with_a_checkpoint(run, house, tmp_path, origin):
    """Its weights, but iteration 0 and fresh moments: fine-tuning one's own model. Data in another encoding
    would be read as other text, and is refused.
    """
    (tmp_path / 'first').mkdir()
    if origin == 'ours':
        first = losses(run('train.py', *SMALL, '--out_dir=first').stdout)[0][5]
    else:
        args = {**SHAPE, 'vocab_size': Tokenizer(read_tokenizer_spec(house / 'data' / 'tiny')).vocab_size}
        p = random_parameters(args)
        write_nanogpt_checkpoint(tmp_path / 'first' / 'ckpt.pt', p, adamw(p), args, 3, 'tiny')
        first = tuple(
            sum(gpt_loss(p, args, *windows(house, stream, 0, k)).item() for k in range(2)) / 2
            for stream in (1, 2)
        )
    before = (tmp_path / 'first' / 'ckpt.pt').read_bytes()
    out = run('train.py', *SMALL, '--init_from=first', '--n_layer=1', '--max_iters=2').stdout
    steps, iters = losses(out)
    assert 'weights from first: ' in out and 'n_layer is 2, as the weights have it, not 1\n' in out
    assert list(steps) == [0, 2] and steps[0] == pytest.approx(first, abs=1.01e-4) and list(iters) == [0, 1]
    saved = load(tmp_path / 'out')
    assert saved['iter_num'] == 2 and saved['model_args']['n_layer'] == 2
    assert {state['step'].item() for state in saved['optimizer']['state'].values()} == {2}
    words = run('train.py', *SMALL, '--init_from=first', '--dataset=bare', status=1)
    assert 'data/bare was prepared with another tokenizer than first' in words
    assert (tmp_path / 'first' / 'ckpt.pt').read_bytes() == before


def test_ints_of_nanogpt(run, tmp_path):
    """nanoGPT's config files may say `dropout = 0`, and its checkpoints then hold an int: the run goes on."""
    run('train.py', *SMALL)
    saved = load(tmp_path / 'out')
    saved['config'].update(dropout=0, weight_decay=0, warmup_iters=2.0)
    torch.save(saved, tmp_path / 'out' / 'ckpt.pt')
    words = run('train.py', '--init_from=resume', *MACHINE, '--max_iters=6', status=1)
    assert words == 'out/ckpt.pt: warmup_iters takes int, not 2.0\n'
    how = ['--init_from=resume', *MACHINE, '--max_iters=6', '--warmup_iters=2']
    assert 'weight_decay' not in run('train.py', *how).stdout
    assert load(tmp_path / 'out')['config']['weight_decay'] == 0.0


@slow
def test_resume_with_another_alphabet(run, house):
    """Other data under old weights would be read as other text: refused. The checkpoint has its tokenizer."""
    run('train.py', *SMALL)
    shutil.copytree(house / 'data' / 'tiny', house / 'data' / 'moved', dirs_exist_ok=True)
    run('train.py', *SMALL, '--dataset=moved', '--init_from=resume', '--max_iters=6')
    (house / 'data' / 'moved' / 'meta.pkl').unlink()
    words = run('train.py', *SMALL, '--dataset=moved', '--init_from=resume', status=1)
    assert 'data/moved was prepared with another tokenizer than out/ckpt.pt: ' in words
    assert f'`python {house}/data/custom/prepare.py --input=TEXT --name=NAME --tokenizer=out`' in words
    run('sample.py', '--num_samples=1', '--max_new_tokens=2', *MACHINE)


def test_types_of_nanogpt(run, tmp_path):
    """nanoGPT's keys of a checkpoint have nanoGPT's types, so that its users' scripts read ours:
    checkpoint['best_val_loss'].item() once failed.
    """
    run('train.py', *SMALL, '--max_iters=1')
    ours = load(tmp_path / 'out')
    args = ours['model_args']
    parameters = random_parameters(args)
    write_nanogpt_checkpoint(tmp_path / 'theirs.pt', parameters, adamw(parameters), args, 1, 'tiny')
    theirs = load(tmp_path, 'theirs.pt')
    assert all(isinstance(ours[key], type(value)) for key, value in theirs.items())
    assert ours['best_val_loss'].dtype == theirs['best_val_loss'].dtype
    assert ours['best_val_loss'].shape == theirs['best_val_loss'].shape
    assert {type(value) for value in ours['config'].values()} <= {bool, int, float, str, type(None)}


def test_first_checkpoint_is_announced(run, altered):
    """Where it takes more than some minutes, here by a clock that runs fast, a line says when it comes."""
    hurried = altered("import time\nclock = time.perf_counter\ntime.perf_counter = lambda: 100_000 * clock()")
    out = run(hurried, *SMALL, '--max_iters=4', '--eval_interval=3').stdout
    assert re.search(
        r'^a checkpoint comes every 3 iterations, \d+[dhm]\d\d[hms] apart: --checkpoint_interval', out, re.M
    )
    assert 'a checkpoint comes' not in run('train.py', *SMALL, '--max_iters=4', '--eval_interval=3').stdout


@slow
def test_old_optimizer_layout(run, tmp_path):
    """nanoGPT of 2022 sorted its parameters by name: its moments belong to others, so no step uses them."""
    run('train.py', *SMALL)
    saved = load(tmp_path / 'out')
    decay, rest = saved['optimizer']['param_groups']
    rest['params'].insert(0, decay['params'].pop())
    torch.save(saved, tmp_path / 'out' / 'ckpt.pt')
    words = run('train.py', *SMALL, '--init_from=resume', status=1)
    assert 'out/ckpt.pt has the state of another --optimizer than adamw' in words


# -----------------------------------------------------------------------------
# the data


@pytest.fixture
def positions(house):
    """The data set 'positions', whose tokens are their own positions."""
    folder = house / 'data' / 'positions'
    folder.mkdir(exist_ok=True)
    characters = ''.join(map(chr, range(3000)))
    write_characters(folder, characters, characters)


def test_epoch_of_blocks(run, altered, positions):
    """sampler=epoch: each block once an epoch, in another order and at another offset each time."""
    script = altered(
        '',
        after="""
for i in range(3 * 60):
    X, Y = scope['get_batch']('train', *divmod(i, 3))
    assert (X[:, :1] + scope['torch'].arange(16) == X).all() and (X + 1 == Y).all()
    print('starts', *X[:, 0].tolist())
""",
    )
    how = ['--dataset=positions', '--sampler=epoch', '--gradient_accumulation_steps=3', '--eval_only=True']
    out = run(script, *SMALL, *how, '--batch_size=8').stdout
    starts = [int(start) for line in re.findall('^starts (.*)$', out, re.M) for start in line.split()]
    blocks = 3000 // 16 - 1
    epochs = [starts[i : i + blocks] for i in range(0, 7 * blocks, blocks)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(min(epoch), min(epoch) + blocks * 16, 16))
        assert epoch != sorted(epoch) and min(epoch) < 3000 - blocks * 16
    assert len({min(epoch) for epoch in epochs}) > 1
    assert len({tuple(np.argsort(epoch)) for epoch in epochs}) == 7


SPY = '''
import model
forward = model.GPT.forward

def spying(self, idx, targets=None, **how):
    if self.training:
        print('drew', *idx[:, 0].tolist())
    return forward(self, idx, targets, **how)

model.GPT.forward = spying
'''


def test_epoch_of_a_resumed_run(run, altered, positions):
    """Every block of the checkpoint's block_size, once an epoch: they were once counted by the command
    line's block_size, nanoGPT's 1024, where the checkpoint said 16.
    """
    spying, blocks = altered(SPY), 3000 // 16 - 1

    def draws(*arguments):
        out = run(spying, *arguments, *MACHINE, '--max_iters=25', '--eval_interval=100').stdout
        return [int(start) for line in re.findall('^drew (.*)$', out, re.M) for start in line.split()]

    whole = draws(*SMALL, '--dataset=positions', '--sampler=epoch', '--out_dir=a')
    assert len(whole) == 25 * 8 and len(set(whole[:blocks])) == blocks
    run('train.py', *SMALL, '--dataset=positions', '--max_iters=7', '--eval_interval=100')  # sampler=random
    resumed = draws('--init_from=resume', '--sampler=epoch', '--out_dir=out')
    assert resumed == whole[7 * 8 :]


@slow
def test_ids_without_text(run, house):
    """A meta.pkl with nothing but vocab_size is enough to train on, as in nanoGPT."""
    folder = house / 'data' / 'music'
    folder.mkdir(exist_ok=True)
    for name in ('train', 'val'):
        (np.arange(200) % 90).astype('<u2').tofile(folder / f'{name}.bin')
    (folder / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 90}))
    run('train.py', *SMALL, '--dataset=music')
    out = run('sample.py', *MACHINE, '--num_samples=1', '--max_new_tokens=3').stdout
    assert re.fullmatch(r'\n\d+ \d+ \d+\n---------------\n', out)


@slow
def test_big_ids(run, house, tmp_path):
    """Ids above 32,767 arrive as they are, although they travel as 16 bits with a sign."""
    folder = house / 'data' / 'big'
    folder.mkdir(exist_ok=True)
    for name in ('train', 'val'):
        np.full(64, 50000, dtype='<u2').tofile(folder / f'{name}.bin')
    steps, _ = losses(
        run(
            'train.py', *SMALL, '--dataset=big', '--max_iters=30', '--eval_interval=30', '--log_interval=30'
        ).stdout
    )
    assert steps[0][1] > 9 and steps[30][1] < 1
    p = load(tmp_path / 'out')
    logits = gpt_logits(p['model'], p['model_args'], torch.full((1, 4), 50000))
    assert logits.argmax(-1).unique().item() == 50000


@slow
def test_memory_does_not_grow_with_the_data(run, house):
    """A map of train.bin that stays open keeps in memory what was read through it: 80 MB here, all of it in
    the end.
    """
    folder = house / 'data' / 'sparse'
    folder.mkdir(exist_ok=True)
    with (folder / 'train.bin').open('wb') as f:
        f.truncate(2 * 10**9)
    (folder / 'val.bin').write_bytes(bytes(10_000))
    (folder / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 4}))
    how = ['--dataset=sparse', '--batch_size=256', '--block_size=128', '--n_embd=4', '--n_layer=1']
    out = run('train.py', *SMALL, *how, '--max_iters=12', '--eval_interval=1', real=True).stdout
    peaks = [float(peak) for peak in re.findall(r'^step .*, peak ([\d.]+) GB$', out, re.M)]
    assert len(peaks) == 13 and peaks[-1] - peaks[2] < 0.02


@slow
def test_dataset_without_a_name(run, house):
    """dataset = '' of users' config files is the folder data/ itself, as nanoGPT's path join makes it."""
    for path in (house / 'data' / 'tiny').iterdir():
        shutil.copy(path, house / 'data')
    steps, iters = losses(run('train.py', *SMALL, '--dataset=').stdout)
    assert list(steps) == [0, 5] and len(iters) == 5
    for path in (house / 'data' / 'tiny').iterdir():
        (house / 'data' / path.name).unlink()


WANDB = """
class Run:
    def log(self, values):
        print('logged', sorted(values))
def init(project, name, config):
    print('init', project, name, config['seed'])
    return Run()
"""


@slow
def test_wandb_that_does_not_start(run, start, tmp_path):
    """Without a login, in a pipe and in a terminal: one line, no question, and training goes on.
    config/train_gpt2.py once ended there.
    """
    env = {'WANDB_API_KEY': '', 'HOME': str(tmp_path), 'NETRC': str(tmp_path / 'none')}
    done = run('train.py', *SMALL, '--wandb_log=True', env=env, real=True)
    assert done.stdout.count('training goes on without wandb') == 1 and done.stderr == ''
    assert 'best val loss' in done.stdout
    ours, theirs = os.openpty()
    process = start(
        *SMALL, '--wandb_log=True', '--out_dir=tty', env=env, stdout=theirs, stderr=theirs, real=True
    )
    os.close(theirs)
    read = b''
    while b'sample from it' not in read:
        read += os.read(ours, 10000)
    assert process.wait(60) == 0
    assert len([line for line in read.splitlines() if b'wandb' in line]) == 1


@slow
def test_drop_in_for_wandb(run, tmp_path):
    """A library that is imported as wandb need not know what only wandb has: id, resume, define_metric."""
    (tmp_path / 'lib').mkdir()
    (tmp_path / 'lib' / 'wandb.py').write_text(WANDB)
    env = {'PYTHONPATH': str(tmp_path / 'lib')}
    out = run('train.py', *SMALL, '--wandb_log=True', env=env, real=True).stdout
    assert 'init owt gpt2 1337' in out and "logged ['grad_norm', 'iter', 'loss', 'lr'" in out
    assert 'wandb has stopped' in out  # it has no finish


# -----------------------------------------------------------------------------
# torch.compile, the benchmark, the profiler


@slow
def test_compile(run):
    """The compiled run has the eager one's curve."""
    small = [*SMALL, '--n_layer=1', '--dropout=0.0']
    eager, _ = losses(run('train.py', *small).stdout)
    out = run('train.py', *small, '--compile=True', '--out_dir=compiled').stdout
    assert re.search('^compiled', out.split('step 0')[0], re.M)
    assert losses(out)[0].keys() == eager.keys()
    for i, pair in losses(out)[0].items():
        assert pair == pytest.approx(eager[i], abs=2e-4)


@slow
@pytest.mark.parametrize(
    'optimizer, checkpointing, dtype', [('adamw', False, 'bfloat16'), ('muon', True, 'float16')]
)
def test_two_graphs(run, altered, optimizer, checkpointing, dtype):
    """Dynamo traces evaluation once and training once, both before the first iteration. A third graph, for
    other strides, a number that changes or a mode, would cost a minute of GPU time whenever it comes.
    """
    script = altered(TRACED)
    out = run(
        script,
        *SMALL,
        '--max_iters=7',
        '--eval_interval=3',
        '--eval_iters=None',
        '--n_layer=1',
        '--compile=True',
        f'--optimizer={optimizer}',
        f'--dtype={dtype}',
        '--checkpoint_interval=2',
        f'--activation_checkpointing={checkpointing}',
    ).stdout
    steps = [int(n) for n in re.findall(r'^(?:step|checkpoint) (\d+): train loss', out, re.M)]
    assert steps == [0, 3, 6, 7] and 'once through' in out
    assert 'a graph\na graph\ncompiled\n' in out and out.count('a graph') == 2


@slow
def test_compile_falls_back(run, altered, tmp_path):
    """No C++ compiler: one line, and the run goes on in eager mode with the same figures."""
    if DEVICE != 'cpu':
        pytest.skip("Triton needs no C++ compiler")
    broken = altered(
        "import torch._inductor.config as config\n"
        "config.cpp.cxx, config.force_disable_caches = ('/nonexistent/c++',), True"
    )
    eager = losses(run('train.py', *SMALL).stdout)
    out = run(broken, *SMALL, '--compile=True', '--out_dir=compiled').stdout
    assert len(re.findall('^torch.compile does not work here, running eager', out, re.M)) == 1
    assert losses(out) == eager and load(tmp_path / 'compiled')['config']['compile'] is False


@slow
def test_bench(run, tmp_path):
    """config/bench.py: no data, no files, and one JSON object at the end with the figures of the lines."""
    small = [
        'config/bench.py',
        *MACHINE,
        '--n_layer=1',
        '--n_head=2',
        '--n_embd=16',
        '--block_size=32',
        '--batch_size=2',
        '--gradient_accumulation_steps=2',
    ]
    out = run('train.py', *small, '--max_iters=8').stdout
    assert 'step ' not in out and not list(tmp_path.iterdir())
    result = json.loads(out.splitlines()[-1])
    ms = re.findall(r'^iter \d+: loss [\d.]+, time ([\d.]+)ms', out, re.M)
    times = sorted(map(float, ms[2:]))  # the first quarter warms up
    want = {'median': (times[2] + times[3]) / 2, 'min': times[0], 'max': times[-1]}
    assert len(times) == 6 and result['ms'] == pytest.approx(want, abs=0.01)
    assert result['tokens_per_second'] == pytest.approx(128 / result['ms']['median'] * 1000)
    assert result['mfu'] is None and 0.1 < result['peak_memory_gb'] < 10
    assert result['torch'] == torch.__version__ and result['processes'] == result['threads'] == 1
    settings = {'optimizer': 'adamw', 'batch_size': 2, 'dtype': 'float32', 'compile': False}
    assert result['settings'].items() >= settings.items()
    # the first iteration, which is cold, never counts
    out = run('train.py', *small, '--max_iters=3', '--log_interval=2').stdout
    warm = float(re.search(r'^iter 2: .* time ([\d.]+)ms', out, re.M)[1])
    assert json.loads(out.splitlines()[-1])['ms']['max'] == pytest.approx(warm, abs=0.01)
    # a peak that is known makes an mfu
    out = run(
        'train.py',
        *small,
        '--max_iters=2',
        '--peak_flops=1e9',
        '--optimizer=muon',
        '--activation_checkpointing=True',
    ).stdout
    result = json.loads(out.splitlines()[-1])
    flops = GPT(GPTConfig(32, 50304, 1, 2, 16, bias=False)).estimate_mfu(1, 32, 1)
    assert result['mfu'] == pytest.approx(result['tokens_per_second'] * flops / 1e9)
    assert 'dataset=None only times training' in run('train.py', *small, '--eval_only=True', status=1)


@slow
def test_profile(run, tmp_path):
    """The eighth iteration: its ten costliest operations, and a trace; the run itself is no other."""
    ten = [*SMALL, '--max_iters=10']
    plain = losses(run('train.py', *ten, '--out_dir=plain').stdout)
    done = run('train.py', *ten, '--profile=True')
    out = done.stdout
    assert losses(out) == plain and 'Warning' not in done.stderr
    assert out.index('iter 7:') < out.index('Self CPU') < out.index('iter 8:')
    table = out[out.index('Self CPU') : out.index('Self CPU time total')]
    assert 'aten::' in table and len(table.splitlines()) == 13  # ten, and three of the frame
    events = json.loads((tmp_path / 'out' / 'trace.json').read_text())['traceEvents']
    names = [event['name'] for event in events if 'name' in event]
    assert 'aten::mm' in names and names.count('ChunkedCrossEntropy') == 2  # one for each micro-step
    run('train.py', *ten, '--profile=True', '--max_iters=2', '--out_dir=short')
    assert (tmp_path / 'short' / 'trace.json').is_file()  # a shorter run: its last
