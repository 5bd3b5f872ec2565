"""Checks and quiz of the chapter on generation."""

import torch

from ... import load_config
from ...config import ModelConfig
from ...lab.exercises import exercise
from ...lab.mistakes import same
from ...lab.quiz import Quiz
from ...language.context import KVCache
from ...language.decoder import Decoder
from ...language.generation import generate, pad_left


def _numbers(config):
    """What one block keeps of one token."""
    latent = config.latent_attention
    if latent is not None:
        return latent.kv_lora_rank + latent.qk_rope_head_dim
    return 2 * config.num_key_value_heads * config.head_dim


def _cache_bytes(config, tokens, batch, bytes_per_number, numbers=_numbers):
    return batch * tokens * config.num_hidden_layers * numbers(config) * bytes_per_number


def _without_latents(config):
    return 2 * config.num_key_value_heads * config.head_dim


def _latents_alone(config):
    return config.latent_attention.kv_lora_rank if config.latent_attention else _numbers(config)


def _latents_twice(config):
    return _numbers(config) * (2 if config.latent_attention else 1)


def _keys_alone(config):
    return _numbers(config) // (1 if config.latent_attention else 2)


def _all_heads(config):
    return _numbers(config) if config.latent_attention else 2 * config.num_attention_heads * config.head_dim


def _one_latent_token(config, tokens, batch, bytes_per_number):
    if config.latent_attention:
        return _cache_bytes(config, 1, 1, 2)
    return _cache_bytes(config, tokens, batch, bytes_per_number)


@exercise(
    "cache bytes",
    wrong=(
        lambda config, n, batch, size: _cache_bytes(config, n, batch, size, _without_latents),
        lambda config, n, batch, size: _cache_bytes(config, n, batch, size, _latents_alone),
        lambda config, n, batch, size: _cache_bytes(config, n, batch, size, _latents_twice),
        lambda config, n, batch, size: _cache_bytes(config, n, batch, size, _keys_alone),
        lambda config, n, batch, size: _cache_bytes(config, n, batch, size, _all_heads),
        lambda config, n, batch, size: _cache_bytes(config, n, 1, size),
        _one_latent_token,
    ),
)
def cache_bytes(answer):
    """Batch and length count alike: a server's memory is full of caches."""
    shape = load_config("minicpm4-8b")
    got = answer(shape, 1, 1, 2)
    assert not same(got, 16_384), "Keys *and* values are kept: twice as much."
    assert not same(got, 524_288), "Only the key-value heads are kept, 2 in this model, not all 32."
    assert same(got, 32_768), (
        "MiniCPM4-8B has 32 blocks. Each keeps a key and a value of 128 numbers for each of 2 heads, and a "
        "number has 2 bytes here."
    )
    assert same(answer(shape, 10, 3, 4), 32_768 * 60), (
        "10 tokens, 3 texts and 4 bytes a number: 10 × 3 × 2 times as much."
    )
    latent = load_config("minicpm3-4b")
    got = answer(latent, 1, 1, 2)
    assert not same(got, _cache_bytes(latent, 1, 1, 2, _latents_twice)), (
        "A latent stands for key and value together, so it is kept once."
    )
    assert same(got, 62 * (256 + 32) * 2), (
        "MiniCPM3 has 62 blocks. Each keeps of a token one latent (256 numbers) and one rotated key (32) for "
        "all heads."
    )
    assert same(answer(latent, 7, 2, 4), 28 * 62 * (256 + 32) * 2), (
        "Latents, too, are kept of every token of every text, in as many bytes as were asked for."
    )
    other = load_config("minicpm-2.4b")
    assert same(answer(other, 4096, 1, 1), 4096 * 40 * 2 * 36 * 64), (
        "The 2.4B keeps 36 heads of width 64 in 40 blocks. Do your sizes come from the config?"
    )


@exercise(
    "nucleus by hand",
    wrong=(
        [0, 1, 0, 0],  # the token that crosses the line is dropped
        [0, 0.5, 0, 0.25],  # not divided
        [0, 5 / 9, 1.5 / 9, 2.5 / 9],  # one too many
        [2 / 3, 1 / 3, 0, 0],  # sorted
        [0.1, 0.5, 0.15, 0.25],  # nothing dropped
        [0, 0.5 / 0.7, 0, 0.25 / 0.7],  # divided by the line
    ),
)
def nucleus_by_hand(answer):
    """0.5 is not enough, 0.75 is: two tokens, divided by 0.75."""
    numbers = [float(number) for number in answer]
    assert len(numbers) == 4, f"Expected four numbers, one for each token; yours are {len(numbers)}."
    assert same(sum(numbers), 1, tolerance=1e-3), (
        f"Probabilities add up to 1; yours to {sum(numbers):.3f}. Divide by what is left."
    )
    assert not same(max(numbers), 1, tolerance=1e-3), (
        "0.5 alone is less than 0.7. The token that crosses the line stays."
    )
    assert numbers[0] == 0 and numbers[2] == 0, (
        "Ask of each token what stands before it, best first. Where that is already 0.7 or more, the token "
        "is dropped. And keep the order of the question: the second token is the best."
    )
    assert same(numbers[1] / numbers[3], 2, tolerance=1e-2), (
        "Those that stay keep their proportions: 0.5 is twice 0.25."
    )


