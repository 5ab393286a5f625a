"""What two ranks under torchrun see of a run: one of them stops for a while, and one step is not finite."""

import json
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from contracap.config import build, to_toml
from contracap.data.loader import TrainingBatches
from contracap.images import ImageConfig
from contracap.pretrained import load
from contracap.training.recipe import Recipe
from contracap.training.recorder import read_metrics


@pytest.mark.slow
def test_two_ranks_name_the_one_that_is_waited_for_and_put_together_what_they_see(
    recipe_values: dict, colours: Path, tmp_path: Path
) -> None:
    evaluation = {
        "every": 4,
        "tasks": {"pairs": {"task": "retrieval", "data": str(colours)}},
        "captions": {"data": str(colours), "samples": 1},
    }
    values = {"stall_seconds": 2.0, "nonfinite": "skip", "peak_tflops": 1.0, "log_every": 4, "profile": True}
    recipe = build(Recipe, recipe_values | values | {"evaluation": evaluation})
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    child = Path(__file__).parent / "seen.py"
    run = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(child), str(tmp_path / "recipe.toml")),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    # Each reports itself, rank 1 with its stack; rank 0 says which of them it is, once.
    assert re.search(
        r"^rank 1 stands still: waiting for data of step 7 for 2 s, at contracap/training/", run.stderr, re.M
    )
    assert re.search(r"^rank 0 stands still: in the step of step 7 for 2 s", run.stderr, re.M)
    assert "in pausing\n" in run.stderr
    (verdict,) = re.findall(r"^the ranks wait for .*$", run.stderr, re.M)
    assert verdict.startswith("the ranks wait for rank 1, waiting for data of step 7 ")
    assert re.search(r"^rank 1 continues, after \d+ s waiting for data of step 7$", run.stderr, re.M)
    assert re.search(r"^rank 0 continues, ", run.stderr, re.M)

    # Counts are of both ranks, the wait is that of the rank that waited more.
    _, *records = read_metrics(Path(recipe.out))
    records = [record for record in records if "samples_per_second" in record]
    assert [record["step"] for record in records] == [4, 8]
    assert records[1]["data_wait_share"] > 0.5
    assert 2 < records[1]["tokens_per_second"] / records[1]["samples_per_second"] < 10
    assert records[0]["skipped_steps"] == 1.0

    # The samples of the step that was not finite, from both.
    (spike,) = map(json.loads, (Path(recipe.out) / "spikes.jsonl").read_text().splitlines())
    tokenizer = load("tiny", weights="random", seed=0)[1].tokenizer
    batches = TrainingBatches(recipe.data, image=ImageConfig(size=32), tokenizer=tokenizer, seed=0)
    assert spike["step"] == 4 and sorted(spike["keys"]) == sorted(list(islice(batches, 4))[-1].keys)

    profiles = sorted(path.name for path in (Path(recipe.out) / "profile").iterdir())
    assert profiles == ["rank-0.json.gz", "rank-1.json.gz"]
    assert len((Path(recipe.out) / "captions.jsonl").read_text().splitlines()) == 2
