"""A small decoder with SmolLM2's vocabulary, to guess for it: the control for the EAGLE-3 head; some minutes.

Run it with `python notebooks/inference/recorded/speculative_draft.py`, after `eagle.py`, whose texts it
reads, and with which its weights are kept.

Can a small model of our own guess for SmolLM2? It must have its 49,152 tokens, whose table alone, 28 million
numbers at a width of 576, is four times as large as two blocks. So it takes the target's table, which is
frozen, and has two blocks of its own behind it, which begin as the target's first and last. It is taught the
laws that the head is taught, at the same places of the same batches, each once; it has 7 million numbers to
learn, and the head 5. What it has not are the streams: it reads tokens alone.

The rules, fixed before the run. At least as many updates as the head has. It is judged as the head is. "The
streams are worth something" on a kind if the interval of the difference of tokens a call, prompt by prompt,
with chains of four, leaves out 0.
"""

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from eagle import FILES, KEPT, ROWS, STEPS, WARMUP, Texts, judge, loss, ranking, seen, target, units
from eagle_texts import FOLDER
from torch import Tensor

from minicpm_lite.inference.drafts import frequent_draft
from minicpm_lite.inference.guess_trees import Shape
from minicpm_lite.inference.packed import put_packed
from minicpm_lite.inference.quantization import Quantized, quantize
from minicpm_lite.inference.speculative import Draft
from minicpm_lite.lab.recorded import run_jobs
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.training.checkpoint import load_checkpoint, save_checkpoint
from minicpm_lite.training.objective import Objective
from minicpm_lite.training.settings import TrainerConfig
from minicpm_lite.training.sharded_checkpoint import checkpoints
from minicpm_lite.training.trainer import Trainer
from minicpm_lite.training.wsd import WSD

BLOCKS = FOLDER / "speculative_draft.safetensors"  # no chapter reads it
RATE, EVERY, TYPE = 5e-4, 50, "Q8_0"


@dataclass(frozen=True)
class Job:
    """The run; `name` is its key in the results."""

    stable: int  # updates; a fourth as many follow in which the rate decays

    @property
    def name(self) -> str:
        return f"decoder/{self.stable}"


def small() -> Decoder:
    """The target's table, its first and last block, its last norm."""
    model = target()
    with torch.device("meta"):
        found = Decoder(replace(model.config, num_hidden_layers=2))
    found.embed_tokens = copy.deepcopy(model.embed_tokens).requires_grad_(False)
    found.layers[0], found.layers[1] = copy.deepcopy(model.layers[0]), copy.deepcopy(model.layers[-1])
    found.layers[1].self_attn.layer = 1
    found.norm = copy.deepcopy(model.norm)
    found.register_buffer("vocabulary", ranking()[:KEPT], persistent=False)
    return found


def following(model: Decoder, batch: dict[str, Tensor], steps: int = STEPS) -> Iterator[Tensor]:
    """As the head's `chain`: if all guesses before were right, the next is what the text gives."""
    states = model.norm(model.states(model.embed(batch["ids"]))[-1])
    for step in range(steps):
        yield states[:, 1 + step :]


def taught(model: Decoder, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return loss(model, batch, lambda *given: following(*given, steps=1))


def train(job: Job) -> dict:
    """As the head: its stable stage in one folder, the decay from there in another."""
    model = small()
    schedule = WSD(RATE, WARMUP, job.stable - WARMUP, job.stable // 4)
    config = TrainerConfig(ROWS, 256, precision="bfloat16", max_grad_norm=0.5)
    objective = Objective("the target's noted laws", taught, units)
    trainer = Trainer(model, Texts(), schedule, config, objective)
    stages = ("decoder", job.stable, FILES), (f"decoder-{job.stable}", schedule.total_steps, seen(job.stable))
    for stage, end, files in stages:
        folder, trainer.batches = FOLDER / stage, Texts(files)
        if found := [step for step in checkpoints(folder) if trainer.step < step <= end]:
            trainer.load(checkpoints(folder)[max(found)])
        if trainer.step < end:
            trainer.train(end, folder, checkpoint_every=EVERY, keep=40, progress=False)
    tensors = dict(model.layers.named_parameters(prefix="layers")) | {"norm.weight": model.norm.weight}
    tensors = {name: quantize(w, TYPE).data if w.ndim == 2 else w for name, w in tensors.items()}
    save_checkpoint(BLOCKS, tensors, {"target": "SmolLM2-135M-Instruct", "type": TYPE})
    return {"losses": trainer.losses, "judged": judge(model, 24, following)}


def decoder_draft(shape: Shape) -> Draft:
    """What was trained, as a draft: blocks packed as they are stored, frequent rows of the table, too."""
    model, (tensors, _) = small(), load_checkpoint(BLOCKS)
    draft = frequent_draft(model, ranking()[:KEPT], shape)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.uint8:
            put_packed(draft.model, name, Quantized(TYPE, tensor))
        else:
            draft.model.get_parameter(name).data.copy_(tensor)
    put_packed(draft.model, "lm_head.weight", quantize(draft.model.lm_head.weight, TYPE))
    return draft


if __name__ == "__main__":
    facts = {"model": "SmolLM2-135M-Instruct, Q4_1", "rate": RATE, "kept": KEPT, "type": TYPE}
    run_jobs(__file__, [Job(int(sys.argv[1]))], train, facts | Texts().identity(), workers=1)
