import json
from dataclasses import replace
from pathlib import Path

import pytest

from contracap.apps.plan.failures import Failures
from contracap.apps.plan.planner import plan_run
from contracap.apps.plan.speed import travel_seconds
from contracap.apps.plan.text_lengths import caption_texts
from contracap.apps.plan.traffic import Collective
from contracap.config import build
from contracap.data.index import ShardEntry, write_index
from contracap.parallel import ParallelConfig
from contracap.training.flops import TextLengths
from contracap.training.gpus import find_gpu
from contracap.training.recipe import Recipe, load_recipe

PUBLISHED = load_recipe(Path(__file__).parents[3] / "recipes" / "pretrain-laion2b-coca-vit-l-14.toml")


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


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    first = plan_run(recipe(), gpus=16, gpu="rtx-4090").figures

    def needed(rows: float) -> float:
        changed = recipe(data={"train": "no such shards", "batch_size": int(16 * rows)})
        return plan_run(changed, gpus=16, gpu="rtx-4090").figures["memory_gib_per_gpu"]

    largest = first["largest_batch_per_gpu"]
    assert needed(largest) <= first["usable_gib_per_gpu"] < needed(largest + 1)


def test_a_batch_in_parts_needs_the_memory_of_one_part() -> None:
    whole, parts = (plan_run(recipe(accumulation=accumulation), gpus=2, gpu="l40s").memory for accumulation in (1, 4))
    assert parts["activations"] == whole["activations"] / 4
    assert parts["gradients"] == whole["gradients"]


def test_what_stays_in_a_machine_travels_faster() -> None:
    gpu = find_gpu("a100-80g")
    local, far = (
        Collective(kind="all_reduce", purpose="gradients", payload=8e9, ranks=8, local=local) for local in (True, False)
    )
    assert travel_seconds(gpu, [local]) == pytest.approx(14e9 / 300e9)
    assert travel_seconds(gpu, [local, far]) == pytest.approx(14e9 / 300e9 + 14e9 / 50e9)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp"])
def test_traffic_costs_time_only_where_the_passes_do_not_hide_it(kind: str) -> None:
    large, small = (
        plan_run(recipe(data={"train": "x", "batch_size": batch}, parallel={"kind": kind}), gpus=16, gpu="h100-80g")
        for batch in (2**21, 64)
    )
    left = "parameters and gradients, not hidden"
    assert large.seconds[left] == 0 < small.seconds[left]


def test_sharing_a_model_out_takes_less_memory_and_more_traffic() -> None:
    ddp, hsdp, fsdp = (
        plan_run(replace(PUBLISHED, parallel=ParallelConfig(kind=kind)), gpus=384, gpu="h200-141g")
        for kind in ("ddp", "hsdp", "fsdp")
    )
    for name, more in (("parameters", 8), ("AdamW moments", 8)):
        assert ddp.memory[name] == pytest.approx(more * hsdp.memory[name], rel=1e-3)
        assert hsdp.memory[name] > 40 * fsdp.memory[name]
    held = [plan.figures["memory_gib_per_gpu"] for plan in (ddp, hsdp, fsdp)]
    assert held == sorted(held, reverse=True)
    assert ddp.figures["all_gather_megabytes_per_step"] < hsdp.figures["all_gather_megabytes_per_step"]
    assert ddp.figures["reduce_scatter_megabytes_per_step"] == 0 < hsdp.figures["reduce_scatter_megabytes_per_step"]


def test_the_contrastive_loss_holds_the_features_of_all_gpus() -> None:
    plan = plan_run(recipe(size="coca_ViT-B-32"), gpus=16, gpu="a100-80g")
    assert plan.memory["contrastive scores"] == 2 * 2 * 4 * 4 * 64 + 2 * 64 * 512 * 4


