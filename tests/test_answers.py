"""Answers that count: data with masks, whose loss is the mean over the tokens that count; the template, which
goes with the model; and the chat_template of an export. Masks are written by hand here.
"""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import MACHINE, SMALL, TEXT
from reference import gpt_loss
from test_train import load
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.tokenizer import EOT, Tokenizer, char_tokenizer, encode_parts, template_parts, train_bpe
from model import GPT, GPTConfig, UserError, read_checkpoint

slow = pytest.mark.slow
TEMPLATE = 'Question: {question}\nAnswer: {answer}'
ONE_EACH = ['--dataset=answers', '--batch_size=1', '--gradient_accumulation_steps=4', '--eval_iters=8']


def write_masks(folder, train, val, template=TEMPLATE):
    for split, mask in (('train', train), ('val', val)):
        mask.astype(np.uint8).tofile(folder / f'{split}.mask')
    (folder / 'template.txt').write_bytes(template.encode())


def tokens(folder, split='train'):
    return np.fromfile(folder / f'{split}.bin', dtype='<u2').astype(np.int64)


@pytest.fixture
def answers(house):
    """The folder of a data set with masks: answers of various lengths; a third of train.bin has none."""
    folder = house / 'data' / 'answers'
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(house / 'data' / 'tiny', folder)
    random = np.random.default_rng(0)
    train, val = (np.zeros(len(tokens(folder, split)), bool) for split in ('train', 'val'))
    for mask, first in ((train, 1000), (val, 0)):
        for start in range(first, len(mask), 20):
            mask[start : start + random.integers(13)] = True
    write_masks(folder, train, val)
    return folder


def iteration_batch(folder, iteration, steps, batch_size, seed=1337, block_size=16):
    """All sequences of an iteration as one batch (x, y), and how many tokens of each micro-step count."""
    data, mask = tokens(folder), np.fromfile(folder / 'train.mask', dtype=np.uint8)
    x, y = [], []
    for micro_step in range(steps):
        rng = np.random.default_rng((seed, 0, iteration, micro_step))
        for start in rng.integers(len(data) - block_size, size=batch_size):
            targets = slice(start + 1, start + 1 + block_size)
            x.append(data[start : start + block_size])
            y.append(np.where(mask[targets] == 1, data[targets], -1))
    counts = (np.stack(y) >= 0).reshape(steps, -1).sum(1)
    return torch.from_numpy(np.stack(x)), torch.from_numpy(np.stack(y)), counts


def read_metrics(folder, kind='train'):
    """{iteration: line} of the lines of one kind."""
    lines = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
    return {line['iter']: line for line in lines if line['kind'] == kind}


def same_state(a, b):
    """Whether two checkpoints have the same weights and moments, to the last bit."""
    moments = zip(a['optimizer']['state'].values(), b['optimizer']['state'].values(), strict=True)
    return all(torch.equal(p, b['model'][name]) for name, p in a['model'].items()) and all(
        torch.equal(x[key], y[key]) for x, y in moments for key in x
    )


@slow
def test_the_loss_of_an_iteration(run, answers, tmp_path):
    """The gradient, its norm and the logged loss are those of one batch with all that the iteration counts,
    in float64: a mean over tokens, where a mean over micro-steps would weigh short answers more. One of the
    micro-steps counts nothing.
    """
    run('train.py', *SMALL, *ONE_EACH, '--max_iters=3', '--out_dir=first')
    for seed in range(1000):
        x, y, counts = iteration_batch(answers, 0, 4, 1, seed)
        if min(counts) == 0 and len(set(counts)) == 4:
            break
    else:
        raise AssertionError("no seed draws what this test needs")
    run(
        *(
            'train.py',
            *SMALL,
            *ONE_EACH,
            '--init_from=first',
            '--max_iters=1',
            '--beta1=0.5',
            '--grad_clip=0',
        ),
        f'--seed={seed}',
    )
    first = read_checkpoint(tmp_path / 'first' / 'ckpt.pt')
    p = {name: q.double().requires_grad_() for name, q in first['model'].items() if name != 'lm_head.weight'}
    loss = gpt_loss(p, first['model_args'], x, y)
    loss.backward()

    # After one step a first moment is half of the gradient. Matrices come before vectors.
    ordered = sorted(p.values(), key=lambda q: q.dim() < 2)
    state = load(tmp_path / 'out')['optimizer']['state']
    for i, q in enumerate(ordered):
        torch.testing.assert_close(2 * state[i]['exp_avg'].double(), q.grad, rtol=1e-4, atol=2e-7)
    line = read_metrics(tmp_path / 'out')[0]
    assert line['loss'] == pytest.approx(loss.item(), abs=2e-6)
    norm = torch.cat([q.grad.flatten() for q in p.values()]).norm().item()
    assert line['grad_norm'] == pytest.approx(norm, rel=1e-5)


