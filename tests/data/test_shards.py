"""Shards: nothing is lost on the way to disk, and nothing damaged is read."""

import json
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from functools import lru_cache

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from minicpm_lite.data import shards as module
from minicpm_lite.data.shards import Shards, tokenizer_checksum, write_shards
from minicpm_lite.data.windows import TokenWindows
from minicpm_lite.language.tokenizer import BytePairTokenizer, train_tokenizer

TOKENS = np.random.default_rng(0).integers(0, 1000, 1000)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_TOKENS", 64)


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path / "corpus", [TOKENS], vocab_size=1000, shard_tokens=300)
    return tmp_path / "corpus"


@pytest.fixture(scope="module")
def folder_of_all(tmp_path_factory):
    """One for all examples of a test, which leaves it as it was."""
    folder = tmp_path_factory.mktemp("x") / "corpus"
    write_shards(folder, [TOKENS], vocab_size=1000, shard_tokens=300)
    without(folder, "checksum")  # which would notice all changes of the index, and older ones have none
    return folder


@pytest.mark.slow  # many shards
@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 1000), max_size=8), shard=st.integers(1, 1200), stretch=st.slices(1000))
def test_what_is_written_is_read(tmp_path_factory, cuts, shard, stretch):
    stretch = slice(*stretch.indices(1000)[:2])
    documents = np.split(TOKENS, sorted(cuts))
    shards = write_shards(tmp_path_factory.mktemp("x") / "corpus", documents, 1000, shard_tokens=shard)
    assert len(shards) == 1000
    assert shards[stretch].tolist() == TOKENS[stretch].tolist()
    assert shards.id_range() == (TOKENS.min(), TOKENS.max())
    assert [each["tokens"] for each in shards._shards[:-1]] == [shard] * (len(shards._shards) - 1)
    shards.verify()


def test_shards_go_to_other_processes(folder):
    shards = Shards(folder)
    windows = pickle.loads(pickle.dumps(TokenWindows(shards, 8, 0)))
    assert windows.identity() == TokenWindows(shards, 8, 0).identity()
    assert torch.equal(windows[5], TokenWindows(shards, 8, 0)[5])


def test_more_shards_than_a_program_may_open(tmp_path, monkeypatch):
    """What is mapped takes a descriptor of the process; a terabyte is thousands of shards."""
    monkeypatch.setattr(Shards, "_array", lru_cache(3)(Shards._array.__wrapped__))
    ids, before = torch.arange(40), len(os.listdir("/proc/self/fd"))
    folders = [write_shards(tmp_path / name, [ids], 40, shard_tokens=4) for name in ("one", "other", "third")]
    for stretch in (slice(None), slice(1, 39), slice(2, 5), slice(30, 31)):
        for shards in folders:
            assert torch.equal(shards[stretch], ids[stretch])
    assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_a_shard_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    write_shards(tmp_path / "shards", [[1, 2, 3]], 10)

    def too_many(path, mode):
        raise OSError(24, "Too many open files", str(path))

    monkeypatch.setattr(np.lib.format, "open_memmap", too_many)
    with pytest.raises(OSError, match="Too many open files"):
        Shards(tmp_path / "shards")


def test_tensors_lists_and_arrays_are_taken(tmp_path):
    shards = write_shards(tmp_path / "x", iter([[1, 2], torch.tensor([3]), np.array([4], np.uint8), []]), 10)
    assert shards[:].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_the_number_format_follows_from_the_vocabulary(tmp_path, vocab_size, dtype):
    """The largest id must survive: as uint16, 65,536 would come back as 0."""
    shards = write_shards(tmp_path / "x", [[0, vocab_size - 1]], vocab_size)
    assert np.load(tmp_path / "x" / "tokens-00000.npy").dtype == dtype
    assert shards[:].tolist() == [0, vocab_size - 1]


def test_ids_that_32_bits_cannot_hold_are_refused(tmp_path):
    """As uint32, 2^32 would come back as 0."""
    assert write_shards(tmp_path / "x", [[2**32 - 1]], 2**32)[:].tolist() == [2**32 - 1]
    with pytest.raises(ValueError, match="vocab_size is 4294967297; ids are written with 32 bits"):
        write_shards(tmp_path / "y", [[2**32]], 2**32 + 1)


def test_a_link_to_an_empty_folder_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    write_shards(tmp_path / "link", [TOKENS], 1000)
    assert (tmp_path / "link").is_symlink()
    assert Shards(tmp_path / "disk")[:].tolist() == TOKENS.tolist()


