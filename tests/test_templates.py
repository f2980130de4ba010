"""How rows become documents: what counts in the loss, and that a prompt has the ids that training saw."""

import random

import numpy as np
import pytest

from data.tokenizer import (
    EOT,
    Tokenizer,
    UserError,
    char_tokenizer,
    encode_parts,
    read_tokenizer_spec,
    template_fields,
    template_parts,
    template_prompt,
    train_bpe,
    unescape,
)

QA = "Question: {question}\nAnswer: {answer}"
ROW = {'question': " Who is there? ", 'answer': "Only the wind.\n"}
TALK = [
    {'role': 'system', 'content': "Be brief. "},
    {'role': 'user', 'content': "\nHello"},
    {'role': 'assistant', 'content': "Hi."},
    {'role': 'user', 'content': "Say User: and <|endoftext|>"},
    {'role': 'assistant', 'content': "User: <|endoftext|>"},
]


def as_text(parts):
    return ''.join(EOT if text is None else text for text, _ in parts)


def tokenizers(bpe):
    """One of each kind, for training data. All have an <|endoftext|>."""
    everything = as_text(template_parts(QA, ROW) + template_parts('{messages}', {'messages': TALK}))
    alphabet = sorted(set(everything) | set('abcdefghijklmnopqrstuvwxyz'))
    trained = train_bpe([everything] * 3, 400)
    return char_tokenizer([*alphabet, EOT]), trained, Tokenizer({'kind': 'gpt2'}, ordinary=True)


def test_fields():
    """What stands before the last field does not count, the rest and its end do. Contents are stripped; the
    space before an answer is the answer's. Plain documents stay as they are, and count as a whole.
    """
    end = (None, True)
    assert template_fields(QA) == ['question', 'answer']
    assert template_parts(QA, ROW) == [
        ("Question: Who is there?\nAnswer:", False),
        (" Only the wind.", True),
        end,
    ]
    assert template_parts('{text}', {'text': " a \n", 'id': 7}) == [(" a \n", True), end]
    assert template_parts('{a}  {b}!\n', {'a': 'x', 'b': 'y'}) == [('x ', False), (' y!\n', True), end]
    assert template_parts('{a}{b c}{a}', {'a': 'x', 'b c': '{a}'}) == [('x{a}', False), ('x', True), end]
    assert template_parts('{story}', {'story': 'x'}) == [('', False), ('x', True), end]
    assert template_prompt(QA, " Who? \n") == "Question: Who?\nAnswer:"


@pytest.mark.parametrize(
    'template, row, words',
    [
        (QA, {'question': 'a'}, 'the field "answer" is missing'),
        (QA, {'question': 'a', 'answer': None}, 'the field "answer" is missing'),
        (QA, {'question': 3.5, 'answer': 'a'}, 'the field "question" is no text, but 3.5'),
        ('{text}', {'title': 'a'}, 'the field "text" is missing'),
        ('{messages}', {'messages': 'a'}, 'no list of messages'),
        ('{messages}', {'messages': ['a']}, 'no list of messages'),
        ('{messages}', {'messages': [{'content': 'a'}]}, 'the field "role" is missing'),
        ('{messages}', {'messages': [{'role': 'tool', 'content': 'a'}]}, "'tool' is none of system"),
        ('{messages}', {'messages': [{'role': 'user', 'content': [1]}]}, r'"content" is no text, but \[1\]'),
    ],
)
def test_wrong_rows(template, row, words):
    """A row that does not fit is an error that names the field, not a document without it."""
    with pytest.raises(UserError, match=words):
        template_parts(template, row)


def test_wrong_templates():
    for template in ("Question: Answer:", "{question\nAnswer: {answer}", "{a} {}", "{a} }"):
        with pytest.raises(UserError, match="does not name its fields in braces"):
            template_fields(template)
    for template, count in (('{text}', 0), ('{a}{b}{c}', 2)):
        with pytest.raises(UserError, match=f'has {count} fields for a line to fill.*--template'):
            template_prompt(template, 'a')


def test_conversation():
    """The assistant's answers count, each with its <|endoftext|>; the newline behind that does not, and is
    there between turns only. A conversation that ends with a question has an end too, which does not count.
    """
    assert template_parts('{messages}', {'messages': TALK}) == [
        ("Be brief.\nUser: Hello\nAssistant:", False),
        (" Hi.", True),
        (None, True),
        ("\nUser: Say User: and <|endoftext|>\nAssistant:", False),
        (" User: <|endoftext|>", True),
        (None, True),
    ]
    assert template_parts('{messages}', {'messages': TALK[:2]}) == [
        ("Be brief.\nUser: Hello\n", False),
        (None, False),
    ]
    assert template_parts('{messages}', {'messages': TALK[:4]})[2:] == [
        (None, True),
        ("\nUser: Say User: and <|endoftext|>\n", False),
        (None, False),
    ]


