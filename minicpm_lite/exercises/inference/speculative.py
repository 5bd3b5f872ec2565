"""Checks and quiz of the chapter on speculative decoding."""

from heapq import heappop, heappush
from itertools import product

import torch
from torch import Tensor

from ...lab.exercises import exercise
from ...lab.mistakes import same
from ...lab.quiz import Quiz


def _ids(tokens):
    """Token ids as a list, whatever they came in."""
    return [int(each) for each in (tokens.tolist() if isinstance(tokens, Tensor) else tokens)]


def _look_up(
    text, longest, guesses, shortest=1, first=False, itself=0, shift=0, upwards=False, left=1, unseen=0,
    apart=False,
):  # fmt: skip
    sizes = range(min(longest, len(text) - left), shortest - 1, -1)
    for size in sorted(sizes) if upwards else sizes:
        ends = [
            end
            for end in range(size + unseen, len(text) + itself)
            if text[end - size : end] == text[len(text) - size :] and not (apart and end > len(text) - size)
        ]
        if ends:
            end = ends[0] if first else ends[-1]
            return text[end + shift : end + shift + guesses]
    return []


@exercise(
    "look up",
    wrong=(
        lambda text, longest, guesses: _look_up(text, 1, guesses),  # the newest token alone
        lambda text, longest, guesses: _look_up(text, longest, guesses, shortest=longest),
        lambda text, longest, guesses: _look_up(text, longest, guesses, first=True),
        lambda text, longest, guesses: _look_up(text, longest, guesses, upwards=True),
        lambda text, longest, guesses: _look_up(text, longest, guesses, itself=1),  # it finds the end itself
        lambda text, longest, guesses: _look_up(text, longest, guesses, shift=-1),
        lambda text, longest, guesses: _look_up(text, longest, guesses, shift=1),
        lambda text, longest, guesses: _look_up(text, longest, len(text)),
        lambda text, longest, guesses: _look_up(text, longest, guesses + 1),
        lambda text, longest, guesses: _look_up(text, longest + 1, guesses),
        lambda text, longest, guesses: _look_up(text, longest, guesses, unseen=1),  # not at the beginning
        lambda text, longest, guesses: _look_up(text, longest, guesses, left=2),
        lambda text, longest, guesses: _look_up(text, longest, guesses, apart=True),  # no place that overlaps
    ),
)
def look_up(answer):
    """The longest end of the text that stood there before says best how it goes on."""
    cases = (
        ([1, 2, 3, 4, 1, 2], 3, 2, "1 2 stood at the beginning, and 3 4 came behind it."),
        ([1, 2, 3, 4, 1, 2], 3, 9, "All that came behind it, if it is fewer than asked for."),
        (
            [5, 1, 2, 7, 6, 2, 8, 5, 1, 2],
            3,
            1,
            "5 1 2 stood there before and was followed by 7; 2 alone was last followed by 8. Try the longest "
            "first.",
        ),
        (
            [5, 1, 2, 7, 6, 2, 8, 5, 1, 2],
            1,
            1,
            "`longest` is 1: the newest token alone counts, and was last followed by 8.",
        ),
        ([9, 4, 8, 9, 3, 7, 9], 2, 2, "Of two places the later one: 9 was last followed by 3 7."),
        ([1, 2, 9, 3, 2], 2, 2, "3 2 stood nowhere; 2 did. Then a shorter end counts."),
        ([1, 2, 3], 3, 4, "3 stood nowhere before: no guess, []. The end of the text is no place before it."),
        ([4, 4, 4], 2, 3, "4 4 stood one place earlier, and a 4 came behind it."),
        ([4, 4, 4, 4], 3, 4, "4 4 4 stood one place earlier; the two places may overlap."),
        ([1, 2, 3, 1], 3, 2, "The 1 stood at the very beginning, and nowhere else before: look there, too."),
        ([5, 6, 9, 5, 6], 2, 3, "5 6 stood at the very beginning: look there, too."),
        ([4, 4], 2, 3, "The 4 stood one place earlier: of a text of two tokens the newest one can be found."),
        ([7], 3, 3, "A text of one token: nothing stands before it."),
    )
    for text, longest, guesses, hint in cases:
        got = _ids(answer(list(text), longest, guesses))
        expected = _look_up(text, longest, guesses)
        assert got == expected, (
            f"look_up({text}, {longest}, {guesses}) should be {expected}, and not {got}. {hint}"
        )


