import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks.harness import (
    Benchmark,
    Row,
    Run,
    UnequalError,
    Work,
    alternate,
    compare,
    compare_memory,
    in_fresh_process,
    require_equal,
)
from benchmarks.machine import peak_growth
from benchmarks.peers import peer_module

CPU = torch.device("cpu")
RATIOS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 100.0)  # of the seven rounds


class Clock:
    """Time that passes only where a work says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, *seconds: float) -> Work:
        """Takes this long at each call; the first is not timed."""
        left = list(seconds)

        def work() -> None:
            self.now += left.pop(0)

        return work


def ratios(share: float = 1.0) -> Row:
    clock = Clock()
    return compare(
        "counting",
        run=Run(),
        ours=clock.work(50, *[2.0] * 7),
        checked_peer=lambda: (clock.work(50, *(2 * ratio for ratio in RATIOS)), "equal"),
        items=10,
        unit="items/s",
        clock=clock,
        share=share,
    )


@pytest.mark.parametrize("share", [1.0, 0.25])  # of the work, that the peer does
def test_figures_are_medians_and_quartiles_of_the_timed_rounds(share: float) -> None:
    row = ratios(share)
    assert (row.ours, row.peer, row.ratio, row.quartiles) == (5.0, 1.25 * share, 4 / share, (2.5 / share, 5.5 / share))
    assert (row.note, row.reason) == ("equal", "")


def test_runs_alternate_after_an_untimed_run_of_each() -> None:
    calls = []
    clock = lambda: float(len(calls))  # noqa: E731
    seconds = alternate(lambda: calls.append("ours"), lambda: calls.append("peer"), rounds=7, clock=clock)
    assert calls == ["ours", "peer"] * 8
    assert seconds == [[1.0] * 7, [1.0] * 7]


def test_nothing_is_timed_if_the_outputs_differ() -> None:
    def checked_peer() -> tuple[Work, str]:
        raise UnequalError("row 3 differs")

    calls = []
    with pytest.raises(UnequalError):
        compare("x", run=Run(), ours=lambda: calls.append(1), checked_peer=checked_peer, items=1, unit="items/s")
    assert not calls


def test_without_a_peer_only_ours_is_measured() -> None:
    row = compare(
        "counting",
        run=Run(),
        ours=lambda: None,
        checked_peer=lambda: (peer_module("open_clip_of_nowhere"), ""),
        items=10,
        unit="items/s",
    )
    memory = compare_memory(
        "holding", ours=lambda: (3.0, {}), peer=lambda: peer_module("open_clip_of_nowhere"), tolerance=0.0
    )
    for found in (row, memory):
        assert found.ours > 0 and (found.peer, found.ratio, found.quartiles) == (None, None, None)
        assert found.reason.startswith("open_clip_of_nowhere cannot be imported")


def test_numbers_are_equal_within_the_tolerance_and_nan_never_is() -> None:
    ours = {"loss": 2.002, "norm": 1.0, "rate": 5.0}
    assert "1.0e-03" in require_equal(ours, {"loss": 2.0, "norm": torch.ones(())}, tolerance=0.01)
    nan = float("nan")
    for one, other in ((2.002, 2.0), (nan, 1.0), (1.0, nan)):
        with pytest.raises(UnequalError, match="loss"):
            require_equal({"loss": one}, {"loss": other}, tolerance=1e-4)


def test_memory_of_sides_with_other_numbers_has_no_row() -> None:
    row = compare_memory("x", ours=lambda: (5.0, {"loss": 1.0}), peer=lambda: (60.0, {"loss": 1.0}), tolerance=1e-4)
    assert (row.ours, row.peer, row.ratio, row.unit) == (5.0, 60.0, 12.0, "MiB")
    with pytest.raises(UnequalError):
        compare_memory("x", ours=lambda: (5.0, {"loss": 1.0}), peer=lambda: (60.0, {"loss": 2.0}), tolerance=1e-4)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"first": lambda run: ratios(), "second": lambda run: Row(work="two", unit="MiB", ours=1.0, reason="alone")}
    module = SimpleNamespace(
        BENCHMARK=Benchmark(rows=rows, cuda_rows={"third": rows["first"]}, samples=lambda: 10, cuda=True)
    )
    monkeypatch.setattr(command_line.importlib, "import_module", lambda name: module)


def test_result_file_holds_the_rows_that_are_asked_for_versions_and_machine(
    benchmark: None, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "bench.json"
    assert command_line.main(["data", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["command"] == f"python -m benchmarks data --json {path}"
    assert (content["seed"], content["samples"]) == (0, 10)
    assert content["figures"] == {"counting": 4.0, "two": None} and content["reasons"] == {"two": "alone"}
    assert content["machine"].keys() == {"cpu", "cores", "threads", "load", "device"} and "torch" in content["versions"]
    expected = {"work": "counting", "unit": "items/s", "ours": 5.0, "peer": 1.25, "ratio": 4.0, "quartiles": [2.5, 5.5]}
    assert content["rows"][0] == expected | {"note": "equal", "reason": ""}
    capsys.readouterr()
    assert command_line.main(["data", "--rows", "second"]) == 0
    out = capsys.readouterr().out
    assert "two" in out and "alone" in out and "counting" not in out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        *(("dta", "data"), ("data --rows fourth", "first"), ("data --rows third", "cuda")),
        *(("data --rounds 6", "7"), ("data --json .", "directory")),
    ],
)
def test_wrong_arguments_are_refused_with_what_would_do(benchmark: None, capsys, arguments: str, word: str) -> None:
    try:
        assert command_line.main(arguments.split()) == 1
    except SystemExit as exit:
        assert exit.code == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("name", command_line.NAMES)
def test_every_name_has_rows(name: str) -> None:
    assert command_line.importlib.import_module(f"benchmarks.{name}").BENCHMARK.rows


def growth(mib: int) -> float:
    return peak_growth(lambda: len(b"1" * (mib * 2**20)), CPU)


def test_peak_growth_counts_what_is_freed_again() -> None:
    assert 240 < in_fresh_process(growth, 256) < 288
