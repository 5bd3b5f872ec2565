"""Checks and quiz of the chapter on checkpoints."""

import math

import torch

from ...config import ModelConfig, load_config
from ...lab.exercises import exercise
from ...lab.mistakes import same
from ...lab.quiz import Quiz
from ...pretrained.families import config_to_json
from ...pretrained.llama_cpp import half_split_rows


def _numbers(shapes):
    return sum(math.prod(shape) for shape in shapes)


@exercise(
    "bytes of a file",
    wrong=(
        lambda list_bytes, shapes, each: list_bytes + _numbers(shapes) * each,
        lambda list_bytes, shapes, each: 8 + list_bytes + sum(map(sum, shapes)) * each,
        lambda list_bytes, shapes, each: 8 + list_bytes + sum(s[0] * s[-1] for s in shapes) * each,
        lambda list_bytes, shapes, each: 8 + list_bytes + _numbers(s[:2] for s in shapes) * each,
        lambda list_bytes, shapes, each: 8 + list_bytes + _numbers(shapes[:1]) * each,
        lambda list_bytes, shapes, each: 8 + list_bytes + _numbers(shapes[:2]) * each,
        lambda list_bytes, shapes, each: 8 + list_bytes + _numbers(set(shapes)) * each,
        lambda list_bytes, shapes, each: 8 + list_bytes + _numbers(shapes) * 2,
        lambda list_bytes, shapes, each: 8 + list_bytes + sum(math.prod(s) for s in shapes if s) * each,
    ),
)
def file_bytes(answer):
    """8 bytes say how long the list is."""
    got = answer(100, [(3,)], 4)
    assert not same(got, 112), "The first 8 bytes hold the length of the list."
    assert same(got, 120), "8 bytes for the length, 100 for the list, and three numbers of 4 bytes."
    assert same(answer(10, [(2, 3), (5,)], 2), 40), "A tensor of 2 × 3 holds 6 numbers, one of 5 holds 5."
    assert same(answer(200, [(2, 3, 4), (7, 1, 1, 2)], 2), 284), (
        "A tensor may have three dimensions, or four: all are multiplied."
    )
    assert same(answer(20, [(3,), (2,), (3,), (3,)], 4), 72), (
        "Four tensors, three of them of the same shape: each has its own place in the file."
    )
    assert same(answer(10, [], 2), 18), "A file may hold no tensor."
    assert same(answer(50, [(), (4,)], 1), 63), "A tensor without dimensions, of shape (), is one number."


_FIELDS = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")
_WIDE_HEADS = ModelConfig(  # of which neither the factor nor the ratio of widths is whole
    hidden_size=96, intermediate_size=64, num_hidden_layers=9, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=50, head_dim=16, scale_emb=4.5, scale_depth=0.6, dim_model_base=36,
)  # fmt: skip


def _fields(config, **changed):
    return {name: config_to_json(config, "granite")[name] for name in _FIELDS} | changed


