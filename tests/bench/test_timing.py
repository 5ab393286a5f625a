import json
import subprocess
import sys

import pytest
import torch

from contracap.bench import timing
from contracap.bench.timing import (
    Benchmark,
    NoPeerError,
    Row,
    UnequalError,
    Work,
    compare,
    in_turns,
    matmul_rate,
    peak_mib,
    peer_module,
    require_equal,
    this_machine,
    threads,
)

RATIOS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 100.0)  # of the seven rounds


class Clock:
    """Time that passes only where a work says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, *seconds: float) -> Work:
        """Takes so long at each call, first unmeasured."""
        left = list(seconds)

        def work() -> None:
            self.now += left.pop(0)

        return work


def ratios(rounds: int = 7, **settings: float) -> Row:
    clock = Clock()
    return compare(
        "counting",
        ours=clock.work(50, *[2.0] * 7),
        checked_peer=lambda: (clock.work(50, *(2 * ratio for ratio in RATIOS)), "equal"),
        items=10,
        unit="items/s",
        rounds=rounds,
        clock=clock,
        **settings,
    )


def test_a_share_of_the_peers_work_is_made_up_to_the_whole() -> None:
    row = ratios(share=0.25)
    assert (row.ours, row.peer, row.ratio, row.quartiles) == (5.0, 1.25 / 4, 16.0, (10.0, 22.0))


def test_figures_are_medians_and_quartiles_of_the_measured_rounds() -> None:
    row = ratios()
    assert (row.ours, row.peer, row.ratio, row.quartiles) == (5.0, 1.25, 4.0, (2.5, 5.5))
    assert (row.note, row.reason) == ("equal", "")


def test_works_run_in_turns_after_one_run_of_each() -> None:
    calls = []
    seconds = in_turns(lambda: calls.append("a"), lambda: calls.append("b"), rounds=7, clock=lambda: float(len(calls)))
    assert calls == ["a", "b"] * 8
    assert seconds == [[1.0] * 7, [1.0] * 7]


def test_the_rate_of_a_product_is_its_operations_by_its_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(number / 2 for number in range(14))  # each product takes half a second
    monkeypatch.setattr(timing, "device_clock", lambda device: next(times))
    assert matmul_rate(torch.device("cpu"), torch.bfloat16, side=64) == 2 * 2 * 64**3


def test_few_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds must be a whole number of at least 7"):
        ratios(rounds=6)


def test_nothing_is_timed_where_the_outputs_differ() -> None:
    def checked_peer() -> tuple[Work, str]:
        raise UnequalError("row 3 differs")

    calls = []
    with pytest.raises(UnequalError, match="row 3 differs"):
        compare("x", ours=lambda: calls.append(1), checked_peer=checked_peer, items=1, unit="items/s")
    assert not calls


def test_numbers_are_equal_within_the_tolerance_of_the_peer_s_and_a_nan_never_is() -> None:
    note = require_equal(
        {"loss": 2.002, "norm": 1.0, "rate": 5.0}, {"loss": 2.0, "norm": torch.ones(())}, tolerance=0.01
    )
    assert note == "loss, norm differ by 1.0e-03 at most (allowed: 1e-02)"
    with pytest.raises(UnequalError, match=r"loss is 2\.002, the peer's 2: 1.0e-03 apart, allowed is 1e-04"):
        require_equal({"loss": 2.002}, {"loss": 2.0}, tolerance=1e-4)
    for ours, peer in ((float("nan"), 1.0), (1.0, float("nan"))):
        with pytest.raises(UnequalError, match="loss is"):
            require_equal({"loss": ours}, {"loss": peer}, tolerance=0.01)


def test_without_a_peer_ours_is_timed_and_the_rest_is_null_with_the_reason() -> None:
    clock = Clock()
    row = compare(
        "counting",
        ours=clock.work(50, *[2.0] * 7),
        checked_peer=lambda: (peer_module("open_clip_of_nowhere"), ""),
        items=10,
        unit="items/s",
        clock=clock,
    )
    assert (row.ours, row.peer, row.ratio, row.quartiles) == (5.0, None, None, None)
    assert row.reason.startswith("open_clip_of_nowhere cannot be imported (")
    content = Benchmark(rows=[row], samples=10, seed=0, machine={}).result("contracap bench x").to_dict()
    assert content["figures"] == {"counting": None}
    assert content["reasons"] == {"counting": row.reason}


def test_file_holds_the_keys_of_every_benchmark(tmp_path) -> None:
    path = tmp_path / "bench.json"
    Benchmark(rows=[ratios()], samples=10, seed=3, machine=this_machine()).result("contracap bench x").write(path)
    content = json.loads(path.read_text())
    assert (content["command"], content["seed"], content["samples"]) == ("contracap bench x", 3, 10)
    assert content["figures"] == {"counting": 4.0}
    assert content["machine"].keys() == {"cpu", "cores", "threads", "load"}
    (row,) = content["rows"]
    expected = {"work": "counting", "unit": "items/s", "ours": 5.0, "peer": 1.25, "ratio": 4.0, "quartiles": [2.5, 5.5]}
    assert row == expected | {"note": "equal", "reason": ""}


def test_table_has_a_line_for_each_row_and_says_why_a_peer_is_missing() -> None:
    rows = [ratios(), Row(work="memory", unit="MiB", ours=1234.5, reason="ours alone")]
    lines = Benchmark(rows=rows, samples=10, seed=0, machine={}).table().splitlines()
    assert [line.split() for line in lines] == [
        ["work", "ours", "peer", "unit", "ratio", "quartiles"],
        ["counting", "5.00", "1.25", "items/s", "4.00", "2.50", "to", "5.50"],
        ["memory", "1,234", "-", "MiB", "-", "-"],
        [],
        ["counting:", "equal"],
        ["memory:", "ours", "alone"],
    ]


def test_stand_ins_for_the_peer_do_not_stay() -> None:
    before = set(sys.modules)
    with pytest.raises(NoPeerError):
        peer_module("open_clip_of_nowhere")
    assert set(sys.modules) == before


@pytest.mark.slow
def test_the_peer_can_be_imported_first_of_all(open_clip) -> None:
    program = "from contracap.bench.timing import peer_module; peer_module('open_clip_train.data').get_data"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_threads_are_as_before_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise RuntimeError
    assert torch.get_num_threads() == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_remembers_what_was_freed() -> None:
    before = peak_mib()
    block = bytearray(64 * 2**20)
    del block
    assert peak_mib() >= before
    block = b"\1" * (256 * 2**20)
    del block
    assert peak_mib() >= 256


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_growth_counts_what_a_work_frees_again() -> None:
    program = (
        "import torch; from contracap.bench.timing import peak_growth; held = bytearray(64 * 2**20); "
        "print(peak_growth(lambda: len(b'1' * (256 * 2**20)), torch.device('cpu')))"
    )
    child = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert 240 < float(child.stdout) < 288  # 256, as the kernel counts
