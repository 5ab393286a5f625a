import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from contracap.config import ConfigError, build, to_dict, to_toml
from contracap.data.indexing import index_folder
from contracap.data.order import OrderError
from contracap.data.shards import read_records, write_shard
from contracap.pretrained import load, random_model, read_weights, save, save_open_clip
from contracap.pretrained.errors import WeightsError
from contracap.pretrained.open_clip_names import to_open_clip
from contracap.training.checkpoint import CheckpointError
from contracap.training.initial_model import initial_model
from contracap.training.loop import TrainingError
from contracap.training.recipe import Recipe, load_recipe, with_steps
from contracap.training.recorder import read_metrics
from contracap.training.start import precision_on
from contracap.training.trainer import train
from tests.model.tiny_models import tiny_mammut


def losses(folder: Path) -> list[tuple[int, float | None, float | None]]:
    """Step and both losses of every record that has them, as they are."""
    return [
        (record["step"], record.get("contrastive_loss"), record.get("captioning_loss"))
        for record in read_metrics(folder)
        if "loss" in record
    ]


def assert_same_weights(first: Path, second: Path, file: str = "model.safetensors") -> None:
    ours, theirs = read_weights(first / file).state, read_weights(second / file).state
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("has", "expected"),
    [({}, "fp32"), ({"avx2": True}, "fp32"), ({"amx_bf16": True}, "bf16"), ({"bf16": True}, "bf16")],
)
def test_a_cpu_computes_in_bf16_only_if_it_multiplies_it(has: dict, expected: str, monkeypatch) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: has, raising=False)
    cpu = torch.device("cpu")
    assert precision_on(cpu, "auto") == expected
    assert precision_on(cpu, "bf16") == "bf16" and precision_on(cpu, "fp32") == "fp32"


def test_a_run_records_its_precision_and_goes_on_in_no_other(recipe_values: dict, monkeypatch) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", dict, raising=False)
    train(build(Recipe, recipe_values))
    assert 'precision = "fp32"' in (Path(recipe_values["out"]) / "recipe.toml").read_text()
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    with pytest.raises(CheckpointError, match="precision was fp32 and is now bf16"):
        train(build(Recipe, recipe_values | {"resume": True}))


def test_a_run_leaves_what_the_documents_promise(recipe_values: dict) -> None:
    checkpoint = train(build(Recipe, recipe_values | {"validate_every": 4}))
    folder = Path(recipe_values["out"])
    assert checkpoint == folder / "checkpoints" / "step-00000008"
    assert (folder / "checkpoints" / "last").resolve() == checkpoint.resolve()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "last",
        "step-00000004",
        "step-00000008",
    ]
    assert list((folder / "tensorboard").iterdir())
    records = read_metrics(folder)
    assert [step for step, *_ in losses(folder)] == list(range(1, 9))
    assert {"learning_rate", "gradient_norm", "logit_scale", "samples_per_second"} <= set(records[0])
    assert [record["step"] for record in records if "validation_captioning_loss" in record] == [4, 8]
    model, processor = load(folder / "checkpoints" / "last")
    assert model.encode_image(processor.images([torch_picture()])).shape == (1, 32)


def torch_picture():
    from PIL import Image

    return Image.new("RGB", (50, 40), "red")


PATCH_DROPOUT = {"model": {"vision": {"patch_dropout": 0.5}}}
KINDS = {
    "both losses": PATCH_DROPOUT | {"ema_decay": 0.9, "accumulation": 2},
    "captioning only": {"loss": {"contrastive": 0.0, "captioning": 1.0}, "frozen": ["vision"]},
    "contrastive only": {"loss": {"contrastive": 1.0, "captioning": 0.0}},
    "MaMMUT": {"model": to_dict(tiny_mammut(feed_forward_before_cross=False))},
}


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_equals_uninterrupted_run(recipe_values: dict, tmp_path: Path, kind: str) -> None:
    values = recipe_values | KINDS[kind]
    whole = train(build(Recipe, values | {"out": str(tmp_path / "whole")}))
    parts = values | {"out": str(tmp_path / "parts"), "resume": True}
    stopped = build(Recipe, parts)
    # Cut off in the middle, behind the checkpoint of step 4: the records of steps 5 and 6 are written and then lost.
    with pytest.MonkeyPatch.context() as patch:
        count = iter(range(100))
        from contracap.training import loop

        step = loop.train_step

        def dies(*args):
            if next(count) == 6:
                raise KeyboardInterrupt
            return step(*args)

        patch.setattr(loop, "train_step", dies)
        with pytest.raises(KeyboardInterrupt):
            train(stopped)
    assert len(read_metrics(tmp_path / "parts")) == 6
    resumed = train(stopped)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same_weights(whole, resumed)
    if "ema_decay" in values:
        assert_same_weights(whole, resumed, "average.safetensors")
    assert train(stopped) == resumed  # a finished run has nothing left to do


