import pytest
import torch

from contracap.apps.plan.planner import plan_run
from contracap.config import build
from contracap.losses import LossConfig
from contracap.model.coca import CoCa
from contracap.model.sizes import find_size
from contracap.training.gpus import GPUS
from contracap.training.parts import freeze
from contracap.training.recipe import Recipe
from contracap.training.utilisation import DEVICES, ModelUtilisation, Peak, find_peak

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def model(size: str = "tiny") -> CoCa:
    with torch.device("meta"):
        return CoCa(find_size(size))


def utilisation(of: CoCa, **loss: float) -> ModelUtilisation:
    return ModelUtilisation(of, LossConfig(**loss), Peak(flops=1e12, source="test"))


def test_utilisation_is_what_the_plan_says_of_the_same_speed_also_with_a_frozen_tower() -> None:
    values = {"size": "coca_ViT-L-14", "steps": 2000, "out": "none", "data": {"train": "none", "batch_size": 1024}}
    of, plans = model("coca_ViT-L-14"), []
    for frozen in ((), ("vision",)):
        freeze(of, frozen)
        recipe = build(Recipe, values | {"precision": "bf16", "frozen": frozen})
        plan = plan_run(recipe, gpus=8, gpu="h100-80g", text_tokens=76.0)
        plans.append(plan)
        whole = ModelUtilisation(of, recipe.loss, Peak(flops=GPUS["h100-80g"].bf16, source="the table"))
        found = whole(plan.figures["samples_per_second_per_gpu"], 76.0)
        assert 100 * found == pytest.approx(plan.figures["mfu_percent"], rel=1e-9)
        assert 0.3 < found < 0.5
    whole, frozen = plans
    forward = frozen.flops["image encoder"]
    assert frozen.training_flops["image encoder"] == forward and whole.training_flops["image encoder"] == 3 * forward
    assert frozen.figures["step_seconds"] < 0.7 * whole.figures["step_seconds"]


def test_longer_texts_at_the_same_speed_use_more() -> None:
    of = utilisation(model())
    assert of(100.0, 12.0) > of(100.0, 6.0)
    assert of(200.0, 6.0) == pytest.approx(2 * of(100.0, 6.0))


def test_a_frozen_tower_is_spared_its_backward_pass() -> None:
    whole, frozen = model(), model()
    frozen.vision.requires_grad_(False)
    spared = utilisation(whole).flops(8.0) - utilisation(frozen).flops(8.0)
    alone = CoCa(find_size("tiny"))
    alone.requires_grad_(False)
    towers = utilisation(whole).flops(8.0) - utilisation(alone).flops(8.0)
    assert 0 < spared < towers < utilisation(whole).flops(8.0)
    half = model()
    half.vision.requires_grad_(False)
    next(half.vision.parameters()).requires_grad_(True)
    assert utilisation(half).flops(8.0) == utilisation(whole).flops(8.0)


def test_the_peak_is_the_tables_where_it_knows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert find_peak(CUDA, bf16=True, stated=None) == Peak(
        flops=989e12, source="dense bf16 of an NVIDIA H100 80GB HBM3"
    )
    exact = find_peak(CUDA, bf16=False, stated=None)
    assert exact is not None and exact.flops == 67e12
    assert set(DEVICES.values()) == set(GPUS)


def test_of_another_device_only_the_recipe_knows_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert find_peak(CUDA, bf16=True, stated=None) is None
    assert find_peak(CPU, bf16=True, stated=None) is None
    stated = find_peak(CPU, bf16=False, stated=1.5)
    assert stated is not None and stated.flops == 1.5e12
    assert "as a share of 1.5 TFLOP/s for each device (peak_tflops of the recipe)" in str(
        ModelUtilisation(model(), LossConfig(), stated)
    )
