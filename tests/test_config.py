"""Every file of config/ against train.py's real keys; the keys and defaults of the contract with nanoGPT."""

import re
import sys

import pytest
from conftest import ROOT

DEFAULTS = {
    'train.py': dict(
        out_dir='out',
        eval_interval=2000,
        log_interval=1,
        eval_iters=200,
        eval_only=False,
        always_save_checkpoint=True,
        init_from='scratch',
        wandb_log=False,
        wandb_project='owt',
        wandb_run_name='gpt2',
        dataset='openwebtext',
        gradient_accumulation_steps=40,
        batch_size=12,
        block_size=1024,
        n_layer=12,
        n_head=12,
        n_embd=768,
        dropout=0.0,
        bias=False,
        learning_rate=6e-4,
        max_iters=600000,
        weight_decay=1e-1,
        beta1=0.9,
        beta2=0.95,
        grad_clip=1.0,
        decay_lr=True,
        warmup_iters=2000,
        lr_decay_iters=600000,
        min_lr=6e-5,
        backend=None,
        device=None,
        dtype=None,
        compile=None,
        seed=1337,
        sampler='random',
        optimizer='adamw',
        lr_schedule='cosine',
        activation_checkpointing=False,
        profile=False,
    ),
    'sample.py': dict(
        init_from='resume',
        out_dir='out',
        start='\n',
        num_samples=10,
        max_new_tokens=500,
        temperature=0.8,
        top_k=200,
        seed=1337,
        device=None,
        dtype=None,
        compile=False,
        top_p=None,
        stop=None,
        stream=False,
    ),
}
CHOICES = {
    'sampler': ['random', 'epoch'],
    'optimizer': ['adamw', 'muon'],
    'lr_schedule': ['cosine', 'linear', 'wsd'],
    'dtype': ['float32', 'bfloat16', 'float16', None],
}
CONFIG_FILES = sorted(path.name for path in (ROOT / 'config').glob('*.py'))


def configured(monkeypatch, script, *arguments):
    """The `config` that a script of the project gets from its arguments."""
    monkeypatch.setattr(sys, 'argv', [script, *arguments])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # the configurator has one
    source = (ROOT / script).read_text(encoding='utf-8')
    start = source.index("configurator.py').read_text(")
    scope = {'__file__': str(ROOT / script), '__name__': '__main__'}
    exec(compile(source[: source.index('\n', start)], script, 'exec'), scope)
    return scope['config']


@pytest.mark.parametrize('script', DEFAULTS)
def test_defaults(monkeypatch, script):
    config = configured(monkeypatch, script)
    for key, value in DEFAULTS[script].items():
        assert config[key] == value and type(config[key]) is type(value), key


@pytest.mark.parametrize('key', CHOICES)
def test_choices(monkeypatch, key):
    """train.py declares the words that a key takes, and the configurator holds it to them."""
    for word in CHOICES[key]:
        assert configured(monkeypatch, 'train.py', f'--{key}={word}')[key] == word
    takes = ' or '.join(map(str, CHOICES[key]))
    with pytest.raises(SystemExit, match=f"^--{key}=mun: {key} takes {takes}, not 'mun'$"):
        configured(monkeypatch, 'train.py', f'--{key}=mun')


@pytest.mark.parametrize('name', CONFIG_FILES)
def test_config_file(monkeypatch, capsys, name):
    """Real keys of the right type, a data set that has a prepare.py, a schedule that ends with the run."""
    config = configured(monkeypatch, 'train.py', f'config/{name}')
    assert 'ignored' not in capsys.readouterr().err  # every name is a key
    assert config['dataset'] is None or (ROOT / 'data' / config['dataset'] / 'prepare.py').is_file()
    ends = not config['decay_lr'] or config['lr_decay_iters'] <= config['max_iters']
    assert config['dataset'] is None or ends
    assert config['n_embd'] % config['n_head'] == 0


@pytest.mark.parametrize('name', CONFIG_FILES)
def test_config_file_for_sample(monkeypatch, capsys, name):
    """As in nanoGPT, sample.py takes a file that was written for train.py: it ignores train.py's keys."""
    text = (ROOT / 'config' / name).read_text(encoding='utf-8')
    assigned = {line.split(' = ')[0] for line in text.splitlines() if re.match(r'\w+ = ', line)}
    config = configured(monkeypatch, 'sample.py', f'config/{name}')
    start, names = capsys.readouterr().err.removesuffix('\n').split('ignored, no keys of sample.py: ')
    assert not start and set(names.split(', ')) == assigned - set(config)


def test_keys_of_the_other_script_are_no_typos(monkeypatch, tmp_path):
    path = tmp_path / 'all.py'
    for script, other in (('train.py', 'sample.py'), ('sample.py', 'train.py')):
        keys = set(configured(monkeypatch, other)) - set(configured(monkeypatch, script))
        path.write_text(''.join(f'{key} = None\n' for key in keys))
        assert configured(monkeypatch, script, str(path)) == configured(monkeypatch, script)


def test_help(run):
    """Every key with its default and what it means."""
    for script, defaults in DEFAULTS.items():
        out = run(script, '--help').stdout
        assert all(f'--{key}={value!r}' in out for key, value in defaults.items())
    assert 'python data/openwebtext/prepare.py' in run('data/openwebtext/prepare.py', '--help').stdout


NO_PACKAGES = """
import sys
for name in ('torch', 'numpy', 'tqdm', 'transformers', 'datasets', 'tokenizers', 'tiktoken', 'model', 'data'):
    sys.modules[name] = None  # importing it is an error
"""


@pytest.mark.parametrize(
    'script',
    [
        'train.py',
        'sample.py',
        'data/custom/prepare.py',
        *(
            pytest.param(f'data/{name}/prepare.py', marks=pytest.mark.slow)
            for name in ('openwebtext', 'wiki_zh', 'wikitext')
        ),
    ],
)
def test_answers_without_packages(run, altered, script):
    """--help and a typo are answered at once: the imports, which take seconds, come behind the keys."""
    bare = altered(NO_PACKAGES, script)
    assert 'keys and their defaults:\n  --' in run(bare, '--help').stdout
    assert "unknown key 'numworkers'" in run(bare, '--numworkers=3', status=1)


def test_requirements():
    """Every package is pinned. An older Python, which a pin would fail with a page of versions, meets a line
    whose name tells what is wrong.
    """
    from packaging.requirements import Requirement

    lines = (ROOT / 'requirements.txt').read_text(encoding='utf-8').splitlines()
    first, *others = [Requirement(line) for line in lines if line.strip() and line[0] != '#']
    assert first.name == 'Python-3.11-or-later-is-needed' and first.url == f'file:///{first.name}'
    for version, applies in (('3.9', True), ('3.10', True), ('3.11', False), ('3.14', False)):
        assert first.marker.evaluate({'python_version': version}) is applies
    assert not first.marker.evaluate()
    for requirement in others:
        pins = [specifier.operator for specifier in requirement.specifier]
        assert pins == ['=='] and '*' not in str(requirement.specifier), requirement
        assert requirement.marker is None and requirement.url is None