def _left(p, q, guess, rest):
    """What a token is drawn from after a refusal, not divided: right, or by a mistake."""
    return {
        "residual": (p - q).clamp(min=0),
        "p": p.clone(),
        "q": q.clone(),
        "other way": (q - p).clamp(min=0),
        "size": (p - q).abs(),
        "guess alone": p.scatter(0, torch.tensor(guess), 0.0),
    }[rest]


def _check_chain(
    p, q, guesses, luck, exchanged=False, at_least=False, rest="residual", divide=True, last=0, going=False
):
    kept = 0
    for place, guess in enumerate(guesses):
        ratio = q[place, guess] / p[place, guess] if exchanged else p[place, guess] / q[place, guess]
        if luck[place] < ratio or (at_least and luck[place] <= ratio):
            kept += 1
        elif not going:
            law = _left(p[place], q[place], guess, rest)
            return kept, law / law.sum() if divide else law
    return kept, p[kept - last]


_TEA, _TEA_DRAFT = [0.5, 0.3, 0.2], [0.2, 0.7, 0.1]


def _chains():
    """Laws, guesses, luck, and what a case is about."""
    tea = torch.tensor([_TEA, [0.1, 0.2, 0.7], [0.4, 0.4, 0.2]]).double()
    draft = torch.tensor([_TEA_DRAFT, [0.3, 0.5, 0.2]]).double()
    yield (
        *(tea, draft, [1, 2], [0.4, 0.9]),
        "coffee: 0.3 / 0.7 is 0.43, and 0.4 is less; then 0.7 / 0.2 is more than 1. Both are kept, and the "
        "next token comes from the last row of p.",
    )
    yield (
        *(tea, draft, [1, 2], [0.5, 0.1]),
        "coffee: 0.5 is not less than 0.43. The guess is refused, and the next token comes from the residual "
        "(0.3, 0, 0.1) / 0.4. What follows a refused guess is not asked.",
    )
    yield (
        *(tea, draft, [0, 0], [0.99, 0.4]),
        "tea has p = 0.5 and q = 0.2, so it is kept whatever the luck. The second guess has 0.1 / 0.3, which "
        "is less than 0.4: refused, and the residual is that of the second place.",
    )
    yield tea[:1], draft[:0], [], [], "No guess at all: the token comes from the only law there is."
    yield tea[:2], tea[:1], [1], [0.999], "Where q is p, every guess is kept."
    never = torch.tensor([[0.0, 1.0], [0.5, 0.5]]).double()
    yield (
        *(never, torch.tensor([[0.5, 0.5]]).double(), [0], [0.0]),
        "A token that the model never writes is refused, even with a luck of 0: keep a guess if its luck is "
        "*less than* p / q.",
    )
    random = torch.Generator().manual_seed(0)
    p = torch.rand(5, 7, generator=random, dtype=torch.float64).softmax(-1)
    q = (4 * torch.rand(4, 7, generator=random, dtype=torch.float64)).softmax(-1)
    for luck in ([0.1, 0.1, 0.1, 0.1], [0.1, 0.2, 0.97, 0.1], [0.1, 0.1, 0.1, 0.99]):
        yield p, q, q.argmax(-1).tolist(), luck, "Four guesses among seven tokens."


