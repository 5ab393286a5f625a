import csv
import errno
import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from contracap.apps.bulk.inputs import Item
from contracap.apps.bulk.outputs import Existing, Lines
from contracap.apps.bulk.rows import Row
from contracap.apps.bulk.side_cars import SideCars
from contracap.apps.bulk.table_files import TableError, TableFormat, read_rows
from contracap.apps.bulk.table_output import Table
from contracap.data.sources import read_source

NAMES: dict[TableFormat, str] = {
    "jsonl": "a.jsonl",
    "csv": "a.csv",
    "parquet": "a.parquet",
    "metadata": "metadata.jsonl",
}
FORMATS = list(NAMES)


def rows(folder: Path, *captions: str, embed: bool = False) -> list[tuple[Item, Row]]:
    """Captions of the images 0.jpg, 1.jpg, ... of a folder."""
    made = []
    for number, caption in enumerate(captions):
        path = folder / f"{number}.jpg"
        vector = np.array([number, 0.5, 1 / 3], dtype=np.float32) if embed else None
        row = Row(path=str(path), caption=caption, score=-1.5 - number, embedding=vector)
        made.append((Item(name=str(path), source=path), row))
    return made


def write(table: Table, *batches: list[tuple[Item, Row]]) -> None:
    with table:
        for batch in batches:
            table.write(batch)
        table.finish()


def captions(path: Path) -> list[tuple[str, ...]]:
    """Image names, without folders, and captions, read by the reader of sources that makes shards."""
    found = read_source(path, kind="table" if path.is_file() else "imagefolder").entries
    return [(Path(item.path).name, *item.captions) for item in found]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_table_is_read_by_shards_make_whatever_the_captions_hold(tmp_path: Path, kind: TableFormat) -> None:
    out = tmp_path / NAMES[kind]
    texts = [
        'a "b", c',
        "d\te\nf é\u2028g",
        "h\ri",
        "j\r\nk",
        "l\x85\x1em\0n",
        '"',
        "'",
        "\\n",
        "#,;|",
        "none of them",
        "1.5",
    ]
    write(Table(out, kind, "skip", embed=False), rows(tmp_path, *texts), [])
    assert captions(out) == [(f"{number}.jpg", text) for number, text in enumerate(texts)]
    assert [row.caption for row in read_rows(out, kind)] == texts
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_the_columns_are_those_that_are_documented(tmp_path: Path) -> None:
    for kind in FORMATS:
        write(Table(tmp_path / NAMES[kind], kind, "skip", embed=True), rows(tmp_path, "x", "y", embed=True))
    vectors = np.array([[0, 0.5, 1 / 3], [1, 0.5, 1 / 3]], dtype=np.float32)
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [["path", "caption", "score", "embedding"]] * 2
    assert lines[1]["path"] == f"{tmp_path}/1.jpg" and lines[1]["score"] == -2.5
    assert np.array_equal(np.array([line["embedding"] for line in lines], dtype=np.float32), vectors)
    (_, *table) = csv.reader((tmp_path / "a.csv").read_text().splitlines())
    assert table == [[f"{tmp_path}/0.jpg", "x", "-1.5"], [f"{tmp_path}/1.jpg", "y", "-2.5"]]
    assert np.array_equal(np.load(tmp_path / "a.csv.npy"), vectors)
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [(line["file_name"], line["text"]) for line in lines] == [("0.jpg", "x"), ("1.jpg", "y")]
    from pyarrow import parquet

    table = parquet.read_table(tmp_path / "a.parquet")
    assert str(table.schema.field("embedding").type) == "list<element: float>"
    assert np.array_equal(np.stack(table["embedding"].to_numpy()), vectors)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("embed", [False, True])
def test_a_finished_table_is_added_to_and_keeps_its_rows(tmp_path: Path, kind: TableFormat, embed: bool) -> None:
    out, whole = tmp_path / NAMES[kind], tmp_path / "whole" / NAMES[kind]
    made = rows(tmp_path, "x", "y", "z", embed=embed)
    write(Table(out, kind, "skip", embed=embed), made[:2])
    with Table(out, kind, "skip", embed=embed) as table:
        assert [table.has(item) for item, _ in made] == [True, True, False]
        table.write(made[2:])
        table.finish()
    assert captions(out) == [("0.jpg", "x"), ("1.jpg", "y"), ("2.jpg", "z")]
    if kind != "metadata":  # which holds no scores, and names that start where it lies
        write(Table(whole, kind, "skip", embed=embed), made)
        assert out.read_bytes() == whole.read_bytes()
    if kind == "csv" and embed:
        assert len(np.load(f"{out}.npy")) == 3


