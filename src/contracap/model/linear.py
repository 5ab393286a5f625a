"""Linear layers, by the fastest product that a CPU has."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

# What torch.compile makes of linear layers on a CPU; a private part of torch. Where it is missing, torch's own choice
# serves, which is MKL: see docs/performance.md for how much slower.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_product: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default if HAS_ONEDNN else linear
ROWS = 8  # that weights are packed for; those serve any number


class Linear(nn.Linear):
    """`torch.nn.Linear`, whose products in fp32 without gradients on a CPU are oneDNN's.

    Attributes:
        packed: the weight once more, as oneDNN reads it fastest.
    """

    packed: Tensor | None = None

    def forward(self, input: Float[Tensor, "*rows in_features"]) -> Float[Tensor, "*rows out_features"]:
        if self.packed is not None:
            return _product(input, self.packed, self.bias, "none", [], "")
        if _is_plain(self.weight) and input.dtype == torch.float32 and _computes_as_it_is():
            return _product(input, self.weight, self.bias, "none", [], "")
        return linear(input, self.weight, self.bias)


class PackedWeights:
    """Second copies of the weights of linear layers, for many passes over few rows, which reading weights bounds."""

    def __init__(self, *parts: nn.Module):
        self._layers = [layer for part in parts for layer in part.modules() if isinstance(layer, Linear)]
        self._copies: dict[Linear, tuple[int, int, Tensor]] = {}

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the layers read the copies, where nothing needs gradients or a lower precision. They are made here, and
        made anew when a weight has changed, but by way of its `data`, which nothing tells of."""
        try:
            if _computes_as_it_is():
                for layer in self._layers:
                    layer.packed = self._copy(layer)
            yield
        finally:
            for layer in self._layers:
                layer.packed = None

    def _copy(self, layer: Linear) -> Tensor | None:
        weight = layer.weight
        if not _is_plain(weight) or weight.is_inference():  # whether those change cannot be told
            return None
        state = (weight.data_ptr(), weight._version)
        if layer not in self._copies or self._copies[layer][:2] != state:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
            self._copies[layer] = (*state, packed)
        return self._copies[layer][2]


def _is_plain(weight: Tensor) -> bool:
    """Whether oneDNN can read it: no weight of 8 bits, none that ranks share."""
    return HAS_ONEDNN and type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32


def _computes_as_it_is() -> bool:
    """Whether no gradient, no lower precision and no compiler has a say in the product."""
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
