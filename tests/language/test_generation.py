"""Generation: cached equals uncached, batched equals alone, greedy equal to transformers, nothing read twice."""

import copy
from dataclasses import replace

import pytest
import torch
from small_models import WRITER, WRITERS, Counted, make_ids, make_model, with_dropout

from minicpm_lite.config import RopeScaling
from minicpm_lite.language.context import Int8Cache, KVCache, Tree
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.generation import generate, pad_left, resolve_stop_ids, stream
from minicpm_lite.language.sampling import Sampling


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def without_a_cache(model: Decoder, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("name", WRITERS)
@torch.no_grad()
def test_greedy_equals_the_whole_text_computed_anew(name):
    model, ids = make_model(WRITERS[name]), make_ids(WRITER, 2, 7)
    assert torch.equal(generate(model, ids, 12), without_a_cache(model, ids, 12))


@pytest.mark.parametrize("name", WRITERS)
@torch.no_grad()
def test_rows_of_a_padded_batch_are_the_rows_alone(name):
    model = make_model(WRITERS[name])
    prompts = [make_ids(WRITER, 1, n)[0].tolist() for n in (9, 1, 5)]
    ids, padding = pad_left(prompts, pad_id=17)
    together = generate(model, ids, 15, padding=padding)
    for prompt, row, pad in zip(prompts, together, padding.tolist(), strict=True):
        assert torch.equal(row[pad:], generate(model, torch.tensor([prompt]), 15)[0])


def test_padding_that_is_seen_is_told_apart(monkeypatch):
    """The two bugs of batched generation: padding that is attended to, positions that count it."""
    model = make_model(WRITER)
    prompts = [make_ids(WRITER, 1, n)[0].tolist() for n in (9, 2)]
    ids, padding = pad_left(prompts, pad_id=17)
    alone = generate(model, torch.tensor([prompts[1]]), 15)[0]
    assert not torch.equal(generate(model, ids, 15)[1, 7:], alone)  # no padding given
    on_the_right = torch.tensor([prompts[0], prompts[1] + [17] * 7])
    assert not torch.equal(generate(model, on_the_right, 15)[1, 9:], alone[2:])


# Parity with transformers


@pytest.fixture(scope="module")
def twin():
    """The same weights in transformers' Granite."""
    from transformers import GraniteConfig, GraniteForCausalLM

    model = make_model(WRITER)
    config = model.config
    reference = GraniteForCausalLM(
        GraniteConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=300, max_position_embeddings=96, rms_norm_eps=config.rms_norm_eps, tie_word_embeddings=False,
            embedding_multiplier=4, residual_multiplier=config.residual_scale, attention_multiplier=8**-0.5,
            logits_scaling=config.width_ratio, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip
    weights = {
        name if name == "lm_head.weight" else f"model.{name}": w for name, w in model.state_dict().items()
    }
    reference.load_state_dict(weights)
    return reference.eval()


@torch.no_grad()
def test_greedy_equals_transformers(twin):
    ids = make_ids(WRITER, 3, 8)
    theirs = twin.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    assert torch.equal(generate(make_model(WRITER), ids, 40), theirs)


@torch.no_grad()
def test_greedy_with_penalty_and_stop_equals_transformers(twin):
    model, ids = make_model(WRITER), make_ids(WRITER, 2, 8)
    plain = generate(model, ids, 40, repetition_penalty=1.3)
    stop = int(plain[0, 20])
    theirs = twin.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False,
        repetition_penalty=1.3, eos_token_id=stop, pad_token_id=stop,
    )  # fmt: skip
    assert torch.equal(generate(model, ids, 40, repetition_penalty=1.3, stop_ids=[stop]), theirs)
    assert not torch.equal(plain, generate(model, ids, 40))


@torch.no_grad()
def test_left_padded_batch_equals_transformers(twin):
    ids, padding = pad_left([make_ids(WRITER, 1, n)[0].tolist() for n in (9, 3, 6)])
    mask = (torch.arange(9) >= padding[:, None]).long()
    theirs = twin.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert torch.equal(generate(make_model(WRITER), ids, 20, padding=padding), theirs)


# Chance and stopping


def test_a_seed_gives_the_same_text_and_another_seed_another():
    model, ids = make_model(WRITER), make_ids(WRITER, 2, 5)
    first, again, other = (
        generate(model, ids, 20, 1.0, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_row_stops_and_the_others_go_on():
    model, ids = make_model(WRITER), make_ids(WRITER, 3, 6)
    free = generate(model, ids, 12)
    stop = int(free[0, 9])
    stopped = generate(model, ids, 12, stop_ids=[stop])
    for row_free, row in zip(free[:, 6:].tolist(), stopped[:, 6:].tolist(), strict=True):
        end = row_free.index(stop) + 1 if stop in row_free else len(row_free)
        assert row[:end] == row_free[:end][: len(row)] and set(row[end:]) <= {stop}
    assert len(list(stream(model, ids[:1], 12, stop_ids=[stop]))) <= 4  # nothing is computed after the end


def test_the_best_token_is_taken_without_chance():
    model, ids, before = make_model(WRITER), make_ids(WRITER, 2, 4), torch.random.get_rng_state()
    generate(model, ids, 3, repetition_penalty=1.2)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("prompt", "new"), [(15, 2), (12, 5), (16, 1), (14, 2), (17, 3)])
@torch.no_grad()
def test_longrope_counts_the_tokens_that_are_read(prompt, new):
    """The last token is chosen and never read, so up to the border the short factors hold."""
    scaling = RopeScaling("longrope", 16, short_factor=(1.0,) * 4, long_factor=(1.0, 2.0, 4.0, 8.0))
    model, ids = make_model(replace(WRITER, rope_scaling=scaling)), make_ids(WRITER, 1, prompt)
    first = generate(model, ids, new)[0, prompt]
    read = (
        torch.cat([ids, make_ids(WRITER, 1, new - 1)], dim=1) if new > 1 else ids
    )  # same length, same first tokens
    assert first == model(read)[0, prompt - 1].argmax()


def test_generated_ids_can_be_trained_on():
    """They are ordinary tensors, not ones of inference mode, which autograd refuses."""
    model, ids = make_model(WRITER), make_ids(WRITER, 1, 4)
    model(generate(model, ids, 3)).sum().backward()
    assert model.embed_tokens.weight.grad is not None


@pytest.mark.parametrize("kind", [list, tuple, set, iter, lambda ids: (each for each in ids), dict.fromkeys])
def test_stop_ids_may_be_anything_that_yields_them(kind):
    """An iterator is empty after it was read once, and what was meant to stop must stop all the same."""
    model, ids = make_model(WRITER), make_ids(WRITER, 3, 6)
    stop = [int(generate(model, ids, 12)[0, 9])]
    assert torch.equal(generate(model, ids, 12, stop_ids=kind(stop)), generate(model, ids, 12, stop_ids=stop))
    assert len(list(stream(model, ids[:1], 12, stop_ids=kind(stop)))) <= 4


def test_a_model_stops_at_its_own_tokens_unless_told_otherwise():
    model, ids = make_model(WRITER), make_ids(WRITER, 1, 6)
    free = generate(model, ids, 12)
    first, second = free[0, 9].item(), free[0, 15].item()
    for ends in ((first,), (first, second), (second, first)):
        model.config = replace(WRITER, eos_token_id=ends)
        stopped = generate(model, ids, 12)
        assert torch.equal(stopped, generate(model, ids, 12, stop_ids=ends))
        assert torch.equal(stopped, free[:, : stopped.shape[1]]) and stopped.shape[1] <= 10
        assert torch.equal(generate(model, ids, 12, stop_ids=()), free)
        assert torch.equal(generate(model, ids, 12, stop_ids=[299]), free) == (299 not in free[0, 6:])
        assert resolve_stop_ids(model, None) == ends and resolve_stop_ids(model, []) == ()


# A cache that was handed in


@pytest.mark.parametrize("read", [0, 1, 5, 8])
@pytest.mark.parametrize("name", WRITERS)
@torch.no_grad()
def test_what_a_cache_has_read_is_not_read_again(name, read):
    model, ids = make_model(WRITERS[name]), make_ids(WRITER, 2, 9)
    expected, counted, cache = generate(model, ids, 10), Counted(model), KVCache(60)
    if read:
        model(ids[:, :read], cache)
    assert counted.since() == 2 * read
    text = generate(model, ids, 10, context=cache)
    assert torch.equal(text, expected)
    assert counted.since() == 2 * (9 - read + 9)  # the last token is chosen and never read
    assert cache.length == 18
    more = generate(model, text, 7, context=cache)
    assert counted.since() == 2 * (1 + 6)
    assert torch.equal(more, generate(model, ids, 17))


@torch.no_grad()
def test_a_text_in_two_parts_has_the_same_chance_and_the_same_penalty():
    """What was read before counts as text: it is seen by the penalty."""
    model, ids, cache = make_model(WRITER), make_ids(WRITER, 2, 9), KVCache(40)
    settings = dict(temperature=1.0, top_p=0.9, repetition_penalty=1.5)
    expected = generate(model, ids, 12, **settings, generator=seeded())
    model(ids[:, :6], cache)
    assert torch.equal(generate(model, ids, 12, **settings, generator=seeded(), context=cache), expected)


@torch.no_grad()
def test_a_cache_goes_back_and_on_with_another_answer():
    model, ids, cache = make_model(WRITER), make_ids(WRITER, 1, 9), KVCache(60)
    first = generate(model, ids, 10, context=cache)
    other = torch.cat([first[:, :12], make_ids(WRITER, 1, 4)], dim=1)
    counted = Counted(model)
    cache.truncate(12)
    assert torch.equal(generate(model, other, 8, context=cache), generate(model, other, 8))
    assert counted.since() == (4 + 7) + (16 + 7)


@torch.no_grad()
def test_a_cache_with_padding_reads_a_padded_batch_in_two_parts():
    model = make_model(WRITER)
    ids, padding = pad_left([make_ids(WRITER, 1, n)[0].tolist() for n in (9, 3, 6)])
    expected = generate(model, ids, 12, repetition_penalty=1.3, padding=padding)
    cache = KVCache(20, padding)
    model(ids[:, :7], cache)
    assert torch.equal(generate(model, ids, 12, repetition_penalty=1.3, context=cache), expected)


@pytest.mark.parametrize("change", ["first", "last", "another row", "padded"])
@torch.no_grad()
def test_a_cache_goes_on_with_no_other_text_than_it_has_read(change):
    model, ids = make_model(WRITER), make_ids(WRITER, 2, 9)
    padding = torch.tensor([0, 3]) if change == "padded" else None
    cache = KVCache(40, padding)
    model(ids[:, :6], cache)
    other = ids.clone()
    row, place = {"first": (0, 0), "last": (1, 5), "another row": (1, 2), "padded": (1, 3)}[change]
    other[row, place] = (other[row, place] + 1) % 300
    with pytest.raises(
        ValueError, match="has read another text than ids begins with; go back with its truncate"
    ):
        generate(model, other, 4, context=cache)
    other[1, :3] = ids[1, :3] if padding is None else 7  # what is no text may be any token
    cache.truncate(place)
    assert cache.length == place and generate(model, other, 4, context=cache).shape == (2, 13)


@pytest.mark.parametrize("read", [0, 2, 20])
def test_a_text_goes_on_in_no_cache_that_was_used_for_another(read):
    model, ids, cache = make_model(WRITER), make_ids(WRITER, 1, 9), KVCache(40)
    expected = generate(model, ids, 8)[0, 9:].tolist()
    steps = stream(model, ids, 8, context=cache)
    assert [int(next(steps)) for _ in range(3)] == expected[:3]
    cache.truncate(4)
    if read:
        with torch.no_grad():
            model(make_ids(WRITER, 1, read), cache)
    with pytest.raises(RuntimeError, match="gone back or moved its rows since the step before"):
        next(steps)


@pytest.mark.parametrize("rows", [[1, 0], [0, 0], [0, 1, 1]])
def test_no_text_goes_on_in_a_cache_whose_rows_were_moved(rows):
    model, ids, cache = make_model(WRITER), make_ids(WRITER, 2, 9), KVCache(40)
    steps = stream(model, ids, 8, context=cache)
    next(steps)
    cache.select(rows)
    with pytest.raises(RuntimeError, match="gone back or moved its rows since the step before"):
        next(steps)


@torch.no_grad()
def test_what_a_cache_has_read_moves_with_it():
    model, ids = make_model(WRITER), make_ids(WRITER, 2, 6)
    cache = KVCache(40)
    model(ids, cache)
    cache.select([1, 0, 1])
    ids = ids[[1, 0, 1]]
    guesses = make_ids(WRITER, 3, 4)
    model(guesses, Tree(cache, [-1, 0, 0, 2]))
    cache.take([0, 2, 3])
    text = torch.cat([ids, guesses[:, [0, 2, 3]], guesses[:, :1]], dim=1)
    assert cache.has_read(text) and not cache.has_read(torch.cat([ids, guesses], dim=1))
    assert torch.equal(generate(model, text, 5, context=cache), generate(model, text, 5))


@torch.no_grad()
def test_features_in_the_place_of_tokens_are_no_other_text():
    """An image has no ids: whatever stands for it in the text is right."""
    model, ids, cache = make_model(WRITER), make_ids(WRITER, 1, 9), KVCache(40)
    model(ids[:, :3], cache)
    model.states(torch.randn(1, 2, 32), cache)
    model(ids[:, 5:7], cache)
    assert cache.has_read(torch.cat([ids[:, :3], make_ids(WRITER, 1, 2), ids[:, 5:]], dim=1))
    assert not cache.has_read(ids.roll(1, dims=1))
    generate(model, ids, 3, context=cache)
    cache.truncate(2)
    model(ids[:, :4], Tree(cache, [-1, 0, 1, 2]))  # guesses that are not taken
    model.states(torch.randn(1, 4, 32), cache)
    generate(model, torch.cat([ids[:, :2], ids[:, -7:]], dim=1), 3, context=cache)


@torch.no_grad()
def test_a_cache_goes_on_with_no_other_model():
    model, other, ids = make_model(WRITER), make_model(WRITER), make_ids(WRITER, 2, 9)
    for kind in (KVCache, Int8Cache):
        cache = kind(40)
        model(ids[:, :6], cache)
        with pytest.raises(ValueError, match="filled by another model; use one cache for each model"):
            generate(other, ids, 4, context=cache)
        generate(model, ids, 4, context=copy.deepcopy(cache))
        cache.truncate(0)
        generate(other, ids, 4, context=cache)


# Samples


@pytest.mark.parametrize("name", WRITERS)
@torch.no_grad()
def test_samples_of_a_prompt_equal_its_copies_and_read_it_once(name):
    model, ids = make_model(WRITERS[name]), make_ids(WRITER, 1, 9)
    expected = generate(model, ids.expand(6, -1), 12, 1.0, generator=seeded())
    counted = Counted(model)
    assert torch.equal(generate(model, ids, 12, 1.0, generator=seeded(), samples=6), expected)
    assert counted.since() == 9 + 6 * 11
    assert len({tuple(row) for row in expected.tolist()}) == 6  # they are samples, not copies of one answer
    with_context = generate(model, ids, 12, 1.0, generator=seeded(), context=KVCache(40), samples=6)
    assert torch.equal(with_context, expected)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@torch.no_grad()
def test_samples_of_padded_prompts_stand_in_the_order_of_the_prompts(penalty):
    model = make_model(WRITER)
    ids, padding = pad_left([make_ids(WRITER, 1, n)[0].tolist() for n in (9, 3, 6)])
    copies, stop = (each.repeat_interleave(4, dim=0) for each in (ids, padding)), [17, 34]
    many, many_padding = copies
    settings = dict(temperature=0.9, top_k=40, repetition_penalty=penalty, stop_ids=stop)
    expected = generate(model, many, 12, **settings, padding=many_padding, generator=seeded())
    counted = Counted(model)
    together = generate(model, ids, 12, **settings, padding=padding, generator=seeded(), samples=4)
    assert torch.equal(together, expected)
    assert counted.since() == 27 + 12 * (together.shape[1] - 9 - 1)


@torch.no_grad()
def test_ids_in_32_bits():
    model, ids = make_model(WRITER), make_ids(WRITER, 2, 7)
    for penalty in (1.0, 1.3):
        found = generate(model, ids.int(), 9, repetition_penalty=penalty)
        assert torch.equal(found, generate(model, ids, 9, repetition_penalty=penalty))


@torch.no_grad()
def test_one_sample_and_best_tokens():
    model, ids = make_model(WRITER), make_ids(WRITER, 2, 7)
    assert torch.equal(generate(model, ids, 9, samples=1), generate(model, ids, 9))
    assert torch.equal(
        generate(model, ids, 9, samples=3), generate(model, ids, 9).repeat_interleave(3, dim=0)
    )
    assert [len(tokens) for tokens in stream(model, ids, 3, samples=3)] == [6, 6, 6]


# Scores that are no numbers


class Breaks(Decoder):
    """From the given call on, one row's scores are not finite."""

    def __init__(self, call: int, row: int, value: float) -> None:
        super().__init__(WRITER)
        self.calls, self.broken = 0, (call, row, value)

    def forward(self, ids, context=None, last_only=False):
        logits, (call, row, value) = super().forward(ids, context, last_only), self.broken
        if self.calls >= call:
            logits[row, -1, 5] = value
        self.calls += 1
        return logits


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("call", [0, 1, 4])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=5)], ids=["best", "drawn"])
def test_scores_that_are_not_finite_are_refused_at_any_step_and_in_any_row(sampling, call, row, value):
    model, steps = Breaks(call, row, value), []
    with pytest.raises(
        FloatingPointError, match=rf"scores after token {6 + call} are finite numbers.*They are torch.float32"
    ):
        steps += stream(model, make_ids(WRITER, 3, 6), 8, sampling)
    written = stream(Breaks(call, row, value), make_ids(WRITER, 3, 6), 8, sampling)
    for _ in range(call):
        assert len(next(written)) == 3  # what was sound before was given out


