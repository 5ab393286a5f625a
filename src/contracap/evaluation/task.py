"""One thing that can be measured of a model, and the evaluator that measures it."""

from dataclasses import dataclass
from typing import Literal

from contracap.evaluation.captioning import Captioning
from contracap.evaluation.features import sample_batches
from contracap.evaluation.result import Evaluator
from contracap.evaluation.retrieval import Retrieval
from contracap.evaluation.zeroshot import TEMPLATES, ZeroShot, load_classes, load_templates
from contracap.generation.choice import build_strategy
from contracap.processor import Processor

Shards = str | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A task: of the command line, of a recipe, or of a file of tasks.

    Attributes:
        task: what is measured.
        data: folders of tar shards, or shards.
        classes: for `zeroshot`: a JSON list of names, in the order of the labels, or a JSON object with such a list
            `classes`.
        templates: for `zeroshot`: a JSON list of prompts, {} where the name goes; by default eight of photographs.
        strategy: for `captioning`: how words are chosen.
        settings: of the strategy, `key=value` each.
    """

    task: Literal["retrieval", "captioning", "zeroshot"]
    data: Shards
    classes: str | None = None
    templates: str | None = None
    strategy: str = "beam"
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.task == "zeroshot" and self.classes is None:
            raise ValueError(
                "zeroshot needs the names of the classes: --classes FILE, a JSON list in the order of the labels"
            )
        build_strategy(self.strategy, self.settings)

    @property
    def writes(self) -> bool:
        """Whether the model must have a decoder."""
        return self.task == "captioning"


def build_evaluator(config: TaskConfig, processor: Processor) -> Evaluator:
    """What measures a task. Its files and its first sample are looked at: a wrong path is found now, not hours later.

    Raises: FileNotFoundError, ValueError: if there are no samples, or a file or the first sample lacks what it needs.
    """
    first = next(sample_batches(config.data, 1))[0]
    if config.task == "zeroshot":
        assert config.classes is not None  # or there would be no such task
        templates = load_templates(config.templates) if config.templates else TEMPLATES
        evaluator = ZeroShot(config.data, processor, classes=load_classes(config.classes), templates=templates)
        evaluator.label(first)
        return evaluator
    if config.task == "retrieval":
        return Retrieval(config.data, processor)
    return Captioning(config.data, processor, strategy=build_strategy(config.strategy, config.settings))
