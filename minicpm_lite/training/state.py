"""The state of a run: the tensors that a checkpoint holds, and the facts that must agree to go on from it.

    model.<name>                     every parameter, frozen or not, and every persistent buffer
    optimizer.exp_avg.<name>         AdamW's moments, of the parameters that have some:
    optimizer.exp_avg_sq.<name>      not of frozen ones, and not of those that no gradient ever reached

How often each parameter was moved is a fact, not a tensor. It says, too, which of them have moments.
"""

import json
import re
import zlib
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..language.decoder import Decoder, changed_inside, own_class
from .processes import on_each
from .settings import TrainerConfig

__all__ = [
    "BUILT_IN",
    "buffers_given_back",
    "checkpoint_shapes",
    "checkpoint_tensors",
    "fingerprint",
    "hold_buffers",
    "make_moments",
    "own_memory",
    "require_one_run",
    "require_own_memory",
    "require_same_run",
    "run_identity",
    "updates_made",
    "weight_checksums",
]

_MOMENTS = ("exp_avg", "exp_avg_sq")
BUILT_IN = ", of a built-in "
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # which is another one in every program


def run_identity(model: nn.Module, config: TrainerConfig, text: dict, objective: str) -> dict[str, dict]:
    """What must be the same for a checkpoint to fit a run; as JSON gives it back, with lists for tuples.

    Args:
        model: a decoder is named by its config and by the classes of what was built into it, with the
            settings that they show (``extra_repr``); another module by its class and shapes, and by what the
            fields of its ``config`` look like, if that is a dataclass.
        config: the trainer's.
        text: the identity of what is read.
        objective: the name of what is minimised.

    Raises:
        ValueError: a module keeps state that is no tensor of a checkpoint.
    """
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(
                f"{name or 'The model'} keeps a state of its own ({type(module).__name__}.get_extra_state), "
                "which no checkpoint of a run holds. Keep it in a buffer, by register_buffer."
            )
    trainer = asdict(config)
    del trainer["compile"]  # decides how, not what
    if isinstance(model, Decoder):
        identity = {"model config": asdict(model.config)}
    else:
        shapes = {name: tensor.shape for name, tensor in _kept(model).items()}
        identity = {"model": {"class": own_class(model).__name__, **shapes}}
        if is_dataclass(own_config := getattr(model, "config", None)):  # of which JSON may not take all
            identity["config of the module"] = {
                field.name: _spelled(getattr(own_config, field.name, None)) for field in fields(own_config)
            }
    changed = changed_inside(model) if isinstance(model, Decoder) else {}

    def built_in(name: str) -> str:
        """Whose weight it is, if that computes with it in another way than a plain decoder."""
        owners = [name[:end] for end in range(len(name)) if end == 0 or name[end] == "."]
        owner = next((owner for owner in owners if owner in changed), None)
        if owner is None:
            return ""
        return f"{BUILT_IN}{_shown(model.get_submodule(owner))}"

    kinds = {name: "trained" if p.requires_grad else "frozen" for name, p in model.named_parameters()}
    identity |= {"trainer config": trainer, "text": text, "objective": {"name": objective}}
    identity["choice of parameters"] = {
        name: f"{kinds.get(name, 'a buffer')} in {str(tensor.dtype).removeprefix('torch.')}{built_in(name)}"
        for name, tensor in _kept(model).items()
    }
    return json.loads(json.dumps(identity))


def fingerprint(model: Decoder) -> str:
    """Eight digits of all that a decoder computes with: config, weights and buffers, what was built in."""
    built_in = {
        name: "missing" if here is None else _shown(model.get_submodule(name))
        for name, (here, _) in changed_inside(model).items()
    }
    facts = [asdict(model.config), built_in, weight_checksums(model)]
    return f"{zlib.crc32(json.dumps(facts, sort_keys=True).encode()):08x}"


def _shown(module: nn.Module) -> str:
    """The class of a module, with the settings that it shows."""
    settings = _ADDRESS.sub("", " ".join(module.extra_repr().split()))
    return f"{own_class(module).__qualname__}{settings and f'({settings})'}"


def _spelled(value: object) -> str:
    """As `repr` has it, and the same in every program: without addresses, and sets in one order."""
    if type(value) in (set, frozenset, list, tuple) and value:
        inside = [_spelled(each) for each in value]
        listed = ", ".join(inside if isinstance(value, list | tuple) else sorted(inside))
        if type(value) is list:
            return f"[{listed}]"
        if type(value) is tuple:
            return f"({listed}{',' * (len(value) == 1)})"
        return f"{{{listed}}}" if type(value) is set else f"frozenset({{{listed}}})"
    if type(value) is dict:
        return "{" + ", ".join(f"{_spelled(key)}: {_spelled(each)}" for key, each in value.items()) + "}"
    if is_dataclass(value) and not isinstance(value, type):
        listed = [f"{each.name}={_spelled(getattr(value, each.name))}" for each in fields(value) if each.repr]
        return f"{type(value).__qualname__}({', '.join(listed)})"
    return _ADDRESS.sub("", repr(value))


