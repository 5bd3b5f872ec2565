"""Right answers in another style than the chapter's are accepted."""

import heapq
import random
from itertools import product

import pytest
import torch

from minicpm_lite.config import ModelConfig
from minicpm_lite.exercises.inference import speculative as check
from minicpm_lite.inference.drafts import PromptLookup
from minicpm_lite.inference.guess_trees import StaticTree
from minicpm_lite.inference.speculative_costs import Costs, best_chain, best_tree
from minicpm_lite.language.context import KVCache, Tree
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.sampling import Sampling

MODEL = Decoder(ModelConfig(8, 8, 1, 2, 10))


def by_a_table(text, longest, guesses):
    """Where each run of tokens was last followed, as the library keeps it; a tuple."""
    places = {}
    for end in range(1, len(text)):
        for size in range(1, min(longest, end) + 1):
            places[tuple(text[end - size : end])] = end
    for size in range(min(longest, len(text)), 0, -1):
        if end := places.get(tuple(text[-size:])):
            return tuple(text[end : end + guesses])
    return ()


def by_tensors(text, longest, guesses):
    ids = torch.tensor(text)
    for size in range(longest, 0, -1):
        if size < len(text):
            windows = ids.unfold(0, size, 1)[:-1]
            same = (windows == ids[-size:]).all(1).nonzero().flatten()
            if len(same):
                end = int(same[-1]) + size
                return ids[end : end + guesses]
    return ids[:0]


def by_the_library(text, longest, guesses):
    """It goes on with its own guesses where a copy reaches the end; these are cut off."""
    drafting = PromptLookup(guesses, longest).begin(MODEL, 99, Sampling(), None)
    found = drafting.propose([text], guesses)
    tokens, length = found.tokens[0].tolist(), len(by_a_table(text, longest, guesses))
    return tokens[:length]


def chain_in_a_while(p, q, guesses, luck):
    """The place first, lists of numbers, in float32."""
    kept = 0
    while kept < len(guesses) and luck[kept] * float(q[kept][guesses[kept]]) < float(p[kept][guesses[kept]]):
        kept += 1
    if kept == len(guesses):
        return [kept, p[kept].float()]
    law = [max(0.0, a - b) for a, b in zip(p[kept].tolist(), q[kept].tolist(), strict=True)]
    return [kept, [each / sum(law) for each in law]]


def chain_at_once(p, q, guesses, luck):
    """All ratios at once, and how many hold from the start."""
    places, tokens = torch.arange(len(guesses)), torch.tensor(guesses, dtype=torch.long)
    holds = torch.tensor(luck, dtype=p.dtype) < (p[:-1] / q)[places, tokens]
    kept = holds.long().cumprod(0).sum()
    padded = torch.cat([q, torch.zeros_like(p[:1])])  # behind the last guess nothing was offered
    owed = torch.relu(p[kept] - padded[kept])
    return kept, owed / owed.sum()


def number_by_the_library(alpha, calls, draft):
    return best_chain(Costs((*calls, calls[-1]), draft), alpha, len(calls) - 1)


def number_by_hand(alpha, calls, draft):
    best, fastest = 0, 0.0
    for guesses, call in enumerate(calls):
        speed = (1 - alpha ** (guesses + 1)) / (1 - alpha) / (call + guesses * draft)
        if speed > fastest:
            best, fastest = guesses, speed
    return float(best)


def sight_by_walking(parents):
    sees = [[0.0] * len(parents) for _ in parents]
    depths = []
    for place in range(len(parents)):
        at, steps = place, -1
        while at >= 0:
            sees[place][at], at, steps = 1.0, parents[at], steps + 1
        depths.append(steps)
    return sees, torch.tensor(depths)


def sight_of_the_library(parents):
    tree = Tree(KVCache(9), parents)
    return tree.ancestors, tree.depths


def sight_by_recursion(parents):
    def row(place):
        return set() if place < 0 else {place} | row(parents[place])

    size = range(len(parents))
    return torch.tensor([[other in row(place) for other in size] for place in size]), [
        len(row(place)) - 1 for place in size
    ]


def place_without_dividing(p, guesses, luck):
    """What is left is kept as it is, and the luck is measured by it."""
    left, gone = p.tolist(), 1.0
    for place, guess in enumerate(guesses):
        if luck[place] * gone < left[guess]:
            return [place, None]
        gone -= left[guess]
        left[guess] = 0.0
    return [None, [each / gone for each in left]]


def place_by_masks(p, guesses, luck):
    refused = torch.zeros(len(p), dtype=torch.bool)
    for place, guess in enumerate(guesses):
        law = p.masked_fill(refused, 0)
        if luck[place] < law[guess] / law.sum():
            return torch.tensor(place), p
        refused[guess] = True
    law = p.masked_fill(refused, 0)
    return None, law / law.sum()


def shuffled_tensor(tokens, start, stop, generator):
    ids = torch.tensor(tokens)
    part = ids[start:stop]
    return torch.cat([ids[:start], part[torch.randperm(len(part), generator=generator)], ids[stop:]])


