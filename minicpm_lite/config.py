"""The shape of a model as a frozen dataclass, and the YAML files that hold the family's.

Each file in ``configs/`` describes one model: a ``model`` block (this dataclass), where they were published
``training`` (the recipe), ``rope_scaling`` and ``sparse_config`` (for long texts), each with its ``source``.
``minicpm-*``, ``minicpm3-*``, ``minicpm4*`` and ``bitcpm4-*`` are released models; ``lite-*`` are the small
models of the book. Field names are those of the released ``config.json`` files, so that a reader finds them
there again.
"""

import math
import re
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from reprlib import repr as shown

import yaml

LARGEST_VOCABULARY = 2**24
ROPE_TYPES = ("linear", "dynamic", "yarn", "llama3", "longrope")
_LARGEST = {  # far beyond any model, and small enough that what is made of them can be counted and built
    "vocab_size": LARGEST_VOCABULARY,
    "num_hidden_layers": 1_000,
    "num_experts": 10_000,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "qk_nope_head_dim": 2**16,
    "qk_rope_head_dim": 2**16,
    "v_head_dim": 2**16,
    "max_position_embeddings": 2**40,
    "original_max_position_embeddings": 2**40,
}
_LARGEST_WIDTH = 2**24
_MOST_EXPERTS = 100_000  # in all layers together
_DEEPEST = 16  # levels of a YAML file; configs have three
_CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Sizes of multi-head latent attention (MLA, MiniCPM3): keys and values come from one small latent."""

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        for field in fields(self):
            _require_size(field.name, getattr(self, field.name))


@dataclass(frozen=True)
class MixtureConfig:
    """A mixture of experts (MiniCPM-MoE): each token visits a few of many feed-forward networks.

    Attributes:
        num_experts: feed-forward networks in each layer.
        num_experts_per_token: how many of them a token visits. With 1 the router learns nothing but balance.
        balance_loss_weight: what the balance loss is multiplied by in training; 0 trains without it.
    """

    num_experts: int
    num_experts_per_token: int
    balance_loss_weight: float = 0.01

    def __post_init__(self) -> None:
        _require_size("num_experts", self.num_experts)
        require_positive_integer("num_experts_per_token", self.num_experts_per_token)
        if self.balance_loss_weight != 0:
            require_positive_number("balance_loss_weight", self.balance_loss_weight)
        if self.num_experts_per_token > self.num_experts:
            raise ValueError(
                f"A token visits {self.num_experts_per_token} of {self.num_experts} experts; "
                "num_experts_per_token must lie between 1 and num_experts."
            )


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are changed for texts longer than the model was trained on.

    Attributes:
        rope_type: "linear" (position interpolation), "dynamic" (NTK-aware, by the length at hand), "yarn",
            "llama3" or "longrope", as released ``config.json`` files spell them.
        factor: how many times longer the context becomes. For "dynamic", how fast theta grows beyond the
            original context; 1 keeps pace with the text. Left out for "longrope": the ratio of the model's
            ``max_position_embeddings`` to the original one.
        original_max_position_embeddings: the context before, in tokens.
        short_factor: "longrope": what each frequency is divided by up to the original context.
        long_factor: "longrope": what each frequency is divided by beyond it.
        attention_factor: what cosine and sine are multiplied by. Left out: as the method's paper says.
        beta_fast: "yarn": pairs that turn more often than this in the original context stay as they are.
        beta_slow: "yarn": pairs that turn less often than this are interpolated.
        low_freq_factor: "llama3": the same border as ``beta_slow``.
        high_freq_factor: "llama3": the same border as ``beta_fast``.

    Raises:
        ValueError: an unknown type, a number that cannot be, factors that are missing or that no one reads.
    """

    rope_type: str
    original_max_position_embeddings: int
    factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_type is {shown(self.rope_type)}; expected one of {', '.join(ROPE_TYPES)}."
            )
        _require_size("original_max_position_embeddings", self.original_max_position_embeddings)
        for name in ("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
            require_positive_number(name, getattr(self, name))
        if self.attention_factor is not None:
            require_positive_number("attention_factor", self.attention_factor)
            if self.rope_type not in ("yarn", "longrope"):
                raise ValueError(
                    f'Only rope_type "yarn" and "longrope" read attention_factor; this is "{self.rope_type}".'
                )
        for slow, fast in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
            if getattr(self, slow) >= getattr(self, fast):
                raise ValueError(
                    f"{slow} is {getattr(self, slow)} and {fast} is {getattr(self, fast)}; slow pairs turn "
                    f"less often than fast ones, so {slow} must be the smaller."
                )
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if self.rope_type != "longrope":
                if factors is not None:
                    raise ValueError(f'Only rope_type "longrope" reads {name}; this is "{self.rope_type}".')
                continue
            if not isinstance(factors, list | tuple) or not factors:
                raise ValueError(
                    f'rope_type "longrope" needs {name}: a list with one number for each frequency.'
                )
            object.__setattr__(self, name, tuple(factors))
            for factor in factors:
                require_positive_number(f"each {name}", factor)
        if self.rope_type == "longrope" and self.original_max_position_embeddings == 1:
            raise ValueError(
                'original_max_position_embeddings is 1; rope_type "longrope" divides by its logarithm, so '
                "give at least 2."
            )
        if self.rope_type != "longrope" and self.factor is None:
            raise ValueError(f'rope_type "{self.rope_type}" needs a factor: how many times longer.')
        if self.factor is not None:
            require_positive_number("factor", self.factor)
            if self.factor < 1:
                raise ValueError(f"factor is {self.factor}; a context is made longer, so give at least 1.")


@dataclass(frozen=True)
class SparseConfig:
    """How InfLLM v2 chooses what a token attends to (MiniCPM4 and 4.1); see `inference.sparse_attention`.

    The defaults are those of the released ``sparse_config``, whose names the first eight fields have. A text
    is cut into blocks; means of windows stand for its keys where a query chooses among them.

    Attributes:
        kernel_size: tokens of a window, whose keys are averaged.
        kernel_stride: tokens from the start of one window to that of the next.
        init_blocks: blocks at the beginning of the text that every query attends to.
        block_size: tokens of a block.
        window_size: every query attends to ``window_size / block_size`` blocks, of which its own is the last.
        topk: blocks besides those of the window, the ones at the beginning included.
        use_nope: choose by queries and keys before their rotation. No release does, and it is not built here.
        dense_len: a query that sees fewer tokens than this attends to all of them; 0 or -1: none does.
        approximate_lse: take the sum in the softmax over windows from means four times as coarse, which a
            fused GPU kernel reads in a quarter of the time (InfLLM v2, section 3).
        coarse_topk: beyond the paper: of the windows, only those inside this many coarse ones are read, the
            coarse ones that score best. None: all are read.

    Raises:
        ValueError: a size is no whole number, or windows and blocks do not fit into each other.

    >>> SparseConfig().num_blocks, SparseConfig().num_visible(131_072)
    (96, 6144)
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    init_blocks: int = 1
    block_size: int = 64
    window_size: int = 2048
    topk: int = 64
    use_nope: bool = False
    dense_len: int = 8192
    approximate_lse: bool = False
    coarse_topk: int | None = None

    def __post_init__(self) -> None:
        for name in ("kernel_size", "kernel_stride", "block_size", "window_size", "topk"):
            _require_size(name, getattr(self, name))
        for name, least in (("init_blocks", 0), ("dense_len", -1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {shown(value)}; expected a whole number of at least {least}.")
        for whole, part in (
            ("kernel_size", "kernel_stride"),
            ("block_size", "kernel_stride"),
            ("window_size", "block_size"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole} is {getattr(self, whole)} and {part} is {getattr(self, part)}; "
                    f"expected a multiple, such as {getattr(self, part) * 2}."
                )
        if self.kernel_size > self.block_size:
            raise ValueError(
                f"kernel_size is {self.kernel_size} and block_size is {self.block_size}; a window reaches "
                "over one border of blocks at most, so give at most block_size."
            )
        if self.init_blocks > self.topk:
            raise ValueError(
                f"init_blocks is {self.init_blocks} and topk is {self.topk}; the blocks at the beginning are "
                "among the topk, so give at most as many."
            )
        for name in ("use_nope", "approximate_lse"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {shown(getattr(self, name))}; expected true or false.")
        if self.use_nope:
            raise ValueError(
                "use_nope is true: blocks would be chosen by queries and keys before their rotation, which "
                "is not built here. The released models have use_nope: false."
            )
        if self.coarse_topk is not None:
            _require_size("coarse_topk", self.coarse_topk)
            if self.coarse_topk < self.topk:
                raise ValueError(
                    f"coarse_topk is {self.coarse_topk} and topk is {self.topk}; the blocks are chosen among "
                    "those under the coarse windows, so give at least as many."
                )

    @property
    def local_blocks(self) -> int:
        """Blocks of the window, of which the query's own is the last."""
        return self.window_size // self.block_size

    @property
    def num_blocks(self) -> int:
        """Blocks that a query attends to where there are so many: topk + window_size / block_size."""
        return self.topk + self.local_blocks

    @property
    def all_visible(self) -> int:
        """Up to how many tokens a query attends to all that it sees."""
        return max(self.dense_len - 1, self.num_blocks * self.block_size)

    def num_visible(self, length: int) -> int:
        """How many of ``length`` tokens the last one attends to; its own block counts as far as it goes."""
        if length <= self.all_visible:
            return length
        return length - (-(-length // self.block_size) - self.num_blocks) * self.block_size


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a MiniCPM decoder. With the three multipliers left out it is a Llama.

    Fields that are left out and follow from others (``num_key_value_heads``, ``head_dim``) are filled in at
    once. So `dataclasses.replace` keeps them: give them anew, or as None, when the heads or the width change.

    Attributes:
        hidden_size: width of the residual stream, "d".
        intermediate_size: width of the feed-forward network.
        num_hidden_layers: number of blocks, "L".
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; each serves ``num_attention_heads / num_key_value_heads``
            query heads (grouped-query attention). Left out: one for each query head.
        vocab_size: number of token ids.
        head_dim: width of one head. Left out: ``hidden_size / num_attention_heads``.
        max_position_embeddings: longest sequence the model was trained for, in tokens.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how the rotary frequencies are changed for longer texts, or None.
        rms_norm_eps: added to the mean square before its root is taken.
        tie_word_embeddings: the output layer uses the embedding table.
        scale_emb: the embeddings are multiplied by this.
        scale_depth: each block's output is multiplied by ``scale_depth / sqrt(num_hidden_layers)`` before it
            is added to the residual stream. None: by 1.
        dim_model_base: the last hidden state is divided by ``hidden_size / dim_model_base``. None: by 1.
        init_std: standard deviation of the weights at the start, at width ``dim_model_base``.
        latent_attention: sizes of MLA, or None for ordinary attention.
        mixture: sizes of the mixture of experts, or None for one dense feed-forward network.
        eos_token_id: ids that end a text; generation stops at them unless told otherwise. One id or a list,
            as released files spell it, becomes a tuple; None, an empty one.

    Raises:
        ValueError: a size is not positive, the heads do not divide, a head cannot be rotated, or an id that
            ends a text is none of the vocabulary.

    >>> ModelConfig(hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
    ...             vocab_size=256).head_dim
    16
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 4096
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    scale_emb: float = 1.0
    scale_depth: float | None = None
    dim_model_base: int | None = None
    init_std: float = 0.02
    latent_attention: LatentAttentionConfig | None = None
    mixture: MixtureConfig | None = None
    eos_token_id: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for size in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "vocab_size", "max_position_embeddings"):  # fmt: skip
            _require_size(size, getattr(self, size))
        for factor in ("rope_theta", "rms_norm_eps", "scale_emb", "init_std"):
            require_positive_number(factor, getattr(self, factor))
        for factor in ("scale_depth", "dim_model_base"):
            if getattr(self, factor) is not None:
                require_positive_number(factor, getattr(self, factor))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads} and num_key_value_heads is "
                f"{self.num_key_value_heads}: each key-value head must serve the same number of query heads. "
                f"Choose a divisor of {self.num_attention_heads}."
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} "
                    "attention heads. Choose a divisor for num_attention_heads, or give head_dim."
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _require_size("head_dim", self.head_dim)
        if self.rotary_dim % 2:
            raise ValueError(
                f"The rotated part of a head is {self.rotary_dim} wide; pairs are rotated, so make it even."
            )
        scaling = self.rope_scaling.rope_type if self.rope_scaling else None
        if scaling == "dynamic" and self.rotary_dim == 2:
            raise ValueError(
                'rope_type "dynamic" raises rope_theta, on which the one pair of a rotated part of 2 does '
                "not depend; use another type, or wider heads."
            )
        if scaling == "yarn" and self.rope_theta <= 1:
            raise ValueError(
                f"rope_theta is {self.rope_theta}, with which no pair turns slower than the first; rope_type "
                '"yarn" tells fast pairs from slow ones, so give more than 1.'
            )
        if scaling == "longrope":
            for factors in (self.rope_scaling.short_factor, self.rope_scaling.long_factor):
                if len(factors) != self.rotary_dim // 2:
                    raise ValueError(
                        f"rope_scaling holds {len(factors)} factors; the rotated part of a head is "
                        f"{self.rotary_dim} wide and needs {self.rotary_dim // 2}, one for each pair."
                    )
        if self.mixture and (experts := self.num_hidden_layers * self.mixture.num_experts) > _MOST_EXPERTS:
            raise ValueError(
                f"num_hidden_layers times num_experts is {experts:,}; at most {_MOST_EXPERTS:,} experts are "
                "possible here."
            )
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(
                f"tie_word_embeddings is {shown(self.tie_word_embeddings)}; expected true or false."
            )
        ends = () if self.eos_token_id is None else self.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends
        if not isinstance(ends, list | tuple) or not all(
            isinstance(end, int) and not isinstance(end, bool) and 0 <= end < self.vocab_size for end in ends
        ):
            raise ValueError(
                f"eos_token_id is {shown(self.eos_token_id)}; expected ids of the vocabulary: whole numbers "
                f"from 0 to {self.vocab_size - 1}, one or a list."
            )
        object.__setattr__(self, "eos_token_id", tuple(dict.fromkeys(ends)))

    @property
    def rotary_dim(self) -> int:
        """How many features of a head are rotated."""
        return self.latent_attention.qk_rope_head_dim if self.latent_attention else self.head_dim

    @property
    def residual_scale(self) -> float:
        """What each block's output is multiplied by: scale_depth / sqrt(L), or 1."""
        return 1.0 if self.scale_depth is None else self.scale_depth / self.num_hidden_layers**0.5

    @property
    def width_ratio(self) -> float:
        """hidden_size / dim_model_base, or 1: the logits are divided by it."""
        return 1.0 if self.dim_model_base is None else self.hidden_size / self.dim_model_base