def test_computing_again_takes_time_that_the_mfu_does_not_count_and_saves_memory() -> None:
    kept, again = (
        plan_run(replace(PUBLISHED, parallel=ParallelConfig(recompute=recompute)), gpus=384, gpu="a100-80g")
        for recompute in ("none", "blocks")
    )
    assert again.flops == kept.flops
    # Nearly a whole forward pass, for four fifths of the activations.
    assert again.figures["step_seconds"] / kept.figures["step_seconds"] == pytest.approx(4 / 3, abs=0.04)
    assert again.figures["mfu_percent"] < kept.figures["mfu_percent"]
    assert again.memory["activations"] < 0.2 * kept.memory["activations"]


def test_a_batch_in_parts_pays_for_its_features_with_a_forward_pass_of_the_contrastive_branch() -> None:
    whole, parts = (plan_run(recipe(accumulation=accumulation), gpus=2, gpu="l40s") for accumulation in (1, 4))
    assert whole.seconds["features beforehand"] == 0 < parts.seconds["features beforehand"]
    contrastive = recipe(loss={"captioning": 0.0})
    forward = sum(plan_run(contrastive, gpus=2, gpu="l40s").flops.values())
    assert parts.seconds["features beforehand"] == pytest.approx(32 * forward / (0.5 * 362e12))
    assert parts.memory["gradients of features"] == 2 * 32 * 32 * 4
    captioning = plan_run(recipe(accumulation=4, loss={"contrastive": 0.0}), gpus=2, gpu="l40s")
    assert captioning.seconds["features beforehand"] == 0 and "gradients of features" not in captioning.memory


def test_a_cut_of_the_captions_is_what_texts_are_padded_to() -> None:
    cut = recipe(data={"train": "no such shards", "batch_size": 64, "captions": {"max_tokens": 8}})
    assert "8.0 tokens per text" in plan_run(cut, gpus=1, gpu="l40s").title
    with pytest.raises(ValueError, match=r"text_tokens is 9\.0; it must be from 2 to 8"):
        plan_run(cut, gpus=1, gpu="l40s", text_tokens=9.0)


def test_the_best_interval_loses_less_than_its_neighbours() -> None:
    failures = Failures(stall=1.0, writing=0.0, between=3600 * 50_000 / 384)
    best = failures.best_interval
    assert best / 60 == pytest.approx(16, abs=0.5)
    assert 100 * failures.lost_share(best) == pytest.approx(0.2, abs=0.01)
    assert failures.lost_share(best) < min(failures.lost_share(factor * best) for factor in (0.9, 1.1))
    many = replace(failures, between=3600 * 50_000 / 4096)
    assert many.best_interval / 60 == pytest.approx(5, abs=0.1)


def test_a_share_is_below_the_whole_and_counts_are_whole() -> None:
    plan = plan_run(recipe(size="tiny", steps=2000), gpus=2, gpu="rtx-4090")
    assert 0 < plan.figures["failure_loss_percent_at_best"] <= plan.figures["failure_loss_percent"] < 100
    assert plan.figures["best_steps_between_checkpoints"] % 1 == 0
    (line,) = (line for line in plan.table().splitlines() if line.startswith("batch per gpu"))
    assert line.split()[-1] == "32"


def test_the_next_checkpoint_waits_until_the_one_before_is_written() -> None:
    failures = Failures(stall=1.0, writing=600.0, between=10_000.0)
    assert failures.best_interval == 600
    for interval, lost in {600.0: 1 / 600 + (300 + 600) / 10_000, 200.0: 401 / 200 + (100 + 600) / 10_000}.items():
        assert failures.lost_share(interval) == pytest.approx(lost / (1 + lost))


