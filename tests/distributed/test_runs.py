"""Whole runs on many ranks, by recipe: how they share the model, what they resume from, and how they end."""

import json
import multiprocessing
import re
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from contracap.config import build
from contracap.data.loader import TrainingBatches
from contracap.evaluation.config import EvaluationConfig
from contracap.evaluation.suite import build_suite
from contracap.images import ImageConfig
from contracap.pretrained import load, read_weights
from contracap.training.recipe import Recipe
from contracap.training.recorder import read_metrics
from contracap.training.trainer import train

pytestmark = pytest.mark.slow  # minutes of runs on two and four ranks

ROOT = Path(__file__).parents[2]
TROUBLES = {"no room for records": "ddp", "no room for weights": "ddp", "no room for moments": "fsdp"}
MEASURED = ("samples_per_second", "tokens_per_second", "data_wait_share", "memory_gib")


def numbers(folder: Path) -> dict[int, dict[str, float]]:
    """The records by step, but for what depends on the machine, and for figures of evaluators."""
    found: dict[int, dict[str, float]] = {}
    for record in read_metrics(folder):
        values = {name: value for name, value in record.items() if name not in MEASURED and "/" not in name}
        found.setdefault(record["step"], {}).update(values)
    return found


def same_up_to_rounding(ours: Path, theirs: Path) -> None:
    ours, theirs = numbers(ours), numbers(theirs)
    assert ours.keys() == theirs.keys() and len(theirs) == 6
    for step, values in theirs.items():
        assert ours[step] == pytest.approx(values, rel=1e-3 if step > 4 else 1e-4)  # differences grow


def same_average(ours: Path, theirs: Path) -> None:
    ours, theirs = (read_weights(run / "checkpoints" / "last" / "average.safetensors").state for run in (ours, theirs))
    for name in theirs:
        assert (ours[name] - theirs[name]).norm() <= 1e-3 * theirs[name].norm() + 1e-4, name


def evaluation(data: Path, *, every: int) -> dict[str, Any]:
    tasks = {"pairs": {"task": "retrieval", "data": str(data)}}
    return {"every": every, "tasks": tasks, "captions": {"data": str(data), "samples": 2}}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


class Runs:
    """A folder of runs on so many ranks, one after the other."""

    def __init__(self, folder: Path, count: int, colours: Path):
        self.folder, self.count = folder, count
        self.values = {
            "size": "tiny",
            "precision": "fp32",
            "steps": 6,
            "log_every": 1,
            "ema_decay": 0.5,
            "accumulation": 2,
            "validate_every": 6,
            "resume": True,
            "data": {"train": str(colours), "validation": str(colours), "batch_size": 8, "shuffle_buffer": 16},
            "optimizer": {"warmup_steps": 2},
            "checkpoint": {"every": 3},
        }
        self.queue: list[dict[str, Any]] = []

    def recipe(self, name: str, **changes: Any) -> dict[str, Any]:
        return self.values | {"out": str(self.folder / name)} | changes

    def add(self, name: str, kind: str, *, source: str | None = None, trouble: str = "none", **changes: Any) -> None:
        values = self.recipe(name, parallel={"kind": kind}, **changes)
        self.queue.append({"name": name, "values": values, "source": source, "trouble": trouble})

    def done(self) -> "Runs":
        if "fork" not in multiprocessing.get_all_start_methods():
            pytest.skip("no fork on this system")
        (self.folder / "runs.json").write_text(json.dumps(self.queue))
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "tests.distributed.runs", self.folder, str(self.count)],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=400,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        self.errors = done.stderr
        return self

    def ends(self, name: str) -> list[str]:
        """How the run ended on each rank."""
        return [(self.folder / f"{name}.{rank}").read_text() for rank in range(self.count)]


