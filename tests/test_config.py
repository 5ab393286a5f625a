import os
import string
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracap.config import ConfigError, build, load_toml, to_dict, to_toml


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    learning_rate: float = 8e-4
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["cosine", "linear"] = "cosine"

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    name: str
    every: int = 100


@dataclass(frozen=True, kw_only=True)
class Run:
    steps: int
    data: str | tuple[str, ...] = "shards"
    out: Path = Path("runs/one")
    resume: bool = False
    optimizer: Optimizer = Optimizer()
    teacher: Optimizer | None = None
    evaluators: tuple[Evaluator, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_fields_left_out_keep_their_defaults_and_a_whole_number_stands_for_a_float() -> None:
    expected = Run(steps=3, optimizer=Optimizer(betas=(0.8, 0.9)))
    assert build(Run, {"steps": 3, "optimizer": {"betas": [0.8, 0.9]}}) == expected
    assert isinstance(build(Optimizer, {"learning_rate": 1}).learning_rate, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"steps": 1, "optimizer": {"learning_rte": 1e-3}},
            "unknown key 'optimizer.learning_rte'; did you mean 'optimizer.learning_rate'?",
        ),
        (
            {"steps": 1, "evaluators": [{"name": "a"}, {"nam": "b"}]},
            "unknown key 'evaluators.1.nam'; did you mean 'evaluators.1.name'?",
        ),
        (
            {"steps": 1, "optimizer": {"xyz": 1}},
            "unknown key 'optimizer.xyz'; the keys here are learning_rate, betas, schedule",
        ),
        ({"steps": 1, "betas": [0.1, 0.2]}, "unknown key 'betas'; did you mean 'optimizer.betas'?"),
        ({}, "key 'steps' is missing"),
        (
            {"steps": 1, "optimizer": {"learning_rate": float("nan"), "betas": [0.1, float("-inf")]}},
            "'optimizer.learning_rate' must be a finite number, not nan; "
            "'optimizer.betas.1' must be a finite number, not -inf",
        ),
        ({"steps": 1, "weights": {"a": float("inf")}}, "'weights.a' must be a finite number, not inf"),
        ({"steps": "5"}, "'steps' must be an integer, not '5'"),
        ({"steps": 1, "resume": 1}, "'resume' must be true or false, not 1"),
        ({"steps": 1, "data": 5}, "'data' must be a string or a list, each a string, not 5"),
        ({"steps": 1, "optimizer": 5}, "'optimizer' must be a table, not 5"),
        (
            {"steps": 1, "optimizer": {"schedule": "step"}},
            "'optimizer.schedule' must be one of 'cosine', 'linear', not 'step'",
        ),
        (
            {"steps": 1, "optimizer": {"betas": [0.9]}},
            "'optimizer.betas' must be a list (a number, a number), not [0.9]",
        ),
        ({"steps": 1, "optimizer": {"learning_rate": -1.0}}, "'optimizer': learning_rate is -1.0; it must be above 0"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Run, values)
    assert str(caught.value) == message


def test_overrides_win_and_are_toml_values_else_strings(tmp_path: Path) -> None:
    path = written(tmp_path, 'steps = 5\n[optimizer]\nschedule = "linear"\n')
    overrides = ["steps=7", "optimizer.learning_rate=1e-3", "out=runs/two", "resume=true", "teacher.betas=[0.1, 0.2]"]
    assert load_toml(path, Run, overrides) == Run(
        steps=7,
        out=Path("runs/two"),
        resume=True,
        optimizer=Optimizer(learning_rate=1e-3, schedule="linear"),
        teacher=Optimizer(betas=(0.1, 0.2)),
    )


def test_an_override_of_thousands_of_brackets_is_a_string_like_any_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="steps"):
        load_toml(written(tmp_path, ""), Run, ["steps=" + "[" * 5000])


@pytest.mark.parametrize("override", ["steps", "=3", "optimizer..betas=1", "steps.more=1"])
def test_an_override_that_is_no_assignment_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        load_toml(written(tmp_path, "steps = 5"), Run, [override])


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*missing.toml"):
        load_toml(tmp_path / "missing.toml", Run)
    path = written(tmp_path, "steps = ")
    with pytest.raises(ConfigError, match=r"run.toml is not a TOML file"):
        load_toml(path, Run)
    with pytest.raises(ConfigError, match=r"run.toml: unknown key 'step'; did you mean 'steps'\?"):
        load_toml(written(tmp_path, "step = 5"), Run)


texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)
numbers = st.floats(allow_nan=False, allow_infinity=False, width=64)
optimizers = st.builds(
    Optimizer,
    learning_rate=st.floats(min_value=1e-300, allow_nan=False, allow_infinity=False),
    betas=st.tuples(numbers, numbers),
    schedule=st.sampled_from(["cosine", "linear"]),
)
runs = st.builds(
    Run,
    steps=st.integers(-(2**62), 2**62),
    data=texts | st.lists(texts, max_size=3).map(tuple),
    out=st.text(string.ascii_letters, min_size=1).map(Path),
    resume=st.booleans(),
    optimizer=optimizers,
    teacher=st.none() | optimizers,
    evaluators=st.lists(st.builds(Evaluator, name=texts), max_size=2).map(tuple),
    weights=st.dictionaries(texts, numbers, max_size=3),
)


@settings(max_examples=50, deadline=None)
@given(runs)
def test_what_is_written_is_read_back_equal(tmp_path_factory: pytest.TempPathFactory, run: Run) -> None:
    assert build(Run, to_dict(run)) == run
    assert load_toml(written(tmp_path_factory.getbasetemp(), to_toml(run)), Run) == run


def test_a_none_that_cannot_be_written_is_refused() -> None:
    broken = replace(Run(steps=1), optimizer=None)
    with pytest.raises(ConfigError, match=r"Run.optimizer is None but its default is not"):
        to_dict(broken)


def test_text_that_toml_cannot_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"is not text that a TOML file can hold"):
        to_toml({"data": {"train": "caf\udce9"}})


def test_a_value_of_any_length_is_shown_in_short() -> None:
    for value in (10**3000, "x" * 3000, [1] * 3000):
        with pytest.raises(ConfigError) as refused:
            build(Optimizer, {"learning_rate": value})
        assert len(str(refused.value)) < 200


def test_a_file_that_may_never_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.toml")
    with pytest.raises(OSError, match="named pipe"):
        load_toml(tmp_path / "recipe.toml", Optimizer)
