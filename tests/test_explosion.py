"""A loss that explodes, the way back to the last good checkpoint, and the checkpoints that are kept."""

import json
import re
import shutil
import signal

import pytest
import torch
from conftest import MACHINE, SMALL, wait_for
from test_survival import assert_close, assert_same_state, load, metrics, names, posix

slow = pytest.mark.slow

# The batches of iterations 12 to 17 ruin the model: a step down on minus their loss is a step up on it.
# Behind a rewind the batches are others, which do no harm. Without `bad` this writes down the batches.
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
    """The exploded model is said, and goes to last.pt; ckpt.pt stays. Resuming starts from the good one."""
    out = run(ruin(), *RUN, '--max_iters=20').stdout
    assert re.search(
        r'^step 20: train loss [\d.]+, val loss [\d.]+; exploded, no new out/ckpt.pt$', out, re.M
    )
    good, bad = load(tmp_path / 'out'), load(tmp_path / 'out', 'last.pt')
    assert (good['iter_num'], bad['iter_num']) == (10, 20) and bad['exploded'] and not good['exploded']
    assert bad['best_val_loss'] == good['best_val_loss']
    out = run('train.py', '--init_from=auto', *MACHINE, '--max_iters=20').stdout
    assert 'resuming out/ckpt.pt at iteration 10' in out and 'exploded' not in out
    assert names(tmp_path / 'out') == {'ckpt.pt', 'metrics.jsonl'}
    run('train.py', *RUN, '--max_iters=20', '--out_dir=never')
    assert_same_state(load(tmp_path / 'out'), load(tmp_path / 'never'))


@pytest.mark.parametrize('save', ('--checkpoint_interval=18', 'stop'))
def test_explosion_between_evaluations(run, start, ruin, tmp_path, save):
    """A checkpoint between evaluations looks at the loss too, and so does the one after a SIGTERM."""
    if save == 'stop':
        process = start(*RUN, '--max_iters=100000', script=ruin())
        out = wait_for(process, 'iter 16:')
        process.send_signal(signal.SIGTERM)
        out += process.stdout.read()
        assert process.wait() == 0
    else:
        out = run(ruin(), *RUN, save, '--max_iters=19').stdout
    assert re.search(r'^checkpoint \d+: .*; exploded, no new out/ckpt.pt$', out, re.M), out
    assert load(tmp_path / 'out')['iter_num'] == 10 and load(tmp_path / 'out', 'last.pt')['exploded']


@posix
@slow
@pytest.mark.parametrize('how', (['--dropout=0.2'], ['--sampler=epoch']))
def test_rewind(run, start, ruin, tmp_path, how):
    """The run goes back by itself and on with other batches. Killed behind that and resumed it ends in the
    same state with the same lines of metrics.jsonl, and so does a run of two ranks, but for rounding.
    """
    script, how = ruin(*how), [*RUN, *how, '--rewind=True']
    out = run(script, *how).stdout
    assert out.count('exploded') == 2 and len(re.findall('^iter 13:', out, re.M)) == 2
    assert 'iteration 20: the loss has exploded, back to 10 and other batches (1 of 3 times)\n' in out
    end, lines = load(tmp_path / 'out'), metrics(tmp_path / 'out')
    assert end['iter_num'] == 40 and end['rewinds'] == 0  # there was a new best since
    assert [line['iter'] for line in lines if line['kind'] == 'train'] == list(range(40))
    run('train.py', *how, '--out_dir=never')
    never = metrics(tmp_path / 'never')
    assert lines[:12] == never[:12] and lines[12]['loss'] != never[12]['loss']
    assert lines[-1]['val/loss'] < lines[11]['val/loss']

    process = start(*how, '--out_dir=killed', script=script)
    out = wait_for(process, 'step 20:') + wait_for(process, 'iter 15:')
    process.kill()
    process.wait()
    assert load(tmp_path / 'killed')['iter_num'] == 10
    run(script, '--init_from=resume', '--out_dir=killed', *MACHINE)
    assert_same_state(load(tmp_path / 'killed'), end)
    assert metrics(tmp_path / 'killed') == lines
    run(script, *how, '--out_dir=two', ranks=2)
    assert_close(metrics(tmp_path / 'two'), lines)


def test_rewinds_that_do_not_help(run, altered, tmp_path):
    """After three of them the run ends in a line. The good checkpoint stays."""
    hopeless = altered('''
import model
forward, calls = model.GPT.forward, 0

def hopeless(self, *arguments, **how):
    global calls
    calls += self.training
    logits, loss = forward(self, *arguments, **how)
    return logits, loss if calls <= 20 or not self.training else -loss

model.GPT.forward = hopeless
''')
    words = run(hopeless, *RUN, '--rewind=True', status=1)
    assert words.startswith('iteration 20: the loss has exploded after 3 rewinds. Go on from the last ')
    assert load(tmp_path / 'out')['iter_num'] == 10
    lines = [line['iter'] for line in metrics(tmp_path / 'out')]
    assert lines == [0, *range(10), 10, *range(10, 20)]


