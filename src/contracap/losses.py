"""The contrastive and the captioning loss: pure functions of tensors, in nats, float32."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

CONTRASTIVE_CHUNK = 4096  # columns that are scored at a time
CAPTION_CHUNK = 4096  # rows that are scored at a time, except on a CPU


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the two losses in their sum; a weight of 0 skips that branch of the model.

    Source: CoCa (arXiv 2205.01917), equation 4; section 4.1 for 1 : 2.
    """

    contrastive: float = 1.0
    """Weight of the contrastive loss."""
    captioning: float = 2.0
    """Weight of the captioning loss."""

    def __post_init__(self) -> None:
        if min(self.contrastive, self.captioning) < 0 or self.contrastive == self.captioning == 0:
            raise ValueError("loss weights must not be negative, and one must be above 0")


Gather = Callable[[Tensor], Tensor]
"""Return the rows of all ranks, given those of this rank. Rows are the first dimension, equally many on each rank."""


def contrastive_loss(
    image_features: Float[Tensor, "batch embed"],
    text_features: Float[Tensor, "batch embed"],
    *,
    logit_scale: Float[Tensor, ""],
    gather: Gather | None = None,
    chunk: int = CONTRASTIVE_CHUNK,
) -> Float[Tensor, ""]:
    """Mean of image-to-text and text-to-image cross-entropy of these rows among the rows of all ranks.

    The value is this rank's mean. Its gradient is that of the sum over all ranks. Averaging it over the ranks, as DDP
    and FSDP do, therefore gives the gradient of one process on the global batch.

    Args:
        image_features: unit rows, float32 or finer; row i belongs to row i of `text_features`.
        logit_scale: the factor itself, not its logarithm.
        gather: returns the rows of all ranks; None if there is only one. It is called in the forward pass only.
        chunk: columns that are scored at a time; memory is batch x chunk.

    Source: CLIP (arXiv 2103.00020), figure 3.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        scale = logit_scale.to(torch.promote_types(logit_scale.dtype, torch.float32))
        if gather is not None or len(image_features) > chunk:
            needs_grad = torch.is_grad_enabled() and (image_features.requires_grad or text_features.requires_grad)
            return _ContrastiveLoss.apply(scale * image_features, text_features, gather, chunk, needs_grad)
        logits = scale * image_features @ text_features.T
        targets = torch.arange(len(logits), device=logits.device)
        return (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2


class _ContrastiveLoss(torch.autograd.Function):
    """Contrastive loss of scaled images and texts, of whose scores no more than `chunk` columns are ever held.

    Two passes over the columns: the first computes the log-normaliser of each row's scores, the second the gradients.
    A row is also a column of the other side's rows, on all ranks. Their log-normalisers are gathered as well, two
    numbers a pair, so that no gradient needs to travel. The backward pass only scales.
    Source: Inf-CL (arXiv 2410.17243), for the online sum in tiles; DisCo-CLIP (arXiv 2304.08480), for gradients of
    other ranks' terms formed where the features are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        images: Float[Tensor, "batch embed"],
        texts: Float[Tensor, "batch embed"],
        gather: Gather | None,
        chunk: int,
        needs_grad: bool,
    ) -> Float[Tensor, ""]:
        def gathered(rows: Tensor) -> Tensor:
            return gather(rows) if gather else rows

        rows = torch.stack([images, texts])
        # Columns are the other side of each row.
        column_chunks = [each.transpose(0, 1) for each in gathered(torch.stack([texts, images], dim=1)).split(chunk)]

        log_normalisers = rows.new_full(rows.shape[:2], -torch.inf)
        for columns in column_chunks:
            log_normalisers = torch.logaddexp(log_normalisers, (rows @ columns.mT).logsumexp(dim=2))
        if needs_grad:
            gradient = torch.zeros_like(rows)
            column_log_normalisers = gathered(log_normalisers.flip(0).T.contiguous()).split(chunk)
            for columns, other_log_normalisers in zip(column_chunks, column_log_normalisers, strict=True):
                scores = rows @ columns.mT
                probabilities = (scores - log_normalisers[:, :, None]).exp_()
                probabilities += scores.sub_(other_log_normalisers.T[:, None]).exp_()
                gradient.baddbmm_(probabilities, columns)
            ctx.save_for_backward((gradient / 2 - rows.flip(0)) / len(images))
        return (log_normalisers.mean(0) - (images * texts).sum(1)).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]  # the decorator drops its names
        grad_images, grad_texts = ctx.saved_tensors[0] * grad_outputs[0]
        return grad_images, grad_texts, None, None, None


