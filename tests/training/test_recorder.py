import json
import math
from pathlib import Path
from typing import Any

from contracap.training.recorder import METRICS_FILE, SPIKES_FILE, Recorder, read_metrics


def strict(line: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null_in_the_files(tmp_path: Path) -> None:
    with Recorder(tmp_path, start=0, total_steps=2, loggers=[]) as recorder:
        recorder.record(1, {"loss": math.nan, "gradient_norm": math.inf, "learning_rate": 1e-3})
        recorder.record_spike({"step": 1, "loss": -math.inf, "samples": [{"score": math.nan, "key": "0001"}]})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None, "gradient_norm": None, "learning_rate": 1e-3}]
    for name in (METRICS_FILE, SPIKES_FILE):
        (line,) = (tmp_path / name).read_text().splitlines()
        strict(line)
    assert strict(line) == {"step": 1, "loss": None, "samples": [{"score": None, "key": "0001"}]}


def test_a_record_that_is_still_being_written_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    for text, steps in (("", []), ('{"step": 1', []), ('{"step": 1}\n', [1]), ('{"step": 1}\n{"st', [1])):
        path.write_text(text)
        assert [record["step"] for record in read_metrics(tmp_path)] == steps
