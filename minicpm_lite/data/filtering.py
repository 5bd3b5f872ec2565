"""UltraClean in small: normalise, tell the language, drop duplicates, keep what a classifier calls good.

What MiniCPM4's report describes (section 2.2) is two things. A quality classifier in the form of fastText:
hashed runs of up to three words, the mean of their embeddings, a linear layer; so cheap that it scores 15
trillion tokens on CPUs. And *efficient verification* of candidate data, above all of the seeds that the
classifier learns from: not a training run from nothing, but a short decay from one stable checkpoint with 30
% candidate and 70 % default data, judged by the model that comes out.

Deduplication is not part of that description; it is here because every such pipeline has it.

Traps: a classifier learns whatever tells its two classes apart, so seeds from one source teach it that
source. A perplexity is low for text that repeats itself. A document that is too short to judge is not a bad
one: say what happens to it.
"""

import math
import re
import unicodedata
import zlib
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Encoding, Tokenizer

from ..config import require_positive_integer, require_positive_number, require_probability
from ..files import written_whole
from ..language.decoder import Decoder
from ..language.scoring import evaluating, require_finite, token_losses
from ..language.tokenizer import (
    BYTE_TOKEN,
    BytePairTokenizer,
    encode_whole,
    reading_all_as_text,
    require_several,
    require_text,
)
from ..optional import require
from ..runtime import require_seed
from .dedup import MinHash, first_of_each, hashed_ngrams, near_duplicates, words_of

__all__ = [
    "QualityClassifier",
    "area_under_roc",
    "bits_per_byte",
    "drop_reasons",
    "identify_languages",
    "normalise",
]

_BLANK_LINES = re.compile(r"\n\s*\n")
_SPACES = re.compile(r"[^\S\n\t\r]+")
_FORMAT = "minicpm_lite quality classifier 3"
_SETTINGS = {
    "dim": int, "lr": float, "ngrams": int, "min_count": int, "epochs": int, "buckets": int, "seed": int,
}  # fmt: skip
_UNKNOWN = "und"  # ISO 639-2: undetermined


def normalise(text: str) -> str:
    r"""The form in which documents are compared and classified; the text that is kept stays as it was.

    Runs of blank lines and of spaces become one; accents go; letters become small; newline, tab and carriage
    return stay (section 2.2 of the MiniCPM4 report).

    >>> normalise("Le  CAFÉ\n\n \n\tferme")
    'le cafe\n\tferme'
    """
    if not isinstance(text, str):
        raise TypeError(f"A document is {type(text).__name__}; it must be a string.")
    apart = unicodedata.normalize("NFD", text.lower())
    bare = "".join(char for char in apart if unicodedata.category(char) != "Mn")
    bare = unicodedata.normalize("NFC", bare)
    return _SPACES.sub(" ", _BLANK_LINES.sub("\n", bare)).strip(" \n")


def identify_languages(texts: Iterable[str], least: float = 0.5) -> list[str]:
    """The language of each text as an ISO 639-1 code; "und" where it cannot be told.

    Args:
        texts: the text as found; capitals and accents help.
        least: a language with a smaller probability is not told; neither is that of a text without a letter.

    Raises:
        ImportError: py3langid is missing; the message names the command to get it.
        TypeError: one string in place of several.
        ValueError: ``least`` is no probability.
    """
    require_several(texts)
    require_probability("least", least)
    classify = _language_identifier().classify
    codes = []
    for text in texts:
        code, probability = classify(text) if any(map(str.isalpha, text)) else (_UNKNOWN, 0.0)
        codes.append(code if probability >= least else _UNKNOWN)
    return codes


@cache
def _language_identifier():
    module = require("py3langid.langid", install="minicpm_lite[data]", purpose="tell languages apart")
    return module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)


