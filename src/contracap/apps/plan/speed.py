"""The operations and the time of one step."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from contracap.apps.plan.memory import saved_bytes
from contracap.apps.plan.planned_run import PlannedRun
from contracap.apps.plan.traffic import Collective
from contracap.losses import LossConfig
from contracap.training.flops import BACKWARD, TextLengths, count_flops, training_flops
from contracap.training.gpus import Gpu

UPDATE_BYTES = 40  # moved in a GPU's memory for each parameter: its gradient is clipped (12), then AdamW (28)


@dataclass(frozen=True, kw_only=True)
class SampleFlops:
    """Operations of one sample.

    Attributes:
        forward, training: of the forward pass, and of forward and backward pass, by part of the model.
        features: of the pass before the first part of a batch, for the contrastive loss.
        recomputed: of what the backward pass computes again.
    """

    forward: Mapping[str, float]
    training: Mapping[str, float]
    features: float
    recomputed: float


def sample_flops(run: PlannedRun, texts: TextLengths) -> SampleFlops:
    """Count the operations of a sample whose text has the mean length."""
    recipe, config = run.recipe, run.recipe.model_config
    counted = count_flops(config, recipe.loss, texts)
    features = recomputed = 0.0
    if recipe.accumulation > 1 and run.tokens.contrastive:
        features = sum(count_flops(config, LossConfig(captioning=0.0), texts).parts.values())
    if recipe.parallel.recompute == "blocks":
        blocks = counted.blocks
        recomputed = (sum(training_flops(run.model, blocks).values()) - sum(blocks.values())) / BACKWARD
    training = training_flops(run.model, counted.parts)
    return SampleFlops(forward=counted.parts, training=training, features=features, recomputed=recomputed)


def step_seconds(run: PlannedRun, flops: SampleFlops) -> Mapping[str, float]:
    """Return the seconds of a step by what they go to.

    Forward and backward pass take what their arithmetic takes, or what it takes to write their activations and read
    them again, whichever is longer. Parameters travel while a pass runs, gradients while the backward pass of the last
    part does; only what is left of that counts.
    """
    gpu, rate, parts = run.gpu, run.rate, run.recipe.accumulation
    recompute = run.recipe.parallel.recompute == "blocks"
    saved = saved_bytes(run.recipe.model_config, run.tokens, product=run.product, recompute=recompute)
    forward_flops, training = (run.samples * sum(each.values()) for each in (flops.forward, flops.training))
    passes = max(training / rate, 2 * (run.samples * sum(saved.values())) / gpu.bandwidth)
    features, recomputed = run.samples * flops.features / rate, run.samples * flops.recomputed / rate
    first = passes * forward_flops / training
    forward = first + features
    backward = (passes - first + recomputed) / parts

    def travel(*purposes: str) -> float:
        return travel_seconds(gpu, (each for each in run.collectives if each.purpose in purposes))

    fetching = travel("parameters, backward") / parts
    left = max(0.0, travel("parameters, forward") - forward)
    left += (parts - 1) * max(0.0, fetching - backward) + max(0.0, fetching + travel("gradients") - backward)
    return {
        "forward and backward": passes,
        "features beforehand": features,
        "recomputation": recomputed,
        "update": UPDATE_BYTES * run.shares.trained / gpu.bandwidth,
        "features and numbers": travel("features", "numbers"),
        "parameters and gradients, not hidden": left,
    }


def travel_seconds(gpu: Gpu, collectives: Iterable[Collective]) -> float:
    """Return the seconds that collectives take one after the other, by their bytes alone."""
    return math.fsum(each.sent / (gpu.local_link if each.local else gpu.link) for each in collectives)
