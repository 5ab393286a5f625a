import io
import os
import tarfile
from pathlib import Path

import pytest

from contracap.apps.bulk.inputs import count_items, find_items, first_items
from contracap.data.samples import MAX_MEMBER_BYTES, SampleError
from contracap.data.shards import ShardError, write_shard
from contracap.download import DownloadError
from tests.apps.bulk.conftest import fill, picture


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*paths: str) -> list[str]:
    return [item.name for item in find_items(paths)]


def shard(path: Path, keys: list[str]) -> str:
    write_shard(path, ((key, {"jpg": picture(seed), "txt": b"\xff"}) for seed, key in enumerate(keys)))
    return str(path)


def test_a_folder_gives_its_images_by_name_then_those_of_its_subfolders(here: Path) -> None:
    fill(here / "a", ["b.JPG", "a.png", "z/1.webp", "c/d/2.jpeg", ".hidden.jpg", ".cache/3.jpg"])
    (here / "a" / "a.txt").write_text("a caption")
    assert names("a") == ["a/a.png", "a/b.JPG", "a/c/d/2.jpeg", "a/z/1.webp"]
    assert names("a/b.JPG", "a/c") == ["a/b.JPG", "a/c/d/2.jpeg"]


def test_a_pattern_gives_images_and_shards_and_nothing_twice(here: Path) -> None:
    fill(here, ["a/1.jpg", "a/2.png", "b/1.jpg", "b/c/1.jpg", "b/.d/1.jpg"])
    (here / "a" / "1.txt").write_text("a caption")
    shard(here / "a" / "0.tar", ["x"])
    assert names("a/*") == ["a/0.tar/x", "a/1.jpg", "a/2.png"]
    assert names("**/1.jpg") == ["a/1.jpg", "b/1.jpg", "b/c/1.jpg"]
    assert names("b/**") == ["b/1.jpg", "b/c/1.jpg"]
    assert names("[ab]/?.jpg") == ["a/1.jpg", "b/1.jpg"]
    assert names(f"{here}/b/*.jpg") == [f"{here}/b/1.jpg"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(here: Path) -> None:
    fill(here, ["a[1].jpg", "a1.jpg"])
    assert names("a[1].jpg") == ["a[1].jpg"]


def test_a_list_has_a_path_or_url_on_each_line(here: Path) -> None:
    fill(here, ["a b.jpg", "c.png"])
    (here / "list.txt").write_bytes("\ufeffa b.jpg\r\n\r\n  http://localhost/x.jpg?a=1\nc.png".encode())
    found = list(find_items(["list.txt"]))
    assert [item.source for item in found] == [Path("a b.jpg"), "http://localhost/x.jpg?a=1", Path("c.png")]
    assert found[2].content() == (here / "c.png").read_bytes()


def test_a_line_of_a_list_that_names_no_file_is_told_with_its_number(here: Path) -> None:
    fill(here, ["a.jpg", "#b.jpg"])
    (here / "list.txt").write_text("a.jpg\n\n# a comment\n#b.jpg\nnone.jpg\n")
    (here / "first.txt").write_text("# a comment\na.jpg\n")
    found = list(find_items(["list.txt"]))
    assert found[2].content() == (here / "#b.jpg").read_bytes()
    for place, words in ((1, "list.txt, line 3: no such file: # a comment (a list has no comments)"), (3, "line 5")):
        with pytest.raises(FileNotFoundError) as caught:
            found[place].content()
        assert words in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"no comments.*first\.txt, line 1"):
        list(first_items(["first.txt"]))


def test_a_shard_gives_its_images_whatever_its_texts_are(here: Path) -> None:
    shard(here / "0.tar", ["a", "b/c"])
    shard(here / "1.tar", ["d"])
    found = list(find_items(["{0..1}.tar"]))
    assert [item.name for item in found] == ["0.tar/a", "0.tar/b/c", "1.tar/d"]
    assert [item.content() for item in found] == [picture(0), picture(1), picture(0)]
    assert names("0.tar", "pipe:cat 1.tar") == ["0.tar/a", "0.tar/b/c", "pipe:cat 1.tar/d"]


def test_what_is_no_image_or_breaks_off_is_an_item_that_says_so(here: Path) -> None:
    write_shard(here / "0.tar", [("a", {"jpg": picture(0)}), ("../b", {"jpg": b""}), ("c", {"jpg": picture(1)})])
    whole = (here / "0.tar").read_bytes()
    (here / "0.tar").write_bytes(whole[: whole.index(b"c.jpg") + 600])
    fill(here, ["z.jpg"])
    found = list(find_items(["0.tar", "none.jpg", "z.jpg"]))
    assert [type(item.source) for item in found] == [bytes, SampleError, ShardError, FileNotFoundError, type(Path())]
    with pytest.raises(SampleError, match="points out of the folder"):
        found[1].content()