def test_the_working_directory_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unread = iter([TOKENS])
    with pytest.raises(FileExistsError, match="is the working directory"):
        write_shards(".", unread, 1000)
    assert list(unread) and not any(tmp_path.iterdir())
    assert len(write_shards("x", [TOKENS], 1000)) == len(TOKENS)


def test_shards_are_plain_npy_files(folder):
    assert (
        np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))]).tolist() == TOKENS.tolist()
    )


def test_memory_is_bounded(tmp_path, monkeypatch):
    """Eight million tokens from a generator, with blocks of 64 thousand: the peak is a block, not the corpus."""
    monkeypatch.setattr(module, "_BLOCK_TOKENS", 1 << 16)
    document = np.arange(1 << 15, dtype=np.int64) % 1000
    tracemalloc.start()
    shards = write_shards(tmp_path / "x", (document for _ in range(256)), 1000, shard_tokens=1 << 20)
    windows = TokenWindows(shards, 128, 0)
    for index in range(100):
        windows[index]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(shards) == 1 << 23
    assert peak < 4e6


# What does not fit is refused with a sentence.


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ([[1, 2], [3, 1000]], "Array 1 holds the id 1000; the vocabulary has ids from 0 to 999"),
        ([[1, -2]], "Array 0 holds the id -2"),
        ([[0.5]], "Array 0 has 1 dimensions and the type float64; expected token ids"),
        ([[[1]]], "Array 0 has 2 dimensions"),
        ([[1], [[1], [2, 3]]], "Array 1 has rows of different lengths; expected token ids"),
        ([[True]], "the type bool"),
        ([[], []], "There was no token to write"),
    ],
)
def test_arrays_that_are_no_tokens(tmp_path, arrays, sentence):
    with pytest.raises(ValueError, match=sentence):
        write_shards(tmp_path / "x", iter(arrays), 1000)
    assert list(tmp_path.iterdir()) == [], "nothing half-written is left"


@pytest.mark.slow  # takes long where it fails, and a second where not
def test_short_documents_are_not_counted_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_TOKENS", 1 << 16)
    started = time.process_time()
    made = write_shards(tmp_path / "x", ([number % 1000] for number in range(1 << 16)), 1000)
    assert time.process_time() - started < 20, "it takes a second; counting anew, minutes"
    assert len(made) == 1 << 16


def test_a_folder_that_holds_something_is_not_touched(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="already holds something"):
        write_shards(folder, [TOKENS], 1000)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_full_disk(tmp_path, monkeypatch):
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="corpus could not be written: No space left on device"):
        write_shards(tmp_path / "corpus", [TOKENS], 1000, shard_tokens=300)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_no_corpus_and_in_no_ones_way(tmp_path):
    (tmp_path / ".corpus.writing").mkdir()
    (tmp_path / ".corpus.writing" / "tokens-00000.npy").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="There is no shards.json"):
        Shards(tmp_path / "corpus")
    write_shards(tmp_path / "corpus", [TOKENS], 1000).verify()
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@settings(max_examples=20, deadline=None)
@given(turns=st.lists(st.integers(0, 2), max_size=12))
def test_of_several_writers_of_one_folder_one_writes_it(tmp_path_factory, turns):
    """In any order of their steps: the first to begin is not disturbed, whoever comes meanwhile is refused."""
    folder = tmp_path_factory.mktemp("x") / "corpus"
    steps, said = [threading.Semaphore(0) for _ in range(3)], [None] * 3
    begun = [threading.Event() for _ in range(3)]

    def write(writer):
        def arrays():
            for _ in range(4):
                begun[writer].set()
                steps[writer].acquire()
                yield np.full(100, writer)

        try:
            said[writer] = write_shards(folder, arrays(), 1000, shard_tokens=150)
        except FileExistsError as error:
            said[writer] = error
            begun[writer].set()

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(3)]
    for writer in dict.fromkeys([*turns, 0, 1, 2]):
        writers[writer].start()
        begun[writer].wait(10)
        for turn in turns:
            if turn == writer:
                steps[turn].release()
    for writer in range(3):
        steps[writer].release(10)
        writers[writer].join(10)
    assert sum(isinstance(each, Shards) for each in said) == 1
    shards = Shards(folder)
    shards.verify()
    winner = next(writer for writer in range(3) if isinstance(said[writer], Shards))
    assert set(shards[:].tolist()) == {winner} and len(shards) == 400
    refusals = ("is being written by another program", "already holds something")
    refused = [str(each) for each in said if not isinstance(each, Shards)]
    assert all(any(each in sentence for each in refusals) for sentence in refused)
    assert [path.name for path in folder.parent.iterdir()] == ["corpus"]


