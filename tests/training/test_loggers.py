import sys
from pathlib import Path
from typing import Any

import pytest

from contracap.config import build
from contracap.training.loggers import LoggerError, open_loggers
from contracap.training.recipe import Recipe
from contracap.training.trainer import train


class Wandb:
    """Stands in for the package, and writes down what it is asked."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.axes: list[tuple[str, str | None]] = []
        self.ends: list[int] = []

    def init(self, **settings: Any) -> "Wandb":
        self.runs.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.ends.append(exit_code)

    def Table(self, *, columns: list[str], data: list[list[str]]) -> tuple[list[str], list[list[str]]]:
        return columns, data


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    standing_in = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", standing_in)
    return standing_in


def test_a_resumed_run_is_the_same_run_at_weights_and_biases(recipe_values: dict, wandb: Wandb) -> None:
    values = recipe_values | {"wandb": "captions", "resume": True}
    train(build(Recipe, values | {"steps": 4}))
    train(build(Recipe, values))
    first, second = wandb.runs
    assert first["project"] == "captions" and first["resume"] == "allow" and first["dir"] == recipe_values["out"]
    assert first["id"] == second["id"] == (Path(recipe_values["out"]) / "wandb-id.txt").read_text().strip()
    assert first["config"]["data"]["batch_size"] == 8
    assert [values["step"] for values in wandb.logged] == list(range(1, 9))
    assert {"loss", "samples_per_second"} <= set(wandb.logged[0])
    assert wandb.axes[:2] == [("step", None), ("*", "step")]
    assert wandb.ends == [0, 0]


def test_two_runs_are_two_at_weights_and_biases(tmp_path: Path, wandb: Wandb) -> None:
    for name in ("one", "two"):
        for board in open_loggers(tmp_path / name, start=0, wandb="captions", settings={}):
            board.close(failed=True)
    assert len({run["id"] for run in wandb.runs}) == 2
    assert wandb.ends == [1, 1]


def test_a_project_without_the_package_says_what_to_install(
    recipe_values: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"wandb = 'captions' needs .*: pip install 'contracap\[wandb\]'"):
        train(build(Recipe, recipe_values | {"wandb": "captions"}))
    assert not Path(recipe_values["out"]).exists()  # the run has not begun


def test_a_board_that_cannot_begin_says_what_would_do_and_leaves_no_id(
    tmp_path: Path, wandb: Wandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise RuntimeError("api_key not configured\n(no-tty)")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        LoggerError,
        match=r"^wandb = 'captions' cannot be started: api_key not configured \(no-tty\)\. Log in .*offline",
    ):
        open_loggers(tmp_path, start=0, wandb="captions", settings={})
    assert not (tmp_path / "wandb-id.txt").exists()


def test_boards_show_figures_and_captions(tmp_path: Path, wandb: Wandb) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for board in open_loggers(tmp_path, start=0, wandb="captions", settings={}):
        board.log_numbers(3, {"loss": 2.5})
        board.log_captions(3, {"0001": "a red image"})
        board.close(failed=False)
    assert wandb.logged == [
        {"step": 3, "loss": 2.5},
        {"step": 3, "captions": (["key", "caption"], [["0001", "a red image"]])},
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 2.5)]
    (text,) = events.Tensors("captions/text_summary")
    assert text.tensor_proto.string_val[0] == b"0001: a red image"
