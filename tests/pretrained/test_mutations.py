"""Small files of every kind, damaged in every way: each is read, or refused in one line; none hangs.

Where a checksum can tell, what is read is what was written. The seeds are fixed; another range of them, for a
longer search:

    python -m tests.pretrained.test_mutations 1000 1200
"""

import json
import math
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import AddedToken

from minicpm_lite import ModelConfig, load_config
from minicpm_lite.config import LatentAttentionConfig, RopeScaling, load_recipe
from minicpm_lite.inference.packed import load_packed, quantize_model, save_packed
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.tokenizer import train_tokenizer
from minicpm_lite.pretrained.checkpoints import (
    load_chat_template,
    load_pretrained,
    load_tokenizer,
    save_pretrained,
)
from minicpm_lite.pretrained.llama_cpp import stored_name
from minicpm_lite.training.checkpoint import load_checkpoint, save_checkpoint

REFUSALS = (ValueError, FileNotFoundError, ImportError)
SECONDS = 10
SHAPE = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=270)
YAML = """\
model:
  source: a test
  hidden_size: 8
  intermediate_size: 8
  num_hidden_layers: 2
  num_attention_heads: 2
  vocab_size: 270
  rope_theta: 1e4
  eos_token_id: [1, 2]
  latent_attention: {q_lora_rank: 4, kv_lora_rank: 4, qk_nope_head_dim: 2, qk_rope_head_dim: 2, v_head_dim: 4}
  mixture: {num_experts: 4, num_experts_per_token: 2}
training:
  tokens: 1.1e12
"""
CHECKPOINT = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1.5, dtype=torch.bfloat16)}
FACTS = {"step": 3, "losses": [1.5, 1.25], "name": "ä"}


# How a file is damaged.

ODD_VALUES = [None, True, False, 0, 1, -1, 2**31, 2**62, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "a", "1e-5", "\n", "\ud800", "</s>", [], [1], [[]], ["a"], {}, {"a": 1}]  # fmt: skip
ODD_NUMBERS = [0, 1, 2, 4, 7, 8, 9, 12, 13, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content) + 1)]


def flip(content: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def overwrite(content: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(content)
    at = chance.randrange(len(damaged))
    new = chance.choice([
        bytes([chance.randrange(256)]), b"\0" * 8, b"\xff" * 4, b"\n", b"\x80",
        struct.pack("<Q", chance.choice(ODD_NUMBERS)), struct.pack("<I", chance.choice(ODD_NUMBERS) % 2**32),
    ])  # fmt: skip
    damaged[at : at + len(new)] = new
    return bytes(damaged)


def insert(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content) + 1)
    new = chance.choice(
        [
            b"\0",
            b'"',
            b"[",
            b"]",
            b"{",
            b"}",
            b",",
            b":",
            b"\n",
            b"\xff",
            b"9" * 5_000,
            b"[" * 5_000,
            b"- " * 500,
        ]
    )
    return content[:at] + new + content[at:]


def repeat(content: bytes, chance: random.Random) -> bytes:
    """A piece a second time, so that names stand twice."""
    start, end = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    return content[:end] + content[start:]


def swap(content: bytes, chance: random.Random) -> bytes:
    """Two pieces change places."""
    a, b, c, d = sorted(chance.randrange(len(content) + 1) for _ in range(4))
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


BYTES = [cut, flip, flip, overwrite, overwrite, insert, repeat, swap]


def change_value(content: bytes, chance: random.Random) -> bytes:
    """Somewhere in a JSON file another value, of any type, or none, or a name that no one knows."""
    whole = json.loads(content)
    places = []

    def walk(value: object) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list) and len(places) < 2_000:
                walk(value[key])

    walk(whole)
    holder, key = chance.choice(places)
    what = chance.randrange(4)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, dict):
        holder[chance.choice(["unheard_of", "", "\n", key.upper()])] = holder.pop(key)
    elif what == 2 and len(places) > 1:
        other, elsewhere = chance.choice(places)
        holder[key] = json.loads(json.dumps(other[elsewhere]))
    else:
        holder[key] = chance.choice(ODD_VALUES)
    return json.dumps(whole).encode("utf-8", "surrogatepass")


def change_word(content: bytes, chance: random.Random) -> bytes:
    """Somewhere in a text another word, or none."""
    words = re.split(r"(\w+)", content.decode())
    words[chance.randrange(1, len(words), 2)] = str(chance.choice(ODD_VALUES))
    return "".join(words).encode("utf-8", "surrogatepass")


