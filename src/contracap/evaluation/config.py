"""Evaluations of a model: one task, several, or those of a training run.

Imports no torch, because the command line makes its flags of these classes.
"""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Literal

from contracap.config import ConfigError, SettingsHelp, assign, build, keys_text, require_paths, to_dict
from contracap.evaluation.metrics.scores import metric_names
from contracap.evaluation.metrics.tokens import TokenizerName

if TYPE_CHECKING:
    from contracap.generation.strategy import Strategy

Task = Literal["retrieval", "captioning", "zeroshot", "vqa"]
Shards = str | tuple[str, ...]

# The fields that each task takes, in addition to `task` and `data`
TASK_FIELDS: dict[Task, tuple[str, ...]] = {
    "retrieval": ("caption_lines",),
    "captioning": (
        *("caption_lines", "metrics", "tokenizer", "corenlp_dir", "spice_memory", "clipscore"),
        *("strategy", "settings"),
    ),
    "zeroshot": ("classes", "templates"),
    "vqa": ("answers", "prompt", "strategy", "settings"),
}


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One task, from the command line, a recipe or a file of tasks."""

    task: Task
    """Kind of evaluation."""
    data: Annotated[Shards, "PATH [PATH ...]"]
    """Tar shards, or folders of tar shards. For `zeroshot` also a folder with a subfolder of images for each class.
    For `vqa` also a file of questions in the format of VQAv2 or OK-VQA, followed by the folder of its images if
    that is elsewhere."""
    classes: Annotated[str | None, "NAME|FILE"] = None
    """For `zeroshot`: a published set, such as `imagenet1k`, or a file of names in the order of the labels: a .txt with
    one a line, a JSON list, or a JSON object with a list `classes`. The default is the names of the subfolders."""
    templates: Annotated[str | None, "NAME|FILE"] = None
    """For `zeroshot`: a published set or a file, as for `classes`, or a single template, such as `a photo of a {}`.
    Each has {} where the name goes. The default is the templates of the published classes, or eight for photographs."""
    caption_lines: bool = True
    """For `retrieval` and `captioning`: whether each line of a `.txt` is a caption; otherwise the whole file is one."""
    metrics: Annotated[str | tuple[str, ...], "NAME"] = ()
    """For `captioning`: bleu, rouge_l, cider, meteor, spice or cider_plain. The default is all that can run, except
    `cider_plain`."""
    tokenizer: TokenizerName | None = None
    """For `captioning`: `java` is the tokenizer of published figures, and the default where it can run."""
    corenlp_dir: Annotated[str | None, "DIR"] = None
    """For SPICE: folder with the jars of CoreNLP 3.6.0. The default is $CONTRACAP_CORENLP_DIR."""
    spice_memory: Annotated[str | None, "SIZE"] = None
    """For SPICE: the most memory that Java may use, in the form of its option -Xmx. The default is 8g."""
    clipscore: Annotated[str | None, "WEIGHTS"] = None
    """For `captioning`: weights that compute CLIPScore and RefCLIPScore; `self` is the model that writes the
    captions."""
    answers: Annotated[str | None, "FILE"] = None
    """For `vqa`: a file of answers to choose from: a .txt with one a line, a JSON list, or a JSON object with a list
    `answers`. By default the model writes the answer."""
    prompt: Annotated[str | None, "TEXT"] = None
    """For `vqa`: the text before an answer, with {} where the question goes. The default is `question: {} answer:`."""
    strategy: Annotated[str | None, "NAME"] = None
    """For `captioning` and `vqa`: greedy, beam, sample, legacy or rerank. The default is beam search for captions and
    greedy decoding for answers. Unless settings say otherwise, `max_tokens` and `min_tokens` are 30 and 5 for captions,
    76 and 0 for answers."""
    settings: Annotated[tuple[str, ...], "[KEY=VALUE ...]"] = ()
    """Settings of the strategy, such as `width=3`; `contracap caption WEIGHTS --set help` lists them."""

    def __post_init__(self) -> None:
        names = (self.metrics,) if isinstance(self.metrics, str) else self.metrics
        object.__setattr__(self, "metrics", metric_names(names))
        if not self.data:
            raise ValueError("there is nothing to measure on: give `data`, folders of tar shards, or shards")
        require_paths(self, "data", "classes", "templates", "corenlp_dir", "clipscore", "answers")
        first = self.data if isinstance(self.data, str) else self.data[0]
        if first.endswith(".json") and self.task != "vqa":
            raise ValueError(
                f"{first} is not a tar shard; {self.task} needs some: contracap shards make {first} --out DIR"
            )
        taken = ["data", *TASK_FIELDS[self.task]]
        for each in fields(self):
            if getattr(self, each.name) != each.default and each.name not in ("task", *taken):
                raise ValueError(f"{self.task} takes no {each.name}; what it takes is {', '.join(taken)}")
        if self.answers is not None and (self.strategy or self.settings):
            raise ValueError("an answer is chosen from `answers` or written by a strategy: leave one of them out")
        if self.writes:
            self.build_strategy()

    @property
    def writes(self) -> bool:
        """True if the model must have a decoder."""
        return self.task in ("captioning", "vqa")

    @property
    def reads(self) -> list[str]:
        """The paths it reads, and names of published classes and templates."""
        data = [self.data] if isinstance(self.data, str) else self.data
        named = (self.classes, self.templates, self.clipscore, self.answers)
        return [*data, *(name for name in named if name is not None)]

    def build_strategy(self) -> "Strategy":
        """Return the named strategy, or the default of the task, with these settings.

        Unless a setting says otherwise, its `max_tokens` and `min_tokens` are those of the default.
        """
        from contracap.generation.registry import STRATEGIES

        try:
            return self._build_strategy()
        except ConfigError as error:
            if self.strategy is None or self.strategy in STRATEGIES:
                raise ConfigError(f"settings: {error}") from None
            raise

    def _build_strategy(self) -> "Strategy":
        from contracap.evaluation.vqa import STRATEGY as ANSWERING
        from contracap.generation.beam import BeamSearch
        from contracap.generation.registry import build_strategy

        usual: Strategy = ANSWERING if self.task == "vqa" else BeamSearch()
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


@dataclass(frozen=True, kw_only=True)
class SampleCaptionsConfig:
    """Captions for people to read, in captions.jsonl and TensorBoard."""

    data: Shards
    """Tar shards, or folders of tar shards."""
    samples: int = 16
    """Number of images, from the start of the data."""

    def __post_init__(self) -> None:
        require_paths(self, "data")
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation during training, in addition to the losses; none by default."""

    every: int = 1000
    """Steps between evaluations; there is always one at the end."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Tasks by name; metrics are recorded as `NAME/metric`."""
    captions: SampleCaptionsConfig | None = None
    """Sample captions, written to captions.jsonl at each evaluation."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is {self.every}; it must be at least 1 step")

    @property
    def writes(self) -> bool:
        """True if the model must have a decoder."""
        return self.captions is not None or any(task.writes for task in self.tasks.values())


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """A file of tasks, each a table `[tasks.NAME]`."""

    tasks: dict[str, TaskConfig]

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("there is no task: give each a table [tasks.NAME]")
