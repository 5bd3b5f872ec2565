"""Conversations: every example whole and once an epoch, answers alone predicted, in the published template."""

import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import KINDS
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing

from minicpm_lite import ModelConfig
from minicpm_lite.data.conversations import (
    ConversationWindows,
    EncodedExample,
    Example,
    encode_example,
    packed_windows,
)
from minicpm_lite.data.windows import Windows, batch_of
from minicpm_lite.language.chat import encode_chat, minicpm_chat
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.scoring import context_only, next_token_loss, predicted, readable
from minicpm_lite.language.tokenizer import BytePairTokenizer, train_tokenizer

MODEL = ModelConfig(16, 40, 1, 2, 30, num_key_value_heads=1, max_position_embeddings=64)

ids = st.lists(st.integers(0, 29), min_size=1, max_size=5).map(tuple)


@settings(deadline=None)
@given(
    parts=st.lists(st.tuples(ids, ids), min_size=1, max_size=30),
    length=st.integers(9, 20),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_each_example_whole_and_once_an_epoch(parts, length, seed, epoch):
    windows = ConversationWindows([EncodedExample(*each) for each in parts], length, seed)
    count = len(windows.packed)
    found = []
    for index in range(epoch * count, (epoch + 1) * count):
        row = windows[index].tolist()
        assert len(row) == length + 1
        while row and row[-1] == ~0:
            row.pop()
        found += split_examples(row)
    assert sorted(found) == sorted(parts)


def split_examples(row):
    """Questions are negative, answers are not: each change from answer to question begins an example."""
    found = []
    while row:
        question = [~i for i in row[: next(k for k, i in enumerate(row) if i >= 0)]]
        rest = row[len(question) :]
        answer = rest[: next((k for k, i in enumerate(rest) if i < 0), len(rest))]
        found.append((tuple(question), tuple(answer)))
        row = rest[len(answer) :]
    return found


EXAMPLES = [
    EncodedExample((1, 2, 3), (4, 5)),
    EncodedExample((6,), (7, 8, 9)),
    EncodedExample((10, 11), (12,)),
]


def test_packing_by_hand():
    windows = ConversationWindows(EXAMPLES, 9, seed=0)
    rows = {
        tuple(split_examples([i for i in windows[k].tolist() if i != ~0])) for k in range(len(windows.packed))
    }
    assert sum(len(row) for row in rows) == 3
    assert windows.id_range()[1] == 12
    assert windows.predicted_share == pytest.approx(6 / (9 * len(windows.packed)))
    one = ConversationWindows(EXAMPLES[:1], 4, seed=0)
    assert one[0].tolist() == [~1, ~2, ~3, 4, 5] and one.predicted_share == 0.5
    assert one[7].tolist() == one[0].tolist()


def test_epochs_differ_and_seeds_differ():
    many = [EncodedExample((i % 20,), (i % 7, 20)) for i in range(200)]
    windows = ConversationWindows(many, 8, seed=0)
    count = len(windows.packed)
    first, second = (torch.stack([windows[e * count + i] for i in range(count)]) for e in (0, 1))
    assert not torch.equal(first, second)
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, second.tolist()))
    other = ConversationWindows(many, 8, seed=1)
    assert windows.identity() != other.identity() != ConversationWindows(many[1:], 8, 1).identity()
    assert windows.identity() == ConversationWindows(many, 8, seed=0).identity()


def test_the_loss_is_that_of_the_answers_alone():
    """Equal to the cross entropy written out by hand; the padding and the questions' own losses are not in it."""
    torch.manual_seed(0)
    model = Decoder(MODEL)
    windows = ConversationWindows(EXAMPLES, 9, seed=0)
    batch = batch_of(windows, 0, len(windows.packed))
    ids = readable(batch)
    log_p = model(ids[:, :-1]).log_softmax(-1)
    total, tokens = 0.0, 0
    for row in range(len(batch)):
        for place in range(1, 10):
            if batch[row, place] >= 0:
                total -= log_p[row, place - 1, ids[row, place]].item()
                tokens += 1
    assert tokens == 6
    assert next_token_loss(model, batch).item() == pytest.approx(total / tokens, rel=1e-5)
    wrong = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    assert wrong != pytest.approx(total / tokens, rel=1e-3), "a loss without the mask is another number"


@pytest.mark.parametrize(
    ("examples", "sentence"),
    [
        ([], "no example to put into windows"),
        ([EncodedExample((), (1,))], "Example 0 lacks a question or an answer"),
        ([EXAMPLES[0], EncodedExample((1,), ())], "Example 1 lacks a question or an answer"),
        ([EncodedExample((1,) * 5, (2,) * 5)], "Example 0 has 10 tokens; a window holds 9"),
    ],
)
def test_examples_that_fit_no_window(examples, sentence):
    with pytest.raises(ValueError, match=sentence):
        ConversationWindows(examples, 8, seed=0)


