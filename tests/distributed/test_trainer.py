"""Whole runs under torchrun, on gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from contracap.config import build, to_toml
from contracap.training.recipe import Recipe, load_recipe
from contracap.training.recorder import read_metrics
from contracap.training.trainer import train

pytestmark = pytest.mark.slow


def losses(folder: Path) -> dict[int, tuple[float, float, float]]:
    names = ("contrastive_loss", "captioning_loss", "gradient_norm")
    return {
        record["step"]: tuple(record[name] for name in names) for record in read_metrics(folder) if "loss" in record
    }


def torchrun(recipe: Path, *overrides: str, ranks: int = 2, restarts: int = 0) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", "--monitor-interval=0.1"),
            *("-m", "contracap", "train", str(recipe), *overrides),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    assert process.wait(timeout=300) == 0


@pytest.fixture(scope="module")
def recipe_file(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    values = {
        "size": "tiny",
        "steps": 40,
        "out": str(folder / "run"),
        "log_every": 1,
        "precision": "fp32",
        "ema_decay": 0.5,
        "resume": True,
        "parallel": {"kind": "fsdp"},
        "data": {"train": str(colours), "validation": str(colours), "batch_size": 8, "shuffle_buffer": 16},
        "optimizer": {"warmup_steps": 2},
        "checkpoint": {"every": 3},
    }
    (folder / "recipe.toml").write_text(to_toml(build(Recipe, values)))
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def whole(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    finish(torchrun(recipe_file, f"out={folder}"))
    return folder


def steps_done(folder: Path) -> int:
    """The last step that was recorded."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def workers(process: subprocess.Popen[bytes]) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_for_step(process: subprocess.Popen[bytes], folder: Path, step: int) -> None:
    while steps_done(folder) < step:
        assert process.poll() is None
        time.sleep(0.01)


def test_run_of_two_ranks_has_the_losses_of_one_process(recipe_file: Path, whole: Path, tmp_path: Path) -> None:
    train(load_recipe(recipe_file, [f"out={tmp_path / 'one'}"]))
    one, both = losses(tmp_path / "one"), losses(whole)
    assert len(one) == len(both) == 40
    for step in range(1, 13):
        assert both[step] == pytest.approx(one[step], rel=1e-3 if step > 6 else 1e-4)  # differences of rounding grow


def test_run_whose_ranks_are_killed_comes_back_by_itself_with_the_same_losses(
    recipe_file: Path, whole: Path, tmp_path: Path
) -> None:
    hurt = torchrun(recipe_file, f"out={tmp_path / 'hurt'}", restarts=3)
    killed: set[int] = set()
    for step, rank in ((2, 0), (2, 1), (20, 0)):  # before the first checkpoint, while they start, and after
        wait_for_step(hurt, tmp_path / "hurt", step)
        while len(started := [worker for worker in workers(hurt) if worker not in killed]) < 2:
            time.sleep(0.01)
        killed |= set(started)
        os.kill(started[rank], signal.SIGKILL)
    finish(hurt)
    assert losses(tmp_path / "hurt") == losses(whole)


def test_torchrun_that_is_asked_to_end_leaves_a_checkpoint_that_goes_on(
    recipe_file: Path, whole: Path, tmp_path: Path
) -> None:
    changes = (f"out={tmp_path / 'asked'}", "checkpoint.every=100", "data.workers=1")
    asked = torchrun(recipe_file, *changes, restarts=3)
    wait_for_step(asked, tmp_path / "asked", 5)
    asked.send_signal(signal.SIGTERM)
    assert asked.wait(timeout=60) == 1  # torchrun's own status, and no restart
    done = steps_done(tmp_path / "asked")
    assert (tmp_path / "asked" / "checkpoints" / "last").resolve().name == f"step-{done:08d}"
    assert done < 40
    finish(torchrun(recipe_file, *changes))
    assert losses(tmp_path / "asked") == losses(whole)
