"""Documents of text files: marks and blank lines are none, and what cannot be read is named by line or byte."""

import gzip
import json
import sys
import tracemalloc
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from minicpm_lite.data import documents as module
from minicpm_lite.data.documents import encoded, read_documents, require_texts
from minicpm_lite.language.tokenizer import fast_tokenizer, split_words, train_tokenizer

TEXT = "It is a truth universally acknowledged. " * 3


def test_marks_and_blank_lines_are_no_text(tmp_path):
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode().replace(b" ", b"\r\n"))
    rows = [json.dumps({"text": TEXT}).encode(), b"", b"  ", json.dumps({"text": "\ufeff"}).encode()]
    (tmp_path / "mark.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(rows))
    found = [list(read_documents(tmp_path / name, "text")) for name in ("mark.txt", "mark.jsonl")]
    assert found == [[TEXT.replace(" ", "\n")], [TEXT, "\ufeff"]]


def test_another_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "one"}\n\n{"content": "two"}')
    assert list(read_documents(tmp_path / "a.jsonl", "content")) == ["one", "two"]
    with pytest.raises(ValueError, match="Line 1 of .*a.jsonl is no JSON object with a text under 'text'"):
        list(read_documents(tmp_path / "a.jsonl", "text"))


def test_files_are_asked_for_before_any_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    require_texts([tmp_path / "a.txt"])
    with pytest.raises(FileNotFoundError, match="There is no file .*b.txt"):
        require_texts([tmp_path / "a.txt", tmp_path / "b.txt"])
    with pytest.raises(ValueError, match="a.txt is given twice"):
        require_texts([tmp_path / "a.txt", tmp_path / "x" / ".." / "a.txt"])
    for name in ("c.pdf", "d.gz", "e.parquet.gz"):
        with pytest.raises(ValueError, match=f"{name} is neither .txt nor .jsonl"):
            require_texts([tmp_path / name])


def test_each_file_is_looked_up_once(tmp_path, monkeypatch):
    """Not once for each of the others, of which there may be thousands."""
    looked_up, resolve = [], Path.resolve
    monkeypatch.setattr(Path, "resolve", lambda path: looked_up.append(path) or resolve(path))
    files = [tmp_path / f"{number}.txt" for number in range(20)]
    for file in files:
        file.touch()
    require_texts(files)
    assert looked_up == files


def test_an_empty_gzip_file_is_none(tmp_path):
    (tmp_path / "a.jsonl.gz").touch()
    with pytest.raises(
        ValueError, match="a.jsonl.gz is not a whole gzip file .it is empty.. It may be trunc"
    ):
        list(read_documents(tmp_path / "a.jsonl.gz", "text"))


PLACES = dict(
    good=b'{"text": "one"}\n\n{"text": "two"}', latin=b'{"text": "on"}\n{"text": "\xe9"}', cut=b'{"text"'
)


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_gzipped_files_are_read_as_what_was_zipped(tmp_path, name, kind):
    """Texts, and what is said of lines and bytes that cannot be read."""
    plain, zipped = tmp_path / f"{name}.{kind}", tmp_path / f"{name}.{kind}.gz"
    plain.write_bytes(PLACES[name])
    zipped.write_bytes(gzip.compress(PLACES[name]))

    def said(path):
        try:
            return list(read_documents(path, "text"))
        except ValueError as error:
            return str(error).replace(str(path), "PATH")

    require_texts([zipped])
    assert said(zipped) == said(plain)


@settings(max_examples=100, deadline=None)
@given(kept=st.integers(1, 200), flipped=st.none() | st.integers(0, 200))
def test_damaged_gzip_is_a_sentence(tmp_path_factory, kept, flipped):
    whole = gzip.compress("".join(json.dumps({"text": f"{i * 7919}"}) + "\n" for i in range(99)).encode())
    damaged = bytearray(whole[: len(whole) - kept])
    if flipped is not None:
        damaged = bytearray(whole)
        damaged[flipped] ^= 1
    path = tmp_path_factory.mktemp("x") / "a.jsonl.gz"
    path.write_bytes(damaged)
    try:
        found = list(read_documents(path, "text"))
    except ValueError as error:
        assert "is not a whole gzip file" in str(error) or str(error).startswith(
            ("Line ", f"{path} is not UTF")
        )
    else:  # a flip in the header's time or name
        assert found == [f"{i * 7919}" for i in range(99)]


def test_texts_are_cut_in_order_whatever_the_batch(monkeypatch):
    tokenizer = train_tokenizer(TEXT, 280)
    texts = [TEXT[start : start + 7 * start] for start in range(40)]
    expected = [tokenizer.encode(text).ids + [3] for text in texts]
    for characters in (1, 50, 1 << 22):
        monkeypatch.setattr(module, "_BATCH_CHARACTERS", characters)
        assert list(encoded(iter(texts), tokenizer, end=3)) == expected
    assert list(encoded(texts, tokenizer, end=None)) == [ids[:-1] for ids in expected]


