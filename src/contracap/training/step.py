"""One update of the weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from contracap.data.batch import Batch
from contracap.images import ImageConfig, normalise
from contracap.losses import LossConfig, captioning_loss, contrastive_loss
from contracap.model.coca import CoCa
from contracap.model.text import TokenStates
from contracap.parallel import ParallelModel, ProcessGroup, full_tensor
from contracap.training.optimizer import OptimizerConfig, learning_rate_at

LOGIT_SCALE_RANGE = (0.0, math.log(100.0))
ContrastiveLoss = Callable[..., Tensor]
"""Return the contrastive loss of image_features and text_features, with the keyword logit_scale."""


class NonFiniteError(ValueError):
    """A loss or gradient that is NaN or infinite. The step left the weights as they were."""


@dataclass
class TrainingState:
    """The model, its optimizer, and everything else that a step changes.

    Attributes:
        step: steps tried so far; those that changed nothing count too.
        average: moving average of the weights by name; None if the run keeps none.
        process_group: the ranks that take this step together, each on its rows of the batch.
        learning_rate_factors: of the optimizer's groups; all 1 if there are none.
        parallel: the model as it runs on the ranks.
    """

    model: CoCa
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor] | None
    parallel: ParallelModel
    step: int = 0
    process_group: ProcessGroup = ProcessGroup()
    learning_rate_factors: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """The settings of a step; attributes as in `Recipe`.

    Attributes:
        bf16: whether the forward pass runs under autocast.
    """

    loss: LossConfig
    optimizer: OptimizerConfig
    image: ImageConfig
    total_steps: int
    bf16: bool
    accumulation: int
    ema_decay: float
    seed: int


def compute_losses(
    model: CoCa,
    batch: Batch,
    config: StepConfig,
    *,
    num_labels: int | Tensor,
    parallel: ParallelModel,
    contrastive: ContrastiveLoss | None = None,
) -> dict[str, Tensor]:
    """Return the losses of weight above 0 by name, not weighted.

    Args:
        batch: on the model's device; a micro-batch, if the batch is split.
        num_labels: the number of labels of the whole batch, by which the captioning loss is divided.
        parallel: the same model as it runs on the ranks.
        contrastive: replaces `contrastive_loss`. Used for micro-batches, whose negatives are the whole batch.
    """
    contrastive = contrastive or partial(contrastive_loss, gather=parallel.gather)

    def forward_batch(forward: Callable[..., Any]) -> Any:
        # The normalised pixels take as much memory as much of the rest: nothing else refers to them.
        return forward(normalise(batch.pixels, config.image), batch.ids, batch.lengths)

    def captioning(caption_states: TokenStates) -> Tensor:
        vocabulary = model.require_decoder().vocabulary.weight
        return captioning_loss(caption_states.states, vocabulary, labels=caption_states.labels, num_labels=num_labels)

    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=config.bf16):
        if not config.loss.captioning:
            images, texts = forward_batch(parallel.model.contrastive_features)
            return {"contrastive_loss": contrastive(images, texts, logit_scale=model.logit_scale.exp())}
        if not config.loss.contrastive:
            return {"captioning_loss": captioning(forward_batch(parallel.model.caption_states))}
        output = forward_batch(parallel.model)
        return {
            "captioning_loss": captioning(output.caption_states),
            "contrastive_loss": contrastive(
                output.image_features, output.text_features, logit_scale=output.logit_scale
            ),
        }


def grad_cache_losses(
    model: CoCa, micro_batches: Sequence[Batch], config: StepConfig, *, parallel: ParallelModel
) -> list[ContrastiveLoss]:
    """Return a contrastive loss for each micro-batch, whose negatives are the whole batch.

    First, all micro-batches are embedded without gradients. From these embeddings come the loss of the whole batch and
    its gradient with respect to each of them. Then each micro-batch is embedded again, with gradients, and given to its
    loss. That has the gradient of the whole loss with respect to this micro-batch; its value is an equal share of it.
    Source: GradCache (arXiv 2101.06983).
    """
    device = model.device.type
    with torch.no_grad(), parallel.forward_only(), torch.autocast(device, dtype=torch.bfloat16, enabled=config.bf16):
        features = [
            parallel.model.contrastive_features(normalise(each.pixels, config.image), each.ids, each.lengths)
            for each in micro_batches
        ]
    images, texts = (torch.cat(rows).requires_grad_() for rows in zip(*features, strict=True))
    scale = model.logit_scale.detach().exp().requires_grad_()
    loss = contrastive_loss(images, texts, logit_scale=scale, gather=parallel.gather)
    grad_images, grad_texts, grad_scale = torch.autograd.grad(loss, (images, texts, scale))
    count = len(micro_batches)
    return [
        partial(
            _surrogate_loss,
            value=loss.detach() / count,
            grad_images=images,
            grad_texts=texts,
            grad_scale=grad_scale / count,
        )
        for images, texts in zip(grad_images.chunk(count), grad_texts.chunk(count), strict=True)
    ]


def _surrogate_loss(
    image_features: Float[Tensor, "batch embed"],
    text_features: Float[Tensor, "batch embed"],
    *,
    logit_scale: Float[Tensor, ""],
    value: Float[Tensor, ""],
    grad_images: Float[Tensor, "batch embed"],
    grad_texts: Float[Tensor, "batch embed"],
    grad_scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Return a number with this value and these gradients."""
    slope = (image_features * grad_images).sum() + (text_features * grad_texts).sum() + logit_scale * grad_scale
    return value + (slope - slope.detach())


