import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from contracap.config import ConfigError, build, to_dict, to_toml
from contracap.data.indexing import index_folder
from contracap.data.loader import TrainingBatches
from contracap.data.order import OrderError
from contracap.data.shards import read_records, read_samples, write_shard
from contracap.images import ImageConfig
from contracap.pretrained import load, random_model, save, save_open_clip
from contracap.pretrained.errors import WeightsError
from contracap.pretrained.open_clip_names import to_open_clip
from contracap.training import loop, trainer
from contracap.training.checkpoint import CheckpointError
from contracap.training.initial_model import initial_model
from contracap.training.loop import TrainingError
from contracap.training.recipe import Recipe, load_recipe, with_steps
from contracap.training.recorder import read_metrics
from contracap.training.start import precision_on
from contracap.training.step import StepMetrics, TrainingState
from contracap.training.trainer import train
from contracap.training.writer import CheckpointWriter
from tests.model.tiny_models import tiny_mammut

from .interference import assert_same_weights, at_step, lines, losses, scale_loss


@pytest.mark.parametrize(
    ("has", "expected"),
    [({}, "fp32"), ({"avx2": True}, "fp32"), ({"amx_bf16": True}, "bf16"), ({"bf16": True}, "bf16")],
)
def test_a_cpu_computes_in_bf16_only_if_it_multiplies_it(has: dict, expected: str, monkeypatch) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: has, raising=False)
    cpu = torch.device("cpu")
    assert precision_on(cpu, "auto") == expected
    assert precision_on(cpu, "bf16") == "bf16" and precision_on(cpu, "fp32") == "fp32"


def test_a_run_records_its_precision_and_goes_on_in_no_other(finished: dict, monkeypatch) -> None:
    assert 'precision = "fp32"' in (Path(finished["out"]) / "recipe.toml").read_text()
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    with pytest.raises(CheckpointError, match="precision was fp32 and is now bf16"):
        train(build(Recipe, finished | {"precision": "auto"}))


def test_a_run_leaves_what_the_documents_promise(whole: Path) -> None:
    checkpoints = whole / "checkpoints"
    assert (checkpoints / "last").resolve() == (checkpoints / "step-00000008").resolve()
    assert sorted(path.name for path in checkpoints.iterdir()) == ["last", "step-00000004", "step-00000008"]
    assert list((whole / "tensorboard").iterdir())
    records = read_metrics(whole)
    assert [step for step, *_ in losses(whole)] == list(range(1, 9))
    assert {"learning_rate", "gradient_norm", "logit_scale", "samples_per_second"} <= set(records[1])
    assert [record["step"] for record in records if "validation_captioning_loss" in record] == [4, 8]
    model, processor = load(checkpoints / "last")
    assert model.encode_image(processor.images([Image.new("RGB", (50, 40), "red")])).shape == (1, 32)


def test_evaluations_on_the_way_leave_figures_and_captions(whole: Path, colours: Path) -> None:
    figures = [record["step"] for record in read_metrics(whole) if "pairs/text_to_image_recall@1" in record]
    assert figures == [4, 8]
    captions = lines(whole / "captions.jsonl")
    assert [(line["step"], line["key"]) for line in captions] == [
        (step, key) for step in (4, 8) for key in ("0000", "0001")
    ]
    assert captions[0]["references"] == list(next(iter(read_samples(str(colours / "000.tar")))).captions)


MAMMUT = {
    "model": to_dict(tiny_mammut(feed_forward_before_cross=False)),
    "loss": {"contrastive": 0.0, "captioning": 1.0},
    "frozen": ["vision"],
}
LARGE = {"size": "flickr8k", "precision": "fp32", "ema_decay": 0.9}


def require_aligned_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """On some CPUs kernels round by where a tensor lies: one that is read from a file must lie as a fresh one does."""
    step = loop.train_step

    def watched(state: TrainingState, *rest: Any) -> StepMetrics:
        moments = [tensor for each in state.optimizer.state.values() for tensor in each.values()]
        tensors = [*state.model.parameters(), *(state.average or {}).values(), *moments]
        assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
        return step(state, *rest)

    monkeypatch.setattr(loop, "train_step", watched)


