"""One update of the weights."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from contracap.data.batch import Batch
from contracap.image import ImageConfig, normalise
from contracap.losses import LossConfig, captioning_loss, contrastive_loss
from contracap.model.coca import CoCa
from contracap.parallel import ProcessGroup, Wrapped, whole
from contracap.tokenizer import lengths
from contracap.training.optimizer import OptimizerConfig, learning_rate

LOGIT_SCALE_RANGE = (0.0, math.log(100.0))
Contrast = Callable[..., Tensor]  # a contrastive loss: of image_features, text_features and logit_scale=


class NonFiniteError(ValueError):
    """A loss or gradient that is NaN or infinite; the weights were left as they were."""


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
    """The wanted losses by name, not weighted; what has weight 0 is not computed.

    Args:
        batch: on the model's device.
        tokens: what the captioning loss is divided by: the labels of the batch, or of the larger one that this is a
            part of.
        shared: the model as the ranks share it; None where one process has it alone.
        contrast: in place of `contrastive_loss`, which contrasts the batch and those of the other ranks.
    """
    wanted, shared = config.loss, shared or Wrapped(model.features)
    contrast = contrast or partial(contrastive_loss, gather=shared.gather)
    parts = {}
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=config.bf16):
        made = shared.features(
            normalise(batch.pixels, config.image),
            batch.ids,
            contrastive=wanted.contrastive > 0,
            captioning=wanted.captioning > 0,
        )
        if made.caption_states is not None and made.caption_labels is not None:
            parts["captioning_loss"] = captioning_loss(
                made.caption_states,
                model.require_decoder().vocabulary.weight,
                labels=made.caption_labels,
                tokens=tokens,
                chunk=wanted.chunk or None,
            )
    if made.image_features is not None and made.text_features is not None:
        # Outside autocast: the product of the embeddings stays float32.
        parts["contrastive_loss"] = contrast(
            made.image_features, made.text_features, logit_scale=model.logit_scale.exp()
        )
    return parts


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
            shared.features(normalise(part.pixels, config.image), part.ids, contrastive=True, captioning=False)
            for part in parts
        ]
    inputs = [
        torch.cat([part.image_features for part in made if part.image_features is not None]).requires_grad_(),
        torch.cat([part.text_features for part in made if part.text_features is not None]).requires_grad_(),
        model.logit_scale.detach().exp().requires_grad_(),
    ]
    loss = contrastive_loss(*inputs[:2], logit_scale=inputs[2], gather=shared.gather)
    to_images, to_texts, to_scale = torch.autograd.grad(loss, inputs)
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


def count_labels(ids: Int64[Tensor, "batch tokens"], end: int) -> Int64[Tensor, ""]:
    """Tokens that the captioning loss is over: all of each text but its first, its end token included."""
    return (lengths(ids, end) - 1).sum()


def train_step(state: TrainingState, batch: Batch, config: StepConfig) -> dict[str, float]:
    """Forward, backward, clip, update. Returns losses (nats), `gradient_norm` before clipping, `logit_scale`,
    `learning_rate`.

    A batch in parts has the losses and gradients of the batch in one.
    Randomness (patch dropout) depends on seed, step and rank alone, so that a resumed run repeats it.

    Raises: NonFiniteError: before anything was changed.
    """
    model, optimizer = state.model, state.optimizer
    process_group, shared = state.process_group, state.wrapped or Wrapped(model.features)
    rate = learning_rate(state.step, config.optimizer, total_steps=config.total_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    model.train()
    batch = batch.to(model.device)
    tokens = process_group.mean(count_labels(batch.ids, model.config.text.end))
    parts = batch.split(config.accumulation)
    seed = config.seed * 1_000_003 + state.step + process_group.rank * 2**48  # each rank drops patches of its own
    contrasts: Sequence[Contrast | None] = [None] * len(parts)
    torch.manual_seed(seed)
    if len(parts) > 1 and config.loss.contrastive:
        contrasts = contrast_whole(model, parts, config, shared=shared)
        torch.manual_seed(seed)  # each part drops the same patches again
    weights = {"contrastive_loss": config.loss.contrastive, "captioning_loss": config.loss.captioning}
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
    *found, gradient_norm = torch.cat([means, whole(norm).reshape(1)]).tolist()  # the device is waited for once
    numbers = dict(zip(totals, found, strict=True))
    numbers |= {"loss": sum(weights[name] * numbers[name] for name in totals), "gradient_norm": gradient_norm}
    if not all(math.isfinite(value) for value in numbers.values()):
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(", ".join(f"{name} {value:.6g}" for name, value in numbers.items()))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        model.logit_scale.clamp_(*LOGIT_SCALE_RANGE)
        if state.average is not None:
            for name, parameter in model.named_parameters():
                state.average[name].lerp_(parameter, 1.0 - config.ema_decay)
    return numbers | {"learning_rate": rate, "logit_scale": model.logit_scale.exp().item()}
