import json
from pathlib import Path

import pytest

from contracap.config import build
from contracap.data.index import ShardEntry, write_index
from contracap.plan.flops import Texts
from contracap.plan.run import caption_texts, plan_run
from contracap.plan.speed import best_interval, lost_share, traffic_bytes
from contracap.recipe import Recipe, load_recipe

PUBLISHED = load_recipe(Path(__file__).parent.parent.parent / "recipes" / "pretrain-laion2b-coca-vit-l-14.toml")


def recipe(**changes: object) -> Recipe:
    values = {"size": "tiny", "steps": 200, "out": "runs/x", "data": {"train": "no such shards", "batch_size": 64}}
    return build(Recipe, values | changes)


def test_one_free_efficiency_gives_the_published_run() -> None:
    plan = plan_run(PUBLISHED, gpus=384, gpu="a100-40g", efficiency=0.156)
    assert plan.samples == pytest.approx(13e9, rel=1e-3)
    assert plan.figures["samples_per_second_per_gpu"] == pytest.approx(75.5, rel=0.02)
    assert plan.figures["days"] == pytest.approx(5.19, rel=0.02)
    assert plan.figures["gpu_hours"] == pytest.approx(47_800, rel=0.02)
    assert plan.flops == plan.padded_flops


def test_shorter_texts_make_the_run_shorter_and_the_batch_larger() -> None:
    padded, short = (plan_run(PUBLISHED, gpus=384, gpu="h100-80g", text_tokens=tokens) for tokens in (76.0, 16.0))
    assert sum(short.padded_flops.values()) == sum(padded.flops.values()) > sum(short.flops.values())
    assert short.figures["gpu_hours"] < padded.figures["gpu_hours"]
    assert short.figures["largest_batch_per_gpu"] > padded.figures["largest_batch_per_gpu"]


@pytest.mark.parametrize("gpu", ["rtx-4090", "h200-141g"])
def test_the_largest_batch_fits_and_one_more_does_not(gpu: str) -> None:
    first = plan_run(recipe(), gpus=16, gpu=gpu).figures

    def needed(rows: float) -> float:
        changed = recipe(data={"train": "no such shards", "batch_size": int(16 * rows)})
        return plan_run(changed, gpus=16, gpu=gpu).figures["memory_gib_per_gpu"]

    largest = first["largest_batch_per_gpu"]
    assert needed(largest) <= first["usable_gib_per_gpu"] < needed(largest + 1)


def test_a_batch_in_parts_needs_the_memory_of_one_part() -> None:
    whole, parts = (plan_run(recipe(accumulation=accumulation), gpus=2, gpu="l40s").memory for accumulation in (1, 4))
    assert parts["activations"] == whole["activations"] / 4
    assert parts["gradients"] == whole["gradients"]


def test_gradients_travel_twice_around_the_ring_and_features_to_all() -> None:
    arguments = {"trained": 1000, "embed_dim": 32, "rows": 5.0, "contrastive": True}
    assert traffic_bytes(gpus=4, **arguments) == {"gradients": 2 * 3 / 4 * 4000, "features": 3 * 5 * (2 * 32 + 2) * 4}
    assert sum(traffic_bytes(gpus=1, **arguments).values()) == 0
    assert traffic_bytes(gpus=4, **arguments | {"contrastive": False})["features"] == 0


def test_gradients_cost_time_only_where_the_backward_pass_does_not_hide_them() -> None:
    large, small = (
        plan_run(recipe(data={"train": "x", "batch_size": batch}), gpus=8, gpu="h100-80g") for batch in (2**20, 64)
    )
    assert large.seconds["gradients, not hidden"] == 0 < small.seconds["gradients, not hidden"]


def test_the_best_interval_loses_less_than_its_neighbours() -> None:
    between = 3600 * 50_000 / 384
    best = best_interval(1.0, between)
    assert best / 60 == pytest.approx(16, abs=0.5)
    assert 100 * lost_share(best, 1.0, between) == pytest.approx(0.2, abs=0.01)
    assert lost_share(best, 1.0, between) < min(lost_share(factor * best, 1.0, between) for factor in (0.9, 1.1))
    assert best_interval(1.0, 3600 * 50_000 / 4096) / 60 == pytest.approx(5, abs=0.1)


