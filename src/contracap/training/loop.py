"""The training loop: steps, and events between them."""

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from contracap.data.batch import Batch
from contracap.training.monitor import Monitor
from contracap.training.step import NonFiniteError, StepConfig, TrainingState, train_step

MAX_SKIPPED = 50  # in a row; then the run stops, because its weights will not recover
logger = logging.getLogger(__name__)


class TrainingError(ValueError):
    """A run that stopped and cannot continue as it is."""


@dataclass(frozen=True)
class Event:
    """An action every few steps, and after the last one."""

    every: int
    action: Callable[[], None]


def repeat_steps(
    state: TrainingState,
    batches: Iterable[Batch],
    config: StepConfig,
    *,
    monitor: Monitor,
    events: Sequence[Event],
    nonfinite: Literal["stop", "skip"],
) -> None:
    """Train from `state.step` to `config.total_steps`. Events that are due at the same step run in their order.

    Raises: TrainingError: at a loss or gradient that is not finite; if such steps are to be skipped, at the last of
        `MAX_SKIPPED` in a row.
    """
    skipped = 0
    for batch in itertools.islice(monitor.batches(batches), config.total_steps - state.step):
        try:
            numbers = train_step(state, batch, config).read()
        except NonFiniteError as error:
            skipped += 1
            stops = nonfinite == "stop" or skipped == MAX_SKIPPED
            monitor.note_not_finite(str(error), batch, stops=stops)
            if stops:
                row = f", number {skipped} of such steps in a row" if skipped > 1 else ""
                raise TrainingError(f"step {state.step + 1}: {error}{row}") from None
            logger.warning("skipped step %d: %s", state.step + 1, error)
            numbers = {}
        else:
            skipped = 0
        state.step += 1
        monitor.step(numbers, batch)
        for event in events:
            if state.step % event.every == 0 or state.step == config.total_steps:
                event.action()