def test_weights_that_become_nan_are_refused():
    model, ids = make_model(WRITER), make_ids(WRITER, 1, 6)
    steps = stream(model, ids, 8)
    for _ in range(3):
        next(steps)
    model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(
        FloatingPointError, match="scores after token 9 are finite numbers. Are the weights whole"
    ):
        next(steps)


# Bad input


def read_by(model: Decoder, tokens: int, room: int, padding: torch.Tensor | None = None) -> KVCache:
    cache = KVCache(room, padding)
    with torch.no_grad():
        model(make_ids(WRITER, 2, 9)[:, :tokens], cache)
    return cache


def test_the_last_token_is_not_read():
    """So a text may be one token longer than what the model was made to read."""
    model = make_model(WRITER)
    for prompt in (90, 96):
        assert generate(model, make_ids(WRITER, 1, prompt), 97 - prompt).shape == (1, 97)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: generate(m, make_ids(WRITER, 1, 0), 5), r"expected a tensor of token ids, \(batch, tokens\), with one token at least"),
        (lambda m: generate(m, make_ids(WRITER, 1, 5)[0], 5), r"expected a tensor of token ids, \(batch, tokens\).*For one text: ids\[None\]|i64\[5\]"),
        (lambda m: generate(m, make_ids(WRITER, 1, 90), 10), "90 tokens and max_new_tokens is 10; the model was made to read 96.*Set max_new_tokens to 7"),
        (lambda m: generate(m, make_ids(WRITER, 1, 97), 1), "97 tokens.*made to read 96.*Shorten the prompt"),
        (lambda m: generate(m, make_ids(WRITER, 1, 5) + 300, 5), "the model knows 0 to 299. Was it cut"),
        *((lambda m, kind=kind: generate(m, make_ids(WRITER, 1, 5).to(kind), 5), "expected a tensor of token ids|ids")
          for kind in (torch.int16, torch.uint8, torch.uint16, torch.bool, torch.complex64, torch.float32)),
        (lambda m: list(stream(m, make_ids(WRITER, 1, 5), 5, 0.7)), "sampling"),
        (lambda m: generate(m, make_ids(WRITER, 1, 5), 0), "max_new_tokens is 0"),
        (lambda m: generate(m, make_ids(WRITER, 1, 5), 5, temperature=-0.5), "temperature is -0.5; expected 0"),
        (lambda m: generate(m, make_ids(WRITER, 1, 5), 5, temperature=float("nan")), "temperature is nan"),
        (lambda m: generate(m, make_ids(WRITER, 1, 5), 5, top_k=0), "top_k is 0"),
        (lambda m: generate(m, make_ids(WRITER, 1, 5), 5, top_p=1.5), "top_p is 1.5; expected a probability"),
        (lambda m: generate(m, make_ids(WRITER, 1, 5), 5, top_p=0.0), "top_p is 0.0"),
        (lambda m: generate(m, make_ids(WRITER, 1, 5), 5, repetition_penalty=-1.0), "repetition_penalty is -1.0"),
        (lambda m: generate(m, make_ids(WRITER, 2, 5), 5, padding=torch.tensor([0, 5])), r"padding is tensor\(\[0, 5\]\); expected whole numbers in a tensor.*from 0 to 4, one for each of the 2 rows"),
        (lambda m: generate(m, make_ids(WRITER, 2, 5), 5, padding=torch.tensor([0])), r"one for each of the 2 rows|i64\[1\]"),
        (lambda m: generate(m, make_ids(WRITER, 1, 5), 5, stop_ids=7), "stop_ids is 7|argument stop_ids|stop_ids"),
        (lambda m: generate(m, make_ids(WRITER, 1, 5), 5, stop_ids=["a"]), "stop_ids"),
        (lambda m: generate(m, make_ids(WRITER, 1, 5), 5, stop_ids=[300, 5]), r"stop_ids is \[300, 5\]; expected a list of token ids, which this model has from 0 to 299"),
        (lambda m: generate(m, make_ids(WRITER, 1, 5), 5, stop_ids=[-1]), r"stop_ids is \[-1\]"),
        (lambda m: generate(m, make_ids(WRITER, 1, 5), 5, samples=0), "samples is 0"),
        (lambda m: generate(m, make_ids(WRITER, 2, 9), 5, context=read_by(m, 9, 40)), "The cache has read 9 tokens, and ids holds 9; give the whole text"),
        (lambda m: generate(m, make_ids(WRITER, 2, 4), 5, context=read_by(m, 9, 40)), "The cache has read 9 tokens, and ids holds 4; .* go back with its truncate"),
        (lambda m: generate(m, make_ids(WRITER, 2, 9), 8, context=read_by(m, 5, 15)), "room for 15 tokens; this text and its answer need 16"),
        (lambda m: generate(m, make_ids(WRITER, 2, 9), 5, padding=torch.tensor([0, 2]), context=read_by(m, 5, 40)), "padding is given, and a context"),
        (lambda m: generate(m, make_ids(WRITER, 2, 9), 5, padding=torch.tensor([0, 2]), context=read_by(m, 5, 40, torch.tensor([0, 2]))), "padding is given, and a context"),
        (lambda m: generate(m, make_ids(WRITER, 2, 5), 5, context=KVCache(40, torch.tensor([5, 0]))), r"made with the padding \[5, 0\], and ids holds 5 tokens; each row needs one that is text"),
        (lambda m: pad_left([]), "There is no prompt"),
        (lambda m: pad_left([[1], []]), "Prompt 1 is empty"),
    ],
)  # fmt: skip
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(
        (ValueError, TypeError), match=sentence
    ):  # the type check of the tests sees some first
        call(make_model(WRITER))


