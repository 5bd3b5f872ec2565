"""SigLIP's text encoder: a short text to one vector.

    x = W[token] + position          y = norm(blocks(x))          vector = W_head y_last + b

All tokens see each other, the filling behind a short text, too: the model was trained so, with texts filled
up to one length, and the vector is read at the last place, whatever stands there. A text that is filled up to
another length has another vector.

Source: SigLIP as released (big_vision; ``SiglipTextModel``).
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from .layers import EncoderBlock, require_encoder_shape
from .siglip import initialise_encoder

__all__ = ["TextConfig", "TextEncoder"]


@dataclass(frozen=True)
class TextConfig:
    """The shape of an encoder for short texts. The defaults are So400m's.

    Attributes:
        vocab_size: token ids.
        hidden_size: features of a token, and of the text's vector.
        intermediate_size: features between the two layers of a block.
        num_hidden_layers: blocks.
        num_attention_heads: of each block.
        length: tokens of a text, filled up.
        layer_norm_eps: added to the variance in each norm.

    Raises:
        ValueError: a size that cannot be, or heads that do not divide the features.
    """

    vocab_size: int = 32_000
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    length: int = 64
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        require_encoder_shape(self)


class TextEncoder(nn.Module):
    """Short texts, all filled up to one length, to a vector each."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Embedding(config.length, width)
        self.layers = nn.ModuleList(
            EncoderBlock(width, config.intermediate_size, config.num_attention_heads, config.layer_norm_eps)
            for _ in range(config.num_hidden_layers)
        )
        self.final_layer_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.head = nn.Linear(width, width)
        if self.head.weight.device.type != "meta":
            initialise_encoder(self)
            for table in (self.token_embedding, self.position_embedding):
                nn.init.normal_(table.weight, std=width**-0.5)
            nn.init.trunc_normal_(self.head.weight, std=width**-0.5)
            nn.init.zeros_(self.head.bias)

    def forward(self, ids: Int[Tensor, "texts length"]) -> Float[Tensor, "texts width"]:
        """A vector for each text.

        Raises:
            ValueError: texts of another length than the encoder's, or ids that are none.
        """
        if ids.ndim != 2 or ids.shape[1] != self.config.length:
            raise ValueError(
                f"The ids are of shape {tuple(ids.shape)}; expected texts of {self.config.length} tokens, "
                "filled up."
            )
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            raise ValueError(
                f"The ids lie between {int(ids.min())} and {int(ids.max())}; expected 0 to "
                f"{self.config.vocab_size - 1}."
            )
        x = self.token_embedding(ids) + self.position_embedding.weight
        for layer in self.layers:
            x = layer(x, None)
        return self.head(self.final_layer_norm(x)[:, -1])
