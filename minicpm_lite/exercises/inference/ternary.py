"""Checks and quiz of the chapter on ternary weights."""

import copy

import torch
from torch import Tensor

from ...config import ModelConfig, load_config
from ...inference.ternary import TernaryLinear, make_ternary
from ...lab.exercises import exercise
from ...lab.mistakes import same
from ...lab.quiz import Quiz
from ...language.decoder import Decoder
from ...parameters import count_parameters
from ...training.settings import TrainerConfig
from ...training.trainer import Trainer
from ...training.wsd import WSD

_LEAST = 1e-5  # of a scale


def _codes(weight, group, cut=0.5, size="mean", least=_LEAST):
    grouped = weight.unflatten(1, (-1, group))
    sizes = grouped.abs()
    scale = {
        "mean": lambda: sizes.mean(2),
        "largest": lambda: sizes.amax(2),
        "signed": lambda: grouped.mean(2).abs(),
        "middle": lambda: sizes.median(2).values,
        "added": lambda: sizes.mean(2) + _LEAST,
        "only zeros": lambda: torch.where(sizes.mean(2) == 0, _LEAST, sizes.mean(2)),
        "squares": lambda: sizes.square().mean(2).sqrt(),
        "matrix": lambda: sizes.mean().expand(sizes.shape[:2]),
    }[size]()
    scale = scale if size == "only zeros" else scale.clamp(min=least)
    codes = grouped.sign() * (sizes > cut * scale[..., None])
    return codes.flatten(1), scale


@exercise(
    "codes and scales",
    wrong=(
        lambda weight, group: _codes(weight, group, cut=0.1),  # the threshold of many descriptions
        lambda weight, group: _codes(weight, group, cut=1.0),  # truncated instead of rounded
        lambda weight, group: _codes(weight, group, size="largest"),
        lambda weight, group: _codes(weight, group, size="signed"),
        lambda weight, group: _codes(weight, group, size="middle"),
        lambda weight, group: _codes(weight, group, size="squares"),
        lambda weight, group: _codes(weight, group, size="matrix"),
        lambda weight, group: _codes(weight, group, size="added"),  # the least scale added to all
        lambda weight, group: _codes(weight, group, size="only zeros"),
        lambda weight, group: _codes(weight, group, least=0),
        lambda weight, group: _codes(weight, weight.shape[1]),
        lambda weight, group: _codes(weight, 4),
        lambda weight, group: _codes(weight.abs(), group),
        lambda weight, group: (_not_clamped(weight, group), _codes(weight, group)[1]),
        lambda weight, group: (_times_scale(weight, group), _codes(weight, group)[1]),
        lambda weight, group: (_codes(weight, group)[0], _codes(weight, group)[1].flatten()),
        lambda weight, group: (weight / _unclamped(weight, group)).round().clamp(-1, 1),
    ),
    without=("a loop", "ternarize"),
)
def codes_and_scales(answer):
    """The mean size of a group is its scale, and half of that the threshold: the nearest of three values."""
    cases = (
        (
            torch.tensor([[0.5, -0.1, 0.2, -1.2]]),
            4,
            "One group of four: the sizes add up to 2, the scale is 0.5.",
        ),
        (
            torch.tensor([[0.5, -0.1, 0.2, -1.2, 5.0, -1.0, 2.0, -12.0]]),
            4,
            "The second group of four is ten times the first: its codes are the same, and its scale is 5.",
        ),
        (
            torch.tensor([[1.0, -1.0, 0.3, 0.0], [8.0, 0.1, -0.1, 0.2]]),
            4,
            "Each row has a scale of its own; a large weight of one row does not change the codes of "
            "another.",
        ),
        (
            torch.tensor([[0.9, 0.1, -0.2, 3.0, 1.0, -0.6]]),
            2,
            "Groups of two: `group` is an argument.",
        ),
        (
            torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 1.0, -1.0, 1.0]]),
            4,
            "A group of zeros: its codes are 0, and its scale is the least one, 0.00001, so that nothing is "
            "divided by zero.",
        ),
        (
            torch.tensor([[0.0005, -0.0001, 0.0002, -0.0012]]),
            4,
            "A thousandth of the first group: its scale is 0.0005. The least scale takes the place of less; "
            "nothing is added to what is larger.",
        ),
        (
            torch.tensor([[4e-6, -4e-6, 0.0, 8e-6]]),
            4,
            "Four weights whose mean size, 0.000004, is less than the least scale, which takes its place.",
        ),
        (
            torch.randn(6, 24, generator=torch.Generator().manual_seed(0)),
            8,
            "Six rows of 24 weights in groups of 8: 6 × 24 codes and 6 × 3 scales.",
        ),
    )
    for weight, group, hint in cases:
        before = weight.clone()
        got = answer(weight, group)
        assert isinstance(got, tuple | list) and len(got) == 2, (
            "Return two tensors: the codes and the scales."
        )
        codes, scale = (torch.as_tensor(each).double() for each in got)
        expected, wanted = _codes(before.double(), group)
        assert scale.shape == wanted.shape, (
            f"{hint} The scales have shape {tuple(scale.shape)}; expected {tuple(wanted.shape)}, one for "
            "each group of each row."
        )
        assert same(scale / wanted, torch.ones_like(wanted), 1e-3), (
            f"{hint} The scales are not the mean sizes |w| of the groups."
        )
        assert codes.shape == expected.shape, (
            f"{hint} The codes have shape {tuple(codes.shape)}; expected that of the matrix."
        )
        assert set(codes.flatten().tolist()) <= {-1.0, 0.0, 1.0}, (
            f"{hint} Codes are -1, 0 or 1, and nothing else: neither larger, nor times the scale."
        )
        assert not same(codes, _codes(before.double(), group, cut=1.0)[0]) or same(codes, expected), (
            f"{hint} You cut w / scale off towards 0; a code is the whole number *nearest* to it, so "
            "that all beyond half a scale becomes 1 or -1."
        )
        assert same(codes, expected), f"{hint} A code is the whole number nearest to w / scale."


