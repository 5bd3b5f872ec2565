"""The model that a command is given, with what belongs to it: a run, a folder, a file or a name."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from ..data.shards import TOKENIZER
from ..language.chat import Template, chatml
from ..language.decoder import Decoder
from ..language.templates import chat_template
from ..pretrained.checkpoints import (
    load_chat_template,
    load_pretrained,
    load_special_tokens,
    load_tokenizer,
)
from ..training.run_folder import require_noted
from ..training.sharded_checkpoint import is_checkpoint, latest_checkpoint, load_weights, read_facts

__all__ = ["OpenModel", "open_model"]


@dataclass(frozen=True)
class OpenModel:
    """A model, ready to be used.

    Attributes:
        decoder: its weights.
        tokenizer: its vocabulary.
        template_source: its own chat template, in Jinja, if it has one.
        special_tokens: what that may name.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    template_source: str | None = None
    special_tokens: dict[str, str] | None = None

    @property
    def template(self) -> Template:
        """How it wants a conversation written: its own template, or ChatML."""
        return chat_template(self.template_source, self.special_tokens) if self.template_source else chatml


def open_model(place: str) -> OpenModel:
    """Load a model and what belongs to it.

    Args:
        place: the folder of a run of ours, of which the newest checkpoint is taken; one of its checkpoints; a
            folder in the Hugging Face layout; a .gguf file; or ``owner/name`` on the hub.

    Raises:
        FileNotFoundError: there is no such place, or it lacks a file.
        ValueError: a file is damaged, or holds what this library would compute wrongly.
    """
    path = Path(place)
    checkpoint = path if is_checkpoint(path) else latest_checkpoint(path)
    if checkpoint is not None:
        run = checkpoint.parent
        if not (run / TOKENIZER).is_file():
            raise FileNotFoundError(
                f"{run} holds no {TOKENIZER}, so what its model reads and writes is not known: its data said "
                "nothing of it. Copy the file there, or give Trainer.train(tokenizer=...) in Python."
            )
        require_noted(run / TOKENIZER, read_facts(checkpoint)["text"])  # it may have been copied elsewhere
        return OpenModel(load_weights(checkpoint), load_tokenizer(run))
    decoder = load_pretrained(place).eval()
    return OpenModel(decoder, load_tokenizer(place), load_chat_template(place), load_special_tokens(place))
