"""Folders as people have them, captioned."""

import os
import shutil
from pathlib import Path

from contracap.cli import main


def call(*arguments: object) -> int:
    return main(["caption", *map(str, arguments), "--strategy", "greedy", "--format", "sidecar"])


def test_an_empty_path_does_not_caption_the_working_folder(trial, weights, tmp_path, monkeypatch, capsys) -> None:
    shutil.copytree(trial("sidecars"), tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    assert call(weights, "", "--overwrite") == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_names_as_long_as_a_file_system_takes_have_side_cars(trial, weights: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trial("longname"), tmp_path / "here")
    shutil.copy(folder / "a.jpg", folder / ("d" * 251 + ".jpg"))
    assert call(weights, folder) == 0
    assert len(list(folder.glob("*.txt"))) == 4
    assert call(weights, folder, "--ext", ".caption") == 1  # of one image it would be longer than names may be
    assert sorted(path.name[0] for path in folder.glob("*.caption")) == ["a", "b", "c"]


def test_empty_and_blank_side_cars_are_written_and_others_stay(trial, weights: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trial("sidecars"), tmp_path / "here")
    before = {path: path.read_bytes() for path in folder.glob("*.txt")}
    assert call(weights, folder) == 0
    for path, content in before.items():
        if path.stem in ("empty", "blank"):
            assert path.read_text().strip()
        else:
            assert path.read_bytes() == content
    assert all(path.with_suffix(".txt").stat().st_size for path in folder.glob("*.png"))


def test_a_side_car_that_is_not_a_file_is_the_error_of_its_picture(trial, weights, tmp_path, capsys) -> None:
    folder = shutil.copytree(trial("longname"), tmp_path / "here")
    (folder / "a.txt").mkdir()
    os.mkfifo(folder / "c.txt")
    assert call(weights, folder) == 1
    assert capsys.readouterr().err.count("is not a file") == 2
    assert len([path for path in folder.glob("*.txt") if path.is_file()]) == 1