def test_ids(bpe):
    """The counted ids are those of the answers and of their ends, and a token of its own ends each: a text
    <|endoftext|> in a content is thirteen characters. What is read before an answer, at first and behind an
    earlier answer, has the ids that training has there.
    """
    for tokenizer in tokenizers(bpe):
        parts = template_parts('{messages}', {'messages': TALK})
        ids, mask = encode_parts(tokenizer, parts)
        assert ids.dtype == np.uint16 and mask.dtype == np.uint8 and len(ids) == len(mask)
        assert tokenizer.decode(ids.tolist()) == as_text(parts)
        counted = tokenizer.decode(ids[mask == 1].tolist())
        assert counted == f" Hi.{EOT} User: <|endoftext|>{EOT}"
        assert np.count_nonzero(ids == tokenizer.eot) == 2 and ids[-1] == tokenizer.eot

        first = list(tokenizer.encode("Be brief.\n" + template_prompt('{messages}', "Hello")))
        second = list(tokenizer.encode('\n' + template_prompt('{messages}', TALK[3]['content'])))
        answers = [[*tokenizer.encode(text), tokenizer.eot] for text in (" Hi.", " User: <|endoftext|>")]
        assert ids.tolist() == first + answers[0] + second + answers[1]

        ids, mask = encode_parts(tokenizer, template_parts(QA, ROW))
        prompt = list(tokenizer.encode(template_prompt(QA, ROW['question'])))
        assert ids[: len(prompt)].tolist() == prompt and mask.tolist() == [0] * len(prompt) + [1] * (
            len(ids) - len(prompt)
        )


def test_characters_with_an_end(tmp_path):
    """<|endoftext|> is the last id of an alphabet that has it, one token in a prompt, its characters in
    ordinary text; it comes back from meta.pkl and from transformers' file.
    """
    alphabet = [*sorted(set('ab <|endoftext|>')), EOT]
    ordinary = char_tokenizer(alphabet)
    prompt = Tokenizer(ordinary.spec)
    assert ordinary.eot == prompt.eot == prompt.bos == len(alphabet) - 1
    assert prompt.encode(f'a{EOT}b') == [*prompt.encode('a'), prompt.eot, *prompt.encode('b')]
    assert len(ordinary.encode(EOT)) == 13 and ordinary.eot not in ordinary.encode(EOT)
    assert char_tokenizer('ab\n').eot is None and char_tokenizer('ab\n').bos == 2

    (tmp_path / 'meta.pkl').write_bytes(ordinary.files()['meta.pkl'])
    assert read_tokenizer_spec(tmp_path) == ordinary.spec
    (tmp_path / 'meta.pkl').unlink()
    exported = prompt.for_transformers()
    exported.save(str(tmp_path / 'tokenizer.json'))
    assert read_tokenizer_spec(tmp_path) == ordinary.spec
    assert exported.encode(f'a{EOT}b').ids == prompt.encode(f'a{EOT}b')
    assert exported.get_vocab_size() == len(alphabet)


def test_words(tmp_path):
    """A vocabulary of words: the longest that fits is taken first, here and in transformers' file, as a
    search from the left finds them; what no word begins is an error.
    """
    words = ['a', 'b', 'ab', 'abc', 'cab', ' ', '\n', '. ', '.', '(', '[x]', 'the', 'he']
    tokenizer = Tokenizer(char_tokenizer(words).spec)
    exported = tokenizer.for_transformers()
    exported.save(str(tmp_path / 'tokenizer.json'))
    assert read_tokenizer_spec(tmp_path) == tokenizer.spec
    chance = random.Random(0)
    for _ in range(200):
        text = ''.join(chance.choices(words, k=chance.randrange(12)))
        ids, left = [], text
        while left:
            longest = max((word for word in words if left.startswith(word)), key=len, default=None)
            if longest is None:  # as 'c' where 'cab' does not follow
                break
            ids.append(words.index(longest))
            left = left[len(longest) :]
        if left:
            with pytest.raises(UserError, match='does not know the character'):
                tokenizer.encode(text)
        else:
            assert tokenizer.encode(text) == exported.encode(text).ids == ids
            assert tokenizer.decode(ids) == exported.decode(ids, skip_special_tokens=False) == text


def test_unescape():
    """As people type it in a shell: \\n, \\t and \\\\ are translated, and nothing else."""
    assert unescape(r'a\nb\tc\\n\x\ ') == 'a\nb\tc\\n\\x\\ '
    assert unescape('数\\n学') == '数\n学' and unescape('') == ''
