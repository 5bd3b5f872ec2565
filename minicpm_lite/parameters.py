"""How many parameters a model has, from its shape alone: a listing need not make the models it lists.

    table       V d                      once if the output layer is tied, else twice
    attention   d (H + 2 K) h + H h d    H heads and K key-value heads of width h
    latent      d r_q + r_q H (n + p) + d (r_kv + p) + r_kv H (n + v) + H v d, and norms r_q + r_kv
    feed-forward  3 d f                  for each expert, and a router of d rows' width if there are several
    norms       2 d a block, and d at the end

V ids, d hidden size, f intermediate size; n, p and v are the widths of a head without positions, with
positions, and of its values. That these are the parameters of `Decoder` is a test over every kind of shape.
"""

from dataclasses import dataclass

from .config import ModelConfig

__all__ = ["ParameterCount", "count_parameters"]


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, by what one may mean.

    Attributes:
        tables: that turn ids into vectors, and vectors into scores of ids.
        others: all the rest; papers often mean these when they name the size of a model.
        idle: of the others, experts that a token does not visit.
    """

    tables: int
    others: int
    idle: int

    @property
    def total(self) -> int:
        """All of them, as they lie in a file."""
        return self.tables + self.others

    @property
    def active(self) -> int:
        """Those that one token uses, tables included."""
        return self.total - self.idle


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count the parameters of a shape.

    >>> from minicpm_lite import load_config
    >>> count_parameters(load_config("minicpm-2.4b"))
    ParameterCount(tables=282822912, others=2442057984, idle=0)
    """
    d, heads, latent = config.hidden_size, config.num_attention_heads, config.latent_attention
    if latent is None:
        queries, keys = heads * config.head_dim, config.num_key_value_heads * config.head_dim
        attention = d * (queries + 2 * keys) + queries * d
    else:
        width = latent.qk_nope_head_dim + latent.qk_rope_head_dim
        attention = d * latent.q_lora_rank + latent.q_lora_rank * heads * width
        attention += d * (latent.kv_lora_rank + latent.qk_rope_head_dim)
        attention += latent.kv_lora_rank * heads * (latent.qk_nope_head_dim + latent.v_head_dim)
        attention += heads * latent.v_head_dim * d
        attention += latent.q_lora_rank + latent.kv_lora_rank  # norms
    expert = 3 * d * config.intermediate_size
    experts, visited = 1, 1
    router = 0
    if config.mixture is not None:
        experts, visited = config.mixture.num_experts, config.mixture.num_experts_per_token
        router = d * experts
    layers = config.num_hidden_layers
    return ParameterCount(
        tables=config.vocab_size * d * (1 if config.tie_word_embeddings else 2),
        others=layers * (attention + experts * expert + router + 2 * d) + d,
        idle=layers * (experts - visited) * expert,
    )