SLOW_SIZES = [pytest.param(size, marks=pytest.mark.slow) for size in ("scenes", "flickr8k")]


@pytest.mark.parametrize("size", ["tiny", *SLOW_SIZES])
def test_a_resumed_run_computes_in_memory_as_torch_allocates_it(
    recipe_values: dict, tmp_path: Path, monkeypatch, size: str
) -> None:
    """On some CPUs kernels round by where a tensor lies: one that is read from a file must lie as a fresh one does."""
    from contracap.training import loop

    step, stops = loop.train_step, iter([12])

    def watched(state, *rest):
        moments = [each for each in state.optimizer.state.values()]
        tensors = [*state.model.parameters(), *state.average.values(), *(t for each in moments for t in each.values())]
        assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
        if state.step == 12 and next(stops, None):
            raise KeyboardInterrupt
        return step(state, *rest)

    data = recipe_values["data"] | {"streams": 4, "workers": 1}
    values = recipe_values | {"size": size, "precision": "fp32", "checkpoint": {"every": 5}, "data": data}
    values |= {"ema_decay": 0.9, "steps": 14, "resume": True}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(build(Recipe, values | {"out": str(tmp_path / "whole")}))
        monkeypatch.setattr(loop, "train_step", watched)
        with pytest.raises(KeyboardInterrupt):
            train(build(Recipe, values | {"out": str(tmp_path / "parts")}))
        train(build(Recipe, values | {"out": str(tmp_path / "parts")}))
    finally:
        torch.set_num_threads(threads)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for file in ("model.safetensors", "average.safetensors"):
        assert_same_weights(tmp_path / "parts/checkpoints/last", tmp_path / "whole/checkpoints/last", file)


