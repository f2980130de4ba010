"""
A random walk over all that may happen to a run and its folder. Each step starts train.py there: as a new run,
with resume, with auto or by the command that the last step has printed; on data prepared anew, with a shorter
context or other keys; with SIGTERM or SIGKILL at a chosen instant. Each step must leave what the rules below
allow, and states that are those of a run that never stopped.

`pytest tests/test_walk.py --walk=3000 --walk_seed=7` walks farther, on another way.
"""

import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import zipfile
from collections import namedtuple
from functools import lru_cache
from hashlib import sha256

import pytest
import torch
from conftest import MACHINE, ROOT, TEXT, end, launch

slow = pytest.mark.slow
posix = pytest.mark.skipif(os.name != 'posix', reason='signals and locks of POSIX systems')

# The network is tiny, so that a step takes a third of a second.
SIZES = '--dataset=walk --n_layer=1 --n_head=1 --n_embd=8 --batch_size=1 --gradient_accumulation_steps=2'
OTHERS = '--eval_iters=1 --warmup_iters=0 --lr_decay_iters=100 --dropout=0.1'
NEW_RUN = [*MACHINE, *SIZES.split(), *OTHERS.split()]
SPAN = 12  # iterations that a run takes at most with the same settings

# A plan of walked.py, which executes train.py.
PLAN = {'script': 'train.py', 'ruin': False, 'links': True, 'at': None, 'among': '', 'signal': 9}


def execute(house, cwd, arguments, **plan):
    """Runs train.py with a plan. Returns its status, what it printed, and its errors."""
    streams = [cwd / 'stdin', cwd / 'stdout', cwd / 'stderr']
    for path in streams:
        path.write_text('')
    process = launch(house / 'walked.py', arguments, cwd, {'WALK': json.dumps({**PLAN, **plan})}, streams)
    try:
        status = process.wait(60)
    finally:
        end(process)
    return status, streams[1].read_text(), streams[2].read_text()


# -----------------------------------------------------------------------------
# what stands in a folder

Saved = namedtuple('Saved', 'iter best state config data_digest')  # a checkpoint, its tensors as a hash


