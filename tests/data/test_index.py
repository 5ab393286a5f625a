import hashlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import fsspec
import pytest

from contracap.data.counts import samples_in
from contracap.data.index import INDEX_FILE, IndexFileError, ShardEntry, read_index, write_index
from contracap.data.indexing import index_folder, index_shard
from contracap.data.shards import ShardError, list_shards, write_shard

LONG = "a dog runs " * 60  # 180 words, each a token


def make_shard(path: Path, captions: list[list[str]]) -> None:
    members = (
        (f"{number}", {"jpg": b"p", "json": json.dumps({"captions": texts}).encode()})
        for number, texts in enumerate(captions)
    )
    write_shard(path, members)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_shard(tmp_path / "a.tar", [["a dog", "a cat"], ["a dog runs"]])
    make_shard(tmp_path / "b.tar", [["a"], [], [LONG]])
    return tmp_path


def test_entry_counts_samples_captions_and_their_lengths_uncut(folder: Path) -> None:
    entry = index_shard(folder / "b.tar")
    content = (folder / "b.tar").read_bytes()
    assert entry == ShardEntry(
        name="b.tar",
        samples=3,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        captions=2,
        caption_lengths={3: 1, 182: 1},
    )
    assert index_shard(folder / "a.tar").caption_lengths == {4: 2, 5: 1}


def test_unusable_sample_counts_as_sample_without_captions(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", [("0", {"txt": b"no picture"}), ("1", {"jpg": b"p", "txt": b"one"})])
    entry = index_shard(tmp_path / "s.tar")
    assert (entry.samples, entry.captions) == (2, 1)


def test_index_of_flickr8k_says_what_its_manifest_says(data_folder: Path) -> None:
    manifest = json.loads((data_folder / "flickr8k" / "manifest.json").read_text())["splits"]["val"]
    entry = index_shard(data_folder / manifest["shards"][0]["path"])
    assert (entry.samples, entry.captions) == (manifest["images"], manifest["captions"])
    assert (entry.bytes, entry.sha256) == (manifest["shards"][0]["bytes"], manifest["shards"][0]["sha256"])
    assert sum(entry.caption_lengths.values()) == entry.captions


def test_written_index_is_read_back_sorted_by_name(folder: Path) -> None:
    entries = [index_shard(folder / name) for name in ("b.tar", "a.tar")]
    write_index(folder, entries)
    assert read_index(folder) == {entry.name: entry for entry in entries}
    document = json.loads((folder / INDEX_FILE).read_text())
    assert [entry["name"] for entry in document["shards"]] == ["a.tar", "b.tar"]
    assert document["shards"][1]["caption_lengths"] == {"3": 1, "182": 1}


def test_index_of_a_remote_folder_is_read_if_there_is_one(folder: Path) -> None:
    assert read_index(folder) == read_index("memory://nothing/here") == {}
    entries = index_folder(folder)
    with fsspec.open("memory://remote/index.json", "wb") as file:
        cast(Any, file).write((folder / INDEX_FILE).read_bytes())
    assert list(read_index("memory://remote/").values()) == list(read_index("memory://remote").values()) == entries


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"shards": [{"name": "a.tar"}]}', b'{"shards": 3}', b"\xff", b"[" * 100_000]
)
def test_broken_index_is_one_line_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INDEX_FILE).write_bytes(content)
    with pytest.raises(IndexFileError, match=r"index\.json") as error:
        read_index(tmp_path)
    assert "\n" not in str(error.value)


def test_completing_an_index_reads_new_and_changed_shards_only(folder: Path) -> None:
    marked = [replace(entry, sha256=f"as it was: {entry.name}") for entry in index_folder(folder)]
    write_index(folder, marked)
    make_shard(folder / "b.tar", [["other"]])
    make_shard(folder / "c.tar", [["new"]])
    assert (folder / "b.tar").stat().st_size == marked[1].bytes
    os.utime(folder / "b.tar", (later := time.time() + 9, later))
    completed = index_folder(folder)
    assert completed == [marked[0], index_shard(folder / "b.tar"), index_shard(folder / "c.tar")]
    make_shard(folder / "b.tar", [["a longer shard"]] * 20)
    assert index_folder(folder)[1].samples == 20
    (folder / "b.tar").unlink()
    assert index_folder(folder) == [completed[0], completed[2]] == list(read_index(folder).values())


def test_broken_shard_is_an_error_after_the_others_are_indexed(folder: Path) -> None:
    (folder / "0.tar").write_bytes(b"no tar")
    with pytest.raises(ShardError, match=r"0\.tar"):
        index_folder(folder)
    assert list(read_index(folder)) == ["a.tar", "b.tar"]


def test_shard_that_is_indexed_and_gone_is_an_error(folder: Path) -> None:
    write_index(folder, [*index_folder(folder), replace(index_shard(list_shards(folder)[0]), name="gone.tar")])
    with pytest.raises(IndexFileError, match=r"lists gone\.tar, which is not there"):
        samples_in(list_shards(folder))


def test_samples_are_known_from_the_index_img2dataset_or_the_headers(tmp_path: Path) -> None:
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", ((str(key), {"jpg": b"p"}) for key in range(number + 2)))
    (tmp_path / "1_stats.json").write_text('{"count": 9, "successes": 7}')
    shards = list_shards(tmp_path)
    assert samples_in(shards) == [2, 7, 4]
    index_folder(tmp_path)
    assert samples_in(shards) == [2, 3, 4]
    write_shard(tmp_path / "0.tar", ((str(key), {"jpg": bytes(9000)}) for key in range(8)))
    with pytest.raises(IndexFileError, match="index it again"):
        samples_in(shards)


def test_remote_folder_is_indexed_into_a_local_one(tmp_path: Path) -> None:
    local = tmp_path / "local"
    write_shard(local / "0.tar", [("a", {"jpg": b"p", "txt": b"t"})])
    with fsspec.open("memory://bucket/shards/0.tar", "wb") as file:
        cast(Any, file).write((local / "0.tar").read_bytes())
    with pytest.raises(IndexFileError, match="is remote: give a local folder"):
        index_folder("memory://bucket/shards/")
    assert index_folder("memory://bucket/shards/", out=tmp_path / "out") == index_folder(local)
