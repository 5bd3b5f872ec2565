"""A head guesses in training what it guesses in use, and what is written is the target's."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from minicpm_lite.config import LatentAttentionConfig, MixtureConfig, ModelConfig
from minicpm_lite.inference.drafts import rank_by_frequency
from minicpm_lite.inference.eagle import (
    EagleDraft,
    EagleHead,
    _guesses,
    _taught,
    agreement_by_step,
    eagle,
    levels,
    load_eagle,
    save_eagle,
    share_output,
    unrolled,
)
from minicpm_lite.inference.guess_trees import Chain, DynamicTree, StaticTree
from minicpm_lite.inference.packed import put_packed
from minicpm_lite.inference.quantization import quantize
from minicpm_lite.inference.speculative import Drafting, Stats, speculative_generate, speculative_stream
from minicpm_lite.inference.speculative_costs import Adaptive, Costs
from minicpm_lite.language.context import KVCache
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.generation import generate, pad_left
from minicpm_lite.language.sampling import Sampling
from minicpm_lite.language.scoring import context_only
from minicpm_lite.training.checkpoint import save_checkpoint
from minicpm_lite.training.processes import processes
from minicpm_lite.training.settings import Layout, TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD

CONFIG = ModelConfig(
    32, 64, 4, 4, 29, num_key_value_heads=2, max_position_embeddings=128, init_std=0.3, scale_emb=3.0,
    eos_token_id=(28,),
)  # fmt: skip
KEPT = torch.tensor([28, 3, 1, 4, 0, 5, 9, 2, 6, 8, 7, 20, 11])
RANKING = torch.cat([KEPT, torch.tensor([i for i in range(29) if i not in KEPT.tolist()])])


def pair(kept=KEPT, seed=0) -> tuple[EagleHead, Decoder]:
    torch.manual_seed(seed)
    target, head = Decoder(CONFIG).eval(), EagleHead(CONFIG, kept)
    for parameter in head.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return head, target


@torch.no_grad()
def naive(head: EagleHead, target: Decoder, ids: list[int], guessed: list[int]) -> torch.Tensor:
    """The scores behind a text and each of some guesses, all made anew, without a cache and without a tree."""
    *streams, _ = target.states(target.embed(torch.tensor([ids[:-1]])), after=(2, 2, 1))
    known = head.fuse(torch.cat(streams, dim=-1))  # of all tokens but the newest
    tokens, found = ids[1:], []
    for step in range(len(guessed) + 1):
        made = head(known, target.embed(torch.tensor([tokens])))
        found.append(head.logits(made[:, -1:])[0, 0])
        if step < len(guessed):
            # The keys of the text stay those of its streams; only behind it stands what the head made.
            known, tokens = torch.cat([known, made[:, -1:]], dim=1), [*tokens, guessed[step]]
    return torch.stack(found)


def test_levels():
    assert levels(32) == (2, 16, 29) and levels(4) == (2, 2, 1)
    with pytest.raises(ValueError, match="The target has 3 blocks; EAGLE-3 reads three levels of 4 or more"):
        levels(3)


@pytest.mark.parametrize("start", [2, 3, 9])
@torch.no_grad()
def test_the_training_time_test_is_what_is_done_in_use(start):
    """Step k at place t is the guess k behind a text that ends with token t + 1, if guesses are the text's."""
    head, target = pair()
    ids = torch.randint(29, (1, 16), generator=torch.Generator().manual_seed(1))
    steps = 4
    unrolled = _guesses(head, _taught(head, target, ids), steps)
    text = ids[0].tolist()
    wanted = naive(head, target, text[:start], text[start : start + steps - 1])
    for step, (scores, _, _) in enumerate(unrolled):
        assert_close(scores[0, start - 2], wanted[step], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pieces", [[9], [4, 1, 3, 1], [2, 6, 1]])
@torch.no_grad()
def test_a_chain_is_guessed_from_all_of_the_text_however_it_came(pieces):
    """Rows of different length, in pieces, with guesses between that were not taken."""
    head, target = pair()
    texts = [torch.randint(29, (sum(pieces) + more,)).tolist() for more in (0, 5)]
    drafting = EagleDraft(head, Chain(3)).begin(target, 60, Sampling(), None)
    read = [0, 0]
    for place in range(len(pieces)):
        ends = [sum(pieces[: place + 1]) + more for more in (0, 5)]
        shown = []
        for row, (text, end) in enumerate(zip(texts, ends, strict=True)):
            *streams, _ = target.states(target.embed(torch.tensor([text[: end - 1]])), after=(2, 2, 1))
            shown.append(torch.cat(streams, dim=-1)[0, max(read[row] - 1, 0) :])
        drafting.see(shown)
        found = drafting.propose([text[a:b] for text, a, b in zip(texts, read, ends, strict=True)], 9)
        read = ends
    for row, text in enumerate(texts):
        guessed: list[int] = []
        for _ in range(3):
            guessed.append(int(KEPT[naive(head, target, text, guessed)[-1].argmax()]))
        assert found.tokens[row].tolist() == guessed


@pytest.mark.parametrize(
    "shape", [Chain(4), StaticTree((-1, -1, 0, 0, 2), (0, 1, 0, 1, 0)), DynamicTree(3, 3, 8)]
)
@pytest.mark.parametrize("samples", [1, 2])
def test_what_is_written_is_the_targets(shape, samples):
    head, target = pair()
    ids, padding = pad_left([[5, 6, 7, 8, 1], [9, 2], [4]])
    wanted = generate(target, ids, 24, padding=padding, samples=samples)
    found, stats = speculative_generate(
        target, EagleDraft(head, shape), ids, 24, padding=padding, samples=samples
    )
    assert torch.equal(found, wanted) and stats.proposed
    sampled, _ = speculative_generate(
        target, EagleDraft(head, shape), ids, 12, temperature=0.9, top_p=0.9, padding=padding,
        repetition_penalty=1.2, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert sampled.shape[0] == 3


def test_a_cache_that_has_read_the_beginning_and_a_draft_that_is_not_always_asked():
    head, target = pair()
    ids = torch.tensor([[5, 6, 7, 8, 1, 2, 3]])
    wanted = generate(target, ids, 20)
    for draft in (
        EagleDraft(head, Chain(4)),
        Adaptive(EagleDraft(head, Chain(4)), Costs((1.0, 1.1, 1.2, 1.3, 1.4), 0.1)),
        Adaptive(EagleDraft(head, Chain(4)), Costs((1.0, 2.0, 3.0), 0.9)),  # it pays never
    ):
        cache = KVCache(40)
        with torch.no_grad():
            target(ids[:, :4], cache)
        assert torch.equal(speculative_generate(target, draft, ids, 20, context=cache)[0], wanted)


def test_it_learns_to_guess():
    """A target that counts, with a period that one head learns in a moment: nearly all guesses come true."""
    torch.manual_seed(0)
    text = (torch.arange(4000) * 5) % 23
    target = Decoder(CONFIG)
    Trainer(target, text, WSD(0.01, 5, 100, 20), TrainerConfig(8, 24)).train(progress=False)
    target.eval()
    head = EagleHead(CONFIG, rank_by_frequency(text, 29)[:23])
    held_out = text[:200].view(4, 50)
    before = agreement_by_step(head, target, held_out, 4)
    trainer = Trainer(head, text, WSD(0.01, 5, 60, 20), TrainerConfig(8, 24), eagle(target, steps=4))
    trainer.train(progress=False)
    after = agreement_by_step(head, target, held_out, 4)
    assert max(before) < 0.5 and min(after) > 0.9
    assert trainer.losses[-1] < 0.3 * trainer.losses[0]
    _, stats = speculative_generate(target, EagleDraft(head, Chain(4)), text[None, :9], 40)
    assert stats.acceptance_length > 3.5


def test_what_is_minimised():
    """The sum as the definition reads, with a place that is read only and tokens that cannot be guessed."""
    head, target = pair()
    window = torch.randint(29, (2, 9), generator=torch.Generator().manual_seed(2))
    window[0, :5] = context_only(window[0, :5])
    objective = eagle(target, steps=3)
    minimised, reported = objective.loss(head, window)
    ids, total = torch.where(window < 0, ~window, window), 0.0
    with torch.no_grad():
        laws = target(ids)
        for row in range(2):
            for step in range(3):
                for place in range(9 - 2 - step):
                    token = place + 2 + step
                    law = laws[row, token - 1]
                    if window[row, token] < 0 or int(law.argmax()) not in KEPT.tolist():
                        continue
                    text = ids[row].tolist()
                    scores = naive(head, target, text[: place + 2], text[place + 2 : token])[-1]
                    total -= 0.8**step * (law[KEPT].softmax(0) * F.log_softmax(scores, 0)).sum().item()
    assert objective.weight(window) == 12
    assert minimised.item() == reported.item() == pytest.approx(total / 12, rel=1e-4)
    minimised.backward()
    assert all(p.grad is None for p in target.parameters()), "The target stays as it is."
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_refusals():
    head, target = pair()
    other = Decoder(ModelConfig(32, 64, 5, 4, 29))
    with pytest.raises(ValueError, match="for 4 blocks of width 32 and 29 tokens, and the target has 5"):
        EagleDraft(head, Chain(2)).begin(other, 20, Sampling(), None)
    for ids in ([], [3, 3], [29], [-1]):
        with pytest.raises(ValueError, match="expected some of those that the model has, 0 to 28"):
            EagleHead(CONFIG, torch.tensor(ids, dtype=torch.long))
    for change in (
        {"latent_attention": LatentAttentionConfig(8, 8, 4, 4, 8), "num_key_value_heads": 4, "head_dim": 8},
        {"mixture": MixtureConfig(4, 2)},
    ):
        config = ModelConfig(**vars(CONFIG) | change)
        with pytest.raises(ValueError, match="the target has latent attention or experts"):
            EagleHead(config, KEPT)
    with pytest.raises(ValueError, match="steps"):
        eagle(target, steps=0)
    for decay in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="decay"):
            eagle(target, decay=decay)
    with pytest.raises(ValueError, match="windows have 7 tokens and steps is 7; a window needs more tokens"):
        agreement_by_step(head, target, torch.zeros(1, 7, dtype=torch.long))
    assert all(0 <= each <= 1 for each in agreement_by_step(head, target, torch.tensor([[*range(8)]])))


def test_an_objective_is_known_by_all_that_it_depends_on(tmp_path):
    """A run is not resumed towards another target, or with another decay or number of steps."""
    text = torch.randint(29, (400,), generator=torch.Generator().manual_seed(0))

    def run(objective):
        return Trainer(pair()[0], text, WSD(0.01, 1, 3, 1), TrainerConfig(2, 10), objective)

    target, other = pair()[1], pair(seed=1)[1]
    run(eagle(target)).train(2, tmp_path, progress=False)
    checkpoint = next(tmp_path.glob("step-*2"))
    run(eagle(pair()[1])).load(checkpoint)
    for objective in (eagle(other), eagle(target, decay=0.5), eagle(target, steps=3)):
        with pytest.raises(ValueError, match="EAGLE-3, 7 steps"):
            run(objective).load(checkpoint)


def test_heads_train_in_bfloat16_and_from_targets_in_it():
    text = (torch.arange(400) * 5) % 23
    losses = {}
    for precision in ("float32", "bfloat16"):
        for target in (pair()[1], pair()[1].bfloat16()):
            trainer = Trainer(
                pair()[0], text, WSD(0.01, 1, 5, 1), TrainerConfig(2, 20, precision=precision), eagle(target)
            )
            trainer.train(progress=False)
            assert trainer.model.norm.weight.dtype == torch.float32
            losses[precision, target.norm.weight.dtype] = trainer.losses
    plain = losses["float32", torch.float32]
    assert all(found == pytest.approx(plain, rel=0.2) for found in losses.values())


def test_a_head_that_is_cut_over_processes_is_refused():
    head, target = pair()
    with processes(), pytest.raises(ValueError, match="cut over processes .* give Layout"):
        Trainer(
            head, torch.arange(29).repeat(9), WSD(0.01, 1, 3, 1), TrainerConfig(2, 10), eagle(target),
            Layout(sharded=True),
        ).train(progress=False)  # fmt: skip


def test_a_head_is_a_draft_like_others():
    head, target = pair()
    drafting = EagleDraft(head, Chain(2)).begin(target, 20, Sampling(), None)
    assert isinstance(drafting, Drafting) and drafting.after == (2, 2, 1)
    stats = Stats()
    steps = list(
        speculative_stream(target, torch.tensor([[1, 2]]), 5, draft=EagleDraft(head, Chain(2)), stats=stats)
    )
    assert len(steps) == 5 and stats.calls


def test_a_head_with_the_targets_output_layer_is_kept_without_it(tmp_path):
    head, target = pair(RANKING[:13])
    share_output(head, target)
    assert torch.equal(head.lm_head.weight, target.tables[-1][head.vocabulary])
    assert not head.lm_head.weight.requires_grad
    with torch.no_grad():
        for weight in head.parameters():
            weight.copy_(weight.bfloat16())  # so that nothing is lost
    share_output(head, target)
    file = tmp_path / "head.safetensors"
    save_eagle(file, head, RANKING)
    same = load_eagle(file, target)
    for name, tensor in head.state_dict().items():
        assert torch.equal(same.state_dict()[name], tensor), name
    more = load_eagle(file, target, kept=29)
    hidden = torch.randn(1, 5, 32)
    assert_close(more.logits(hidden)[..., :13], head.logits(hidden))
    assert torch.equal(more.vocabulary, RANKING)
    ids = torch.tensor([[5, 6, 7, 8, 1]])
    wanted = generate(target, ids, 20)
    packed = load_eagle(file, target)
    for name, weight in [*packed.named_parameters()]:
        if weight.ndim == 2:
            put_packed(packed, name, quantize(weight, "Q8_0"))
    for guessing in (same, more, packed):
        found, stats = speculative_generate(target, EagleDraft(guessing, Chain(3)), ids, 20)
        assert torch.equal(found, wanted) and stats.proposed


def test_files_of_heads_that_do_not_fit_are_refused(tmp_path, unchecked):
    head, target = pair(RANKING[:13])
    file = tmp_path / "head.safetensors"
    with pytest.raises(ValueError, match="The head has an output layer of its own"):
        save_eagle(file, head, RANKING)
    share_output(head, target)
    with pytest.raises(ValueError, match="13 tokens that are not the first 13 of the ranking"):
        save_eagle(file, head, RANKING.flip(0))
    save_eagle(file, head, RANKING)
    for kept in (0, 30):
        with pytest.raises(ValueError, match=f"ranks 29 tokens, of which {kept} are asked for"):
            load_eagle(file, target, kept)
    with pytest.raises(ValueError, match="and the target has 31"):
        load_eagle(file, Decoder(ModelConfig(**vars(CONFIG) | {"vocab_size": 31})))
    with pytest.raises(ValueError, match="of another shape"):
        load_eagle(file, Decoder(ModelConfig(**vars(CONFIG) | {"intermediate_size": 96})))
    for facts in ({}, ["a", "list"], None, "text"):
        save_checkpoint(file, {}, facts)
        with pytest.raises(ValueError, match="of no head"):
            load_eagle(file, target)


def test_a_text_too_short_for_a_guess_is_worth_nothing():
    head, target = pair()
    loss, _ = eagle(target).loss(head, torch.tensor([[3]]))
    loss.backward()
    assert loss == 0 and not head.norm.weight.grad.any()
    assert list(unrolled(head, torch.zeros(1, 1, 96), torch.zeros(1, 1, 32))) == []


@torch.no_grad()
def test_marks_of_what_is_not_predicted_are_read():
    head, target = pair()
    ids = torch.randint(29, (2, 12))
    assert agreement_by_step(head, target, context_only(ids)) == agreement_by_step(head, target, ids)
