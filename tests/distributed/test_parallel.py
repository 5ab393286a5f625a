import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contracap.losses import contrastive_loss
from contracap.parallel import (
    Agreement,
    ParallelConfig,
    ParallelError,
    ParallelModel,
    ProcessGroup,
    parallelize,
    start_process_group,
)

from .child import (
    CASES,
    DTYPES,
    KINDS,
    MAMMUT,
    PAIRS,
    SCALES,
    WIDE,
    backward,
    loss_and_gradients,
    pairs,
    tiny,
    update,
)

ROOT = Path(__file__).parents[2]
LOSS = {torch.float32: 1e-5, torch.float64: 1e-10}
GRADIENT = {torch.float32: 1e-4, torch.float64: 1e-10}
Found = list[dict[Any, Any]]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=lambda count: f"{count} ranks")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each of so many processes came to."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork on this system")
    out, count = tmp_path_factory.mktemp("ranks"), request.param
    command = [sys.executable, "-W", "error", "-m", "tests.distributed.child", out, str(count)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(count)]


def one_process(dtype: torch.dtype, equal: bool, scale: float) -> tuple[Tensor, ...]:
    return loss_and_gradients(*pairs(dtype, equal=equal), scale)


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_mean_loss_and_gradients_of_many_ranks_equal_one_process(found: Found) -> None:
    for dtype, equal, scale, chunk in CASES:
        losses, *features, scales = zip(*(rank[dtype, equal, scale, chunk] for rank in found), strict=True)
        loss, *expected, to_scale = one_process(dtype, equal, scale)
        close(torch.stack(losses).mean(), loss, LOSS[dtype])
        close(torch.stack(scales).mean(), to_scale, GRADIENT[dtype])
        for ours, theirs in zip(features, expected, strict=True):  # of the sum over ranks, not of the mean
            close(torch.cat(ours) / len(found), theirs, GRADIENT[dtype])


def test_no_tensor_of_the_loss_is_larger_than_local_rows_times_chunk_or_what_was_gathered(found: Found) -> None:
    rows, width, chunk = WIDE["rows"], WIDE["width"], WIDE["chunk"]
    for rank in found:
        assert rank["watch"][0] == max(2 * rows * chunk, 2 * rows * width * len(found))


def test_bytes_received_are_those_the_docstring_says(found: Found) -> None:
    rows, width, others = WIDE["rows"], WIDE["width"], len(found) - 1
    for rank in found:
        assert rank["watch"][1] == 4 * others * rows * (2 * width + 2)
        assert rank["watch"][2] == 4 * others * rows * 2 * width  # without gradients


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        close(ours[name], theirs[name], tolerance)


def test_updated_weights_of_a_model_spread_over_ranks_are_those_of_one_process(found: Found) -> None:
    expected = update("ddp")
    for kind in KINDS[len(found)]:
        ours = [rank[kind, "update"] for rank in found]
        close(ours[0]["loss"], expected["loss"], 1e-10)
        same(ours[0]["gradients"], expected["gradients"], 1e-10)
        close(ours[0]["norm"], expected["norm"], 1e-10)
        same(ours[0]["weights"], expected["weights"], 1e-8)  # Adam divides by gradients that may be nearly 0
        close(torch.cat([each["embedding"] for each in ours]), expected["embedding"], 1e-8)


def test_gradients_of_a_batch_in_parts_with_two_passes_over_one_stack_equal_one_process(found: Found) -> None:
    order = torch.arange(PAIRS).view(len(found), 2, -1).transpose(0, 1).flatten()  # a part holds rows of every rank
    expected = backward("ddp", torch.float64, parts=2, order=order, config=MAMMUT)[1]
    for kind in KINDS[len(found)]:
        close(found[0][kind, "parts"]["loss"], expected["loss"], 1e-10)
        same(found[0][kind, "parts"]["gradients"], expected["gradients"], 1e-10)


def test_parameters_shared_in_bf16_get_gradients_averaged_in_float32(found: Found) -> None:
    expected, ours = backward("ddp", torch.float32)[1], found[0]["bf16"]
    close(ours["loss"], expected["loss"], 0.01)
    for name, gradient in expected["gradients"].items():
        assert ours["gradients"][name].dtype == torch.float32
        assert (ours["gradients"][name] - gradient).norm() <= 0.05 * gradient.norm(), name


def test_every_rank_hears_the_others(found: Found) -> None:
    count = len(found)
    for rank in found:
        helpers = rank["helpers"]
        assert helpers["broadcast"] == "from 0"
        assert helpers["all_gather"] == [{"position": other} for other in range(count)]
        assert helpers["sum"].tolist() == [sum(range(count)), count]
        assert helpers["any"] == [True, False]
        assert helpers["mean"].item() == (count - 1) / 2


def test_what_one_rank_claims_is_agreed_on_a_step_later(found: Found) -> None:
    for rank in found:
        assert rank["agreement"] == [[False, False], [False, False], [True, False]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 3])
def test_loss_of_one_process_in_chunks_is_that_of_all_at_once(dtype: torch.dtype, chunk: int) -> None:
    for scale in SCALES:
        images, texts = pairs(dtype)
        for index, (ours, theirs) in enumerate(
            zip(
                loss_and_gradients(images, texts, scale, chunk=chunk),
                loss_and_gradients(images, texts, scale),
                strict=True,
            )
        ):
            close(ours, theirs, (GRADIENT if index else LOSS)[dtype])


def test_loss_in_chunks_needs_no_gradient_and_takes_one_side_frozen() -> None:
    images, texts = pairs(torch.float64)
    scale = torch.tensor(9.0, dtype=torch.float64)
    assert not contrastive_loss(images, texts, logit_scale=scale, chunk=3).requires_grad
    texts.requires_grad_()
    ours, theirs = (contrastive_loss(images, texts, logit_scale=scale, chunk=chunk) for chunk in (3, 8))
    close(torch.autograd.grad(ours, texts)[0], torch.autograd.grad(theirs, texts)[0], 1e-12)


def test_alone_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with start_process_group(torch.device("cpu")) as process_group:
        assert process_group == ProcessGroup()
        assert not torch.distributed.is_initialized()
        tokens = torch.tensor(7)
        assert process_group.sum(tokens) is process_group.mean(tokens) is process_group.broadcast(tokens) is tokens
        assert process_group.all_gather("position") == ["position"]
        assert process_group.any(True, False) == Agreement(process_group).ask(True, False) == [True, False]
        process_group.barrier()
        model = tiny(torch.float32)
        assert parallelize(model, ParallelConfig(kind="fsdp"), process_group) == ParallelModel(model)


@pytest.mark.parametrize("variables", [{}, {"RANK": "one", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}])
def test_ranks_that_torchrun_did_not_start_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for name, value in {"WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ParallelError, match=r"RANK is (not set|one): start the ranks with torchrun"),
        start_process_group(torch.device("cpu")),
    ):
        pass
