"""Linear layers that multiply by oneDNN, the fastest product on a CPU: put into a model from outside."""

from collections.abc import Callable, Iterable, Iterator
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
SAMPLED = 64  # rows of a weight, at least, by which a change is seen


def use_onednn(model: nn.Module) -> None:
    """Let the linear layers of a model multiply by oneDNN where that is possible: in float32, without gradients, on a
    CPU. Elsewhere they are the layers that they were."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = OneDNNLinear


class OneDNNLinear(nn.Linear):
    """`torch.nn.Linear` with oneDNN's product.

    Attributes:
        packed: the weight once more, as oneDNN reads it fastest.
    """

    packed: Tensor | None = None

    def forward(self, input: Float[Tensor, "*rows in_features"]) -> Float[Tensor, "*rows out_features"]:
        if self.packed is not None:
            return _product(input, self.packed, self.bias, "none", [], "")
        fits = input.shape[-1] == self.in_features and input.dtype == torch.float32  # else torch says what is wrong
        if fits and _is_plain(self.weight) and _computes_as_it_is():
            return _product(input, self.weight, self.bias, "none", [], "")
        return linear(input, self.weight, self.bias)


class PackedWeights:
    """Second copies of the weights of linear layers, for many passes over few rows, which reading weights bounds."""

    def __init__(self, layers: Iterable[OneDNNLinear]):
        self._layers = list(layers)
        self._copies: dict[OneDNNLinear, tuple[tuple[int, int, float], Tensor]] = {}

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the layers read the copies, where nothing needs gradients or a lower precision. They are made here, and
        made anew when a weight has changed."""
        try:
            if _computes_as_it_is():
                for layer in self._layers:
                    layer.packed = self._copy(layer)
            yield
        finally:
            for layer in self._layers:
                vars(layer).pop("packed", None)  # not set to None: a compiled layer would be compiled anew

    def _copy(self, layer: OneDNNLinear) -> Tensor | None:
        weight = layer.weight
        if not _is_plain(weight) or weight.is_inference():  # whether those change cannot be told
            return None
        # What is done by way of `weight.data`, as adapters are merged, has no version; some rows tell of it.
        some = weight.detach()[:: max(1, len(weight) // SAMPLED)]
        state = (weight.data_ptr(), weight._version, float(some.sum(dtype=torch.float64)))
        if layer not in self._copies or self._copies[layer][0] != state:
            self._copies[layer] = (state, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS))
        return self._copies[layer][1]


def _is_plain(weight: Tensor) -> bool:
    """Whether oneDNN can read it: no weight of 8 bits, none that ranks share."""
    return HAS_ONEDNN and type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32


def _computes_as_it_is() -> bool:
    """Whether no gradient, no lower precision and no compiler has a say in the product."""
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