def test_a_table_with_nothing_to_add_is_not_touched(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    write(Table(out, "jsonl", "skip", embed=False), rows(tmp_path, "x"))
    before = out.stat()
    write(Table(out, "jsonl", "skip", embed=False))
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_no_row_is_written_twice_and_append_adds_other_captions(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    made = rows(tmp_path, "x", "y")
    write(Table(out, "jsonl", "skip", embed=False), made, made[:1])
    assert captions(out) == [("0.jpg", "x"), ("1.jpg", "y")]
    write(Table(out, "jsonl", "append", embed=False), rows(tmp_path, "x", "other"))
    assert captions(out) == [("0.jpg", "x"), ("1.jpg", "y", "other")]
    write(Table(out, "jsonl", "overwrite", embed=False), rows(tmp_path, "new"))
    assert captions(out) == [("0.jpg", "new")]


def test_overwrite_forgets_what_a_stopped_run_had(tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    write(Table(out, "csv", "skip", embed=False), rows(tmp_path, "first", "second"))
    with pytest.raises(KeyboardInterrupt), Table(out, "csv", "append", embed=False) as table:
        table.write(rows(tmp_path, "x"))
        raise KeyboardInterrupt
    assert captions(out) == [("0.jpg", "first"), ("1.jpg", "second")]
    write(Table(out, "csv", "overwrite", embed=False), rows(tmp_path, "new"))
    assert captions(out) == [("0.jpg", "new")]


def test_one_process_at_a_time_writes_a_table(tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    with ProcessPoolExecutor(1, get_context("fork")) as another:
        another.submit(os.getpid).result()  # it is there before the table is open
        with Table(out, "csv", "skip", embed=False) as table:
            table.write(rows(tmp_path, "x"))
            with pytest.raises(OSError, match=r"a\.csv\.partial: another process is writing it"):
                another.submit(write, Table(out, "csv", "skip", embed=False)).result()
            table.finish()
    assert captions(out) == [("0.jpg", "x")]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_is_none_of_ours_is_left_alone(tmp_path: Path, kind: TableFormat) -> None:
    out = tmp_path / NAMES[kind]
    for content in (b"file_name,label\na.jpg,3\n", b'{"file_name": "a.jpg", "text": "x", "label": 3}\n', b"\xff\xfe"):
        out.write_bytes(content)
        with pytest.raises(TableError, match=f"{out.name} is not a {kind} file of captions .*--overwrite"):
            write(Table(out, kind, "skip", embed=False))
        assert out.read_bytes() == content and os.listdir(tmp_path) == [out.name]


def test_a_partial_file_that_is_none_of_ours_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv.partial").write_bytes(b"something else" * 100)
    with pytest.raises(OSError, match=r"a\.csv\.partial cannot be used: .*delete it"):
        write(Table(tmp_path / "a.csv", "csv", "skip", embed=False))


@pytest.mark.parametrize("embed", [False, True])
def test_rows_with_and_without_embeddings_do_not_mix(tmp_path: Path, embed: bool) -> None:
    out = tmp_path / "a.jsonl"
    write(Table(out, "jsonl", "skip", embed=embed), rows(tmp_path, "x", embed=embed))
    with pytest.raises(TableError, match="with --embed" if embed else "without --embed"):
        write(Table(out, "jsonl", "skip", embed=not embed))
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_metadata_takes_no_image_from_elsewhere(tmp_path: Path) -> None:
    table = Table(tmp_path / "a" / "metadata.jsonl", "metadata", "skip", embed=False)
    for item in (Item(name="b.jpg", source=tmp_path / "b.jpg"), Item(name="http://x/a.jpg", source="http://x/a.jpg")):
        with pytest.raises(ValueError, match="no file in the folder of"):
            table.check(item)


def test_a_full_disk_is_told_and_costs_no_finished_row(tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    made = rows(tmp_path, "x" * 500, "y" * 500, "z" * 50_000)
    with pytest.raises(OSError) as caught, Table(out, "csv", "skip", embed=False) as table:
        table.write(made[:2])
        table._journal.commit()
        (pages,) = table._journal._database.execute("PRAGMA page_count").fetchone()
        table._journal._database.execute(f"PRAGMA max_page_count = {pages}")
        table.write(made[2:])
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, f"{out}.partial")
    assert os.listdir(tmp_path) == ["a.csv.partial"]
    write(Table(out, "csv", "skip", embed=False), made[2:])
    assert [name for name, _ in captions(out)] == ["0.jpg", "1.jpg", "2.jpg"]


def full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_at_the_end_leaves_the_rows_to_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError) as caught:
            write(Table(out, "jsonl", "skip", embed=False), rows(tmp_path, "x"))
    assert caught.value.filename == str(out) and os.listdir(tmp_path) == ["a.jsonl.partial"]
    write(Table(out, "jsonl", "skip", embed=False))
    assert captions(out) == [("0.jpg", "x")]


@pytest.mark.parametrize("existing", ["skip", "overwrite", "append"])
def test_side_cars_hold_a_caption_a_line(tmp_path: Path, existing: Existing) -> None:
    (tmp_path / "0.caption").write_bytes(b"mine\r\n")
    made = rows(tmp_path, "a\tb\nc", "d", embed=True)
    for _ in range(2):  # the second time changes nothing
        with SideCars(".caption", existing, embed=True) as output:
            assert [output.has(item) for item, _ in made] == [existing == "skip" and _ > 0] * 2
            output.write(made)
    first = {"skip": b"mine\r\n", "overwrite": b"a b c\n", "append": b"mine\na b c\n"}[existing]
    assert (tmp_path / "0.caption").read_bytes() == first
    assert (tmp_path / "1.caption").read_bytes() == b"d\n"
    assert np.array_equal(np.load(tmp_path / "1.npy"), made[1][1].embedding)
    assert len(os.listdir(tmp_path)) == 4


def test_a_side_car_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = rows(tmp_path, "x", "y")
    with SideCars(".txt", "skip", embed=False) as output:
        output.write(made[:1])
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError) as caught, SideCars(".txt", "overwrite", embed=False) as output:
        output.write(made)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "0.txt"))
    assert os.listdir(tmp_path) == ["0.txt"] and (tmp_path / "0.txt").read_text() == "x\n"


