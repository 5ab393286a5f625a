import json
from pathlib import Path

import pytest

from contracap.evaluation.predictions import Prediction, read_predictions, read_references, write_predictions

NOCAPS = {
    "images": [
        {"id": 0, "file_name": "a.jpg", "domain": "in-domain"},
        {"id": 1, "file_name": "b.jpg", "domain": "out-domain"},
        {"id": 2, "file_name": "c.jpg", "domain": "near-domain"},
    ],
    "annotations": [
        {"image_id": 1, "caption": "two cats", "id": 0},
        {"image_id": 0, "caption": "a dog", "id": 1},
        {"image_id": 1, "caption": "", "id": 2},
        {"image_id": 1, "caption": " cats\n", "id": 3},
    ],
}


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_list_with_its_references_is_read_in_order(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "own.json",
        [
            {"captions": ["a dog", " ", "a hound"], "prediction": "dog", "image_name": "a.jpg", "split": "test"},
            {"captions": ["two cats"], "prediction": "", "domain": "example.org"},
            {"captions": ["a man"], "prediction": "man", "image_name": "b.jpg", "domain": "near-domain"},
        ],
    )
    assert read_predictions(path) == [
        Prediction(key="a.jpg", prediction="dog", captions=("a dog", "a hound"), image_name="a.jpg"),
        Prediction(key="df8d6d3a5c8bf987", prediction="", captions=("two cats",)),
        Prediction(key="b.jpg", prediction="man", captions=("a man",), image_name="b.jpg", domain="near"),
    ]


def test_results_of_coco_find_their_references_by_id(tmp_path: Path) -> None:
    results = write(tmp_path, "results.json", [{"image_id": 1, "caption": "cats"}, {"image_id": "0", "caption": "dog"}])
    assert read_predictions(results, read_references(write(tmp_path, "nocaps.json", NOCAPS))) == [
        Prediction(key="1", prediction="cats", captions=("two cats", "cats"), image_name="b.jpg", domain="out"),
        Prediction(key="0", prediction="dog", captions=("a dog",), image_name="a.jpg", domain="in"),
    ]


def test_references_need_no_list_of_pictures(tmp_path: Path, data_folder: Path) -> None:
    references = data_folder / "caption_metrics" / "coco_karpathy_val_gt.json"
    first = json.loads(references.read_text())["annotations"][0]["image_id"]
    results = write(tmp_path, "results.json", [{"image_id": first, "caption": "a child"}])
    (entry,) = read_predictions(results, read_references(references))
    assert len(entry.captions) >= 5
    assert entry.image_name is None


GOOD = {"captions": ["a dog"], "prediction": "dog"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"own\.json is not JSON"),
        ('{"path": "a.jpg"}\n{"path": "b.jpg"}\n', r"own\.json is JSON lines; wanted is one JSON list"),
        ({}, r"own\.json must be a JSON list of at least one entry"),
        ([GOOD, "dog"], r"own\.json, entry 1 \(counted from 0\): must be an object, not str"),
        ([GOOD, {"captions": ["a dog"]}], r"entry 1 .*: needs a text under `prediction`"),
        ([GOOD | {"captions": ["a dog", 3]}], r"entry 0 .*: needs a list of texts under `captions`"),
        ([{"prediction": "dog"}], r"entry 0 .*: needs a list of texts under `captions`"),
        ([GOOD | {"captions": [" "]}], r"entry 0 .*: has no reference in `captions`"),
        ([GOOD, GOOD | {"captions": ["...", "!"]}], r"entry 1 .*: has no reference in `captions` with a word"),
        ([GOOD | {"image_name": "a.jpg"}] * 2, r"entry 1 .*: is the second one of image a\.jpg"),
        ([{"image_id": 3, "caption": "dog"}], r"entry 0 .*: has no `captions`, but an `image_id`.*--references FILE"),
    ],
)
def test_a_malformed_list_is_refused_with_the_entry(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_predictions(write(tmp_path, "own.json", content))


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (
            [{"image_id": 0, "caption": "dog"}, {"image_id": 7, "caption": "dog"}],
            "entry 1 .*: the image_id 7 is not among the references",
        ),
        ([{"image_id": 2, "caption": "dog"}], "entry 0 .*: the image_id 2 is not .* one of theirs is"),
        ([{"image_id": 0, "caption": "dog"}] * 2, "entry 1 .*: is the second one of image 0"),
        ([{"image_id": 0}], "entry 0 .*: needs a text under `caption`"),
        ([GOOD], "entry 0 .*: needs an `image_id`"),
    ],
)
def test_malformed_results_are_refused_with_the_entry(tmp_path: Path, results: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_predictions(
            write(tmp_path, "results.json", results), read_references(write(tmp_path, "nocaps.json", NOCAPS))
        )


@pytest.mark.parametrize("content", [[], {"images": []}, {"annotations": [{"image_id": 1}]}, {"annotations": 3}])
def test_references_of_another_layout_are_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(ValueError, match=r"refs\.json does not have the layout of COCO's annotations"):
        read_references(write(tmp_path, "refs.json", content))


def test_pictures_with_one_key_have_no_name_to_be_told_apart_by(tmp_path: Path) -> None:
    predictions = [Prediction(key=key, prediction="red", captions=("red",)) for key in ("a", "b", "a")]
    write_predictions(tmp_path / "kept.json", predictions)
    assert [entry.get("image_name") for entry in json.loads((tmp_path / "kept.json").read_text())] == [None, "b", None]
    assert len(read_predictions(tmp_path / "kept.json", None)) == 3
