"""A small run, made whole and made sharded, and its checkpoints."""

import json
import zlib
from contextlib import nullcontext

import pytest
import torch

from minicpm_lite import ModelConfig
from minicpm_lite.data.windows import TokenWindows
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.training.processes import processes
from minicpm_lite.training.settings import Layout, TrainerConfig
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD

MODEL = ModelConfig(16, 40, 2, 2, 41, max_position_embeddings=64, scale_depth=1.4, dim_model_base=16)
CONFIG = TrainerConfig(batch_size=2, sequence_length=8)
SCHEDULE = WSD(0.01, 2, 4, 4)
TOKENS = (torch.arange(1000) * 7 // 3) % 41


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "sharded"])
def layout(request):
    """A program that starts no processes and keeps its model whole; and one process that cuts it."""
    with processes() if request.param else nullcontext():
        yield Layout(sharded=request.param)


@pytest.fixture(scope="session")
def reseal():
    """Lets a checkpoint's facts say what its files hold now, and what of the facts is changed."""

    def reseal(folder, **changes) -> None:
        facts = json.loads((folder / "checkpoint.json").read_text()) | changes
        del facts["checksum"]
        files = sorted(folder.glob("*.safetensors"))
        facts["files"] = {file.name: file.stat().st_size for file in files}
        facts["checksums"] = {file.name: zlib.crc32(file.read_bytes()) for file in files}
        facts["checksum"] = zlib.crc32(json.dumps(facts, sort_keys=True).encode())
        (folder / "checkpoint.json").write_text(json.dumps(facts))

    return reseal


@pytest.fixture(scope="module")
def make(layout):
    """A run of ten steps, and what of it differs."""

    def make(model=MODEL, tokens=TOKENS, schedule=SCHEDULE, config=CONFIG) -> Trainer:
        torch.manual_seed(0)
        windows = TokenWindows(tokens, config.sequence_length, config.seed)
        return Trainer(Decoder(model), windows, schedule, config, layout=layout)

    return make


@pytest.fixture(scope="module")
def saved(make, tmp_path_factory):
    """Checkpoints of steps 1, 4 (stable), 6 (the decay begins), 8 and 10."""
    folder, trainer = tmp_path_factory.mktemp("run"), make()
    for step in (1, 4, 6, 8, 10):
        trainer.train(step, progress=False)
        trainer.save(folder)
    return folder