@lru_cache(maxsize=1000)
def read_saved(content):
    """The checkpoint in a file, which must be whole."""
    assert zipfile.is_zipfile(io.BytesIO(content)), "a checkpoint is damaged"
    assert zipfile.ZipFile(io.BytesIO(content)).testzip() is None
    saved = torch.load(io.BytesIO(content), 'cpu', weights_only=True)
    tensors = list(saved['model'].values())
    for moments in saved['optimizer']['state'].values():
        tensors += moments.values()
    state = sha256(b''.join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()
    best = saved['best_val_loss'].item()
    return Saved(saved['iter_num'], best, state, saved['config'], saved['data_digest'])


def read_metrics(content):
    """The lines of metrics.jsonl without what varies, and half a line at the end."""
    *lines, torn = content.split(b'\n')
    lines = [json.loads(line) for line in lines]
    for line in lines:
        for timing in ('ms', 'tokens_per_second', 'mfu'):
            line.pop(timing, None)
    return lines, torn


class Folder:
    """The files of out_dir by name, as hashes: those of the run, its checkpoints among them, and others."""

    def __init__(self, path):
        contents = {p.name: p.read_bytes() for p in path.glob('*') if p.suffix not in ('.part', '')}
        self.files = {name: sha256(content).hexdigest() for name, content in contents.items()}
        own = re.compile(r'(ckpt|last|ckpt-\d+)\.pt|metrics\.jsonl')
        self.run = {name: key for name, key in self.files.items() if own.fullmatch(name)}
        self.others = {name: key for name, key in self.files.items() if name not in self.run}
        self.saved = {name: read_saved(contents[name]) for name in self.run if name.endswith('.pt')}
        self.kept = {saved.iter for name, saved in self.saved.items() if '-' in name}
        assert all(f'ckpt-{n}.pt' in self.saved for n in self.kept)

        self.lines, self.torn = read_metrics(contents.get('metrics.jsonl', b''))

    def pair(self):
        """What ckpt.pt and last.pt hold, as (iteration, best loss), or None for a file that is not there."""
        found = (self.saved.get('ckpt.pt'), self.saved.get('last.pt'))
        return tuple(saved and saved[:2] for saved in found)

    def newest(self):
        """The name of the checkpoint that resume must take: that of ckpt-N.pt only where no other is left."""
        names = self.saved.keys() & {'ckpt.pt', 'last.pt'} or self.saved.keys()
        return max(sorted(names), key=lambda name: self.saved[name].iter, default=None)

    def has_aside(self, files):
        """Whether all these files are here under NAME.old, or all under NAME.old1, and so on."""
        suffixes = {name[name.rindex('.') :] for name in self.others}
        return any(
            all(self.others.get(name + suffix) == key for name, key in files.items()) for suffix in suffixes
        )


# -----------------------------------------------------------------------------
# what should stand there

Segment = namedtuple('Segment', 'start seed learning_rate block_size data')  # settings from an iteration on


class References:
    """Runs that never stop, by their histories: tuples of segments."""

    def __init__(self, house, folder, ruin):
        self.house, self.folder, self.ruin = house, folder, ruin
        self.known = {}  # by history: the folder, the lines of metrics.jsonl

    def run(self, history):
        if history not in self.known:
            out = self.folder / str(len(self.known)) / 'out'
            out.mkdir(parents=True)
            start, seed, learning_rate, block_size, data = history[-1]
            how = f'--seed={seed} --learning_rate={learning_rate} --block_size={block_size} '
            how += (
                f'--dataset=walk_{data} --max_iters={start + SPAN} --eval_interval=1 --keep_checkpoints=1000'
            )
            how = [*NEW_RUN, *how.split()]
            lines = []
            if history[1:]:
                before, lines = self.run(history[:-1])
                shutil.copy(before / f'ckpt-{start}.pt', out / 'last.pt')
                how.append('--init_from=resume')
            done = execute(self.house, out.parent, how, script='unguarded.py', ruin=self.ruin)
            assert done[0] == 0 or (self.ruin and 'not finite' in done[2]), done
            own_lines, _ = read_metrics((out / 'metrics.jsonl').read_bytes())
            self.known[history] = out, [line for line in lines if line['iter'] < start] + own_lines
        return self.known[history]

    def state(self, history, iteration):
        return read_saved((self.run(history)[0] / f'ckpt-{iteration}.pt').read_bytes()).state

    def lines(self, history, kind):
        return {line['iter']: line for line in self.run(history)[1] if line['kind'] == kind}


Point = namedtuple('Point', 'iter when ckpt last best exploded')


def course(ckpt, last, best, first, keys, losses):
    """The rules of ckpt.pt and last.pt: yields what they hold at each point of a run from `first` on."""
    exploded = False
    for n in range(first, max(first, keys['max_iters']) + 1):
        yield Point(n, 'before', ckpt, last, best, exploded)
        save_to = None
        if keys['checkpoint_interval'] and n % keys['checkpoint_interval'] == 0:
            save_to = 'last.pt'
        if n % keys['eval_interval'] == 0 or n >= keys['max_iters']:
            if n not in losses:  # not finite
                return
            train_loss, val_loss = losses[n]
            exploded = min(train_loss, val_loss) > best + 0.5
            improved = n > 0 and val_loss < best
            best = val_loss if improved else best
            save_to = 'ckpt.pt' if improved or keys['always_save_checkpoint'] else 'last.pt'

        in_ckpt, in_last = ckpt and ckpt[0] == n, last and last[0] == n
        if n == 0 or exploded or in_ckpt:
            save_to = None
        if save_to == 'ckpt.pt':
            ckpt = (n, best)
            yield Point(n, 'between', ckpt, last, best, exploded)
            last = None
        elif save_to and not in_last:
            last = (n, best)
        yield Point(n, 'after', ckpt, last, best, exploded)


def stopped_at(point):
    """What ckpt.pt and last.pt hold after a stop at this point: the newest state goes to last.pt."""
    held = [saved[0] for saved in (point.ckpt, point.last) if saved]
    if point.iter == 0 or point.exploded or point.iter in held:
        return point.ckpt, point.last
    return point.ckpt, (point.iter, point.best)


# -----------------------------------------------------------------------------
# the walk


class Walk:
    def __init__(self, house, folder, references, seed):
        self.house, self.folder, self.references = house, folder, references
        self.random = random.Random(seed)
        self.plan = {'ruin': references.ruin, 'links': self.random.random() < 0.7}
        self.out = folder / 'out'
        self.histories = {}  # by state: the history of the run that has come to it
        self.digests = {}  # by data set: its digest in checkpoints
        self.aside = {}  # the files of the run that was set aside last
        self.command = None  # that the last step has printed
        self.log = []
        self.use_data('a')

    def use_data(self, name):
        self.data = name
        folder = self.house / 'data'
        shutil.copytree(folder / f'walk_{name}', folder / 'walk', dirs_exist_ok=True)

    def step(self):
        """Starts train.py once, in one of many ways, and looks at what it has left."""
        chance, choice = self.random.random, self.random.choice
        if chance() < 0.08:
            self.use_data('b' if self.data == 'a' else 'a')
        if self.command and chance() < 0.7:
            self.follow(self.command)
            return
        before = Folder(self.out)
        if len(before.others) > 30 and before.saved:  # somebody tidies up
            for name in before.others:
                (self.out / name).unlink()
            before = Folder(self.out)

        init_from = choice(['scratch', 'scratch', 'resume', 'resume', 'auto', 'auto'])
        goes_on = before.saved and init_from != 'scratch'
        given = self.choose_keys(before.saved[before.newest()] if goes_on else None)
        how = [*(MACHINE if goes_on else NEW_RUN), f'--init_from={init_from}', f'--out_dir={self.out.name}']
        how += [f'--{key}={value}' for key, value in given.items()]
        plan = {}
        if chance() < 0.75:
            among = choice(['', '', '.pt', '.old', 'after', 'after unlink', 'last.pt', 'metrics.jsonl'])
            number = choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            plan = {'signal': int(number), 'among': among, 'at': int(2 ** self.random.uniform(0, 6))}
        self.execute(before, init_from, given, how, plan)

    def choose_keys(self, saved):
        """The keys of a new run, or some for one that goes on from `saved`."""
        chance, choice = self.random.random, self.random.choice
        given = {'always_save_checkpoint': chance() < 0.4, 'keep_checkpoints': choice([1, 3])}
        given.update(eval_interval=choice([1, 2, 3, 4]), checkpoint_interval=choice([0, 1, 2, 3]))
        first = 0
        if saved is None:
            given.update(seed=choice([1, 2]), learning_rate=0.01, block_size=8)
        else:
            first = saved.iter
            given = {key: value for key, value in given.items() if chance() < 0.5}
            if chance() < 0.04:
                given['block_size'] = choice([8, 6, 4])
            if chance() < 0.1 or first == self.history(saved, given)[-1].start + SPAN:
                rates = {0.01, 0.02, 0.005} - {saved.config['learning_rate']}
                given['learning_rate'] = choice(sorted(rates))
        end = self.history(saved, given)[-1].start + SPAN
        given['max_iters'] = min(first + self.random.randint(1, 5), end)
        return given

    def history(self, saved, given):
        """The history of a run with these keys that goes on from `saved`, or of a new one if that is None."""
        keys = {**(saved.config if saved else {}), **given}
        settings = (keys['seed'], keys['learning_rate'], keys['block_size'], self.data)
        if saved is None:
            return (Segment(0, *settings),)
        history = self.histories[saved.state]
        return history if history[-1][1:] == settings else (*history, Segment(saved.iter, *settings))

    def follow(self, command):
        """Executes a command as it was printed, but that its `python` is the one of the test."""
        *moves, last = command.split(' && ')
        python, script, *how = shlex.split(last)
        assert python == 'python' and script == str(self.house / 'train.py')
        subprocess.run(' && '.join(moves), shell=True, cwd=self.folder, check=True)
        keys = dict(word[2:].split('=', 1) for word in how)
        given = {'seed': int(keys['seed'])} if 'seed' in keys else {}
        here, self.out = self.out, self.folder / keys['out_dir']
        before = Folder(self.out)
        if 'mkdir' in command:
            assert self.aside.items() <= before.files.items(), "not all files of the old run are brought back"
        self.execute(before, 'resume', given, how, {})
        if self.out != here:
            shutil.rmtree(here)
            self.out = self.out.rename(here)
            self.command = None  # it names the folder

    def execute(self, before, init_from, given, how, plan):
        """Runs train.py and checks all that it prints and leaves."""
        words = [f'data {self.data}', *(word for word in how if word not in NEW_RUN)]
        status, text, errors = execute(self.house, self.folder, how, **self.plan, **plan)
        self.log.append(f'{" ".join(words)} -> {status} {"".join(re.findall("^signal .*", text, re.M))}')
        after = Folder(self.out)
        assert 'Traceback' not in text + errors, text + errors
        assert errors.count('\n') == (1 if status == 1 else 0), errors
        assert before.others.items() <= after.others.items(), "files that are not the run's have changed"
        commands = re.findall('`((?:mkdir|mv|python) [^`]*)`', text + errors)
        self.command = commands[-1] if commands else None

        start = before.saved[before.newest()] if before.saved and init_from != 'scratch' else None
        refusal = None
        if start and given.get('block_size', 0) > start.config['block_size']:
            refusal = 'leave --block_size off'
        elif start is None and init_from != 'scratch' and any('.pt.old' in name for name in before.others):
            refusal = 'bring back the run that was set aside by'
        elif start is None and init_from == 'resume':
            refusal = 'train first, or name the folder'
        if refusal or status == -signal.SIGTERM:  # before it could handle the signal
            assert after.files == before.files and status != 0
            assert status < 0 or refusal in errors, errors
            return

        if start and status >= 0:
            origin = f'{self.out.name}/{before.newest()}'
            assert f'resuming {origin} at iteration {start.iter}: ' in text, text
        if not start and before.run:
            is_aside = after.has_aside(before.run)
            assert is_aside or before.run.items() <= after.run.items(), "the old run is in pieces"
            if is_aside and before.saved:
                self.aside = before.run
            if after.run.get('metrics.jsonl') == before.run.get('metrics.jsonl'):  # it was killed earlier
                newest = after.newest()
                assert newest is None or after.saved[newest] == before.saved[before.newest()]
                return
        self.check(before, after, start, given, status, text, errors)

    def check(self, before, after, start, given, status, text, errors):
        """Checks the checkpoints and metrics of a run that has begun to write."""
        first = start.iter if start else 0
        keys = {**(start.config if start else {}), **given}
        history = self.history(start, given)
        best = start.best if start else math.inf
        other_data = start and start.data_digest != self.digests.get(self.data)
        if other_data or (start and keys['block_size'] < start.config['block_size']):
            best = math.inf
            old = {name: key for name, key in before.run.items() if name in before.saved}
            assert after.saved == before.saved or after.has_aside(old), "a checkpoint is overwritten"

        # What the process says about its end, and what it has written down, tells how far it came.
        trained = [line['iter'] for line in after.lines if line['kind'] == 'train']
        stop = re.search(r'^stopped before iteration (\d+): ', text, re.M)
        evaluations = self.references.lines(history, 'eval').items()
        losses = {n: (line['train/loss'], line['val/loss']) for n, line in evaluations}
        points = list(course(*(before.pair() if start else (None, None)), best, first, keys, losses))
        wrote = after.run.get('metrics.jsonl') != before.run.get('metrics.jsonl')
        if stop:
            points = [p for p in points if p.iter <= int(stop[1])]
            possible = [stopped_at(p) for p in points if p.iter == int(stop[1]) and p.when != 'between']
        elif status == 0:
            assert points[-1].when == 'after'
            possible = [points[-1][2:4]]
        else:
            assert status == -signal.SIGKILL or 'is not finite. ' in errors, text + errors
            passed = max(trained, default=-1) if wrote else -1
            possible = [p[2:4] for p in points if p.iter > passed or (p.iter == passed and p.when == 'after')]
        assert after.pair() in possible, (after.pair(), possible, text)

        for name, saved in after.saved.items():
            if after.run[name] != before.run.get(name):
                assert saved.state == self.references.state(history, saved.iter), name
                assert all(saved.config[key] == keys[key] for key in Segment._fields[1:4])
                assert self.digests.setdefault(self.data, saved.data_digest) == saved.data_digest
                self.histories.setdefault(saved.state, history)

        # keep_checkpoints=3 keeps the three newest ckpt.pt. A kill may cost the newest its second name.
        ckpt_iter = (after.pair()[0] or (0, 0))[0]
        ckpts = {p.ckpt[0] for p in points if p.ckpt not in (None, points[0].ckpt) and p.ckpt[0] <= ckpt_iter}
        kept = before.kept if start else set()
        expected = kept
        if ckpts and keys['keep_checkpoints'] > 1:
            expected = set(sorted(kept | ckpts)[-keys['keep_checkpoints'] :])
        at_least = expected if status == 0 else expected - {ckpt_iter}
        at_most = expected if status == 0 else kept | ckpts
        assert at_least <= after.kept <= at_most

        # metrics.jsonl has each iteration once and in order, with the figures of the run that never stopped.
        if not wrote:
            return
        earlier = [line for line in before.lines if line['iter'] < first]
        assert after.lines[: len(earlier)] == earlier and (not after.torn or status == -signal.SIGKILL)
        order = [(line['iter'], line['kind']) for line in after.lines if line['kind'] != 'run']
        assert order == sorted(set(order))
        for line in after.lines[len(earlier) :]:
            if line['kind'] == 'run':
                assert line['iter'] == first
            else:
                assert line == self.references.lines(history, line['kind'])[line['iter']]
        assert trained == list(range(len(trained))) and len(trained) >= first
        if status == 0:
            assert len(trained) == (int(stop[1]) if stop else max(first, keys['max_iters']))
        due = [p.iter for p in points if p.when == 'after' and p.iter <= len(trained)]
        due = [n for n in due if n % keys['eval_interval'] == 0 or n >= keys['max_iters']]
        evaluated = [n for n, kind in order if kind == 'eval' and n >= first]
        unfinished = bool(stop) or status != 0
        assert evaluated == due or (unfinished and evaluated == due[:-1])


@pytest.fixture(scope='module')
def walk_house(house, tmp_path_factory):
    """A copy of the project with the data sets a and b, and with a train.py that lets a loss explode."""
    from data.common import write_characters

    walk_house = tmp_path_factory.mktemp('walk') / 'house'
    shutil.copytree(house, walk_house, symlinks=True)  # a link to the house itself would have no end
    for name, text in (('a', TEXT), ('b', TEXT[::-1])):
        (walk_house / 'data' / f'walk_{name}').mkdir()
        write_characters(walk_house / 'data' / f'walk_{name}', text[:3000], text[3000:])
    shutil.copy(ROOT / 'tests' / 'walked.py', walk_house)
    shutil.copy(walk_house / 'train.py', walk_house / 'unguarded.py')
    replace(walk_house / 'unguarded.py', 'state.best_val_loss + 0.5', 'math.inf')
    return walk_house


def replace(path, text, other):
    """Replaces a text that must be there once."""
    code = path.read_text()
    assert code.count(text) == 1, f"{path} has {code.count(text)} times {text}"
    path.write_text(code.replace(text, other))


@pytest.fixture(scope='module')
def references(walk_house, tmp_path_factory):
    """Those of walks without ruin, and with."""
    return [References(walk_house, tmp_path_factory.mktemp('references'), ruin) for ruin in (False, True)]


def go(walk, steps):
    """Walks. An error tells the last steps."""
    for n in range(steps):
        try:
            walk.step()
        except AssertionError as error:
            raise AssertionError('\n'.join([f"step {n}", *walk.log[-12:]])) from error


@posix
@slow
@pytest.mark.parametrize('ruin', [False, True])
def test_walk(walk_house, references, tmp_path, request, ruin):
    """Nothing that happens to a run loses its best model or its newest state, changes a bit of it, or leaves
    its folder so that nobody can go on.
    """
    seed = request.config.getoption('--walk_seed')
    go(Walk(walk_house, tmp_path, references[ruin], seed), request.config.getoption('--walk'))


# Faults that the walk must find in a copy of train.py: what is written there, and what instead. It finds the
# first three within a few steps, and the others within some hundreds.
BROKEN = {
    'metrics.jsonl not cut': ("if json.loads(line)['iter'] < first_iter:", "if json.loads(line):"),
    'the old run set aside file by file': (
        "    old_names = keep_as_old([*kept_checkpoints(), ckpt_path, last_path, metrics_path])\n"
        "    for name in old_names:\n",
        "    old_names = {}\n"
        "    for name in filter(os.path.exists, [*kept_checkpoints(), ckpt_path, last_path, metrics_path]):\n"
        "        old_names.update(keep_as_old([name]))\n",
    ),
    'dropout that counts from the resume': ("('dropout', iteration,", "('dropout', iteration - first_iter,"),
    'a checkpoint written in place': (
        "with atomic_write(path) as f:\n        torch.save",
        "with open(path, 'wb') as f:\n        torch.save",
    ),
    'last.pt unlinked before ckpt.pt': ("for name in old_names:", "for name in reversed(old_names):"),
    'last.pt unlinked before a save': (
        "    with atomic_write(path) as f:\n        torch",
        "    Path(last_path).unlink(missing_ok=True)\n    with atomic_write(path) as f:\n        torch",
    ),
    'checkpoints of other data overwritten': ("    elif best_starts_anew:", "    elif False:"),
    'ckpt.pt resumed although last.pt is newer': ("max(iterations, key=iterations.get)", "min(iterations)"),
    'the best model overwritten': ("improved or always_save_checkpoint else", "True else"),
    'the best loss forgotten': ("torch.tensor(state.best_val_loss)", "torch.tensor(math.inf)"),
    'an exploded model saved': ("save_to and not exploded and", "save_to and"),
    'moments not resumed': ("        optim.load_state_dict(checkpoint['optimizer'])\n", ""),
    'the newest checkpoints not kept': ("()[keep_checkpoints:]", "()[:-keep_checkpoints]"),
    'a command for the wrong folder': ("f'--out_dir={folder}']", "f'--out_dir={out_dir}']"),
}


def pytest_generate_tests(metafunc):
    if 'fault' in metafunc.fixturenames:
        farther = metafunc.config.getoption('--walk') > 20
        metafunc.parametrize('fault', list(BROKEN)[: None if farther else 1])


@posix
@slow
def test_broken(walk_house, references, tmp_path, request, fault):
    """The walk finds this fault, and so can be believed where it finds none."""
    shutil.copytree(walk_house, tmp_path / 'house')
    replace(tmp_path / 'house' / 'train.py', *BROKEN[fault])
    seed = request.config.getoption('--walk_seed')
    walk = Walk(tmp_path / 'house', tmp_path, references[fault == 'an exploded model saved'], seed)
    with pytest.raises(AssertionError):
        go(walk, 500)
    print(f"{fault}: found in step {len(walk.log)}")
