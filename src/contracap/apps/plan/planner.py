"""From a recipe to its plan. Nothing is trained, read from afar, or asked of a GPU."""

import math
from collections.abc import Mapping

from contracap.apps.plan.advice import MAX_GPUS, find_warnings
from contracap.apps.plan.failures import COPYING, WRITING, failure_figures
from contracap.apps.plan.parameters import EXACT, checkpoint_bytes, count_parameters, planned_model
from contracap.apps.plan.planned_run import PlannedRun
from contracap.apps.plan.report import GIB, Plan
from contracap.apps.plan.speed import SampleFlops, sample_flops, step_seconds
from contracap.apps.plan.text_lengths import caption_texts
from contracap.apps.plan.traffic import KINDS, bytes_by_kind
from contracap.config import require_count
from contracap.data.patterns import require_consent
from contracap.training.flops import TextLengths
from contracap.training.gpus import find_gpu
from contracap.training.recipe import Recipe, with_steps
from contracap.wording import counted


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
    """Plan a run in which every GPU has an equal part of each batch, and of the model what `parallel.kind` says.

    Args:
        gpu: a row of the table in `training.gpus`.
        gpus_per_machine: these reach each other faster, and have one copy of the model together under `hsdp`.
        efficiency: share of the GPU's dense peak that forward and backward pass reach.
        text_tokens: mean length of the captions, start and end included; by default that of the index next to local
            shards, else the whole context.
        hours_between_failures: of one GPU. Source: arXiv 2407.21783: 419 stops in 54 days on 16,384 GPUs.
        allow_commands: whether the recipe's `pipe:` sources may run, to count the samples of its epochs.

    Raises: ValueError: if an argument is out of range, or there is no such GPU.
    """
    if recipe.epochs is not None:
        require_consent(recipe.commands, allow_commands)
    recipe, machine = with_steps(recipe), find_gpu(gpu)
    _check(gpus, gpus_per_machine, efficiency, hours_between_failures)
    context = min(recipe.model_config.text.context, recipe.data.captions.max_tokens or recipe.model_config.text.context)
    padded = TextLengths(mean=float(context), longest=context)
    known = _text_lengths(recipe, context, text_tokens)
    run = PlannedRun(
        recipe=recipe,
        model=planned_model(recipe),
        texts=known or padded,
        gpu=machine,
        gpus=gpus,
        gpus_per_machine=gpus_per_machine,
        efficiency=efficiency,
    )
    flops, padded_flops = sample_flops(run, run.texts), sample_flops(run, padded)
    seconds = step_seconds(run, flops)
    failures = failure_figures(run, step_seconds=sum(seconds.values()), hours_between_failures=hours_between_failures)
    return Plan(
        title=_title(run, gpu),
        assumptions=_assumptions(run, padded=known is None),
        warnings=find_warnings(run, gpu),
        samples=recipe.steps * recipe.data.batch_size,
        parameters=count_parameters(run.model),
        flops=flops.forward,
        training_flops=flops.training,
        padded_flops=padded_flops.forward,
        padded_training_flops=padded_flops.training,
        memory=run.memory(run.rows),
        seconds=seconds,
        collectives=run.collectives,
        figures={**_figures(run, flops, sum(seconds.values())), **failures},
    )


def _check(gpus: int, gpus_per_machine: int, efficiency: float, hours_between_failures: float) -> None:
    """Raises: ValueError: if an argument of `plan_run` is out of range."""
    for name, number in {"gpus": gpus, "gpus_per_machine": gpus_per_machine}.items():
        require_count(name, number, 1, "which share each batch", most=MAX_GPUS)
    if not 0 < hours_between_failures < math.inf:
        raise ValueError(f"hours_between_failures is {hours_between_failures}; it must be a finite number above 0")
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency is {efficiency}; it must be above 0 and at most 1")


def _text_lengths(recipe: Recipe, context: int, text_tokens: float | None) -> TextLengths | None:
    """Return the lengths that are given, or else those of the data; None if nobody knows them.

    Raises: ValueError: if the given mean is out of range.
    """
    if text_tokens is None:
        return caption_texts(recipe.data, context)
    if not 2 <= text_tokens <= context:
        raise ValueError(
            f"text_tokens is {text_tokens}; it must be from 2 to {context}, the longest that the run reads"
        )
    return TextLengths(mean=text_tokens, longest=context)


def _title(run: PlannedRun, gpu: str) -> str:
    recipe, precision = run.recipe, "fp32" if run.product == EXACT else "bf16"
    return (
        f"{recipe.size} on {run.gpus} {gpu}, {recipe.parallel.kind}, {precision}: "
        f"{counted(recipe.steps, 'step(s)')} of {counted(recipe.data.batch_size, 'sample(s)')}, "
        f"{math.ceil(run.samples):,} on each GPU, {run.texts.mean:.1f} tokens per text on average"
    )


def _figures(run: PlannedRun, flops: SampleFlops, step: float) -> Mapping[str, float]:
    hours = run.recipe.steps * step / 3600
    payload = bytes_by_kind(run.collectives)
    return {
        "parameters_million": sum(count_parameters(run.model).values()) / 1e6,
        "forward_gflop_per_sample": sum(flops.forward.values()) / 1e9,
        "memory_gib_per_gpu": sum(run.memory(run.rows).values()) / GIB,
        "usable_gib_per_gpu": run.usable_memory / GIB,
        "batch_per_gpu": run.samples,
        "largest_batch_per_gpu": float(run.recipe.accumulation * run.max_rows),
        "step_seconds": step,
        "samples_per_second_per_gpu": run.samples / step,
        "mfu_percent": 100 * run.samples * sum(flops.training.values()) / step / run.peak,
        **{f"{kind}_megabytes_per_step": payload[kind] / 1e6 for kind in KINDS},
        "sent_megabytes_per_step": sum(each.sent for each in run.collectives) / 1e6,
        "hours": hours,
        "days": hours / 24,
        "gpu_hours": hours * run.gpus,
        "checkpoint_gigabytes": checkpoint_bytes(run.model, averaged=run.recipe.ema_decay > 0) / 1e9,
    }


def _assumptions(run: PlannedRun, *, padded: bool) -> list[str]:
    gpu = run.gpu
    found = [
        f"{run.rate / 1e12:,.1f} TFLOP/s in forward and backward pass, {gpu.bandwidth / 1e12:.2f} TB/s in memory, "
        f"{gpu.local_link / 1e9:.1f} GB/s to GPUs of the same machine, {gpu.link / 1e9:.1f} GB/s to others, "
        f"{COPYING / 1e9:.1f} GB/s for a checkpoint off a GPU and {WRITING / 1e9:.1f} GB/s for writing it while steps "
        "go on; data comes fast enough"
    ]
    if padded:
        found.append("every text fills the context: give the mean length of the captions, or index local shards")
    return found
