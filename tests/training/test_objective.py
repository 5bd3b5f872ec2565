"""The next-token objective: exact values, exact counts, and what is added for a mixture."""

from dataclasses import replace
from itertools import combinations

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from minicpm_lite import ModelConfig
from minicpm_lite.config import MixtureConfig
from minicpm_lite.inference.packed import quantize_model
from minicpm_lite.inference.ternary import make_ternary
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.layers import replace_linears
from minicpm_lite.language.scoring import context_only
from minicpm_lite.language.upcycling import balance_loss
from minicpm_lite.training.objective import distillation, next_token, within_documents

MODEL = ModelConfig(32, 80, 2, 4, 40, num_key_value_heads=2, max_position_embeddings=64, init_std=0.1)
WINDOW = ((torch.arange(34) * 7 // 3) % 40).view(2, 17)
CONTEXT = torch.zeros_like(WINDOW, dtype=torch.bool)
CONTEXT[0, :9] = True
CONTEXT[1, [0, 4, 16]] = True
MASKED = torch.where(CONTEXT, context_only(WINDOW), WINDOW)


def test_loss_of_a_uniform_model_is_known():
    model = Decoder(MODEL)
    torch.nn.init.zeros_(model.embed_tokens.weight)
    minimised, reported = next_token.loss(model, WINDOW)
    assert reported.item() == pytest.approx(torch.tensor(40.0).log().item(), rel=1e-5)
    assert minimised.requires_grad and not reported.requires_grad


def test_what_is_only_read_is_not_counted():
    model = Decoder(MODEL)
    losses = F.cross_entropy(model(WINDOW[:, :-1]).transpose(1, 2), WINDOW[:, 1:], reduction="none")
    counted = losses[~CONTEXT[:, 1:]]
    assert_close(next_token.loss(model, MASKED)[0], counted.mean())
    assert next_token.weight(MASKED) == len(counted) == 8 + 14
    assert next_token.weight(WINDOW) == 32
    assert abs(next_token.loss(model, MASKED)[1] - losses.mean()) > 1e-3, "the mean of all would be noticed"


@pytest.mark.parametrize("objective", [next_token, within_documents(3)], ids=["plain", "documents"])
def test_the_sum_is_the_mean_times_the_units(objective):
    model = Decoder(MODEL)
    for window in (WINDOW, MASKED, MASKED[:1], context_only(WINDOW)):
        mean = objective.loss(model, window)[1].item()
        assert objective.summed(model, window) == pytest.approx(mean * objective.weight(window), rel=1e-6)


def test_gradients_are_those_of_the_plain_mean():
    torch.manual_seed(0)
    model = Decoder(MODEL)
    plain = F.cross_entropy(model(WINDOW[:, :-1]).flatten(0, 1), WINDOW[:, 1:].flatten())
    wanted = torch.autograd.grad(plain, model.parameters())
    found = torch.autograd.grad(next_token.loss(model, WINDOW)[0], model.parameters())
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True)), "bit for bit"


def test_a_batch_without_a_unit_is_zero_and_moves_nothing():
    """A process may be left with such a pass; it must not be nan, which no share of 0 takes away."""
    model = Decoder(MODEL)
    minimised, reported = next_token.loss(model, context_only(WINDOW))
    assert next_token.weight(context_only(WINDOW)) == 0
    assert minimised.item() == reported.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(minimised, model.parameters()))


def test_documents_are_kept_apart():
    """As if each were a window of its own; units are the same tokens."""
    model, end = Decoder(MODEL), int(WINDOW[0, 6])
    apart = within_documents(end)
    documents = [WINDOW[:1, :7], WINDOW[:1, 7:]]
    counts = [6, 9]  # and the first token of the second, which its end token alone predicts
    assert end not in WINDOW[0, 7:16] and end not in WINDOW[0, :6]
    alone = [next_token.loss(model, document)[0] * n for document, n in zip(documents, counts, strict=True)]
    logits = model(WINDOW[:1, :7])[0, -1]
    alone.append(F.cross_entropy(logits, WINDOW[0, 7]))
    minimised, reported = apart.loss(model, WINDOW[:1])
    assert_close(minimised, sum(alone) / 16)
    assert_close(reported, minimised) and not reported.requires_grad
    assert abs(minimised - next_token.loss(model, WINDOW[:1])[0]) > 1e-5
    assert apart.weight(MASKED) == next_token.weight(MASKED)
    assert len({apart.name, within_documents(end + 1).name, next_token.name}) == 3


