import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from contracap import cli
from contracap.apps.plan.planner import plan_run
from contracap.config import ConfigError, build, load_toml, to_toml
from contracap.data.shards import write_shard
from contracap.training.recipe import Recipe, load_recipe, with_steps
from contracap.training.start import check_inputs
from contracap.training.trainer import train

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
LEAST = {"size": "tiny", "steps": 200, "out": "runs/x", "data": {"train": "shards", "batch_size": 8}}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_comes_back_from_what_it_writes(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    (tmp_path / "resolved.toml").write_text(to_toml(recipe))
    assert load_toml(tmp_path / "resolved.toml", Recipe) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"vison": {}}}, "in 'model': unknown key 'vison'; did you mean 'vision'"),
        ({"optimizer": {"peak_rate": 1e-3}}, "'optimizer.peak_rate' is .*: it is optimizer.learning_rate now"),
        ({"optimizer": {"final_rate": 0.0}}, "'optimizer.final_rate' is .*: it is optimizer.min_learning_rate now"),
        ({"loss": {"chunk": 64}}, "'loss.chunk' is of an earlier version: delete it"),
        ({"kernels": {"text": "packed"}}, "'kernels' .* delete it"),
        ({"parallel": {"gather": "ring"}}, "'parallel.gather' .* delete it"),
        ({"steps": 0}, "at least 1"),
        ({"out": ""}, "out is empty"),
        ({"initialise_from": " "}, "initialise_from is empty"),
        ({"data": {"train": "", "batch_size": 8}}, "train is empty"),
        ({"data": {"train": {"a": {"shards": ["x", ""]}}, "batch_size": 8}}, "shards is empty"),
        ({"data": {"train": "x", "validation": [""], "batch_size": 8}}, "validation is empty"),
        ({"evaluation": {"tasks": {"x": {"task": "retrieval", "data": ["a", ""]}}}}, "data is empty"),
        ({"evaluation": {"captions": {"data": ""}}}, "data is empty"),
        ({"steps": 50}, "warmup_steps 100 must be below steps 50"),
        ({"accumulation": 3}, "must divide data.batch_size 8"),
        ({"validate_every": 10}, "needs data.validation"),
        ({"stall_seconds": -1.0}, "stall_seconds is -1.0; it must be above 0, or 0"),
        ({"stall_seconds": float("nan")}, "'stall_seconds' must be a finite number, not nan"),
        ({"wandb": ""}, "wandb is ''; give the project's name, or leave the key out"),
        ({"peak_tflops": 0.0}, "peak_tflops is 0.0; it must be above 0"),
        (
            {"size": "ViT-B-32", "loss": {"captioning": 0.0}, "evaluation": {"captions": {"data": "shards"}}},
            "writes no captions",
        ),
        (
            {"evaluation": {"tasks": {"x": {"dta": "shards"}}}},
            "unknown key 'evaluation.tasks.x.dta'; did you mean 'evaluation.tasks.x.data'",
        ),
        (
            {"data": {"train": {"a": {"shards": "x", "weight": 0}}, "batch_size": 8}},
            r"^'data\.train\.a': weight is 0\.0; it must be above 0$",
        ),
        (
            {"data": {"train": {"a": {"shard": "x"}}, "batch_size": 8}},
            r"^unknown key 'data\.train\.a\.shard'; did you mean 'data\.train\.a\.shards'\?$",
        ),
        ({"out": "caf\udce9"}, "not valid UTF-8"),
        (
            {"data": {"train": "x", "validation": ["a", 1], "batch_size": 8}},
            r"^'data\.validation\.1' must be a string, not 1$",
        ),
        ({"steps": 10**18}, "steps is 1,000,.*; it must be at most"),
        (
            {"data": {"train": "x", "batch_size": 10**11}},
            "batch_size must be at most 1,073,741,824, is 100,000,000,000",
        ),
        ({"data": {"train": "x", "batch_size": 8, "workers": 100_000}}, "workers must be at most 1,024"),
        ({"data": {"train": "x", "batch_size": 8, "shuffle_buffer": 10**15}}, "shuffle_buffer must be at most"),
        ({"size": "huge"}, "unknown size 'huge'; the sizes are coca_ViT-B-32"),
        ({"size": "ViT-B-32"}, "has no decoder: set loss.captioning = 0"),
        ({"model": {"vision": {"depth": 3}}}, "depth"),
        ({"ema_decay": 1.0}, "below 1"),
        ({"data": {"train": "x", "batch_size": 1}}, "at least 2 pairs"),
        ({"seed": -1}, "seed is -1"),
        ({"optimizer": {"betas": [0.9, 1.5]}}, "below 1"),
        ({"model": {"pooler": {"queries": 1}}}, "needs at least 2"),
        ({"model": {"decoder": {"heads": 5}}}, "not a multiple of the decoder's 5 heads"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Recipe, LEAST | change)


def test_numbers_with_thousands_of_digits_are_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(to_toml(build(Recipe, LEAST)))
    with pytest.raises(ConfigError, match="'steps' must be an integer"):
        load_recipe(tmp_path / "recipe.toml", ["steps=" + "9" * 10_000])
    (tmp_path / "recipe.toml").write_text("steps = " + "9" * 10_000)
    with pytest.raises(ConfigError, match="is not a TOML file"):
        load_recipe(tmp_path / "recipe.toml")


