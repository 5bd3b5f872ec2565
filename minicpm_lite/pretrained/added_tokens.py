"""The tokens that a model's folder adds to those of ``tokenizer.json``, as transformers reads its files.

    tokenizer_config.json      lists tokens by id (``added_tokens_decoder``) and names some, as ``eos_token``
    special_tokens_map.json    names more, in older folders
    added_tokens.json          lists more, in older folders
    config.json                says of which family the model is

Source: `TokenizersBackend` of transformers 5.23, its tokenizer for models without a class of their own; and
`AutoTokenizer`, which chooses the class.

Choices, and the traps behind them:

- A control token that is not added is spelt in letters; the model answers worse, and nothing tells.
- The older files count only where ``tokenizer_config.json`` lists nothing.
- A token that is listed with other flags than in ``tokenizer.json`` has those of the list. One that is named
  is special.
- A class of transformers that ``tokenizer_config.json`` names has names of its own for what the files leave
  out: without them a template that writes ``eos_token`` writes nothing. Of some families it is not heeded.
- A list may give a token an id that it cannot get behind ``tokenizer.json``. transformers opens such a folder
  and reads the token as another row of the model's table; here it is refused.
"""

from dataclasses import dataclass
from operator import index
from pathlib import Path
from reprlib import repr as shown

from tokenizers import AddedToken, Tokenizer

from .weights import read_json

__all__ = ["ADDED_TOKENS_FILES", "AddedTokens", "read_added_tokens"]

