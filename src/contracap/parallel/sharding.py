"""A model that many ranks train: copies with averaged gradients (DDP), or shards of every parameter (FSDP)."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from contracap.losses import Gather
from contracap.model.coca import CoCa, CoCaOutput
from contracap.model.text import TokenStates
from contracap.model.transformer import CrossAttentionBlock, SelfAttentionBlock
from contracap.parallel.blocks import change_blocks
from contracap.parallel.gather import gather_rows
from contracap.parallel.process_group import ParallelError, ProcessGroup

Kind = Literal["ddp", "fsdp", "hsdp"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model runs on its devices and is spread over the ranks."""

    kind: Kind = "ddp"
    """`ddp`: each rank holds the whole model. `fsdp`: each rank holds a shard of every parameter, its gradient and
    its moments. `hsdp`: shards within a machine, copies across machines. A run can be resumed with another kind."""
    recompute: Literal["none", "blocks"] = "none"
    """`blocks`: keep only the input of each transformer block and compute its activations again in the backward
    pass. Takes less memory and more time."""
    compile: bool = False
    """Fuse the operations of each block with `torch.compile`. Meant for GPUs: see docs/performance.md."""


class Replica(nn.Module):
    """A model whose copies on all ranks average their gradients (DDP), with the methods that a training step calls."""

    def __init__(self, model: CoCa):
        super().__init__()
        self.copies = nn.parallel.DistributedDataParallel(_Methods(model), gradient_as_bucket_view=True)

    def forward(self, *batch: Any) -> CoCaOutput:
        return self.copies("__call__", *batch)

    def contrastive_features(self, *batch: Any) -> tuple[Tensor, Tensor]:
        return self.copies("contrastive_features", *batch)

    def caption_states(self, *batch: Any) -> TokenStates:
        return self.copies("caption_states", *batch)


class _Methods(nn.Module):
    """Methods of a model as one forward pass, which is what DDP watches."""

    def __init__(self, model: CoCa):
        super().__init__()
        self.model = model

    def forward(self, method: str, *batch: Any) -> Any:
        return getattr(self.model, method)(*batch)


@dataclass(frozen=True)
class ParallelModel:
    """A model whose gradients are averaged over the ranks by each backward pass.

    Attributes:
        model: what to call in place of the model, on the rows of this rank.
        gather: gathers the rows of all ranks for the contrastive loss; None if there is only one rank.
        accumulating: a context for the forward and backward passes of all parts of a batch but the last. Their
            gradients stay on this rank.
        forward_only: a context for forward passes that no backward pass follows.
    """

    model: CoCa | Replica
    gather: Gather | None = None
    accumulating: Callable[[], AbstractContextManager[None]] = nullcontext
    forward_only: Callable[[], AbstractContextManager[None]] = nullcontext


def parallelize(
    model: CoCa, config: ParallelConfig, process_group: ProcessGroup, *, bf16: bool = False
) -> ParallelModel:
    """Apply recomputation and compilation to the blocks of `model`, and spread it over the ranks, if there are several.

    Call it after the model is moved to its device and frozen, and before the optimizer is built. Every parameter that
    is not frozen must take part in the losses.

    Args:
        config: under `ddp`, all ranks start from the values of rank 0. Under `fsdp` and `hsdp`, parameters become
            DTensors, a block gathers its own when it runs, and all ranks must bring the same values.
        bf16: whether sharded parameters are sent and multiplied in bf16; gradients are averaged in float32.

    Traffic per rank and step, without the loss: `ddp` all-reduces the bytes of the trained parameters. With N shards, a
    rank gathers (N - 1) / N of all parameters, in the backward pass those of the blocks again, and scatters as many
    bytes of gradients; `hsdp` also all-reduces 1 / N of the gradients between machines.

    Raises: ParallelError: for `hsdp`, if the machines have different numbers of ranks.
    """
    change_blocks(model, recompute=config.recompute == "blocks", compiled=config.compile)
    if process_group.world_size == 1:
        return ParallelModel(model)
    if config.kind == "ddp":
        replica = Replica(model)
        return ParallelModel(replica, gather_rows, replica.copies.no_sync)
    return shard(model, config, process_group, bf16=bf16)


def sharded_modules(model: CoCa) -> list[nn.Module]:
    """Return the modules that FSDP shards one by one: each gathers its parameters while it runs. All other parameters
    belong to the root module."""
    # Cross-attention belongs to the root: its keys and values are computed before its block runs.
    return [
        module.feed_forward if isinstance(module, CrossAttentionBlock) else module
        for module in model.modules()
        if isinstance(module, SelfAttentionBlock | CrossAttentionBlock)
    ]


def shard(model: CoCa, config: ParallelConfig, process_group: ProcessGroup, *, bf16: bool) -> ParallelModel:
    """Shard the parameters of `model` over the ranks, as `parallelize` does for `fsdp` and `hsdp`; one rank may be
    alone."""
    # Imported here, because it takes a second that a run of one process need not wait for.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if config.kind == "hsdp" and len(set(process_group.all_gather(process_group.local_world_size))) > 1:
        raise ParallelError("hsdp needs equally many ranks on each machine: use fsdp or ddp")
    shape, names = (process_group.world_size,), ("shard",)
    if config.kind == "hsdp":
        shape, names = (
            (process_group.world_size // process_group.local_world_size, process_group.local_world_size),
            ("replicate", "shard"),
        )
    mesh = init_device_mesh(process_group.device.type, shape, mesh_dim_names=names)
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    )
    for module in sharded_modules(model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    # The root's parameters stay gathered until the backward pass, because the losses read some of them. FSDP cannot
    # shard a scalar.
    scale = model.logit_scale
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params={scale})
    for method in ("contrastive_features", "caption_states", "encode_image", "encode_text", "encode_caption_tokens"):
        register_fsdp_forward_method(model, method)

    def average(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad = process_group.mean(parameter.grad)

    if scale.requires_grad:
        scale.register_post_accumulate_grad_hook(average)
    assert isinstance(model, FSDPModule)

    @contextmanager
    def accumulating() -> Iterator[None]:
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    @contextmanager
    def forward_only() -> Iterator[None]:
        try:
            yield
        finally:
            model.reshard()  # as a backward pass would have done for the root's parameters

    return ParallelModel(model, gather_rows, accumulating, forward_only)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be sharded, on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a full tensor, sharded as `like` is; the opposite of `full_tensor`."""
    if not hasattr(like, "full_tensor"):
        return tensor.to(like.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
