"""``{model-table}``: the released models, read from the library's configurations, counted by its decoder."""

import torch
from sphinx.util.docutils import SphinxDirective

from minicpm_lite import list_configs, load_config
from minicpm_lite.language.decoder import Decoder

from .tables import table

HEADERS = [
    "Configuration", "Parameters", "Without embeddings", "Layers", "Width", "FFN",
    "Heads q / kv", "Head size", "Vocabulary", "Context", "Tied",
]  # fmt: skip


def count(config) -> tuple[str, str]:
    """All parameters, and those without embeddings, counted on the meta device: shapes without numbers."""
    try:
        with torch.device("meta"):
            decoder = Decoder(config)
    except (NotImplementedError, ValueError):  # a variant whose chapter is not written yet
        return "–", "–"
    return f"{decoder.num_parameters(embeddings=True):,}", f"{decoder.num_parameters(embeddings=False):,}"


def row(name: str) -> list[str]:
    """One model's cells."""
    config = load_config(name)
    latent = config.latent_attention
    heads = f"{config.num_attention_heads} / {'latent' if latent else config.num_key_value_heads}"
    head = f"{latent.qk_nope_head_dim} + {latent.qk_rope_head_dim}" if latent else f"{config.head_dim}"
    mixture = f" × {config.mixture.num_experts}" if config.mixture else ""
    return [
        f"`{name}`", *count(config), f"{config.num_hidden_layers}", f"{config.hidden_size:,}",
        f"{config.intermediate_size:,}{mixture}", heads, head, f"{config.vocab_size:,}",
        f"{config.max_position_embeddings:,}", "yes" if config.tie_word_embeddings else "no",
    ]  # fmt: skip


class ModelTable(SphinxDirective):
    """``{model-table}``: one row for each released model; the book's own ``lite-*`` models are left out."""

    def run(self):
        self.env.note_reread()
        rows = [row(name) for name in list_configs() if not name.startswith("lite-")]
        return [table(self, HEADERS, rows, numeric=set(range(1, len(HEADERS) - 1)), name="models")]


def setup(app):
    app.add_directive("model-table", ModelTable)
