"""sample.py as a subprocess: what it prints, and what decides it."""
import re
import subprocess
import sys

import pytest
import torch

from conftest import SMALL
from model import GPT, GPTConfig, Tokenizer, read_checkpoint
from reference import gpt_logits

END = '---------------\n'


@pytest.fixture(scope='module')
def trained(house, tmp_path_factory):
    """A folder with out/ckpt.pt of a run that has learnt the text a little."""
    folder = tmp_path_factory.mktemp('trained')
    subprocess.run([sys.executable, str(house / 'train.py'), *SMALL, '--max_iters=60', '--eval_interval=60'], cwd=folder, check=True, capture_output=True)
    return folder


def sample(run, trained, *arguments, **how):
    out = run('sample.py', '--device=cpu', *arguments, cwd=trained, **how).stdout
    assert out.endswith(END)
    return [text.removesuffix('\n') for text in out.split(END)[:-1]]


def test_greedy_text(run, trained):
    """temperature 0 is the plain argmax loop, told apart up to block_size."""
    checkpoint = read_checkpoint(trained / 'out' / 'ckpt.pt')
    tokenizer = Tokenizer(checkpoint['tokenizer'])
    ids = tokenizer.encode('the ')
    for _ in range(12):
        logits = gpt_logits(checkpoint['model'], checkpoint['model_args'], torch.tensor([ids]))
        ids.append(logits[0, -1].argmax().item())
    assert sample(run, trained, '--start=the ', '--temperature=0', '--max_new_tokens=12', '--num_samples=2') == [tokenizer.decode(ids)] * 2


def test_sample_i_is_its_own(run, trained):
    """The text of sample i depends on (seed, i): not on num_samples, not on streaming. stdout holds the text alone."""
    three = sample(run, trained, '--num_samples=3', '--max_new_tokens=40')
    assert len(set(three)) == 3 and all(len(text) == 41 for text in three)  # "\n" as typed in a default, then 40 characters
    assert sample(run, trained, '--num_samples=2', '--max_new_tokens=40') == three[:2]
    assert sample(run, trained, '--num_samples=3', '--max_new_tokens=40', '--stream=True') == three
    assert sample(run, trained, '--num_samples=3', '--max_new_tokens=40', '--seed=7') != three
    assert sample(run, trained, '--num_samples=1', '--max_new_tokens=40', '--top_k=1') == sample(
        run, trained, '--num_samples=1', '--max_new_tokens=40', '--temperature=0')
    assert sample(run, trained, '--num_samples=1', '--max_new_tokens=40', '--top_p=0.0001', '--top_k=None') == sample(
        run, trained, '--num_samples=1', '--max_new_tokens=40', '--temperature=0')


def test_memory_splits_the_batch(run, house, trained):
    """Where memory is short the samples come in several batches, and are the same."""
    source = (house / 'sample.py').read_text(encoding='utf-8')
    short = source.replace('memory // 2 //', '120_000 //')  # room for the caches of 4 samples
    assert short != source
    (house / 'short.py').write_text(short, encoding='utf-8')
    for how in (['--num_samples=9'], ['--num_samples=9', '--stream=True'], ['--num_samples=9', '--stop=the'], ['--num_samples=1']):
        texts = [run(script, '--device=cpu', '--max_new_tokens=30', *how, cwd=trained) for script in ('sample.py', 'short.py')]
        assert texts[0].stdout == texts[1].stdout and texts[0].stdout.count(END) == int(how[0].split('=')[1])
        assert f"prefill {3 if '9' in how[0] else 1} tokens in" in texts[1].stderr


def test_speeds(run, trained):
    """Prefill and decode apart, on stderr; the first new token comes out of prefill."""
    done = run('sample.py', '--device=cpu', '--num_samples=3', '--start=the ', '--max_new_tokens=11', cwd=trained)
    assert re.fullmatch(r'prefill 4 tokens in [\d.]+ s, \d+ tok/s; decode 30 tokens in [\d.]+ s, \d+ tok/s; cpu, float32\n', done.stderr)


def test_compile(run, trained):
    """Compiled with static shapes, the text stays."""
    how = ['--num_samples=2', '--max_new_tokens=40', '--start=the lazy dog ']
    assert sample(run, trained, *how, '--compile=True') == sample(run, trained, *how)


