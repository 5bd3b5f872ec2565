"""Text as it is written: pieces add up, no character is cut, stop strings are found wherever tokens are cut."""

import warnings
from dataclasses import replace
from os.path import commonprefix

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import KINDS, WORDS
from small_models import TEXT, TOKENIZER, WRITER, Says, make_model
from tokenizers import Tokenizer, decoders, models, processors

from minicpm_lite.config import ModelConfig
from minicpm_lite.language.chat import Chat, chatml, encode_chat
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.generation import generate
from minicpm_lite.language.sampling import Sampling
from minicpm_lite.language.tokenizer import BytePairTokenizer, train_tokenizer
from minicpm_lite.language.writing import TextWriter, generate_text, stream_text

MINE = BytePairTokenizer.from_tokenizers(TOKENIZER)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The writer


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=25))
def test_pieces_add_up_to_the_text_and_no_character_is_cut(text):
    writer = TextWriter(TOKENIZER)
    pieces = [writer.push(token) for token in TOKENIZER.encode(text).ids] + [writer.finish()]
    assert "".join(pieces) == writer.text == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(alphabet="ab\n人🙂", max_size=20),
    stop=st.lists(st.text(alphabet="ab\n人🙂", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string_wherever_tokens_are_cut(text, stop):
    writer, shown = TextWriter(TOKENIZER, stop), ""
    for token in TOKENIZER.encode(text).ids:
        shown += writer.push(token)
        if writer.stopped:
            break
    shown += writer.finish()
    places = [(text.find(each) + len(each), text.find(each)) for each in stop if each in text]
    assert shown == writer.text == (text[: min(places)[1]] if places else text)
    assert writer.stopped == bool(places)


def test_half_a_character_at_the_end_is_shown_as_such():
    tokens = TOKENIZER.encode("a🦜").ids  # the parrot is not in the training text: four bytes, four tokens
    writer = TextWriter(TOKENIZER)
    assert [writer.push(token) for token in tokens[:-1]] == ["a"] + [""] * (len(tokens) - 2)
    assert writer.finish() == "\ufffd"


def test_text_is_held_back_only_as_long_as_it_may_become_a_stop_string():
    writer = TextWriter(TOKENIZER, ["END"])
    assert [writer.push(token) for token in TOKENIZER.encode("xEyENz").ids] == ["x", "", "Ey", "", "", "ENz"]


def byte_fallback_tokenizer() -> Tokenizer:
    """A tokenizer of the kind that Llama 2 and MiniCPM have: what it lacks is written as byte tokens."""
    pieces = ["\u2581a", "\u2581b", "c", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(
        st.sampled_from([0, 1, 2, 3 + 0x0A, 3 + 0x61, *(3 + b for b in "🙂人".encode())]), max_size=12
    )
)
def test_byte_tokens_are_put_together_as_the_tokenizer_does(tokens):
    tokenizer = byte_fallback_tokenizer()
    writer = TextWriter(tokenizer)
    assert "".join([writer.push(token) for token in tokens] + [writer.finish()]) == tokenizer.decode(tokens)


def test_an_added_token_of_a_sentencepiece_vocabulary_is_decoded_as_the_tokenizer_does():
    tokenizer = byte_fallback_tokenizer()
    tokenizer.add_special_tokens(["\u2581<PRE>", "<é>"])
    ids = [tokenizer.token_to_id(token) for token in ("\u2581a", "\u2581<PRE>", "<é>", "c")]
    writer = TextWriter(tokenizer)
    assert "".join([writer.push(token) for token in ids] + [writer.finish()]) == "a <PRE><é>c"


# Behind a prompt


def behind(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> str:
    """As transformers' pipeline: both are decoded together, and the prompt's text is cut off."""
    before, whole = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (prompt, prompt + new))
    return whole[len(commonprefix([before, whole])) :]  # all of `before`, unless a character is cut in two


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_an_answer_is_decoded_behind_its_prompt(kind, data):
    """Any tokens, words, bytes, control tokens and ids that the tokenizer lacks; before them few or many."""
    tokenizer = KINDS[kind]
    words = tokenizer.encode(WORDS, add_special_tokens=False).ids
    ids = st.one_of(st.sampled_from(words), st.integers(0, tokenizer.get_vocab_size() + 1))
    prompt = data.draw(st.lists(ids, max_size=8)) + words * data.draw(st.integers(0, 1))
    new = data.draw(st.lists(ids, max_size=30)) + data.draw(st.sampled_from([[], words]))
    whole = behind(tokenizer, prompt, new)
    writer = TextWriter(tokenizer, prompt=prompt)
    assert "".join([writer.push(token) for token in new] + [writer.finish()]) == writer.text == whole
    if whole:
        start = data.draw(st.integers(0, len(whole) - 1))
        stop = whole[start : start + 3]
        writer = TextWriter(tokenizer, [stop], prompt)
        shown = "".join([writer.push(token) for token in new] + [writer.finish()])
        assert writer.stopped and shown == whole[: whole.index(stop)]


def test_the_first_space_behind_a_prompt_stays():
    """Sentencepiece tokenizers drop it at the beginning of a text; in each row, and for stop strings too."""
    for kind in ("prepended", "first_only", "unigram", "word_pieces", "whole_words"):
        tokenizer = KINDS[kind]
        prompt, whole = (tokenizer.encode(text).ids for text in ("a man", "a man is a man"))
        answer, text = whole[len(prompt) :], tokenizer.decode(whole)[len(tokenizer.decode(prompt)) :]
        assert whole[: len(prompt)] == prompt and text.startswith(" ")
        says = [
            Says(*rows, config=replace(WRITER, vocab_size=400))
            for rows in ([answer], [answer] * 2, [answer] * 2)
        ]
        assert "".join(stream_text(says[0], tokenizer, "a man", len(answer))) == text
        assert generate_text(says[1], tokenizer, ["a man", prompt], len(answer)) == [text, text]
        assert generate_text(says[2], tokenizer, ["a man", "a"], len(answer), stop=[" "]) == ["", ""]
        writer = TextWriter(tokenizer)
        alone = "".join([writer.push(token) for token in answer] + [writer.finish()])
        assert alone == tokenizer.decode(answer), "without a prompt it begins as the tokenizer decodes it"


class CountedDecodes:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.tokens = tokenizer, 0

    def id_to_token(self, token: int) -> str | None:
        return self.tokenizer.id_to_token(token)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        self.tokens += len(ids)
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("kind", ["byte_level", "prepended"])
def test_however_long_a_text_is_few_tokens_are_decoded_at_a_time(kind):
    tokenizer = KINDS[kind]
    word, unknown = tokenizer.encode("a").ids[-1], tokenizer.get_vocab_size()
    half = tokenizer.token_to_id("ð" if kind == "byte_level" else "<0xF0>")  # of a character
    writer = TextWriter(tokenizer, prompt=[word] * 500)
    writer._tokenizer = counted = CountedDecodes(tokenizer)
    for token in [word] * 500 + [unknown] * 500 + [half] * 500 + [word] * 500:
        writer.push(token)
    writer.finish()
    assert writer.text.count("\ufffd") == 500
    assert counted.tokens < 2000 * 20, "a text that is decoded anew for each token takes a million"


# A model that writes


def test_streamed_text_is_the_whole_text():
    model = make_model(WRITER)
    pieces = list(stream_text(model, TOKENIZER, "It is a truth", 30, Sampling(1.0), generator=seeded()))
    (whole,) = generate_text(model, TOKENIZER, ["It is a truth"], 30, Sampling(1.0), generator=seeded())
    assert len(pieces) > 5 and "".join(pieces) == whole
    ids = torch.tensor([TOKENIZER.encode("It is a truth").ids])
    free = generate(model, ids, 30, 1.0, generator=seeded())
    assert whole == TOKENIZER.decode(free[0, ids.shape[1] :].tolist())


def test_a_batch_of_texts_stops_row_by_row():
    first, second = (TOKENIZER.encode(text).ids for text in ("man. wife", "a wife, that. man"))
    assert generate_text(Says(first, second), TOKENIZER, ["x", "y z"], 20, stop=["."]) == [
        "man",
        "a wife, that",
    ]


def test_a_special_token_can_be_a_stop_string():
    tokenizer = train_tokenizer(TEXT, 290)
    tokenizer.add_special_tokens(["<|im_end|>"])
    answer = tokenizer.encode("a wife<|im_end|>a wife").ids
    assert tokenizer.token_to_id("<|im_end|>") in answer
    assert generate_text(Says(answer), tokenizer, ["x"], 20, stop=["<|im_end|>"]) == ["a wife"]


def test_a_stop_token_is_not_part_of_the_text():
    tokens = TOKENIZER.encode("a wife").ids
    stop = TOKENIZER.encode("🙂").ids[0]
    answer = [*tokens, stop, *tokens]
    assert generate_text(Says(answer), TOKENIZER, ["x"], 20, stop_ids=[stop]) == ["a wife"]
    assert "".join(stream_text(Says(answer), TOKENIZER, "x", 20, stop_ids=[stop])) == "a wife"


def test_nothing_is_computed_after_all_texts_have_stopped():
    says = Says(TOKENIZER.encode("man. wife wife wife").ids)
    generate_text(says, TOKENIZER, ["x"], 20, stop=["."])
    assert says.step == len(TOKENIZER.encode("man.").ids)


@pytest.mark.parametrize("write", [
    lambda model, **more: generate_text(model, TOKENIZER, ["x"], 1, **more),
    lambda model, **more: list(stream_text(model, TOKENIZER, "x", 1, **more)),
    lambda model, **more: Chat(model, TOKENIZER, chatml, **more),
])  # fmt: skip
def test_ends_that_are_ordinary_tokens_are_named(write):
    """As those of a released shape are in a vocabulary of one's own; unless they are asked for."""
    end = TOKENIZER.token_to_id("a")
    model = Says([end], config=replace(WRITER, eos_token_id=end))
    with pytest.warns(
        UserWarning, match=rf"ends texts at 'a' \(id {end}\), of which ordinary texts are made"
    ):
        write(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(model, stop_ids=[end])
        write(Says([end]))


@pytest.mark.filterwarnings("ignore:The model ends texts at")
def test_a_model_stops_at_its_own_tokens_unless_told_otherwise():
    tokens = TOKENIZER.encode("a wife").ids
    stop = TOKENIZER.encode("🙂").ids[0]
    answer, config = [*tokens, stop, *tokens, stop], replace(WRITER, eos_token_id=stop)
    assert generate_text(Says(answer, config=config), TOKENIZER, ["x"], 20) == ["a wife"]
    assert "".join(stream_text(Says(answer, config=config), TOKENIZER, "x", 20)) == "a wife"
    whole = TOKENIZER.decode(answer)
    assert generate_text(Says(answer, config=config), TOKENIZER, ["x"], len(answer), stop_ids=()) == [whole]
    assert (
        "".join(stream_text(Says(answer, config=config), TOKENIZER, "x", len(answer), stop_ids=())) == whole
    )


def test_stop_tokens_from_an_iterator_stop_every_row():
    first, second = (TOKENIZER.encode(text).ids for text in ("a wife", "that man"))
    stop = TOKENIZER.encode("🙂").ids[0]
    says = Says([*first, stop, 1, 1, 1], [*second, stop])
    assert generate_text(says, TOKENIZER, ["x", "y"], 20, stop_ids=iter([stop])) == ["a wife", "that man"]
    assert (
        "".join(stream_text(Says([*first, stop, 1, 1]), TOKENIZER, "x", 20, stop_ids=iter([stop])))
        == "a wife"
    )


@pytest.mark.parametrize(
    "kind", [list, tuple, set, iter, lambda stop: (each for each in stop), dict.fromkeys]
)
def test_stop_strings_and_prompts_may_be_anything_that_yields_them(kind):
    """An iterator is empty after it was read once, and what was meant to stop must stop all the same."""
    answer = TOKENIZER.encode("man. wife, that").ids
    assert generate_text(Says(answer, answer), TOKENIZER, ["x", "y"], 9, stop=kind(["."])) == ["man", "man"]
    assert generate_text(Says(answer, answer), TOKENIZER, iter(["x", "y"]), 9, stop=["."]) == ["man", "man"]
    assert "".join(stream_text(Says(answer), TOKENIZER, "x", 9, stop=kind(["."]))) == "man"
    writer = TextWriter(TOKENIZER, kind(["."]))
    assert "".join(writer.push(token) for token in answer) == "man" and writer.stopped


def test_a_prompt_may_be_its_tokens():
    model, prompt = make_model(WRITER), "It is a truth"
    ids = TOKENIZER.encode(prompt).ids
    assert generate_text(model, TOKENIZER, [ids, "man"], 9) == generate_text(
        model, TOKENIZER, [prompt, "man"], 9
    )
    assert list(stream_text(model, TOKENIZER, ids, 9)) == list(stream_text(model, TOKENIZER, prompt, 9))


def test_a_start_token_that_would_stand_twice_is_warned_of():
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.add_special_tokens(["<s>"])
    start = [("<s>", 300)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=start)
    model = make_model(replace(WRITER, vocab_size=301))
    with pytest.warns(UserWarning, match="begins with <s>, and the tokenizer puts another before it"):
        list(stream_text(model, tokenizer, "<s>man", 1))
    with pytest.warns(UserWarning, match="begins with <s>"):
        generate_text(model, tokenizer, ["man", "<s>man"], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate_text(model, tokenizer, ["man", "a man<s>", ""], 1)
        tokenizer.post_processor = processors.TemplateProcessing("$A", special_tokens=start)
        generate_text(model, tokenizer, ["<s>man", "<s><s>man"], 1)


# Either kind of tokenizer


PROMPTS = ["It is a truth", "单身汉 — must be", "🙂"]


@pytest.mark.slow  # thousands of texts, piece by piece
@pytest.mark.parametrize("seed", range(2))
def test_our_own_tokenizer_writes_the_same_text_as_the_fast_one(seed):
    model, settings = make_model(WRITER), dict(sampling=Sampling(1.0), stop=["\n", "man"])
    mine, fast = (
        generate_text(model, tokenizer, PROMPTS, 30, **settings, generator=seeded(seed))
        for tokenizer in (MINE, MINE.fast)
    )
    assert mine == fast and all(mine)
    for prompt in PROMPTS:
        mine, fast = (
            list(stream_text(model, tokenizer, prompt, 30, **settings, generator=seeded(seed)))
            for tokenizer in (MINE, MINE.fast)
        )
        assert mine == fast and mine
    ids = torch.tensor([MINE.encode("It is a truth")])
    written = generate(model, ids, 30, 1.0, generator=seeded(seed))[0, ids.shape[1] :].tolist()
    pieces = stream_text(model, MINE, "It is a truth", 30, Sampling(1.0), generator=seeded(seed))
    assert "".join(pieces) == MINE.decode(written)


@settings(max_examples=100, deadline=None)
@given(
    ids=st.lists(st.integers(0, 299), max_size=12),
    stop=st.lists(st.sampled_from(["a", " m", "\ufffd", "身"]), max_size=2),
)
def test_our_own_tokenizer_in_a_writer(ids, stop):
    writers = [TextWriter(tokenizer, stop) for tokenizer in (MINE, MINE.fast)]
    pieces = [[writer.push(token) for token in ids] + [writer.finish()] for writer in writers]
    assert pieces[0] == pieces[1] and writers[0].text == writers[1].text
    if not stop:
        assert writers[0].text == MINE.decode(ids)


def test_orders_to_cut_or_pad_are_not_followed():
    """They stand in many a tokenizer.json, for the batches that it was trained with."""
    ordered = Tokenizer.from_str(TOKENIZER.to_str())
    ordered.enable_truncation(2)
    ordered.enable_padding(length=40)
    model, prompts = make_model(WRITER), ["It is a truth universally acknowledged", "man"]
    assert generate_text(model, ordered, prompts, 12) == generate_text(model, TOKENIZER, prompts, 12)
    for prompt in prompts:
        pieces = [list(stream_text(model, each, prompt, 12)) for each in (ordered, TOKENIZER)]
        assert pieces[0] == pieces[1]
    assert ordered.truncation["max_length"] == 2 and ordered.padding["length"] == 40


# Bad input


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: generate_text(m, TOKENIZER, ["a", ""], 5), "Prompt 1 is empty"),
        (lambda m: generate_text(m, TOKENIZER, [], 5), "There is no prompt"),
        (lambda m: generate_text(m, TOKENIZER, "a", 5), "prompts is one string"),
        (lambda m: generate_text(m, TOKENIZER, None, 5), "prompts"),
        (lambda m: generate_text(m, TOKENIZER, [b"a"], 5), "Expected type|type bytes; expected str"),
        (lambda m: list(stream_text(m, TOKENIZER, None, 5)), "prompt|type NoneType; expected str"),
        (lambda m: list(stream_text(m, TOKENIZER, "a\ud83d", 5)), r"unpaired surrogate, U\+D83D, at 1"),
        (lambda m: list(stream_text(m, TOKENIZER, "a", 5, 0.7)), "sampling"),
        (lambda m: list(stream_text(m, TOKENIZER, "a", 5, stop=None)), "stop"),
        (lambda m: TextWriter(TOKENIZER, ["a", ""]), "none of them empty"),
        (lambda m: TextWriter(TOKENIZER, "ab"), "stop is 'ab'; expected a list of strings"),
        (lambda m: list(stream_text(m, TOKENIZER, "a", 5, stop_ids=["a"])), "stop_ids"),
        (
            lambda m: generate_text(m, TOKENIZER, [[~5, 4]], 5),
            r"A prompt is \[-6, 4\]; expected a text, or its",
        ),
        (lambda m: list(stream_text(m, TOKENIZER, [1 << 40], 5)), r"A prompt is \[1099511627776\]"),
        (lambda m: list(stream_text(m, TOKENIZER, [5000], 5)), "from 5000 to 5000; the model knows 0 to 299"),
        (
            lambda m: list(stream_text(m, TOKENIZER, "a", 5, stop="ab")),
            "stop is 'ab'; expected a list of strings",
        ),
    ],
)
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(
        (ValueError, TypeError), match=sentence
    ):  # the type check of the tests sees some first
        call(make_model(WRITER))


def test_other_types_are_refused_with_a_sentence_where_nothing_checks_them_before(unchecked):
    model, tokenizer = Decoder(ModelConfig(16, 24, 1, 2, 300)), train_tokenizer("a man", 260)
    for call, sentence in (
        (lambda: list(stream_text(model, tokenizer, "a", 2, 0.7)), "sampling is 0.7; expected"),
        (lambda: list(stream_text(model, tokenizer, "a", 2, stop=None)), "stop is None; expected"),
        (lambda: list(stream_text(model, tokenizer, None, 2)), "The text is of type NoneType; expected"),
        (lambda: generate_text(model, tokenizer, [b"a"], 2), "The text is of type bytes; expected"),
        (lambda: encode_chat(tokenizer, chatml, [model]), "Message 0 is of type Decoder; expected a table"),
        (lambda: encode_chat(tokenizer, chatml, {"role": "user"}), "Message 0 is of type str; expected a table"),
        (lambda: generate_text(model, tokenizer, None, 2), "prompts is None; expected"),
        (lambda: generate_text(model, tokenizer, [torch.tensor([1.0])], 2), "A prompt is tensor([1.]); expected a text, or its tokens"),
        (lambda: generate_text(model, tokenizer, [["a"]], 2), "A prompt is ['a']; expected"),
        (lambda: generate(model, torch.tensor([[1.5]]), 2), "ids is tensor([[1.5000]]); expected"),
        (lambda: generate(model, [[5]], 2), "ids is [[5]]; expected"),
        (lambda: Sampling(temperature="0.9"), "temperature is '0.9'; expected"),
        (lambda: Sampling(temperature=1.0, top_p="0.9"), "top_p is '0.9'; expected"),
        (lambda: Sampling(repetition_penalty=None), "repetition_penalty is None; expected"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError)) as refusal:
            call()
        assert str(refusal.value).startswith(sentence)
    generate_text(model, tokenizer, [torch.tensor([1])], 2)  # tokens in a tensor are a prompt
