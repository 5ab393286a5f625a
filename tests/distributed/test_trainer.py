"""Whole runs under torchrun, on gloo."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from contracap.config import build, to_toml
from contracap.training.logging import read_metrics
from contracap.training.recipe import Recipe, load_recipe
from contracap.training.trainer import train


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


@pytest.fixture
def recipe_file(recipe_values: dict, tmp_path: Path) -> Path:
    path, values = tmp_path / "recipe.toml", recipe_values | {"precision": "fp32", "resume": True}
    path.write_text(to_toml(build(Recipe, values | {"steps": 12, "checkpoint": {"every": 3}})))
    return path


def steps_done(folder: Path) -> int:
    """The last step that was recorded."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def workers(process: subprocess.Popen[bytes]) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.slow
def test_run_of_two_ranks_has_the_losses_of_one_process(recipe_file: Path, tmp_path: Path) -> None:
    two = torchrun(recipe_file, f"out={tmp_path / 'two'}")
    train(load_recipe(recipe_file, [f"out={tmp_path / 'one'}"]))
    finish(two)
    one, both = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 12
    for step, values in one.items():
        assert both[step] == pytest.approx(values, rel=1e-3 if step > 6 else 1e-4)  # differences of rounding grow


@pytest.mark.slow
def test_run_whose_ranks_are_killed_ten_times_comes_back_by_itself_with_the_same_losses(
    recipe_file: Path, tmp_path: Path
) -> None:
    changes = ("steps=120", "parallel.kind=fsdp", "ema_decay=0.5")
    finish(torchrun(recipe_file, f"out={tmp_path / 'whole'}", *changes))
    draw = random.Random(0)
    kills = sorted(draw.sample(range(2, 110), 10))
    hurt = torchrun(recipe_file, f"out={tmp_path / 'hurt'}", *changes, restarts=10)
    for kill in kills:
        while steps_done(tmp_path / "hurt") < kill:
            assert hurt.poll() is None
            time.sleep(0.002)
        os.kill(draw.choice(workers(hurt)), signal.SIGKILL)
        time.sleep(1)
    finish(hurt)
    assert len(losses(tmp_path / "hurt")) == 120
    assert losses(tmp_path / "hurt") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_torchrun_that_is_asked_to_end_leaves_a_checkpoint_that_goes_on(recipe_file: Path, tmp_path: Path) -> None:
    changes = ("steps=40", "parallel.kind=hsdp", "checkpoint.every=100", "data.workers=1")
    finish(torchrun(recipe_file, f"out={tmp_path / 'whole'}", *changes))
    asked = torchrun(recipe_file, f"out={tmp_path / 'asked'}", *changes, restarts=3)
    while steps_done(tmp_path / "asked") < 5:
        assert asked.poll() is None
        time.sleep(0.01)
    asked.send_signal(signal.SIGTERM)
    assert asked.wait(timeout=60) == 1  # torchrun's own status, and no restart
    done = steps_done(tmp_path / "asked")
    assert (tmp_path / "asked" / "checkpoints" / "last").resolve().name == f"step-{done:08d}"
    assert done < 40
    finish(torchrun(recipe_file, f"out={tmp_path / 'asked'}", *changes))
    assert losses(tmp_path / "asked") == losses(tmp_path / "whole")
