import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from contracap.model import onednn
from contracap.model.onednn import HAS_ONEDNN, OneDNNLinear, PackedWeights, use_onednn

pytestmark = pytest.mark.skipif(not HAS_ONEDNN, reason="this torch has no oneDNN")


@pytest.fixture
def layer() -> OneDNNLinear:
    torch.manual_seed(0)
    return OneDNNLinear(48, 32)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """The weights that oneDNN has multiplied."""
    seen: list[torch.Tensor] = []
    product = onednn._product
    monkeypatch.setattr(onednn, "_product", lambda *args: seen.append(args[1]) or product(*args))
    yield seen


@pytest.mark.parametrize("rows", [(1,), (2, 5), (1, 1, 70)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_onednn_equal_torchs_own(rows: tuple[int, ...], bias: bool, products: list) -> None:
    layer, inputs = OneDNNLinear(48, 32, bias=bias), torch.randn(*rows, 48)
    with torch.no_grad():
        expected = nn.functional.linear(inputs, layer.weight, layer.bias)
        torch.testing.assert_close(layer(inputs), expected, rtol=1e-5, atol=1e-5)
        with PackedWeights([layer]).used():
            torch.testing.assert_close(layer(inputs), expected, rtol=1e-5, atol=1e-5)
    assert len(products) == 2 and products[0] is layer.weight and products[1] is not layer.weight


def test_gradients_autocast_double_and_other_kinds_of_weights_are_left_to_torch(
    layer: OneDNNLinear, products: list
) -> None:
    inputs = torch.randn(3, 48)
    layer(inputs).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16), PackedWeights([layer]).used():
            assert layer.packed is None and layer(inputs).dtype == torch.bfloat16
        assert copy.deepcopy(layer).double()(inputs.double()).dtype == torch.float64
        assert OneDNNLinear(48, 32, device="meta")(inputs.to("meta")).device.type == "meta"
    assert not products


def test_packed_weights_follow_a_weight_that_changes_and_are_not_left_behind(layer: OneDNNLinear) -> None:
    packed, inputs = PackedWeights([layer]), torch.randn(3, 48)
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: layer.weight.mul_(2),
            lambda: layer.weight.data.add_(torch.ones(32, 48)),
            lambda: layer.load_state_dict(OneDNNLinear(48, 32).state_dict()),
        ):
            change()
            expected = nn.functional.linear(inputs, layer.weight, layer.bias)
            with packed.used():
                torch.testing.assert_close(layer(inputs), expected, rtol=1e-5, atol=1e-5)
                kept = layer.packed
            with packed.used():
                assert layer.packed is kept, "nothing changed: it is not made anew"
    assert layer.packed is None and "packed" not in vars(layer) and set(layer.state_dict()) == {"weight", "bias"}


def test_packed_weights_end_with_an_error_too(layer: OneDNNLinear) -> None:
    with pytest.raises(RuntimeError), PackedWeights([layer]).used():
        raise RuntimeError
    assert layer.packed is None


def test_a_model_given_onednn_computes_the_same_and_keeps_its_weights() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 8, bias=False)), torch.randn(3, 48)
    with torch.no_grad():
        expected, state = model(inputs), model.state_dict()
        use_onednn(model)
        torch.testing.assert_close(model(inputs), expected, rtol=1e-5, atol=1e-5)
    assert [type(layer) for layer in model] == [OneDNNLinear, nn.GELU, OneDNNLinear]
    assert model.state_dict().keys() == state.keys()
