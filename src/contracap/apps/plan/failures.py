"""Time that checkpoints and failures cost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from contracap.apps.plan.parameters import checkpoint_bytes, snapshot_bytes
from contracap.apps.plan.planned_run import PlannedRun

COPYING = 5e9  # bytes a second of a checkpoint's copy off a GPU, into memory that is not pinned: an assumption
WRITING = 1e9  # bytes a second of writing it afterwards, while steps go on: an assumption


@dataclass(frozen=True, kw_only=True)
class Failures:
    """Cost of checkpoints and failures; a checkpoint is copied between two steps and written during the next ones.

    Attributes:
        stall: seconds that a checkpoint holds the run up.
        writing: seconds until it is whole. The next one waits for that.
        between: mean seconds from one failure of any GPU to the next.
    """

    stall: float
    writing: float
    between: float

    @property
    def best_interval(self) -> float:
        """Return the seconds between checkpoints that lose the least time; at least the time that writing takes.

        Source: J. W. Young, Comm. ACM 17 (1974)."""
        return max(self.writing, math.sqrt(2 * self.stall * self.between))

    def lost_share(self, interval: float) -> float:
        """Return the share of the whole time that goes to checkpoints every `interval` seconds of steps and, after a
        failure, to repeating half an interval and what was done while the lost checkpoint was written."""
        waiting = max(0.0, self.writing - interval)
        lost = (self.stall + waiting) / interval + (interval / 2 + self.writing) / self.between  # a second of steps
        return lost / (1 + lost)


def failure_figures(run: PlannedRun, *, step_seconds: float, hours_between_failures: float) -> Mapping[str, float]:
    """Return what checkpoints and failures cost: with the recipe's checkpoints, and with the best ones.

    Args:
        hours_between_failures: of one GPU.
    """
    averaged = run.recipe.ema_decay > 0
    failures = Failures(
        stall=snapshot_bytes(run.model, run.shares, averaged=averaged) / COPYING,
        writing=checkpoint_bytes(run.model, averaged=averaged) / WRITING,
        between=3600 * hours_between_failures / run.gpus,
    )
    seconds = run.recipe.steps * step_seconds
    interval, best = (
        min(each, seconds) for each in (run.recipe.checkpoint.every * step_seconds, failures.best_interval)
    )
    figures = {
        "hours_between_failures": failures.between / 3600,
        "checkpoint_stall_seconds": failures.stall,
        "checkpoint_writing_seconds": failures.writing,
    }
    if seconds <= failures.stall + failures.writing:  # over before its only checkpoint is: a share means nothing
        return figures
    return figures | {
        "failure_loss_percent": 100 * failures.lost_share(interval),
        "best_steps_between_checkpoints": max(1.0, float(round(best / step_seconds))),
        "failure_loss_percent_at_best": 100 * failures.lost_share(best),
    }
