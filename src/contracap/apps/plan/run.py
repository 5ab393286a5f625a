"""From a recipe to its plan: nothing is computed, read from afar, or asked of a GPU."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

from contracap.apps.plan.memory import memory_parts, saved_bytes
from contracap.apps.plan.parameters import (
    EXACT,
    checkpoint_bytes,
    count_parameters,
    planned_model,
    shares_of,
    snapshot_bytes,
)
from contracap.apps.plan.report import GIB, Plan
from contracap.apps.plan.speed import COPYING, WRITING, Failures, step_seconds
from contracap.apps.plan.traffic import KINDS, bytes_by_kind, collectives_of
from contracap.config import require_count
from contracap.data.config import DataConfig
from contracap.data.index import read_index
from contracap.data.remote import require_consent
from contracap.data.shards import list_shards
from contracap.losses import LossConfig
from contracap.training.flops import BACKWARD, TextLengths, count_flops, tokens_of, training_flops
from contracap.training.gpus import Gpu, find_gpu
from contracap.training.recipe import Recipe, in_steps

USABLE = 0.92  # share of a GPU's memory; CUDA, buffers between GPUs and gaps between tensors take the rest: estimated
MAX_ROWS = 2**20
MAX_GPUS = 10**6
Fits = Callable[[Recipe, int], bool]  # whether a step of the recipe on so many GPUs has the memory it takes


def plan_run(
    recipe: Recipe,
    *,
    gpus: int,
    gpu: str,
    gpus_per_machine: int = 8,
    efficiency: float = 0.5,
    text_tokens: float | None = None,
    hours_between_failures: float = 50_000.0,
    allow_commands: bool = False,
) -> Plan:
    """The plan of a run in which every GPU has an equal part of each batch, and of the model what `parallel.kind` says.

    Args:
        gpu: a row of the table in `training.gpus`.
        gpus_per_machine: these reach each other faster, and have one copy of the model together under `hsdp`.
        efficiency: share of the GPU's dense peak that forward and backward pass reach.
        text_tokens: mean length of the captions, start and end included; by default that of the index beside local
            shards, else the whole context.
        hours_between_failures: of one GPU. Source: arXiv 2407.21783: 419 stops in 54 days on 16,384 GPUs.
        allow_commands: whether the recipe's `pipe:` sources may run, to count the samples of its epochs.

    Raises: ValueError: if an argument is out of range, or there is no such GPU.
    """
    if recipe.epochs is not None:
        require_consent(recipe.commands, allow_commands)
    recipe = in_steps(recipe)
    machine, config = find_gpu(gpu), recipe.model_config
    for name, number in {"gpus": gpus, "gpus_per_machine": gpus_per_machine}.items():
        require_count(name, number, 1, "which share each batch", most=MAX_GPUS)
    if not 0 < hours_between_failures < math.inf:
        raise ValueError(f"hours_between_failures is {hours_between_failures}; it must be a finite number above 0")
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency is {efficiency}; it must be above 0 and at most 1")
    context = min(config.text.context, recipe.data.captions.max_tokens or config.text.context)
    if text_tokens is not None and not 2 <= text_tokens <= context:
        raise ValueError(
            f"text_tokens is {text_tokens}; it must be from 2 to {context}, the longest that the run reads"
        )
    padded = TextLengths(mean=float(context), longest=context)
    known = (
        caption_texts(recipe.data, context) if text_tokens is None else TextLengths(mean=text_tokens, longest=context)
    )
    texts = known or padded

    model, tokens = planned_model(recipe), tokens_of(config, recipe.loss, texts)
    shares = shares_of(model, recipe.parallel.kind, gpus=gpus, per_machine=gpus_per_machine)
    batch, parts, recompute = recipe.data.batch_size, recipe.accumulation, recipe.parallel.recompute == "blocks"
    product, peak = (EXACT, machine.fp32) if recipe.precision == "fp32" else (2, machine.bf16)
    share = batch / gpus
    rows = share / parts
    counted = count_flops(config, recipe.loss, texts)
    flops, blocks = counted.parts, counted.blocks
    training = training_flops(model, flops)
    again = (sum(training_flops(model, blocks).values()) - sum(blocks.values())) / BACKWARD
    features = 0.0
    if parts > 1 and tokens.contrastive:
        features = share * sum(count_flops(config, LossConfig(captioning=0.0), texts).parts.values())

    def memory(rows: float) -> Mapping[str, float]:
        return memory_parts(recipe, model, shares, tokens, rows=rows, product=product)

    def fits(changed: Recipe, gpus: int) -> bool:
        others = shares_of(model, changed.parallel.kind, gpus=gpus, per_machine=gpus_per_machine)
        rows = batch / gpus / changed.accumulation
        return sum(memory_parts(changed, model, others, tokens, rows=rows, product=product).values()) <= usable

    usable = USABLE * machine.memory
    largest = bisect_right(range(1, MAX_ROWS), usable, key=lambda rows: sum(memory(float(rows)).values()))
    collectives = collectives_of(recipe, shares, rows=share, product=product)
    seconds = step_seconds(
        machine,
        rate=efficiency * peak,
        forward_flops=share * sum(flops.values()),
        training_flops=share * sum(training.values()),
        features_flops=features,
        recomputed_flops=share * again * recompute,
        saved_bytes=share * sum(saved_bytes(config, tokens, product=product, recompute=recompute).values()),
        trained=shares.trained,
        parts=parts,
        collectives=collectives,
    )
    step = sum(seconds.values())
    hours = recipe.steps * step / 3600
    checkpoint = checkpoint_bytes(model, averaged=recipe.ema_decay > 0)
    figures = {
        "parameters_million": sum(count_parameters(model).values()) / 1e6,
        "forward_gflop_per_sample": sum(flops.values()) / 1e9,
        "memory_gib_per_gpu": sum(memory(rows).values()) / GIB,
        "usable_gib_per_gpu": usable / GIB,
        "batch_per_gpu": share,
        "largest_batch_per_gpu": float(recipe.accumulation * largest),
        "step_seconds": step,
        "samples_per_second_per_gpu": share / step,
        "mfu_percent": 100 * share * sum(training.values()) / step / peak,
        **{f"{kind}_megabytes_per_step": bytes_by_kind(collectives)[kind] / 1e6 for kind in KINDS},
        "sent_megabytes_per_step": sum(each.sent for each in collectives) / 1e6,
        "hours": hours,
        "days": hours / 24,
        "gpu_hours": hours * gpus,
        "checkpoint_gigabytes": checkpoint / 1e9,
    }
    failures = Failures(
        stall=snapshot_bytes(model, shares, averaged=recipe.ema_decay > 0) / COPYING,
        writing=checkpoint / WRITING,
        between=3600 * hours_between_failures / gpus,
    )
    figures |= _failure_figures(recipe, failures, step=step)
    padded_flops = count_flops(config, recipe.loss, padded).parts
    precision = "fp32" if product == EXACT else "bf16"
    return Plan(
        title=f"{recipe.size} on {gpus} {gpu}, {recipe.parallel.kind}, {precision}: {recipe.steps:,} steps of "
        f"{batch:,} samples, {share:,.5g} on each GPU, texts of {texts.mean:.1f} tokens in the mean",
        assumptions=_assumptions(machine, rate=efficiency * peak, padded=known is None),
        warnings=_warnings(recipe, fits, gpus=gpus, gpu=gpu, per_machine=gpus_per_machine, largest=largest),
        samples=recipe.steps * batch,
        parameters=count_parameters(model),
        flops=flops,
        training_flops=training,
        padded_flops=padded_flops,
        padded_training_flops=training_flops(model, padded_flops),
        memory=memory(rows),
        seconds=seconds,
        collectives=collectives,
        figures=figures,
    )


def caption_texts(data: DataConfig, context: int) -> TextLengths | None:
    """Lengths of the captions, cut to the context, as the indexes beside local shards tell; None if none does.

    They are counted in tokens of CLIP's tokenizer, and all captions alike, whatever the weights of a mixture.

    Raises:
        IndexFileError: if an index cannot be read.
    """
    counts: Counter[int] = Counter()
    for source in data.sources.values():
        for path in [source.shards] if isinstance(source.shards, str) else source.shards:
            if "://" in path or path.startswith("pipe:"):  # not a place that can be looked into at once
                continue
            try:
                shards = {Path(shard) for shard in list_shards(path)}
            except FileNotFoundError:  # a plan may come before its data
                continue
            for folder in {shard.parent for shard in shards}:
                for entry in read_index(folder).values():
                    if folder / entry.name in shards:
                        counts.update(entry.caption_lengths)
    if not counts:
        return None
    cut = [(min(length, context), count) for length, count in counts.items()]
    mean = sum(length * count for length, count in cut) / counts.total()
    return TextLengths(mean=mean, longest=max(length for length, _ in cut))


def _failure_figures(recipe: Recipe, failures: Failures, *, step: float) -> dict[str, float]:
    """What checkpoints and failures cost: with the recipe's checkpoints, and with the best ones."""
    run = recipe.steps * step
    interval, best = min(recipe.checkpoint.every * step, run), min(failures.best_interval, run)
    figures = {
        "hours_between_failures": failures.between / 3600,
        "checkpoint_stall_seconds": failures.stall,
        "checkpoint_writing_seconds": failures.writing,
    }
    if run <= failures.stall + failures.writing:  # over before its only checkpoint is: a share of it means nothing
        return figures
    return figures | {
        "failure_loss_percent": 100 * failures.lost_share(interval),
        "best_steps_between_checkpoints": best / step,
        "failure_loss_percent_at_best": 100 * failures.lost_share(best),
    }


