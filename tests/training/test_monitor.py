"""What a run sees of itself, as whole runs leave it behind."""

import json
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from contracap.config import build
from contracap.data.batch import Batch
from contracap.data.loader import TrainingBatches
from contracap.data.shards import read_samples
from contracap.images import ImageConfig
from contracap.parallel import ProcessGroup
from contracap.pretrained import load, read_weights
from contracap.training import spikes, step
from contracap.training.loop import TrainingError
from contracap.training.monitor import Monitor
from contracap.training.recipe import Recipe
from contracap.training.recorder import Recorder, read_metrics
from contracap.training.trainer import train
from contracap.training.watchdog import Watchdog
from contracap.training.writer import CheckpointWriter


def losses(folder: str) -> list[tuple[float, float]]:
    return [(record["loss"], record["gradient_norm"]) for record in read_metrics(Path(folder)) if "loss" in record]


def lines(recipe: Recipe, name: str) -> list[dict]:
    return [json.loads(line) for line in (Path(recipe.out) / name).read_text().splitlines()]


def batches(recipe: Recipe, count: int) -> list[Batch]:
    """What the run will be fed."""
    tokenizer = load("tiny", weights="random", seed=0)[1].tokenizer
    return list(islice(TrainingBatches(recipe.data, image=ImageConfig(size=32), tokenizer=tokenizer, seed=0), count))


def scale_loss(monkeypatch: pytest.MonkeyPatch, *, at: int, factor: float) -> None:
    """Multiply the contrastive loss of one step, from 1."""
    calls, loss = iter(range(1, 1000)), step.contrastive_loss
    monkeypatch.setattr(
        step,
        "contrastive_loss",
        lambda *args, **kwargs: loss(*args, **kwargs) * (factor if next(calls) == at else 1),
    )


def test_a_run_counts_its_tokens_and_its_use_of_the_device(recipe_values: dict) -> None:
    recipe = build(Recipe, recipe_values | {"steps": 4, "log_every": 2, "peak_tflops": 0.5})
    train(recipe)
    first, *records = read_metrics(Path(recipe.out))
    assert first == {"step": 0, "mfu_peak_tflops": 0.5}
    tokens = [int(batch.lengths.sum()) for batch in batches(recipe, 4)]
    for record, counted in zip(records, (tokens[:2], tokens[2:]), strict=True):
        mean = record["tokens_per_second"] / record["samples_per_second"]
        assert mean == pytest.approx(sum(counted) / 16)
        assert 0 < record["mfu"] < 1 and 0 < record["data_wait_share"] < 1
        assert 0.05 < record["memory_gib"] < 100


def test_without_a_known_peak_no_utilisation_is_made_up(recipe_values: dict) -> None:
    train(build(Recipe, recipe_values | {"steps": 3, "device": "cpu"}))
    assert not any("mfu" in name for record in read_metrics(Path(recipe_values["out"])) for name in record)


