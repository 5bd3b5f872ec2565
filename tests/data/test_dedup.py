"""Hashes, signatures, bands, clusters; against datasketch, against exact counts, and against wrong versions."""

import random
import time

import jaxtyping
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minicpm_lite.data import dedup
from minicpm_lite.data.assets import load_austen
from minicpm_lite.data.dedup import (
    MinHash,
    candidate_pairs,
    clusters_of,
    estimated_jaccard,
    first_of_each,
    hashed_ngrams,
    jaccard,
    lsh_probability,
    lsh_threshold,
    near_duplicates,
    rows_of_band,
    words_of,
)

WORDS = load_austen()[10_000:400_000].split()
sets = st.sets(st.integers(0, 2**32 - 1), max_size=30).map(lambda s: np.array(sorted(s), np.uint64))


def document(number: int, words: int = 200) -> str:
    return " ".join(WORDS[number * words : (number + 1) * words])


def edited(text: str, share: float, rng: random.Random) -> str:
    words = text.split()
    for place in rng.sample(range(len(words)), round(share * len(words))):
        words[place] = f"edit{rng.random()}"
    return " ".join(words)


# --- words and shingles ---


def test_words_are_words_marks_and_single_chinese_characters():
    assert words_of("Well, it's 3.5%: 你好吗 naïve_x") == [
        "Well", ",", "it", "'", "s", "3", ".", "5", "%", ":", "你", "好", "吗", "naïve_x"
    ]  # fmt: skip
    assert words_of("  \n\t ") == []


@pytest.mark.parametrize(
    "word",
    ["हिन्दी", "தமிழ்", "বাংলা", "සිංහල", "श्\u200dरी", "می\u200cخواهم", "cafe\u0301", "שָׁלוֹם"],
    ids=["Hindi", "Tamil", "Bengali", "Sinhala", "joined", "not joined", "accent", "Hebrew"],
)
def test_signs_on_letters_cut_no_word(word):
    assert words_of(word) == [word]
    assert words_of(f"({word}, {word})") == ["(", word, ",", word, ")"]
    assert words_of(f"{word}你好") == [word, "你", "好"]


def test_a_sign_without_a_letter_is_a_mark():
    assert words_of("a \u0301 .\u0301") == ["a", "\u0301", ".", "\u0301"]


def test_one_string_is_no_words_and_no_set_an_array(monkeypatch):
    """Letters would be taken for words, and each set for one element."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for a reader
    with pytest.raises(TypeError, match="is one string"):
        hashed_ngrams("two words", 2)
    with pytest.raises(ValueError, match="size is 0"):
        hashed_ngrams(["two", "words"], 0)
    for pair in (({1, 2}, {2, 3}), (np.array([1]), [1]), (frozenset(), np.array([1]))):
        with pytest.raises(TypeError, match="expected sorted arrays"):
            jaccard(*pair)


@pytest.mark.parametrize("kind", [np.uint32, np.int64, np.uint64, ">u4"])
def test_signatures_of_every_number_format_make_the_same_pairs(kind):
    """As when they were kept as JSON."""
    signatures = np.array(
        [[1, 2, 3, 4], [1, 2, 9, 9], [1, 8, 3, 7], [7, 7, 1, 2], [1, 2, 5, 5], [6, 6, 5, 5]]
    )
    pairs = candidate_pairs(signatures.astype(kind), 2)
    assert pairs.tolist() == [[0, 1], [0, 4], [1, 4], [4, 5]]


@pytest.mark.parametrize(
    "text",
    [
        "今天天气很好我们一起去公园散步然后回家吃饭",
        "きょうはとてもいいてんきなのでコウエンマデさんぽに",
        "วันนี้อากาศดีมากเราไปเดินเล่นในสวนสาธารณะด้วยกัน",
        "ມື້ນີ້ອາກາດດີຫຼາຍພວກເຮົາໄປຍ່າງຫຼິ້ນຢູ່ສວນ",
        "ថ្ងៃនេះអាកាសធាតុល្អណាស់យើងទៅដើរលេងនៅសួនច្បារ",
        "ဒီနေ့ရာသီဥတုသာယာတယ်ပန်းခြံကိုသွားတယ်",
    ],
    ids=["Chinese", "Japanese", "Thai", "Lao", "Khmer", "Burmese"],
)
def test_where_no_spaces_stand_each_character_is_a_word(text):
    """Else a page would be one word, and a copy that lacks a letter another page."""
    assert words_of(text) == list(text) == words_of(" ".join(text))
    assert words_of(f"see {text}!") == ["see", *text, "!"]
    text = text * 3
    assert near_duplicates([text, text[:-4], text[::-1]]).tolist() == [0, 0, 2]


def test_a_run_has_the_same_hash_wherever_it_stands_and_another_when_reordered():
    words = ["a", "b", "c", "x", "a", "b", "c"]
    hashes = hashed_ngrams(words, 3)
    assert len(hashes) == 5 and hashes[0] == hashes[4]
    assert len({int(hashed_ngrams(list(order), 3)[0]) for order in ("abc", "acb", "bac", "cba")}) == 4
    assert hashed_ngrams(["a"], 2).tolist() == []
    assert hashes.max() < 2**32


def test_shingles_are_a_set_and_a_short_document_is_one_shingle():
    minhash = MinHash(shingle_size=3)
    assert len(minhash.shingles("a b c a b c")) == 3  # abc bca cab abc
    assert len(minhash.shingles("a b")) == 1
    assert len(minhash.shingles("")) == 0
    assert jaccard(minhash.shingles("a b"), minhash.shingles("a b")) == 1


# --- signatures ---


@given(st.lists(sets, max_size=6))
@settings(max_examples=30, deadline=None)
def test_a_signature_is_the_least_place_of_each_order_in_whole_numbers(hashes):
    """The definition, in Python's integers, which do not overflow."""
    minhash = MinHash(num_perm=8, seed=3)
    a, b = minhash.permutations.tolist()

    def spread(h):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = (h ^ (h >> shift)) * factor % 2**32
        return h ^ (h >> 16)

    expected = [
        [min((a[k] * spread(int(h)) + b[k]) % 2**32 for h in s) if len(s) else 2**32 - 1 for k in range(8)]
        for s in hashes
    ]
    found = minhash.signatures_of_sets(hashes)
    assert found.dtype == np.uint32 and found.shape == (len(hashes), 8)
    assert found.tolist() == expected


