"""The MiniCPM decoder: a Llama block with three multipliers.

    x = embedding(ids) * scale_emb
    for each of the L blocks:
        x = x + scale_depth / sqrt(L) * attention(norm(x))
        x = x + scale_depth / sqrt(L) * feed_forward(norm(x))
    logits = output(norm(x) / (hidden_size / dim_model_base))

Source: Hu et al. 2024, "MiniCPM", arXiv 2404.06395, section 6.1 and appendix A.1; released modelling code.

The three lines are three methods, `Decoder.embed`, `Decoder.states` and `Decoder.logits`, so that what stands
between them can be used: features of an image take the place of embeddings, a draft model reads the residual
stream half-way. How tokens meet is brought by each call, as a context (see `context`).

Choices, and the traps behind them:

- With all multipliers 1 this is Llama, so one class runs the book's small models, Llama-type checkpoints
  and every released MiniCPM. Module names are those of the released checkpoints.
- ``L`` in the residual scale is the number of blocks, not twice that; attention and feed-forward share it.
- The attention scale is 1/sqrt(head_dim). The 1/head_dim of µP theory is not used by any release.
- The hidden state is divided before the output layer, which equals dividing the logits up to rounding.
- The config chooses the modules: latent attention or grouped queries, experts or one feed-forward network.
"""

from collections.abc import Iterable
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..config import ModelConfig
from .context import Context
from .latent_attention import LatentAttention
from .layers import Attention, FeedForward, RMSNorm
from .moe import MixtureOfExperts

__all__ = ["Block", "Decoder", "changed_inside", "own_class", "plain_shapes", "require_plain"]