class MissingBlockError(ValueError):
    """A config file lacks the block that was asked for, for instance because no recipe was published."""


@dataclass(frozen=True)
class TrainingRecipe:
    """How a released model was pre-trained, as far as it was published; None where it was not.

    Attributes:
        tokens: tokens seen in pre-training.
        batch_tokens: tokens in one optimiser step of the stable stage.
        peak_learning_rate: learning rate of the stable stage.
        decay_half_life_steps: half-life of the exponential decay, in steps.
    """

    tokens: float
    batch_tokens: float | None = None
    peak_learning_rate: float | None = None
    decay_half_life_steps: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is not None:
                require_positive_number(field.name, getattr(self, field.name))


def list_configs() -> list[str]:
    """Names of all models that `load_config` knows, sorted.

    >>> list_configs()[:2]
    ['bitcpm4-0.5b', 'bitcpm4-1b']
    """
    return sorted(path.stem for path in _CONFIGS.glob("*.yaml"))


def load_config(name: str | Path) -> ModelConfig:
    """The shape of a model, by its name (see `list_configs`) or from a YAML file of your own.

    Raises:
        ValueError: no such model (the nearest names are suggested), an unknown or missing field, or a value
            that cannot be.

    >>> load_config("minicpm-1.2b").num_hidden_layers
    52
    """
    return model_config(_block(name, "model"), f"The model block of config {str(name)!r}")


