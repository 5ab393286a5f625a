"""What a recipe wants measured while it trains: several evaluators as one."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from contracap.data.shards import list_shards
from contracap.evaluation.features import picture_pixels, sample_batches
from contracap.evaluation.processes import ALONE, Processes
from contracap.evaluation.result import Evaluator
from contracap.evaluation.retrieval import Retrieval
from contracap.evaluation.zeroshot import TEMPLATES, ZeroShot, load_classes, load_templates
from contracap.generation.captioner import Captioner
from contracap.model.coca import CoCa
from contracap.processor import Processor

Shards = str | tuple[str, ...]
BATCH = 16  # pictures captioned at a time


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig:
    """Classification without training.

    Attributes:
        data: folders of tar shards, or shards, whose samples have a label.
        classes: a JSON list of names, in the order of the labels, or a JSON object with such a list `classes`.
        templates: a JSON list of prompts, {} where the name goes; by default eight of photographs.
    """

    data: Shards
    classes: str
    templates: str | None = None


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
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured on the way, beside the losses; with none of it, nothing.

    Attributes:
        every: steps from one time to the next; there is always one at the end.
        retrieval: folders of tar shards, or shards, to rank.
    """

    every: int = 1000
    retrieval: Shards | None = None
    zeroshot: ZeroShotConfig | None = None
    captions: SampleCaptionsConfig | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is {self.every}; it must be at least 1 step")


@dataclass(frozen=True, kw_only=True)
class SampleCaption:
    """What a model writes for one picture, beside what people wrote."""

    key: str
    caption: str
    references: tuple[str, ...]


class Suite:
    """The evaluators of an `EvaluationConfig`, in the shape of one.

    Every rank must run it to its end: they share the pictures to rank, and maybe the model, which must have made a
    training step before then: FSDP keeps the tensors that its first pass gathers into, and those of inference mode
    cannot be trained on. The figures are the same on every rank.

    Attributes:
        captions: written by the last `run`, ready for JSON.
    """

    def __init__(self, config: EvaluationConfig, processor: Processor, processes: Processes = ALONE):
        """`processes`: the ranks.

        Raises: FileNotFoundError, ValueError: if shards are missing, or a file does not hold what it should, such as
        a label in the first sample of `zeroshot`."""
        tables = [table.data for table in (config.zeroshot, config.captions) if table is not None]
        for data in [*tables, *([config.retrieval] if config.retrieval is not None else [])]:
            list_shards(data)  # a wrong path is found now, not hours later
        self._config, self._processor = config.captions, processor
        self._evaluators: dict[str, Evaluator] = {}
        if config.retrieval is not None:
            self._evaluators["retrieval"] = Retrieval(config.retrieval, processor, processes=processes)
        if (zeroshot := config.zeroshot) is not None:
            templates = load_templates(zeroshot.templates) if zeroshot.templates else TEMPLATES
            classes = load_classes(zeroshot.classes)
            evaluator = ZeroShot(zeroshot.data, processor, classes=classes, templates=templates)
            evaluator.label(next(sample_batches(zeroshot.data, 1))[0])
            self._evaluators["zeroshot"] = evaluator
        self.captions: list[Mapping[str, Any]] = []

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._evaluators) or self._config is not None

    def run(self, model: CoCa) -> Iterator[tuple[str, float]]:
        """Name and value of each figure, such as `retrieval/text_to_image_recall@1`.

        Raises: ValueError: as the evaluators do.
        """
        for name, evaluator in self._evaluators.items():
            yield from ((f"{name}/{figure}", value) for figure, value in evaluator.run(model))
        if self._config is not None:
            self.captions = [asdict(caption) for caption in self._write_captions(model, self._config)]

    def _write_captions(self, model: CoCa, config: SampleCaptionsConfig) -> Iterator[SampleCaption]:
        captioner = Captioner(model, self._processor)
        samples = islice((sample for batch in sample_batches(config.data, BATCH) for sample in batch), config.samples)
        while batch := list(islice(samples, BATCH)):
            written = captioner.generate(picture_pixels(batch, self._processor))
            for sample, caption in zip(batch, written, strict=True):
                yield SampleCaption(key=sample.key, caption=caption.text, references=tuple(sample.captions))
