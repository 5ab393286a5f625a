"""Files of images as people have them: names, metadata, links, and what lies in an image's place."""

import os
from pathlib import Path

import pytest

from contracap.cli import main
from contracap.data.sources import read_source
from contracap.image_files import decode


def captioned(weights: Path, capsys: pytest.CaptureFixture[str], *paths: Path) -> tuple[int, list[str], str]:
    """Status, the names that got a caption, and stderr."""
    status = main(["caption", str(weights), *map(str, paths), "--strategy", "greedy", "--batch-size", "1"])
    out, err = capsys.readouterr()
    return status, [Path(line.split("\t")[0]).name for line in out.splitlines()], err


def test_images_under_any_suffix_are_captioned(trial, weights: Path, capsys) -> None:
    folder = trial("suffixes")
    status, names, _ = captioned(weights, capsys, folder)
    assert status == 0 and sorted(names) == sorted(os.listdir(folder))


@pytest.mark.parametrize("name", ["big-text-chunk", "big-itxt-chunk", "big-iccp-chunk", "bad-crc-in-text"])
def test_good_pixels_are_read_whatever_the_metadata(trial, name: str) -> None:
    pixels = decode(trial("pictures") / f"{name}.png")
    assert pixels[:, 36, 36].tolist() == [220, 20, 20]


def test_linked_folders_are_read(trial, weights: Path, capsys) -> None:
    folder = trial("linked")
    status, names, _ = captioned(weights, capsys, folder)
    assert status == 0 and names == ["1.jpg", "0.jpg"]
    assert [item.captions for item in read_source(folder).entries] == [("a green square",), ("a red square",)]


def test_what_never_ends_is_refused_by_name_and_below_a_folder(weights: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "list.txt").write_text(f"{tmp_path}/zero.jpg\n")
    for path, word in [("", "1 device"), ("pipe.jpg", "named pipe"), ("zero.jpg", "device"), ("list.txt", "device")]:
        status, names, err = captioned(weights, capsys, tmp_path / path)
        assert status == 1 and not names and word in err and err.count("\n") == 1, err
