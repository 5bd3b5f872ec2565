"""SigLIP's picture encoder as MiniCPM-V has it: pictures of any size, packed, without a token for the whole.

    x_p = W pixels_p + b + table[bucket(p)]        a patch of 14 by 14 pixels, and where in the picture it is
    x   = norm(block_27(... block_1(x)))           every patch looks at every other of its picture

    bucket of row i of h, column j of w:   s floor(s i / h) + floor(s j / w)     in a table of s by s, s = 70

Source: SigLIP So400m/14 (arXiv 2303.15343; big_vision) with the table of MiniCPM-V 2.5 and later. The encoder
of 1.0 and 2.0 lacks the last block and stretches a table of 27 by 27 by bicubic interpolation.

Choices, and the traps behind them:

- A patch takes the place in the table where it lies in the picture; nothing is interpolated. Buckets are
  computed in whole numbers. Released code compares float32 fractions and, for some sizes (25 rows, say),
  takes the neighbouring bucket for a few patches.
- Pictures of different sizes go through in one call, filled up with patches that nobody looks at, so that a
  picture comes out as it would alone.
- A patch is a row of ``3 * 14 * 14`` numbers, and the convolution of released files is a linear layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..config import require_positive_integer
from ..pretrained.assemble import assemble
from ..pretrained.weights import read_json, read_weights
from .layers import (
    MLP,
    CrossAttention,
    EncoderBlock,
    SelfAttention,
    real_places,
    require_encoder_shape,
)

__all__ = [
    "AttentionPooling",
    "Patches",
    "SigLIPConfig",
    "SigLIPEncoder",
    "initialise_encoder",
    "load_siglip",
    "pack_pictures",
    "position_buckets",
]

_PATCHES = "embeddings.patch_embedding.weight"


@dataclass(frozen=True)
class SigLIPConfig:
    """The shape of an encoder for pictures. The defaults are So400m/14 with MiniCPM-V's table.

    Attributes:
        hidden_size: features of a patch.
        intermediate_size: features between the two layers of a block.
        num_hidden_layers: blocks.
        num_attention_heads: of each block.
        patch_size: pixels of a patch's side.
        table_side: rows and columns of the table of positions.
        layer_norm_eps: added to the variance in each norm.

    Raises:
        ValueError: a size that cannot be, or heads that do not divide the features.
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    patch_size: int = 14
    table_side: int = 70
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        require_encoder_shape(self)


@dataclass(frozen=True, eq=False)
class Patches:
    """Pictures as rows of patches, filled up to the one with most; a batch for a trainer, or a part of one.

    Attributes:
        pixels: of each patch, colour by colour and row by row.
        grids: rows and columns of patches of each picture.
    """

    pixels: Float[Tensor, "pictures patches pixels"]
    grids: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.grids)

    def __getitem__(self, pictures: slice) -> "Patches":
        """Some of the pictures, filled up to the one of them with most."""
        grids = self.grids[pictures]
        most = max((rows * columns for rows, columns in grids), default=0)
        return Patches(self.pixels[pictures, :most], grids)

    def to(self, device: torch.device) -> "Patches":
        """The same on a device."""
        return Patches(self.pixels.to(device), self.grids)

    @property
    def real(self) -> Bool[Tensor, "pictures patches"] | None:
        """Which patches are no filling; None if all are."""
        return real_places([rows * columns for rows, columns in self.grids], self.pixels.device)


