"""Token shards: a corpus of any size as a folder of arrays, read where they lie, checked as they are read.

    folder/shards.json          vocabulary, end token, number format, tokens and checksums of every shard;
                                a checksum of itself
    folder/tokens-00000.npy     one array of token ids each, uint16 or uint32
    ...
    folder/tokenizer.json       what made the ids, if it is known, so that a model trained on them can be used

`write_shards` makes such a folder, `Shards` opens it as one long stream, which the windows of
`minicpm_lite.data.windows` are cut from. The arrays are NumPy's own format, so that any tool can read them.

Choices, and the traps behind them:

- Files are mapped into memory, not read: a process holds the windows it uses, whatever the corpus weighs.
- uint16 ends at 65,535, and a larger id written to it would wrap around without a word. So the format follows
  from the vocabulary, and MiniCPM's vocabularies (73,440 ids and more) need uint32.
- A checksum for each million tokens. A block is checked when it is first touched, so a damaged disk is
  noticed for the price of reading what is read anyway, not of the whole corpus at the start.
- The folder is written beside its place and renamed: there is never half a corpus. Meanwhile the place is
  locked: of two programs that would write one folder, one is refused.
- The stream knows no documents, only the token that ends each, if there is one. A window may begin in one
  document and end in another, and cross from shard to shard.
"""

import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from ..config import require_positive_integer
from ..files import locked, written_whole
from ..language.tokenizer import BytePairTokenizer, fast_tokenizer, panics_as_errors

__all__ = ["TOKENIZER", "Shards", "is_tokenizer", "tokenizer_checksum", "write_shards"]

TOKENIZER = "tokenizer.json"

INDEX = "shards.json"
_FORMAT = {"format": "minicpm_lite token shards", "version": 1}
_BLOCK_TOKENS = 1 << 20  # what one checksum covers
_MOST_OPEN = 256  # shards at a time, of all folders, since a program may open 1,024 files in all


def tokenizer_checksum(tokenizer: Tokenizer | BytePairTokenizer) -> int:
    """A number that differs when anything differs by which a tokenizer cuts whole texts."""
    return zlib.crc32(_description(tokenizer).encode())


def _description(tokenizer: Tokenizer | BytePairTokenizer) -> str:
    """What ``tokenizer.json`` says, and what it says again when it was read: scores lose a digit at first.

    Some scores go round without an end; then what comes first by its letters, wherever the round was entered.
    """
    texts, text = [], fast_tokenizer(tokenizer).to_str()
    while text not in texts:
        texts.append(text)
        text = Tokenizer.from_str(text).to_str()
    return min(texts[texts.index(text) :])


def is_tokenizer(file: Path, checksums: Collection[int]) -> bool:
    """Whether a file holds a tokenizer of one of these checksums; its JSON may be spelt otherwise."""
    if zlib.crc32(file.read_bytes()) in checksums:
        return True
    try:
        with panics_as_errors():
            tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        return tokenizer_checksum(tokenizer) in checksums
    except Exception:  # the package raises plain Exception
        return False


