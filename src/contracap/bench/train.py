"""How fast a model learns, and in how much memory: training steps beside open_clip's, and the captioning loss."""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from contracap.bench.accumulation import accumulation_memory_row, accumulation_time_row
from contracap.bench.largest import largest_batch_row
from contracap.bench.memory import captioning_loss_row
from contracap.bench.steps import Pair, Setting, Step, Ways, describe, describe_limit, make_batch
from contracap.bench.timing import (
    LEAST_ROUNDS,
    Benchmark,
    NoPeerError,
    Row,
    device_clock,
    in_turns,
    matmul_rate,
    require_equal,
    this_machine,
    timed_row,
)
from contracap.data.batch import Batch
from contracap.data.loader import evaluation_samples
from contracap.model.sizes import find_size
from contracap.training.start import precision_on

Device = Literal["cpu", "cuda"]

B_32, L_14, CLIP = "coca_ViT-B-32", "coca_ViT-L-14", "ViT-B-32"
BATCHES = {"cpu": {B_32: 16, L_14: 4}, "cuda": {B_32: 1024, L_14: 256}}
LOSS_BATCH = 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Passes:
    """A whole batch, in as few steps as memory holds.

    Attributes:
        batch: rows of it.
        parts: steps it takes; doubled when the device's memory is full, which the unmeasured round finds out.
        numbers: of the last step.
    """

    step: Step
    batch: int
    parts: int = 1
    numbers: Mapping[str, float | Tensor] = field(default_factory=dict)

    def __call__(self) -> None:
        while True:
            rows = self.batch // self.parts
            try:
                for first in range(0, self.batch, rows):
                    self.numbers = self.step(slice(first, first + rows))
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
                self.parts *= 2
            else:
                return


def bench_train(
    *, rounds: int = LEAST_ROUNDS, device: Device = "cpu", rows: Sequence[str] = (), seed: int = 0
) -> Benchmark:
    """Speed and memory of training steps beside open_clip's, and the memory of the captioning loss.

    Args:
        rounds: of each comparison.
        device: of all rows; batches are larger on `cuda`, and both sides are timed eager and compiled.
        rows: which to measure, by their names in `ROWS`, and on `cuda` in `CUDA_ROWS`; none means all.

    Raises:
        FileNotFoundError: if there are no Flickr8k shards in the folder that CONTRACAP_DATA names, or ../shared/data.
        UnequalError: if a step gives other losses or another gradient norm than open_clip's; it is not timed then.
        ValueError: for a row that there is not, too few rounds, or `cuda` where torch finds none.
    """
    named = ROWS | CUDA_ROWS
    unknown = [name for name in rows if name not in named]
    if unknown:
        raise ValueError(f"no row {unknown[0]!r} in this benchmark; the rows are {', '.join(named)}")
    if device == "cpu":
        named = ROWS
        foreign = [name for name in rows if name not in named]
        if foreign:
            raise ValueError(f"row {foreign[0]!r} is measured in the memory of a GPU; say --device cuda")
    elif not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no CUDA device; say cpu")
    place = torch.device(device)
    precision = precision_on(place, "auto")
    setting = Setting(
        captions=flickr8k_captions(),
        device=place,
        precision=precision,
        rounds=rounds,
        seed=seed,
        compiled=device == "cuda",
    )
    machine = this_machine() | {"device": device, "precision": precision}
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(place)
    # A CPU without instructions for bf16 would take minutes over such a product.
    rates = {name: matmul_rate(place, DTYPES[name]) for name in dict.fromkeys(["fp32", precision])}
    setting.matmul = rates[precision]
    machine["matmul_tflops"] = {name: round(rate / 1e12, 3) for name, rate in rates.items()}
    measured = [named[name](setting) for name in rows or named]
    return Benchmark(rows=measured, samples=len(setting.captions), seed=seed, machine=machine)


def flickr8k_captions() -> list[str]:
    """Every caption of Flickr8k's training split but those with an exclamation mark, whose id open_clip may take for
    fill.

    Raises:
        FileNotFoundError: if there are no shards.
    """
    folder = Path(os.environ.get("CONTRACAP_DATA") or "../shared/data") / "flickr8k" / "train"
    if not folder.is_dir():
        raise FileNotFoundError(f"no captions at {folder}: set CONTRACAP_DATA to a folder with flickr8k in it")
    captions = [caption for sample in evaluation_samples(folder) for caption in sample.captions]
    return [caption for caption in captions if "!" not in caption]


def step_row(setting: Setting, *, size: str, full: bool) -> Row:
    """Our step on a batch beside open_clip's; `full`: with texts that fill the context, on a CPU on half of it."""
    samples = BATCHES[setting.device.type][size]
    if full and setting.device.type == "cpu":
        samples //= 2
    batch = make_batch(size, setting, samples=samples, full=full)
    pair = setting.pair(size)
    texts = f"texts of {batch.ids.shape[1]} tokens" if full else "Flickr8k captions"
    return compare_steps(f"{size} step, batch {samples}, {texts}", pair, partial(pair.checked_peer, batch), batch)


