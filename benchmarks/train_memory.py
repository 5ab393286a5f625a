"""Memory of training: the captioning loss, a batch in parts, and the largest batch that fits into a GPU."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from benchmarks.harness import Numbers, Row, Run, compare_memory, in_fresh_process, require_equal
from benchmarks.machine import peak_growth, peak_mib
from benchmarks.peers import MissingPeerError
from benchmarks.train_steps import (
    OpenClip,
    Ours,
    Side,
    describe_texts,
    make_batch,
    make_side,
    precision,
    tolerance,
)
from contracap.data.batch import Batch
from contracap.losses import captioning_loss
from contracap.model.sizes import find_size

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of states, vocabulary and labels

LOSS_BATCH, LOSS_TOLERANCE = 256, 1e-4
PARTS = 8
MICRO_BATCHES = {"cpu": 16, "cuda": 128}
FIRST = 16  # samples of the first batch that is tried
CLOSE = 0.06  # how far above the largest batch that fits the smallest that does not may lie, as a share
SECONDS = 15.0  # for each side; a GPU takes about 10


def captioning_loss_row(run: Run, *, size: str) -> Row:
    """Memory of our captioning loss and of torch's linear and cross-entropy, with their gradients, in float32, beyond
    inputs and the vocabulary's gradient."""
    config = find_size(size).text
    batch = make_batch(size, run, samples=LOSS_BATCH)
    labels = torch.cat([ids[1:count] for ids, count in zip(batch.ids, batch.lengths, strict=True)]).cpu()
    return compare_memory(
        f"captioning loss, memory beyond inputs and weight gradient, batch {LOSS_BATCH}, {size}",
        ours=partial(in_fresh_process, loss_memory, chunked_loss, labels, config.vocab_size, config.width, run),
        peer=partial(in_fresh_process, loss_memory, plain_loss, labels, config.vocab_size, config.width, run),
        tolerance=LOSS_TOLERANCE,
        note=f"the peer is torch's linear + cross_entropy on the same {len(labels):,} rows, no padding among them, in "
        f"fp32; {describe_texts(batch)}",
    )


def loss_memory(
    loss: Loss, labels: Int64[Tensor, "rows"], vocab_size: int, width: int, run: Run
) -> tuple[float, Numbers]:
    """MiB that loss and backward pass add to the peak memory of this process, without the vocabulary's gradient; and
    the numbers that must be equal."""
    torch.manual_seed(run.seed)
    states = torch.randn(len(labels), width, device=run.device, requires_grad=True)
    vocabulary = nn.Parameter(nn.init.normal_(torch.empty(vocab_size, width, device=run.device), std=width**-0.5))
    labels = labels.to(run.device)
    # What libraries set up in their first call belongs to no loss.
    few, small = (torch.ones(8, width, device=run.device, requires_grad=True) for _ in range(2))
    loss(few, small, torch.zeros(8, dtype=torch.int64, device=run.device)).backward()
    values = list[Tensor]()

    def work() -> None:
        values.append(loss(states, vocabulary, labels))
        values[0].backward()

    extra = peak_growth(work, run.device) - vocabulary.nbytes / 2**20
    assert states.grad is not None and vocabulary.grad is not None  # both were asked for
    return extra, {
        "captioning_loss": values[0].item(),
        "norm of the states' gradient": states.grad.norm().item(),
        "norm of the vocabulary's gradient": vocabulary.grad.norm().item(),
    }


def chunked_loss(
    states: Float[Tensor, "rows width"], vocabulary: Float[Tensor, "vocabulary width"], labels: Int64[Tensor, "rows"]
) -> Float[Tensor, ""]:
    """Our captioning loss."""
    return captioning_loss(states, vocabulary, labels=labels, num_labels=len(labels))


def plain_loss(
    states: Float[Tensor, "rows width"], vocabulary: Float[Tensor, "vocabulary width"], labels: Int64[Tensor, "rows"]
) -> Float[Tensor, ""]:
    """The captioning loss by its definition."""
    return cross_entropy(linear(states, vocabulary), labels)


