"""One thing that can be measured of a model, and the evaluator that measures it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from contracap.config import SettingsHelp, assign, build, keys_text, require_paths, to_dict
from contracap.data.captions import require_captions
from contracap.data.questions import questions
from contracap.data.shards import SampleError, layout_fault
from contracap.evaluation.captioning import Prediction, evaluate_captioning
from contracap.evaluation.clipscore import ClipScorer
from contracap.evaluation.features import opened, sample_batches
from contracap.evaluation.result import Evaluator, Result
from contracap.evaluation.retrieval import evaluate_retrieval
from contracap.evaluation.scores import CaptionScorer, MetricName, metric_names
from contracap.evaluation.spice import MEMORY
from contracap.evaluation.tokens import TokenizerName
from contracap.evaluation.vqa import PROMPT, Answered, answering, check_prompt, evaluate_vqa, load_answers
from contracap.evaluation.vqa import STRATEGY as ANSWERING
from contracap.evaluation.zeroshot import (
    check_templates,
    evaluate_zeroshot,
    label_of,
    load_classes,
    load_templates,
    named_classes,
    templates_of,
)
from contracap.generation.beam import BeamSearch
from contracap.generation.choice import build_strategy
from contracap.generation.reranking import split
from contracap.generation.sampling import Sampling
from contracap.generation.strategy import Strategy
from contracap.model.coca import CoCa
from contracap.parallel.process_group import ProcessGroup
from contracap.pretrained import load_on_device
from contracap.processor import Processor

Task = Literal["retrieval", "captioning", "zeroshot", "vqa"]
Shards = str | tuple[str, ...]

COMMON = ("task", "data")
TAKES: dict[Task, tuple[str, ...]] = {
    "retrieval": ("caption_lines",),
    "captioning": (
        "caption_lines",
        "metrics",
        "tokenizer",
        "corenlp_dir",
        "spice_memory",
        "clipscore",
        "strategy",
        "settings",
    ),
    "zeroshot": ("classes", "templates"),
    "vqa": ("answers", "prompt", "strategy", "settings"),
}
STRATEGIES: dict[Task, Strategy] = {"captioning": BeamSearch(), "vqa": ANSWERING}


def _named_metrics(value: object) -> object:
    names = [value] if isinstance(value, str) else value
    is_texts = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return metric_names(names) if is_texts else value


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One task, from the command line, a recipe or a file of tasks."""

    task: Task
    """What is measured."""
    data: Shards
    """Tar shards, or folders of tar shards. For `zeroshot` also a folder with a subfolder of images for each class.
    For `vqa` also a file of questions in the format of VQAv2 or OK-VQA, followed by the folder of its images if
    that is elsewhere."""
    classes: str | None = None
    """For `zeroshot`: a published set, such as `imagenet1k`, or a JSON file with a list of names in the order of
    the labels, or with an object whose `classes` is such a list. The default is the names of the subfolders."""
    templates: str | None = None
    """For `zeroshot`: a published set or a JSON file, like `classes`, with {} where the name goes. The default is
    the templates of the published classes, or eight for photographs."""
    caption_lines: bool = True
    """For `retrieval` and `captioning`: whether each line of a `.txt` is a caption; otherwise the whole file is one."""
    metrics: Annotated[tuple[MetricName, ...], BeforeValidator(_named_metrics)] = ()
    """For `captioning`: the metrics to compute. The default is all that can run, except `cider_plain`."""
    tokenizer: TokenizerName | None = None
    """For `captioning`: `java` is the tokenizer behind published figures, and the default where it can run."""
    corenlp_dir: str | None = None
    """For SPICE: folder with the jars of CoreNLP 3.6.0. The default is $CONTRACAP_CORENLP_DIR."""
    spice_memory: str | None = None
    """For SPICE: the most memory that Java may use, in the form of its option -Xmx. The default is 8g."""
    clipscore: str | None = None
    """For `captioning`: weights that compute CLIPScore and RefCLIPScore; `self` is the model that writes the
    captions."""
    answers: str | None = None
    """For `vqa`: a JSON file with a list of answers to choose from, or with an object whose `answers` is such a
    list. By default the model writes the answer."""
    prompt: str | None = None
    """For `vqa`: the text before an answer, with {} where the question goes. The default is `question: {} answer:`."""
    strategy: str | None = None
    """For `captioning` and `vqa`: the decoding strategy. The default is beam search for captions and greedy
    decoding for answers. Unless `settings` say otherwise, `max_tokens` and `min_tokens` are 30 and 5 for captions,
    76 and 0 for answers."""
    settings: tuple[str, ...] = ()
    """Settings of the strategy, `key=value` each."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("there is nothing to measure on: --data PATH, a folder of tar shards, or shards")
        require_paths(self, "data", "classes", "templates", "corenlp_dir", "clipscore", "answers")
        first = self.data if isinstance(self.data, str) else self.data[0]
        if first.endswith(".json") and self.task != "vqa":
            raise ValueError(
                f"{first} is no tar shard; {self.task} wants it made into some: contracap shards make {first} --out DIR"
            )
        taken = (*COMMON, *TAKES[self.task])
        for field in fields(self):
            if getattr(self, field.name) != field.default and field.name not in taken:
                raise ValueError(
                    f"{self.task} takes no {field.name}; what it takes is {', '.join((*COMMON[1:], *TAKES[self.task]))}"
                )
        if self.answers is not None and (self.strategy or self.settings):
            raise ValueError("an answer is chosen from `answers` or written by a strategy: leave one of them out")
        if self.writes:
            self.build_strategy()

    @property
    def writes(self) -> bool:
        """Whether the model must have a decoder."""
        return self.task in ("captioning", "vqa")

    @property
    def reads(self) -> list[str]:
        """The paths it reads, or the names of what has no path, as of published classes."""
        data = [self.data] if isinstance(self.data, str) else self.data
        named = (self.classes, self.templates, self.clipscore, self.answers)
        return [*data, *(name for name in named if name is not None)]

    def build_strategy(self) -> Strategy:
        """How words are chosen: by the named strategy, or as the task has it, with these settings; texts are as long
        as the task has them, if no setting says otherwise."""
        usual = STRATEGIES[self.task]
        if self.strategy is not None:
            of = "of." if self.strategy == "rerank" else ""
            lengths = (f"{of}{name}={to_dict(usual)[name]}" for name in ("max_tokens", "min_tokens"))
            return build_strategy(self.strategy, (*lengths, *self.settings))
        if "help" in self.settings:
            raise SettingsHelp(keys_text(type(usual)))
        values = to_dict(usual)
        for setting in self.settings:
            assign(values, setting)
        return build(type(usual), values)


def seed_of(*tasks: TaskConfig) -> int | None:
    """The seed that the words of all these tasks are drawn with; None if none are drawn, or if there are several seeds:
    what was asked tells them."""
    writers = [split(task.build_strategy())[0] for task in tasks if task.writes]
    seeds = {writer.seed for writer in writers if isinstance(writer, Sampling)}
    return seeds.pop() if len(seeds) == 1 else None


def asked(config: TaskConfig) -> dict[str, Any]:
    """What a task says beyond the defaults, as plain values."""
    changed = {field.name for field in fields(config) if getattr(config, field.name) != field.default}
    return {name: value for name, value in to_dict(config).items() if name in changed}


def build_evaluator(
    config: TaskConfig,
    processor: Processor,
    process_group: ProcessGroup = ProcessGroup(),
    on_predictions: Callable[[Sequence[Prediction | Answered]], object] = lambda _: None,
) -> Evaluator:
    """Return what measures a task; its results say what was asked. The files and the first sample are read now: a wrong
    path is found before hours of work, not after.

    Args:
        process_group: the ranks that run it together. They share retrieval; each of them runs the other tasks whole.
        on_predictions: called with what the model wrote, before it is scored; for `captioning` and `vqa`.

    Raises: FileNotFoundError, ValueError: if there are no samples, or a file or the first sample lacks what it needs.
    """
    evaluate = _prepared(config, process_group, on_predictions)

    def evaluator(model: CoCa) -> Result:
        result = evaluate(model, processor)
        return replace(result, seed=seed_of(config), details={"asked": asked(config)} | dict(result.details))

    return evaluator


def _prepared(
    config: TaskConfig, process_group: ProcessGroup, on_predictions: Callable[[Sequence[Any]], object]
) -> Callable[[CoCa, Processor], Result]:
    """Return the evaluation of a task with all its arguments but the model and the processor."""
    data = opened(config.data, lines=config.caption_lines)
    first = next(sample_batches(data, 1))[0]
    if config.task in ("retrieval", "captioning"):
        try:
            require_captions(first)
        except SampleError as error:
            raise ValueError(f"{error}, which {config.task} compares with.{layout_fault(first.shard)}") from None
    if config.task == "zeroshot":
        data, classes = named_classes(config.data, load_classes(config.classes) if config.classes else None)
        templates = load_templates(config.templates) if config.templates else templates_of(config.classes)
        label_of(first, len(classes))
        return partial(evaluate_zeroshot, data=data, classes=classes, templates=check_templates(templates))
    if config.task == "retrieval":
        return partial(evaluate_retrieval, data=data, process_group=process_group)
    if config.task == "vqa":
        questions(first)
        answers = load_answers(config.answers) if config.answers else ()
        prompt = check_prompt(PROMPT if config.prompt is None else config.prompt)
        answer = answering(answers, config.build_strategy())
        return partial(evaluate_vqa, data=data, answer=answer, prompt=prompt, on_predictions=on_predictions)
    scorer = CaptionScorer(
        metrics=config.metrics,
        tokenizer=config.tokenizer,
        corenlp=config.corenlp_dir,
        spice_memory=config.spice_memory or MEMORY,
    )
    return partial(
        evaluate_captioning,
        data=data,
        strategy=config.build_strategy(),
        scorer=scorer,
        clipscore="self" if config.clipscore == "self" else _judge(config.clipscore),
        process_group=process_group,
        on_predictions=on_predictions,
    )


def _judge(weights: str | None) -> ClipScorer | None:
    if weights is None:
        return None
    return ClipScorer(*load_on_device(weights), name=weights)


def evaluate(
    model: CoCa, processor: Processor, *, task: Task, data: str | Path | Sequence[str | Path], **options: Any
) -> Result:
    """Measure one task of a model, as `contracap evaluate --task` does.

    Args:
        data: folders of tar shards, or shards, as `TaskConfig` has them.
        options: other fields of `TaskConfig`, such as `classes="imagenet1k"`.

    Returns: a result whose `figures` go from name to number.

    Raises: FileNotFoundError, ValueError: if the data or an option is wrong.
    """
    paths = [data] if isinstance(data, str | Path) else data
    values = {"task": task, "data": [str(path) for path in paths], **options}
    config = build(TaskConfig, values)
    command = f"contracap.evaluate({', '.join(f'{name}={value!r}' for name, value in values.items())})"
    return replace(build_evaluator(config, processor)(model), command=command)