def test_another_yardstick(run, house, tmp_path):
    """The best loss on other data, or of a longer context, makes no explosion of a resumed run's."""
    run('train.py', *RUN, '--max_iters=20')
    (house / 'data' / 'noise').mkdir(exist_ok=True)
    for name in ('train.bin', 'val.bin', 'meta.pkl'):
        content = (house / 'data' / 'tiny' / name).read_bytes()
        if name != 'meta.pkl':  # the same ids in another order
            content = b''.join(sorted(content[i : i + 2] for i in range(0, len(content), 2)))
        (house / 'data' / 'noise' / name).write_bytes(content)
    out = run('train.py', '--init_from=resume', *MACHINE, '--dataset=noise', '--max_iters=21').stdout
    best = re.search(r'^best val loss ([\d.]+)', out, re.M)[1]
    assert 'exploded' not in out and 'step 21: train loss' in out and f'val loss {best}' in out


def test_prepared_again(run, house, tmp_path):
    """The same for data of the same name, where the resumed run begins between evaluations."""
    shutil.copytree(house / 'data' / 'tiny', house / 'data' / 'again')
    run('train.py', *RUN, '--dataset=again', '--max_iters=33', '--eval_interval=30')
    for name in ('train.bin', 'val.bin'):
        path = house / 'data' / 'again' / name
        content = path.read_bytes()
        path.write_bytes(b''.join(sorted(content[i : i + 2] for i in range(0, len(content), 2))))
    out = run('train.py', '--init_from=resume', *MACHINE, '--max_iters=35').stdout
    assert 'checkpoint 33: train loss' in out and 'exploded' not in out
    assert load(tmp_path / 'out')['iter_num'] == 35


def test_good_newest_state_stays(run, ruin, tmp_path):
    """last.pt, where it is newer than ckpt.pt, is overwritten by no exploded model."""
    how = ['--always_save_checkpoint=False', '--eval_interval=11', '--checkpoint_interval=6']
    script = ruin()
    run(script, *RUN, *how, '--max_iters=13')
    good = load(tmp_path / 'out', 'last.pt')
    assert (load(tmp_path / 'out')['iter_num'], good['iter_num']) == (11, 13)
    out = run(script, '--init_from=auto', *MACHINE, '--max_iters=20').stdout
    assert 'resuming out/last.pt at iteration 13' in out and out.count('exploded') == 2
    assert_same_state(load(tmp_path / 'out', 'last.pt'), good)


def test_kept_checkpoints(run, tmp_path):
    """keep_checkpoints=3: ckpt.pt and the two before it, as they were; resume falls back to them. A new run
    keeps them all under other names.
    """
    how = [*SMALL, '--keep_checkpoints=3', '--eval_interval=2']
    run('train.py', *how, '--max_iters=8')
    assert names(tmp_path / 'out') == {'ckpt.pt', 'ckpt-6.pt', 'ckpt-4.pt', 'metrics.jsonl'}
    run('train.py', *SMALL, '--eval_interval=2', '--max_iters=4', '--out_dir=short')
    assert_same_state(load(tmp_path / 'out', 'ckpt-4.pt'), load(tmp_path / 'short'))
    for name in ('ckpt.pt', 'ckpt-6.pt'):
        path = tmp_path / 'out' / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    out = run('train.py', '--init_from=auto', *MACHINE, '--max_iters=10').stdout
    assert len(re.findall('^cannot read out/ckpt(?:-6)?.pt, damaged', out, re.M)) == 2
    assert 'resuming out/ckpt-4.pt at iteration 4' in out
    run('train.py', *how, '--max_iters=10', '--out_dir=never')
    assert_same_state(load(tmp_path / 'out'), load(tmp_path / 'never'))
    old = names(tmp_path / 'out')
    assert old == {'ckpt.pt', 'ckpt-8.pt', 'ckpt-6.pt', 'metrics.jsonl'}
    exploded = {**load(tmp_path / 'out'), 'iter_num': 11, 'exploded': True}
    torch.save(exploded, tmp_path / 'out' / 'last.pt')
    (tmp_path / 'out' / 'ckpt.pt').rename(tmp_path / 'ckpt.pt')  # leaves the exploded one and the kept
    out = run('train.py', '--init_from=auto', *MACHINE, '--max_iters=9').stdout
    assert 'resuming out/ckpt-8.pt at iteration 8' in out
    run('train.py', *how, '--max_iters=2')
    assert names(tmp_path / 'out') == {'ckpt.pt', 'metrics.jsonl'} | {f'{name}.old' for name in old}
