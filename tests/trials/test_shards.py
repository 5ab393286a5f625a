"""Shards as other tools write them."""

import json
from pathlib import Path

import pytest

from contracap.cli import main
from contracap.data.captions import CaptionConfig
from contracap.data.config import DataConfig
from contracap.data.loader import TrainingBatches
from contracap.data.order import OrderError
from contracap.data.shards import read_samples
from contracap.images import ImageConfig
from contracap.tokenizer import Tokenizer


def figures(weights: Path, shard: Path, task: str, out: Path) -> dict:
    words = ["evaluate", str(weights), "--task", task, "--data", str(shard), "--json", str(out)]
    if task == "captioning":
        words += ["--metrics", "bleu", "cider", "--tokenizer", "python"]
    assert main(words) == 0
    return json.loads(out.read_text())


def test_captions_of_clip_benchmark_are_a_line_each(trial, weights: Path, tmp_path) -> None:
    folder = trial("shards")
    for task in ("retrieval", "captioning"):
        lines = figures(weights, folder / "clip_benchmark.tar", task, tmp_path / "lines.json")
        listed = figures(weights, folder / "clip_benchmark-as-json.tar", task, tmp_path / "listed.json")
        assert lines["figures"] == listed["figures"]
        assert task == "captioning" or lines["captions"] == 20


@pytest.mark.parametrize(
    ("name", "remedy"), [("unsorted", "--sort=name"), ("dotted", "first dot"), ("renamed", "first dot")]
)
def test_the_layout_is_told_with_its_remedy(trial, weights: Path, tmp_path, capsys, name: str, remedy: str) -> None:
    shard = str(trial("shards") / f"{name}.tar")
    assert main(["evaluate", str(weights), "--task", "retrieval", "--data", shard]) == 1
    assert remedy in capsys.readouterr().err
    main(["shards", "show", shard, "--out", str(tmp_path / "page.html")])
    assert remedy in "".join(capsys.readouterr())
    config = DataConfig(train=shard, batch_size=2, shuffle_buffer=2, streams=1)
    with pytest.raises(OrderError, match=remedy):
        next(iter(TrainingBatches(config, image=ImageConfig(size=8), tokenizer=Tokenizer(16), seed=0)))


def test_captions_are_found_wherever_they_stand(trial) -> None:
    found = {sample.key: sample.captions for sample in read_samples(str(trial("shards") / "captions.tar"))}
    assert found["002"] == ("one caption", "another")
    assert found["003"] == ("a caption with a mark",)
    assert found["005"] == ("json with a mark",)
    assert found["008"] == ("has a txt",)
    assert found["011"] == ("a class of text",)
    assert found["012"] == ("but a caption",)
    assert found["013"] == ("text beside an empty caption",)
    assert found["014"] == ("one text under captions",)
    assert [key for key, captions in found.items() if not captions] == ["000", "001", "004", "007", "009", "010"]


def test_one_setting_takes_a_text_as_one_caption(trial) -> None:
    shard = str(trial("shards") / "clip_benchmark.tar")
    for lines, batch in ((True, 20), (False, 4)):
        config = DataConfig(
            train=shard, batch_size=1, streams=1, shuffle_buffer=4, captions=CaptionConfig(use="all", lines=lines)
        )
        batches = iter(TrainingBatches(config, image=ImageConfig(size=8), tokenizer=Tokenizer(76), seed=0))
        keys = [next(batches).keys[0] for _ in range(batch)]
        assert sorted(keys) == sorted([f"s{number:07}" for number in range(4)] * (batch // 4))
