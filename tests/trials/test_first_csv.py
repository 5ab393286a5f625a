"""What a new user meets who has a CSV and images, and trains on them."""

import csv
import logging
import os
from pathlib import Path

import pytest
from PIL import Image

from contracap.cli import main
from contracap.config import ConfigError
from contracap.data.annotations import SourceError
from contracap.data.shard_maker import make_shards
from contracap.data.shards import list_shards, read_samples
from contracap.data.sources import read_source
from contracap.pretrained.find import find_weights
from contracap.training.recipe import load_recipe
from contracap.training.trainer import train
from tests.image_samples import encode

RECIPE = 'size = "tiny"\nsteps = 4\n[optimizer]\nwarmup_steps = 0\n[data]\ntrain = "nowhere"\nbatch_size = 4\n'


def png(shade: int = 0) -> bytes:
    return encode(Image.new("RGB", (16, 16), (shade, 0, 0)), "PNG")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images, a CSV with four captions of them and a row without a file, and a recipe."""
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    with (tmp_path / "t.csv").open("w", newline="") as file:
        rows = [("0.png", "a", "train"), ("0.png", "b", "train"), ("1.png", "c", "test"), ("2.png", "d", "test")]
        csv.writer(file).writerows([("image", "caption", "split"), *rows, ("gone.png", "e", "train")])
    (tmp_path / "r.toml").write_text(f"out = {str(tmp_path / 'run')!r}\n{RECIPE}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_table_in_place_of_shards_is_told_to_be_made_into_some(folder: Path, capsys) -> None:
    advice = "'t.csv' is not a tar shard; make shards from it: contracap shards make 't.csv' --out DIR"
    assert f"data.train: {advice}" in said(["train", "r.toml", "data.train=t.csv"], capsys)
    mixture = ["train", "r.toml", "data.train={one = {shards = 't.csv'}}"]
    assert f"data.train.one: {advice}" in said(mixture, capsys)
    assert f"--data: {advice}" in said(["evaluate", "none", "--task", "retrieval", "--data", "t.csv"], capsys)
    assert advice in said(["shards", "show", "t.csv"], capsys)
    assert not (folder / "run" / "checkpoints").exists()


def test_key_or_option_whose_shards_are_missing_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make = "no shards .* in the folder .*: make some with contracap shards make"
    for key, error, value in (
        ("data.train", "no such shard", "data.train=nowhere"),
        ("data.train", "the list of shards is empty", "data.train=[]"),
        ("data.train.one", "no such shard", "data.train={one = {shards = 'nowhere'}}"),
    ):
        assert f"{key}: {error}" in said(["train", "r.toml", value], capsys)
    make_shards(folder / "t.csv", folder / "shards")
    wanted = ["data.train=shards", "validate_every=1", "data.validation=nowhere"]
    assert "data.validation: no such shard" in said(["train", "r.toml", *wanted], capsys)
    assert "--data: no such shard" in said(["evaluate", "none", "--task", "retrieval", "--data", "nowhere"], capsys)
    with pytest.raises(FileNotFoundError, match=make):
        list_shards(folder)


def test_rows_of_a_split_are_taken_where_a_table_has_the_column(folder: Path) -> None:
    assert [item.name for item in read_source("t.csv", splits=["test"]).entries] == ["1.png", "2.png"]
    assert len(read_source("t.csv", splits=["train", "test"]).entries) == 4
    with pytest.raises(SourceError, match="no row of the split val, but of 'test', 'train'"):
        read_source("t.csv", splits=["val"])
    (folder / "u.csv").write_text("image,caption\n0.png,a\n")
    with pytest.raises(SourceError, match="no column split"):
        read_source("u.csv", splits=["val"])


def test_columns_of_parquet_are_known_by_the_suffix_of_their_images(folder: Path) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    for name in ("jpg", "png", "jpeg", "webp"):
        parquet.write_table(pyarrow.table({name: [png()], "caption": ["a"]}), folder / "t.parquet")
        assert make_shards("t.parquet", folder / name).samples == 1
    parquet.write_table(pyarrow.table({"photo.jpg": [png()], "caption": ["a"]}), folder / "t.parquet")
    with pytest.raises(SourceError, match="--image-column") as error:
        read_source("t.parquet")
    assert "line above" not in str(error.value)


@pytest.mark.parametrize("names", [("caption1", "caption2", "caption10"), ("Caption_0", "caption_1", "caption_2")])
def test_numbered_columns_are_captions_of_one_image(folder: Path, names: tuple[str, ...]) -> None:
    Path("t.csv").write_text(f"image,{names[1]},{names[0]},{names[2]}\n0.png,b,a,c\n1.png,,x,\n")
    items = read_source("t.csv").entries
    assert [item.captions for item in items] == [("a", "b", "c"), ("x",)] and not items[0].fields


def test_captions_of_all_named_columns_are_taken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.csv").write_text("image,short,long,caption\n0.png,a,b,c\n")
    make = ["shards", "make", "t.csv", "--out", "out", "--workers", "1"]
    assert main([*make, "--caption-column", "short", "long"]) == 0
    assert next(read_samples("out/00000.tar")).captions == ("a", "b")
    assert main([*make, "--caption-column", "short", "--caption-column", "long"]) == 2
    assert "--caption-column is given twice" in capsys.readouterr().err
    assert "has no column short or none" in said([*make, "--caption-column", "short", "none"], capsys)


@pytest.mark.parametrize("cell", ["nan", "None"])
def test_missing_values_of_a_table_of_text_are_not_captions(folder: Path, cell: str) -> None:
    Path("t.csv").write_text(f"image,caption\n0.png,{cell}\n1.png,{cell} of them\n")
    source = read_source("t.csv")
    assert [item.captions for item in source.entries] == [(f"{cell} of them",)]
    assert [skipped.kind for skipped in source.skipped] == ["no_caption"]


def test_repeated_captions_of_an_image_are_kept_and_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.csv").write_text("image,caption\n0.png,a\n0.png,a\n1.png,a\n")
    for _ in range(2):
        assert main(["shards", "make", "t.csv", "--out", "out", "--workers", "1"]) == 0
        assert "2 samples with 3 captions" in (out := capsys.readouterr().out) and "1 repeated caption, kept" in out


@pytest.mark.parametrize("words", [["--set", "epochs=1"], ["--log-every", "2"]])
def test_change_that_is_written_as_an_option_is_told_how(folder: Path, capsys, words: list[str]) -> None:
    assert main(["train", "r.toml", *words]) == 2
    change = "log_every=2" if "2" in words else "epochs=1"
    assert f"changes to a recipe are written KEY=VALUE: {change}\n" in capsys.readouterr().err


def test_batch_larger_than_the_data_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shards(folder / "t.csv", folder / "shards")
    words = ["epochs=8", "data.train=shards", "data.batch_size=96", "optimizer.warmup_steps=10"]
    line = said(["train", "r.toml", *words], capsys)
    assert "data.batch_size 96 exceeds the 3 samples" in line and "8 epochs of 3 samples are 1 step:" in line


def test_captions_that_the_context_cuts_are_told_at_the_start(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path("t.csv").write_text("image,caption\n" + "".join(f"{number}.png,{'dog ' * 30}\n" for number in range(3)))
    make_shards(folder / "t.csv", folder / "shards")
    data = ["data.train=shards", "data.batch_size=2", "data.streams=1", "data.shuffle_buffer=2", "steps=1"]
    train(load_recipe("r.toml", data))
    assert caplog.text.count("captions fill the context of 16 tokens") == 1


def test_shards_need_not_be_made_into_shards(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shards(folder / "t.csv", folder / "shards")
    assert "shards already: use shards as it is" in said(["shards", "make", "shards", "--out", "out"], capsys)
    assert "shard already" in said(["shards", "make", "shards/00000.tar", "--out", "out"], capsys)


def test_images_without_texts_are_told_which_were_looked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no .txt" in said(["shards", "make", ".", "--out", "out", "--workers", "1"], capsys)


def test_every_mistake_of_a_recipe_takes_a_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "r.toml", "stepz=1", "data.batchsize=4"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize(("rank", "out"), [("0", "last\n"), ("1", "")])
def test_one_of_the_ranks_says_where_the_checkpoint_is(folder: Path, capsys, monkeypatch, rank: str, out: str) -> None:
    monkeypatch.setattr("contracap.training.trainer.train", lambda *_, **__: Path("last"))
    monkeypatch.setenv("RANK", rank)
    assert main(["train", "r.toml"]) == 0
    assert capsys.readouterr().out == out


def test_images_in_another_folder_are_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "t.csv").rename("elsewhere/t.csv")
    (folder / "1.png").rename("elsewhere/x.png")
    os.chdir(folder / "elsewhere")
    assert "--pictures DIR" in said(["shards", "make", "t.csv", "--out", "out", "--workers", "1"], capsys)


def test_counts_of_made_shards_add_up(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # also of a folder that is finished
        assert main(["shards", "make", "t.csv", "--out", "out", "--workers", "1"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == ["3 samples with 4 captions in 1 shard: out", "skipped 1: missing_file"]
    assert sum(len(sample.captions) for sample in read_samples("out/00000.tar")) == 4


def test_mistake_of_the_command_line_is_not_blamed_on_the_file(folder: Path) -> None:
    for override, message in (
        ("data.batchsize=4", "command line: unknown key 'data.batchsize'; did you mean 'data.batch_size'?"),
        ("data.batch_size=x", "command line: 'data.batch_size' must be"),
        ("data.streams=3", "command line: 'data': streams is 3"),
    ):
        with pytest.raises(ConfigError) as error:
            load_recipe("r.toml", [override])
        assert str(error.value).startswith(message)
    (folder / "r.toml").write_text(RECIPE.replace("steps", "step") + "batchsize = 4\n")
    with pytest.raises(ConfigError) as error:
        load_recipe("r.toml", ["ou=x"])
    for mistake in (
        "r.toml: unknown key 'step'",
        "r.toml: unknown key 'data.batchsize'",
        "command line: unknown key 'ou'",
    ):
        assert mistake in str(error.value)


def test_plan_of_a_tiny_run_has_no_figures_without_meaning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps, is_long in (("steps=4", False), ("steps=10000000", True)):
        assert main(["plan", "r.toml", steps, "--gpus", "1", "--gpu", "a100-80g"]) == 0
        told = capsys.readouterr().out
        assert told.startswith("about ") == ("failure loss" in told) == is_long


def test_resumed_run_says_that_its_schedule_is_stretched(folder: Path, caplog, monkeypatch) -> None:
    caplog.set_level(logging.INFO)
    make_shards(folder / "t.csv", folder / "shards")
    values = ["data.train=shards", "data.batch_size=2", "device=cpu", "precision=fp32"]
    train(load_recipe("r.toml", values))
    assert "schedule is stretched" not in caplog.text
    assert "trained)" not in caplog.text
    train(load_recipe("r.toml", [*values, "steps=5", "resume=true"]))
    assert caplog.text.count("steps was 4 and is now 5: the schedule is stretched") == 1
    caplog.clear()
    for _ in range(2):
        find_weights(folder / "run")
    assert caplog.text.count("is the folder of a run") == 1