def model_config(values: dict, where: str = "The model config") -> ModelConfig:
    """The shape of a model from plain values, such as `dataclasses.asdict` gives or a checkpoint holds.

    Raises:
        ValueError: an unknown or missing field, or a value that cannot be; ``where`` says whose.
    """
    values = dict(values)
    for field, kind in (
        ("latent_attention", LatentAttentionConfig),
        ("mixture", MixtureConfig),
        ("rope_scaling", RopeScaling),
    ):
        if values.get(field) is not None:
            values[field] = _build(kind, values[field], f"{where}, {field},")
    return _build(ModelConfig, values, where)


def load_recipe(name: str | Path) -> TrainingRecipe:
    """The published training recipe of a model.

    Raises:
        ValueError: no such model, or its file holds no recipe because none was published.

    >>> load_recipe("minicpm-2.4b").peak_learning_rate
    0.01
    """
    return _build(TrainingRecipe, _block(name, "training"), f"The training block of config {str(name)!r}")


def load_rope_scaling(name: str | Path) -> RopeScaling:
    """The published rotary scaling that takes a model beyond its released context.

    Raises:
        ValueError: no such model, or its file holds no scaling because none was published.

    >>> load_rope_scaling("minicpm4.1-8b").original_max_position_embeddings
    65536
    """
    return _build(RopeScaling, _block(name, "rope_scaling"), f"The rope_scaling of config {str(name)!r}")


