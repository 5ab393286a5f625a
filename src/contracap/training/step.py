"""One update of the weights."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from contracap.data.batch import Batch
from contracap.image import ImageConfig, normalise
from contracap.losses import Gather, LossConfig, alone, captioning_loss, contrastive_loss
from contracap.model.coca import CoCa, TrainingFeatures
from contracap.parallel import Ranks, Wrapped, whole
from contracap.tokenizer import lengths
from contracap.training.optimizer import OptimizerConfig, learning_rate

LOGIT_SCALE_RANGE = (0.0, math.log(100.0))


class NonFiniteError(ValueError):
    """A loss or gradient that is NaN or infinite; the weights were left as they were."""


@dataclass
class TrainingState:
    """What a step changes.

    Attributes:
        step: updates tried so far.
        average: moving average of the weights by name; None when the run keeps none.
        ranks: the processes that take this step together, each on its rows of the batch.
        wrapped: the model as they share it; None where one process trains alone.
    """

    model: CoCa
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor] | None
    step: int = 0
    ranks: Ranks = Ranks()
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
    features: Callable[..., TrainingFeatures] | None = None,
    gather: Gather = alone,
) -> dict[str, Tensor]:
    """The wanted losses by name, not weighted; what has weight 0 is not computed.

    Args:
        batch: on the model's device.
        tokens: what the captioning loss is divided by: the labels of the batch, or of the larger one that this is a
            part of.
        features: what to call in place of `model.features`.
        gather: brings the rows of all ranks, for the contrastive loss.
    """
    wanted = config.loss
    parts = {}
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=config.bf16):
        made = (features or model.features)(
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
            )
    if (
        made.image_features is not None and made.text_features is not None
    ):  # outside autocast: the product of the embeddings stays float32
        parts["contrastive_loss"] = contrastive_loss(
            made.image_features, made.text_features, logit_scale=model.logit_scale.exp(), gather=gather
        )
    return parts


def count_labels(ids: Int64[Tensor, "batch tokens"], end: int) -> Int64[Tensor, ""]:
    """Tokens that the captioning loss is over: all of each text but its first, its end token included."""
    return (lengths(ids, end) - 1).sum()


def train_step(state: TrainingState, batch: Batch, config: StepConfig) -> dict[str, float]:
    """Forward, backward, clip, update. Returns losses (nats), `gradient_norm` before clipping, `logit_scale`,
    `learning_rate`.

    Randomness (patch dropout) depends on the seed and the step alone, so that a resumed run repeats it.

    Raises: NonFiniteError: before anything was changed.
    """
    model, optimizer = state.model, state.optimizer
    ranks, shared = state.ranks, state.wrapped or Wrapped(model.features)
    torch.manual_seed(config.seed * 1_000_003 + state.step + ranks.rank * 2**48)  # each drops patches of its own
    rate = learning_rate(state.step, config.optimizer, total_steps=config.total_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    model.train()
    batch = batch.to(model.device)
    tokens = ranks.mean(count_labels(batch.ids, model.config.text.end))
    # Of each part the captioning loss is a share of the whole batch's; the contrastive loss a mean over the part's
    # rows.
    shares = {"contrastive_loss": 1 / config.accumulation, "captioning_loss": 1.0}
    weights = {"contrastive_loss": config.loss.contrastive, "captioning_loss": config.loss.captioning}
    totals: dict[str, Tensor] = {}
    for left, part in zip(reversed(range(config.accumulation)), batch.split(config.accumulation), strict=True):
        with shared.accumulating() if left else nullcontext():
            made = losses(model, part, config, tokens=tokens, features=shared.features, gather=shared.gather)
            values = {name: value * shares[name] for name, value in made.items()}
            torch.stack([weights[name] * value for name, value in values.items()]).sum().backward()
        totals = {name: totals.get(name, 0.0) + value.detach() for name, value in values.items()}
    norm = torch.nn.utils.clip_grad_norm_(
        [parameter for parameter in model.parameters() if parameter.grad is not None],
        config.optimizer.clip_norm or math.inf,
    )
    numbers = {name: ranks.mean(value).item() for name, value in totals.items()}
    numbers |= {
        "loss": sum(weights[name] * value for name, value in numbers.items()),
        "gradient_norm": whole(norm).item(),
    }
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
