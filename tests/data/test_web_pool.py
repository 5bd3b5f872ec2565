"""The labelled pool: shares, labels that hold, and no text on two sides."""

import zlib
from collections import Counter
from dataclasses import astuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_lite.data import packages, web_pool
from minicpm_lite.data.assets import load_conversations
from minicpm_lite.data.dedup import MinHash, jaccard, words_of
from minicpm_lite.data.web_pool import CLEAN, build_pool, load_web_documents, pieces_of


@pytest.fixture(scope="module")
def pool():
    pytest.importorskip("chitchat_dataset", reason="the conversations come in a package")
    return build_pool(scale=0.1)


@settings(deadline=None)
@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 30))
def test_pieces_are_short_and_lose_nothing_but_space_and_a_short_rest(text, size):
    pieces = list(pieces_of(text, size, shortest=1))
    assert all(len(piece) <= size for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_a_piece_ends_at_a_space_unless_there_is_none():
    assert list(pieces_of("abc def", 5, 1)) == ["abc", "def"]
    assert list(pieces_of("abcdefgh", 3, 1)) == ["abc", "def", "gh"]
    assert list(pieces_of("abc def", 5, shortest=4)) == ["abc", "def"]
    with pytest.raises(ValueError, match="size is 0"):
        list(pieces_of("abc def", 0))
    with pytest.raises(ValueError, match="shortest"):
        list(pieces_of("abc def", 3, shortest=0))


def test_what_one_caller_changes_is_no_one_elses(pool):
    changed = build_pool(scale=0.1)
    changed.held_out["books"] = ""
    assert build_pool(scale=0.1).held_out == pool.held_out != changed.held_out


def test_the_web_documents_are_eight_sources_of_fifty():
    assert set(Counter(document.source for document in load_web_documents()).values()) == {50}


def test_the_pool_is_that_of_the_first_edition(pool):
    """Recorded runs filtered these very documents."""

    def checksum(documents) -> int:
        return zlib.crc32(repr([astuple(document) for document in documents]).encode())

    assert checksum(pool.documents) == 2800130084 and checksum(pool.seeds) == 1608677458
    assert zlib.crc32(repr(pool.held_out).encode()) == 1703416223


def test_the_pool_is_the_same_again_and_another_for_another_seed(pool):
    web_pool._build_pool.cache_clear()
    assert build_pool(scale=0.1) == pool
    assert build_pool(seed=1, scale=0.1).documents != pool.documents


def test_about_half_is_clean_and_every_kind_is_there(pool):
    characters = Counter()
    for document in pool.documents:
        characters[document.source] += len(document.text)
    clean = sum(characters[source] for source in CLEAN) / characters.total()
    assert 0.4 < clean < 0.55
    assert set(characters) == {
        *CLEAN, "code", "Chinese", "shuffled words", "noisy letters", "keyword spam", "random words",
        "random characters", "half Chinese", "exact copy", "near copy",
    }  # fmt: skip


def test_copies_point_to_their_originals(pool):
    minhash = MinHash()
    for document in pool.documents:
        assert (document.original is not None) == ("copy" in document.source)
        if document.original is not None:
            original = pool.documents[document.original]
            assert original.clean and not document.clean
            similar = jaccard(minhash.shingles(original.text), minhash.shingles(document.text))
            assert similar == 1 if document.source == "exact copy" else similar > 0.3


def test_seeds_pool_and_held_out_share_no_text(pool):
    minhash = MinHash(shingle_size=8)
    texts = {
        "pool": "\n".join(document.text for document in pool.documents if document.clean),
        "seeds": "\n".join(document.text for document in pool.seeds),
        **pool.held_out,
    }
    shingles = {name: minhash.shingles(text) for name, text in texts.items()}
    for a in texts:
        for b in texts:
            if a < b:
                assert jaccard(shingles[a], shingles[b]) < 0.001, (a, b)


def test_shuffled_words_keep_the_words_and_lose_the_order(pool):
    texts = [document.text for document in pool.documents if document.source == "shuffled words"]
    known = {pair for d in pool.documents if d.clean for pair in _pairs(d.text)}
    clean = [d.text for d in pool.documents if d.source == "chat"]
    seen = [sum(p in known for p in _pairs(text)) / len(_pairs(text)) for text in (*texts, *clean)]
    assert sum(seen[: len(texts)]) / len(texts) < 0.5 < sum(seen[len(texts) :]) / len(clean)


def _pairs(text: str) -> list[tuple[str, str]]:
    words = words_of(text)
    return list(zip(words, words[1:], strict=False))


def test_a_missing_package_and_a_wrong_scale_get_one_sentence(monkeypatch):
    for scale in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"The scale of the pool is {scale}; it must be more than 0"):
            build_pool(scale=scale)

    def missing(package):
        raise packages.PackageNotFoundError(package)

    monkeypatch.setattr(packages, "distribution", missing)
    packages.package_file.cache_clear()
    load_conversations.cache_clear()
    with pytest.raises(
        ImportError, match="chitchat-dataset is needed .* pip install .chitchat-dataset==0.9.0"
    ):
        web_pool._build_pool.__wrapped__(0, 0.1)
    packages.package_file.cache_clear()


def test_pieces_hold_something():
    text = "one two" + " " * 40 + "three four"
    pieces = [*pieces_of(text, size=9, shortest=3)]
    assert pieces and all(pieces) and "".join("".join(pieces).split()) == "onetwothreefour"