def test_a_folder_that_takes_no_files_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        Table(tmp_path, "csv", "skip", embed=False)
    assert sqlite3.threadsafety == 3  # the journal is asked in one thread and written in another


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that nobody can write to."""
    (folder := tmp_path / "mounted").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_file_system_is_told_at_once_and_by_its_name(read_only: Path) -> None:
    picture = Item(name="a.jpg", source=read_only / "a.jpg")
    for refused in (
        lambda: Table(read_only / "new" / "a.csv", "csv", "skip", embed=False),
        lambda: SideCars(".txt", "skip", embed=False).check(picture),
    ):
        with pytest.raises(OSError) as caught:
            refused()
        assert caught.value.errno == errno.EROFS


def test_the_second_image_of_a_name_has_no_side_car_in_whatever_order_they_come(tmp_path: Path) -> None:
    def captioned(output: SideCars, name: str) -> str:
        """Why an image has no caption; "" if it has one."""
        item = Item(name=name, source=tmp_path / name)
        try:
            broken = [] if output.has(item) else output.write([(item, Row(path=name, caption="x", score=None))])
        except ValueError as error:
            broken = [error]
        return "".join(map(str, broken))

    for existing in ("skip", "skip", "overwrite", "append"):
        with SideCars(".txt", existing, embed=False) as output:
            for name in ("a.png", "a/a.jpg", "b.jpg", "a.png"):  # one of them twice, which is no other image
                assert captioned(output, name) == ""
            assert output.repeated == 1
            for name, first in {"a.jpg": "a.png", "a/a.png": "a.jpg", "b.JPG": "b.jpg"}.items():
                assert f"{name}: {first} has the same side-car, {name[-5]}.txt: rename" in captioned(output, name)


def test_a_line_is_a_path_a_tab_and_a_text_whatever_the_path_holds(capsys: pytest.CaptureFixture[str]) -> None:
    row = Row(path="a\tb  c\nd\x1b[31m.jpg", caption="x\ty", score=None)
    Lines().write([(Item(name=row.path, source=Path(row.path)), row)])
    assert capsys.readouterr().out == "a\\x09b  c\\x0ad\\x1b[31m.jpg\tx y\n"


def test_embeddings_of_a_csv_file_take_the_place_of_no_other_file(tmp_path: Path) -> None:
    out, beside = tmp_path / "a.csv", tmp_path / "a.csv.npy"
    (tmp_path / "a.npy").write_bytes(b"mine")
    write(Table(out, "csv", "skip", embed=True), rows(tmp_path, "x", embed=True))
    assert (tmp_path / "a.npy").read_bytes() == b"mine" and beside.exists()
    write(Table(out, "csv", "overwrite", embed=False), rows(tmp_path, "x"))
    assert not beside.exists()  # else they would be read as those of the new rows
    write(Table(out, "csv", "skip", embed=False), rows(tmp_path, "x", "y"))
    assert captions(out) == [("0.jpg", "x"), ("1.jpg", "y")]
    out.unlink()
    beside.write_bytes(b"mine")
    with pytest.raises(TableError, match=r"a\.csv\.npy is there without a\.csv"):
        write(Table(out, "csv", "skip", embed=True), rows(tmp_path, "x", embed=True))
    assert beside.read_bytes() == b"mine" and not out.exists()
    write(Table(out, "csv", "overwrite", embed=True), rows(tmp_path, "x", embed=True))
    assert len(np.load(beside)) == 1


@pytest.mark.parametrize("kind", FORMATS)
def test_a_row_with_a_blank_caption_counts_as_none(tmp_path: Path, kind: TableFormat) -> None:
    out = tmp_path / NAMES[kind]
    write(Table(out, kind, "skip", embed=False), rows(tmp_path, " ", "y"))
    made = rows(tmp_path, "x", "y")
    with Table(out, kind, "skip", embed=False) as table:
        assert [table.has(item) for item, _ in made] == [False, True]
        table.write(made[:1])
        table.finish()
    assert sorted(captions(out)) == [("0.jpg", "x"), ("1.jpg", "y")]


def test_a_file_without_line_ends_is_not_read_whole(tmp_path: Path) -> None:
    (out := tmp_path / "a.jsonl").touch()
    os.truncate(out, 2**40)  # a hole
    with pytest.raises(TableError, match="characters"):
        write(Table(out, "jsonl", "skip", embed=False))
