"""Duplicates: exact ones by a hash, near ones by MinHash signatures and locality-sensitive hashing.

Two documents are near duplicates if their sets of shingles, runs of a few words, overlap strongly: if their
Jaccard index J, the size of their intersection over that of their union, is high. Comparing all pairs of sets
is out of the question for many documents. MinHash (Broder 1997) gives each document a short signature: of
each of many random orders of all shingles, its first one. Two signatures agree at a place with probability J.
Locality-sensitive hashing then looks only at pairs that agree in at least one whole band of the signature.

MiniCPM's papers say that MinHash was used, within and across corpora, and give no parameters. The defaults
here (runs of 5 words, 128 orders, J of 0.8) are common choices.

Traps: a product of two 32-bit numbers fits into 64 bits, one of two 61-bit numbers does not and would wrap
around unseen, so all hashes here have 32 bits. A multiplier must be odd, or the "order" maps two shingles to
one place. A hundred copies of one document, or pages of one template, are nearly 5,000 pairs: exact copies
are set aside first, two documents that already hang together are not compared, and of those that nearly
reach the threshold a few of their rarest shingles tell it (prefix and positional filter: Bayardo et al. 2007,
"Scaling up all pairs similarity search"; Xiao et al. 2008, PPJoin). Listings, pages that each put together
many of the same parts, have no rare shingles: there nothing spares a look at every pair, and what is left is
to make it short.
"""

import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import combinations, pairwise

import numpy as np
import regex
from jaxtyping import Bool, Float, Int, Integer, UInt32, UInt64

from ..config import require_positive_integer
from ..language.tokenizer import require_several
from ..runtime import require_seed

__all__ = [
    "MinHash",
    "candidate_pairs",
    "clusters_of",
    "estimated_jaccard",
    "first_of_each",
    "hashed_ngrams",
    "jaccard",
    "lsh_probability",
    "lsh_threshold",
    "near_duplicates",
    "rows_of_band",
    "words_of",
]

_32_BITS = np.uint64(0xFFFFFFFF)
_NO_SPACES = (  # scripts that put none between words
    r"\u3400-\u9fff"  # Chinese
    r"\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Japanese kana
    r"\u0e00-\u0eff"  # Thai, Lao
    r"\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Burmese
    r"\u1780-\u17ff"  # Khmer
)
_LETTERS = r"\p{L}\p{N}_"
_SIGNS = r"\p{M}\u200c\u200d"  # on or between letters: vowel signs, accents, joiners; no word begins with one
_WORD = regex.compile(
    rf"(?V1)[{_NO_SPACES}]|[{_LETTERS}--[{_NO_SPACES}]][{_LETTERS}{_SIGNS}--[{_NO_SPACES}]]*|\S"
)
_NGRAM_FACTOR = 0x01000193  # odd; weights the words of a run by their place
_SHINGLES_AT_A_TIME = 8192  # times 128 orders of 8 bytes: 8 MiB, about what a cache holds
_COMPARISONS_REMEMBERED = 1 << 16  # the same pair may meet in several bands
_ROUNDING = 1e-9  # of a bound, so that none is above what it bounds
EMPTY = 1 << 32  # what documents without a shingle share; no hash is it


def words_of(text: str) -> list[str]:
    """Words and punctuation marks, in order; in scripts that put no spaces between words, single characters.

    >>> words_of("don't, 你好")
    ['don', "'", 't', ',', '你', '好']
    """
    return _WORD.findall(text)


def hashed_ngrams(words: Iterable[str], size: int) -> UInt64[np.ndarray, " ngrams"]:
    """A hash of 32 bits for each run of ``size`` words, in order; none if there are fewer words.

    Raises:
        TypeError: one string in place of several words.
        ValueError: ``size`` is no whole number above 0.

    >>> hashed_ngrams(["a", "b", "a", "b"], 2).tolist()[::2] == [hashed_ngrams(["a", "b"], 2)[0]] * 2
    True
    """
    require_positive_integer("size", size)
    require_several(words)
    hashes = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words], np.uint64)
    runs = max(len(hashes) - size + 1, 0)
    combined = np.zeros(runs, np.uint64)
    for place in range(size):
        combined = (combined * np.uint64(_NGRAM_FACTOR) + hashes[place : place + runs]) & _32_BITS
    return combined


