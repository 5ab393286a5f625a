import io
import json
import tarfile
from pathlib import Path
from typing import Any, cast

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracap.data.shards import (
    SAMPLE_SUFFIXES,
    Record,
    SampleError,
    ShardError,
    list_shards,
    parse,
    records,
    samples,
    write_shard,
)

LONG = "long/" + "n" * 150 + "/" + "é" * 90
NAMES = [
    *("a.jpg", "a.json", "b.seg.png", "b.JPG", "dir.with.dot/c.jpg", "dir.with.dot/c.txt", "d/a.jpg", "./e.jpg"),
    *(f"{LONG}.jpg", f"{LONG}.json", "README", ".hidden", "__meta__", "__MACOSX__/a.jpg", "a.jpg", "f.", "g.jpg"),
]


def write_members(path: Path, names: list[str], *, format: int = tarfile.PAX_FORMAT, mode: Any = "w") -> None:
    with tarfile.open(path, mode, format=format) as archive:
        folder = tarfile.TarInfo("a.folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        link = tarfile.TarInfo("a.link")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        archive.addfile(link)
        for number, name in enumerate(names):
            content = f"{number} {name}".encode() * (number * 40)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def webdataset_records(shard: str) -> list[tuple[str, dict[str, bytes]]]:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    found = []
    with open(shard, "rb") as stream:
        for sample in group_by_keys(tar_file_expander([{"url": shard, "stream": stream}])):
            members = {suffix: content for suffix, content in sample.items() if not suffix.startswith("__")}
            found.append((sample["__key__"], members))
    return found


def our_records(shard: str, start: int = 0) -> list[tuple[str, dict[str, bytes]]]:
    return [(record.key, record.members) for record in records(shard, start)]


def simple_shard(path: Path, keys: list[str]) -> list[tuple[str, dict[str, bytes]]]:
    written = [(key, {"jpg": key.encode() * 300, "txt": b"a " + key.encode()}) for key in keys]
    write_shard(path, written)
    return written


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tgz", "w:gz")])
def test_samples_and_bytes_are_those_of_webdataset(tmp_path: Path, suffix: str, mode: str, format: int) -> None:
    shard = tmp_path / f"shard.{suffix}"
    write_members(shard, NAMES, format=format, mode=mode)
    ours = our_records(str(shard))
    assert ours == webdataset_records(str(shard))
    assert [key for key, _ in ours] == ["a", "b", "dir.with.dot/c", "d/a", "./e", LONG, "a", "f", "g"]
    assert set(ours[1][1]) == {"seg.png", "jpg"}


def test_flickr8k_samples_are_those_of_webdataset(data_folder: Path) -> None:
    shard = str(data_folder / "flickr8k" / "val" / "000000.tar")
    ours = our_records(shard)
    assert ours == webdataset_records(shard)
    assert len(ours) == 1000
    assert all(len(sample.captions) == 5 for sample in samples(shard))


def test_repeated_suffix_starts_another_sample(tmp_path: Path) -> None:
    write_members(tmp_path / "s.tar", ["a.jpg", "a.txt", "a.jpg", "a.txt"])
    assert [(key, set(members)) for key, members in our_records(str(tmp_path / "s.tar"))] == [("a", {"jpg", "txt"})] * 2


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_written_shard_is_read_back_from_any_start(tmp_path: Path, suffix: str) -> None:
    written = simple_shard(tmp_path / "new" / f"s.{suffix}", ["x/0", "x/1", "2", "3"])
    for start in range(6):
        assert our_records(str(tmp_path / "new" / f"s.{suffix}"), start) == written[start:]


def test_shards_are_read_through_fsspec(tmp_path: Path) -> None:
    written = simple_shard(tmp_path / "s.tar", ["0", "1"])
    with fsspec.open("memory://folder/s.tar", "wb") as file:
        cast(Any, file).write((tmp_path / "s.tar").read_bytes())
    assert our_records("memory://folder/s.tar") == written


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1))
def test_cut_shard_gives_whole_samples_then_an_error(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    folder = tmp_path_factory.mktemp("cut")
    written = simple_shard(folder / "whole.tar", ["0", "1", "2", "3"])
    content = (folder / "whole.tar").read_bytes()
    cut = folder / "cut.tar"
    end = 4 * 4 * 512  # four samples of two headers and two contents, each padded to 512 bytes; then the end mark
    cut.write_bytes(content[: int(share * (end + 511))])
    found = []
    with pytest.raises(ShardError, match=r"cut\.tar"):
        found.extend((record.key, record.members) for record in records(str(cut)))
    assert found == written[: len(found)]
    assert len(found) >= int(share * 4) - 1


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_garbage_in_a_shard_is_one_error_that_names_it(tmp_path: Path, suffix: str) -> None:
    shard = tmp_path / f"s.{suffix}"
    simple_shard(shard, ["0", "1", "2"])
    content = bytearray(shard.read_bytes())
    middle = 2048 + 100 if suffix == "tar" else len(content) // 2
    content[middle : middle + 40] = b"\xff" * 40
    shard.write_bytes(content)
    with pytest.raises(ShardError, match=rf"s\.{suffix}") as error:
        our_records(str(shard))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not a tar file" * 100, b"\x1f\x8b broken"])
def test_file_that_is_no_tar_is_a_shard_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(ShardError, match="beyond its first 0 samples"):
        our_records(str(tmp_path / "s.tar"))


def test_missing_shard_is_a_shard_error() -> None:
    with pytest.raises(ShardError, match=r"nowhere\.tar"):
        our_records("nowhere.tar")


def parsed(**members: bytes) -> tuple[str, ...]:
    members.setdefault("jpg", b"picture")
    return parse(Record(key="k", members=members, shard="s.tar")).captions


def test_captions_come_from_captions_then_text_then_caption() -> None:
    both = json.dumps({"captions": ["one", " two\n", ""], "caption": "three"}).encode()
    assert parsed(json=both, txt=b"four") == ("one", "two")
    assert parsed(json=b'{"caption": "three"}', txt=b"four\n") == ("four",)
    assert parsed(json=b'{"caption": "three"}') == ("three",)
    assert parsed(txt="fünf".encode()) == ("fünf",)
    assert parsed(json=b'{"caption": null}') == ()
    assert parsed() == ()


def test_label_comes_from_json_or_cls() -> None:
    record = Record(key="k", members={"png": b"p", "cls": b"7\n"}, shard="s.tar")
    assert parse(record).fields == {"label": 7}
    record = Record(key="k", members={"webp": b"p", "json": b'{"label": 3}'}, shard="s.tar")
    assert parse(record).fields == {"label": 3}


@pytest.mark.parametrize(
    "members",
    [
        {"json": b"{broken"},
        {"json": b"[1]"},
        {"json": b'{"captions": "one string"}'},
        {"json": b'{"captions": [1]}'},
        {"json": b'{"caption": 5}'},
        {"json": b"[" * 100_000},
        {"txt": b"\xff\xfe\xfa"},
        {"cls": b"cat"},
    ],
)
def test_unreadable_member_is_an_error_that_names_sample_and_shard(members: dict[str, bytes]) -> None:
    with pytest.raises(SampleError, match=r"sample k of s\.tar"):
        parsed(**members)


def test_sample_without_picture_is_an_error_that_lists_the_members() -> None:
    with pytest.raises(SampleError, match=r"no picture \(members: json, txt\)"):
        parse(Record(key="k", members={"txt": b"t", "json": b"{}"}, shard="s.tar"))


def test_failed_writing_leaves_the_old_shard_and_nothing_else(tmp_path: Path) -> None:
    written = simple_shard(tmp_path / "s.tar", ["0"])

    def failing():
        yield "1", {"jpg": b"x"}
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "s.tar", failing())
    with pytest.raises(ValueError, match=r"'a\.b'"):
        write_shard(tmp_path / "s.tar", [("a.b", {"jpg": b"x"})])
    assert our_records(str(tmp_path / "s.tar")) == written
    assert [file.name for file in tmp_path.iterdir()] == ["s.tar"]


