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
from contracap.parallel import ProcessGroup, Wrapped, whole
from contracap.training.optimizer import OptimizerConfig, learning_rate_at

LOGIT_SCALE_RANGE = (0.0, math.log(100.0))
Contrast = Callable[..., Tensor]  # a contrastive loss: of image_features, text_features and logit_scale=


class NonFiniteError(ValueError):
    """A loss or gradient that is NaN or infinite. The step left the weights as they were."""


@dataclass
class TrainingState:
    """What a step changes.

    Attributes:
        step: updates tried so far.
        average: moving average of the weights by name; None when the run keeps none.
        process_group: the ranks that take this step together, each on its rows of the batch.
        wrapped: the model as they share it; None where one process trains alone.
    """

    model: CoCa
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor] | None
    step: int = 0
    process_group: ProcessGroup = ProcessGroup()
    wrapped: Wrapped | None = None


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What a step needs of the recipe; attributes as in `Recipe`.

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


def losses(
    model: CoCa,
    batch: Batch,
    config: StepConfig,
    *,
    tokens: int | Tensor,
    shared: Wrapped | None = None,
    contrast: Contrast | None = None,
) -> dict[str, Tensor]:
    """The losses of weight above 0 by name, not weighted.

    Args:
        batch: on the model's device.
        tokens: what the captioning loss is divided by: the labels of the batch, or of the larger one that this is a
            part of.
        shared: the model as the ranks share it; None where one process has it alone.
        contrast: in place of `contrastive_loss`, which contrasts the batch and those of the other ranks.
    """
    shared = shared or Wrapped(model)
    contrast = contrast or partial(contrastive_loss, gather=shared.gather)

    def passed(forward: Callable[..., Any]) -> Any:
        """The batch through `forward`. The normalised pixels, as large as much of the rest, are let go after it."""
        return forward(normalise(batch.pixels, config.image), batch.ids, batch.lengths)

    def captioning(captions: TokenStates) -> Tensor:
        vocabulary = model.require_decoder().vocabulary.weight
        return captioning_loss(captions.states, vocabulary, labels=captions.labels, tokens=tokens)

    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=config.bf16):
        if not config.loss.captioning:
            images, texts = passed(shared.model.contrastive_features)
            return {"contrastive_loss": contrast(images, texts, logit_scale=model.logit_scale.exp())}
        if not config.loss.contrastive:
            return {"captioning_loss": captioning(passed(shared.model.caption_states))}
        output = passed(shared.model)
        return {
            "captioning_loss": captioning(output.caption_states),
            "contrastive_loss": contrast(output.image_features, output.text_features, logit_scale=output.logit_scale),
        }


def contrast_whole(model: CoCa, parts: Sequence[Batch], config: StepConfig, *, shared: Wrapped) -> list[Contrast]:
    """For each part of a batch, what its embeddings add to the contrastive loss of the whole batch.

    All parts are embedded once without gradients. Their embeddings are all that is kept; from them come the loss and
    its gradients towards each of them. Then a part can be embedded again, with gradients: what its function gives has
    the gradients of the whole loss towards this part, and for its value an equal share of it.
    Source: GradCache (arXiv 2101.06983).
    """
    device = model.device.type
    with torch.no_grad(), shared.forward_only(), torch.autocast(device, dtype=torch.bfloat16, enabled=config.bf16):
        made = [
            shared.model.contrastive_features(normalise(part.pixels, config.image), part.ids, part.lengths)
            for part in parts
        ]
    images, texts = (torch.cat(features).requires_grad_() for features in zip(*made, strict=True))
    scale = model.logit_scale.detach().exp().requires_grad_()
    loss = contrastive_loss(images, texts, logit_scale=scale, gather=shared.gather)
    to_images, to_texts, to_scale = torch.autograd.grad(loss, (images, texts, scale))
    count = len(parts)
    return [
        partial(_share, value=loss.detach() / count, to_images=images, to_texts=texts, to_scale=to_scale / count)
        for images, texts in zip(to_images.chunk(count), to_texts.chunk(count), strict=True)
    ]


