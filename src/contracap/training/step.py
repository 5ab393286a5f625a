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
Contrast = Callable[..., Tensor]  # a contrastive loss: of image_features, text_features and logit_scale=


class NonFiniteError(ValueError):
    """A loss or gradient that is NaN or infinite. The step left the weights as they were."""


@dataclass
class TrainingState:
    """The model, its optimizer, and everything else that a step changes.

    Attributes:
        step: updates tried so far.
        average: moving average of the weights by name; None if the run keeps none.
        process_group: the ranks that take this step together, each on its rows of the batch.
        parallel: the model spread over the ranks; None if there is only one.
        learning_rate_factors: of the optimizer's groups; all 1 if there are none.
    """

    model: CoCa
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor] | None
    step: int = 0
    process_group: ProcessGroup = ProcessGroup()
    parallel: ParallelModel | None = None
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
    tokens: int | Tensor,
    parallel: ParallelModel | None = None,
    contrast: Contrast | None = None,
) -> dict[str, Tensor]:
    """Return the losses of weight above 0 by name, not weighted.

    Args:
        batch: on the model's device.
        tokens: divisor of the captioning loss: the number of labels of the whole batch, of which this may be a part.
        parallel: the model spread over the ranks; None if there is only one.
        contrast: used instead of `contrastive_loss`, which contrasts this batch with itself and those of other ranks.
    """
    parallel = parallel or ParallelModel(model)
    contrast = contrast or partial(contrastive_loss, gather=parallel.gather)

    def forward_batch(forward: Callable[..., Any]) -> Any:
        # The normalised pixels take as much memory as much of the rest: nothing else refers to them.
        return forward(normalise(batch.pixels, config.image), batch.ids, batch.lengths)

    def captioning(captions: TokenStates) -> Tensor:
        vocabulary = model.require_decoder().vocabulary.weight
        return captioning_loss(captions.states, vocabulary, labels=captions.labels, tokens=tokens)

    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=config.bf16):
        if not config.loss.captioning:
            images, texts = forward_batch(parallel.model.contrastive_features)
            return {"contrastive_loss": contrast(images, texts, logit_scale=model.logit_scale.exp())}
        if not config.loss.contrastive:
            return {"captioning_loss": captioning(forward_batch(parallel.model.caption_states))}
        output = forward_batch(parallel.model)
        return {
            "captioning_loss": captioning(output.caption_states),
            "contrastive_loss": contrast(output.image_features, output.text_features, logit_scale=output.logit_scale),
        }


def contrast_in_parts(
    model: CoCa, parts: Sequence[Batch], config: StepConfig, *, parallel: ParallelModel
) -> list[Contrast]:
    """Return, for each part of a batch, a function that stands for the contrastive loss of the whole batch.

    First, all parts are embedded without gradients. From these embeddings come the loss and its gradient with respect
    to each of them. Then each part is embedded again, with gradients, and given to its function. The result has the
    gradient of the whole loss with respect to this part; its value is an equal share of the loss.
    Source: GradCache (arXiv 2101.06983).
    """
    device = model.device.type
    with torch.no_grad(), parallel.forward_only(), torch.autocast(device, dtype=torch.bfloat16, enabled=config.bf16):
        made = [
            parallel.model.contrastive_features(normalise(part.pixels, config.image), part.ids, part.lengths)
            for part in parts
        ]
    images, texts = (torch.cat(features).requires_grad_() for features in zip(*made, strict=True))
    scale = model.logit_scale.detach().exp().requires_grad_()
    loss = contrastive_loss(images, texts, logit_scale=scale, gather=parallel.gather)
    to_images, to_texts, to_scale = torch.autograd.grad(loss, (images, texts, scale))
    count = len(parts)
    return [
        partial(_stand_in, value=loss.detach() / count, to_images=images, to_texts=texts, to_scale=to_scale / count)
        for images, texts in zip(to_images.chunk(count), to_texts.chunk(count), strict=True)
    ]


