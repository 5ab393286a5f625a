"""The largest batch whose training step fits into a GPU, beside open_clip's."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from contracap.bench.steps import Ours, Peer, Setting, describe, make_batch, released
from contracap.bench.timing import NoPeerError, Row, require_equal
from contracap.data.batch import Batch
from contracap.pretrained import random_model

START = 16  # samples
CLOSE = 0.06  # of the largest that fits: how far above it the smallest that does not may lie
SECONDS = 45.0  # for each side; what is not found by then is said to be open


def largest_batch_row(setting: Setting, *, size: str) -> Row:
    """The most samples that one eager step of ours takes, and of open_clip's, each with the GPU to itself.

    Raises:
        UnequalError: if the steps on the first batch give other losses or another gradient norm.
        NoFitError: if not one sample fits.
    """
    setting.release()
    batch = make_batch(size, setting, samples=START, full=False)
    ours = Ours(size, setting)
    numbers = ours.ways(batch)["eager"](slice(0, START))
    fitting, failing = largest(lambda samples: fits(ours, batch, samples))
    del ours
    setting.release()
    row = Row(
        work=f"largest batch of a {size} step, Flickr8k captions",
        unit="samples",
        ours=float(fitting),
        note=f"eager, found to within {CLOSE:.0%} or {SECONDS:.0f} s; ours {_found(fitting, failing)}",
    )
    texts = f"texts repeat {START}: {describe(batch)}"
    try:
        peer = Peer(size, random_model(released(size), seed=setting.seed)[0], setting)
    except NoPeerError as error:
        return replace(row, note=f"{row.note}; {texts}", reason=str(error))
    agreement = require_equal(numbers, peer.ways(batch)["eager"](slice(0, START)), tolerance=setting.tolerance)
    peer_fitting, peer_failing = largest(lambda samples: fits(peer, batch, samples))
    del peer
    setting.release()
    return replace(
        row,
        peer=float(peer_fitting),
        ratio=fitting / peer_fitting,
        note=f"{size} in {setting.precision}: {agreement}; {row.note}, open_clip's "
        f"{_found(peer_fitting, peer_failing)}; {texts}",
    )


class NoFitError(ValueError):
    """Not even one sample fits into the memory of the device."""


def largest(fits: Callable[[int], bool], *, clock: Callable[[], float] = time.monotonic) -> tuple[int, int | None]:
    """The largest number found that fits, and the smallest found that does not (None where time ended before that), by
    doubling from `START` and bisection.

    Raises:
        NoFitError: if 1 does not fit.
    """
    end = clock() + SECONDS
    low, high = 0, None
    while high is None or high - low > max(1, CLOSE * low):
        if low and clock() >= end:
            break
        samples = (low + high) // 2 if high is not None else 2 * low or START
        if fits(samples):
            low = samples
        else:
            high = samples
    if not low:
        raise NoFitError("not even a batch of 1 fits into the memory of the device")
    return low, high


def fits(side: Ours | Peer, batch: Batch, samples: int) -> bool:
    """Whether memory holds a step on so many samples, which are those of the batch again and again."""
    rows = torch.arange(samples) % len(batch)
    try:
        pixels, ids = (tensor[rows.to(tensor.device)] for tensor in (batch.pixels, batch.ids))
        whole = Batch(pixels=pixels, ids=ids, lengths=batch.lengths[rows.numpy()], keys=[""] * samples)
        side.ways(whole)["eager"](slice(0, samples))
    except torch.OutOfMemoryError:
        return False
    finally:
        if batch.ids.is_cuda:
            torch.cuda.empty_cache()
    return True


def _found(fitting: int, failing: int | None) -> str:
    return (
        f"{fitting:,} fit, {failing:,} do not" if failing else f"{fitting:,} fit, more were not tried for want of time"
    )
