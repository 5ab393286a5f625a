"""Whole runs on many ranks, by recipe: how they share the model, what they resume from, and how they end."""

import json
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from contracap.config import build
from contracap.pretrained import load, read_weights
from contracap.training.recipe import Recipe
from contracap.training.recorder import read_metrics
from contracap.training.trainer import train

pytestmark = pytest.mark.slow  # minutes of runs on two and four ranks

ROOT = Path(__file__).parents[2]
KINDS = ("ddp", "fsdp", "hsdp")
RESUMED = {"one to fsdp": ("one", "fsdp"), "fsdp to hsdp": ("fsdp", "hsdp"), "hsdp to ddp": ("hsdp", "ddp")}
TROUBLES = {"no room for records": "ddp", "no room for weights": "ddp", "no room for moments": "fsdp"}
MEASURED = ("samples_per_second", "tokens_per_second", "data_wait_share", "memory_gib")


def numbers(folder: Path) -> dict[int, dict[str, float]]:
    """The records by step, but for what depends on the machine."""
    found: dict[int, dict[str, float]] = {}
    for record in read_metrics(folder):
        values = {name: value for name, value in record.items() if name not in MEASURED}
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
def of_two(one: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("two"), 2, colours)
    for kind in KINDS:
        runs.add(kind, kind)
    for name, (source, kind) in RESUMED.items():
        runs.add(name, kind, source=str(one if source == "one" else runs.folder / source))
    runs.add("asked to end", "ddp", trouble="asked to end", out=str(runs.folder / "ended"))
    runs.add("ended", "ddp")
    for trouble, kind in TROUBLES.items():
        runs.add(trouble, kind, trouble=trouble)
    return runs.done()


@pytest.fixture(scope="module")
def of_four(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What two ranks do not show: parameters shared by two, each pair with the whole model. The rest is here to keep
    the other tests short."""
    two = Runs(tmp_path_factory.mktemp("of two"), 2, colours)
    two.add("fsdp", "fsdp")
    runs = Runs(tmp_path_factory.mktemp("four"), 4, colours)
    runs.add("hsdp", "hsdp")
    runs.add("of two", "fsdp", source=str(two.done().folder / "fsdp"))
    runs.add("wild", "hsdp", optimizer={"learning_rate": 1e30, "warmup_steps": 0})
    runs.add("captions", "fsdp", frozen=["vision"], loss={"contrastive": 0.0, "captioning": 1.0})
    runs.add("bf16", "fsdp", precision="bf16")
    return runs.done()


def assert_done_as_in_one_process(runs: Runs, name: str, one: Path) -> None:
    assert runs.ends(name) == ["done"] * runs.count
    same_up_to_rounding(runs.folder / name, one)
    same_average(runs.folder / name, one)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_two_ranks_has_the_losses_and_the_average_of_one_process(of_two: Runs, one: Path, kind: str) -> None:
    assert {"validation_contrastive_loss", "validation_captioning_loss"} <= set(numbers(one)[6])
    assert_done_as_in_one_process(of_two, kind, one)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_in_another_way_to_share_the_model(of_two: Runs, one: Path, name: str) -> None:
    assert_done_as_in_one_process(of_two, name, one)


@pytest.mark.parametrize("name", ["hsdp", "of two"])
def test_a_run_on_four_ranks_has_the_losses_of_one_process_also_where_it_goes_on_from_two(
    of_four: Runs, one: Path, name: str
) -> None:
    assert_done_as_in_one_process(of_four, name, one)


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


def test_every_rank_stops_at_a_loss_that_is_not_finite(of_four: Runs) -> None:
    for end in of_four.ends("wild"):
        assert end.startswith("TrainingError: step ") and "nan" in end


def test_frozen_parts_stay_and_bf16_is_near_when_the_model_is_shared_out(of_four: Runs, one: Path) -> None:
    assert of_four.ends("captions") == of_four.ends("bf16") == ["done"] * 4
    first, trained = (
        load(of_four.folder / "captions" / "checkpoints" / name)[0] for name in ("step-00000003", "step-00000006")
    )
    for (name, before), after in zip(first.named_parameters(), trained.parameters(), strict=True):
        if name.startswith(("vision.", "decoder.")):
            assert torch.equal(before, after) == name.startswith("vision."), name
    fp32, bf16 = numbers(one), numbers(of_four.folder / "bf16")
    for step in fp32:
        assert bf16[step]["loss"] == pytest.approx(fp32[step]["loss"], rel=0.02)
    assert bf16[1]["loss"] != fp32[1]["loss"]
    model, _ = load(of_four.folder / "bf16" / "checkpoints" / "last")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
