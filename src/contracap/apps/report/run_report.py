"""A run folder as one page: what was trained, how it went, and what the last checkpoint can do."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from contracap.apps.html_page import Html, page, paragraph, table
from contracap.apps.report.curves import draw_curves
from contracap.apps.report.sections import sections_of
from contracap.config import build
from contracap.data.annotations import read_json
from contracap.data.loader import evaluation_samples
from contracap.data.patterns import require_consent
from contracap.evaluation.captioning import evaluate_captioning
from contracap.evaluation.config import TaskConfig
from contracap.evaluation.features import Source, open_source
from contracap.evaluation.result import RESULTS_FILE, Evaluator, unexpected
from contracap.evaluation.retrieval import evaluate_retrieval
from contracap.evaluation.task import build_evaluator
from contracap.files import read_regular, write_text
from contracap.pretrained import load
from contracap.pretrained.errors import NonFiniteWeightsError
from contracap.processor import Processor
from contracap.training.checkpoint import CHECKPOINTS, last_checkpoint
from contracap.training.recipe import RECIPE_FILE, Recipe, load_recipe
from contracap.training.recorder import CAPTIONS_FILE, METRICS_FILE, read_metrics
from contracap.wording import counted, text_problem

PAGE = "report.html"
MAX_VALIDATION = 1000  # samples that are measured where the recipe has no tasks
MAX_CAPTIONS = 16  # images whose captions on the way are shown
NO_COMMANDS = "no report runs one"
Builder = Callable[[], tuple[Source, Evaluator]]  # of an evaluator, with the data it measures on
logger = logging.getLogger(__name__)


def write_report(run: Path) -> Path:
    """Evaluate the last checkpoint and write RUN/report.html, whole or not at all. Return its path.

    Raises:
        FileNotFoundError: if the folder is not that of a run.
        ValueError: if its recipe, its records or its checkpoint cannot be read.
    """
    for name in (RECIPE_FILE, METRICS_FILE):
        if not (run / name).is_file():
            raise FileNotFoundError(f"{run} is not a run folder: it has no {name}; give the `out` of contracap train")
    recipe = load_recipe(run / RECIPE_FILE)
    sections: dict[str, list[Html]] = {"": [_facts(recipe)]}
    with _errors_in(run / METRICS_FILE):
        records = read_metrics(run)
        sections[""].insert(0, paragraph(_progress(records, recipe)))
        if records:
            sections["The run"] = [draw_curves(records)]
    if checkpoint := last_checkpoint(run / CHECKPOINTS):
        sections |= measure_checkpoint(run, recipe, checkpoint)
    else:
        sections["Figures"] = [paragraph("No checkpoint yet, so nothing was evaluated.")]
    if (run / CAPTIONS_FILE).is_file():
        with _errors_in(run / CAPTIONS_FILE):
            sections["Sample captions during training"] = [captions_on_the_way(run / CAPTIONS_FILE)]
    write_text(run / PAGE, page(f"{run.absolute().name}: {recipe.size}", sections))
    return run / PAGE


def measure_checkpoint(run: Path, recipe: Recipe, checkpoint: Path) -> dict[str, list[Html]]:
    """The figures of the recipe's tasks, or else of those of its study, then a section for each; without tasks, of its
    validation shards. What fails costs its own figures only."""
    try:
        model, processor = load(checkpoint, precision="fp32")
    except NonFiniteWeightsError as error:  # the curves show when they became so
        logger.warning("nothing was evaluated: %s", error)
        return {"Figures": [paragraph(f"Nothing was evaluated: {error}")]}
    try:
        evaluators, what = _evaluators(run, recipe, processor)
    except (ValueError, OSError) as error:
        evaluators, what = {}, str(error)
    if not evaluators:
        logger.warning("nothing was evaluated: %s", what)
        return {"Figures": [paragraph(f"Nothing was evaluated: {what}")]}
    rows, missing, sections = [], [], {}
    for name, build_one in evaluators.items():
        logger.info("evaluating %s", name)
        try:
            data, evaluator = build_one()
            result = evaluator(model)
        except Exception as error:  # also out of memory
            logger.warning("%s was not evaluated: %s", name, error, exc_info=unexpected(error))
            missing.append(paragraph(f"{name} was not evaluated: {str(error) or type(error).__name__}"))
            continue
        rows += [(name, figure, f"{100 * value:.2f}", f"{result.samples:,}") for figure, value in result.values.items()]
        missing += [paragraph(f"{name}, {figure}: {reason}") for figure, reason in result.reasons.items()]
        parts = list(sections_of(result, data))
        if parts:
            sections[f"{name} in detail"] = parts
    head = ("task", "figure", "times 100", "samples")
    shown = [table(head, rows, numbers=(2, 3))] if rows else []
    done = "Evaluated" if rows else "Nothing was evaluated"
    return {"Figures": [paragraph(f"{done} with {checkpoint.name} on {what}."), *shown, *missing]} | sections


def _evaluators(run: Path, recipe: Recipe, processor: Processor) -> tuple[dict[str, Builder], str]:
    """Return what builds each evaluator, and on what they measure, in words; if on nothing, why."""
    for tasks, what in ((recipe.evaluation.tasks, "recipe"), (_asked(run / RESULTS_FILE), "study")):
        if tasks:
            for task in tasks.values():
                require_consent(task.data, False, NO_COMMANDS)
            made = {name: partial(_of_task, task, processor) for name, task in tasks.items()}
            return made, f"the tasks of the {what}"
    if recipe.data.validation is None:
        return {}, "the recipe has neither evaluation.tasks nor data.validation"
    require_consent(recipe.data.validation, False, NO_COMMANDS)
    lines = recipe.data.captions.lines
    samples = list(islice(evaluation_samples(recipe.data.validation, lines=lines), MAX_VALIDATION))
    if not all(sample.captions for sample in samples):
        return {}, "the recipe has no evaluation.tasks, and its validation shards have no captions"
    evaluators: dict[str, Builder] = {}
    if recipe.loss.contrastive:
        evaluators["retrieval"] = lambda: (samples, partial(evaluate_retrieval, processor=processor, data=samples))
    if recipe.loss.captioning:
        evaluators["captioning"] = lambda: (samples, partial(evaluate_captioning, processor=processor, data=samples))
    what = (
        f"the first {counted(len(samples), 'sample(s)')} of its validation shards; the recipe has no evaluation.tasks"
    )
    return evaluators, what


def _of_task(task: TaskConfig, processor: Processor) -> tuple[Source, Evaluator]:
    return open_source(task.data, lines=task.caption_lines), build_evaluator(task, processor)


def _asked(file: Path) -> dict[str, TaskConfig]:
    """Return the tasks that a run was measured by before, as its results say; none if there are no results."""
    if not file.is_file():
        return {}
    content = read_json(file)
    try:
        tasks = content.get("tasks", {}).items()
        return {name: build(TaskConfig, task["asked"]) for name, task in tasks if "asked" in task}
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} does not tell which tasks were measured: {error}") from None


def captions_on_the_way(path: Path) -> Html:
    """Show the captions of the first images at the first, the middle and the last step of captions.jsonl."""
    written: dict[int, dict[str, Mapping[str, Any]]] = {}
    whole, _, _ = read_regular(path).decode("utf-8").rpartition("\n")  # a line may be half written
    for line in whole.splitlines():
        caption = json.loads(line)
        written.setdefault(caption["step"], {})[caption["key"]] = caption
    steps = sorted(written)
    steps = sorted({steps[place * (len(steps) - 1) // 2] for place in range(3)}) if steps else []
    if not steps:
        return paragraph("None were written.")
    rows = [
        (
            *(written[step].get(key, {}).get("caption", "") for step in steps),
            next(iter(caption.get("references", ())), ""),
        )
        for key, caption in islice(written[steps[-1]].items(), MAX_CAPTIONS)
    ]
    return table((*(f"step {step:,}" for step in steps), "reference"), rows)


def _progress(records: Sequence[Mapping[str, Any]], recipe: Recipe) -> str:
    done = records[-1]["step"] if records else 0
    return f"{done:,} of {recipe.steps:,} steps of {counted(recipe.data.batch_size, 'image(s)')} with a caption each."


def _facts(recipe: Recipe) -> Html:
    """The recipe's main facts."""
    train = recipe.data.train
    sources = ", ".join(train) if isinstance(train, dict | tuple) else train
    return table(("", ""), list(_fact_rows(recipe, sources)))


def _fact_rows(recipe: Recipe, sources: str) -> Iterator[tuple[str, str]]:
    optimizer, loss = recipe.optimizer, recipe.loss
    yield "size", recipe.size + (f", with {json.dumps(recipe.model)}" if recipe.model else "")
    yield "data", f"{sources}; {recipe.steps * recipe.data.batch_size:,} samples in all"
    yield "loss", f"contrastive {loss.contrastive:g}, captioning {loss.captioning:g}"
    parts = [f"{part} from {name}" for part, name in recipe.initialise_parts.items()]
    yield "starts from", "; ".join([recipe.initialise_from or "random weights", *parts])
    yield (
        "optimizer",
        f"learning rate {optimizer.learning_rate:g}, {optimizer.warmup_steps:,} warm-up steps, weight decay "
        f"{optimizer.weight_decay:g}",
    )
    yield "precision", recipe.precision
    yield "seed", str(recipe.seed)


@contextmanager
def _errors_in(path: Path) -> Iterator[None]:
    """Name the file in errors about a line of it."""
    try:
        yield
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} holds a line that is not JSON: {text_problem(error)}") from None
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} holds a line that is not a record of a run: {error!r}") from None