@pytest.mark.slow  # a process starts that imports torch; tests/test_files.py looks at the same lock
def test_a_writer_that_was_killed_locks_nothing(tmp_path):
    program = (
        "import os, sys\nfrom minicpm_lite.data.shards import write_shards\n"
        "def arrays():\n    yield [1]\n    os._exit(9)\nwrite_shards(sys.argv[1], arrays(), 10)"
    )
    assert subprocess.run([sys.executable, "-c", program, tmp_path / "corpus"]).returncode == 9
    write_shards(tmp_path / "corpus", [TOKENS], 1000).verify()
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_file_in_the_folder_s_place_is_not_touched(tmp_path):
    (tmp_path / "corpus").write_text("mine")
    with pytest.raises(FileExistsError, match="corpus is no folder"):
        write_shards(tmp_path / "corpus", [TOKENS], 1000)
    assert (tmp_path / "corpus").read_text() == "mine"


def test_an_error_of_the_source_stays_the_source_s(tmp_path):
    def arrays():
        yield [1]
        yield (tmp_path / "no such text").read_bytes()

    with pytest.raises(FileNotFoundError, match="no such text"):
        write_shards(tmp_path / "x", arrays(), 1000)
    assert list(tmp_path.iterdir()) == []


def damaged(folder, what):
    first, index = folder / "tokens-00000.npy", folder / "shards.json"
    if what == "missing":
        first.unlink()
    elif what == "extra":
        np.save(folder / "tokens-00009.npy", np.zeros(3, np.uint16))
    elif what == "truncated":
        first.write_bytes(first.read_bytes()[:-10])
    elif what == "header cut":
        first.write_bytes(first.read_bytes()[:20])
    elif what == "too long":
        first.write_bytes(first.read_bytes() + b"12")
    elif what == "other type":
        np.save(first, np.load(first).astype(np.int64))
    elif what == "other shape":
        np.save(first, np.load(first)[:-1])
    elif what == "pickle":
        np.save(first, np.array([{}], dtype=object), allow_pickle=True)
    elif what == "archive":
        with first.open("wb") as file:
            np.savez(file, np.zeros(3))
    elif what == "no index":
        index.unlink()
    elif what == "no JSON":
        index.write_text("{")
    elif what == "deep JSON":
        index.write_text("[" * 100_000)
    else:
        content = json.loads(index.read_text())
        if what == "foreign":
            content["format"] = "something else"
        elif what == "later version":
            content["version"] = 2
        elif what == "a checksum less":
            content["shards"][0]["checksums"].pop()
        elif what == "unknown type":
            content["dtype"] = "float32"
        elif what == "an end that is no id":
            content["end"] = 1000
        index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("missing", "tokens-00000.npy is missing; shards.json says it holds 300 tokens"),
        ("extra", "tokens-00009.npy is not in shards.json"),
        ("truncated", "tokens-00000.npy is not a whole .npy file.*truncated"),
        ("header cut", "tokens-00000.npy is not a whole .npy file"),
        ("too long", "is longer than its 300 tokens"),
        ("other type", r"holds an array of type int64 and shape \(300,\); shards.json says uint16"),
        ("other shape", r"shape \(299,\); shards.json says uint16 and \(300,\)"),
        ("pickle", "tokens-00000.npy is not a whole .npy file"),
        ("archive", "tokens-00000.npy is not a whole .npy file"),
        ("no index", "There is no shards.json in"),
        ("no JSON", "shards.json is not an index of token shards, version 1"),
        ("deep JSON", "shards.json is not an index of token shards, version 1"),
        ("an end that is no id", "is not an index of token shards"),
        ("foreign", "is not an index of token shards"),
        ("later version", "is not an index of token shards"),
        ("a checksum less", "is not an index of token shards"),
        ("unknown type", "is not an index of token shards"),
    ],
)
def test_damage_that_is_seen_at_once(folder, what, sentence):
    damaged(folder, what)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
        Shards(folder)
    assert "\n" not in str(caught.value)


ODD = [None, True, 0, -1, 1.5, 2**70, "x", "../x", "\0", [], {}, [1], "tokens-00001.npy", float("nan"), 64]


