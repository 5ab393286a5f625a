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


@pytest.fixture(scope="module")
def pair():
    return load("tiny", weights="random", seed=0)


@pytest.fixture(scope="module")
def greys(tmp_path_factory) -> Path:
    """A shard of 20 grey images with captions and labels, and the names of the two classes."""
    folder = tmp_path_factory.mktemp("greys")

    def record(index: int) -> tuple[str, dict[str, bytes]]:
        file = io.BytesIO()
        Image.new("L", (40, 40), 12 * index).save(file, "PNG")
        fields = {"captions": [f"grey number {index}", "a grey"], "label": index // 10}
        return f"{index:04d}", {"png": file.getvalue(), "json": json.dumps(fields).encode()}

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


def test_the_result_of_several_tasks_has_what_was_asked_their_figures_reasons_and_details(pair, greys: Path) -> None:
    model, processor = pair
    tasks = build(TasksConfig, {"tasks": {"pairs": retrieval(greys), "greys": zeroshot(greys)}}).tasks
    result = measure_tasks(tasks, model, processor, command="contracap evaluate x")
    assert result.samples == 40
    assert result.figures["greys/acc5"] is None
    assert result.reasons == {"greys/acc5": "acc5 needs at least 5 classes; there are 2"}
    samples = {"samples": 20, "keys_digest": result.per_sample["greys/acc1"].samples}
    assert result.details["tasks"] == {
        "pairs": {"asked": retrieval(greys), **samples, "captions": 40},
        "greys": {"asked": zeroshot(greys), **samples, "classes": 2, "templates": 8},
    }


def test_a_task_that_fails_costs_its_own_figures_only(pair, greys: Path, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("L", (40, 40)).save(file, "PNG")
    picture, label = file.getvalue(), json.dumps({"label": 1}).encode()
    write_shard(tmp_path / "0.tar", [("0000", {"png": picture, "json": label}), ("0001", {"png": picture})])
    values = {"late": zeroshot(greys) | {"data": str(tmp_path)}, "pairs": retrieval(greys)}
    tasks = build(TasksConfig, {"tasks": values}).tasks
    result = measure_tasks(tasks, *pair, command="contracap evaluate x")
    assert result.figures["late"] is None and "sample 0001" in result.reasons["late"]
    assert result.figures["pairs/text_to_image_recall@1"] is not None


def test_a_task_that_runs_out_of_memory_costs_its_own_figures_only(pair, greys: Path, monkeypatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("contracap.evaluation.task.evaluate_zeroshot", run)
    tasks = build(TasksConfig, {"tasks": {"late": zeroshot(greys), "pairs": retrieval(greys)}}).tasks
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


@pytest.mark.parametrize("task", ["retrieval", "captioning"])
def test_pictures_without_captions_are_found_when_the_suite_is_made(pair, tmp_path: Path, task: str) -> None:
    file = io.BytesIO()
    Image.new("L", (40, 40)).save(file, "PNG")
    write_shard(tmp_path / "0.tar", [("0000", {"png": file.getvalue()})])
    with pytest.raises(ValueError, match=rf"task x: sample 0000 of .*0\.tar has no caption, which {task}"):
        suite(pair, tasks={"x": {"task": task, "data": str(tmp_path)}})


def test_an_error_of_a_task_names_it(pair, greys: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"task greys: .*none\.json"):
        suite(pair, tasks={"pairs": retrieval(greys), "greys": zeroshot(greys) | {"classes": "none.json"}})


def test_the_first_pictures_are_captioned_as_the_captioner_does(pair, greys: Path) -> None:
    model, processor = pair
    result = suite(pair, captions={"data": str(greys), "samples": 18})(model)
    assert result.figures == {}
    assert [caption["key"] for caption in result.predictions] == [f"{index:04d}" for index in range(18)]
    assert result.predictions[17]["references"] == ("grey number 17", "a grey")
    pictures = [Image.new("L", (40, 40), 12 * index) for index in range(18)]
    assert [caption["caption"] for caption in result.predictions] == [
        caption.text for caption in Captioner(model, processor)(pictures)
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_is_evaluated_in_the_precision_that_it_trains_in(
    greys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
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
        "precision": precision,
        "data": {"train": str(greys), "batch_size": 4},
        "optimizer": {"warmup_steps": 0},
        "evaluation": {"tasks": {"pairs": retrieval(greys)}, "captions": {"data": str(greys), "samples": 2}},
    }
    train(build(Recipe, values))
    assert set(seen) == {precision == "bf16"}
    assert len((tmp_path / "run" / "captions.jsonl").read_text().splitlines()) == 2


def test_shards_without_labels_are_found_when_the_suite_is_made(pair, greys: Path, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("L", (40, 40)).save(file, "PNG")
    write_shard(tmp_path / "0.tar", [("0000", {"png": file.getvalue(), "txt": b"a grey"})])
    with pytest.raises(ValueError, match=r"sample 0000 of .*0\.tar has no label: give each sample a field `label`"):
        suite(pair, tasks={"greys": zeroshot(greys) | {"data": str(tmp_path)}})


def test_classes_without_names_are_found_when_the_suite_is_made(pair, greys: Path) -> None:
    with pytest.raises(ValueError, match="task greys: `classes` is missing"):
        suite(pair, tasks={"greys": {"task": "zeroshot", "data": str(greys)}})


def test_a_suite_of_nothing_is_none(pair, greys: Path) -> None:
    assert suite(pair) is None
    assert suite(pair, captions={"data": str(greys)})
    assert suite(pair, tasks={"pairs": {"task": "retrieval", "data": [str(greys)]}})


@pytest.mark.parametrize("name", ["retrieval", "zeroshot", "captions"])
def test_missing_shards_are_found_when_the_suite_is_made(pair, greys: Path, name: str) -> None:
    gone = {"data": str(greys / "gone")}
    tables = {
        "retrieval": {"tasks": {"x": retrieval(greys) | gone}},
        "zeroshot": {"tasks": {"x": zeroshot(greys) | gone}},
        "captions": {"captions": gone},
    }
    with pytest.raises(FileNotFoundError, match="gone"):
        suite(pair, **tables[name])


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"every": 0}, "every is 0"),
        ({"captions": {"data": "x", "samples": 0}}, "samples is 0"),
        ({"tasks": {"cifar": {"task": "zero", "data": "x"}}}, "'tasks.cifar.task' must be one of 'retrieval', "),
        (
            {"tasks": {"x": {"task": "captioning", "data": "x", "settings": ["widht=2"]}}},
            "unknown key 'widht'; did you",
        ),
        (
            {"tasks": {"x": {"task": "retrieval", "data": "x", "strategy": "beam"}}},
            "'tasks.x': retrieval takes no strategy",
        ),
        ({"tasks": {"x": {"task": "retrieval", "data": []}}}, "'tasks.x': there is nothing to measure on"),
        (
            {"tasks": {"x": {"task": "retrieval", "data": "dataset_coco.json"}}},
            r"'tasks.x': dataset_coco\.json is not a tar shard; .*: contracap shards make dataset_coco\.json --out DIR",
        ),
        ({"tasks": {"x": {"task": "zeroshot", "data": ["a.json", "pictures"]}}}, "a.json is not a tar shard; zeroshot"),
        ({"tasks": {"x": {"task": "vqa", "data": "x", "answers": "x", "strategy": "beam"}}}, "leave one of them out"),
        ({"tasks": {"x": {"task": "captioning", "data": "x", "strategy": "legacy"}}}, "settings: .*legacy.*key 'year'"),
        ({"tasks": {"cifar": {"task": "captioning"}}}, "key 'tasks.cifar.data' is missing"),
        (
            {"tasks": {"x": {"task": "captioning", "data": "x", "strategy": "bean"}}},
            "'tasks.x': unknown strategy 'bean'",
        ),
    ],
)
def test_a_wrong_table_says_what_is_wrong(tables: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(EvaluationConfig, tables)


@pytest.mark.parametrize("file", sorted(TASKS.glob("*.toml")), ids=lambda path: path.name)
def test_the_files_of_tasks_can_be_read_and_name_published_classes(file: Path) -> None:
    tasks = load_toml(file, TasksConfig).tasks
    assert tasks
    for task in tasks.values():
        assert task.classes is None or main_name(task.classes)
