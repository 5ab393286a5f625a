import io
import json
import os
import signal
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from contracap.cli import main
from contracap.data import sample_members
from contracap.data.index import read_index
from contracap.data.indexing import index_folder, index_shard
from contracap.data.samples import MAX_TEXT_BYTES, Sample
from contracap.data.shard_maker import MadeShards, MakingError, make_shards
from contracap.data.shards import list_shards, read_samples, write_shard
from contracap.image_files import decode


def picture(number: int, *, format: str = "JPEG", size: tuple[int, int] = (9, 8), **options: Any) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def make_folder(folder: Path, count: int) -> Path:
    """Images with side-car texts."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:03}.jpg").write_bytes(picture(number))
        (folder / f"{number:03}.txt").write_text(f"caption of {number}\nanother of {number}\n")
    return folder


def read(out: Path) -> list[Sample]:
    return [sample for shard in list_shards(out) for sample in read_samples(shard)]


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def as_folder(root: Path) -> Path:
    for name, captions in CAPTIONS.items():
        (root / name).with_suffix(".txt").write_text("\n".join(captions))
    return root


def as_table(root: Path) -> Path:
    lines = [{"path": name, "caption": captions} for name, captions in CAPTIONS.items()]
    (root / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root / "t.jsonl"


CAPTIONS = {"a1.jpg": ("one", "two"), "b2.png": ("three",), "c3.jpeg": ("vier ü",)}
PICTURES = {"a1.jpg": picture(1), "b2.png": picture(2, format="PNG"), "c3.jpeg": picture(3, format="WEBP")}


@pytest.mark.parametrize("kind", [as_folder, as_table])
def test_samples_are_read_back_with_untouched_pictures(tmp_path: Path, kind: Callable[[Path], Path]) -> None:
    root = tmp_path / "source"
    root.mkdir()
    for name, content in PICTURES.items():
        (root / name).write_bytes(content)
    made = make_shards(kind(root), tmp_path / "out", samples_per_shard=2)
    assert made == MadeShards(shards=2, samples=3, captions=4, skipped={})
    found = read(tmp_path / "out")
    assert {sample.fields["source"]: (sample.image, sample.captions) for sample in found} == {
        name: (PICTURES[name], CAPTIONS[name]) for name in CAPTIONS
    }
    assert [sample.key for sample in found] == ["000000000", "000000001", "000000002"]


def test_members_are_named_by_the_true_format(tmp_path: Path) -> None:
    formats = {"PNG": "png", "GIF": "gif", "TIFF": "tif", "BMP": "bmp", "MPO": "jpg", "JPEG2000": "jp2"}
    formats |= {"WEBP": "webp", "PPM": "ppm", "ICO": "ico", "AVIF": "avif", "HEIF": "heif"}
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    Image.init()
    formats = {format: suffix for format, suffix in formats.items() if format in Image.SAVE}
    folder = make_folder(tmp_path / "source", len(formats))
    for number, format in enumerate(formats):
        options: dict[str, Any] = {"MPO": {"save_all": True}, "ICO": {"sizes": [(8, 9)]}}.get(format, {})
        (folder / f"{number:03}.jpg").write_bytes(picture(number, format=format, **options))
    make_shards(folder, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "00000.tar") as archive:
        names = [name.partition(".")[2] for name in archive.getnames()]
    assert names[::2] == list(formats.values())
    assert names[1::2] == ["json"] * len(formats)
    assert len(read(tmp_path / "out")) == len(formats)  # all are read back


def test_what_cannot_be_used_is_skipped_counted_and_named(tmp_path: Path) -> None:
    root = tmp_path / "source"
    root.mkdir()
    good = picture(0)
    files = {"good.jpg": good, "cut.jpg": good[:200], "text.png": b"no picture", "empty.jpg": b"", "none.jpg": good}
    files["other.jpg"] = picture(1, format="PCX")
    files |= {"small.jpg": picture(0, size=(7, 30)), "long.jpg": picture(2)}
    for name, content in files.items():
        (root / name).write_bytes(content)
    long_text = {"long.jpg": "a" * MAX_TEXT_BYTES}
    captions = [(name, long_text.get(name, "a caption")) for name in files if name != "none.jpg"]
    rows = [*captions, ("none.jpg", " "), ("gone.jpg", "gone"), ("../source/good.jpg", "up"), ("sub", "a folder")]
    (root / "sub").mkdir()
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (root / "metadata.jsonl").write_text("\n".join(lines))
    made = make_shards(root, tmp_path / "out", samples_per_shard=3)
    assert made.samples == 1
    assert made.skipped == {
        "broken_picture": 4,
        "missing_file": 2,
        "no_caption": 1,
        "picture_size": 1,
        "too_large": 1,
        "unsafe_path": 1,
    }
    report = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    kinds = {line["source"]: line["kind"] for line in report}
    assert len(report) == 10
    assert kinds["../source/good.jpg"] == "unsafe_path"
    assert kinds["gone.jpg"] == "missing_file"
    assert kinds["text.png"] == "broken_picture"
    assert all("\n" not in line["message"] for line in report)


def test_larger_pictures_are_scaled_to_the_shorter_side_and_stored_upright(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "source", 3)
    turned = Image.Exif()
    turned[0x0112] = 6
    (folder / "000.jpg").write_bytes(picture(0, size=(40, 80), exif=turned))  # 80 x 40, to be shown as 40 x 80
    (folder / "001.jpg").write_bytes(picture(1, size=(90, 61), format="PNG"))
    small = picture(2, size=(20, 500))
    (folder / "002.jpg").write_bytes(small)
    make_shards(folder, tmp_path / "out", shorter_side=20)
    found = read(tmp_path / "out")
    assert [tuple(decode(sample.image).shape) for sample in found] == [(3, 40, 20), (3, 30, 20), (3, 20, 500)]
    assert found[2].image == small
    for sample in found[:2]:
        scaled = Image.open(io.BytesIO(sample.image))
        assert (scaled.format, scaled.getexif().get(0x0112)) == ("JPEG", None)


def test_index_describes_the_shards_and_nothing_else_is_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_shards(make_folder(tmp_path / "source", 5), out, samples_per_shard=2)
    shards = [f"0000{number}.tar" for number in range(3)]
    assert sorted(contents(out)) == [*shards, "index.json", "making.json", "skipped.jsonl"]
    assert list(read_index(out).values()) == [index_shard(shard) for shard in list_shards(out)]
    assert [entry.samples for entry in read_index(out).values()] == [2, 2, 1]


@pytest.mark.slow
def test_shards_and_their_index_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "source", 9)
    (folder / "004.jpg").write_bytes(b"broken")
    made = make_shards(folder, tmp_path / "here", samples_per_shard=2)
    assert make_shards(folder, tmp_path / "there", samples_per_shard=2, workers=2) == made
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert index_folder(tmp_path / "there", workers=2, out=tmp_path) == list(read_index(tmp_path / "here").values())


def make_and_die(folder: Path, out: Path, dies_at: int) -> None:
    calls = count(1)

    def dying(content: bytes, name: str) -> Any:
        if next(calls) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(content, name)

    sample_members.decode = dying
    make_shards(folder, out, samples_per_shard=3)


def test_making_killed_in_the_middle_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = make_folder(tmp_path / "source", 10), tmp_path / "out"
    (folder / "001.jpg").write_bytes(b"broken")
    make_shards(folder, tmp_path / "whole", samples_per_shard=3)
    dying = get_context("fork").Process(target=make_and_die, args=(folder, out, 8))  # in the third shard
    dying.start()
    dying.join(60)
    assert dying.exitcode == -signal.SIGKILL
    assert [Path(shard).name for shard in list_shards(out)] == ["00000.tar", "00001.tar"]
    decoded: list[str] = []
    monkeypatch.setattr("contracap.data.sample_members.decode", lambda _, name: decoded.append(name) or decode(_, name))
    make_shards(folder, out, samples_per_shard=3)
    assert decoded == ["006.jpg", "007.jpg", "008.jpg", "009.jpg"]
    assert contents(out) == contents(tmp_path / "whole")


def test_interrupted_verb_says_what_is_done_and_that_it_goes_on(tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupted(content: bytes, name: str) -> Any:
        if name == "005.jpg":
            raise KeyboardInterrupt
        return decode(content, name)

    folder, out = make_folder(tmp_path / "source", 9), tmp_path / "out"
    call = ["shards", "make", str(folder), "--out", str(out), "--samples-per-shard", "3", "--workers", "0"]
    with monkeypatch.context() as patched:
        patched.setattr("contracap.data.sample_members.decode", interrupted)
        assert main(call) == 130
    said = capsys.readouterr().err.splitlines()
    assert "1 of 3 shards" in said[-1] and "the same command" in said[-1]
    assert main(call) == 0
    assert len(read(out)) == 9


def failing(*arguments: Any) -> Any:
    raise OSError("disk full")


def test_shard_that_is_gone_is_made_again_before_the_end_and_missed_after_it(tmp_path: Path, monkeypatch) -> None:
    folder, out = make_folder(tmp_path / "source", 4), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("contracap.data.shard_maker.write_index", failing)
        with pytest.raises(OSError, match="disk full"):
            make_shards(folder, out, samples_per_shard=2)
    (out / "00001.tar").unlink()
    make_shards(folder, out, samples_per_shard=2)
    assert len(read(out)) == 4
    (out / "00001.tar").unlink()
    with pytest.raises(MakingError, match=r"00001\.tar is gone"):
        make_shards(folder, out, samples_per_shard=2)


def test_finished_folder_is_left_alone_by_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = make_folder(tmp_path / "source", 4), tmp_path / "out"
    (folder / "001.jpg").write_bytes(b"broken")
    made = make_shards(folder, out)
    before = contents(out)
    monkeypatch.delattr("contracap.data.sample_members.decode")
    assert (
        make_shards(folder, out) == made == MadeShards(shards=1, samples=3, captions=6, skipped={"broken_picture": 1})
    )
    assert contents(out) == before


def test_other_source_or_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "source", 4), tmp_path / "out"
    make_shards(folder, out)
    before = contents(out)
    with pytest.raises(MakingError, match="shorter_side was None and is now 8"):
        make_shards(folder, out, shorter_side=8)
    (folder / "000.txt").write_text("a better caption")
    with pytest.raises(MakingError, match=r"source.*delete .*--out"):
        make_shards(folder, out)
    assert contents(out) == before


def test_folder_with_foreign_shards_or_a_broken_plan_is_refused(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "source", 1), tmp_path / "out"
    write_shard(out / "mine.tar", [("0", {"jpg": b"p"})])
    with pytest.raises(MakingError, match="holds shards already"):
        make_shards(folder, out)
    assert sorted(contents(out)) == ["mine.tar"]
    (out / "making.json").write_text("[")
    with pytest.raises(MakingError, match=r"making\.json is broken"):
        make_shards(folder, out)


def test_source_without_a_usable_picture_is_an_error_and_can_be_tried_again(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("image,caption\na.jpg,one\n")
    with pytest.raises(MakingError, match=r"not one image .*skipped\.jsonl .* missing_file: no such file: .*a\.jpg"):
        make_shards(table, tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["skipped.jsonl"]
    (tmp_path / "a.jpg").write_bytes(picture(0))
    assert make_shards(table, tmp_path / "out").samples == 1


@pytest.mark.parametrize("setting", ["samples_per_shard", "shorter_side"])
def test_numbers_below_one_are_refused_before_anything_is_written(tmp_path: Path, setting: str) -> None:
    folder = make_folder(tmp_path / "source", 1)
    with pytest.raises(ValueError, match=f"{setting} must be an integer of at least 1"):
        make_shards(folder, tmp_path / "out", **{setting: 0})
    assert not (tmp_path / "out").exists()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and its address on the web."""
    folder = make_folder(tmp_path / "served", 6)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_pictures_from_the_web_are_fetched_and_failures_counted_by_status(tmp_path, served: tuple[Path, str]) -> None:
    folder, address = served
    urls = [*(f"{address}/{number:03}.jpg" for number in range(6)), f"{address}/gone.jpg", f"{address}/000.txt"]
    table = tmp_path / "t.tsv"
    table.write_text("URL\tTEXT\n" + "".join(f"{url}\tcaption {number}\n" for number, url in enumerate(urls)))
    made = make_shards(table, tmp_path / "out", samples_per_shard=5)
    assert made == MadeShards(shards=2, samples=6, captions=6, skipped={"broken_picture": 1, "http_404": 1})
    found = read(tmp_path / "out")
    assert [sample.fields["source"] for sample in found] == urls[:6]
    assert [sample.image for sample in found] == [(folder / f"{number:03}.jpg").read_bytes() for number in range(6)]
    assert [sample.captions for sample in found] == [(f"caption {number}",) for number in range(6)]
