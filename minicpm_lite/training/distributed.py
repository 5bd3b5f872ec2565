"""Training on as many processes as there are: model, gradients, moments and batch are cut over them.

    torchrun --nproc-per-node 8 -m minicpm_lite.cli train --config minicpm-1.2b --data shards --out run

Every process keeps its part of each weight, gradient and moment, and gathers a block's weights just before it
computes with them: FSDP2, ``torch.distributed.fsdp.fully_shard``. One process, two on a laptop and a cluster
run the same code; a run gives the same losses on any of them, up to rounding. In Python:

    with processes():
        with torch.device("meta"):
            model = Decoder(load_config("minicpm-1.2b"))
        Trainer(model, shards, schedule, config, layout=Layout(sharded=True)).train(folder="run")

Choices, and the traps behind them:

- **The batch is divided, not multiplied.** ``batch_size`` counts the windows of a step over all processes,
  and process r takes its stretch of them. So the order of the data is the same at any world size.
- **The mean is over tokens, not over processes.** Where windows hold tokens that are not predicted, a mean of
  the processes' means is another number. So each pass counts by its share of the whole step's tokens.
- **Weights do not depend on the world size.** A decoder is made without memory, on the meta device. Then each
  process draws each parameter whole, from a generator seeded by its name, and keeps its part: one parameter
  at a time in memory. What has weights already, a released model or an adapter in it, is cut as it is;
  it must be the same in every process, or the model would be pieced together of several.
- **The step's gradient is a sum.** Each process hands in its share of the mean, so FSDP is told to add up,
  where it would take the mean.
- **A parameter may be reached in some processes only**, as an eye is where only they read images. The others
  then add zeros. One that no process reached stays as it is, see `leave_unreached`; zeros alone would let
  weight decay move it. Decoders, and their `embed`, `states` and `logits` where these are called apart, are
  called by all processes alike and in the same order, since all of them gather the weights together.
- **A forward pass without its backward pass leaves weights gathered**, and other tensors under their names
  than the optimiser's. `cut_again` ends that; the trainer calls it before it touches the state.
- **Gradients are reduced after every pass**, so that they are never held whole. It costs communication that
  ``set_requires_gradient_sync(False)`` would save, and saves 4 bytes a parameter on every device.
- **bfloat16 without rounded angles.** Weights are rounded to bfloat16 as they are gathered, and gradients are
  added in float32: see `minicpm_lite.training.precision`. FSDP would also cast what a block is given. The
  rotary angles must stay in float32, so that is switched off.
- **Errors are everyone's.** What one process finds (a damaged shard, a full disk) all processes raise.
- **Buffers** are not cut: each process has its own, moved by what it reads itself.
- With experts, the balance loss is that of each pass on each process, by its share, not of the whole batch.
"""

import zlib
from collections.abc import Container
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ..language.decoder import Decoder
from ..language.layers import RMSNorm
from ..runtime import require_seed
from .processes import add_up, local_device, on_each, world_size
from .settings import TrainerConfig
from .state import weight_checksums

__all__ = ["cut_again", "initialise", "leave_unreached", "shard"]