def _stand_in(
    image_features: Float[Tensor, "batch embed"],
    text_features: Float[Tensor, "batch embed"],
    *,
    logit_scale: Float[Tensor, ""],
    value: Float[Tensor, ""],
    to_images: Float[Tensor, "batch embed"],
    to_texts: Float[Tensor, "batch embed"],
    to_scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Return a number with this value and these gradients."""
    slope = (image_features * to_images).sum() + (text_features * to_texts).sum() + logit_scale * to_scale
    return value + (slope - slope.detach())


def count_labels(batch: Batch) -> int:
    """Return the number of tokens that the captioning loss predicts: all of each text except the start token."""
    return int(batch.lengths.sum()) - len(batch)


@dataclass(frozen=True)
class StepMetrics:
    """The numbers of a step, still on the device.

    Attributes:
        names: the names of `values`.
        weights: the weight of each loss in the sum `loss`.
    """

    names: tuple[str, ...]
    values: Float[Tensor, "names"]
    weights: Mapping[str, float]
    learning_rate: float

    def read(self) -> dict[str, float]:
        """Return the losses (nats), their weighted sum `loss`, `gradient_norm` before clipping, `learning_rate` and
        `logit_scale`. Waits for the device.

        Raises: NonFiniteError: if a loss or the norm is NaN or infinite; the step then changed nothing.
        """
        numbers = dict(zip(self.names, self.values.tolist(), strict=True))
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

    A batch in parts has the losses and gradients of the batch in one. A step whose losses or gradients are not finite
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
    totals = _backward(state, batch, config, weights)
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip_norm or math.inf)
    means = process_group.mean(torch.stack(list(totals.values())))
    values = torch.cat([means, full_tensor(norm).reshape(1)])
    _update(state, values.isfinite().all(), config)
    names = (*totals, "gradient_norm", "logit_scale")
    values = torch.cat([values, model.logit_scale.detach().exp().reshape(1)])
    return StepMetrics(names, values, weights, learning_rate)


def _backward(
    state: TrainingState, batch: Batch, config: StepConfig, weights: Mapping[str, float]
) -> dict[str, Float[Tensor, ""]]:
    """Accumulate the gradients of the weighted losses over the parts of the batch. Return the losses, not weighted."""
    model, process_group, parallel = state.model, state.process_group, state.parallel or ParallelModel(state.model)
    tokens = process_group.mean(torch.full((), count_labels(batch), device=model.device))
    parts = batch.to(model.device).split(config.accumulation)
    seed = config.seed * 1_000_003 + state.step + process_group.rank * 2**48  # each rank drops patches of its own
    torch.manual_seed(seed)
    contrasts: Sequence[Contrast | None] = [None] * len(parts)
    if len(parts) > 1 and config.loss.contrastive:
        contrasts = contrast_in_parts(model, parts, config, parallel=parallel)
        torch.manual_seed(seed)  # each part drops the same patches again
    totals: dict[str, Tensor] = {}
    for number, (part, contrast) in enumerate(zip(parts, contrasts, strict=True), start=1):
        with parallel.accumulating() if number < len(parts) else nullcontext():
            values = compute_losses(model, part, config, tokens=tokens, parallel=parallel, contrast=contrast)
            torch.stack([weights[name] * value for name, value in values.items()]).sum().backward()
        totals = {name: totals.get(name, 0.0) + value.detach() for name, value in values.items()}
    return totals


@torch.no_grad()
def _update(state: TrainingState, finite: Bool[Tensor, ""], config: StepConfig) -> None:
    """Update the weights, their scale and their moving average, unless the step's numbers are not finite.

    This is decided on the device, as a gradient scaler does.
    """
    model, optimizer = state.model, state.optimizer
    optimizer.found_inf = finite.logical_not().float()  # pyrefly: ignore[missing-attribute]  # of fused optimizers
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.logit_scale.clamp_(*LOGIT_SCALE_RANGE)
    if state.average is not None:
        weight = finite * (1.0 - config.ema_decay)
        for name, parameter in model.named_parameters():
            state.average[name].lerp_(parameter, weight.to(parameter.dtype))