@exercise(
    "check chain",
    wrong=(
        lambda p, q, guesses, luck: _check_chain(
            p, q, guesses, luck, rest="p"
        ),  # drawn anew, as it seems fair
        lambda p, q, guesses, luck: _check_chain(p, q, guesses, luck, rest="q"),
        lambda p, q, guesses, luck: _check_chain(p, q, guesses, luck, rest="guess alone"),
        lambda p, q, guesses, luck: _check_chain(p, q, guesses, luck, rest="other way"),
        lambda p, q, guesses, luck: _check_chain(p, q, guesses, luck, rest="size"),
        lambda p, q, guesses, luck: _check_chain(p, q, guesses, luck, divide=False),
        lambda p, q, guesses, luck: _check_chain(p, q, guesses, luck, exchanged=True),
        lambda p, q, guesses, luck: _check_chain(p, q, guesses, luck, at_least=True),
        lambda p, q, guesses, luck: _check_chain(p, q, guesses, luck, going=True),
        lambda p, q, guesses, luck: _check_chain(p, q, guesses, luck, last=min(1, len(guesses))),
        lambda p, q, guesses, luck: _check_chain(p, q, guesses, [0.5] * len(guesses)),
        lambda p, q, guesses, luck: _check_chain(p, q, p[:-1].argmax(-1).tolist(), luck),
        lambda p, q, guesses, luck: (_check_chain(p, q, guesses, luck), p[: len(q)].sub_(q))[0],  # in place
    ),
)
def check_chain(answer):
    """Kept with min(1, p / q), and else drawn from what q has not offered enough of: together exactly p."""
    for p, q, guesses, luck, hint in _chains():
        laws = p.clone(), q.clone()
        got = answer(*laws, list(guesses), list(luck))
        assert isinstance(got, tuple | list) and len(got) == 2, (
            "Return two things: how many guesses are kept, and the law of the token that follows them."
        )
        assert torch.equal(laws[0], p) and torch.equal(laws[1], q), (
            "The laws that were given were changed, and whoever asks still needs them. Make new ones."
        )
        kept, law = int(got[0]), torch.as_tensor(got[1]).double()
        wanted, expected = _check_chain(p, q, guesses, luck)
        assert kept == wanted, (
            f"Guesses {guesses} with the luck {luck}: {wanted} are kept, and not {kept}. {hint}"
        )
        assert law.shape == expected.shape, (
            f"The law has shape {tuple(law.shape)}; expected one probability for each of the "
            f"{len(expected)} tokens."
        )
        assert same(law, expected, 1e-5), (
            f"Guesses {guesses} with the luck {luck}: the next token comes from "
            f"({', '.join(f'{each:.3f}' for each in expected.tolist())}), and not from "
            f"({', '.join(f'{each:.3f}' for each in law.tolist())}). {hint}"
        )


@exercise("forecast", wrong=(1.9375, 2.0, 2.5, 3.5, 5, 1.94, 4, "3"))
def forecast_length(answer):
    """Half of the calls write five tokens and half write one. Luck that comes in streaks is worth more."""
    assert not isinstance(answer, str), f"Expected a number, not the text {answer!r}."
    answer = float(answer)
    assert abs(answer - 1.9375) > 0.02, (
        "That is the sum 1 + a + a² + a³ + a⁴ for a = 0.5. It holds where each guess has luck of its own."
    )
    assert abs(answer - 2) > 0.02, "So many guesses are kept on average. What else does a call write?"
    assert abs(answer - 3) < 0.01, (
        "There are two kinds of calls. How many tokens does one write in which all four guesses are right, "
        "and how many one in which none is?"
    )


def _length(alpha, guesses):
    return sum(alpha**place for place in range(guesses + 1))


def _best_guesses(alpha, calls, draft, length=_length, shift=0, least=0, share=1.0):
    return max(
        range(least, len(calls)),
        key=lambda k: length(alpha, k) / (share * calls[max(k - shift, 0)] + k * draft),
    )


_MACHINES = (
    (0.8, [1.0, 1.02, 1.05, 1.1, 1.2, 1.3, 1.45, 1.6, 1.8], 0.05),
    (0.8, [1.0, 1.02, 1.05, 1.1, 1.2, 1.3, 1.45, 1.6, 1.8], 0.4),
    (0.5, [1.0, 1.02, 1.05, 1.1, 1.2, 1.3, 1.45, 1.6, 1.8], 0.05),
    (0.2, [1.0, 1.3, 1.6, 1.9], 0.1),  # none pays
    (0.95, [40.0, 41.0, 42.0, 43.0, 44.0, 45.0, 46.0, 80.0, 81.0], 0.0),  # milliseconds, and a step
    (0.9, [1.0, 2.0, 3.0, 4.0, 5.0], 0.0),  # a call that costs by the token
    (0.7, [0.02, 0.021], 0.001),
    (0.8, [20.0, 20.4, 21.0, 22.0, 24.0, 26.0], 1.0),  # milliseconds of both
    (0.85, [9.4, 10.6, 11.8, 12.0, 15.7, 15.9, 15.5, 15.6], 0.0),  # steps: better, worse, best
)