def accumulation_memory_row(run: Run, *, size: str) -> Row:
    """Memory of a batch in parts beyond that of one part, next to open_clip's accumulation of the same batch."""
    micro = MICRO_BATCHES[run.device.type]
    row = compare_memory(
        f"{size} step of {PARTS} parts of {micro}, memory beyond that of one part",
        ours=partial(accumulation_memory, "ours", size, run),
        peer=partial(accumulation_memory, "open_clip's", size, run),
        tolerance=tolerance(run),
        note=f"two steps each; {describe_texts(make_batch(size, run, samples=PARTS * micro))}",
    )
    note = f"the gradient of open_clip's logit scale, which its accumulation counts {PARTS} times, is counted once"
    return replace(row, note=f"{size} in {precision(run)}: {row.note}; {note}")


def accumulation_memory(side: Side, size: str, run: Run) -> tuple[float, Numbers]:
    """MiB that a batch in parts takes beyond one part, and the numbers of its first step."""
    many, numbers = in_fresh_process(training_peak, side, size, PARTS, run)
    one, _ = in_fresh_process(training_peak, side, size, 1, run)
    return many - one, numbers


def training_peak(side: Side, size: str, parts: int, run: Run) -> tuple[float, Numbers]:
    """Peak memory of this process after two steps on a batch in parts (the second has the optimizer's moments), and
    the numbers of the first."""
    batch = make_batch(size, run, samples=parts * MICRO_BATCHES[run.device.type])
    step = make_side(side, size, run).step(batch, parts=parts)
    numbers, _ = step(), step()
    return peak_mib(run.device), {name: float(value) for name, value in numbers.items()}


def largest_batch_row(run: Run, *, size: str) -> Row:
    """The most samples of one eager step, each side with the GPU to itself.

    Raises:
        UnequalError: if the steps on the first batch differ.
    """
    size = run.size(size)
    batch = make_batch(size, run, samples=FIRST)
    row = Row(work=f"largest batch of a {size} step, captions", unit="samples", ours=0.0)
    fitting, numbers = in_fresh_process(largest_batch, "ours", size, run)
    try:
        peer_fitting, peer_numbers = in_fresh_process(largest_batch, "open_clip's", size, run)
    except MissingPeerError as error:
        return replace(row, ours=float(fitting), reason=str(error))
    note = (
        f"{size} in {precision(run)}: {require_equal(numbers, peer_numbers, tolerance=tolerance(run))}; eager, found "
        f"to within {CLOSE:.0%} or {SECONDS:.0f} s; texts repeat {FIRST}: {describe_texts(batch)}"
    )
    return replace(row, ours=float(fitting), peer=float(peer_fitting), ratio=fitting / peer_fitting, note=note)


def largest_batch(side: Side, size: str, run: Run) -> tuple[int, Numbers]:
    """The most samples of a step of one side, and the numbers of its step on the first batch."""
    batch = make_batch(size, run, samples=FIRST)
    trained = make_side(side, size, run)
    numbers = {name: float(value) for name, value in trained.step(batch)().items()}
    return largest(lambda samples: fits(trained, batch, samples), 1.0 if run.small else SECONDS), numbers


def largest(fits: Callable[[int], bool], seconds: float = SECONDS) -> int:
    """The largest number that fits, as far as time allows, by doubling from `FIRST`, then bisection."""
    end = time.monotonic() + seconds
    low, high = 0, None
    while high is None or high - low > max(1, CLOSE * low):
        if low and time.monotonic() >= end:
            break
        samples = (low + high) // 2 if high is not None else 2 * low or FIRST
        if samples == 0:
            raise torch.OutOfMemoryError("not even a batch of 1 fits into the memory of the device")
        if fits(samples):
            low = samples
        else:
            high = samples
    return low


def fits(side: Ours | OpenClip, batch: Batch, samples: int) -> bool:
    """Return whether a step on this many samples, which repeat those of the batch, fits into memory."""
    rows = torch.arange(samples) % len(batch)
    try:
        pixels, ids = (tensor[rows.to(tensor.device)] for tensor in (batch.pixels, batch.ids))
        side.step(Batch(pixels=pixels, ids=ids, lengths=batch.lengths[rows.numpy()], keys=[""] * samples))()
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True