def captioning_loss(
    states: Float[Tensor, "rows width"],
    vocabulary: Float[Tensor, "vocab width"],
    *,
    labels: Int64[Tensor, "rows"],
    num_labels: int | Tensor,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of the next token, summed over the rows and divided by `num_labels`.

    Args:
        states: the decoder's normalised states.
        vocabulary: the matrix that scores each token.
        labels: the token that follows each row; a row whose label is negative counts for nothing, and is not read.
        num_labels: labels of the whole batch, which may be larger than what is given here; above 0.
        chunk: rows that are scored at a time; by default 512 on a CPU, 4096 elsewhere.

    Source: CoCa (arXiv 2205.01917), equation 3.
    """
    if chunk is None:
        chunk = 512 if states.device.type == "cpu" else CAPTION_CHUNK
    is_enabled = torch.is_grad_enabled()
    needs_grad = (is_enabled and states.requires_grad, is_enabled and vocabulary.requires_grad)
    return _SummedCrossEntropy.apply(states, vocabulary, labels, chunk, needs_grad) / num_labels


class _SummedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `states @ vocabulary.T`, of which no more than a chunk of rows is ever held.

    While a chunk's scores are there, the gradients are formed from them; the backward pass only scales these. Torch's
    own `linear_cross_entropy` (2.13 and later) does so too, but sums a bf16 loss in bf16 and ignores autocast.
    Source: Liger (arXiv 2410.10989), for the idea.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Float[Tensor, "rows width"],
        vocabulary: Float[Tensor, "vocab width"],
        labels: Int64[Tensor, "rows"],
        chunk: int,
        needs_grad: tuple[bool, bool],
    ) -> Float[Tensor, ""]:
        device = states.device.type
        compute_dtype = torch.promote_types(states.dtype, vocabulary.dtype)
        if torch.is_autocast_enabled(device):  # then the products are of that type; all else is at least float32
            compute_dtype = torch.get_autocast_dtype(device)
        accumulate_dtype = torch.promote_types(compute_dtype, torch.float32)
        with torch.autocast(device, enabled=False):
            ignored = labels[:, None] < 0
            labels = labels.clamp(min=0)[:, None]
            hidden, matrix = states.to(compute_dtype).masked_fill(ignored, 0), vocabulary.to(compute_dtype)
            grad_states = torch.empty_like(hidden) if needs_grad[0] else None
            grad_vocabulary = torch.zeros_like(matrix, dtype=accumulate_dtype) if needs_grad[1] else None
            # All chunks share these buffers, so that their memory is touched for the first time once.
            all_scores = hidden.new_empty(min(chunk, len(hidden)), len(matrix))
            # Probabilities, in the place of the scores where the type allows it.
            in_place = compute_dtype == accumulate_dtype
            all_probabilities = all_scores if in_place else torch.empty_like(all_scores, dtype=accumulate_dtype)
            total = torch.zeros((), dtype=accumulate_dtype, device=states.device)
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                chunk_states, targets = hidden[rows], labels[rows]
                scores = all_scores[: len(chunk_states)]
                probabilities = scores if in_place else all_probabilities[: len(chunk_states)]
                torch.mm(chunk_states, matrix.T, out=scores)
                total += _softmax_cross_entropy(scores, probabilities, targets).masked_fill(ignored[rows], 0).sum()
                if not any(needs_grad):
                    continue
                probabilities.scatter_add_(1, targets, probabilities.new_full(targets.shape, -1.0))
                grad_scores = scores.copy_(probabilities)
                if grad_states is not None:
                    torch.mm(grad_scores, matrix, out=grad_states[rows])
                if grad_vocabulary is not None and in_place:
                    grad_vocabulary.addmm_(grad_scores.T, chunk_states)
                elif grad_vocabulary is not None:
                    grad_vocabulary += grad_scores.T @ chunk_states
            if grad_states is not None:
                grad_states.masked_fill_(ignored, 0)
        ctx.save_for_backward(grad_states, grad_vocabulary)
        ctx.types = states.dtype, vocabulary.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]  # the decorator drops its names
        scaled = [
            None if gradient is None else (gradient * grad_outputs[0]).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.types, strict=True)
        ]
        return *scaled, None, None, None


def _softmax_cross_entropy(
    scores: Float[Tensor, "rows vocab"], probabilities: Float[Tensor, "rows vocab"], targets: Int64[Tensor, "rows 1"]
) -> Float[Tensor, "rows 1"]:
    """Return the cross-entropy of each row, and write the softmax to `probabilities`, which may be `scores` itself."""
    probabilities.copy_(scores)
    target_scores, highest = probabilities.gather(1, targets), probabilities.amax(1, keepdim=True)
    torch.softmax(probabilities, dim=1, out=probabilities)
    # The log-normaliser follows from the highest score and its probability, without another exponential.
    log_normalisers = highest - probabilities.amax(1, keepdim=True).log()
    return log_normalisers - target_scores