def _up_the_hill(alpha, calls, draft):
    guesses = 0
    while guesses + 1 < len(calls) and _best_guesses(alpha, calls[: guesses + 2], draft) > guesses:
        guesses += 1
    return guesses


@exercise(
    "best number",
    wrong=(
        lambda alpha, calls, draft: _best_guesses(alpha, calls, 0),  # the draft is free
        lambda alpha, calls, draft: _best_guesses(alpha, [calls[0]] * len(calls), draft),  # so are the calls
        lambda alpha, calls, draft: len(calls) - 1,  # the more the better
        lambda alpha, calls, draft: _best_guesses(alpha, calls, draft, least=1),
        lambda alpha, calls, draft: _best_guesses(alpha, calls, draft, shift=1),
        lambda alpha, calls, draft: _best_guesses(alpha, calls, draft, length=lambda a, k: a * k + 1),
        lambda alpha, calls, draft: _best_guesses(
            alpha, calls, draft, length=lambda a, k: _length(a, k) - 1 + 1e-9
        ),
        lambda alpha, calls, draft: _best_guesses(alpha, calls, draft, share=0.0) if draft else 0,
        lambda alpha, calls, draft: _best_guesses(0.8, calls, draft),
        lambda alpha, calls, draft: _best_guesses(alpha, calls, draft) + 1,
        lambda alpha, calls, draft: round(1 / (1 - alpha)),
        _up_the_hill,
        lambda alpha, calls, draft: _best_guesses(alpha, [call / calls[0] for call in calls], draft),
    ),
)
def best_guesses(answer):
    """Each further guess brings less than the one before, and has its price: so there is a best number."""
    for alpha, calls, draft in _MACHINES:
        got, expected = answer(alpha, list(calls), draft), _best_guesses(alpha, calls, draft)
        assert float(got) == int(got), f"Expected a whole number of guesses, and not {got}."
        assert int(got) == expected, (
            f"Each guess kept with chance {alpha}, calls of 1, 2, … tokens take {calls}, a step of the draft "
            f"{draft}: {expected} guesses are fastest, and not {int(got)}. Tokens that a call writes, over "
            "the call of 1 + k tokens and k steps of the draft; and k = 0 is plain decoding."
        )


def _depths(parents):
    depths = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return depths


def _sight(parents, own=True, only_parent=False, causal=False, children=False, siblings=False):
    size = len(parents)
    sees = torch.eye(size, dtype=torch.bool) if own else torch.zeros(size, size, dtype=torch.bool)
    for place, parent in enumerate(parents):
        if causal:
            sees[place, :place] = True
        elif only_parent:
            sees[place, parent] |= parent >= 0
        else:
            while parent >= 0:
                sees[place, parent] = True
                parent = parents[parent]
    if siblings:
        for place, parent in enumerate(parents):
            sees[place] |= torch.tensor([other == parent for other in parents])
    return sees.T if children else sees


_TREES = ([-1, 0, 0, 1, 1, 2], [-1, 0, 1, 2, 3], [-1, -1, 0, 1, 1, 4, 2], [-1], [-1, 0, 0, 0, 3, 4, 1, 6])


