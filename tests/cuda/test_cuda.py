"""On a GPU the library computes what it computes on a CPU, and takes the memory that was planned.

The oracle is the CPU: the same weights and the same ids, in float32 (PyTorch leaves TensorFloat off).
"""

import copy
import gc
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from minicpm_lite.config import (
    LatentAttentionConfig,
    MixtureConfig,
    ModelConfig,
    RopeScaling,
    load_config,
)
from minicpm_lite.data.conversations import EncodedExample
from minicpm_lite.language.chat import Chat, chatml
from minicpm_lite.language.context import Int8Cache, KVCache, Tree, causal_mask, dense_attention
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.documents import loss_within_documents
from minicpm_lite.language.generation import generate, pad_left
from minicpm_lite.language.scoring import next_token_loss
from minicpm_lite.language.tokenizer import train_tokenizer
from minicpm_lite.pretrained.checkpoints import load_pretrained, save_pretrained
from minicpm_lite.training.memory import plan_memory
from minicpm_lite.training.processes import processes
from minicpm_lite.training.settings import Layout, TrainerConfig
from minicpm_lite.training.sharded_checkpoint import load_weights
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.two_stage import score_answers
from minicpm_lite.training.wsd import WSD

BASE = ModelConfig(
    64, 160, 3, 4, 99, num_key_value_heads=2, max_position_embeddings=64, init_std=0.1, scale_emb=12,
    scale_depth=1.4, dim_model_base=32,
)  # fmt: skip
KINDS = {
    "grouped": BASE,
    "untied": replace(BASE, tie_word_embeddings=False),
    "yarn": replace(BASE, rope_scaling=RopeScaling("yarn", 16, 4.0)),
    "latent": replace(
        BASE, num_key_value_heads=4, head_dim=24, latent_attention=LatentAttentionConfig(24, 20, 16, 8, 12)
    ),
    "experts": replace(BASE, mixture=MixtureConfig(4, 2)),
}
TOKENS = torch.arange(4000) * 7 % 97


def two(config: ModelConfig) -> tuple[Decoder, Decoder]:
    """The same model on a CPU and on a GPU."""
    torch.manual_seed(0)
    model = Decoder(config)
    return model, copy.deepcopy(model).cuda()


@pytest.fixture(params=KINDS)
def config(request) -> ModelConfig:
    return KINDS[request.param]


