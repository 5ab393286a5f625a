import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from contracap.config import ConfigError, build, load_toml
from contracap.data.shards import write_shard
from contracap.evaluation.class_names import main_name
from contracap.evaluation.config import EvaluationConfig, TasksConfig
from contracap.evaluation.result import Evaluator
from contracap.evaluation.retrieval import evaluate_retrieval
from contracap.evaluation.suite import build_suite, measure_tasks
from contracap.evaluation.zeroshot import evaluate_zeroshot
from contracap.generation.captioner import Captioner
from contracap.model.coca import CoCa
from contracap.pretrained import load
from contracap.training.recipe import Recipe
from contracap.training.trainer import train

TASKS = Path(__file__).parents[2] / "recipes" / "tasks"
GREYS = ["dark", "bright"]


def grey(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (40, 40), value).save(file, "PNG")
    return file.getvalue()


GREY = grey(0)


@pytest.fixture(scope="module")
def pair():
    return load("tiny", weights="random", seed=0)


@pytest.fixture(scope="module")
def greys(tmp_path_factory) -> Path:
    """A shard of 20 grey images with captions and labels, and the names of the two classes."""
    folder = tmp_path_factory.mktemp("greys")

    def record(index: int) -> tuple[str, dict[str, bytes]]:
        fields = {"captions": [f"grey number {index}", "a grey"], "label": index // 10}
        return f"{index:04d}", {"png": grey(12 * index), "json": json.dumps(fields).encode()}

    write_shard(folder / "000.tar", map(record, range(20)))
    (folder / "classes.json").write_text(json.dumps(GREYS))
    return folder


def retrieval(data: Path) -> dict[str, str]:
    return {"task": "retrieval", "data": str(data)}


def zeroshot(data: Path) -> dict[str, str]:
    return {"task": "zeroshot", "data": str(data), "classes": str(data / "classes.json")}


def suite(pair, **tables: object) -> Evaluator | None:
    return build_suite(build(EvaluationConfig, tables), pair[1])


def test_figures_are_those_of_the_evaluators_under_their_names(pair, greys: Path) -> None:
    model, processor = pair
    found = suite(pair, tasks={"pairs": retrieval(greys), "greys": zeroshot(greys)})(model).values
    pairs = evaluate_retrieval(model, processor, str(greys))
    labels = evaluate_zeroshot(model, processor, str(greys), classes=GREYS)
    alone = {f"pairs/{name}": value for name, value in pairs.values.items()}
    assert found == alone | {f"greys/{name}": value for name, value in labels.values.items()}
    assert {"pairs/text_to_image_recall@1", "greys/acc1"} <= set(found)
    tasks = build(TasksConfig, {"tasks": {"pairs": retrieval(greys), "greys": zeroshot(greys)}}).tasks
    result = measure_tasks(tasks, model, processor, command="contracap evaluate x")
    assert (result.samples, result.values) == (40, found)
    assert result.figures["greys/acc5"] is None
    assert result.reasons == {"greys/acc5": "acc5 needs at least 5 classes; there are 2"}
    samples = {"samples": 20, "keys_digest": result.per_sample["greys/acc1"].samples}
    assert result.details["tasks"] == {
        "pairs": {"asked": retrieval(greys), **samples, "captions": 40},
        "greys": {"asked": zeroshot(greys), **samples, "classes": 2, "templates": 8},
    }


def test_a_task_that_fails_or_runs_out_of_memory_costs_its_own_figures_only(
    pair, greys: Path, tmp_path: Path, monkeypatch
) -> None:
    label = json.dumps({"label": 1}).encode()
    write_shard(tmp_path / "0.tar", [("0000", {"png": GREY, "json": label}), ("0001", {"png": GREY})])
    values = {"late": zeroshot(greys) | {"data": str(tmp_path)}, "pairs": retrieval(greys)}
    tasks = build(TasksConfig, {"tasks": values}).tasks
    result = measure_tasks(tasks, *pair, command="contracap evaluate x")
    assert result.figures["late"] is None and "sample 0001" in result.reasons["late"]
    assert result.figures["pairs/text_to_image_recall@1"] is not None

    def run(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("contracap.evaluation.task.evaluate_zeroshot", run)
    result = measure_tasks(tasks, *pair, command="contracap evaluate x")
    assert result.figures["late"] is None and result.reasons["late"] == "CUDA out of memory"
    assert result.figures["pairs/text_to_image_recall@1"] is not None


def test_data_that_goes_away_during_a_run_costs_its_own_figures_only(pair, greys: Path, tmp_path: Path, caplog) -> None:
    gone = shutil.copytree(greys, tmp_path / "gone")
    healthy = {"pairs": retrieval(greys)}
    tables = {"tasks": {"late": retrieval(gone)} | healthy, "captions": {"data": str(greys), "samples": 2}}
    measure, sampled = suite(pair, **tables), suite(pair, tasks=healthy, captions={"data": str(gone)})
    shutil.rmtree(gone)
    result = measure(pair[0])
    assert set(result.values) == {name for name in result.figures if name.startswith("pairs/")}
    assert len(result.predictions) == 2
    assert "late" in caplog.text and "gone" in caplog.text
    result = sampled(pair[0])
    assert result.values and not result.predictions
    assert "evaluation.captions" in caplog.text


def test_the_first_pictures_are_captioned_as_the_captioner_does(pair, greys: Path) -> None:
    model, processor = pair
    result = suite(pair, captions={"data": str(greys), "samples": 17})(model)
    assert result.figures == {}
    assert [caption["key"] for caption in result.predictions] == [f"{index:04d}" for index in range(17)]
    assert result.predictions[16]["references"] == ("grey number 16", "a grey")
    pictures = [Image.new("L", (40, 40), 12 * index) for index in range(17)]
    assert [caption["caption"] for caption in result.predictions] == [
        caption.text for caption in Captioner(model, processor)(pictures)
    ]


def test_a_model_is_evaluated_in_the_precision_that_it_trains_in(
    greys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    encode = CoCa.encode_text

    def watched(self: CoCa, ids: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return encode(self, ids)

    monkeypatch.setattr(CoCa, "encode_text", watched)
    values = {
        "size": "tiny",
        "steps": 1,
        "out": str(tmp_path / "run"),
        "device": "cpu",
        "precision": "bf16",
        "data": {"train": str(greys), "batch_size": 4},
        "optimizer": {"warmup_steps": 0},
        "evaluation": {"tasks": {"pairs": retrieval(greys)}, "captions": {"data": str(greys), "samples": 2}},
    }
    train(build(Recipe, values))
    assert set(seen) == {True}
    assert len((tmp_path / "run" / "captions.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"task": "retrieval", "data": "bare"}, r"task x: sample 0000 of .*0\.tar has no caption, which retrieval"),
        ({"task": "captioning", "data": "bare"}, r"task x: sample 0000 of .*0\.tar has no caption, which captioning"),
        (
            {"task": "zeroshot", "data": "bare", "classes": "cifar10"},
            r"sample 0000 of .*0\.tar has no label: give",
        ),
        ({"task": "zeroshot", "data": "."}, "task x: `classes` is missing"),
        ({"task": "zeroshot", "data": ".", "classes": "none.json"}, r"task x: .*none\.json"),
        ({"task": "retrieval", "data": "gone"}, "gone"),
        ({"task": "zeroshot", "data": "gone", "classes": "cifar10"}, "gone"),
        ({"data": "gone"}, "gone"),  # captions
    ],
)
def test_what_cannot_be_measured_is_found_when_the_suite_is_made(
    pair, greys: Path, tmp_path: Path, monkeypatch, values, said
) -> None:
    monkeypatch.chdir(greys)
    write_shard(tmp_path / "bare" / "0.tar", [("0000", {"png": GREY})])
    table = values | ({"data": str(tmp_path / "bare")} if values["data"] == "bare" else {})
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        suite(pair, **({"tasks": {"x": table}} if "task" in table else {"captions": table}))


def test_a_suite_of_nothing_is_none(pair, greys: Path) -> None:
    assert suite(pair) is None
    assert suite(pair, captions={"data": str(greys)})
    assert suite(pair, tasks={"pairs": {"task": "retrieval", "data": [str(greys)]}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "zero"}, "'tasks.x.task' must be one of 'retrieval', "),
        ({"task": "captioning", "settings": ["widht=2"]}, "unknown key 'widht'; did you"),
        ({"task": "retrieval", "strategy": "beam"}, "'tasks.x': retrieval takes no strategy"),
        ({"task": "retrieval", "data": []}, "'tasks.x': there is nothing to measure on"),
        (
            {"task": "retrieval", "data": "a.json"},
            r"a\.json is not a tar shard; .*: contracap shards make a\.json --out",
        ),
        ({"task": "zeroshot", "data": ["a.json", "pictures"]}, r"a\.json is not a tar shard; zeroshot"),
        ({"task": "vqa", "answers": "x", "strategy": "beam"}, "leave one of them out"),
        ({"task": "captioning", "strategy": "legacy"}, "settings: .*legacy.*key 'year'"),
        ({"task": "captioning", "strategy": "bean"}, "'tasks.x': unknown strategy 'bean'"),
    ],
)
def test_a_wrong_table_says_what_is_wrong(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(EvaluationConfig, {"tasks": {"x": {"data": "x"} | values}})


def test_wrong_values_and_missing_keys_say_so() -> None:
    for tables, message in (
        ({"every": 0}, "every is 0"),
        ({"captions": {"data": "x", "samples": 0}}, "samples is 0"),
        ({"tasks": {"x": {"task": "captioning"}}}, "key 'tasks.x.data' is missing"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(EvaluationConfig, tables)


@pytest.mark.parametrize("file", sorted(TASKS.glob("*.toml")), ids=lambda path: path.name)
def test_the_files_of_tasks_can_be_read_and_name_published_classes(file: Path) -> None:
    tasks = load_toml(file, TasksConfig).tasks
    assert tasks
    for task in tasks.values():
        assert task.classes is None or main_name(task.classes)
