"""What it costs to take a batch in parts: time beside plain micro-batches, memory beside open_clip's accumulation."""

import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from contracap.bench.steps import LOSS, OPTIMIZER, Ours, Peer, Setting, describe, make_batch, released
from contracap.bench.timing import NoPeerError, Row, Work, compare, device_clock, peak_mib, require_equal
from contracap.data.batch import Batch
from contracap.pretrained import random_model
from contracap.training.step import count_labels, losses

Side = Literal["ours", "open_clip's"]

PARTS = 8
MICRO_BATCHES = {"cpu": 16, "cuda": 128}
LEAST_MIB = 1.0  # that our extra memory counts with in the ratio, where there is less


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Memory of a process that trains.

    Attributes:
        mib: the most that it held.
        before: likewise before its first step.
        numbers: losses and gradient norm of that step.
    """

    mib: float
    before: float
    numbers: Mapping[str, float]


def accumulation_time_row(setting: Setting, *, size: str) -> Row:
    """Our step on a batch in parts, beside its parts alone, none of which is contrasted with the others."""
    micro = MICRO_BATCHES[setting.device.type]
    batch = make_batch(size, setting, samples=PARTS * micro, full=False)
    ours = setting.pair(size).ours
    accumulated, plain = ours.accumulated_step(batch, parts=PARTS), partial(plain_step, ours, batch)

    def checked_plain() -> tuple[Work, str]:
        return plain, require_equal(accumulated(), plain(), tolerance=setting.tolerance)

    row = compare(
        f"{size} step of {PARTS} parts of {micro}, time beside {PARTS} plain micro-batches of ours",
        ours=accumulated,
        checked_peer=checked_plain,
        items=len(batch),
        unit="samples/s",
        rounds=setting.rounds,
        clock=partial(device_clock, setting.device),
    )
    assert row.ratio is not None  # the other side is ours, too
    return replace(
        row,
        note=f"takes {1 / row.ratio:.2f} times as long as the peer, which is our own step on parts that are each "
        f"contrasted within themselves, with one update; {row.note}, contrastive losses and gradients differ; "
        f"eager; {describe(batch)}",
    )


def plain_step(ours: Ours, batch: Batch) -> Mapping[str, Tensor]:
    """An update by the gradients of plain micro-batches; the captioning loss, which is that of the batch in one."""
    model, optimizer = ours.model, ours.state.optimizer
    tokens = count_labels(batch)
    captioning = torch.zeros((), device=model.device)
    for part in batch.split(PARTS):
        values = losses(model, part, ours.config, tokens=tokens)
        captioning += values["captioning_loss"].detach()
        (LOSS.captioning * values["captioning_loss"] + LOSS.contrastive * values["contrastive_loss"]).backward()
    nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return {"captioning_loss": captioning}


def accumulation_memory_row(setting: Setting, *, size: str) -> Row:
    """What a batch in parts takes beyond one part alone, beside open_clip's accumulation of the same batch.

    Raises:
        UnequalError: if losses or gradient norm of the batch differ.
        ValueError: if no step goes beyond what was held before it, so that nothing was measured.
    """
    setting.release()
    micro = MICRO_BATCHES[setting.device.type]
    work = f"{size} step of {PARTS} parts of {micro}, memory beyond that of one part"
    batch = make_batch(size, setting, samples=PARTS * micro, full=False)
    many, one = (_peak_of("ours", size, micro, parts, setting) for parts in (PARTS, 1))
    row = Row(
        work=work,
        unit="MiB",
        ours=many.mib - one.mib,
        note=f"peak memory of a fresh process each with two steps, measured once; ours {_both(many, one)}",
    )
    try:
        peer_many, peer_one = (_peak_of("open_clip's", size, micro, parts, setting) for parts in (PARTS, 1))
    except NoPeerError as error:
        return replace(row, note=f"{row.note}; {describe(batch)}", reason=str(error))
    except torch.OutOfMemoryError:
        reason = "open_clip's step does not fit into the memory of the device"
        return replace(row, note=f"{row.note}; {describe(batch)}", reason=reason)
    agreement = require_equal(many.numbers, peer_many.numbers, tolerance=setting.tolerance)
    extra = peer_many.mib - peer_one.mib
    return replace(
        row,
        peer=extra,
        ratio=extra / max(row.ours, LEAST_MIB),
        note=f"{size} in {setting.precision}: {agreement}, where the gradient of open_clip's logit scale, which its "
        f"accumulation counts {PARTS} times, is counted once; {row.note}, open_clip's {_both(peer_many, peer_one)}; "
        f"{describe(batch)}",
    )


def _peak_of(side: Side, size: str, micro: int, parts: int, setting: Setting) -> Peak:
    # A process each: the peak of resident memory never falls again.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh_process:
        peak = fresh_process.submit(training_peak, side, size, micro, parts, setting).result()
    if peak.mib <= peak.before:
        raise ValueError(f"{size}: {peak.before:.0f} MiB were held before the first step, which the steps do not reach")
    return peak


def training_peak(side: Side, size: str, micro: int, parts: int, setting: Setting) -> Peak:
    """Of this process, after two steps on a batch in parts of `micro` samples; the second has the optimizer's moments.

    Raises:
        NoPeerError: if open_clip is asked for and not installed.
    """
    batch = make_batch(size, setting, samples=parts * micro, full=False)
    if side == "ours":
        trained = Ours(size, setting)
    else:
        trained = Peer(size, random_model(released(size), seed=setting.seed)[0], setting)
    if parts == 1:
        step = partial(trained.ways(batch)["eager"], slice(0, micro))
    else:
        step = trained.accumulated_step(batch, parts=parts)
    before = _held_mib(setting.device)
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(setting.device)
    numbers, _ = (step(), step())
    return Peak(
        mib=_held_mib(setting.device), before=before, numbers={name: float(value) for name, value in numbers.items()}
    )


def _held_mib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else peak_mib()


def _both(many: Peak, one: Peak) -> str:
    return f"{many.mib:,.0f} MiB with {PARTS} parts and {one.mib:,.0f} with the first alone"