def test_the_published_run_is_held_up_for_a_copy_and_not_for_the_writing() -> None:
    figures = plan_run(PUBLISHED, gpus=384, gpu="a100-40g", efficiency=0.156).figures
    parameters = 1e6 * figures["parameters_million"]
    assert PUBLISHED.parallel.kind == "ddp"
    assert figures["checkpoint_stall_seconds"] == pytest.approx(12 * parameters / 5e9)
    assert figures["checkpoint_writing_seconds"] == pytest.approx(figures["checkpoint_gigabytes"])
    assert figures["failure_loss_percent_at_best"] == pytest.approx(0.26, abs=0.01)
    out = plan_run(replace(PUBLISHED, parallel=ParallelConfig(kind="fsdp")), gpus=384, gpu="a100-40g").figures
    assert out["checkpoint_stall_seconds"] == pytest.approx(4 * parameters / 5e9, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "gpus", "message"),
    [
        ({}, 3, "data.batch_size 64 cannot be shared by 3 GPUs: set it to 63 or 66"),
        ({"accumulation": 4}, 32, "data.batch_size 64 cannot be shared by 32 GPUs with 4 parts each"),
        ({}, 32, "data.streams 16 cannot be shared by 32 GPUs: set it to 32"),
        (
            {"size": "coca_ViT-L-14", "data": {"train": "x", "batch_size": 1024}},
            2,
            "512 samples at a time do not fit into the memory of one l40s, 95 do: take 16 GPUs, or set "
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


def test_what_a_warning_advises_warns_of_nothing() -> None:
    changes = {"size": "coca_ViT-L-14", "data": {"train": "x", "batch_size": 90112, "streams": 256}}
    (warning,) = plan_run(recipe(**changes), gpus=256, gpu="a100-80g").warnings
    assert warning.endswith(
        'do: set parallel.recompute = "blocks", or take 512 GPUs and set data.streams = 512, or set accumulation = 2'
    )
    again = recipe(**changes, parallel={"recompute": "blocks"})
    parts = recipe(**changes, accumulation=2)
    more = recipe(**changes | {"data": changes["data"] | {"streams": 512}})
    for advised, gpus in ((again, 256), (more, 512), (parts, 256)):
        assert plan_run(advised, gpus=gpus, gpu="a100-80g").warnings == []


def test_a_run_that_fits_warns_of_nothing() -> None:
    assert plan_run(recipe(), gpus=16, gpu="l40s").warnings == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": "a100"}, "unknown GPU 'a100'; the GPUs are a100-40g"),
        ({"gpus": 0}, "gpus must be"),
        ({"gpus_per_machine": 0}, "gpus_per_machine must be an integer of at least 1"),
        ({"text_tokens": float("nan")}, "text_tokens is nan"),
        ({"efficiency": 1.5}, "efficiency is 1.5"),
        ({"text_tokens": 17.0}, "text_tokens is 17.0; it must be from 2 to 16"),
        ({"hours_between_failures": 0.0}, "hours_between_failures is 0.0; it must be a finite number above 0"),
        ({"hours_between_failures": float("inf")}, "hours_between_failures is inf"),
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
    assert caption_texts(first.data, 16) == TextLengths(mean=(5.0 + 16) / 2, longest=16)
    assert caption_texts(both.data, 16) == TextLengths(mean=(2 * 5 + 2 * 16 + 4 * 9) / 8, longest=16)
    assert caption_texts(PUBLISHED.data, 76) is None  # remote
    plan = plan_run(both, gpus=1, gpu="l40s")
    assert "9.8 tokens per text" in plan.title and len(plan.assumptions) == 1
    assert len(plan_run(recipe(), gpus=1, gpu="l40s").assumptions) == 2


def test_the_file_holds_the_figures_and_what_they_were_made_of(tmp_path: Path) -> None:
    plan = plan_run(recipe(), gpus=4, gpu="rtx-4090")
    plan.result("contracap plan x.toml").write(tmp_path / "plan.json")
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["figures"] == pytest.approx(dict(plan.figures))
    assert (written["samples"], written["seed"], written["reasons"]) == (200 * 64, None, {})
    assert sum(written["plan"]["memory"].values()) / 2**30 == pytest.approx(written["figures"]["memory_gib_per_gpu"])
    assert written["plan"]["warnings"] == []
