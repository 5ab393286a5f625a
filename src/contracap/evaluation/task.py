"""One thing that can be measured of a model, and the evaluator that measures it."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from contracap.config import build, to_dict
from contracap.data.captions import require_captions
from contracap.data.questions import questions
from contracap.data.samples import SampleError
from contracap.data.shards import layout_fault
from contracap.evaluation.captioning import evaluate_captioning
from contracap.evaluation.features import opened, sample_batches
from contracap.evaluation.metrics.clipscore import ClipScorer
from contracap.evaluation.metrics.scores import CaptionScorer
from contracap.evaluation.metrics.spice import MEMORY
from contracap.evaluation.predictions import Prediction
from contracap.evaluation.result import Evaluator, Result
from contracap.evaluation.retrieval import evaluate_retrieval
from contracap.evaluation.task_config import Task, TaskConfig
from contracap.evaluation.vqa import PROMPT, Answered, answering, check_prompt, evaluate_vqa, load_answers
from contracap.evaluation.zeroshot import (
    check_templates,
    evaluate_zeroshot,
    label_of,
    load_classes,
    load_templates,
    named_classes,
    templates_of,
)
from contracap.generation.reranking import split
from contracap.generation.sampling import Sampling
from contracap.model.coca import CoCa
from contracap.parallel.process_group import ProcessGroup
from contracap.pretrained import load_on_device
from contracap.processor import Processor


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
