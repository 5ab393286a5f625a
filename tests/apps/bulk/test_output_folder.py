import json
from pathlib import Path

import fsspec
import pytest

from contracap.apps.bulk.output_folder import Folder, FolderError


@pytest.fixture(scope="module")
def bucket(s3: None) -> str:
    """An empty bucket of a local S3 server."""
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("parts")
    return "s3://parts"


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "local":
        return Folder(str(tmp_path / "new"))
    return Folder(f"{request.getfixturevalue('bucket')}/{tmp_path.name}/")


def test_a_file_is_there_once_it_is_whole(folder: Folder) -> None:
    assert folder.names() == set()
    with folder.writing("a.parquet") as path:
        path.write_bytes(b"1234")
        assert "a.parquet" not in folder.names()
    assert folder.names() == {"a.parquet"}
    with pytest.raises(ZeroDivisionError), folder.writing("b.parquet") as path:
        path.write_bytes(b"12")
        raise ZeroDivisionError
    assert folder.names() == {"a.parquet"}


def test_a_folder_is_of_one_run(folder: Folder) -> None:
    settings = {"strategy": {"name": "BeamSearch", "width": 6}, "embedding": None}
    folder.claim(settings, described={"weights": "tiny"})
    folder.claim(settings, described={"weights": "tiny, moved"})
    with pytest.raises(FolderError, match=r"other settings: embedding: None -> 'float16'\. Give another --out"):
        folder.claim(settings | {"embedding": "float16"}, described={"weights": "tiny"})
    assert folder.names() == {"_bulk.json"}


def test_a_manifest_that_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "_bulk.json").write_text('{"settings"')
    with pytest.raises(FolderError, match=r"_bulk\.json is not a manifest of a run"):
        Folder(str(tmp_path)).claim({}, described={})


def test_the_manifest_says_where_the_parts_come_from(tmp_path: Path) -> None:
    Folder(str(tmp_path)).claim({"embedding": "float32"}, described={"weights": "tiny"})
    assert json.loads((tmp_path / "_bulk.json").read_text()) == {
        "weights": "tiny",
        "settings": {"embedding": "float32"},
    }


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".0.parquet.k2j.partial", "0.parquet", ".keep"):
        (tmp_path / name).write_bytes(b"")
    Folder(str(tmp_path)).remove_partial()
    assert {file.name for file in tmp_path.iterdir()} == {"0.parquet", ".keep"}
    Folder(str(tmp_path / "none")).remove_partial()


@pytest.mark.parametrize("name", ["https://host/folder", "file:///folder", "ftp://host/folder"])
def test_a_place_without_atomic_puts_is_refused(name: str) -> None:
    with pytest.raises(FolderError, match="give a local folder, or one of s3:// or gs://"):
        Folder(name)


def test_a_folder_with_a_manifest_of_the_old_name_goes_on_and_gets_the_new_one(tmp_path: Path) -> None:
    (tmp_path / "bulk.json").write_text('{"settings": {"embedding": "float32"}}')
    with pytest.raises(FolderError, match="other settings"):
        Folder(str(tmp_path)).claim({"embedding": "float16"}, described={})
    Folder(str(tmp_path)).claim({"embedding": "float32"}, described={})
    assert Folder(str(tmp_path)).names() == {"_bulk.json"}


def test_pandas_and_pyarrow_read_the_folder_as_a_data_set(tmp_path: Path) -> None:
    import pandas as pd
    import pyarrow as pa
    from pyarrow import parquet

    folder = Folder(str(tmp_path))
    folder.claim({}, described={})
    for name in ("a.parquet", "b.parquet"):
        with folder.writing(name) as path:
            parquet.write_table(pa.table({"key": [name]}), path)
    assert (
        list(pd.read_parquet(tmp_path)["key"])
        == parquet.read_table(tmp_path)["key"].to_pylist()
        == [
            "a.parquet",
            "b.parquet",
        ]
    )