@dataclass(frozen=True)
class MinHash:
    """Signatures of documents: of each random order of all shingles, the first one in the document.

    An order is h -> a h + b modulo 2^32 with an odd a, which maps no two hashes to one place; hashes go
    through MurmurHash3's last step before, which spreads them. It is the scheme "affine32" of datasketch.

    Attributes:
        num_perm: random orders, the length of a signature.
        shingle_size: words in a shingle; a shorter document is one shingle.
        seed: decides the orders.
    """

    num_perm: int = 128
    shingle_size: int = 5
    seed: int = 1
    permutations: UInt64[np.ndarray, "2 num_perm"] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_positive_integer("num_perm", self.num_perm)
        require_positive_integer("shingle_size", self.shingle_size)
        require_seed(self.seed)
        random = np.random.RandomState(self.seed)
        a = random.randint(0, 1 << 31, self.num_perm, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
        b = random.randint(0, 1 << 32, self.num_perm, dtype=np.uint32)
        object.__setattr__(self, "permutations", np.array([a, b], np.uint64))

    def shingles(self, text: str) -> UInt64[np.ndarray, " shingles"]:
        """The set of a document's shingles as sorted 32-bit hashes; empty only for an empty document."""
        words = words_of(_checked(text))
        return np.unique(hashed_ngrams(words, min(self.shingle_size, max(len(words), 1))))

    def signatures(self, texts: Iterable[str]) -> UInt32[np.ndarray, "documents num_perm"]:
        """A signature for each document; that of an empty document is all ones in binary."""
        require_several(texts)
        return self.signatures_of_sets(map(self.shingles, texts))

    def signatures_of_sets(
        self, sets: Iterable[UInt64[np.ndarray, " _"]]
    ) -> UInt32[np.ndarray, "documents num_perm"]:
        """The same from sets of 32-bit hashes: of shingles, or of anything else.

        Raises:
            TypeError: a set that is no array of unsigned 64-bit numbers.
        """
        sets = tuple(sets)
        for each in sets:
            if not (isinstance(each, np.ndarray) and each.dtype == np.uint64):
                kind = getattr(each, "dtype", type(each).__name__)
                raise TypeError(f"A set of hashes is of type {kind}; expected an array of np.uint64.")
        signatures = np.full((len(sets), self.num_perm), 0xFFFFFFFF, np.uint32)
        start = 0
        while start < len(sets):  # as many documents at a time as fit into the cache
            stop, shingles = start, 0
            while stop < len(sets) and (stop == start or shingles + len(sets[stop]) <= _SHINGLES_AT_A_TIME):
                shingles += len(sets[stop])
                stop += 1
            filled = [index for index in range(start, stop) if len(sets[index])]
            if filled:
                edges = np.cumsum([0] + [len(sets[index]) for index in filled[:-1]])
                signatures[filled] = self._first_places(np.concatenate([sets[i] for i in filled]), edges)
            start = stop
        return signatures

    def _first_places(self, hashes: np.ndarray, edges: np.ndarray) -> np.ndarray:
        a, b = self.permutations
        places = _spread(hashes)[:, None] * a  # (shingles, num_perm); at most (2^32 - 1)^2
        places += b  # at most (2^32 - 1) 2^32, which still fits into 64 bits
        places &= _32_BITS
        return np.minimum.reduceat(places, edges, axis=0).astype(np.uint32)


def _spread(hashes: UInt64[np.ndarray, " _"]) -> UInt64[np.ndarray, " _"]:
    """MurmurHash3's finalizer on 32 bits: a bijection in which each input bit moves every output bit."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashes = ((hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)) & _32_BITS
    return hashes ^ (hashes >> np.uint64(16))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Of two sets (sorted, without repeats): the size of the intersection over that of the union.

    Two empty sets have 1: they are the same.

    Raises:
        TypeError: one of them is no array.

    >>> jaccard(np.array([1, 2, 3]), np.array([2, 3, 4]))
    0.5
    """
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):  # of a set NumPy makes one element
        raise TypeError(
            f"The sets are of type {type(a).__name__} and {type(b).__name__}; expected sorted arrays without "
            "repeats: MinHash.shingles(text), or np.unique(list(numbers))."
        )
    common = len(np.intersect1d(a, b, assume_unique=True))
    union = len(a) + len(b) - common
    return common / union if union else 1.0


