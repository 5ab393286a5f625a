"""What befalls a run of a test, and what it leaves behind."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from contracap.pretrained import read_weights
from contracap.training import loop, step
from contracap.training.recorder import read_metrics
from contracap.training.step import StepMetrics, TrainingState


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], object]) -> None:
    """Let something happen within a step of the run."""
    train_step = loop.train_step

    def acting(state: TrainingState, *args: Any) -> StepMetrics:
        if state.step == number - 1:
            action()
        return train_step(state, *args)

    monkeypatch.setattr(loop, "train_step", acting)


def scale_loss(monkeypatch: pytest.MonkeyPatch, *, at: Collection[int], factor: float) -> None:
    """Multiply the contrastive losses of these steps, from 1."""
    calls, loss = iter(range(1, 1000)), step.contrastive_loss
    monkeypatch.setattr(
        step,
        "contrastive_loss",
        lambda *args, **kwargs: loss(*args, **kwargs) * (factor if next(calls) in at else 1),
    )


def losses(folder: Path) -> list[tuple[int, float | None, float | None]]:
    """Step and both losses of every record that has them, as they are."""
    return [
        (record["step"], record.get("contrastive_loss"), record.get("captioning_loss"))
        for record in read_metrics(folder)
        if "loss" in record
    ]


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def assert_same_weights(first: Path, second: Path, file: str = "model.safetensors") -> None:
    ours, theirs = (read_weights(checkpoint / file).state for checkpoint in (first, second))
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
