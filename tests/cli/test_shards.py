"""Texts become shards, or a sentence says why not."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shell import TEXT, says
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from minicpm_lite.cli import main
from minicpm_lite.data.shards import Shards
from minicpm_lite.language.tokenizer import train_tokenizer
from minicpm_lite.pretrained.checkpoints import load_tokenizer


def test_texts_become_shards(at_home, capsys):
    argv = ["shards", "novel.txt", "web.jsonl", "--tokenizer", "tokenizer.json", "--out", "made"]
    assert main([*argv, "--vocab-size", "320", "--shard-tokens", "500"]) == 0
    shards = Shards("made", vocab_size=320)
    text = Tokenizer.from_file("tokenizer.json").decode(shards[:].tolist(), skip_special_tokens=False)
    assert text == TEXT + "".join(TEXT[i:] for i in range(5))
    assert f"made: {len(shards):,} tokens" in capsys.readouterr().out
    assert len(list((at_home / "made").glob("*.npy"))) > 1


def test_documents_can_be_ended(at_home):
    token = "Ā"  # of a byte that no text holds
    argv = ["shards", "web.jsonl", "--tokenizer", "tokenizer.json", "--out", "ended", "--end", token]
    assert main(argv) == 0
    assert Shards("ended")[:][-1] == Tokenizer.from_file("tokenizer.json").token_to_id(token)
    assert Shards("ended").end == Shards("ended")[:][-1]


@pytest.mark.parametrize(
    ("tokens", "hint"),
    [
        ([], ""),
        (["</s>"], ' This tokenizer has a token for it: --end "</s>".'),
        (["<|endoftext|>", "<other>"], ' This tokenizer has a token for it: --end "<|endoftext|>".'),
        (["</s>", "<eos>"], ""),
    ],
)
def test_a_warning_where_nothing_ends_a_document(at_home, capsys, tokens, hint):
    learned = train_tokenizer(TEXT, 290)
    learned.add_special_tokens(tokens)
    learned.save("with.json")
    argv = ["shards", "novel.txt", "--tokenizer", "with.json", "--out", "made"]
    assert main(argv) == 0
    warning = "Without --end nothing says where a document ends, and a model will not learn to stop."
    assert capsys.readouterr().err == f"{warning}{hint}\n"
    assert Shards("made").end is None


def test_gzipped_texts_make_the_same_shards(at_home):
    for name in ("novel.txt", "web.jsonl"):
        (at_home / f"{name}.gz").write_bytes(gzip.compress((at_home / name).read_bytes()))
        argv = ["--tokenizer", "tokenizer.json", "--shard-tokens", "500", "--out"]
        assert main(["shards", name, *argv, f"plain-{name}"]) == 0
        assert main(["shards", f"{name}.gz", *argv, f"zipped-{name}"]) == 0
        plain, zipped = (sorted((at_home / f"{kind}-{name}").iterdir()) for kind in ("plain", "zipped"))
        assert [path.read_bytes() for path in plain] == [path.read_bytes() for path in zipped]


def test_a_table_makes_the_same_shards(at_home):
    texts = [json.loads(line)["text"] for line in (at_home / "web.jsonl").read_text().splitlines()]
    pq.write_table(pa.table({"content": texts}), "web.parquet")
    argv = ["--tokenizer", "tokenizer.json", "--out"]
    assert main(["shards", "web.jsonl", *argv, "lines"]) == 0
    assert main(["shards", "web.parquet", "--field", "content", *argv, "rows"]) == 0
    assert Shards("rows").identity() == Shards("lines").identity()


def test_texts_are_read_whole_and_spelt_tokens_stay_text(at_home):
    """What a tokenizer.json orders beside cutting words does not act; a document's end is where one ends."""
    plain = train_tokenizer(TEXT, 290)
    plain.add_special_tokens(["</s>"])
    plain.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 290)])
    plain.save("plain.json")
    plain.enable_truncation(16)
    plain.save("cut.json")
    plain.no_truncation()
    plain.enable_padding(length=4096)
    plain.save("padded.json")
    (at_home / "spelt.txt").write_text(TEXT + "An end </s> is no end.")
    made = []
    for name in ("plain", "cut", "padded"):
        argv = ["shards", "spelt.txt", "--tokenizer", f"{name}.json", "--out", name, "--end", "</s>"]
        assert main(argv) == 0
        made.append((Shards(name)[:].tolist(), Shards(name).tokenizer))
    assert made[0] == made[1] == made[2], "also the tokenizer's checksum"
    ids = made[0][0]
    assert ids.count(290) == 1 and ids[-1] == 290
    assert plain.decode(ids[:-1]) == TEXT + "An end </s> is no end."


