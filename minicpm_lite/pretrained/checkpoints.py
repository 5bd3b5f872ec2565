"""Models in the Hugging Face layout: a folder with ``config.json`` and weights in safetensors.

    load_pretrained(folder | file.gguf | "owner/name") -> Decoder
    save_pretrained(model, folder)

A checkpoint is a table of names and tensors, and a few numbers that say how to compute with them; `families`
knows how each family of models spells both.

Choices, and the traps behind them:

- Names and shapes are compared before the first tensor is read; every difference is reported, none skipped.
- Only safetensors. A pickle file may run any code when it is opened.
- The model is built without memory and takes its tensors one by one, so the peak is one model, not two.
- A folder is written beside its place and renamed. A folder that holds anything is never touched.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..config import ModelConfig, require_positive_integer
from ..language.decoder import Decoder
from ..optional import require
from .families import config_from_json, config_to_json, family_of, few, own_family, stored_names

__all__ = ["assemble", "load_pretrained", "load_tokenizer", "save_pretrained"]

_FLOATS = {"F64", "F32", "F16", "BF16"}
_HARMLESS = re.compile(r"rotary_emb\.inv_freq$")  # older files store the rotary frequencies; we compute them
_HUB_FILES = ["config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]


def load_pretrained(path_or_id: str | Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """A model from a folder, a GGUF file, or the Hugging Face hub.

    Args:
        path_or_id: a folder with ``config.json`` and safetensors; a file that ends in ``.gguf``; or, if there
            is no such path, ``owner/name`` of a model on the hub, which is downloaded once.
        dtype: of the weights in memory; each tensor is converted as it is read.

    Raises:
        FileNotFoundError: there is no such path, or the folder lacks a file.
        ValueError: a file is damaged, or holds something this library would compute wrongly.
        ImportError: the hub or a GGUF file needs a package that is not installed.
    """
    path = _local(path_or_id, _HUB_FILES)
    if path.suffix == ".gguf":
        from .gguf import load_gguf  # here, because that file builds on this one

        return load_gguf(path, dtype)
    return _load_folder(path, dtype)


def load_tokenizer(path_or_id: str | Path) -> Tokenizer:
    """The tokenizer of a model: ``tokenizer.json`` of a folder or on the hub, or what a GGUF file holds.

    Raises:
        FileNotFoundError: there is no such path, or the folder holds no ``tokenizer.json``.
        ValueError: the file is damaged, or a GGUF file's tokenizer is of a kind that is not rebuilt here.
    """
    path = _local(path_or_id, ["tokenizer.json"])
    if path.suffix == ".gguf":
        from .gguf import gguf_tokenizer  # here, because that file builds on this one

        return gguf_tokenizer(path)
    file = path / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} holds no tokenizer.json. Older releases ship tokenizer.model (sentencepiece) only; "
            "transformers' AutoTokenizer reads it, and its save_pretrained writes tokenizer.json."
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises plain Exception
        raise ValueError(f"{file} is not a tokenizer of the tokenizers package: {error}") from None


def _local(path_or_id: str | Path, hub_files: list[str]) -> Path:
    """The path itself, or where the hub's files of that name were put."""
    path = Path(path_or_id).expanduser()
    if path.suffix == ".gguf" and path.is_file() or path.is_dir():
        return path
    if path.exists():
        raise ValueError(
            f"{path} is a file; expected the folder that holds config.json and the weights, or a .gguf file."
        )
    if (
        path.suffix == ".gguf"
        or not isinstance(path_or_id, str)
        or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path_or_id)
    ):
        raise FileNotFoundError(f"There is no folder or file {path}.")
    hub = require("huggingface_hub", install="minicpm_lite[pretrained]", purpose="download a model")
    try:
        return Path(hub.snapshot_download(path_or_id, allow_patterns=hub_files))
    except OSError as error:  # all of the hub's refusals and network troubles are OSErrors
        raise FileNotFoundError(
            f"There is no folder {path_or_id}, and the hub gave no model of that name: {error}"
        ) from error


