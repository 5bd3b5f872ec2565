"""On a GPU the part on inference computes what it computes on a CPU, where the kernels are not."""

import copy

import pytest
import torch
from torch.testing import assert_close

from minicpm_lite.config import ModelConfig, SparseConfig
from minicpm_lite.inference.drafts import PromptLookup
from minicpm_lite.inference.packed import quantize_model
from minicpm_lite.inference.sparse_attention import SparseCache, SparseContext
from minicpm_lite.inference.speculative import speculative_generate
from minicpm_lite.inference.ternary import make_ternary
from minicpm_lite.language.context import Tree
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.fast_decoding import fast_decoding

CONFIG = ModelConfig(64, 256, 2, 4, 128, num_key_value_heads=2, init_std=0.1)
SPARSE = SparseConfig(kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=3, dense_len=0)


@pytest.fixture
def two() -> tuple[Decoder, Decoder]:
    """The same model on a CPU and on a GPU."""
    torch.manual_seed(0)
    model = Decoder(CONFIG).eval()
    return model, copy.deepcopy(model).cuda()


@pytest.mark.parametrize("levels", [{}, {"coarse_topk": 4}, {"approximate_lse": True}])
def test_sparse_attention_of_a_text(two, levels):
    ids, results = torch.randint(128, (2, 300)), []
    for model in two:
        logits = model(ids.to(model.embed_tokens.weight.device), SparseContext(SparseConfig(
            **vars(SPARSE) | levels)))  # fmt: skip
        logits.square().mean().backward()
        results.append((logits.detach().cpu(), model.layers[0].self_attn.q_proj.weight.grad.cpu()))
    assert_close(results[1], results[0], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_a_sparse_cache_in_pieces_and_with_guesses(two):
    ids, padding, results = torch.randint(128, (2, 300)), torch.tensor([0, 5]), []
    for model in two:
        device = model.embed_tokens.weight.device
        cache = SparseCache(400, SPARSE, padding=padding.to(device))
        for piece in ids.to(device).split([200, 1, 99], dim=1):
            logits = model(piece, cache)
        guesses = model(ids[:, :3].to(device), Tree(cache, [-1, 0, 0]))
        cache.take([[0, 2], [0]])
        results.append((logits[:, -1].cpu(), guesses.cpu(), model(ids[:, :1].to(device), cache).cpu()))
    assert_close(results[1], results[0], atol=1e-3, rtol=1e-3)


def test_guesses_change_nothing(two):
    prompt, written = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]]), []
    for model in two:
        device = model.embed_tokens.weight.device
        tokens, _ = speculative_generate(model, PromptLookup(), prompt.to(device), 20)
        written.append(tokens.cpu())
    assert torch.equal(*written)


def test_ternary_layers(two):
    ids, results = torch.randint(128, (2, 30)), []
    for model in two:
        make_ternary(model)
        logits = model(ids.to(model.embed_tokens.weight.device))
        logits.square().mean().backward()
        results.append((logits.detach().cpu(), model.layers[0].self_attn.q_proj.latent.grad.cpu()))
    assert_close(results[1], results[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0", "Q4_K_M"])
@torch.no_grad()
def test_packed_weights(type):
    """A kernel on the CPU rounds its inputs to 8 bits, so the two differ a little."""
    torch.manual_seed(0)
    model = quantize_model(Decoder(ModelConfig(256, 512, 2, 4, 128, init_std=0.1)), type)
    ids = torch.randint(128, (2, 30))
    expected = model(ids)
    assert_close(model.cuda()(ids.cuda()).cpu(), expected, atol=0.02 * expected.abs().max().item(), rtol=0)


def test_kernels_refuse_a_gpu(two):
    with pytest.raises(ValueError, match="the kernels multiply float32 on a CPU"):
        fast_decoding(two[1])
