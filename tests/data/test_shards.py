import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracap.data import shards, tar
from contracap.data.annotations import read_json
from contracap.data.captions import require_captions
from contracap.data.indexing import index_shard
from contracap.data.samples import Record, SampleError, parse_record
from contracap.data.shards import ShardError, count_samples, list_shards, read_records, read_samples, write_shard

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
    return [(record.key, record.members) for record in read_records(shard, start)]


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
    write_members(shard, ["a.jpg", "a.txt", "a.jpg", "a.txt"], format=format, mode=mode)  # webdataset refuses it
    assert [(key, set(members)) for key, members in our_records(str(shard))] == [("a", {"jpg", "txt"})] * 2


def test_flickr8k_samples_are_those_of_webdataset(data_folder: Path) -> None:
    shard = str(data_folder / "flickr8k" / "val" / "000000.tar")
    ours = our_records(shard)
    assert ours == webdataset_records(shard)
    assert len(ours) == 1000
    assert all(len(sample.captions) == 5 for sample in read_samples(shard))


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_written_shard_is_read_back_from_any_start(tmp_path: Path, suffix: str) -> None:
    written = simple_shard(tmp_path / "new" / f"s.{suffix}", ["x/0", "x/1", "2", "3"])
    for start in range(6):
        assert our_records(str(tmp_path / "new" / f"s.{suffix}"), start) == written[start:]


@settings(max_examples=25, deadline=None)
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
        found.extend((record.key, record.members) for record in read_records(str(cut)))
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


@pytest.mark.parametrize("content", [b"", b"not a tar file" * 100, b"\x1f\x8b broken", None])
def test_file_that_is_no_tar_or_missing_is_a_shard_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(ShardError, match=r"s\.tar: [^0]*"):
        our_records(str(tmp_path / "s.tar"))


@pytest.mark.parametrize("read", [count_samples, index_shard, lambda path: read_json(Path(path))])
def test_what_may_never_end_is_not_read(tmp_path: Path, read: Callable[[str], object]) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "device.tar").symlink_to("/dev/zero")
    for name, kind in (("pipe.tar", "named pipe"), ("device.tar", "device")):
        with pytest.raises((ShardError, OSError), match=f"a {kind}, not a regular file"):
            read(str(tmp_path / name))


def parsed(**members: bytes) -> tuple[str, ...]:
    members.setdefault("jpg", b"picture")
    return parse_record(Record(key="k", members=members, shard="s.tar")).captions


def test_captions_come_from_captions_then_text_then_caption_and_labels_from_json_or_cls() -> None:
    both = json.dumps({"captions": ["one", " two\n", ""], "caption": "three"}).encode()
    assert parsed(json=both, txt=b"four") == ("one", "two")
    assert parsed(json=b'{"caption": "three"}', txt=b"four\n") == ("four",)
    assert parsed(json=b'{"caption": "three"}') == ("three",)
    assert parsed(txt="fünf".encode()) == ("fünf",)
    assert parsed(json=b'{"caption": null}') == ()
    assert parsed() == ()
    for members in ({"cls": b"7\n"}, {"json": b'{"label": 7}'}):
        assert parse_record(Record(key="k", members={"png": b"p", **members}, shard="s.tar")).fields == {"label": 7}


@pytest.mark.parametrize(
    "members",
    [
        {"json": b"{broken"},
        {"json": b"[1]"},
        {"json": b'{"captions": [1]}'},
        {"json": b'{"caption": 5}'},
        {"json": b"[" * 100_000},
        {"txt": b"\xff\xfe\xfa"},
        {"cls": b"cat"},
    ],
)
def test_unreadable_member_is_told_to_who_misses_it_with_sample_and_shard(members: dict[str, bytes]) -> None:
    sample = parse_record(Record(key="k", members={"jpg": b"picture", **members}, shard="s.tar"))
    with pytest.raises(SampleError, match=r"sample k of s\.tar .*(json|txt|cls|caption)") as error:
        require_captions(sample)
    assert error.value.kind == "broken_text"


@pytest.mark.parametrize(
    "members",
    [
        {"json": b'{"captions": "one"}'},
        {"json": b'{"caption": ["one", ""]}'},
        {"json": b'{"captions": [7], "caption": "one"}'},
        {"json": b'{"caption": ""}', "txt": b"one"},
        {"json": b"{broken", "txt": b"\xef\xbb\xbfone"},
        {"json": b'{"caption": "one"}', "txt": b" \n"},
        {"txt": b"one", "cls": b"n01440764"},
    ],
)
def test_first_of_the_members_that_has_a_caption_counts(members: dict[str, bytes]) -> None:
    assert parsed(**members) == ("one",)