class Block(nn.Module):
    """One layer: attention, then feed-forward, each normed before and scaled after."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = (LatentAttention if config.latent_attention else Attention)(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (MixtureOfExperts if config.mixture else FeedForward)(config)
        self.residual_scale = config.residual_scale

    def forward(
        self,
        x: Float[Tensor, "batch tokens d"],
        rotary: tuple[Tensor, Tensor],
        context: Context,
    ) -> Float[Tensor, "batch tokens d"]:
        r = self.residual_scale
        found = self.self_attn(self.input_layernorm(x), rotary, context)
        x = x.add(found, alpha=r)  # x + r * found, in one pass over memory
        return x.add(self.mlp(self.post_attention_layernorm(x)), alpha=r)


class Decoder(nn.Module):
    """The whole model: token ids in, logits out.

    Weights start as the MiniCPM paper's Table 7 says: normal with standard deviation ``init_std`` for the
    embeddings and ``init_std / sqrt(width_ratio)`` for the matrices; norms start at 1. On the meta device
    (``with torch.device("meta")``) the model has shapes and no memory. ``config`` may be replaced by one with
    other rotary frequencies; what else it says was built in, and needs a new model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        table = (config.vocab_size, config.hidden_size)
        has_memory = torch.get_default_device().type != "meta"  # without, there is nothing to draw, slowly
        self.embed_tokens = (
            nn.Embedding(*table)
            if has_memory
            else nn.Embedding.from_pretrained(torch.empty(table), freeze=False)
        )
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None  # tied: the embedding table is the output layer
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if has_memory:
            for weight, std in self.initial_stds():
                nn.init.normal_(weight, std=std)

    def forward(
        self, ids: Int[Tensor, "batch tokens"], context: Context | None = None, last_only: bool = False
    ) -> Float[Tensor, "batch logits vocab"]:
        """Logits of the next token at each position, in float32 or better.

        Args:
            ids: the text, or with a cache its newest tokens.
            context: what the tokens may look at; left out, they are a text of their own.
            last_only: the logits of the last position alone. Of a long prompt nothing else is needed, and the
                logits of all of it can take more memory than the model.

        Raises:
            ValueError: no token or something else, as `embed` says; more tokens than the context has room for
                or the model was made for; or a cache that another model has filled.
        """
        x = self.read(ids, context)[-1]
        return self.logits(x[:, -1:] if last_only else x)

    def read(
        self, ids: Int[Tensor, "batch tokens"], context: Context | None = None, after: Iterable[int] = ()
    ) -> list[Float[Tensor, "batch tokens d"]]:
        """The residual streams of tokens, as `states` gives them; the context is told which tokens they are.

        Raises:
            ValueError: as `embed` and `states`.
        """
        context, x = Context() if context is None else context, self.embed(ids)
        context.read(ids)
        return self.states(x, context, after)

    def embed(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens d"]:
        """What enters the first block for each token.

        Raises:
            ValueError: no token, no batch of them, or something else than whole numbers of 32 or 64 bits.
            IndexError: on a CPU, an id that the table has no row for. (A GPU ends the program; to look before
                would cost each step a wait for it.)
        """
        if ids.ndim != 2:
            raise ValueError(
                f"ids has shape {tuple(ids.shape)}; expected (batch, tokens). For one text: ids[None]."
            )
        if ids.shape[1] == 0:
            raise ValueError("ids holds no token; give at least one, for instance the start token.")
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"ids is of type {ids.dtype}; expected whole numbers of 64 or 32 bits: ids.long()."
            )
        return self.embed_tokens(ids) * self.config.scale_emb

    def states(
        self, x: Float[Tensor, "batch tokens d"], context: Context | None = None, after: Iterable[int] = ()
    ) -> list[Float[Tensor, "batch tokens d"]]:
        """The residual stream after some blocks, and as the last one after all of them.

        Args:
            x: what enters the first block: embeddings, or other features in their place.
            context: what the tokens may look at; left out, they are a text of their own.
            after: after how many blocks; 0 is ``x`` itself.

        Raises:
            ValueError: more tokens than the context has room for or the model was made for, or a number of
                blocks that the model has not.
        """
        context, after = Context() if context is None else context, tuple(after)
        if not all(0 <= blocks <= len(self.layers) for blocks in after):
            raise ValueError(f"after is {after}; expected numbers of blocks from 0 to {len(self.layers)}.")
        context.belong(self)
        positions = context.begin(x)
        if context.reach > self.config.max_position_embeddings:
            raise ValueError(
                f"{context.reach} tokens were given, but the model was made for "
                f"{self.config.max_position_embeddings} (max_position_embeddings). Give fewer, or extend its "
                "context first."
            )
        rotary, seen = context.angles(self.config, positions), {0: x}
        for number, layer in enumerate(self.layers, start=1):
            x = layer(x, rotary, context)
            if number in after:
                seen[number] = x
        context.end()
        return [*(seen[blocks] for blocks in after), x]

    def logits(self, x: Float[Tensor, "batch tokens d"]) -> Float[Tensor, "batch tokens vocab"]:
        """What the residual stream after the last block says of the next token, in float32 or better."""
        x = self.norm(x) / self.config.width_ratio
        logits = F.linear(x, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(x)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @property
    def tables(self) -> list[nn.Parameter]:
        """The embedding table and, unless it is tied, the table of the output layer."""
        return [self.embed_tokens.weight] + ([] if self.lm_head is None else [self.lm_head.weight])

    def initial_stds(self) -> list[tuple[nn.Parameter, float]]:
        """What is drawn, and the standard deviation it is drawn with; the rest are norms, which start at 1.

        The output layer is named twice, as every matrix and then as a table, which counts.
        """
        config = self.config
        matrices = [module.weight for module in self.modules() if isinstance(module, nn.Linear)]
        return [(matrix, config.init_std / config.width_ratio**0.5) for matrix in matrices] + [
            (table, config.init_std) for table in self.tables
        ]

    def num_parameters(self, embeddings: bool = False) -> int:
        """Number of parameters; without ``embeddings``, neither the table nor the output layer counts."""
        tables = {id(table) for table in self.tables}
        return sum(p.numel() for p in self.parameters() if embeddings or id(p) not in tables)


def changed_inside(model: Decoder) -> dict[str, tuple[type | None, type | None]]:
    """By name, the modules that are of another class in a plain decoder: their class here and there, if any.

    A layer that computes with its weight in another way has the same names and shapes; its class tells.
    """
    return _different(_classes(model), _classes(_plain(model.config)))


def plain_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """The shape of each tensor that a plain decoder of this config has, by its name. Nothing is built."""
    return {name: tensor.shape for name, tensor in _plain(config).state_dict().items()}


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module; of one that is cut over processes, which is of FSDP's class too, its own."""
    classes = type(module).__mro__
    return next(kind for kind in classes if not kind.__module__.startswith("torch.distributed.fsdp"))


def require_plain(model: Decoder) -> None:
    """Refuse a decoder that was changed inside: a plain one of its weights computes something else, if any.

    Raises:
        ValueError: a sentence that names the first change; or the model is cut over processes.
    """
    if own_class(model) is not type(model):
        raise ValueError(
            "The model is cut over processes, and each holds a part of it. Save a checkpoint with its "
            "Trainer; load_weights makes a whole model of that."
        )
    held = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if changed := changed_inside(model) or _different(held, plain_shapes(model.config)):
        name, (here, there) = next(iter(changed.items()))
        raise ValueError(
            f"The model was changed inside: {name or 'the model itself'} is {_shown(here)}, and in a plain "
            f"decoder {_shown(there)}. Merge or undo what was built into it first."
        )


@lru_cache(maxsize=16)
def _plain(config: ModelConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


def _classes(model: Decoder) -> dict[str, type]:
    return {name: own_class(module) for name, module in model.named_modules(remove_duplicate=False)}


def _different(here: dict, there: dict) -> dict[str, tuple]:
    pairs = {name: (here.get(name), there.get(name)) for name in here | there}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _shown(part: type | torch.Size | None) -> str:
    if isinstance(part, type):
        return f"{part.__module__}.{part.__qualname__}"
    return "missing" if part is None else f"of shape {tuple(part)}"
