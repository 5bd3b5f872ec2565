"""Checks and quiz of the chapter on the tokenizer."""

import math
from collections import Counter
from itertools import pairwise

from ... import load_config
from ...lab.exercises import exercise
from ...lab.mistakes import same
from ...lab.quiz import Quiz
from ...parameters import count_parameters


@exercise(
    "characters",
    wrong=(
        lambda context, bytes_a_token, bytes_a_character: context * bytes_a_token,
        lambda context, bytes_a_token, bytes_a_character: context / bytes_a_token / bytes_a_character,
        lambda context, bytes_a_token, bytes_a_character: context * bytes_a_character / bytes_a_token,
        lambda context, bytes_a_token, bytes_a_character: context * bytes_a_token // bytes_a_character,
    ),
)
def characters(answer):
    """The same context holds fewer characters where characters are long."""
    assert same(answer(100, 1, 1), 100), "One byte a token and one byte a character: 100 tokens hold 100."
    assert same(answer(100, 4, 1), 400), "100 tokens of 4 bytes are 400 bytes, so 400 English letters."
    assert same(answer(4096, 3, 3), 4096), "Chinese characters of 3 bytes in tokens of 3 bytes: one each."
    assert same(answer(4096, 1, 3), 4096 / 3), (
        "Byte by byte, a Chinese character takes three tokens. An average need not be whole: do not round it."
    )
    assert same(answer(10, 3.75, 1.5), 25), (
        "Ten tokens of 3.75 bytes are 37.5 bytes. Each character takes 1.5."
    )
    assert same(answer(0, 4, 1), 0), "No context, no characters."


def _counts(words):
    counts = Counter()
    for row, times in words.items():
        for pair in pairwise(row):
            counts[pair] += times
    return counts


def _smallest_of_best(counts):
    return min(counts, key=lambda pair: (-counts[pair], pair))


def _join(row, pair, new):
    joined, i = [], 0
    while i < len(row):
        met = row[i : i + 2] == pair
        joined.append(new if met else row[i])
        i += 2 if met else 1
    return tuple(joined)


def _join_once(row, pair, new):
    i = next((i for i, each in enumerate(pairwise(row)) if each == pair), None)
    return row if i is None else (*row[:i], new, *row[i + 2 :])


def _join_overlapping(row, pair, new):
    places = [i for i, each in enumerate(pairwise(row)) if each == pair]
    covered = {i + 1 for i in places}
    return tuple(new if i in places else row[i] for i in range(len(row)) if i in places or i not in covered)


def _learn(words, how_many, count=_counts, choose=_smallest_of_best, join=_join, first=256):
    merges = []
    while len(merges) < how_many and (counts := count(words)):
        merges.append(choose(counts))
        words = {join(row, merges[-1], first + len(merges) - 1): times for row, times in words.items()}
    return merges


def _each_word_once(words):
    return Counter(pair for row in words for pair in pairwise(row))


def _once_a_word(words):
    counts = Counter()
    for row, times in words.items():
        for pair in set(pairwise(row)):
            counts[pair] += times
    return counts


def _without_joining(words, how_many):
    counts = _counts(words)
    return sorted(counts, key=lambda pair: (-counts[pair], pair))[:how_many]


def _join_in_few(words, how_many, lose=False):
    """Joins a pair in the first word that has it alone; or loses the words that have it not."""
    merges = []
    while len(merges) < how_many and (counts := _counts(words)):
        pair, new = _smallest_of_best(counts), 256 + len(merges)
        merges.append(pair)
        having = [row for row in words if pair in pairwise(row)]
        changed = having if lose else having[:1]
        words = {
            _join(row, pair, new) if row in changed else row: times
            for row, times in words.items()
            if row in having or not lose
        }
    return merges


def _largest_of_best(counts):
    return max(counts, key=lambda pair: (counts[pair], pair))


