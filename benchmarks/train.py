"""Speed and memory of training steps, next to open_clip with the same weights on the same batch."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.harness import MIN_ROUNDS, Benchmark, Numbers, Row, Run, alternate, compare, require_equal
from benchmarks.machine import matmul_rate, release_memory
from benchmarks.train_memory import (
    MICRO_BATCHES,
    PARTS,
    accumulation_memory_row,
    captioning_loss_row,
    largest_batch_row,
)
from benchmarks.train_run import feeding_row, fsdp_row
from benchmarks.train_steps import (
    DTYPES,
    LOSS,
    OPTIMIZER,
    OpenClip,
    Ours,
    Side,
    Step,
    describe_texts,
    flickr8k_captions,
    make_batch,
    precision,
    tolerance,
)
from contracap.data.batch import Batch
from contracap.training.step import compute_losses, count_labels
from contracap.training.utilisation import ModelUtilisation, Peak

B_32, L_14, CLIP = "coca_ViT-B-32", "coca_ViT-L-14", "ViT-B-32"
BATCHES = {"cpu": {B_32: 16, L_14: 4}, "cuda": {B_32: 1024, L_14: 256}}


def step_row(run: Run, *, size: str, full: bool = False) -> Row:
    """Our step on a batch next to open_clip's; `full`: with texts that fill the context, on a CPU on half the batch."""
    samples = BATCHES[run.device.type][size] // (2 if full and run.device.type == "cpu" else 1)
    size = run.size(size)

    def row(samples: int) -> Row:
        batch = make_batch(size, run, samples=samples, full=full)
        texts = f"texts of {batch.ids.shape[1]} tokens" if full else "captions"
        ours = Ours(size, run)
        return time_steps(f"{size} step, batch {samples}, {texts}", ours, batch, partial(checked_step, ours, batch))

    return fitting(row, run.count(samples, small=4), run)


def clip_row(run: Run) -> Row:
    """Our step of a CoCa next to open_clip's step of a CLIP with the same towers, on the same images and texts."""

    def row(samples: int) -> Row:
        batch, clip_batch = (make_batch(size, run, samples=samples) for size in (B_32, CLIP))
        ours = Ours(B_32, run)

        def checked_peer() -> tuple[Step, str]:
            _, coca_note = checked_step(ours, batch)
            clip, clip_note = checked_step(Ours(CLIP, run), clip_batch)
            return clip, f"{coca_note}; {clip_note}"

        work = f"{B_32} step against open_clip's CLIP {CLIP} step, batch {samples} (ratio: CLIP's time by ours)"
        return time_steps(work, ours, batch, checked_peer)

    return fitting(row, BATCHES[run.device.type][B_32], run)


def fitting(row: Callable[[int], Row], samples: int, run: Run) -> Row:
    """The row of the largest batch that both sides can hold: `samples`, or half as many again and again."""
    while True:
        try:
            return row(samples)
        except torch.OutOfMemoryError:
            if samples == 1:
                raise
        samples //= 2
        release_memory(run.device)


def time_steps(work: str, ours: Ours, batch: Batch, checked_peer: Callable[[], tuple[Step, str]]) -> Row:
    """Our step on the batch next to a peer's."""
    step, speeds = fastest("ours", ways(ours, batch, ours.run), ours.run, len(batch))
    row = compare(work, run=ours.run, ours=step, checked_peer=checked_peer, items=len(batch), unit="samples/s")
    notes = [row.note, speeds, describe_utilisation(ours, batch, row.ours), describe_texts(batch)]
    return replace(row, note="; ".join(filter(None, notes)))


def checked_step(ours: Ours, batch: Batch) -> tuple[Step, str]:
    """open_clip's step on this batch, and how far it agrees with ours.

    Raises:
        MissingPeerError: if open_clip is not installed.
        UnequalError: if losses or gradient norm differ.
    """
    peer = OpenClip(ours.size, ours.model, ours.run)
    step, speeds = fastest("open_clip's", ways(peer, batch, ours.run), ours.run, len(batch))
    note = require_equal(ours.step(batch)(), step(), tolerance=tolerance(ours.run))
    note = f"{ours.size} in {precision(ours.run)}: {note}"
    return step, f"{note}; {speeds}" if speeds else note


def ways(side: Ours | OpenClip, batch: Batch, run: Run) -> Mapping[str, Step]:
    """A step of one side: eager, and on a GPU also compiled."""
    steps = {"eager": side.step(batch)}
    return steps | ({"compiled": side.compiled_step(batch)} if run.device.type == "cuda" or run.small else {})


