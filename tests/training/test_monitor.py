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
from contracap.images import ImageConfig
from contracap.parallel import ProcessGroup
from contracap.pretrained import load
from contracap.training import spikes
from contracap.training.monitor import Monitor
from contracap.training.recipe import Recipe
from contracap.training.recorder import Recorder, read_metrics
from contracap.training.trainer import train
from contracap.training.watchdog import Watchdog

from .interference import lines, scale_loss


def batches(recipe: Recipe, count: int) -> list[Batch]:
    """What the run will be fed."""
    tokenizer = load("tiny", weights="random", seed=0)[1].tokenizer
    return list(islice(TrainingBatches(recipe.data, image=ImageConfig(size=32), tokenizer=tokenizer, seed=0), count))


def test_a_run_counts_its_tokens_and_its_use_of_the_device(whole: Path, whole_values: dict) -> None:
    first, *records = read_metrics(whole)
    assert first == {"step": 0, "mfu_peak_tflops": 0.5}
    records = [record for record in records if "loss" in record]
    for record, batch in zip(records, batches(build(Recipe, whole_values), 8), strict=True):
        mean = record["tokens_per_second"] / record["samples_per_second"]
        assert mean == pytest.approx(batch.lengths.sum() / 8)
        assert 0 < record["mfu"] < 1 and 0 < record["data_wait_share"] < 1
        assert 0.05 < record["memory_gib"] < 100


def test_a_slow_loader_shows_in_the_share_that_is_waited(recipe_values: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    made = TrainingBatches.__iter__

    def slow(self):
        for number, batch in enumerate(made(self)):
            time.sleep(2.0 if number == 2 else 0)
            yield batch

    recipe = build(Recipe, recipe_values | {"steps": 3})
    monkeypatch.setattr(TrainingBatches, "__iter__", slow)
    train(recipe)
    assert read_metrics(Path(recipe.out))[-1]["data_wait_share"] > 0.5


def test_a_spike_is_written_with_the_keys_of_its_samples(
    recipe_values: dict, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spikes, "WARM_UP", 5)
    scale_loss(monkeypatch, at=[8], factor=1000.0)
    recipe = build(Recipe, recipe_values | {"log_every": 8})
    train(recipe)
    (spike,) = lines(Path(recipe.out) / "spikes.jsonl")
    assert spike["step"] == 8 and spike["keys"] == batches(recipe, 8)[-1].keys
    assert spike["numbers"]["loss"] > 100 > spike["usual"]["loss"]
    (warning,) = [message for message in caplog.messages if message.startswith("spike")]
    assert warning.startswith("spike at step 8: loss ") and warning.endswith("spikes.jsonl names the samples")


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


def test_wrong_paths_of_evaluators_are_found_before_the_first_step(recipe_values: dict, tmp_path: Path) -> None:
    recipe = build(
        Recipe, recipe_values | {"evaluation": {"tasks": {"x": {"task": "retrieval", "data": str(tmp_path / "gone")}}}}
    )
    with pytest.raises(FileNotFoundError, match="gone"):
        train(recipe)
    assert not (tmp_path / "run").exists()