_TINY = ModelConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=61,
    init_std=0.4,
    tie_word_embeddings=False,  # an untrained model with one table repeats what it just read
)


def _tiny(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(_TINY).eval()


@torch.no_grad()
def _batch(model, prompts, new_tokens, left=True, announced=True):
    ids, padding = pad_left(prompts)
    if not left:
        longest = ids.shape[1]
        ids = torch.tensor([list(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
    cache = KVCache(ids.shape[1] + new_tokens, padding if announced else None)
    newest, written = ids, []
    for _ in range(new_tokens):
        newest = model(newest, cache)[:, -1:].argmax(-1)
        written.append(newest)
    return torch.cat(written, dim=1)


@exercise(
    "batch greedy",
    wrong=(
        lambda model, prompts, new_tokens: _batch(model, prompts, new_tokens, left=False, announced=False),
        lambda model, prompts, new_tokens: _batch(model, prompts, new_tokens, announced=False),
        lambda model, prompts, new_tokens: _batch(model, prompts, new_tokens, left=False),
        lambda model, prompts, new_tokens: torch.cat(
            [pad_left(prompts)[0], _batch(model, prompts, new_tokens)], dim=1
        ),
    ),
    without=("generate", "stream"),
)
def batch_greedy(answer):
    """Each row is what the prompt would get alone."""
    prompts = [[5, 17, 3, 40, 22], [9], [30, 8, 51]]
    for seed, texts, new_tokens in ((0, prompts, 6), (1, prompts[::-1], 9), (1, [[7, 7], [12, 50]], 4)):
        model = _tiny(seed)
        with torch.no_grad():
            got = answer(model, [list(text) for text in texts], new_tokens)
        assert len(got) == len(texts) and all(len(row) == new_tokens for row in got), (
            f"Expected the new tokens alone: {len(texts)} rows of {new_tokens}."
        )
        for row, text in zip(got, texts, strict=True):
            alone = generate(model, torch.tensor([text]), new_tokens, stop_ids=())[0, len(text) :]
            assert same(torch.as_tensor(row), alone), (
                f"A prompt of {len(text)} tokens gets another text in a batch than alone. Where must its "
                "last token stand, and who must know which tokens are no text?"
            )


def _safe_length(text, stops, longest=None):
    met = [text.find(stop) for stop in stops if stop in text]
    if met:
        return min(met)
    for place in range(0 if longest is None else max(0, len(text) - longest), len(text)):
        if any(stop.startswith(text[place:]) for stop in stops):
            return place
    return len(text)


def _first_in_the_list(text, stops):
    return next((text.find(stop) for stop in stops if stop in text), _safe_length(text, stops))


def _last_met(text, stops):
    met = [text.rfind(stop) for stop in stops if stop in text]
    return min(met) if met else _safe_length(text, stops)


def _latest_beginning(text, stops):
    met = [text.find(stop) for stop in stops if stop in text]
    held = [place for place in range(len(text)) if any(stop.startswith(text[place:]) for stop in stops)] or [
        len(text)
    ]
    return min(met) if met else held[-1]


def _first_met_or_begun(text, stops):
    for place in range(len(text)):
        if any(text.startswith(stop, place) or stop.startswith(text[place:]) for stop in stops):
            return place
    return len(text)


def _ends_anywhere(text, stops):
    met = [text.find(stop) for stop in stops if stop in text]
    held = [place for place in range(len(text)) if any(text[place:] in stop for stop in stops)]
    return min(met or held or [len(text)])


def _last_in_the_list(text, stops):
    return next((text.find(stop) for stop in stops[::-1] if stop in text), _safe_length(text, stops))


@exercise(
    "safe length",
    wrong=(
        lambda text, stops: len(text) - max(map(len, stops), default=1) + 1,
        lambda text, stops: min([text.find(stop) for stop in stops if stop in text] or [len(text)]),
        lambda text, stops: _safe_length(text, stops, longest=3),
        lambda text, stops: _safe_length(text, stops[:1]),
        lambda text, stops: _safe_length(text, stops[:2]),
        lambda text, stops: _safe_length(text, stops[-1:]),
        _first_in_the_list,
        _last_in_the_list,
        _first_met_or_begun,
        _ends_anywhere,
        _last_met,
        _latest_beginning,
    ),
)
def safe_length(answer):
    """The rule of `TextWriter`."""
    for text, stops, length, why in (
        ("hello", ["END"], 5, "Nothing here can become the stop string: show all."),
        (
            "helloE",
            ["END"],
            5,
            "The last sign may be the beginning of the stop string; only it is held back.",
        ),
        ("helloEN", ["END"], 5, "The last two signs may become the stop string."),
        ("helloENx", ["END"], 8, "What follows can no longer make a stop string of this: show everything."),
        ("aENDb", ["END"], 1, "The stop string stands in the text. Show what is before it."),
        ("aENDbEND", ["END"], 1, "The stop string stands there twice; the first one ends the text."),
        (
            "aEN",
            ["END", "Nothing"],
            1,
            "Two stop strings may have begun. Hold back from the earlier beginning.",
        ),
        ("aEN", ["Nothing", "END"], 1, "The order of the stop strings decides nothing."),
        ("xaa", ["aab"], 1, "Both last signs may belong to the stop string."),
        ("xaaa", ["aab"], 2, "Of three a's only the last two can begin aab."),
        ("aSTOPbEND", ["END", "STOP"], 1, "The first stop string in the *text* counts, not in the list."),
        ("aENDbSTOP", ["END", "STOP"], 1, "The first stop string in the *text* counts, not the last."),
        (
            "aSTO",
            ["STOPS", "TO"],
            2,
            "STOPS has begun, but TO stands there whole and ends the text, so its place counts.",
        ),
        ("aEN", ["xyz", "pqr", "END"], 1, "There may be any number of stop strings; the third has begun."),
        ("aENDb", ["xyz", "pqr", "END"], 1, "There may be any number of stop strings; the third is there."),
        ("heN", ["END"], 3, "N stands in END, but no stop string *begins* with it: hold nothing back."),
        ("It is.\n\nQuestio", ["\n\nQuestion:"], 6, "A long stop string may have begun long ago."),
        ("EN", ["END"], 0, "The whole text may be the beginning of a stop string."),
        ("", ["END"], 0, "Of an empty text nothing can be shown."),
        ("hello", [], 5, "Without a stop string nothing is held back."),
    ):
        assert same(answer(text, list(stops)), length), f"Of {text!r} with the stop strings {stops}: {why}"


def _above(probabilities, limit):
    left = probabilities.masked_fill(probabilities < limit, 0)
    return left / left.sum(-1, keepdim=True)


def _more_than(probabilities, min_p):
    best = probabilities.amax(-1, keepdim=True)
    left = probabilities.masked_fill((probabilities <= min_p * best) & (probabilities < best), 0)
    return left / left.sum(-1, keepdim=True)


@exercise(
    "min-p",
    wrong=(
        _more_than,
        lambda probabilities, min_p: _above(probabilities, min_p),
        lambda probabilities, min_p: _above(probabilities, min_p * probabilities.max()),
        lambda probabilities, min_p: _above(probabilities, min_p * probabilities[:, :1]),
        lambda probabilities, min_p: probabilities.masked_fill(
            probabilities < min_p * probabilities.amax(-1, keepdim=True), 0
        ),
        lambda probabilities, min_p: (
            probabilities * (probabilities >= min_p * probabilities.amax(-1, keepdim=True))
        ).softmax(-1),
    ),
)
def min_p_filter(answer):
    """The filter is right. Now the experiment."""
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.26, 0.25, 0.25, 0.24]])
    got = answer(p.clone(), 0.5)
    assert got.shape == p.shape, f"Expected shape {tuple(p.shape)}, not {tuple(got.shape)}."
    assert (got[1] > 0).all(), (
        "In the second row all tokens are near the best one, so all stay. To what is your limit relative?"
    )
    got = answer(p.clone(), 0.2)
    assert got[0, 3] == 0, "0.05 is less than 0.2 × 0.5: dropped."
    assert got[0, 2] > 0, "0.15 is at least 0.2 × 0.5 = 0.1: it stays."
    assert same(got.sum(-1), [1, 1]), "Each row adds up to 1."
    assert same(got[0, :3], p[0, :3] / 0.95), (
        "Those that stay keep their proportions: divide by what is left."
    )
    tie = torch.tensor([[0.125, 0.5, 0.25, 0.125]], dtype=torch.float64)
    assert same(answer(tie.clone(), 0.5), [[0, 2 / 3, 1 / 3, 0]]), (
        "*At least* half of the best: who has exactly half of it stays. And the best need not stand first."
    )
    assert same(answer(tie.clone(), 0.0), tie), "With `min_p = 0` every token stays."
    assert same(answer(tie.clone(), 1.0), [[0, 1, 0, 0]]), "With `min_p = 1` only the best token stays."


quiz = Quiz(
    [
        (
            "A model writes its 500th token, with a cache. How many tokens go through its "
            "blocks in this step?",
            ["1", "500", "all of the vocabulary"],
            0,
            "The cache holds keys and values of the others.",
        ),
        (
            "The processor becomes twice as fast, the memory stays. One text is decoded by a model of 8B "
            "parameters",
            ["twice as fast", "about as fast as before", "half as fast"],
            1,
            "The weights still have to come from memory for each token.",
        ),
        (
            "The best token has probability 0.9. What does top-p with p = 0.5 keep?",
            ["Nothing", "This token alone", "Half of the vocabulary"],
            1,
            "The best token is never dropped, and it is already enough.",
        ),
        (
            "Why are prompts padded on the left for generation?",
            [
                "Because models read from the left",
                "So that all next tokens stand in one column",
                "It saves memory",
            ],
            1,
            "A batch advances together: the last position is every row's newest.",
        ),
        (
            "A chat model gets another model's template. You see",
            ["an error", "a warning", "worse answers"],
            2,
            "For the model every text is a text to go on with.",
        ),
    ]
)
