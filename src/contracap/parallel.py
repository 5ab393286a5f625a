"""Many processes that train one model: the process group, the rows of all ranks, the model's gradients averaged."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from contracap.losses import Gather
from contracap.model.coca import CoCa, TrainingFeatures
from contracap.model.transformer import CrossBlock, SelfBlock

Kind = Literal["ddp", "fsdp", "hsdp"]
Value = TypeVar("Value")
TIMEOUT = timedelta(minutes=10)  # what a rank waits for the others, before it takes them for lost

# torch 2.13 gave it a new name, and warns at each call of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class ParallelError(ValueError):
    """Ranks that cannot be started, or a model that cannot be spread over them, as asked."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many ranks share a model; one rank alone has all of it.

    Attributes:
        kind: what `wrapped` does. `ddp`: each rank holds everything. `fsdp`: each holds a share of every parameter, its
            gradient and its moments. `hsdp`: shares within a machine, copies between machines.
        gather: how the contrastive loss gets the rows of all ranks. `gathered`: all at once. `ring`: block after block,
            at twice the traffic and without ever holding them all.
        recompute: `blocks`: of each transformer block only the input is kept, and its activations are computed again in
            the backward pass: less memory, more time.
    """

    kind: Kind = "ddp"
    gather: Literal["gathered", "ring"] = "gathered"
    recompute: Literal["none", "blocks"] = "none"


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that train together; by default it is alone, and each method gives back what it got.

    With more than one, every rank must make the same calls in the same order.

    Attributes:
        rank: from 0; rank 0 writes the files.
        count: ranks on all machines.
        local_count: ranks on this machine.
        device: where this rank computes.
    """

    rank: int = 0
    count: int = 1
    local_count: int = 1
    device: torch.device = torch.device("cpu")

    def broadcast(self, value: Value) -> Value:
        """Rank 0's value; anything that can be pickled."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def collect(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order; anything small that can be pickled."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def sum(self, numbers: Tensor) -> Tensor:
        """Sum over the ranks, element by element."""
        if self.count == 1:
            return numbers
        total = numbers.detach().clone()
        dist.all_reduce(total)
        return total

    def mean(self, numbers: Tensor) -> Tensor:
        """Mean over the ranks, element by element.

        What is averaged later must be divided by this: a captioning loss whose `tokens` are the mean over the ranks of
        the labels they hold is, averaged over the ranks, the sum over all labels divided by their number.
        """
        return numbers if self.count == 1 else self.sum(numbers) / self.count

    def wait(self) -> None:
        """Go on when every rank has come here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def started(device: torch.device) -> Iterator[Ranks]:
    """The ranks that `torchrun` started, in a process group (nccl between CUDA devices, gloo else) that ends with the
    context; without `torchrun`, one process and no group.

    Args:
        device: its type counts; of several CUDA devices each rank takes its own.

    Raises: ParallelError: if torchrun's environment variables are incomplete, or a rank finds no device of its own.
    """
    count = _variable("WORLD_SIZE") if "WORLD_SIZE" in os.environ else 1
    if count == 1:
        yield Ranks(device=device)
        return
    rank, local_rank, local_count = (_variable(name) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ParallelError(
                f"rank {rank} is number {local_rank} on its machine, which has {torch.cuda.device_count()} CUDA "
                "devices: give torchrun --nproc-per-node that number, or less"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    store, _, _ = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    if count == local_count:
        # torchrun keeps its store when it starts ranks again, and gloo would connect to the addresses of dead ones.
        # On several machines the counts may differ, so there it is left to luck and another restart.
        store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",  # objects and checkpoints go through gloo
        store=store,
        rank=rank,
        world_size=count,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield Ranks(rank=rank, count=count, local_count=local_count, device=device)
    finally:
        dist.destroy_process_group()


def _variable(name: str) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        raise ParallelError(
            f"WORLD_SIZE is set, but {name} is {os.environ.get(name) or 'not set'}: start the ranks with torchrun, "
            "or unset WORLD_SIZE to train in one process"
        ) from None


def gathered(rows: Tensor) -> Iterable[Tensor]:
    """The rows of all ranks in one block: fetched once, and held.

    A contrastive loss of n pairs of width d on each of R ranks receives (R - 1) x n x (2 d + 2) numbers per rank.
    """
    block = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
    _all_gather(block, rows)
    return [block]


@dataclass(frozen=True)
class Ring:
    """The rows of all ranks, a rank's after the other's: each passes on what it has used to the next, while it uses it.

    No rank holds more than two blocks, but the two passes of a contrastive loss go around twice: of n pairs of width d
    on each of R ranks (R - 1) x n x (4 d + 2) numbers per rank are received.
    """

    rows: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        rank, count = dist.get_rank(), dist.get_world_size()
        block = self.rows
        for _ in range(count - 1):
            coming = torch.empty_like(block)
            transfers = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, block, (rank + 1) % count),
                    dist.P2POp(dist.irecv, coming, (rank - 1) % count),
                ]
            )
            yield block
            for transfer in transfers:
                transfer.wait()
            block = coming
        yield block