@exercise(
    "fields of a Granite",
    wrong=(
        lambda config: _fields(config, attention_multiplier=1.0),  # the default
        lambda config: _fields(config, residual_multiplier=config.scale_depth),
        lambda config: _fields(
            config, residual_multiplier=config.scale_depth / math.sqrt(2 * config.num_hidden_layers)
        ),
        lambda config: _fields(config, logits_scaling=config.dim_model_base / config.hidden_size),
        lambda config: _fields(config, logits_scaling=config.hidden_size // config.dim_model_base),
        lambda config: _fields(config, embedding_multiplier=int(config.scale_emb)),
        lambda config: _fields(
            config,
            attention_multiplier=math.sqrt(config.num_attention_heads / config.hidden_size),
        ),
        lambda config: _fields(load_config("minicpm-2.4b")),
        lambda config: dict(zip(_FIELDS, (12, 0.2213594362, 9, 0.125), strict=True)),
    ),
)
def granite_fields(answer):
    """vLLM and transformers can now run it."""
    for config in (load_config("minicpm-2.4b"), _WIDE_HEADS):
        got, right = answer(config), _fields(config)
        layers, width, base = config.num_hidden_layers, config.hidden_size, config.dim_model_base
        for name in _FIELDS:
            assert name in got, f"The field `{name}` is missing."
        assert same(got["embedding_multiplier"], right["embedding_multiplier"]), (
            "The embedding is multiplied by scale_emb, in both families."
        )
        assert not same(got["residual_multiplier"], config.scale_depth), (
            "Granite's residual_multiplier is the whole factor, with the root of the number of blocks."
        )
        assert same(got["residual_multiplier"], right["residual_multiplier"]), (
            f"scale_depth is {config.scale_depth:g}, and L, the number of blocks, is {layers}."
        )
        assert same(got["logits_scaling"], right["logits_scaling"]), (
            f"Granite divides the logits by logits_scaling. The width is {width}, and dim_model_base {base}."
        )
        assert same(got["attention_multiplier"], right["attention_multiplier"]), (
            f"Heads are {config.head_dim} wide, as the config says; Granite multiplies the scores by "
            "attention_multiplier, where others divide by a root."
        )


def _with_loops(weight, heads):
    head_dim = len(weight) // heads
    out = torch.empty_like(weight)
    for row in range(len(weight)):
        head, place = divmod(row, head_dim)
        out[head * head_dim + place // 2 + place % 2 * head_dim // 2] = weight[row]
    return out


@exercise(
    "rows put back",
    wrong=(
        _with_loops,
        lambda w, heads: torch.stack([w[int(i)] for i in half_split_rows(torch.arange(len(w)), heads)]),
        lambda w, heads: w.view(heads, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape),
        lambda w, heads: torch.cat([w[0::2], w[1::2]]),
        lambda w, heads: half_split_rows(w, 2 if len(w) == 8 else 3),
        lambda w, heads: half_split_rows(w, heads).flip(1),
    ),
    without=("a loop",),
)
def put_back(answer):
    """Pairs stand half a head apart again."""
    column = torch.arange(8.0)[:, None]
    got = answer(column.clone(), 1)
    assert got.shape == (8, 1), f"The matrix keeps its shape (8, 1); yours is {tuple(got.shape)}."
    assert not same(got.flatten(), [0, 4, 1, 5, 2, 6, 3, 7]), (
        "That is the way into the file. The way back is the other one."
    )
    assert same(got.flatten(), [0, 2, 4, 6, 1, 3, 5, 7]), (
        "One head of 8 rows: the first rows of all pairs come first, in order, then the second ones."
    )
    two = answer(column.clone(), 2)
    assert two.shape == (8, 1) and same(two.flatten(), [0, 2, 1, 3, 4, 6, 5, 7]), (
        "With two heads of four rows, rows never leave their head."
    )
    for heads, head_dim, columns in ((3, 8, 5), (4, 6, 6), (1, 10, 24), (5, 2, 3)):
        weight = torch.arange(float(heads * head_dim * columns)).view(-1, columns)
        assert same(answer(weight.clone(), heads), half_split_rows(weight, heads)), (
            f"{heads} heads of {head_dim} rows and {columns} columns: not what naive_put_back gives. Whole "
            "rows move; columns stay."
        )


def _filled(sizes, limit, begin_with_one=False, most=math.inf, at_limit=True):
    shards = [[]] if begin_with_one else []
    for size in sizes:
        total = sum(shards[-1], size) if shards else 0
        if not shards or len(shards[-1]) >= most or total > limit or (total == limit and not at_limit):
            shards.append([])
        shards[-1].append(size)
    return shards


def _sorted_first(sizes, limit):
    return _filled(sorted(sizes, reverse=True), limit)


@exercise(
    "filled shards",
    wrong=(
        lambda sizes, limit: _filled(sizes, limit, begin_with_one=True),  # empty before a large tensor
        lambda sizes, limit: _filled(sizes, limit, most=2),
        lambda sizes, limit: _filled(sizes, limit, at_limit=False),
        lambda sizes, limit: [list(sizes)],
        lambda sizes, limit: [[size] for size in sizes],
        lambda sizes, limit: _filled([size for size in sizes if size <= limit], limit),
        _sorted_first,
    ),
)
def fill_shards(answer):
    """Nothing is lost, nothing is split, and no file is empty."""
    got = answer([3, 3, 3], 6)
    assert same([size for shard in got for size in shard], [3, 3, 3]), (
        "Every size must appear once, in order."
    )
    assert same(got, [[3, 3], [3]]), "3 + 3 fill a shard of 6 exactly, and the third begins a new one."
    assert same(answer([1, 2, 2, 1, 4, 1, 1], 6), [[1, 2, 2, 1], [4, 1, 1]]), (
        "Of 1, 2, 2, 1, 4, 1, 1 the first four fill a shard of 6, and the other three the next: a shard "
        "takes as much as it can."
    )
    got = answer([9, 1], 5)
    assert [] not in list(got), "A shard was left empty before a large tensor."
    assert same(got, [[9], [1]]), "9 is above the limit of 5 and cannot be split: it stands alone."
    assert same(answer([1, 9, 1], 5), [[1], [9], [1]]), "After a tensor above the limit a new shard begins."
    assert same(answer([2, 5, 1], 6), [[2], [5, 1]]), (
        "2, 5, 1 with a limit of 6: the tensors stay in order, so 1 does not go back to the first shard."
    )
    assert same(answer([2, 2], 3), [[2], [2]]), "2 + 2 is above the limit, which is 3 there."
    assert same(answer([], 5), []), "No tensors, no shards."


def _compared(expected, stored, shape=tuple, order=sorted, harmless="rotary_emb.inv_freq"):
    return (
        order(expected.keys() - stored.keys()),
        order(name for name in stored.keys() - expected.keys() if not name.endswith(harmless)),
        order(
            name for name in expected.keys() & stored.keys() if shape(expected[name]) != shape(stored[name])
        ),
    )


def _unsorted(names):
    return sorted(names, reverse=True)


@exercise(
    "every difference",
    wrong=(
        lambda expected, stored: _compared(expected, stored, order=_unsorted),
        lambda expected, stored: _compared(expected, stored, shape=lambda s: s[0]),
        lambda expected, stored: _compared(expected, stored, shape=math.prod),
        lambda expected, stored: _compared(expected, stored, shape=len),
        lambda expected, stored: _compared(expected, stored, shape=sorted),
        lambda expected, stored: _compared(expected, stored, harmless=" "),
        lambda expected, stored: _compared(expected, stored, harmless=("rotary_emb.inv_freq", "bias")),
        lambda expected, stored: _compared(expected, stored, harmless="inv_freq"),
        lambda expected, stored: _compared(expected, stored, harmless=".inv_freq"),
        lambda expected, stored: _compared(expected, stored, harmless="emb.inv_freq"),
        lambda expected, stored: _compared(expected, stored, harmless=".rotary_emb.inv_freq"),
        lambda expected, stored: _compared(
            expected, {name: shape for name, shape in stored.items() if "rotary_emb.inv_freq" not in name}
        ),
        lambda expected, stored: (_compared(expected, stored)[0], [], []),  # strict=False
        lambda expected, stored: _compared(stored, expected),
    ),
)
def differences(answer):
    """With three empty lists, and only then, a file may be loaded."""

    def ask(expected, stored):
        got = answer(dict(expected), dict(stored))
        assert isinstance(got, tuple | list) and len(got) == 3, "Return three lists."
        return [list(names) for names in got]

    model = {"a": (2, 3), "b": (4,), "c": (5, 5)}
    assert ask(model, model) == [[], [], []], "A file that fits has no differences: three empty lists."
    assert ask(model, {"a": (2, 3), "c": (5, 5)}) == [["b"], [], []], "`b` is missing in the file."
    assert ask(model, model | {"d.bias": (1,)}) == [[], ["d.bias"], []], (
        "A tensor that the model does not know must be named: a bias that is skipped changes every answer."
    )
    ending = "rotary_emb.inv_freq"
    for name in (ending, "layers.0." + ending):
        assert ask(model, model | {name: (8,)}) == [[], [], []], f"`{name}`: stored frequencies are harmless."
    for name in (ending + ".scale", "vision.inv_freq", *(ending[cut:] for cut in range(1, len(ending)))):
        assert ask(model, model | {name: (8,)})[1] == [name], (
            f"Only names that *end* in the whole of `{ending}` are harmless, and `{name}` does not."
        )
    for shape, why in (
        ((3, 2), "(3, 2) is not (2, 3), though both hold six numbers."),
        ((2, 4), "(2, 4) is not (2, 3): the second dimension differs."),
        ((2, 3, 1), "(2, 3, 1) is not (2, 3): one has a dimension more."),
    ):
        assert ask(model, model | {"a": shape}) == [[], [], ["a"]], why
    names = [f"layers.{number}" for number in (3, 1, 2, 0, 5, 4)]
    one, two = dict.fromkeys(names, (1,)), dict.fromkeys(names, (2,))
    assert ask(one, {}) == [sorted(names), [], []] == ask({}, one)[1::-1] + [[]], "Sort the names."
    assert ask(one, two) == [[], [], sorted(names)], "Sort the names of the third list, too."


def _factor(embedding, output):
    return ((embedding * output).sum() / output.square().sum()).item()


def _same_table(embedding, output):
    return torch.allclose(embedding, _factor(embedding, output) * output, rtol=1e-4, atol=1e-6)


@exercise(
    "factor between two tables",
    wrong=(
        lambda embedding, output: (embedding[0, 0] / output[0, 0]).item(),
        lambda embedding, output: (embedding.norm() / output.norm()).item(),
        lambda embedding, output: (
            torch.allclose(embedding, _factor(embedding, output) * output, atol=0.01)
            * _factor(embedding, output)
        ),
        lambda embedding, output: _same_table(embedding, output) / _factor(embedding, output),
        lambda embedding, output: _same_table(embedding, output) * abs(_factor(embedding, output)),
        lambda embedding, output: _same_table(embedding, output) * 108.0,
        lambda embedding, output: _same_table(embedding[0], output[0]) * _factor(embedding[0], output[0]),
        lambda embedding, output: (
            _same_table(embedding[:, 0], output[:, 0]) * _factor(embedding[:, 0], output[:, 0])
        ),
        lambda embedding, output: next(
            (f for f in (108.0, 24.0) if torch.allclose(embedding, f * output, rtol=1e-4)), 0.0
        ),
    ),
)
def factor_between(answer):
    """scale_emb times hidden_size / dim_model_base: only the product."""
    generator = torch.Generator().manual_seed(0)
    table, other = torch.randn(2, 20, 6, generator=generator)
    for first, second in ((12, 9), (12, 2), (0.7, 5), (-3, 4)):
        got = answer(first * table, table / second)
        assert not same(got, 0), f"{first} E and E / {second} are one table times a number."
        assert same(got / first / second, 1, tolerance=1e-3), (
            f"The embedding is {first} E and the output layer E / {second}. What number times the second "
            "gives the first?"
        )
    for size in (1, 0.0001):
        assert same(answer(12 * size * table, size * other), 0), (
            "Two tables with nothing in common have no factor between them, however small their entries are. "
            "One quotient is not enough; check all entries, each by its own size."
        )
    for row, column in ((3, 2), (0, 5), (19, 0)):
        off = table / 9
        off[row, column] += 1
        assert same(answer(12 * table, off), 0), "One entry differs, so it is not the same table."


quiz = Quiz(
    [
        (
            "You open a safetensors file from a stranger. What can it do?",
            ["Run code", "Hold wrong numbers", "Nothing at all"],
            1,
            "It holds numbers only. Wrong numbers are still possible, and a model that has them may say "
            "anything.",
        ),
        (
            "A file has 290 tensors, your model 291 parameters, and strict=False loads it. The 291st",
            ["is zero", "is random", "is taken from another layer"],
            1,
            "It stays as it was initialised.",
        ),
        (
            "Which mistake is the most dangerous?",
            ["The model writes nonsense", "The program stops", "The loss is 5 % higher"],
            2,
            "The others are found within a minute.",
        ),
        (
            "config.json of a MiniCPM lacks tie_word_embeddings. The tables are",
            ["tied", "untied", "as in Llama"],
            0,
            "The default belongs to the family: tied in MiniCPM, untied in Llama.",
        ),
        (
            "You write a MiniCPM as Granite. Which weights change?",
            ["The tables", "None", "o_proj and down_proj"],
            1,
            "Only config.json changes: names and numbers. Folding to a Llama changes weights.",
        ),
    ]
)
