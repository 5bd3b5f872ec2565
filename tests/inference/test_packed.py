"""Packed decoders: they compute what their rounded weights say, in the memory that they say, and are kept whole."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import WIDE, make_ids, make_model
from torch import nn
from torch.testing import assert_close

from minicpm_lite import kernels
from minicpm_lite.inference import packed as module
from minicpm_lite.inference.drafts import frequent_draft
from minicpm_lite.inference.gptq import gptq_model
from minicpm_lite.inference.guess_trees import Chain
from minicpm_lite.inference.mixtures import mixture, packed_size
from minicpm_lite.inference.packed import (
    PackedEmbedding,
    PackedLinear,
    load_packed,
    put_packed,
    quantize_model,
    save_packed,
    true_bits,
    unpack_model,
)
from minicpm_lite.inference.quantization import dequantize, quantize
from minicpm_lite.inference.ternary import make_ternary
from minicpm_lite.language.context import KVCache
from minicpm_lite.language.decoder import Decoder, require_plain
from minicpm_lite.language.fast_decoding import fast_decoding
from minicpm_lite.language.generation import generate
from minicpm_lite.language.layers import replace_linears
from minicpm_lite.pretrained.checkpoints import save_pretrained
from minicpm_lite.training.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Inputs that are not rounded to 8 bits, so that the numbers are those of the weights alone."""
    monkeypatch.setattr(kernels, "built", lambda source: False)


KINDS = ["Q4_K_M", "Q8_0", "Q4_0", "TQ2_0", "INT8", "INT4_G32"]


def packed_model(family: str = "grouped", types="Q4_K_M"):
    return quantize_model(make_model(WIDE[family]), types)


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("types", KINDS)
@torch.no_grad()
def test_it_computes_what_its_rounded_weights_say(family, types, unchecked):
    """Rounded by hand into a plain decoder: the oracle. With a cache, too, where latents are absorbed."""
    config = WIDE[family]
    model, ids = make_model(config), make_ids(config)
    plain = copy.deepcopy(model)
    for name, type in mixture(types, config).items():
        weight = plain.get_parameter(name)
        weight.copy_(dequantize(quantize(weight, type)))
    expected, original = plain(ids), model(ids)
    assert quantize_model(model, types) is model
    assert_close(model(ids), expected, atol=2e-5, rtol=1e-4)
    cache = KVCache(17)
    pieces = [model(piece, cache) for piece in ids.split([9, 1, 7], dim=1)]
    assert_close(torch.cat(pieces, dim=1), expected, atol=1e-4, rtol=1e-3)
    assert (expected - original).abs().max() > 1e-3, "rounding is seen"
    assert_close(unpack_model(model)(ids), expected, atol=2e-5, rtol=1e-4)
    require_plain(unpack_model(model))


@pytest.mark.parametrize("family", WIDE)
def test_every_matrix_but_routers_is_packed(family):
    model = packed_model(family, "Q8_0")
    left = [name for name, p in model.named_parameters() if p.ndim == 2]
    assert left == [name for name in left if name.endswith("mlp.gate.weight")]
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert isinstance(model.embed_tokens, PackedEmbedding) and isinstance(model.lm_head, PackedLinear)
    shared = model.lm_head.packed.data_ptr() == model.embed_tokens.packed.data_ptr()
    assert shared == model.config.tie_word_embeddings


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("types", ["Q4_K_M", "TQ1_0"])
def test_size_is_as_planned(family, types, unchecked):
    config = WIDE[family]
    before = true_bits(make_model(config))
    assert before.bits_per_weight == 32 and before == packed_size(config, {})
    after = true_bits(packed_model(family, types))
    assert after == packed_size(config, mixture(types, config)) and after.weights == before.weights


