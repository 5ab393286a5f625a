"""Evaluators of one task: from its configuration to a function that measures a model."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from contracap.config import build, to_dict
from contracap.data.captions import require_captions
from contracap.data.questions import parse_questions
from contracap.data.samples import SampleError
from contracap.data.shards import layout_fault
from contracap.evaluation.answers import AnswerChooser, AnswerWriter
from contracap.evaluation.captioning import evaluate_captioning
from contracap.evaluation.class_names import check_templates, load_classes, load_templates, templates_for
from contracap.evaluation.config import Task, TaskConfig
from contracap.evaluation.features import open_source, sample_batches
from contracap.evaluation.metrics.clipscore import ClipScorer
from contracap.evaluation.metrics.scores import CaptionScorer
from contracap.evaluation.metrics.spice import MEMORY
from contracap.evaluation.predictions import Prediction
from contracap.evaluation.result import Evaluator, Result
from contracap.evaluation.retrieval import evaluate_retrieval
from contracap.evaluation.vqa import PROMPT, Answer, check_prompt, evaluate_vqa, load_answers
from contracap.evaluation.zeroshot import evaluate_zeroshot, label_of, match_classes
from contracap.generation.reranking import ContrastiveReranking
from contracap.generation.sampling import Sampling
from contracap.model.coca import CoCa
from contracap.parallel.process_group import ProcessGroup
from contracap.pretrained import load
from contracap.processor import Processor


def seed_of(*tasks: TaskConfig) -> int | None:
    """Return the seed with which these tasks sample texts; None if none samples, or if the seeds differ."""
    strategies = [task.build_strategy() for task in tasks if task.writes]
    strategies = [each.of if isinstance(each, ContrastiveReranking) else each for each in strategies]
    seeds = {strategy.seed for strategy in strategies if isinstance(strategy, Sampling)}
    return seeds.pop() if len(seeds) == 1 else None


def build_evaluator(
    config: TaskConfig,
    processor: Processor,
    process_group: ProcessGroup = ProcessGroup(),
    on_predictions: Callable[[Sequence[Prediction | Answer]], object] = lambda _: None,
) -> Evaluator:
    """Return the evaluator of a task. Its results hold the configuration, without defaults, as the detail `asked`.

    Files and the first sample are read now, so that a wrong path is found before hours of work.

    Args:
        process_group: the ranks that run it together. They share retrieval; each rank runs the other tasks whole.
        on_predictions: called with the texts that the model wrote, before they are scored; for `captioning` and `vqa`.

    Raises: FileNotFoundError, ValueError: if there are no samples, or a file or the first sample lacks what it needs.
    """
    evaluate = _bind_task(config, process_group, on_predictions)
    changed = {field.name for field in fields(config) if getattr(config, field.name) != field.default}
    asked = {name: value for name, value in to_dict(config).items() if name in changed}

    def evaluator(model: CoCa) -> Result:
        result = evaluate(model, processor)
        return replace(result, seed=seed_of(config), details={"asked": asked} | dict(result.details))

    return evaluator


def _bind_task(
    config: TaskConfig, process_group: ProcessGroup, on_predictions: Callable[[Sequence[Any]], object]
) -> Callable[[CoCa, Processor], Result]:
    """Return the evaluation function of a task with all arguments except the model and the processor."""
    data = open_source(config.data, lines=config.caption_lines)
    first = next(sample_batches(data, 1))[0]
    if config.task in ("retrieval", "captioning"):
        try:
            require_captions(first)
        except SampleError as error:
            raise ValueError(f"{error}, which {config.task} compares with.{layout_fault(first.shard)}") from None
    if config.task == "zeroshot":
        data, classes = match_classes(config.data, load_classes(config.classes) if config.classes else None)
        templates = load_templates(config.templates) if config.templates else templates_for(config.classes)
        label_of(first, len(classes))
        return partial(evaluate_zeroshot, data=data, classes=classes, templates=check_templates(templates))
    if config.task == "retrieval":
        return partial(evaluate_retrieval, data=data, process_group=process_group)
    if config.task == "vqa":
        parse_questions(first)
        answers = load_answers(config.answers) if config.answers else ()
        answerer = AnswerChooser(answers) if answers else AnswerWriter(config.build_strategy())
        prompt = check_prompt(PROMPT if config.prompt is None else config.prompt)
        return partial(evaluate_vqa, data=data, answerer=answerer, prompt=prompt, on_predictions=on_predictions)
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
        clipscore="self" if config.clipscore == "self" else _load_judge(config.clipscore),
        process_group=process_group,
        on_predictions=on_predictions,
    )


def _load_judge(weights: str | None) -> ClipScorer | None:
    return None if weights is None else ClipScorer(*load(weights, precision="fp32"), name=weights)


def evaluate(
    model: CoCa, processor: Processor, *, task: Task, data: str | Path | Sequence[str | Path], **options: Any
) -> Result:
    """Measure one task of a model, as `contracap evaluate --task` does.

    Args:
        data: folders of tar shards, or shards, as `TaskConfig` has them.
        options: other fields of `TaskConfig`, such as `classes="imagenet1k"`.

    Raises: FileNotFoundError, ValueError: if the data or an option is wrong.
    """
    paths = [data] if isinstance(data, str | Path) else data
    values = {"task": task, "data": [str(path) for path in paths], **options}
    config = build(TaskConfig, values)
    command = f"contracap.evaluate({', '.join(f'{name}={value!r}' for name, value in values.items())})"
    return replace(build_evaluator(config, processor)(model), command=command)
