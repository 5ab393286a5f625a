"""The verb that measures a model. The result is written before it is printed: a pipe that is
closed must not cost what took hours."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from contracap.cli.errors import interruption, written
from contracap.cli.options import (
    AllowCommands,
    OptionalStrategyName,
    PathText,
    ResultFile,
    Settings,
    Size,
    WeightsName,
    arg,
    check_outputs,
    command_line,
    load_model,
)
from contracap.evaluation.scores import METRICS, ONE_IMAGE, metric_names
from contracap.evaluation.tokens import TokenizerName

if TYPE_CHECKING:
    from contracap.evaluation.captioning import Prediction
    from contracap.evaluation.vqa import Answered


@interruption("interrupted: no figure was written; the same command begins anew")
def evaluate(
    weights: WeightsName,
    /,
    *,
    task: Annotated[Literal["retrieval", "captioning", "zeroshot", "vqa"] | None, arg(help="what to measure")] = None,
    data: Annotated[
        tuple[PathText, ...],
        arg(
            metavar="PATH [PATH ...]",
            help="folders of tar shards, or shards; for zeroshot also a folder of class folders, for vqa VQAv2's file",
        ),
    ] = (),
    classes: Annotated[
        PathText | None,
        arg(metavar="NAME|FILE", help="for zeroshot: a published set, such as imagenet1k, or a JSON list of names"),
    ] = None,
    templates: Annotated[
        PathText | None, arg(metavar="NAME|FILE", help="for zeroshot: likewise, prompts with {} where the name goes")
    ] = None,
    caption_lines: Annotated[
        bool, arg(help="for retrieval and captioning: each line of a .txt is a caption; else the whole text is one")
    ] = True,
    metrics: Annotated[
        tuple[str, ...],
        arg(metavar="NAME", help=f"for captioning: {', '.join(METRICS)}; by default all but the last that can run"),
    ] = (),
    tokenizer: Annotated[
        TokenizerName | None,
        arg(help="for captioning: java is the one of the published figures, and taken where it can run"),
    ] = None,
    corenlp_dir: Annotated[
        PathText | None,
        arg(metavar="DIR", help="for spice: the jars of CoreNLP 3.6.0; by default CONTRACAP_CORENLP_DIR"),
    ] = None,
    spice_memory: Annotated[
        str | None, arg(metavar="SIZE", help="for spice: the most that Java may use, such as 4g; by default 8g")
    ] = None,
    clipscore: Annotated[
        PathText | None,
        arg(metavar="WEIGHTS", help="for captioning: adds CLIPScore and RefCLIPScore by these weights, or by `self`"),
    ] = None,
    answers: Annotated[
        PathText | None,
        arg(metavar="FILE", help="for vqa: a JSON list of answers to choose from, or a JSON object with `answers`"),
    ] = None,
    prompt: Annotated[
        str | None,
        arg(metavar="TEXT", help='for vqa: what comes before an answer, such as the default "question: {} answer:"'),
    ] = None,
    strategy: OptionalStrategyName = None,
    settings: Settings = (),
    tasks: Annotated[
        Path | None,
        arg(metavar="TASKS.toml", help="several tasks instead, a table [tasks.NAME] each, with the flags as its keys"),
    ] = None,
    predictions: Annotated[
        Path | None,
        arg(metavar="OUT.json", help="for one task, captioning or vqa: file for what the model writes"),
    ] = None,
    allow_commands: AllowCommands = False,
    size: Size = None,
    json: ResultFile = None,
) -> int:
    """Measure a model: zero-shot classification, retrieval, captioning, questions about pictures."""
    from contracap.config import load_toml
    from contracap.data.remote import require_consent
    from contracap.data.shards import list_shards
    from contracap.evaluation.predictions import write_predictions
    from contracap.evaluation.suite import TasksConfig, measure_tasks
    from contracap.evaluation.task import TaskConfig, build_evaluator

    flags = {
        "data": data,
        "classes": classes,
        "templates": templates,
        "metrics": metric_names(metrics),
        "tokenizer": tokenizer,
        "corenlp_dir": corenlp_dir,
        "spice_memory": spice_memory,
        "clipscore": clipscore,
        "answers": answers,
        "prompt": prompt,
        "strategy": strategy,
        "settings": settings,
        "caption_lines": caption_lines,
    }
    # What is asked for is refused before the weights are read, and looked at before anything is computed.
    if predictions is not None and task not in ("captioning", "vqa"):
        raise ValueError("--predictions keeps what a model writes for --task captioning or --task vqa: leave it out")
    if tasks is not None:
        asked = {"task": task, **flags, "set": settings, "no-caption-lines": not caption_lines}
        given = [name for name, value in asked.items() if value and name not in ("settings", "caption_lines")]
        if given:
            named = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"--tasks {tasks} says what to measure, and so does {named}: one of them")
        wanted = load_toml(tasks, TasksConfig).tasks
        for each in wanted.values():
            require_consent(each.data, allow_commands)
    elif task is None:
        raise ValueError(
            "say what to measure: --task retrieval, captioning, zeroshot or vqa, or a file of tasks, --tasks FILE"
        )
    else:
        wanted = {str(task): TaskConfig(task=task, **flags)}
    read = [name for each in wanted.values() for name in each.reads]
    check_outputs([weights, tasks, *read], json=json, predictions=predictions)
    for path in data:
        if not path.endswith(".json") and not Path(path).is_dir():  # questions, and images in a folder for each class
            list_shards(path, key="--data")
    model, processor = load_model(weights, size)
    if model.config.decoder is None and (writing := [name for name, each in wanted.items() if each.writes]):
        raise ValueError(f"{weights} has no decoder and writes nothing: leave out {', '.join(writing)}")
    kept = list[bool]()

    def keep(found: "Sequence[Prediction | Answered]") -> None:
        if predictions is not None:
            kept.append(written(write_predictions, predictions, found))

    if tasks is not None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")  # figures of a task as soon as it is done
        result = measure_tasks(wanted, model, processor, command=command_line())
    else:
        (config,) = wanted.values()
        result = replace(build_evaluator(config, processor, on_predictions=keep)(model), command=command_line())
    if json is not None:
        kept.append(written(result.write, json))
    width = max(24, *map(len, result.figures))
    counted = {"images": result.samples} | {name: result.details.get(name) for name in ("captions", "questions")}
    for name, count in counted.items():
        if count is not None:
            print(f"{name:{width}}  {count:,}")
    for name, value in result.figures.items():
        print(f"{name:{width}}  {f'{value:.4f}' if value is not None else f'none: {result.reasons[name]}'}")
    missed = [  # tasks that failed, and figures that were asked for by name
        figure
        for name, each in wanted.items()
        for figure, reason in result.reasons.items()
        if reason != ONE_IMAGE  # which no other call would change
        if figure == name or (each.metrics and (tasks is None or figure.startswith(f"{name}/")))
    ]
    if missed:
        raise ValueError(f"no figures of {', '.join(missed)}: {result.reasons[missed[0]]}")
    return 0 if all(kept) else 1