def test_accumulation(run, answers, tmp_path):
    """Four micro-steps of one sequence are one of four: the epoch sampler gives both the same windows."""
    how = ['train.py', *SMALL, '--dataset=answers', '--sampler=epoch', '--max_iters=8']
    run(*how, '--batch_size=4', '--gradient_accumulation_steps=1', '--out_dir=a')
    run(*how, '--batch_size=1', '--gradient_accumulation_steps=4', '--out_dir=b')
    a, b = (read_metrics(tmp_path / name) for name in 'ab')
    for i in range(8):
        assert a[i]['loss'] == pytest.approx(b[i]['loss'], abs=1e-5)
        assert a[i]['grad_norm'] == pytest.approx(b[i]['grad_norm'], rel=1e-4)


@slow
@pytest.mark.parametrize('ranks', [2, 4])
def test_ranks(run, answers, tmp_path, ranks):
    """Losses, of training and of evaluation, do not depend on how many processes share the micro-steps."""
    how = ['train.py', *SMALL, *ONE_EACH, '--max_iters=8', '--eval_iters=7']
    run(*how, '--out_dir=one')
    run(*how, '--out_dir=more', ranks=ranks, timeout=600)
    for kind, names in (('train', ['loss', 'grad_norm']), ('eval', ['train/loss', 'val/loss'])):
        one, more = (read_metrics(tmp_path / name, kind) for name in ('one', 'more'))
        assert one.keys() == more.keys()
        for i in one:
            for name in names:
                assert one[i][name] == pytest.approx(more[i][name], abs=1e-5)


@pytest.mark.parametrize('optimizer, ranks', [('adamw', 0), pytest.param('muon', 2, marks=slow)])
def test_an_iteration_that_counts_nothing(run, answers, tmp_path, optimizer, ranks):
    """It changes no weight and no moment, not by weight decay either, and logs a loss and a norm of 0: a mean
    over nothing is nan, and one such step would ruin a model.
    """
    mask = np.zeros(len(tokens(answers)), bool)
    mask[1200:2200] = True
    write_masks(answers, mask, np.ones(len(tokens(answers, 'val')), bool))
    empty = [i for i in range(12) if not iteration_batch(answers, i, 2, 1)[2].any()]
    assert 0 not in empty and 2 < len(empty) < 9
    run(
        *('train.py', *SMALL, '--dataset=answers', '--batch_size=1', f'--optimizer={optimizer}'),
        *('--eval_interval=1', '--eval_iters=8', '--keep_checkpoints=100', '--max_iters=12'),
        ranks=ranks,
    )
    lines = read_metrics(tmp_path / 'out')
    states = {i: load(tmp_path / 'out', f'ckpt-{i}.pt') for i in range(1, 13)}
    for i in range(1, 12):
        assert same_state(states[i], states[i + 1]) == (i in empty)
        assert (lines[i]['loss'] == lines[i]['grad_norm'] == 0) == (i in empty)


