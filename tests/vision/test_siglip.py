"""SigLIP's encoder: counts, transformers' results, buckets in whole numbers, packed as alone."""

import json
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minicpm_lite.vision.siglip import (
    SigLIPConfig,
    SigLIPEncoder,
    load_siglip,
    pack_pictures,
    position_buckets,
)

SMALL = SigLIPConfig(24, 40, 2, 3, patch_size=4, table_side=5)


def make_encoder(config: SigLIPConfig = SMALL, pooling: bool = False) -> SigLIPEncoder:
    torch.manual_seed(0)
    model = SigLIPEncoder(config, pooling).eval()
    for parameter in model.parameters():  # far from where they begin, so that each matters
        nn.init.normal_(parameter, std=0.3)
    return model


def count(config: SigLIPConfig, pooling: bool = False) -> int:
    with torch.device("meta"):
        return sum(each.numel() for each in SigLIPEncoder(config, pooling).parameters())


def test_counts_of_the_releases():
    assert count(SigLIPConfig()) == 417_792_240
    assert count(SigLIPConfig(table_side=27)) == 412_987_248
    assert count(SigLIPConfig(table_side=32)) == 413_327_088
    assert count(SigLIPConfig(), pooling=True) - count(SigLIPConfig()) == 15_238_352
    assert count(SigLIPConfig()) - count(SigLIPConfig(num_hidden_layers=26)) == 15_239_504


