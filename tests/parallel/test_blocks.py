import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from contracap.model.coca import CoCa
from contracap.model.sizes import SIZES
from contracap.parallel import ParallelConfig, ProcessGroup, parallelize


def gradients_and_kept(config: ParallelConfig) -> tuple[dict[str, Tensor], int]:
    """Gradients of a pass over some images and texts, and the numbers it kept for the backward pass."""
    torch.manual_seed(0)
    model = CoCa(SIZES["tiny"]).double()
    model.initialise()
    names = dict(model.named_parameters())
    shared = parallelize(model, config, ProcessGroup())
    ids = torch.tensor([[1022, 5, 6, 7, 1023], [1022, 8, 1023, 0, 0]])
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    weights = {parameter.data_ptr() for parameter in names.values()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = shared.model(torch.randn(2, 3, 32, 32).double(), ids)
    total = sum(count for place, count in kept.items() if place not in weights)
    (made.caption_states.states.square().sum() + (made.image_features * made.text_features).sum()).backward()
    assert dict(model.named_parameters()).keys() == names.keys()
    return {name: parameter.grad for name, parameter in names.items() if parameter.grad is not None}, total


def test_recomputed_blocks_keep_less_and_give_the_same_gradients() -> None:
    expected, kept = gradients_and_kept(ParallelConfig())
    found, fewer = gradients_and_kept(ParallelConfig(recompute="blocks"))
    assert found.keys() == expected.keys() and len(found) > 100
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    assert fewer < kept / 3


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses_and_gradients_and_stay_compiled_in_evaluation() -> None:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("compiled.py"))]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    for name in ("compiled", "both"):
        for numbers, expected in zip(found[name], found["plain"], strict=True):
            assert numbers == pytest.approx(expected, rel=1e-5)