@pytest.mark.parametrize("num_perm", [16, 128])
def test_the_same_signatures_as_datasketch_bit_for_bit(num_perm):
    datasketch = pytest.importorskip("datasketch")
    ours = MinHash(num_perm=num_perm, seed=7)
    for number in range(20):
        shingles = ours.shingles(document(number))
        theirs = datasketch.MinHash(num_perm=num_perm, seed=7, scheme="affine32", hashfunc=int)
        theirs.update_batch(shingles.tolist())
        assert theirs.hashvalues.tolist() == ours.signatures_of_sets([shingles])[0].tolist()


def test_documents_at_a_time_do_not_matter(monkeypatch):
    texts = [document(number, words) for number, words in enumerate((5, 300, 1, 40, 900))] + ["", "two words"]
    together = MinHash().signatures(texts)
    monkeypatch.setattr(dedup, "_SHINGLES_AT_A_TIME", 1)
    assert (MinHash().signatures(texts) == together).all()
    assert (together[5] == 2**32 - 1).all()


def test_the_estimate_is_unbiased_with_the_variance_of_a_coin():
    """400 pairs at three overlaps: the mean within 3.5 standard errors, the spread within a fifth."""
    rng = np.random.default_rng(0)
    for overlap in (0.2, 0.5, 0.9):
        pairs, exact = [], []
        for _ in range(400):
            pool = rng.choice(2**32, 400, replace=False).astype(np.uint64)
            common = round(200 * 2 * overlap / (1 + overlap))
            pairs.append((np.sort(pool[:200]), np.sort(np.r_[pool[:common], pool[200 : 400 - common]])))
            exact.append(jaccard(*pairs[-1]))
        minhash = MinHash(num_perm=128, seed=1)
        left, right = (minhash.signatures_of_sets([pair[side] for pair in pairs]) for side in (0, 1))
        error = estimated_jaccard(left, right) - exact
        sigma = np.sqrt(overlap * (1 - overlap) / 128)
        assert abs(np.mean(exact) - overlap) < 0.01
        assert abs(error.mean()) < 3.5 * sigma / 20
        assert 0.8 < error.std() / sigma < 1.2
        assert np.mean(abs(error) < 3 * sigma) > 0.98


def test_an_even_multiplier_would_be_seen():
    """It halves the places again and again, so that different hashes fall on one: estimates rise."""
    minhash = MinHash(num_perm=64)
    broken = MinHash(num_perm=64)
    broken.permutations[0] = broken.permutations[0] << np.uint64(24) & np.uint64(0xFFFFFFFF)
    a, b = (np.sort(np.random.default_rng(s).choice(2**32, 500, False).astype(np.uint64)) for s in (0, 1))
    right = minhash.signatures_of_sets([a, b])
    wrong = broken.signatures_of_sets([a, b])
    assert estimated_jaccard(*right) < 0.05 < 0.5 < estimated_jaccard(*wrong)


