"""Every file of config/ against train.py's real keys; the keys and defaults of the contract with nanoGPT."""

import os
import re
import sys
from importlib.metadata import version

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
SCRIPTS = [
    'train.py',
    'sample.py',
    *(f'data/{p.parent.name}/prepare.py' for p in ROOT.glob('data/*/prepare.py')),
]
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
    with pytest.raises(ValueError, match=f"^--{key}=mun: {key} takes {takes}, not 'mun'$"):
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


@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
def test_modules_in_config_files(monkeypatch, tmp_path, script):
    """nanoGPT's files may use os, time and math without importing them, and two users' files do."""
    path = tmp_path / 'mine.py'
    path.write_text("out_dir = os.path.join('out', str(math.ceil(0.5)))\nseed = int(time.time() > 0)\n")
    config = configured(monkeypatch, script, str(path))
    assert (config['out_dir'], config['seed']) == (os.path.join('out', '1'), 1)


@pytest.mark.parametrize('script', SCRIPTS)
def test_config_files_beside_the_script(monkeypatch, tmp_path, script):
    """Each script finds the project's config files, and their names, from any folder."""
    monkeypatch.chdir(tmp_path)
    configured(monkeypatch, script, 'config/bench.py')
    with pytest.raises(ValueError, match='^bench: no such config file, did you mean config/bench.py'):
        configured(monkeypatch, script, 'bench')


GROUPS = {
    'train.py': [
        ('the run and its files', 'out_dir'),
        ('Weights & Biases (wandb.ai)', 'wandb_log'),
        ('data and batches', 'dataset'),
        ('model', 'n_layer'),
        ('optimizer', 'optimizer'),
        ('learning rate schedule', 'decay_lr'),
        ('the machine (None: what is there)', 'backend'),
    ],
    'sample.py': [
        ('the model', 'init_from'),
        ('what it is asked', 'start'),
        ('what it writes', 'num_samples'),
        ('the machine (None: what is there)', 'device'),
    ],
}


@pytest.mark.parametrize('script', SCRIPTS)
def test_help(run, monkeypatch, script):
    """Every key once, with its default and words, in groups, and no line wider than 79 columns: a terminal of
    80 wrapped 21 of train.py's 52 lines, n_layer had no words, and a script without keys a heading for them.
    """
    out = run(script, '--help').stdout
    assert max(map(len, out.splitlines())) <= 79 and f'python {script}' in out
    keys = configured(monkeypatch, script)
    words = dict(re.findall(r'^  (--.*?)  +(\S.*)', out, re.MULTILINE))
    assert list(words) == [f'--{key}={value!r}' for key, value in keys.items()]
    assert out.count('\n  --') == len(keys) and ('keys and their defaults' in out) == bool(keys)
    headings = re.findall(r'\n\n(.*):\n  --(\w+)=', out.partition('keys and their defaults')[2])
    assert headings == GROUPS.get(script, [])


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
    assert 'keys and their defaults' in run(bare, '--help').stdout
    assert "unknown key 'numworkers'" in run(bare, '--numworkers=3', status=1)


def test_requirements():
    """Lines as pip and uv read them. Each package has a lower bound, so that what is installed already stays,
    and CI's last job pins it there. ruff is pinned, because its output depends on its version.
    """
    from packaging.requirements import Requirement

    text = (ROOT / 'requirements.txt').read_text(encoding='utf-8')
    ci = (ROOT / '.github' / 'workflows' / 'ci.yml').read_text(encoding='utf-8')
    pattern, replacement = re.search(r"sed -E 's/(.*)/(.*)/' requirements.txt", ci).groups()
    for line in text.splitlines():
        line = line.split('#')[0].strip()
        if not line:
            continue
        wanted, oldest = Requirement(line), Requirement(re.sub(pattern, replacement, line))
        assert wanted.specifier.contains(version(wanted.name)), line
        assert wanted.marker is None and wanted.url is None and not wanted.extras
        operators = {specifier.operator for specifier in wanted.specifier}
        assert operators in ([{'=='}] if wanted.name == 'ruff' else [{'>='}, {'>=', '<'}]), line
        (pin,) = oldest.specifier
        assert pin.operator == '==' and pin.version in [bound.version for bound in wanted.specifier]
