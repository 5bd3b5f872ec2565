"""The pipeline of `filtering` on an engine that scales out: datatrove's executors and files, our blocks.

datatrove reads documents from shards, runs blocks over them in independent tasks, on one machine or as jobs
of a cluster, and keeps note of which tasks are done. Near duplicates need four steps, since any two
documents can be a pair: signatures per shard, pairs per band, clusters over all, and the removal per shard.
The engine's own steps are used for that; only the signature is ours, so that both pipelines see the same
duplicates.

    language -> signatures | pairs of each band | clusters | removal -> quality
    one task per shard       one task per band     one task    one task per shard

Two differences from `filtering.drop_reasons`: exact copies are not a stage of their own, since their
signatures agree in every band; and no pair is verified, so the curve of the bands alone decides.

Traps:

- The engine skips tasks that its folder notes as done, and does not ask with which settings or from which
  documents. So the folder notes these, too, and one of another run is refused.
- The last stage takes the files of the first by their order. A task that keeps no document would write none,
  and every later file would meet the duplicates of another. So the files are there from the beginning.
- The engine's reader passes over a broken line with a word in its log. Ours refuses it.
"""

import json
import zlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from ..config import require_probability
from ..files import locked, written_whole
from ..optional import require
from .dedup import EMPTY, MinHash, rows_of_band, words_of
from .documents import row_in
from .filtering import QualityClassifier, identify_languages, language_codes, normalise

_NEED = {"install": "minicpm_lite[data]", "purpose": "run the pipeline on datatrove"}
_minhash = require("datatrove.pipeline.dedup.minhash", **_NEED)
_base_filter = require("datatrove.pipeline.filters.base_filter", **_NEED)
_readers = require("datatrove.pipeline.readers", **_NEED)
_writers = require("datatrove.pipeline.writers", **_NEED)
_executor = require("datatrove.executor", **_NEED)
_hashing = require("datatrove.utils.hashing", **_NEED)

_orjson = require("orjson", **_NEED)
_words = require("datatrove.utils.word_tokenizers", **_NEED)

__all__ = ["LanguageBlock", "QualityBlock", "SignatureBlock", "TextReader", "filtering_stages"]


class TextReader(_readers.JsonlReader):
    """Read JSON lines; refuse what holds no text, which the engine's own reader passes over."""

    name = "texts"

    def read_file(self, filepath: str) -> Iterator:
        """The documents of a file; its byte order mark, blank lines and empty texts are none.

        Raises:
            ValueError: a line is no JSON object with a text, or no UTF-8, or holds what the engine could not
                write into its next file; the sentence names it.
        """
        number = 0
        try:
            with self.data_folder.open(
                filepath, "r", compression=self.compression, encoding="utf-8-sig"
            ) as file:
                for number, line in enumerate(file, start=1):
                    if line.strip() and (document := self._document(line, filepath, number)):
                        yield document
        except UnicodeDecodeError:
            raise ValueError(f"{filepath} is not UTF-8 text in or behind line {number + 1}.") from None

    def _document(self, line: str, filepath: str, number: int):
        with self.track_time():
            place = f"Line {number} of {filepath}"
            row = row_in(line, self.text_key, place)
            try:
                document = self.get_document_from_dict(row, filepath, number - 1)
                _orjson.dumps(document)  # as it is written, where an error would not name the line
            except (TypeError, RecursionError) as error:
                raise ValueError(
                    f"{place} holds something beside its text that the engine cannot write again ({error}). "
                    "Mend it, or take it out."
                ) from None
            return document


class LanguageBlock(_base_filter.BaseFilter):
    """Keep documents of the given languages; the reason of a drop is the language that was found."""

    name = "language"

    def __init__(self, languages: str | Iterable[str] = ("en",), exclusion_writer=None) -> None:
        super().__init__(exclusion_writer)
        self.languages = language_codes(languages)

    def filter(self, doc) -> bool | tuple[bool, str]:
        """True to keep the document, else False and the language."""
        code = identify_languages([doc.text])[0]
        return True if code in self.languages else (False, code)


class QualityBlock(_base_filter.BaseFilter):
    """Keep documents that a classifier scores at least ``threshold``.

    The score goes into their metadata as "quality", in the place of another that they bring.
    """

    name = "quality"

    def __init__(self, classifier: str | Path, threshold: float = 0.5, exclusion_writer=None) -> None:
        require_probability("threshold", threshold)
        super().__init__(exclusion_writer)
        self.path, self.threshold = str(classifier), threshold

    @cached_property
    def classifier(self) -> QualityClassifier:
        """Read where it is used: a task on another machine gets the path, not the weights."""
        return QualityClassifier.load(self.path)

    def filter(self, doc) -> bool | tuple[bool, str]:
        """True to keep the document."""
        doc.metadata["quality"] = float(self.classifier.scores([normalise(doc.text)])[0])
        return doc.metadata["quality"] >= self.threshold or (False, "quality")


class _Words(_words.WordTokenizer):
    """`words_of` where the engine asks for a tokenizer; its own would need another package."""

    def word_tokenize(self, text: str) -> list[str]:
        return words_of(text)

    def sent_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError("Shingles are made of words; sentences are not needed.")

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError("Shingles are made of words; places are not needed.")


class SignatureBlock(_minhash.MinhashDedupSignature):
    """datatrove's first step of near duplicates, with the shingles and the random orders of `MinHash`."""

    name = "signatures"

    def __init__(self, output_folder: str | Path, minhash: MinHash, bands: int) -> None:
        super().__init__(str(output_folder), config=_engine_config(minhash, bands), language=_Words())
        self.minhash, self.bands = minhash, bands

    def get_shingles(self, text: str) -> np.ndarray:
        """The hashed shingles of a document, in datatrove's shape (shingles, 1).

        One that has none gets the one that such documents share, since datatrove compares no empty sets.
        """
        shingles = self.minhash.shingles(normalise(text))
        return (shingles if len(shingles) else np.array([EMPTY], np.uint64))[:, None]

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """The signature, band by band."""
        signature = self.minhash.signatures_of_sets([shingles[:, 0]])[0]
        return signature.reshape(self.bands, -1).tolist()


