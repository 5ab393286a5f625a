"""The contrastive and the captioning loss: pure functions of tensors, in nats, float32."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy, linear


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
    states: Float[Tensor, "rows width"],
    vocabulary: Float[Tensor, "vocabulary width"],
    *,
    labels: Int64[Tensor, "rows"],
    tokens: int | Tensor,
) -> Float[Tensor, ""]:
    """Cross-entropy of the next token, summed over the rows and divided by `tokens`.

    Args:
        states: the decoder's normalised states.
        vocabulary: the matrix that scores each token.
        labels: the token that follows each row; a row of label -100 counts for nothing.
        tokens: labels of the whole batch, which may be larger than what is given here; above 0.

    Source: CoCa (arXiv 2205.01917), equation 4.
    """
    return cross_entropy(linear(states, vocabulary).float(), labels, reduction="sum") / tokens