def test_documents_that_nothing_ends_cannot_be_kept_apart(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for a reader
    with pytest.raises(ValueError, match="The end is None; expected the id that ends each document"):
        within_documents(None)
    with pytest.raises(ValueError, match="The end is -1; expected the id"):  # as some configs say "none"
        within_documents(-1)


@pytest.mark.parametrize("objective", [next_token, within_documents(3)], ids=["plain", "documents"])
@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_the_balance_loss_is_minimised_and_not_reported(weight, objective):
    torch.manual_seed(0)
    model = Decoder(replace(MODEL, mixture=MixtureConfig(4, 2, balance_loss_weight=weight))).train()
    minimised, reported = objective.loss(model, WINDOW)
    assert_close(minimised - reported, weight * balance_loss(model))


def test_outside_of_training_no_balance_loss_is_added():
    """That of an earlier pass would be left in the layers, with its graph."""
    model = Decoder(replace(MODEL, mixture=MixtureConfig(4, 2))).train()
    next_token.loss(model, WINDOW)[0].backward()
    minimised, reported = next_token.loss(model.eval(), WINDOW)
    assert_close(minimised, reported)
    minimised.backward()


# Distillation


def small(seed: int) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(MODEL)


def test_distillation_is_its_formula():
    teacher, model = small(1), small(2)
    minimised, reported = distillation(teacher).loss(model, WINDOW)
    p, q = (each(WINDOW[:, :-1]).softmax(-1).double() for each in (teacher, model))
    expected = (p * (p / q).log()).sum(-1).mean()
    assert_close(minimised.double(), expected, atol=1e-6, rtol=1e-4)
    assert minimised.requires_grad and not reported.requires_grad and reported == minimised.detach()


def test_a_share_of_the_text():
    teacher, model = small(1), small(2)
    alone, text = (distillation(teacher).loss(model, MASKED)[1], next_token.loss(model, MASKED)[1])
    assert_close(distillation(teacher, 0).loss(model, MASKED)[1], text, atol=1e-6, rtol=1e-5)
    assert_close(
        distillation(teacher, 0.25).loss(model, MASKED)[1], 0.25 * alone + 0.75 * text, atol=1e-6, rtol=1e-5
    )


def test_a_model_that_says_the_same_has_nothing_to_learn():
    teacher = small(1)
    minimised, reported = distillation(teacher).loss(small(1), MASKED)
    assert abs(reported.item()) < 1e-6
    wrong = torch.autograd.grad(distillation(small(3)).loss(teacher, MASKED)[0], teacher.embed_tokens.weight)[
        0
    ]
    assert wrong.abs().max() > 1e-4


def test_the_teacher_gets_no_gradient_and_keeps_its_mode():
    teacher, model = small(1).train(), small(2)
    objective = distillation(teacher)
    objective.loss(model, MASKED)[0].backward()
    assert teacher.training and all(p.grad is None for p in teacher.parameters())
    assert objective.weight(MASKED) == next_token.weight(MASKED)
    assert objective.loss(model, context_only(WINDOW))[0].item() == 0


def test_a_run_knows_its_teacher_by_its_weights():
    assert distillation(small(1)).name == distillation(small(1)).name != distillation(small(2)).name
    assert distillation(small(1), 0.5).name != distillation(small(1)).name


def halved(model: Decoder) -> Decoder:
    """Its layers have the weights of the plain ones, and compute something else."""

    class Halved(nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    def change(_: str, linear: nn.Linear) -> nn.Linear:
        new = Halved(linear.in_features, linear.out_features, bias=False)
        new.weight = linear.weight
        return new

    replace_linears(model, change)
    return model


def test_a_run_knows_its_teacher_by_all_that_it_computes_with():
    """Packed bytes are buffers, frequencies are in the config, and a layer's class is none of the two."""
    turned = small(1)
    turned.config = replace(MODEL, rope_theta=500.0)
    teachers = [
        small(1),
        small(1).double(),
        turned,
        halved(small(1)),
        make_ternary(small(1)),
        make_ternary(small(1), "matrix"),
        *(quantize_model(small(seed), type) for seed in (1, 2) for type in ("Q8_0", "Q4_0")),
    ]
    outputs = [teacher.eval()(WINDOW[:, :-1]).float() for teacher in teachers]
    for one, other in combinations(outputs, 2):
        assert not torch.equal(one, other), "each says something else"
    names = [distillation(teacher).name for teacher in teachers]
    assert len(set(names)) == len(names)
    assert names[-1] == distillation(quantize_model(small(2), "Q4_0")).name


def test_a_teacher_of_another_vocabulary_is_refused():
    for size in (30, 50):
        other = Decoder(replace(MODEL, vocab_size=size))
        with pytest.raises(ValueError, match=f"The teacher has {size} token ids and the model has 40"):
            distillation(other).loss(small(1), WINDOW)


@pytest.mark.parametrize("share", [-0.1, 1.1, True, "all", float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="share is .*; expected a number from 0 to 1"):
        distillation(small(1), share)


def test_divergence_the_other_way_round_is_told_apart():
    teacher, model = small(1), small(2)
    with torch.no_grad():
        teacher.embed_tokens.weight.mul_(3)
    one, other = distillation(teacher).loss(model, WINDOW)[1], distillation(model).loss(teacher, WINDOW)[1]
    assert abs(one - other) > 1e-3