def sentencepiece() -> Tokenizer:
    """A tokenizer as of MiniCPM: no words, a blank before whatever comes first, bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    letters = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))],
    )
    tokenizer.train_from_iterator([word.replace(" ", "▁") for word in split_words(TEXT)], letters)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def with_a_blank_in_front() -> Tokenizer:
    tokenizer = train_tokenizer(TEXT, 280)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def stripping() -> Tokenizer:
    tokenizer = train_tokenizer(TEXT, 280)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    return tokenizer


def lines_and_words() -> Tokenizer:
    """Learned across words, so that tokens go over blanks and line ends."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT + "\n" + TEXT], letters)
    return tokenizer


@pytest.mark.parametrize(
    "kind",
    [partial(train_tokenizer, TEXT, 280), sentencepiece, with_a_blank_in_front, stripping, lines_and_words],
)
@settings(max_examples=40, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(
            [
                "It is",
                " a truth",
                "\n",
                " ",
                ".",
                "\n\n",
                "，",
                "é",
                "e\u0301",
                "</s>",
                "truth",
                "\r\n",
                "话说。",
            ]
            + ["\n\u3000\u3000"]
        ),
        max_size=80,
    ).map("".join),
    piece=st.integers(1, 40),
    around=st.integers(8, 40),
)
def test_a_long_text_is_cut_in_pieces_with_the_same_tokens(kind, text, piece, around):
    tokenizer = kind()
    tokenizer.add_special_tokens(["</s>"])
    end = tokenizer.token_to_id("</s>")
    (whole,) = encoded([text], tokenizer, end)
    with patch.multiple(module, _PIECE_CHARACTERS=piece, _AROUND=around):
        pieces = list(encoded([text], tokenizer, end))
    assert sum(pieces, []) == whole


def test_a_long_text_takes_little_memory(monkeypatch):
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(module, "_AROUND", 50)
    for kind in (partial(train_tokenizer, TEXT, 280), sentencepiece):
        pieces = list(encoded([TEXT * 200, "It"], kind(), None))
        assert len(pieces) == 25 and max(map(len, pieces)) < 1500


@pytest.mark.parametrize("between", ["\n\u3000\u3000", "\n\n", ""])
def test_texts_without_blanks_are_cut_too(monkeypatch, between):
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(module, "_AROUND", 50)
    text = ("话说天下大势，分久必合，合久必分。" + between) * 500
    for kind in (partial(train_tokenizer, TEXT, 280), sentencepiece):
        pieces = list(encoded([text], kind(), None))
        assert len(pieces) >= 8 and sum(pieces, []) == kind().encode(text).ids


def test_control_tokens_that_texts_spell_are_text():
    """Special or not; the one that ends a document stands at its end alone."""
    tokenizer, plain = train_tokenizer(TEXT, 280), train_tokenizer(TEXT, 280)
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.add_tokens(["<|end|>", "<think>"])
    texts = ["It says </s> and <|end|>", "<think>", "It is a truth"]
    expected = [plain.encode(text).ids + [281] for text in texts]
    assert list(encoded(texts, tokenizer, end=tokenizer.token_to_id("<|end|>"))) == expected


def test_nothing_of_a_text_is_left_out():
    lacking = Tokenizer(models.BPE())
    lacking.pre_tokenizer, lacking.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    lacking.train_from_iterator([TEXT], trainers.BpeTrainer(show_progress=False))
    with pytest.raises(ValueError, match="The vocabulary has no token for 'é', which a text holds"):
        list(encoded([TEXT, TEXT[:9] + "é"], lacking, None))


def test_a_start_token_stands_where_it_stands_before_a_prompt():
    tokenizer = train_tokenizer(TEXT, 280)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    start, end = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    tokenizer.post_processor = TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", start), ("</s>", end)]
    )
    texts = [TEXT, "", "It is <s> and </s> in a text."]
    found = list(encoded(texts, tokenizer, end))
    for text, ids in zip(texts, found, strict=True):
        assert (ids[0], ids[-1]) == (start, end) and {start, end}.isdisjoint(ids[1:-1])
        assert tokenizer.decode(ids[1:-1]) == text
        assert fast_tokenizer(tokenizer).encode(text).ids[0] == start


@pytest.mark.parametrize("end", ["\n", "—", "the", "</s>"])
def test_an_end_that_a_text_holds_is_refused(end):
    """A text would be two to whoever reads; only what is a control token, however it is spelt, is never in one."""
    tokenizer = train_tokenizer("the cat — and the hat\n" * 20, 290)
    if end != "the":
        tokenizer.add_tokens([end])
    end_id = tokenizer.token_to_id(end)
    texts = ["a cat", f"a cat{end} and a hat"]
    if end == "</s>":
        found = list(encoded(texts, tokenizer, end_id))
        assert [(ids.count(end_id), ids[-1]) for ids in found] == [(1, end_id)] * 2
    else:
        with pytest.raises(ValueError, match="A text holds the token that is to end documents, .* as two"):
            list(encoded(texts, tokenizer, end_id))
        assert list(encoded(texts[:1], tokenizer, end_id)) == [[*tokenizer.encode("a cat").ids, end_id]]


