import json
import shutil
from pathlib import Path

import pytest

from contracap.apps.study import StudyConfig, study
from contracap.config import ConfigError, build
from contracap.data.shards import write_shard
from contracap.pretrained.errors import WeightsError
from contracap.training.checkpoint import CheckpointError
from tests.evaluation.worlds import COLOURS, record

BOTH, CLIP = {"loss": {"contrastive": 1.0, "captioning": 1.0}}, {"loss": {"contrastive": 1.0, "captioning": 0.0}}


def values_of(shards: Path, out: Path) -> dict:
    """A study of two steps a run on twelve images."""
    return {
        "out": str(out),
        "seeds": [3],
        "recipe": {
            "size": "tiny",
            "steps": 2,
            "device": "cpu",
            "precision": "fp32",
            "data": {"train": str(shards), "batch_size": 4},
            "optimizer": {"warmup_steps": 0},
        },
        "arms": {"coca": BOTH, "clip": CLIP},
        "tasks": {
            "pairs": {"task": "retrieval", "data": str(shards)},
            "captions": {"task": "captioning", "data": str(shards), "strategy": "greedy", "metrics": ["cider"]},
        },
    }


def run_study(values: dict, command: str = "contracap study x") -> None:
    study(build(StudyConfig, values), command=command)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "shards"
    images = [
        record(f"{index:04d}", colour, captions=[f"a {colour} image", f"something {colour}"], label=index % 6)
        for index, colour in enumerate([*COLOURS, *COLOURS])
    ]
    write_shard(folder / "0.tar", images)
    return folder


@pytest.fixture(scope="module")
def finished(shards: Path) -> Path:
    """The folder of a study that is done: training takes most of the time of these tests."""
    out = shards.parent / "finished"
    run_study(values_of(shards, out))
    return out


@pytest.fixture
def values(shards: Path, tmp_path: Path) -> dict:
    """A study that has not begun."""
    return values_of(shards, tmp_path / "study")


@pytest.fixture
def done(values: dict, finished: Path) -> dict:
    """The same study, done."""
    shutil.copytree(finished, values["out"])
    return values


def commands(values: dict) -> dict[str, str]:
    """By which command each run was measured."""
    files = Path(values["out"]).glob("*-[34]/results.json")
    return {path.parent.name: json.loads(path.read_text())["command"] for path in files}


def test_arms_of_a_seed_begin_alike_and_see_the_same_samples(values: dict) -> None:
    config = build(StudyConfig, values)
    coca, clip = (config.run(arm, 3) for arm in ("coca", "clip"))
    assert (coca.seed, coca.data, coca.size, coca.steps) == (clip.seed, clip.data, clip.size, clip.steps)
    assert (coca.loss.captioning, clip.loss.captioning) == (1.0, 0.0)
    assert Path(coca.out) == Path(values["out"]) / "coca-3"


def test_a_run_is_measured_by_the_tasks_that_its_losses_teach_and_once(done: dict) -> None:
    out = Path(done["out"])
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*-3/**/*") if path.is_file()}
    recipe = {key: value for key, value in done["recipe"].items() if key != "steps"} | {"epochs": 0.5}
    run_study(done | {"seeds": [3, 4], "recipe": recipe})  # half of twelve images in fours are two steps
    assert {path: path.stat().st_mtime_ns for path in out.glob("*-3/**/*") if path.is_file()} == kept
    assert {"results.json", "recipe.toml", "model.safetensors"} <= {path.name for path in kept}
    found = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*-[34]/results.json")}
    assert found.keys() == {"coca-3", "coca-4", "clip-3", "clip-4"}
    assert {name.split("/")[0] for name in found["coca-3"]["figures"]} == {"pairs", "captions"}
    assert {name.split("/")[0] for name in found["clip-4"]["figures"]} == {"pairs"}
    assert found["clip-4"]["seed"] == 4
    comparison = json.loads((out / "coca-vs-clip" / "results.json").read_text())
    assert comparison["names"] == ["coca", "clip"] and comparison["runs"] == 2
    recalls = [
        found[run]["figures"]["pairs/text_to_image_recall@1"] for run in ("coca-3", "coca-4", "clip-3", "clip-4")
    ]
    (row,) = (row for row in comparison["rows"] if row["figure"] == "pairs/text_to_image_recall@1")
    assert row["gaps"] == pytest.approx([recalls[0] - recalls[2], recalls[1] - recalls[3]])


def test_other_tasks_measure_a_run_again(done: dict) -> None:
    done["tasks"]["captions"] |= {"strategy": "beam", "settings": ["width=2"]}
    run_study(done, "contracap study again")
    assert commands(done) == {"coca-3": "contracap study again", "clip-3": "contracap study x"}


@pytest.mark.parametrize(("name", "value"), [("steps", 4), ("device", "auto")])
def test_runs_of_other_schedules_are_not_mixed(done: dict, name: str, value: object) -> None:
    before = sorted(path.name for path in Path(done["out"]).iterdir())
    with pytest.raises(ValueError, match=f"coca-3 was started with {name} .*, not {value}: choose another out"):
        run_study(done | {"recipe": done["recipe"] | {name: value}, "seeds": [4, 3]})
    assert sorted(path.name for path in Path(done["out"]).iterdir()) == before


