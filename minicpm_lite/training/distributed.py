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
  at a time in memory. A model that has weights, say a released one, is cut as it is.
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

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ..language.decoder import Decoder
from .processes import local_device, world_size
from .settings import TrainerConfig

__all__ = ["initialise", "shard"]


def shard(model: nn.Module, config: TrainerConfig) -> None:
    """Cut a module over all processes, in place: each keeps its part of every parameter.

    The blocks of its decoders are gathered one by one, each before it computes; then each decoder's tables,
    and the rest of the module. `Trainer` calls this where its layout says so.

    Args:
        model: the same in every process. A decoder on the meta device is drawn from the config's seed.
        config: its precision is that of the gathered weights; ``compile`` compiles block by block.

    Raises:
        ValueError: a module that is no decoder is on the meta device.
    """
    drawn = any(parameter.is_meta for parameter in model.parameters())
    if drawn and not isinstance(model, Decoder):
        raise ValueError(
            f"The {type(model).__name__} is on the meta device, and only a decoder's weights are drawn while "
            "it is cut. Give a module that has its weights."
        )
    device = local_device()
    mesh = init_device_mesh(device.type, (world_size(),))
    reduced = torch.bfloat16 if config.precision == "bfloat16" else None
    policy = MixedPrecisionPolicy(
        param_dtype=reduced, reduce_dtype=torch.float32 if reduced else None, cast_forward_inputs=False
    )
    decoders = [module for module in model.modules() if isinstance(module, Decoder)]
    for decoder in decoders:
        for block in decoder.layers:
            if config.compile:
                block.compile()
            fully_shard(block, mesh=mesh, mp_policy=policy)
    for whole in dict.fromkeys([*decoders, model]):  # a decoder may be the model
        fully_shard(whole, mesh=mesh, mp_policy=policy)
    for decoder in decoders:
        _callable_apart(decoder)
    if drawn:
        model.to_empty(device=device)
        initialise(model, config.seed)


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


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Draw the weights of a model anew; the same ones, whole or sharded, over however many processes.

    The distributions are those of `Decoder`; each parameter has a generator of its own, seeded by its name.
    """
    tables = {id(table) for table in model.tables}
    for name, parameter in model.named_parameters():
        std = model.config.init_std / (1 if id(parameter) in tables else model.config.width_ratio**0.5)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        whole = torch.ones(parameter.shape)
        if parameter.ndim > 1:
            whole.normal_(std=std, generator=generator)
        if isinstance(parameter, DTensor):  # every process has drawn it, so nothing is sent
            whole = distribute_tensor(
                whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
        parameter.copy_(whole)