@exercise(
    "what guesses see",
    wrong=(
        lambda parents: (_sight(parents, causal=True), _depths(parents)),  # as in a text
        lambda parents: (_sight(parents, only_parent=True), _depths(parents)),
        lambda parents: (_sight(parents, own=False), _depths(parents)),
        lambda parents: (_sight(parents, children=True), _depths(parents)),
        lambda parents: (_sight(parents, siblings=True), _depths(parents)),
        lambda parents: (_sight(parents), list(range(len(parents)))),  # places in the list
        lambda parents: (_sight(parents), [each + 1 for each in _depths(parents)]),
        lambda parents: (_sight(parents), [max(parent + 1, 0) for parent in parents]),
        lambda parents: (_sight([-1, 0, 0, 1, 1, 2][: len(parents)]), _depths(parents)),
    ),
)
def tree_sight(answer):
    """Each guess sees itself and those before it on its branch, and their number says where it stands."""
    for parents in _TREES:
        got = answer(list(parents))
        assert isinstance(got, tuple | list) and len(got) == 2, (
            "Return two things: what is seen, and the depths."
        )
        sees, depths = torch.as_tensor(got[0]), torch.as_tensor(got[1])
        size = len(parents)
        assert sees.shape == (size, size), (
            f"For {size} tokens the first result has shape {tuple(sees.shape)}; expected a row and a column "
            "for each."
        )
        assert [int(each) for each in depths.flatten()] == _depths(parents), (
            f"Parents {parents}: the depths are {_depths(parents)}. A token that follows the text has depth "
            "0, any other one more than its parent; where it stands in the list says nothing."
        )
        expected = _sight(parents)
        for place in range(size):
            seen = [int(each) for each in sees[place].bool().nonzero().flatten()]
            wanted = [int(each) for each in expected[place].nonzero().flatten()]
            assert seen == wanted, (
                f"Parents {parents}: token {place} sees {wanted}, and not {seen}: itself, its parent, the "
                "parent's parent, and so on; and no token of another branch."
            )


def _place(p, guesses, luck, meets_p=False, divide=True, rest="law", twice=False, zero=True):
    law = p.clone()
    for place, guess in enumerate(guesses):
        if luck[place] < (p if meets_p else law)[guess]:
            return place, None
        if zero and not (twice and guess in guesses[:place]):
            law[guess] = 0
        if divide:
            law = law / law.sum()
    return None, {"law": law, "p": p, "even": torch.ones_like(p) / len(p)}[rest]


def _in_place(p, guesses, luck):
    """It changes the law that it was given."""
    for place, guess in enumerate(guesses):
        if luck[place] < p[guess]:
            return place, None
        p[guess] = 0
        p /= p.sum()
    return None, p


@exercise(
    "mended place",
    wrong=(
        lambda p, guesses, luck: _place(p, guesses, luck, meets_p=True, divide=False, rest="p"),  # as broken
        lambda p, guesses, luck: _place(p, guesses, luck, meets_p=True),
        lambda p, guesses, luck: _place(p, guesses, luck, divide=False),
        lambda p, guesses, luck: _place(p, guesses, luck, rest="p"),
        lambda p, guesses, luck: _place(p, guesses, luck, rest="even"),
        lambda p, guesses, luck: _place(p, guesses, luck, zero=False),
        lambda p, guesses, luck: _place(p, guesses[:1], luck),
        lambda p, guesses, luck: _place(p, guesses, luck[:1] * len(luck)),
        lambda p, guesses, luck: (int(p.argmax() == guesses[0]) - 1, p),
        _in_place,
    ),
)
def mended_place(answer):
    """Each refused guess leaves the law, which is divided by what is left; the next one meets that."""
    tea = torch.tensor(_TEA).double()
    cases = (
        (tea, [1, 0], [0.2, 0.9], "coffee has 0.3, and 0.2 is less: the first guess is kept."),
        (
            tea,
            [1, 0],
            [0.4, 0.6],
            "coffee is refused. Then tea has 0.5 / 0.7 = 0.71, and not 0.5: of the calls that come so far "
            "more write tea.",
        ),
        (
            tea,
            [1, 0],
            [0.4, 0.8],
            "Both are refused, so that only cocoa is left, and it is certain.",
        ),
        (tea, [0], [0.7], "tea alone was guessed and refused: 0.3 and 0.2 are left, divided by their sum."),
        (
            tea,
            [1, 1],
            [0.4, 0.0],
            "A guess that comes twice was refused before: its probability is 0 by now.",
        ),
        (tea, [], [], "No guess: the token comes from p."),
        (
            torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25]).double(),
            [2, 4, 1],
            [0.31, 0.5, 0.7],
            "Three guesses of five tokens.",
        ),
    )
    for p, guesses, luck, hint in cases:
        given = p.clone()
        got = answer(given, list(guesses), list(luck))
        assert isinstance(got, tuple | list) and len(got) == 2, (
            "Return two things: which guess is kept (its place, or None), and the law that is left."
        )
        assert same(given, p), "The law that was given was changed. Whoever called may still need it."
        which, expected = _place(p, guesses, luck)
        named = "none is kept" if which is None else f"the guess in place {which} is kept"
        assert (got[0] is None) == (which is None) and (which is None or int(got[0]) == which), (
            f"Guesses {guesses} with the luck {luck}: {named}, and you return {got[0]}. {hint}"
        )
        if which is None:
            law = torch.as_tensor(got[1]).double()
            assert law.shape == expected.shape and same(law, expected, 1e-6), (
                f"Guesses {guesses} with the luck {luck}: none is kept, and the token comes from "
                f"({', '.join(f'{each:.3f}' for each in expected.tolist())}). {hint}"
            )