def clip_row(setting: Setting) -> Row:
    """Our step of a CoCa beside open_clip's step of a CLIP with the same towers, on the same pictures and texts."""
    samples = BATCHES[setting.device.type][B_32]
    batch, clip_batch = (make_batch(size, setting, samples=samples, full=False) for size in (B_32, CLIP))
    pair = setting.pair(B_32)

    def checked_peer() -> tuple[Ways, str]:
        _, coca_note = pair.checked_peer(batch)
        clip, clip_note = Pair(CLIP, setting).checked_peer(clip_batch)
        return clip, f"{coca_note}; {clip_note}"

    work = f"{B_32} step against open_clip's CLIP {CLIP} step, batch {samples} (ratio: CLIP's time by ours)"
    row = compare_steps(work, pair, checked_peer, batch)
    if row.ratio is None:
        return row
    return replace(row, note=f"our CoCa step takes {1 / row.ratio:.2f} times a CLIP step; {row.note}")


def compare_steps(work: str, pair: Pair, checked_peer: Callable[[], tuple[Ways, str]], batch: Batch) -> Row:
    """The row of the pair's own step on the batch and the peer's, each in the fastest of its ways, and over the batch
    in as many parts as the device's memory needs."""
    setting, note, reason = pair.setting, "", ""
    sides = {}
    try:
        peer, note = checked_peer()
    except NoPeerError as error:
        reason = str(error)
    else:
        sides["open_clip's"] = checked_passes(peer, len(batch), setting)
    sides = {"ours": checked_passes(pair.ours.ways(batch), len(batch), setting)} | sides
    works = {(whose, way): passes for whose, side in sides.items() for way, passes in side.items()}
    measured = in_turns(*works.values(), rounds=setting.rounds, clock=partial(device_clock, setting.device))
    seconds = dict(zip(works, measured, strict=True))
    fastest = {
        whose: min((seconds[whose, way] for way in side), key=statistics.median) for whose, side in sides.items()
    }
    row = timed_row(
        work,
        fastest["ours"],
        fastest.get("open_clip's"),
        items=len(batch),
        unit="samples/s",
        reason=reason,
    )
    speeds = [
        f"{whose} {way} {len(batch) / statistics.median(taken):,.1f} samples/s"
        for (whose, way), taken in seconds.items()
    ]
    split = [
        f"{whose} {way} in {passes.parts} steps, for want of memory"
        for (whose, way), passes in works.items()
        if passes.parts > 1
    ]
    remarks = [
        note,
        ", ".join(speeds) if setting.compiled else "",
        *split,
        describe_limit(pair.ours.model, batch, row.ours, setting),
        describe(batch),
    ]
    return replace(row, note="; ".join(filter(None, remarks)))


def checked_passes(ways: Ways, samples: int, setting: Setting) -> Mapping[str, Passes]:
    """Of each way of one side. A compiled one begins with the parts that the eager one needs, so that it is compiled
    for the batch that is timed.

    Raises:
        UnequalError: if its numbers are not those of the eager one.
    """
    passes = {"eager": Passes(ways["eager"], samples)}
    if "compiled" in ways:
        passes["eager"]()
        passes["compiled"] = Passes(ways["compiled"], samples, passes["eager"].parts)
        passes["compiled"]()
        expected = Passes(ways["eager"], samples, passes["compiled"].parts)
        expected()
        require_equal(passes["compiled"].numbers, expected.numbers, tolerance=setting.tolerance)
    return passes


def loss_memory_row(setting: Setting) -> Row:
    """Memory that the captioning loss and its gradients take, on the labels of a batch of captions."""
    setting.release()
    config = find_size(B_32).text
    batch = make_batch(B_32, setting, samples=LOSS_BATCH, full=False)
    row = captioning_loss_row(
        f"captioning loss, memory beyond inputs and weight gradient, batch {LOSS_BATCH}, {B_32}",
        labels=torch.cat([ids[1:end] for ids, end in zip(batch.ids, batch.lengths, strict=True)]).cpu(),
        vocab_size=config.vocab_size,
        width=config.width,
        device=setting.device,
        seed=setting.seed,
    )
    return replace(row, note=f"{row.note}; {describe(batch)}")


# In this order the models of each size are made once.
ROWS: dict[str, Callable[[Setting], Row]] = {
    "b-32": partial(step_row, size=B_32, full=False),
    "b-32-full": partial(step_row, size=B_32, full=True),
    "b-32-clip": clip_row,
    "accumulation-time": partial(accumulation_time_row, size=B_32),
    "l-14": partial(step_row, size=L_14, full=False),
    "l-14-full": partial(step_row, size=L_14, full=True),
    "loss-memory": loss_memory_row,
    "accumulation-memory": partial(accumulation_memory_row, size=B_32),
}
CUDA_ROWS: dict[str, Callable[[Setting], Row]] = {
    "largest-batch-b-32": partial(largest_batch_row, size=B_32),
    "largest-batch-l-14": partial(largest_batch_row, size=L_14),
}
