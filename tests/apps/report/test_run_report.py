"""A run's page, from a run folder made by hand: random weights of the tiny size, images of one colour each."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from contracap.apps.report.run_report import write_report
from contracap.cli import main
from contracap.config import to_toml
from contracap.data.shards import write_shard
from contracap.evaluation.config import TaskConfig
from contracap.evaluation.suite import measure_tasks
from contracap.model.sizes import SIZES
from contracap.pretrained import load, write_weights
from contracap.training.recipe import load_recipe
from tests.evaluation.worlds import COLOURS, record

TASKS = """
[evaluation.tasks.colours]
task = "zeroshot"
data = "{shards}"
classes = "{classes}"

[evaluation.tasks.pairs]
task = "retrieval"
data = "{shards}"

[evaluation.tasks.written]
task = "captioning"
data = "{shards}"
strategy = "greedy"
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    records = [
        record(
            f"image{number}", colour, captions=[f"a {colour} square", f"all <{colour}>"], label=number % len(COLOURS)
        )
        for number, colour in enumerate([*COLOURS, *COLOURS])
    ]
    write_shard(folder / "000000.tar", records)
    return folder


@pytest.fixture
def run(tmp_path: Path, shards: Path) -> Path:
    """A run folder whose recipe has no tasks."""
    folder = tmp_path / "run"
    path = folder / "recipe.toml"
    folder.mkdir()
    path.write_text(
        f'size = "tiny"\nsteps = 20\nout = "{folder}"\n[data]\ntrain = "{shards}"\nbatch_size = 4\n'
        "[optimizer]\nwarmup_steps = 1\n"
    )
    path.write_text(to_toml(load_recipe(path)))
    lines = [{"step": step, "contrastive_loss": 2.0 / step, "learning_rate": 1e-3} for step in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model, processor = load("tiny", weights="random", seed=0)
    write_weights(
        folder / "checkpoints" / "step-00000020" / "model.safetensors",
        model=SIZES["tiny"],
        image=processor.image_config,
        state=model.state_dict(),
    )
    (folder / "checkpoints" / "last").symlink_to("step-00000020")
    return folder


def extended(run: Path, toml: str, **values: object) -> Path:
    with (run / "recipe.toml").open("a", encoding="utf-8") as file:
        file.write(toml.format(**values))
    return run


def headings(page: Path) -> list[str]:
    return [part.split("</h2>")[0] for part in page.read_text(encoding="utf-8").split("<h2>")[1:]]


def test_each_task_of_the_recipe_has_its_figures_and_its_section(run: Path, shards: Path, tmp_path: Path) -> None:
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps(list(COLOURS)))
    page = write_report(extended(run, TASKS, shards=shards, classes=classes))
    assert page == run / "report.html"
    looks = [f"{task} in detail" for task in ("colours", "pairs", "written")]
    assert headings(page) == ["The run", "Figures", *looks]
    html = page.read_text(encoding="utf-8")
    assert "the tasks of the recipe" in html
    assert html.count("<svg") == 2
    for kind in ("Best", "Median", "Worst"):
        assert f"<h3>{kind}</h3>" in html
    assert "http" not in html
    assert "<red>" not in html and "all &lt;red&gt;" in html

    model, processor = load(run / "checkpoints" / "last")
    tasks = load_recipe(run / "recipe.toml").evaluation.tasks
    found = measure_tasks(tasks, model, processor, command="contracap evaluate")
    rows = [tuple(re.findall(r"<td[^>]*>(.*?)</td>", row)) for row in re.findall(r"<tr>(.*?)</tr>", html)]
    shown = {f"{row[0]}/{row[1]}": row[2:] for row in rows if row and row[0] in tasks}
    values = {name: value for name, value in found.figures.items() if value is not None}
    assert shown == {name: (f"{100 * value:.2f}", "12") for name, value in values.items()}
    assert len({row[0] for row in shown.values()}) > 3


def test_a_checkpoint_is_found_without_the_link(run: Path, shards: Path) -> None:
    (run / "checkpoints" / "last").unlink()
    page = write_report(extended(run, '[evaluation.tasks.pairs]\ntask = "retrieval"\ndata = "{data}"\n', data=shards))
    assert "the tasks of the recipe" in page.read_text(encoding="utf-8")


def test_without_tasks_the_validation_shards_are_measured_and_each_time_alike(run: Path, shards: Path) -> None:
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("[data]\n", f'[data]\nvalidation = "{shards}"\n'))
    page = write_report(run)
    assert headings(page) == ["The run", "Figures", "retrieval in detail", "captioning in detail"]
    content = page.read_bytes()
    assert "the first 12 samples of its validation shards" in content.decode()
    assert write_report(run).read_bytes() == content


def test_what_has_no_loss_is_not_measured_on_the_validation_shards(run: Path, shards: Path) -> None:
    recipe = run / "recipe.toml"
    text = recipe.read_text().replace("[data]\n", f'[data]\nvalidation = "{shards}"\n')
    recipe.write_text(re.sub("captioning = .*", "captioning = 0.0", text))
    assert headings(write_report(run)) == ["The run", "Figures", "retrieval in detail"]


