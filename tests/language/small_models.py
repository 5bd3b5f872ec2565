"""Small models of every kind and inputs for them, which the tests of this folder share."""

from dataclasses import replace
from tempfile import TemporaryDirectory

import torch

from minicpm_lite.config import LatentAttentionConfig, MixtureConfig, ModelConfig
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.layers import replace_linears
from minicpm_lite.language.tokenizer import train_tokenizer
from minicpm_lite.pretrained.checkpoints import save_pretrained

MULTIPLIERS = dict(scale_emb=12, scale_depth=1.4, dim_model_base=32, init_std=0.1)
PLAIN = {
    "grouped, tied": ModelConfig(
        64, 160, 3, 4, 99, num_key_value_heads=2, max_position_embeddings=64, **MULTIPLIERS
    ),
    "grouped, untied": ModelConfig(
        64, 160, 3, 4, 99, num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False, **MULTIPLIERS,
    ),
    "multi-head, tied": ModelConfig(96, 256, 2, 6, 120, max_position_embeddings=64, **MULTIPLIERS),
    "multi-head, untied": ModelConfig(
        48, 64, 5, 3, 50, max_position_embeddings=64, tie_word_embeddings=False, rope_theta=500.0, **MULTIPLIERS,
    ),
    "no multipliers": ModelConfig(
        64, 160, 3, 4, 99, num_key_value_heads=2, max_position_embeddings=64, init_std=0.1
    ),
}  # fmt: skip
GROUPED, UNTIED = PLAIN["grouped, tied"], PLAIN["grouped, untied"]
LATENT = ModelConfig(
    64, 160, 3, 4, 99, head_dim=24, max_position_embeddings=64, latent_attention=LatentAttentionConfig(24, 20, 16, 8, 12),
    **MULTIPLIERS,
)  # fmt: skip
FIVE_EXPERTS = MixtureConfig(num_experts=5, num_experts_per_token=2)
SPARSE = ModelConfig(32, 48, 2, 4, 50, max_position_embeddings=64, init_std=0.3, mixture=FIVE_EXPERTS)
DENSE = replace(SPARSE, mixture=None, scale_emb=12, scale_depth=1.4, dim_model_base=16, init_std=0.1)
FAMILIES = {"grouped": GROUPED, "untied": UNTIED, "latent": LATENT, "experts": SPARSE}
WIDE = {  # all rows are multiples of 256, which the blocks of all packed types divide
    name: replace(
        config, hidden_size=256, intermediate_size=256, num_hidden_layers=2, head_dim=64, dim_model_base=128,
        latent_attention=config.latent_attention and LatentAttentionConfig(256, 256, 48, 16, 64),
    )
    for name, config in FAMILIES.items()
}  # fmt: skip

# Models that write: with weights so large, and tables apart, that what they write depends on what they read.
SHAPE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=300,
    max_position_embeddings=96, scale_emb=4, scale_depth=1.4, dim_model_base=16, init_std=0.3,
    tie_word_embeddings=False,
)  # fmt: skip
WRITERS = {
    "multi-head": ModelConfig(**SHAPE),
    "grouped": ModelConfig(**SHAPE, num_key_value_heads=2),
    "latent": ModelConfig(**SHAPE, latent_attention=LatentAttentionConfig(24, 16, 8, 8, 8)),
    "mixture": ModelConfig(**SHAPE, mixture=MixtureConfig(4, 2)),
}
WRITER = WRITERS["grouped"]
TEXT = (
    "It is a truth universally acknowledged, that a single man — 单身汉 — must be in want of a wife. 🙂\n" * 4
)
TOKENIZER = train_tokenizer(TEXT, 300)


def make_model(config: ModelConfig, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones would hide a norm that is not applied
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def make_ids(config: ModelConfig, batch: int = 2, tokens: int = 17) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(1))


def changed_inside(config: ModelConfig) -> Decoder:
    """A decoder in which a layer of the same names and shapes computes something else."""

    class Halved(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    model = make_model(config)
    replace_linears(model, lambda name, linear: Halved(linear.in_features, linear.out_features, bias=False))
    return model


def with_dropout(config: ModelConfig) -> Decoder:
    """A decoder in training mode that forgets half of what enters its feed-forward networks."""
    model = make_model(config)
    replace_linears(
        model,
        lambda name, linear: WithDropout(linear) if name.endswith("down_proj") else linear,
    )
    return model.train()


class WithDropout(torch.nn.Module):
    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    @property
    def weight(self) -> torch.Tensor:
        return self.linear.weight

    def forward(self, x):
        return self.linear(torch.nn.functional.dropout(x, 0.5, self.training))


def opened_by_transformers(model: Decoder, family: str) -> torch.nn.Module:
    """The same weights in transformers, by way of a saved folder."""
    from transformers import AutoModelForCausalLM

    with TemporaryDirectory() as folder:
        save_pretrained(model, f"{folder}/model", model_type=family)
        return AutoModelForCausalLM.from_pretrained(f"{folder}/model").eval()


def granite(model: Decoder) -> torch.nn.Module:
    """The same weights in transformers' Granite, which has all of MiniCPM's multipliers."""
    return opened_by_transformers(model, "granite")


class Counted:
    """Counts the tokens that a model reads while it runs."""

    def __init__(self, model: Decoder) -> None:
        self.tokens = 0
        model.embed_tokens.register_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        self.tokens += inputs[0].numel()

    def since(self) -> int:
        """How many there were since the last question."""
        tokens, self.tokens = self.tokens, 0
        return tokens


class Says(Decoder):
    """In place of a decoder: writes the given tokens, whatever the prompt; one list for each row."""

    def __init__(self, *rows: list[int], config: ModelConfig = WRITER) -> None:
        super().__init__(config)
        self.rows, self.step = rows, 0

    def forward(self, ids, context=None, last_only=False):
        tokens = torch.tensor([row[self.step] if self.step < len(row) else 0 for row in self.rows])
        self.step += 1
        return torch.nn.functional.one_hot(tokens, self.config.vocab_size).float()[:, None]
