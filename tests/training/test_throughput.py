import time

import numpy as np
import pytest
import torch

from contracap.data.batch import Batch
from contracap.training.throughput import GIB, RankCounts, Throughput, summarise


def batch() -> Batch:
    """Three texts of 2, 4 and 5 tokens."""
    pixels, ids = torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, 5, dtype=torch.int64)
    return Batch(pixels=pixels, ids=ids, lengths=np.array([2, 4, 5]), keys=["a", "b", "c"])


def measured(**changed: float | None) -> RankCounts:
    fields = dict(steps=2, samples=8, tokens=40, seconds=4.0, waited=1.0, memory=1.0 * GIB, gpu_utilisation=None)
    return RankCounts(**(fields | changed))


def test_counts_begin_anew_with_each_record() -> None:
    throughput = Throughput(torch.device("cpu"))
    time.sleep(0.02)
    throughput.count_step(batch())
    throughput.count_wait(0.01)
    first = throughput.take()
    assert first.tokens == 11 and first.waited == 0.01 and first.seconds >= 0.02
    second = throughput.take()
    assert (second.samples, second.tokens, second.waited) == (0, 0, 0.0)
    assert second.seconds < first.seconds


def test_resident_memory_holds_what_the_process_allocates() -> None:
    throughput = Throughput(torch.device("cpu"))
    held = torch.ones(2**25)  # 128 MiB, touched
    assert held.nbytes < throughput.take().memory < 2**40


def test_speeds_are_of_all_ranks_and_the_rest_of_the_worst() -> None:
    found = summarise([measured(), measured(seconds=5.0, waited=4.0, tokens=60, memory=3.0 * GIB)], None)
    assert found == {
        "samples_per_second": 16 / 5,
        "tokens_per_second": 100 / 5,
        "data_wait_share": 0.8,
        "memory_gib": 3.0,
    }


@pytest.mark.parametrize("jump", [{"seconds": -3600.0}, {"seconds": 0.0}, {"waited": -2.0}, {"waited": 9.0}])
def test_a_clock_that_jumps_gives_no_rates(jump: dict[str, float]) -> None:
    assert summarise([measured(), measured(**jump)], lambda *_: 1.0).keys() == {"memory_gib"}


def test_utilisation_is_told_the_speed_of_one_device_and_the_mean_text() -> None:
    found = summarise([measured(), measured()], lambda samples_per_second, tokens: samples_per_second * 1000 + tokens)
    assert found["mfu"] == 2 * 1000 + 5


def test_gpu_utilisation_is_the_mean_and_only_there_if_all_know_it() -> None:
    assert summarise([measured(gpu_utilisation=0.5), measured(gpu_utilisation=1.0)], None)["gpu_utilisation"] == 0.75
    assert "gpu_utilisation" not in summarise([measured(gpu_utilisation=0.5), measured()], None)


def test_a_driver_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def utilization(device: torch.device) -> int:
        asked.append(device)
        raise ModuleNotFoundError("nvidia-ml-py")

    monkeypatch.setattr("torch.cuda.utilization", utilization)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 3 * GIB)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: None)
    throughput = Throughput(torch.device("cuda", 0))
    taken = [throughput.take(), throughput.take()]
    assert [each.gpu_utilisation for each in taken] == [None, None] and len(asked) == 1
    assert taken[0].memory == 3 * GIB