def test_a_slow_loader_shows_in_the_share_that_is_waited(recipe_values: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    made = TrainingBatches.__iter__

    def slow(self):
        for batch in made(self):
            time.sleep(0.3)
            yield batch

    recipe = build(Recipe, recipe_values | {"steps": 3})
    monkeypatch.setattr(TrainingBatches, "__iter__", slow)
    train(recipe)
    assert read_metrics(Path(recipe.out))[-1]["data_wait_share"] > 0.5


def test_a_spike_is_written_with_the_keys_of_its_samples(
    recipe_values: dict, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spikes, "WARM_UP", 12)
    scale_loss(monkeypatch, at=15, factor=1000.0)
    recipe = build(Recipe, recipe_values | {"steps": 16, "log_every": 8})
    train(recipe)
    (spike,) = lines(recipe, "spikes.jsonl")
    assert spike["step"] == 15 and spike["keys"] == batches(recipe, 15)[-1].keys
    assert spike["numbers"]["loss"] > 100 > spike["usual"]["loss"]
    (warning,) = [message for message in caplog.messages if message.startswith("spike")]
    assert warning.startswith("spike at step 15: loss ") and warning.endswith("spikes.jsonl names the samples")


class Two(ProcessGroup):
    """Rank 0 of two; what it gathers, the other one has, too, but for the keys of its samples."""

    def all_gather(self, value):
        measured, spikes = value
        return [value, (measured, [replace(spike, keys=["theirs"]) for spike in spikes])]


def test_the_keys_of_a_spike_are_those_of_all_ranks(tmp_path: Path) -> None:
    process_group = Two(world_size=2)
    steps = {"start": 0, "total_steps": 200}
    numbers = {"loss": 2.0, "gradient_norm": 1.0}
    pixels, ids = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.ones(1, 4, dtype=torch.int64)
    batch = Batch(pixels=pixels, ids=ids, lengths=np.array([4]), keys=["ours"])
    with (
        Recorder(tmp_path, loggers=[], **steps) as recorder,
        Watchdog(0.0, ProcessGroup(), start=0) as watchdog,
        Monitor(recorder, process_group, watchdog=watchdog, profile=None, utilisation=None, **steps) as monitor,
    ):
        for _ in range(120):
            monitor.step(numbers, batch)
        monitor.step(numbers | {"loss": 9.0}, batch)
        assert not (tmp_path / "spikes.jsonl").exists()  # until a message to the others is due anyway
        monitor.log({})
    (spike,) = map(json.loads, (tmp_path / "spikes.jsonl").read_text().splitlines())
    assert (spike["step"], spike["keys"], spike["usual"]["loss"]) == (121, ["ours", "theirs"], 2.0)
    assert read_metrics(tmp_path)[-1]["loss"] == 9.0


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_a_step_that_is_not_finite_is_written_with_its_keys(
    recipe_values: dict, monkeypatch: pytest.MonkeyPatch, nonfinite: str
) -> None:
    scale_loss(monkeypatch, at=6, factor=float("nan"))
    recipe = build(Recipe, recipe_values | {"nonfinite": nonfinite})
    if nonfinite == "stop":
        with pytest.raises(TrainingError):
            train(recipe)
    else:
        train(recipe)
    (spike,) = lines(recipe, "spikes.jsonl")
    assert spike["step"] == 6 and "contrastive_loss nan" in spike["reason"]
    assert spike["keys"] == batches(recipe, 6)[-1].keys


def test_evaluating_on_the_way_changes_nothing_of_the_training(
    recipe_values: dict, colours: Path, tmp_path: Path
) -> None:
    patch_dropout = {"model": {"vision": {"patch_dropout": 0.5}}}  # evaluation must leave it on for the next step
    plain = train(build(Recipe, recipe_values | patch_dropout))
    evaluation = {
        "every": 5,
        "tasks": {"pairs": {"task": "retrieval", "data": str(colours)}},
        "captions": {"data": str(colours), "samples": 2},
    }
    watched = recipe_values | patch_dropout | {"out": str(tmp_path / "watched"), "validate_every": 5}
    recipe = build(Recipe, watched | {"evaluation": evaluation})
    evaluated = train(recipe)
    assert losses(recipe.out) == losses(recipe_values["out"])
    ours, theirs = (read_weights(folder / "model.safetensors").state for folder in (plain, evaluated))
    assert all((ours[name] == theirs[name]).all() for name in ours)
    figures = [record for record in read_metrics(Path(recipe.out)) if "pairs/text_to_image_recall@1" in record]
    assert [record["step"] for record in figures] == [5, 8]
    first = next(iter(read_samples(str(colours / "000.tar"))))
    captions = lines(recipe, "captions.jsonl")
    assert [(line["step"], line["key"]) for line in captions] == [
        (step, key) for step in (5, 8) for key in ("0000", "0001")
    ]
    assert captions[0]["references"] == list(first.captions)


def test_wrong_paths_of_evaluators_are_found_before_the_first_step(recipe_values: dict, tmp_path: Path) -> None:
    recipe = build(
        Recipe, recipe_values | {"evaluation": {"tasks": {"x": {"task": "retrieval", "data": str(tmp_path / "gone")}}}}
    )
    with pytest.raises(FileNotFoundError, match="gone"):
        train(recipe)
    assert not (tmp_path / "run").exists()


def test_a_spike_is_written_with_the_checkpoint_that_follows_it(
    recipe_values: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale_loss(monkeypatch, at=3, factor=float("nan"))
    recipe = build(Recipe, recipe_values | {"log_every": 8, "nonfinite": "skip", "checkpoint": {"every": 4}})
    save, seen = CheckpointWriter.save, []

    def saving(*args: object) -> None:
        seen.append([line["step"] for line in lines(recipe, "spikes.jsonl")])
        save(*args)

    monkeypatch.setattr(CheckpointWriter, "save", saving)
    train(recipe)
    assert seen == [[3], [3]]