def write_shards(
    folder: str | Path,
    token_arrays: Iterable[np.ndarray | Tensor | list[int]],
    vocab_size: int,
    tokenizer: Tokenizer | BytePairTokenizer | None = None,
    shard_tokens: int = 1 << 28,
    end: int | None = None,
) -> "Shards":
    """Write token ids, document after document, as a folder of shards.

    The arrays may come from a generator: a million tokens at a time are held in memory.

    Args:
        folder: a new folder, or an empty one.
        token_arrays: token ids, one dimension each; they are joined to one stream.
        vocab_size: ids of the model that will read them, from 0 to ``vocab_size - 1``. It may exceed the
            tokenizer's, where a model's table was rounded up.
        tokenizer: what made the ids; it is written beside them, and its checksum noted, so that no other one
            is mixed in.
        shard_tokens: tokens in a shard; the last one may hold fewer.
        end: the id that closes each document in the arrays; it is noted. None: nothing does.

    Raises:
        ValueError: an id outside the vocabulary, something that is no array of whole numbers, an end that is
            no id or that no array holds, no token, or a vocabulary smaller than the tokenizer's or larger
            than 32 bits hold.
        FileExistsError: the folder already holds something or is the working directory, or another program is
            writing it.
        OSError: it cannot be written, or the disk is full; nothing is left behind.
    """
    require_positive_integer("vocab_size", vocab_size)
    require_positive_integer("shard_tokens", shard_tokens)
    if tokenizer is not None:
        largest = max(fast_tokenizer(tokenizer).get_vocab().values(), default=0)  # there may be gaps
        if largest >= vocab_size:
            raise ValueError(
                f"The tokenizer gives ids up to {largest} and vocab_size is {vocab_size}; the model's table "
                "must have a row for each of them."
            )
    if vocab_size > 1 << 32:
        raise ValueError(
            f"vocab_size is {vocab_size}; ids are written with 32 bits, {1 << 32} different ones."
        )
    if end is not None and (type(end) is not int or end not in range(vocab_size)):  # as it is read again
        raise ValueError(
            f"The end token is {end!r}; expected an id of the vocabulary, an int from 0 to {vocab_size - 1}."
        )
    place = Path(folder).expanduser().resolve()  # a link to an empty folder stays, the folder is filled
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    shards: list[dict] = []
    ended = end is None
    with _new_folder(place), written_whole(place, folder=True) as beside:
        beside.mkdir(parents=True)
        for block in _blocks(token_arrays, vocab_size, dtype, shard_tokens):
            if not shards or shards[-1]["tokens"] >= shard_tokens:
                shards.append({"file": f"tokens-{len(shards):05d}.npy", "tokens": 0, "checksums": [],
                               "smallest": vocab_size, "largest": 0})  # fmt: skip
            shard = shards[-1]
            with (beside / shard["file"]).open("r+b" if shard["tokens"] else "w+b") as file:
                shard["tokens"] += len(block)
                _write_header(file, dtype, shard["tokens"])
                file.seek(0, os.SEEK_END)
                file.write(block.tobytes())
            ended = ended or bool((block == end).any())
            shard["checksums"].append(zlib.crc32(block.tobytes()))
            shard["smallest"] = min(shard["smallest"], int(block.min()))
            shard["largest"] = max(shard["largest"], int(block.max()))
        if not shards:
            raise ValueError("There was no token to write.")
        if not ended:
            raise ValueError(
                f"The end token is {end}, and no array holds it, so nothing would say where a document ends. "
                "Put it behind the ids of each document."
            )
        description = None if tokenizer is None else _description(tokenizer)
        index = _FORMAT | {
            "vocab_size": vocab_size,
            "dtype": dtype.name,
            "end": end,
            "tokenizer": None if description is None else zlib.crc32(description.encode()),
            "block_tokens": _BLOCK_TOKENS,
            "shards": shards,
        }
        index["checksum"] = _checksum(index)
        if description is not None:
            (beside / TOKENIZER).write_text(description, encoding="utf-8")
        (beside / INDEX).write_text(json.dumps(index, indent=1))
    return Shards(folder)


@contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Make a folder, or take an empty one, and keep other writers out."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is no folder. Shards are written into a new folder.")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if any(folder.iterdir()):  # also what a writer put there while this one waited to ask
            raise FileExistsError(f"{folder} already holds something. Shards are written into a new folder.")
        try:
            yield
        except BaseException:
            with suppress(OSError):  # it holds something
                if is_new:
                    folder.rmdir()
            raise


def _blocks(
    token_arrays: Iterable, vocab_size: int, dtype: np.dtype, shard_tokens: int
) -> Iterator[np.ndarray]:
    """The joined stream in pieces of a million tokens; a shard's last piece may be shorter."""
    waiting: list[np.ndarray] = []
    held = 0  # tokens in them
    room_in_shard = shard_tokens
    for number, array in enumerate(token_arrays):
        array = _checked(array, number, vocab_size).astype(dtype)
        while len(array):
            wanted = min(_BLOCK_TOKENS, room_in_shard) - held
            waiting.append(array[:wanted])
            array = array[wanted:]
            held += len(waiting[-1])
            if len(waiting[-1]) == wanted:
                block, waiting, held = np.concatenate(waiting), [], 0
                room_in_shard = room_in_shard - len(block) or shard_tokens
                yield block
    if waiting:
        yield np.concatenate(waiting)


def _checked(array: object, number: int, vocab_size: int) -> np.ndarray:
    if isinstance(array, Tensor):  # NumPy does not know all of its types, nor gradients
        array = array.detach().cpu()
        array = array.double() if array.is_floating_point() else array
    try:
        array = np.asarray(array)
    except ValueError:
        raise ValueError(
            f"Array {number} has rows of different lengths; expected token ids, whole numbers in one "
            "dimension."
        ) from None
    if array.size == 0:
        return np.empty(0, dtype=np.uint16)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"Array {number} has {array.ndim} dimensions and the type {array.dtype}; expected token ids, "
            "whole numbers in one dimension."
        )
    smallest, largest = int(array.min()), int(array.max())
    if smallest < 0 or largest >= vocab_size:
        raise ValueError(
            f"Array {number} holds the id {smallest if smallest < 0 else largest}; the vocabulary has ids "
            f"from 0 to {vocab_size - 1}. Was it cut with another tokenizer?"
        )
    return array


