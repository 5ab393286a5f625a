"""The commands that make a run, or plan one."""

import os
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff

from contracap.cli.flags import arg
from contracap.cli.options import AllowCommands, ResultFile, WeightsName, check_outputs, command_line


def quickstart(
    *,
    out: Annotated[Path, arg(metavar="DIR", help="Folder for results.json, report.html and the run.")] = Path(
        "quickstart"
    ),
) -> None:
    """Train a small model on images that it draws itself, then caption, classify and retrieve. Downloads nothing. If
    interrupted, run the same command again to continue."""
    from contracap.apps.quickstart import RESUME_HINT
    from contracap.apps.quickstart import quickstart as run
    from contracap.training.shutdown import exit_on_signal

    with exit_on_signal(RESUME_HINT):
        run(out, command=command_line())


def train(
    recipe: Annotated[Path | None, arg(metavar="RECIPE.toml", help="Model, data, steps and run folder.")] = None,
    overrides: Annotated[
        tuple[str, ...],
        arg(
            metavar="[KEY.PATH=VALUE ...]",
            help="Changes to the recipe, such as out=runs/first data.batch_size=64 resume=true.",
        ),
    ] = (),
    /,
    *,
    allow_commands: AllowCommands = False,
    keys: Annotated[FlagCreatePairsOff[bool], arg(help="List all keys of recipes, and train nothing.")] = False,
) -> None:
    """Train a model by a recipe. Its key `out` is the run folder."""
    from contracap.config import keys_text
    from contracap.training.recipe import Recipe, load_recipe

    if keys:
        print(keys_text(Recipe))
        return
    if recipe is None:
        raise ValueError("name a recipe: contracap train RECIPE.toml; --keys lists what it may say")
    from contracap.training.shutdown import exit_on_signal
    from contracap.training.trainer import train as run

    with exit_on_signal():
        checkpoint = run(load_recipe(recipe, overrides), allow_commands=allow_commands)
        if os.environ.get("RANK", "0") == "0":  # of the ranks of torchrun, one
            print(checkpoint)


def finetune(
    weights: WeightsName,
    data: Annotated[
        Path, arg(metavar="DATA", help="A folder of images with texts, a table, COCO's JSON, ...; or tar shards.")
    ],
    overrides: Annotated[
        tuple[str, ...], arg(metavar="[KEY.PATH=VALUE ...]", help="Changes to the recipe that is chosen.")
    ] = (),
    /,
    *,
    out: Annotated[Path, arg(metavar="DIR", help="Folder for recipe.toml, data, run, report.html and results.json.")],
) -> None:
    """Fine-tune a captioner on your own images, with settings that suit their number, and show captions before and
    after. If interrupted, run the same command again to continue."""
    from contracap.apps.finetune import figures_as_text
    from contracap.apps.finetune import finetune as run
    from contracap.training.shutdown import exit_on_signal

    with exit_on_signal("the same command continues"):
        print(figures_as_text(run(weights, data, out, overrides, command=command_line())))
        print(f"the page: {out / 'report.html'}")


def study(
    study: Annotated[Path, arg(metavar="STUDY.toml", help="The recipe, the arms, the seeds and what to measure.")],
    overrides: Annotated[tuple[str, ...], arg(metavar="[KEY.PATH=VALUE ...]", help="Changes to the study.")] = (),
    /,
    *,
    allow_commands: AllowCommands = False,
) -> None:
    """Train one recipe in several arms with several seeds, then measure and compare them. If interrupted, run the
    same command again to continue."""
    from contracap.apps.compare.comparison_tables import to_markdown
    from contracap.apps.study import StudyConfig
    from contracap.apps.study import study as run
    from contracap.config import load_toml
    from contracap.training.shutdown import exit_on_signal

    with exit_on_signal():
        config = load_toml(study, StudyConfig, overrides)
        for comparison in run(config, command=command_line(), allow_commands=allow_commands):
            print(to_markdown(comparison))


def plan(
    recipe: Annotated[Path, arg(metavar="RECIPE.toml", help="The run to plan.")],
    overrides: Annotated[tuple[str, ...], arg(metavar="[KEY.PATH=VALUE ...]", help="Changes to the recipe.")] = (),
    /,
    *,
    gpus: Annotated[int, arg(metavar="N", help="GPUs that share each batch.")],
    gpu: Annotated[str, arg(metavar="NAME", help="One of a100-40g, a100-80g, h100-80g, h200-141g, l40s and rtx-4090.")],
    gpus_per_machine: Annotated[
        int, arg(help="GPUs of a machine, whose links are faster; with hsdp they share a model.")
    ] = 8,
    efficiency: Annotated[
        float, arg(help="Share of the GPU's dense peak that the forward and backward passes reach.")
    ] = 0.5,
    text_tokens: Annotated[
        float | None,
        arg(help="Mean length of the captions; the default is that of index.json, or else the whole context."),
    ] = None,
    hours_between_failures: Annotated[float, arg(help="Mean hours until one GPU fails.")] = 50_000.0,
    allow_commands: AllowCommands = False,
    json: ResultFile = None,
) -> None:
    """Estimate the memory, time and traffic of a run, without running it."""
    from contracap.apps.plan.planner import plan_run
    from contracap.training.recipe import load_recipe

    check_outputs([recipe], json=json)
    made = plan_run(
        load_recipe(recipe, overrides),
        gpus=gpus,
        gpu=gpu,
        gpus_per_machine=gpus_per_machine,
        efficiency=efficiency,
        text_tokens=text_tokens,
        hours_between_failures=hours_between_failures,
        allow_commands=allow_commands,
    )
    if json is not None:
        made.result(command_line()).write(json)
    print(made.table())
