"""Checks and quiz of the chapter on training beyond one machine."""

import math

import torch
from torch import Tensor, nn

from ...config import ModelConfig
from ...data.windows import Permutation
from ...lab.exercises import exercise
from ...lab.mistakes import same
from ...lab.quiz import Quiz
from ...language.decoder import Decoder
from ...language.scoring import next_token_loss, predicted, token_losses

_WHOLE = {0: 16, 1: 4, 2: 2, 3: 0}  # bytes a parameter that a stage does not cut over the ranks


def _smallest_power(fits, most=40, least=0):
    return next((2**k for k in range(least, most) if fits(2**k)), 0)


def _of_table(whole):
    """Of another table of what is whole."""
    return lambda parameters, stage, room: _smallest_power(
        lambda P: (whole[stage] + (16 - whole[stage]) / P) * parameters <= room
    )


@exercise(
    "GPUs needed",
    wrong=(
        lambda parameters, stage, room: math.ceil(16 * parameters / room),
        lambda parameters, stage, room: _smallest_power(lambda P: 16 * parameters / P <= room),
        lambda parameters, stage, room: _smallest_power(
            lambda P: (_WHOLE[stage] + 16 / P) * parameters <= room
        ),
        lambda parameters, stage, room: _smallest_power(
            lambda P: (_WHOLE[stage] + (16 - _WHOLE[stage]) / P) * parameters < room
        ),
        lambda parameters, stage, room: _smallest_power(
            lambda P: (_WHOLE[stage] + (16 - _WHOLE[stage]) / P) * parameters <= room, most=7
        ),
        lambda parameters, stage, room: _smallest_power(
            lambda P: (_WHOLE[stage] + (16 - _WHOLE[stage]) / P) * parameters <= room, least=bool(stage)
        ),
        *(
            _of_table(_WHOLE | {stage: _WHOLE[stage] + more})
            for stage, more in ((0, -1), (1, -1), (1, 1), (2, -1), (2, 1), (3, 1))
        ),
    ),
)
def gpus_needed(answer):
    """What is not cut over the ranks must fit by itself; the rest shrinks."""
    assert same(answer(1e9, 0, 16e9), 1), (
        "A billion parameters take 16 GB without sharding, which fits into 16 GB exactly. At most means that "
        "equal is enough."
    )
    for stage in (0, 1, 2, 3):
        assert same(answer(1e9, stage, 64e9), 1), "Into 64 GB they fit on one GPU, whatever the stage."
    assert same(answer(8e9, 3, 20e9), 8), "8 billion take 128 GB. Cut over 4 that is 32 GB, over 8 it is 16."
    assert same(answer(8e9, 1, 40e9), 16), (
        "Stage 1 keeps 4 bytes a parameter whole, 32 GB, and cuts 12: with 16 GPUs another 6 GB."
    )
    for room in (31e9, 40e9):
        assert same(answer(8e9, 2, room), 8), (
            "Stage 2 keeps 2 bytes a parameter whole, 16 GB, and cuts 14: 44 GB with 4 GPUs, 30 GB with 8."
        )
    assert same(answer(1e12, 3, 4e9), 4096), (
        "A trillion parameters take 16,000 GB. In 4 GB each that needs thousands of GPUs. Does your search "
        "stop too early?"
    )
    for parameters, stage, room, hint in (
        (1e9, 0, 15.5e9, "Data parallelism cuts nothing, so more GPUs do not help."),
        (8e9, 1, 30e9, "With stage 1 and 8 billion parameters 32 GB are never cut, and 30 are there."),
        (
            8e9,
            1,
            32e9,
            "With stage 1 and 8 billion parameters 32 GB are never cut, and something always comes on top.",
        ),
    ):
        try:
            found = answer(parameters, stage, room)
        except OverflowError:
            raise AssertionError(
                f"{hint} Your search goes on and on; see first whether it can end."
            ) from None
        assert same(found, 0), f"{hint} So no number is enough."


def _model(seed: int, vocab: int) -> Decoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(
            ModelConfig(
                hidden_size=16,
                intermediate_size=40,
                vocab_size=vocab,
                num_hidden_layers=1,
                num_attention_heads=2,
            )
        )


def _gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def _count(micro_batches) -> int:
    return sum(int(predicted(part).sum()) for part in micro_batches)


def _accumulate(model, micro_batches, loss):
    model.zero_grad()
    for part in micro_batches:
        loss(part).backward()
    return _count(micro_batches)


def _mean_of_means(model, micro_batches):
    return _accumulate(model, micro_batches, lambda part: next_token_loss(model, part) / len(micro_batches))


def _sum_of_means(model, micro_batches):
    return _accumulate(model, micro_batches, lambda part: next_token_loss(model, part))


def _never_cleared(model, micro_batches):
    count = _count(micro_batches)
    for part in micro_batches:
        (token_losses(model, part).sum() / count).backward()
    return count


def _counts_everything(model, micro_batches):
    count = sum(part[:, 1:].numel() for part in micro_batches)
    _accumulate(model, micro_batches, lambda part: token_losses(model, part).sum() / count)
    return count


