"""Where GPTQ and P-GPTQ do their damage in SmolLM2-135M: which matrices, which positions; half an hour on one
core of a busy machine.

Run it with `python notebooks/inference/recorded/quantization_where.py`. Model, texts, draws of calibration
text and rounded matrices are those of `quantization.py`, of which this is the sequel: its temporary files are
used where they are, and made again where not.

- apart: GPTQ in all matrices but the keys, or but the values, which are rounded to nearest.
- matrix: one down projection alone, that of layer 11, in which the first position is nearly all of H. By GPTQ
  or by P-GPTQ, with everything else to nearest; and by GPTQ, with everything else by P-GPTQ but keys and
  values to nearest.
- positions: a rounded model is given the exact keys and values of one position, as in "sink" there: of the
  first, and as controls of eight others, drawn from 2 to 128 with a seed of their own. The first draw only.
- held out: what rounding loses of a layer's outputs on its calibration text, and on the windows on which the
  models are judged; from the fifth position on, and at the first. Inputs are those of the unrounded model.

The rules, fixed before the runs. A referee had one run each of "apart" (0.346 and 0.180 nats) and of one
matrix (0.197), so for these two only the spread over draws was open.

- Values, and not keys, are the way on which GPTQ does its damage if with values to nearest at least half of
  what GPTQ loses more than rounding to nearest is gone, by the whole 95 % interval over the three draws, and
  with keys to nearest less than a fifth.
- The matrix is what P-GPTQ spoils beside keys and values if, by P-GPTQ alone in it, the model is worse than
  to nearest, and if with GPTQ in it at least half is gone of what P-GPTQ with keys and values to nearest
  loses more than nearest; both by the whole interval.
- The first position is not one of many if the eight others take away less than a tenth of that loss each.
- GPTQ gains on new text in a kind of matrix if, there too, the median of the layers is below that of rounding
  to nearest in each draw.

The power: over three draws half an interval was 0.04 nats (GPTQ) and 0.07 (P-GPTQ, keys and values to
nearest); what is to be halved is 0.11 and 0.20. Eight controls see a tenth if they lie within a thirtieth of
each other; the one of before, the twelfth position, took 1 %.
"""

import copy
from functools import cache

import torch
from quantization import (
    EARLY,
    HELD_OUT,
    KINDS,
    LENGTH,
    METHODS,
    SEEDS,
    TYPE,
    Job,
    block_types,
    exact_at,
    held_out,
    kept_codes,
    kept_statistics,
    losses,
    smollm2,
    statistics,
)
from torch import Tensor

from minicpm_lite.inference.quantization import Quantized, dequantize, quantize
from minicpm_lite.lab.recorded import run_jobs
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.scoring import token_losses
from minicpm_lite.runtime import tune_cpu

SPECIAL = "layers.11.mlp.down_proj.weight"
ALL_NEAREST = dict.fromkeys(KINDS, "nearest")
CASES = {  # how each kind of matrix is rounded, and how that one matrix is
    "GPTQ, k to nearest": (METHODS["GPTQ"] | {"k_proj": "nearest"}, "GPTQ"),
    "GPTQ, v to nearest": (METHODS["GPTQ"] | {"v_proj": "nearest"}, "GPTQ"),
    "nearest, that matrix by GPTQ": (ALL_NEAREST, "GPTQ"),
    "nearest, that matrix by P-GPTQ": (ALL_NEAREST, "P-GPTQ"),
    "P-GPTQ, k and v to nearest, that matrix by GPTQ": (METHODS["P-GPTQ, k and v to nearest"], "GPTQ"),
}
WAYS = ("nearest", "GPTQ")  # whose layers are judged on new text
CONTROLS, LAST_CONTROL = 8, 128
FACTS = {
    "length": LENGTH, "held_out_windows": HELD_OUT, "seeds": SEEDS, "type": TYPE, "matrix": SPECIAL,
}  # fmt: skip


def work(job: Job) -> dict:
    tune_cpu()
    torch.set_float32_matmul_precision("medium")
    with torch.no_grad():
        if job.study == "positions":
            return of_positions(job)
        if job.study == "held out":
            return of_layers(job.seed)
        ways, special = CASES[job.case]
        return {"losses": losses(rounded(ways, special, job.seed), held_out(HELD_OUT))}


codes_of = cache(kept_codes)


def rounded(ways: dict[str, str], special: str, seed: int) -> Decoder:
    model = copy.deepcopy(smollm2())
    for name in block_types(model):
        way = special if name == SPECIAL else ways[name.split(".")[-2]]
        model.get_parameter(name).copy_(rounded_weight(name, way, seed))
    return model


def rounded_weight(name: str, way: str, seed: int) -> Tensor:
    if way == "nearest":
        return dequantize(quantize(smollm2().get_parameter(name), TYPE))
    return dequantize(Quantized(TYPE, codes_of(way, seed)[name]))


def of_positions(job: Job) -> dict:
    """Losses with exact keys and values at one position: the first, and each of the controls."""
    model = rounded(METHODS[job.case], job.case, job.seed)
    others = 2 + torch.randperm(LAST_CONTROL - 1, generator=torch.Generator().manual_seed(0))[:CONTROLS]
    found = {}
    for position in (1, *others.tolist()):
        found[position] = []
        for windows in held_out(HELD_OUT).split(4):
            with exact_at(model, windows, position - 1):
                found[position] += token_losses(model, windows).mean(1).tolist()
    return {"losses": found}


@cache
def of_held_out() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Hessians of the windows on which models are judged: from the fifth position on, and of the first."""
    windows = held_out(HELD_OUT)[:, :LENGTH]
    return statistics(smollm2(), windows, EARLY), statistics(smollm2(), windows[:, :1], 0)


def of_layers(seed: int) -> dict:
    """Shares of the squared outputs that are lost, layer by layer."""
    later, _, first = kept_statistics(seed)
    new_later, new_first = of_held_out()
    texts = {"its text": (later, first), "new text": (new_later, new_first)}
    shares = {}
    for way in WAYS:
        kinds = {kind: {text: {"later": [], "first": []} for text in texts} for kind in KINDS}
        for name in block_types(smollm2()):
            weight, kind = smollm2().get_parameter(name), name.split(".")[-2]
            change = rounded_weight(name, way, seed) - weight
            for text, hessians in texts.items():
                for where, hessian in zip(("later", "first"), hessians, strict=True):
                    lost, whole = (((each @ hessian[name]) * each).sum().item() for each in (change, weight))
                    kinds[kind][text][where].append(lost / whole)
        shares[way] = kinds
    return {"shares": shares}


def all_jobs() -> list[Job]:
    """What decides most comes first."""
    found = [Job("apart", case, seed) for seed in SEEDS for case in list(CASES)[:2]]
    found += [Job("matrix", case, seed) for seed in SEEDS for case in list(CASES)[2:]]
    found += [Job("positions", way, SEEDS[0]) for way in ("GPTQ", "P-GPTQ")]
    return found + [Job("held out", "layers", seed) for seed in SEEDS]


if __name__ == "__main__":
    run_jobs(__file__, all_jobs(), work, FACTS, workers=1)
