"""Models in the Hugging Face layout: a folder with ``config.json`` and weights in safetensors.

    load_pretrained(folder | file.gguf | "owner/name") -> Decoder
    load_tokenizer(the same) -> Tokenizer
    load_chat_template(the same) -> str | None
    save_pretrained(model, folder, tokenizer)

A checkpoint is a table of names and tensors, and a few numbers that say how to compute with them; `families`
knows how each family of models spells both.

Choices, and the traps behind them:

- Which ids end a text stands in two files. Where there is a ``generation_config.json``, it alone decides, as
  in transformers' ``generate``; ``config.json`` is asked where there is none.
- A tokenizer file may hold a length at which texts are cut or padded. Whoever encodes with it would lose
  text and not be told, so neither is kept, in reading or in writing.
- A chat template stands in a file of its own, in older releases in ``tokenizer_config.json``. Where there are
  both the file counts, as in transformers.
- A folder is written beside its place and renamed. A folder that holds anything is never touched, nor one
  that another program writes.
- A chat template names tokens that stand in ``tokenizer_config.json``; without them it writes other prompts.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from reprlib import repr as shown

import torch
from tokenizers import Tokenizer

from ..config import LARGEST_VOCABULARY, ModelConfig, list_configs, require_positive_integer
from ..files import locked, written_whole
from ..language.decoder import Decoder, require_plain
from ..language.tokenizer import BytePairTokenizer, fast_tokenizer, panics_as_errors
from ..language.writing import warn_of_ordinary_ends
from ..optional import require
from .added_tokens import ADDED_TOKENS_FILES, AddedTokens, read_added_tokens
from .assemble import assemble, empty_decoder
from .families import config_from_json, config_to_json, end_ids_to_json, family_of, own_family, stored_name
from .gguf import read_gguf
from .gguf_tokenizer import gguf_tokenizer, special_id
from .llama_cpp import load_gguf
from .weights import few, read_json, read_weights, write_json, write_weights

__all__ = [
    "load_chat_template",
    "load_pretrained",
    "load_special_tokens",
    "load_tokenizer",
    "name_special_tokens",
    "read_tokenizer",
    "save_pretrained",
]

_HARMLESS = re.compile(r"rotary_emb\.inv_freq$")  # older files store the rotary frequencies; we compute them
_CHAT_TEMPLATE = "chat_template.jinja"
# classes that decide by themselves whether a blank stands before a text
_PUT_A_BLANK = ("CohereTokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer", "LlamaTokenizer", "Qwen2Tokenizer")
_HUB_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
]


def load_pretrained(path_or_id: str | Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """A model from a folder, a GGUF file, or the Hugging Face hub.

    Args:
        path_or_id: a folder with ``config.json`` and safetensors; a file that ends in ``.gguf``, or any part
            of one that was split; or, if there is no such path, ``owner/name`` of a model on the hub, which
            is downloaded once.
        dtype: of the weights in memory; each tensor is converted as it is read.

    Raises:
        FileNotFoundError: there is no such path, or the folder lacks a file.
        ValueError: a file is damaged, or holds something this library would compute wrongly.
        ImportError: the hub or a GGUF file needs a package that is not installed.
    """
    path = _local(path_or_id, _HUB_FILES)
    return load_gguf(path, dtype) if _is_gguf(path) else _load_folder(path, dtype)


def load_tokenizer(path_or_id: str | Path) -> Tokenizer:
    """The tokenizer of a model: ``tokenizer.json`` of a folder or on the hub, or what a GGUF file holds.

    It reads whole texts: lengths at which the file would cut or pad them are left out, and so is what it
    would put behind each. Tokens that the folder lists or names beside it are added, see `added_tokens`.

    Raises:
        FileNotFoundError: there is no such path, or the folder holds no ``tokenizer.json``.
        ValueError: a file is damaged, two of them do not belong together, or a GGUF file's tokenizer is of a
            kind that is not rebuilt here.
    """
    path = _local(path_or_id, ADDED_TOKENS_FILES)
    if _is_gguf(path):
        return fast_tokenizer(gguf_tokenizer(path))
    file = path / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} holds no tokenizer.json. Older releases ship tokenizer.model (sentencepiece) only; "
            "transformers' AutoTokenizer reads it, and its save_pretrained writes tokenizer.json."
        )
    tokenizer = read_tokenizer(file)
    tokens = read_added_tokens(path)
    tokens.add_to(tokenizer)
    _require_one_beginning(tokenizer, tokens, path / "tokenizer_config.json")
    return tokenizer


def read_tokenizer(file: str | Path) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json``, under whatever name; as `load_tokenizer` gives it.

    Raises:
        ValueError: the file is damaged, or something else, or gives two tokens one id.
    """
    try:
        with panics_as_errors():
            # read here: the package knows only names of files that are UTF-8
            tokenizer = Tokenizer.from_str(Path(file).read_text(encoding="utf-8"))
    except OSError:
        raise
    except Exception as error:  # the package raises plain Exception
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is not a tokenizer.json of the tokenizers package: {reason}") from None
    if (largest := _largest_id(tokenizer)) >= LARGEST_VOCABULARY:  # the package counts through all before it
        raise ValueError(
            f"{file} gives a token the id {largest:,}; expected less than {LARGEST_VOCABULARY:,}."
        )
    names: dict[int, str] = {}
    for name, token in tokenizer.get_vocab().items():
        if (other := names.setdefault(token, name)) != name:
            raise ValueError(
                f"{file} gives {shown(min(name, other))} and {shown(max(name, other))} the same id, {token}; "
                "expected an id of its own for each token."
            )
    try:
        return fast_tokenizer(tokenizer)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def load_chat_template(path_or_id: str | Path) -> str | None:
    """How a model wants a conversation written: its own template, in Jinja; None if it has none.

    It is a program of whoever released the model. Run it in a sandbox.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: a file is damaged, or holds several templates and none of them is the default.
    """
    path = _local(path_or_id, [_CHAT_TEMPLATE, "tokenizer_config.json"])
    if _is_gguf(path):
        source, template = (
            f"{path}, tokenizer.chat_template,",
            read_gguf(path).metadata.get("tokenizer.chat_template"),
        )
    elif (file := path / _CHAT_TEMPLATE).is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8: {error}") from None
    elif (file := path / "tokenizer_config.json").is_file():
        source, template = f"{file}, chat_template,", read_json(file).get("chat_template")
    else:
        return None
    if isinstance(template, list):  # several, by name
        named = {
            one["name"]: one.get("template")
            for one in template
            if isinstance(one, dict) and isinstance(one.get("name"), str)
        }
        if "default" not in named:
            raise ValueError(f"{source} holds templates named {few(sorted(named))}; none is the default.")
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{source} holds {shown(template)}; expected a text.")
    return template