def _assumptions(gpu: Gpu, *, rate: float, padded: bool) -> list[str]:
    found = [
        f"{rate / 1e12:,.1f} TFLOP/s in forward and backward pass, {gpu.bandwidth / 1e12:.2f} TB/s in memory, "
        f"{gpu.local_link / 1e9:.1f} GB/s to GPUs of the same machine, {gpu.link / 1e9:.1f} GB/s to others, "
        f"{COPYING / 1e9:.1f} GB/s for a checkpoint off a GPU and {WRITING / 1e9:.1f} GB/s for writing it while steps "
        "go on; data comes fast enough"
    ]
    if padded:
        found.append("every text fills the context: give the mean length of the captions, or index local shards")
    return found


def _warnings(recipe: Recipe, fits: Fits, *, gpus: int, gpu: str, per_machine: int, largest: int) -> list[str]:
    batch, streams, parts = recipe.data.batch_size, recipe.data.stream_count, recipe.accumulation
    found = []
    if batch % (gpus * parts):
        each = f"{gpus} GPUs" + (f" with {parts} parts each" if parts > 1 else "")
        lower = batch // (gpus * parts) * gpus * parts
        found.append(
            f"data.batch_size {batch} cannot be shared by {each}: "
            f"set it to {f'{lower} or ' if lower else ''}{lower + gpus * parts}"
        )
    elif streams % gpus:
        found.append(f"data.streams {streams} cannot be shared by {gpus} GPUs: set it to {gpus}, or a multiple of it")
    if not largest:
        found.append(f"not a single sample fits into the memory of one {gpu}: take a larger GPU, or a smaller size")
    elif not fits(recipe, gpus):
        found.append(
            f"{batch / gpus / parts:,.5g} samples at a time do not fit into the memory of one {gpu}, {largest} do: "
            + (", or ".join(_ways_to_fit(recipe, fits, gpus=gpus, per_machine=per_machine)) or "take a larger GPU")
        )
    return found


def _ways_to_fit(recipe: Recipe, fits: Fits, *, gpus: int, per_machine: int) -> Iterator[str]:
    """What would do, each by itself; GPUs that the streams of the data can be shared by come before fewer others."""
    batch, streams, parts = recipe.data.batch_size, recipe.data.stream_count, recipe.accumulation
    again = replace(recipe, parallel=replace(recipe.parallel, recompute="blocks"))
    if again != recipe and fits(again, gpus):
        yield 'set parallel.recompute = "blocks"'
    numbers = [number for number in range(gpus + 1, min(batch // parts, MAX_GPUS) + 1) if not batch % (number * parts)]
    if recipe.parallel.kind == "hsdp":
        numbers = [number for number in numbers if not number % min(number, per_machine)]
    numbers.sort(key=lambda number: streams % number > 0)
    for number in islice((number for number in numbers if fits(recipe, number)), 1):
        yield f"take {number} GPUs" + (f" and set data.streams = {number}" if streams % number else "")
    cuts = (cut for cut in range(parts + 1, batch // gpus + 1) if not batch % (gpus * cut))
    for cut in islice((cut for cut in cuts if fits(replace(recipe, accumulation=cut), gpus)), 1):
        yield f"set accumulation = {cut}"
