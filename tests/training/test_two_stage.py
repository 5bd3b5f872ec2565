"""A run through coarse data, a mixed decay and answers alone; what a model makes of held-out questions."""

import math
from dataclasses import replace

import pytest
import torch

from minicpm_lite import ModelConfig
from minicpm_lite.config import RopeScaling
from minicpm_lite.data.conversations import ConversationWindows, EncodedExample, packed_windows
from minicpm_lite.data.mixtures import MixtureWindows
from minicpm_lite.data.windows import TokenWindows, Windows
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.generation import generate
from minicpm_lite.language.scoring import token_losses
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.two_stage import choice_accuracy, score_answers
from minicpm_lite.training.wsd import WSD

MODEL = ModelConfig(16, 40, 1, 2, 30, num_key_value_heads=1, max_position_embeddings=64)
CONFIG = TrainerConfig(batch_size=3, sequence_length=8)


def make_recipe(weight=0.5, seed=0):
    """Prose of small ids, conversations of large ones."""
    examples = [EncodedExample((20 + i % 5, 25), (15 + i % 5, 29)) for i in range(40)]
    return MixtureWindows(
        {
            "prose": TokenWindows(torch.arange(400) % 13, 8, seed),
            "chats": ConversationWindows(examples, 8, seed),
        },
        [(0, {"prose": 1}), (12, {"prose": 1 - weight, "chats": weight}), (24, {"chats": 1})],
    )


def test_is_windows():
    assert isinstance(make_recipe(), Windows)
    assert make_recipe().id_range() == (0, 29)
    assert make_recipe().length == 8


def test_a_run_over_all_stages_resumes_bit_for_bit(tmp_path):
    """Stopped in the middle of the mixed decay; the data are those of a run that was not stopped."""

    def run(data):
        torch.manual_seed(0)
        return Trainer(Decoder(MODEL), data, WSD(0.01, 1, 3, 4), CONFIG)

    whole = run(make_recipe())
    whole.train(10, progress=False)
    first = run(make_recipe())
    first.train(6, progress=False)
    path = first.save(tmp_path)
    second = run(make_recipe())
    second.load(path)
    second.train(10, progress=False)
    assert second.losses == whole.losses
    for mine, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="stages"):
        run(make_recipe(weight=0.25)).load(path)
    with pytest.raises(ValueError, match="sources"):
        run(make_recipe(seed=1)).load(path)


def test_a_branch_changes_stage_and_keeps_its_place():
    """Plain until the decay, mixed from there: the prose goes on where the stable stage stopped."""
    plain, mixed = make_recipe(0.0), make_recipe(0.5)
    assert all(torch.equal(plain[index], mixed[index]) for index in range(12))
    prose = [mixed.locate(index)[1] for index in range(24) if mixed.locate(index)[0] == "prose"]
    assert prose == list(range(18))
    chats = [mixed.locate(index)[1] for index in range(12, 40) if mixed.locate(index)[0] == "chats"]
    assert chats == list(range(22)), "SFT goes on where the decay's conversations stopped"


# What a model makes of questions.

EXAMPLES = [
    EncodedExample((1, 2, 3), (4, 5)),
    EncodedExample((6,), (7, 8, 9)),
    EncodedExample((10, 11), (12,)),
]


def test_padding_changes_nothing():
    """An example scores the same alone, beside longer ones, and at the start of a window."""
    torch.manual_seed(0)
    model = Decoder(MODEL)
    together = score_answers(model, EXAMPLES)
    for place, example in enumerate(EXAMPLES):
        alone = score_answers(model, [example])
        assert alone.total_loss.item() == pytest.approx(together.total_loss[place].item(), rel=1e-5)
        row = packed_windows([[example]], len(example))
        assert token_losses(model, row).sum().item() == pytest.approx(alone.total_loss.item(), rel=1e-5)
    assert together.tokens.tolist() == [2, 3, 1]
    assert together.loss == pytest.approx(together.total_loss.sum().item() / 6)


SCALINGS = {
    "plain": None,
    "yarn": RopeScaling("yarn", 8, factor=4.0),
    "dynamic": RopeScaling("dynamic", 8, factor=2.0),
    "longrope": RopeScaling("longrope", 8, short_factor=(1.0,) * 4, long_factor=(1.0, 2.0, 3.0, 9.0)),
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_an_example_scores_the_same_whatever_shares_its_batch(kind):
    """Also where the rotary frequencies follow the length of the text: on both sides of its border."""
    torch.manual_seed(0)
    model = Decoder(replace(MODEL, rope_scaling=SCALINGS[kind], init_std=0.3))
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 8, (30, 2), generator=generator).tolist()
    drawn = [torch.randint(30, (sum(size),), generator=generator).tolist() for size in sizes]
    asked = [EncodedExample(tuple(ids[:n]), tuple(ids[n:])) for ids, (n, _) in zip(drawn, sizes, strict=True)]
    assert {8, 9, 10} <= set(map(len, asked))
    alone = [score_answers(model, [example]) for example in asked]
    for batch_size in (1, 4, 64):
        together = score_answers(model, asked, batch_size)
        for place, one in enumerate(alone):
            assert together.total_loss[place].item() == pytest.approx(one.total_loss.item(), rel=1e-5)
            assert together.tokens[place] == one.tokens and together.exact[place] == one.exact
    by_hand = token_losses(model, packed_windows([[asked[0]]], len(asked[0]))).sum().item()
    assert alone[0].total_loss.item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("answer", [(3,), (3, 4)])
