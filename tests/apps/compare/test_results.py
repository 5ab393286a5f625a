import json
from pathlib import Path

import pytest

from contracap.apps.compare.results import load_result, names_of
from tests.apps.compare.worlds import result


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    written = result({"cifar10/acc1": [1.0, 0.0, 1.0]}, {"coco/SPICE": None, "coco/Bleu_4": 0.25})
    written.write(tmp_path / "results.json")
    assert load_result(tmp_path / "results.json") == written


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"figures": None}, "no `figures`"),
        ({"figures": {}}, "has no figures"),
        ({"figures": {"acc1": "0.5"}}, "acc1 is '0.5'"),
        ({"samples": None}, "samples is None"),
        ({"figures": {"acc1": 10**400}}, r"figure acc1 is 10{39}; it must be"),
        ({"figures": {"acc1": float("nan")}}, "figure acc1 is nan"),
        ({"tasks": ["coco"]}, "`tasks` must be an object"),
        ({"asked": ["cifar10"]}, "`asked` must be an object"),
        ({"tasks": {"coco": {"captions": "5"}}}, "`captions` must be how many"),
        ({"rows": [], "resamples": 10_000}, "holds the gaps of a comparison, not scores"),
        ({"per_sample": {"acc1": {"values": [0.5]}}}, "must have `samples`, a digest of the samples' keys; it is None"),
        ({"per_sample": {"acc1": {"samples": "x", "values": [1.5e308, -1.5e308]}}}, "list of numbers"),
        ({"reasons": []}, "must be objects"),
        ({"per_sample": {"acc1": {"samples": "x", "values": ["1"]}}}, "list of numbers"),
        ({"per_sample": {"acc1": {"samples": "x", "values": [0.0, 0.0]}}}, "the mean of its values is 0"),
    ],
)
def test_a_file_that_is_no_result_is_refused_by_name(tmp_path: Path, change: dict, words: str) -> None:
    content = {"samples": 2, "figures": {"acc1": 0.5}} | change
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words) as caught:
        load_result(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["[1, 2]", "3", "{", "", "[" * 100_000, "1" * 5000])
def test_other_json_and_no_json_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"results\.json"):
        load_result(path)


def test_systems_are_called_as_what_tells_their_files_apart() -> None:
    assert names_of(Path("coca/results.json"), Path("clip/results.json")) == ("coca", "clip")
    assert names_of(Path("coca.json"), Path("clip.json")) == ("coca", "clip")
    assert names_of(Path("coca.json"), Path("clip/results.json")) == ("coca", "clip")
    assert names_of(Path("coca/best.json"), Path("clip/best.json")) == ("coca", "clip")
    assert names_of(Path("clip.json"), Path("clip/results.json")) != ("clip", "clip")
    assert names_of(Path("x/a/results.json"), Path("y/a/results.json")) == ("x/a/results.json", "y/a/results.json")