class QualityClassifier:
    """Is a document like the good ones or like the bad ones? In the form of fastText, written out.

    A document is the bag of its words that are frequent enough and of all its runs of two to ``ngrams``
    words, hashed into ``buckets``. Its vector is the mean of their embeddings. A linear layer and a softmax
    make the probability. Training is stochastic gradient descent, a document at a time, with a learning rate
    that falls linearly to zero.

    At the end everything between a feature and the probability is linear, so each feature's embedding is
    folded into one number; `weights` holds them. Features that training never saw have 0.

    The defaults for dim, learning rate, runs, least count and epochs are the published ones (MiniCPM4 report,
    section 2.2, where words are the tokens of DeepSeek-V2). They were made for millions of documents: for a
    few hundred, raise ``epochs`` or ``lr``.

    Args:
        dim: size of an embedding.
        lr: learning rate of the first document.
        ngrams: longest run of words.
        min_count: words that are rarer in the training documents are left out; runs are not.
        epochs: passes over the training documents.
        buckets: for the runs of two and more words.
        seed: decides the first embeddings and the order of the documents.
    """

    def __init__(
        self,
        dim: int = 256,
        lr: float = 0.1,
        ngrams: int = 3,
        min_count: int = 5,
        epochs: int = 3,
        buckets: int = 2_000_000,
        seed: int = 0,
    ) -> None:
        for name, value in (("dim", dim), ("ngrams", ngrams), ("min_count", min_count),
                            ("epochs", epochs), ("buckets", buckets)):  # fmt: skip
            require_positive_integer(name, value)
        require_positive_number("lr", lr)
        require_seed(seed)
        self.dim, self.lr, self.ngrams, self.min_count = dim, lr, ngrams, min_count
        self.epochs, self.buckets, self.seed = epochs, buckets, seed
        self.known: np.ndarray = np.empty(0, np.uint64)  # features of the training documents, sorted
        self.weights: np.ndarray = np.empty(0, np.float32)  # log odds of good that each contributes

    def fit(self, good: Iterable[str], bad: Iterable[str]) -> "QualityClassifier":
        """Learn from normalised documents; balance the two sides, or the larger one wins ties.

        Raises:
            ValueError: one side has no document with a word, or every word is rarer than `min_count` and
                there are no runs.
            FloatingPointError: the training diverged; the classifier is untrained then.
            TypeError: one string in place of several.
        """
        require_several(good)
        require_several(bad)
        good, bad = ([self._features(text) for text in side] for side in (good, bad))
        for name, side in (("good", good), ("bad", bad)):
            if not any(len(bag) for bag in side):
                raise ValueError(
                    f"There is no {name} document with a word in it; a classifier needs both kinds."
                )
        features, counts = np.unique(np.concatenate(good + bad), return_counts=True)
        is_word = features < 1 << 32
        known = features[~is_word | (counts >= self.min_count)]
        if not len(known):
            raise ValueError(
                f"Every word of the documents occurs fewer than {self.min_count} times (min_count), and "
                "there are no runs of words. Give more documents, or a smaller min_count."
            )
        self.known, self.weights = known, np.empty(0, np.float32)  # untrained, until all went well
        labels = np.repeat([1.0, 0.0], [len(good), len(bad)])
        with np.errstate(over="ignore", invalid="ignore"):  # told of below
            weights = self._train([self._rows(bag) for bag in good + bad], labels)
        if not np.isfinite(weights).all():  # its scores would be neither above a threshold nor below it
            raise FloatingPointError(
                f"The classifier diverged with a learning rate of {self.lr}; take a smaller lr."
            )
        self.weights = weights
        return self

    def scores(self, texts: Iterable[str]) -> Float[np.ndarray, " documents"]:
        """The probability that each normalised document is good; 0.5 for one without a known feature.

        Raises:
            RuntimeError: the classifier has not been trained.
            TypeError: one string in place of several.
        """
        require_several(texts)
        if not len(self.weights):
            raise RuntimeError("The classifier has not been trained; call fit(good, bad) first.")
        logits = []
        for text in texts:
            rows, repeats, size = self._rows(self._features(text))
            logits.append(repeats @ self.weights[rows] / max(size, 1))
        return _sigmoid(np.array(logits, float))

    def save(self, path: str | Path) -> None:
        """Write the folded classifier and its settings to a safetensors file."""
        if not len(self.weights):
            raise RuntimeError("The classifier has not been trained; call fit(good, bad) first.")
        tensors = {"known": self.known.astype(np.int64), "weights": self.weights}
        facts = {"format": _FORMAT} | {name: str(getattr(self, name)) for name in _SETTINGS}
        facts["checksum"] = _checksum(facts, tensors)
        with written_whole(path) as beside:
            save_file(tensors, beside, metadata=facts)

    @classmethod
    def load(cls, path: str | Path) -> "QualityClassifier":
        """Read what `save` wrote; `fit` trains anew, with the settings of then.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated or damaged, or holds no classifier of this form, or one that
                diverged.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no classifier at {path}.")
        try:
            with safe_open(path, framework="numpy") as file:
                facts = file.metadata() or {}
                if facts.get("format") != _FORMAT:
                    raise ValueError(
                        f"{path} holds no quality classifier of this form; expected one written by save()."
                    )
                tensors = {name: file.get_tensor(name) for name in ("known", "weights")}
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or no safetensors file ({error}).") from None
        if facts.pop("checksum", None) != _checksum(facts, tensors):
            raise ValueError(f"{path} is damaged: it is not as it was written. Save the classifier again.")
        if not np.isfinite(tensors["weights"]).all():
            raise ValueError(f"{path} holds a classifier that diverged: its weights are not finite numbers.")
        classifier = cls(**{name: kind(facts[name]) for name, kind in _SETTINGS.items()})
        classifier.known, classifier.weights = tensors["known"].astype(np.uint64), tensors["weights"]
        return classifier

    def _features(self, text: str) -> np.ndarray:
        """Words by their hash, runs by their bucket plus 2^32, so that the two never meet."""
        words = words_of(text)
        runs = [
            hashed_ngrams(words, size) % np.uint64(self.buckets) + np.uint64(1 << 32)
            for size in range(2, self.ngrams + 1)
        ]
        return np.concatenate([hashed_ngrams(words, 1), *runs])

    def _rows(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Rows of the known features, how often each occurs, and the size that the mean is taken over.

        As in fastText, a rare word is no feature, but an unseen run counts in the mean and adds nothing.
        """
        unique, repeats = np.unique(features, return_counts=True)
        rows = np.minimum(np.searchsorted(self.known, unique), len(self.known) - 1)
        known = self.known[rows] == unique
        size = int(repeats[known | (unique >= 1 << 32)].sum())
        return rows[known], repeats[known].astype(np.float32), size

    def _train(self, bags: list[tuple[np.ndarray, np.ndarray, int]], labels: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(self.seed)
        table = rng.uniform(-1 / self.dim, 1 / self.dim, (len(self.known), self.dim)).astype(np.float32)
        output = np.zeros((2, self.dim), np.float32)  # bad, good
        order = np.concatenate([rng.permutation(len(bags)) for _ in range(self.epochs)])
        for step, index in enumerate(order):
            rows, repeats, size = bags[index]
            if not len(rows):
                continue
            share = (repeats / size)[:, None]
            hidden = (share * table[rows]).sum(0)
            good = _sigmoid((output[1] - output[0]) @ hidden)
            error = np.float32(labels[index] - good) * np.array([[-1.0], [1.0]], np.float32)
            rate = np.float32(self.lr * (1 - step / len(order)))
            towards = rate * (error * output).sum(0)
            output += rate * error * hidden
            table[rows] += share * towards
        return table @ (output[1] - output[0])


def _checksum(facts: dict[str, str], tensors: dict[str, np.ndarray]) -> str:
    held = [repr(sorted(facts.items())).encode(), *(tensors[name].tobytes() for name in sorted(tensors))]
    return str(zlib.crc32(b"".join(held)))


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))  # never overflows


