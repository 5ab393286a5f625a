"""A study: one recipe in several arms, each with several seeds, measured by the same tasks and compared."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from contracap.apps.compare.comparison import Comparison, compare
from contracap.apps.compare.results import load_result
from contracap.apps.compare.writing import write_comparison
from contracap.apps.figures import require_matplotlib
from contracap.config import ConfigError, build, require_paths, to_dict
from contracap.data.patterns import require_consent
from contracap.data.shards import list_shards
from contracap.evaluation.config import TaskConfig
from contracap.evaluation.result import RESULTS_FILE, Result
from contracap.evaluation.suite import build_evaluators, build_suite, measure_tasks
from contracap.images import ImageConfig
from contracap.pretrained import find_weights, load, processor_for
from contracap.training.checkpoint import CHECKPOINTS, checkpoint_name
from contracap.training.recipe import RECIPE_FILE, Recipe, load_recipe, merge, with_steps
from contracap.training.start import device_of, precision_on, require_same_run
from contracap.training.trainer import train

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A recipe, the changes of each arm, and the tasks."""

    out: str
    """Folder for the runs, each in `ARM-SEED`, and the comparisons."""
    seeds: tuple[int, ...]
    """Seeds of the runs of each arm. Arms with the same seed see the same samples in the same order."""
    recipe: dict[str, Any]
    """The recipe that all arms share, as in a recipe file; the study sets `out`, `seed` and `resume`."""
    arms: dict[str, dict[str, Any]]
    """Changes to the recipe, by name of the arm. The first arm is compared with each of the others."""
    tasks: dict[str, TaskConfig]
    """What is measured of each run whose losses train it."""

    def __post_init__(self) -> None:
        require_paths(self, "out")
        if len(self.arms) < 2:
            raise ValueError("a study needs at least two arms, each a table [arms.NAME], to compare")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {list(self.seeds)}; give one or more, each once")
        if not self.tasks:
            raise ValueError("there is nothing to measure: give each task a table [tasks.NAME]")
        given = {"out", "seed", "resume"}
        for where, values in {
            "recipe": self.recipe,
            **{f"arms.{arm}": found for arm, found in self.arms.items()},
        }.items():
            if taken := given & values.keys():
                raise ValueError(f"{where}: {', '.join(sorted(taken))} is given by the study: leave it out")
        self._check_arms()

    def _check_arms(self) -> None:
        """Build the recipe of each arm. A mistake that all arms share is told once.

        Raises: ValueError: if a recipe is wrong, or an arm tells nothing.
        """
        recipes, problems = list[Recipe](), dict[str, list[str]]()
        for arm in self.arms:
            if Path(arm).name != arm:
                raise ValueError(f"arm {arm!r} names a folder: leave out slashes")
            try:
                recipe = replace(self.run(arm, self.seeds[0]), out=self.out)
            except ConfigError as error:
                for each in error.problems:
                    problems.setdefault(each, []).append(arm)
                continue
            if recipe in recipes:
                raise ValueError(f"arm {arm} is the same as another one before it: a gap between them tells nothing")
            recipes.append(recipe)
            if not problems and not self.common_tasks(arm):
                raise ValueError(f"arm {arm}: no task measures what its losses teach and those of the first arm")
        if problems:
            where = {each: f"arm {', '.join(arms)}" for each, arms in problems.items() if len(arms) < len(self.arms)}
            raise ValueError("\n".join(f"{where.get(each, 'recipe')}: {each}" for each in problems))

    def run(self, arm: str, seed: int) -> Recipe:
        """The recipe of one run."""
        given = {"out": str(Path(self.out) / f"{arm}-{seed}"), "seed": seed, "resume": True}
        return build(Recipe, merge(merge(self.recipe, self.arms[arm]), given))

    def common_tasks(self, arm: str) -> set[str]:
        """The tasks that an arm and the first one are both measured by."""
        first, other = (self.tasks_of(self.run(name, self.seeds[0])) for name in (next(iter(self.arms)), arm))
        return first.keys() & other.keys()

    def tasks_of(self, recipe: Recipe) -> dict[str, TaskConfig]:
        """Tasks that the losses of a run teach: writing by the captioning loss, the others by the contrastive one."""
        taught = {True: recipe.loss.captioning > 0, False: recipe.loss.contrastive > 0}
        return {name: task for name, task in self.tasks.items() if taught[task.writes]}