def _all_at_once(model, micro_batches):
    return _accumulate(model, [torch.cat(list(micro_batches))], lambda part: next_token_loss(model, part))


@exercise(
    "gradient accumulation",
    wrong=(
        _mean_of_means,
        _sum_of_means,
        _never_cleared,
        _counts_everything,
        _all_at_once,
        lambda model, micro_batches: _count(micro_batches),
    ),
)
def accumulated(answer):
    """Sums are added; the division by all predicted tokens comes once."""
    for seed, vocab, rows, length in ((0, 50, (1, 1, 2), 13), (1, 30, (2, 3, 1, 2), 8)):
        draw = torch.Generator().manual_seed(seed)
        batch = torch.randint(vocab, (sum(rows), length), generator=draw)
        batch[0, : length // 2 + 1] = ~batch[0, : length // 2 + 1]  # read, not predicted
        batch[rows[0] : rows[0] + rows[1]] = ~batch[
            rows[0] : rows[0] + rows[1]
        ]  # a part with nothing to predict
        model, sizes = _model(seed, vocab), []
        next_token_loss(model, batch).backward()
        wanted = _gradient(model)
        for parameter in model.parameters():
            parameter.grad.mul_(2)  # left over from an earlier step
        stale = _gradient(model)
        model.register_forward_pre_hook(lambda _, given, sizes=sizes: sizes.append(len(given[0])))
        count = answer(model, batch.split(rows))
        assert same(count, int(predicted(batch).sum())), (
            "Count the tokens that are predicted: not the first of a window, and not those stored as "
            "complements."
        )
        assert all(p.grad is not None for p in model.parameters()), (
            "After the call the parameters have no gradient. Where is backward?"
        )
        assert not torch.equal(_gradient(model), stale), (
            "The gradients are those from before the call. Where is backward?"
        )
        distance = float((_gradient(model) - wanted).norm() / wanted.norm())
        size = float(_gradient(model).norm() / wanted.norm())
        assert 2 / 3 < size < 3 / 2, (
            f"Your gradient is {size:.2g} times as long as it should be. Was the old one cleared, and is "
            "the sum divided once?"
        )
        assert distance < 1e-4, (
            "Micro-batches with fewer predicted tokens weigh too much. Which mean is wanted: over "
            "micro-batches, or over tokens?"
        )
        assert max(sizes, default=0) <= max(rows), (
            f"The gradient is right, but the model was given {max(sizes)} windows at once; no micro-batch "
            f"has more than {max(rows)}. The memory for all of them is what accumulation shall save."
        )


def _size_at(step, changes):
    return [size for start, size in changes if start <= step][-1]


def _stretch(first, rank, world_size, size):
    share = size // world_size
    return range(first + rank * share, first + (rank + 1) * share)


def _step_times_size(step, rank, world_size, changes):
    size = _size_at(step, changes)
    return _stretch(step * size, rank, world_size, size)


def _forgets_the_rank(step, rank, world_size, changes):
    first = sum(_size_at(s, changes) for s in range(step))
    return _stretch(first, 0, world_size, _size_at(step, changes))


def _only_one_change(step, rank, world_size, changes):
    before = changes[0][1] * min(step, changes[-1][0])
    first = before + max(0, step - changes[-1][0]) * changes[-1][1]
    return _stretch(first, rank, world_size, _size_at(step, changes))


def _changes_late(step, rank, world_size, changes):
    first = sum(_size_at(max(s - 1, 0), changes) for s in range(step))
    return _stretch(first, rank, world_size, _size_at(max(step - 1, 0), changes))


def _in_turns(step, rank, world_size, changes):
    first, size = sum(_size_at(s, changes) for s in range(step)), _size_at(step, changes)
    return range(first + rank, first + size, world_size)


@exercise(
    "batch ramp",
    wrong=(_step_times_size, _forgets_the_rank, _only_one_change, _changes_late, _in_turns),
)
def ramp_indices(answer):
    """Count what all earlier steps have read, whatever their batch was."""

    def indices(*given):
        return [int(index) for index in answer(*given)]

    assert indices(3, 0, 1, [(0, 4)]) == [12, 13, 14, 15], (
        "With one batch size nothing changes: step 3 of 4 reads 12 to 15."
    )
    assert indices(3, 1, 2, [(0, 4)]) == [14, 15], (
        "Rank 1 of 2 reads the second half of the step's indices, in one stretch."
    )
    grown = [(0, 2), (5, 4)]
    assert indices(5, 0, 1, grown) == [10, 11, 12, 13], (
        "Five steps of 2 have read 0 to 9. A batch size holds from its first step on, so step 5 reads four."
    )
    assert indices(7, 0, 1, grown) == [18, 19, 20, 21], "Five steps of 2 and two of 4 have read 18 windows."
    for changes, steps in (([(0, 4), (3, 8), (6, 12)], 9), ([(0, 8), (1, 4), (2, 12), (10, 8)], 14)):
        total = sum(_size_at(step, changes) for step in range(steps))
        for world_size in (1, 2, 4):
            read = [
                index
                for step in range(steps)
                for rank in range(world_size)
                for index in indices(step, rank, world_size, changes)
            ]
            assert read == list(range(total)), (
                f"Over {steps} steps with {len(changes) - 1} changes of the batch every index must come "
                f"once, in order (world size {world_size})."
            )


def _without_walking(number, size, key):
    """Undoes the shifts once; the grid is the permutation of a size that fills it."""
    rows = math.isqrt(size - 1) + 1
    grid = Permutation(rows * math.ceil(size / rows), key)
    return _searched(number, grid.size, key)


def _walking(number, size, key, most):
    """Walks back a few times and no more."""
    for _ in range(most):
        number = _without_walking(number, size, key)
        if number < size:
            break
    return number


def _searched(number, size, key):
    permutation = Permutation(size, key)
    return next(position for position in range(size) if permutation[position] == number)


@exercise(
    "inverse permutation",
    wrong=(
        _searched,
        lambda number, size, key: Permutation(size, key)[number],
        _without_walking,
        lambda number, size, key: number,
        lambda number, size, key: _walking(number, size, key, most=2),
        lambda number, size, key: _walking(number, size, key, most=4),
    ),
    without=("naive_permutation", "Permutation"),
)
def index_of(answer):
    """The shifts are undone in reverse order, and cycles are walked back."""
    for size, key in ((16, 3), (12, 3), (10, 1), (97, 5), (1, 0), (44, 10)):  # the last goes back 5 times
        permutation = Permutation(size, key)
        for position in range(size):
            number = permutation[position]
            back = int(answer(number, size, key))
            assert 0 <= back < size, (
                f"For {number} of {size} your answer is {back}, outside the permutation. A number that lands "
                "on a cell too many must go back again, as often as it does."
            )
            assert back == position, (
                f"Position {position} of {size} holds {number}; your answer for it is {back}. The last shift "
                "must be undone first."
            )
    for size, key in ((10**12 // 4096, 7), (10**9 + 7, 8)):
        for position in range(4):  # early ones, so that a search ends before it is refused
            assert answer(Permutation(size, key)[position], size, key) == position, (
                f"In an epoch of {size:,} windows your position is another one's. Large numbers need whole "
                "numbers all the way."
            )


@exercise(
    "checkpoint interval",
    wrong=(
        lambda c, m: math.sqrt(c * m),
        lambda c, m: m / 2,
        lambda c, m: 2 * c * m,
        lambda c, m: 20 * c,
        lambda c, m: math.sqrt(c / (2 * m)),
        lambda c, m: math.sqrt(round(2 * c * m)),
        lambda c, m: math.sqrt(2 * round(c) * round(m)),
    ),
)
def best_interval(answer):
    """Where saving costs as much as what is lost: neither may dominate."""
    for c, m, hint in (
        (50, 10_000, "Is the lost share smaller a little to the left of your interval, or to the right?"),
        (200, 10_000, "If saving takes four times as long, one saves half as often."),
        (50, 40_000, "If failures are four times as rare, one saves half as often."),
        (2, 4, "Small numbers obey the formula, too."),
        (0.4, 30.2, "Saving may take less than a second; nothing need be whole."),
        (3, 100, "The interval need not be whole."),
    ):
        assert same(answer(c, m), math.sqrt(2 * c * m), tolerance=1e-3), f"c = {c:,} and m = {m:,}. {hint}"


quiz = Quiz(
    [
        (
            "FSDP on 8 GPUs instead of data parallelism on 8 GPUs. What grows?",
            ["the memory of each GPU", "the traffic between the GPUs", "the batch that is needed"],
            1,
            "The weights are gathered for each use: 3 instead of 2 lengths of the parameters in a step. The "
            "states shrink to an eighth.",
        ),
        (
            "Rank 0 predicts 100 tokens and rank 1 predicts 300. The gradient of the batch is",
            [
                "the mean of the two mean gradients",
                "a quarter of rank 0's and three quarters of rank 1's",
                "the sum of the two mean gradients",
            ],
            1,
            "Every token counts the same, wherever it was predicted.",
        ),
        (
            "A run on 8 GPUs is killed after step 5,000 and goes on with 4. What must the checkpoint hold, "
            "so that the data goes on in order?",
            [
                "the state of each rank's random generator",
                "the shuffled list",
                "the step number, and a check that it is the same text and seed",
            ],
            2,
            "Which window comes where is a function of its index, and the index follows from the step.",
        ),
        (
            "Activation checkpointing changes",
            ["the gradients, a little", "memory and time, not the result", "the number of parameters"],
            1,
            "The same operations are done again on the same numbers.",
        ),
        (
            "After 10,000 steps the loss of a resumed run is a little better than that of the run that was "
            "not killed. The first suspect is",
            ["luck", "the optimiser's moments", "the data: it may be reading text a second time"],
            2,
            "A sampler that begins again after a restart shows known text. An exact resume gives the same "
            "loss, not a better one.",
        ),
    ]
)