def test_losses_after_kill_9_and_resume_equal_the_uninterrupted_run(recipe_values: dict, tmp_path: Path) -> None:
    values = recipe_values | {"steps": 20, "checkpoint": {"every": 3}, "resume": True}
    (tmp_path / "recipe.toml").write_text(to_toml(build(Recipe, values)))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(load_recipe(tmp_path / "recipe.toml", [f"out={whole}"]))
    command = [sys.executable, "-m", "contracap", "train", str(tmp_path / "recipe.toml"), f"out={killed}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (killed / "checkpoints" / "step-00000006").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert len(losses(killed)) < 20
    train(load_recipe(tmp_path / "recipe.toml", [f"out={killed}"]))
    assert len(losses(killed)) == 20
    assert losses(killed) == losses(whole)
    assert_same_weights(killed / "checkpoints" / "last", whole / "checkpoints" / "last")


def test_a_run_is_not_overwritten_and_not_mixed_with_another(recipe_values: dict) -> None:
    train(build(Recipe, recipe_values))
    with pytest.raises(CheckpointError, match="already holds a run, up to step-00000008: resume=true continues"):
        train(build(Recipe, recipe_values))
    changed = {"resume": True, "seed": 5, "model": {"text": {"cls_mask": "legacy"}}}
    with pytest.raises(
        CheckpointError, match=r"model\.text\.cls_mask was None and is now legacy; seed was 0 and is now 5"
    ):
        train(build(Recipe, recipe_values | changed))
    with pytest.raises(CheckpointError, match="already at step 8, beyond the recipe's 4 steps"):
        train(build(Recipe, recipe_values | {"resume": True, "steps": 4}))
    checkpoints = Path(recipe_values["out"]) / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000008")
    with pytest.raises(CheckpointError, match=r"points to step-00000008, which is gone; point it to step-00000004$"):
        train(build(Recipe, recipe_values | {"resume": True}))


def test_a_checkpoint_cut_off_while_being_written_is_not_taken(recipe_values: dict, monkeypatch) -> None:
    from contracap.training import checkpoint as module

    calls = iter(range(10))
    save_file = module.dcp.save

    def dies_at_the_second(*args, **kwargs):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return save_file(*args, **kwargs)

    monkeypatch.setattr(module.dcp, "save", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        train(build(Recipe, recipe_values))
    checkpoints = Path(recipe_values["out"]) / "checkpoints"
    assert (checkpoints / "last").resolve().name == "step-00000004"
    assert load(checkpoints / "last")
    assert train(build(Recipe, recipe_values | {"resume": True})).name == "step-00000008"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["last", "step-00000004", "step-00000008"]


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_a_loss_that_is_not_finite_stops_the_run_or_is_skipped(
    recipe_values: dict, monkeypatch, nonfinite: str
) -> None:
    from contracap.training import step as module

    calls = iter(range(100))
    loss = module.contrastive_loss
    monkeypatch.setattr(
        module,
        "contrastive_loss",
        lambda *args, **kwargs: loss(*args, **kwargs) * (float("nan") if next(calls) == 5 else 1),
    )
    recipe = build(Recipe, recipe_values | {"nonfinite": nonfinite})
    if nonfinite == "stop":
        with pytest.raises(TrainingError, match=r"step 6: .*nan.* Last good checkpoint: .*step-00000004"):
            train(recipe)
    else:
        model, _ = load(train(recipe))
        records = read_metrics(Path(recipe_values["out"]))
        assert [record.get("skipped_steps") for record in records] == [None] * 5 + [1] + [None] * 2
        assert "loss" not in records[5]
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def broken_from(monkeypatch: pytest.MonkeyPatch, *, first: int, last: int) -> None:
    """The contrastive losses of these steps, from 1, are not finite."""
    from contracap.training import step as module

    calls, loss = iter(range(1, 1000)), module.contrastive_loss
    monkeypatch.setattr(
        module,
        "contrastive_loss",
        lambda *args, **kwargs: loss(*args, **kwargs) * (float("nan") if first <= next(calls) <= last else 1),
    )


def test_a_run_whose_every_step_is_skipped_stops_and_keeps_its_good_checkpoint(
    recipe_values: dict, monkeypatch
) -> None:
    monkeypatch.setattr("contracap.training.loop.MAX_SKIPPED", 5)
    broken_from(monkeypatch, first=3, last=1000)
    values = recipe_values | {"nonfinite": "skip", "steps": 100, "checkpoint": {"every": 1, "keep": 1}}
    with pytest.raises(
        TrainingError, match=r"step 7: .*, number 5 of such steps in a row\. Last .*step-00000002\. Remedy: start"
    ):
        train(build(Recipe, values))


def test_skipped_steps_between_good_ones_do_not_add_up(recipe_values: dict, monkeypatch) -> None:
    monkeypatch.setattr("contracap.training.loop.MAX_SKIPPED", 2)
    broken_from(monkeypatch, first=8, last=8)
    calls = iter(range(1, 100))
    from contracap.training import step as module

    loss = module.captioning_loss
    monkeypatch.setattr(
        module,
        "captioning_loss",
        lambda *args, **kwargs: loss(*args, **kwargs) * (float("inf") if next(calls) in (4, 6) else 1),
    )
    values = recipe_values | {"nonfinite": "skip", "checkpoint": {"every": 2, "keep": 9}}
    last = train(build(Recipe, values))  # the last step was skipped, too
    assert [path.name for path in sorted(last.parent.glob("step-*"))] == ["step-00000002", "step-00000008"]
    assert load(last)


def test_an_evaluation_that_fails_is_warned_of_and_the_run_goes_on(
    recipe_values: dict, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    from contracap.training import trainer

    validate, times = trainer.validation_losses, iter(range(9))

    def gone_at_first(*args, **kwargs):
        return validate(*args, **kwargs) if next(times) else Path("/gone.tar").read_text()

    monkeypatch.setattr(trainer, "build_suite", lambda *args: lambda model: 1 / 0)
    monkeypatch.setattr(trainer, "validation_losses", gone_at_first)
    values = recipe_values | {
        "validate_every": 4,
        "evaluation": {"every": 4, "tasks": {"pairs": {"task": "retrieval", "data": recipe_values["data"]["train"]}}},
    }
    assert train(build(Recipe, values)).name == "step-00000008"
    assert "no figures at step 4: rank 0: No such file or directory: /gone.tar" in caplog.text
    assert "no figures at step 8: rank 0: ZeroDivisionError: division by zero" in caplog.text
    records = read_metrics(Path(values["out"]))
    assert [record["step"] for record in records if "validation_contrastive_loss" in record] == [8]


def test_a_shard_that_has_gone_is_not_blamed_on_the_run_folder(recipe_values: dict, monkeypatch) -> None:
    from contracap.training import loop

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
    trained, _ = load(train(build(Recipe, values)))
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


def test_metrics_after_the_checkpoint_and_a_cut_last_line_are_dropped(recipe_values: dict) -> None:
    folder = Path(recipe_values["out"])
    train(build(Recipe, recipe_values | {"steps": 4}))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "loss": 1.0}) + "\n" + '{"step": 6, "lo')
    train(build(Recipe, recipe_values | {"resume": True}))
    assert [record["step"] for record in read_metrics(folder)] == list(range(1, 9))


