"""A run whose ranks torchrun starts, starts again, and is asked to end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from contracap.config import build, to_toml
from contracap.training.recipe import Recipe

from .test_runs import Runs, numbers


def torchrun(recipe: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node=2", "--max-restarts=3", "--monitor-interval=0.1"),
            *("-m", "contracap", "train", str(recipe)),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


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


@pytest.mark.slow
def test_a_run_whose_ranks_are_killed_and_that_is_asked_to_end_has_the_losses_of_one_that_nothing_interrupts(
    colours: Path, tmp_path: Path
) -> None:
    runs = Runs(tmp_path, 2, colours)
    data = runs.values["data"] | {"workers": 1}
    runs.add("whole", "fsdp", steps=40, validate_every=0, data=data)
    runs.done()
    hurt = tmp_path / "hurt"
    (tmp_path / "recipe.toml").write_text(to_toml(build(Recipe, runs.queue[0]["values"] | {"out": str(hurt)})))

    # Ranks that are killed come back by themselves: one before the first checkpoint, one after.
    process, killed = torchrun(tmp_path / "recipe.toml"), set[int]()
    for step, rank in ((2, 1), (8, 0)):
        wait_for_step(process, hurt, step)
        while len(started := [worker for worker in workers(process) if worker not in killed]) < 2:
            time.sleep(0.01)
        killed |= set(started)
        os.kill(started[rank], signal.SIGKILL)

    # The end is behind a checkpoint; torchrun has a status of its own, and starts nothing again.
    wait_for_step(process, hurt, 16)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 1
    done = steps_done(hurt)
    assert (hurt / "checkpoints" / "last").resolve().name == f"step-{done:08d}"
    assert done < 40

    assert torchrun(tmp_path / "recipe.toml").wait(timeout=300) == 0
    assert numbers(hurt) == numbers(tmp_path / "whole")
