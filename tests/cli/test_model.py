"""Whatever a command is given as a model: a run, a checkpoint, a folder, a file."""

import json
import shutil

import pytest
import torch
from shell import SHAPE
from tokenizers import processors

from minicpm_lite import ModelConfig, cli
from minicpm_lite.cli.model import open_model
from minicpm_lite.data.shards import write_shards
from minicpm_lite.language.chat import chatml, encode_chat
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.tokenizer import train_tokenizer
from minicpm_lite.pretrained.checkpoints import load_pretrained, save_pretrained
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.sharded_checkpoint import load_weights
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
    opened = open_model(str(folder))
    assert same(opened.decoder, model) and not opened.decoder.training
    assert opened.tokenizer.decode(opened.tokenizer.encode("the hat").ids) == "the hat"
    newest, older = (open_model(str(folder / f"step-0000000{step}")).decoder for step in (4, 3))
    assert same(newest, model) and not same(older, model)
    assert opened.template is chatml


def test_a_checkpoint_beside_another_runs_tokenizer_is_refused(tmp_path):
    """As where the best checkpoint was copied into the folder of the next attempt."""
    for number, text in enumerate(("the cat and the hat " * 9, "a dog or a log or a fog " * 9)):
        tokenizer = train_tokenizer(text, 270)
        shards = write_shards(tmp_path / f"shards-{number}", [tokenizer.encode(text).ids] * 9, 300, tokenizer)
        model = Decoder(ModelConfig(**SHAPE))
        trainer = Trainer(model, shards, WSD(0.01, 1, 2, 1), TrainerConfig(2, 8))
        trainer.train(
            folder=tmp_path / f"run-{number}",
            progress=False,
            tokenizer=tmp_path / f"shards-{number}" / "tokenizer.json",
        )
    assert same(
        open_model(str(tmp_path / "run-0")).decoder, load_weights(tmp_path / "run-0" / "step-00000004")
    )
    shutil.copytree(tmp_path / "run-0" / "step-00000004", tmp_path / "run-1" / "step-00000009")
    with pytest.raises(ValueError, match="is not the tokenizer that made the ids of this run"):
        open_model(str(tmp_path / "run-1" / "step-00000009"))


def test_a_folder_that_others_write(run, tmp_path):
    folder, model = run
    opened = open_model(str(folder))
    opened.tokenizer.add_special_tokens(["<s>"])
    source = "{{ bos_token }}{% for message in messages %}{{ message.content }}!{% endfor %}"
    save_pretrained(opened.decoder, tmp_path / "saved", opened.tokenizer, chat_template=source)
    settings = tmp_path / "saved" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"bos_token": {"content": "<s>"}}))
    again = open_model(str(tmp_path / "saved"))
    assert same(again.decoder, model) and not again.decoder.training
    assert again.tokenizer.to_str() == opened.tokenizer.to_str() and again.template_source == source
    assert again.template([{"role": "user", "content": "hat"}]) == "<s>hat!"


@pytest.mark.filterwarnings("ignore:The model ends texts at")
def test_a_template_in_a_run_names_its_start_and_end(tmp_path):
    """Nothing else in its folder does; and what is exported asks in the same tokens."""
    tokenizer = train_tokenizer("the cat and the hat", 260)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    start, end = map(tokenizer.token_to_id, ("<s>", "</s>"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", start)])
    model = Decoder(ModelConfig(**SHAPE, eos_token_id=(3, end)))
    trainer = Trainer(model, torch.arange(500) % 300, WSD(0.01, 1, 2, 1), TrainerConfig(2, 8))
    trainer.train(folder=tmp_path / "run", progress=False)
    tokenizer.save(str(tmp_path / "run" / "tokenizer.json"))
    source = "{{ bos_token + 'the ' }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    (tmp_path / "run" / "chat_template.jinja").write_text(source)
    opened = open_model(str(tmp_path / "run"))
    assert opened.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    talk = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "hat"}]
    expected = tokenizer.encode("the cat</s>hat</s>").ids
    assert expected.count(end) == 2 and expected[0] == start
    assert encode_chat(opened.tokenizer, opened.template, talk) == expected
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    again = open_model(str(tmp_path / "out"))
    assert encode_chat(again.tokenizer, again.template, talk) == expected


def test_what_is_no_model(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder or file nowhere"):
        open_model("nowhere")
    with pytest.raises(FileNotFoundError, match="lite-1m. It is the name of a shape, without weights"):
        open_model("lite-1m")
    for place in (run[0], run[0] / "step-00000004"):
        with pytest.raises(
            FileNotFoundError, match="config.json; .* This is a run of the trainer: `minicpm-l"
        ):
            load_pretrained(place)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="There is no .*config.json"):
        open_model(str(tmp_path / "empty"))
    (run[0] / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no tokenizer.json"):
        open_model(str(run[0]))


def test_a_link_to_a_checkpoint_has_the_tokenizer_of_its_run(run, tmp_path, monkeypatch):
    folder, model = run
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "best").symlink_to(folder / "step-00000004")
    train_tokenizer("zzz qqq www", 262).save(str(tmp_path / "models" / "tokenizer.json"))
    own = open_model(str(folder)).tokenizer.to_str()
    assert open_model(str(tmp_path / "models" / "best")).tokenizer.to_str() == own
    monkeypatch.chdir(folder / "step-00000004")
    assert open_model(".").tokenizer.to_str() == own