def _shuffled(tokens, start, stop, generator, first=None, order=None):
    part = tokens[start:stop]
    order = torch.randperm(len(part), generator=generator).tolist() if order is None else order(len(part))
    return [*tokens[:start], *(part[place] for place in order), *tokens[stop:]]


def _shuffles(answer, tokens, start, stop, seeds):
    """What an answer makes of a text with some seeds, and whether it left the text as it was."""
    given, found = list(tokens), []
    for seed in seeds:
        found.append(_ids(answer(given, start, stop, torch.Generator().manual_seed(seed))))
    return {"found": found, "whole": given == list(tokens)}


def _shuffled_there(tokens, start, stop, generator):
    tokens[start:stop] = _shuffled(tokens, start, stop, generator)[start:stop]
    return tokens


@exercise(
    "shuffled",
    ask=_shuffles,
    wrong=(
        lambda tokens, start, stop, generator: tokens,  # nothing is done
        lambda tokens, start, stop, generator: _shuffled(tokens, 0, len(tokens), generator),
        lambda tokens, start, stop, generator: _shuffled(tokens, start, stop, None),  # another chance
        lambda tokens, start, stop, generator: _shuffled(
            tokens, start, stop, torch.Generator().manual_seed(0)
        ),
        lambda tokens, start, stop, generator: _shuffled(
            tokens, start, stop, None, order=lambda size: range(size - 1, -1, -1)
        ),
        lambda tokens, start, stop, generator: _shuffled(
            tokens, start, stop, None, order=lambda size: [*range(1, size), 0][:size]
        ),
        lambda tokens, start, stop, generator: _shuffled(tokens, start, stop + 1, generator),
        lambda tokens, start, stop, generator: _shuffled(tokens, start + 1, stop, generator),
        lambda tokens, start, stop, generator: _shuffled(tokens, start, stop, generator)[start:stop],
        lambda tokens, start, stop, generator: [
            *tokens[:start],
            *torch.randint(100, (stop - start,), generator=generator).tolist(),
            *tokens[stop:],
        ],
        _shuffled_there,
    ),
)
def shuffled(answer):
    """The same tokens, as many, in no order: if the gain stays, it was not the copying."""
    text = [*range(100, 140), 7, 7, 8]
    for start, stop in ((5, 35), (0, 43), (10, 42)):
        told = answer(text, start, stop, (1, 1, 2, 3))
        found = told["found"]
        for tokens in found:
            assert len(tokens) == len(text), (
                f"The text has {len(text)} tokens and yours {len(tokens)}: return the whole text, and not "
                "the passage alone."
            )
            assert tokens[:start] == text[:start] and tokens[stop:] == text[stop:], (
                f"Tokens {start} to {stop - 1} are the passage; what stands before or behind has changed."
            )
            assert sorted(tokens[start:stop]) == sorted(text[start:stop]), (
                "The passage holds other tokens than before. A control differs in one thing, here the order."
            )
        assert told["whole"], (
            "The text that was given was changed. Make a copy: the other arm still needs it."
        )
        assert found[0] != text, "The passage stands as before."
        assert found[0] == found[1], "The same seed gave two orders: draw with the generator that is given."
        assert found[1] != found[2] and found[2] != found[3], (
            "Other seeds gave the same order: draw with the generator that is given."
        )
        pairs = {*zip(text[start:stop], text[start + 1 : stop], strict=False)}
        kept = sum(
            pair in pairs for pair in zip(found[2][start:stop], found[2][start + 1 : stop], strict=False)
        )
        assert kept < 0.3 * (stop - start), (
            f"{kept} of {stop - start - 1} neighbours are still neighbours, so there is as much to copy."
        )
    assert answer(text, 4, 4, (1,))["found"] == [text], "An empty passage: the text stays as it is."
    other = [*range(50, 90)]
    assert answer(other, 4, 5, (1,))["found"] == [other], "A passage of one token: the text stays as it is."


