"""Generation: cached equals uncached, batched equals alone, greedy and sampled equal to transformers."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from torch.testing import assert_close

from minicpm_lite.config import LatentAttentionConfig, MixtureConfig, ModelConfig, RopeScaling
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.generation import (
    Sampling,
    TextWriter,
    chatml,
    generate,
    generate_text,
    minicpm_chat,
    next_token_probabilities,
    pad_left,
    stream,
    stream_text,
)
from minicpm_lite.language.tokenizer import train_tokenizer

SHAPE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=300,
    max_position_embeddings=96, scale_emb=4, scale_depth=1.4, dim_model_base=16, init_std=0.3,
)  # fmt: skip
CONFIGS = {
    "multi-head": ModelConfig(**SHAPE),
    "grouped": ModelConfig(**SHAPE, num_key_value_heads=2),
    "latent": ModelConfig(**SHAPE, latent_attention=LatentAttentionConfig(24, 16, 8, 8, 8)),
    "mixture": ModelConfig(**SHAPE, mixture=MixtureConfig(4, 2)),
}
TEXT = (
    "It is a truth universally acknowledged, that a single man — 单身汉 — must be in want of a wife. 🙂\n" * 4
)
TOKENIZER = train_tokenizer(TEXT, 300)


def make_model(name: str = "grouped") -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIGS[name]).eval()


def make_ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(300, (batch, tokens), generator=torch.Generator().manual_seed(1))


def without_a_cache(model: Decoder, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_greedy_equals_the_whole_text_computed_anew(name):
    model, ids = make_model(name), make_ids(2, 7)
    assert torch.equal(generate(model, ids, 12), without_a_cache(model, ids, 12))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_rows_of_a_padded_batch_are_the_rows_alone(name):
    model = make_model(name)
    prompts = [make_ids(1, n)[0].tolist() for n in (9, 1, 5)]
    ids, padding = pad_left(prompts, pad_id=17)
    together = generate(model, ids, 15, padding=padding)
    for prompt, row, pad in zip(prompts, together, padding.tolist(), strict=True):
        assert torch.equal(row[pad:], generate(model, torch.tensor([prompt]), 15)[0])


def test_padding_that_is_seen_is_told_apart(monkeypatch):
    """The two bugs of batched generation: padding that is attended to, positions that count it."""
    model = make_model()
    prompts = [make_ids(1, n)[0].tolist() for n in (9, 2)]
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

    model = make_model()
    config = model.config
    reference = GraniteForCausalLM(
        GraniteConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=300, max_position_embeddings=96, rms_norm_eps=config.rms_norm_eps, tie_word_embeddings=True,
            embedding_multiplier=4, residual_multiplier=config.residual_scale, attention_multiplier=8**-0.5,
            logits_scaling=config.width_ratio, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip
    weights = {f"model.{name}": w for name, w in model.state_dict().items()}
    reference.load_state_dict(weights | {"lm_head.weight": model.embed_tokens.weight})
    return reference.eval()


@torch.no_grad()
def test_greedy_equals_transformers(twin):
    ids = make_ids(3, 8)
    theirs = twin.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    assert torch.equal(generate(make_model(), ids, 40), theirs)


@torch.no_grad()
def test_greedy_with_penalty_and_stop_equals_transformers(twin):
    model, ids = make_model(), make_ids(2, 8)
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
    ids, padding = pad_left([make_ids(1, n)[0].tolist() for n in (9, 3, 6)])
    mask = (torch.arange(9) >= padding[:, None]).long()
    theirs = twin.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert torch.equal(generate(make_model(), ids, 20, padding=padding), theirs)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0), Sampling(0.7), Sampling(1.5, top_k=5), Sampling(1.0, top_k=1), Sampling(1.0, top_k=300),
        Sampling(1.0, top_p=0.5), Sampling(0.3, top_p=0.9), Sampling(2.0, top_p=1.0), Sampling(1.0, top_p=1e-6),
        Sampling(0.8, top_k=20, top_p=0.8), Sampling(1.0, repetition_penalty=1.7),
        Sampling(0.8, top_k=20, top_p=0.8, repetition_penalty=0.9),
    ],
    ids=str,
)  # fmt: skip
def test_probabilities_equal_the_processors_of_transformers(sampling):
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits, seen = 3 * torch.randn(4, 300, generator=torch.Generator().manual_seed(2)), make_ids(4, 12)
    steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p:
        steps.append(TopPLogitsWarper(sampling.top_p))
    expected = steps(seen, logits.clone()).softmax(-1)
    assert_close(next_token_probabilities(logits, sampling, seen), expected, atol=1e-6, rtol=1e-5)


# Wrong samplers that people really write; each must be told apart from the right one.

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, -3.0]])


def rule(sampling: Sampling, seen=None) -> list[float]:
    return next_token_probabilities(LOGITS, sampling, seen)[0].tolist()


def test_top_p_keeps_the_token_that_crosses_the_line():
    plain = LOGITS.softmax(-1)[0]  # 0.600, 0.221, 0.134, 0.030, 0.004
    assert_close(
        torch.tensor(rule(Sampling(1.0, top_p=0.7))),
        torch.tensor([plain[0], plain[1], 0, 0, 0]) / plain[:2].sum(),
    )
    assert rule(Sampling(1.0, top_p=0.1)) == [1, 0, 0, 0, 0]  # the best token is never dropped


def test_the_penalty_lowers_positive_and_negative_scores():
    plain, penalised = (
        rule(Sampling(1.0)),
        rule(Sampling(1.0, repetition_penalty=2.0), torch.tensor([[0, 3]])),
    )
    changed = torch.tensor([[1.0, 1.0, 0.5, -2.0, -3.0]])  # dividing -1 by 2 would have raised it
    assert_close(torch.tensor(penalised), changed.softmax(-1)[0])
    assert penalised[3] < plain[3]


def test_padding_is_not_penalised_but_the_same_token_in_the_text_is():
    sampling, seen, padding = (
        Sampling(1.0, repetition_penalty=2.0),
        torch.tensor([[0, 0, 1], [0, 1, 0]]),
        torch.tensor([2, 1]),
    )
    both = next_token_probabilities(LOGITS.expand(2, -1), sampling, seen, padding)
    assert_close(both[0], torch.tensor([[2.0, 0.5, 0.5, -1, -3]]).softmax(-1)[0])
    assert_close(both[1], torch.tensor([[1.0, 0.5, 0.5, -1, -3]]).softmax(-1)[0])


def test_draws_follow_the_probabilities():
    """A chi-squared test of 4,000 draws at fixed seed: the 99.9 % quantile for 11 degrees of freedom is 31.3."""
    model, sampling = make_model(), Sampling(0.9, top_k=12)
    ids = make_ids(1, 5)
    with torch.no_grad():
        expected = next_token_probabilities(model(ids)[:, -1], sampling)[0] * 4000
    drawn = generate(
        model, ids.expand(4000, -1), 1, 0.9, top_k=12, generator=torch.Generator().manual_seed(0)
    )[:, -1]
    counts, possible = torch.bincount(drawn, minlength=300), expected > 0
    assert int(possible.sum()) == 12 and int(counts[~possible].sum()) == 0
    chi_squared = ((counts - expected) ** 2 / expected)[possible].sum()
    assert chi_squared < 31.3


def test_a_seed_gives_the_same_text_and_another_seed_another():
    model, ids = make_model(), make_ids(2, 5)
    first, again, other = (
        generate(model, ids, 20, 1.0, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_row_stops_and_the_others_go_on():
    model, ids = make_model(), make_ids(3, 6)
    free = generate(model, ids, 12)
    stop = int(free[0, 9])
    stopped = generate(model, ids, 12, stop_ids=[stop])
    for row_free, row in zip(free[:, 6:].tolist(), stopped[:, 6:].tolist(), strict=True):
        end = row_free.index(stop) + 1 if stop in row_free else len(row_free)
        assert row[:end] == row_free[:end][: len(row)] and set(row[end:]) <= {stop}
    assert len(list(stream(model, ids[:1], 12, stop_ids=[stop]))) <= 4  # nothing is computed after the end


def test_the_best_token_is_taken_without_chance():
    before = torch.random.get_rng_state()
    generate(make_model(), make_ids(2, 4), 3, repetition_penalty=1.2)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("prompt", "new"), [(15, 2), (12, 5), (16, 1), (14, 2), (17, 3)])
@torch.no_grad()
def test_longrope_counts_the_tokens_that_are_read(prompt, new):
    """The last token is chosen and never read, so up to the border the short factors hold."""
    scaling = RopeScaling("longrope", 16, short_factor=(1.0,) * 4, long_factor=(1.0, 2.0, 4.0, 8.0))
    torch.manual_seed(0)
    model, ids = Decoder(replace(CONFIGS["grouped"], rope_scaling=scaling)), make_ids(1, prompt)
    first = generate(model, ids, new)[0, prompt]
    read = torch.cat([ids, make_ids(1, new - 1)], dim=1) if new > 1 else ids  # same length, same first tokens
    assert first == model(read)[0, prompt - 1].argmax()


def test_generated_ids_can_be_trained_on():
    """They are ordinary tensors, not ones of inference mode, which autograd refuses."""
    model, ids = make_model(), make_ids(1, 4)
    model(generate(model, ids, 3)).sum().backward()
    assert model.embed_tokens.weight.grad is not None


# Text


class Says(Decoder):
    """In place of a decoder: writes the given tokens, whatever the prompt."""

    def __init__(self, *rows: list[int]) -> None:
        super().__init__(CONFIGS["grouped"])
        self.rows, self.step = rows, 0

    def forward(self, ids, cache=None, last_only=False):
        tokens = torch.tensor([row[self.step] if self.step < len(row) else 0 for row in self.rows])
        self.step += 1
        return torch.nn.functional.one_hot(tokens, 300).float()[:, None]


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=25))
def test_pieces_add_up_to_the_text_and_no_character_is_cut(text):
    writer = TextWriter(TOKENIZER)
    pieces = [writer.push(token) for token in TOKENIZER.encode(text).ids] + [writer.finish()]
    assert "".join(pieces) == writer.text == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(alphabet="ab\n人🙂", max_size=20),
    stop=st.lists(st.text(alphabet="ab\n人🙂", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string_wherever_tokens_are_cut(text, stop):
    writer, shown = TextWriter(TOKENIZER, stop), ""
    for token in TOKENIZER.encode(text).ids:
        shown += writer.push(token)
        if writer.stopped:
            break
    shown += writer.finish()
    places = [(text.find(each) + len(each), text.find(each)) for each in stop if each in text]
    assert shown == writer.text == (text[: min(places)[1]] if places else text)
    assert writer.stopped == bool(places)


def test_half_a_character_at_the_end_is_shown_as_such():
    tokens = TOKENIZER.encode("a🦜").ids  # the parrot is not in the training text: four bytes, four tokens
    writer = TextWriter(TOKENIZER)
    assert [writer.push(token) for token in tokens[:-1]] == ["a"] + [""] * (len(tokens) - 2)
    assert writer.finish() == "\ufffd"


def test_text_is_held_back_only_as_long_as_it_may_become_a_stop_string():
    writer = TextWriter(TOKENIZER, ["END"])
    assert [writer.push(token) for token in TOKENIZER.encode("xEyENz").ids] == ["x", "", "Ey", "", "", "ENz"]


def byte_fallback_tokenizer() -> Tokenizer:
    """A tokenizer of the kind that Llama 2 and MiniCPM have: what it lacks is written as byte tokens."""
    pieces = ["\u2581a", "\u2581b", "c", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(
        st.sampled_from([0, 1, 2, 3 + 0x0A, 3 + 0x61, *(3 + b for b in "🙂人".encode())]), max_size=12
    )
)
def test_byte_tokens_are_put_together_as_the_tokenizer_does(tokens):
    tokenizer = byte_fallback_tokenizer()
    writer = TextWriter(tokenizer)
    assert "".join([writer.push(token) for token in tokens] + [writer.finish()]) == tokenizer.decode(tokens)


def test_streamed_text_is_the_whole_text():
    model = make_model()
    pieces = list(
        stream_text(
            model, TOKENIZER, "It is a truth", 30, Sampling(1.0), generator=torch.Generator().manual_seed(3)
        )
    )
    (whole,) = generate_text(
        model, TOKENIZER, ["It is a truth"], 30, Sampling(1.0), generator=torch.Generator().manual_seed(3)
    )
    assert len(pieces) > 5 and "".join(pieces) == whole
    ids = torch.tensor([TOKENIZER.encode("It is a truth").ids])
    free = generate(model, ids, 30, 1.0, generator=torch.Generator().manual_seed(3))
    assert whole == TOKENIZER.decode(free[0, ids.shape[1] :].tolist())


def test_a_batch_of_texts_stops_row_by_row():
    first, second = (TOKENIZER.encode(text).ids for text in ("man. wife", "a wife, that. man"))
    assert generate_text(Says(first, second), TOKENIZER, ["x", "y z"], 20, stop=["."]) == [
        "man",
        "a wife, that",
    ]


def test_a_special_token_can_be_a_stop_string():
    tokenizer = train_tokenizer(TEXT, 290)
    tokenizer.add_special_tokens(["<|im_end|>"])
    answer = tokenizer.encode("a wife<|im_end|>a wife").ids
    assert tokenizer.token_to_id("<|im_end|>") in answer
    assert generate_text(Says(answer), tokenizer, ["x"], 20, stop=["<|im_end|>"]) == ["a wife"]


def test_a_stop_token_is_not_part_of_the_text():
    tokens = TOKENIZER.encode("a wife").ids
    stop = TOKENIZER.encode("🙂").ids[0]
    answer = [*tokens, stop, *tokens]
    assert generate_text(Says(answer), TOKENIZER, ["x"], 20, stop_ids=[stop]) == ["a wife"]
    assert "".join(stream_text(Says(answer), TOKENIZER, "x", 20, stop_ids=[stop])) == "a wife"


def test_nothing_is_computed_after_all_texts_have_stopped():
    says = Says(TOKENIZER.encode("man. wife wife wife").ids)
    generate_text(says, TOKENIZER, ["x"], 20, stop=["."])
    assert says.step == len(TOKENIZER.encode("man.").ids)


# Chat templates

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello!\nWho are you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": " 你好 "},
]
MINICPM4 = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MINICPM = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{'<用户>' + message['content'].strip()"
    " + '<AI>'}}{% else %}{{message['content'].strip()}}{% endif %}{% endfor %}"
)


def rendered(template: str, messages: list[dict], add_generation_prompt: bool = True) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=add_generation_prompt
    )
    return texts[0]


@pytest.mark.parametrize("messages", [TALK, TALK[1:], TALK[:2], TALK[1:3]])
@pytest.mark.parametrize("add", [True, False])
def test_chatml_equals_its_jinja_template(messages, add):
    assert chatml(messages, add_generation_prompt=add) == rendered(MINICPM4, messages, add)


def test_minicpm_chat_equals_its_jinja_template():
    assert minicpm_chat(TALK[1:]) == rendered(MINICPM, TALK[1:])


def test_chatml_with_a_system_message_of_the_model():
    assert chatml(TALK[1:2], system="Be brief.") == chatml(TALK[:2])
    assert chatml(TALK, system="Another.") == chatml(TALK)


# Bad input


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: generate(m, make_ids(1, 0), 5), "The prompt is empty"),
        (lambda m: generate(m, make_ids(1, 5)[0], 5), r"shape \(5,\); expected \(batch, tokens\)|i64\[5\]"),
        (lambda m: generate(m, make_ids(1, 90), 10), "90 tokens and max_new_tokens is 10, together 100; the model was made for 96.*Set max_new_tokens to 6"),
        (lambda m: generate(m, make_ids(1, 200), 1), "200 tokens.*made for 96.*Shorten the prompt"),
        (lambda m: generate(m, make_ids(1, 5) + 300, 5), "the model knows 0 to 299. Was it cut"),
        (lambda m: generate(m, make_ids(1, 5), 0), "max_new_tokens is 0"),
        (lambda m: generate(m, make_ids(1, 5), 5, temperature=-0.5), "temperature is -0.5; expected 0"),
        (lambda m: generate(m, make_ids(1, 5), 5, temperature=float("nan")), "temperature is nan"),
        (lambda m: generate(m, make_ids(1, 5), 5, top_k=0), "top_k is 0"),
        (lambda m: generate(m, make_ids(1, 5), 5, top_p=1.5), "top_p is 1.5; expected a probability"),
        (lambda m: generate(m, make_ids(1, 5), 5, top_p=0.0), "top_p is 0.0"),
        (lambda m: generate(m, make_ids(1, 5), 5, repetition_penalty=-1.0), "repetition_penalty is -1.0"),
        (lambda m: generate(m, make_ids(2, 5), 5, padding=torch.tensor([0, 5])), r"padding is \[0, 5\]; expected a number from 0 to 4"),
        (lambda m: generate(m, make_ids(2, 5), 5, padding=torch.tensor([0])), r"for each of the 2 rows|i64\[1\]"),
        (lambda m: next_token_probabilities(torch.zeros(1, 3), Sampling(repetition_penalty=1.2)), "penalty is 1.2; give the tokens so far as seen"),
        (lambda m: generate(m, make_ids(1, 5), 5, stop_ids=None), "stop_ids is None|argument stop_ids|stop_ids"),
        (lambda m: generate(m, make_ids(1, 5), 5, stop_ids=["a"]), "stop_ids"),
        (lambda m: pad_left([]), "There is no prompt"),
        (lambda m: pad_left([[1], []]), "Prompt 1 is empty"),
        (lambda m: generate_text(m, TOKENIZER, ["a", ""], 5), "Prompt 1 is empty"),
        (lambda m: generate_text(m, TOKENIZER, "a", 5), "prompts is one string"),
        (lambda m: TextWriter(TOKENIZER, ["a", ""]), "none of them empty"),
        (lambda m: chatml([]), r"expected a list such as"),
        (lambda m: chatml(["hi"]), "Message 0 is 'hi'|messages"),
        (lambda m: chatml([{"role": "user"}]), "Message 0 is .*expected a role"),
        (lambda m: chatml([{"role": "robot", "content": "x"}]), "system, user, assistant"),
        (lambda m: minicpm_chat(TALK), "Message 0 is .*expected a role .user, assistant."),
    ],
)  # fmt: skip
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(
        (ValueError, TypeError), match=sentence
    ):  # the type check of the tests sees some first
        call(make_model())
