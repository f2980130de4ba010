"""A loss that explodes, and the checkpoints that are kept from it, from other data and from damage."""

import json
import re
import shlex
import shutil
import signal

import pytest
import torch
from conftest import MACHINE, SMALL, wait_for
from test_survival import assert_same_state, contents, load, metrics, names, posix

slow = pytest.mark.slow

# The batches of iterations 12 to 17 ruin the model: a step down on minus their loss is a step up on it.
# With another seed the batches are others, which do no harm. Without `bad` this writes down the batches.
RUIN = '''
import json, model
forward = model.GPT.forward
bad = {bad}

def ruined(self, idx, *arguments, **how):
    logits, loss = forward(self, idx, *arguments, **how)
    if self.training and bad is None:
        print('batch', idx[:, :4].tolist())
    return logits, -loss if self.training and bad and idx[:, :4].tolist() in bad else loss

model.GPT.forward = ruined
'''
RUN = [*SMALL, '--max_iters=40', '--eval_interval=10', '--eval_iters=4']


@pytest.fixture
def ruin(run, altered):
    def ruin(*how):
        out = run(altered(RUIN.format(bad=None)), *RUN, *how, '--max_iters=18', '--out_dir=batches').stdout
        batches = re.findall('^batch (.*)$', out, re.M)
        assert len(set(batches)) == len(batches) == 36
        return altered(RUIN.format(bad=[json.loads(batch) for batch in batches[24:]]))

    return ruin


def test_explosion(run, ruin, tmp_path):
    """The exploded model is in no file, and a line says so. The command that it prints goes on from the good
    one with other batches. Without it, resuming replays the same bits.
    """
    script = ruin()
    out = run(script, *RUN, '--max_iters=20').stdout
    assert re.search(r'^step 20: train loss [\d.]+, val loss [\d.]+, peak [\d.]+ GB$', out, re.M)
    words = (
        'iteration 20: the loss has exploded, and nothing is saved. Go on from out/ckpt.pt of iteration 10'
    )
    command = re.search(
        rf'^{re.escape(words)} with other batches by `python \S+ (.*)`, or with --l', out, re.M
    )[1]
    assert names(tmp_path / 'out') == {'ckpt.pt', 'metrics.jsonl'}
    assert load(tmp_path / 'out')['iter_num'] == 10
    shutil.copytree(tmp_path / 'out', tmp_path / 'again')
    out = run(script, '--init_from=auto', *MACHINE, '--max_iters=20', '--out_dir=again').stdout
    assert 'resuming again/ckpt.pt at iteration 10' in out and 'exploded' in out
    assert metrics(tmp_path / 'again') == metrics(tmp_path / 'out')
    out = run(script, *shlex.split(command), '--max_iters=20').stdout
    assert 'seed was 1337 in the checkpoint, is 1338 now' in out and 'exploded' not in out
    assert load(tmp_path / 'out')['iter_num'] == 20 and load(tmp_path / 'out')['config']['seed'] == 1338


@posix
def test_stop_while_exploded(run, start, ruin, tmp_path):
    """Nothing is saved, neither on SIGTERM nor between evaluations, and the last line says how to go on. An
    older last.pt would be resumed instead of ckpt.pt, so the command moves it.
    """
    how = [*RUN, '--eval_interval=5', '--checkpoint_interval=1', '--max_iters=100000', '--sampler=epoch']
    script = ruin('--sampler=epoch')
    run(script, *RUN, '--sampler=epoch', '--eval_interval=10', '--checkpoint_interval=3', '--max_iters=13')
    shutil.copytree(tmp_path / 'out', tmp_path / 'more')
    process = start(*how, '--out_dir=more', '--init_from=resume', '--eval_interval=17', script=script)
    out = wait_for(process, 'iteration 17: the loss has exploded') + wait_for(process, 'iter 17:')
    process.send_signal(signal.SIGTERM)
    out += process.stdout.read()
    assert process.wait() == 0
    last = out.splitlines()[-1]
    assert re.match(
        r'stopped before iteration \d+: the model has exploded and is not saved\. Go on from ', last
    )
    left = load(tmp_path / 'more', 'last.pt')['iter_num']
    assert f'`mv more/last.pt more/last-{left}.pt && ' in last and left < 17


@slow
def test_recovers(run, ruin, tmp_path):
    """Training goes on through an explosion, and saves again once an evaluation is sound."""
    out = run(ruin(), *RUN, '--max_iters=200', '--log_interval=100').stdout
    assert 'exploded' in out and load(tmp_path / 'out')['iter_num'] == 200