def test_logits_and_gradients(config):
    cpu, gpu = two(config)
    ids = torch.randint(99, (2, 17))
    next_token_loss(cpu, ids).backward()
    next_token_loss(gpu, ids.cuda()).backward()
    assert_close(gpu(ids.cuda()).cpu(), cpu(ids), atol=1e-4, rtol=1e-4)
    for (name, one), other in zip(cpu.named_parameters(), gpu.parameters(), strict=True):
        assert_close(other.grad.cpu(), one.grad, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("samples", [1, 2])
def test_generation(config, samples):
    cpu, gpu = two(config)
    ids, padding = pad_left([[5, 6, 7, 8], [9]])
    settings = dict(max_new_tokens=12, repetition_penalty=1.2, samples=samples)
    written = generate(cpu, ids, padding=padding, **settings)
    assert_close(generate(gpu, ids.cuda(), padding=padding.cuda(), **settings).cpu(), written)
    drawn = generate(
        gpu, ids.cuda(), 8, temperature=1.0, top_k=20, top_p=0.9, padding=padding.cuda(), samples=samples,
        generator=torch.Generator("cuda").manual_seed(0),
    )  # fmt: skip
    assert drawn.shape == (2 * samples, 12) and drawn.is_cuda


@pytest.mark.parametrize("make_cache", [KVCache, Int8Cache, lambda room: KVCache(room, dtype=torch.bfloat16)])
@torch.no_grad()
def test_caches_and_trees(config, make_cache):
    outcomes = []
    for model in two(config):
        device, cache = model.embed_tokens.weight.device, make_cache(32)
        ids = torch.tensor([[3, 1, 4, 1, 5]], device=device)
        model(ids, cache)
        guesses = model(torch.tensor([[7, 8, 9]], device=device), Tree(cache, [-1, 0, 0]))
        cache.take([0, 2])
        cache.truncate(6)
        outcomes.append((guesses.cpu(), model(ids[:, :2], cache).cpu()))
    assert_close(outcomes[1], outcomes[0], atol=5e-2 if make_cache is not KVCache else 1e-4, rtol=1e-3)


def test_a_chat():
    tokenizer = train_tokenizer("the cat sat on the mat " * 20, 280)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    answers = []
    for model in two(replace(BASE, vocab_size=300)):
        chat = Chat(model, tokenizer, chatml)
        answers.append(["".join(chat.answer(text, 6)) for text in ("the cat", "the mat")])
    assert answers[0] == answers[1]


@torch.no_grad()
def test_masked_groups_take_no_memory_for_all_scores():
    """Scores of 16 heads, 2,048 queries and keys would take 268 MB in float32."""
    query, key, value = (torch.randn(1, heads, 2048, 64, device="cuda") for heads in (16, 2, 2))
    mask = causal_mask(2048, 2048, "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    masked = dense_attention(query, key, value, mask)
    assert torch.cuda.max_memory_allocated() - before < 100e6
    assert_close(masked, dense_attention(query, key, value), atol=1e-4, rtol=1e-4)


def trained(model: Decoder, steps: int = 8, layout: Layout = Layout(), **settings) -> Trainer:
    config = TrainerConfig(4, 32, **settings)
    trainer = Trainer(model, TOKENS, WSD(1e-2, 2, 10, 4), config, layout=layout)
    trainer.train(steps, progress=False)
    return trainer


@pytest.mark.parametrize("layout", [Layout(), Layout(micro_batch=2, activation_checkpointing=True)])
def test_training(config, layout):
    cpu, gpu = two(config)
    assert trained(gpu, layout=layout).losses == pytest.approx(trained(cpu).losses, abs=2e-3)


@pytest.mark.parametrize("settings", [dict(precision="bfloat16"), dict(compile=True)])
def test_faster_training(settings):
    cpu, gpu = two(BASE)
    assert trained(gpu, **settings).losses == pytest.approx(trained(cpu).losses, abs=0.05)


def test_a_checkpoint_goes_from_one_to_the_other(config, tmp_path):
    cpu, gpu = two(config)
    schedule, settings = WSD(1e-2, 2, 10, 4), TrainerConfig(4, 32)
    whole = trained(gpu, 10)
    first = Trainer(copy.deepcopy(cpu).cuda(), TOKENS, schedule, settings)
    first.train(5, folder=tmp_path, progress=False)
    for model in (Decoder(config), Decoder(config).cuda()):
        resumed = Trainer(model, TOKENS, schedule, settings)
        resumed.load(tmp_path / "step-00000005")
        resumed.train(10, progress=False)
        assert resumed.losses == pytest.approx(whole.losses, abs=2e-3)
    assert load_weights(tmp_path / "step-00000005").embed_tokens.weight.device.type == "cpu"


def test_documents_kept_apart():
    cpu, gpu = two(BASE)
    ids = torch.randint(99, (2, 17))
    assert_close(
        loss_within_documents(gpu, ids.cuda(), 7).cpu(),
        loss_within_documents(cpu, ids, 7),
        atol=1e-4,
        rtol=1e-4,
    )


def test_one_sharded_process():
    cpu, gpu = two(BASE)
    with processes() as device:
        assert device.type == "cuda"
        assert trained(gpu, layout=Layout(sharded=True)).losses == pytest.approx(
            trained(cpu).losses, abs=2e-3
        )


@pytest.mark.parametrize(
    ("precision", "layout"),
    [
        ("bfloat16", Layout(sharded=True)),
        ("bfloat16", Layout(4, True, True)),
        ("bfloat16", Layout()),
        ("float32", Layout(4, True, True)),
    ],
)
def test_the_planned_memory_is_what_a_step_takes(precision, layout):
    config = replace(load_config("minicpm4-0.5b"), num_hidden_layers=6)
    settings = TrainerConfig(8, 1024, precision=precision)
    planned = plan_memory(config, settings, layout, 1).total
    gc.collect()  # what earlier tests left
    before = torch.cuda.memory_allocated()
    with processes():
        with torch.device("cuda"):
            model = Decoder(config)
        trainer = Trainer(model, torch.arange(40_000) % 73_000, WSD(1e-3, 2, 10, 4), settings, layout=layout)
        trainer.train(1, progress=False)
        torch.cuda.reset_peak_memory_stats()
        trainer.train(3, progress=False)
        taken = torch.cuda.max_memory_allocated() - before
    print(f"{precision}, {layout}: planned {planned / 1e9:.2f} GB, taken {taken / 1e9:.2f} GB")
    assert planned == pytest.approx(taken, rel=0.1)


def test_the_command_line(tmp_path):
    """Text to tokenizer to shards to a run to text, and on to the Hugging Face layout."""

    def command(line: str) -> str:
        ran = subprocess.run(
            [sys.executable, "-m", "minicpm_lite.cli", *line.split()],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    (tmp_path / "text.txt").write_text("the cat sat on the mat and saw the hat. " * 3000)
    command("tokenizer text.txt --out t.json --vocab-size 300")
    command("shards text.txt --tokenizer t.json --out shards --end <|endoftext|> --vocab-size 1024")
    tiny = "--config lite-1m --data shards --batch-tokens 512 --sequence-length 64 --peak-lr 0.01"
    command(f"train {tiny} --out run --steps 20 --warmup 2 --decay 5")
    command(f"train {tiny} --out exact --steps 6 --warmup 2 --decay 1 --precision float32")
    assert "the" in command("generate run the --max-new-tokens 8")
    command("export run --out exported")
    assert (tmp_path / "exported" / "model.safetensors").exists()


def test_answers_are_scored_alike():
    cpu, gpu = two(BASE)
    examples = [EncodedExample((1, 2, 3), (4, 5)), EncodedExample((6,), (7,))]
    one, other = score_answers(cpu, examples), score_answers(gpu, examples)
    assert_close(other.total_loss.cpu(), one.total_loss, atol=1e-4, rtol=1e-4)


def test_a_model_is_saved_from_the_gpu(tmp_path):
    cpu, gpu = two(BASE)
    save_pretrained(gpu, tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    assert_close(load_pretrained(tmp_path)(ids), cpu(ids))