@pytest.mark.parametrize("suffix", ["tar", "tgz"])
def test_same_records_make_the_same_file(tmp_path: Path, suffix: str) -> None:
    simple_shard(tmp_path / f"a.{suffix}", ["0", "1"])
    simple_shard(tmp_path / f"b.{suffix}", ["0", "1"])
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_folder_lists_its_shards_by_name(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar.gz", "c.tgz", "index.json", "x.tar.part"):
        (tmp_path / name).touch()
    listed = [str(tmp_path / name) for name in ("a.tar.gz", "b.tar", "c.tgz")]
    assert list_shards(tmp_path) == listed
    assert list_shards([str(tmp_path / "c.tgz"), tmp_path, "s3://bucket/x.tar"]) == [
        listed[2],
        *listed,
        "s3://bucket/x.tar",
    ]


def test_absent_shards_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no shards .* in the folder"):
        list_shards(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.tar"):
        list_shards(str(tmp_path / "nothing.tar"))
    with pytest.raises(FileNotFoundError, match="empty"):
        list_shards([])


def test_block_of_zeros_within_a_shard_does_not_end_it(tmp_path: Path) -> None:
    simple_shard(tmp_path / "0.tar", ["a", "b", "c", "d"])
    content = bytearray((tmp_path / "0.tar").read_bytes())
    header = content.index(b"c.jpg")
    content[header : header + 512] = bytes(512)
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(ShardError, match="a block of zeros at byte"):
        our_records(str(tmp_path / "0.tar"))


def test_members_that_unfold_to_more_than_any_picture_are_not_read(tmp_path: Path) -> None:
    header = tarfile.TarInfo("bomb.jpg")
    header.size = 2**40
    with (tmp_path / "0.tar").open("wb") as file:
        file.write(header.tobuf(format=tarfile.GNU_FORMAT))
    with pytest.raises(ShardError, match=r"0\.tar"):
        our_records(str(tmp_path / "0.tar"))
    record = Record(key="bomb", members={"jpg": b""}, shard="0.tar", too_large=["jpg"])
    with pytest.raises(SampleError, match=r"bomb of 0\.tar: jpg has more than 268,435,456 bytes"):
        parse(record)


def test_members_of_other_suffixes_are_left_empty_when_asked_for(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [("a", {"jpg": b"p", "npy": b"features", "txt": b"t"})])
    (record,) = records(str(tmp_path / "0.tar"), suffixes=SAMPLE_SUFFIXES)
    assert record.members == {"jpg": b"p", "npy": b"", "txt": b"t"}


@pytest.mark.parametrize("content", [b"x", b"\x93NUMPY", b"PK\x03\x04", b""])
def test_a_npy_member_is_handed_on_as_it_lies(tmp_path: Path, content: bytes) -> None:
    fields = {"labels": [1]}
    write_shard(tmp_path / "0.tar", [("a", {"jpg": b"p", "npy": content, "json": json.dumps(fields).encode()})])
    (sample,) = samples(str(tmp_path / "0.tar"))
    assert (sample.npy, sample.fields) == (content, fields)