def load_sparse_config(name: str | Path) -> SparseConfig:
    """The published sparse attention of a model.

    Raises:
        ValueError: no such model, or its file holds none because it was released with dense attention alone.

    >>> load_sparse_config("minicpm4-8b").num_blocks
    96
    """
    return sparse_config(_block(name, "sparse_config"), f"The sparse_config of config {str(name)!r}")


def sparse_config(values: dict, where: str = "The sparse_config") -> SparseConfig:
    """Sparse attention from plain values, such as ``sparse_config`` of a released ``config.json``.

    Raises:
        ValueError: an unknown field, or a value that cannot be; ``where`` says whose.
    """
    return _build(SparseConfig, values, where)


def _block(name: str | Path, block: str) -> dict:
    if str(name).endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"There is no file {path}.")
    elif str(name) in list_configs():
        path = _CONFIGS / f"{name}.yaml"
    else:
        near = get_close_matches(str(name).lower(), list_configs(), n=3)
        known = f"Did you mean {' or '.join(near)}?" if near else f"Known are: {', '.join(list_configs())}."
        raise ValueError(f"There is no config named {str(name)!r}. {known}")
    content = _read_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get(block), dict):
        raise MissingBlockError(f"{path.name} has no {block!r} block, so there is none to load.")
    return {key: value for key, value in content[block].items() if key != "source"}


