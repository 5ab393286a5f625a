import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from contracap.apps.bulk import parts
from contracap.apps.bulk.output_folder import Folder
from contracap.apps.bulk.parts import BulkConfig, PartWriter, part_config, part_name
from contracap.data.shards import read_records, write_shard
from contracap.generation import BeamSearch, Captioner, Greedy
from contracap.model.coca import CoCa
from contracap.model.sizes import SIZES
from contracap.pretrained import random_model
from contracap.processor import Processor
from tests.apps.bulk.worlds import picture, rows, write_shards

BEAMS = BeamSearch(width=2, max_tokens=12)


@pytest.fixture(scope="module")
def tiny() -> tuple[CoCa, Processor]:
    return random_model(SIZES["tiny"], seed=0)


def writer(tiny: tuple[CoCa, Processor], config: BulkConfig) -> PartWriter:
    return PartWriter(config, *tiny, metadata={"weights": "tiny"}, threads=2)


def pictures(shard: str) -> list[bytes]:
    return [record.members["jpg"] for record in read_records(shard)]


def test_a_part_holds_what_captioner_and_model_say(tiny, tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path / "shards", 1, 7)
    made = writer(tiny, BulkConfig(strategy=BEAMS, embedding="float16", batch_size=3))
    assert made.write(shard, Folder(str(tmp_path / "out"))) == parts.ShardOutcome(shard=shard, rows=7)
    model, processor = tiny
    captions = Captioner(model, processor)(pictures(shard), BEAMS)
    with torch.no_grad():
        embeddings = model.encode_image(processor.images(pictures(shard))).numpy()
    found = rows(tmp_path / "out", shard)
    assert [row["key"] for row in found] == [f"0-{number:03}" for number in range(7)]
    assert {row["shard"] for row in found} == {shard} and {row["error"] for row in found} == {None}
    assert [row["caption"] for row in found] == [caption.text for caption in captions]
    for name in ("score", "log_probability"):
        assert [row[name] for row in found] == pytest.approx([getattr(caption, name) for caption in captions], abs=1e-4)
    assert np.abs(np.array([row["embedding"] for row in found], np.float32) - embeddings).max() < 1e-3
    schema = pq.read_schema(tmp_path / "out" / part_name(shard))
    assert schema.field("embedding").type == pa.list_(pa.float16(), SIZES["tiny"].embed_dim)
    assert json.loads(schema.metadata[b"contracap"]) == {"weights": "tiny"}


def test_captions_begin_with_the_prompt(tiny, tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path / "shards", 1, 3)
    writer(tiny, BulkConfig(strategy=BEAMS, prompt="a photo of")).write(shard, Folder(str(tmp_path / "out")))
    expected = [caption.text for caption in Captioner(*tiny)(pictures(shard), BEAMS, prompts="a photo of")]
    assert [row["caption"] for row in rows(tmp_path / "out", shard)] == expected
    assert all(text.startswith("a photo of") for text in expected)


def test_columns_are_those_that_are_wanted(tiny, tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path / "shards", 1, 2)
    for name, config in {"c": BulkConfig(strategy=Greedy()), "e": BulkConfig(embedding="float32")}.items():
        writer(tiny, config).write(shard, Folder(str(tmp_path / name)))
    assert list(rows(tmp_path / "c", shard)[0]) == ["key", "shard", "caption", "score", "log_probability", "error"]
    assert list(rows(tmp_path / "e", shard)[0]) == ["key", "shard", "embedding", "error"]


def test_an_unreadable_image_has_a_row_that_says_why(tiny, tmp_path: Path) -> None:
    shard = str(tmp_path / "0.tar")
    broken = picture(1)[:200]
    write_shard(shard, [("a", {"jpg": broken}), ("b", {"jpg": picture(0)}), ("c", {"txt": b"x"}), ("d", {"jpg": b""})])
    made = writer(tiny, BulkConfig(strategy=BEAMS, embedding="float32", batch_size=1))  # no image in three batches
    assert made.write(shard, Folder(str(tmp_path / "out"))) == parts.ShardOutcome(
        shard=shard, rows=3, unreadable=2, first_unreadable="a, d", without_image=1
    )
    found = rows(tmp_path / "out", shard)
    assert [row["key"] for row in found] == ["a", "b", "d"]
    said = [f"{shard}/a: ", None, f"{shard}/d: "]
    assert all(
        row["error"].startswith(start) if start else not row["error"] for row, start in zip(found, said, strict=True)
    )
    unread = [found[0], found[2]]
    assert all(row[name] is None for row in unread for name in ("caption", "score", "log_probability", "embedding"))
    assert found[1]["caption"] == Captioner(*tiny)([picture(0)], BEAMS)[0].text