@pytest.mark.parametrize(("new", "room"), [(7, 15), (1, 9)])
def test_a_cache_with_just_enough_room_is_enough(new, room):
    model, ids = make_model(WRITER), make_ids(WRITER, 2, 9)
    assert torch.equal(generate(model, ids, new, context=read_by(model, 5, room)), generate(model, ids, new))


def test_a_model_that_is_in_training_writes_as_one_that_is_not():
    """And between two tokens, and behind the last, it is in training."""
    model, ids = with_dropout(WRITER), make_ids(WRITER, 2, 5)
    modes = [model.training for _ in stream(model, ids, 8, stop_ids=())]
    written = generate(model, ids, 8, stop_ids=())
    assert all(modes) and all(part.training for part in model.modules())
    assert torch.equal(written, generate(model.eval(), ids, 8, stop_ids=()))
    assert not model.training


def test_a_token_belongs_to_whoever_gets_it():
    """A caller may change it in place, say to ids of its own; what the model reads stays."""
    model, ids = make_model(WRITER), make_ids(WRITER, 2, 4)
    plain = [token.tolist() for token in stream(model, ids, 8, stop_ids=())]
    changed = []
    for token in stream(model, ids, 8, stop_ids=()):
        changed.append(token.tolist())
        token += 1
    assert changed == plain


def test_a_model_that_is_put_in_training_between_two_tokens_writes_on_as_before():
    model, ids, written = with_dropout(WRITER).eval(), make_ids(WRITER, 2, 5), []
    alone = generate(model, ids, 8, stop_ids=())
    for token in stream(model, ids, 8, stop_ids=()):
        written.append(token)
        model.train()
    assert torch.equal(torch.stack(written, dim=1), alone[:, 5:])


def test_a_part_in_training_within_a_model_that_is_not_draws_nothing():
    """As what `replace_linears` put into a model that was read, until someone calls eval()."""
    model, ids = with_dropout(WRITER), make_ids(WRITER, 2, 5)
    alone = generate(model.eval(), ids, 8, stop_ids=())
    model.layers[0].mlp.down_proj.train()
    assert torch.equal(generate(model, ids, 8, stop_ids=()), alone)
    assert model.layers[0].mlp.down_proj.training and not model.training
