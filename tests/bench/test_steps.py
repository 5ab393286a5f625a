import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from contracap.bench import steps
from contracap.bench.steps import Ours, Pair, Peer, Setting, describe, describe_limit, make_batch
from contracap.bench.timing import UnequalError
from contracap.model.sizes import SIZES
from contracap.tokenizer import lengths
from contracap.training.optimizer import OptimizerConfig

TINY = SIZES["tiny"]
ALL = slice(0, None)


@pytest.fixture
def seen_by_compile(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What torch.compile is given, which is left as it is: the hook that checks shapes cannot be compiled."""
    seen: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda given: seen.append(given) or given)
    return seen


def test_both_sides_change_their_weights_alike(
    setting: Setting, small_peers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "OPTIMIZER", OptimizerConfig(learning_rate=1e-5, warmup_steps=0))
    batch = make_batch("tiny", setting, samples=4, full=False)
    ours = Ours("tiny", setting)
    peer = Peer("tiny", ours.model, setting).ways(batch)["eager"]
    found = []
    for _ in range(5):
        numbers, peer_numbers = ours.ways(batch)["eager"](ALL), peer(ALL)
        found.append(numbers["loss"])
        for name, value in peer_numbers.items():
            assert numbers[name] == pytest.approx(float(value), rel=1e-4), name
    assert found[-1] < found[0] - 1e-3


def test_a_benchmark_s_own_rate_moves_no_weight(setting: Setting) -> None:
    ours = Ours("tiny", setting)
    batch = make_batch("tiny", setting, samples=4, full=False)
    first, *_, last = (ours.ways(batch)["eager"](ALL) for _ in range(5))
    assert last == pytest.approx(first, rel=1e-6)
    assert ours.state.optimizer.state  # the update was done all the same


def test_eager_and_compiled_steps_share_weights_and_optimizer(
    setting: Setting, small_peers: None, seen_by_compile: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "OPTIMIZER", OptimizerConfig(learning_rate=1e-3, warmup_steps=0))
    batch = make_batch("tiny", setting, samples=4, full=False)
    plain = Ours("tiny", setting)
    expected = [plain.ways(batch)["eager"](ALL)["loss"] for _ in range(4)]
    ours = Ours("tiny", replace(setting, compiled=True))
    blocks = len(seen_by_compile)
    assert blocks == TINY.vision.layers + TINY.text.layers + 2 * TINY.decoder.layers
    ways = ours.ways(batch)
    assert [ways[way](ALL)["loss"] for way in ("eager", "compiled", "eager", "compiled")] == pytest.approx(expected)
    peer = Peer("tiny", ours.model, replace(setting, compiled=True))
    assert seen_by_compile[blocks:] == [peer.model]
    assert peer.ways(batch).keys() == ways.keys() == {"eager", "compiled"}


def test_the_peer_in_parts_has_the_gradients_of_the_batch(setting: Setting, small_peers: None) -> None:
    batch = make_batch("tiny", setting, samples=8, full=False)
    ours = Ours("tiny", setting)
    whole = Peer("tiny", ours.model, setting)
    expected = whole.ways(batch)["eager"](ALL)
    found = Peer("tiny", ours.model, setting).accumulated_step(batch, parts=4)()
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-5
    )


def test_a_step_forgets_gradients_of_one_that_memory_did_not_hold(setting: Setting, small_peers: None) -> None:
    batch = make_batch("tiny", setting, samples=4, full=False)
    ours = Ours("tiny", setting)
    peer = Peer("tiny", ours.model, setting)
    for side in (ours, peer):
        step: Callable[..., Any] = side.ways(batch)["eager"]
        expected = float(step(ALL)["gradient_norm"])
        for parameter in side.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        assert float(step(ALL)["gradient_norm"]) == pytest.approx(expected, rel=1e-5)


def test_models_are_kept_until_another_size_is_asked_for(setting: Setting) -> None:
    pair = setting.pair("tiny")
    assert setting.pair("tiny") is pair
    assert setting.pair("tiny-clip") is not pair
    assert setting.pair("tiny") is not pair


def test_pairs_that_differ_are_refused(setting: Setting, small_peers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair("tiny", setting)
    batch = make_batch("tiny", setting, samples=4, full=False)
    assert pair.checked_peer(batch)[1].startswith("tiny in fp32: contrastive_loss, gradient_norm, captioning_loss dif")
    with torch.no_grad():
        pair.ours.model.logit_scale.mul_(0.99)
    with pytest.raises(UnequalError, match="contrastive_loss is"):
        pair.checked_peer(batch)


def test_the_limit_is_the_rate_of_a_product(setting: Setting) -> None:
    model = Ours("tiny", setting).model
    batch = make_batch("tiny", setting, samples=4, full=False)
    assert describe_limit(model, batch, 100.0, setting) == ""
    setting.matmul = 2e9
    once, twice = (describe_limit(model, batch, speed, setting) for speed in (100.0, 200.0))
    shares = [float(text.split()[6].removesuffix("%")) for text in (once, twice)]
    assert shares[1] == pytest.approx(2 * shares[0], abs=0.11) and shares[0] > 1
    assert once.endswith("% of 0.002 TFLOP/s (a product of 2048 rows and columns here in fp32)")


@pytest.mark.slow
def test_compiled_steps_have_the_numbers_of_eager_ones(open_clip: ModuleType) -> None:
    child = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("compiled.py"))],
        check=True,
        capture_output=True,
        text=True,
    )
    assert child.stdout.splitlines() == ["ours eager", "ours compiled", "open_clip's eager", "open_clip's compiled"]


def test_texts_are_described_by_their_lengths(setting: Setting) -> None:
    batch = make_batch("tiny", setting, samples=20, full=False)
    counted = lengths(batch.ids, TINY.text.end).tolist()
    listed = ", ".join(f"{length}: {counted.count(length)}" for length in sorted(set(counted)))
    assert describe(batch) == f"texts by their tokens, {sum(counted) / 20:.1f} on average: {listed}"
    assert len(set(counted)) > 1
    full = make_batch("tiny", setting, samples=20, full=True)
    assert lengths(full.ids, TINY.text.end).tolist() == [16] * 20
    assert (full.ids[:, -1] == TINY.text.end).all()


def test_all_sizes_are_timed_on_the_same_texts_and_the_seed_draws_them(setting: Setting) -> None:
    batch, clip = (make_batch(size, setting, samples=8, full=False) for size in ("tiny", "tiny-clip"))
    assert torch.equal(batch.ids, clip.ids) and torch.equal(batch.pixels, clip.pixels)
    other = make_batch("tiny", replace(setting, seed=1), samples=8, full=False)
    assert not torch.equal(batch.ids, other.ids)
