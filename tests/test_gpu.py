"""The same numbers on a GPU as on the CPU. The slow twins on the CPU prove the tests themselves."""

import copy
from pathlib import Path

import pytest
import torch

import contracap
from contracap.config import build
from contracap.generation import BeamSearch, Captioner, Greedy
from contracap.model.coca import CoCa
from contracap.processor import Processor
from contracap.training import loop
from contracap.training.recipe import Recipe
from contracap.training.recorder import read_metrics
from contracap.training.trainer import train

TEXTS = ["a dog", "two red circles above a blue star", "snow"]
LOSSES = ("captioning_loss", "contrastive_loss", "gradient_norm")


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model_and_processor(varied_weights: Path) -> tuple[CoCa, Processor]:
    """A model that writes different things about different images, on the CPU."""
    return contracap.load(str(varied_weights), device="cpu", precision="fp32")


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_features_and_logits_are_those_of_the_cpu(model_and_processor, pixels: torch.Tensor, device: str) -> None:
    model, processor = model_and_processor
    ids = processor.texts(TEXTS)
    with torch.no_grad():
        expected = model(pixels[:3], ids)
        found = copy.deepcopy(model).to(device)(pixels[:3].to(device), ids.to(device))
    torch.testing.assert_close(found.image_features.cpu(), expected.image_features, rtol=1e-3, atol=1e-4)  # TF32
    torch.testing.assert_close(found.text_features.cpu(), expected.text_features, rtol=1e-4, atol=1e-5)
    for row, length in enumerate((ids != 0).sum(dim=1)):
        logits = (each.logits[row, : length - 1].cpu() for each in (found, expected))
        torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def test_auto_is_bf16_on_a_gpu_and_near_fp32(varied_weights: Path, pixels: torch.Tensor, device: str) -> None:
    exact, _ = contracap.load(str(varied_weights), device="cpu", precision="fp32")
    model, _ = contracap.load(str(varied_weights), device=device)
    assert model.precision == ("fp32" if device == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16")
    with torch.no_grad():
        cosines = (model.encode_image(pixels.to(device)).cpu().float() * exact.encode_image(pixels)).sum(dim=1)
    assert cosines.min() > 0.999


@pytest.mark.parametrize("strategy", [BeamSearch(3, max_tokens=12), Greedy(max_tokens=12)], ids=["beam", "greedy"])
# torch.compile cannot trace the checks of shapes that the tests run with here; `python -m benchmarks.gpu` runs without.
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["eager", "compiled"])
def test_captions_are_those_of_the_cpu(
    model_and_processor, pixels: torch.Tensor, device: str, strategy, compiled: bool
) -> None:
    model, processor = model_and_processor
    expected = Captioner(copy.deepcopy(model), processor).generate(pixels, strategy)
    captioner = Captioner(model.to(device), processor, compiled=compiled)
    for _ in range(2):  # the second time by a CUDA graph that was recorded
        found = captioner.generate(pixels, strategy)
        assert [each.token_ids for each in found] == [each.token_ids for each in expected]


def test_resumed_run_has_the_losses_of_an_uninterrupted_one(
    recipe_values: dict, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = recipe_values | {"device": device, "precision": "fp32", "resume": True}
    step, calls = loop.train_step, iter(range(100))

    def stopped(*arguments):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return step(*arguments)

    train(build(Recipe, values | {"out": str(tmp_path / "whole")}))
    monkeypatch.setattr(loop, "train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(build(Recipe, values | {"out": str(tmp_path / "parts")}))
    train(build(Recipe, values | {"out": str(tmp_path / "parts")}))
    whole, parts = (
        [record[name] for record in read_metrics(tmp_path / out) if "loss" in record for name in LOSSES]
        for out in ("whole", "parts")
    )
    assert len(whole) == 8 * len(LOSSES) and parts == pytest.approx(whole, rel=1e-4)
