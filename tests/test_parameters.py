"""Parameters counted from a shape are those of the decoder that has it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_lite import ModelConfig, list_configs, load_config
from minicpm_lite.config import LatentAttentionConfig, MixtureConfig
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.upcycling import num_active_parameters
from minicpm_lite.parameters import count_parameters


def assert_counts(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Decoder(config)
    count = count_parameters(config)
    assert count.total == model.num_parameters(embeddings=True)
    assert count.others == model.num_parameters()
    assert count.active == num_active_parameters(model, embeddings=True)


@pytest.mark.parametrize("name", list_configs())
def test_every_released_model(name):
    assert_counts(load_config(name))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_kind_of_shape(data):
    few = st.integers(1, 3)
    groups, keys, half = data.draw(few), data.draw(few), data.draw(few)
    latent, mixture, untied = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.booleans())
    heads = groups * keys if not latent else data.draw(few)
    shape = dict(head_dim=2 * half)
    if latent:
        plain = data.draw(few)
        ranks = LatentAttentionConfig(data.draw(few), data.draw(few), plain, 2 * half, data.draw(few))
        shape = dict(latent_attention=ranks, head_dim=plain + 2 * half)
    if mixture:
        experts = data.draw(st.integers(1, 4))
        shape["mixture"] = MixtureConfig(experts, data.draw(st.integers(1, experts)))
    assert_counts(
        ModelConfig(
            data.draw(st.integers(1, 9)), data.draw(few), data.draw(few), heads, data.draw(st.integers(1, 9)),
            num_key_value_heads=keys if not latent else heads, tie_word_embeddings=not untied, **shape,
        )
    )  # fmt: skip