def places_of(value, place=()):
    """Every place in what JSON gave, as the keys that lead there."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield place
    for key, each in inside:
        yield from places_of(each, (*place, key))


def without(folder, *fields):
    """Take fields out of the index, as older ones lack them."""
    index = json.loads((folder / "shards.json").read_text())
    for field in fields:
        del index[field]
    (folder / "shards.json").write_text(json.dumps(index))


def read_or_refused(folder):
    """The right tokens, or one sentence."""
    try:
        shards = Shards(folder)
        shards.id_range(), shards.identity(), shards.verify()
        assert shards[:].tolist() == TOKENS.tolist()
    except (ValueError, FileNotFoundError) as error:
        assert str(error).endswith((".", "?")) and "\n" not in str(error)


def test_an_index_with_any_value_exchanged_is_read_or_refused(folder):
    without(folder, "checksum")  # which would notice all of them, and older folders have none
    whole = (folder / "shards.json").read_text()
    for place in places_of(json.loads(whole)):
        for odd in ODD:
            index = box = {"index": json.loads(whole)}
            *path, last = ("index", *place)
            for key in path:
                box = box[key]
            box[last] = odd
            (folder / "shards.json").unlink()  # some systems wait for the disk where a file is written again
            (folder / "shards.json").write_text(json.dumps(index["index"]))
            read_or_refused(folder)


def test_any_value_of_an_index_that_is_exchanged_for_another_is_noticed(folder):
    whole = (folder / "shards.json").read_text()
    assert "checksum" in json.loads(whole)
    for place in places_of(json.loads(whole)):
        index = box = {"index": json.loads(whole)}
        *path, last = ("index", *place)
        for key in path:
            box = box[key]
        if isinstance(box[last], str | dict | list):
            continue  # of another type it is no index
        box[last] = 7
        (folder / "shards.json").write_text(json.dumps(index["index"]))
        with pytest.raises(ValueError, match="shards.json is not"):
            Shards(folder)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(["shards.json", "tokens-00000.npy"]),
    place=st.integers(0, 700),
    new=st.binary(max_size=3) | st.sampled_from([b"{", b"[", b"(", b'"', b"1", b"\n"]),
    gone=st.integers(0, 9),
)
def test_files_with_some_bytes_exchanged_are_read_or_refused(folder_of_all, name, place, new, gone):
    file = folder_of_all / name
    whole = file.read_bytes()
    file.unlink()
    try:
        file.write_bytes(whole[:place] + new + whole[place + gone :])
        read_or_refused(folder_of_all)
    finally:
        file.unlink(missing_ok=True)
        file.write_bytes(whole)


def test_another_vocabulary(folder):
    assert Shards(folder, vocab_size=1000).vocab_size == 1000
    with pytest.raises(ValueError, match="written for a vocabulary of 1000 ids; this model's has 1024"):
        Shards(folder, vocab_size=1024)


def test_one_flipped_bit_is_noticed_when_it_is_touched(folder):
    path = folder / "tokens-00001.npy"
    content = bytearray(path.read_bytes())
    content[-2 * (300 - 100)] ^= 1  # token 100 of the second shard, token 400 of the stream
    path.write_bytes(content)
    shards = Shards(folder)
    assert shards[:364].tolist() == TOKENS[:364].tolist(), "what is whole can be read"
    with pytest.raises(ValueError, match="tokens-00001.npy is damaged: its tokens 64 to 127 do not have"):
        shards[364:365]
    with pytest.raises(ValueError, match="tokens-00001.npy is damaged"):
        shards.verify()


def test_each_block_is_checked_once(folder, monkeypatch):
    shards, checked = Shards(folder), []
    crc32 = module.zlib.crc32
    monkeypatch.setattr(module.zlib, "crc32", lambda data: checked.append(len(data)) or crc32(data))
    shards[0:65]
    shards[10:100]
    assert checked == [128, 128], "two blocks of 64 tokens, two bytes each"
    shards.verify()
    assert len(checked) == 2 + 3 * 5 + 2, "all of them, those that were read before once more"
    shards[0:65]
    assert len(checked) == 2 + 3 * 5 + 2


def test_a_single_place_is_no_stretch(folder, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # whose check would come before
    with pytest.raises(TypeError, match=r"read in stretches, such as \[0:512\]; got \[5\]"):
        Shards(folder)[5]


def test_a_stretch_with_steps_is_refused(folder):
    with pytest.raises(ValueError, match="has a step of 2"):
        Shards(folder)[0:10:2]


def test_the_end_token_is_noted(tmp_path, folder):
    shards = write_shards(tmp_path / "x", [[5, 0], [6, 0]], 10, end=0)
    assert shards.end == Shards(tmp_path / "x").end == 0
    assert Shards(folder).end is None
    plain = write_shards(tmp_path / "y", [[5, 0], [6, 0]], 10)
    assert shards.identity() == plain.identity(), "what is read is the same"


def test_an_end_that_no_array_holds_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="The end token is 0, and no array holds it, .* behind the ids of each"
    ):
        write_shards(tmp_path / "x", [[5], [6]], 10, end=0)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("end", [10, -1, True, 1.0, "1", np.int64(1)])
def test_an_end_that_is_no_id_is_refused_before_anything_is_written(tmp_path, monkeypatch, end):
    """What JSON does not know, or what the folder would be refused for when it is read."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # whose check would come before
    arrays = iter([[1], [2]])
    with pytest.raises(ValueError, match=f"The end token is {re.escape(repr(end))}; expected an id .* to 9"):
        write_shards(tmp_path / "z", arrays, 10, end=end)
    assert next(arrays) == [1] and not (tmp_path / "z").exists()


