"""Folders as people have them: what is read, what is left out, and that the rest is counted."""

import os
import socket
from pathlib import Path

import pytest
from PIL import Image

from contracap.data.image_finder import SkippedFiles, find_images, has_image
from tests.image_samples import encode


def picture(format: str = "JPEG") -> bytes:
    return encode(Image.new("RGB", (8, 8), "red"), format)


def fill(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def walked(folder: Path) -> tuple[list[str], dict[str, int]]:
    passed = SkippedFiles()
    return [file.as_posix() for file in find_images(folder, passed)], dict(passed.counts)


def test_files_without_a_known_suffix_are_judged_by_their_content(tmp_path: Path) -> None:
    files = {"a": picture(), "b.jpg_large": picture(), "c.42": picture("PNG"), "d.bin": picture("WEBP")}
    others = {"e": b"no picture", "f.mp4": b"\0\0\0 ftypisom", "g.MP4": b"", "h.nef": picture("TIFF"), "i.txt": b"a"}
    fill(tmp_path, **files, **others, scan=picture("TIFF"))
    found, passed = walked(tmp_path)
    assert found == ["a", "b.jpg_large", "c.42", "d.bin", "scan"]
    assert passed == {".mp4": 2, "file(s) without suffix": 1, ".nef": 1}


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "jp2", "heic", "heif", "ico", "JPG", "pgm"])
def test_other_names_of_images_are_read(tmp_path: Path, suffix: str) -> None:
    fill(tmp_path, **{f"a.{suffix}": b""})
    assert walked(tmp_path) == ([f"a.{suffix}"], {})


def test_linked_folders_are_followed_once_and_never_in_circles(tmp_path: Path) -> None:
    folder, elsewhere = fill(tmp_path / "here" / "sub", **{"1.jpg": b""}).parent, fill(tmp_path / "x", **{"2.jpg": b""})
    (folder / "again").symlink_to("sub")
    (folder / "circle").symlink_to("circle")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "sub" / "twice").symlink_to(elsewhere)
    (folder / "up").symlink_to(tmp_path)
    (elsewhere / "back").symlink_to(folder)
    (elsewhere / "gone.jpg").symlink_to("nowhere.jpg")
    (elsewhere / "file.jpg").symlink_to(folder / "sub" / "1.jpg")
    found, passed = walked(folder)
    assert found == ["linked/2.jpg", "linked/file.jpg", "sub/1.jpg"]
    assert passed == {"link(s) to a folder that is already read": 3, "folder(s) met before": 1, "broken link(s)": 2}


def test_only_regular_files_are_pictures(tmp_path: Path) -> None:
    fill(tmp_path, **{"a.jpg": picture(), ".hidden.jpg": b""})
    os.mkfifo(tmp_path / "b.jpg")
    os.mkfifo(tmp_path / "no-suffix")
    (tmp_path / "c.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "d.jpg"))
        found, passed = walked(tmp_path)
    assert found == ["a.jpg"]
    assert passed == {"named pipe(s)": 2, "device(s)": 1, "socket(s)": 1, "hidden file(s) or folder(s)": 1}


def test_what_is_passed_over_is_told_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, **{"a.jpg": picture(), "a.txt": b"", "b.mp4": b"", "c.mp4": b"", "d.zip": b""})
    list(find_images(tmp_path))
    (line,) = caplog.messages
    assert "2 .mp4, 1 .zip" in line and str(tmp_path) in line and "txt" not in line
    assert not has_image(fill(tmp_path / "empty", **{"a.mp4": b""}))


def test_files_of_our_own_are_neither_images_nor_counted(tmp_path: Path) -> None:
    ours = (".contracap.txt.json", ".c.csv.settings.json", ".k2j.partial", "c.csv.partial", "c.csv.partial-journal")
    fill(tmp_path, **dict.fromkeys(ours, b""), **{"a.jpg": picture(), ".hidden": b""})
    assert walked(tmp_path) == (["a.jpg"], {"hidden file(s) or folder(s)": 1})


def test_a_subfolder_that_cannot_be_read_is_counted_and_the_rest_is_found(tmp_path: Path, monkeypatch) -> None:
    fill(tmp_path / "lost+found")
    fill(tmp_path / "z", **{"b.jpg": picture()})
    scandir = os.scandir

    def refusing(path: Path) -> object:  # as for a user, which root never meets
        if Path(path).name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert walked(tmp_path) == (["z/b.jpg"], {"unreadable folder(s)": 1})
    with pytest.raises(PermissionError):
        walked(tmp_path / "lost+found")