@exercise(
    "learn",
    wrong=(
        _without_joining,
        lambda words, how_many: _learn(words, how_many, count=_each_word_once),
        lambda words, how_many: _learn(words, how_many, count=_once_a_word),
        lambda words, how_many: _learn(words, how_many, choose=lambda counts: counts.most_common(1)[0][0]),
        lambda words, how_many: _learn(words, how_many, choose=_largest_of_best),
        lambda words, how_many: _learn(words, how_many, join=_join_overlapping),
        lambda words, how_many: _learn(words, how_many, join=_join_once),
        lambda words, how_many: _join_in_few(words, how_many),
        lambda words, how_many: _learn({row[:4]: times for row, times in words.items()}, how_many),
        lambda words, how_many: _join_in_few(words, how_many, lose=True),
        lambda words, how_many: _learn(words, how_many, first=257),
        lambda words, how_many: _learn(words, how_many + 1),
    ),
)
def learn(answer):
    """Count, join the best, count again: that is the whole training."""
    for words, merges, why in (
        (
            {(1, 2): 1, (3, 4): 2},
            [(3, 4)],
            "The word (3, 4) occurs twice, so its pair counts two. Do you count words as often as they come?",
        ),
        ({(3, 4, 3, 4): 1, (1, 2): 1}, [(3, 4)], "A pair can stand twice in one word; it then counts twice."),
        (
            {(1, 2, 3): 2, (9, 2, 3): 2, (1, 2): 1},
            [(2, 3)],
            "The counts of all words add up, and every place of a word has a pair, not its beginning alone.",
        ),
        ({(7, 8): 3, (2, 9): 3}, [(2, 9)], "Of pairs with equal counts the smaller one comes first."),
        ({(2, 9): 1, (2, 3): 1}, [(2, 3)], "Equal counts and equal first ids: the second ids decide."),
        (
            {(1, 2, 3): 3, (1, 2): 1},
            [(1, 2), (256, 3)],
            "After the first merge the words have changed: the 2 that stood before the 3 is gone. Join the "
            "pair in all words, as the symbol 256, before you count again.",
        ),
        (
            {(1, 2, 3, 4): 5},
            [(1, 2), (3, 4), (256, 257)],
            "Each merge makes a new symbol: first 256, then 257. After two merges this word has two symbols.",
        ),
        (
            {(5, 5, 5): 2, (8, 9): 1},
            [(5, 5), (256, 5)],
            "Of three equal symbols the first two are joined, and the third is left: a symbol is used once.",
        ),
        (
            {(5, 6, 5, 6): 2, (5, 6): 1},
            [(5, 6), (256, 256)],
            "A pair that stands twice in a word is joined in both places.",
        ),
        (
            {(1, 2, 3, 4, 5, 6, 7, 5, 6): 2},
            [(5, 6), (1, 2)],
            "A word may be long: count its pairs, and join them, up to its end.",
        ),
        (
            {(7, 8): 10, (1, 2): 7, (3, 1, 2): 2, (5, 6): 4, (9, 10): 3},
            [(7, 8), (1, 2), (5, 6), (9, 10), (3, 257)],
            "Join the pair in every word that has it, and keep the words that have it not.",
        ),
    ):
        got = answer(dict(words), len(merges))
        assert len(got) == len(merges), (
            f"{words}, merges asked for: {len(merges)}; yours are {len(got)}. {why}"
        )
        assert same(got, merges), f"{words}, merges asked for: {len(merges)}. {why}"
    assert same(answer({(1, 2): 1, (5,): 9}, 5), [(1, 2)]), (
        "Five merges were asked for, but after the first no word has a pair any more. Stop there."
    )
    assert same(answer({(5,): 9}, 2), []), "A word of one symbol has no pair: nothing can be learned from it."


def _only_when_all_is_whole(tokens):
    """Prints a token only if everything before it is whole, too."""
    texts, held = [], b""
    for token in tokens:
        held += token
        try:
            texts.append(held.decode())
            held = b""
        except UnicodeDecodeError:
            texts.append("")
    return texts


def _one_or_three_bytes(tokens):
    texts, held = [], b""
    for token in tokens:
        held += token
        text = ""
        while held and len(held) >= (size := 1 if held[0] < 128 else 3):
            text += held[:size].decode("utf-8", errors="replace")
            held = held[size:]
        texts.append(text)
    return texts