def test_61_bit_multipliers_overflow_64_bits_unseen_and_ours_cannot():
    assert (2**61 - 2) * (2**32 - 1) > 2**64 > (2**32 - 1) * (2**32 - 1) + (2**32 - 1)
    assert MinHash().permutations.max() < 2**32
    assert (MinHash().permutations[0] % 2 == 1).all()


# --- bands ---


def test_the_curve_of_the_bands():
    assert lsh_probability(0.0, 16, 8) == 0 and lsh_probability(1.0, 16, 8) == 1
    assert lsh_probability(0.5, 1, 1) == 0.5
    assert np.isclose(lsh_probability(0.8, 20, 5), 0.99964, atol=1e-5)  # Mining of Massive Datasets, 3.4.2
    assert np.isclose(lsh_probability(0.5, 20, 5), 0.470, atol=1e-3)
    assert np.isclose(lsh_threshold(16, 4), 0.5)  # the same chapter


def test_pairs_are_found_as_often_as_the_curve_says():
    rng = np.random.default_rng(1)
    for similarity, bands in ((0.6, 16), (0.75, 16), (0.5, 32)):
        places = rng.integers(0, 2**32, (1000, 128), dtype=np.uint32)
        other = np.where(rng.random((1000, 128)) < similarity, places, places + np.uint32(1))
        found = candidate_pairs(np.concatenate([places, other]), bands)
        share = sum(b - a == 1000 for a, b in found.tolist()) / 1000
        expected = lsh_probability(similarity, bands, 128 // bands)
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 1000)


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), max_size=12), st.sampled_from([1, 2, 3, 6])
)
@settings(max_examples=60, deadline=None)
def test_candidates_are_exactly_the_pairs_that_agree_in_a_band(rows, bands):
    signatures = np.array(rows, np.uint32).reshape(-1, 6)
    cut = signatures.reshape(-1, bands, 6 // bands)
    expected = [
        [i, j] for i in range(len(rows)) for j in range(i + 1, len(rows)) if (cut[i] == cut[j]).all(-1).any()
    ]
    assert candidate_pairs(signatures, bands).tolist() == expected


# --- clusters ---


@given(st.integers(1, 20), st.data())
@settings(max_examples=60, deadline=None)
def test_clusters_are_connected_components(documents, data):
    places = st.integers(0, documents - 1)
    pairs = data.draw(st.lists(st.tuples(places, places), max_size=25))
    component = list(range(documents))
    for _ in range(documents):  # spread the least number along the pairs until nothing changes
        for a, b in pairs:
            component[a] = component[b] = min(component[a], component[b])
    assert clusters_of(documents, pairs).tolist() == component


def test_long_chains_are_no_deep_recursion():
    assert set(clusters_of(20_000, [(i, i + 1) for i in range(19_999)]).tolist()) == {0}


def test_planted_duplicates_are_found_and_strangers_are_not():
    """Of known strength: an edit of 1 word spoils 5 shingles, so J is known, and far from the threshold."""
    rng = random.Random(0)
    originals = [document(number) for number in range(150)]
    close = [edited(text, 0.01, rng) for text in originals[:50]]  # J about 0.9
    far = [edited(text, 0.15, rng) for text in originals[50:100]]  # J about 0.3
    labels = near_duplicates([*originals, *close, *far])
    assert labels[:150].tolist() == list(range(150))  # no two originals
    assert np.mean(labels[150:200] == np.arange(50)) > 0.95  # recall
    assert (labels[200:] == np.arange(200, 250)).all()  # precision


def test_verification_takes_back_what_the_bands_let_through():
    rng = random.Random(1)
    originals = [document(number) for number in range(60)]
    texts = originals + [edited(text, 0.06, rng) for text in originals]  # J about 0.6
    loose = near_duplicates(texts, bands=32, threshold=None)
    strict = near_duplicates(texts, bands=32, threshold=0.8)
    assert np.mean(loose[60:] < 60) > 0.9 and (strict == np.arange(120)).all()


def test_equal_texts_are_one_whatever_their_length():
    labels = near_duplicates(["", "hello?", "a b c", "", "hello?", "hello", "a b c"])
    assert labels.tolist() == [0, 1, 2, 0, 1, 5, 2]
    assert near_duplicates([]).tolist() == []


def test_a_hundred_copies_are_not_five_thousand_comparisons(monkeypatch):
    calls = []
    monkeypatch.setattr(dedup, "jaccard", lambda a, b: calls.append(1) or 1.0)
    assert set(near_duplicates([document(0)] * 100)) == {0} and calls == []


def test_pages_of_one_template_are_not_compared_with_each_other(monkeypatch):
    """Once they hang together, all pairs of a bucket would be n (n - 1) / 2 comparisons for nothing."""
    calls = []
    monkeypatch.setattr(dedup, "jaccard", lambda a, b: calls.append(1) or jaccard(a, b))
    page = document(0, 60)
    for pages in (50, 100, 200):
        calls.clear()
        assert set(near_duplicates([f"{page} item {number}" for number in range(pages)])) == {0}
        assert len(calls) < 3 * pages


def template_pages(pages: int, more: int = 0) -> list[str]:
    """120 words that all pages have and 18 that only one has, so J of about 0.73; sizes may differ, too."""
    shared = " ".join(f"w{place}" for place in range(120))
    return [shared + "".join(f" u{page}x{j}" for j in range(18 + page % (more + 1))) for page in range(pages)]


@pytest.mark.parametrize("more", [0, 12])
def test_pages_just_below_the_threshold_are_not_compared(monkeypatch, more):
    """Each of 300 agrees with nearly all others in a band: 40,000 comparisons, were all of them looked at."""
    calls = []
    monkeypatch.setattr(dedup, "jaccard", lambda a, b: calls.append(1) or jaccard(a, b))
    pages = template_pages(300, more)
    shingles = [MinHash().shingles(page) for page in pages]
    assert 0.6 < jaccard(shingles[0], shingles[-1]) < 0.8
    assert near_duplicates(pages).tolist() == list(range(300))
    assert len(calls) < 300


@pytest.mark.parametrize("share", [0.84, 0.9])  # of all pairs a few are alike, or many
def test_listings_are_compared_no_more_often_than_all_their_pairs(monkeypatch, share):
    """Pages of the same parts, each with others left out, share what is rarest in them many times over."""
    rng, words, meetings = random.Random(0), [f"w{number}" for number in range(500)], []
    meet = dedup._Linker._meet
    monkeypatch.setattr(dedup._Linker, "_meet", lambda *given: meetings.append(1) or meet(*given))
    parts = [" ".join(rng.choices(words, k=12)) for _ in range(40)]
    pages = [" ".join(part for part in parts if rng.random() < share) for _ in range(70)]
    minhash = MinHash()
    signatures, shingles = minhash.signatures(pages), [minhash.shingles(page) for page in pages]
    candidates = candidate_pairs(signatures, 16).tolist()
    alike = [(a, b) for a, b in candidates if jaccard(shingles[a], shingles[b]) >= 0.8]
    assert 0.02 < len(alike) / len(candidates) < 0.9
    assert near_duplicates(pages).tolist() == clusters_of(len(pages), alike).tolist()
    assert len(meetings) < sum(len(bucket) ** 2 for bucket in dedup._buckets(signatures, 16))


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40), st.integers(0, 12)), min_size=1, max_size=20),
    st.sampled_from([0.05, 0.3, 0.5, 0.75, 0.8, 0.9, 1.0]),
)
@example([(0, 0, 0), (0, 7, 0), (0, 7, 0)], 0.05)  # a set that is empty
@example([(0, 0, 0), (0, 14, 0), (0, 14, 0), (0, 0, 0)], 0.05)  # two of them are alike
@settings(max_examples=100, deadline=None)
def test_no_pair_above_the_threshold_is_missed(stretches, threshold):
    """Against all pairs: sets that overlap in every proportion, in one bucket."""
    sets = {
        number: np.unique(np.r_[start : start + length, 1000 + 20 * number : 1000 + 20 * number + own])
        for number, (start, length, own) in enumerate(stretches)
    }
    sets = {number: each.astype(np.uint64) for number, each in sets.items()}
    pairs = [(a, b) for a in sets for b in range(a) if jaccard(sets[a], sets[b]) >= threshold]
    expected = clusters_of(len(sets), pairs).tolist()
    linker, clusters = dedup._Linker(sets, threshold), dedup._Clusters(len(sets))
    linker(list(sets), clusters)
    assert clusters.labels().tolist() == expected
    if filled := [number for number in sets if len(sets[number])]:
        clusters = dedup._Clusters(len(sets))
        linker._compare_all(filled, clusters)
        assert clusters.labels()[filled].tolist() == [expected[number] for number in filled]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=14),
    st.sampled_from([None, 0.3, 0.6, 0.8]),
)
@settings(max_examples=60, deadline=None)
def test_clusters_are_those_of_all_candidate_pairs(versions, threshold):
    """By hand: every candidate pair compared, and what is similar joined."""
    texts = [edited(document(n, 40), 0.05 * edits, random.Random(edits)) for n, edits in versions]
    minhash = MinHash(num_perm=32)
    distinct = [index for index, text in enumerate(texts) if text not in texts[:index]]
    shingles = [minhash.shingles(texts[index]) for index in distinct]
    pairs = [(distinct[a], distinct[b]) for a, b in candidate_pairs(minhash.signatures_of_sets(shingles), 16)
             if threshold is None or jaccard(shingles[a], shingles[b]) >= threshold]  # fmt: skip
    copies = [(texts.index(text), index) for index, text in enumerate(texts)]
    expected = clusters_of(len(texts), pairs + copies)
    assert near_duplicates(texts, minhash, 16, threshold).tolist() == expected.tolist()