@torch.inference_mode()
def bits_per_byte(
    model: Decoder, tokenizer: Tokenizer | BytePairTokenizer, texts: Iterable[str], max_tokens: int = 256
) -> Float[np.ndarray, " documents"]:
    """How badly a language model predicts each document: the score of a perplexity filter.

    Per byte of the text, as it was before a tokenizer normalises it, and not per token, so that models with
    different vocabularies can be compared. The first token has no context and is not predicted; its bytes do
    not count. A document of fewer than two tokens cannot be judged and gets nan. All of a document is text,
    also what is spelt as a control token.

    Args:
        model: what good text looks like is what it was trained on.
        tokenizer: the model's.
        texts: as found.
        max_tokens: read at most this much of each document.

    Raises:
        TypeError: a document that is no string, or one string in place of several.
        ValueError: a document with half a character, or something that the vocabulary has no token for.
        FloatingPointError: a loss that is no finite number.
    """
    require_several(texts)
    require_positive_integer("max_tokens", max_tokens)
    tokenizer = reading_all_as_text(tokenizer)
    bits = []
    with evaluating(model):
        for text in texts:
            require_text(text)
            encoding = encode_whole(tokenizer, text, add_special_tokens=False)
            ids = encoding.ids[:max_tokens]
            size = _bytes_of_first(len(ids), encoding, text) - _bytes_of_first(1, encoding, text)
            if len(ids) > 1 and size:
                window = torch.tensor([ids], device=next(model.parameters()).device)
                losses = token_losses(model, window)
                require_finite(losses, "a document")
                bits.append(losses.sum().item() / math.log(2) / size)
            else:
                bits.append(math.nan)
    return np.array(bits, float)