def _write_header(file, dtype: np.dtype, tokens: int) -> None:
    """Begin the file with NumPy's header, which is padded so that a larger count fits in later."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(
        file, {"descr": dtype.newbyteorder("<").str, "fortran_order": False, "shape": (tokens,)}
    )


class Shards:
    """A folder of shards as one stream of token ids: ``shards[start:stop]``.

    Names, sizes and number formats are checked at once, the tokens themselves when they are first read.

    Args:
        folder: what `write_shards` made.
        vocab_size: of the model that will read them; shards for another one are refused. Left out: any.

    Attributes:
        folder: where they lie.
        vocab_size: ids they were written for.
        tokenizer: checksum of what made them, or None where it was not noted.
        end: the id that closes each document, or None where nothing does or it was not noted.

    Raises:
        FileNotFoundError: no folder, no index in it, or a shard is missing.
        ValueError: a foreign or changed index, another vocabulary, or a shard that is extra, truncated or of
            another number format.
    """

    def __init__(self, folder: str | Path, vocab_size: int | None = None) -> None:
        self.folder = Path(folder).expanduser()
        index = _read_index(self.folder)
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer: int | None = index["tokenizer"]
        self.end: int | None = index.get("end")  # older folders do not say
        if vocab_size is not None and vocab_size != self.vocab_size:
            raise ValueError(
                f"{self.folder} was written for a vocabulary of {self.vocab_size} ids; this model's has "
                f"{vocab_size}. Write the shards with this model's tokenizer; if they are, and its table was "
                f"rounded up, with vocab_size={vocab_size} (--vocab-size)."
            )
        self._block_tokens: int = index["block_tokens"]
        self._shards: list[dict] = index["shards"]
        extra = {path.name for path in self.folder.glob("*.npy")} - {shard["file"] for shard in self._shards}
        if extra:
            raise ValueError(f"{self.folder / min(extra)} is not in {INDEX}. Is it left from another corpus?")
        self._dtype = np.dtype(index["dtype"])
        for number in range(len(self._shards)):
            self._array(number)
        self._starts = np.cumsum([0] + [shard["tokens"] for shard in self._shards]).tolist()
        self._intact = [bytearray(len(shard["checksums"])) for shard in self._shards]

    @lru_cache(_MOST_OPEN)  # noqa: B019, of all objects together, as the limit of open files is
    def _array(self, number: int) -> np.ndarray:
        shard, dtype = self._shards[number], self._dtype
        path = self.folder / shard["file"]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {INDEX} says it holds {shard['tokens']:,} tokens.")
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        except (ValueError, EOFError, TokenError) as error:
            raise ValueError(
                f"{path} is not a whole .npy file ({error}). It may be truncated; copy or write it again."
            ) from None
        if array.dtype != dtype or array.shape != (shard["tokens"],):
            raise ValueError(
                f"{path} holds an array of type {array.dtype} and shape {array.shape}; {INDEX} says {dtype} "
                f"and ({shard['tokens']},). Copy or write it again."
            )
        if path.stat().st_size != array.offset + array.nbytes:
            raise ValueError(f"{path} is longer than its {len(array):,} tokens. Copy or write it again.")
        return array

    def __reduce__(self) -> tuple:
        return type(self), (self.folder,)  # in another process the folder is opened anew

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, stretch: slice) -> Int[Tensor, " tokens"]:
        """The tokens of a stretch of the stream, as 64-bit ids.

        Raises:
            TypeError: no stretch, but a single place.
            ValueError: a shard no longer is what was written, or a stretch with steps.
        """
        if not isinstance(stretch, slice):
            raise TypeError(f"A stream of shards is read in stretches, such as [0:512]; got [{stretch!r}].")
        start, stop, step = stretch.indices(len(self))
        if step != 1:
            raise ValueError(f"The stretch has a step of {step}; a stream is read token by token.")
        pieces = []
        while start < stop:
            shard = bisect_right(self._starts, start) - 1
            first, last = (
                start - self._starts[shard],
                min(stop, self._starts[shard + 1]) - self._starts[shard],
            )
            for block in range(first // self._block_tokens, (last - 1) // self._block_tokens + 1):
                self._check(shard, block)
            pieces.append(self._array(shard)[first:last].astype(np.int64))
            start = self._starts[shard + 1]
        return torch.from_numpy(np.concatenate(pieces)) if pieces else torch.empty(0, dtype=torch.long)

    def tokenizer_file(self) -> Path | None:
        """The file of what made them, which lies beside them; None where there is none.

        Raises:
            ValueError: it is another one than was noted.
        """
        file = self.folder / TOKENIZER
        if not file.is_file():
            return None
        if self.tokenizer is not None and not is_tokenizer(file, [self.tokenizer]):
            raise ValueError(
                f"{file} is not the tokenizer that made the ids beside it: its checksum is not the one in "
                f"{INDEX}. Copy it again."
            )
        return file

    def verify(self) -> None:
        """Read everything once and compare it with the checksums; takes as long as reading the files does.

        Raises:
            FileNotFoundError: the tokenizer was noted and is missing.
            ValueError: a shard or the tokenizer no longer is what was written.
        """
        if self.tokenizer_file() is None and self.tokenizer is not None:
            raise FileNotFoundError(
                f"{self.folder / TOKENIZER} is missing, and {INDEX} notes its checksum. Copy it there, too."
            )
        for shard, intact in enumerate(self._intact):
            for block in range(len(intact)):
                intact[block] = 0  # what was whole when it was read may be damaged by now
                self._check(shard, block)

    def _check(self, shard: int, block: int) -> None:
        if self._intact[shard][block]:
            return
        first = block * self._block_tokens
        tokens = self._array(shard)[first : first + self._block_tokens]
        if zlib.crc32(tokens.tobytes()) != self._shards[shard]["checksums"][block]:
            raise ValueError(
                f"{self.folder / self._shards[shard]['file']} is damaged: its tokens {first:,} to "
                f"{first + len(tokens) - 1:,} do not have the checksum they were written with. Copy or write "
                "it again."
            )
        self._intact[shard][block] = 1

    def id_range(self) -> tuple[int, int]:
        """Smallest and largest token id, as noted when they were written."""
        return min(s["smallest"] for s in self._shards), max(s["largest"] for s in self._shards)

    def identity(self) -> dict:
        """Number of tokens, vocabulary, tokenizer, and a checksum over the checksums."""
        checksums = json.dumps([shard["checksums"] for shard in self._shards])
        return {"tokens": len(self), "checksum": zlib.crc32(checksums.encode()),
                "vocab_size": self.vocab_size, "tokenizer": self.tokenizer}  # fmt: skip


def _read_index(folder: Path) -> dict:
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"There is no {INDEX} in {folder}, so it holds no shards. Write some with `minicpm-lite shards`."
        )
    try:
        index = json.loads((folder / INDEX).read_text())
        unchanged = index.pop("checksum", None) in (None, _checksum(index))  # older folders have none
        if not _is_index(index):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"{folder / INDEX} is not an index of token shards, version {_FORMAT['version']}. Was it edited, "
            "or written by another program?"
        ) from None
    if not unchanged:
        raise ValueError(
            f"{folder / INDEX} is not what was written: its checksum differs. It was damaged or edited "
            "since; copy or write it again."
        )
    return index


def _checksum(index: dict) -> int:
    return zlib.crc32(json.dumps(index, sort_keys=True).encode())


def _is_index(index: dict) -> bool:
    """Whether what was read has every field, each of its kind."""
    shards, end = index["shards"], index.get("end")
    counts = [index["vocab_size"], index["block_tokens"], *(shard["tokens"] for shard in shards)]
    numbers = [number for shard in shards for number in (shard["smallest"], shard["largest"])]
    numbers += [checksum for shard in shards for checksum in shard["checksums"]]
    numbers += [number for number in (index["tokenizer"], end) if number is not None]
    return (
        {key: index[key] for key in _FORMAT} == _FORMAT
        and index["dtype"] in ("uint16", "uint32")
        and len(shards) > 0
        and all(isinstance(shard["file"], str) for shard in shards)
        and all(type(number) is int for number in (*counts, *numbers))  # True is none
        and min(counts) > 0
        and all(len(s["checksums"]) == -(-s["tokens"] // index["block_tokens"]) for s in shards)
        and (end is None or 0 <= end < index["vocab_size"])
    )