def test_documents_can_be_read_once_only():
    texts = [document(number) for number in (0, 1, 0, 2)]
    assert near_duplicates(iter(texts)).tolist() == [0, 1, 0, 3]
    minhash = MinHash()
    expected = minhash.signatures(texts)
    assert (minhash.signatures(iter(texts)) == expected).all()
    assert (minhash.signatures_of_sets(map(minhash.shingles, texts)) == expected).all()
    assert clusters_of(3, iter([(0, 2)])).tolist() == [0, 1, 0]
    assert first_of_each(iter("aba")).tolist() == [True, True, False]
    assert hashed_ngrams(iter("abc"), 2).tolist() == hashed_ngrams(list("abc"), 2).tolist()


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (
            lambda: clusters_of(5, [(-1, 0)]),
            ValueError,
            r"A pair is \(-1, 0\); expected documents from 0 to 4",
        ),
        (lambda: lsh_probability(80, 16, 8), ValueError, "similarity is 80; expected a part, from 0 to 1"),
        (lambda: clusters_of(5, [(0, 5)]), ValueError, r"A pair is \(0, 5\)"),
        (
            lambda: MinHash().signatures_of_sets([np.array([1])]),
            TypeError,
            "of type int64; expected an array of",
        ),
        (
            lambda: MinHash().signatures_of_sets([{1, 2}]),
            TypeError,
            "of type set; expected an array of np.uint64",
        ),
        (
            lambda: estimated_jaccard(np.zeros(8, np.uint32), np.zeros(16, np.uint32)),
            ValueError,
            "Signatures of 8 and 16 places",
        ),
    ],
)
def test_what_is_no_document_set_or_signature_is_refused(call, error, says, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for a reader
    with pytest.raises(error, match=says):
        call()


def test_first_of_each_keeps_the_first():
    labels = near_duplicates(["x y z", "q", "x y z", "q"])
    assert first_of_each(labels.tolist()).tolist() == [True, True, False, False]


@pytest.mark.slow  # a promise about scale: 100,000 documents take two minutes on one core, and time is linear
def test_25_000_short_documents_take_less_than_half_a_minute():
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=60)) for _ in range(25_000)]
    start = time.perf_counter()
    labels = near_duplicates(texts)
    assert time.perf_counter() - start < 30
    assert len(set(labels.tolist())) > 24_990


# --- what cannot be ---


def test_impossible_input_gets_one_sentence():
    with pytest.raises(ValueError, match="num_perm is 0"):
        MinHash(num_perm=0)
    with pytest.raises(ValueError, match="shingle_size is -1"):
        MinHash(shingle_size=-1)
    with pytest.raises(
        ValueError, match=r"Signatures of 128 places cannot be cut into 10 equal bands; .*divide 128"
    ):
        candidate_pairs(MinHash().signatures(["a"]), 10)
    with pytest.raises(ValueError, match="choose bands that divide 100, or a num_perm that 16 divides"):
        near_duplicates(iter(["a"]), MinHash(100))
    with pytest.raises(ValueError, match="bands is 0"):
        rows_of_band(128, 0)
    for threshold in (0.0, 1.2):
        with pytest.raises(ValueError, match=rf"The threshold is {threshold}; a Jaccard index"):
            near_duplicates(["a"], threshold=threshold)
    with pytest.raises(TypeError, match="A document is NoneType; it must be a string"):
        dedup._checked(None)
    assert lsh_threshold(1, 1) == 1
