import re
import time
from collections.abc import Callable

import pytest

from contracap.config import build
from contracap.data.loader import TrainingBatches
from contracap.parallel import ProcessGroup
from contracap.training.recipe import Recipe
from contracap.training.trainer import train
from contracap.training.watchdog import CHECKPOINT, DATA, STEP, Stall, Watchdog, describe_stalls


def reports(caplog: pytest.LogCaptureFixture, beginning: str) -> list[str]:
    return [message for message in caplog.messages if message.startswith(beginning)]


def wait_for(report: Callable[[], list[str]]) -> None:
    """Until there is one; ten seconds at most."""
    for _ in range(1000):
        if report():
            return
        time.sleep(0.01)


def test_a_loader_that_blocks_is_reported_once_with_its_stack(
    recipe_values: dict, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = TrainingBatches.__iter__

    def blocked() -> list[str]:
        return reports(caplog, "rank 0 stands still: waiting for data of step 3 for ")

    def blocking(self):
        for number, batch in enumerate(batches(self), start=1):
            if number == 3:
                wait_for(blocked)
                time.sleep(0.5)  # long enough for a second report
            yield batch

    monkeypatch.setattr(TrainingBatches, "__iter__", blocking)
    train(build(Recipe, recipe_values | {"steps": 4, "stall_seconds": 0.3}))
    (report,) = blocked()
    assert "at contracap/training/" in report.splitlines()[0]  # where the package waits
    assert "in blocking" in report  # and the stack down to what it waits for
    assert len(reports(caplog, "rank 0 continues, after ")) >= 1


def test_the_first_step_may_take_four_times_as_long(caplog: pytest.LogCaptureFixture) -> None:
    with Watchdog(0.2, ProcessGroup(), start=7) as watchdog:
        watchdog.enter(STEP)
        time.sleep(0.5)
        assert not caplog.messages
        wait_for(lambda: reports(caplog, "rank 0 stands still: in the step of step 8 for "))
    with Watchdog(0.2, ProcessGroup(), start=7) as watchdog:
        watchdog.step(8)
        began = time.monotonic()
        wait_for(lambda: reports(caplog, "rank 0 stands still: waiting for data of step 9 for "))
        assert time.monotonic() - began < 0.7
    assert len(reports(caplog, "rank 0 stands still")) == 2


def test_a_loop_that_gets_on_is_never_reported(caplog: pytest.LogCaptureFixture) -> None:
    with Watchdog(1.0, ProcessGroup(), start=0) as watchdog:
        watchdog.step(1)
        for _ in range(8):
            watchdog.enter(DATA)
            time.sleep(0.1)
            with watchdog.phase(CHECKPOINT):
                time.sleep(0.1)
    assert not caplog.messages


def test_no_seconds_watch_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with Watchdog(0.0, ProcessGroup(), start=0) as watchdog:
        watchdog.enter(DATA)
        time.sleep(0.1)
    assert not caplog.messages


def stall(step: int = 5, phase: str = STEP, *, waits: bool = True, place: str = "step.py:9 in step") -> Stall:
    return Stall(step=step, phase=phase, seconds=300.0, place=place, waits=waits)


@pytest.mark.parametrize(
    ("stalls", "expected"),
    [
        (
            {0: stall(), 1: stall(), 2: stall(phase=DATA, waits=False, place="remote.py:7 in read")},
            r"wait for rank 2, waiting for data of step 5 for 300 s, at remote\.py:7 in read$",
        ),
        ({0: stall(6), 1: stall(5), 2: stall(6)}, r"wait for rank 1, in the step of step 5 "),
        (
            {0: stall(phase=CHECKPOINT, waits=False), 2: stall(phase=CHECKPOINT)},
            "wait for rank 0, writing a checkpoint",
        ),
        ({0: stall(), 1: stall()}, "wait for rank 2, from which there is no word"),
        (
            {0: stall(), 1: stall(place="step.py:3 in backward"), 2: stall()},
            r"in the same step: rank 1 in the step of step 5, at step\.py:3 in backward; ranks 0, 2 in the step",
        ),
    ],
    ids=["at something of its own", "a step behind", "rank 0 writes", "gone", "inside the step"],
)
def test_rank_0_says_whom_the_others_wait_for(stalls: dict[int, Stall], expected: str) -> None:
    assert re.search(expected, describe_stalls(stalls, 3))


def test_many_ranks_are_named_in_one_short_line() -> None:
    stalls = {rank: stall() for rank in range(1024)} | {3: stall(phase=DATA, waits=False)}
    assert describe_stalls(stalls, 1024).startswith("the ranks wait for rank 3, ")
    assert len(describe_stalls({rank: stall() for rank in range(1024)}, 1024)) < 200
