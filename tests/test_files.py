import os
from pathlib import Path

import pytest

from contracap.files import replacing, try_place, write_text


def test_a_file_appears_whole_and_nothing_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "first\n")
    write_text(tmp_path / "new" / "a.txt", "zweite ü\n")
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "zweite ü\n"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "good")
    with pytest.raises(RuntimeError), replacing(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "good"
    assert len(list(tmp_path.iterdir())) == 1


def test_rights_are_those_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_an_error_names_the_path_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (Path("/proc/x.json"), tmp_path / "folder"):
        for write in (try_place, lambda path: write_text(path, "x")):
            with pytest.raises(OSError) as caught:
                write(path)
            assert caught.value.filename == str(path) and caught.value.strerror


def test_a_place_is_tried_without_a_trace(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "good")
    try_place(tmp_path / "a.txt")
    try_place(tmp_path / "new" / "b.txt")
    assert (tmp_path / "a.txt").read_text() == "good"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "new"]
    with pytest.raises(FileExistsError):
        try_place(tmp_path / "a.txt" / "b.txt")
