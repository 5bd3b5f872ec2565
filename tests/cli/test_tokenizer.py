"""A vocabulary from one's own texts."""

import json

import pytest
from shell import TEXT, says
from tokenizers import Tokenizer

from minicpm_lite.cli import main


def test_a_vocabulary_is_learned(at_home, capsys):
    assert main(["tokenizer", "novel.txt", "web.jsonl", "--out", "made.json", "--vocab-size", "300"]) == 0
    made = Tokenizer.from_file("made.json")
    assert made.get_vocab_size() == 300 and made.token_to_id("<|endoftext|>") == 299
    assert made.decode(made.encode(TEXT + "帽").ids) == TEXT + "帽"
    assert capsys.readouterr().out.startswith("made.json: 300 ids, <|endoftext|> among them, from ")


def test_a_small_text_says_how_many_ids_it_gave(at_home, capsys):
    (at_home / "small.txt").write_text("the cat")
    assert main(["tokenizer", "small.txt", "--out", "made.json", "--vocab-size", "1000"]) == 0
    ids = Tokenizer.from_file("made.json").get_vocab_size()
    assert ids < 1000
    said = capsys.readouterr()
    assert said.out.startswith(f"made.json: {ids} ids") and "--vocab-size 1000" in said.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["none.txt", "--out", "made.json"], "There is no file none.txt"),
        (["novel.txt", "--out", "tokenizer.json"], "tokenizer.json exists; nothing is overwritten"),
        (["novel.txt", "--out", "made.json", "--vocab-size", "100"], "Invalid value for '--vocab-size'"),
        (["novel.txt", "--out", "made.json", "--vocab-size", "256"], "Invalid value for '--vocab-size'"),
        (["novel.txt", "--out", "no/such/made.json"], "made.json could not be written: No such file"),
        (["empty.txt", "--out", "made.json"], "holds no text"),
        (["novel.txt", "--out", "made.json", "--end", "th"], "--end is 'th', which texts hold, too"),
        *(
            (["novel.txt", "--out", "made.json", "--end", end], f"--end is {end!r}. Give a token of several")
            for end in ("", " ", "\n", "t", "—", "  ")
        ),
        (["broken.jsonl", "--out", "made.json"], "Line 2 of broken.jsonl is no JSON object"),
    ],
)
def test_what_cannot_be_learned_from(at_home, capsys, words, sentence):
    (at_home / "empty.txt").write_text("")
    (at_home / "broken.jsonl").write_text(json.dumps({"text": "a"}) + "\n{\n")
    says(capsys, ["tokenizer", *words], sentence)
    assert not (at_home / "made.json").exists()
