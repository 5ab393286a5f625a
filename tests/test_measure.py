import json
from pathlib import Path

import pytest

from contracap.cli import main
from contracap.cli.options import ModelFlags, check_outputs
from contracap.data.shards import write_shard
from tests.evaluation.programs import refusing, stand_in
from tests.evaluation.worlds import COLOURS, record

TASK = ["--task", "captioning", "--strategy", "greedy", "--data"]
COUNTED = ["--metrics", "bleu", "rouge_l", "cider", "--tokenizer", "python"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    pictures = [
        record(name, name, captions=[f" A {name} wall.", "", f"all is {name} \ud83d"], domain=f"{domain}-domain")
        for name, domain in zip(COLOURS, ["in", "near", "near", "out", "in", "far"], strict=True)
    ]
    write_shard(folder / "0.tar", pictures)
    return folder


def test_captions_are_kept_as_score_reads_them_with_the_same_figures(weights, shards, tmp_path: Path) -> None:
    kept, evaluated, scored = (tmp_path / name for name in ("kept.json", "evaluated.json", "scored.json"))
    task = [*TASK, shards, *COUNTED, "--predictions", kept, "--json", evaluated]
    assert main(list(map(str, ["evaluate", weights, *task]))) == 0
    assert main(list(map(str, ["score", kept, *COUNTED, "--json", scored]))) == 0
    ours, again = (json.loads(path.read_text()) for path in (evaluated, scored))
    assert {"CIDEr", "CIDEr_in", "CIDEr_near", "CIDEr_out"} < set(ours["figures"])
    for part in ("figures", "per_sample", "samples", "tokenizer", "bleu_stats", "domains"):
        assert ours[part] == again[part]
    assert [entry["image_name"] for entry in json.loads(kept.read_text())] == list(COLOURS)


def folder_later(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Once the weights are read, a folder stands where a file was to be written."""

    load = ModelFlags.load

    def load_later(flags: ModelFlags, weights: str):
        path.mkdir()
        return load(flags, weights)

    monkeypatch.setattr(ModelFlags, "load", load_later)


def test_captions_are_kept_where_a_metric_fails(weights, shards, tmp_path: Path, monkeypatch, capsys) -> None:
    stand_in(monkeypatch, tmp_path, "sys.exit('no heap')", jar=tmp_path / "tokenizer.jar")
    task = [*TASK, shards, "--metrics", "cider", "--tokenizer", "java"]
    assert main(list(map(str, ["evaluate", weights, *task, "--predictions", tmp_path / "kept.json"]))) == 1
    failed = "contracap: error: the Java tokenizer failed (exit status 1): no heap\n"
    assert capsys.readouterr().err == failed
    assert len(json.loads((tmp_path / "kept.json").read_text())) == 6
    folder_later(monkeypatch, tmp_path / "lost.json")
    assert main(list(map(str, ["evaluate", weights, *task, "--predictions", tmp_path / "lost.json"]))) == 1
    assert capsys.readouterr().err == f"contracap: error: Is a directory: {tmp_path / 'lost.json'}\n{failed}"


@pytest.mark.parametrize("several", [False, True])
def test_a_metric_that_was_named_and_failed_is_told_by_the_exit_status(
    weights, shards, tmp_path: Path, monkeypatch, capsys, several: bool
) -> None:
    refusing(monkeypatch)
    task = [*TASK, shards, "--metrics", "cider", "meteor", "--tokenizer", "python"]
    if several:
        file = tmp_path / "tasks.toml"
        settings = 'metrics = ["cider", "meteor"]\ntokenizer = "python"'
        file.write_text(f'[tasks.coco]\ntask = "captioning"\ndata = "{shards}"\n{settings}\n')
        task = ["--tasks", file]
    assert main(list(map(str, ["evaluate", weights, *task, "--json", tmp_path / "result.json"]))) == 1
    name = "coco/METEOR" if several else "METEOR"
    assert f"no figures of {name}: METEOR could not be run" in capsys.readouterr().err.splitlines()[-1]
    figures = json.loads((tmp_path / "result.json").read_text())["figures"]
    missing = {figure for figure, value in figures.items() if value is None}
    assert {figure for figure in missing if "CIDEr_" not in figure} == {name} < set(figures)  # of domains of one image


@pytest.mark.parametrize("option", ["--predictions", "--json"])
def test_figures_are_shown_where_a_file_cannot_be_written(
    weights, shards, tmp_path: Path, monkeypatch, capsys, option: str
) -> None:
    folder_later(monkeypatch, tmp_path / "lost.json")
    places = {"--predictions": tmp_path / "kept.json", "--json": tmp_path / "result.json"}
    places[option] = tmp_path / "lost.json"
    task = [*TASK, shards, *COUNTED, *(part for place in places.items() for part in place)]
    assert main(list(map(str, ["evaluate", weights, *task]))) == 1
    out, err = capsys.readouterr()
    assert "CIDEr" in out and err == f"contracap: error: Is a directory: {tmp_path / 'lost.json'}\n"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [
        "result.json" if option == "--predictions" else "kept.json"
    ]


@pytest.mark.parametrize("option", ["--predictions", "--json"])
def test_a_place_that_cannot_be_written_is_refused_before_the_weights_are_read(tmp_path, capsys, option: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for place, reason in (
        ("folder", "Is a directory: "),
        ("file/x.json", f"{tmp_path / 'file'} is a file, not a folder"),
    ):
        task = ["--task", "captioning", "--data", "data", option, str(tmp_path / place)]
        assert main(["evaluate", "none.safetensors", *task]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"contracap: error: {option} {tmp_path / place} cannot be written: {reason}")
        assert err.count("\n") == 1


@pytest.mark.parametrize("other", [["--json"], ["--answers"]])
def test_no_other_file_is_overwritten(tmp_path: Path, capsys, other: list[str]) -> None:
    task = ["--task", "vqa", "--data", str(tmp_path), *other, str(tmp_path / "x.json")]
    assert main(["evaluate", "none.safetensors", *task, "--predictions", str(tmp_path / "x.json")]) == 1
    assert "x.json would take the place of another file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "options"),
    [
        (["own", "--task", "captioning", "--data", "data"], ["--predictions", "--json"]),
        (["weights", "--task", "captioning", "--data", "data", "--clipscore", "own"], ["--predictions", "--json"]),
        (["weights", "--task", "vqa", "--data", "data", "--answers", "own"], ["--predictions"]),
        (["weights", "--tasks", "tasks.toml"], ["--json"]),
    ],
)
def test_no_file_that_is_read_is_overwritten(
    tmp_path: Path, monkeypatch, capsys, task: list[str], options: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = '[tasks.a]\ntask = "zeroshot"\ndata = "data"\nclasses = "own"\n'
    for name in ("own", "tasks.toml"):
        Path(name).write_text(text)
    Path("link").symlink_to("own")
    for option in options:
        assert main(["evaluate", *task, option, "link"]) == 1
        expected = f"contracap: error: {option} link would take the place of another file: name one of its own\n"
        assert capsys.readouterr().err == expected
        assert Path("own").read_text() == text


def test_a_name_of_weights_takes_no_place(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_outputs(["coca_ViT-B-32", "hf-hub:laion/CoCa-ViT-B-32", None], json=Path("out.json"), predictions=None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", [["--task", "retrieval"], ["--task", "zeroshot"], ["--tasks", "tasks.toml"], []])
def test_what_writes_nothing_or_is_several_is_refused_before_the_weights_are_read(capsys, what: list[str]) -> None:
    assert main(["evaluate", "none.safetensors", *what, "--predictions", "kept.json"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and "--task captioning or --task vqa" in err
