import gzip
import json
from pathlib import Path

import pytest
import torch

from contracap.training.profiling import Profile


def traced_steps(folder: Path) -> set[str]:
    """The steps, from 0, that the trace of rank 0 holds; it holds operators, too."""
    events = json.loads(gzip.decompress((folder / "profile" / "rank-0.json.gz").read_bytes()))["traceEvents"]
    names = {event["name"] for event in events if event.get("ph") == "X"}
    assert "aten::addmm" in names
    return {name for name in names if name.startswith("ProfilerStep#")}


def test_a_run_leaves_a_trace_of_its_steps(whole: Path) -> None:
    assert traced_steps(whole) == {f"ProfilerStep#{step}" for step in (5, 6, 7)}
    assert [path.name for path in (whole / "profile").iterdir()] == ["rank-0.json.gz"]


@pytest.mark.parametrize(("steps", "traced"), [(17, (12, 13, 14)), (3, (2,))])
def test_three_steps_are_traced_or_the_last_ones_of_a_short_run(
    tmp_path: Path, steps: int, traced: tuple[int, ...]
) -> None:
    profile, layer = Profile(tmp_path, rank=0, steps=steps), torch.nn.Linear(4, 4)
    for _ in range(steps):
        layer(torch.ones(2, 4))
        profile.step()
    assert traced_steps(tmp_path) == {f"ProfilerStep#{step}" for step in traced}


def test_too_short_a_run_says_that_there_is_no_trace(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    profile = Profile(tmp_path, rank=0, steps=2)
    profile.step()
    profile.step()
    profile.close()
    assert caplog.messages == ["profile: with 2 steps left there is nothing to trace; it takes 3"]
    assert not list(tmp_path.iterdir())


def test_a_run_that_ends_early_leaves_no_trace(tmp_path: Path) -> None:
    profile = Profile(tmp_path, rank=0, steps=100)
    profile.step()
    profile.close()
    assert not list(tmp_path.iterdir())