def fastest(side: Side, steps: Mapping[str, Step], run: Run, samples: int) -> tuple[Step, str]:
    """The fastest of several ways to take the same step, and what was measured, if there are several.

    Each speed is printed at once, because open_clip's steps take a minute or more to compile.

    Raises:
        UnequalError: if they have other numbers than the first.
    """
    first, *others = steps.values()
    if not others:
        return first, ""
    medians, speeds = dict[str, float](), list[str]()
    for name, step in steps.items():
        require_equal(step(), first(), tolerance=tolerance(run))
        (seconds,) = alternate(step, rounds=MIN_ROUNDS, clock=run.clock)
        medians[name] = statistics.median(seconds)
        speeds.append(f"{side} {name} {samples / medians[name]:,.1f} samples/s")
        print(speeds[-1], flush=True)
    return steps[min(medians, key=medians.__getitem__)], ", ".join(speeds)


def describe_utilisation(ours: Ours, batch: Batch, samples_per_second: float) -> str:
    """The share of the speed of a large matrix product that our step reaches."""
    rate = matmul_rate(ours.run.device, DTYPES[precision(ours.run)])
    peak = Peak(flops=rate, source=f"a product of 2048 rows and columns here in {precision(ours.run)}")
    counts = batch.lengths
    share = ModelUtilisation(ours.model, LOSS, peak)(samples_per_second, sum(counts) / len(counts))
    return f"ours computes, by the plan's counting, {share:.1%} of {rate / 1e12:.4g} TFLOP/s ({peak.source})"


def accumulation_time_row(run: Run) -> Row:
    """Our step on a batch in parts next to the parts alone, each of which is contrasted within itself."""
    micro = MICRO_BATCHES[run.device.type]
    batch = make_batch(B_32, run, samples=PARTS * micro)
    ours = Ours(B_32, run)
    accumulated, plain = ours.step(batch, parts=PARTS), partial(plain_step, ours, batch)
    row = compare(
        f"{B_32} step of {PARTS} parts of {micro}, time next to {PARTS} plain micro-batches of ours",
        run=run,
        ours=accumulated,
        checked_peer=lambda: (plain, require_equal(accumulated(), plain(), tolerance=tolerance(run))),
        items=len(batch),
        unit="samples/s",
    )
    note = (
        f"takes {1 / (row.ratio or 1):.2f} times as long as the peer, which is our own step on parts that are each "
        f"contrasted within themselves, with one update; {row.note}, contrastive losses and gradients differ"
    )
    return replace(row, note=f"{note}; eager; {describe_texts(batch)}")


def plain_step(ours: Ours, batch: Batch) -> Numbers:
    """An update by the gradients of plain micro-batches. Their captioning loss is that of the whole batch."""
    model, optimizer = ours.model, ours.state.optimizer
    num_labels = count_labels(batch)
    captioning = torch.zeros((), device=model.device)
    for part in batch.split(PARTS):
        values = compute_losses(model, part, ours.config, num_labels=num_labels, parallel=ours.state.parallel)
        captioning += values["captioning_loss"].detach()
        (LOSS.captioning * values["captioning_loss"] + LOSS.contrastive * values["contrastive_loss"]).backward()
    nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return {"captioning_loss": captioning}


def machine(run: Run) -> Mapping[str, Any]:
    """Precision, and the speed of matrix products; a CPU without instructions for bf16 would take minutes over one."""
    rates = {name: matmul_rate(run.device, DTYPES[name]) for name in dict.fromkeys(["fp32", precision(run)])}
    return {
        "precision": precision(run),
        "matmul_tflops": {name: round(rate / 1e12, 3) for name, rate in rates.items()},
    }


BENCHMARK = Benchmark(
    rows={
        "b-32": partial(step_row, size=B_32),
        "b-32-full": partial(step_row, size=B_32, full=True),
        "b-32-clip": clip_row,
        "accumulation-time": accumulation_time_row,
        "l-14": partial(step_row, size=L_14),
        "l-14-full": partial(step_row, size=L_14, full=True),
        "loss-memory": partial(captioning_loss_row, size=B_32),
        "accumulation-memory": partial(accumulation_memory_row, size=B_32),
    },
    cuda=True,
    cuda_rows={
        "largest-batch-b-32": partial(largest_batch_row, size=B_32),
        "largest-batch-l-14": partial(largest_batch_row, size=L_14),
        "feeding": partial(feeding_row, size=B_32, samples=BATCHES["cuda"][B_32]),
        "fsdp": partial(fsdp_row, size=B_32, samples=BATCHES["cuda"][B_32]),
    },
    samples=lambda: len(flickr8k_captions()),
    machine=machine,
)