def study(config: StudyConfig, *, command: str, allow_commands: bool = False) -> list[Comparison]:
    """Train and measure every run that is not done yet, seed by seed, then compare the first arm with each other.

    Writes to the folder `out`: a run folder with `results.json` for each arm and seed, and for each comparison a folder
    `FIRST-vs-ARM`, as `compare.writing.write` does.

    Raises:
        ImportError: if matplotlib, which draws the comparisons, is not installed.
        FileNotFoundError, ValueError: as training and evaluating do; also if a run was started with other settings.
        Interrupted: after a checkpoint, if the process is asked to end; the same call continues.
    """
    require_matplotlib()  # hours before it is used
    for task in config.tasks.values():
        require_consent(task.data, allow_commands)
    for arm in config.arms:
        require_consent(config.run(arm, config.seeds[0]).commands, allow_commands)
    first_runs = {arm: with_steps(config.run(arm, config.seeds[0])) for arm in config.arms}  # samples are counted once
    runs = [
        (arm, replace(config.run(arm, seed), steps=first_runs[arm].steps, epochs=None))
        for seed in config.seeds
        for arm in config.arms
    ]
    for _, recipe in runs:
        _require_same_run(recipe)
    for recipe in first_runs.values():
        _check_inputs(recipe, config.tasks_of(recipe))
    results: dict[str, list[Result]] = {arm: [] for arm in config.arms}
    for number, (arm, recipe) in enumerate(runs, start=1):
        logger.info("run %d of %d: %s, seed %d", number, len(runs), arm, recipe.seed)
        tasks = config.tasks_of(recipe)
        results[arm].append(complete_run(recipe, tasks, command=command, allow_commands=allow_commands))
    first, *others = config.arms
    made = []
    for other in others:
        made.append(compare(results[first], results[other], names=(first, other)))
        write_comparison(made[-1], Path(config.out) / f"{first}-vs-{other}", command=command)
    return made


def _check_inputs(recipe: Recipe, tasks: dict[str, TaskConfig]) -> None:
    """Look for everything that a run and its tasks read, hours before it is read.

    Raises: FileNotFoundError, ValueError: if something is missing or wrong.
    """
    for key, paths in recipe.data.training_paths.items():
        list_shards(paths, key=key)
    for weights in recipe.weights:
        find_weights(weights)
    if recipe.validate_every and recipe.data.validation is not None:
        list_shards(recipe.data.validation, key="data.validation")
    processor = processor_for(recipe.model_config, ImageConfig(size=recipe.model_config.vision.image_size))
    build_suite(recipe.evaluation, processor)
    build_evaluators(tasks, processor)


def complete_run(recipe: Recipe, tasks: dict[str, TaskConfig], *, command: str, allow_commands: bool = False) -> Result:
    """Return the figures of a run, from its `results.json`. It is trained to its end and measured first, as far as that
    is not done.

    Raises:
        FileNotFoundError, ValueError: as training does, or if a task fails.
    """
    folder = Path(recipe.out)
    asked = {name: to_dict(task) for name, task in tasks.items()}
    done = {"checkpoint": checkpoint_name(recipe.steps), "asked": asked}
    trained = (folder / CHECKPOINTS).exists()  # else nobody has looked at which recipe it was that was measured
    if trained and (found := _found(folder / RESULTS_FILE)) and found.details.get("study") == done:
        return found
    model, processor = load(train(recipe, allow_commands=allow_commands), precision="fp32")
    result = measure_tasks(tasks, model, processor, command=command, seed=recipe.seed)
    if failed := [name for name in tasks if name in result.reasons]:
        raise ValueError(f"{folder}: task {failed[0]}: {result.reasons[failed[0]]}")
    result = replace(result, details={**result.details, "study": done})
    result.write(folder / RESULTS_FILE)
    return result


def _found(file: Path) -> Result | None:
    """Return what was measured before; None, and a warning, if the file is damaged."""
    if not file.exists():
        return None
    try:
        return load_result(file)
    except ValueError as error:
        logger.warning("measuring again: %s", error)
        return None


def _require_same_run(recipe: Recipe) -> None:
    """A run may continue for more steps, or with data that lie elsewhere; a study's runs are each trained in one way.

    Raises: ValueError: if the run was started with other settings, or nobody knows how.
    """
    folder = Path(recipe.out)
    if not (folder / CHECKPOINTS).exists():
        return
    if not (folder / RECIPE_FILE).is_file():
        raise ValueError(f"{folder} holds checkpoints but no {RECIPE_FILE}: remove it, or choose another out")
    recipe = replace(recipe, precision=precision_on(device_of(recipe), recipe.precision))
    require_same_run(folder, recipe)
    before = load_recipe(folder / RECIPE_FILE)
    for name, was, now in (
        ("steps", before.steps, recipe.steps),
        ("device", before.device, recipe.device),
        ("accumulation", before.accumulation, recipe.accumulation),
        ("nonfinite", before.nonfinite, recipe.nonfinite),
        ("data.train", before.data.train, recipe.data.train),
    ):
        if was != now:
            raise ValueError(f"{folder} was started with {name} {was}, not {now}: choose another out")
