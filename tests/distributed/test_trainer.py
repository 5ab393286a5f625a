"""Whole runs under torchrun, on gloo."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from contracap.config import build, to_toml
from contracap.recipe import Recipe
from contracap.trainer import train
from contracap.training.metrics import read_metrics

pytest_plugins = ["tests.training.conftest"]


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
    assert process.wait(timeout=120) == 0


@pytest.fixture
def recipe_file(recipe_values: dict, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(build(Recipe, recipe_values | {"steps": 12, "checkpoint": {"every": 3}})))
    return path


def test_run_of_two_ranks_has_the_losses_of_one_process(recipe_values: dict, recipe_file: Path, tmp_path: Path) -> None:
    two = torchrun(recipe_file, f"out={tmp_path / 'two'}")
    train(build(Recipe, recipe_values | {"steps": 12, "checkpoint": {"every": 3}}))
    finish(two)
    one, both = losses(Path(recipe_values["out"])), losses(tmp_path / "two")
    assert len(one) == 12
    for step, values in one.items():
        assert both[step] == pytest.approx(values, rel=1e-3 if step > 6 else 1e-4)  # differences of rounding grow


@pytest.mark.slow
def test_run_whose_rank_is_killed_comes_back_by_itself_with_the_same_losses(recipe_file: Path, tmp_path: Path) -> None:
    finish(torchrun(recipe_file, f"out={tmp_path / 'whole'}", "steps=40"))
    hurt = torchrun(recipe_file, f"out={tmp_path / 'hurt'}", "steps=40", "resume=true", restarts=10)
    metrics, kills = tmp_path / "hurt" / "metrics.jsonl", 0
    while hurt.poll() is None and kills < 3:
        time.sleep(0.05)
        done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        if done >= 10 * (kills + 1):
            children = Path(f"/proc/{hurt.pid}/task/{hurt.pid}/children").read_text().split()
            os.kill(int(children[kills % len(children)]), signal.SIGKILL)
            kills += 1
            time.sleep(1)
    finish(hurt)
    assert kills == 3
    assert losses(tmp_path / "hurt") == losses(tmp_path / "whole")