def _unclamped(weight, group):
    return weight.unflatten(1, (-1, group)).abs().mean(2).repeat_interleave(group, 1)


def _not_clamped(weight, group):
    return (weight / _unclamped(weight, group).clamp(min=_LEAST)).round()


def _times_scale(weight, group):
    codes, scale = _codes(weight, group)
    return codes * scale.repeat_interleave(group, 1)


def _digits(byte, shift=-1, rounds=5, scale=256):
    digits, left = [], byte
    for _ in range(rounds):
        left *= 3
        digits.append(left // scale + shift)
        left %= scale
    return digits


def _not_masked(byte):
    """Digits of a byte of which nothing is taken away when a digit is read."""
    return [(byte * 3**place >> 8) - 1 for place in range(1, 6)]


def _base_three(number):
    return [number // 3**place % 3 - 1 for place in (4, 3, 2, 1, 0)]


def _byte(codes):
    number = 0
    for code in codes:
        number = 3 * number + code + 1
    return -(-number * 256 // 243)


@exercise(
    "read byte",
    wrong=(
        lambda byte: _base_three(byte),  # the byte taken for the number itself
        lambda byte: _digits(byte)[::-1],
        lambda byte: _digits(byte, shift=0),
        lambda byte: _digits(byte, rounds=4),
        _not_masked,
        lambda byte: _digits(byte, scale=255),
        lambda byte: _digits(byte, scale=243),
        lambda byte: _base_three(-(-byte * 243 // 256)),  # rounded up twice
        lambda byte: [(byte >> place & 3) - 1 for place in (6, 4, 2, 0)],
    ),
)
def read_byte(answer):
    """Five trits of a byte. By times 3, a shift and a mask for each, a processor needs no division for it."""
    for codes in (
        (0, 0, 0, 0, 0), (-1, -1, -1, -1, -1), (1, 1, 1, 1, 1), (1, -1, 0, 1, 0), (-1, 0, 1, 0, -1),
        (0, 1, -1, -1, 1), (-1, -1, -1, -1, 1), (1, -1, -1, -1, -1),
    ):  # fmt: skip
        got = answer(_byte(codes))
        assert len(got) == 5, f"A byte holds five codes; {len(got)} came."
        assert not same(list(got)[::-1], list(codes)) or codes == codes[::-1], (
            "The codes come in the reverse order: the first is the digit that counts 81."
        )
        assert not same(list(got), [code + 1 for code in codes]), (
            "These are the digits, from 0 to 2. A code is the digit less 1."
        )
        assert not same(list(got), _not_masked(_byte(codes))) or same(list(got), list(codes)), (
            "The first code is right, and the others grow: once a digit is read, keep only the rest, without "
            "the 256s that the digit counts, and take that times 3."
        )
        assert same(list(got), list(codes)), (
            f"The byte {_byte(codes)} holds {list(codes)}, and not {[int(code) for code in got]}. It is "
            "not the "
            "number of base 3 itself, but that number as a share of 243, in units of 1/256; a digit is "
            "the code "
            "+ 1."
        )
    for number in range(243):
        assert same(list(answer(-(-number * 256 // 243))), _base_three(number)), (
            "Not all 243 bytes that are written are read right."
        )


def _layer(latent):
    linear = torch.nn.Linear(latent.shape[1], latent.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(latent)
    return TernaryLinear(linear)


def _spoiled(latent, what):
    scale = latent.abs().mean(dim=None if "matrix" in what else 1, keepdim=True)
    scale = scale if what == "no least" else scale.clamp(min=_LEAST)
    codes = latent / scale
    codes = (codes.trunc() if "truncated" in what else codes.round()).clamp(-1, 1)
    if what == "no scale":
        return latent + (codes - latent).detach()
    if what == "no gradient":
        return codes.detach() * scale.detach()
    if what == "scale learns":
        return codes.detach() * scale
    if what == "twice":
        return latent + latent + (codes * scale - 2 * latent).detach()
    if what == "nothing detached":
        return latent + (codes * scale - latent)
    if what == "not rounded":
        return latent + 0 * codes
    if what == "one sum":  # which is rounded, so that some weights are none of the three values
        return latent + (codes * scale - latent).detach()
    return (codes * scale).detach() + (latent - latent.detach())


_FAULTS = {  # what each makes of the values, and what is said of it
    "matrix": "The scale is the mean of the whole matrix: a row of large weights silences the others. Each "
    "row has the mean of its own sizes.",
    "truncated": "The quotient is cut off towards 0, so that the dead zone ends at a whole scale. It ends at "
    "half of one: round to the nearest.",
    "truncated, matrix": "Two faults are left: the scale is the mean of the whole matrix and not of each "
    "row, and the quotient is cut off towards 0 instead of rounded.",
    "no scale": "These are the codes. A ternary weight is its code times the scale.",
    "not rounded": "The latent weights came back as they are: what cancels must not cancel the codes.",
}


def _there_and_back(answer, latent, arriving):
    """The result, and the gradient that reaches the latent weights if this one arrives at the result."""
    result = answer(latent)
    if not (isinstance(result, Tensor) and result.requires_grad and result.shape == arriving.shape):
        return result, None
    [gradient] = torch.autograd.grad((result * arriving).sum(), latent, allow_unused=True)
    return result.detach(), gradient


@exercise(
    "mended weight",
    ask=_there_and_back,
    wrong=tuple(
        lambda latent, what=what: _spoiled(latent, what)
        for what in (
            "matrix", "truncated", "truncated, matrix", "no scale", "no gradient", "scale learns", "twice",
            "nothing detached", "not rounded", "one sum", "no least",
        )
    ),
)  # fmt: skip
def mended_weight(answer):
    """Forward the three values, backward the gradient as it came: both of what the layer promises."""
    generator = torch.Generator().manual_seed(0)
    for shape, factor in (((3, 8), 1.0), ((5, 12), 0.03), ((16, 96), 1.0)):
        latent = torch.randn(*shape, generator=generator) * factor
        latent[0] *= 20  # one row is larger than the others
        latent[1] *= shape[1] == 8  # and one has only zeros
        expected = _layer(latent.clone()).weight.detach()
        learned = latent.clone().requires_grad_()
        before, arriving = latent.clone(), torch.randn(*shape, generator=generator)
        got, gradient = answer(learned, arriving)
        assert isinstance(got, Tensor) and got.shape == shape, "Return a matrix of the latent weights' shape."
        assert torch.equal(learned.detach(), before), "The latent weights themselves were changed."
        assert not got.isnan().any(), (
            "A row of zeros became a row of NaN: 0 / 0. The first equation has a least scale."
        )
        for what, hint in _FAULTS.items():
            spoiled = _spoiled(latent, what).detach()
            assert not same(got, spoiled, 2e-3) or same(got, expected, 2e-3), hint
        for row in got:
            assert len((row / row.abs().amax().clamp(min=1e-9)).round(decimals=3).unique()) <= 3, (
                "A row of the result has more than three values."
            )
        assert same((got == 0).double(), (expected == 0).double()), (
            "The wrong weights are 0. Which are nearer to 0 than to the scale, and whose mean is the scale "
            "of a row?"
        )
        assert same(got, expected, 2e-3), (
            "The values are not those of the scale. Each row has the mean of its own sizes."
        )
        for row in got:
            assert len(row.unique()) <= 3, (
                "Some weights are only almost one of the three values: in float32 the sum w + (ŵ - w) is "
                "rounded. Add what cancels first: ŵ + (w - w), which is exactly 0 behind ŵ."
            )
        assert gradient is not None, "No gradient reaches the latent weights."
        assert same(gradient, arriving, 1e-4), (
            "The gradient that reaches a latent weight is not that of the ternary weight. Straight through "
            "means: as it came, neither 0, nor twice, nor through the scale."
        )


@exercise("forecast", wrong=(0.31, 0.5, 1 / 3, 0.2, 25, 0.1, 0.75, "0.25"))
def forecast_zeros(answer):
    """Evenly spread sizes have their mean in the middle, and half of that leaves the lowest quarter."""
    assert not isinstance(answer, str), f"Expected a number, not the text {answer!r}."
    answer = float(answer)
    assert answer <= 1, "Give a share, from 0 to 1, not per cent."
    assert abs(answer - 0.31) > 0.02, "That is the share of a bell curve. These weights are spread evenly."
    assert abs(answer - 0.25) < 0.01, (
        "What is the mean of |w|, if w is spread evenly from -1 to 1? Which sizes lie below half of that?"
    )


def _megabytes(config, group, table_bits, scale_bits=16, code_bits=2, tables=None, norms=True, twice=False):
    count = count_parameters(config)
    norm = (2 * config.num_hidden_layers + 1) * config.hidden_size
    matrices = count.others - norm * (not twice)
    tables = count.tables if tables is None else tables
    bits = matrices * (code_bits + scale_bits / group) + tables * table_bits + 32 * norm * norms
    return bits / 8e6


_CASES = (
    (load_config("bitcpm4-0.5b"), 256, 6.5625),
    (load_config("bitcpm4-0.5b"), 64, 16),
    (load_config("minicpm4-8b"), 256, 4.5),
    (load_config("lite-1m"), 32, 32),
)


@exercise(
    "megabytes",
    wrong=(
        lambda config, group, bits: _megabytes(config, group, bits, scale_bits=0),
        lambda config, group, bits: _megabytes(config, group, bits, scale_bits=32),
        lambda config, group, bits: _megabytes(config, group, bits, code_bits=1.585),
        lambda config, group, bits: _megabytes(config, group, bits, norms=False),
        lambda config, group, bits: _megabytes(config, group, bits, twice=True),
        lambda config, group, bits: _megabytes(config, group, bits, tables=0),
        lambda config, group, bits: _megabytes(
            config, group, bits, tables=2 * config.vocab_size * config.hidden_size
        ),
        lambda config, group, bits: _megabytes(
            config, group, bits, tables=config.vocab_size * config.hidden_size
        ),
        lambda config, group, bits: 8 * _megabytes(config, group, bits),
        lambda config, group, bits: 1e6 * _megabytes(config, group, bits),
        lambda config, group, bits: 8e6 * _megabytes(config, group, bits),
        lambda config, group, bits: _megabytes(config, group, bits) * 1e6 / 2**20,
        lambda config, group, bits: _megabytes(config, 256, bits),
    ),
)
def ternary_megabytes(answer):
    """Codes, scales, tables and norms. The tables are not ternary: of a small model's file, a large share."""
    for config, group, table_bits in _CASES:
        got, expected = float(answer(config, group, table_bits)), _megabytes(config, group, table_bits)
        assert not same(got, 1e6 * expected, 1e-3), "That is in bytes: a megabyte is a million of them."
        assert not same(got, 8e6 * expected, 1e-3), (
            "That is in bits: eight are a byte, and a million bytes a megabyte."
        )
        assert not same(got, 8 * expected, 1e-3), "That is in megabits: eight bits are a byte."
        assert not same(got, expected * 1e6 / 2**20, 1e-4), (
            "That is in units of 2^20 bytes (MiB); a megabyte is a million bytes here."
        )
        assert not same(got / expected, _megabytes(config, group, table_bits, twice=True) / expected, 1e-5), (
            "The norms are counted twice: `others` holds them, too. The matrices are the others without them."
        )
        assert same(got, expected, 1e-4), (
            f"Width {config.hidden_size}, {config.num_hidden_layers} blocks, groups of {group}, tables of "
            f"{table_bits:g} bits: {expected:.5f} MB, and not {got:.5f}. Count the scales (16 bits a "
            "group), the "
            "tables (one if they are tied, else two), and the norms (2 a block and one at the end, 32 bits)."
        )


def _fork(trainer, schedule, group, same_model=False, other=None, plain=True, ternary=True, groups=None):
    first = trainer.branch(schedule)
    second = first if same_model else trainer.branch(schedule if other is None else other)
    if not plain:
        make_ternary(first.model, group)
    if ternary:
        make_ternary(second.model, groups or group)
    return first, second


def _fresh(trainer, schedule, group):
    """Runs that begin with the model of another, and not with its moments and its place in the data."""
    models = [copy.deepcopy(trainer.model) for _ in range(2)]
    make_ternary(models[1], group)
    return tuple(Trainer(model, trainer.batches, schedule, trainer.config) for model in models)


def _trained(trainer, schedule, group):
    runs = _fork(trainer, schedule, group)
    for run in runs:
        run.train(progress=False)
    return runs


def _facts(answer, trunk, schedule, group):
    """What is so of the two runs, and of the trunk, before and after the two have learned a little."""
    before = copy.deepcopy(trunk.model.state_dict())
    runs = answer(trunk, schedule, group)
    if not (isinstance(runs, tuple | list) and len(runs) == 2):
        return "no pair"
    if not all(isinstance(run, Trainer) for run in runs):
        return "models" if all(isinstance(run, Decoder) for run in runs) else "no pair"
    layers = [[part for part in run.model.modules() if isinstance(part, TernaryLinear)] for run in runs]
    facts = {
        "ternary": [bool(each) for each in layers],
        "trunk ternary": any(isinstance(part, TernaryLinear) for part in trunk.model.modules()),
        "groups": [part.group for part in layers[1]],
        "one": runs[0].model is runs[1].model,
        "trunk": [run.model is trunk.model for run in runs],
        "schedule": [run.schedule == schedule for run in runs],
        "steps": [run.step for run in runs],
    }
    for run in runs:
        run.train(run.step + 2, progress=False)
    after = [
        {name.replace(".latent", ".weight"): p for name, p in model.state_dict().items()}
        for model in (trunk.model, *(run.model for run in runs))
    ]
    return facts | {
        "trunk stays": all(torch.equal(before[name], p) for name, p in after[0].items()),
        "differ": any(not torch.equal(p, after[2][name]) for name, p in after[1].items()),
    }


@exercise(
    "fork",
    ask=_facts,
    wrong=(
        lambda trainer, schedule, group: _fork(trainer, schedule, group, same_model=True),
        lambda trainer, schedule, group: _fork(trainer, schedule, group, other=trainer.schedule),
        lambda trainer, schedule, group: _fork(trainer, schedule, group, plain=False),
        lambda trainer, schedule, group: _fork(trainer, schedule, group, ternary=False),
        lambda trainer, schedule, group: _fork(trainer, schedule, group, groups=4),
        lambda trainer, schedule, group: _fork(trainer, schedule, group)[::-1],
        lambda trainer, schedule, group: _fork(trainer, trainer.schedule, group),
        lambda trainer, schedule, group: (trainer, _fork(trainer, schedule, group)[1]),
        lambda trainer, schedule, group: _fork(trainer, schedule, "matrix"),
        lambda trainer, schedule, group: (
            make_ternary(trainer.model, group),
            _fork(trainer, schedule, group),
        )[1],
        lambda trainer, schedule, group: tuple(run.model for run in _fork(trainer, schedule, group)),
        _trained,
        _fresh,
    ),
)
def fork(answer):
    """Weights, moments, data and rates are the same, so what the two runs differ by is the rounding alone."""
    config = ModelConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=12
    )
    for seed, steps, group in ((0, 3, "row"), (1, 5, 8)):
        torch.manual_seed(seed)
        text = (torch.arange(900) * (7 + seed)) % 12
        trunk = Trainer(Decoder(config), text, WSD(0.01, 2, 20, 0), TrainerConfig(2, 8))
        trunk.train(steps, progress=False)
        got = answer(trunk, WSD(0.02, 0, 6 + steps, 2), group)
        assert got != "no pair", "Return two `Trainer`s as a pair: the control and the ternary one."
        assert got != "models", "Return the two `Trainer`s themselves; their models alone cannot go on."
        assert not got["trunk ternary"], (
            "The trunk itself was turned ternary. Take branches first, and change the model of one of them."
        )
        assert not any(got["trunk"]), (
            f"The {'second' if got['trunk'][1] else 'first'} run is the trunk itself: to train it would "
            "train the trunk on. Take a branch of it."
        )
        assert not got["one"], (
            "Both runs have one model, so what turns the one ternary turns the other, too. Take two branches."
        )
        assert got["ternary"] != [True, False], "The order is: first the control, then the ternary run."
        assert got["ternary"] != [True, True], "Both runs are ternary; the control stays in full precision."
        assert got["ternary"] != [False, False], (
            "Both runs are in full precision; the second must turn ternary."
        )
        assert all(got["schedule"]), (
            f"The {'second' if got['schedule'][0] else 'first'} run does not go on under the schedule that "
            "was given. Were the rates not the same, the two would differ in them as well."
        )
        assert max(got["steps"]) <= steps, (
            f"The trunk is at step {steps}, and a run that came back at step {max(got['steps'])}: return the "
            "two untrained."
        )
        assert got["steps"] == [steps, steps], (
            f"The trunk is at step {steps}, and its branches must be, too: a new `Trainer` begins at step 0, "
            "reads other data, and has no moments of Adam."
        )
        assert set(got["groups"]) == {group}, (
            f"The layers have groups of {got['groups'][0]!r}; `group` is an argument, {group!r} here."
        )
        assert got["trunk stays"], "Training the two changed the trunk: they must have weights of their own."
        assert got["differ"], "Both runs have learned the same: is the second one rounded?"


def _least(weights):
    sizes = weights.abs().sort(descending=True).values
    sums = sizes.cumsum(0)
    counts = torch.arange(1, len(sizes) + 1)
    best = (sums**2 / counts).argmax()
    return (sums / counts)[best]


def _error(weights, scale):
    scale = torch.as_tensor(scale, dtype=weights.dtype)
    codes = (weights / scale.clamp(min=1e-12)).round().clamp(-1, 1)
    return (weights - codes * scale).square().sum()


def _one_round(weights):
    scale = weights.abs().mean()
    return weights[weights.abs() > scale / 2].abs().mean()


def _once_in_turn(weights, rounds):
    """Codes for a scale and a scale for codes, in turn: it stops at the first that is its own answer."""
    scale = weights.abs().mean()
    for _ in range(rounds):
        scale = weights[weights.abs() > scale / 2].abs().mean()
    return scale


def _of_grid(weights, steps):
    """The best of a grid of scales up to the largest weight."""
    grid = torch.linspace(0, 1, steps + 1, dtype=weights.dtype)[1:] * weights.abs().max()
    return min(grid, key=lambda scale: _error(weights, scale))


@exercise(
    "best scale",
    wrong=(
        lambda weights: weights.abs().mean(),
        lambda weights: weights.abs().max(),
        lambda weights: weights.square().mean().sqrt(),
        lambda weights: weights.abs().median(),
        _one_round,
        lambda weights: 1.2 * weights.std(),
        lambda weights: _least(weights) / 2,
        lambda weights: _least(weights[:-1]),
        lambda weights: _of_grid(weights, 100),
        lambda weights: _of_grid(weights, 3000),
        lambda weights: _once_in_turn(weights, 100),
    ),
)
def best_scale(answer):
    """For a given number of codes other than 0 the best are the largest, and the best scale their mean."""
    generator = torch.Generator().manual_seed(0)
    cases = (
        torch.tensor([1.0, -1.0, 0.1, 0.0]),
        torch.tensor([4.0, 1.0, -1.0, 1.0, 0.9, -1.1]),
        torch.tensor([10.0, 0.3, -0.2, 0.4, 0.1, -0.3, 0.2]),
        torch.randn(256, generator=generator),
        torch.randn(64, generator=generator) ** 3,
        torch.tensor([0.2, -0.4, 0.1, 3.0]),
    )
    for weights in cases:
        weights = weights.double()
        got = float(answer(weights.clone()))
        least, mine = _error(weights, _least(weights)), _error(weights, abs(got))
        few = ", ".join(f"{value:g}" for value in weights.tolist())
        shown = f"the weights {few}" if len(weights) < 10 else f"a row of {len(weights)} random weights"
        assert got > 0, "A scale is above 0."
        assert not (mine <= least * (1 + 1e-3) and abs(got / float(_least(weights)) - 1) > 1e-5), (
            f"For {shown} your scale is near the best, {got:.5g}, and not the best, "
            f"{float(_least(weights)):.5g}, as one of a grid would be. For given codes the best scale is the "
            "mean size of the weights whose code is not 0; so there are only as many candidates as weights."
        )
        assert mine <= least * (1 + 1e-4) + 1e-9, (
            f"For {shown} the squared error is {mine:.4f} with your scale, {got:.4f}; "
            f"{least:.4f} can be had. Suppose that k weights get a code that is not 0: which k should "
            "that be, and "
            "which scale is then the best?"
        )


quiz = Quiz(
    [
        (
            "A row of eight weights has sizes that add up to 4. Which weights become 0?",
            ["Those below 0.25 in size", "Those below 0.5 in size", "Those below a tenth of the largest"],
            0,
            "The scale is the mean, 0.5, and a weight is rounded to 0 where it is nearer to 0 than to the "
            "scale.",
        ),
        (
            "In training, what does the optimiser move?",
            [
                "The codes, by one at a time",
                "The scales",
                "Latent weights in float32, which are rounded anew each time",
            ],
            2,
            "A step is far smaller than the way from one value to the next. The latent weight adds such "
            "steps up.",
        ),
        (
            "Without the straight-through gradient, with the true derivative of rounding and with its scales "
            "held fixed, a ternary layer",
            [
                "learns the same, more slowly",
                "learns nothing, as the derivative is 0 almost everywhere",
                "diverges",
            ],
            1,
            "A small change of a weight changes no code, so with fixed scales it changes no output. (Where "
            "the scales follow the weights, what they do to the scales can still be learned.)",
        ),
        (
            "Where do most bytes of a ternary BitCPM4-0.5B go that log2(3) bits for each weight do not "
            "explain?",
            ["Into the scales", "Into the norms", "Into the table of tokens, which is not ternary"],
            2,
            "The table is a sixth of the weights, and with 6.6 bits each two fifths of the file.",
        ),
        (
            "Suppose that the work on 4-bit weights takes 3 ms, and that reading their bytes, which goes on "
            "beside it, takes 1 ms. Ternary weights have less than half of these bytes. What do fewer bytes "
            "alone gain?",
            [
                "More than a factor of two",
                "Nothing: only less work on a weight would help",
                "As much as the multiplications took",
            ],
            1,
            "What takes longer is what one waits for, here the work. A kernel that has less to do for each "
            "ternary weight gains by that, and not by the bytes.",
        ),
        (
            "Which model can be packed as TQ2_0 without changing a bit?",
            [
                "Any trained model",
                "One trained ternary, with a scale for each row of 1,024 weights",
                "One trained ternary, with a scale for each 64 weights",
            ],
            1,
            "TQ2_0 holds one scale for 256 weights of a row: all weights under it must have the same.",
        ),
    ]
)
