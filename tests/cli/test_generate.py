"""Texts that go on, and one sentence where they cannot."""

import io
import json

import pytest
from shell import SHAPE, TEXT, says

from minicpm_lite import ModelConfig
from minicpm_lite.cli import main
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.tokenizer import train_tokenizer
from minicpm_lite.language.writing import generate_text
from minicpm_lite.pretrained.checkpoints import load_pretrained, load_tokenizer, save_pretrained


@pytest.fixture
def model(at_home):
    save_pretrained(Decoder(ModelConfig(**SHAPE | {"init_std": 0.5})), "model", train_tokenizer(TEXT, 300))
    return "model"


def written(capsys, *words) -> str:
    assert main(["generate", *words]) == 0
    return capsys.readouterr().out


def test_it_writes_what_the_library_writes(model, capsys):
    (expected,) = generate_text(load_pretrained(model), load_tokenizer(model), ["It is"], 12)
    assert written(capsys, model, "It is", "--max-new-tokens", "12") == f"It is{expected}\n"
    found = json.loads(written(capsys, model, "It is", "--max-new-tokens", "12", "--json"))
    assert found == {"prompt": "It is", "text": expected}


def test_chance_has_a_seed(model, capsys):
    drawn = [
        written(capsys, model, "It", "--max-new-tokens", "9", "--temperature", "1.5", "--seed", seed)
        for seed in ("1", "1", "2")
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_prompt_from_standard_input(model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("It is"))
    assert written(capsys, model, "-", "--max-new-tokens", "3").startswith("It is")


def test_a_stop_string_ends_it(model, capsys):
    whole = json.loads(written(capsys, model, "It is", "--max-new-tokens", "20", "--json"))["text"]
    cut = json.loads(
        written(capsys, model, "It is", "--max-new-tokens", "20", "--stop", whole[3:5], "--json")
    )
    assert cut["text"] == whole[: whole.index(whole[3:5])]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere", "It is"], "There is no folder or file nowhere"),
        (["model", "It is", "--temperature", "-1"], "Invalid value for '--temperature'"),
        (["model", "It is", "--top-p", "1.5"], "top_p is 1.5"),
        (["model", "It is", "--top-p", "0.5"], "--top-k and --top-p say among which tokens chance chooses"),
        (["model", "It is", "--top-k", "5"], "Give a --temperature, such as 0.8"),
        (["model", "", "--max-new-tokens", "5"], "Prompt 0 is empty"),
        (["model", "It is", "--max-new-tokens", "100"], "the model was made to read 64"),
    ],
)
def test_what_cannot_go_on(model, capsys, words, sentence):
    says(capsys, ["generate", *words], sentence)