def load_special_tokens(path_or_id: str | Path) -> dict[str, str]:
    """The tokens that a model's chat template may name: ``bos_token``, ``eos_token`` and others it has.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: a file is damaged.
    """
    path = _local(path_or_id, ADDED_TOKENS_FILES)
    if _is_gguf(path):
        file = read_gguf(path)
        tokens = file.metadata.get("tokenizer.ggml.tokens", ())
        ids = {f"{name}_token": special_id(file, name) for name in ("bos", "eos")}
        return {name: tokens[i] for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    return {name: str(token) for name, token in read_added_tokens(path).named.items()}


def name_special_tokens(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, str]:
    """The same of a model without such files: ``bos_token`` and ``eos_token``, where it has them.

    The first is what the tokenizer puts in front of texts, the other the first id that ends a text of the
    model. Only special tokens are named: transformers would make one of any other, and texts split
    differently.
    """
    added = tokenizer.get_added_tokens_decoder()
    ids = {"bos_token": tokenizer.encode("").ids[:1], "eos_token": config.eos_token_id}
    special = {name: [i for i in each if i in added and added[i].special] for name, each in ids.items()}
    return {name: added[each[0]].content for name, each in special.items() if each}


def save_pretrained(
    model: Decoder,
    path: str | Path,
    tokenizer: Tokenizer | BytePairTokenizer | None = None,
    *,
    chat_template: str | None = None,
    special_tokens: Mapping[str, str] | None = None,
    model_type: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model as a folder that `load_pretrained`, transformers, vLLM and others read.

    All files are written to a folder beside the place and renamed at the end, so the place holds either a
    whole checkpoint or nothing; an empty folder keeps it until then. Nothing is ever overwritten.

    Args:
        model: the model to write. The ids that end a text are those of its config.
        path: a folder that does not exist yet, or is empty.
        tokenizer: of the model; written as ``tokenizer.json``, without lengths at which texts are cut or
            padded, with what transformers' ``AutoTokenizer`` asks for beside it. Left out: none is written.
        chat_template: how the model wants a conversation written, in Jinja; written as
            ``chat_template.jinja``. Left out: none is written.
        special_tokens: what that may name, as `load_special_tokens` gives it; written with the tokenizer, if
            they are special in it, see `name_special_tokens`. What is left out is what that gives.
        model_type: the family (see `families`). Left out: "minicpm3" with latent attention; with multipliers
            "granite", as which transformers opens a MiniCPM without code from elsewhere, or with experts,
            too, "minicpm"; without multipliers "mixtral" with experts and "llama" without.
        max_shard_bytes: the weights are split into files of about this size; a tensor is never split.

    Warns:
        UserWarning: texts of the model end at an ordinary token of the tokenizer.

    Raises:
        FileExistsError: the folder holds something or is the working directory, or another program writes it.
        ValueError: the family computes something else than the model, the model was changed inside, or the
            tokenizer gives ids that the model does not know.
        OSError: the folder above is missing or cannot be written, or the disk is full; nothing is left.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile was given
    path = Path(os.path.expanduser(path)).resolve()
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"There is no folder {path.parent} to write {path.name} into; create it first."
        )
    require_positive_integer("max_shard_bytes", max_shard_bytes)
    family = model_type or own_family(model.config)
    values = config_to_json(model.config, family)
    weights = _plain_weights(model)
    values["dtype"] = values["torch_dtype"] = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    if tokenizer is not None:
        tokenizer = fast_tokenizer(tokenizer)
        _require_known_ids(tokenizer, model.config)
        warn_of_ordinary_ends(tokenizer, model.config)
    with _new_folder(path), written_whole(path, folder=True) as beside:
        beside.mkdir()
        write_json(beside / "config.json", values)
        if model.config.eos_token_id:
            ends = {"eos_token_id": end_ids_to_json(model.config)}
            write_json(beside / "generation_config.json", ends)
        if tokenizer is not None:
            (beside / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
            special = {str(t) for t in tokenizer.get_added_tokens_decoder().values() if t.special}
            given = {name: token for name, token in (special_tokens or {}).items() if token in special}
            named = name_special_tokens(tokenizer, model.config) | given
            write_json(beside / "tokenizer_config.json", _tokenizer_settings(model.config) | named)
        if chat_template is not None:
            (beside / _CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8", newline="")
        named = {stored_name(name, family): tensor for name, tensor in weights.items()}
        write_weights(beside, named, max_shard_bytes)


def _require_one_beginning(tokenizer: Tokenizer, tokens: AddedTokens, settings: Path) -> None:
    """Refuse settings that begin a text otherwise than ``tokenizer.json``, where they count."""
    if (name := tokens.of_class) not in _PUT_A_BLANK:
        return
    blank = tokenizer.encode("a", add_special_tokens=False).tokens[:1] != ["a"]
    begins = [("add_prefix_space", "blank", blank, None if name == "LlamaTokenizer" else False)]
    if name == "GPTNeoXTokenizer":
        begins.append(("add_bos_token", "token", bool(tokenizer.encode("").ids), False))
    for key, what, puts, default in begins:
        asked, says = tokens.settings.get(key), f"says {key}: {json.dumps(tokens.settings.get(key))}"
        if asked is None:
            asked, says = default, f"leaves out {key}, which is {json.dumps(default)} then"
        if isinstance(asked, bool) and asked != puts:
            raise ValueError(
                f"{settings} {says}, and tokenizer.json puts {'a' if puts else 'no'} {what} before a text. "
                f"For a {name} transformers heeds the first, others the second. Make the two the same."
            )


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def _local(path_or_id: str | Path, hub_files: list[str]) -> Path:
    """The path itself, or where the hub's files of that name were put."""
    path = Path(os.path.expanduser(path_or_id))
    if _is_gguf(path) and path.is_file() or path.is_dir():
        return path
    if path.exists():
        raise ValueError(
            f"{path} is a file; expected the folder that holds config.json and the weights, or a .gguf file."
        )
    if (
        _is_gguf(path)
        or not isinstance(path_or_id, str)
        or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path_or_id)
    ):
        hint = (
            " It is the name of a shape, without weights: see load_config."
            if str(path) in list_configs()
            else ""
        )
        raise FileNotFoundError(f"There is no folder or file {path}.{hint}")
    hub = require("huggingface_hub", install="minicpm_lite[pretrained]", purpose="download a model")
    try:
        return Path(hub.snapshot_download(path_or_id, allow_patterns=hub_files))
    except OSError as error:  # all of the hub's refusals and network troubles are OSErrors
        raise FileNotFoundError(
            f"There is no folder {path_or_id}, and the hub gave no model of that name: {error}"
        ) from error


def _load_folder(folder: Path, dtype: torch.dtype) -> Decoder:
    file, generation = folder / "config.json", folder / "generation_config.json"
    if not file.is_file():
        hint = ""
        if (folder / "checkpoint.json").exists() or any(folder.glob("step-*/checkpoint.json")):
            hint = (
                " This is a run of the trainer: `minicpm-lite export` makes a model's folder of it, and "
                "minicpm_lite.training.sharded_checkpoint.load_weights reads one of its checkpoints."
            )
        raise FileNotFoundError(f"There is no {file}; a model's folder holds its shape there.{hint}")
    values = read_json(file)
    config = config_from_json(values, str(file))
    if generation.is_file():
        ends = read_json(generation).get("eos_token_id")
        try:
            config = replace(config, eos_token_id=ends)
        except ValueError as error:
            raise ValueError(f"{generation}: {error}") from None
    family = family_of(values)
    shapes, tensors = read_weights(folder)
    shapes = {name: shape for name, shape in shapes.items() if not _HARMLESS.search(name)}
    return assemble(
        empty_decoder(config, len(shapes), str(folder)),
        lambda name: stored_name(name, family),
        shapes,
        tensors,
        dtype,
        str(folder),
    )


@contextmanager
def _new_folder(path: Path) -> Iterator[None]:
    """Make a folder, or take an empty one, and keep other writers out."""
    occupied = FileExistsError(
        f"{path} exists and holds something; nothing is overwritten. Give another folder, or remove it."
    )
    is_new = not path.exists()
    if not is_new and not path.is_dir():
        raise occupied
    path.mkdir(exist_ok=True)
    with locked(path):
        if any(path.iterdir()):  # also what another program put there meanwhile
            raise occupied
        try:
            yield
        except BaseException:
            if is_new:
                with suppress(OSError):  # it holds something
                    path.rmdir()
            raise


def _plain_weights(model: Decoder) -> dict[str, torch.Tensor]:
    """The weights by name, if they are those of a plain decoder, each with numbers of its own."""
    require_plain(model)
    weights = model.state_dict()
    if any(tensor.is_meta for tensor in weights.values()):
        raise ValueError("The model is on the meta device: it has shapes and no weights to write.")
    first: dict[int, str] = {}  # the first name of the numbers at an address
    for name, tensor in weights.items():
        twin = first.setdefault(tensor.data_ptr(), name)
        if twin != name:
            raise ValueError(
                f"{twin} and {name} are one tensor under two names, and would be two in the file. Give each "
                "its own copy; for the two tables, set tie_word_embeddings instead."
            )
    return weights


def _largest_id(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab().values(), default=0)


def _require_known_ids(tokenizer: Tokenizer, config: ModelConfig) -> None:
    if (largest := _largest_id(tokenizer)) >= config.vocab_size:
        raise ValueError(
            f"The tokenizer gives ids up to {largest}, and the model knows {config.vocab_size} ids. It is "
            "another model's tokenizer."
        )


def _tokenizer_settings(config: ModelConfig) -> dict[str, object]:
    """What ``tokenizer_config.json`` must say, so that AutoTokenizer gives the same ids."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
