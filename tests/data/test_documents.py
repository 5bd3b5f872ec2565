"""Documents of text files: marks and blank lines are none, and what cannot be read is named by line or byte."""

import json

import pytest

from minicpm_lite.data.documents import documents, require_texts

TEXT = "It is a truth universally acknowledged. " * 3


def test_marks_and_blank_lines_are_no_text(tmp_path):
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode().replace(b" ", b"\r\n"))
    rows = [json.dumps({"text": TEXT}).encode(), b"", b"  ", json.dumps({"text": "\ufeff"}).encode()]
    (tmp_path / "mark.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(rows))
    found = [list(documents(tmp_path / name, "text")) for name in ("mark.txt", "mark.jsonl")]
    assert found == [[TEXT.replace(" ", "\n")], [TEXT, "\ufeff"]]


def test_another_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "one"}\n\n{"content": "two"}')
    assert list(documents(tmp_path / "a.jsonl", "content")) == ["one", "two"]
    with pytest.raises(ValueError, match="Line 1 of .*a.jsonl is no JSON object with a text under 'text'"):
        list(documents(tmp_path / "a.jsonl", "text"))


def test_files_are_asked_for_before_any_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    require_texts([tmp_path / "a.txt"])
    with pytest.raises(FileNotFoundError, match="There is no file .*b.txt"):
        require_texts([tmp_path / "a.txt", tmp_path / "b.txt"])
    with pytest.raises(ValueError, match="c.pdf is neither .txt nor .jsonl"):
        require_texts([tmp_path / "c.pdf"])
