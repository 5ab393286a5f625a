"""The time of one step and its traffic between GPUs, and what failures cost."""

import math
from collections.abc import Mapping

from contracap.plan.flops import BACKWARD
from contracap.plan.gpus import Gpu
from contracap.plan.memory import EXACT

UPDATE_BYTES = 40  # moved in a GPU's memory for each parameter: its gradient is clipped (12), then AdamW (28)
WRITING = 1e9  # bytes a second that a checkpoint is written with: an assumption


def traffic_bytes(*, trained: int, embed_dim: int, rows: float, gpus: int, contrastive: bool) -> Mapping[str, float]:
    """Bytes that each GPU sends in a step, and receives.

    Gradients go round a ring twice, once to be summed and once to be handed out. Of the contrastive loss, features of
    both towers go to all, and two numbers a pair.

    Args:
        trained: parameters that have a gradient.
        rows: samples of a step on each GPU.
    """
    pairs = rows * (gpus - 1) * (2 * embed_dim + 2) * contrastive
    return {"gradients": 2 * (gpus - 1) / gpus * trained * EXACT, "features": pairs * EXACT}


def step_seconds(
    gpu: Gpu,
    *,
    rate: float,
    forward_flops: float,
    saved_bytes: float,
    trained: int,
    traffic: Mapping[str, float],
) -> Mapping[str, float]:
    """Seconds of a step by what they go to.

    Forward and backward pass take what their arithmetic takes, or what it takes to write their activations and read
    them again, whichever is longer. Gradients travel while the backward pass runs; only what is left of that counts.

    Args:
        rate: operations a second that the arithmetic reaches.
        forward_flops, saved_bytes: of all samples of this GPU.
        trained: parameters that have a gradient.
        traffic: as `traffic_bytes` gives it.
    """
    passes = max((1 + BACKWARD) * forward_flops / rate, 2 * saved_bytes / gpu.bandwidth)
    backward = passes * BACKWARD / (1 + BACKWARD)
    return {
        "forward and backward": passes,
        "update": UPDATE_BYTES * trained / gpu.bandwidth,
        "features": traffic["features"] / gpu.link,
        "gradients, not hidden": max(0.0, traffic["gradients"] / gpu.link - backward),
    }


def best_interval(stall: float, between_failures: float) -> float:
    """Seconds between checkpoints that lose the least. Source: J. W. Young, Comm. ACM 17 (1974).

    Args:
        stall: seconds that a checkpoint holds the run up.
        between_failures: mean seconds from one failure of any GPU to the next.
    """
    return math.sqrt(2 * stall * between_failures)


def lost_share(interval: float, stall: float, between_failures: float) -> float:
    """Share of the time that goes to writing checkpoints and, after a failure, to repeating half an interval."""
    return stall / interval + interval / (2 * between_failures)