def test_keys_and_shards_may_have_bytes_that_are_no_text(tiny, tmp_path: Path) -> None:
    shard = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.tar")
    keys = [os.fsdecode(b"a\xff"), "a\\xff", os.fsdecode(b"b\xff")]
    write_shard(shard, [(key, {"jpg": picture(0) if key[0] == "a" else b"x"}) for key in keys])
    writer(tiny, BulkConfig(embedding="float32")).write(shard, Folder(str(tmp_path / "out")))
    found = rows(tmp_path / "out", shard)
    assert [row["key"] for row in found] == ["a\\xff", "a\\x5cxff", "b\\xff"] and found[2]["error"]
    assert {row["shard"] for row in found} == {f"{tmp_path}/\\xff.tar"}


def test_rows_stay_in_order_over_row_groups(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "ROW_GROUP", 4)
    (shard,) = write_shards(tmp_path / "shards", 1, 9)
    writer(tiny, BulkConfig(embedding="float32", batch_size=2)).write(shard, Folder(str(tmp_path / "out")))
    assert [row["key"] for row in rows(tmp_path / "out", shard)] == [f"0-{number:03}" for number in range(9)]
    assert pq.ParquetFile(tmp_path / "out" / part_name(shard)).metadata.num_row_groups == 3


def test_an_empty_shard_has_an_empty_part(tiny, tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [])
    outcome = writer(tiny, BulkConfig(strategy=BEAMS)).write(str(tmp_path / "0.tar"), Folder(str(tmp_path / "out")))
    assert (outcome.rows, outcome.problem) == (0, "")
    assert rows(tmp_path / "out", str(tmp_path / "0.tar")) == []


def test_a_cut_shard_has_no_part_and_the_outcome_says_why(tiny, tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path / "shards", 1, 6)
    content = Path(shard).read_bytes()
    Path(shard).write_bytes(content[: len(content) // 2])
    made = writer(tiny, BulkConfig(embedding="float32", batch_size=2))
    assert f"cannot read shard {shard} beyond" in made.write(shard, Folder(str(tmp_path / "out"))).problem
    assert "no such" in made.write(str(tmp_path / "none.tar"), Folder(str(tmp_path / "out"))).problem.lower()
    assert list((tmp_path / "out").iterdir()) == []


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """What a full disk does to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_part_that_does_not_fit_the_disk_is_an_error_and_no_file(tiny, tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path / "shards", 1, 6)
    made = writer(tiny, BulkConfig(embedding="float32"))
    with no_file_above(1000), pytest.raises(OSError, match="File too large"):
        made.write(shard, Folder(str(tmp_path / "out")))
    assert list((tmp_path / "out").iterdir()) == []


def test_weights_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    model, processor = random_model(SIZES["tiny"], seed=0)
    torch.nn.init.constant_(next(model.vision.parameters()), float("nan"))
    (shard,) = write_shards(tmp_path / "shards", 1, 1)
    for config in (BulkConfig(embedding="float32"), BulkConfig(strategy=BEAMS)):
        with pytest.raises(ValueError, match="finite"):
            PartWriter(config, model, processor, metadata={}, threads=1).write(shard, Folder(str(tmp_path / "out")))


def test_a_model_without_decoder_is_refused_for_captions_alone() -> None:
    clip, processor = random_model(replace(SIZES["tiny"], decoder=None), seed=0)
    PartWriter(BulkConfig(embedding="float32"), clip, processor, metadata={}, threads=1)
    with pytest.raises(ValueError, match="decoder"):
        PartWriter(BulkConfig(strategy=BEAMS), clip, processor, metadata={}, threads=1)


def test_part_names_differ_where_shards_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a/0.tar", "b/0.tar", "s3://a/0.tar", "s3://b/0.tar", "pipe:zcat /d/0.tar", "pipe:cat /d/0.tar", "a/0.tgz"]
    made = [part_name(name) for name in names]
    assert len(set(made)) == len(names)
    assert all("/" not in name and name.startswith("0-") and name.endswith(".parquet") for name in made)
    assert len(part_name("pipe:" + "x y" * 500)) < 200
    monkeypatch.chdir(tmp_path)
    assert part_name("a/0.tar") == part_name(str(tmp_path / "a/0.tar")) == part_name("b/../a/0.tar")
    assert part_name("https://h/0.tar?signed=1") == part_name("https://h/0.tar?signed=2")


def test_settings_tell_other_weights_and_other_strategies(tiny) -> None:
    config, greedy = BulkConfig(strategy=BEAMS), BulkConfig(strategy=Greedy())
    same = part_config(config, *random_model(SIZES["tiny"], seed=0))
    assert part_config(config, *tiny) == same == json.loads(json.dumps(same))
    assert part_config(config, *random_model(SIZES["tiny"], seed=1)) != same
    assert part_config(greedy, *tiny) != same != part_config(replace(config, embedding="float16"), *tiny)
    assert part_config(replace(config, prompt="a"), *tiny) != same
    assert part_config(replace(config, batch_size=1), *tiny) == same


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 0}, "batch_size must be an integer"),
        ({"embedding": None}, "nothing"),
        ({"prompt": "a"}, "no captions"),
    ],
)
def test_a_run_that_makes_nothing_is_refused(change: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(BulkConfig(embedding="float32"), **change)
