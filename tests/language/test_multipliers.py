"""The stream as it grows, by formula and by hooks; its free scale; decoders folded to a Llama."""

import math
from dataclasses import replace
from statistics import mean

import pytest
import torch
from small_models import (
    FAMILIES,
    GROUPED,
    PLAIN,
    changed_inside,
    make_ids,
    make_model,
    opened_by_transformers,
)
from torch.testing import assert_close

from minicpm_lite import load_config
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.multipliers import fold_to_llama, stream_sizes
from minicpm_lite.runtime import seed_everything

# The stream


@pytest.mark.parametrize("name", FAMILIES)
def test_stream_sizes_are_those_at_the_doors(name):
    model = make_model(FAMILIES[name])
    ids, heard = make_ids(model.config), []
    for block in model.layers:
        block.register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    model.norm.register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    with torch.no_grad():
        model(ids)
    expected = torch.stack([x.square().mean().sqrt() for x in heard])
    assert torch.equal(stream_sizes(model, ids), expected)


def test_blocks_that_find_nothing_leave_the_stream():
    model = make_model(GROUPED)
    for block in model.layers:
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
        torch.nn.init.zeros_(block.mlp.down_proj.weight)
    sizes = stream_sizes(model, make_ids(model.config))
    assert len(sizes) == GROUPED.num_hidden_layers + 1
    assert torch.equal(sizes, sizes[:1].expand_as(sizes))


def end_of_stream(**changes) -> float:
    """Mean square that 4 or 64 blocks add before training, over three draws of the weights."""
    config = replace(load_config("lite-1m"), **changes)
    ids = torch.randint(config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    gains = []
    for seed in range(3):
        seed_everything(seed)
        sizes = stream_sizes(Decoder(config), ids)
        gains.append((sizes[-1] ** 2 - sizes[0] ** 2).item())
    return mean(gains)


@pytest.mark.slow  # builds deep models
def test_with_the_multiplier_the_depth_cancels():
    with_it = [end_of_stream(num_hidden_layers=depth) for depth in (4, 64)]
    without = [end_of_stream(num_hidden_layers=depth, scale_depth=None) for depth in (4, 64)]
    assert math.isclose(with_it[0], with_it[1], rel_tol=0.15)
    assert math.isclose(without[1] / without[0], 64 / 4, rel_tol=0.35)


# The free scale of the stream


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_only_the_ratio_of_the_two_factors_counts(name):
    model = make_model(FAMILIES[name]).double()
    config, ids = model.config, make_ids(model.config)
    depth = config.num_hidden_layers**0.5 if config.scale_depth is None else config.scale_depth
    for scale_emb in (0.1, 1.0, 40.0):
        change = scale_emb / config.scale_emb
        other = Decoder(
            replace(
                config,
                scale_emb=scale_emb,
                scale_depth=depth * change,
                rms_norm_eps=config.rms_norm_eps * change**2,
            )
        ).double()
        other.load_state_dict(model.state_dict())
        assert_close(other(ids), model(ids), atol=1e-12, rtol=1e-12)
        other = Decoder(replace(other.config, rms_norm_eps=config.rms_norm_eps * change)).double()
        other.load_state_dict(model.state_dict())
        assert scale_emb == config.scale_emb or not torch.allclose(other(ids), model(ids), atol=1e-6)


# Folding


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_fold_to_llama(name):
    model = make_model(PLAIN[name])
    ids = make_ids(model.config)
    folded = fold_to_llama(model)
    assert (folded.config.scale_emb, folded.config.residual_scale, folded.config.width_ratio) == (1, 1, 1)
    assert folded.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert folded.num_parameters(embeddings=True) == model.num_parameters(embeddings=True)
    for folded_table, table in zip(folded.tables, model.tables, strict=True):
        assert torch.equal(folded_table, table)
    assert_close(folded(ids), model(ids), atol=2e-5, rtol=1e-5)
    assert_close(opened_by_transformers(folded, "llama")(ids).logits, model(ids), atol=2e-5, rtol=1e-5)


def test_the_model_that_was_folded_stays_as_it_was():
    model = make_model(GROUPED)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    fold_to_llama(model)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_folding_keeps_the_mode(training):
    assert fold_to_llama(make_model(GROUPED).train(training)).training == training


@pytest.mark.parametrize(
    ("name", "reason"), [("minicpm3-4b", "latent attention"), ("minicpm-moe-8x2b", "mixture of experts")]
)
def test_only_plain_decoders_fold(name, reason):
    with pytest.raises(ValueError, match=f"this has .*{reason}"), torch.device("meta"):
        fold_to_llama(Decoder(load_config(name)))


def test_a_decoder_that_was_changed_inside_does_not_fold():
    with pytest.raises(ValueError, match="changed inside: layers.0.self_attn.q_proj is"):
        fold_to_llama(changed_inside(GROUPED))