_SETTINGS, _NAMES_FILE, _IDS_FILE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_MODEL, _TOKENIZER = "config.json", "tokenizer.json"
ADDED_TOKENS_FILES = [_SETTINGS, _NAMES_FILE, _IDS_FILE, _MODEL, _TOKENIZER]
_NAMES = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)  # of all models
_NAMES_OF_CLASS = {  # what they are where no file says so
    "CodeLlamaTokenizer": {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "prefix_token": "▁<PRE>",
        "middle_token": "▁<MID>",
        "suffix_token": "▁<SUF>",
        "eot_token": "▁<EOT>",
        "fill_token": "<FILL_ME>",
    },
    "CohereTokenizer": {
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "unk_token": "<UNK>",
        "pad_token": "<PAD>",
        "cls_token": "<CLS>",
        "sep_token": "<SEP>",
        "mask_token": "<MASK_TOKEN>",
    },
    "GemmaTokenizer": {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad", "mask")},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "GPTNeoXTokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    | {"pad_token": "<|padding|>"},
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}
_HEED_NO_CLASS = ("granite", "minicpm3", "mistral", "mixtral")  # families
_TOKEN = str | dict | AddedToken  # of other types are flags such as "add_bos_token"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class AddedTokens:
    """What a folder says of added tokens; those without flags are texts.

    Attributes:
        listed: by id.
        named: by a name that ends in "_token", in the order in which they are added.
        extra: special ones without a name.
        of_older_folder: ``tokenizer.json`` lists tokens, too.
        source: the file that lists.
        settings: what ``tokenizer_config.json`` says of all else.
        of_class: whose rules transformers follows beside these files; "": none's.
    """

    listed: dict[int, AddedToken]
    named: dict[str, str | AddedToken]
    extra: list[str | AddedToken]
    of_older_folder: bool
    source: Path
    settings: dict
    of_class: str

    def add_to(self, tokenizer: Tokenizer) -> None:
        """Add them to the tokenizer of the folder's ``tokenizer.json``, or give them their flags there.

        Raises:
            ValueError: a token that is new gets another id than it is listed with.
        """
        own = tokenizer.get_added_tokens_decoder()
        listed = self.listed | own if self.of_older_folder else self.listed
        known = {str(token) for token in (*own.values(), *listed.values())}
        tokens: list[str | AddedToken] = [listed[i] for i in sorted(listed)]
        for token in (*self.named.values(), *self.extra):
            if str(token) not in known and token not in tokens:
                tokens.append(token)
        names = {str(token) for token in self.named.values()}
        for place, token in enumerate(tokens):
            if isinstance(token, str):
                tokens[place] = AddedToken(token, special=True)
            elif str(token) in names:
                token.special = True
        tokenizer.add_tokens(tokens)
        before = {str(token) for token in own.values()}
        for i, token in sorted(listed.items()):
            name, given = str(token), tokenizer.token_to_id(str(token))
            if name and name not in before and given != i:
                raise ValueError(
                    f"{self.source} lists {name!r} as id {i}, and behind tokenizer.json it has id {given}. "
                    "The two files do not belong together."
                )


def read_added_tokens(folder: Path) -> AddedTokens:
    """What the files of a folder say of added tokens.

    Raises:
        ValueError: a file is damaged, or holds something else than tokens.
    """
    settings = _read(folder / _SETTINGS)
    older = "added_tokens_decoder" not in settings
    names = _read(folder / _NAMES_FILE) if older else {}
    source = folder / (_IDS_FILE if older else _SETTINGS)
    ids = _read(source) if older else settings["added_tokens_decoder"]
    of_class = _class_heeded(folder, settings)
    try:
        values = _joined(settings, names)
        named = {name: each for name, each in values.items() if _is_named(name, each)}
        own = values.get("model_specific_special_tokens") or {}
        named = dict.fromkeys(_NAMES) | _NAMES_OF_CLASS.get(of_class, {}) | named | own
        named = {name: _token(each) for name, each in named.items() if isinstance(each, _TOKEN)}
        extra = values.get("extra_special_tokens", values.get("additional_special_tokens")) or []
        if not isinstance(extra, list):
            raise TypeError(f"{shown(extra)} is no list")
        extra = [_token(each) for each in extra]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        files = _SETTINGS + (f" or {_NAMES_FILE}" if names else "")
        raise ValueError(f"{files} in {folder} names special tokens that are none: {error}.") from None
    try:
        if older:
            special = {str(values[name]) for name in _NAMES if values.get(name)}
            special |= {str(each) for each in values.get("extra_special_tokens") or []}
            listed = {
                index(i): AddedToken(name, normalized=name not in special, special=name in special)
                for name, i in ids.items()
            }
        else:
            listed = {int(i): _with_flags(each) for i, each in ids.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{source} lists {shown(ids)} as added tokens; expected tokens and their ids."
        ) from None
    return AddedTokens(listed, named, extra, older, source, settings, of_class)


def _is_named(name: str, value: object) -> bool:
    """Whether it is a token with a name; a table with a name that only some models have must say so."""
    is_table = isinstance(value, dict) and "__type" not in value
    return name.endswith("_token") and (name in _NAMES or not is_table)


def _class_heeded(folder: Path, settings: dict) -> str:
    """The tokenizer's class in transformers, where it decides what files leave out."""
    try:
        model = _read(folder / _MODEL)
    except ValueError as error:
        raise ValueError(
            f"{folder / _MODEL}, which beside a tokenizer says what its model is, cannot be read ({error}). "
            "If it is of something else, keep the tokenizer in a folder of its own."
        ) from None
    name = str(settings.get("tokenizer_class") or model.get("tokenizer_class")).removesuffix("Fast")
    if name not in _NAMES_OF_CLASS or model.get("model_type") in _HEED_NO_CLASS:
        return ""
    if name == "LlamaTokenizer" and _is_byte_level(folder / _TOKENIZER):
        return ""  # as Llama 3's, which is of no class
    return name


def _is_byte_level(file: Path) -> bool:
    return file.is_file() and b'"ByteLevel"' in file.read_bytes()


def _joined(settings: dict, names: dict) -> dict:
    """The settings, with the names of an older folder, which count more.

    What has a name that only some models have stands under "model_specific_special_tokens" then.
    """
    values = dict(settings)
    if "additional_special_tokens" in values and not values.get("extra_special_tokens"):
        values["extra_special_tokens"] = values.pop("additional_special_tokens")
    own = {name: each for name, each in values.items() if name.endswith("_token") and isinstance(each, str)}
    own = {name: values.pop(name) for name in own if name not in _NAMES}
    if isinstance(values.get("extra_special_tokens"), dict):
        own |= values.pop("extra_special_tokens")
    if own:
        values["model_specific_special_tokens"] = own
    for name, value in names.items():
        if name == "extra_special_tokens" and isinstance(value, list):
            before = values.get(name) or []
            value = before + [each for each in map(_special, value) if each not in before]
        elif name != "extra_special_tokens":
            value = _special(value)
        values[name] = value
    if isinstance(values.get("extra_special_tokens"), dict):
        own = values.get("model_specific_special_tokens") or {}
        values["model_specific_special_tokens"] = own | values.pop("extra_special_tokens")
    return values


def _special(value: object) -> object:
    """A special token with its flags, of a table of them; all else as it is."""
    return _with_flags(value | {"special": True}) if isinstance(value, dict) else value


def _token(value: object) -> str | AddedToken:
    if isinstance(value, str):
        value.encode()  # which half a character cannot be
    return value if isinstance(value, str | AddedToken) else _with_flags(value)


def _with_flags(value: dict) -> AddedToken:
    return AddedToken(value["content"], **{flag: value[flag] for flag in _FLAGS if flag in value})


def _read(file: Path) -> dict:
    return read_json(file) if file.is_file() else {}