def estimated_jaccard(
    a: UInt32[np.ndarray, "*pairs num_perm"], b: UInt32[np.ndarray, "*pairs num_perm"]
) -> float | Float[np.ndarray, "*pairs"]:
    """The share of places where signatures agree: unbiased, with variance J (1 - J) / num_perm.

    Raises:
        ValueError: signatures of different lengths.
    """
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"Signatures of {a.shape[-1]} and {b.shape[-1]} places were given; those of one MinHash have as "
            "many."
        )
    return np.mean(a == b, axis=-1)


def lsh_probability(
    similarity: float | np.ndarray, bands: int, rows: int
) -> float | Float[np.ndarray, " similarities"]:
    """The probability that two documents of a Jaccard index agree in at least one of the bands.

    A band of r rows agrees with probability s^r; none of b agrees with (1 - s^r)^b.

    Raises:
        ValueError: a similarity outside 0 to 1.

    >>> round(lsh_probability(0.8, bands=16, rows=8), 3)
    0.947
    """
    if not (np.all(np.asarray(similarity) >= 0) and np.all(np.asarray(similarity) <= 1)):
        raise ValueError(f"similarity is {similarity!r}; expected a part, from 0 to 1.")
    return 1 - (1 - similarity**rows) ** bands


def lsh_threshold(bands: int, rows: int) -> float:
    """About where the curve of `lsh_probability` is steepest: (1/b)^(1/r).

    >>> round(lsh_threshold(bands=16, rows=8), 3)
    0.707
    """
    return (1 / bands) ** (1 / rows)


def rows_of_band(num_perm: int, bands: int) -> int:
    """Places of a signature in each of its bands.

    Raises:
        ValueError: the bands do not divide the signature.
    """
    require_positive_integer("bands", bands)
    if num_perm % bands:
        raise ValueError(
            f"Signatures of {num_perm} places cannot be cut into {bands} equal bands; "
            f"choose bands that divide {num_perm}, or a num_perm that {bands} divides."
        )
    return num_perm // bands


def candidate_pairs(
    signatures: Integer[np.ndarray, "documents num_perm"], bands: int
) -> Int[np.ndarray, "pairs 2"]:
    """All pairs (i < j) whose signatures agree in at least one whole band, each once, in order.

    Args:
        signatures: from `MinHash`.
        bands: pieces of equal size that each signature is cut into.

    Raises:
        ValueError: the signature's length is no multiple of ``bands``.
    """
    pairs: set[tuple[int, int]] = set()
    for bucket in _buckets(signatures, bands):
        pairs.update(combinations(bucket, 2))
    return np.array(sorted(pairs), np.int64).reshape(-1, 2)


def _buckets(signatures: Integer[np.ndarray, "documents num_perm"], bands: int) -> Iterator[list[int]]:
    """Of each band the groups of documents, two or more in order, whose signatures agree in it."""
    rows = rows_of_band(signatures.shape[1], bands)
    for band in range(bands if len(signatures) else 0):
        keys = np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows])
        _, bucket = np.unique(keys.view(f"V{keys.itemsize * rows}").ravel(), return_inverse=True)
        order = np.argsort(bucket, kind="stable")
        edges = np.flatnonzero(np.diff(bucket[order])) + 1
        yield from (members.tolist() for members in np.split(order, edges) if len(members) > 1)


