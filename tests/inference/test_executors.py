"""Executors: what an engine may ask of each, compiled code too, and what is refused."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from minicpm_lite.config import MixtureConfig, ModelConfig, SparseConfig
from minicpm_lite.inference import executors
from minicpm_lite.inference.engine import Engine, Request
from minicpm_lite.inference.executors import CompiledExecutor, Executor, PagedExecutor
from minicpm_lite.inference.packed import PackedEmbedding, quantize_model
from minicpm_lite.language.chat import Chat
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.fast_decoding import fast_decoding
from minicpm_lite.language.writing import generate_text

ROOT = Path(__file__).parents[2]
CONFIG = ModelConfig(
    16, 24, 4, 2, 23, num_key_value_heads=1, max_position_embeddings=64, init_std=0.4, eos_token_id=(22,)
)


@cache
def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIG).eval()


@pytest.mark.parametrize("kind", [PagedExecutor, CompiledExecutor])
def test_what_an_engine_asks_for_is_there(kind):
    assert isinstance(kind(model(), 8), Executor)


@torch.no_grad()
def test_streams_are_those_of_the_decoder():
    executor, ids = PagedExecutor(model(), 8), [1, 2, 3, 4, 5]
    text = executor.open(ids, 12)
    scores, streams = executor.prefill(text, ids, (2, 1))
    *wanted, last = model().read(torch.tensor([ids]), after=(2, 1))
    torch.testing.assert_close(streams, torch.cat(wanted, dim=-1)[0])
    torch.testing.assert_close(scores, model().logits(last)[0, -1])
    assert executor.decode([text], [6])[1] is None
    _, streams = executor.verify([text], [[7, 8, 9]], [[-1, 0, 0]], (3,))
    *wanted, _ = model().read(torch.tensor([[*ids, 6, 7, 9]]), after=(3,))
    torch.testing.assert_close(streams[0, [0, 2]], wanted[0][0, -2:])
    executor.accept([[0, 2]])
    assert text.tokens == [*ids, 6, 7, 9]


def test_weights_are_looked_at_only_where_a_text_finds_room(monkeypatch):
    executor, looked, appearance = PagedExecutor(model(), 2, page_size=8), [], executors.appearance
    monkeypatch.setattr(executors, "appearance", lambda model: looked.append(model) or appearance(model))
    text = executor.open([1, 2, 3], 16)
    assert [executor.open([4], 8) for _ in range(3)] == [None] * 3 and looked == [executor.model]
    executor.close(text)
    assert executor.open([4], 8) is not None and len(looked) == 2


@pytest.mark.parametrize(
    ("room", "why"),
    [(65, "room is 65, and the model was made to read 64 tokens"), (0, "room"), ("a", "room")],
)
def test_room_beyond_the_model_is_refused(room, why, unchecked):
    with pytest.raises(ValueError, match=why):
        PagedExecutor(model(), 32, room=room)


def test_packed_tables_are_not_unpacked_in_each_step(monkeypatch):
    """Where a model is, its weights tell; those of a packed table are unpacked for whoever asks."""
    torch.manual_seed(0)
    packed = quantize_model(Decoder(ModelConfig(32, 64, 2, 2, 23, init_std=0.3)).eval(), "Q8_0")
    monkeypatch.setattr(PackedEmbedding, "weight", property(lambda table: pytest.fail("It was unpacked.")))
    serving = Engine(PagedExecutor(packed, 8))
    answer = serving.submit(Request((1, 2, 3), 4, stop_ids=()))
    serving.run()
    assert answer.state == "done"
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(23)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert len(generate_text(packed, tokenizer, ["1 2 3"], 4)) == 1
    assert "".join(Chat(packed, tokenizer, lambda messages: messages[-1]["content"]).answer("1 2", 3))


@pytest.mark.slow  # compiles in a process of its own
def test_compiled_code_writes_the_same_texts_and_is_made_a_few_times():
    script = Path(__file__).with_name("compiled_engine.py")
    run = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("is served") == 2


SPARSE = SparseConfig(4, 2, 1, 4, 8, 2, dense_len=0)


def own_kernels(type: str) -> Decoder:
    """A small model with the kernels of this library, in float32 or packed."""
    torch.manual_seed(0)
    config = ModelConfig(64, 96, 3, 4, 50, num_key_value_heads=2, max_position_embeddings=200, init_std=0.3)
    plain = Decoder(config).eval()
    return fast_decoding(plain) if type == "F32" else quantize_model(plain, type)


@pytest.mark.parametrize("type", ["F32", "Q8_0"])
@pytest.mark.parametrize("sparse", [None, SPARSE], ids=["dense", "sparse"])
def test_a_token_has_the_same_bits_in_any_company(type, sparse):
    """One by one, or among guesses and beside other texts."""
    model = own_kernels(type)
    tree, path = [7, 1, 8, 2, 9, 3], [0, 2, 4, 5]
    for length, others in ((3, 60), (13, 9), (13, 150), (60, 3), (130, 20)):  # of the first 16 all is seen
        executor = PagedExecutor(model, 80, 8, sparse=sparse)
        prompt, longer = torch.randint(50, (length,)).tolist(), torch.randint(50, (others,)).tolist()
        one, many, other = (executor.open(ids, len(ids) + 10, False) for ids in (prompt, prompt, longer))
        for text, ids in ((one, prompt), (many, prompt), (other, longer)):
            executor.prefill(text, ids)
        alone = [executor.decode([one], [tree[place]])[0][0] for place in path]
        scores, _ = executor.verify([other, many], [[4, 5], tree], [[-1, 0], [-1, 0, 0, 2, 2, 4]])
        assert torch.equal(scores[1][path], torch.stack(alone))


@pytest.mark.parametrize("guesses", [30, 31, 32, 33, 60])
@pytest.mark.parametrize("sparse", [None, SPARSE], ids=["dense", "sparse"])
def test_many_guesses_of_a_neighbour_change_no_bit(guesses, sparse):
    """Packed layers take any number of rows in the same order, and so must attention."""
    model = own_kernels("Q8_0")
    executor = PagedExecutor(model, 120, 8, sparse=sparse)
    prompts = [torch.randint(50, (length,)).tolist() for length in (40, 13)]
    texts = [executor.open(ids, len(ids) + 70, False) for ids in prompts]
    other, one = texts
    for text, ids in zip(texts, prompts, strict=True):
        executor.prefill(text, ids)
    tree = torch.randint(50, (guesses + 1,)).tolist()
    beside, _ = executor.verify([other, one], [tree, [3]], [[*range(-1, guesses)], [-1]])
    executor.accept([[0], []])
    alone, _ = executor.verify([one], [[3]], [[-1]])
    executor.accept([[]])
    decoded, _ = executor.decode([one], [3])
    assert torch.equal(beside[1][0], alone[0][0]) and torch.equal(alone[0][0], decoded[0])


@pytest.mark.parametrize("type", ["F32", "Q8_0"])
@pytest.mark.parametrize("sparse", [None, SPARSE], ids=["dense", "sparse"])
def test_a_prompt_has_the_same_bits_however_it_is_cut_into_pieces_of_up_to_32(type, sparse):
    model, ids = own_kernels(type), torch.randint(50, (90,)).tolist()
    found = []
    for cuts in ([32] * 3, [7] * 13, [1, 31, 1, 31, 26], [16, 3] * 5, [1] * 90):
        executor = PagedExecutor(model, 20, 8, sparse=sparse)
        text, start = executor.open(ids, 100), 0
        for size in cuts:
            piece = ids[start : start + size]
            if piece:
                scores, _ = executor.prefill(text, piece)
            start += size
        found.append(torch.stack([scores, executor.decode([text], [5])[0][0]]))
    for other in found[1:]:
        assert torch.equal(other, found[0])


def test_a_mixture_of_experts_is_refused_by_code_for_one_graph():
    config = ModelConfig(32, 48, 2, 4, 40, mixture=MixtureConfig(3, 2))
    with pytest.raises(
        ValueError, match="The model has a mixture of experts; .* Give it to a PagedExecutor."
    ):
        CompiledExecutor(Decoder(config).eval(), 20)