def shard(model: nn.Module, config: TrainerConfig) -> None:
    """Cut a module over all processes, in place: each keeps its part of every parameter.

    The blocks of its decoders are gathered one by one, each before it computes; then each decoder's tables,
    and the rest of the module. `Trainer` calls this where its layout says so.

    Args:
        model: the same in every process. What its decoders have on the meta device is drawn from the config's
            seed.
        config: its precision is that of the gathered weights; ``compile`` compiles block by block.

    Raises:
        ValueError: no processes were joined, or something that no decoder draws is on the meta device, or
            weights differ between the processes, or what is gathered at different times shares a weight, or
            the model is cut already.
    """
    if not dist.is_initialized():
        raise ValueError(
            "Layout(sharded=True) cuts the model over the processes, and none were joined. Make and train it "
            "within `with processes():`, also where there is only one."
        )
    if _cut(model):
        raise ValueError(
            "The model is cut over the processes already, by another Trainer. Make it anew, and let the new "
            "Trainer load a checkpoint, or branch_from one."
        )
    decoders = [module for module in model.modules() if isinstance(module, Decoder)]
    _require_own_parts(model, decoders)
    on_meta = {decoder: _to_draw(decoder) for decoder in decoders}
    _require_the_rest(model, on_meta)
    _require_the_same(model)
    device = local_device()
    mesh = init_device_mesh(device.type, (world_size(),))
    reduced = torch.bfloat16 if config.precision == "bfloat16" else None
    policy = MixedPrecisionPolicy(
        param_dtype=reduced, reduce_dtype=torch.float32 if reduced else None, cast_forward_inputs=False
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP cuts no other
    for decoder in decoders:
        for block in decoder.layers:
            if config.compile:
                block.forward = torch.compile(block.forward)
            fully_shard(block, mesh=mesh, mp_policy=policy)
    for whole in dict.fromkeys([*decoders, model]):  # a decoder may be the model
        fully_shard(whole, mesh=mesh, mp_policy=policy)
    for decoder in decoders:
        _callable_apart(decoder)
    model.set_reduce_scatter_unused_params(True)
    for module in _cut(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    if any(on_meta.values()):  # `to_empty` would empty the rest, too
        model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    for decoder, names in on_meta.items():
        initialise(decoder, config.seed, names)


def _callable_apart(model: Decoder) -> None:
    """Let an objective call the parts of a forward pass: each gathers the weights, as the whole does.

    Within a call of the whole they are gathered already. To do it again would free them at its end, and the
    backward pass would have to gather the tables once more.
    """
    within = {part: getattr(model, part) for part in ("embed", "states", "logits")}
    for part in within:
        register_fsdp_forward_method(model, part)
    apart = {part: getattr(model, part) for part in within}
    model.register_forward_pre_hook(lambda *call: vars(model).update(within))
    model.register_forward_hook(lambda *call: vars(model).update(apart), always_call=True)


def _to_draw(decoder: Decoder) -> set[str]:
    """What a decoder draws, of its parameters on the meta device."""
    drawn = dict(decoder.initial_stds()).keys()
    drawn |= {module.weight for module in decoder.modules() if isinstance(module, RMSNorm)}
    return {name for name, p in decoder.named_parameters() if p.is_meta and p in drawn}


def _require_own_parts(model: nn.Module, decoders: list[Decoder]) -> None:
    """Refuse one parameter in two parts that are gathered apart: blocks, the rest of a decoder, all else."""
    apart = {block for decoder in decoders for block in decoder.layers}.union(decoders, [model])
    paths = [path for path, module in model.named_modules(remove_duplicate=False) if module in apart]
    first: dict[nn.Parameter, tuple[str, str]] = {}  # its name, and the part that it stands in
    for name, parameter in model.named_parameters(remove_duplicate=False):
        part = max((path for path in paths if not path or name.startswith(f"{path}.")), key=len)
        other, its_part = first.setdefault(parameter, (name, part))
        if part != its_part:
            raise ValueError(
                f"{other} and {name} are one Parameter, in parts of the model that are gathered at different "
                "times, so it cannot be cut. Give Layout(), which keeps the model whole."
            )


def _require_the_rest(model: nn.Module, on_meta: dict[Decoder, set[str]]) -> None:
    """Refuse what is on the meta device and would hold arbitrary numbers, since no decoder draws it."""
    drawn = {id(decoder.get_parameter(name)) for decoder, names in on_meta.items() for name in names}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta and id(tensor) not in drawn:
            raise ValueError(
                f"{name} of the {type(model).__name__} is on the meta device, and only a decoder's own "
                "weights are drawn while it is cut. Give it its values."
            )


def _require_the_same(model: nn.Module) -> None:
    """Refuse weights that differ between the processes."""
    first, *others = on_each(lambda: weight_checksums(model) if world_size() > 1 else {})
    for name in dict.fromkeys(name for checksums in (first, *others) for name in checksums):
        if any(theirs.get(name) != first.get(name) for theirs in others):
            raise ValueError(
                f"{name} of the {type(model).__name__} differs between the processes, and each would keep "
                "its part. Seed them alike before the model is made, or load the same weights in all."
            )


@torch.no_grad()
def initialise(model: Decoder, seed: int, names: Container[str] | None = None) -> None:
    """Draw the weights of a model anew; the same ones, whole or sharded, over however many processes.

    The distributions are those of `Decoder`; each parameter has a generator of its own, seeded by its name.

    Args:
        model: whose weights.
        seed: decides them.
        names: of the parameters that are drawn; left out, all.

    Raises:
        ValueError: one of them is a matrix of something that was built into the model, such as the latent
            weights of a ternary layer. Nothing is drawn then.
    """
    require_seed(seed)
    stds = dict(model.initial_stds())
    drawn = {name: p for name, p in model.named_parameters() if names is None or name in names}
    for name, parameter in drawn.items():
        if parameter not in stds and parameter.ndim > 1:
            raise ValueError(
                f"{name} is a matrix that a plain decoder does not have, so nothing says how it is drawn. "
                "Draw the model's weights first, and build into it afterwards."
            )
    for name, parameter in drawn.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        whole = torch.ones(parameter.shape)
        if parameter in stds:
            whole.normal_(std=stds[parameter], generator=generator)
        if isinstance(parameter, DTensor):  # every process has drawn it, so nothing is sent
            whole = distribute_tensor(
                whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
        parameter.copy_(whole)


def cut_again(model: nn.Module) -> None:
    """Free what a forward pass gathered that no backward pass followed; in a whole module there is none."""
    gathered = not all(isinstance(parameter, DTensor) for parameter in model.parameters())
    if isinstance(model, FSDPModule) and gathered:
        model.reset_iter_state()


def leave_unreached(model: nn.Module, optimizer: Optimizer) -> set[nn.Parameter]:
    """Let steps of the optimiser leave alone what no process reached, as they do with a whole module.

    A step for which nothing at all was reached raises a ValueError, in all processes.

    Returns:
        The parameters that this process reached; to be emptied before each step's passes.
    """
    reached: set[nn.Parameter] = set()
    for module in _cut(model):
        cut = dict(module.named_parameters())
        module.unshard()
        for name, gathered in module.named_parameters():
            if gathered is not cut[name] and gathered.requires_grad:
                gathered.register_post_accumulate_grad_hook(partial(_note, reached, cut[name]))
        module.reshard()

    def drop(*step: object) -> None:
        parameters = [each for each in model.parameters() if each.requires_grad]
        counts = torch.tensor([each in reached for each in parameters], dtype=torch.int32)
        counts = add_up(counts.to(local_device())).tolist()
        if not any(counts):
            raise ValueError(
                "No process has a gradient for any weight of the model: the loss was computed by another "
                "module. Let the objective use the one that it is given."
            )
        for parameter, count in zip(parameters, counts, strict=True):
            if not count:
                parameter.grad = None

    optimizer.register_step_pre_hook(drop)
    return reached


def _note(reached: set[nn.Parameter], parameter: nn.Parameter, gathered: Tensor) -> None:
    reached.add(parameter)


def _cut(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