class _Clusters:
    """Documents that hang together, while links come in; a cluster's root is its first document."""

    def __init__(self, documents: int) -> None:
        self.parent = list(range(documents))

    def root(self, document: int) -> int:
        parent = self.parent
        while parent[document] != document:
            parent[document] = parent[parent[document]]  # halve the path for the next time
            document = parent[document]
        return document

    def link(self, a: int, b: int) -> None:
        low, high = sorted((self.root(a), self.root(b)))
        self.parent[high] = low

    def labels(self) -> Int[np.ndarray, " documents"]:
        return np.array([self.root(document) for document in range(len(self.parent))], np.int64)


def clusters_of(documents: int, pairs: Iterable[Sequence[int]]) -> Int[np.ndarray, " documents"]:
    """Who hangs together with whom, over any number of pairs: for each document its cluster's first one.

    >>> clusters_of(5, [(0, 3), (3, 4)]).tolist()
    [0, 1, 2, 0, 0]

    Raises:
        ValueError: a pair names a document that there is not.
    """
    clusters = _Clusters(documents)
    for a, b in pairs:
        if not (0 <= a < documents and 0 <= b < documents):
            raise ValueError(f"A pair is ({a}, {b}); expected documents from 0 to {documents - 1}.")
        clusters.link(int(a), int(b))
    return clusters.labels()


def first_of_each(keys: Iterable) -> Bool[np.ndarray, " keys"]:
    """Which to keep so that each key is there once: those whose key did not come before.

    >>> first_of_each("abcab").tolist()
    [True, True, True, False, False]
    """
    seen = set()
    return np.array([not (key in seen or seen.add(key)) for key in keys], bool)


def near_duplicates(
    texts: Iterable[str],
    minhash: MinHash | None = None,
    bands: int = 16,
    threshold: float | None = 0.8,
) -> Int[np.ndarray, " documents"]:
    """For each document the first one of its cluster; `first_of_each` of them says which to keep.

    Equal texts are one document from the start. Normalise before, so that spaces and capitals do not count.

    Args:
        texts: normalised documents; empty ones are duplicates of each other.
        minhash: the signatures; left out, 128 orders of 5-word shingles.
        bands: of each signature.
        threshold: least exact Jaccard index of a pair; None takes every candidate without looking.

    Raises:
        ValueError: a threshold outside 0 to 1, or bands that do not divide the signature.
        TypeError: a document that is no string, or one string in place of several.
    """
    require_several(texts)
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(
            f"The threshold is {threshold}; a Jaccard index is compared with more than 0 and at most 1."
        )
    minhash, texts = minhash or MinHash(), tuple(texts)
    rows_of_band(minhash.num_perm, bands)  # refused before the long work
    clusters, first = _Clusters(len(texts)), {}
    for index, text in enumerate(texts):
        clusters.link(first.setdefault(_checked(text), index), index)
    distinct = list(first.values())
    sets = {index: minhash.shingles(texts[index]) for index in distinct}
    link = _link_all if threshold is None else _Linker(sets, threshold)
    for bucket in _buckets(minhash.signatures_of_sets(sets.values()), bands):
        link([distinct[place] for place in bucket], clusters)
    return clusters.labels()


def _link_all(bucket: list[int], clusters: _Clusters) -> None:
    for document in bucket:
        clusters.link(bucket[0], document)