def _best_length(chances, guesses):
    waiting, length = [], 1.0
    for chance in chances:
        heappush(waiting, -chance)
    for _ in range(guesses):
        best = -heappop(waiting)
        length += best
        for chance in chances:
            heappush(waiting, -best * chance)
    return length


def _by_levels(chances, guesses, wide):
    """A tree with so many guesses at each place, filled level by level."""
    products = sorted(
        (-_product(path) for depth in range(1, guesses + 1) for path in product(chances[:wide], repeat=depth))
        if wide == 1
        else (-_product(path) for depth in range(1, 4) for path in product(chances[:wide], repeat=depth))
    )
    return 1 - sum(products[:guesses])


def _product(factors):
    found = 1.0
    for factor in factors:
        found *= factor
    return found


@exercise(
    "best tree",
    wrong=(
        lambda chances, guesses: _by_levels(chances, guesses, 1),  # a chain
        lambda chances, guesses: 1 + sum(sorted(chances, reverse=True)[:guesses]),  # all for one place
        lambda chances, guesses: _best_length(chances, guesses) - 1,  # without the model's own token
        lambda chances, guesses: _best_length(chances[:2], guesses),
        lambda chances, guesses: _best_length(chances, guesses + 1),
        lambda chances, guesses: _best_length(chances, 8),
        lambda chances, guesses: _best_length([0.6, 0.2, 0.1], guesses),
        lambda chances, guesses: sum(sum(chances) ** place for place in range(guesses + 1)),
        lambda chances, guesses: 1 + guesses * chances[0],
    ),
)
def best_length(answer):
    """The likeliest paths first: none is likelier than its beginning, so they are a tree, and the best."""
    for chances, guesses in (
        ([0.6, 0.2, 0.1], 1),
        ([0.6, 0.2, 0.1], 2),
        ([0.6, 0.2, 0.1], 4),
        ([0.6, 0.2, 0.1], 8),
        ([0.5, 0.4], 6),
        ([0.9], 5),
        ([0.9, 0.05], 12),
        ([0.3, 0.25, 0.2, 0.15], 10),
    ):
        got, expected = float(answer(list(chances), guesses)), _best_length(chances, guesses)
        assert got <= expected + 1e-6, (
            f"Chances {chances}, {guesses} guesses: a call writes {expected:.3f} tokens at best, and yours "
            f"is {got:.3f}. No guess counts twice, and there are {guesses} beside the model's own token."
        )
        assert got >= expected - 1e-6, (
            f"Chances {chances}, {guesses} guesses: a call can write {expected:.3f} tokens, and yours is "
            f"{got:.3f}. A guess is worth the product of the chances on its path. Which guess that could be "
            "added next is worth most?"
        )


def _replayed(right, most, forward=1, counted=0, cut=True):
    """Tokens a call: right, or by a mistake."""
    place = calls = 0
    while place < len(right):
        place += min(right[place], most) + forward
        calls += 1
    return (len(right) if cut else place) / calls + counted


