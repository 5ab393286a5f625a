import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from contracap.apps.show import survey_lines, write_page
from contracap.cli import main
from contracap.data.indexing import index_folder
from contracap.data.shards import write_shard
from contracap.data.survey import survey
from contracap.images import AugmentationConfig, ImageConfig
from contracap.tokenizer import Tokenizer

EVIL = "<script>alert('&')</script>"
LONG = "dog " * 100


def encoded(width: int, height: int, *, shade: int = 0, kind: str = "jpeg", orientation: int = 1) -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (width, height), (shade % 256, shade // 256, 99)).save(file, kind, exif=exif)
    return file.getvalue()


def sample(image: bytes, *captions: str, suffix: str = "jpg") -> dict[str, bytes]:
    return {suffix: image, "json": json.dumps({"captions": captions}).encode()}


def shard(path: Path, members: Sequence[dict[str, bytes]], *, prefix: str = "k") -> Path:
    write_shard(path, [(f"{prefix}{number:03}", content) for number, content in enumerate(members)])
    return path


def numbered(path: Path, count: int) -> Path:
    return shard(path, [sample(encoded(40, 30, shade=number), f"image {number}") for number in range(count)])


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two shards with what can go wrong: of the second the last sample is cut off."""
    shard(
        tmp_path / "s" / "0.tar",
        [
            sample(encoded(400, 300), "a dog", "a cat"),
            sample(encoded(300, 400, shade=1), LONG),
            sample(encoded(400, 300), "a dog"),  # the first one's image, and a caption of it
            sample(b"no picture at all", "a broken one"),
            sample(encoded(50, 50, shade=2)),
            {"txt": b"no picture here"},
            sample(encoded(7, 90), "it is too small"),
            sample(encoded(160, 90, kind="png"), EVIL, suffix="png"),
        ],
    )
    cut = shard(tmp_path / "s" / "1.tar", [sample(encoded(60, 120, shade=9), "tall"), sample(encoded(9, 9), "gone")])
    content = cut.read_bytes()
    cut.write_bytes(content[: content.index(b"k001.jpg") + 600])
    return tmp_path / "s"


def test_everything_in_the_shards_is_counted(mixed: Path) -> None:
    found = survey(mixed)
    assert (found.shards, found.shards_read, found.complete) == (2, 2, True)
    assert found.samples == 9
    assert found.captions == 8
    assert found.captions_per_image == {0: 1, 1: 6, 2: 1}
    assert found.formats == {"JPEG": 5, "PNG": 1}
    assert found.shorter_sides == {50: 1, 60: 1, 90: 1, 300: 3}
    assert found.aspect_ratios == {"1:2": 1, "3:4": 1, "1:1": 1, "4:3": 2, "16:9": 1}
    assert (found.repeated_images, found.repeated_captions) == (1, 1)
    assert found.enlarged_share == 3 / 6


def test_what_cannot_be_used_is_counted_by_kind_and_named(mixed: Path) -> None:
    skipped = survey(mixed).skipped
    assert {kind: found.count for kind, found in skipped.items()} == {
        "broken_picture": 1,
        "broken_shard": 1,
        "no_caption": 1,
        "no_picture": 1,
        "picture_size": 1,
    }
    for kind, name in (("broken_picture", "k003"), ("no_caption", "k004"), ("no_picture", "k005")):
        assert f"sample {name} of {mixed / '0.tar'}" in skipped[kind].examples[0]
    assert str(mixed / "1.tar") in skipped["broken_shard"].examples[0]


def test_only_the_first_messages_of_a_kind_are_kept(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", [sample(b"nothing", "x")] * 12)
    skipped = survey(path).skipped["broken_picture"]
    assert (skipped.count, len(skipped.examples)) == (12, 5)


def test_caption_lengths_are_those_of_the_tokenizer_with_start_and_end(mixed: Path) -> None:
    counts = survey(mixed)
    tokenizer = Tokenizer()
    assert counts.caption_lengths[4] == 3  # start, a, dog, end; and twice more
    assert counts.caption_lengths[102] == 1
    assert counts.caption_lengths[len(tokenizer.encode(EVIL)) + 2] == 1
    assert counts.cut_share == 1 / 8


def test_a_image_is_measured_as_it_stands_upright(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", [sample(encoded(400, 200, orientation=6), "turned")])
    found = survey(path)
    assert found.aspect_ratios == {"1:2": 1}
    assert (found.shown[0].width, found.shown[0].height) == (200, 400)
    assert Image.open(io.BytesIO(found.shown[0].original)).size == (128, 256)


def test_a_image_of_too_many_pixels_is_told_by_its_header(tmp_path: Path) -> None:
    bitmap = bytearray(encoded(4, 4, kind="bmp"))
    bitmap[18:26] = np.array([50_000, 50_000], dtype="<i4").tobytes()
    path = shard(tmp_path / "s.tar", [sample(bytes(bitmap), "huge", suffix="bmp")])
    assert survey(path).skipped["picture_size"].count == 1


def test_a_shown_image_that_is_damaged_behind_its_header_is_skipped(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", [sample(encoded(64, 64)[:-200], "cut"), sample(encoded(64, 64), "whole")])
    found = survey(path)
    assert [shown.captions for shown in found.shown] == [("whole",)]
    assert found.skipped["broken_picture"].count == 1


def test_a_limit_reads_the_first_samples_only(tmp_path: Path) -> None:
    for name in "012":
        numbered(tmp_path / f"{name}.tar", 4)
    found = survey(tmp_path, limit=6)
    assert (found.samples, found.shards, found.shards_read, found.complete) == (6, 3, 2, False)
    assert survey(tmp_path, limit=12).complete
    assert "the first 6 of an unknown number" in "\n".join(survey_lines(found))


def test_behind_a_limit_the_index_tells_how_many_samples_there_are(tmp_path: Path) -> None:
    for name in "01":
        numbered(tmp_path / f"{name}.tar", 4)
    index_folder(tmp_path)
    found = survey(tmp_path, limit=2)
    assert (found.samples, found.captions, found.total_samples) == (2, 2, 8)  # only the total is about the rest
    assert "the first 2 of 8" in "\n".join(survey_lines(found))
    numbered(tmp_path / "1.tar", 40)
    assert survey(tmp_path, limit=2).total_samples is None  # the index is older than the shard


def test_the_draw_is_fair_and_no_larger_than_asked(tmp_path: Path) -> None:
    path = numbered(tmp_path / "s.tar", 10)
    drawn = np.zeros(10)
    for seed in range(20):
        keys = [
            int(shown.key[1:]) for shown in survey(path, sample_count=3, seed=seed, image=ImageConfig(size=8)).shown
        ]
        assert len(keys) == 3
        assert keys == sorted(set(keys))
        drawn[keys] += 1
    assert 1 <= drawn.min() <= drawn.max() <= 13  # 6 each are expected, give or take 2


def test_a_seed_gives_the_same_survey_and_page(mixed: Path, tmp_path: Path) -> None:
    first, second, other = (survey(mixed, seed=seed) for seed in (1, 1, 2))
    assert first == second
    write_page(first, tmp_path / "first.html")
    write_page(second, tmp_path / "second.html")
    assert (tmp_path / "first.html").read_bytes() == (tmp_path / "second.html").read_bytes()
    assert replace(other, shown=first.shown, seed=1) == first  # what is counted does not depend on it


def test_crops_are_those_of_the_given_configs(tmp_path: Path) -> None:
    left_red = Image.new("RGB", (200, 100), "blue")
    left_red.paste("red", (0, 0, 100, 100))
    file = io.BytesIO()
    left_red.save(file, "png")
    path = shard(tmp_path / "s.tar", [sample(file.getvalue(), "red and blue", suffix="png")])
    whole = AugmentationConfig(crop_scale=(1.0, 1.0), crop_ratio=(2.0, 2.0), flip=1.0)
    (shown,) = survey(path, image=ImageConfig(size=64), augmentation=whole).shown
    crop = Image.open(io.BytesIO(shown.crop))
    assert crop.size == (64, 64)
    red, _, blue = crop.getpixel((8, 32))  # type: ignore[misc]
    assert blue > 200 > 50 > red


def test_hostile_captions_and_names_are_escaped(mixed: Path, tmp_path: Path) -> None:
    half = "\ud800"
    shard(mixed / "2.tar", [sample(encoded(30, 30), EVIL, half), sample(b"broken", "x")], prefix=EVIL.replace("/", ""))
    write_page(survey(mixed), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4
    for words in ("<li>a dog</li><li>a cat</li>", "k000 · 0.tar · 400 x 300", "(no caption)", "k000 · 1.tar"):
        assert words in page


def test_names_cannot_steer_the_terminal(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", [sample(b"broken", "x")], prefix="\x1b[2J\n")
    assert all(line.isprintable() for line in survey_lines(survey(path)))


@pytest.mark.parametrize(
    ("wrong", "name"), [({"limit": 0}, "limit"), ({"sample_count": -1}, "samples"), ({"seed": -1}, "seed")]
)
def test_numbers_that_make_no_sense_are_refused(tmp_path: Path, wrong: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        survey(numbered(tmp_path / "s.tar", 1), **wrong)


def test_captions_are_measured_by_the_context_and_vocabulary_of_the_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "extraordinarily " * 5
    path = shard(tmp_path / "s.tar", [sample(encoded(40, 40), text), sample(encoded(40, 41), "a dog")])
    recipe = tmp_path / "r.toml"
    recipe.write_text('size = "tiny"\nsteps = 9999\nout = "r"\n[data]\ntrain = "s"\nbatch_size = 2\n')
    assert main(["shards", "show", str(path), "--recipe", str(recipe), "--out", str(tmp_path / "p.html")]) == 0
    said = capsys.readouterr().out
    assert "50 % are cut by a context of 16 tokens" in said
    assert re.search(r"^ +17\+ .* 1$", said, re.MULTILINE)


def test_a_page_that_cannot_be_written_is_told_before_anything_is_read(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("contracap.data.survey.survey", lambda *_, **__: pytest.fail("too late"))
    assert main(["shards", "show", str(mixed), "--out", str(tmp_path)]) == 1
    assert f"--out {tmp_path}" in capsys.readouterr().err


def test_shards_without_a_usable_sample_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tar").write_bytes(b"nothing" * 200)
    shard(tmp_path / "s.tar", [sample(b"broken", "x")])
    for name, said in (("a.tar", "a.tar"), ("s.tar", "no sample can be used, of 1 that were read: sample k000")):
        assert main(["shards", "show", str(tmp_path / name), "--out", str(tmp_path / "page.html")]) == 1
        assert said in capsys.readouterr().err and not (tmp_path / "page.html").exists()