def require_same_run(
    path: str | Path, facts: dict, identity: dict[str, dict], may_differ: Container[str] = ()
) -> None:
    """Refuse a checkpoint whose facts differ from a run's `run_identity`.

    Args:
        path: the checkpoint's.
        facts: what it says; of what the identity does not speak, it may say anything.
        identity: the run's.
        may_differ: fields that are not compared.

    Raises:
        ValueError: a sentence that names the first field that differs.
    """
    for part, mine in identity.items():
        theirs = facts.get(part) or {}
        for field in mine | theirs:
            if theirs.get(field) != mine.get(field) and field not in may_differ:
                raise ValueError(
                    f"{path} belongs to another {part}: its {field} is {theirs.get(field)!r}, this run's is "
                    f"{mine.get(field)!r}."
                )


def require_one_run(facts: dict[str, dict]) -> None:
    """Refuse processes that were given different runs, in all of them: each hands in its own facts.

    Raises:
        ValueError: a sentence that names the first field that differs from the first process's.
    """
    first, *others = on_each(lambda: facts)
    for number, theirs in enumerate(others, start=1):
        require_same_run(f"What process {number} was given", theirs, first)


def weight_checksums(model: nn.Module) -> dict[str, int]:
    """By name, a checksum of each parameter and persistent buffer that has values and lies here whole."""
    return {
        name: zlib.crc32(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        for name, tensor in _kept(model).items()
        if not (tensor.is_meta or isinstance(tensor, DTensor))
    }


def own_memory(model: nn.Module) -> None:
    """Give each number of a slice, or of an expanded tensor, a place in memory of its own.

    It may be written to then. And the fused AdamW moves the first numbers that lie in a parameter's memory,
    as many as it has, which are others in a slice.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.is_contiguous():
            tensor.data = tensor.data.clone()  # one that is merely transposed keeps its order


def hold_buffers(model: nn.Module) -> Callable[[], None]:
    """Note what the buffers hold; the function that comes gives it back to them, as often as it is called."""
    before = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]

    @torch.no_grad()
    def give_back() -> None:
        for module, name, buffer, held in before:
            module._buffers[name] = buffer.copy_(held)

    return give_back


def require_own_memory(model: nn.Module) -> None:
    """Refuse two tensors in one stretch of memory: each would be moved by itself, and no file takes both.

    Raises:
        ValueError: a sentence that names them.
    """
    stretches = []
    for name, tensor in _kept(model).items():
        if not (tensor.is_meta or isinstance(tensor, DTensor)) and tensor.numel():
            last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            start, length = tensor.data_ptr(), (last + 1) * tensor.element_size()
            stretches.append((str(tensor.device), start, start + length, name))
    for (device, _, end, name), (next_device, start, _, other) in pairwise(sorted(stretches)):
        if device == next_device and start < end:
            raise ValueError(
                f"{name} and {other} share memory. To tie them, give both modules the same Parameter; else "
                "give one of them a copy."
            )


@contextmanager
def buffers_given_back(model: nn.Module) -> Iterator[None]:
    """Give the buffers what they held before, if anything is raised within."""
    give_back = hold_buffers(model)
    try:
        yield
    except BaseException:
        give_back()
        raise


def updates_made(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """How often each parameter was moved; without those that never were."""
    return {
        name: int(optimizer.state[parameter]["step"])
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def make_moments(model: nn.Module, optimizer: Optimizer, updates: Mapping[str, int]) -> None:
    """Make room for the moments of a checkpoint, in place of those that are there."""
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        if name in updates:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(updates[name]), device=parameter.device),
                **{moment: torch.zeros_like(parameter) for moment in _MOMENTS},
            }


def checkpoint_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and moments by their names in a checkpoint: the tensors themselves, not copies."""
    tensors = {f"model.{name}": tensor.detach() for name, tensor in _kept(model).items()}
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            for moment in _MOMENTS:
                tensors[f"optimizer.{moment}.{name}"] = optimizer.state[parameter][moment]
    return tensors


def checkpoint_shapes(model: nn.Module, updates: Mapping[str, int]) -> dict[str, torch.Size]:
    """Name and shape of every tensor of a checkpoint in which these parameters were moved."""
    kept = _kept(model)
    shapes = {f"model.{name}": tensor.shape for name, tensor in kept.items()}
    for name in updates:
        shapes |= {f"optimizer.{moment}.{name}": kept[name].shape for moment in _MOMENTS}
    return shapes


def _kept(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones once, and persistent buffers."""
    passing = {
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in passing}
    return dict(model.named_parameters()) | buffers