def test_a_task_whose_data_have_gone_costs_no_other(run: Path, shards: Path, tmp_path: Path) -> None:
    page = write_report(extended(run, TASKS, shards=shards, classes=tmp_path / "gone.json"))
    assert headings(page) == ["The run", "Figures", "pairs in detail", "written in detail"]
    assert "colours was not evaluated: " in page.read_text(encoding="utf-8")


def test_a_run_of_a_study_is_measured_by_the_studys_tasks(run: Path, shards: Path) -> None:
    model, processor = load("tiny", weights="random", seed=0)
    tasks = {"pairs": TaskConfig(task="retrieval", data=(str(shards),))}
    measure_tasks(tasks, model, processor, command="contracap study").write(run / "results.json")
    page = write_report(run)
    assert headings(page) == ["The run", "Figures", "pairs in detail"]
    assert "on the tasks of the study." in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["{", '{"tasks": {"a": {"asked": {"tsk": 1}}}}'])
def test_results_that_are_damaged_cost_the_figures_and_not_the_curves(run: Path, text: str) -> None:
    (run / "results.json").write_text(text)
    page = write_report(run)
    assert headings(page) == ["The run", "Figures"]
    assert re.search(r"Nothing was evaluated: .*results\.json", page.read_text(encoding="utf-8"))


def test_without_anything_to_measure_the_page_says_so(run: Path) -> None:
    said = "Nothing was evaluated: the recipe has neither evaluation.tasks nor data.validation"
    assert said in write_report(run).read_text(encoding="utf-8")


def test_a_run_without_a_checkpoint_shows_its_curves(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    page = write_report(run)
    assert headings(page) == ["The run", "Figures"]
    assert "No checkpoint yet" in page.read_text(encoding="utf-8")


def test_captions_on_the_way_stand_side_by_side(run: Path) -> None:
    lines: list[Mapping[str, Any]] = [
        {"step": step, "key": "picture0", "caption": f"words <{step}>", "references": ["a red square"]}
        for step in (5, 10, 15, 20)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "captions.jsonl").write_text(text + '{"step": 25, "ke')  # half written
    page = write_report(run)
    assert headings(page)[-1] == "Sample captions during training"
    html = page.read_text(encoding="utf-8")
    row = "<td>words &lt;5&gt;</td><td>words &lt;10&gt;</td><td>words &lt;20&gt;</td><td>a red square</td>"
    assert row in html


def edit(path: Path, before: str, after: str) -> None:
    path.write_text(path.read_text().replace(before, after))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "recipe.toml").unlink(), "is not a run folder: it has no recipe.toml"),
        (lambda run: (run / "metrics.jsonl").unlink(), "is not a run folder: it has no metrics.jsonl"),
        (lambda run: (run / "metrics.jsonl").write_text("{\n"), "metrics.jsonl holds a line that is not JSON"),
        (
            lambda run: (run / "captions.jsonl").write_text('{"key": 1}\n'),
            "captions.jsonl holds a line that is not a re",
        ),
        (lambda run: edit(run / "recipe.toml", 'size = "tiny"', "size = 3"), "size"),
        (lambda run: (run / "checkpoints/last/model.safetensors").write_bytes(b"x"), "is not a weights file"),
    ],
)
def test_what_is_no_run_is_one_line_and_leaves_no_page(run: Path, capsys, damage, words: str) -> None:
    damage(run)
    assert main(["report", str(run)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("contracap: error: ")
    assert words in line
    assert not (run / "report.html").exists()


def test_a_model_that_went_astray_costs_its_figures_and_not_the_curves(run: Path, shards: Path) -> None:
    path = run / "checkpoints/last/model.safetensors"
    model, processor = load(path)
    state = {name: torch.full_like(tensor, torch.nan) for name, tensor in model.state_dict().items()}
    write_weights(path, model=model.config, image=processor.image_config, state=state)
    page = write_report(extended(run, '[evaluation.tasks.pairs]\ntask = "retrieval"\ndata = "{data}"\n', data=shards))
    assert headings(page) == ["The run", "Figures"]
    assert "holds NaN or infinity" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("where", ["task", "validation"])
def test_a_report_runs_no_command_of_its_run(run: Path, tmp_path: Path, where: str) -> None:
    command = f"pipe:touch {tmp_path / 'ran'}"
    tables = {"task": '[evaluation.tasks.x]\ntask = "retrieval"\ndata = "{}"\n', "validation": 'validation = "{}"\n'}
    text = (run / "recipe.toml").read_text()
    added = tables[where].format(command)
    text = text.replace("[data]\n", f"[data]\n{added}") if where == "validation" else text + added
    (run / "recipe.toml").write_text(text)
    assert "no report runs one" in write_report(run).read_text()
    assert not (tmp_path / "ran").exists()