@exercise(
    "printed",
    wrong=(
        lambda tokens: [token.decode("utf-8", errors="replace") for token in tokens],
        lambda tokens: [token.decode("utf-8", errors="ignore") for token in tokens],
        _only_when_all_is_whole,
        _one_or_three_bytes,
        lambda tokens: [""] * (len(tokens) - 1) + [b"".join(tokens).decode("utf-8", errors="ignore")],
    ),
)
def printed(answer):
    """Whole characters only, and each exactly once."""
    hat = "帽".encode()
    assert same(answer([b"It", b" is"]), ["It", " is"]), "Plain letters are printed at once, blanks included."
    assert same(answer([hat[:1], hat[1:2], hat[2:]]), ["", "", "帽"]), (
        "A character of three bytes, in three tokens of one: none of them is a character alone. Print "
        "nothing, nothing, and then all of it."
    )
    assert same(answer([b"a" + hat[:2], hat[2:] + b"b"]), ["a", "帽b"]), (
        "A token can end a character and begin another. Its whole characters are printed at once, and only "
        "the rest is held back."
    )
    for character in "é🙂":
        code = character.encode()
        parts = [code[:1], *(code[i : i + 1] for i in range(1, len(code))), b"!"]
        assert same(answer(parts), [""] * (len(code) - 1) + [character, "!"]), (
            f"Characters have one to four bytes; {character} has {len(code)}."
        )
    assert same(answer([b"a", hat[:2]]), ["a", ""]), (
        "The text is cut off inside a character: print nothing of it."
    )
    assert same(answer([b"x" + hat + hat[:1], b"", hat[1:]]), ["x帽", "", "帽"]), (
        "A token may hold several characters and a part of the next, and a token may be empty."
    )
    assert same(answer([]), []), "No token, nothing to print: an empty list."


def _sizes(config):
    return count_parameters(config).others, config.vocab_size * config.hidden_size


def _by_the_flag(config):
    body, table = _sizes(config)
    return 0 if config.tie_word_embeddings else table / (body + 2 * table)


@exercise(
    "saved by tying",
    wrong=(
        lambda config: _sizes(config)[1],
        lambda config: _sizes(config)[1] / sum(_sizes(config)),
        lambda config: 2 * _sizes(config)[1] / (_sizes(config)[0] + 2 * _sizes(config)[1]),
        lambda config: _sizes(config)[1] / _sizes(config)[0],
        lambda config: 100 * _sizes(config)[1] / (_sizes(config)[0] + 2 * _sizes(config)[1]),
        _by_the_flag,
    ),
)
def saved_by_tying(answer):
    """One of two equal tables goes; the whole is body and two tables."""
    for name in ("minicpm4-8b", "minicpm4-0.5b", "lite-1m"):
        config = load_config(name)
        body, table = _sizes(config)
        got = answer(config)
        assert 0 <= got <= 1, "A share was asked for, from 0 to 1: not per cent, not a number of parameters."
        assert not same(got, 2 * table / (body + 2 * table)), (
            "Tying saves one of the two tables; the other is still needed."
        )
        assert not same(got, table / (body + table)), (
            "This is what a second table adds to the tied model. Asked was the share of the untied model, "
            "which has two tables."
        )
        assert got > 0, (
            f"{name} is tied already, but the question is what tying saves. Do not look at the config's flag."
        )
        assert same(got, table / (body + 2 * table)), (
            f"For {name}: the body has {body:,} parameters, and one table has {table:,}. Which part of the "
            "untied model goes?"
        )


def _cost(N, d, size, held, overhead):
    return (2 * (N + size * d) + overhead) / held


def _best(N, d, sizes, bytes_a_token, overhead, cost=_cost):
    costs = [cost(N, d, size, held, overhead) for size, held in zip(sizes, bytes_a_token, strict=True)]
    return sizes[costs.index(min(costs))]