def pack_pictures(pictures: Sequence[Float[Tensor, "3 height width"]], patch: int = 14) -> Patches:
    """Cut pictures of any sizes into patches, row by row.

    Args:
        pictures: pixels from -1 to 1; `minicpm_lite.vision.images.pixels_of` makes them.
        patch: pixels of a patch's side.

    Raises:
        ValueError: no picture, or one that is no whole number of patches high and wide.

    >>> packed = pack_pictures([torch.zeros(3, 28, 14), torch.zeros(3, 14, 14)])
    >>> packed.pixels.shape, packed.grids, packed.real.tolist()
    (torch.Size([2, 2, 588]), ((2, 1), (1, 1)), [[True, True], [True, False]])
    """
    if not pictures:
        raise ValueError("There are no pictures to pack; give at least one.")
    rows, grids = [], []
    for number, picture in enumerate(pictures):
        shape = tuple(picture.shape)
        if len(shape) != 3 or shape[0] != 3 or 0 in shape or shape[1] % patch or shape[2] % patch:
            raise ValueError(
                f"Picture {number} is of shape {shape}; expected 3 colours, and a height and a width that "
                f"are multiples of {patch}. vision.slicing.slice_image makes pictures of such sizes."
            )
        grids.append((shape[1] // patch, shape[2] // patch))
        # (3, rows, patch, columns, patch) -> (rows, columns, 3, patch, patch)
        cut = picture.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).permute(1, 3, 0, 2, 4)
        rows.append(cut.reshape(-1, 3 * patch * patch))
    return Patches(nn.utils.rnn.pad_sequence(rows, batch_first=True), tuple(grids))


def position_buckets(rows: int, columns: int, side: int = 70) -> Int[Tensor, " patches"]:
    """Which entry of a table of ``side`` by ``side`` each patch of a picture takes, row by row.

    >>> position_buckets(2, 3, side=70).tolist()
    [0, 23, 46, 2450, 2473, 2496]
    """
    down, right = (side * torch.arange(n) // n for n in (rows, columns))
    return (side * down[:, None] + right).flatten()


class AttentionPooling(nn.Module):
    """One vector for a picture: a learned query looks at all patches (SigLIP's head; MiniCPM-V has none)."""

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.attention = CrossAttention(width, config.num_attention_heads)
        self.layernorm = nn.LayerNorm(width, config.layer_norm_eps)
        self.mlp = MLP(width, config.intermediate_size)

    def forward(
        self, x: Float[Tensor, "pictures patches width"], real: Bool[Tensor, "pictures patches"] | None = None
    ) -> Float[Tensor, "pictures width"]:
        found = self.attention(self.probe.expand(len(x), -1, -1), x, x, real)[:, 0]
        return found + self.mlp(self.layernorm(found))


class SigLIPEncoder(nn.Module):
    """Pictures to a vector for each of their patches.

    Args:
        config: its shape.
        pooling: whether there is a head that makes one vector of a picture, as contrastive training needs.
            MiniCPM-V has none.

    >>> with torch.device("meta"):
    ...     encoder = SigLIPEncoder(SigLIPConfig())
    >>> f"{sum(parameter.numel() for parameter in encoder.parameters()):,}"
    '417,792,240'
    """

    def __init__(self, config: SigLIPConfig, pooling: bool = False) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, width)
        self.position_embedding = nn.Embedding(config.table_side**2, width)
        self.layers = nn.ModuleList(
            EncoderBlock(width, config.intermediate_size, config.num_attention_heads, config.layer_norm_eps)
            for _ in range(config.num_hidden_layers)
        )
        self.post_layernorm = nn.LayerNorm(width, config.layer_norm_eps)
        self.head = AttentionPooling(config) if pooling else None
        if self.post_layernorm.weight.device.type != "meta":
            initialise_encoder(self)

    def forward(self, patches: Patches) -> Float[Tensor, "pictures patches width"]:
        """A vector for each patch; zeros where a picture has none.

        Raises:
            ValueError: patches of another size than the encoder's.
        """
        size = 3 * self.config.patch_size**2
        if patches.pixels.shape[-1] != size:
            raise ValueError(
                f"The patches have {patches.pixels.shape[-1]} numbers; this encoder reads patches of "
                f"{self.config.patch_size} pixels a side, which have {size}."
            )
        buckets = [position_buckets(*grid, self.config.table_side) for grid in patches.grids]
        places = nn.utils.rnn.pad_sequence(buckets, batch_first=True).to(patches.pixels.device)
        real = patches.real
        x = self.patch_embedding(patches.pixels) + self.position_embedding(places)
        for layer in self.layers:
            x = layer(x, real)
        x = self.post_layernorm(x)
        return x if real is None else x * real[..., None]

    def pooled(self, patches: Patches) -> Float[Tensor, "pictures width"]:
        """One vector for each picture.

        Raises:
            ValueError: the encoder has no pooling, or as `forward` does.
        """
        if self.head is None:
            raise ValueError("This encoder has no pooling; SigLIPEncoder(config, pooling=True) has.")
        return self.head(self(patches), patches.real)


def initialise_encoder(model: nn.Module) -> None:
    """Draw the weights of an encoder anew, as SigLIP does: by the sizes of a layer, biases (nearly) 0."""
    for module in model.modules():
        if isinstance(module, MLP):
            for linear in (module.fc1, module.fc2):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.normal_(linear.bias, std=1e-6)
        elif isinstance(module, SelfAttention):
            for linear in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
        elif isinstance(module, CrossAttention):
            for part in (*module.in_proj_weight.chunk(3), module.out_proj.weight):
                nn.init.xavier_uniform_(part)
            nn.init.zeros_(module.in_proj_bias)
            nn.init.zeros_(module.out_proj.bias)
        elif isinstance(module, AttentionPooling):
            nn.init.xavier_uniform_(module.probe)
        elif isinstance(module, SigLIPEncoder):
            nn.init.trunc_normal_(
                module.patch_embedding.weight, std=(3 * module.config.patch_size**2) ** -0.5
            )
            nn.init.zeros_(module.patch_embedding.bias)
            nn.init.normal_(module.position_embedding.weight, std=module.config.hidden_size**-0.5)


def load_siglip(folder: str | Path, dtype: torch.dtype = torch.float32) -> SigLIPEncoder:
    """The picture encoder of a folder in the Hugging Face layout: SigLIP alone, or with its text encoder.

    Args:
        folder: with ``config.json`` and weights in safetensors.
        dtype: of the weights in memory.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the config is no SigLIP's, or the tensors do not fit to it.
    """
    folder = Path(folder)
    told = read_json(folder / "config.json")
    told = told.get("vision_config", told)
    config = _config_from_json(told, folder / "config.json")
    shapes, tensors = read_weights(folder)
    inside = "vision_model." if any(name.startswith("vision_model.") for name in shapes) else ""
    side = config.patch_size
    conv = inside + _PATCHES
    if shapes.get(conv) == (config.hidden_size, 3, side, side):
        shapes[conv] = (config.hidden_size, 3 * side**2)
    with torch.device("meta"):
        encoder = SigLIPEncoder(config, pooling=any(name.startswith(f"{inside}head.") for name in shapes))
    return assemble(
        encoder,
        lambda name: inside + _stored_name(name),
        {name: shape for name, shape in shapes.items() if name.startswith(inside)},
        ((name, each.flatten(1) if name == conv else each) for name, each in tensors),
        dtype,
        str(folder),
    )


def _stored_name(name: str) -> str:
    if name.startswith(("patch_embedding.", "position_embedding.")):
        return f"embeddings.{name}"
    return f"encoder.{name}" if name.startswith("layers.") else name


def _config_from_json(told: dict, where: Path) -> SigLIPConfig:
    if told.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh" or told.get("num_channels", 3) != 3:
        raise ValueError(f"{where} asks for another activation than gelu_pytorch_tanh, or not for 3 colours.")
    if "siglip" not in str(told.get("model_type", "siglip")):
        raise ValueError(f"{where} is of model_type {told['model_type']!r}; expected SigLIP's vision model.")
    image, patch = told.get("image_size", 224), told.get("patch_size", 16)
    require_positive_integer(f"image_size in {where}", image)
    require_positive_integer(f"patch_size in {where}", patch)
    return SigLIPConfig(
        told.get("hidden_size", 768),
        told.get("intermediate_size", 3072),
        told.get("num_hidden_layers", 12),
        told.get("num_attention_heads", 12),
        patch,
        image // patch,
        told.get("layer_norm_eps", 1e-6),
    )