def test_stop(run, trained):
    """A sample ends before the stop text, streamed or not; one that never meets it goes on to its length."""
    plain = sample(run, trained, '--num_samples=4', '--max_new_tokens=60')
    want = [text[0] + text[1:].partition('the')[0] for text in plain]
    assert want != plain
    for how in ('False', 'True'):
        assert sample(run, trained, '--num_samples=4', '--max_new_tokens=60', '--stop=the', f'--stream={how}') == want
    assert sample(run, trained, '--num_samples=4', '--max_new_tokens=60', '--stop=<|endoftext|>', '--stream=True') == plain
    done = run('sample.py', '--device=cpu', '--num_samples=4', '--max_new_tokens=2000', '--stop=the', cwd=trained)  # and all stops when all have ended
    assert int(re.search(r'decode (\d+) tokens', done.stderr)[1]) < 4 * 1000


def test_prompts(run, trained, tmp_path):
    """Text, FILE:path, standard input, nothing (a newline for characters), and one longer than the window."""
    (tmp_path / 'prompt.txt').write_text('the lazy dog ')
    common = ['--num_samples=1', '--max_new_tokens=8', '--temperature=0']
    typed = sample(run, trained, '--start=the lazy dog ', *common)
    assert typed[0].startswith('the lazy dog ') and len(typed[0]) == 21
    assert sample(run, trained, f'--start=FILE:{tmp_path / "prompt.txt"}', *common) == typed
    assert sample(run, trained, '--start=-', *common, stdin='the lazy dog ') == typed
    assert sample(run, trained, '--start=', *common)[0] == sample(run, trained, *common)[0].removeprefix('\n')
    long = 'the quick fox jumps over the fence, and '
    assert sample(run, trained, f'--start={long}', *common)[0].startswith(long)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_dtypes(run, trained, dtype):
    assert 'the' in sample(run, trained, f'--dtype={dtype}', '--num_samples=1', '--max_new_tokens=100')[0]


def test_nanogpt_checkpoint(run, trained, house, tmp_path):
    """One without a tokenizer finds it in data/NAME/meta.pkl, and without that says what to do."""
    checkpoint = torch.load(trained / 'out' / 'ckpt.pt', weights_only=True)
    want = sample(run, trained, '--num_samples=1', '--max_new_tokens=40')
    del checkpoint['tokenizer'], checkpoint['scaler']
    (tmp_path / 'out').mkdir()
    torch.save(checkpoint, tmp_path / 'out' / 'ckpt.pt')
    assert sample(run, tmp_path, '--num_samples=1', '--max_new_tokens=40') == want
    checkpoint['config']['dataset'] = 'elsewhere'
    torch.save(checkpoint, tmp_path / 'out' / 'ckpt.pt')
    assert 'Put the meta.pkl or tokenizer.json of its data set into' in run('sample.py', status=1, cwd=tmp_path)


def test_whole_characters(run, tmp_path):
    """A character that spans several tokens appears whole in a stream, and broken bytes as without streaming."""
    import tokenizers
    bytes_only = tokenizers.ByteLevelBPETokenizer()
    bytes_only.train_from_iterator([], vocab_size=257, special_tokens=['<|endoftext|>'])
    torch.manual_seed(0)
    net = GPT(GPTConfig(block_size=64, vocab_size=320, n_layer=1, n_head=1, n_embd=8))
    (tmp_path / 'out').mkdir()
    torch.save({'model': net.state_dict(), 'model_args': vars(net.config), 'tokenizer': {'kind': 'bpe', 'json': bytes_only.to_str()}},
               tmp_path / 'out' / 'ckpt.pt')
    how = ['--start=日本🦊', '--num_samples=2', '--max_new_tokens=300', '--temperature=1', '--top_k=0']
    plain = sample(run, tmp_path, *how)
    assert any(127 < ord(c) != 0xfffd for text in plain for c in text[3:])  # characters of two bytes came up
    assert sample(run, tmp_path, *how, '--stream=True') == plain


def test_transformers_folder(run, tmp_path, bpe):
    """GPT-2's encoding for a folder without a tokenizer, greedy text as transformers' own, from <|endoftext|> where nothing is given."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=32, initializer_range=1.0)).eval()
    theirs.save_pretrained(tmp_path / 'gpt2')
    for start in ('Hello, world', ''):
        ids = torch.tensor([bpe.encode(start) or [50256]])
        want = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=50256)
        got = sample(run, tmp_path, f'--init_from={tmp_path / "gpt2"}', f'--start={start}', '--temperature=0', '--num_samples=1', '--max_new_tokens=12')
        assert got == [start + bpe.decode(want[0, ids.size(1):].tolist())]
