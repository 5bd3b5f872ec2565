"""transformers' SigLIP and ours with the same weights, for tests that compare the two."""

import torch
from torch import nn
from transformers import SiglipConfig, SiglipModel

from minicpm_lite.vision.contrastive import Contrastive
from minicpm_lite.vision.siglip import SigLIPConfig, SigLIPEncoder
from minicpm_lite.vision.text_encoder import TextConfig, TextEncoder


def both_towers() -> tuple[SiglipModel, Contrastive]:
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    theirs = SiglipModel(
        SiglipConfig(
            text_config=dict(**sizes, vocab_size=11, max_position_embeddings=6, projection_size=16),
            vision_config=dict(**sizes, image_size=8, patch_size=4),
        )
    ).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = Contrastive(
        SigLIPEncoder(SigLIPConfig(16, 24, 2, 2, patch_size=4, table_side=2), pooling=True),
        TextEncoder(TextConfig(11, 16, 24, 2, 2, length=6)),
    ).eval()
    stored = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(stored[their_name(name)].reshape(parameter.shape))
    return theirs, ours


def their_name(name: str) -> str:
    if name in ("log_scale", "bias"):
        return {"log_scale": "logit_scale", "bias": "logit_bias"}[name]
    tower, inner = name.split(".", 1)
    if inner.startswith(("patch_embedding.", "position_embedding.", "token_embedding.")):
        inner = f"embeddings.{inner}"
    elif inner.startswith("layers."):
        inner = f"encoder.{inner}"
    return {"images": "vision_model.", "texts": "text_model."}[tower] + inner
