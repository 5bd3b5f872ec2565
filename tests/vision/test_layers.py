"""The layers of encoders beside PyTorch's own."""

import pytest
import torch
from torch import nn

from minicpm_lite.vision.layers import CrossAttention, EncoderBlock


def test_cross_attention_is_that_of_pytorch():
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True)
    ours = CrossAttention(24, 3)
    nn.init.normal_(theirs.in_proj_bias)
    ours.load_state_dict(theirs.state_dict())
    query, key, value = torch.randn(2, 5, 24), torch.randn(2, 7, 24), torch.randn(2, 7, 24)
    real = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    for mask in (None, real):
        expected, _ = theirs(query, key, value, key_padding_mask=None if mask is None else ~mask)
        torch.testing.assert_close(ours(query, key, value, mask), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("filled", [False, True])
def test_a_block_is_pytorchs_encoder_layer(filled):
    torch.manual_seed(0)
    ours = EncoderBlock(24, 40, 3, 1e-6).eval()
    theirs = nn.TransformerEncoderLayer(
        24, 3, 40, 0.0, lambda x: nn.functional.gelu(x, approximate="tanh"), 1e-6, True, norm_first=True
    ).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    attention, mlp = ours.self_attn, ours.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    theirs.load_state_dict(
        {
            "self_attn.in_proj_weight": torch.cat([each.weight for each in projections]),
            "self_attn.in_proj_bias": torch.cat([each.bias for each in projections]),
            "self_attn.out_proj.weight": attention.out_proj.weight,
            "self_attn.out_proj.bias": attention.out_proj.bias,
            "linear1.weight": mlp.fc1.weight,
            "linear1.bias": mlp.fc1.bias,
            "linear2.weight": mlp.fc2.weight,
            "linear2.bias": mlp.fc2.bias,
            "norm1.weight": ours.layer_norm1.weight,
            "norm1.bias": ours.layer_norm1.bias,
            "norm2.weight": ours.layer_norm2.weight,
            "norm2.bias": ours.layer_norm2.bias,
        }
    )
    x = torch.randn(2, 6, 24)
    real = torch.tensor([[True] * 6, [True] * 2 + [False] * 4]) if filled else None
    with torch.enable_grad():  # without gradients PyTorch takes a way of its own, which drops what is filled
        expected = theirs(x, src_key_padding_mask=None if real is None else ~real)
    found = ours(x, real)
    shown = torch.ones(2, 6, dtype=torch.bool) if real is None else real
    torch.testing.assert_close(found[shown], expected[shown], atol=2e-6, rtol=1e-5)
