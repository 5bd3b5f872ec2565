"""GPTQ: byte for byte what its definition says, solved densely; and what people get wrong, told apart."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import WIDE, make_ids, make_model

from minicpm_lite.inference import gptq as module
from minicpm_lite.inference.calibration import walk_blocks
from minicpm_lite.inference.gptq import gptq, gptq_model
from minicpm_lite.inference.packed import PackedLinear, quantize_model
from minicpm_lite.inference.quantization import block_format, dequantize, finite_grid, quantize

DAMPING = 0.01
SIZES = {
    "Q4_0": 96,
    "Q8_0": 64,
    "Q5_0": 64,
    "INT4_G32": 96,
    "INT8": 64,
    "Q4_K": 256,
    "Q6_K": 256,
    "TQ2_0": 256,
}


def problem(type: str, seed: int = 0, rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and the hessian of inputs whose columns go together."""
    columns, draw = SIZES[type], torch.Generator().manual_seed(seed)
    x = torch.randn(3 * columns, columns, generator=draw).double()
    x = x @ torch.randn(columns, columns, generator=draw).double() + x[:, :1]
    return torch.randn(rows, columns, generator=draw), x.T @ x


def densely(weight: torch.Tensor, hessian: torch.Tensor, type: str) -> torch.Tensor:
    """The definition: after each column, the later ones that make the error least, by solving for all of them."""
    kind = block_format(type, weight.shape[1])
    hessian = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    original, w, packed = weight.double(), weight.double(), []
    for j in range(weight.shape[1]):
        place = j % kind.block
        if place == 0:
            grid = finite_grid(kind, w[:, j : j + kind.block].float().unflatten(1, (-1, kind.group)))
            codes = []
        here = grid.of_group(place // kind.group)
        codes.append(kind.round(w[:, j, None, None].float(), here)[..., 0])
        w = w.clone()
        w[:, j] = kind.values(codes[-1][..., None], here)[:, 0, 0]
        fixed, free = slice(0, j + 1), slice(j + 1, None)
        errors = w[:, fixed] - original[:, fixed]
        if j + 1 < weight.shape[1]:
            w[:, free] = (
                original[:, free]
                - torch.linalg.solve(hessian[free, free], (errors @ hessian[fixed, free]).T).T
            )
        if place == kind.block - 1:
            packed.append(kind.pack(torch.cat(codes, 1).unflatten(1, (-1, kind.group)), grid))
    return torch.cat(packed, dim=1)


def loss(packed, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    change = (dequantize(packed) - weight).to(hessian)
    return ((change @ hessian) * change).sum().item()


@pytest.mark.parametrize("type", SIZES)
def test_it_is_its_definition(type):
    weight, hessian = problem(type)
    assert torch.equal(gptq(weight, hessian, type).data, densely(weight, hessian, type))


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 4), type=st.sampled_from(["Q4_0", "INT4_G32", "Q8_0"]))
@settings(max_examples=12, deadline=None)
def test_it_is_its_definition_for_any_matrix(seed, rows, type):
    weight, hessian = problem(type, seed, rows)
    assert torch.equal(gptq(weight, hessian, type).data, densely(weight, hessian, type))


@pytest.mark.parametrize("type", SIZES)
def test_blocked_and_unblocked_are_equal(type):
    weight, hessian = problem(type)
    whole = gptq(weight, hessian, type, columns_at_once=SIZES[type])
    for at_once in (block_format(type, SIZES[type]).block, 128, 40, 24, 16, 7, 1):
        assert torch.equal(gptq(weight, hessian, type, columns_at_once=at_once).data, whole.data)


@pytest.mark.parametrize("type", SIZES)
def test_the_text_loses_less_than_by_rounding_to_nearest(type):
    """And in most types about half."""
    losses = [
        [
            loss(how(weight, hessian), weight, hessian)
            for how in (lambda w, h: gptq(w, h, type), lambda w, h: quantize(w, type))
        ]
        for weight, hessian in (problem(type, seed) for seed in range(3))
    ]
    assert all(ours < nearest for ours, nearest in losses)
    assert sum(ours for ours, _ in losses) < 0.75 * sum(nearest for _, nearest in losses)


