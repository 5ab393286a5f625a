"""Warnings: why a run cannot be started as planned, and changes that would do."""

import math
from collections.abc import Iterator
from dataclasses import replace

from contracap.apps.plan.planned_run import PlannedRun
from contracap.wording import counted

MAX_GPUS = 10**6


def find_warnings(run: PlannedRun, gpu: str) -> list[str]:
    """Return why the run cannot be started, a line each.

    Args:
        gpu: name of the GPU.
    """
    return [*_sharing_warnings(run), *_memory_warnings(run, gpu)]


def _sharing_warnings(run: PlannedRun) -> Iterator[str]:
    data, parts, gpus = run.recipe.data, run.recipe.accumulation, run.gpus
    batch, streams = data.batch_size, data.stream_count
    if batch % (gpus * parts):
        each = counted(gpus, "GPU(s)") + (f" with {parts} parts each" if parts > 1 else "")
        lower = batch // (gpus * parts) * gpus * parts
        advice = f"{f'{lower} or ' if lower else ''}{lower + gpus * parts}"
        yield f"data.batch_size {batch} cannot be shared by {each}: set it to {advice}"
    elif streams % gpus:
        yield f"data.streams {streams} cannot be shared by {gpus} GPUs: set it to {gpus}, or a multiple of it"


def _memory_warnings(run: PlannedRun, gpu: str) -> Iterator[str]:
    if not run.max_rows:
        yield f"not a single sample fits into the memory of one {gpu}: take a larger GPU, or a smaller size"
    elif not run.fits:
        ways = [way for way in (_recompute(run), _more_gpus(run), _more_parts(run)) if way]
        yield (
            f"{math.ceil(run.rows):,} samples at a time do not fit into the memory of one {gpu}, {run.max_rows} do: "
            + (", or ".join(ways) or "take a larger GPU")
        )


def _recompute(run: PlannedRun) -> str | None:
    recipe = replace(run.recipe, parallel=replace(run.recipe.parallel, recompute="blocks"))
    changed = replace(run, recipe=recipe)
    return 'set parallel.recompute = "blocks"' if recipe != run.recipe and changed.fits else None


def _more_gpus(run: PlannedRun) -> str | None:
    """Numbers of GPUs that the data's streams can be shared by come before fewer others."""
    recipe, streams = run.recipe, run.recipe.data.stream_count
    most = min(recipe.data.batch_size // recipe.accumulation, MAX_GPUS)
    numbers = [n for n in range(run.gpus + 1, most + 1) if not recipe.data.batch_size % (n * recipe.accumulation)]
    if recipe.parallel.kind == "hsdp":  # whole machines
        numbers = [number for number in numbers if not number % min(number, run.gpus_per_machine)]
    for number in sorted(numbers, key=lambda number: streams % number > 0):
        if replace(run, gpus=number).fits:
            return f"take {number} GPUs" + (f" and set data.streams = {number}" if streams % number else "")
    return None


def _more_parts(run: PlannedRun) -> str | None:
    batch, gpus = run.recipe.data.batch_size, run.gpus
    for parts in range(run.recipe.accumulation + 1, batch // gpus + 1):
        if not batch % (gpus * parts) and replace(run, recipe=replace(run.recipe, accumulation=parts)).fits:
            return f"set accumulation = {parts}"
    return None