def test_a_start_token_that_is_the_end_too_is_none_of_the_text():
    tokenizer = train_tokenizer(TEXT, 280)
    tokenizer.add_special_tokens(["<s>"])
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", start)])
    assert list(encoded(["a"], tokenizer, start)) == [[start, *tokenizer.encode("a").ids[1:], start]]


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ("one text", "texts is one string"),
        (["a", "b \ud800"], r"unpaired surrogate, U\+D800"),
        (["a", 5], "type int"),
    ],
)
def test_what_is_no_list_of_texts_is_not_encoded(texts, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        list(encoded(texts, train_tokenizer(TEXT, 280), None))


def test_a_corpus_is_not_held_in_memory(monkeypatch):
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 1 << 12)
    tokenizer = train_tokenizer(TEXT, 280)
    tracemalloc.start()
    tokens = sum(len(ids) for ids in encoded((TEXT * 3 for _ in range(1000)), tokenizer, end=None))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tokens > 50_000 and peak < 500_000


# Tables


def table(path, texts, kind=None, **options) -> None:
    texts = pa.array(texts, kind or pa.string())
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, **options)


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text(max_size=30), max_size=20),
    kind=st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]),
    rows=st.integers(1, 20),
    compression=st.sampled_from(["NONE", "SNAPPY", "ZSTD"]),
)
def test_a_table_has_a_document_in_each_row(tmp_path_factory, texts, kind, rows, compression):
    path = tmp_path_factory.mktemp("x") / "a.parquet"
    table(path, texts, kind, row_group_size=rows, compression=compression)
    require_texts([path])
    assert list(read_documents(path, "text")) == texts


@pytest.mark.parametrize(
    ("texts", "kind", "field", "sentence"),
    [
        (["one", None, "three"], pa.string(), "text", "Row 2 of .*a.parquet has no text under 'text'"),
        ([1, 2], pa.int64(), "text", "Row 1 of .*a.parquet has no text under 'text'"),
        ([["one"]], pa.list_(pa.string()), "text", "Row 1 of .*a.parquet has no text under 'text'"),
        ([b"one"], pa.binary(), "text", "Row 1 of .*a.parquet has no text under 'text'"),
        (["one"], pa.string(), "content", "a.parquet has no column 'content'; it has id, text"),
    ],
)
def test_rows_without_a_text(tmp_path, texts, kind, field, sentence):
    table(tmp_path / "a.parquet", texts, kind)
    with pytest.raises(ValueError, match=sentence):
        list(read_documents(tmp_path / "a.parquet", field))


def test_a_table_with_two_columns_of_the_name(tmp_path):
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet has 2 columns 'text'; one holds the texts"):
        list(read_documents(tmp_path / "a.parquet", "text"))


def test_bytes_of_a_table_that_are_no_text(tmp_path):
    wrong = pa.array(["one", "tw\xf6"], pa.string()).to_pylist()
    raw = pa.array([text.encode("latin-1") for text in wrong], pa.binary())
    pq.write_table(
        pa.table({"text": pa.Array.from_buffers(pa.string(), 2, raw.buffers())}), tmp_path / "a.parquet"
    )
    with pytest.raises(ValueError, match="a.parquet is not UTF-8 text in one of the rows behind row 0"):
        list(read_documents(tmp_path / "a.parquet", "text"))


@settings(max_examples=150, deadline=None)
@given(kept=st.integers(0, 500), flipped=st.none() | st.integers(0, 10_000))
def test_a_damaged_table_is_a_sentence(tmp_path_factory, kept, flipped):
    path = tmp_path_factory.mktemp("x") / "a.parquet"
    table(path, [f"{i * 7919}" for i in range(99)], write_page_checksum=True)
    whole = path.read_bytes()
    damaged = bytearray(whole[: len(whole) - kept])
    if flipped is not None:
        damaged = bytearray(whole)
        damaged[flipped % len(whole)] ^= 1
    path.write_bytes(damaged)
    try:
        found = list(read_documents(path, "text"))
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert found == [f"{i * 7919}" for i in range(99)] or flipped is not None


def test_a_table_is_not_held_in_memory(tmp_path):
    table(tmp_path / "a.parquet", [f"{i}" * 2000 for i in range(5000)], row_group_size=1000)
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in read_documents(tmp_path / "a.parquet", "text"))
    assert most < 30_000_000, "of more than 35 million bytes"


def test_without_the_package_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ImportError, match=r"'pyarrow' is needed to read parquet files.*minicpm_lite\[parquet\]"
    ):
        require_texts([tmp_path / "a.parquet"])
