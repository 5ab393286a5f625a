"""Evaluators on a model whose parameters are shared out over the ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_model_that_is_shared_out_has_the_figures_of_one_process_and_trains_on(colours: Path, tmp_path: Path) -> None:
    child = Path(__file__).parent / "evaluated.py"
    subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(child), str(colours), str(tmp_path)),
        ],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["shared"] == found["alone"]
        first, *others = found["norms"]
        assert first > 0 and others == [first, first]