@pytest.mark.parametrize('sampler', ['epoch', pytest.param('random', marks=slow)])
def test_resume_is_exact(run, answers, tmp_path, sampler):
    """6 iterations, and 3 followed by 3, with dropout: every weight and moment is equal. The template is in
    the checkpoint.
    """
    long = ['train.py', *SMALL, *ONE_EACH, '--dropout=0.2', '--eval_interval=3', f'--sampler={sampler}']
    run(*long, '--max_iters=6', '--out_dir=a')
    run(*long, '--max_iters=3', '--out_dir=b')
    out = run('train.py', '--init_from=resume', '--out_dir=b', *MACHINE, '--max_iters=6').stdout
    a, b = (load(tmp_path / name) for name in 'ab')
    assert same_state(a, b) and a['best_val_loss'] == b['best_val_loss'] and 'starts anew' not in out
    assert b['template'] == TEMPLATE


@slow
def test_float16(run, answers, tmp_path):
    """With a GradScaler: the loss follows float32's, and iterations that count nothing are no steps of it."""
    how = ['train.py', *SMALL, *ONE_EACH, '--learning_rate=4e-3', '--max_iters=8', '--eval_interval=8']
    run(*how, '--out_dir=a')
    run(*how, '--out_dir=b', '--dtype=float16')
    a, b = (read_metrics(tmp_path / name) for name in 'ab')
    for i in range(8):
        assert a[i]['loss'] == pytest.approx(b[i]['loss'], abs=0.03)
    steps = sum(line['loss'] > 0 for line in b.values())
    assert load(tmp_path / 'b')['scaler']['_growth_tracker'] == steps


def test_evaluation(run, answers, tmp_path):
    """The loss and the perplexity of val.bin, once through, are means over the targets that count, and the
    first line of a run says how many these are. Evaluated windows that count nothing are an error.
    """
    run('train.py', *SMALL, *ONE_EACH, '--max_iters=2')
    out = run(
        'train.py', '--init_from=resume', *MACHINE, '--eval_iters=None', '--max_iters=3', '--batch_size=3'
    ).stdout
    saved = load(tmp_path / 'out')
    model = GPT.from_checkpoint(saved).double()
    data, mask = tokens(answers, 'val'), np.fromfile(answers / 'val.mask', dtype=np.uint8)
    total = counted = 0
    for start in range(0, len(data) - 1, 16):
        x = torch.from_numpy(data[start : start + 16][: len(data) - 1 - start])[None]
        targets = slice(start + 1, start + 1 + x.size(1))
        y = torch.from_numpy(np.where(mask[targets] == 1, data[targets], -1))
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(
                model(x, y[None])[0][0], y, ignore_index=-1, reduction='sum'
            )
        total += losses.item()
        counted += (y >= 0).sum().item()
    assert read_metrics(tmp_path / 'out', 'eval')[3]['val/loss'] == pytest.approx(total / counted, abs=1e-5)
    assert f'perplexity {np.exp(total / counted):.2f} per token ({counted:,})' in out
    train_counted = np.fromfile(answers / 'train.mask', dtype=np.uint8)[1:].sum()
    assert f'of these, {train_counted:,} and {counted:,} count in the loss' in out

    few = np.zeros(len(data), bool)
    few[1] = True
    write_masks(answers, np.ones(len(tokens(answers)), bool), few)
    how = ['train.py', *SMALL, *ONE_EACH, '--eval_only=True']
    words = run(*how, '--eval_iters=1', status=1)
    assert words == "no token counts in 1 micro-batches of an evaluation: raise --eval_iters\n"
    assert 'val loss' in run(*how, '--eval_iters=None').stdout


def digest_of(folder, *more):
    """What a checkpoint of these data says of them: lengths, all of val.bin, 64 pages of train.bin …"""
    train, val = (np.fromfile(folder / f'{split}.bin', dtype='<u2') for split in ('train', 'val'))
    digest = hashlib.sha256(f'{len(train)} {len(val)}'.encode() + val.tobytes())
    for start in np.linspace(0, len(train), num=64, endpoint=False, dtype=np.int64):
        digest.update(train[start : start + 2048].tobytes())
    return digest.hexdigest()