def _load_folder(folder: Path, dtype: torch.dtype) -> Decoder:
    values = _read_json(folder / "config.json", "a model's folder holds its shape there")
    config = config_from_json(values, str(folder / "config.json"))
    shards = _shards(folder)
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}  # each stored tensor: its file and shape
    for file, promised in shards.items():
        with _open(file) as shard:
            here = set(shard.keys())
            if lacking := sorted(promised - here):
                raise ValueError(
                    f"{file} lacks {few(lacking)}, which model.safetensors.index.json says it holds."
                )
            for name in here:
                part = shard.get_slice(name)
                if part.get_dtype() not in _FLOATS:
                    raise ValueError(
                        f"{name} in {file} is stored as {part.get_dtype()}; only floating-point weights of "
                        "16 bits or more are read. Take the checkpoint that is not quantised."
                    )
                if name in found:
                    raise ValueError(f"{name} is stored twice: in {found[name][0].name} and in {file}.")
                found[name] = file, tuple(part.get_shape())

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for file in shards:
            with _open(file) as shard:
                for name in shard.keys():  # noqa: SIM118, not a dict
                    # a copy, because what safetensors gives may be the file itself, mapped into memory
                    yield name, shard.get_tensor(name).to(dtype, copy=True)

    return assemble(
        config,
        stored_names(config, family_of(values)),
        {name: shape for name, (_, shape) in found.items() if not _HARMLESS.search(name)},
        tensors(),
        dtype,
        str(folder),
    )