_ANSWERS = (
    ([4, 3, 2, 1, 0, 0, 0, 4, 3, 2, 1, 0], 7, "Calls begin at places 0, 5, 6 and 7: 12 tokens in 4 calls."),
    ([4, 3, 2, 1, 0, 0, 0, 4, 3, 2, 1, 0], 2, "At most two guesses: calls at 0, 3, 5, 6, 7 and 10."),
    ([0, 0, 0, 0, 0], 4, "Nothing is right: each call writes a token of its own."),
    ([5, 4, 3, 2, 1, 0], 5, "All is right: one call writes everything."),
    ([0, 2, 1, 0, 1, 0, 3, 2, 1], 4, "The last call would write more, but the answer ends."),
    ([0, 5, 4, 3, 2, 1, 0, 0, 1, 0, 2, 1, 0, 0], 3, "A streak that is longer than the guesses."),
    ([3, 2, 1, 0, 2, 1, 0], 1, "One guess a call."),
    ([0], 3, "An answer of one token."),
)


@exercise(
    "replay",
    wrong=(
        lambda right, most: sum(min(each, most) + 1 for each in right) / len(right),  # all places
        lambda right, most: sum(min(each, most) for each in right) / len(right),
        lambda right, most: _replayed(right, len(right)),  # `most` is not asked
        lambda right, most: _replayed(right, 4),
        lambda right, most: _replayed(right, most, counted=-1),  # without the model's own token
        lambda right, most: _replayed(right, most, cut=False),  # beyond the end
        lambda right, most: _replayed(right, most - 1),
        lambda right, most: _replayed(right, most + 1),
        lambda right, most: 1 / _replayed(right, most),
        lambda right, most: most + 1,
        lambda right, most: 3.0,
    ),
)
def replayed(answer):
    """A call begins where the one before has ended; what lies between is never asked."""
    for right, most, hint in _ANSWERS:
        got, expected = float(answer(list(right), most)), _replayed(right, most)
        assert abs(got - expected) < 1e-6, (
            f"replayed({right}, {most}) should be {expected:.3f}, and not {got:.3f}. {hint} A call writes "
            "the guesses that are right, up to `most`, and one token more; the next one begins behind them."
        )


quiz = Quiz(
    [
        (
            "Checking eight guesses takes hardly longer than writing one token, because",
            [
                "the weights are read once for all of them, and reading is what takes the time",
                "the draft has computed most of it before",
                "guesses need no attention",
            ],
            0,
            "A step waits for the weights. Once they are there, nine products with each take little longer "
            "than one.",
        ),
        (
            "A draft offers a token with q = 0.8, to which the model gives p = 0.2. It is kept with chance",
            ["0.2", "0.25", "0.8"],
            1,
            "p / q. Offered with 0.8 and kept with 0.25, it is written with 0.2, as it should be.",
        ),
        (
            "A guess is refused. From what is the token drawn that stands there instead?",
            [
                "From p, the model's law of this place",
                "From the positive part of p - q, divided by its sum",
                "From p without the refused token, always",
            ],
            1,
            "Of some tokens the draft has offered enough already. What is still owed is the positive part of "
            "p - q. (Taking the token out of p is the same only where the guess was chosen and not drawn.)",
        ),
        (
            "A worse draft makes the text",
            ["worse", "slower to come, and no worse", "shorter"],
            1,
            "What is written has the model's own law, whatever the draft offers. It decides the time alone.",
        ),
        (
            "Two guesses stand side by side in a tree, both for the same place. In the mask",
            [
                "the second sees the first, since it stands behind it in memory",
                "neither sees the other, and both have the same position",
                "both see each other",
            ],
            1,
            "Each sees the text and its own ancestors. How deep it stands in the tree says its position.",
        ),
        (
            "FR-Spec makes drafting faster by",
            [
                "keeping frequent tokens in a cache",
                "letting the model check fewer guesses",
                "giving the draft an output layer of the frequent tokens alone",
            ],
            2,
            "The output layer is most of what a draft reads. The model that checks keeps its vocabulary.",
        ),
    ]
)
