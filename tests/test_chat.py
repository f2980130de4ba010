"""sample.py --chat and --each_line: lines in, answers out."""

import io
import os
import re
import runpy
import select
import signal
import sys
import time

import pytest
import torch
from conftest import MACHINE, end, launch
from reference import gpt_logits

import model
from data.tokenizer import EOT, Tokenizer, char_tokenizer, encode_parts, template_parts, train_bpe
from model import GPT, GPTConfig

CHAT = '--chat=True'
GREEDY = '--temperature=0'
FIELDS = 'Q: {question}\nA: {answer}'
ALPHABET = ['\n', *' :abcdefghijklmnopqrstuvwxyzAQU日']


def write_model(folder, spec, template, block_size=64, scale=6.0):
    """Writes out/ckpt.pt, a random network whose likeliest tokens vary."""
    tokenizer = Tokenizer(spec)
    torch.manual_seed(1)
    net = GPT(GPTConfig(block_size, tokenizer.vocab_size, 2, 2, 16))
    weights = {name: p * scale if p.dim() > 1 else p for name, p in net.state_dict().items()}
    (folder / 'out').mkdir(exist_ok=True)
    checkpoint = {
        'model': weights,
        'model_args': vars(net.config),
        'iter_num': 1,
        'config': {},
        'tokenizer': spec,
        'template': template,
    }
    torch.save({key: value for key, value in checkpoint.items() if value is not None}, folder / 'out/ckpt.pt')
    return weights, vars(net.config), tokenizer


@pytest.fixture
def talk(house, tmp_path, monkeypatch, capsys):
    """talk('--key=value', …, stdin='a line\\n') runs sample.py in this process. Returns its stdout;
    its stderr is talk.err. What the network has read, as (ids, first position), is in talk.reads.
    """
    decode = GPT.decode
    talk_reads = []

    def recording_decode(net, tokens, pos, cache):
        talk_reads.append((tokens[0].tolist(), pos[0].item()))
        return decode(net, tokens, pos, cache)

    def talk(*arguments, stdin=''):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # the configurator has one
        monkeypatch.setattr(sys, 'argv', ['sample.py', *MACHINE, *arguments])
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding='utf-8'))
        monkeypatch.setattr(GPT, 'decode', recording_decode)
        talk_reads.clear()
        talk.reads = talk_reads
        runpy.run_path(str(house / 'sample.py'), run_name='__main__')
        out, talk.err = capsys.readouterr()
        return out

    return talk


def contexts(reads):
    """What stood in the cache after each read, checked to be read behind what was there before."""
    context = []
    for ids, first in reads:
        assert first <= len(context) or first == 0
        context = context[:first] + ids
        yield context


