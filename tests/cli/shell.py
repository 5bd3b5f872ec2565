"""What the tests of the commands share: a small home, and a sentence instead of a traceback."""

import re

from minicpm_lite.cli import main

TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife. " * 40
SHAPE = dict(hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, vocab_size=300,
             max_position_embeddings=64, scale_depth=1.4, dim_model_base=16)  # fmt: skip


def says(capsys, argv, sentence) -> None:
    """The command fails with exit code 2 and this one sentence; a run may have been announced before."""
    capsys.readouterr()
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == "" or argv[0] == "train" and re.fullmatch(r".* steps of .* tokens\.\n", said.out)
    assert said.err.startswith("minicpm-lite: ") and said.err.count("\n") == 1
    assert sentence in said.err


def damage(folder) -> None:
    """Flip a bit in every shard."""
    for path in folder.glob("*.npy"):
        content = bytearray(path.read_bytes())
        content[-7] ^= 1
        path.write_bytes(content)
