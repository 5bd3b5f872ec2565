"""The model that a command is given, with what belongs to it: a run, a folder, a file or a name."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from ..data.shards import TOKENIZER
from ..language.chat import Template, chatml
from ..language.decoder import Decoder
from ..language.templates import CHATML, MINICPM, chat_template
from ..pretrained.checkpoints import (
    load_chat_template,
    load_pretrained,
    load_special_tokens,
    load_tokenizer,
    name_special_tokens,
)
from ..training.run_folder import require_noted
from ..training.sharded_checkpoint import (
    is_checkpoint,
    latest_checkpoint,
    load_weights,
    read_facts,
    run_of,
)

__all__ = ["OpenModel", "open_model"]


@dataclass(frozen=True)
class OpenModel:
    """A model, ready to be used.

    Attributes:
        decoder: its weights.
        tokenizer: its vocabulary.
        template_source: its chat template, in Jinja, if it has one or one was given.
        special_tokens: what that may name.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    template_source: str | None = None
    special_tokens: dict[str, str] | None = None

    @property
    def template(self) -> Template:
        """How it wants a conversation written: its template, or ChatML."""
        return chat_template(self.template_source, self.special_tokens) if self.template_source else chatml


def open_model(place: str, template: str | None = None) -> OpenModel:
    """Load a model and what belongs to it.

    Args:
        place: the folder of a run of ours, of which the newest checkpoint is taken; one of its checkpoints; a
            folder in the Hugging Face layout; a .gguf file; or ``owner/name`` on the hub.
        template: ``chatml``, ``minicpm`` or a file that holds one in Jinja, in place of the model's own; a
            run has one where somebody put a ``chat_template.jinja`` into its folder.

    Raises:
        FileNotFoundError: there is no such place or template, or it lacks a file.
        ValueError: a file is damaged, or holds what this library would compute wrongly.
    """
    given = None if template is None else _template_source(template)
    path = Path(place)
    checkpoint = path if is_checkpoint(path) else latest_checkpoint(path)
    if checkpoint is not None:
        run = run_of(checkpoint)
        if not (run / TOKENIZER).is_file():
            raise FileNotFoundError(
                f"{run} holds no {TOKENIZER}, so what its model reads and writes is not known: its data said "
                "nothing of it. Copy the file there, or give Trainer.train(tokenizer=...) in Python."
            )
        require_noted(run / TOKENIZER, read_facts(checkpoint)["text"])  # it may have been copied elsewhere
        decoder, place = load_weights(checkpoint), run
    else:
        decoder = load_pretrained(place).eval()
    source = load_chat_template(place) if given is None else given
    tokenizer, special_tokens = load_tokenizer(place), load_special_tokens(place)
    if checkpoint is not None:  # a run has no file that names them
        special_tokens = name_special_tokens(tokenizer, decoder.config)
    return OpenModel(decoder, tokenizer, source, special_tokens)


def _template_source(template: str) -> str:
    """The program in Jinja that a name or a file stands for."""
    named = {"chatml": CHATML, "minicpm": MINICPM}
    if template in named:
        return named[template]
    if not Path(template).is_file():
        raise FileNotFoundError(
            f"There is no chat template {template}; expected {', '.join(named)} or a file in Jinja."
        )
    try:
        source = Path(template).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{template} is not UTF-8: {error}") from None
    chat_template(source)  # which refuses what is no program
    return source