def test_what_was_given_can_be_read_once_only():
    once, plain = ConversationWindows(iter(EXAMPLES), 9, 0), ConversationWindows(EXAMPLES, 9, 0)
    assert once.identity() == plain.identity() and torch.equal(once[5], plain[5])


def test_a_window_is_its_readers_own():
    windows, expected = ConversationWindows(EXAMPLES, 9, 0), ConversationWindows(EXAMPLES, 9, 0)
    for index in range(9):
        windows[index].fill_(7)
    assert all(torch.equal(windows[index], expected[index]) for index in range(9))


def test_is_windows():
    assert isinstance(ConversationWindows(EXAMPLES, 9, 0), Windows)


def test_conversations_count_from_zero():
    with pytest.raises(IndexError, match="index of the window is -1"):
        ConversationWindows(EXAMPLES, 9, 0)[-1]


def test_packing_marks_all_but_answers():
    """Question, answer, question, answer, padding: what is not an answer is read and not predicted."""
    windows = packed_windows([EXAMPLES[:2], EXAMPLES[2:]], 10)
    assert readable(windows).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 0], [10, 11, 12, 0, 0, 0, 0, 0, 0, 0]]
    assert predicted(windows).int().tolist() == [[0, 0, 1, 1, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0]]
    assert windows[1, 3:].tolist() == context_only(torch.zeros(7, dtype=torch.long)).tolist()


# What the first edition packed, its recorded runs read.


@pytest.mark.parametrize(
    ("seed", "first_100", "identity", "share"),
    [
        (0, 4248467192, {"windows": 16, "checksum": 683303190, "length": 16, "seed": 0}, 0.546875),
        (1, 3529990701, {"windows": 15, "checksum": 3566844755, "length": 16, "seed": 1}, 0.5833333333333334),
    ],
)
def test_the_windows_are_those_of_the_first_edition(seed, first_100, identity, share):
    examples = [EncodedExample((20 + i % 5, 25), (15 + i % 5, 29, *range(i % 4))) for i in range(40)]
    windows = ConversationWindows(examples, 16, seed)
    seen = torch.stack([windows[index] for index in range(100)])
    assert zlib.crc32(seen.numpy().tobytes()) == first_100
    assert windows.identity() == identity
    assert windows.id_range() == (0, 29) and windows.predicted_share == share


# Encoding.

TEXT = "how many is 2 plus 3? it is five, of course. " * 9


def test_an_example_reads_back_in_the_template():
    tokenizer = train_tokenizer(TEXT, 300)
    tokenizer.add_tokens(["<用户>", "<AI>"])
    encoded = encode_example(tokenizer, Example("sum", "2 plus 3", "five"))
    assert tokenizer.decode([*encoded.question, *encoded.answer]) == "<用户>2 plus 3<AI> five\n"
    assert tokenizer.decode(list(encoded.answer)) == " five\n"
    marks = [tokenizer.token_to_id(mark) for mark in ("<用户>", "<AI>")]
    assert [encoded.question[0], encoded.question[-1]] == marks


@pytest.mark.parametrize("special", [True, False], ids=["special", "added"])
@given(
    question=st.lists(st.sampled_from(["<AI>", "<用户>", "</s>", "<A", "I>", "five", " ", "\n"])).map(
        "".join
    ),
    answer=st.lists(st.sampled_from(["<AI>", "<用户>", "</s>", "<", "s>", "it is ", "\n"])).map("".join),
)
@settings(max_examples=60, deadline=None)
def test_control_tokens_that_are_spelt_are_letters(special, question, answer):
    tokenizer = train_tokenizer(TEXT, 270)
    add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
    add(["<用户>", "<AI>", "</s>"])
    example = Example("any", question, answer)
    encoded = encode_example(tokenizer, example)
    controls = [token for token in (*encoded.question, *encoded.answer) if token >= 270]
    assert controls == [encoded.question[0], encoded.question[-1]] == [270, 271]
    for ids, text in ((encoded.question, example.asked), (encoded.answer, example.answered)):
        assert tokenizer.decode(list(ids), skip_special_tokens=False) == text
    if not any(token in question for token in ("<AI>", "<用户>", "</s>")):
        assert list(encoded.question) == tokenizer.encode(example.asked).ids, "as it always was"


