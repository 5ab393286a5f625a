"""A training step waits for the device nowhere: on fake tensors, which have no values, whoever reads one raises."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from contracap.model.coca import CoCa, CoCaConfig
from contracap.parallel import ParallelModel, ProcessGroup, gather_rows
from contracap.training.checkpoint import moving_average
from contracap.training.optimizer import build_optimizer
from contracap.training.step import StepConfig, StepMetrics, TrainingState, train_step

from .test_step import CONFIG, TINY, batch

LEGACY = replace(TINY, text=replace(TINY.text, cls_mask="legacy"), vision=replace(TINY.vision, patch_dropout=0.5))


def fake_step(config: StepConfig, model: CoCaConfig = TINY, *, world_size: int = 1) -> StepMetrics:
    """A step on tensors without values, of the first of `world_size` ranks."""
    process_group, made = ProcessGroup(world_size=world_size, local_world_size=world_size), batch()
    with FakeTensorMode(allow_non_fake_inputs=True):  # the lengths of texts lie on the CPU, and are read there
        coca = CoCa(model)
        coca.initialise()
        state = TrainingState(
            model=coca,
            optimizer=build_optimizer(coca, config.optimizer),
            average=moving_average(coca),
            process_group=process_group,
            parallel=ParallelModel(coca, None if world_size == 1 else gather_rows),
        )
        fake = replace(made, pixels=torch.zeros_like(made.pixels), ids=torch.zeros_like(made.ids))
        return train_step(state, fake, replace(config, ema_decay=0.9))


@pytest.mark.parametrize(
    ("model", "parts"), [(TINY, 1), (LEGACY, 2)], ids=["whole", "legacy mask, patch dropout, in parts"]
)
def test_a_step_waits_for_nothing(model: CoCaConfig, parts: int) -> None:
    numbers = fake_step(replace(CONFIG, accumulation=parts), model)
    with pytest.raises(DataDependentOutputException):
        numbers.read()  # so a read within the step would have been seen


def test_what_ranks_tell_each_other_in_a_step_waits_for_nothing() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)  # its collectives do nothing
    try:
        fake_step(replace(CONFIG, accumulation=2), world_size=2)
    finally:
        dist.destroy_process_group()
