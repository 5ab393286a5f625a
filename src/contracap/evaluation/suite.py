"""Several tasks as one: what a recipe wants measured while it trains, and what a file of tasks asks of a model."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from contracap.config import require_paths
from contracap.data.shards import list_shards
from contracap.evaluation.distributed import run_on_every_rank
from contracap.evaluation.features import picture_pixels, sample_batches
from contracap.evaluation.result import Evaluator, PerSample, Result, measure, unexpected
from contracap.evaluation.task import Shards, TaskConfig, asked, build_evaluator, seed_of
from contracap.generation.captioner import Captioner
from contracap.model.coca import CoCa
from contracap.parallel.process_group import ProcessGroup
from contracap.processor import Processor

BATCH = 16  # pictures captioned at a time
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SampleCaptionsConfig:
    """Captions to read, in captions.jsonl and on the boards.

    Attributes:
        data: folders of tar shards, or shards.
        samples: pictures, the first ones.
    """

    data: Shards
    samples: int = 16

    def __post_init__(self) -> None:
        require_paths(self, "data")
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured on the way, beside the losses; with none of it, nothing.

    Attributes:
        every: steps from one time to the next; there is always one at the end.
        tasks: by name; a figure is recorded as `NAME/figure`.
    """

    every: int = 1000
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    captions: SampleCaptionsConfig | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is {self.every}; it must be at least 1 step")

    @property
    def writes(self) -> bool:
        """Whether the model must have a decoder."""
        return self.captions is not None or any(task.writes for task in self.tasks.values())


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """A file of tasks, each a table `[tasks.NAME]`."""

    tasks: dict[str, TaskConfig]

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("there is no task: give each a table [tasks.NAME]")


def build_evaluators(
    tasks: Mapping[str, TaskConfig], processor: Processor, process_group: ProcessGroup = ProcessGroup()
) -> dict[str, Evaluator]:
    """What measures each of the tasks, on this rank of `process_group`.

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
    """Measures one task after the other. Figures are called `NAME/figure`; what was asked, and details, stand under
    `tasks`. A task that fails costs its own figures only: in their place its name is null, with the reason.

    Raises: FileNotFoundError, ValueError: as `build_evaluators` does, before anything is computed.
    """
    figures, reasons = dict[str, float | None](), dict[str, str]()
    per_sample, details, samples = dict[str, PerSample](), dict[str, Any](), 0
    for name, evaluator in build_evaluators(tasks, processor).items():
        try:
            result = measure(evaluator, model, command=command)
        except Exception as error:  # out of memory, for one: a single task is no reason to lose the others
            logger.warning("%s was not measured: %s", name, error, exc_info=unexpected(error))
            figures[name], reasons[name] = None, str(error) or type(error).__name__
            continue
        logger.info("%s: %s", name, ", ".join(f"{figure} {value}" for figure, value in result.figures.items()))
        figures |= {f"{name}/{figure}": value for figure, value in result.figures.items()}
        reasons |= {f"{name}/{figure}": reason for figure, reason in result.reasons.items()}
        per_sample |= {f"{name}/{figure}": values for figure, values in result.per_sample.items()}
        details[name] = {"asked": asked(tasks[name]), "samples": result.samples} | dict(result.details)
        samples += result.samples
    return Result(
        command=command,
        seed=seed_of(*tasks.values()) if seed is None else seed,
        samples=samples,
        figures=figures,
        reasons=reasons,
        per_sample=per_sample,
        details={"tasks": details},
    )


@dataclass(frozen=True, kw_only=True)
class SampleCaption:
    """What a model writes for one picture, beside what people wrote."""

    key: str
    caption: str
    references: tuple[str, ...]


class Suite:
    """The evaluators of an `EvaluationConfig`, in the shape of one.

    Every rank must run it to its end: they share the pictures of retrieval, and maybe the model, which must have made a
    training step before then: FSDP keeps the tensors that its first pass gathers into, and those of inference mode
    cannot be trained on. The figures are the same on every rank.

    Attributes:
        captions: written by the last `run`, ready for JSON.
    """

    def __init__(self, config: EvaluationConfig, processor: Processor, process_group: ProcessGroup = ProcessGroup()):
        """`process_group`: the ranks that run it together.

        Raises: FileNotFoundError, ValueError: as `build_evaluators` does."""
        if config.captions is not None:
            list_shards(
                config.captions.data, key="evaluation.captions.data"
            )  # a wrong path is found now, not hours later
        self._config, self._processor = config.captions, processor
        self._process_group = process_group
        self._evaluators = build_evaluators(config.tasks, processor, process_group)
        self.captions: list[Mapping[str, Any]] = []

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._evaluators) or self._config is not None

    def run(self, model: CoCa) -> Iterator[tuple[str, float]]:
        """Name and value of each figure, such as `flickr8k/text_to_image_recall@1`.

        Raises: Exception: as the evaluators do; on the other ranks a ValueError that says the same, so that none waits
            for one that has failed.
        """
        for name, evaluator in self._evaluators.items():
            figures = run_on_every_rank(self._process_group, lambda evaluator=evaluator: list(evaluator.run(model)))
            yield from ((f"{name}/{figure}", value) for figure, value in figures)
        if (config := self._config) is not None:
            captions = run_on_every_rank(self._process_group, lambda: list(self._write_captions(model, config)))
            self.captions = [asdict(caption) for caption in captions]

    def _write_captions(self, model: CoCa, config: SampleCaptionsConfig) -> Iterator[SampleCaption]:
        captioner = Captioner(model, self._processor)
        samples = islice((sample for batch in sample_batches(config.data, BATCH) for sample in batch), config.samples)
        while batch := list(islice(samples, BATCH)):
            written = captioner.generate(picture_pixels(batch, self._processor))
            for sample, caption in zip(batch, written, strict=True):
                yield SampleCaption(key=sample.key, caption=caption.text, references=tuple(sample.captions))
