import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_compiled_steps_write_the_same_captions_and_are_compiled_once_for_their_shape() -> None:
    command = [sys.executable, "-m", "tests.generation.compiled"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["captions"]["True"] == result["captions"]["False"] and len(result["captions"]["True"]) == 6
    assert result["graphs"] == 1