def _engine_config(minhash: MinHash, bands: int):
    return _minhash.MinhashConfig(
        n_grams=minhash.shingle_size,
        num_buckets=bands,
        hashes_per_bucket=rows_of_band(minhash.num_perm, bands),
        hash_config=_hashing.HashConfig(precision=32, hash_fc="sha1"),  # 32-bit places; its hash is not used
    )


def filtering_stages(
    source: str | Path,
    work: str | Path,
    classifier: str | Path,
    tasks: int = 1,
    workers: int = 1,
    threshold: float = 0.5,
    minhash: MinHash | None = None,
    bands: int = 16,
    languages: str | Iterable[str] = ("en",),
) -> list:
    """Four executors to be run in this order; a stage that was done before is skipped when run again.

    To run on a cluster, make the same stages with ``SlurmPipelineExecutor`` and chain them by ``depends``.

    Args:
        source: a folder of JSON lines with a field "text" in each.
        work: a folder for what lies between; the result is in ``work/kept``, one file per task. A new one, or
            that of the same work, which goes on.
        classifier: a file of `QualityClassifier.save`.
        tasks: independent pieces of the work; the shards of the source are dealt out to them.
        workers: processes at a time.
        threshold: least score of a document that is kept.
        minhash: the signatures; left out, 128 orders of 5-word shingles.
        bands: of each signature.
        languages: that are kept; left out, English alone.

    Raises:
        FileNotFoundError: there is no source folder, or no classifier.
        ValueError: bands that do not divide the signature, a threshold outside 0 to 1, a work folder of
            other documents or settings, or one that lies within the source, or that within it; or the source
            holds a link to a folder.
        FileExistsError: when a stage is run in whose work folder another program runs one.
    """
    if not Path(source).is_dir():
        raise FileNotFoundError(f"There is no folder {source}; give one with files of JSON lines.")
    if not Path(classifier).is_file():
        raise FileNotFoundError(f"There is no classifier at {classifier}; write one with its method save().")
    places = Path(source).resolve(), Path(work).resolve()
    if places[0].is_relative_to(places[1]) or places[1].is_relative_to(places[0]):
        raise ValueError(
            f"The source {source} and the work folder {work} lie within each other, so a stage would read "
            "what it writes. Give folders apart."
        )
    files = sorted(Path(source).rglob("*"))
    if links := [path for path in files if path.is_symlink() and path.is_dir()]:
        raise ValueError(
            f"{links[0]} is a link to a folder, which the engine does not enter. Give the folder itself as a "
            "source of its own, or put links to its files there."
        )
    minhash, work, languages = minhash or MinHash(), Path(work), language_codes(languages)
    config = _engine_config(minhash, bands)
    kept_language = str(work / "language")
    blocks = {
        "1_signatures": (tasks, [
            TextReader(str(source)),
            LanguageBlock(languages),
            _writers.JsonlWriter(kept_language, output_filename="${rank}.jsonl", compression=None),
            SignatureBlock(work / "signatures", minhash, bands),
        ]),
        "2_pairs": (bands, [
            _minhash.MinhashDedupBuckets(str(work / "signatures"), str(work / "pairs"), config=config),
        ]),
        "3_clusters": (1, [
            _minhash.MinhashDedupCluster(str(work / "pairs"), str(work / "clusters"), config=config),
        ]),
        "4_quality": (tasks, [
            _readers.JsonlReader(kept_language),
            _minhash.MinhashDedupFilter(str(work / "clusters")),
            QualityBlock(classifier, threshold),
            _writers.JsonlWriter(str(work / "kept"), output_filename="${rank}.jsonl", compression=None),
        ]),
    }  # fmt: skip
    _note(work, {
        "source": [[str(path.relative_to(source)), path.stat().st_size, path.stat().st_mtime_ns]
                   for path in files if path.is_file()],
        "classifier": zlib.crc32(Path(classifier).read_bytes()),
        "tasks": tasks,
        "threshold": threshold,
        "minhash": [minhash.num_perm, minhash.shingle_size, minhash.seed],
        "bands": bands,
        "languages": sorted(languages),
    })  # fmt: skip
    (work / "language").mkdir(exist_ok=True)
    for rank in range(tasks):  # see the second trap
        (work / "language" / f"{rank:05d}.jsonl").touch()
    return [_Stage(work, stage, pipeline, count, workers) for stage, (count, pipeline) in blocks.items()]


class _Stage(_executor.LocalPipelineExecutor):
    """A stage that has the work folder for itself while it runs."""

    def __init__(self, work: Path, name: str, pipeline: list, tasks: int, workers: int) -> None:
        super().__init__(pipeline, tasks, workers, logging_dir=str(work / "logs" / name))
        self.work = work

    def run(self):
        with locked(self.work):
            return super().run()


def _note(work: Path, what: dict) -> None:
    """Note in a new folder what it is for; refuse one that notes something else."""
    note = work / "note.json"
    if not note.exists():
        work.mkdir(parents=True, exist_ok=True)
        with written_whole(note) as beside:
            beside.write_text(json.dumps(what))
    elif (noted := json.loads(note.read_text())) != what:
        changed = ", ".join(key for key in what if noted.get(key) != what[key])
        raise ValueError(
            f"{work} holds what was done with another {changed} and would be taken for done. Give a new "
            "folder."
        )