def test_ids_may_have_gaps(at_home):
    values = json.loads((at_home / "tokenizer.json").read_text())
    vocab = values["model"]["vocab"]
    vocab[max(vocab, key=vocab.get)] = 400
    (at_home / "gaps.json").write_text(json.dumps(values))
    assert main(["shards", "novel.txt", "--tokenizer", "gaps.json", "--out", "made"]) == 0
    assert Shards("made").vocab_size == 401


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["novel.txt", "./novel.txt"], "novel.txt is given twice"),
        (["novel.pdf"], "novel.pdf is neither .txt nor .jsonl"),
        (["novel.parquet"], "There is no file novel.parquet"),
        (["cut.parquet"], "cut.parquet is not a whole parquet file"),
        (["rows.parquet"], "rows.parquet has no column 'text'; it has content"),
        (["cut.jsonl.gz"], "cut.jsonl.gz is not a whole gzip file"),
        (["none.txt"], "There is no file none.txt"),
        (["novel.txt", "--tokenizer", "none.json"], "There is no tokenizer at none.json"),
        (["novel.txt", "--tokenizer", "tiny.yaml"], "tiny.yaml is not a tokenizer.json"),
        (["novel.txt", "--end", "<nothing>"], "The tokenizer has no token '<nothing>'"),
        (
            ["web.jsonl", "--field", "content"],
            "Line 1 of web.jsonl is no JSON object with a text under 'content'",
        ),
        (["novel.txt", "--vocab-size", "100"], "The tokenizer gives ids up to 299 and vocab_size is 100"),
        (["novel.txt", "--out", "one"], "one already holds something"),
        (["latin.txt"], "latin.txt is not UTF-8 text: byte 3"),
        (["latin.jsonl"], "latin.jsonl is not UTF-8 text: byte 175014 cannot be read"),
        (["half.jsonl"], "Line 2 of half.jsonl holds half a character, U+D83D"),
        (["deep.jsonl"], "Line 1 of deep.jsonl is no JSON object with a text under 'text'"),
        (["number.jsonl"], "Line 1 of number.jsonl is no JSON object with a text under 'text'"),
    ],
)
def test_texts_that_cannot_be_cut(at_home, capsys, change, sentence):
    (at_home / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    good = b'{"text": "the cat sat on the mat"}\n'
    (at_home / "latin.jsonl").write_bytes(good * 5000 + b'{"text": "bad \xff"}\n')
    (at_home / "half.jsonl").write_bytes(good + b'{"text": "cut emoji \\ud83d"}\n')
    (at_home / "deep.jsonl").write_text("[" * 100_000)
    (at_home / "cut.jsonl.gz").write_bytes(gzip.compress(good * 5000)[:-20])
    pq.write_table(pa.table({"content": [TEXT]}), "rows.parquet")
    (at_home / "cut.parquet").write_bytes((at_home / "rows.parquet").read_bytes()[:-20])
    (at_home / "number.jsonl").write_text('{"text": 5}')
    argv = ["shards", "--tokenizer", "tokenizer.json", "--out", "made"]
    says(capsys, [*argv, *change], sentence)
    assert not (at_home / "made").exists()


@pytest.mark.parametrize("given", ["model", "model/tokenizer.json"])
def test_tokens_that_a_model_s_folder_adds_are_read(at_home, given):
    """As `generate` and `export` of the same folder read them."""
    learned = train_tokenizer(TEXT, 290)
    (at_home / "model").mkdir()
    learned.save("model/tokenizer.json")
    first = learned.get_vocab_size()
    listed = {str(first): {"content": "truth univers"}, str(first + 1): {"content": "<end>", "special": True}}
    settings = {"added_tokens_decoder": listed, "eos_token": "<end>"}
    (at_home / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert main(["shards", "novel.txt", "--tokenizer", given, "--end", "<end>", "--out", "made"]) == 0
    own = load_tokenizer("model")
    assert Shards("made")[:].tolist() == [*own.encode(TEXT).ids, first + 1] and first in Shards("made")[:]
    assert load_tokenizer("made").to_str() == own.to_str()
    learned.save("alone.json")  # of a name by itself
    assert main(["shards", "novel.txt", "--tokenizer", "alone.json", "--out", "alone"]) == 0
    assert first not in Shards("alone")[:]
