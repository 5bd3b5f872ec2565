"""Documents of text files: marks and blank lines are none, and what cannot be read is named by line or byte."""

import gzip
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_lite.data import documents as module
from minicpm_lite.data.documents import encoded, read_documents, require_texts
from minicpm_lite.language.tokenizer import train_tokenizer

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
    with pytest.raises(ValueError, match="c.pdf is neither .txt nor .jsonl"):
        require_texts([tmp_path / "c.pdf"])
    with pytest.raises(ValueError, match="d.gz is neither .txt nor .jsonl"):
        require_texts([tmp_path / "d.gz"])
    with pytest.raises(
        ValueError, match="e.parquet is a table, which is not read here. Write its rows as lines"
    ):
        require_texts([tmp_path / "e.parquet"])


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


def test_a_corpus_is_not_held_in_memory(monkeypatch):
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 1 << 12)
    tokenizer = train_tokenizer(TEXT, 280)
    tracemalloc.start()
    tokens = sum(len(ids) for ids in encoded((TEXT * 3 for _ in range(1000)), tokenizer, end=None))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tokens > 50_000 and peak < 500_000
