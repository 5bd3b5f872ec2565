"""The model and the tokenizer that a command is given: a run, a checkpoint, a folder, a file, a name."""

from pathlib import Path

from tokenizers import Tokenizer

from ..language.decoder import Decoder
from ..pretrained.checkpoints import load_pretrained, load_tokenizer
from ..training.sharded_checkpoint import is_checkpoint, latest_checkpoint, load_weights

__all__ = ["open_model"]


def open_model(place: str) -> tuple[Decoder, Tokenizer]:
    """Load a model and its tokenizer.

    Args:
        place: the folder of a run of ours, of which the newest checkpoint is taken; one of its checkpoints; a
            folder in the Hugging Face layout; a .gguf file; or ``owner/name`` on the hub.

    Raises:
        FileNotFoundError: there is no such place, or it lacks a file.
        ValueError: a file is damaged, or holds what this library would compute wrongly.
    """
    path = Path(place)
    checkpoint = path if is_checkpoint(path) else latest_checkpoint(path)
    if checkpoint is None:
        return load_pretrained(place).eval(), load_tokenizer(place)
    model = load_weights(checkpoint)
    return model, load_tokenizer(checkpoint.parent)