def test_data_digest(run, house, answers, tmp_path):
    """The masks and the template belong to what identifies the data: where they change, the best loss is no
    measure any more. Without them nothing has changed, so older checkpoints still know their data.
    """
    run('train.py', *SMALL, '--max_iters=1', '--out_dir=plain')
    saved = load(tmp_path / 'plain')
    assert saved['data_digest'] == digest_of(house / 'data' / 'tiny') and saved['template'] is None
    run('train.py', *SMALL, *ONE_EACH, '--max_iters=1')
    digests = {saved['data_digest'], load(tmp_path / 'out')['data_digest']}
    names = ['val.mask', 'train.mask', 'template.txt']
    for n, name in enumerate(names, 2):
        content = bytearray((answers / name).read_bytes())
        content[0 if name == 'template.txt' else -1] ^= 1
        (answers / name).write_bytes(content)
        out = run('train.py', '--init_from=resume', *MACHINE, f'--max_iters={n}').stdout
        assert "the best val loss starts anew: other data than out/ckpt.pt's" in out
        digests.add(load(tmp_path / 'out')['data_digest'])
    assert len(digests) == 5


def test_wrong_masks(run, house, answers):
    """One line each: a mask that is missing or of another length, no template, a mask that counts nothing."""
    prepare = f"`python {house}/data/custom/prepare.py --input=TEXT --name=answers`"
    everything = {path.name: path.read_bytes() for path in answers.iterdir()}
    there = ', '.join(sorted(everything))
    mask = everything['train.mask']
    for name, content, words in (
        ('val.mask', None, f"there is no {answers}/val.mask, only "),
        ('train.mask', None, f"there is no {answers}/train.mask, only "),
        ('template.txt', None, f"there is no {answers}/template.txt, only "),
        ('train.mask', mask[:-1], f"{answers}/train.mask is for 2,999 tokens, but train.bin has 3,000: run "),
        ('train.mask', bytes(len(mask)), f"{answers}/train.mask counts no token: run "),
    ):
        for path, whole in everything.items():
            (answers / path).write_bytes(whole)
        (answers / name).unlink()
        if content is not None:
            (answers / name).write_bytes(content)
        error = run('train.py', *SMALL, '--dataset=answers', status=1)
        assert error.startswith(words) and prepare in error
        if content is None:
            assert there.replace(f'{name}, ', '').replace(f', {name}', '') in error


# -----------------------------------------------------------------------------
# the template and an export

CONVERSATIONS = [
    [('user', 'the fox'), ('assistant', 'jumps over the house')],
    [('system', ' a small dog \n'), ('user', 'the  dog '), ('assistant', '\nwalks.\n\nand'), ('user', 'and')],
    [('assistant', 'the cat'), ('user', 'runs'), ('assistant', ''), ('system', 'quick'), ('assistant', '.')],
    [('user', 'the end?')],
]


def messages_of(turns):
    return [{'role': role, 'content': content} for role, content in turns]


@pytest.fixture(scope='module')
def specs():
    """A tokenizer of each kind that has <|endoftext|>."""
    alphabet = sorted(set(TEXT + 'Assistant: User?'))
    return {
        'char': char_tokenizer([*alphabet, EOT]).spec,
        'bpe': train_bpe([TEXT], 300).spec,
        'gpt2': {'kind': 'gpt2'},
    }


@pytest.mark.parametrize('kind', ['char', 'bpe', pytest.param('gpt2', marks=slow)])
def test_chat_template(specs, bpe, tmp_path, kind):
    """What apply_chat_template makes of conversations, whole or up to the next answer, are the very ids that
    data were made of.
    """
    ours = Tokenizer(specs[kind], ordinary=True)
    net = GPT(GPTConfig(block_size=8, vocab_size=ours.vocab_size, n_layer=1, n_head=1, n_embd=4))
    net.tokenizer_source, net.template = specs[kind], '{messages}'
    net.save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for messages in map(messages_of, CONVERSATIONS):
        want, _ = encode_parts(ours, template_parts('{messages}', {'messages': messages}))
        assert theirs.apply_chat_template(messages, return_dict=False) == want.tolist()
        asked = [*messages, {'role': 'assistant', 'content': ''}]
        *prompt, _, _ = template_parts('{messages}', {'messages': asked})  # without ' ' and the end
        want, _ = encode_parts(ours, prompt)
        found = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert found == want.tolist()