def test_folders_that_do_not_say_how_documents_end_are_read(folder):
    without(folder, "end", "checksum")
    assert Shards(folder).end is None and Shards(folder)[:].tolist() == TOKENS.tolist()


def test_the_tokenizer_is_noted(tmp_path):
    tokenizer = train_tokenizer("Emma Woodhouse, handsome, clever, and rich " * 9, 270)
    shards = write_shards(tmp_path / "x", [tokenizer.encode("Emma").ids], 512, tokenizer)
    assert shards.tokenizer == tokenizer_checksum(tokenizer) == shards.identity()["tokenizer"]
    assert tokenizer_checksum(train_tokenizer("Sense and Sensibility " * 9, 270)) != shards.tokenizer
    with pytest.raises(ValueError, match="The tokenizer gives ids up to 269 and vocab_size is 269"):
        write_shards(tmp_path / "y", [[1]], 269, tokenizer)


def test_a_vocabulary_with_gaps_needs_a_row_for_its_largest_id(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 9}, unk_token="a"))
    with pytest.raises(ValueError, match="gives ids up to 9 and vocab_size is 9"):
        write_shards(tmp_path / "x", [[0]], 9, tokenizer)
    assert len(write_shards(tmp_path / "x", [[0]], 10, tokenizer)) == 1


def test_a_tokenizer_that_was_written_and_read_is_the_same(tmp_path):
    """Of Unigram's scores a digit is lost on the way."""
    tokenizer = Tokenizer(models.Unigram([(f"w{i}", -(i**0.5)) for i in range(99)], 0, False))
    assert Tokenizer.from_str(tokenizer.to_str()).to_str() != tokenizer.to_str(), "as it is today"
    shards = write_shards(tmp_path / "x", [[1]], 100, tokenizer)
    shards.verify()
    assert tokenizer_checksum(tokenizer) == shards.tokenizer
    assert tokenizer_checksum(Tokenizer.from_file(str(shards.tokenizer_file()))) == shards.tokenizer


@pytest.fixture
def with_tokenizer(tmp_path):
    tokenizer = train_tokenizer("Emma Woodhouse, handsome, clever, and rich " * 9, 270)
    return write_shards(tmp_path / "x", [tokenizer.encode("Emma").ids], 512, tokenizer)


def test_the_tokenizer_beside_the_tokens_is_the_one_that_is_noted(with_tokenizer):
    file = with_tokenizer.folder / "tokenizer.json"
    with_tokenizer.verify()
    assert with_tokenizer.tokenizer_file() == file
    content = json.loads(file.read_text())
    ids = content["model"]["vocab"]
    ids["A"], ids["B"] = ids["B"], ids["A"]
    file.write_text(json.dumps(content))
    for read in (with_tokenizer.verify, with_tokenizer.tokenizer_file):
        with pytest.raises(ValueError, match=r"tokenizer.json is not the tokenizer that made the ids"):
            read()
    file.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json is not the tokenizer that made the ids"):
        with_tokenizer.tokenizer_file()
    file.unlink()
    assert with_tokenizer.tokenizer_file() is None and len(with_tokenizer[:]), "the tokens can be read"
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json is missing"):
        with_tokenizer.verify()


