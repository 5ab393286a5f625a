import errno
import os
import stat
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest

from contracap.files import replace_file, require_folder, try_place, write_text


def test_a_file_appears_whole_and_nothing_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "first\n")
    write_text(tmp_path / "new" / "a.txt", "zweite ü\n")
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "zweite ü\n"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "good")
    with pytest.raises(RuntimeError), replace_file(tmp_path / "a.txt") as partial:
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
    for below in ("b.txt", "c/b.txt"):
        with pytest.raises(NotADirectoryError, match=r"a\.txt is a file, not a folder"):
            try_place(tmp_path / "a.txt" / below)


@pytest.mark.parametrize("name", ["a" * 251 + ".txt", "ü" * 125 + ".text"])
def test_a_name_may_be_as_long_as_names_can_be(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "x")
    try_place(tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    for write in (try_place, lambda path: write_text(path, "x")):
        with pytest.raises(OSError) as caught:
            write(tmp_path / f"a{name}")
        assert caught.value.errno == errno.ENAMETOOLONG and caught.value.filename == str(tmp_path / f"a{name}")


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    read = list[str]()
    reader = Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    try_place(pipe)
    write_text(pipe, "x")
    reader.join()
    assert read == ["x"] and pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_a_device_is_written_to_and_stays(tmp_path: Path) -> None:
    """As the real ones do: a test that fails as root must not cost the machine its /dev/null."""
    null, full = tmp_path / "null", tmp_path / "full"
    try:
        os.mknod(null, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        os.mknod(full, 0o600 | stat.S_IFCHR, os.makedev(1, 7))
        null.write_text("")
    except PermissionError:
        pytest.skip("only root makes devices, and not everywhere")
    for path in (null, full):
        try_place(path)
    write_text(null, "x")
    with pytest.raises(OSError) as caught:
        write_text(full, "x")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(full))
    assert null.is_char_device() and full.is_char_device() and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_stdout_gets_the_content_between_what_else_is_printed(tmp_path: Path, kind: str) -> None:
    program = "from contracap.files import *; print(1, flush=True); write_text('/dev/stdout', '2\\n'); print(3)"
    with (tmp_path / "out").open("wb") as file:
        out = file if kind == "file" else subprocess.PIPE
        done = subprocess.run([sys.executable, "-c", program], stdout=out, check=True)
    assert (done.stdout or (tmp_path / "out").read_bytes()) == b"1\n2\n3\n"
    assert Path("/dev/stdout").is_symlink()


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a").symlink_to("folder/b")
    for text in ("x", "y"):
        write_text(tmp_path / "a", text)
        assert (tmp_path / "folder" / "b").read_text() == text and (tmp_path / "a").is_symlink()


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    require_folder(tmp_path)
    require_folder(tmp_path / "missing")
    with pytest.raises(NotADirectoryError, match="file is a file, not a folder"):
        require_folder(tmp_path / "file")
