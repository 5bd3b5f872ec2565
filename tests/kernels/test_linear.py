"""Products with packed weights: within the stated bound of gguf's weights in float64, whatever is drawn.

Wrong kernels are seeded: the same bound rejects each.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import PACKED, VALUES, by_gguf, make_packed, mins_of, packed_weights
from torch.testing import assert_close

from minicpm_lite import kernels
from minicpm_lite.kernels import FORMATS, linear, linears, reference
from minicpm_lite.kernels.build import built

TYPES = list(FORMATS)
SMALLEST = 2.0**-119  # below it the numbers of a group count as zeros


def make_weight(type: str, outputs: int, blocks: int = 2, seed: int = 0) -> torch.Tensor:
    if type == "F32":
        return torch.randn(outputs, 37 * blocks, generator=torch.Generator().manual_seed(seed))
    return make_packed(type, outputs, blocks, seed)


def features_of(weight: torch.Tensor, type: str) -> int:
    return kernels.dequantize(weight[:1], type).shape[1]


def make_x(rows: int, weight: torch.Tensor, type: str, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, features_of(weight, type), generator=torch.Generator().manual_seed(seed))


def bound(x: torch.Tensor, packed: torch.Tensor, type: str) -> torch.Tensor:
    """How far an output may be off: the bound of the docstring, and what float32 rounds."""
    exact, mins = by_gguf(packed, type).double(), mins_of(packed, type).double()
    groups = x.double().unflatten(1, (-1, 32)).abs()
    largest = groups.amax(-1, keepdim=True)
    off = torch.where(largest > SMALLEST, largest / 254, largest).expand_as(groups).flatten(1)
    # what is summed in float32: scale * value and min by themselves, with x as it was rounded
    summed = (groups.flatten(1) + off) @ (exact.abs() + 2 * mins).T
    steps = 12 + x.shape[1] / 8  # roundings that follow each other
    return off @ exact.abs().T * (1 + 2**-15) + steps * 2**-24 * summed + 1e-36


def is_close(y: torch.Tensor, x: torch.Tensor, packed: torch.Tensor, type: str) -> bool:
    weights = by_gguf(packed, type).double()
    exact, allowed = x.double() @ weights.T, bound(x, packed, type)
    fits = x.double().abs() @ (weights.abs() + 2 * mins_of(packed, type)).T < 1e38  # float32 ends soon after
    return y.shape == exact.shape and bool(((y.double() - exact).abs() <= allowed)[fits].all())


@given(
    packed_weights(),
    st.integers(1, 17),
    st.sampled_from([1e-44, 1e-38, 1e-35, 1e-20, 1.0, 1e20, 1e30]),
    st.sampled_from(["normal", "sparse", "zeros", "one large", "all alike"]),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=300)
def test_products_keep_to_the_bound(weights, rows, size, kind, seed):
    type, packed = weights
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, by_gguf(packed[:1], type).shape[1], generator=generator)
    if kind == "sparse":
        x *= torch.rand(x.shape, generator=generator) < 0.05
    elif kind == "one large":
        x[:, int(torch.randint(x.shape[1], (1,), generator=generator))] *= 1000
    elif kind != "normal":
        x[:] = float(kind == "all alike")
    x *= size
    assert is_close(linear(x, packed, type), x, packed, type)
    assert is_close(reference(x, packed, type), x, packed, type)


@pytest.mark.parametrize("rows", range(1, 18))
@pytest.mark.parametrize("type", PACKED)
def test_every_type_with_every_number_of_rows(type, rows):
    for outputs in (1, 3, 4, 7, 33):
        packed = make_packed(type, outputs, 1 + rows % 2, seed=rows)
        x = make_x(rows, packed, type)
        assert is_close(linear(x, packed, type), x, packed, type)


@pytest.mark.parametrize("type", PACKED)
def test_the_bound_is_not_loose(type):
    """Rounding x uses a good part of it up: an error twice as large would often be seen."""
    packed = make_packed(type, 64, 1, seed=3)
    x = make_x(1, packed, type)
    error = linear(x, packed, type).double() - x.double() @ by_gguf(packed, type).double().T
    assert 0.05 < (error.abs() / bound(x, packed, type)).max() < 1


@given(st.integers(1, 34), st.integers(0, 70), st.integers(1, 13), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=150)
def test_float32_is_multiplied_in_float32(rows, features, outputs, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, features, generator=generator) for n in (rows, outputs))
    exact, allowed = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    assert ((linear(x, weight, "F32") - exact).abs() <= (8 + features / 16) * 2**-24 * allowed).all()


# Wrong kernels


def wrong_nibbles(x, packed, type):
    blocks = packed.clone().view(len(packed), -1, FORMATS[type].nbytes)
    values = blocks[..., VALUES[type]]
    blocks[..., VALUES[type]] = values << 4 | values >> 4
    return linear(x, blocks.flatten(1), type)


def scale_of_the_first_group_for_all(x, packed, type):
    weights = by_gguf(packed, type).unflatten(1, (-1, 32))
    sizes = weights.abs().amax(-1, keepdim=True)
    return F.linear(x, (weights / sizes * sizes[:, :1]).flatten(1))


def min_forgotten(x, packed, type):
    return linear(x, packed, type) + x @ mins_of(packed, type).T


def min_of_the_sum_unscaled(x, packed, type):
    step = x.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
    q = (x.unflatten(1, (-1, 32)) / step).round()
    return min_forgotten(x, packed, type) - q.flatten(1) @ mins_of(packed, type).T


def one_step_for_a_whole_row(x, packed, type):
    step = x.abs().amax(-1, keepdim=True) / 127
    return F.linear((x / step).round() * step, by_gguf(packed, type))


def x_cut_off_instead_of_rounded(x, packed, type):
    groups = x.unflatten(1, (-1, 32))
    step = groups.abs().amax(-1, keepdim=True) / 127
    return F.linear(((groups / step).trunc() * step).flatten(1), by_gguf(packed, type))


def x_in_seven_bits(x, packed, type):
    groups = x.unflatten(1, (-1, 32))
    step = groups.abs().amax(-1, keepdim=True) / 63
    return F.linear(((groups / step).round() * step).flatten(1), by_gguf(packed, type))


def pairs_that_overflow(x, packed, type):
    """As `maddubs` with the 128 of Q8_0 on the unsigned side: sums of pairs stop at 32,767."""
    groups = x.unflatten(1, (-1, 32))
    step = groups.abs().amax(-1, keepdim=True) / 127
    q = (groups / step).round()  # (rows, groups, 32)
    blocks = packed.view(len(packed), -1, 34)
    values = blocks[..., 2:].view(torch.int8).float() + 128
    products = q[:, None] * values[None]  # (rows, outputs, groups, 32)
    sums = products.unflatten(-1, (16, 2)).sum(-1).clamp(-32768, 32767).sum(-1) - 128 * q.sum(-1)[:, None]
    scales = blocks[..., :2].contiguous().view(torch.float16).float()[..., 0]
    return (sums * scales * step[:, None, :, 0]).sum(-1)


def last_group_forgotten(x, packed, type):
    x = x.clone()
    x[:, -32:] = 0
    return linear(x, packed, type)


def rows_swapped(x, packed, type):
    return linear(x.flip(0), packed, type)


WRONG = [
    *((wrong, type) for wrong in (wrong_nibbles, last_group_forgotten, rows_swapped) for type in PACKED),
    *((scale_of_the_first_group_for_all, type) for type in PACKED),
    *((min_forgotten, type) for type in ("Q4_K", "Q5_K")),
    *((min_of_the_sum_unscaled, type) for type in ("Q4_K", "Q5_K")),
    *((x_cut_off_instead_of_rounded, type) for type in PACKED),
    *((x_in_seven_bits, type) for type in PACKED),
    *((one_step_for_a_whole_row, type) for type in PACKED),
    (pairs_that_overflow, "Q8_0"),
]


def worst_x(packed: torch.Tensor, type: str) -> torch.Tensor:
    """Rows whose errors in the first output add up, as those of random ones would not.

    Between two steps of 1/127, where cutting off errs most, and of 1/63; small in all groups but one; and as
    large as can be, where sums of pairs overflow.
    """
    weights = by_gguf(packed[:1], type).unflatten(1, (-1, 32))
    whole = torch.randint(1, 50, weights.shape[1:], generator=torch.Generator().manual_seed(6))
    rows = torch.stack([(whole + 0.9) / 127, (whole + 0.48) / 63, 0.003 + 0 * whole, 1.0 + 0 * whole])
    rows[:2, :, 0] = 1  # (rows, groups, 32): each group has its largest number
    rows[2, 0] = 1
    return (rows * torch.where(weights < 0, -1.0, 1.0)).flatten(1)


@pytest.mark.parametrize(("wrong", "type"), WRONG, ids=lambda each: getattr(each, "__name__", each))
def test_wrong_kernels_are_rejected(wrong, type):
    packed = make_packed(type, 40, 64 // (FORMATS[type].block // 32), seed=4)
    x = worst_x(packed, type)
    assert is_close(linear(x, packed, type), x, packed, type)
    assert not is_close(wrong(x, packed, type), x, packed, type)


# What an output depends on


@pytest.mark.parametrize("type", TYPES)
def test_a_row_gives_the_same_bits_in_any_company(type):
    weight = make_weight(type, 21)
    x = make_x(300 if type != "F32" else 32, weight, type)
    together = linear(x, weight, type)
    for rows in (1, 2, 3, 4, 5, 8, 9, 16, 17, 31):
        assert torch.equal(linear(x[:rows], weight, type), together[:rows])
        assert torch.equal(linear(x[-rows:], weight, type), together[-rows:])


@pytest.mark.parametrize("type", TYPES)
def test_the_number_of_threads_changes_no_bit(type):
    weight = make_weight(type, 4099)  # so many that they are shared out
    x, threads = make_x(5, weight, type), torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            found.append(linear(x, weight, type))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("type", TYPES)
def test_several_matrices_give_the_bits_that_each_gives(type):
    weights = [make_weight(type, outputs, seed=outputs) for outputs in (5, 2049, 1, 3, 18)]
    weights[3] = weights[3][:0]
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):  # among whom the matrices are shared out as if they were one
            torch.set_num_threads(number)
            for rows in (1, 2, 3, 8, 9, 40):
                x = make_x(rows, weights[0], type)
                for some in (weights, weights[:1], weights[3:]):
                    found = linears(x, some, type)
                    assert len(found) == len(some)
                    assert all(torch.equal(y, linear(x, w, type)) for y, w in zip(found, some, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("type", TYPES)
def test_what_is_no_number_does_not_get_lost(type, bad):
    """Where PyTorch's product is no finite number, this one is none; other rows do not notice."""
    weight = make_weight(type, 9)
    for rows in (1, 4, 7):
        x = make_x(rows, weight, type)
        clean = linear(x, weight, type)
        for place in (0, 31, x.shape[1] - 1):
            hurt = x.clone()
            hurt[rows // 2, place] = bad
            found, expected = linear(hurt, weight, type), reference(hurt, weight, type)
            assert not found[~expected.isfinite()].isfinite().any()
            others = torch.arange(rows) != rows // 2
            assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("type", PACKED)
def test_weights_that_are_no_numbers_do_not_get_lost(type):
    """A damaged file."""
    packed = make_packed(type, 6, 2, seed=5, scales=[float("inf"), float("nan"), 1.0])
    x = make_x(3, packed, type)
    expected = reference(x, packed, type)
    assert not expected.isfinite().all()
    assert not linear(x, packed, type)[~expected.isfinite()].isfinite().any()


# Shapes and types of x


@pytest.mark.parametrize("type", TYPES)
def test_x_may_lie_in_memory_in_any_way(type):
    weight = make_weight(type, 5)
    x = make_x(12, weight, type)
    expected = linear(x, weight, type)
    features = x.shape[1]
    assert torch.equal(linear(x.view(3, 2, 2, features), weight, type), expected.view(3, 2, 2, 5))
    assert torch.equal(linear(x[3], weight, type), expected[3])
    assert torch.equal(linear(x.T.contiguous().T, weight, type), expected)
    assert torch.equal(linear(x[::3], weight, type), expected[::3])
    assert torch.equal(linear(x[:1].expand(6, -1), weight, type), expected[:1].expand(6, -1))
    wide = torch.cat([x, x], dim=1)
    assert torch.equal(linear(wide[:, features:], weight, type), expected)


@pytest.mark.parametrize("type", TYPES)
def test_so_may_the_weights(type):
    weight = make_weight(type, 6)
    x = make_x(2, weight, type)
    expected = linear(x, weight, type)
    assert torch.equal(linear(x, weight[::2], type), expected[:, ::2])
    assert torch.equal(linear(x, weight.T.contiguous().T, type), expected)
    odd = torch.empty(weight.numel() + 1, dtype=weight.dtype)[1:].view(weight.shape).copy_(weight)
    assert torch.equal(linear(x, odd, type), expected)
    mixed = linears(x, [weight[::2], odd, weight.T.contiguous().T], type)
    assert torch.equal(torch.cat(mixed, -1), torch.cat([expected[:, ::2], expected, expected], -1))


@pytest.mark.parametrize("type", TYPES)
def test_nothing_gives_nothing(type):
    weight = make_weight(type, 5)
    x = make_x(2, weight, type)
    assert linear(x[:0], weight, type).shape == (0, 5)
    assert linear(x.new_empty(3, 0, x.shape[1]), weight, type).shape == (3, 0, 5)
    assert linear(x, weight[:0], type).shape == (2, 0)
    assert torch.equal(linear(x[:, :0], weight[:, :0], type), torch.zeros(2, 5))
    assert kernels.dequantize(weight[:, :0], type).shape == (5, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("type", TYPES)
def test_x_in_16_bits_is_computed_in_float32(type, dtype):
    weight = make_weight(type, 5)
    for rows in (3, 40):
        x = make_x(rows, weight, type).to(dtype)
        assert torch.equal(linear(x, weight, type), linear(x.float(), weight, type).to(dtype))
        assert linear(x, weight, type).dtype == dtype
        assert torch.equal(
            torch.cat(linears(x, [weight, weight[:2]], type), -1)[..., :7],
            torch.cat([linear(x, weight, type), linear(x, weight[:2], type)], -1),
        )


def test_many_rows_of_float32_are_left_to_pytorch():
    weight, x = torch.randn(7, 130), torch.randn(33, 130)
    assert torch.equal(linear(x, weight, "F32"), F.linear(x, weight))


# Refused

W = torch.zeros(4, 18, dtype=torch.uint8)


@pytest.mark.parametrize("compute", [linear, reference])
@pytest.mark.parametrize(
    ("x", "weight", "type", "sentence"),
    [
        (torch.zeros(1, 32), W, "Q4_2", "type is 'Q4_2'; expected one of F32, Q8_0"),
        (torch.zeros(1, 32), W.float(), "Q4_0", "weight is torch.float32 .*; Q4_0 expects bytes"),
        (torch.zeros(1, 32), W, "Q8_0", r"weight .* \(4, 18\); Q8_0 expects bytes \(uint8\), 34 for each 32"),
        (torch.zeros(1, 31), W, "Q4_0", r"x has shape \(1, 31\) and weight \(4, 18\); .* \(..., 32\) of x"),
        (torch.zeros(1, 33), torch.zeros(2, 32), "F32", r"expected .* \(..., 32\) of x"),
        (torch.tensor(1.0), torch.zeros(2, 1), "F32", r"x has shape \(\) .* \(..., 1\) of x"),
        (torch.zeros(1, 32), W[0], "Q4_0", "expected two dimensions of weight"),
        (torch.zeros(1, 32), W[None], "Q4_0", "expected two dimensions of weight"),
        (torch.zeros(1, 32), torch.tensor(1.0), "F32", "expected two dimensions of weight"),
        (torch.zeros(1, 32).double(), W, "Q4_0", "x is torch.float64; expected float32, float16 or bfloat16"),
        (torch.zeros(1, 32).long(), W, "Q4_0", "x is torch.int64; expected float32"),
        (
            torch.zeros(1, 32, device="meta"),
            W,
            "Q4_0",
            "x is on meta and weight on cpu; expected both on one",
        ),
        (torch.zeros(1, 32, requires_grad=True), W, "Q4_0", r"A gradient .* Compute under torch.no_grad\(\)"),
        (torch.zeros(1, 2), torch.zeros(2, 2, requires_grad=True), "F32", "A gradient would be asked for"),
    ],
)
def test_what_does_not_fit_is_refused(compute, x, weight, type, sentence):
    with pytest.raises(ValueError, match=sentence):
        compute(x, weight, type)


def test_several_are_refused_for_each_of_them():
    x = torch.zeros(1, 32)
    with pytest.raises(ValueError, match=r"weight \(4, 36\); expected .* \(..., 64\) of x"):
        linears(x, [W, torch.zeros(4, 36, dtype=torch.uint8)], "Q4_0")
    with pytest.raises(ValueError, match="weight is torch.float32 .*; Q4_0 expects bytes"):
        linears(x, [W, W.float()], "Q4_0")
    with pytest.raises(ValueError, match="x is on cpu and weight on meta; expected both on one device"):
        linears(x, [W, W.to("meta")], "Q4_0")
    with pytest.raises(ValueError, match="A gradient would be asked for"):
        linears(x, [torch.zeros(2, 32), torch.zeros(2, 32, requires_grad=True)], "F32")


def test_without_gradients_parameters_are_multiplied():
    x, weight = torch.randn(2, 3, requires_grad=True), torch.nn.Parameter(torch.randn(4, 3))
    with torch.no_grad():
        assert_close(linear(x, weight, "F32"), x @ weight.T)
    with torch.inference_mode():
        assert_close(linear(x, weight, "F32"), x @ weight.T)
    assert_close(linear(x.detach(), weight.detach(), "F32"), (x @ weight.T).detach())


# As an operator


@pytest.mark.parametrize("type", TYPES)
def test_the_operator_keeps_what_it_says(type):
    """Its schema, its shape on no memory, and dynamic shapes."""
    assert built("linear")
    weight = make_weight(type, 5)
    x, number = make_x(3, weight, type), FORMATS[type].number
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.minicpm_lite.linear, (x, [weight], number), test_utils=checks)
    torch.library.opcheck(torch.ops.minicpm_lite.linear, (x[0], [weight, weight], number), test_utils=checks)
    if type != "F32":
        arguments = (weight, number, x.shape[1])
        torch.library.opcheck(torch.ops.minicpm_lite.dequantize, arguments, test_utils=checks)
    shape = torch.ops.minicpm_lite.linear(x.to("meta").view(1, 3, -1), [weight.to("meta")] * 2, number)
    assert (shape.shape, shape.device.type, shape.dtype) == ((1, 3, 10), "meta", torch.float32)


@pytest.mark.parametrize("type", TYPES)
def test_it_compiles_to_one_graph(type):
    torch._dynamo.reset()  # it counts how often one function was compiled
    weight = make_weight(type, 5)

    def together(x):
        first, second = linears(torch.relu(x), [weight, weight[:2]], type)
        return linear(torch.relu(x), weight, type) * 2, first + 1, second

    compiled = torch.compile(together, fullgraph=True, backend="aot_eager")
    for rows in (1, 2, 3, 5, 40):
        x = make_x(rows, weight, type)
        assert all(map(torch.equal, compiled(x), together(x)))


@pytest.mark.slow  # a process of its own, which compiles C++ code of torch's
def test_torch_compile_takes_it_before_it_was_ever_called():
    """The first call of all is traced: what is built then is built while tracing."""
    script = """
import torch
from minicpm_lite.kernels import linear, reference

x, weight = torch.randn(3, 64), torch.randn(10, 64)
compiled = torch.compile(lambda x: torch.tanh(linear(x, weight, "F32") + 1), fullgraph=True)
found = compiled(x)
torch.testing.assert_close(found, torch.tanh(reference(x, weight, "F32") + 1))
assert torch.ops.minicpm_lite.linear.default
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_meta_tensors_take_pytorchs_path():
    x, weight = torch.zeros(2, 32, device="meta"), W.to("meta")
    assert linear(x, weight, "Q4_0").shape == (2, 4)