@pytest.mark.parametrize("change", [lambda t: None, lambda t: t.enable_truncation(9)])
def test_a_tokenizer_that_is_spelt_otherwise_is_the_one_that_is_noted(with_tokenizer, change):
    """As the package itself saves it, with indents; or released, with a limit of length."""
    file = with_tokenizer.folder / "tokenizer.json"
    tokenizer, before = Tokenizer.from_file(str(file)), file.read_bytes()
    change(tokenizer)
    tokenizer.save(str(file))
    assert with_tokenizer.tokenizer_file().read_bytes() != before
    with_tokenizer.verify()


def test_a_tokenizer_that_was_not_noted_is_taken_as_it_lies(folder):
    (folder / "tokenizer.json").write_text("{}")
    assert Shards(folder).tokenizer is None
    assert Shards(folder).tokenizer_file() == folder / "tokenizer.json"


def test_the_checksum_of_a_tokenizer_is_that_of_how_it_cuts_whole_texts():
    """Cutting and padding are no part of it; without them it is what the first edition noted."""
    tokenizer = train_tokenizer("Emma Woodhouse, handsome, clever, and rich " * 9, 270)
    plain = tokenizer_checksum(tokenizer)
    assert plain == zlib.crc32(tokenizer.to_str().encode())
    tokenizer.enable_truncation(4)
    assert tokenizer_checksum(tokenizer) == plain
    tokenizer.enable_padding(length=7)
    assert tokenizer_checksum(tokenizer) == plain
    assert tokenizer.truncation and tokenizer.padding, "it is left as it was"


def test_the_tokenizer_from_scratch_is_taken(tmp_path):
    tokenizer = BytePairTokenizer.train(["Emma Woodhouse, handsome, clever, and rich " * 9], 270)
    shards = write_shards(tmp_path / "x", [tokenizer.encode("Emma")], 512, tokenizer)
    assert shards.tokenizer == tokenizer_checksum(tokenizer) == tokenizer_checksum(tokenizer.fast)
    with pytest.raises(ValueError, match=r"The tokenizer gives ids up to \d+ and vocab_size is 256"):
        write_shards(tmp_path / "y", [[1]], 256, tokenizer)


def test_identity_tells_corpora_apart(tmp_path):
    def identity(name, tokens, **changes):
        return write_shards(tmp_path / name, [tokens], **(dict(vocab_size=1000) | changes)).identity()

    one = identity("a", TOKENS)
    assert one == identity("b", TOKENS) == json.loads(json.dumps(one))
    others = [identity("c", TOKENS[::-1]), identity("d", TOKENS, vocab_size=1001), identity("e", TOKENS[:-1])]
    assert one not in others


@pytest.mark.parametrize("score", [-4.5855530131160184e-09, -4.585553013116018e-09, -1.5])
def test_scores_that_never_come_back_the_same_have_one_checksum(score, tmp_path):
    """The package reads one number and writes another, and then the first one again."""
    made = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", score)], 0, False))
    read = Tokenizer.from_str(made.to_str())
    assert tokenizer_checksum(made) == tokenizer_checksum(read)
    written = write_shards(tmp_path / "shards", [[1, 1]], 2, made)
    assert written[:].tolist() == [1, 1] and (tmp_path / "shards" / "tokenizer.json").is_file()


def test_the_home_directory_has_its_short_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_shards("~/shards", [[1, 1]], 2)
    assert (tmp_path / "shards").is_dir() and not (tmp_path / "~").exists()
    assert len(Shards("~/shards")) == 2


def test_what_was_whole_once_is_read_again_when_it_is_verified(tmp_path):
    shards = write_shards(tmp_path / "shards", [np.arange(50)], 60)
    shards.verify()
    file = shards.folder / "tokens-00000.npy"
    with open(file, "r+b") as opened:
        opened.seek(-1, 2)
        last = opened.read(1)[0]
        opened.seek(-1, 2)
        opened.write(bytes([last ^ 1]))
    with pytest.raises(ValueError, match="tokens-00000.npy"):
        shards.verify()


@pytest.mark.parametrize(
    "array", [torch.ones(3).bfloat16(), torch.ones(3, requires_grad=True), torch.ones(3, dtype=torch.bool)]
)
def test_tensors_of_no_ids_are_refused(array, tmp_path):
    with pytest.raises(ValueError, match="expected token ids, whole numbers in one dimension"):
        write_shards(tmp_path / "shards", [array], 60)
