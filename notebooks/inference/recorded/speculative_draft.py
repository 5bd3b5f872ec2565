"""A small decoder with SmolLM2's vocabulary, to guess for it: the control for the EAGLE-3 head.

Run `python notebooks/inference/recorded/speculative_draft.py 70` on one GPU after `eagle.py`, whose texts it
reads, and where it left its results; the number says how many seconds the stable stage lasts.

Can a small model of our own guess for SmolLM2? It must have its 49,152 tokens, whose table alone, 28 million
numbers at a width of 576, is four times as large as two blocks. So it takes the target's table, which is
frozen, and has two blocks of its own behind it, which begin as the target's first and last. It is taught the
laws that the head is taught, at the same places of the same batches, each once; it has 7 million numbers to
learn, and the head 5. What it has not are the streams: it reads tokens alone.

The rules, fixed before the run. The rate is that of the trial with the most tokens a call. The run is long
enough if it makes at least as many updates as the head's. It is judged as the head is. "The streams are worth
something" on a kind if the interval of the difference of tokens a call, prompt by prompt, with chains of
four, leaves out 0.
"""

import copy
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from eagle import DEVICE, JUDGED, KEPT, TRIAL, Job, judge, of_all, ranking, target, train, trainer_of
from eagle_texts import FOLDER
from torch import Tensor

from minicpm_lite.inference.drafts import frequent_draft
from minicpm_lite.inference.eagle import STEPS
from minicpm_lite.inference.guess_trees import Shape
from minicpm_lite.inference.packed import put_packed
from minicpm_lite.inference.quantization import Quantized, quantize
from minicpm_lite.inference.speculative import Draft
from minicpm_lite.lab.recorded import load_results, run_jobs
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.training.checkpoint import load_checkpoint, save_checkpoint
from minicpm_lite.training.objective import distillation

BLOCKS = FOLDER / "speculative_draft.safetensors"  # no chapter reads it
RATES, TYPE = (5e-4, 1e-3, 2e-3), "Q8_0"


def small(vocabulary: Tensor) -> Decoder:
    """The target's table, its first and last block, its last norm; what it guesses when it is judged."""
    model = target()
    with torch.device("meta"):
        found = Decoder(replace(model.config, num_hidden_layers=2))
    found.embed_tokens = copy.deepcopy(model.embed_tokens)
    found.layers[0], found.layers[1] = copy.deepcopy(model.layers[0]), copy.deepcopy(model.layers[-1])
    found.layers[1].self_attn.layer = 1
    found.norm = copy.deepcopy(model.norm)
    found.register_buffer("vocabulary", vocabulary.to(DEVICE), persistent=False)
    found = found.float().requires_grad_(True)
    found.embed_tokens.requires_grad_(False)
    return found


def following(model: Decoder, ids: Tensor, steps: int = STEPS) -> Iterator[Tensor]:
    """As the head's `chain`: if all guesses before were right, the next is what the text gives."""
    states = model.norm(model.states(model.embed(ids))[-1])
    for step in range(steps):
        yield states[:, 1 + step :]


def work(job: Job) -> dict:
    """Trials of rates, or as the head: a stable stage, then the decay."""
    objective = distillation(target())
    if job.name == "trials":
        found = {}
        for rate in RATES:
            trainer = trainer_of(small(ranking()), rate, objective)
            trainer.train(TRIAL, progress=False)
            found[str(rate)] = {
                "losses": trainer.losses,
                "judged": judge(trainer.model, JUDGED, following),
            }
        return found
    trials = load_results(__file__)["runs"]["trials"]
    rate = max(RATES, key=lambda rate: of_all(trials[str(rate)]["judged"]))
    model = small(ranking())
    found = train(trainer_of(model, rate, objective), job.seconds, lambda: judge(model, JUDGED, following))
    tensors = dict(model.layers.named_parameters(prefix="layers")) | {"norm.weight": model.norm.weight}
    tensors = {name: weight.detach().cpu() for name, weight in tensors.items()}
    tensors = {name: quantize(w, TYPE).data if w.ndim == 2 else w for name, w in tensors.items()}
    tensors["ranking"] = ranking().int()
    save_checkpoint(BLOCKS, tensors, {"target": "SmolLM2-135M-Instruct", "type": TYPE})
    return found | {"judged": judge(model, 24, following)}


def decoder_draft(shape: Shape) -> Draft:
    """What was trained, as a draft: blocks packed as they are stored, frequent rows of the table, too."""
    tensors, _ = load_checkpoint(BLOCKS)
    kept = tensors.pop("ranking")[:KEPT].long()
    draft = frequent_draft(small(kept), kept, shape)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.uint8:
            put_packed(draft.model, name, Quantized(TYPE, tensor))
        else:
            draft.model.get_parameter(name).data.copy_(tensor)
    put_packed(draft.model, "lm_head.weight", quantize(draft.model.lm_head.weight, TYPE))
    return draft


if __name__ == "__main__":
    facts = {"model": "SmolLM2-135M-Instruct, Q4_1", "rates": RATES, "kept": KEPT, "type": TYPE}
    for job in (Job("trials"), Job("decoder", float(sys.argv[1]))):
        run_jobs(__file__, [job], work, facts, workers=1)