def test_an_answer_to_no_question_is_not_scored(answer):
    """Nothing stands before its first token, so a sum over the others would be another answer's."""
    with pytest.raises(ValueError, match="has no question"):
        score_answers(Decoder(MODEL), [*EXAMPLES, EncodedExample((), answer)])


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match="has no answer"):
        score_answers(Decoder(MODEL), [*EXAMPLES, EncodedExample((3,), ())])
    with pytest.raises(ValueError, match="batch_size is 0"):
        score_answers(Decoder(MODEL), EXAMPLES, batch_size=0)


@pytest.fixture(scope="module")
def taught():
    """A model that has learned four answers by heart, one of them wrong."""
    torch.manual_seed(0)
    lesson = [EncodedExample((i, 9), (20 + i, 10 + i, 29)) for i in range(4)]
    run = Trainer(Decoder(MODEL), ConversationWindows(lesson, 8, 0), WSD(0.02, 5, 75, 20), CONFIG)
    run.train(progress=False)
    return run.model, lesson


def test_exact_means_greedy_decoding_gives_the_answer(taught):
    model, lesson = taught
    asked = [*lesson[:3], EncodedExample((3, 9), (23, 11, 29)), EncodedExample((5, 5), (1, 2, 3))]
    scores = score_answers(model, asked)
    assert scores.exact.tolist() == [True, True, True, False, False]
    assert scores.accuracy == 0.6
    for example, exact in zip(asked, scores.exact.tolist(), strict=True):
        written = generate(model, torch.tensor([example.question]), len(example.answer))[0]
        assert (tuple(written.tolist()[-len(example.answer) :]) == example.answer) == exact


def test_choices(taught):
    model, lesson = taught
    right = [[EncodedExample(e.question, o.answer) for o in (e, *lesson) if o is e or o != e] for e in lesson]
    right = [[row[0]] + [option for option in row[1:] if option.answer != row[0].answer] for row in right]
    assert choice_accuracy(model, right) == 1.0
    assert choice_accuracy(model, [row[::-1] for row in right]) == 0.0
    assert choice_accuracy(model, [[row[0], row[0]] for row in right]) == 0.0, "a tie is not right"
    with pytest.raises(ValueError, match=r"\[1\] answers; expected one number of answers for all, 2 or more"):
        choice_accuracy(model, [[lesson[0]]])
    with pytest.raises(ValueError, match=r"\[2, 4\] answers"):
        choice_accuracy(model, [right[0], right[1][:2]])
    with pytest.raises(ValueError, match="no example to score"):
        score_answers(model, [])


def test_examples_can_be_read_once_only(taught):
    model, lesson = taught
    assert score_answers(model, iter(lesson)).exact.tolist() == score_answers(model, lesson).exact.tolist()
    choices = [[lesson[0], lesson[1]], [lesson[2], lesson[3]]]
    assert choice_accuracy(model, (iter(row) for row in choices)) == choice_accuracy(model, choices)


def test_scoring_leaves_the_model_in_its_mode(taught):
    model, lesson = taught
    for mode in (True, False):
        model.train(mode)
        score_answers(model, lesson)
        assert model.training is mode


def test_a_model_that_is_trained_goes_on_being_trained_also_behind_an_error():
    model = Decoder(ModelConfig(16, 24, 1, 2, 41, max_position_embeddings=16)).train()
    score_answers(model, [EncodedExample((1,), (2, 3))])
    with pytest.raises(ValueError, match="the model was made for"):
        score_answers(model, [EncodedExample((1,), tuple(range(30)))])
    assert model.training


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_model_whose_losses_are_no_numbers_is_not_scored(broken):
    """Its best token would be the first of all, and a comparison of nan is always lost."""
    model = Decoder(MODEL)
    model.norm.weight.data.fill_(broken)
    right, wrong = EncodedExample((1,), (0,)), EncodedExample((1,), (3,))
    for call in (lambda: score_answers(model, [right]), lambda: choice_accuracy(model, [[right, wrong]])):
        with pytest.raises(FloatingPointError, match="loss of an answer is no finite number"):
            call()