def test_the_template_of_an_export(run, answers, tmp_path):
    """The template goes from the data into ckpt.pt, from there into an export and back, and a run on other
    data has theirs. The model card says in five lines what is known, and replaces nobody else's.
    """
    run('train.py', *SMALL, *ONE_EACH, '--max_iters=1')
    net = GPT.from_checkpoint(tmp_path / 'out')
    export = tmp_path / 'export'
    net.save_pretrained(export)
    assert net.template == GPT.from_pretrained(str(export)).template == TEMPLATE
    assert 'chat_template' not in (export / 'tokenizer_config.json').read_text()
    best = load(tmp_path / 'out')['best_val_loss'].item()
    card = (export / 'README.md').read_text()
    for words in (
        f'Data: answers. 1 iterations, best validation loss {best:.4f} nats a token.',
        f'In the loss answers in {TEMPLATE!r} count.',
        f'--init_from={export}`',
        'Context: 16 tokens. Beyond them `generate` ends in',
    ):
        assert words in card
    assert card.count('\n') == 5

    run('train.py', *SMALL, '--init_from=export', '--max_iters=1', '--out_dir=plain')
    plain = GPT.from_checkpoint(tmp_path / 'plain')
    assert plain.template is None
    plain.save_pretrained(export)
    card = (export / 'README.md').read_text()
    assert 'Data: tiny.' in card and 'In the loss every token counts.' in card
    (export / 'README.md').write_text('My own words.')
    plain.save_pretrained(export)
    assert (export / 'README.md').read_text() == 'My own words.'


def test_beyond_the_context(specs, tmp_path):
    """As the model card says: transformers' own error."""
    net = GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=1, n_embd=4))
    net.tokenizer_source = specs['bpe']
    net.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    how = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    assert theirs.generate(torch.tensor([[1, 2]]), max_new_tokens=6, **how).shape == (1, 8)
    with pytest.raises(IndexError):
        theirs.generate(torch.tensor([[1, 2]]), max_new_tokens=9, **how)


def test_unfaithful_tokenizer(tmp_path):
    """One that transformers would read otherwise is refused, before anything is written: here two characters
    are one id, whose text would be either.
    """
    net = GPT(GPTConfig(block_size=8, vocab_size=3, n_layer=1, n_head=1, n_embd=4))
    stoi = {'a': 0, 'b': 1, '\n': 2}
    itos = {i: character for character, i in stoi.items()}
    capitals = {'A': 0, 'B': 1}
    net.tokenizer_source = {'kind': 'char', 'vocab_size': 3, 'stoi': {**stoi, **capitals}, 'itos': itos}
    with pytest.raises(
        ValueError, match='this tokenizer cannot be written for transformers .*two texts have one id'
    ):
        net.save_pretrained(tmp_path / 'export')
    assert not (tmp_path / 'export').exists()


def test_home_folder(specs, tmp_path, monkeypatch):
    """~ is the user's home folder, from Python too; a folder called ~ was made once."""
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    net = GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=1, n_embd=4))
    net.tokenizer_source = specs['bpe']
    net.save_pretrained('~/export')
    assert [path.name for path in tmp_path.iterdir()] == ['export']
    assert GPT.from_pretrained('~/export').config == net.config


def test_dtype_of_sampling():
    """A text, which train.py's key takes, is told in one line: it would pack the weights in float16."""
    with pytest.raises(UserError, match="takes a dtype such as torch.float16, not 'float32'"):
        GPT(GPTConfig(8, 16, 1, 1, 4)).for_sampling('cpu', 'float32')