def test_bad_samples_are_named_and_counted_and_survive_a_resume(recipe_values: dict, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(recipe_values["data"]["train"], shards)
    good = list(read_records(str(shards / "000.tar")))
    broken = [("broken", {"png": b"no picture", "txt": b"a"}), ("silent", {"png": good[0].members["png"]})]
    write_shard(shards / "002.tar", broken)
    data = recipe_values["data"] | {"train": str(shards)}
    values = recipe_values | {"data": data, "steps": 12, "checkpoint": {"every": 4, "keep": 3}}
    train(build(Recipe, values))
    folder = Path(values["out"])

    def named() -> list[tuple[int, str | None, str]]:
        lines = map(json.loads, (folder / "skipped.jsonl").read_text().splitlines())
        return [(line["step"], line["key"], line["kind"]) for line in lines]

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
    lines = (Path(recipe_values["out"]) / "skipped.jsonl").read_text().splitlines()
    assert len(lines) == 51


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


def test_validation_shards_are_looked_at_before_the_first_step_and_only_if_they_are_used(recipe_values: dict) -> None:
    data = recipe_values["data"]
    train(build(Recipe, recipe_values | {"data": data | {"validation": "gone"}, "steps": 3}))
    wanted = data | {"batch_size": 64, "train": [data["train"], data["train"]]}
    with pytest.raises(ValueError, match="holds 48 samples with captions, fewer than one batch of 64"):
        train(
            build(
                Recipe,
                recipe_values | {"data": wanted, "validate_every": 4, "resume": False, "out": data["train"] + "-run"},
            )
        )


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
    assert train(load_recipe(recipe_values["out"], ["resume=true", "steps=4"])).name == "step-00000004"


def test_a_damaged_checkpoint_names_the_one_before_it(recipe_values: dict) -> None:
    last = train(build(Recipe, recipe_values))
    for part, damage in (("model.safetensors", "cut"), ("position.json", "{")):
        before = (last / part).read_bytes()
        (last / part).write_text(damage)
        with pytest.raises(CheckpointError, match=r"ln -sfn step-00000004 .*/checkpoints/last"):
            train(build(Recipe, recipe_values | {"steps": 9, "resume": True}))
        (last / part).write_bytes(before)


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({}, "validate_every is 0"),
        ({"data": {"batch_size": 56}}, "exceeds the 48 samples"),
        ({"loss": {"captioning": 0.0}}, "the decoder is not trained"),
    ],
)
def test_settings_that_are_hardly_wanted_are_warned_of(recipe_values: dict, caplog, change: dict, warning: str) -> None:
    data = recipe_values["data"] | change.get("data", {})
    train(build(Recipe, recipe_values | change | {"steps": 3, "data": data}))
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
