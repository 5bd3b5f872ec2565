"""Added tokens of a folder: the same as transformers has them, for whatever its files say."""

import json
import tempfile
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import KINDS
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, processors

from minicpm_lite.language.tokenizer import train_tokenizer
from minicpm_lite.pretrained.checkpoints import load_special_tokens, load_tokenizer
from minicpm_lite.pretrained.families import FAMILIES

NAMES = ["<|a|>", "<|b|>", "</s>", "mRNA", "plain", "▁x"]  # "plain" is a word of the vocabulary
TEXT = "some plain <|a|> words, <|b|>  mRNAs and mRNA </s>plain  ▁x <|A|>\n"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@cache
def vocabulary() -> str:
    tokenizer = train_tokenizer("some plain words of a chat, mRNA " * 20, 300)
    assert tokenizer.token_to_id("plain") or tokenizer.token_to_id("Ġplain")
    return tokenizer.to_str()


flags = st.dictionaries(st.sampled_from(FLAGS), st.booleans())
content = st.sampled_from(NAMES)
table = st.builds(lambda content, flags: {"content": content} | flags, content, flags)
typed = table.map(lambda each: each | {"__type": "AddedToken"})
named = st.sampled_from(["eos_token", "pad_token", "bos_token", "image_token", "unk_token"])
extra = st.lists(content | typed, max_size=3)
in_settings = st.fixed_dictionaries(
    {},
    optional={
        "extra_special_tokens": extra | st.dictionaries(named, content, max_size=2),
        "additional_special_tokens": extra,
        "model_specific_special_tokens": st.dictionaries(named, content, max_size=2),
        "add_bos_token": st.booleans(),
    },
)
in_map = st.fixed_dictionaries(
    {},
    optional={
        "extra_special_tokens": st.lists(content | table, max_size=3)
        | st.dictionaries(named, content, max_size=2),
        "additional_special_tokens": st.lists(content, max_size=2),
    },
)
folders = st.fixed_dictionaries(
    {
        "own": st.lists(st.tuples(content, flags), max_size=3, unique_by=lambda each: each[0]),
        "listed": st.none() | st.lists(st.tuples(content, flags), max_size=4, unique_by=lambda each: each[0]),
        "gap": st.sampled_from([0, 0, 0, 1]),
        "settings": in_settings,
        "named": st.dictionaries(named, st.none() | content | typed | table, max_size=3),
        "map": st.none() | st.tuples(in_map, st.dictionaries(named, st.none() | content | table, max_size=3)),
        "ids": st.none() | st.lists(content, max_size=3, unique=True),
    }
)


def write(folder: Path, own, listed, gap, settings, named, map, ids) -> None:
    tokenizer = Tokenizer.from_str(vocabulary())
    for name, flags in own:
        tokenizer.add_tokens([AddedToken(name, **flags)])
    tokenizer.save(str(folder / "tokenizer.json"))
    first, known = tokenizer.get_vocab_size(), tokenizer.get_vocab()

    def numbered(names: list[str]) -> dict[str, int]:
        new = [name for name in names if name not in known]
        return {name: known.get(name, first + gap + new.index(name) if name in new else 0) for name in names}

    written = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings | named
    if listed is not None:
        numbers = numbered([name for name, _ in listed])
        written["added_tokens_decoder"] = {
            str(numbers[name]): {"content": name} | flags for name, flags in listed
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    if map is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(map[0] | map[1]))
    if ids is not None:
        (folder / "added_tokens.json").write_text(json.dumps(numbered(ids)))


@pytest.mark.parametrize("family", ["llama", "minicpm3"])
@pytest.mark.parametrize("puts", [False, True])
@pytest.mark.parametrize(
    "kind",
    ["GPT2TokenizerFast", "Qwen2Tokenizer", "GPTNeoXTokenizer", "CohereTokenizerFast", "LlamaTokenizer",
     "PreTrainedTokenizerFast"],
)  # fmt: skip
def test_what_begins_a_text_is_that_of_transformers_or_refused(kind, puts, family, tmp_path):
    from transformers import AutoTokenizer

    for asked, marked in product((None, False, True), (False, True)):
        folder = tmp_path / f"{asked} {marked}"
        folder.mkdir()
        tokenizer = Tokenizer.from_str(vocabulary())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=puts)
        if marked:
            first = tokenizer.id_to_token(0)
            tokenizer.post_processor = processors.TemplateProcessing(f"{first} $A", None, [(first, 0)])
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "config.json").write_text(json.dumps({"model_type": family}))
        said = {"tokenizer_class": kind} | ({} if asked is None else {"add_prefix_space": asked})
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
        theirs = AutoTokenizer.from_pretrained(folder)("some plain words").input_ids
        if theirs == tokenizer.encode("some plain words").ids:
            assert load_tokenizer(folder).encode("some plain words").ids == theirs
        else:
            says = "leaves out add_prefix_space, which is false then"
            if asked is not None:
                says = f"says add_prefix_space: {json.dumps(asked)}"
            sentence = f"{says}, and tokenizer.json puts {'a' if puts else 'no'} blank before a text"
            if puts == bool(asked):
                sentence = "leaves out add_bos_token, which is false then, and tokenizer.json puts a token"
            with pytest.raises(ValueError, match=f"{sentence}.* Make the two the same"):
                load_tokenizer(folder)