@pytest.mark.parametrize("type", ["Q4_0", "INT8", "Q4_K"])
def test_columns_that_have_nothing_to_do_with_each_other_are_rounded_to_nearest(type):
    weight, _ = problem(type)
    hessian = torch.diag(torch.rand(SIZES[type]).double() + 0.1)
    assert torch.equal(gptq(weight, hessian, type).data, quantize(weight, type).data)


def test_a_column_that_no_text_used_moves_nothing():
    weight, hessian = problem("Q4_0")
    hessian[:, 40] = hessian[40] = 0
    without = hessian.clone()
    changed = weight.clone()
    changed[:, 40] *= 0.9
    one, other = dequantize(gptq(weight, hessian, "Q4_0")), dequantize(gptq(changed, without, "Q4_0"))
    assert torch.equal(one[:, :32], other[:, :32]) and torch.equal(one[:, 64:], other[:, 64:])


def test_float32_is_enough():
    weight, hessian = problem("Q4_0")
    single = gptq(weight, hessian.float(), "Q4_0")
    assert loss(single, weight, hessian) < 1.02 * loss(gptq(weight, hessian, "Q4_0"), weight, hessian)


# Mistakes that people make, each in a copy of the formula.


def mistaken(weight, hessian, type, mistake):
    """GPTQ column by column, with one thing wrong."""
    kind, w = block_format(type, weight.shape[1]), weight.double()
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    if mistake == "factor of H":
        factor = torch.linalg.cholesky(damped, upper=True)
    elif mistake == "U Uᵀ":
        factor = torch.linalg.cholesky(torch.linalg.inv(damped).flip(0, 1)).flip(0, 1)
    out, codes = [], []
    for j in range(weight.shape[1]):
        place = j % kind.block
        if place == 0:
            source = weight.double() if mistake == "scale of the first weights" else w
            grid = kind.fit(source[:, j : j + kind.block].float().unflatten(1, (-1, kind.group)))
        here = grid.of_group(place // kind.group)
        codes.append(kind.round(w[:, j, None, None].float(), here)[..., 0])
        error = (w[:, j] - kind.values(codes[-1][..., None], here)[:, 0, 0]) / factor[j, j]
        if mistake == "error not divided":
            error = error * factor[j, j]
        if mistake != "error not propagated":
            w[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :] * (-1 if mistake == "sign" else 1)
        if place == kind.block - 1:
            out.append(kind.pack(torch.cat(codes, 1).unflatten(1, (-1, kind.group)), grid))
            codes = []
    return torch.cat(out, dim=1)


def test_the_formula_without_a_mistake_is_the_definition():
    weight, hessian = problem("Q4_0")
    assert torch.equal(mistaken(weight, hessian, "Q4_0", None), densely(weight, hessian, "Q4_0"))


@pytest.mark.parametrize(
    "mistake",
    [
        "factor of H",
        "U Uᵀ",
        "error not propagated",
        "error not divided",
        "sign",
        "scale of the first weights",
    ],
)
def test_wrong_versions_are_told_apart(mistake):
    weight, hessian = problem("Q4_0")
    assert not torch.equal(mistaken(weight, hessian, "Q4_0", mistake), gptq(weight, hessian, "Q4_0").data)


# Errors


def test_what_cannot_be_quantised_is_refused(unchecked):
    weight, hessian = problem("Q4_0")
    with pytest.raises(ValueError, match="hessian has shape .*; expected 96 squared"):
        gptq(weight, hessian[:5, :5], "Q4_0")
    with pytest.raises(ValueError, match="The hessian holds no inputs"):
        gptq(weight, torch.zeros_like(hessian), "Q4_0")
    with pytest.raises(ValueError, match="or numbers that are not finite"):
        gptq(weight, hessian * torch.nan, "Q4_0")
    with pytest.raises(ValueError, match="has no inverse, with damping 0"):
        gptq(weight, torch.ones_like(hessian), "Q4_0", damping=0)
    with pytest.raises(ValueError, match="1 of 480 weights are infinite"):
        gptq(
            torch.where(torch.arange(96) + torch.arange(5)[:, None] * 96 == 9, torch.inf, weight),
            hessian,
            "Q4_0",
        )
    with pytest.raises(ValueError, match="Rows of 96 weights do not divide into blocks of 256"):
        gptq(weight, hessian, "Q4_K")
    with pytest.raises(ValueError, match="columns_at_once is 0; expected a whole number of at least 1"):
        gptq(weight, hessian, "Q4_0", columns_at_once=0)


@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 300))
@settings(deadline=None)
def test_pieces_are_whole_blocks_or_parts_of_one(blocks, block, at_once):
    pieces = list(module._pieces(blocks * block, block, at_once))
    assert [column for piece in pieces for column in range(*piece)] == list(range(blocks * block))
    for start, end in pieces:
        whole = start % block == end % block == 0
        assert end - start <= at_once and (whole or start // block == (end - 1) // block)


# Whole models


@pytest.mark.parametrize("type", ["INT8", "INT4_G96"])
@torch.no_grad()
def test_rows_of_any_length_that_the_type_divides(type, unchecked):
    """192 columns, as those of lite-1m, are no multiple of 128, and 128 none of a block."""
    config = replace(WIDE["grouped"], hidden_size=192, head_dim=48, intermediate_size=384)
    model, windows = make_model(config), make_ids(config, batch=16)
    expected = model(windows)
    ours, nearest = (
        (how(copy.deepcopy(model))(windows) - expected).square().mean()
        for how in (lambda m: gptq_model(m, type, windows), lambda m: quantize_model(m, type))
    )
    assert ours < nearest


@pytest.mark.parametrize("family", WIDE)
@torch.no_grad()
def test_a_model_loses_less_than_by_rounding_to_nearest(family, unchecked):
    config = WIDE[family]
    model, windows = make_model(config), make_ids(config, batch=16)
    expected = model(windows)
    by_gptq = gptq_model(copy.deepcopy(model), "INT4_G32", windows)
    nearest = quantize_model(copy.deepcopy(model), "INT4_G32")
    assert by_gptq.layers[1].mlp is not model.layers[1].mlp and not by_gptq.training
    assert {name: part.type for name, part in by_gptq.named_modules() if isinstance(part, PackedLinear)} == {
        name: part.type for name, part in nearest.named_modules() if isinstance(part, PackedLinear)
    }
    ours, theirs = ((each(windows) - expected).square().mean() for each in (by_gptq, nearest))
    assert ours < 0.8 * theirs


@torch.no_grad()
def test_the_second_block_is_quantised_on_what_the_first_became():
    model, windows = make_model(WIDE["grouped"]), make_ids(WIDE["grouped"], batch=16)
    name = "layers.1.self_attn.q_proj"
    packed = gptq_model(copy.deepcopy(model), "INT4_G32", windows)
    seen = {}
    half = copy.deepcopy(model)
    half.layers[0] = packed.layers[0]
    walk_blocks(half, windows, lambda at, block, found: seen.update({at: found}))
    weight = model.get_submodule(name).weight
    expected = gptq(weight, seen[1]["self_attn.q_proj"].hessian, "INT4_G32")
    assert torch.equal(packed.get_submodule(name).packed, expected.data)
    walk_blocks(model, windows, lambda at, block, found: seen.update({at: found}))
    other = gptq(weight, seen[1]["self_attn.q_proj"].hessian, "INT4_G32")
    assert not torch.equal(packed.get_submodule(name).packed, other.data), (
        "the first as it was would be noticed"
    )


@torch.no_grad()
def test_idle_experts_are_rounded_to_nearest_and_tables_too():
    config = WIDE["experts"]
    model, window = make_model(config), torch.full((1, 2), 3)
    packed = gptq_model(copy.deepcopy(model), "Q8_0", window)
    nearest = quantize_model(copy.deepcopy(model), "Q8_0")
    same = [
        name
        for name, part in packed.named_modules()
        if isinstance(part, PackedLinear) and torch.equal(part.packed, nearest.get_submodule(name).packed)
    ]
    assert "lm_head" in same and sum(".experts." in name for name in same) >= 2 * 3 * 3


def test_unknown_names_are_refused_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(module, "walk_blocks", None)
    for name in ("layers.9.mlp.up_proj.weight", "norm.weight"):
        with pytest.raises(ValueError, match=f"no matrix '{name}'"):
            gptq_model(make_model(WIDE["grouped"]), {name: "Q4_0"}, make_ids(WIDE["grouped"]))


def test_damping_is_a_share_of_the_mean_diagonal():
    _, hessian = problem("Q4_0")
    factor = module._factor(hessian, 0.5)
    damped = hessian + 0.5 * hessian.diagonal().mean() * torch.eye(96).double()
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(96).double(), atol=1e-8, rtol=0)
    assert not factor.tril(-1).any()
