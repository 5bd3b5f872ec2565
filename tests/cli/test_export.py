"""A run becomes a folder that others open."""

import pytest
import torch
from shell import TEXT, says
from torch.testing import assert_close

from minicpm_lite import ModelConfig
from minicpm_lite.cli import main
from minicpm_lite.data.shards import write_shards
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.templates import MINICPM
from minicpm_lite.language.tokenizer import train_tokenizer
from minicpm_lite.pretrained.checkpoints import load_chat_template, load_special_tokens, save_pretrained
from minicpm_lite.training.sharded_checkpoint import load_weights


@pytest.fixture
def run(at_home):
    tokenizer = train_tokenizer(TEXT, 300)
    write_shards("text", [tokenizer.encode(TEXT).ids], 300, tokenizer)
    steps = [
        "--batch-tokens",
        "64",
        "--sequence-length",
        "16",
        "--steps",
        "3",
        "--warmup",
        "1",
        "--decay",
        "0",
    ]
    assert main(["train", "--config", "tiny.yaml", "--data", "text", "--out", "run", *steps]) == 0
    return at_home / "run"


def test_transformers_opens_what_was_exported(run, at_home, capsys):
    """Without code from elsewhere, and with the tokenizer that the shards were cut with."""
    import transformers

    assert main(["export", "run", "--out", "mine"]) == 0
    ours = load_weights(run / "step-00000003")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("mine").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("mine")
    ids = tokenizer("It is a truth", return_tensors="pt").input_ids
    with torch.no_grad():
        assert_close(theirs(ids).logits, ours(ids), atol=1e-5, rtol=1e-5)
    assert tokenizer.decode(ids[0]) == "It is a truth"
    assert "parameters, with tokenizer.json" in capsys.readouterr().out


def test_a_template_finds_the_tokens_that_it_names(at_home):
    tokenizer = train_tokenizer(TEXT, 290)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    template, named = "{{ bos_token }}{{ eos_token }}", {"bos_token": "<s>", "eos_token": "</s>"}
    model = Decoder(ModelConfig(16, 16, 1, 2, 300))
    save_pretrained(model, "a", tokenizer, chat_template=template, special_tokens=named)
    assert main(["export", "a", "--out", "b"]) == 0
    assert load_special_tokens("b") == named and load_chat_template("b") == template


def test_the_template_of_a_run_is_one_that_is_given_or_lies_in_its_folder(run, at_home, capsys):
    assert main(["export", "run", "--out", "bare"]) == 0
    assert load_chat_template("bare") is None and "chat_template" not in capsys.readouterr().out
    assert main(["export", "run", "--template", "minicpm", "--out", "named"]) == 0
    assert load_chat_template("named") == MINICPM and "chat_template.jinja" in capsys.readouterr().out
    (run / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert main(["export", "run/step-00000003", "--out", "kept"]) == 0
    assert load_chat_template("kept") == "{{ messages[0].content }}"


def test_what_cannot_be_exported(run, at_home, capsys):
    says(capsys, ["export", "nowhere", "--out", "x"], "There is no folder or file nowhere")
    says(capsys, ["export", "run", "--out", "text"], "text exists and holds something")
    says(capsys, ["export", "run", "--out", "x", "--family", "llama"], "it has multipliers")
    says(capsys, ["export", "run", "--out", "x", "--family", "gpt"], "models are written as one of")
    assert not (at_home / "x").exists()
