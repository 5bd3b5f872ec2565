"""What tests of speculative decoding share: drafts that do as they are told, and laws by counting all chances."""

import copy
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import pytest
import torch

from minicpm_lite.config import ModelConfig
from minicpm_lite.inference.speculative import Guesses
from minicpm_lite.language.decoder import Decoder


def tiny(vocab_size: int = 3, seed: int = 0) -> Decoder:
    """A decoder in float64 whose law of the next token depends on all that it has read."""
    torch.manual_seed(seed)
    config = ModelConfig(
        8, 8, 1, 2, vocab_size, max_position_embeddings=16, init_std=1.0, tie_word_embeddings=False
    )
    model = Decoder(config).double().eval()
    model.lm_head.weight.data /= 3  # so that no token is nearly certain, or nearly impossible
    return model


def near(model: Decoder, noise: float = 0.02, seed: int = 0) -> Decoder:
    """A decoder that says nearly the same."""
    random, other = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)
    return other


@dataclass(frozen=True)
class Told:
    """A draft that proposes what a function says of the rows' texts and of how many guesses there is room for."""

    propose: Callable[[list[list[int]], int], Guesses]

    def begin(self, target, room, sampling, generator):
        return _Telling(self.propose)


class _Telling:
    def __init__(self, propose: Callable) -> None:
        self.say, self.texts = propose, None

    def propose(self, new, most):
        self.texts = self.texts or [[] for _ in new]
        for text, tokens in zip(self.texts, new, strict=True):
            text += tokens
        return self.say(self.texts, most)

    def select(self, rows):
        self.texts = self.texts and [self.texts[row] for row in rows]


def chain(rows: Sequence[Sequence[int]]) -> Guesses:
    return Guesses(torch.tensor(rows), (*range(-1, len(rows[0]) - 1),))


def foreseen(texts: Sequence[Sequence[int]], right: Callable[[int, int], bool], guesses: int = 3) -> Told:
    """Proposes what will be written, right or wrong as a function of the row and the place in the text says."""

    def propose(known: list[list[int]], most: int) -> Guesses:
        rows = []
        for text in known:
            row = next(i for i, whole in enumerate(texts) if list(whole[: len(text)]) == text)
            coming = [*texts[row][len(text) :], *[0] * guesses][: min(guesses, most)]
            rows.append([
                token if right(row, len(text) + place) else (token + 1) % 7
                for place, token in enumerate(coming)
            ])  # fmt: skip
        return chain(rows)

    return Told(propose)


def exact_law(run: Callable[[], Hashable]) -> dict[Hashable, float]:
    """The law of what a run gives: it runs once for each sequence of what `torch.multinomial` can draw in it."""
    law: dict[Hashable, float] = defaultdict(float)
    script: list[int] = []
    while True:
        chances, choices = [], []

        def draw(
            weights, num_samples, generator=None, chances=chances, choices=choices, script=tuple(script)
        ):
            drawn = []
            for row in weights.reshape(-1, weights.shape[-1]):
                possible = row.nonzero().flatten().tolist()
                at = len(choices)
                choice = script[at] if at < len(script) else 0
                choices.append((choice, len(possible)))
                chances.append(float(row[possible[choice]] / row.sum()))
                drawn.append([possible[choice]])
            return torch.tensor(drawn).reshape(*weights.shape[:-1], 1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "multinomial", draw)
            result = run()
        law[result] += float(torch.tensor(chances, dtype=torch.float64).prod())
        while choices and choices[-1][0] + 1 == choices[-1][1]:
            choices.pop()
        if not choices:
            return dict(law)
        script = [choice for choice, _ in choices]
        script[-1] += 1


def distance(one: dict, other: dict) -> float:
    """The largest difference of two laws at one outcome."""
    return max(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in one | other)