@pytest.mark.parametrize(
    ("changes", "gpus", "message"),
    [
        ({}, 3, "data.batch_size 64 cannot be shared by 3 GPUs: set it to 63 or 66"),
        ({}, 128, "data.batch_size 64 cannot be shared by 128 GPUs: set it to 128"),
        ({"accumulation": 4}, 32, "data.batch_size 64 cannot be shared by 32 GPUs with 4 parts each"),
        ({}, 32, "data.streams 16 cannot be shared by 32 GPUs: set it to 32"),
        (
            {"size": "coca_ViT-L-14", "data": {"train": "x", "batch_size": 1024}},
            2,
            "512 samples at a time do not fit into the memory of one l40s, 95 do: take at least 11 GPUs, or set "
            "accumulation = 8",
        ),
        (
            {"model": {"vision": {"layers": 4, "width": 8192}}},
            1,
            "not a single sample fits into the memory of one l40s",
        ),
    ],
)
def test_what_cannot_run_is_warned_of(changes: dict, gpus: int, message: str) -> None:
    plan = plan_run(recipe(**changes), gpus=gpus, gpu="l40s")
    assert len(plan.warnings) == 1 and plan.warnings[0].startswith(message)
    assert f"warning: {message}" in plan.table()


def test_a_run_that_fits_warns_of_nothing() -> None:
    assert plan_run(recipe(), gpus=16, gpu="l40s").warnings == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": "a100"}, "unknown GPU 'a100'; the GPUs are a100-40g"),
        ({"gpus": 0}, "gpus is 0"),
        ({"efficiency": 1.5}, "efficiency is 1.5"),
        ({"text_tokens": 17.0}, "text_tokens is 17.0; it must be from 2 to 16"),
        ({"hours_between_failures": 0.0}, "hours_between_failures 0.0"),
    ],
)
def test_a_wrong_argument_says_what_is_wrong(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_run(recipe(), **({"gpus": 1, "gpu": "l40s"} | changes))


def entry(name: str, lengths: dict[int, int]) -> ShardEntry:
    return ShardEntry(
        name=name, samples=4, bytes=10240, sha256="0", captions=sum(lengths.values()), caption_lengths=lengths
    )


def test_caption_lengths_come_from_the_index_of_the_shards_that_are_read(tmp_path: Path) -> None:
    for name in ("0.tar", "1.tar"):
        (tmp_path / name).touch()
    write_index(tmp_path, [entry("0.tar", {5: 2, 20: 2}), entry("1.tar", {9: 4})])
    both = recipe(data={"train": str(tmp_path), "batch_size": 64})
    first = recipe(data={"train": {"one": {"shards": [str(tmp_path / "{0..0}.tar")]}}, "batch_size": 64})
    assert caption_texts(first.data, 16) == Texts(mean=(5.0 + 16) / 2, longest=16)
    assert caption_texts(both.data, 16) == Texts(mean=(2 * 5 + 2 * 16 + 4 * 9) / 8, longest=16)
    assert caption_texts(PUBLISHED.data, 76) is None  # remote
    plan = plan_run(both, gpus=1, gpu="l40s")
    assert "texts of 9.8 tokens" in plan.title and len(plan.assumptions) == 1
    assert len(plan_run(recipe(), gpus=1, gpu="l40s").assumptions) == 2


def test_the_file_holds_the_figures_and_what_they_were_made_of(tmp_path: Path) -> None:
    plan = plan_run(recipe(), gpus=4, gpu="rtx-4090")
    plan.result("contracap plan x.toml").write(tmp_path / "plan.json")
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["figures"] == pytest.approx(dict(plan.figures))
    assert (written["samples"], written["seed"], written["reasons"]) == (200 * 64, None, {})
    assert sum(written["plan"]["memory"].values()) / 2**30 == pytest.approx(written["figures"]["memory_gib_per_gpu"])
    assert written["plan"]["warnings"] == []


def test_the_columns_of_the_table_are_aligned() -> None:
    lines = plan_run(recipe(), gpus=4, gpu="rtx-4090").table().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("GFLOP of a sample"))
    assert len({len(line) for line in lines[start : start + 11]}) == 1