class _YAMLLoader(yaml.SafeLoader):
    """As PyYAML's, but numbers are those of YAML 1.2; a name stands once, and depth has an end.

    So 1e9 is a number, 0300 is three hundred and no octal, and 1:30 is no number of minutes.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        self.depth += 1
        if self.depth > _DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"more than {_DEEPEST} levels", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        names = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in names:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} stands there twice", problem_mark=key.start_mark
                )
            names.add(key.value)
        return super().construct_mapping(node, deep)


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_YAMLLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBERS = {_INT: r"[-+]?[0-9]+$", _FLOAT: r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"}
for _tag, _form in _NUMBERS.items():
    _YAMLLoader.add_implicit_resolver(_tag, re.compile(_form), [*"-+.0123456789"])
_YAMLLoader.add_constructor(_INT, lambda loader, node: int(loader.construct_scalar(node)))


def _read_yaml(path: Path) -> object:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _YAMLLoader)
    except yaml.MarkedYAMLError as error:
        raise ValueError(
            f"{path.name} is not valid YAML, line {error.problem_mark.line + 1}: {error.problem}."
        ) from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        # of characters, dates and numbers without end; the last two where a tag promises another type
        raise ValueError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from None


def _build(kind: type, values: dict, where: str):
    if not isinstance(values, dict):
        raise ValueError(f"{where} holds {shown(values)}; expected names with values.")
    known = [field.name for field in fields(kind)]
    for key in values:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known are: {', '.join(known)}."
            raise ValueError(f"{where} has an unknown field {key!r}. {hint}")
    missing = [field.name for field in fields(kind) if field.default is MISSING and field.name not in values]
    if missing:
        raise ValueError(f"{where} is incomplete: it lacks {', '.join(missing)}.")
    return kind(**values)


def require_positive_integer(name: str, value: object) -> None:
    """Refuse what is not a whole number of at least 1, with a sentence that names it."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {shown(value)}; expected a whole number of at least 1.")


def _require_size(name: str, value: object) -> None:
    """Refuse what is no size of a model: beside all else, what no machine could build."""
    require_positive_integer(name, value)
    if value > (largest := _LARGEST.get(name, _LARGEST_WIDTH)):
        raise ValueError(f"{name} is {shown(value)}; at most {largest:,} is possible here.")


def require_probability(name: str, value: object) -> None:
    """Refuse what is not a number from 0 to 1, with a sentence that names it."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
        raise ValueError(f"{name} is {shown(value)}; expected a number from 0 to 1.")


def require_positive_number(name: str, value: object) -> None:
    """Refuse what is not a finite number above 0, with a sentence that names it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {shown(value)}; expected a number greater than 0.")