def typed(kind: int, letter: str, *values: float) -> bytes:
    """A value of a key as GGUF spells it; several are a list."""
    head = struct.pack("<I", kind) if len(values) == 1 else struct.pack("<IIQ", 9, kind, len(values))
    return head + struct.pack(f"<{len(values)}{letter}", *values)


def texts(*values: str) -> bytes:
    head = struct.pack("<I", 8) if len(values) == 1 else struct.pack("<IIQ", 9, 8, len(values))
    return head + b"".join(struct.pack("<Q", len(value.encode())) + value.encode() for value in values)


ODD_KEYS = [
    *(typed(4, "I", number % 2**32) for number in ODD_NUMBERS),
    *(typed(10, "Q", number) for number in ODD_NUMBERS),
    *(typed(6, "f", number) for number in (0.0, -1.0, 0.5, 3.0, 1e-45, math.nan, math.inf)),
    typed(5, "i", -1), typed(12, "d", 1e308), typed(12, "d", 1e-320), typed(7, "?", True), typed(7, "?", False),
    *(texts(text) for text in ("", "a", "llama", "gpt2", "granite", "yarn", "a\nb", "9" * 5_000)),
    typed(5, "i"), typed(5, "i", 1, 2), typed(5, "i", *[3] * 11), typed(6, "f", *[math.nan] * 11), texts("a", "a"), texts("", "a b"),
]  # fmt: skip


def change_key(content: bytes, chance: random.Random) -> bytes:
    """A key of a GGUF file gets another value, of any type, or another name; all else stays in its place."""
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(content)
        file.flush()
        reader = gguf.GGUFReader(file.name)
        names = [name for name in reader.fields if not name.startswith("GGUF.")]
        field = reader.fields[name := chance.choice(names)]
        end = field.offset + sum(part.nbytes for part in field.parts)
        last = reader.tensors[-1].field
        table_end, data = last.offset + sum(part.nbytes for part in last.parts), reader.data_offset
    start = field.offset + 8 + len(name)
    value = chance.choice([*ODD_KEYS, content[start:end]])
    if value == content[start:end]:
        name = chance.choice(["unheard.of", chance.choice(names), ""])
    head = (
        content[: field.offset]
        + struct.pack("<Q", len(name))
        + name.encode()
        + value
        + content[end:table_end]
    )
    return head + bytes(-len(head) % 32) + content[data:]


WITHIN = {".json": change_value, ".yaml": change_word, ".jinja": change_word, ".gguf": change_key}


# Files of every kind, and who reads them.


def write_gguf(path: Path, kind: str) -> None:
    """A small model of MiniCPM's third architecture with a tokenizer, as gguf-py writes it."""
    writer = gguf.GGUFWriter(path, "minicpm3")
    sizes = {"context_length": 16, "embedding_length": 8, "block_count": 1, "feed_forward_length": 8, "attention.head_count": 2, "attention.head_count_kv": 2, "attention.q_lora_rank": 4, "attention.kv_lora_rank": 4, "attention.key_length": 4, "attention.value_length": 4, "rope.dimension_count": 2}  # fmt: skip
    for name, value in sizes.items():
        writer.add_uint32(f"minicpm3.{name}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_string("minicpm3.rope.scaling.type", "longrope")
    writer.add_tokenizer_model(kind)
    letters = ["▁", *"abc"] if kind == "llama" else list("abc")
    tokens = ["<unk>", "<s>", "</s>", *letters, "ab", "abc", "<|end|>"]
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3, *[1] * (len(letters) + 2), 4])
    writer.add_token_scores([0.0] * 3 + [-float(i) for i in range(len(tokens) - 3)])
    if kind == "gpt2":
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}")
    latent = LatentAttentionConfig(4, 4, 2, 2, 4)
    config = ModelConfig(
        8, 8, 1, 2, len(tokens), head_dim=4, latent_attention=latent, tie_word_embeddings=False
    )
    for name, tensor in Decoder(config).state_dict().items():
        writer.add_tensor(stored_name(name), tensor.numpy())
    for length in ("short", "long"):
        writer.add_tensor(f"rope_factors_{length}.weight", torch.ones(1).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_all(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer("a man, a plan, a canal " * 9, 262)
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    scaling = RopeScaling("longrope", 64, short_factor=(1.0, 1.5), long_factor=(2.0, 3.0))
    config = ModelConfig(**SHAPE, scale_emb=12, scale_depth=1.4, dim_model_base=4, rope_scaling=scaling, eos_token_id=(1, 2))  # fmt: skip
    save_pretrained(
        Decoder(config), folder / "model", tokenizer, chat_template="{{ messages }}", max_shard_bytes=6_000
    )
    named = [{"name": name, "template": "{{ messages }}"} for name in ("default", "tool_use")]
    (folder / "old").mkdir()
    (folder / "old/tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "chat_template": named})
    )
    write_gguf(folder / "sentencepiece.gguf", "llama")
    write_gguf(folder / "bytes.gguf", "gpt2")
    (folder / "a.yaml").write_text(YAML)
    save_checkpoint(folder / "a.checkpoint", CHECKPOINT, FACTS)
    save_packed(a_packed_model(), folder / "a.packed")


def a_packed_model() -> Decoder:
    torch.manual_seed(1)
    return quantize_model(
        Decoder(ModelConfig(**SHAPE | {"hidden_size": 32, "intermediate_size": 32})), "Q8_0"
    )


def read_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer.to_str(), str)


def read_checkpoint(path: Path) -> None:
    tensors, facts = load_checkpoint(path)
    assert facts == FACTS and tensors.keys() == CHECKPOINT.keys()
    for name, tensor in CHECKPOINT.items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype


def read_packed(path: Path) -> None:
    loaded, written = load_packed(path).state_dict(), a_packed_model().state_dict()
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in written.items())


