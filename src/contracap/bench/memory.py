"""How much memory the captioning loss takes, beside the same loss by its definition."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from contracap.bench.timing import Row, peak_growth, require_equal
from contracap.losses import captioning_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of states, vocabulary and labels

TOLERANCE = 1e-4


def captioning_loss_row(
    work: str, *, labels: Int64[Tensor, "rows"], vocab_size: int, width: int, device: torch.device, seed: int
) -> Row:
    """What the loss of these labels and its backward pass take in float32, beyond inputs and weight gradient.

    Raises:
        UnequalError: if the losses, or the norms of their gradients, differ.
    """
    extras, numbers = [], []
    for loss in (chunked, plain):
        # A process each: the peak of resident memory never falls again.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh_process:
            measured = fresh_process.submit(loss_memory, loss, labels, vocab_size, width, device, seed).result()
        extras.append(measured[0])
        numbers.append(measured[1])
    note = require_equal(*numbers, tolerance=TOLERANCE)
    return Row(
        work=work,
        unit="MiB",
        ours=extras[0],
        peer=extras[1],
        ratio=extras[1] / extras[0],
        note=f"the peer is torch's linear + cross_entropy on the same {len(labels):,} rows, no fill among them, in "
        f"fp32; {note}; peak memory of a fresh process each, measured once",
    )


def loss_memory(
    loss: Loss, labels: Int64[Tensor, "rows"], vocab_size: int, width: int, device: torch.device, seed: int
) -> tuple[float, dict[str, float]]:
    """MiB by which loss and backward pass raise the peak memory of this process, less the vocabulary's gradient; and
    the numbers that must be equal whichever loss it is."""
    torch.manual_seed(seed)
    states = torch.randn(len(labels), width, device=device, requires_grad=True)
    vocabulary = nn.Parameter(nn.init.normal_(torch.empty(vocab_size, width, device=device), std=width**-0.5))
    labels = labels.to(device)
    # What libraries set up in their first call belongs to no loss.
    few, small = (torch.ones(8, width, device=device, requires_grad=True) for _ in range(2))
    loss(few, small, torch.zeros(8, dtype=torch.int64, device=device)).backward()
    values = []

    def work() -> None:
        values.append(loss(states, vocabulary, labels))
        values[0].backward()

    extra = peak_growth(work, device) - vocabulary.nbytes / 2**20
    assert states.grad is not None and vocabulary.grad is not None  # both were asked for
    numbers = {
        "captioning_loss": values[0].item(),
        "norm of the states' gradient": states.grad.norm().item(),
        "norm of the vocabulary's gradient": vocabulary.grad.norm().item(),
    }
    return extra, numbers


def chunked(
    states: Float[Tensor, "rows width"], vocabulary: Float[Tensor, "vocabulary width"], labels: Int64[Tensor, "rows"]
) -> Float[Tensor, ""]:
    """Our captioning loss."""
    return captioning_loss(states, vocabulary, labels=labels, tokens=len(labels))


def plain(
    states: Float[Tensor, "rows width"], vocabulary: Float[Tensor, "vocabulary width"], labels: Int64[Tensor, "rows"]
) -> Float[Tensor, ""]:
    """The captioning loss by its definition."""
    return cross_entropy(linear(states, vocabulary), labels)