def test_other_settings_are_found_before_the_first_run(done: dict) -> None:
    other = done | {"recipe": done["recipe"] | {"optimizer": {"warmup_steps": 1}}, "seeds": [4, 3]}
    with pytest.raises(CheckpointError, match=r"coca-3 was run with another recipe: optimizer\.warmup_steps"):
        run_study(other)
    assert not (Path(done["out"]) / "coca-4").exists()


def test_runs_on_other_data_are_not_mixed(done: dict, shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    data = done["recipe"]["data"] | {"train": str(copy)}
    with pytest.raises(ValueError, match=r"coca-3 was started with data\.train .*shards, not .*copy: choose"):
        run_study(done | {"recipe": done["recipe"] | {"data": data}})


def test_results_whose_run_is_gone_are_not_taken_for_another_recipes(done: dict) -> None:
    for folder in Path(done["out"]).glob("*-3/checkpoints"):
        shutil.rmtree(folder)
    run_study(done | {"recipe": done["recipe"] | {"optimizer": {"warmup_steps": 1}}}, "contracap study again")
    assert set(commands(done).values()) == {"contracap study again"}


def test_damaged_results_are_measured_again(done: dict, caplog: pytest.LogCaptureFixture) -> None:
    damage = {"clip-3": "[]", "coca-3": '{"figures": {}'}
    whole = {run: json.loads((Path(done["out"]) / run / "results.json").read_text()) for run in damage}
    for run, content in damage.items():
        (Path(done["out"]) / run / "results.json").write_text(content)
    with caplog.at_level("WARNING"):
        run_study(done)
    for run in damage:
        again = json.loads((Path(done["out"]) / run / "results.json").read_text())
        assert again["figures"] == whole[run]["figures"]
    assert caplog.text.count("measuring again") == 2


def test_wrong_paths_are_found_before_the_first_run(values: dict, tmp_path: Path) -> None:
    values["tasks"]["captions"] |= {"data": str(tmp_path / "gone")}
    with pytest.raises(FileNotFoundError, match=r"task captions: .*gone"):
        run_study(values)
    assert not Path(values["out"]).exists()


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"train": "gone"}},
        {"data": {"validation": "gone"}, "validate_every": 1},
        {"initialise_from": "gone.safetensors"},
        {"evaluation": {"tasks": {"late": {"task": "retrieval", "data": "gone"}}}},
    ],
)
def test_what_an_arm_lacks_is_found_before_the_first_run(values: dict, change: dict) -> None:
    values["arms"]["clip"] = CLIP | change
    with pytest.raises((FileNotFoundError, WeightsError), match="gone"):
        run_study(values)
    assert not Path(values["out"]).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {"coca": BOTH}}, "at least two arms"),
        ({"seeds": [1, 1]}, "give one or more, each once"),
        ({"tasks": {}}, "nothing to measure"),
        ({"arms": {"coca": BOTH, "clip": {"loss": {"captoning": 0.0}}}}, "arm clip: unknown key 'loss.captoning'"),
        ({"arms": {"coca": BOTH, "clip": CLIP | {"seed": 1}}}, "arms.clip: seed is given by the study"),
        ({"arms": {"coca": BOTH, "a/b": CLIP}}, "arm 'a/b' names a folder"),
        ({"arms": {"coca": BOTH, "clip": CLIP, "other": CLIP}}, "arm other is the same as another one before it"),
        ({"seed": 1}, "unknown key 'seed'; did you mean 'seeds'"),
        ({"out": ""}, "out is empty"),
    ],
)
def test_a_wrong_study_says_what_is_wrong(values: dict, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(StudyConfig, values | change)


def test_every_mistake_of_a_study_takes_a_line(values: dict) -> None:
    wrong = {"recipe": values["recipe"] | {"stepz": 1}, "arms": {"coca": BOTH | {"lr": 1}, "clip": CLIP | {"sede": 1}}}
    with pytest.raises(ConfigError) as error:
        build(StudyConfig, values | wrong)
    assert [each.partition(";")[0] for each in error.value.problems] == [
        "recipe: unknown key 'stepz'",
        "arm coca: unknown key 'lr'",
        "arm clip: unknown key 'sede'",
    ]


def test_an_arm_that_no_task_measures_is_refused(values: dict) -> None:
    tasks = {"captions": values["tasks"]["captions"]}
    with pytest.raises(ConfigError, match="arm clip: no task measures what its losses teach and those of the first"):
        build(StudyConfig, values | {"tasks": tasks})


def test_the_study_of_the_repository_can_be_read() -> None:
    from contracap.config import load_toml

    config = load_toml(Path(__file__).parents[2] / "recipes" / "studies" / "coca-vs-clip.toml", StudyConfig)
    assert list(config.arms) == ["coca", "clip", "captioner"] and len(config.seeds) == 3
