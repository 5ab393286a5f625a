"""The command that measures a model. It writes the result before it prints it, so a closed pipe cannot lose it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from contracap.cli.flags import Flags, GivenFlags, arg
from contracap.cli.messages import interruption, try_write
from contracap.cli.options import AllowCommands, Model, ModelFlags, ResultFile, WeightsName, check_outputs, command_line
from contracap.evaluation.config import TaskConfig
from contracap.evaluation.metrics.scores import ONE_IMAGE

if TYPE_CHECKING:
    from contracap.evaluation.predictions import Prediction
    from contracap.evaluation.result import Result
    from contracap.evaluation.vqa import Answer


class TaskFlags(GivenFlags):
    config_class = TaskConfig


@interruption("interrupted: no result was written; run the command again to start over")
def evaluate(
    weights: WeightsName,
    /,
    *,
    given: Annotated[TaskFlags, Flags],
    tasks: Annotated[
        Path | None,
        arg(
            metavar="TASKS.toml",
            help="Several tasks instead of one: a file with a table [tasks.NAME] for each, whose keys are the flags.",
        ),
    ] = None,
    predictions: Annotated[
        Path | None,
        arg(metavar="OUT.json", help="For one task, captioning or vqa: file for the texts that the model writes."),
    ] = None,
    allow_commands: AllowCommands = False,
    model_flags: Model = ModelFlags(),
    json: ResultFile = None,
) -> int:
    """Measure a model: zero-shot classification, retrieval, captioning, questions about images."""
    from contracap.evaluation.predictions import write_predictions
    from contracap.evaluation.suite import measure_tasks
    from contracap.evaluation.task import build_evaluator
    from contracap.evaluation.vqa import write_answers

    # Arguments and data are checked before the weights are read.
    if predictions is not None and given.get("task") not in ("captioning", "vqa"):
        raise ValueError("--predictions keeps what a model writes for --task captioning or --task vqa: leave it out")
    wanted = _read_tasks(given, tasks, allow_commands=allow_commands)
    read = [name for config in wanted.values() for name in config.reads]
    check_outputs([weights, tasks, *read], json=json, predictions=predictions)
    _check_data(given.get("data", ()))
    model, processor = model_flags.load(weights)
    if model.config.decoder is None and (writing := [name for name, config in wanted.items() if config.writes]):
        raise ValueError(f"{weights} has no decoder and writes nothing: leave out {', '.join(writing)}")
    kept = list[bool]()

    def keep(found: "Sequence[Prediction | Answer]") -> None:
        if predictions is not None:
            write = write_answers if given["task"] == "vqa" else write_predictions
            kept.append(try_write(write, predictions, found))

    if tasks is not None:
        result = measure_tasks(wanted, model, processor, command=command_line())
    else:
        (config,) = wanted.values()
        result = replace(build_evaluator(config, processor, on_predictions=keep)(model), command=command_line())
    if json is not None:
        kept.append(try_write(result.write, json))
    _print(result)
    if missed := _find_missing(result, wanted, single=tasks is None):
        raise ValueError(f"no figures of {', '.join(missed)}: {result.reasons[missed[0]]}")
    return 0 if all(kept) else 1


def _read_tasks(given: GivenFlags, tasks: Path | None, *, allow_commands: bool) -> dict[str, TaskConfig]:
    """Return the tasks by name: the one of the flags, or those of a file.

    Raises: ValueError: if both are given, or neither.
    """
    from contracap.config import load_toml
    from contracap.data.patterns import require_consent
    from contracap.evaluation.config import TasksConfig

    if tasks is None:
        if "task" not in given:
            raise ValueError(
                "say what to measure: --task retrieval, captioning, zeroshot or vqa, or a file of tasks, --tasks FILE"
            )
        values: dict[str, Any] = {"data": (), **given}
        return {given["task"]: TaskConfig(**values)}
    if given:
        raise ValueError(f"--tasks {tasks} says what to measure, and so does {', '.join(given.flags())}: one of them")
    wanted = load_toml(tasks, TasksConfig).tasks
    for config in wanted.values():
        require_consent(config.data, allow_commands)
    return wanted


def _check_data(paths: Sequence[str]) -> None:
    """Raises: ValueError, OSError: if there are no shards at one of these paths."""
    from contracap.data.shards import list_shards

    for path in paths:
        if not path.endswith(".json") and not Path(path).is_dir():  # questions, and images in a folder for each class
            list_shards(path, key="--data")


def _print(result: "Result") -> None:
    width = max(24, *map(len, result.figures))
    counted = {"images": result.samples} | {name: result.details.get(name) for name in ("captions", "questions")}
    for name, count in counted.items():
        if count is not None:
            print(f"{name:{width}}  {count:,}")
    for name, value in result.figures.items():
        print(f"{name:{width}}  {f'{value:.4f}' if value is not None else f'none: {result.reasons[name]}'}")


def _find_missing(result: "Result", wanted: Mapping[str, TaskConfig], *, single: bool) -> list[str]:
    """Return the tasks that failed, and the figures that were asked for by name and have no value."""
    return [
        figure
        for name, config in wanted.items()
        for figure, reason in result.reasons.items()
        if reason != ONE_IMAGE  # which no other call would change
        if figure == name or (config.metrics and (single or figure.startswith(f"{name}/")))
    ]
