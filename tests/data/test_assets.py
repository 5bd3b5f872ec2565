"""The committed data is whole and is what its loaders say."""

import gzip

import pytest

from minicpm_lite.data import assets
from minicpm_lite.data.assets import (
    load_austen,
    load_chinese_classics,
    load_conversations,
    load_emoji,
    load_kenney,
    load_novels,
)


def test_austen_is_six_novels():
    text = load_austen()
    assert len(text) == 4_018_404
    assert text.startswith("EMMA\n\nBy Jane Austen")
    for sentence in ("It is a truth universally acknowledged", "Sir Walter Elliot, of Kellynch Hall"):
        assert sentence in text


def test_the_novels_are_the_whole_text_in_six():
    novels = load_novels()
    assert "".join(novels.values()) == load_austen()
    sentences = {
        "Emma": "Emma Woodhouse, handsome, clever, and rich",
        "Mansfield Park": "Miss Maria Ward, of Huntingdon",
        "Northanger Abbey": "No one who had ever seen Catherine Morland",
        "Persuasion": "Sir Walter Elliot, of Kellynch Hall",
        "Pride and Prejudice": "It is a truth universally acknowledged",
        "Sense and Sensibility": "The family of Dashwood had long been settled in Sussex",
    }
    assert list(novels) == list(sentences)
    for title, sentence in sentences.items():
        assert [name for name, text in novels.items() if sentence in text] == [title]


def test_conversations_are_turns_of_messages():
    pytest.importorskip("chitchat_dataset", reason="the conversations come in a package")
    conversations = load_conversations()
    assert len(conversations) == 7168
    assert all(isinstance(message, str) for turns in conversations for turn in turns for message in turn)
    assert (
        max(map(len, conversations)) > 10 and max(len(turn) for turns in conversations for turn in turns) > 1
    )


def test_chinese_classics_hold_their_openings():
    text = load_chinese_classics()
    assert len(text) == 380_998
    for opening in ("人之初，性本善", "天地玄黃", "关关雎鸠，在河之洲", "大學之道，在明明德"):
        assert opening in text
    assert all(line for line in text.split("\n"))


def test_emoji_pictures_stand_beside_their_names():
    emoji = {each.character: each for each in load_emoji()}
    assert len(emoji) == len(load_emoji()) == 1026
    apple = emoji["🍎"]
    assert (apple.english, apple.image.size, apple.image.mode) == ("red apple", (48, 48), "RGBA")
    red, green, blue, alpha = apple.image.resize((1, 1)).getpixel((0, 0))
    assert red > green and red > blue and alpha > 50
    assert all(each.image.getbbox() for each in load_emoji()), "no picture is empty"


def test_kenney_frames_by_character():
    frames = load_kenney()
    assert len(frames) == 6
    assert sum(map(len, frames.values())) == 78
    for character in frames.values():
        assert {f"walk{i}" for i in range(8)} <= character.keys()
        assert all(frame.mode == "RGBA" for frame in character.values())


def test_pictures_are_their_callers_own():
    for picture in (lambda: load_emoji()[0].image, lambda: load_kenney()["robot"]["walk0"]):
        before = picture().tobytes()
        picture().paste(0, (0, 0, 48, 48))
        assert picture().tobytes() == before and any(before)


def test_a_missing_file_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "_ASSETS", tmp_path)
    with pytest.raises(
        FileNotFoundError, match="lacks its data file austen.txt.gz; install minicpm_lite again"
    ):
        load_austen.__wrapped__()


def test_every_asset_is_named_in_the_notice():
    notice = (assets._ASSETS.parents[2] / "NOTICE").read_text()
    for path in assets._ASSETS.iterdir():
        assert path.name in notice, f"{path.name} has no entry in NOTICE"


def test_texts_are_utf8():
    assert "\ufffd" not in load_austen() + load_chinese_classics()
    assert gzip.decompress((assets._ASSETS / "austen.txt.gz").read_bytes()).decode("utf-8") == load_austen()
