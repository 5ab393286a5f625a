"""Names and shapes of tensors: those of a model, those of a file, and how they differ."""

from collections.abc import Mapping

import torch
from torch import Tensor

from contracap.model.coca import CoCa, CoCaConfig
from contracap.pretrained.errors import WeightsError

Shapes = Mapping[str, torch.Size]


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shape of each tensor."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def meta_state(config: CoCaConfig) -> dict[str, Tensor]:
    """Return the tensors of a model on the meta device: names and shapes without memory.

    Raises: WeightsError: if there can be no tensors of these sizes.
    """
    try:
        with torch.device("meta"):
            return CoCa(config).state_dict()
    except (RuntimeError, OverflowError, TypeError) as error:  # torch's errors for numbers beyond 64 bits
        raise WeightsError(f"its configuration has sizes that no model can have: {error}") from None


def require_same_keys(found: Shapes, expected: Shapes) -> None:
    """Raises: WeightsError: naming the keys (five of each kind) that are missing, extra or misshapen."""
    if problems := key_differences(found, expected):
        raise WeightsError("the weights do not fit: " + "; ".join(problems))


def key_differences(found: Shapes, expected: Shapes, shown: int = 5) -> list[str]:
    """Return one line for each kind of difference, with the first `shown` keys; none if all agree."""
    kinds = {
        "missing": [name for name in expected if name not in found],
        "extra": [name for name in found if name not in expected],
        "misshapen": [
            f"{name} is {list(found[name])}, should be {list(expected[name])}"
            for name in expected
            if name in found and tuple(found[name]) != tuple(expected[name])
        ],
    }
    return [
        f"{len(names)} {kind}: {', '.join(names[:shown])}"
        + (f" and {len(names) - shown} more" if len(names) > shown else "")
        for kind, names in kinds.items()
        if names
    ]
