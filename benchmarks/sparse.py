"""Sparse attention at MiniCPM4-8B's sizes beside dense: a step of one token, and a piece of a long prompt.

Dense is PyTorch's, and one of the same make as ours, which reads memory faster. The physical limit of a step
is the bytes that it reads. Layer after layer has keys and values of its own, as in a model, so that they come
from memory and not from a cache that the turn before has filled.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch

from minicpm_lite.config import SparseConfig, load_sparse_config
from minicpm_lite.inference.block_choice import levels, window_means
from minicpm_lite.inference.sparse_attention import attend_text, attend_tiles
from minicpm_lite.language.context import dense_attention

from .timing import take_turns

LENGTHS = (4096, 8192, 16_384, 32_768, 65_536, 131_072)


def sparse(chunk: int = 256) -> None:
    """Print both, at lengths from 4K to 128K."""
    config = load_sparse_config("minicpm4-8b")
    two_levels = replace(config, coarse_topk=128)
    print("\nAttention with 2 key-value heads, groups of 16 and heads 128 wide, float32; milliseconds")
    print("Aims: faster than torch's dense from 16K on, 15 x at 128K; 70% of what bytes allow beside our own")
    print("    token   torch     own  sparse two-level, and sparse without a kernel")
    for length in LENGTHS:
        layers = max(3, 2**19 // length)
        seconds = take_turns(3 * layers, *attention_works(length, 1, config, two_levels, layers))
        torch_dense, own_dense, ours, *_ = seconds
        seen = config.num_visible(length)
        means = length / config.kernel_stride if seen < length else 0
        bound = 2 * length / (2 * seen + means)  # keys and values that are visible, and the means of windows
        times, of_own = " ".join(f"{each * 1e3:7.2f}" for each in seconds), own_dense / ours
        print(
            f"  {length:7,} {times}  {torch_dense / ours:4.1f} x torch, {of_own:5.2f} x own dense = "
            f"{of_own / bound:.0%} of the {bound:.1f} x that bytes allow"
        )
    print(f"  {chunk} tokens that end a text of so many")
    for length in LENGTHS:
        works = attention_works(length, chunk, config, two_levels, layers=1)
        seconds = take_turns(1, *works[: 4 if length > 16_384 else 5])
        torch_dense, own_dense, ours, *_ = seconds
        times = " ".join(f"{each * 1e3:7.0f}" for each in seconds)
        print(
            f"  {length:7,} {times}  {torch_dense / ours:4.1f} x torch, {own_dense / ours:5.2f} x own dense"
        )


def attention_works(
    length: int, queries: int, config: SparseConfig, two_levels: SparseConfig, layers: int
) -> list[Callable[[], None]]:
    """torch's dense attention, ours, sparse, sparse in two levels, and sparse by PyTorch without a kernel."""
    starts = torch.zeros(1, dtype=torch.long)
    texts = [
        (torch.randn(1, 32, queries, 128), torch.randn(1, 2, length, 128), torch.randn(1, 2, length, 128))
        for _ in range(layers)
    ]
    means = [[window_means(key, *level) for level in levels(two_levels)] for _, key, _ in texts]
    everything = replace(config, dense_len=length + 1)

    works = [
        lambda text, means: dense_attention(*text),
        lambda text, means: attend_text(*text, means[:1], starts, everything),
        lambda text, means: attend_text(*text, means[:1], starts, config),
        lambda text, means: attend_text(*text, means, starts, two_levels),
        lambda text, means: attend_tiles(*text, means[:1], starts, config),
    ]

    def over_layers(work: Callable, first: int) -> Callable[[], None]:
        order = itertools.cycle(
            zip(texts[first:] + texts[:first], means[first:] + means[:first], strict=True)
        )
        return lambda: work(*next(order))

    # None follows another on the same layer, whose keys and values would be at hand.
    return [over_layers(work, place * layers // len(works)) for place, work in enumerate(works)]
