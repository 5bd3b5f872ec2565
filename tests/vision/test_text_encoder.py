"""SigLIP's text encoder beside transformers', and what it refuses."""

import pytest
import torch
from siglip_pairs import both_towers

from minicpm_lite.vision.text_encoder import TextConfig, TextEncoder


def test_counts_of_the_release():
    """So400m's text tower, with its 32,000 pieces."""
    with torch.device("meta"):
        model = TextEncoder(TextConfig())
    block = 15_239_504
    expected = 27 * block + 32_000 * 1152 + 64 * 1152 + 2 * 1152 + 1152 * 1152 + 1152
    assert sum(each.numel() for each in model.parameters()) == expected


def test_equal_to_transformers():
    theirs, ours = both_towers()
    ids = torch.randint(11, (4, 6))
    with torch.no_grad():
        expected = theirs.text_model(ids).pooler_output
        torch.testing.assert_close(ours.texts(ids), expected, atol=5e-6, rtol=1e-5)


def test_every_token_counts_wherever_it_stands():
    _, ours = both_towers()
    ids = torch.zeros(1, 6, dtype=torch.long)
    with torch.no_grad():
        plain = ours.texts(ids)
        for place in range(6):
            other = ids.clone()
            other[0, place] = 3
            assert (ours.texts(other) - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        (torch.zeros(2, 5, dtype=torch.long), "of shape \\(2, 5\\); expected texts of 6 tokens, filled up"),
        (torch.full((1, 6), 11), "between 11 and 11; expected 0 to 10"),
        (torch.full((1, 6), -1), "between -1 and -1; expected 0 to 10"),
    ],
)
def test_texts_that_cannot_be_are_refused(ids, sentence):
    _, ours = both_towers()
    with pytest.raises(ValueError, match=sentence):
        ours.texts(ids)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(length=0), "length is 0; expected a whole number of at least 1."),
        (dict(num_attention_heads=5), "hidden_size is 1152 and num_attention_heads 5"),
        (dict(layer_norm_eps=0), "layer_norm_eps is 0"),
    ],
)
def test_shapes_that_cannot_be_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        TextConfig(**change)