@pytest.mark.parametrize("asked", [None, False, True])
def test_a_blank_of_sentencepiece_is_that_of_transformers_or_refused(asked, tmp_path):
    KINDS["prepended"].save(str(tmp_path / "tokenizer.json"))
    said = {"tokenizer_class": "LlamaTokenizer"} | ({} if asked is None else {"add_prefix_space": asked})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    if asked is False:
        with pytest.raises(ValueError, match="add_prefix_space: false, and tokenizer.json puts a blank"):
            load_tokenizer(tmp_path)
    else:
        load_tokenizer(tmp_path)


CLASSES = ["GPT2Tokenizer", "GPT2TokenizerFast", "GPTNeoXTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast",
           "Qwen2Tokenizer", "GemmaTokenizer", "CohereTokenizerFast", "CodeLlamaTokenizer",
           "PreTrainedTokenizerFast", None]  # fmt: skip


@pytest.mark.slow  # every class of transformers; one is looked at above
@pytest.mark.parametrize("kind", ["byte_level", "prepended"])
@pytest.mark.parametrize("family", [None, *FAMILIES])
def test_names_of_a_class_are_those_of_transformers(kind, family, tmp_path):
    """Where the files leave them out, and the family's tokenizer is of the class that they name."""
    from transformers import AutoTokenizer

    KINDS[kind].save(str(tmp_path / "tokenizer.json"))
    found = set()
    # these put no blank before a text where nothing is said; such a folder is refused
    no_blank = ("GPT2", "GPTNeoX", "Qwen2", "Cohere") if kind == "prepended" else ()
    classes = [name for name in CLASSES if not str(name).startswith(no_blank)]
    for name, says in product(
        classes, [{}, {"bos_token": "<s>"}, {"eos_token": None, "pad_token": "<|end|>"}]
    ):
        named = {} if name is None else {"tokenizer_class": name}
        for in_settings in (named, {}):
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(in_settings | says))
            (tmp_path / "config.json").write_text(
                json.dumps(named | ({"model_type": family} if family else {}))
            )
            theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
            assert load_special_tokens(tmp_path) == theirs.special_tokens_map
            added = theirs.backend_tokenizer.get_added_tokens_decoder()
            assert list(map(repr, ours.get_added_tokens_decoder().items())) == list(map(repr, added.items()))
            found.add((name, theirs.eos_token))
    heeded = family in (None, "llama", "minicpm")
    for name, eos, where in (
        ("GPT2Tokenizer", "<|endoftext|>", heeded and kind == "byte_level"),
        ("LlamaTokenizer", "</s>", heeded and kind == "prepended"),
        ("GemmaTokenizer", "<eos>", heeded),
    ):
        assert ((name, eos) in found) == where


def test_what_is_no_token_is_one_sentence(tmp_path):
    (tmp_path / "tokenizer.json").write_text(vocabulary())
    file = tmp_path / "tokenizer_config.json"
    for wrong in (
        {"extra_special_tokens": [5]},
        {"eos_token": {"content": 5}},
        {"eos_token": {"lstrip": True}},
        {"eos_token": "\ud800"},
        {"extra_special_tokens": "ab"},
        {"model_specific_special_tokens": ["ab"]},
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="names special tokens that are none"):
            load_tokenizer(tmp_path)
    file.unlink()
    for wrong in ({"<x>": "a"}, {"<x>": None}):
        (tmp_path / "added_tokens.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="added_tokens.json lists .* expected tokens and their ids"):
            load_tokenizer(tmp_path)


@settings(deadline=None, max_examples=150)
@given(folders)
def test_added_tokens_are_those_of_transformers(said):
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as place:
        write(Path(place), **said)
        try:
            theirs = AutoTokenizer.from_pretrained(place)
        except (TypeError, ValueError, AttributeError):
            return  # what they cannot open may be opened or refused
        try:
            ours = load_tokenizer(place)
        except ValueError as error:
            assert said["gap"] and "do not belong together" in str(error)
            return
        added = theirs.backend_tokenizer.get_added_tokens_decoder()
        assert {i: repr(each) for i, each in ours.get_added_tokens_decoder().items()} == {
            i: repr(each) for i, each in added.items()
        }
        assert ours.encode(TEXT).ids == theirs(TEXT, add_special_tokens=False).input_ids
        assert load_special_tokens(place) == theirs.special_tokens_map


def test_a_table_of_a_name_that_only_some_models_have_must_say_what_it_is(tmp_path):
    """As transformers has it: else the ids of what comes behind it would be other ones."""
    (tmp_path / "tokenizer.json").write_text(vocabulary())
    size = Tokenizer.from_str(vocabulary()).get_vocab_size()
    for says, ids in (({}, (None, size)), ({"__type": "AddedToken"}, (size, size + 1))):
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "image_token": {"content": "<image>", "special": True} | says,
            "extra_special_tokens": ["<x>"],
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        loaded = load_tokenizer(tmp_path)
        assert (loaded.token_to_id("<image>"), loaded.token_to_id("<x>")) == ids
