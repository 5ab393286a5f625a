"""Captions that were written for samples of shards, joined with them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contracap.data.captions import CaptionConfig, choose_caption
from contracap.data.samples import Sample
from contracap.data.shard_maker import make_shards
from contracap.data.shards import list_shards, read_samples, write_shard
from contracap.data.sources import read_source
from tests.data.test_shard_maker import picture

pyarrow = pytest.importorskip("pyarrow")


def write_part(path: Path, rows: list[dict[str, Any]]) -> Path:
    from pyarrow import parquet

    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards with captions, and a sample without one."""
    for number in range(2):
        members = [
            (f"{number}{i}", {"jpg": picture(i), "json": f'{{"captions": ["web {number}{i}"], "url": "u"}}'.encode()})
            for i in range(3)
        ]
        write_shard(tmp_path / "web" / f"{number}.tar", [*members, (f"{number}9", {"jpg": picture(9)})])
    return tmp_path / "web"


def written(shards: Path) -> list[dict[str, Any]]:
    """Rows as `bulk caption` writes them; the last image of each shard could not be read."""
    found = []
    for shard in list_shards(shards):
        for sample in read_samples(shard):
            text = None if sample.key.endswith("2") else f"made {sample.key}"
            error = None if text else "broken"
            found.append({"key": sample.key, "shard": str(shard), "caption": text, "score": 0.1, "error": error})
    return found


def read(out: Path) -> list[Sample]:
    return [sample for shard in list_shards(out) for sample in read_samples(shard)]


def test_captions_are_joined_with_the_samples_they_were_written_for(shards: Path, tmp_path: Path) -> None:
    for number, rows in enumerate((written(shards)[:4], written(shards)[4:])):
        write_part(tmp_path / "made" / f"{number}-0a.parquet", rows)
    (tmp_path / "made" / "bulk.json").write_text("{}")
    made = make_shards(tmp_path / "made", tmp_path / "out")
    assert (made.shards, made.samples, made.skipped) == (2, 6, {"broken_picture": 2})
    found = read(tmp_path / "out")
    assert [(sample.captions, sample.fields["recaption"]) for sample in found] == [
        (("web 00",), ["made 00"]),
        (("web 01",), ["made 01"]),
        (("made 09",), ["made 09"]),
        (("web 10",), ["made 10"]),
        (("web 11",), ["made 11"]),
        (("made 19",), ["made 19"]),
    ]
    assert [sample.image for sample in found[:2]] == [picture(0), picture(1)]
    assert found[0].fields["url"] == "u"
    mixed = CaptionConfig(weights={"captions": 0.5, "recaption": 0.5})
    generator = np.random.default_rng(0)
    assert {choose_caption(found[0], mixed, generator) for _ in range(20)} == {"web 00", "made 00"}


def test_shards_that_moved_are_found_in_the_folder_that_is_named(shards: Path, tmp_path: Path) -> None:
    part = write_part(tmp_path / "made" / "part.parquet", written(shards))
    moved = shards.rename(tmp_path / "moved")
    made = make_shards(part, tmp_path / "out", images=moved)
    assert made.samples == 6


def test_shard_or_sample_that_is_gone_is_counted(shards: Path, tmp_path: Path) -> None:
    rows = [*written(shards), {"key": "none", "shard": str(shards / "0.tar"), "caption": "x", "error": None}]
    (shards / "1.tar").unlink()
    made = make_shards(write_part(tmp_path / "made" / "part.parquet", rows), tmp_path / "out")
    assert (made.samples, made.skipped) == (3, {"broken_picture": 2, "missing_sample": 4})


def test_embeddings_without_captions_are_told_from_captions(tmp_path: Path) -> None:
    part = write_part(tmp_path / "made" / "part.parquet", [{"key": "0", "shard": "0.tar", "embedding": [0.1]}])
    with pytest.raises(ValueError, match=r"no column caption.*bulk caption"):
        read_source(part)


@pytest.mark.parametrize(("shard", "folder"), [("pipe:touch ran", None), ("x/pipe:touch ran", Path())])
def test_a_row_names_no_command(shard: str, folder: Path | None, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    part = write_part(tmp_path / "made" / "x.parquet", [{"key": "0", "shard": shard, "caption": "x", "error": None}])
    found = read_source(part, images=folder)
    assert not found.entries and [each.kind for each in found.skipped] == ["unsafe_path"]
    assert not (tmp_path / "ran").exists()


def test_the_name_of_a_file_is_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_shard(tmp_path / "pipe:touch ran;.tar", [("a", {"jpg": picture(0)})])
    assert [sample.key for shard in list_shards(".") for sample in read_samples(shard)] == ["a"]
    assert not (tmp_path / "ran").exists()