def _bytes_of_first(count: int, encoding: Encoding, text: str) -> int | float:
    """How many bytes of a text its first tokens stand for; blanks that none holds count with the next one.

    Tokens may share a character: its bytes are theirs, or a normaliser makes several letters of it. Then each
    has a part of it.
    """
    spans = encoding.offsets
    if count >= len(spans):
        return len(text.encode())
    shared = [start < end for (_, end), (start, _) in pairwise(spans)]  # with the token behind
    if not shared[count - 1]:
        return len(text[: spans[count - 1][1]].encode())
    begin, end = count - 1, count
    while begin and shared[begin - 1]:
        begin -= 1
    while end < len(shared) and shared[end]:
        end += 1
    lengths = [1 if BYTE_TOKEN.fullmatch(token) else len(token) for token in encoding.tokens[begin : end + 1]]
    first = encoding.tokens[0]
    if not begin and first[0] in "▁Ġ" and (len(first) == 1 or not text.startswith(" ")):
        lengths[0] -= 1  # the blank that a tokenizer puts before a text
    before, together = text[: spans[begin][0]], text[spans[begin][0] : spans[end][1]]
    part = len(together.encode()) * sum(lengths[: count - begin]) / sum(lengths)
    return len(before.encode()) + part


def area_under_roc(good: Iterable, bad: Iterable) -> float:
    """The probability that a good document scores higher than a bad one; ties count half.

    1 separates perfectly, 0.5 is a coin, 0 separates the wrong way round.

    Raises:
        ValueError: a side is empty, or holds a score that is not a number and so neither higher nor lower.

    >>> area_under_roc([3, 2], [1, 2])
    0.875
    """
    good, bad = np.fromiter(good, float), np.fromiter(bad, float)
    if not (len(good) and len(bad)):
        raise ValueError("The area under the curve compares good with bad documents; one side is empty.")
    if unjudged := int(np.isnan(good).sum() + np.isnan(bad).sum()):
        raise ValueError(
            f"{unjudged} of the scores are nan, which is neither higher nor lower than another. Leave these "
            "documents out, or give them a score."
        )
    bad.sort()  # a table of all pairs would not fit
    lower, not_higher = (int(np.searchsorted(bad, good, side).sum()) for side in ("left", "right"))
    pairs = len(good) * len(bad)
    return lower / pairs + 0.5 * ((not_higher - lower) / pairs)


def language_codes(languages: str | Iterable[str]) -> tuple[str, ...]:
    """The languages to keep, as a tuple; one may stand alone.

    Raises:
        ValueError: there is none, or one that `identify_languages` never gives.
        ImportError: py3langid is missing; the message names the command to get it.

    >>> language_codes("en")
    ('en',)
    """
    codes = (languages,) if isinstance(languages, str) else tuple(languages)
    if not codes:
        raise ValueError('No language is to be kept, so no document would be; name one, such as "en".')
    known = {*_language_identifier().nb_classes, _UNKNOWN}
    if strange := [code for code in codes if code not in known]:
        raise ValueError(
            f"{strange[0]!r} is no language that is told apart, so no document would be kept for it. Known "
            f"are: {', '.join(sorted(known))}."
        )
    return codes


def drop_reasons(
    texts: Iterable[str],
    classifier: QualityClassifier,
    threshold: float = 0.5,
    languages: str | Iterable[str] = ("en",),
    minhash: MinHash | None = None,
) -> list[str | None]:
    """The whole pipeline: for each document None if it is kept, else the stage that dropped it.

    The stages are, in order, "language", "exact duplicate", "near duplicate" and "quality"; cheap ones come
    first, and each sees only what the ones before it kept. An empty document falls at the first, unless
    ``languages`` names its language, "und".

    Raises:
        ValueError: a threshold outside 0 to 1, or no language, or none that `identify_languages` gives; or
            signatures that the 16 bands of `near_duplicates` do not divide.
        TypeError: a document that is no string, or one string in place of several.
    """
    require_several(texts)
    require_probability("threshold", threshold)
    texts, languages = tuple(texts), language_codes(languages)
    normal = [normalise(text) for text in texts]
    reasons: list[str | None] = [None] * len(texts)

    def drop(reason: str, bad) -> list[int]:
        for index, is_bad in zip(left, bad, strict=True):
            if is_bad:
                reasons[index] = reason
        return [index for index in left if reasons[index] is None]

    left = list(range(len(texts)))
    left = drop("language", [code not in languages for code in identify_languages(texts)])
    left = drop("exact duplicate", ~first_of_each([normal[index] for index in left]))
    left = drop("near duplicate", ~first_of_each(near_duplicates([normal[index] for index in left], minhash)))
    left = drop("quality", classifier.scores([normal[index] for index in left]) < threshold)
    return reasons
