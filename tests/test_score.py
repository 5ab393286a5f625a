"""The verb `contracap score`."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from contracap.apps.compare.comparison import compare
from contracap.apps.compare.results import load_result
from contracap.cli import main
from contracap.evaluation.metrics.java import JavaError
from contracap.evaluation.metrics.meteor import Meteor
from contracap.evaluation.metrics.scores import CaptionScorer
from tests.evaluation.programs import without_java

Run = Callable[..., tuple[int, str, str]]

ENTRIES = [
    {"captions": ["A red ball on the grass.", "a ball"], "prediction": "a red ball", "image_name": "0.png"},
    {"captions": ["Two cats on a sofa."], "prediction": "two cats on a bench", "image_name": "1.png"},
    {"captions": ["A man rides a horse."], "prediction": "a man on a horse", "image_name": "2.png"},
]
COUNTED = ("--metrics", "bleu", "rouge_l", "cider")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the verb: exit status, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        status = main(["score", *map(str, arguments)])
        output = capsys.readouterr()
        return status, output.out, output.err

    return call


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(ENTRIES))
    return path


def test_without_java_the_figures_come_out_and_the_rest_is_null_with_its_reason(
    monkeypatch, run, file, tmp_path
) -> None:
    without_java(monkeypatch)
    status, out, err = run(file, "--json", tmp_path / "out.json")
    assert status == 0
    result = json.loads((tmp_path / "out.json").read_text())
    names = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
    assert [line.split()[0] for line in out.splitlines()] == names
    assert list(result["figures"]) == [*names, "METEOR", "SPICE"]
    assert result["figures"]["METEOR"] is None and result["figures"]["SPICE"] is None
    assert [line.split(":")[1].strip() for line in err.splitlines()] == ["METEOR left out", "SPICE left out"]
    assert result["reasons"]["METEOR"].startswith("METEOR needs a Java runtime")
    assert result["tokenizer"] == "python"
    assert result["samples"] == 3
    assert result["bleu_stats"]["testlen"] == 13
    for name in ("ROUGE_L", "CIDEr"):
        values = result["per_sample"][name]["values"]
        assert sum(values) / len(values) == pytest.approx(result["figures"][name])


def test_a_named_metric_that_cannot_run_is_one_line_whose_hint_works_as_written(monkeypatch, run, file, tmp_path):
    without_java(monkeypatch)
    status, out, err = run(file, "--metrics", "bleu", "meteor", "--json", tmp_path / "out.json")
    assert (status, out) == (1, "")
    assert err.startswith("contracap: error: METEOR needs a Java runtime") and err.count("\n") == 1
    assert not (tmp_path / "out.json").exists()
    hint = err.partition("Or leave it out: ")[2].split()
    status, out, err = run(file, *hint)
    assert (status, err) == (0, "")
    assert out.split()[::2] == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]


def test_results_of_coco_score_as_the_same_captions_in_one_list(run, file, tmp_path: Path) -> None:
    ids = [7, 30, 4]
    results = [{"image_id": i, "caption": entry["prediction"]} for i, entry in zip(ids, ENTRIES, strict=True)]
    annotations = [
        {"image_id": i, "caption": caption}
        for i, entry in zip(ids, ENTRIES, strict=True)
        for caption in entry["captions"]
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "references.json").write_text(json.dumps({"annotations": annotations}))
    own = run(file, *COUNTED, "--tokenizer", "python")
    coco = run(
        tmp_path / "results.json", "--references", tmp_path / "references.json", *COUNTED, "--tokenizer", "python"
    )
    assert coco == own and own[0] == 0


def test_pictures_that_were_not_predicted_are_counted(run, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps([{"image_id": 1, "caption": "a dog"}]))
    annotations = [{"image_id": i, "caption": "a dog on a sofa"} for i in range(3)]
    (tmp_path / "references.json").write_text(json.dumps({"annotations": annotations}))
    arguments = (tmp_path / "results.json", "--references", tmp_path / "references.json", "--metrics", "bleu")
    status, _, err = run(*arguments, "--tokenizer", "python")
    assert status == 0
    assert err.startswith("contracap: 2 of 3 images of ") and err.endswith("results.json: they do not count\n")


def test_results_on_other_pictures_do_not_pair_up_and_on_the_same_do(run, tmp_path: Path) -> None:
    unnamed = [{name: entry[name] for name in ("captions", "prediction")} for entry in ENTRIES]
    worse = [entry | {"prediction": "a dog"} for entry in unnamed]
    other = [entry | {"captions": ["a dog", f"{i} dogs"]} for i, entry in enumerate(unnamed)]
    for name, entries in {"own": unnamed, "worse": worse, "other": other}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
        run(tmp_path / f"{name}.json", *COUNTED, "--tokenizer", "python", "--json", tmp_path / f"{name}-scored.json")
    own, worse, other = (load_result(tmp_path / f"{name}-scored.json") for name in ("own", "worse", "other"))
    assert {row.figure for row in compare([own], [worse]).rows if row.low is not None} == {"ROUGE_L", "CIDEr"}
    with pytest.raises(ValueError, match="measured on other samples"):
        compare([own], [other])


def test_a_wrong_entry_is_named(run, tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps([*ENTRIES, {"captions": ["a dog"]}]))
    status, _, err = run(path, *COUNTED)
    assert status == 1
    assert err == f"contracap: error: {path}, entry 3 (counted from 0): needs a text under `prediction`\n"


def test_a_named_metric_that_fails_is_told_by_the_exit_status_and_costs_no_other(
    monkeypatch, run, file, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise JavaError("METEOR failed")

    monkeypatch.setattr(Meteor, "__init__", lambda self: None)
    monkeypatch.setattr(Meteor, "__enter__", lambda self: self)
    monkeypatch.setattr(Meteor, "__exit__", lambda *_: None)
    monkeypatch.setattr(Meteor, "score", fail)
    monkeypatch.setenv("CONTRACAP_CORENLP_DIR", "/nowhere")
    arguments = [file, "--tokenizer", "python", "--json", tmp_path / "out.json"]
    status, out, err = run(*arguments, "--metrics", "rouge_l", "meteor")
    assert (status, out.split()[0], err) == (1, "ROUGE_L", "contracap: METEOR left out: METEOR failed\n")
    assert json.loads((tmp_path / "out.json").read_text())["figures"]["METEOR"] is None
    assert run(*arguments)[0] == 0  # nobody named it


def test_clipscore_is_added_where_the_pictures_are_at_hand(run, file, weights, tmp_path, monkeypatch) -> None:
    arguments = [file, "--metrics", "rouge_l", "--tokenizer", "python", "--clipscore", weights]
    status, _, err = run(*arguments)
    assert status == 1 and "name their folder with --images DIR" in err
    with monkeypatch.context() as patched:
        patched.setattr(CaptionScorer, "score", lambda *_, **__: pytest.fail("too early"))
        for problem in ("entry 0 ", "0.png"):  # it is missing, then damaged
            status, _, err = run(*arguments, "--images", tmp_path)
            assert status == 1 and problem in err and str(tmp_path / "0.png") in err
            for i in range(3):
                (tmp_path / f"{i}.png").write_bytes(b"cut off")
    for i in range(3):
        content = io.BytesIO()
        Image.new("RGB", (20, 20), (80 * i, 100, 0)).save(content, "PNG")
        (tmp_path / f"{i}.png").write_bytes(content.getvalue())
    status, out, _ = run(*arguments, "--images", tmp_path, "--json", tmp_path / "out.json")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["ROUGE_L", "CLIPScore", "RefCLIPScore"]
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["clipscore_model"] == str(weights)
    assert len(result["per_sample"]["CLIPScore"]["values"]) == 3


def test_predictions_of_evaluate_find_the_images_that_shards_were_made_of(run, weights, tmp_path, capsys) -> None:
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (20, 20), (80 * i, 100, 0)).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(f"colour {i}")
    images, shards, kept = tmp_path / "images", tmp_path / "shards", tmp_path / "kept.json"
    evaluate = ["evaluate", str(weights), "--task", "captioning", "--data", str(shards), "--strategy", "greedy"]
    assert main(["shards", "make", str(images), "--out", str(shards), "--workers", "0"]) == 0
    assert main([*evaluate, "--metrics", "rouge_l", "--tokenizer", "python", "--predictions", str(kept)]) == 0
    capsys.readouterr()
    status, out, err = run(kept, *COUNTED, "--tokenizer", "python", "--clipscore", weights, "--images", images)
    assert status == 0, err
    assert "CLIPScore" in out


def test_a_name_without_suffix_finds_the_only_such_image(run, weights: Path, tmp_path: Path) -> None:
    file = tmp_path / "kept.json"
    file.write_text(json.dumps([{"captions": ["a ball"], "prediction": "ball", "image_name": "a"}]))
    arguments = [file, "--metrics", "rouge_l", "--tokenizer", "python", "--clipscore", weights, "--images", tmp_path]
    Image.new("RGB", (20, 20)).save(tmp_path / "a.JPG", "JPEG")
    assert run(*arguments)[0] == 0
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    status, _, err = run(*arguments)
    assert status == 1 and "a.JPG" in err and "a.png" in err


def test_what_belongs_to_clipscore_is_refused_without_it(run, file) -> None:
    status, _, err = run(file, "--images", "pictures")
    assert status == 1 and "belong to the model of --clipscore" in err


def folder_later(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """By the time that the scores are computed, a folder stands where a file was to be written."""
    score = CaptionScorer.score

    def late(self: CaptionScorer, *given, **more):
        path.mkdir()
        return score(self, *given, **more)

    monkeypatch.setattr(CaptionScorer, "score", late)


def test_figures_are_shown_where_they_cannot_be_written(run, file, tmp_path: Path, monkeypatch) -> None:
    arguments = [file, "--metrics", "bleu", "--tokenizer", "python", "--json", tmp_path / "out.json"]
    folder_later(monkeypatch, tmp_path / "out.json")
    status, out, err = run(*arguments)
    assert status == 1 and err == f"contracap: error: Is a directory: {tmp_path / 'out.json'}\n"
    assert "Bleu_4" in out
    status, out, err = run(*arguments)  # seen before anything is computed
    assert (status, out) == (1, "") and "out.json cannot be written: Is a directory" in err


@pytest.mark.parametrize("read", [[], ["other.json", "--references"], ["other.json", "--clipscore"]])
def test_no_file_that_is_read_is_overwritten(run, file, tmp_path: Path, read: list[str]) -> None:
    (tmp_path / "link.json").symlink_to(file)
    status, out, err = run(*read, file, "--json", tmp_path / "link.json")
    assert (status, out) == (1, "") and "link.json would take the place of another file" in err
    assert json.loads(file.read_text()) == ENTRIES