def count_labels(batch: Batch) -> int:
    """Return the number of tokens that the captioning loss predicts: all of each text except the start token."""
    return int(batch.lengths.sum()) - len(batch)


@dataclass(frozen=True)
class StepMetrics:
    """The numbers of a step, still on the device.

    Attributes:
        values: each loss, `gradient_norm` and `logit_scale`.
        weights: the weight of each loss in the sum `loss`.
    """

    values: Mapping[str, Float[Tensor, ""]]
    weights: Mapping[str, float]
    learning_rate: float

    def read(self) -> dict[str, float]:
        """Return the losses (nats), their weighted sum `loss`, `gradient_norm` before clipping, `learning_rate` and
        `logit_scale`. Waits for the device.

        `logit_scale` is that after the update; the losses and the norm are from before it.

        Raises: NonFiniteError: if a loss or the norm is NaN or infinite; the step then changed nothing.
        """
        numbers = dict(zip(self.values, torch.stack(list(self.values.values())).tolist(), strict=True))
        logit_scale = numbers.pop("logit_scale")
        numbers = {
            **{name: number for name, number in numbers.items() if name in self.weights},
            "loss": sum(weight * numbers[name] for name, weight in self.weights.items()),
            "gradient_norm": numbers["gradient_norm"],
        }
        if not all(math.isfinite(value) for value in numbers.values()):
            raise NonFiniteError(", ".join(f"{name} {value:.6g}" for name, value in numbers.items()))
        return numbers | {"learning_rate": self.learning_rate, "logit_scale": logit_scale}


def train_step(state: TrainingState, batch: Batch, config: StepConfig) -> StepMetrics:
    """Forward, backward, clip, update. Nothing here waits for the device.

    Micro-batches have the losses and gradients of the batch as one. A step whose losses or gradients are not finite
    leaves the weights as they are. Randomness (patch dropout) depends on seed, step and rank alone, so that a resumed
    run repeats it.
    """
    model, process_group = state.model, state.process_group
    learning_rate = learning_rate_at(state.step, config.optimizer, total_steps=config.total_steps)
    groups = state.optimizer.param_groups
    for group, factor in zip(groups, state.learning_rate_factors or [1.0] * len(groups), strict=True):
        group["lr"] = learning_rate * factor
    model.train()
    weights = {"captioning_loss": config.loss.captioning, "contrastive_loss": config.loss.contrastive}
    weights = {name: weight for name, weight in weights.items() if weight}
    losses = _backward(state, batch, config, weights)
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip_norm or math.inf)
    means = process_group.mean(torch.stack(list(losses.values())))  # one message for all losses
    values = dict(zip(losses, means, strict=True)) | {"gradient_norm": full_tensor(norm)}
    _update(state, torch.stack(list(values.values())).isfinite().all(), config)
    values["logit_scale"] = model.logit_scale.detach().exp()
    return StepMetrics(values, weights, learning_rate)


def _backward(
    state: TrainingState, batch: Batch, config: StepConfig, weights: Mapping[str, float]
) -> dict[str, Float[Tensor, ""]]:
    """Accumulate the gradients of the weighted losses over the micro-batches. Return the losses, not weighted."""
    model, process_group, parallel = state.model, state.process_group, state.parallel
    num_labels = process_group.mean(torch.full((), count_labels(batch), device=model.device))
    micro_batches = batch.to(model.device).split(config.accumulation)
    # Distinct for every seed, step and rank. Only patch dropout draws from it.
    seed = config.seed * 1_000_003 + state.step + process_group.rank * 2**48
    torch.manual_seed(seed)
    contrastive_losses: Sequence[ContrastiveLoss | None] = [None] * len(micro_batches)
    if len(micro_batches) > 1 and config.loss.contrastive:
        contrastive_losses = grad_cache_losses(model, micro_batches, config, parallel=parallel)
        torch.manual_seed(seed)  # each micro-batch drops the same patches again
    totals: dict[str, Tensor] = {}
    for number, (micro_batch, contrastive) in enumerate(zip(micro_batches, contrastive_losses, strict=True), start=1):
        with parallel.accumulating() if number < len(micro_batches) else nullcontext():
            values = compute_losses(
                model, micro_batch, config, num_labels=num_labels, parallel=parallel, contrastive=contrastive
            )
            torch.stack([weights[name] * value for name, value in values.items()]).sum().backward()
        totals = {name: totals.get(name, 0.0) + value.detach() for name, value in values.items()}
    return totals


@torch.no_grad()
def _update(state: TrainingState, finite: Bool[Tensor, ""], config: StepConfig) -> None:
    """Update the weights, `logit_scale` among them, and their moving average, unless a number is not finite.

    This is decided on the device, as a gradient scaler does.
    """
    model, optimizer = state.model, state.optimizer
    # Fused AdamW skips its update if `found_inf` is 1, without waiting for the device.
    optimizer.found_inf = finite.logical_not().float()  # pyrefly: ignore[missing-attribute]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.logit_scale.clamp_(*LOGIT_SCALE_RANGE)
    if state.average is not None:
        weight = finite * (1.0 - config.ema_decay)
        for name, parameter in model.named_parameters():
            state.average[name].lerp_(parameter, weight.to(parameter.dtype))
