"""Whatever a command is given as a model: a run, a checkpoint, a folder, a file."""

import pytest
import torch
from shell import SHAPE

from minicpm_lite import ModelConfig
from minicpm_lite.cli.model import open_model
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.tokenizer import train_tokenizer
from minicpm_lite.pretrained.checkpoints import save_pretrained
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD


@pytest.fixture
def run(tmp_path):
    """A run of four steps with two checkpoints, and its tokenizer."""
    trainer = Trainer(
        Decoder(ModelConfig(**SHAPE)), torch.arange(500) % 300, WSD(0.01, 1, 2, 1), TrainerConfig(2, 8)
    )
    trainer.train(folder=tmp_path / "run", checkpoint_every=2, progress=False)
    train_tokenizer("the cat and the hat", 260).save(str(tmp_path / "run" / "tokenizer.json"))
    return tmp_path / "run", trainer.model


def same(one: Decoder, other: Decoder) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_run_is_its_newest_checkpoint(run):
    folder, model = run
    opened, tokenizer = open_model(str(folder))
    assert same(opened, model) and not opened.training
    assert tokenizer.decode(tokenizer.encode("the hat").ids) == "the hat"
    newest, _ = open_model(str(folder / "step-00000004"))
    older, _ = open_model(str(folder / "step-00000003"))
    assert same(newest, model) and not same(older, model)


def test_a_folder_that_others_write(run, tmp_path):
    folder, model = run
    opened, tokenizer = open_model(str(folder))
    save_pretrained(opened, tmp_path / "saved", tokenizer)
    again, read = open_model(str(tmp_path / "saved"))
    assert same(again, model) and not again.training and read.to_str() == tokenizer.to_str()


def test_what_is_no_model(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder or file nowhere"):
        open_model("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="There is no .*config.json"):
        open_model(str(tmp_path / "empty"))
    (run[0] / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no tokenizer.json"):
        open_model(str(run[0]))