def test_without_control_tokens_a_template_is_text_like_any_other():
    tokenizer = train_tokenizer(TEXT, 300)
    example = Example("any", '"<AI>', "five")
    assert list(encode_example(tokenizer, example).question) == tokenizer.encode('<用户>"<AI><AI>').ids


def test_examples_are_encoded_whole_whatever_the_tokenizer_says():
    """A tokenizer.json may order to cut, to pad, and to put special tokens around a text."""
    example = Example("sum", "how many is 2 plus 3?", "it is five, of course")
    tokenizer = train_tokenizer(TEXT, 270)
    whole = encode_example(tokenizer, example)
    tokenizer.enable_truncation(3)
    assert encode_example(tokenizer, example) == whole
    tokenizer.no_truncation()
    tokenizer.enable_padding(length=100)
    assert encode_example(tokenizer, example) == whole
    tokenizer.no_padding()
    a = tokenizer.token_to_id("a")
    tokenizer.post_processor = TemplateProcessing(single="$A a", special_tokens=[("a", a)])
    assert encode_example(tokenizer, example) == whole


@given(question=st.text("ab <>AI?", max_size=12).map(lambda text: text + "?"))
@settings(max_examples=60, deadline=None)
def test_a_question_is_learned_as_it_is_asked(question):
    """With the start token of the tokenizer in front, which stands before an answer never."""
    tokenizer = train_tokenizer(TEXT, 270)
    tokenizer.add_special_tokens(["<s>", "<用户>", "<AI>"])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 270)])
    encoded = encode_example(tokenizer, Example("any", question, "five"))
    asked = encode_chat(tokenizer, minicpm_chat, [{"role": "user", "content": question}])
    assert list(encoded.question) == asked and asked[:2] == [270, 271]
    assert tokenizer.decode(list(encoded.answer), skip_special_tokens=False) == " five\n"


@pytest.mark.parametrize("kind", ["byte_level", "prepended", "first_only"])
@given(answer=st.text("abc ", max_size=9).map(str.strip).filter(bool))
@settings(max_examples=30, deadline=None)
def test_one_blank_stands_before_an_answer(kind, answer):
    """Also where the tokenizer puts one itself; then the tokens are those of the whole text without it."""
    tokenizer = Tokenizer.from_str(KINDS[kind].to_str())
    tokenizer.add_special_tokens(["<用户>", "<AI>"])
    encoded = encode_example(tokenizer, Example("any", "a man", answer))
    both = [*encoded.question, *encoded.answer]
    assert tokenizer.decode(both).endswith(f"a man {answer}\n")
    if kind != "first_only":
        blank = " " if kind == "byte_level" else ""
        assert both == tokenizer.encode(f"<用户>a man<AI>{blank}{answer}\n").ids


def test_the_tokenizer_from_scratch_encodes_examples():
    tokenizer = BytePairTokenizer.train([TEXT], 270)
    encoded = encode_example(tokenizer, Example("sum", "2 plus 3", "five"))
    assert encoded.question == tuple(tokenizer.encode("<用户>2 plus 3<AI>"))
    assert encoded.answer == tuple(tokenizer.encode(" five\n"))


def test_a_row_that_is_longer_than_a_window():
    row = [EncodedExample((1, 2, 3), (4, 5))]
    assert packed_windows([row], 5).shape == (1, 5)
    assert packed_windows([row, []], 5)[1].tolist() == context_only(torch.zeros(5, dtype=torch.long)).tolist()
    with pytest.raises(ValueError, match="The examples of row 0 have 5 tokens; a window holds 4"):
        packed_windows([row], 4)


def test_an_answer_that_begins_like_a_blank_keeps_its_own():
    """Whether a tokenizer puts a blank is asked of it, not of what the answer's first token looks like."""
    letters = ["<用户>", "<AI>", *"▁ ax\n", *sorted(set("what is it?"))]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(dict.fromkeys(letters))}, []))
    tokenizer.add_special_tokens(["<用户>", "<AI>"])
    for answer in ("▁x", "a", ""):
        encoded = encode_example(tokenizer, Example("any", "what is it?", answer))
        assert "".join(map(tokenizer.id_to_token, encoded.answer)) == f" {answer}\n"


def test_the_range_of_ids_is_that_of_questions_and_answers():
    """The id that fills windows up is none of them."""
    windows = ConversationWindows([EncodedExample((5, 9), (7,)), EncodedExample((6,), (8, 6))], 8, 0)
    assert windows.id_range() == (5, 9)


def test_an_index_may_be_a_number_of_numpys(unchecked):
    windows = ConversationWindows([EncodedExample((5,), (7,)), EncodedExample((6,), (8,))], 4, 0)
    assert torch.equal(windows[np.int64(3)], windows[3])