def shuffled_by_python(tokens, start, stop, generator):
    part = tokens[start:stop]
    random.Random(int(torch.randint(2**31, (1,), generator=generator))).shuffle(part)
    return tuple(tokens[:start] + part + tokens[stop:])


def shuffled_by_keys(tokens, start, stop, generator):
    found = list(tokens)
    keys = torch.rand(stop - start, generator=generator).tolist()
    found[start:stop] = [token for _, token in sorted(zip(keys, tokens[start:stop], strict=True))]
    return found


def length_by_all_paths(chances, guesses):
    """The likeliest of all paths up to a depth beyond which none is among them; in a tensor."""
    worth = []
    for depth in range(1, guesses + 1):
        level = [torch.tensor(path).double().prod().item() for path in product(chances, repeat=depth)]
        worth = sorted(worth + level, reverse=True)[:guesses]
        if len(worth) == guesses and max(level) < worth[-1]:
            break
    return 1 + torch.tensor(worth).double().sum()


def length_by_a_heap(chances, guesses):
    heap, total = [-each for each in chances], 1.0
    heapq.heapify(heap)
    for _ in range(guesses):
        best = -heapq.heappop(heap)
        total += best
        for each in chances:
            heapq.heappush(heap, -best * each)
    return total


def length_of_the_library(chances, guesses):
    """A machine on which a call costs the same whatever it reads wants all guesses."""
    costs = Costs((1.0,) + (1.0,) * guesses, 0.0)
    tree = best_tree(costs, chances, guesses)
    assert isinstance(tree, StaticTree) and len(tree.parents) == guesses
    worth = []
    for parent, rank in zip(tree.parents, tree.ranks, strict=True):
        worth.append((worth[parent] if parent >= 0 else 1.0) * chances[rank])
    return 1 + sum(worth)


def replayed_by_recursion(right, most):
    def calls(rest):
        return 0 if not rest else 1 + calls(rest[1 + min(rest[0], most) :])

    return torch.tensor(len(right)) / calls(right)


def replayed_by_lengths(right, most):
    """What each call writes, the last one cut."""
    lengths = []
    while sum(lengths) < len(right):
        at = sum(lengths)
        lengths.append(min(1 + right[at], 1 + most, len(right) - at))
    return sum(lengths) / len(lengths)


RIGHT = {
    check.look_up: [by_a_table, by_tensors, by_the_library],
    check.check_chain: [chain_in_a_while, chain_at_once],
    check.forecast_length: [3, 3.0, torch.tensor(3.0)],
    check.best_guesses: [number_by_the_library, number_by_hand],
    check.tree_sight: [sight_by_walking, sight_of_the_library, sight_by_recursion],
    check.mended_place: [place_without_dividing, place_by_masks],
    check.shuffled: [shuffled_tensor, shuffled_by_python, shuffled_by_keys],
    check.replayed: [replayed_by_recursion, replayed_by_lengths],
    check.best_length: [length_by_all_paths, length_by_a_heap, length_of_the_library],
}
CASES = [(exercise, answer) for exercise, answers in RIGHT.items() for answer in answers]


@pytest.mark.parametrize(
    "exercise, answer", CASES, ids=[f"{e.name}-{getattr(a, '__name__', a)}" for e, a in CASES]
)
def test_right_answers_in_other_styles(exercise, answer):
    verdict = exercise.judge(answer)
    assert verdict.state == "right", verdict.message


@pytest.mark.parametrize(
    ("exercise", "answer", "idea"),
    [
        (check.look_up, lambda text, longest, guesses: [], "3 4 came behind it"),
        (check.check_chain, lambda p, q, guesses, luck: len(guesses), "Return two things"),
        (
            check.check_chain,
            lambda p, q, guesses, luck: (chain_at_once(p, q, guesses, luck)[0], p[0, :2]),
            "shape",
        ),
        (check.forecast_length, 1.9375, "luck of its own"),
        (check.forecast_length, 2, "What else does a call write"),
        (check.best_guesses, lambda alpha, calls, draft: 2.5, "whole number"),
        (check.tree_sight, lambda parents: (torch.ones(2, 2), [0, 1]), "a row and a column"),
        (
            check.tree_sight,
            lambda parents: (sight_by_walking(parents)[0], [*range(len(parents))]),
            "in the list",
        ),
        (check.mended_place, lambda p, guesses, luck: (None, p.zero_()), "was changed"),
        (check.shuffled, lambda tokens, start, stop, generator: tokens[start:stop], "the whole text"),
        (check.shuffled, lambda tokens, start, stop, generator: tokens, "stands as before"),
        (
            check.replayed,
            lambda right, most: 1.0 + sum(right) / len(right),
            "Calls begin at places 0, 5, 6 and 7",
        ),
        (check.best_length, lambda chances, guesses: 1.0 + guesses, "No guess counts twice"),
        (check.best_length, lambda chances, guesses: 1.0, "added next"),
    ],
)
def test_what_is_missed_is_said(exercise, answer, idea):
    verdict = exercise.judge(answer)
    assert verdict.state == "wrong" and idea in verdict.message