class _Linker:
    """Links the documents of a bucket whose Jaccard index reaches a threshold, and compares few others.

    Put the shingles of all documents in one order, the rarest first. Two sets x and y with J >= t share at
    least t/(1+t) (|x| + |y|) shingles, so the first one that they share comes early enough in both for so
    many to follow. Pages of one template differ in rare shingles: what they share comes too late, and no two
    of them are looked at. What is left is compared exactly, so no pair is missed.

    Documents that would meet more often than there are pairs to compare are compared as a whole: for each it
    is counted how many of its shingles each other one has. That takes time as the square of the bucket, but
    only a few microseconds for a pair of long pages.
    """

    def __init__(self, sets: dict[int, UInt64[np.ndarray, " _"]], threshold: float) -> None:
        shingles = np.concatenate([np.empty(0, np.uint64), *sets.values()])
        known, counts = np.unique(shingles, return_counts=True)

        @lru_cache(_COMPARISONS_REMEMBERED)
        def similar(a: int, b: int) -> bool:
            return jaccard(sets[a], sets[b]) >= threshold

        @cache
        def rarest(document: int) -> list[int]:
            """Of its shingles those one of which any set must share with it that is as similar."""
            mine = sets[document]
            order = np.lexsort((mine, counts[np.searchsorted(known, mine)]))
            kept = len(mine) - math.ceil(threshold * len(mine) - _ROUNDING) + 1
            return mine[order[:kept]].tolist() or [EMPTY]

        self._sizes = {document: len(shingles) for document, shingles in sets.items()}
        self._share = threshold / (1 + threshold)
        self._sets, self._threshold = sets, threshold
        self._similar, self._rarest = similar, rarest

    def __call__(self, bucket: list[int], clusters: _Clusters) -> None:
        pairs, meetings = len(bucket) * len(_outside(bucket, clusters)), 0
        if not pairs:
            return
        for one, other in pairwise(document for document in bucket if not self._sizes[document]):
            clusters.link(one, other)  # what holds no shingle is alike
        # for each shingle, and each size of a set and place in it: documents in groups that hang together
        index: dict[int, dict[tuple[int, int], list[list[int]]]] = defaultdict(lambda: defaultdict(list))
        for document in bucket:
            size = self._sizes[document]
            for place, shingle in enumerate(self._rarest(document)):
                for (other_size, other_place), groups in index[shingle].items():
                    most = min(size - place, other_size - other_place)  # shared, if this is the first
                    if most >= self._share * (size + other_size) - _ROUNDING:
                        meetings += len(groups)
                        self._meet(document, groups, clusters)
                if meetings > pairs:
                    self._compare_all(bucket, clusters)
                    return
                index[shingle][size, place].append([document])

    def _meet(self, document: int, groups: list[list[int]], clusters: _Clusters) -> None:
        """Link a document with the groups that hold one like it, and put together what hangs together now."""
        together: dict[int, list[int]] = {}
        for group in groups:
            known = clusters.root(group[0]) == clusters.root(document)
            if not known and any(self._similar(other, document) for other in group):
                clusters.link(group[0], document)
            if (first := together.setdefault(clusters.root(group[0]), group)) is not group:
                first.extend(group)
        groups[:] = together.values()

    def _compare_all(self, bucket: list[int], clusters: _Clusters) -> None:
        """Link the documents of a bucket that are alike, by counting the shingles that they share."""
        sizes = np.array([self._sizes[document] for document in bucket])
        shingles = np.concatenate([self._sets[document] for document in bucket])
        order = np.argsort(shingles, kind="stable")
        owners, shingles = np.repeat(np.arange(len(bucket)), sizes)[order], shingles[order]
        for place in _outside(bucket, clusters):
            mine = self._sets[bucket[place]]
            if not len(mine):
                continue
            spans = zip(*(np.searchsorted(shingles, mine, side) for side in ("left", "right")), strict=True)
            shared = np.bincount(
                np.concatenate([owners[slice(*span)] for span in spans]), minlength=len(bucket)
            )
            for other in np.flatnonzero(shared / (sizes + sizes[place] - shared) >= self._threshold):
                clusters.link(bucket[other], bucket[place])


def _outside(bucket: list[int], clusters: _Clusters) -> list[int]:
    """The places in a bucket of those that do not hang together with most of the others."""
    roots = [clusters.root(document) for document in bucket]
    [(most, _)] = Counter(roots).most_common(1)
    return [place for place, root in enumerate(roots) if root != most]


def _checked(text: object) -> str:
    if not isinstance(text, str):
        raise TypeError(f"A document is {type(text).__name__}; it must be a string.")
    return text