@pytest.mark.parametrize("types", ["Q4_K_M", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("family", ["grouped", "untied", "latent"])  # a router may send a token elsewhere
@torch.no_grad()
def test_kernels_that_round_inputs_to_8_bits_change_little(family, types, monkeypatch):
    model = packed_model(family, types)
    ids = make_ids(model.config)
    expected = model(ids)
    monkeypatch.undo()
    found = model(ids)
    assert 0 < (found - expected).norm() < 0.03 * expected.norm()


def attentions(model):
    return [block.self_attn for block in model.layers]


@pytest.mark.parametrize("types", ["Q4_K_M", "Q4_0", "TQ1_0"])
@torch.no_grad()
def test_layers_of_one_input_are_multiplied_in_one_call_if_their_type_is_one(types, monkeypatch):
    monkeypatch.undo()
    model, calls, linears = packed_model("grouped", types), [], kernels.linears
    monkeypatch.setattr(kernels, "linears", lambda x, w, type: calls.append(len(w)) or linears(x, w, type))
    ids = make_ids(model.config)
    together = model(ids)
    kinds = [{part.type for part in (at.q_proj, at.k_proj, at.v_proj)} for at in attentions(model)]
    assert calls.count(3) == sum(len(each) == 1 and each <= kernels.FORMATS.keys() for each in kinds)
    assert (3 in calls) == (types != "TQ1_0")
    monkeypatch.delattr(PackedLinear, "side_by_side")
    assert torch.equal(model(ids), together)


@pytest.mark.parametrize("type", sorted(kernels.FORMATS.keys() - {"F32"}))
def test_rows_of_a_table_are_those_of_the_matrix(type, monkeypatch):
    monkeypatch.undo()  # unpacked by the kernels
    table, ids = PackedEmbedding(quantize(torch.randn(9, 256), type)), torch.tensor([[3, 8], [0, 3]])
    assert torch.equal(table(ids), table.weight[ids])


def test_types_are_chosen_by_name():
    name = "layers.1.mlp.up_proj.weight"
    model = packed_model("grouped", {name: "Q4_0", "embed_tokens.weight": "Q8_0"})
    packed = {at: part.type for at, part in model.named_modules() if hasattr(part, "packed")}
    assert packed == {"embed_tokens": "Q8_0", "lm_head": "Q8_0", "layers.1.mlp.up_proj": "Q4_0"}
    assert quantize_model(model, {"layers.0.mlp.up_proj.weight": "Q4_0"}) is model, "another one, later"


@torch.no_grad()
def test_a_layer_in_tiles_is_the_layer(monkeypatch):
    layer, x = PackedLinear(quantize(torch.randn(37, 64), "Q4_0")), torch.randn(2, 3, 64)
    expected = x @ layer.weight.T
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 5)
    assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16 and layer(x[:0]).shape == (0, 3, 37)


@torch.no_grad()
def test_it_writes_what_its_plain_decoder_writes():
    model, prompt = packed_model("untied", "Q8_0"), torch.tensor([[5, 17, 3], [9, 4, 44]])
    assert torch.equal(generate(model, prompt, 20), generate(unpack_model(model), prompt, 20))


def test_packed_layers_can_be_replaced_again():
    model = packed_model()
    met = []
    replace_linears(model, lambda name, linear: met.append((name, type(linear))) or linear)
    assert len(met) == 7 * 2 + 1 and all(kind is PackedLinear for _, kind in met)


def test_gradients_are_refused():
    model = packed_model()
    model(make_ids(model.config))  # no parameter asks for one
    layer, x = model.layers[0].mlp.up_proj, torch.randn(2, 256, requires_grad=True)
    with pytest.raises(RuntimeError, match="A gradient was asked for through weights that are packed as"):
        layer(x)
    with torch.no_grad():
        assert layer(x).shape == (2, 256)
    with pytest.raises(RuntimeError, match="A gradient was asked for"):
        model.states(model.embed(make_ids(model.config)).requires_grad_())


def test_export_refuses_it(tmp_path):
    with pytest.raises(ValueError, match="The model was changed inside: .* Merge or undo"):
        save_pretrained(packed_model(), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    save_pretrained(unpack_model(packed_model()), tmp_path / "model")


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ("Q3_K_M", "There is no mixture 'Q3_K_M'"),
        ({"layers.0.mlp.up_proj.weight": "Q3_K"}, "There is no type 'Q3_K'"),
        ({"layers.0.mlp.up_proj": "Q4_0"}, "no matrix 'layers.0.mlp.up_proj' that could be packed"),
        ({"norm.weight": "Q4_0"}, "no matrix 'norm.weight' that could be packed"),
        ({"layers.0.mlp.up_proj.weight": "INT4_G96"}, "Rows of 256 weights do not divide into blocks of 96"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_anything_changes(types, message):
    model = make_model(WIDE["grouped"])
    with pytest.raises(ValueError, match=message):
        quantize_model(model, types)
    require_plain(model)


def test_what_is_packed_is_not_packed_again():
    model = packed_model()
    with pytest.raises(ValueError, match="what is packed already has none"):
        quantize_model(model, "Q8_0")


# Layers that compute with more than their weight


class Adapter(nn.Linear):
    """As loralib has it: a linear layer under its name, with a low-rank part beside its weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.down = nn.Parameter(torch.randn(4, linear.in_features) * 0.3)
        self.up = nn.Parameter(torch.randn(linear.out_features, 4) * 0.3)

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


class Doubled(nn.Linear):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight

    def forward(self, x):
        return 2 * super().forward(x)


def biased(linear: nn.Linear) -> nn.Linear:
    new = nn.Linear(linear.in_features, linear.out_features)
    new.weight = linear.weight
    return new


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + 1


def changed(how: str) -> Decoder:
    torch.manual_seed(1)
    model = make_model(WIDE["grouped"])
    if how == "table":
        model.embed_tokens = Shifted(*model.embed_tokens.weight.shape, _weight=model.embed_tokens.weight)
        return model
    layer = {"adapter": Adapter, "doubled": Doubled, "biased": biased}[how]
    replace_linears(
        model, lambda name, linear: layer(linear) if name == "layers.1.self_attn.q_proj" else linear
    )
    return model


def some_packed(model: Decoder) -> Decoder:
    """Packed in one layer, which is none of those that were changed."""
    return quantize_model(model, {"layers.0.mlp.up_proj.weight": "Q8_0"})


WAYS = {
    "quantize_model": lambda model, _: quantize_model(model, "Q8_0"),
    "gptq_model": lambda model, _: gptq_model(model, "Q8_0", make_ids(model.config)),
    "make_ternary": lambda model, _: make_ternary(model),
    "save_packed": lambda model, file: save_packed(some_packed(model), file),
    "unpack_model": lambda model, _: unpack_model(some_packed(model)),
}


@pytest.mark.parametrize(
    ("way", "how"),
    [
        (way, how)
        for way in WAYS
        for how in ("adapter", "doubled", "biased", "table")
        if (way, how) != ("make_ternary", "table")  # which it leaves as it is
    ],
)
@torch.no_grad()
def test_what_a_layer_computes_beside_its_weight_is_not_lost(way, how, tmp_path):
    """The model is refused in a sentence that names the layer, and computes what it did."""
    model = changed(how)
    ids = make_ids(model.config)
    before = model(ids)
    name = "embed_tokens" if how == "table" else "layers.1.self_attn.q_proj"
    with pytest.raises(ValueError, match=rf"(?i){name}.*merge"):
        WAYS[way](model, tmp_path / "file")
    assert_close(model(ids), before, atol=5e-2 if "pack" in way else 0, rtol=0)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_around_packed_layers_adapters_stay():
    """What is not named is not touched, and a layer within an adapter is a plain one."""
    model = changed("adapter")
    ids = make_ids(model.config)
    before = model(ids)
    assert_close(some_packed(model)(ids), before, atol=5e-2, rtol=0)


def test_an_output_layer_beside_a_tied_table_is_not_lost(unchecked):
    draft = frequent_draft(make_model(WIDE["grouped"]), torch.arange(9), Chain(2)).model
    with pytest.raises(ValueError, match="beside it there is another, lm_head, which the packed table"):
        quantize_model(draft, "Q8_0")
    assert draft.lm_head.out_features == 9
    packed = frequent_draft(packed_model(), torch.arange(9), Chain(2)).model
    assert packed.lm_head.out_features == 9, "the way that the sentence names"


def test_broken_weights_are_named():
    model = make_model(WIDE["grouped"])
    with torch.no_grad():
        model.layers[1].self_attn.k_proj.weight[3, 5] = torch.nan
    with pytest.raises(
        ValueError, match=r"layers.1.self_attn.k_proj.weight: 1 of 32,768 weights are infinite"
    ):
        quantize_model(model, "Q8_0")


# Files


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("types", ["Q4_K_M", "INT4_G32"])
@torch.no_grad()
def test_a_file_gives_the_same_model(family, types, tmp_path, unchecked):
    model, file = packed_model(family, types), tmp_path / "model.safetensors"
    save_packed(model, file)
    loaded = load_packed(file)
    ids = make_ids(model.config)
    assert torch.equal(loaded(ids), model(ids)) and loaded.config == model.config
    assert true_bits(loaded) == true_bits(model)
    assert file.stat().st_size < 1.03 * true_bits(model).nbytes + 10_000
    if types == "Q4_K_M" and model.config.tie_word_embeddings:
        assert loaded.lm_head.packed.data_ptr() == loaded.embed_tokens.packed.data_ptr()


@torch.no_grad()
def test_state_dicts_and_copies_go_round():
    model, other = packed_model(), quantize_model(make_model(WIDE["grouped"], seed=1), "Q4_K_M")
    ids = make_ids(model.config)
    assert not torch.equal(other(ids), model(ids))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids), model(ids))
    assert torch.equal(copy.deepcopy(model)(ids), model(ids))


@pytest.mark.parametrize("types", ["INT8", "Q4_K_M"])
@pytest.mark.parametrize("family", ["grouped", "untied"])
def test_a_copy_that_shares_weights_is_packed_alone(family, types, tmp_path):
    """The original stays trainable, and the copy goes round a file, with its table in two places."""
    model = make_model(WIDE[family])
    ids = make_ids(model.config)
    before = model(ids).detach()
    drafted = frequent_draft(model, torch.arange(20), Chain(2)).model
    for packed in (quantize_model(fast_decoding(model), types), quantize_model(drafted, "INT8")):
        assert not any(weight.requires_grad for weight in packed.parameters())
        assert all(weight.requires_grad for weight in model.parameters())
        assert torch.equal(model(ids), before)
    packed = quantize_model(fast_decoding(model), types)
    save_packed(packed, tmp_path / "model")
    with torch.no_grad():
        assert_close(load_packed(tmp_path / "model")(ids), packed(ids), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="has another one, lm_head|not by packing alone: .*lm_head.weight"):
        save_packed(drafted, tmp_path / "draft")
    with pytest.raises(
        ValueError, match=r"changed inside, not by packing alone: layers.0.mlp.down_proj.latent"
    ):
        save_packed(make_ternary(model), tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


def test_files_that_are_no_packed_models_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="There is no checkpoint at"):
        load_packed(file)
    save_packed(packed_model(), file)
    whole, (tensors, facts) = file.read_bytes(), load_checkpoint(file)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_packed(file)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="its checksums differ"):
        load_packed(file)
    name = "layers.0.mlp.up_proj"
    for other_tensors, other_facts, message in (
        ({f"{name}.packed": torch.zeros(256, 143, dtype=torch.uint8)}, {}, "holds torch.uint8 of shape"),
        ({f"{name}.packed": torch.zeros(256, 144)}, {}, f"{name} in .* holds torch.float32"),
        ({"norm.weight": torch.zeros(7)}, {}, "does not fit its own config"),
        ({"more": torch.zeros(7)}, {}, "does not fit its own config"),
        ({}, {"format": "another"}, "a checkpoint, and of no packed model"),
        ({}, {"types": {name: "Q3_K"}}, "Q3_K"),
        ({}, {"types": {"layers.9.mlp.up_proj": "Q4_K"}}, "layers.9.mlp.up_proj is packed .* no such matrix"),
    ):
        save_checkpoint(file, tensors | other_tensors, facts | other_facts)
        with pytest.raises(ValueError, match=message):
            load_packed(file)


MEASURE = """
import sys, torch, psutil
from minicpm_lite.inference.packed import load_packed, true_bits
torch.set_num_threads(1)
load_packed(sys.argv[2])(torch.zeros(1, 4, dtype=torch.long))  # what is needed once
before = psutil.Process().memory_info().rss
model = load_packed(sys.argv[1])
model(torch.zeros(1, 4, dtype=torch.long))
print(psutil.Process().memory_info().rss - before, true_bits(model).nbytes)
"""


@pytest.mark.slow  # starts a process; quick ones above count bytes
def test_the_process_holds_packed_bytes_alone(tmp_path):
    from dataclasses import replace

    small, large = tmp_path / "small", tmp_path / "large"
    config = replace(WIDE["grouped"], hidden_size=512, intermediate_size=1536, num_hidden_layers=12)
    save_packed(packed_model(), small)
    save_packed(quantize_model(make_model(config), "Q4_0"), large)
    command = [sys.executable, "-c", MEASURE, large, small]
    grown, packed = map(int, subprocess.check_output(command, text=True).split())
    whole = 4 * packed_size(config, {}).weights
    assert packed < whole / 7
    assert grown < packed + 16e6, "and what unpacks a part of a layer"


# Mistakes that people make; each is told apart by the numbers.


@torch.no_grad()
@pytest.mark.parametrize("mistake", ["the table alone", "another type's bytes", "rows as columns"])
def test_wrong_models_are_told_apart(mistake, monkeypatch):
    model = make_model(WIDE["grouped"])
    ids = make_ids(model.config)
    expected = quantize_model(copy.deepcopy(model), "Q4_0")(ids)
    if mistake == "the table alone":
        quantize_model(model, "Q4_0").lm_head = nn.Linear(256, model.config.vocab_size, bias=False)
    elif mistake == "another type's bytes":
        quantize_model(model, "Q4_0").layers[0].mlp.up_proj.type = "Q4_K"
    else:
        weight = model.layers[0].mlp.up_proj.weight
        quantize_model(model, "Q4_0")
        model.layers[0].mlp.up_proj = nn.Identity()
        model.layers[0].mlp.up_proj.in_features = 256
        put_packed(model, "layers.0.mlp.up_proj.weight", quantize(weight.T, "Q4_0"))
    assert not (model(ids) - expected).abs().max() < 1e-2


@pytest.mark.parametrize("also", [{}, {"lm_head.weight": "Q8_0"}], ids=["plain", "packed"])
@pytest.mark.parametrize("give", [unpack_model, lambda model: save_packed(model, "never")])
def test_an_output_layer_beside_a_table_that_is_said_to_be_one_is_not_lost(give, also):
    model = make_model(WIDE["grouped"])
    assert model.config.tie_word_embeddings
    model.lm_head = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
    quantize_model(model, {"layers.0.mlp.up_proj.weight": "Q8_0"} | also)
    with pytest.raises(ValueError, match="it has another one, lm_head, which would be lost"):
        give(model)
    assert not Path("never").exists()


@pytest.mark.parametrize("type", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("types", ["Q8_0", "Q4_K_M", "INT4_G32", {"embed_tokens.weight": "Q8_0"}], ids=str)
@pytest.mark.parametrize("family", WIDE)
def test_models_of_any_type_are_packed(family, types, type, unchecked):
    """What is not packed goes with the table, from which all comes in float32."""
    config = WIDE[family]
    model = quantize_model(make_model(config).to(type), types)
    wanted = quantize_model(make_model(config).to(type).float(), types)
    ids = make_ids(config, 1, 12)
    with torch.no_grad():
        found, expected = model(ids).float(), wanted(ids)
    assert found.isfinite().all()
    if types != "INT4_G32" or type == torch.float64:  # whose table is not packed
        assert (found - expected).abs().max() < 0.2 * expected.abs().max()
    generate(model, ids, 4)


def test_the_default_type_of_torch_changes_nothing(monkeypatch):
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    packed = {type: quantize(weight, type) for type in ("Q8_0", "INT4_G32", "Q4_0")}
    wanted = {type: dequantize(each) for type, each in packed.items()}
    model = packed_model()
    plain = unpack_model(model).state_dict()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        for type, each in packed.items():
            assert dequantize(each).dtype == torch.float32 and torch.equal(dequantize(each), wanted[type])
        again = unpack_model(model).state_dict()
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(again[name], weight) for name, weight in plain.items())
    assert all(each.dtype == torch.float32 for each in again.values())