@pytest.fixture(scope="module")
def one(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process."""
    runs = Runs(tmp_path_factory.mktemp("alone"), 1, colours)
    train(build(Recipe, runs.recipe("one", accumulation=1)))
    return runs.folder / "one"


@pytest.fixture(scope="module")
def of_four(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What two ranks do not show: parameters shared by two, each pair with the whole model."""
    runs = Runs(tmp_path_factory.mktemp("four"), 4, colours)
    runs.add("hsdp", "hsdp")
    return runs.done()


@pytest.fixture(scope="module")
def of_two(one: Path, of_four: Runs, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("two"), 2, colours)
    runs.add("ddp", "ddp")
    runs.add("fsdp", "fsdp", evaluation=evaluation(colours, every=3))
    runs.add("one to fsdp", "fsdp", source=str(one))
    runs.add("hsdp of four to ddp", "ddp", source=str(of_four.folder / "hsdp"))
    runs.add("asked to end", "ddp", trouble="asked to end", out=str(runs.folder / "ended"))
    runs.add("ended", "ddp")
    for trouble, kind in TROUBLES.items():
        runs.add(trouble, kind, trouble=trouble)
    runs.add("wild", "fsdp", optimizer={"learning_rate": 1e30, "warmup_steps": 0})
    runs.add("captions", "fsdp", frozen=["vision"], loss={"contrastive": 0.0, "captioning": 1.0}, validate_every=0)
    runs.add(
        *("waited for", "ddp"),
        trouble="waited for",
        **{"steps": 8, "accumulation": 1, "validate_every": 0, "stall_seconds": 2.0, "nonfinite": "skip"},
        **{"peak_tflops": 1.0, "log_every": 4, "profile": True, "checkpoint": {"every": 4}},
        evaluation=evaluation(colours, every=4),
    )
    runs.add("bf16", "fsdp", precision="bf16", validate_every=0)
    return runs.done()


def assert_done_as_in_one_process(runs: Runs, name: str, one: Path) -> None:
    assert runs.ends(name) == ["done"] * runs.count
    same_up_to_rounding(runs.folder / name, one)
    same_average(runs.folder / name, one)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_on_two_ranks_has_the_losses_and_the_average_of_one_process(of_two: Runs, one: Path, kind: str) -> None:
    assert {"validation_contrastive_loss", "validation_captioning_loss"} <= set(numbers(one)[6])
    assert_done_as_in_one_process(of_two, kind, one)


def test_a_model_that_is_shared_out_has_the_figures_and_captions_of_one_process(of_two: Runs, colours: Path) -> None:
    """And trains on: its losses are those of one that is not evaluated."""
    run = of_two.folder / "fsdp"
    model, processor = load(run / "checkpoints" / "step-00000003", precision="fp32")
    result = build_suite(build(EvaluationConfig, evaluation(colours, every=3)), processor)(model)
    records = [record for record in read_metrics(run) if record["step"] == 3]
    assert result.values.items() <= {name: value for record in records for name, value in record.items()}.items()
    captions = [{"step": 3, **caption} for caption in json.loads(json.dumps(result.predictions))]
    assert captions == [line for line in lines(run / "captions.jsonl") if line["step"] == 3]


def test_a_run_on_four_ranks_has_the_losses_and_the_average_of_one_process(of_four: Runs, one: Path) -> None:
    assert_done_as_in_one_process(of_four, "hsdp", one)


@pytest.mark.parametrize("name", ["one to fsdp", "hsdp of four to ddp"])
def test_a_run_goes_on_with_other_ranks_in_another_way_to_share_the_model(of_two: Runs, one: Path, name: str) -> None:
    assert_done_as_in_one_process(of_two, name, one)


def test_a_run_on_two_ranks_goes_on_in_one_process(of_two: Runs, one: Path) -> None:
    alone = of_two.folder / "fsdp to one"
    shutil.copytree(of_two.folder / "fsdp", alone, symlinks=True)
    last = alone / "checkpoints" / "last"
    last.unlink()
    last.symlink_to("step-00000003")
    train(build(Recipe, of_two.recipe("fsdp to one")))
    same_up_to_rounding(alone, one)
    same_average(alone, one)
    assert load(last)[0].logit_scale.isfinite()


def test_one_rank_that_is_asked_to_end_ends_all_after_a_checkpoint_that_goes_on_bit_for_bit(of_two: Runs) -> None:
    for end in of_two.ends("asked to end"):
        assert end.startswith("Interrupted: interrupted after step 4 of 6: the same command continues from ")
        assert end.endswith("step-00000004")
    assert of_two.ends("ended") == ["done"] * of_two.count
    assert numbers(of_two.folder / "ended") == numbers(of_two.folder / "ddp")
    for file in ("model.safetensors", "average.safetensors"):
        ours, theirs = (
            read_weights(of_two.folder / run / "checkpoints" / "last" / file).state for run in ("ended", "ddp")
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("trouble", TROUBLES)
def test_every_rank_says_what_could_not_be_written_and_which_checkpoint_is_good(of_two: Runs, trouble: str) -> None:
    for end in of_two.ends(trouble):
        assert end.startswith("CheckpointError: ") and "\n" not in end
        assert "No space left on device: the disk. Last good checkpoint: none yet. " in end
    assert not list((of_two.folder / trouble / "checkpoints").glob("*"))


def test_every_rank_stops_at_a_loss_that_is_not_finite(of_two: Runs) -> None:
    for end in of_two.ends("wild"):
        assert end.startswith("TrainingError: step ") and "nan" in end


def test_frozen_parts_stay_and_bf16_is_near_when_the_model_is_shared_out(of_two: Runs, one: Path) -> None:
    assert of_two.ends("captions") == of_two.ends("bf16") == ["done"] * 2
    first, trained = (
        load(of_two.folder / "captions" / "checkpoints" / name)[0] for name in ("step-00000003", "step-00000006")
    )
    for (name, before), after in zip(first.named_parameters(), trained.parameters(), strict=True):
        if name.startswith(("vision.", "decoder.")):
            assert torch.equal(before, after) == name.startswith("vision."), name
    fp32, bf16 = numbers(one), numbers(of_two.folder / "bf16")
    for step in fp32:
        assert bf16[step]["loss"] == pytest.approx(fp32[step]["loss"], rel=0.02)
    assert bf16[1]["loss"] != fp32[1]["loss"]
    model, _ = load(of_two.folder / "bf16" / "checkpoints" / "last")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_two_ranks_name_the_one_that_is_waited_for_and_put_together_what_they_see(of_two: Runs) -> None:
    folder = of_two.folder / "waited for"
    assert of_two.ends("waited for") == ["done"] * 2
    # Each reports itself, rank 1 with its stack; rank 0 says which of them it is, once.
    assert re.search(
        r"^rank 1 stands still: waiting for data of step 7 for 2 s, at contracap/training/", of_two.errors, re.M
    )
    assert re.search(r"^rank 0 stands still: in the step of step 7 for 2 s", of_two.errors, re.M)
    assert "in pausing\n" in of_two.errors
    (verdict,) = re.findall(r"^the ranks wait for .*$", of_two.errors, re.M)
    assert verdict.startswith("the ranks wait for rank 1, waiting for data of step 7 ")
    assert re.search(r"^rank 1 continues, after \d+ s waiting for data of step 7$", of_two.errors, re.M)
    assert re.search(r"^rank 0 continues, ", of_two.errors, re.M)

    # Counts are of both ranks, the wait is that of the rank that waited more.
    _, *records = read_metrics(folder)
    records = [record for record in records if "samples_per_second" in record]
    assert [record["step"] for record in records] == [4, 8]
    assert records[1]["data_wait_share"] > 0.5
    assert 2 < records[1]["tokens_per_second"] / records[1]["samples_per_second"] < 10
    assert records[0]["skipped_steps"] == 1.0

    # The samples of the step that was not finite, from both.
    (spike,) = lines(folder / "spikes.jsonl")
    tokenizer = load("tiny", weights="random", seed=0)[1].tokenizer
    batches = TrainingBatches(
        build(Recipe, of_two.recipe("")).data, image=ImageConfig(size=32), tokenizer=tokenizer, seed=0
    )
    assert spike["step"] == 4 and sorted(spike["keys"]) == sorted(list(islice(batches, 4))[-1].keys)

    profiles = sorted(path.name for path in (folder / "profile").iterdir())
    assert profiles == ["rank-0.json.gz", "rank-1.json.gz"]
    assert [line["step"] for line in lines(folder / "captions.jsonl")] == [4, 4, 8, 8]
