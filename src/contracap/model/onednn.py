"""Linear layers that multiply by oneDNN, the fastest product on a CPU: put into a model from outside."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

# The operator that torch.compile uses for linear layers on a CPU; a private part of torch. If it is missing, torch uses
# MKL: docs/performance.md says how much slower it is.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_product: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default if HAS_ONEDNN else linear
ROWS = 8  # the number that weights are packed for; packed weights work with any number
SAMPLED = 64  # rows of a weight, at least, whose sum reveals a change


def use_onednn(model: nn.Module) -> None:
    """Let the linear layers of a model multiply with oneDNN in float32, without gradients, on a CPU. Otherwise they
    work as before."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = OneDNNLinear


class OneDNNLinear(nn.Linear):
    """`torch.nn.Linear` with oneDNN's product.

    Attributes:
        packed: a copy of the weight in the layout that oneDNN reads fastest.
    """

    packed: Tensor | None = None

    def forward(self, input: Float[Tensor, "*rows in_features"]) -> Float[Tensor, "*rows out_features"]:
        if self.packed is not None:
            return _product(input, self.packed, self.bias, "none", [], "")
        fits = input.shape[-1] == self.in_features and input.dtype == torch.float32  # else torch raises its error
        if fits and _is_plain(self.weight) and _computes_plainly():
            return _product(input, self.weight, self.bias, "none", [], "")
        return linear(input, self.weight, self.bias)


def use_bf16(layers: Iterable[nn.Module]) -> None:
    """Let the linear layers that `use_onednn` changed multiply in bf16, without gradients.

    They keep a packed copy of their weights, half as large. All other numbers stay float32.
    """
    for layer in layers:
        if type(layer) is OneDNNLinear:
            layer.__class__ = BFloat16Linear


class BFloat16Linear(OneDNNLinear):
    """`torch.nn.Linear` that multiplies in bf16 and adds up in float32.

    Attributes:
        packed: a copy of the weight in bf16, in the layout that oneDNN reads fastest. It is made when it is first
            needed, and again if the weight has changed, unless through `weight.data`.
    """

    packed_of: tuple[int, int] | None = None

    def forward(self, input: Float[Tensor, "*rows in_features"]) -> Float[Tensor, "*rows out_features"]:
        if not _computes_plainly():
            return linear(input, self.weight, self.bias)
        state = self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version
        if self.packed is None or state != self.packed_of:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach().bfloat16(), ROWS)
            self.packed_of = state
        output = _product(input.bfloat16(), self.packed, None, "none", [], "").float()
        return output if self.bias is None else output.add_(self.bias)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes to copy or pickle; torch can do neither with a packed weight."""
        return {name: value for name, value in vars(self).items() if name not in ("packed", "packed_of")}


class PackedWeights:
    """Packed copies of the weights of linear layers, for many passes over few rows, whose time is that of reading
    weights."""

    def __init__(self, layers: Iterable[OneDNNLinear]):
        self._layers = list(layers)
        self._copies: dict[OneDNNLinear, tuple[tuple[int, int, float], Tensor]] = {}

    @contextmanager
    def used(self) -> Iterator[None]:
        """A context in which the layers read packed copies, unless gradients or a lower precision are needed.

        Copies are made here, and again if a weight has changed.
        """
        try:
            if _computes_plainly():
                for layer in self._layers:
                    layer.packed = self._copy(layer)
            yield
        finally:
            for layer in self._layers:
                vars(layer).pop("packed", None)  # not set to None: that would recompile a compiled layer

    def _copy(self, layer: OneDNNLinear) -> Tensor | None:
        weight = layer.weight
        if not _is_plain(weight) or weight.is_inference():  # changes of inference tensors cannot be seen
            return None
        # A change through `weight.data`, as when adapters are merged, does not count as a version: some rows reveal it.
        some = weight.detach()[:: max(1, len(weight) // SAMPLED)]
        state = (weight.data_ptr(), weight._version, float(some.sum(dtype=torch.float64)))
        if layer not in self._copies or self._copies[layer][0] != state:
            self._copies[layer] = (state, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS))
        return self._copies[layer][1]


def _is_plain(weight: Tensor) -> bool:
    """Return whether oneDNN can read the weight: float32, on the CPU, not sharded."""
    return HAS_ONEDNN and type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32


def _computes_plainly() -> bool:
    """Return whether the product needs no gradient, no lower precision and no compiler."""
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
