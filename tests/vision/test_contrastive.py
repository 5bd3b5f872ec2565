"""The two losses by their definitions, and SigLIP's beside transformers; one process and two."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from siglip_pairs import both_towers

from minicpm_lite.vision.contrastive import Contrastive, sigmoid_loss, softmax_loss
from minicpm_lite.vision.siglip import SigLIPConfig, SigLIPEncoder, pack_pictures
from minicpm_lite.vision.text_encoder import TextConfig, TextEncoder


def vectors(pairs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return F.normalize(torch.randn(pairs, 6), dim=-1), F.normalize(torch.randn(pairs, 6), dim=-1)


def naive_sigmoid(images, texts, log_scale, bias):
    """The sum over all pairs, one by one."""
    total = 0.0
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            score = math.exp(log_scale) * float(image @ text) + bias
            total += math.log1p(math.exp(-score if i == j else score))
    return total / len(images)


def naive_softmax(images, texts, log_scale):
    scores = [[math.exp(log_scale) * float(image @ text) for text in texts] for image in images]
    total = 0.0
    for i in range(len(images)):
        row, column = scores[i], [each[i] for each in scores]
        total -= 2 * scores[i][i] - math.log(sum(map(math.exp, row))) - math.log(sum(map(math.exp, column)))
    return total / (2 * len(images))


@pytest.mark.parametrize("pairs", [1, 2, 7])
@pytest.mark.parametrize(("log_scale", "bias"), [(0.0, 0.0), (2.3, -10.0), (-1.0, 3.0)])
def test_by_definition(pairs, log_scale, bias):
    images, texts = vectors(pairs)
    scale, add = torch.tensor(log_scale), torch.tensor(bias)
    assert sigmoid_loss(images, texts, scale, add).item() == pytest.approx(
        naive_sigmoid(images, texts, log_scale, bias), rel=1e-5
    )
    assert softmax_loss(images, texts, scale).item() == pytest.approx(
        naive_softmax(images, texts, log_scale), rel=1e-5, abs=1e-6
    )


def test_mistakes_are_told_apart():
    """Divided by all pairs, without signs, one direction alone, a bias in the softmax (which it cannot see)."""
    images, texts = vectors(5)
    scale, bias = torch.tensor(1.0), torch.tensor(-2.0)
    scores = scale.exp() * images @ texts.T + bias
    signs = 2 * torch.eye(5) - 1
    right = sigmoid_loss(images, texts, scale, bias)
    for wrong in (
        -F.logsigmoid(signs * scores).mean(),
        -F.logsigmoid(scores).sum() / 5,
        -F.logsigmoid(signs * (scores - bias)).sum() / 5,
    ):
        assert abs(wrong - right) > 0.05
    one_way = F.cross_entropy(scores, torch.arange(5))
    assert abs(one_way - softmax_loss(images, texts, scale)) > 0.01


def test_scores_far_from_zero_stay_finite():
    images, texts = vectors(4)
    for scale in (8.0, 12.0):
        for loss in (
            sigmoid_loss(images, texts, torch.tensor(scale), torch.tensor(-50.0)),
            softmax_loss(images, texts, torch.tensor(scale)),
        ):
            assert loss.isfinite()


def test_the_bias_that_fits_the_share_of_pairs():
    """With b = -log(B - 1) and vectors that say nothing, as many pairs are thought right as are."""
    for pairs in (2, 16, 512):
        bias = torch.tensor(-math.log(pairs - 1))
        assert pairs * bias.sigmoid().item() == pytest.approx(1.0, rel=1e-5)


def test_equal_to_transformers():
    theirs, ours = both_towers()
    pixels, ids = torch.randn(3, 3, 8, 8), torch.randint(11, (3, 6))
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels, return_loss=True)
        images, texts = ours(pack_pictures(list(pixels), 4), ids)
        torch.testing.assert_close(images, expected.image_embeds, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(texts, expected.text_embeds, atol=2e-6, rtol=1e-5)
        loss = sigmoid_loss(images, texts, ours.log_scale, ours.bias)
        torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_weight():
    _, ours = both_towers()
    images, texts = ours(pack_pictures(list(torch.randn(3, 3, 8, 8)), 4), torch.arange(18).view(3, 6) % 11)
    sigmoid_loss(images, texts, ours.log_scale, ours.bias).backward()
    untouched = [name for name, each in ours.named_parameters() if not each.grad.abs().sum() > 0]
    assert untouched == []


@pytest.mark.slow  # starts two processes
def test_two_processes_equal_one():
    script = Path(__file__).with_name("siglip_in_two_processes.py")
    root = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, script], env=root, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]


def test_encoders_that_do_not_fit_are_refused():
    picture = SigLIPConfig(16, 24, 1, 2, patch_size=4, table_side=2)
    with pytest.raises(ValueError, match="The picture encoder has no pooling"):
        Contrastive(SigLIPEncoder(picture), TextEncoder(TextConfig(11, 16, 24, 1, 2, 6)))
    with pytest.raises(ValueError, match="vectors of 16 numbers and texts of 8"):
        Contrastive(SigLIPEncoder(picture, True), TextEncoder(TextConfig(11, 8, 24, 1, 2, 6)))


def test_a_batch_may_be_cut():
    """As a trainer does it: patches are rows, and a part of them is what it would be by itself."""
    pictures = [torch.randn(3, 4 * rows, 8) for rows in (1, 4, 2)]
    packed = pack_pictures(pictures, 4)
    assert len(packed) == 3
    part = packed[2:]
    assert part.grids == ((2, 2),) and torch.equal(part.pixels, pack_pictures(pictures[2:], 4).pixels)
    assert len(packed[3:]) == 0
    assert isinstance(packed.to(torch.device("cpu")), type(packed))