def test_old_checkpoints(run, tmp_path):
    """What an earlier version wrote resumes: an exploded last.pt is passed over, rewinds are told, keys that
    are gone do not matter, and a checkpoint without a digest of its data is of these.
    """
    run('train.py', *RUN, '--max_iters=12', '--eval_interval=4')
    old = load(tmp_path / 'out')
    best = old['best_val_loss'].item()
    del old['data_digest']
    old['config']['rewind'] = True
    old.update(best_val_loss=best, exploded=False, rewinds=1, metrics_bytes=100)
    torch.save(old, tmp_path / 'out' / 'ckpt.pt')
    torch.save({**old, 'iter_num': 13, 'exploded': True}, tmp_path / 'out' / 'last.pt')
    out = run('train.py', '--init_from=resume', *MACHINE, '--max_iters=13').stdout
    assert out.startswith('out/last.pt holds a model that has exploded, and is left out\n')
    assert 'resuming out/ckpt.pt at iteration 12' in out and 'rewind' in out and 'starts anew' not in out
    assert load(tmp_path / 'out')['iter_num'] == 13 and names(tmp_path / 'out') == {
        'ckpt.pt',
        'metrics.jsonl',
    }


def noise(source, target):
    """The same ids in another order."""
    target.mkdir(exist_ok=True)
    for name in ('train.bin', 'val.bin', 'meta.pkl'):
        content = (source / name).read_bytes()
        if name != 'meta.pkl':
            content = b''.join(sorted(content[i : i + 2] for i in range(0, len(content), 2)))
        (target / name).write_bytes(content)


@pytest.mark.parametrize('change', ['prepared again', pytest.param('cropped', marks=slow)])
def test_another_yardstick(run, house, tmp_path, change):
    """A run resumed on other data, here of the same name, or with a shorter context, is not compared with its
    old best loss, and its first save overwrites nothing of the old run: it once replaced a good ckpt.pt.
    """
    folder = house / 'data' / 'again'
    shutil.copytree(house / 'data' / 'tiny', folder, dirs_exist_ok=True)
    run('train.py', *RUN, '--dataset=again', '--max_iters=20', '--keep_checkpoints=2')
    old = contents(tmp_path / 'out')
    resume = ['--init_from=resume', *MACHINE]
    if change == 'cropped':
        resume.append('--block_size=8')
    else:
        noise(folder, folder)
    out = run('train.py', *resume, '--max_iters=22').stdout
    assert out.count('the best val loss starts anew: other data than') == 1
    best = re.search(r'^best val loss ([\d.]+)', out, re.M)[1]
    assert 'exploded' not in out and re.search(f'^step 22: .* val loss {best}, ', out, re.M)
    found = contents(tmp_path / 'out')
    del old['metrics.jsonl']
    assert {name: found[f'{name}.old'] for name in old} == old and len(old) == 3
    assert [line['iter'] for line in metrics(tmp_path / 'out') if line['kind'] == 'train'] == list(range(22))
    out = run('train.py', '--init_from=resume', *MACHINE, '--max_iters=24').stdout
    assert 'starts anew' not in out and len(contents(tmp_path / 'out')) == len(found)


def test_kept_checkpoints(run, tmp_path):
    """keep_checkpoints=3: the three newest ckpt.pt under the names of their iterations; resume falls back to
    them. A new run keeps them all under other names.
    """
    how = [*SMALL, '--keep_checkpoints=3', '--eval_interval=2']
    run('train.py', *how, '--max_iters=8')
    kept = {'ckpt.pt', 'ckpt-8.pt', 'ckpt-6.pt', 'ckpt-4.pt', 'metrics.jsonl'}
    assert names(tmp_path / 'out') == kept
    run('train.py', *SMALL, '--eval_interval=2', '--max_iters=4', '--out_dir=short')
    assert_same_state(load(tmp_path / 'out', 'ckpt-4.pt'), load(tmp_path / 'short'))
    for name in ('ckpt.pt', 'ckpt-8.pt', 'ckpt-6.pt'):
        path = tmp_path / 'out' / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink()  # ckpt.pt and ckpt-8.pt are one file with two names
        path.write_bytes(content)
    out = run('train.py', '--init_from=auto', *MACHINE, '--max_iters=10').stdout
    assert len(re.findall('^cannot read out/ckpt(?:-[68])?.pt, damaged', out, re.M)) == 3
    assert 'resuming out/ckpt-4.pt at iteration 4' in out
    run('train.py', *how, '--max_iters=10', '--out_dir=never')
    assert_same_state(load(tmp_path / 'out'), load(tmp_path / 'never'))
    old = names(tmp_path / 'out')
    assert old == {'ckpt.pt', 'ckpt-10.pt', 'ckpt-8.pt', 'ckpt-6.pt', 'metrics.jsonl'}
    run('train.py', *how, '--max_iters=2')
    assert names(tmp_path / 'out') == {'ckpt.pt', 'ckpt-2.pt', 'metrics.jsonl'} | {
        f'{name}.old' for name in old
    }