def assemble(
    config: ModelConfig,
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    where: str,
) -> Decoder:
    """A decoder whose weights are the given tensors; those of another type are converted one by one.

    Args:
        config: the model's shape.
        names: for each parameter of the decoder, the name under which it is stored.
        shapes: of all that is stored, known before the first tensor is read.
        tensors: the stored names with their tensors; others than those in ``shapes`` are passed over.
        dtype: of the parameters.
        where: the file or folder, for messages.

    Raises:
        ValueError: names or shapes differ; or the tables are tied, and an output layer differs from them.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(
            f"dtype is {dtype!r}; weights are held in torch.float32, float16, bfloat16 or float64."
        )
    with torch.device("meta"):
        model = Decoder(config)
    expected = {names[name]: parameter for name, parameter in model.named_parameters()}
    own = {stored: name for name, stored in names.items()}
    output = names.get("lm_head.weight", "")  # a tied table that is stored a second time
    problems = []
    if missing := [name for name in expected if name not in shapes]:
        problems.append(f"{len(missing)} missing: {few(missing)}")
    if extra := sorted(shapes.keys() - expected.keys() - {output}):
        problems.append(f"{len(extra)} unknown: {few(extra)}")
    if misshapen := [
        f"{name} is {shapes[name]} and should be {tuple(parameter.shape)}"
        for name, parameter in expected.items()
        if name in shapes and shapes[name] != tuple(parameter.shape)
    ]:
        problems.append(f"{len(misshapen)} of another shape: {few(misshapen)}")
    if problems:
        raise ValueError(
            f"The tensors in {where} do not fit its config: {'; '.join(problems)}. Nothing was loaded."
        )
    second = None
    for name, tensor in tensors:
        if name in expected:
            owner, _, leaf = own[name].rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(dtype)))
        elif name == output:
            second = tensor.to(dtype)
    if second is not None and not torch.equal(second, model.embed_tokens.weight):
        raise ValueError(
            f"{where} says that the embedding table is the output layer too (tie_word_embeddings), and "
            f"stores {output} with other values. If that is the right output layer, set "
            "tie_word_embeddings to false in config.json."
        )
    return model.eval()


def save_pretrained(
    model: Decoder, path: str | Path, model_type: str | None = None, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write a model as a folder that `load_pretrained`, transformers, vLLM and others read.

    All files are written to a folder beside the place and renamed at the end, so the place holds either a
    whole checkpoint or nothing. Nothing is ever overwritten.

    Args:
        model: the model to write.
        path: a folder that does not exist yet, or is empty.
        model_type: the family (see the head of this module). Left out: "minicpm3" with latent attention;
            "minicpm" with multipliers; else "mixtral" with a mixture of experts and "llama" without. Give
            "granite" to open a MiniCPM in transformers without code from elsewhere.
        max_shard_bytes: the weights are split into files of about this size; a tensor is never split.

    Raises:
        FileExistsError: the folder holds something.
        ValueError: the family computes something else than the model, or the model was changed inside.
        OSError: the folder above is missing or cannot be written, or the disk is full; nothing is left.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile was given
    path = Path(path).expanduser().absolute()
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"There is no folder {path.parent} to write {path.name} into; create it first."
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(
            f"{path} exists and holds something; nothing is overwritten. Give another folder, or remove it."
        )
    require_positive_integer("max_shard_bytes", max_shard_bytes)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("The model is on the meta device: it has shapes and no weights to write.")
    family = model_type or own_family(model.config)
    values = config_to_json(model.config, family)
    weights = model.state_dict()
    names = stored_names(model.config, family)
    plain = names.keys() - ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    if strange := sorted(weights.keys() ^ plain):
        raise ValueError(
            f"The model's parameters differ from those of a plain decoder in {len(strange)}: {few(strange)}. "
            "Merge or undo what was built into it first."
        )
    values["dtype"] = values["torch_dtype"] = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    beside = path.with_name(f".{path.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)  # what a killed process may have left
    try:
        beside.mkdir()
        _write_json(beside / "config.json", values)
        _write_shards(beside, {names[name]: tensor for name, tensor in weights.items()}, max_shard_bytes)
        os.replace(beside, path)
    except BaseException as error:  # also when the user interrupts
        shutil.rmtree(beside, ignore_errors=True)
        if not isinstance(error, OSError | SafetensorError):
            raise
        raise OSError(f"{path} could not be written, and nothing was left of it: {error}") from None


def _read_json(file: Path, purpose: str) -> dict:
    if not file.is_file():
        raise FileNotFoundError(f"There is no {file}; {purpose}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of the encoding or of JSON
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} holds {type(content).__name__} {str(content)[:40]!r}; expected names with values."
        )
    return content


def _shards(folder: Path) -> dict[Path, set[str]]:
    """The files of weights, and which names the index promises in each."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return {single: set()}
    if not index.is_file():
        pickled = sorted(file.name for file in [*folder.glob("*.bin"), *folder.glob("*.pt*")])
        raise FileNotFoundError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json"
            + (
                f", but {few(pickled)}. A pickle file may run any code when it is opened, so it is not "
                "read. Convert it where you trust it: transformers' from_pretrained, then save_pretrained."
                if pickled
                else "."
            )
        )
    promised = _read_json(index, "").get("weight_map")
    if not isinstance(promised, dict) or not all(isinstance(name, str) for name in promised.values()):
        raise ValueError(f"{index} has no weight_map of names and files.")
    shards: dict[Path, set[str]] = {}
    for name, file in promised.items():
        if Path(file).name != file:
            raise ValueError(f"{index} puts {name} in {file!r}; expected a file in the same folder.")
        shards.setdefault(folder / file, set()).add(name)
    if absent := sorted(file.name for file in shards if not file.is_file()):
        raise FileNotFoundError(
            f"{index} names {len(shards)} files, {len(absent)} of them missing: {few(absent)}. Was the "
            "download cut short?"
        )
    return shards


@contextmanager
def _open(file: Path) -> Iterator:
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a whole safetensors file ({error}). Is it cut short, or a pointer that git-lfs "
            "left? Fetch it again."
        ) from None


def _write_json(file: Path, values: Mapping[str, object]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(values, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _write_shards(folder: Path, weights: Mapping[str, Tensor], max_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    room = max_bytes
    for name, tensor in weights.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    single = len(shards) == 1
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})  # without it transformers refuses
        with (folder / file).open("rb") as stream:
            os.fsync(stream.fileno())
    if not single:
        total = sum(tensor.nbytes for tensor in weights.values())
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
