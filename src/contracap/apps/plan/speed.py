"""The time of one step, and what failures cost."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from contracap.apps.plan.traffic import Collective
from contracap.training.gpus import Gpu

UPDATE_BYTES = 40  # moved in a GPU's memory for each parameter: its gradient is clipped (12), then AdamW (28)
COPYING = (
    5e9  # bytes a second that a checkpoint is copied off a GPU with, into memory that is not pinned: an assumption
)
WRITING = 1e9  # bytes a second that it is then written with, beside the steps: an assumption


def step_seconds(
    gpu: Gpu,
    *,
    rate: float,
    forward_flops: float,
    training_flops: float,
    features_flops: float,
    recomputed_flops: float,
    saved_bytes: float,
    trained: int,
    parts: int,
    collectives: Sequence[Collective],
) -> Mapping[str, float]:
    """Seconds of a step by what they go to.

    Forward and backward pass take what their arithmetic takes, or what it takes to write their activations and read
    them again, whichever is longer. Parameters travel while a pass runs, gradients while the backward pass of the last
    part does; only what is left of that counts.

    Args:
        rate: operations a second that the arithmetic reaches.
        forward_flops, saved_bytes: of all samples of this GPU.
        training_flops: likewise, with those of the backward pass.
        features_flops: of the passes before the first part of a batch, for the contrastive loss.
        recomputed_flops: of what the backward pass computes again.
        trained: parameters with a gradient on this GPU.
        parts: that a batch is cut into.
    """
    passes = max(training_flops / rate, 2 * saved_bytes / gpu.bandwidth)
    features, recomputed = features_flops / rate, recomputed_flops / rate
    first = passes * forward_flops / training_flops
    forward = first + features
    backward = (passes - first + recomputed) / parts

    def travel(*purposes: str) -> float:
        return travel_seconds(gpu, (each for each in collectives if each.purpose in purposes))

    fetching = travel("parameters, backward") / parts
    left = max(0.0, travel("parameters, forward") - forward)
    left += (parts - 1) * max(0.0, fetching - backward) + max(0.0, fetching + travel("gradients") - backward)
    return {
        "forward and backward": passes,
        "features beforehand": features,
        "computed again": recomputed,
        "update": UPDATE_BYTES * trained / gpu.bandwidth,
        "features and numbers": travel("features", "numbers"),
        "parameters and gradients, not hidden": left,
    }


def travel_seconds(gpu: Gpu, collectives: Iterable[Collective]) -> float:
    """Seconds that collectives take one after the other, by their bytes alone."""
    return math.fsum(each.sent / (gpu.local_link if each.local else gpu.link) for each in collectives)


@dataclass(frozen=True, kw_only=True)
class Failures:
    """What checkpoints and failures cost; a checkpoint is copied between two steps and written beside them.

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
        """Seconds between checkpoints that lose the least. Source: J. W. Young, Comm. ACM 17 (1974), for what lies
        above the time that writing takes."""
        return max(self.writing, math.sqrt(2 * self.stall * self.between))

    def lost_share(self, interval: float) -> float:
        """Share of the time that goes to checkpoints every `interval` seconds of steps and, after a failure, to
        repeating half an interval and what was done while the lost checkpoint was written."""
        waiting = max(0.0, self.writing - interval)
        return (self.stall + waiting) / interval + (interval / 2 + self.writing) / self.between
