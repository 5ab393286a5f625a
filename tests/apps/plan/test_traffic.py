import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from contracap.apps.plan.parameters import planned_model, shares_of
from contracap.apps.plan.traffic import Collective, bytes_by_kind, collectives_of
from contracap.training.recipe import Recipe

from .step_on_ranks import CASES, FAKE, MAX_REAL, ROWS, recipe_of


def planned(recipe: Recipe, count: int, *, per_machine: int = 8) -> list[Collective]:
    shares = shares_of(planned_model(recipe), recipe.parallel.kind, gpus=count, per_machine=per_machine)
    return collectives_of(recipe, shares, rows=float(ROWS), product=2 if recipe.precision == "bf16" else 4)


# What depends on how many machines there are.
SHARED = [name for name in CASES if name.startswith("hsdp")]


@pytest.mark.parametrize(
    ("count", "names"),
    [
        (2, ["ddp", "fsdp in parts", "fsdp mammut captioning"]),
        pytest.param(4, list(CASES), marks=pytest.mark.slow),
        pytest.param(FAKE, SHARED, marks=pytest.mark.slow),
    ],
    ids=["2 ranks", "4 ranks", "384 ranks"],
)
def test_ranks_tell_each_other_exactly_the_planned_bytes_and_hold_the_planned_shares(
    count: int, names: list[str], tmp_path: Path
) -> None:
    if count <= MAX_REAL and "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork on this system")
    command = [sys.executable, "-W", "error", "-m", "tests.apps.plan.step_on_ranks", str(tmp_path), str(count), *names]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    written = sorted(tmp_path.glob("*.pt"))
    assert len(written) == (count if count <= MAX_REAL else 1)
    for rank, heard in enumerate(map(torch.load, written)):
        assert list(heard) == names
        for name, (payloads, held, trained) in heard.items():
            recipe = recipe_of(count, **CASES[name])
            per_machine = count // 2 if count <= MAX_REAL else 8
            made = bytes_by_kind(planned(recipe, count, per_machine=per_machine))
            assert {kind: number for kind, number in made.items() if number} == payloads, name
            shares = shares_of(planned_model(recipe), recipe.parallel.kind, gpus=count, per_machine=per_machine)
            if rank == 0:  # the last ranks may hold less, the first has whole shares
                assert (held, trained) == (shares.held, shares.trained), name


@pytest.mark.parametrize(("kind", "sent"), [("all_gather", 30.0), ("reduce_scatter", 30.0), ("all_reduce", 60.0)])
def test_four_ranks_send_three_quarters_of_the_payload_once_or_twice(kind: str, sent: float) -> None:
    assert Collective(kind=kind, purpose="gradients", payload=40.0, ranks=4, local=True).sent == sent


def test_a_gpu_alone_tells_nobody_anything() -> None:
    for kind in ("ddp", "fsdp", "hsdp"):
        assert not planned(recipe_of(1, parallel={"kind": kind}), 1)


def test_shares_stay_within_a_machine_and_copies_go_between() -> None:
    made = planned(recipe_of(64, parallel={"kind": "hsdp"}), 64)
    assert {(each.purpose, each.ranks, each.local) for each in made} == {
        ("parameters, forward", 8, True),
        ("parameters, backward", 8, True),
        ("gradients", 8, True),
        ("gradients", 8, False),
        ("gradients", 64, False),  # of the logit scale
        ("features", 64, False),
        ("numbers", 64, False),
        ("numbers", 8, True),
    }
    assert all(each.local for each in planned(recipe_of(8, parallel={"kind": "fsdp"}), 8))
    assert not any(each.local for each in planned(recipe_of(16, parallel={"kind": "fsdp"}), 16))


def test_the_features_of_a_batch_in_parts_travel_once_and_its_contrastive_branch_is_fetched_once_more() -> None:
    whole, parts = (planned(recipe_of(16, parallel={"kind": "fsdp"}, accumulation=number), 16) for number in (1, 2))

    def payload(made: list[Collective], purpose: str) -> float:
        return sum(each.payload for each in made if each.purpose == purpose)

    for purpose in ("features", "numbers"):
        assert payload(parts, purpose) == payload(whole, purpose)
    assert payload(parts, "gradients") == payload(whole, "gradients") + 4  # of the logit scale, once more
    recipe = recipe_of(16, parallel={"kind": "fsdp"})
    shares = shares_of(planned_model(recipe), "fsdp", gpus=16, per_machine=8)
    beforehand = 4 * (2 * sum(unit.whole for unit in shares.blocks if not unit.decoder) + shares.root.whole)
    assert payload(parts, "parameters, forward") == 2 * payload(whole, "parameters, forward") + beforehand
    assert payload(parts, "parameters, backward") == 2 * payload(whole, "parameters, backward")


def test_machines_of_different_sizes_cannot_be_planned() -> None:
    with pytest.raises(ValueError, match="gpus is 12, but hsdp needs whole machines of 8"):
        planned(recipe_of(12, parallel={"kind": "hsdp"}), 12)