def _share(
    image_features: Float[Tensor, "batch embed"],
    text_features: Float[Tensor, "batch embed"],
    *,
    logit_scale: Float[Tensor, ""],
    value: Float[Tensor, ""],
    to_images: Float[Tensor, "batch embed"],
    to_texts: Float[Tensor, "batch embed"],
    to_scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """A number of this value, with these gradients."""
    slope = (image_features * to_images).sum() + (text_features * to_texts).sum() + logit_scale * to_scale
    return value + (slope - slope.detach())


def count_labels(batch: Batch) -> int:
    """Tokens that the captioning loss is over: all of each text but its first, its end token included."""
    return int(batch.lengths.sum()) - len(batch)


@dataclass(frozen=True)
class StepMetrics:
    """The numbers of a step, still on the device.

    Attributes:
        names: of `values`.
        weights: of each loss in `loss`.
    """

    names: tuple[str, ...]
    values: Float[Tensor, "names"]
    weights: Mapping[str, float]
    learning_rate: float

    def read(self) -> dict[str, float]:
        """Losses (nats), their weighted sum `loss`, `gradient_norm` before clipping, `learning_rate`, `logit_scale`.
        Waits for the device.

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
    model, optimizer = state.model, state.optimizer
    process_group, shared = state.process_group, state.wrapped or Wrapped(model)
    rate = learning_rate_at(state.step, config.optimizer, total_steps=config.total_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    model.train()
    tokens = process_group.mean(torch.full((), count_labels(batch), device=model.device))
    parts = batch.to(model.device).split(config.accumulation)
    seed = config.seed * 1_000_003 + state.step + process_group.rank * 2**48  # each rank drops patches of its own
    contrasts: Sequence[Contrast | None] = [None] * len(parts)
    torch.manual_seed(seed)
    if len(parts) > 1 and config.loss.contrastive:
        contrasts = contrast_whole(model, parts, config, shared=shared)
        torch.manual_seed(seed)  # each part drops the same patches again
    weights = {"captioning_loss": config.loss.captioning, "contrastive_loss": config.loss.contrastive}
    weights = {name: weight for name, weight in weights.items() if weight}
    totals: dict[str, Tensor] = {}
    for left, part, contrast in zip(reversed(range(len(parts))), parts, contrasts, strict=True):
        with shared.accumulating() if left else nullcontext():
            values = losses(model, part, config, tokens=tokens, shared=shared, contrast=contrast)
            torch.stack([weights[name] * value for name, value in values.items()]).sum().backward()
        totals = {name: totals.get(name, 0.0) + value.detach() for name, value in values.items()}
    norm = torch.nn.utils.clip_grad_norm_(
        [parameter for parameter in model.parameters() if parameter.grad is not None],
        config.optimizer.clip_norm or math.inf,
    )
    means = process_group.mean(torch.stack(list(totals.values())))
    values = torch.cat([means, whole(norm).reshape(1)])
    _update(state, values.isfinite().all(), config)
    names = (*totals, "gradient_norm", "logit_scale")
    return StepMetrics(names, torch.cat([values, model.logit_scale.detach().exp().reshape(1)]), weights, rate)


@torch.no_grad()
def _update(state: TrainingState, finite: Bool[Tensor, ""], config: StepConfig) -> None:
    """Step the optimizer and what follows the weights, unless the step's numbers are not finite: decided on the device,
    as a gradient scaler does it."""
    model, optimizer = state.model, state.optimizer
    optimizer.found_inf = finite.logical_not().float()  # pyrefly: ignore[missing-attribute]  # of fused optimizers
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.logit_scale.clamp_(*LOGIT_SCALE_RANGE)
    if state.average is not None:
        weight = finite * (1.0 - config.ema_decay)
        for name, parameter in model.named_parameters():
            state.average[name].lerp_(parameter, weight.to(parameter.dtype))