@exercise(
    "best size",
    wrong=(
        lambda N, d, sizes, bytes_a_token, overhead: sizes[bytes_a_token.index(max(bytes_a_token))],
        lambda N, d, sizes, bytes_a_token, overhead: _best(N, d, sizes, bytes_a_token, 0),
        lambda N, d, sizes, bytes_a_token, overhead: _best(N, d, sizes, bytes_a_token, 2 * overhead),
        lambda N, d, sizes, bytes_a_token, overhead: _best(N, d, sizes, bytes_a_token, overhead / 2),
        lambda N, d, sizes, bytes_a_token, overhead: _best(N, d, sizes, bytes_a_token, overhead / 1.25),
        lambda N, d, sizes, bytes_a_token, overhead: _best(N, 1, sizes, bytes_a_token, overhead),
        lambda *given: _best(*given, cost=lambda *each: math.floor(_cost(*each))),
        lambda *given: _best(*given, cost=lambda *each: round(_cost(*each))),
        lambda *given: _best(*given, cost=lambda *each: math.ceil(_cost(*each))),
        lambda N, d, sizes, bytes_a_token, overhead: _best(0, d, sizes, bytes_a_token, overhead),
        lambda N, d, sizes, bytes_a_token, overhead: _best(
            N,
            d,
            sizes,
            bytes_a_token,
            overhead,
            lambda N, d, size, held, more: 2 * (N + size * d) / held + more,
        ),
        lambda N, d, sizes, bytes_a_token, overhead: _best(
            N, d, sizes, bytes_a_token, overhead, lambda N, d, size, held, more: 2 * (N + size * d) + more
        ),
    ),
)
def best_size(answer):
    """All FLOPs of a token, divided by the bytes it holds."""
    sizes, held = [256, 1024, 4096], [1.0, 2.0, 3.0]
    assert same(answer(10**9, 1, sizes, held, 0), 4096), (
        "With a huge body the output layer is nothing: the longest tokens win."
    )
    assert same(answer(1, 10**6, sizes, held, 0), 256), (
        "With hardly a body, four times the entries for twice the bytes do not pay."
    )
    assert same(answer(1_000, 1, sizes, held, 0), 1024), (
        "1,000 parameters, width 1: compare (1,000 + 256)/1, (1,000 + 1,024)/2 and (1,000 + 4,096)/3."
    )
    assert same(answer(1_000, 10, sizes, held, 0), 256), (
        "1,000 parameters, width 10: every entry is a row of 10 numbers. Does your answer use `d`?"
    )
    assert same(answer(1_000, 1, sizes, held, 20_000), 4096), (
        "What a token costs besides makes longer tokens pay: add it to a token's FLOPs, before you divide."
    )
    assert same(answer(1_000, 1, sizes, held, 6_000), 1024), (
        "Each parameter costs two FLOPs, but the 6,000 that a token costs besides are FLOPs already."
    )
    for overhead, best in ((8_100, 1024), (8_400, 4096)):  # at 8,240 the two cost the same
        assert same(answer(1_000, 1, sizes, held, overhead), best), (
            f"Each parameter costs two FLOPs a token: compare (2 · 2,024 + {overhead:,})/2 with "
            f"(2 · 5,096 + {overhead:,})/3."
        )
    assert same(answer(1_000, 1, sizes, [1.0, 1.1, 1.2], 0), 256), (
        "Four times the entries for a tenth more bytes do not pay. Does your answer use `bytes_a_token`?"
    )
    assert same(answer(1, 1, [2, 3], [2.1, 3.0], 0), 3), (
        "6 FLOPs for 2.1 bytes are 2.86 a byte, 8 for 3 are 2.67. Costs need not be whole: do not round them."
    )
    assert same(answer(1_000, 1, [900, 300], [2.0, 1.0], 0), 900), (
        "Two sizes, the larger first: the answer is one of the sizes given, in whatever order they stand."
    )
    assert same(answer(1, 1, [2, 3], [2.1, 3.0], 0), 3), (
        "6 FLOPs for 2.1 bytes are 2.86 a byte, 8 for 3 are 2.67: do not round before you compare."
    )


quiz = Quiz(
    [
        (
            "A byte-level vocabulary meets a character that is not in its training text. It gives",
            ["a token for “unknown”", "an error", "the bytes of the character"],
            2,
            "All 256 bytes have entries, so any text can be written.",
        ),
        (
            "Model A has a loss of 3.1 nats a token, model B 3.6. B has the larger vocabulary. Better is",
            ["A", "B", "cannot be said"],
            2,
            "Divide each by the bytes that its tokens hold. B's hold more.",
        ),
        (
            "What does tying the two tables save when the model writes a token?",
            ["half of the output layer's FLOPs", "memory, but no FLOPs", "the lookup"],
            1,
            "The output layer multiplies the whole table as before. The lookup never cost anything.",
        ),
        (
            "You add a third language with a script of its own to the training text and keep the number of "
            "entries. For the first two, tokens become",
            ["shorter", "longer", "neither"],
            0,
            "The entries are a budget. What the third takes, the others lose.",
        ),
        (
            "Two trainings on the same text give different vocabularies. The most likely reason is",
            ["a random start", "no rule for equal counts", "rounding"],
            1,
            "BPE has no random numbers and only whole ones. But pairs with equal counts are common, and a "
            "program may meet them in any order.",
        ),
    ]
)