@pytest.mark.parametrize(
    "shards", ["pipe:touch ran", "{pipe:touch ran,b}", "{pi,x}pe:touch ran", ["a.tar", "pipe:touch ran"]]
)
@pytest.mark.parametrize("where", ["train", "validation", "task", "captions"])
def test_commands_of_a_recipe_run_with_consent_only(shards: str | list[str], where: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = LEAST | {"out": str(tmp_path / "run")}
    data = LEAST["data"] | ({where: shards} if where in ("train", "validation") else {})
    tasks = {"x": {"task": "retrieval", "data": shards}} if where == "task" else {}
    captions = {"captions": {"data": shards}} if where == "captions" else {}
    values |= {"data": data, "evaluation": {"tasks": tasks} | captions}
    with pytest.raises(ConfigError, match=r"runs a shell command, 'pipe:touch ran.*--allow-commands"):
        train(build(Recipe, values))
    assert not list(tmp_path.iterdir())


def test_a_plan_counts_the_output_of_commands_with_consent_only(tmp_path: Path) -> None:
    values = {key: value for key, value in LEAST.items() if key != "steps"} | {"epochs": 2.0}
    shard = tmp_path / "a.tar"
    write_shard(shard, [(str(number), {"jpg": b"x", "txt": b"a"}) for number in range(40 * 8)])
    recipe = build(Recipe, values | {"data": {"train": f"pipe:cat {shard}; touch {tmp_path}/ran", "batch_size": 8}})
    recipe = replace(recipe, optimizer=replace(recipe.optimizer, warmup_steps=1))
    with pytest.raises(ConfigError, match=r"runs a shell command.*--allow-commands"):
        plan_run(recipe, gpus=1, gpu="l40s")
    assert not (tmp_path / "ran").exists()
    assert plan_run(recipe, gpus=1, gpu="l40s", allow_commands=True).samples == 2 * 40 * 8


def test_commands_of_a_file_of_tasks_run_with_consent_only(tmp_path: Path, weights: Path, capsys) -> None:
    tasks = tmp_path / "tasks.toml"
    tasks.write_text(f'[tasks.x]\ntask = "retrieval"\ndata = ["x.tar", "pipe:touch {tmp_path}/ran"]\n')
    assert cli.main(["evaluate", str(weights), "--tasks", str(tasks)])
    assert "--allow-commands" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    tasks.write_text(f'[tasks.x]\ntask = "retrieval"\ndata = "pipe:touch {tmp_path}/ran"\n')
    assert cli.main(["evaluate", str(weights), "--tasks", str(tasks), "--allow-commands"])  # its output is no shard
    assert (tmp_path / "ran").exists()


def test_the_recipe_of_a_run_folder_means_that_folder(tmp_path: Path, caplog) -> None:
    folder = tmp_path / 'a "copy"'
    folder.mkdir()
    path = folder / "recipe.toml"
    path.write_text(to_toml(build(Recipe, LEAST)))
    assert load_recipe(path).out == "runs/x"  # somebody's recipe of that name
    (folder / "metrics.jsonl").touch()
    with caplog.at_level("INFO"):
        assert load_recipe(path).out == str(folder)
    assert "out is that folder, not runs/x" in caplog.text
    assert load_recipe(path, ["out=elsewhere"]).out == "elsewhere"
    (folder / "checkpoints").mkdir()
    assert load_recipe(folder) == load_recipe(path)  # the folder of a run stands for its recipe


def test_every_key_is_listed_by_the_command_and_on_its_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--keys"]) == 0
    listed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in listed.splitlines())
    for key in ("data.train.NAME.weight", "evaluation.tasks.NAME.metrics", "optimizer.learning_rate", "epochs"):
        assert f"\n{key}\n" in listed
    page = Path(__file__).parents[2] / "docs" / "recipe-keys.md"
    assert listed in page.read_text(), "write it anew: contracap train --keys"


def test_the_text_of_a_sample_is_one_caption_on_request(tmp_path: Path, weights: Path, capsys) -> None:
    image = io.BytesIO()
    Image.new("RGB", (40, 40)).save(image, "png")
    write_shard(tmp_path / "a.tar", [(key, {"png": image.getvalue(), "txt": b"one\ntwo"}) for key in "xy"])
    call = ["evaluate", str(weights), "--task", "retrieval", "--data", str(tmp_path / "a.tar")]
    for more, captions in ([], 4), (["--no-caption-lines"], 2):
        assert cli.main([*call, *more]) == 0
        assert re.search(rf"^captions +{captions}$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("name", ["hf-hub:nobody/nothing", "coca_ViT-L-14/mscoco"])
def test_weights_of_the_hub_are_not_looked_for_before_the_start(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("contracap.pretrained.find._from_hub", lambda *_: pytest.fail("asks the hub"))
    write_shard(tmp_path / "a.tar", [("x", {"jpg": b"x"})])
    data = {"train": str(tmp_path / "a.tar"), "batch_size": 8}
    check_inputs(build(Recipe, LEAST | {"initialise_from": name, "data": data}), 1)


def test_epochs_stand_for_steps(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [(f"{number}", {"txt": b"a"}) for number in range(20)])
    values = {key: value for key, value in LEAST.items() if key != "steps"} | {"optimizer": {"warmup_steps": 3}}
    data = {"train": str(tmp_path), "batch_size": 8}
    recipe = with_steps(build(Recipe, values | {"data": data, "epochs": 2.0}))
    assert (recipe.steps, recipe.epochs) == (5, None)
    for wrong in ({"epochs": 2.0, "steps": 10}, {"epochs": 0.0}, {}):
        with pytest.raises(ConfigError, match="epochs"):
            build(Recipe, values | {"data": data} | wrong)
    with pytest.raises(ConfigError, match=r"1 epoch of 20 samples is 3 steps: optimizer\.warmup_steps 3 must be"):
        with_steps(build(Recipe, values | {"data": data, "epochs": 1.0}))


def test_epochs_on_the_command_line_replace_the_steps_of_the_file() -> None:
    recipe = load_recipe(RECIPES[0], ["epochs=2"])
    assert (recipe.epochs, recipe.steps) == (2.0, 0)