@pytest.fixture(params=[(32, 48, 2, 4, 4, 5, True), (24, 40, 3, 2, 7, 3, False), (64, 100, 1, 8, 2, 8, True)])
def theirs(request):
    """transformers' encoder with weights that are not those it begins with."""
    transformers = pytest.importorskip("transformers")
    width, inner, layers, heads, patch, side, head = request.param
    torch.manual_seed(0)
    model = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            patch_size=patch,
            image_size=patch * side,
            vision_use_head=head,
        )
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def test_read_and_equal_to_transformers(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = load_siglip(tmp_path)
    config = theirs.config
    pixels = torch.randn(3, 3, config.image_size, config.image_size)
    packed = pack_pictures(list(pixels), config.patch_size)
    assert packed.real is None
    with torch.no_grad():
        expected = theirs(pixels)
        torch.testing.assert_close(ours(packed), expected.last_hidden_state, atol=5e-6, rtol=1e-5)
        if config.vision_use_head:
            torch.testing.assert_close(ours.pooled(packed), expected.pooler_output, atol=1e-5, rtol=1e-5)


def test_read_beside_a_text_encoder(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.SiglipConfig(
        text_config=dict(**sizes, vocab_size=11, max_position_embeddings=6),
        vision_config=dict(**sizes, image_size=8, patch_size=4),
    )
    both = transformers.SiglipModel(config).eval()
    both.save_pretrained(tmp_path)
    ours, pixels = load_siglip(tmp_path), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        expected = both.vision_model(pixels).pooler_output
        torch.testing.assert_close(
            ours.pooled(pack_pictures(list(pixels), 4)), expected, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("side", [1, 2, 27, 70])
def test_buckets_are_exact(side):
    """The bucket of a patch is the largest whose lower border, a fraction, is not beyond the patch's own."""
    for rows in (*range(1, 141), 1306):
        found = position_buckets(rows, 1, side) // side
        borders = [Fraction(k, side) for k in range(side)]
        row = [max(k for k in range(side) if borders[k] <= Fraction(i, rows)) for i in range(0, rows, 7)]
        assert found[::7].tolist() == row


def test_buckets_go_row_by_row():
    grid = position_buckets(3, 5, 70).unflatten(0, (3, 5))
    assert (grid // 70)[:, 0].tolist() == [0, 23, 46]
    assert (grid % 70)[0].tolist() == [0, 14, 28, 42, 56]
    assert torch.equal(grid // 70, (grid // 70)[:, :1].expand(3, 5))


def test_equal_to_transformers_buckets():
    """Its numbers are floats; for whole tables and sizes that float32 keeps, they say the same."""
    vision_utils = pytest.importorskip("transformers.vision_utils")
    if not hasattr(vision_utils, "get_vision_nearest_position_ids"):
        pytest.skip("this version has no such function")
    for rows, columns in ((32, 32), (27, 38), (1, 70), (43, 24)):
        try:
            expected = vision_utils.get_vision_nearest_position_ids(torch.tensor([[rows, columns]]), 70)
        except TypeError:
            pytest.skip("it asks for other arguments")
        assert expected.flatten().tolist() == position_buckets(rows, columns).tolist()


def naive_patches(picture: torch.Tensor, patch: int) -> list[torch.Tensor]:
    _, height, width = picture.shape
    return [
        picture[:, top : top + patch, left : left + patch].flatten()
        for top in range(0, height, patch)
        for left in range(0, width, patch)
    ]


def test_patches_are_cut_row_by_row():
    pictures = [torch.randn(3, 8, 20), torch.randn(3, 12, 4)]
    packed = pack_pictures(pictures, 4)
    assert packed.grids == ((2, 5), (3, 1))
    for number, picture in enumerate(pictures):
        expected = torch.stack(naive_patches(picture, 4))
        assert torch.equal(packed.pixels[number, : len(expected)], expected)
        assert not packed.pixels[number, len(expected) :].any()
    assert packed.real.sum(1).tolist() == [10, 3]


@pytest.mark.parametrize("pooling", [False, True])
def test_packed_is_alone(pooling):
    model = make_encoder(pooling=pooling)
    pictures = [torch.randn(3, 4 * rows, 4 * columns) for rows, columns in ((1, 1), (3, 7), (9, 2), (5, 5))]
    with torch.no_grad():
        packed = pack_pictures(pictures, 4)
        together = model(packed)
        for number, picture in enumerate(pictures):
            alone = model(pack_pictures([picture], 4))[0]
            torch.testing.assert_close(together[number, : len(alone)], alone, atol=1e-6, rtol=1e-5)
            assert not together[number, len(alone) :].any()
        if pooling:
            vectors = torch.cat([model.pooled(pack_pictures([picture], 4)) for picture in pictures])
            torch.testing.assert_close(model.pooled(packed), vectors, atol=2e-6, rtol=1e-5)


def test_what_fills_a_picture_up_is_not_seen():
    model = make_encoder()
    packed = pack_pictures([torch.randn(3, 4, 4), torch.randn(3, 8, 8)], 4)
    with torch.no_grad():
        quiet = model(packed)
        packed.pixels[0, 1:] = 100.0
        torch.testing.assert_close(model(packed), quiet)


def test_a_picture_and_its_turned_copy_differ():
    """Rows and columns are not confused: the same patches in another grid are another picture."""
    model, pixels = make_encoder(), torch.randn(1, 6, 48)
    packed = pack_pictures([torch.zeros(3, 8, 12)], 4)
    with torch.no_grad():
        wide = model(type(packed)(pixels, ((2, 3),)))
        high = model(type(packed)(pixels, ((3, 2),)))
    assert (wide - high).abs().max() > 0.1


def test_gradients_reach_every_weight_that_is_used():
    model = make_encoder(SigLIPConfig(24, 40, 2, 3, patch_size=4, table_side=2), pooling=True)
    model.pooled(pack_pictures([torch.randn(3, 8, 8), torch.randn(3, 4, 8)], 4)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_begins_as_siglip_does():
    torch.manual_seed(0)
    model = SigLIPEncoder(SigLIPConfig(256, 512, 1, 4, patch_size=8, table_side=10), pooling=True)
    block = model.layers[0]
    for weight, spread in (
        (block.mlp.fc1.weight, (2 / (256 + 512)) ** 0.5),
        (block.self_attn.q_proj.weight, (2 / 512) ** 0.5),
        (model.head.attention.in_proj_weight, (2 / 512) ** 0.5),
        (model.position_embedding.weight, 1 / 16),
        (model.patch_embedding.weight, 192**-0.5),
    ):
        assert float(weight.detach().std()) == pytest.approx(spread, rel=0.15)
    assert not block.self_attn.q_proj.bias.any() and block.layer_norm1.weight.eq(1).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(num_hidden_layers=0), "num_hidden_layers is 0; expected a whole number of at least 1."),
        (dict(num_attention_heads=5), "hidden_size is 1152 and num_attention_heads 5; each head takes"),
        (dict(layer_norm_eps=-1), "layer_norm_eps is -1"),
    ],
)
def test_shapes_that_cannot_be_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        SigLIPConfig(**change)


@pytest.mark.parametrize("shape", [(3, 8, 6), (1, 8, 8), (8, 8), (3, 0, 8)])
def test_pictures_that_are_no_whole_patches_are_refused(shape):
    with pytest.raises(ValueError, match="Picture 1 is of shape .*multiples of 4"):
        pack_pictures([torch.zeros(3, 4, 4), torch.zeros(shape)], 4)


def test_calls_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="There are no pictures to pack"):
        pack_pictures([])
    with pytest.raises(
        ValueError, match="The patches have 588 numbers; this encoder reads patches of 4 pixels"
    ):
        make_encoder()(pack_pictures([torch.zeros(3, 14, 14)]))
    with pytest.raises(ValueError, match="This encoder has no pooling"):
        make_encoder().pooled(pack_pictures([torch.zeros(3, 4, 4)], 4))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(hidden_act="relu"), "another activation"),
        (dict(num_channels=1), "not for 3 colours"),
        (dict(model_type="clip_vision_model"), "of model_type 'clip_vision_model'; expected SigLIP"),
        (dict(patch_size="7"), "patch_size in .*config.json is '7'"),
        (dict(num_hidden_layers=4), "The tensors in .* do not fit its config: .* missing"),
        (dict(hidden_size=48), "do not fit its config: .* of another shape"),
    ],
)
def test_configs_that_do_not_fit_are_refused(theirs, tmp_path, change, sentence):
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=sentence):
        load_siglip(tmp_path)


def test_tensors_that_are_left_over_are_refused(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    first = next(name for name in weights if name.endswith("post_layernorm.weight"))
    extra = first.replace("post_layernorm", "pre_layernorm")
    save_file({**weights, extra: torch.ones(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 unknown: .*pre_layernorm.weight"):
        load_siglip(tmp_path)
