"""The contrastive and the captioning loss: pure functions of tensors, in nats, float32."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, pad

ROWS = 256  # the captioning loss scores positions in multiples of this many
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the two losses in their sum; a weight of 0 skips that branch of the model. Source: CoCa, section
    3.2, 1 : 2."""

    contrastive: float = 1.0
    captioning: float = 2.0

    def __post_init__(self) -> None:
        if min(self.contrastive, self.captioning) < 0 or self.contrastive == self.captioning == 0:
            raise ValueError("loss weights must not be negative, and one must be above 0")


def contrastive_loss(
    image_features: Float[Tensor, "batch embed"],
    text_features: Float[Tensor, "batch embed"],
    *,
    logit_scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Mean of picture-to-text and text-to-picture cross-entropy over the batch.

    Args:
        image_features: unit rows; row i belongs to row i of `text_features`.
        logit_scale: the factor itself, not its logarithm.

    Source: CLIP (arXiv 2103.00020), figure 3.
    """
    logits = logit_scale.float() * image_features @ text_features.T
    targets = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2


def captioning_loss(
    states: Float[Tensor, "batch position width"],
    vocabulary: Float[Tensor, "vocabulary width"],
    *,
    labels: Int64[Tensor, "batch position"],
    valid: Bool[Tensor, "batch position"],
    tokens: int | Tensor,
) -> Float[Tensor, ""]:
    """Cross-entropy of the next token, summed over the valid positions and divided by `tokens`.

    Args:
        states: the decoder's normalised states.
        vocabulary: the matrix that scores each token. It is multiplied with the valid positions alone,
            filled up to a multiple of `ROWS` with rows whose result is ignored.
        labels: the token that follows each position.
        tokens: valid positions of the whole batch, which may be larger than what is given here; above 0.

    Source: CoCa (arXiv 2205.01917), equation 4.
    """
    rows = valid.flatten().nonzero().squeeze(1)
    # With another shape for every batch, oneDNN would keep a kernel for each: memory grew by 8 MB a step.
    fill = -len(rows) % ROWS
    targets = pad(labels.flatten()[rows], (0, fill), value=IGNORED)
    rows = pad(rows, (0, fill))
    logits = linear(states.flatten(0, 1)[rows], vocabulary)
    return cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum") / tokens