@pytest.mark.parametrize("changes", [MAMMUT, pytest.param(LARGE, marks=pytest.mark.slow)], ids=["MaMMUT", "flickr8k"])
def test_resumed_run_equals_uninterrupted_run(recipe_values: dict, tmp_path: Path, monkeypatch, changes: dict) -> None:
    require_aligned_tensors(monkeypatch)
    recipe, parts = build(Recipe, recipe_values | changes), tmp_path / "parts"
    whole = train(recipe)
    # Cut off in the middle, behind the checkpoint of step 4: the records of steps 5 and 6 are written and then lost.
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        at_step(patch, 7, lambda: 1 / 0)
        train(replace(recipe, out=str(parts)))
    assert len(losses(parts)) == 6
    resumed = train(replace(recipe, out=str(parts), resume=True))
    assert losses(parts) == losses(Path(recipe.out))
    for file in whole.glob("*.safetensors"):
        assert_same_weights(whole, resumed, file.name)


def test_losses_after_kill_9_and_resume_equal_a_run_that_is_not_interrupted_but_evaluated_on_the_way(
    whole: Path, whole_values: dict, tmp_path: Path, monkeypatch
) -> None:
    killed, file = Path(whole_values["out"]), tmp_path / "recipe.toml"
    file.write_text(to_toml(build(Recipe, whole_values | {"checkpoint": {"every": 2}})))
    # In its sixth step, while the checkpoint behind the fourth one may be half written.
    program = """if True:
        import os, sys
        from contracap import cli
        from contracap.training import loop
        step = loop.train_step
        loop.train_step = lambda state, *rest: os.kill(os.getpid(), 9) if state.step == 5 else step(state, *rest)
        cli.main(["train", sys.argv[1]])"""
    process = subprocess.run([sys.executable, "-c", program, file], capture_output=True)
    assert process.returncode == -signal.SIGKILL
    assert len(losses(killed)) == 5
    with (killed / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 6, "lo')
    require_aligned_tensors(monkeypatch)
    recipe = load_recipe(file, ["resume=true"])
    resumed = train(recipe)
    assert losses(killed) == losses(whole)
    for name in ("model.safetensors", "average.safetensors"):
        assert_same_weights(resumed, whole / "checkpoints" / "last", name)
    assert train(recipe) == resumed  # a finished run has nothing left to do


def test_a_run_is_not_overwritten_and_not_mixed_with_another(finished: dict) -> None:
    with pytest.raises(CheckpointError, match="already holds a run, up to step-00000008: resume=true continues"):
        train(build(Recipe, finished | {"resume": False}))
    changed = {"seed": 5, "model": finished["model"] | {"text": {"layers": 1, "cls_mask": "legacy"}}}
    with pytest.raises(
        CheckpointError, match=r"model\.text\.cls_mask was None and is now legacy; seed was 0 and is now 5"
    ):
        train(build(Recipe, finished | changed))
    with pytest.raises(CheckpointError, match="already at step 8, beyond the recipe's 4 steps"):
        train(build(Recipe, finished | {"steps": 4}))
    shutil.rmtree(Path(finished["out"]) / "checkpoints" / "step-00000008")
    with pytest.raises(CheckpointError, match=r"points to step-00000008, which is gone; point it to step-00000004$"):
        train(build(Recipe, finished))


def test_a_loss_that_is_not_finite_stops_the_run_and_its_samples_are_named(recipe_values: dict, monkeypatch) -> None:
    scale_loss(monkeypatch, at=[6], factor=float("nan"))
    recipe = build(Recipe, recipe_values)
    with pytest.raises(TrainingError, match=r"step 6: .*nan.* Last good checkpoint: .*step-00000004"):
        train(recipe)
    (spike,) = lines(Path(recipe.out) / "spikes.jsonl")
    assert spike["step"] == 6 and "contrastive_loss nan" in spike["reason"]
    tokenizer = load("tiny", weights="random", seed=0)[1].tokenizer
    batches = TrainingBatches(recipe.data, image=ImageConfig(size=32), tokenizer=tokenizer, seed=0)
    assert spike["keys"] == list(islice(batches, 6))[-1].keys


def test_skipped_steps_between_good_ones_do_not_add_up(recipe_values: dict, monkeypatch) -> None:
    monkeypatch.setattr("contracap.training.loop.MAX_SKIPPED", 2)
    scale_loss(monkeypatch, at=[3, 6, 8], factor=float("nan"))
    folder, save, named = Path(recipe_values["out"]), CheckpointWriter.save, []

    def saving(self: CheckpointWriter, state: TrainingState, data: dict) -> None:
        spikes = folder / "spikes.jsonl"
        named.append((state.step, [line["step"] for line in lines(spikes)] if spikes.exists() else []))
        save(self, state, data)

    monkeypatch.setattr(CheckpointWriter, "save", saving)
    values = recipe_values | {"nonfinite": "skip", "log_every": 8, "checkpoint": {"every": 2}}
    model, _ = load(train(build(Recipe, values)))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    # None behind a step that was skipped, save the last; each with the steps that were skipped before.
    assert named == [(2, []), (4, [3]), (8, [3, 6, 8])]
    assert read_metrics(folder)[-1]["skipped_steps"] == 3


def test_a_run_whose_every_step_is_skipped_stops_and_keeps_its_good_checkpoint(
    recipe_values: dict, monkeypatch
) -> None:
    monkeypatch.setattr("contracap.training.loop.MAX_SKIPPED", 3)
    scale_loss(monkeypatch, at=range(3, 1000), factor=float("nan"))
    values = recipe_values | {"nonfinite": "skip", "steps": 100, "checkpoint": {"every": 1, "keep": 1}}
    with pytest.raises(
        TrainingError, match=r"step 5: .*, number 3 of such steps in a row\. Last .*step-00000002\. Remedy: start"
    ):
        train(build(Recipe, values))
    records = read_metrics(Path(values["out"]))
    assert [(record.get("skipped_steps"), "loss" in record) for record in records[1:]] == [(None, True)] + 2 * [
        (1, False)
    ]


def test_an_evaluation_that_fails_is_warned_of_and_the_run_goes_on(
    recipe_values: dict, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    validate, times = trainer.validation_losses, iter(range(9))

    def gone_at_first(*args, **kwargs):
        return validate(*args, **kwargs) if next(times) else Path("/gone.tar").read_text()

    monkeypatch.setattr(trainer, "build_suite", lambda *args: lambda model: 1 / 0)
    monkeypatch.setattr(trainer, "validation_losses", gone_at_first)
    values = recipe_values | {
        "steps": 4,
        "validate_every": 2,
        "evaluation": {"every": 2, "tasks": {"pairs": {"task": "retrieval", "data": recipe_values["data"]["train"]}}},
    }
    assert train(build(Recipe, values)).name == "step-00000004"
    assert "no figures at step 2: rank 0: No such file or directory: /gone.tar" in caplog.text
    assert "no figures at step 4: rank 0: ZeroDivisionError: division by zero" in caplog.text
    records = read_metrics(Path(values["out"]))
    assert [record["step"] for record in records if "validation_contrastive_loss" in record] == [4]


def test_a_shard_that_has_gone_is_not_blamed_on_the_run_folder(recipe_values: dict, monkeypatch) -> None:
    def gone(*args):
        raise FileNotFoundError(2, "No such file or directory", "shards/000.tar")

    monkeypatch.setattr(loop, "train_step", gone)
    with pytest.raises(FileNotFoundError, match=r"shards/000\.tar"):
        train(build(Recipe, recipe_values))


def test_a_run_starts_from_other_weights_at_another_picture_size(recipe_values: dict, tmp_path: Path) -> None:
    source, processor = load("tiny", weights="random", seed=7)
    legacy = build(Recipe, recipe_values | {"model": {"text": {"cls_mask": "legacy"}}}).model_config
    save_open_clip(tmp_path / "hub", model=legacy, image=processor.image_config, state=source.state_dict())
    values = recipe_values | {
        "initialise_from": str(tmp_path / "hub"),
        "frozen": ["vision", "text.token_embedding"],
        "model": {"vision": {"image_size": 48}},
    }
    model, image = initial_model(build(Recipe, values))
    assert (image.size, len(model.vision.position)) == (48, 37)
    assert model.config.text.cls_mask == "legacy"  # as the weights were trained
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained, _ = load(train(build(Recipe, values | {"steps": 3})))
    for name, parameter in trained.named_parameters():
        frozen = name.startswith(("vision.", "text.token_embedding."))
        assert torch.equal(parameter, before[name]) == frozen, name
    asked = {"model": {"vision": {"image_size": 48}, "text": {"cls_mask": "correct"}}}
    assert initial_model(build(Recipe, values | asked))[0].config.text.cls_mask == "correct"


def test_weights_of_another_size_are_refused(recipe_values: dict, tmp_path: Path) -> None:
    model, processor = load("tiny", weights="random", seed=0)
    save(tmp_path / "tiny.safetensors", model, processor)
    with pytest.raises(WeightsError, match=r"is not of size scenes: the weights do not fit: .*missing"):
        train(build(Recipe, recipe_values | {"size": "scenes", "initialise_from": str(tmp_path / "tiny.safetensors")}))


def test_bad_samples_are_named_and_counted_and_survive_a_resume(recipe_values: dict, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(recipe_values["data"]["train"], shards)
    good = list(read_records(str(shards / "000.tar")))
    broken = [("broken", {"png": b"no picture", "txt": b"a"}), ("silent", {"png": good[0].members["png"]})]
    write_shard(shards / "002.tar", broken)
    data = recipe_values["data"] | {"train": str(shards)}
    values = recipe_values | {"data": data}
    train(build(Recipe, values))
    folder = Path(values["out"])

    def named() -> list[tuple[int, str | None, str]]:
        return [(line["step"], line["key"], line["kind"]) for line in lines(folder / "skipped.jsonl")]

    first = named()
    assert {(key, kind) for _, key, kind in first} == {("broken", "broken_picture"), ("silent", "no_caption")}
    counts = read_metrics(folder)[-1]
    assert counts["skipped/broken_picture"] + counts["skipped/no_caption"] == len(first)
    link = folder / "checkpoints" / "last"
    link.unlink()
    link.symlink_to("step-00000004")
    train(build(Recipe, values | {"resume": True}))
    assert named() == first
    assert read_metrics(folder)[-1]["skipped/no_caption"] == counts["skipped/no_caption"]


def test_a_run_over_too_much_bad_data_stops_and_says_so(recipe_values: dict, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(recipe_values["data"]["train"], shards)
    write_shard(shards / "002.tar", [(f"bad{number}", {"png": b"none", "txt": b"a"}) for number in range(60)])
    data = recipe_values["data"] | {"train": str(shards), "streams": 1}
    with pytest.raises(OrderError, match=r"more than max_bad_share = 0\.05 .* broken_picture 51"):
        train(build(Recipe, recipe_values | {"data": data, "steps": 60}))
    assert len(lines(Path(recipe_values["out"]) / "skipped.jsonl")) == 51


def test_what_a_run_lacks_is_found_before_anything_is_built(recipe_values: dict, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("contracap.training.trainer.initial_model", lambda *args: pytest.fail("builds"))
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    data, gone = recipe_values["data"], str(tmp_path / "gone")
    task = {"task": "retrieval", "data": gone}
    for change, message in (
        ({"data": data | {"train": gone}}, "no such shard or folder of shards: .*gone"),
        ({"data": data | {"validation": gone}, "validate_every": 4}, "no such shard or folder of shards: .*gone"),
        ({"evaluation": {"tasks": {"x": task}}}, "task x: no such file or folder: .*gone"),
        ({"initialise_from": gone}, "no weights at .*gone"),
        ({"parallel": {"compile": True}}, "needs a C.. compiler, and there is no .*no-compiler"),
        ({"data": data | {"batch_size": 2**20}, "model": {"vision": {"image_size": 512}}}, "lower it"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train(build(Recipe, recipe_values | change))
    assert not Path(recipe_values["out"]).exists()


def test_fewer_validation_samples_than_a_batch_are_refused_before_the_first_step(recipe_values: dict) -> None:
    data = recipe_values["data"]
    wanted = data | {"batch_size": 64, "train": [data["train"], data["train"]]}
    with pytest.raises(ValueError, match="holds 48 samples with captions, fewer than one batch of 64"):
        train(build(Recipe, recipe_values | {"data": wanted, "validate_every": 4}))


def test_the_recipe_in_a_run_folder_means_the_same_in_another_working_folder(
    recipe_values: dict, colours: Path, tmp_path: Path, monkeypatch
) -> None:
    data = recipe_values["data"] | {"train": colours.name, "validation": colours.name}
    evaluation = {"every": 100, "captions": {"data": colours.name, "samples": 1}}
    monkeypatch.chdir(colours.parent)
    train(
        build(
            Recipe,
            recipe_values | {"steps": 2, "data": data, "evaluation": evaluation, "optimizer": {"warmup_steps": 1}},
        )
    )
    monkeypatch.chdir(tmp_path)
    assert train(load_recipe(recipe_values["out"], ["resume=true", "steps=3"])).name == "step-00000003"


def test_a_damaged_checkpoint_names_the_one_before_it(finished: dict) -> None:
    last = Path(finished["out"]) / "checkpoints" / "last"
    for part, damage in (("model.safetensors", "cut"), ("position.json", "{")):
        before = (last / part).read_bytes()
        (last / part).write_text(damage)
        with pytest.raises(CheckpointError, match=r"ln -sfn step-00000004 .*/checkpoints/last"):
            train(build(Recipe, finished | {"steps": 9}))
        (last / part).write_bytes(before)


def test_settings_that_are_hardly_wanted_are_warned_of(recipe_values: dict, caplog) -> None:
    data = recipe_values["data"] | {"batch_size": 56, "validation": "gone"}  # which is not looked at
    values = recipe_values | {"steps": 2, "data": data, "optimizer": {"warmup_steps": 1}}
    train(build(Recipe, values | {"loss": {"captioning": 0.0}}))
    for warning in ("validate_every is 0", "exceeds the 48 samples", "the decoder is not trained"):
        assert warning in caplog.text


def test_epochs_of_all_captions_are_counted_by_an_index_or_refused(
    recipe_values: dict, colours: Path, tmp_path
) -> None:
    shards = shutil.copytree(colours, tmp_path / "shards")
    data = recipe_values["data"] | {"train": str(shards), "captions": {"use": "all"}}
    values = {name: value for name, value in recipe_values.items() if name != "steps"}
    recipe = build(Recipe, values | {"epochs": 2, "data": data})
    with pytest.raises(ConfigError, match="no index has the number of captions: give steps, or run"):
        with_steps(recipe)
    index_folder(shards)
    assert with_steps(recipe).steps == 2 * 48 * 3 / 8


@pytest.mark.parametrize("changes", [{"vision": {"layers": 1}}, to_dict(tiny_mammut())], ids=["coca", "mammut"])
def test_a_run_starts_from_bare_weights_of_its_own_model(recipe_values: dict, tmp_path: Path, changes: dict) -> None:
    config = build(Recipe, recipe_values | {"model": changes}).model_config
    state = random_model(config, seed=1)[0].state_dict()
    torch.save(
        {"state_dict": {f"module.{name}": each for name, each in to_open_clip(state, config).items()}},
        tmp_path / "a.pt",
    )
    values = recipe_values | {"model": changes, "initialise_from": str(tmp_path / "a.pt")}
    model, _ = initial_model(build(Recipe, values))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"vision": {"activation": "quick_gelu"}}, 'set model.vision.activation = "gelu"'),
        ({"text": {"context": 12}}, "set model.text.context = 16"),
        (to_dict(tiny_mammut()), 'set model.text.pool = "class_token"'),
    ],
)
def test_weights_of_another_model_name_the_key_to_change(
    recipe_values: dict, weights: Path, change: dict, remedy: str
) -> None:
    with pytest.raises(WeightsError, match=remedy):
        initial_model(build(Recipe, recipe_values | {"model": change, "initialise_from": str(weights)}))