def test_groups_of_a_shard_without_an_image_are_counted_and_texts_may_lie_anywhere(
    here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text, image = {"txt": b"a"}, {"jpg": picture(0)}
    write_shard(here / "0.tar", [("a", text), ("b", image), ("c", text), ("a", image), ("b", text)])
    found = list(find_items(["0.tar"]))
    assert [item.name for item in found] == ["0.tar/b", "0.tar/a"] and found[1].content() == picture(0)
    (line,) = caplog.messages
    assert (
        "2 samples without an image" in line and "1 sample whose files are not next" in line and "--sort=name" in line
    )
    write_shard(here / "1.tar", [("a", text)])
    with pytest.raises(FileNotFoundError, match="1 sample without an image"):
        list(first_items(["1.tar"]))


def test_a_pattern_follows_links_as_a_folder_does(here: Path) -> None:
    fill(here, ["a/1.jpg", "x/2.jpg"])
    (here / "a" / "linked").symlink_to("../x")
    (here / "a" / "back").symlink_to("..")
    assert names("a") == names("a/**") == names("a/**/*.jpg") == ["a/1.jpg", "a/linked/2.jpg"]


def test_the_number_of_images_is_known_unless_there_are_shards_which_are_not_opened(here: Path) -> None:
    (here / "shards").mkdir()
    os.mkfifo(here / "shards" / "0.tar")
    fill(here, ["shards/1.jpg", "shards/sub/2.jpg"])
    (here / "list.txt").write_text("shards/1.jpg\nhttp://127.0.0.1/a.jpg\n")
    assert count_items(["shards/*"]) is None
    assert count_items(["shards", "list.txt", "**/2.jpg"]) == 5
    assert count_items(["shards"], recursive=False) == count_items(["shards"], limit=1) == 1


def test_a_file_too_large_for_a_photograph_is_not_read(here: Path) -> None:
    with open("a.jpg", "wb") as file:
        file.truncate(MAX_MEMBER_BYTES + 1)
    (item,) = find_items(["a.jpg"])
    with pytest.raises(OSError, match=r"larger than .*a\.jpg"):
        item.content()


def test_names_that_differ_in_bytes_that_are_no_unicode_stay_distinct(here: Path) -> None:
    raw = [b"a.jpg", b"a\\xff.jpg", b"a\\x5cxff.jpg", b"a\\b.jpg", b"a\xfe.jpg", b"a\xff.jpg"]
    fill(here / "p", [os.fsdecode(name) for name in raw])
    (here / "list.txt").write_bytes(b"".join(b"p/" + name + b"\n" for name in raw))
    found = list(find_items(["list.txt"]))
    assert len({item.name for item in found}) == len(raw) and [item.content() for item in found] == [
        (here / "p" / os.fsdecode(name)).read_bytes() for name in raw
    ]
    assert {"p/a.jpg", "p/a\\b.jpg", "p/a\\xfe.jpg", "p/a\\xff.jpg"} < {item.name for item in found}
    assert sorted(names("p")) == sorted(item.name for item in found)
    shard(here / "0.tar", [os.fsdecode(name)[:-4] for name in raw])
    assert [name.removeprefix("0.tar/") for name in names("0.tar")] == [item.name[2:-4] for item in found]


def test_paths_that_stand_for_nothing_are_told_before_anything_is_read(here: Path) -> None:
    fill(here, ["a/1.jpg"])
    (here / "empty").mkdir()
    (here / "empty.txt").write_text("\n")
    (here / "caption.txt").write_text("a red circle\n")
    (here / "broken.tar").write_bytes(b"no tar" * 200)
    shard(here / "shards" / "0.tar", ["x"])
    for path, message in (
        ("none.jpg", "no such image or folder: none.jpg"),
        ("none.tar", "none.tar"),
        ("empty", "no images in the folder empty"),
        ("shards", "write shards/*.tar"),
        ("a/*.png", "no images at a/*.png"),
        ("empty.txt", "no images at empty.txt"),
        ("caption.txt", "caption.txt is not a list of images"),
        ("broken.tar", "cannot read shard broken.tar"),
    ):
        for paths in ([path],) if path == "broken.tar" else ([path], ["a", path]):
            with pytest.raises((OSError, ValueError)) as caught:
                list(first_items(paths))
            assert message in str(caught.value)
    assert [item.name for item in first_items(["a", "shards/*.tar"])] == ["a/1.jpg", "shards/0.tar/x"]


def test_images_and_shards_come_over_http(here: Path, address: str) -> None:
    fill(here, ["a.jpg"])
    shard(here / "0.tar", ["x"])
    (here / "list.txt").write_text(f"{address}/a.jpg\n{address}/none.jpg\n")
    found = list(find_items([f"{address}/a.jpg", f"{address}/0.tar", "list.txt"]))
    assert [item.name.removeprefix(address) for item in found] == ["/a.jpg", "/0.tar/x", "/a.jpg", "/none.jpg"]
    assert [item.content() for item in found[:3]] == [picture(0)] * 3
    with pytest.raises(DownloadError, match="HTTP status 404"):
        found[3].content()


def test_a_shard_without_an_image_is_told_and_the_rest_is_read(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(here, ["a/1.jpg"])
    write_shard(here / "empty.tar", [])
    (here / "junk.tar").write_bytes(b"junk" * 1000)
    assert [item.name for item in first_items(["a", "empty.tar", "junk.tar"])] == ["a/1.jpg"]
    assert all(name in caplog.text for name in ("empty.tar", "junk.tar"))
    with pytest.raises(FileNotFoundError, match=r"empty\.tar"):
        list(first_items(["empty.tar", "junk.tar"]))


def write_tar(path: Path, names: list[str]) -> str:
    """A tar file of images that are called so."""
    with tarfile.open(path, "w") as archive:
        for seed, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = len(content := picture(seed))
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def test_each_image_whose_name_has_several_dots_is_an_error_that_names_it_and_a_remedy(here: Path) -> None:
    write_tar(here / "dots.tar", ["v1.0.jpg", "v1.1.jpg", "v2.0.jpg"])
    for paths in (["dots.tar"], ["dots.tar", "dots.tar"]):
        with pytest.raises(FileNotFoundError, match=r"v1\.0\.jpg.* one dot.*v1_0\.jpg"):
            list(first_items(paths))
    write_tar(here / "mixed.tar", ["0.input.jpg", "1.jpg", "2.a.jpg", "2.b.jpg"])
    assert [item.name for item in first_items(["mixed.tar"])] == ["mixed.tar/1"]
    assert names("mixed.tar") == [f"mixed.tar/{name}" for name in ("0.input.jpg", "1", "2.a.jpg", "2.b.jpg")]
    with pytest.raises(SampleError, match=r"mixed\.tar/0\.input\.jpg.*0_input\.jpg"):
        next(find_items(["mixed.tar"])).content()


def test_all_paths_that_cannot_be_read_are_named_together(here: Path) -> None:
    fill(here, ["a.jpg"])
    with pytest.raises(ExceptionGroup) as caught:
        list(first_items(["a.jpg", "none.jpg", "ftp://localhost/x.jpg", "no/*.png"]))
    told = [str(error) for error in caught.value.exceptions]
    assert [name in text for name, text in zip(("none.jpg", "ftp://", "no/*.png"), told, strict=True)] == [True] * 3


@pytest.mark.parametrize("url", ["ftp://localhost/x.jpg", "file:///x.PNG", "s3://bucket/x.webp?a=1"])
def test_an_image_on_another_server_than_a_web_server_is_refused_at_once(here: Path, url: str) -> None:
    (here / "list.txt").write_text(f"{url}\n")
    for path in (url, "list.txt"):
        with pytest.raises(ValueError, match="http://") as caught:
            list(first_items([path]))
        assert url in str(caught.value)


def test_a_folder_in_a_list_is_told_with_list_and_line(here: Path) -> None:
    fill(here, ["a.jpg", "b/c.jpg"])
    (here / "list.txt").write_text("a.jpg\nb\n")
    with pytest.raises(IsADirectoryError, match=r"list\.txt, line 2.*b"):
        list(find_items(["list.txt"]))[1].content()


def test_further_images_of_a_group_are_counted(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(here / "0.tar", ["a.jpg", "a.png", "b.png", "c.jpg", "c.png"])
    assert names("0.tar") == ["0.tar/a", "0.tar/b", "0.tar/c"]
    assert caplog.messages == ["0.tar: skipped 2 further images of a sample, of which the first is taken"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0.tar: it is empty"),
        (b"<html>" * 200, r"0.tar: it is a web page \(HTML\)$"),
        (b"no" * 600, "0.tar: inval"),
    ],
)
def test_a_shard_that_is_not_a_tar_file_is_told_for_what_it_is(here: Path, content: bytes, said: str) -> None:
    (here / "0.tar").write_bytes(content)
    with pytest.raises(FileNotFoundError, match=said) as caught:
        list(first_items(["0.tar"]))
    assert "0 samples" not in str(caught.value)