def reference_conversation(weights, args, tokenizer, lines, max_new_tokens):
    """The greedy answers of a conversation, and the ids before each of their tokens: without a cache, all
    that is left is read anew for each token. Half of the window is freed when it is full.
    """
    ordinary = Tokenizer(tokenizer.spec, ordinary=True)
    window = args['block_size']
    turns = []
    answers = []
    contexts = []
    for n, line in enumerate(lines):
        if n > 0 and turns[-1][-1] != tokenizer.eot:
            turns[-1].append(tokenizer.eot)
        newline = '\n' if n > 0 else ''
        turns.append(ordinary.encode(f'{newline}User: {line}\nAssistant:').tolist())
        answer = []
        while len(answer) < max_new_tokens and tokenizer.eot not in answer:
            if len(sum(turns, [])) > window:
                while len(sum(turns, [])) > window // 2 and len(turns) > 1:
                    turns.pop(0)
                if len(sum(turns, [])) > window:
                    turns = [turns[0][-(window // 2) :]]
            context = sum(turns, [])
            contexts.append(context)
            token = gpt_logits(weights, args, torch.tensor([context]))[0, -1].argmax().item()
            answer.append(token)
            turns[-1].append(token)
        answers.append(tokenizer.decode([i for i in answer if i != tokenizer.eot]).strip())
    return answers, contexts


@pytest.mark.parametrize('turns, max_new_tokens', [(10, 7), (10, 20), (3, 90)])
def test_conversation(talk, tmp_path, turns, max_new_tokens):
    """Greedy answers are those of a network that reads all that is left of the conversation for each token,
    also when the window of 64 tokens is full, within a turn and between turns. A turn is read once.
    """
    spec = char_tokenizer([*ALPHABET, EOT]).spec
    *net, tokenizer = write_model(tmp_path, spec, '{messages}')
    lines = ['ab', 'so', 'what is it', 'x', 'a question that is much longer', '日日', 'no', 'go on', 'a', 'e']
    lines = lines[:turns]
    want, want_contexts = reference_conversation(*net, tokenizer, lines, max_new_tokens)
    how = [CHAT, GREEDY, f'--max_new_tokens={max_new_tokens}']
    out = talk(*how, stdin='\n'.join(lines) + '\n')
    assert out == ''.join(f'{answer}\n' for answer in want)
    assert list(contexts(talk.reads)) == want_contexts

    # What the cache holds is not read again, but where the beginning of the conversation had to go.
    times = 0
    for before, context, (_, first) in zip(want_contexts, want_contexts[1:], talk.reads[1:], strict=False):
        if context[: len(before)] == before:
            assert first == len(before)
        else:
            times += 1
    assert times > 1


@pytest.mark.parametrize('kind', ['char', 'bpe'])
def test_ids_of_a_conversation(talk, tmp_path, monkeypatch, kind):
    """What is read is what training reads of the same conversation, whether an answer ended by itself or was
    cut short. A role's name and an end token that somebody types are ordinary text.
    """
    lines = ['hello there', f'User: {EOT}', '  what now? ', 'Assistant: x', 'bye']
    answers = ['fine', 'yes', 'a b', 'a longer answer than the others', '']
    if kind == 'char':
        spec = char_tokenizer([*sorted(set('\n :UserAssistant' + ''.join(lines + answers))), EOT]).spec
    else:
        spec = train_bpe([' '.join(lines + answers) * 3], 300).spec
    *_, tokenizer = write_model(tmp_path, spec, '{messages}', block_size=256)
    ordinary = Tokenizer(spec, ordinary=True)

    # These answers stand for the network's choices. The longest is cut short by max_new_tokens.
    encoded = [[*ordinary.encode(f' {answer}'), tokenizer.eot] for answer in answers]
    max_new_tokens = len(encoded[3]) - 1
    chosen = (token for ids in encoded for token in ids[:max_new_tokens])
    monkeypatch.setattr(model, 'sample_next_token', lambda *_: torch.tensor([[int(next(chosen))]]))
    out = talk(CHAT, f'--max_new_tokens={max_new_tokens}', stdin='\n'.join(lines))
    assert out.splitlines() == answers

    messages = []
    for line, answer in zip(lines, answers, strict=True):
        messages += [{'role': 'user', 'content': line}, {'role': 'assistant', 'content': answer}]
    ids, _ = encode_parts(ordinary, template_parts('{messages}', {'messages': messages}))
    *_, read = contexts(talk.reads)
    assert [*read, tokenizer.eot] == ids.tolist() and read.count(tokenizer.eot) == 4
    assert tokenizer.decode(read).count(EOT) == 5


def test_documents(talk, tmp_path):
    """With a template of fields each line is a document of its own: the answers to one question are the
    samples of its prompt. --each_line gives the same ones in a line each, be it an empty one.
    """
    spec = char_tokenizer([*ALPHABET, EOT]).spec
    write_model(tmp_path, spec, FIELDS)
    how = ['--max_new_tokens=40', '--num_samples=3', '--seed=3']
    *samples, rest = talk('--start=Q: what\\nA:', *how).split('\n---------------\n')
    want = [text.removeprefix('Q: what\nA:').strip() for text in samples]
    assert rest == '' and len(set(want)) == 3 and '\n' in ''.join(want)
    assert any(len(text) < 38 for text in want)  # the end token came
    assert talk(CHAT, *how, stdin='what\n  what\nwhat') == '\n'.join([*want, ''])

    lines = [text.replace('\n', '\\n') for text in want]
    for start, stdin in ((r'what\nwhat\nwhat', ''), ('-', 'what\nwhat\nwhat\n')):
        assert talk('--each_line=True', f'--start={start}', *how, stdin=stdin).splitlines() == lines
    (tmp_path / 'questions.txt').write_text('what\n\nwhat\n')
    out = talk('--each_line=True', '--start=FILE:questions.txt', *how).splitlines()
    assert out == [lines[0], '', lines[2]]

    # A template of one's own asks in the same words. A text may end the answer too.
    out = talk(CHAT, r'--template=Q: {a}\nA: {b}', *how, f'--stop={want[0][5]}', stdin='what')
    assert out == want[0].partition(want[0][5])[0].strip() + '\n'


def test_unknown_character(talk, tmp_path):
    """A character that the model does not know is one line, and the conversation goes on without it."""
    spec = char_tokenizer([*ALPHABET, EOT]).spec
    write_model(tmp_path, spec, '{messages}')
    how = [CHAT, GREEDY, '--max_new_tokens=5']
    first, empty, second = talk(*how, stdin='ab\nÄ\ncd\n').splitlines()
    assert empty == '' and talk.err.count("the model does not know the character 'Ä'") == 1
    assert talk(*how, stdin='ab\ncd\n').splitlines() == [first, second]


@pytest.mark.parametrize(
    'template, how, words',
    [
        (None, [CHAT], 'this model was not trained on answers: say how it should be asked, as --template='),
        (None, ['--each_line=True', '--start=a'], 'this model was not trained on answers'),
        ('{a} {b} {c}', [CHAT], "the template '{a} {b} {c}' has 2 fields for a line to fill"),
        (FIELDS, [CHAT, '--template=Q'], "the template 'Q' does not name its fields in braces"),
        (FIELDS, ['--each_line=True'], '--each_line=True answers the lines of --start=FILE:path, or of'),
    ],
)
def test_mistakes(talk, tmp_path, template, how, words):
    """What cannot be asked is said before the first line is read, with the key that helps."""
    write_model(tmp_path, char_tokenizer([*ALPHABET, EOT]).spec, template)
    with pytest.raises((SystemExit, ValueError), match=re.escape(words)) as error:
        talk(*how, stdin='a\n')
    assert '\n' not in str(error.value) and talk.reads == []


# -----------------------------------------------------------------------------
# A person at a terminal


class Terminal:
    """A pseudo-terminal at which sample.py runs."""

    def __init__(self, script, cwd, *arguments, **how):
        import pty

        self.fd, theirs = pty.openpty()
        env = {'TERM': 'dumb', 'INPUTRC': os.devnull}
        self.process = launch(script, [*MACHINE, *arguments], cwd, env, [theirs] * 3, **how)
        os.close(theirs)
        self.screen = ''

    def type(self, text):
        os.write(self.fd, text.encode())

    def read(self):
        """Waits until something more is on the screen."""
        assert select.select([self.fd], [], [], 60)[0], self.screen
        self.screen += os.read(self.fd, 4096).decode().replace('\r\n', '\n')

    def expect(self, text):
        """Waits until a text is on the screen, and drops all up to its end."""
        while text not in self.screen:
            self.read()
        self.screen = self.screen.partition(text)[2]


@pytest.fixture
def terminal(house, tmp_path):
    """terminal('--key=value', …) starts sample.py at a Terminal. For real see launch."""
    started = []

    def terminal(*arguments, **how):
        started.append(Terminal(house / 'sample.py', tmp_path, *arguments, **how))
        return started[-1]

    yield terminal
    for one in started:
        end(one.process)
        os.close(one.fd)


@pytest.mark.slow
@pytest.mark.skipif(os.name != 'posix', reason='pseudo-terminals are POSIX')
def test_terminal(terminal, tmp_path):
    """The first line says how to leave. Ctrl-C ends an answer or a line that is half typed, and the chat goes
    on. Ctrl-D leaves.
    """
    write_model(tmp_path, char_tokenizer(ALPHABET).spec, FIELDS)  # no end token: its answers are endless
    person = terminal(CHAT, '--max_new_tokens=1000000', real=True)
    person.expect('Ctrl-C ends an answer, Ctrl-D the chat\n')
    for line in ('what\n', '\n', 'and now\n'):
        person.expect('> ')
        person.type(line)
        person.expect(line)
        if line != '\n':
            while len(person.screen) < 30:
                person.read()
            person.process.send_signal(signal.SIGINT)
    person.expect('\n> ')
    person.type('half')
    person.expect('half')
    time.sleep(0.3)  # a person's fingers: Python misses a signal in the instant before it waits for a key
    person.process.send_signal(signal.SIGINT)
    person.expect('\n> ')
    person.type('\x04')
    assert person.process.wait(60) == 0
    assert 'Traceback' not in person.screen


@pytest.mark.slow
@pytest.mark.skipif(os.name != 'posix', reason='pseudo-terminals are POSIX')
def test_prompt_typed_at_a_terminal(terminal, talk, tmp_path):
    """--start=- says what to do there. The last Enter is not part of the prompt, as it is not of a pipe's."""
    write_model(tmp_path, char_tokenizer(ALPHABET).spec, None)
    how = [GREEDY, '--start=-', '--num_samples=1', '--max_new_tokens=9']
    person = terminal(*how)
    person.expect('type the prompt, then Enter and Ctrl-D\n')
    person.type('ab\ncd\n\x04')
    person.expect('ab\ncd\n')
    want = talk(*how, stdin='ab\ncd\n')
    assert talk(r'--start=ab\ncd', *how[:1], *how[2:]) == want
    person.expect(want)
