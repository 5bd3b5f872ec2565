"""The same filtering on datatrove, run in shards on small real data, and compared with ours."""

import json
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("datatrove", reason="the engine is an extra")
pytest.importorskip("orjson", reason="datatrove reads JSON lines with it")

from datatrove.pipeline.readers import JsonlReader
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_lite.data.assets import load_austen, load_chinese_classics
from minicpm_lite.data.dedup import MinHash, first_of_each, near_duplicates
from minicpm_lite.data.documents import read_documents
from minicpm_lite.data.filtering import QualityClassifier, drop_reasons, identify_languages, normalise
from minicpm_lite.data.pipeline import LanguageBlock, SignatureBlock, TextReader, filtering_stages
from minicpm_lite.data.web_pool import build_pool, pieces_of
from minicpm_lite.files import locked


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Documents, classifier, and what the engine kept from three shards."""
    folder = tmp_path_factory.mktemp("engine")
    pool = build_pool(scale=0.08)
    texts = [document.text for document in pool.documents]
    good = [normalise(document.text) for document in pool.seeds]
    bad = [normalise(document.text) for document in pool.documents if not document.clean]
    classifier = QualityClassifier(dim=16, lr=0.5, epochs=15).fit(good, bad[: len(good)])
    classifier.save(folder / "quality.safetensors")
    source = folder / "source"
    source.mkdir()
    for shard in range(3):
        lines = [json.dumps({"text": text, "id": str(number)}) for number, text in enumerate(texts)]
        (source / f"{shard}.jsonl").write_text("\n".join(lines[shard::3]) + "\n")
    for stage in filtering_stages(source, folder / "work", folder / "quality.safetensors", tasks=3):
        stage.run()
    kept = [
        json.loads(line)
        for path in (folder / "work/kept").iterdir()
        for line in path.read_text().splitlines()
    ]
    return texts, classifier, kept


@pytest.mark.slow  # the whole pipeline once more, by our own functions
def test_language_and_near_duplicates_agree_with_ours(run):
    texts, classifier, kept = run
    english = [n for n, code in enumerate(identify_languages(texts)) if code == "en"]
    normal = [normalise(texts[number]) for number in english]
    scores = dict(zip(english, classifier.scores(normal), strict=True))
    labels = dict(zip(english, near_duplicates(normal, threshold=None).tolist(), strict=True))
    survivors = Counter(labels[int(document["id"])] for document in kept)
    assert set(survivors.values()) == {1}  # one of each cluster, though not always the first
    good = {labels[number] for number in english if scores[number] >= 0.5}
    assert set(survivors) <= good
    always = {label for label in good if all(scores[n] >= 0.5 for n in english if labels[n] == label)}
    assert always <= set(survivors)
    assert sum(first_of_each(list(labels.values()))) < len(english)  # there was something to remove


@pytest.mark.slow  # runs datatrove
def test_the_score_travels_with_the_document_and_the_text_is_as_it_was(run):
    texts, classifier, kept = run
    for document in kept[:20]:
        assert document["text"] == texts[int(document["id"])]
        expected = classifier.scores([normalise(document["text"])])[0]
        assert np.isclose(document["metadata"]["quality"], expected)


@pytest.mark.slow  # runs datatrove
@pytest.mark.parametrize("kept_by_the_second", [0, 3])
def test_each_file_meets_its_own_duplicates(tmp_path, kept_by_the_second):
    """Also behind a task that keeps no document at all."""
    classifier, source = tmp_path / "quality.safetensors", tmp_path / "source"
    english, chinese = (
        list(pieces_of(load_austen()[:60_000])),
        list(pieces_of(load_chinese_classics()[:9_000])),
    )
    QualityClassifier(dim=4, min_count=1).fit([english[-1]], [english[-2]]).save(classifier)
    source.mkdir()
    second = english[5:8] if kept_by_the_second else chinese[:3]
    files = [english[:5], second, [*english[:2], *english[8:10]], english[10:15]]  # two copies in the third
    for shard, texts in enumerate(files):
        lines = [json.dumps({"text": text, "id": f"{shard}-{n}"}) for n, text in enumerate(texts)]
        (source / f"{shard}.jsonl").write_text("\n".join(lines))
    for stage in filtering_stages(source, tmp_path / "work", classifier, tasks=4, threshold=0.0):
        stage.run()
    kept = [json.loads(line) for path in (tmp_path / "work/kept").iterdir() for line in path.open()]
    wanted = [text for texts in files for text in texts if text not in chinese]
    assert sorted(document["text"] for document in kept) == sorted(set(wanted))


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([b'{"text": "one"}', b"", b'{"text": "tw'], "Line 3 of a.jsonl is no JSON object with a text"),
        ([b'{"text": "one"}', b'{"content": "two"}'], "Line 2 of a.jsonl is no JSON object with a text"),
        ([b'{"text": 5}'], "Line 1 of a.jsonl is no JSON object with a text under 'text'"),
        ([b'["text"]'], "Line 1 of a.jsonl is no JSON object"),
        ([b'{"text": "\xe9"}'], "a.jsonl is not UTF-8 text in or behind line 1"),
        (
            [b"", b'{"text": "a \\ud800"}'],
            r"Line 2 of a.jsonl holds half a character, U\+D800, which no UTF-8",
        ),
        ([b'{"text": "a", "url": "\\ud800"}'], "Line 1 of a.jsonl holds something beside its text that"),
        ([b'{"text": "a", "media": 5}'], "Line 1 of a.jsonl holds something beside its text that the engine"),
        ([b'{"text": "a", "media": [{"id": "b"}]}'], "cannot write again .* missing 2 required"),
        (
            [b'{"text": "a", "hash": 18446744073709551616}'],
            "cannot write again .Integer exceeds 64-bit range",
        ),
        ([b'{"text": "a", "tree": ' + b"[" * 400 + b"]" * 400 + b"}"], "cannot write again .Recursion limit"),
        (
            [b'{"text": "a", "metadata": "' + b"[" * 9999 + b'"}'],
            "cannot write again .maximum recursion depth",
        ),
    ],
)
def test_a_line_without_a_text_is_refused(tmp_path, lines, sentence):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=sentence):
        list(TextReader(str(tmp_path)).run())


LINES = [
    '{"text": "one"}',
    '{"text": "帽子"}',
    '{"text": "\\ud83d\\ude00"}',
    '{"text": "\\ud800"}',
    '{"text": 5}',
    '["text"]',
    "\ufeff",
    " ",
    "",
]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(LINES), max_size=4), st.sampled_from(["", "\ufeff"]))
def test_texts_are_those_of_read_documents(tmp_path_factory, lines, mark):
    """The two readers refuse the same lines, and give the same texts."""
    folder = tmp_path_factory.mktemp("x")
    (folder / "a.jsonl").write_text(mark + "\n".join(lines), encoding="utf-8")
    try:
        expected = list(read_documents(folder / "a.jsonl", "text"))
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error).replace(f"{folder}/", "").replace("+", r"\+")):
            list(TextReader(str(folder)).run())
    else:
        assert [document.text for document in TextReader(str(folder)).run()] == expected


def test_lines_are_read_as_the_engine_reads_them(tmp_path):
    lines = [{"text": "one", "id": "a", "url": "x"}, {"text": ""}, {"text": "two", "metadata": {"score": 1}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert list(TextReader(str(tmp_path)).run()) == list(JsonlReader(str(tmp_path)).run())


def test_signatures_are_ours_cut_into_bands(tmp_path):
    minhash = MinHash(num_perm=32)
    block = SignatureBlock(tmp_path, minhash, bands=4)
    bands = block.get_signature(block.get_shingles("One  two THREE four five six seven"))
    expected = minhash.signatures([normalise("One  two THREE four five six seven")])[0]
    assert [len(band) for band in bands] == [8] * 4
    assert sum(bands, []) == expected.tolist()


def test_documents_without_a_shingle_are_one_as_in_ours(tmp_path):
    texts = ["   ", "\u0301", "\n\n", "\u200b", "12 34", "12 34", "...", "the cat sat on the mat"]
    source, classifier = tmp_path / "source", tmp_path / "c"
    source.mkdir()
    (source / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    QualityClassifier(dim=8, min_count=1, buckets=1000).fit(["the cat"] * 3, ["buy now"] * 3).save(classifier)
    for stage in filtering_stages(
        source, tmp_path / "work", classifier, threshold=0.0, languages=("en", "und")
    ):
        stage.run()
    lines = (tmp_path / "work/kept/00000.jsonl").read_text().splitlines()
    reasons = drop_reasons(texts, QualityClassifier.load(classifier), 0.0, ("en", "und"))
    expected = [text for text, reason in zip(texts, reasons, strict=True) if reason is None]
    assert [json.loads(line)["text"] for line in lines] == expected and len(expected) < 6


def test_a_link_to_a_folder_is_refused_and_one_to_a_file_is_not(tmp_path):
    source, other, classifier = tmp_path / "source", tmp_path / "other", tmp_path / "c"
    source.mkdir()
    other.mkdir()
    (other / "b.jsonl").write_text('{"text": "one"}')
    classifier.write_bytes(b"1")
    (source / "b.jsonl").symlink_to(other / "b.jsonl")
    filtering_stages(source, tmp_path / "work", classifier)
    (source / "more").symlink_to(other)
    with pytest.raises(ValueError, match="more is a link to a folder, which the engine does not enter"):
        filtering_stages(source, tmp_path / "new", classifier)


def test_the_languages_that_are_kept_are_noted(tmp_path):
    source, classifier = tmp_path / "source", tmp_path / "c"
    source.mkdir()
    classifier.write_bytes(b"1")
    (stage, *_) = filtering_stages(source, tmp_path / "work", classifier, languages=["de", "fr"])
    (block,) = (each for each in stage.pipeline if isinstance(each, LanguageBlock))
    assert set(block.languages) == {"de", "fr"}
    with pytest.raises(ValueError, match="was done with another languages"):
        filtering_stages(source, tmp_path / "work", classifier, languages="de")


def test_one_language_may_stand_alone():
    assert LanguageBlock("de").languages == LanguageBlock(iter(["de"])).languages == ("de",)
    with pytest.raises(ValueError, match="No language is to be kept"):
        LanguageBlock(())


def test_a_folder_of_other_work_is_refused(tmp_path):
    """The engine skips what its folder notes as done: with other documents or settings it would give old results."""
    source, work, classifier = tmp_path / "source", tmp_path / "work", tmp_path / "quality.safetensors"
    source.mkdir()
    (source / "0.jsonl").write_text('{"text": "one"}')
    QualityClassifier(dim=4, min_count=1).fit(["good words"], ["bad ones"]).save(classifier)
    filtering_stages(source, work, classifier, tasks=2)
    filtering_stages(source, work, classifier, tasks=2, workers=2)
    sentence = "work holds what was done with another {} and would be taken for done"
    for changed in (dict(threshold=0.6), dict(bands=8), dict(minhash=MinHash(seed=2)), dict(tasks=3)):
        with pytest.raises(ValueError, match=sentence.format(*changed)):
            filtering_stages(source, work, classifier, **({"tasks": 2} | changed))
    (source / "1.jsonl").write_text('{"text": "two"}')
    with pytest.raises(ValueError, match=sentence.format("source")):
        filtering_stages(source, work, classifier, tasks=2)
    QualityClassifier(dim=4, min_count=1).fit(["good words"], ["other ones"]).save(classifier)
    with pytest.raises(ValueError, match=sentence.format("source, classifier")):
        filtering_stages(source, work, classifier, tasks=2)


def test_a_work_folder_is_for_one_program_at_a_time(tmp_path):
    source, work, classifier = tmp_path / "source", tmp_path / "work", tmp_path / "quality.safetensors"
    source.mkdir()
    (source / "0.jsonl").write_text(json.dumps({"text": "one"}))
    QualityClassifier(dim=4, min_count=1).fit(["good words"], ["bad ones"]).save(classifier)
    first, *_ = filtering_stages(source, work, classifier)
    with locked(work), pytest.raises(FileExistsError, match="work is being written by another program"):
        first.run()
    first.run()
    assert (work / "logs" / "1_signatures" / "completions" / "00000").is_file()


def test_what_cannot_be_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        filtering_stages(tmp_path / "nothing", tmp_path, tmp_path / "c")
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(FileNotFoundError, match="There is no classifier at"):
        filtering_stages(source, tmp_path / "work", tmp_path / "c")
    (tmp_path / "c").write_text("")
    with pytest.raises(ValueError, match="threshold is 2.0; expected a number from 0 to 1"):
        filtering_stages(source, tmp_path / "work", tmp_path / "c", threshold=2.0)
    (tmp_path / "link").symlink_to(source)
    for work in (source, source / "work", tmp_path, tmp_path / "link" / "work", source / ".." / "source"):
        with pytest.raises(ValueError, match="lie within each other, so a stage would read what it writes"):
            filtering_stages(source, work, tmp_path / "c")
    with pytest.raises(ValueError, match="Signatures of 128 places cannot be cut into 10"):
        filtering_stages(source, tmp_path / "work", tmp_path / "c", bands=10)