def in_folder(*readers: Callable[[Path], object]) -> list[Callable[[Path], object]]:
    return [lambda path, read=read: read(path.parent) for read in readers]


GGUF_READERS = [load_pretrained, read_tokenizer, load_chat_template]
READERS: dict[str, list[Callable[[Path], object]]] = {
    "model/config.json": in_folder(load_pretrained),
    "model/generation_config.json": in_folder(load_pretrained),
    "model/model.safetensors.index.json": in_folder(load_pretrained),
    "model/model-00001-of-00002.safetensors": in_folder(load_pretrained),
    "model/tokenizer.json": in_folder(read_tokenizer),
    "old/tokenizer_config.json": in_folder(load_chat_template),
    "model/chat_template.jinja": in_folder(load_chat_template),
    "sentencepiece.gguf": GGUF_READERS,
    "bytes.gguf": GGUF_READERS,
    "a.yaml": [load_config, load_recipe],
    "a.checkpoint": [read_checkpoint],
    "a.packed": [read_packed],
}


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"still at it after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(folder: Path, kind: str, seed: int) -> str:
    """What becomes of a file that one seed damaged; whatever is not allowed is raised."""
    file, chance = folder / kind, random.Random(f"{kind} {seed}")
    whole = file.read_bytes()
    damage = chance.choice([WITHIN.get(file.suffix, chance.choice(BYTES)), chance.choice(BYTES)])
    refused = False
    try:
        file.unlink()  # where a file is cut and written again, some systems wait for the disk
        file.write_bytes(damage(whole, chance))
        for read in READERS[kind]:
            try:
                with no_longer_than(SECONDS), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    read(file)
            except REFUSALS as error:
                assert str(error) and len(str(error).splitlines()) == 1, repr(error)
                refused = True
    finally:
        file.unlink(missing_ok=True)
        file.write_bytes(whole)
    return "refused" if refused else "read"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mutations")
    write_all(folder)
    return folder


@pytest.mark.slow  # 140 damages of each of twelve files
@pytest.mark.parametrize("kind", READERS)
@pytest.mark.filterwarnings("ignore:The model ends texts at")
def test_damaged_files_are_read_or_refused_in_one_line(kind, files):
    found = Counter(outcome(files, kind, seed) for seed in range(140))
    assert found["refused"] > 10


def test_whole_files_are_read(files):
    for kind, readers in READERS.items():
        for read in readers:
            read(files / kind)


if __name__ == "__main__":
    place = Path(tempfile.mkdtemp())
    write_all(place)
    for kind in READERS if len(sys.argv) < 4 else sys.argv[3:]:
        found = Counter()
        for seed in range(*map(int, sys.argv[1:3])):
            begin = time.perf_counter()
            try:
                found[outcome(place, kind, seed)] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                found[repr(error)[:200]] += 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                print("FAULT", kind, seed, repr(error)[:300], where.filename, where.lineno, flush=True)
            if time.perf_counter() - begin > 1:
                print("SLOW", kind, seed, time.perf_counter() - begin)
        print(kind, found, flush=True)
    shutil.rmtree(place)
