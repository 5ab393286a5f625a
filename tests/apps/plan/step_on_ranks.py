"""ProcessGroup that take training steps and note what they tell each other: step_on_ranks.py FOLDER COUNT CASE...

Many ranks are played by one, to which torch's fake process group pretends that the others are there.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from contracap.apps.plan.parameters import planned_model
from contracap.config import build, to_dict
from contracap.data.batch import Batch
from contracap.images import ImageConfig
from contracap.parallel import ProcessGroup, parallelize, start_process_group
from contracap.parallel.process_group import Value
from contracap.pretrained import random_model
from contracap.training.optimizer import build_optimizer
from contracap.training.recipe import Recipe
from contracap.training.step import StepConfig, TrainingState, train_step
from tests.distributed.forks import run_ranks
from tests.model.tiny_models import tiny_mammut

ROWS, MAX_REAL, FAKE = 4, 8, 384


def recipe_of(count: int, **changes: Any) -> Recipe:
    """A recipe of size `tiny` for so many ranks."""
    data = {"train": "shards", "batch_size": ROWS * count, "streams": count}
    return build(Recipe, {"size": "tiny", "steps": 200, "out": "runs/x", "precision": "fp32", "data": data} | changes)


BF16 = {"precision": "bf16"}
MAMMUT = to_dict(tiny_mammut())
CASES: dict[str, dict[str, Any]] = {
    **{kind: {"parallel": {"kind": kind}} for kind in ("ddp", "fsdp", "hsdp")},
    "ddp bf16": BF16,
    "fsdp bf16": BF16 | {"parallel": {"kind": "fsdp"}},
    "hsdp contrastive": {"parallel": {"kind": "hsdp"}, "loss": {"captioning": 0.0}},
    "ddp frozen": {"frozen": ["vision"]},
    "fsdp frozen text": {"parallel": {"kind": "fsdp"}, "frozen": ["text"]},
    "fsdp one block frozen": {"parallel": {"kind": "fsdp"}, "frozen": ["vision.blocks.0"]},
    "fsdp captioning in parts": {"parallel": {"kind": "fsdp"}, "loss": {"contrastive": 0.0}, "accumulation": 2},
    "ddp in parts": {"accumulation": 2},
    "fsdp in parts": {"parallel": {"kind": "fsdp"}, "accumulation": 2},
    "hsdp contrastive in parts": {"parallel": {"kind": "hsdp"}, "loss": {"captioning": 0.0}, "accumulation": 4},
    "ddp captioning in parts": {"loss": {"contrastive": 0.0}, "accumulation": 2},
    "fsdp mammut in parts": {"parallel": {"kind": "fsdp"}, "model": MAMMUT, "accumulation": 2},
    "fsdp mammut captioning": {"parallel": {"kind": "fsdp"}, "model": MAMMUT, "loss": {"contrastive": 0.0}},
}

PAYLOADS: dict[str, tuple[str, Callable[..., int]]] = {
    "c10d::_allgather_base_": ("all_gather", lambda output, *_: output.nbytes),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", lambda output, given, *_: given.nbytes),
    "c10d::allreduce_": ("all_reduce", lambda tensors, *_: sum(tensor.nbytes for tensor in tensors)),
    "_c10d_functional::all_reduce": ("all_reduce", lambda tensor, *_: tensor.nbytes),
}
SILENT = {"_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}


@dataclass
class Heard(TorchDispatchMode):
    """Bytes of each kind of collective; of one that is not expected, its name."""

    payloads: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor first; what it calls comes here again
        name = func.name()
        if name in PAYLOADS:
            kind, payload = PAYLOADS[name]
            self.payloads[kind] += payload(*args)
        elif name.startswith(("c10d::", "_c10d_functional::")) and name not in SILENT:
            self.payloads[name] += 1
        return func(*args, **(kwargs or {}))


def numbers_here(tensors: Iterable[Tensor]) -> int:
    """How many numbers this rank holds of them."""
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel() for tensor in tensors)


def heard_in_a_step(recipe: Recipe, process_group: ProcessGroup) -> tuple[dict[str, int], int, int]:
    """What this rank tells the others in its first step; how many parameters it holds, and how many it trains."""
    model = random_model(recipe.model_config, seed=0)[0]
    for parameter, planned in zip(model.parameters(), planned_model(recipe).parameters(), strict=True):
        parameter.requires_grad_(planned.requires_grad)
    bf16 = recipe.precision == "bf16"
    parallel = parallelize(model, recipe.parallel, process_group, bf16=bf16)
    state = TrainingState(
        model=model,
        optimizer=build_optimizer(model, recipe.optimizer),
        average=None,
        process_group=process_group,
        parallel=parallel,
    )
    config = StepConfig(
        loss=recipe.loss,
        optimizer=recipe.optimizer,
        image=ImageConfig(size=recipe.model_config.vision.image_size),
        total_steps=recipe.steps,
        bf16=bf16,
        accumulation=recipe.accumulation,
        ema_decay=0.0,
        seed=0,
    )
    ids = torch.zeros(ROWS, 16, dtype=torch.int64)
    for row in range(ROWS):
        ids[row, : 4 + row], ids[row, 4 + row] = 5, recipe.model_config.text.end
    pixels, lengths = torch.zeros(ROWS, 3, 32, 32, dtype=torch.uint8), np.arange(5, 5 + ROWS)
    batch = Batch(pixels=pixels, ids=ids, lengths=lengths, keys=["key"] * ROWS)
    with Heard() as heard:
        train_step(state, batch, config)  # not read: ranks that are not there may have said NaN
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return dict(heard.payloads), numbers_here(model.parameters()), numbers_here(trained)


def main(out: Path, process_group: ProcessGroup, names: list[str]) -> None:
    """What one rank does."""
    heard = {name: heard_in_a_step(recipe_of(process_group.world_size, **CASES[name]), process_group) for name in names}
    torch.save(heard, out / f"{process_group.rank}.pt")


def start(out: Path, names: list[str]) -> None:
    """Be a rank of two machines."""
    with start_process_group(torch.device("cpu")) as process_group:
        main(out, process_group, names)


class PlayedRanks(ProcessGroup):
    """ProcessGroup of which each brings what this one brings."""

    def all_gather(self, value: Value) -> list[Value]:
        return [value] * self.world_size


def play(count: int, out: Path, names: list[str]) -> None:
    """Be the first of many ranks, on machines of 8."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # a private part of torch, of the tests alone

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    main(out, PlayedRanks(rank=0, world_size=count, local_world_size=8), names)
    dist.destroy_process_group()


if __name__ == "__main__":
    folder, count, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if count > MAX_REAL:
        import torch._dynamo  # DDP and FSDP need these
        import torch.distributed.fsdp

        torch.set_num_threads(1)
        play(count, folder, names)
    else:
        run_ranks(count, lambda *_: start(folder, names))
