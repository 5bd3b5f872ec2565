"""Normalisation, languages, the classifier, the perplexity filter and the whole pipeline."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import KINDS, LACKING
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from minicpm_lite import optional
from minicpm_lite.config import ModelConfig
from minicpm_lite.data import filtering
from minicpm_lite.data.assets import load_austen, load_chinese_classics
from minicpm_lite.data.dedup import MinHash, near_duplicates
from minicpm_lite.data.filtering import (
    QualityClassifier,
    area_under_roc,
    bits_per_byte,
    drop_reasons,
    identify_languages,
    normalise,
)
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.scoring import token_losses
from minicpm_lite.language.tokenizer import BytePairTokenizer, reading_all_as_text, train_tokenizer

PROSE = normalise(load_austen()[20_000:320_000])
PIECES = [PROSE[start : start + 600] for start in range(0, len(PROSE), 600)]


def shuffled(text: str, seed: int = 0) -> str:
    words = text.split()
    return " ".join(random.Random(seed).sample(words, len(words)))


GOOD, BAD = PIECES[:150], [shuffled(text) for text in PIECES[150:300]]
NEW_GOOD, NEW_BAD = PIECES[300:395], [shuffled(text) for text in PIECES[400:495]]


@pytest.fixture(scope="module")
def classifier():
    return QualityClassifier(dim=16, lr=1.0, epochs=40).fit(GOOD, BAD)


# --- normalisation ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A  B", "a b"),
        ("a\n\n\n \nb", "a\nb"),
        ("a\tb\r\nc", "a\tb\r\nc"),
        ("Ünïcödé Ångström ﬁ", "unicode angstrom ﬁ"),
        ("No\u00a0break", "no break"),
        ("你好", "你好"),
        ("한국어", "한국어"),  # decomposed and put together again
        ("  \n a \n ", "a"),
        ("", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


@settings(deadline=None)
@given(st.text(max_size=80))
def test_normalising_twice_changes_nothing_more(text):
    once = normalise(text)
    assert normalise(once) == once
    assert "\n\n" not in once and "  " not in once


# --- languages ---


def test_languages():
    english, chinese = load_austen()[5000:5400], load_chinese_classics()[:200]
    french = "Le chat est assis sur la table et regarde par la fenêtre, comme tous les jours de la semaine."
    assert identify_languages([english, chinese, french, ""]) == ["en", "zh", "fr", "und"]
    assert identify_languages(["12345 67890", "?!", "\n", "qzx"]) == ["und"] * 4
    assert identify_languages(["hello"], least=1.0) == ["und"]
    with pytest.raises(ValueError, match="least is 50.0; expected a number from 0 to 1"):
        identify_languages(["hello"], least=50.0)
    assert identify_languages([]) == []


def test_a_missing_package_is_one_sentence(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name=name.split(".")[0])

    monkeypatch.setattr(optional, "import_module", missing)
    filtering._language_identifier.cache_clear()
    with pytest.raises(
        ImportError, match=r"'py3langid.langid' is needed to tell languages apart. .*pip install"
    ):
        identify_languages(["hello"])
    filtering._language_identifier.cache_clear()


# --- the classifier ---


def test_it_learns_word_order_and_one_that_sees_single_words_cannot(classifier):
    """Shuffling keeps every word, so only runs of words tell the two apart."""
    single = QualityClassifier(dim=16, lr=1.0, epochs=40, ngrams=1).fit(GOOD, BAD)
    assert area_under_roc(classifier.scores(NEW_GOOD), classifier.scores(NEW_BAD)) > 0.95
    assert 0.2 < area_under_roc(single.scores(NEW_GOOD), single.scores(NEW_BAD)) < 0.8


def test_its_first_step_is_the_gradient_that_autograd_finds():
    """One document, two steps: the second is the first whose embeddings move."""
    bag = [(np.array([0, 2]), np.array([2.0, 1.0], np.float32), 4)]  # one unseen run counts in the mean
    ours = QualityClassifier(dim=3, lr=0.5, epochs=2)
    ours.known = np.arange(3, dtype=np.uint64)
    weights = ours._train(bag, np.array([1.0]))
    rng = np.random.default_rng(0)
    table = torch.tensor(rng.uniform(-1 / 3, 1 / 3, (3, 3)).astype(np.float32), requires_grad=True)
    output = torch.zeros(2, 3, requires_grad=True)
    for rate in (0.5, 0.25):
        hidden = (2 * table[0] + table[2]) / 4
        loss = torch.nn.functional.cross_entropy((output @ hidden)[None], torch.tensor([1]))
        for parameter, gradient in zip(
            (table, output), torch.autograd.grad(loss, (table, output)), strict=True
        ):
            parameter.data -= rate * gradient
    expected = (table @ (output[1] - output[0])).detach().numpy()
    np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow  # trains two classifiers
def test_the_same_seed_gives_the_same_classifier_and_scores_are_probabilities(classifier):
    again = QualityClassifier(dim=16, lr=1.0, epochs=40).fit(GOOD, BAD)
    assert (again.weights == classifier.weights).all()
    scores = classifier.scores([*NEW_GOOD, "", "zzyx", "好"])
    assert ((scores >= 0) & (scores <= 1)).all()
    assert scores[-3:].tolist() == [0.5] * 3  # nothing known


@pytest.mark.slow  # scikit-learn is imported; with autograd the test above looks at the same
def test_as_good_as_logistic_regression_on_the_same_features(classifier):
    linear_model = pytest.importorskip("sklearn.linear_model")
    sparse = pytest.importorskip("scipy.sparse")

    def matrix(texts):
        rows, columns, values = [], [], []
        for row, text in enumerate(texts):
            known, repeats, size = classifier._rows(classifier._features(text))
            rows += [row] * len(known)
            columns += known.tolist()
            values += (repeats / size).tolist()
        return sparse.csr_matrix((values, (rows, columns)), (len(texts), len(classifier.known)))

    reference = linear_model.LogisticRegression(C=1e4, max_iter=500)
    reference.fit(matrix(GOOD + BAD), [1] * len(GOOD) + [0] * len(BAD))
    theirs = reference.decision_function(matrix(NEW_GOOD + NEW_BAD))
    ours = classifier.scores(NEW_GOOD + NEW_BAD)
    difference = area_under_roc(ours[:95], ours[95:]) - area_under_roc(theirs[:95], theirs[95:])
    assert abs(difference) < 0.02
    assert np.corrcoef(np.argsort(np.argsort(ours)), np.argsort(np.argsort(theirs)))[0, 1] > 0.9


def test_as_good_as_fasttext(classifier, tmp_path):
    fasttext = pytest.importorskip("fasttext", reason="it has no wheel for Python 3.12 and newer")
    from minicpm_lite.data.dedup import words_of

    lines = [f"__label__{label} {' '.join(words_of(text))}" for label, side in (("good", GOOD), ("bad", BAD))
             for text in side]  # fmt: skip
    random.Random(0).shuffle(lines)
    path = tmp_path / "train.txt"
    path.write_text("\n".join(lines) + "\n")
    reference = fasttext.train_supervised(
        str(path), dim=16, lr=1.0, epoch=40, wordNgrams=3, minCount=5, bucket=200_000, thread=1, verbose=0
    )

    def score(text):  # through the binding below fasttext's own wrapper, which fails on numpy 2
        return {
            name: p for p, name in reference.f.predict(" ".join(words_of(text)) + "\n", 2, 0.0, "strict")
        }["__label__good"]

    theirs = [score(text) for text in NEW_GOOD + NEW_BAD]
    ours = classifier.scores(NEW_GOOD + NEW_BAD)
    assert area_under_roc(ours[:95], ours[95:]) > area_under_roc(theirs[:95], theirs[95:]) - 0.02
    assert np.corrcoef(ours, theirs)[0, 1] > 0.9


@pytest.mark.slow  # trains classifiers that are wrong, to see that the tests above would notice
@pytest.mark.parametrize("bug", ["rate never falls", "sum instead of mean", "labels swapped"])
def test_wrong_versions_are_seen(bug, classifier, monkeypatch):
    """Each moves the scores away from those of the right one, which autograd confirms above."""
    good, bad = (BAD, GOOD) if bug == "labels swapped" else (GOOD, BAD)
    lr = 0.03 if bug == "sum instead of mean" else 1.0  # with which a sum does not diverge
    wrong = QualityClassifier(dim=16, lr=lr, epochs=40)
    if bug == "rate never falls":
        wrong.lr = type("Constant", (float,), {"__mul__": lambda self, other: float(self)})(1.0)
    if bug == "sum instead of mean":
        rows = wrong._rows
        monkeypatch.setattr(wrong, "_rows", lambda bag: (*rows(bag)[:2], 1))
    right = QualityClassifier(dim=16, lr=lr, epochs=40).fit(GOOD, BAD) if lr < 1 else classifier
    assert not np.allclose(right.scores(NEW_GOOD), wrong.fit(good, bad).scores(NEW_GOOD), atol=0.02)


def test_a_classifier_that_diverged_is_refused(tmp_path):
    """With scores of nan one pipeline would keep every document, and the other drop them all."""
    diverging = QualityClassifier(dim=16, lr=1.0, epochs=5).fit(GOOD[:20], BAD[:20])
    diverging.lr = 1e4
    with pytest.raises(FloatingPointError, match="diverged with a learning rate of 10000.0; take a smaller"):
        diverging.fit(GOOD[:20], BAD[:20])
    with pytest.raises(RuntimeError, match="has not been trained"):
        diverging.scores(NEW_GOOD)
    diverging.weights = np.full(len(diverging.known), np.nan, np.float32)
    diverging.save(tmp_path / "quality.safetensors")
    with pytest.raises(ValueError, match="holds a classifier that diverged"):
        QualityClassifier.load(tmp_path / "quality.safetensors")


def test_it_survives_the_disk_and_refuses_what_it_did_not_write(classifier, tmp_path):
    path = tmp_path / "quality.safetensors"
    classifier.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert (QualityClassifier.load(path).scores(NEW_GOOD) == classifier.scores(NEW_GOOD)).all()
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="is truncated or no safetensors file"):
        QualityClassifier.load(path)
    with pytest.raises(FileNotFoundError, match="There is no classifier at"):
        QualityClassifier.load(tmp_path / "nothing")
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no quality classifier"):
        QualityClassifier.load(path)


@pytest.mark.parametrize(
    "setting",
    [{"dim": 8}, {"lr": 0.7}, {"ngrams": 2}, {"min_count": 2}, {"epochs": 5}, {"buckets": 50}, {"seed": 3}],
    ids=str,
)
def test_a_classifier_from_the_disk_learns_with_its_own_settings(setting, tmp_path):
    saved = QualityClassifier(**{"dim": 16, "lr": 0.1} | setting).fit(GOOD[:10], BAD[:10])
    saved.save(tmp_path / "quality.safetensors")
    again = QualityClassifier.load(tmp_path / "quality.safetensors").fit(GOOD[:10], BAD[:10])
    assert (again.scores(NEW_GOOD) == saved.scores(NEW_GOOD)).all()


# --- perplexity and the area under the curve ---


def test_bits_per_byte_is_the_loss_counted_by_hand():
    tokenizer = train_tokenizer(PROSE[:50_000], 300)
    torch.manual_seed(0)
    model = Decoder(ModelConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                vocab_size=300))  # fmt: skip
    text = PIECES[0]
    ids = tokenizer.encode(text).ids[:10]
    with torch.no_grad():
        log_probabilities = model(torch.tensor([ids])).log_softmax(-1)[0]
    nats = -sum(log_probabilities[place, ids[place + 1]].item() for place in range(9))
    size = len(tokenizer.decode(ids[1:]).encode())
    found = bits_per_byte(model, tokenizer, [text, "", "a"], max_tokens=10)
    assert np.isclose(found[0], nats / np.log(2) / size, rtol=1e-5)
    assert np.isnan(found[1:]).all()  # nothing to predict
    assert np.array_equal(bits_per_byte(model, tokenizer, iter([text, "", "a"]), 10), found, equal_nan=True)

    # what a tokenizer orders beside cutting words does not act
    tokenizer.enable_truncation(4)
    assert bits_per_byte(model, tokenizer, [text], max_tokens=10) == found[0]
    tokenizer.no_truncation()
    tokenizer.enable_padding(length=500)
    assert np.isnan(bits_per_byte(model, tokenizer, ["a"], max_tokens=10)[0])


def test_bits_per_byte_takes_the_tokenizer_from_scratch():
    tokenizer = BytePairTokenizer.train([PROSE[:5000]], 270)
    torch.manual_seed(0)
    model = Decoder(ModelConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                vocab_size=270))  # fmt: skip
    assert bits_per_byte(model, tokenizer, PIECES[:3]).tolist() == (
        bits_per_byte(model, tokenizer.fast, PIECES[:3]).tolist()
    )


def test_the_score_of_a_model_that_is_broken_is_no_score():
    """nan is what a document gets that is too short to be judged."""
    tokenizer = train_tokenizer(PROSE[:5000], 270)
    model = Decoder(ModelConfig(8, 16, 1, 2, 270))
    model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    assert np.isnan(bits_per_byte(model, tokenizer, ["a"])[0])
    with pytest.raises(FloatingPointError, match="The loss of a document is no finite number"):
        bits_per_byte(model, tokenizer, ["a", PIECES[0]])


CONTROL = "<|endoftext|>"
SPELT = ["a man ", CONTROL, "帽子", "🙂", "é", " ", "\n", "of a truth"]


def byte_level() -> tuple[Tokenizer, list[int]]:
    """A vocabulary that knows a control token, and how many bytes each of its tokens has."""
    plain = BytePairTokenizer.train(["It was a truth of a man " * 9], 270)
    plain.fast.add_special_tokens([CONTROL])
    return plain.fast, [len(token) for token in plain.vocabulary]


def sentencepiece() -> tuple[Tokenizer, list[int]]:
    """The same of a vocabulary with "▁" for a space, and bytes for what it lacks."""
    letters = ["▁", *"aetuhmnrof", *"<|endxof|>"]
    names = list(dict.fromkeys(["<unk>", *letters, *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "an"]))
    tokenizer = Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(names)},
            [("▁", "a"), ("a", "n")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", CONTROL])
    return tokenizer, [1 if name.startswith("<0x") else len(name.replace("▁", " ")) for name in names]


@pytest.mark.parametrize("kind", [byte_level, sentencepiece])
def test_bits_per_byte_reads_every_byte_of_a_text_as_text(kind):
    """Also what is spelt as a control token, and characters that are cut into several tokens."""
    tokenizer, sizes = kind()
    torch.manual_seed(0)
    model = Decoder(ModelConfig(8, 16, 1, 2, tokenizer.get_vocab_size()))
    reader = Tokenizer.from_str(tokenizer.to_str())
    reader.encode_special_tokens = True

    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.sampled_from(SPELT), min_size=1, max_size=8).map("".join), st.integers(2, 40))
    def check(text, max_tokens):
        ids = reader.encode(text).ids[:max_tokens]
        assert tokenizer.token_to_id(CONTROL) not in ids
        size = sum(sizes[token] for token in ids[1:])
        if len(ids) < max_tokens and kind is byte_level:
            assert size == len(text.encode()) - sizes[ids[0]]
        found = bits_per_byte(model, tokenizer, [text], max_tokens)[0]
        if len(ids) < 2:
            return np.testing.assert_equal(found, np.nan)
        with torch.no_grad():
            nats = token_losses(model, torch.tensor([ids])).sum().item()
        np.testing.assert_allclose(found, nats / np.log(2) / size)

    check()
    assert tokenizer.encode(CONTROL).ids == [tokenizer.token_to_id(CONTROL)], "as it was"


ADDED = [AddedToken("帽", lstrip=True), AddedToken("ж"), AddedToken("Ġa"), AddedToken("   ")]


def test_bits_per_byte_counts_the_bytes_of_added_tokens():
    """Of one character, with the blanks that they take with them, and spelt like the bytes of another."""
    tokenizer, _ = byte_level()
    tokenizer.add_tokens(ADDED)
    torch.manual_seed(0)
    model = Decoder(ModelConfig(8, 16, 1, 2, tokenizer.get_vocab_size()))

    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.sampled_from(["帽", "ж", "Ġa", "   ", " ", "雨", " a", "a"]), min_size=1))
    def check(pieces):
        text = "q" + "".join(pieces)  # a token of one byte, which is not predicted
        with torch.no_grad():
            nats = token_losses(model, torch.tensor([tokenizer.encode(text).ids])).sum().item()
        found = bits_per_byte(model, tokenizer, [text], 500)[0]
        np.testing.assert_allclose(found, nats / np.log(2) / (len(text.encode()) - 1))

    check()


def normalising() -> dict[str, Tokenizer]:
    """The kinds that take letters apart, put them together or change them."""
    names = ["NFKC", "NFC", "NFD", "Lowercase", "StripAccents"]
    made = {}
    for name in names:
        tokenizer = Tokenizer.from_str(KINDS["byte_level"].to_str())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), getattr(normalizers, name)()])
        made[name] = tokenizer
    unigram = made["unigram, NFKC"] = Tokenizer.from_str(KINDS["unigram"].to_str())
    unigram.normalizer = normalizers.NFKC()
    return made


ZERO = Decoder(ModelConfig(8, 16, 1, 2, 400))
for parameter in ZERO.parameters():
    torch.nn.init.zeros_(parameter)


@pytest.mark.parametrize("kind", [*KINDS, *normalising()])
def test_a_model_without_weights_needs_as_many_bits_for_each_token(kind):
    """log2 of the vocabulary, for whatever bytes of the text the tokens behind the first one stand."""
    tokenizer = (KINDS | normalising())[kind]
    reader = reading_all_as_text(tokenizer)

    @settings(deadline=None, max_examples=40)
    @given(st.lists(st.sampled_from(["½", "…", "e\u0301", "é", "İ", " ", "\n", "man", "</s>", "帽子", "🙂"])))
    def check(pieces):
        text = "a " + "".join(pieces)
        encoding = reader.encode(text, add_special_tokens=False)
        size = len(text[encoding.offsets[0][1] :].encode())
        if encoding.tokens[0] == "▁":  # put before the text, of which it is no part
            size = len(text.encode())
        expected = (len(encoding) - 1) * np.log2(400) / size if size and len(encoding) > 1 else np.nan
        np.testing.assert_allclose(bits_per_byte(ZERO, tokenizer, [text])[0], expected, rtol=1e-5)

    check()


@pytest.mark.parametrize("text", ["帽", "帽子", "帽a", "½…", " 帽", "é a man", "a man"])
def test_the_blank_before_a_text_is_none_of_its_bytes(text):
    """Also where it is in one token with the first byte of the first character."""
    tokenizer = train_tokenizer(" 帽 帽 ½ ½ é é" * 9, 262)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokens = tokenizer.encode(text).tokens
    size = sum(map(len, tokens[1:]))  # a letter stands for a byte
    assert tokens[0][0] == "Ġ" and size == len(text.removeprefix(" ").encode()) + 1 - len(tokens[0])
    expected = (len(tokens) - 1) * np.log2(400) / size
    np.testing.assert_allclose(bits_per_byte(ZERO, tokenizer, [text])[0], expected, rtol=1e-5)


def test_what_a_vocabulary_lacks_is_not_judged():
    with pytest.raises(ValueError, match="The vocabulary has no token for 'é', which a text holds"):
        bits_per_byte(ZERO, LACKING["bytes"], ["the é"])


def test_half_a_character_is_one_sentence():
    tokenizer, _ = byte_level()
    model = Decoder(ModelConfig(8, 16, 1, 2, tokenizer.get_vocab_size()))
    with pytest.raises(ValueError, match="The text holds an unpaired surrogate"):
        bits_per_byte(model, tokenizer, ["a b \ud800"])


@pytest.mark.parametrize("sides", [([3, np.nan], [1, 2]), ([3, 2], [np.nan]), ([np.nan], [np.nan])])
def test_scores_that_are_none_are_not_compared(sides):
    with pytest.raises(ValueError, match=r"[12] of the scores are nan"):
        area_under_roc(*sides)


def test_area_under_roc_of_more_pairs_than_memory_holds():
    """A hundred thousand documents a side, as of the definition for each tenth of the scores."""
    good, bad = np.arange(100_000) % 10 + 1, np.arange(100_000) % 10
    wins = sum((g > b) + 0.5 * (g == b) for g in range(1, 11) for b in range(10))
    assert area_under_roc(good, bad) == pytest.approx(wins / 100)
    assert area_under_roc([np.inf, 1], [-np.inf, np.inf]) == (0.5 + 1 + 0 + 1) / 4


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=12), st.lists(st.integers(0, 5), min_size=1, max_size=12)
)
def test_area_under_roc_counts_pairs(good, bad):
    wins = sum((g > b) + 0.5 * (g == b) for g in good for b in bad)
    assert np.isclose(area_under_roc(good, bad), wins / len(good) / len(bad))
    assert np.isclose(area_under_roc(good, bad) + area_under_roc(bad, good), 1)


# --- the whole ---


def test_each_stage_drops_what_it_should_and_says_so(classifier):
    text = load_austen()[500_000:501_200]
    texts = [
        text,
        "  " + text.upper().replace(" ", "  "),  # the same when normalised
        text.replace("the", "the", 1) + " Indeed.",  # nearly the same
        load_chinese_classics()[:300],
        shuffled(load_austen()[600_000:601_200]),
        "",
        load_austen()[700_000:701_200],
    ]
    assert drop_reasons(texts, classifier) == [
        None, "exact duplicate", "near duplicate", "language", "quality", "language", None
    ]  # fmt: skip
    assert drop_reasons(texts, classifier, threshold=0.0).count("quality") == 0
    assert drop_reasons([], classifier) == []
    assert drop_reasons(["", " \n"], classifier) == ["language"] * 2
    assert drop_reasons([""], classifier, 0.0, languages=("en", "und")) == [None], "as was asked"


def test_documents_can_be_read_once_only(classifier):
    texts = [*GOOD[:3], *BAD[:3], load_chinese_classics()[:200], GOOD[0]]
    expected = drop_reasons(texts, classifier)
    assert drop_reasons(iter(texts), classifier, languages=iter(["en"])) == expected
    assert drop_reasons(iter(texts), classifier, languages="en") == expected
    assert identify_languages(iter(texts)) == identify_languages(texts)
    assert classifier.scores(iter(texts)).tolist() == classifier.scores(texts).tolist()
    small = [QualityClassifier(dim=4, epochs=2).fit(*sides) for sides in (
        (GOOD[:20], BAD[:20]), (iter(GOOD[:20]), iter(BAD[:20]))
    )]  # fmt: skip
    assert small[0].weights.tolist() == small[1].weights.tolist()
    assert area_under_roc(iter([3, 2]), iter([1, 2])) == 0.875


def test_one_text_in_place_of_several_is_refused(classifier):
    """It would be taken letter by letter, and the answer would be one for each letter."""
    tokenizer, _ = byte_level()
    model = Decoder(ModelConfig(8, 16, 1, 2, tokenizer.get_vocab_size()))
    for call in (identify_languages, classifier.scores, near_duplicates, MinHash().signatures,
                 lambda text: classifier.fit(text, ["a"]), lambda text: classifier.fit(["a"], text),
                 lambda text: drop_reasons(text, classifier),
                 lambda text: bits_per_byte(model, tokenizer, text)):  # fmt: skip
        with pytest.raises(TypeError, match="texts is one string; give a list of strings"):
            call("a man of the world")


def test_what_cannot_be_is_one_sentence(classifier):
    for threshold in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"threshold is {threshold}; expected a number from 0 to 1"):
            drop_reasons(["a"], classifier, threshold=threshold)
    for strange in ("EN", "eng", ["en", "en-US"]):
        with pytest.raises(ValueError, match="is no language that is told apart.* Known are: ace, af,"):
            drop_reasons(["a"], classifier, languages=strange)
    with pytest.raises(ValueError, match="No language is to be kept"):
        drop_reasons(["a"], classifier, languages=())
    with pytest.raises(RuntimeError, match=r"has not been trained; call fit\(good, bad\) first"):
        QualityClassifier().scores(["a"])
    with pytest.raises(ValueError, match="There is no bad document with a word in it"):
        QualityClassifier().fit(["a b"], ["", " "])
    with pytest.raises(ValueError, match="dim is 0"):
        QualityClassifier(dim=0)
    with pytest.raises(ValueError, match="seed is -1; expected a whole number"):
        QualityClassifier(seed=-1)
    with pytest.raises(ValueError, match="one side is empty"):
        area_under_roc([], [1.0])


@settings(max_examples=60, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_classifier_is_noticed(tmp_path_factory, at, bit):
    """Or changes nothing, as in the blanks behind the header."""
    path = tmp_path_factory.mktemp("x") / "quality.safetensors"
    good, bad = ["the cat sat on the mat and ran"] * 8, ["buy cheap pills now click here"] * 8
    classifier = QualityClassifier(dim=4, epochs=2, buckets=1000).fit(good, bad)
    classifier.save(path)
    damaged = bytearray(path.read_bytes())
    damaged[int(at * len(damaged))] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        again = QualityClassifier.load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert (again.ngrams, again.buckets) == (classifier.ngrams, classifier.buckets)
        assert (again.scores(good + bad) == classifier.scores(good + bad)).all()


def test_words_that_are_all_too_rare_are_no_features():
    with pytest.raises(ValueError, match="occurs fewer than 5 times .min_count., and there are no runs"):
        QualityClassifier(ngrams=1).fit(["good text"], ["bad words"])