@pytest.mark.parametrize("text", [b"one\ntwo\n", b"one\r\n\r\n two", b"\none\rtwo"])
def test_each_line_of_a_text_is_a_caption(text: bytes) -> None:
    assert parsed(txt=text) == ("one", "two")
    record = Record(key="k", members={"jpg": b"p", "txt": text}, shard="s.tar")
    assert parse_record(record, lines=False).captions == (text.decode().strip(),)


def test_sample_without_picture_is_an_error_that_lists_the_members() -> None:
    with pytest.raises(SampleError, match=r"no image \(members: json, txt\)"):
        parse_record(Record(key="k", members={"txt": b"t", "json": b"{}"}, shard="s.tar"))


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
        parse_record(record)


def zeros(path: Path, members: list[tuple[str, int]], *, samples: int = 1) -> str:
    """A gzipped shard with a good sample, members of zeros, and more good samples."""
    good = [[(f"{number}.jpg", 1), (f"{number}.txt", 1)] for number in range(samples)]
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, size in [*good[0], *members, *(member for sample in good[1:] for member in sample)]:
            header = tarfile.TarInfo(name)
            header.size = size
            with open("/dev/zero", "rb") as file:
                archive.addfile(header, file)
    return str(path)


def test_members_of_one_sample_are_not_read_beyond_the_limit_of_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 10_000)
    monkeypatch.setattr(shards, "MAX_TEXT_BYTES", 1000)
    shard = zeros(tmp_path / "0.tgz", [("b.json", 2000), ("b.txt", 20), ("b.gif", 6000), ("b.jpg", 6000)], samples=2)
    found = list(read_records(shard))
    assert [record.key for record in found] == ["0", "b", "1"]
    assert found[1].too_large == ["json", "jpg"]
    assert sum(map(len, found[1].members.values())) == 6020
    with pytest.raises(SampleError, match="jpg has more than"):
        parse_record(found[1])
    parse_record(replace(found[1], too_large=["json"]))  # a text that nobody needs spoils nothing


@pytest.mark.parametrize(
    ("limit", "members"),
    [
        ("MAX_UNFOLDED_BYTES", [("bomb.jpg", 200_000)]),
        ("MAX_UNFOLDED_BYTES", [(f"bomb.{number}", 30_000) for number in range(4)]),
        ("MAX_HEADER_BYTES", [(f"bomb.{number}", 0) for number in range(500)]),
        ("MAX_HEADER_BYTES", [(f"no-sample-{number}", 0) for number in range(500)]),
        ("MAX_HEADER_BYTES", [("bomb." + "n" * 150_000, 0)]),
        ("MAX_HEADER_BYTES", [("bomb." + "é" * 150_000, 0)]),
    ],
)
def test_a_sample_that_costs_more_than_one_may_ends_its_shard(tmp_path, monkeypatch, limit: str, members) -> None:
    shard = zeros(tmp_path / "0.tgz", members, samples=3)
    assert len(list(read_records(shard))) >= 3
    monkeypatch.setattr(tar, limit, 100_000)
    for read in (lambda: list(read_records(shard)), lambda: count_samples(shard)):
        with pytest.raises(ShardError, match=r"0\.tgz.* more than 100,000 bytes") as error:
            read()
        assert error.value.whole <= 1


def test_many_samples_may_take_more_together_than_one(tmp_path: Path, monkeypatch) -> None:
    for limit in ("MAX_HEADER_BYTES", "MAX_UNFOLDED_BYTES"):
        monkeypatch.setattr(tar, limit, 30_000)
    assert count_samples(zeros(tmp_path / "0.tgz", [("b.jpg", 25_000)], samples=100)) == 101


def test_groups_without_a_picture_are_passed_over_and_counted(tmp_path: Path, caplog) -> None:
    write_shard(tmp_path / "0.tar", [("notes", {"json": b"{}"}), ("a", {"jpg": b"p"}), ("more", {"txt": b"t"})])
    assert [sample.key for sample in read_samples(str(tmp_path / "0.tar"))] == ["a"]
    assert "2 samples without an image" in caplog.text


@pytest.mark.parametrize("content", [b"x", b""])
def test_a_npy_member_is_handed_on_as_it_lies(tmp_path: Path, content: bytes) -> None:
    fields = {"labels": [1]}
    write_shard(tmp_path / "0.tar", [("a", {"jpg": b"p", "npy": content, "json": json.dumps(fields).encode()})])
    (sample,) = read_samples(str(tmp_path / "0.tar"))
    assert (sample.npy, sample.fields) == (content, fields)


def test_a_sparse_member_that_is_damaged_is_told_of_in_words_of_our_own(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.jpg")
    member.size, member.pax_headers = 512, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member, io.BytesIO(bytes(512)))
    with pytest.raises(ShardError, match="a header of a kind that no shard has"):
        list(read_records(str(tmp_path / "a.tar")))
