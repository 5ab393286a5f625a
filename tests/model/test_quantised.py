import sys

import pytest
import torch
from torch import nn

import contracap
from contracap.generation import BeamSearch, Captioner
from contracap.model.quantised import int8


def test_each_weight_is_off_by_half_a_step_of_its_output_at_most() -> None:
    model, _ = contracap.load("tiny", weights="random", seed=0)
    exact, _ = contracap.load("tiny", weights="random", seed=0)
    int8(model)
    rounded = 0
    for (name, module), expected in zip(model.named_modules(), exact.modules(), strict=True):
        if not isinstance(module, nn.Linear) or not isinstance(expected, nn.Linear):
            continue
        identity = torch.eye(expected.in_features)
        bias = 0 if expected.bias is None else expected.bias
        seen, weight = (module(identity) - bias).T, expected.weight
        if name.startswith(("text.blocks", "decoder")) and not name.endswith(".key_value"):
            step = weight.abs().amax(dim=1, keepdim=True) / 127.5
            assert ((seen - weight).abs() <= 0.51 * step + 1e-6).all(), name
            assert not torch.equal(seen, weight), name
            rounded += 1
        else:
            torch.testing.assert_close(seen, weight)
    assert rounded == 2 * 4 + 2 * 4 + 2 * 4 + 1  # text blocks, the decoder's two kinds of blocks, vocabulary


def test_captions_come_with_log_probabilities_close_to_the_exact_ones() -> None:
    model, processor = contracap.load("tiny", weights="random", seed=0)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1022, 5, 17, 300, 1023]]).expand(3, -1)
    with torch.no_grad():
        expected = model(pixels, ids).logits
        image = model.encode_image(pixels)
        int8(model)
        logits = model(pixels, ids).logits
        assert torch.equal(model.encode_image(pixels), image)
    assert 0 < (logits - expected).abs().max() < 0.1
    assert len(Captioner(model, processor).generate(pixels, BeamSearch(3, 12, 5))) == 3


def test_without_torchao_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    model, _ = contracap.load("tiny", weights="random", seed=0)
    with pytest.raises(ImportError, match=r"^int8 weights need torchao: pip install 'contracap\[int8\]'$"):
        int8(model)
    model.decoder = None
    with pytest.raises(ValueError, match="no text decoder"):
        int8(model)
