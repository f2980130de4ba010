"""
A GPT written out a second time, as plain as it gets, on a dict of parameters under nanoGPT's names: what
model.py computes must agree with this. A writer of nanoGPT's checkpoint format, a reader of wandb's files.
"""

import json
import math

import torch


def gpt_logits(p, args, idx):
    """Logits (B, T, V) of parameters p under model_args `args`, in the dtype of p."""

    def linear(x, name):
        y = x @ p[f'{name}.weight'].T
        return y + p[f'{name}.bias'] if f'{name}.bias' in p else y

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * p[f'{name}.weight']
        return x + p[f'{name}.bias'] if f'{name}.bias' in p else x

    def gelu(x):
        if args.get('activation') == 'gelu_tanh':
            return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    T, C, heads = idx.size(1), args['n_embd'], args['n_head']
    x = p['transformer.wte.weight'][idx] + p['transformer.wpe.weight'][:T]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for layer in range(args['n_layer']):
        h = f'transformer.h.{layer}'
        q, k, v = linear(norm(x, f'{h}.ln_1'), f'{h}.attn.c_attn').split(C, dim=-1)
        outs = []
        for s in range(0, C, C // heads):
            e = s + C // heads
            scores = q[..., s:e] @ k[..., s:e].transpose(-1, -2) / math.sqrt(C // heads)
            outs.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[..., s:e])
        x = x + linear(torch.cat(outs, dim=-1), f'{h}.attn.c_proj')
        x = x + linear(gelu(linear(norm(x, f'{h}.ln_2'), f'{h}.mlp.c_fc')), f'{h}.mlp.c_proj')
    return norm(x, 'transformer.ln_f') @ p['transformer.wte.weight'].T


def gpt_loss(p, args, idx, targets):
    logits = gpt_logits(p, args, idx)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def random_parameters(args, seed=0):
    """Parameters of every name that model_args `args` calls for, wte only once."""
    g = torch.Generator().manual_seed(seed)
    C, shapes = args['n_embd'], {}

    def linear(name, rows, columns):
        shapes[f'{name}.weight'] = (rows, columns)
        if args['bias']:
            shapes[f'{name}.bias'] = (rows,)

    def norm(name):
        shapes[f'{name}.weight'] = (C,)
        if args['bias']:
            shapes[f'{name}.bias'] = (C,)

    shapes['transformer.wte.weight'] = (args['vocab_size'], C)
    shapes['transformer.wpe.weight'] = (args['block_size'], C)
    for layer in range(args['n_layer']):
        h = f'transformer.h.{layer}'
        norm(f'{h}.ln_1')
        linear(f'{h}.attn.c_attn', 3 * C, C)
        linear(f'{h}.attn.c_proj', C, C)
        norm(f'{h}.ln_2')
        linear(f'{h}.mlp.c_fc', 4 * C, C)
        linear(f'{h}.mlp.c_proj', C, 4 * C)
    norm('transformer.ln_f')
    return {
        name: torch.randn(shape, generator=g) * 0.2 + ('.ln_' in name and name.endswith('weight'))
        for name, shape in shapes.items()
    }


def adamw(p, weight_decay=0.1, lr=1e-3, betas=(0.9, 0.95)):
    """nanoGPT's optimizer: group 0 the matrices with decay, group 1 the vectors without."""
    matrices, vectors = ([q for q in p.values() if (q.dim() >= 2) is wanted] for wanted in (True, False))
    return torch.optim.AdamW(
        [{'params': matrices, 'weight_decay': weight_decay}, {'params': vectors, 'weight_decay': 0.0}],
        lr=lr,
        betas=betas,
    )


def write_nanogpt_checkpoint(path, p, optimizer, args, iter_num, dataset):
    """The six keys that nanoGPT's train.py saves, as compiled runs save them: names prefixed, best_val_loss
    a tensor.
    """
    state = {f'_orig_mod.{name}': q.detach() for name, q in p.items()}
    state['_orig_mod.lm_head.weight'] = state['_orig_mod.transformer.wte.weight']
    config = {'dataset': dataset, 'device': 'cuda', 'dtype': 'bfloat16'}
    torch.save(
        {
            'model': state,
            'optimizer': optimizer.state_dict(),
            'model_args': args,
            'iter_num': iter_num,
            'best_val_loss': torch.tensor(9.0),
            'config': config,
        },
        path,
    )


def wandb_records(folder):
    """[[record]] of offline runs, oldest first: protocol buffers in leveldb's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    runs = []
    paths = folder.glob('wandb/offline-run-*/*.wandb')
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns):
        data, at, record, records = path.read_bytes(), 7, b'', []
        while at + 7 <= len(data):
            room = 2**15 - at % 2**15
            if room < 7:  # a record's header never straddles two blocks
                at += room
                continue
            size, kind = int.from_bytes(data[at + 4 : at + 6], 'little'), data[at + 6]
            record += data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # whole, or the last piece
                records.append(Record.FromString(record))
                record = b''
        runs.append(records)
    return runs


def read_wandb_runs(folder):
    """[(run id, [history items])] of offline runs, oldest first."""
    runs = []
    for records in wandb_records(folder):
        name, history = None, []
        for record in records:
            name = record.run.run_id or name
            if record.WhichOneof('record_type') == 'history':
                history.append(
                    {
                        item.key or '.'.join(item.nested_key): json.loads(item.value_json)
                        for item in record.history.item
                    }
                )
        runs.append((name, history))
    return runs


def wandb_exit_codes(folder):
    """What offline runs have told wandb of their ends, one after the other."""
    records = [record for records in wandb_records(folder) for record in records]
    return [record.exit.exit_code for record in records if record.WhichOneof('record_type') == 'exit']


def points(history, key):
    """{iteration: value} of a key, which must not change where a resumed run says it again."""
    found = [(line['iter'], line[key]) for line in history if key in line]
    assert len(set(found)) == len(dict(found))
    return dict(found)
