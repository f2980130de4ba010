"""
The script of a step in test_walk.py: train.py, with the plan that the environment names.

It counts the instants before and after operations on files, and sends itself a signal at one of them. For
SIGTERM, forward passes count too. If the plan is to `ruin`, some batches leave weights that are too large, or
infinite: which ones depends on the batch alone, so that a resumed run meets them again.
"""

import builtins
import json
import os
import runpy
import signal
import sys

from torch.optim.optimizer import register_optimizer_step_post_hook

import model

plan = json.loads(os.environ['WALK'])
instants = 0
factor = 1  # of the weights, after the step that is being computed


def instant(what):
    """Sends the signal if this is its instant among those that the plan counts."""
    global instants
    if plan['among'] in what:
        instants += 1
        if instants == plan['at']:
            os.write(1, f'signal {plan["signal"]} {what}\n'.encode())
            os.kill(os.getpid(), plan['signal'])


def traced(name, operation):
    def call(*arguments, **how):
        what = ' '.join([name, *map(str, arguments)])
        instant(f'before {what}')
        result = operation(*arguments, **how)
        instant(f'after {what}')
        return result

    return call


def open_to_write(path, mode, *arguments, **how):
    f = real_open(path, mode, *arguments, **how)
    is_next = instants + 1 == plan['at'] and plan['among'] in f'after open {path} {mode}'
    if is_next and plan['signal'] == signal.SIGKILL and str(path).endswith('metrics.jsonl'):
        f.write('{"kind": "tra')  # the kill that comes now leaves half a line
        f.flush()
    return f


def traced_open(path, mode='r', *arguments, **how):
    return (traced_writing if set(mode) & set('wa') else real_open)(path, mode, *arguments, **how)


def no_link(path, name):
    raise OSError(95, 'no links here')


def forward(self, idx, *arguments, **how):
    global factor
    if self.training and plan['ruin']:
        factor = {0: 8, 1: float('inf')}.get(idx.sum().item() % 60, 1)
    if plan['signal'] == signal.SIGTERM:
        instant('in forward')
    return real_forward(self, idx, *arguments, **how)


def multiply_weights(optimizer, *arguments):
    if factor != 1:
        for group in optimizer.param_groups:
            for p in group['params']:
                p.data.mul_(factor)


real_open, traced_writing = open, traced('open', open_to_write)
builtins.open = traced_open
os.replace = traced('replace', os.replace)
os.unlink = traced('unlink', os.unlink)
os.link = traced('link', os.link) if plan['links'] else no_link
os.fsync = traced('fsync', lambda descriptor: None)  # a kill does not undo what is written
real_forward, model.GPT.forward = model.GPT.forward, forward
register_optimizer_step_post_hook(multiply_weights)
runpy.run_path(os.path.join(os.path.dirname(sys.argv[0]), plan['script']), run_name='__main__')
