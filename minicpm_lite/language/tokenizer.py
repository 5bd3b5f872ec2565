"""Byte-level BPE for the book's small models, trained by the `tokenizers` package."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = ["train_tokenizer"]


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE vocabulary from a text. Any string round-trips; there is no unknown token.

    Raises:
        ValueError: fewer entries than the 256 bytes that every vocabulary holds.

    >>> tokenizer = train_tokenizer("the cat and the hat", vocab_size=260)
    >>> tokenizer.decode(tokenizer.encode("the hat 帽").ids)
    'the hat 帽'
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size is {vocab_size}; the 256 bytes alone take 256 entries.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer
