"""Several tasks, measured one after the other and joined in one result: those of a file, or of a training run."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, TypedDict, TypeVar

from contracap.data.shards import list_shards
from contracap.evaluation.config import EvaluationConfig, SampleCaptionsConfig, TaskConfig
from contracap.evaluation.distributed import run_on_every_rank
from contracap.evaluation.features import image_pixels, sample_batches
from contracap.evaluation.result import Evaluator, PerSample, Result, unexpected
from contracap.evaluation.task import build_evaluator, seed_of
from contracap.generation.captioner import Captioner
from contracap.model.coca import CoCa
from contracap.parallel.process_group import ProcessGroup
from contracap.processor import Processor

Value = TypeVar("Value")
BATCH = 16  # images captioned at a time
logger = logging.getLogger(__name__)


class SampleCaption(TypedDict):
    """A caption of the model and those of people, ready for JSON; `key` is that of the image."""

    key: str
    caption: str
    references: tuple[str, ...]


Suite = Callable[[CoCa], Result[list[SampleCaption]]]


def build_evaluators(
    tasks: Mapping[str, TaskConfig], processor: Processor, process_group: ProcessGroup = ProcessGroup()
) -> dict[str, Evaluator]:
    """Return the evaluator of each task.

    Raises: FileNotFoundError, ValueError: naming the task, if its samples are missing, or a file or its first sample
        lacks what it needs.
    """
    evaluators = {}
    for name, task in tasks.items():
        try:
            evaluators[name] = build_evaluator(task, processor, process_group)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"task {name}: {error}") from None
        except ValueError as error:
            raise ValueError(f"task {name}: {error}") from None
    return evaluators


def measure_tasks(
    tasks: Mapping[str, TaskConfig], model: CoCa, processor: Processor, *, command: str, seed: int | None = None
) -> Result:
    """Measure the tasks one after the other. The figure of a task that fails is its name, null and with the reason.

    Raises: FileNotFoundError, ValueError: as `build_evaluators` does, before anything is computed.
    """
    results = dict[str, Result | str]()
    for name, evaluator in build_evaluators(tasks, processor).items():
        results[name] = result = _try_measure(name, partial(evaluator, model))
        if isinstance(result, Result):
            logger.info("%s: %s", name, ", ".join(f"{figure} {value}" for figure, value in result.figures.items()))
    return replace(join_results(results), command=command, seed=seed_of(*tasks.values()) if seed is None else seed)


def _try_measure(name: str, measure: Callable[[], Value], *, log: bool = True) -> Value | str:
    """Return what `measure` returns. If it fails, warn and return why: the other tasks still run."""
    try:
        return measure()
    except Exception as error:  # also out of memory
        reason = str(error) or type(error).__name__
        if log:
            logger.warning("%s was not measured: %s", name, reason, exc_info=unexpected(error))
        return reason


def join_results(results: Mapping[str, Result | str]) -> Result:
    """Join the results of tasks, or the reasons why they have none, in one result.

    Figures are called `NAME/figure`; the details of each task, such as `asked`, are under `tasks`.
    """
    figures, reasons = dict[str, float | None](), dict[str, str]()
    per_sample, tasks = dict[str, PerSample](), dict[str, Any]()
    for name, result in results.items():
        if isinstance(result, str):
            figures[name], reasons[name] = None, result
            continue
        figures |= {f"{name}/{figure}": value for figure, value in result.figures.items()}
        reasons |= {f"{name}/{figure}": reason for figure, reason in result.reasons.items()}
        per_sample |= {f"{name}/{figure}": values for figure, values in result.per_sample.items()}
        tasks[name] = {"asked": result.details["asked"], "samples": result.samples} | dict(result.details)
    return Result(
        figures=figures,
        samples=sum(task["samples"] for task in tasks.values()),
        reasons=reasons,
        per_sample=per_sample,
        details={"tasks": tasks},
    )


def build_suite(
    config: EvaluationConfig, processor: Processor, process_group: ProcessGroup = ProcessGroup()
) -> Suite | None:
    """Return the evaluator of everything that a recipe measures; None if it measures nothing.

    Its predictions are the captions of `config.captions`. Every rank must call it, since they share the
    images of retrieval and perhaps the model. The figures are the same on every rank. If a task or the captions fail on
    one rank, rank 0 warns, and the result has the other figures.

    A sharded model must have made a training step before: FSDP keeps the tensors that its first pass gathers into, and
    tensors of inference mode cannot be trained.

    Raises: FileNotFoundError, ValueError: as `build_evaluators` does.
    """
    captions = config.captions
    if captions is not None:
        list_shards(captions.data, key="evaluation.captions.data")  # a wrong path is found now, not hours later
    evaluators = build_evaluators(config.tasks, processor, process_group)
    if not evaluators and captions is None:
        return None

    def suite(model: CoCa) -> Result[list[SampleCaption]]:
        def measure(name: str, work: Callable[[], Value]) -> Value | str:
            return _try_measure(name, partial(run_on_every_rank, process_group, work), log=process_group.rank == 0)

        results = {name: measure(name, partial(evaluator, model)) for name, evaluator in evaluators.items()}
        written: list[SampleCaption] | str = []
        if captions is not None:
            written = measure("evaluation.captions", partial(generate_sample_captions, model, processor, captions))
        return replace(join_results(results), predictions=[] if isinstance(written, str) else written)

    return suite


def generate_sample_captions(model: CoCa, processor: Processor, config: SampleCaptionsConfig) -> list[SampleCaption]:
    """Return the model's captions of the first images, each with its references."""
    captioner, written = Captioner(model, processor), list[SampleCaption]()
    samples = islice((sample for batch in sample_batches(config.data, BATCH) for sample in batch), config.samples)
    while batch := list(islice(samples, BATCH)):
        captions = captioner.generate(image_pixels(batch, processor))
        written += [
            {"key": sample.key, "caption": caption.text, "references": tuple(sample.captions)}
            for sample, caption in zip(batch, captions, strict=True)
        ]
    return written