GATHERS: dict[str, Gather] = {"gathered": gathered, "ring": Ring}


@dataclass(frozen=True)
class Wrapped:
    """A model whose gradients are averaged over the ranks by each backward pass.

    Attributes:
        features: what to call in place of `CoCa.features`; the same arguments, on the rows of this rank.
        accumulating: a context for the forward and backward passes of all parts of a batch but the last, whose
            gradients wait on this rank.
    """

    features: Callable[..., TrainingFeatures]
    accumulating: Callable[[], AbstractContextManager[None]] = nullcontext


def wrapped(model: CoCa, kind: Kind, ranks: Ranks, *, bf16: bool = False) -> Wrapped:
    """Spread `model` over the ranks; with one rank it stays as it is.

    Call it when the model is on its device and frozen as it shall be, and before the optimizer is built. Every
    parameter that is not frozen must take part in the losses.

    Args:
        kind: `ddp`: each rank holds everything; the values of rank 0. `fsdp`: each rank holds a share of every
            parameter, as a DTensor, and fetches a block's when it is used; all ranks must bring the same values.
            `hsdp`: shares within a machine, copies between machines.
        bf16: whether parameters that are shared out travel and multiply in bf16; gradients are averaged in float32.

    Raises: ParallelError: for `hsdp`, if the machines have different numbers of ranks.
    """
    if ranks.count == 1:
        return Wrapped(model.features)
    if kind == "ddp":
        copies = nn.parallel.DistributedDataParallel(_Features(model), gradient_as_bucket_view=True)
        return Wrapped(copies, copies.no_sync)
    return _sharded(model, kind, ranks, bf16=bf16)


class _Features(nn.Module):
    """`CoCa.features` as a forward pass, which is what DDP watches."""

    def __init__(self, model: CoCa):
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor, **wanted: bool) -> TrainingFeatures:
        return self.model.features(*args, **wanted)


def units(model: CoCa) -> list[nn.Module]:
    """The parts whose parameters are fetched when they run and let go again, if ranks share them out; what is in none
    of them stays with the root."""
    # A cross-attention is read twice, for its keys and values before its block runs: it stays with the root.
    return [
        module.feed_forward if isinstance(module, CrossBlock) else module
        for module in model.modules()
        if isinstance(module, SelfBlock | CrossBlock)
    ]


def _sharded(model: CoCa, kind: Kind, ranks: Ranks, *, bf16: bool) -> Wrapped:
    # Imported here: it takes a second, which a run of one process need not wait.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if kind == "hsdp" and len(set(ranks.collect(ranks.local_count))) > 1:
        raise ParallelError("hsdp needs equally many ranks on each machine: use fsdp or ddp")
    shape, names = (ranks.count,), ("shard",)
    if kind == "hsdp":
        shape, names = (ranks.count // ranks.local_count, ranks.local_count), ("replicate", "shard")
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    )
    for unit in units(model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    # The root's parameters are there from the forward pass to the backward: the losses read some of them. FSDP cannot
    # share out a scalar.
    scale = model.logit_scale
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params={scale})
    for method in ("features", "encode_image", "encode_text", "encode_caption_tokens"):
        register_fsdp_forward_method(model, method)

    def average(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad = ranks.mean(parameter.grad)

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

    return Wrapped(model.features, accumulating)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be shared out over the ranks, on each of them."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
