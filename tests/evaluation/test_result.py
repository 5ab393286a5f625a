import json
from dataclasses import replace

import pytest

from contracap.evaluation.result import OWN_KEYS, PerSample, Result, list_versions


def test_file_holds_the_keys_of_every_result(tmp_path) -> None:
    path = tmp_path / "new" / "result.json"
    result = Result.of_samples(
        ["a", "b", "c", "ä"],
        {"acc1": 0.5},
        per_sample={"acc1": [1.0, 0.0, 1.0, 0.0]},
        reasons={"acc5": "too few classes"},
        predictions=[1, 2, 3, 4],
        details={"classes": 3},
    )
    replace(result, command="contracap evaluate x", seed=7).write(path)
    content = json.loads(path.read_text())
    assert content.pop("versions") == list_versions() and {"python", "torch", "numpy"} <= list_versions().keys()
    assert content == {
        "command": "contracap evaluate x",
        "seed": 7,
        "samples": 4,
        "figures": {"acc1": 0.5, "acc5": None},
        "reasons": {"acc5": "too few classes"},
        "keys_digest": "e7d027c8df1236b2",
        "classes": 3,
        "per_sample": {"acc1": {"samples": "e7d027c8df1236b2", "values": [1.0, 0.0, 1.0, 0.0]}},
    }
    assert sum(len(line) > 60 for line in path.read_text().splitlines()) == 1  # all values in one line
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_values_pair_up_by_the_samples_in_their_order() -> None:
    digests = {PerSample.of(keys, [1.0, 0.0]).samples for keys in (["a", "b"], ["b", "a"], ["a", "c"], ["a\nb"])}
    assert len(digests) == 4
    assert PerSample.of(["a", "b"], []).samples == PerSample.of(["a", "b"], [1.0]).samples


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_becomes_null_with_a_reason(value: float) -> None:
    content = Result(samples=1, figures={"CIDEr": value}).to_dict()
    assert content["figures"] == {"CIDEr": None}
    assert "finite number" in content["reasons"]["CIDEr"]


def test_null_without_a_reason_and_details_under_the_results_own_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="without a value or a reason: SPICE"):
        Result(samples=1, figures={"SPICE": None})
    values = {"acc1": PerSample.of(["a"], [1.0])}
    assert Result(samples=1, figures={"acc1": 1.0}, per_sample=values).to_dict().keys() == OWN_KEYS
    for key in OWN_KEYS:
        with pytest.raises(ValueError, match=f"own keys: {key}"):
            Result(samples=1, figures={}, details={key: {}})


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path) -> None:
    path = tmp_path / "result.json"
    Result(command="old", samples=1, figures={}).write(path)
    with pytest.raises(TypeError):
        Result(command="new", samples=1, figures={}, details={"odd": object()}).write(path)
    assert json.loads(path.read_text())["command"] == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
