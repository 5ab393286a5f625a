"""The released architecture against open_clip 3.3.0, with the same random weights.

Names and shapes are compared for the released sizes, numbers for two layers of each tower at their widths,
with a small vocabulary.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from contracap.losses import captioning_loss, contrastive_loss
from contracap.model.coca import CoCa, CoCaConfig
from contracap.model.sizes import SIZES
from contracap.pretrained import with_cls_mask
from contracap.pretrained.open_clip_config import config_from_open_clip
from contracap.pretrained.open_clip_names import from_open_clip, to_open_clip
from contracap.tokenizer import text_lengths

from .tiny_models import relative

TEXT_LENGTHS = (2, 3, 20, 75, 76)


def released(name: str) -> CoCaConfig:
    """The size as the released weights mean it."""
    config = SIZES[name]
    return replace(config, text=replace(config.text, cls_mask="legacy"))


def build_peer(open_clip: ModuleType, config: Mapping[str, Any]) -> nn.Module:
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CLIP
    return kind(**{name: value for name, value in config.items() if name != "custom_text"}).eval()


@cache
def peer_and_ours(open_clip: ModuleType, name: str) -> tuple[nn.Module, CoCa]:
    torch.manual_seed(0)
    theirs = deepcopy(open_clip.get_model_config(name))
    for tower in theirs.keys() & {"vision_cfg", "text_cfg", "multimodal_cfg"}:
        theirs[tower] |= {"layers": 2} | ({} if tower == "vision_cfg" else {"vocab_size": 1024})
    theirs["vision_cfg"]["image_size"] = 4 * theirs["vision_cfg"]["patch_size"]
    peer, config = build_peer(open_clip, theirs), config_from_open_clip(theirs)
    if hasattr(peer, "text_decoder"):  # left uninitialised there
        nn.init.normal_(peer.text_decoder.text_projection, std=peer.text_decoder.text_projection.shape[0] ** -0.5)
    model = CoCa(config).eval()
    model.load_state_dict(from_open_clip(peer.state_dict(), config))
    return peer, model


def images(config: CoCaConfig, count: int) -> torch.Tensor:
    return torch.randn(count, 3, config.vision.image_size, config.vision.image_size)


def texts(config: CoCaConfig, lengths: tuple[int, ...] = TEXT_LENGTHS) -> torch.Tensor:
    """Texts of these many tokens, without an inner id 0."""
    ids = torch.zeros(len(lengths), config.text.context, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, 0] = config.text.end - 1
        ids[row, 1 : length - 1] = torch.randint(1, config.text.end - 1, (length - 2,))
        ids[row, length - 1] = config.text.end
    return ids


def assert_same_outputs(peer: nn.Module, model: CoCa, ids: torch.Tensor) -> None:
    pixels = images(model.config, len(ids))
    with torch.no_grad():
        theirs, ours = peer(pixels, ids), model(pixels, ids)
    assert relative(ours.image_features, theirs["image_features"]) < 1e-5
    assert relative(ours.text_features, theirs["text_features"]) < 1e-5
    assert ours.logits.shape == theirs["logits"].shape == (len(ids), 75, model.config.text.vocab_size)
    torch.testing.assert_close(ours.logit_scale, theirs["logit_scale"])
    for row, length in enumerate(TEXT_LENGTHS):
        assert relative(ours.logits[row, : length - 1], theirs["logits"][row, : length - 1]) < 1e-5


@pytest.mark.parametrize("name", ["coca_ViT-B-32", "coca_ViT-L-14"])
def test_coca_equals_open_clip(open_clip, name: str) -> None:
    peer, model = peer_and_ours(open_clip, name)
    assert_same_outputs(peer, model, texts(model.config))


def test_correct_cls_mask_equals_open_clip(open_clip, monkeypatch) -> None:
    peer, legacy = peer_and_ours(open_clip, "coca_ViT-B-32")
    model = CoCa(with_cls_mask(legacy.config, "correct")).eval()
    model.load_state_dict(legacy.state_dict())
    monkeypatch.setattr(peer.text, "correct_cls_mask", True)
    assert_same_outputs(peer, model, texts(model.config))


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14"])
def test_clip_equals_open_clip(open_clip, name: str) -> None:
    peer, model = peer_and_ours(open_clip, name)
    ids, pixels = texts(model.config), images(model.config, 5)
    with torch.no_grad():
        image_features, text_features, _ = peer(pixels, ids)
        ours = model(pixels, ids)
    assert relative(ours.image_features, nn.functional.normalize(image_features, dim=-1)) < 1e-5
    assert relative(ours.text_features, nn.functional.normalize(text_features, dim=-1)) < 1e-5
    assert ours.logits is None


def test_losses_and_gradients_equal_open_clip(open_clip) -> None:
    from open_clip.loss import CoCaLoss

    peer, model = peer_and_ours(open_clip, "coca_ViT-B-32")
    ids, pixels = texts(model.config), images(model.config, 5)
    theirs = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)(**peer(pixels, ids), output_dict=True)
    (theirs["contrastive_loss"] + theirs["caption_loss"]).backward()
    ours = model(pixels, ids)
    contrastive = contrastive_loss(ours.image_features, ours.text_features, logit_scale=ours.logit_scale)
    captioning = captioning_loss(
        ours.caption_states.states,
        model.decoder.vocabulary.weight,
        labels=ours.caption_states.labels,
        num_labels=sum(length - 1 for length in TEXT_LENGTHS),
    )
    (contrastive + 2 * captioning).backward()
    assert abs(contrastive.item() / theirs["contrastive_loss"].item() - 1) < 1e-6
    assert abs(2 * captioning.item() / theirs["caption_loss"].item() - 1) < 1e-6
    gradients = to_open_clip({name: tensor.grad for name, tensor in model.named_parameters()}, model.config)
    for name, parameter in peer.named_parameters():
        found, reference = gradients[name], parameter.grad
        if name.endswith("in_proj_bias"):  # its middle third, the key biases, has the true gradient zero
            found, reference = (torch.cat([grad.chunk(3)[0], grad.chunk(3)[2]]) for grad in (found, reference))
        assert relative(found, reference) < 1e-4, name


@pytest.mark.parametrize("name", ["coca_ViT-B-32", "coca_ViT-L-14", "ViT-L-14"])
def test_configuration_and_weights_of_a_released_size_are_those_of_open_clip(open_clip, name: str) -> None:
    theirs = open_clip.get_model_config(name)
    config = config_from_open_clip(theirs)
    assert config == (released(name) if config.decoder else SIZES[name])
    with torch.device("meta"):
        peer, model = build_peer(open_clip, theirs), CoCa(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in from_open_clip(peer.state_dict(), config).items()}


def test_id_0_inside_a_text_hides_nothing_from_the_decoder_unlike_in_open_clip_3_3_0(open_clip) -> None:
    """The mark "!" in a run of punctuation is id 0, which open_clip takes for padding.

    The code that trained the released weights (2023) hid the key after it from the class token alone; 3.3.0 hides it
    from every later token, so that its caption logits change from there on. Ours follow 2023.
    """
    peer, model = peer_and_ours(open_clip, "coca_ViT-B-32")
    theirs = open_clip.get_tokenizer("coca_ViT-B-32")(["wow!; what a goal"])[0].tolist()
    mark, end = theirs.index(0), theirs.index(49407)
    assert mark < end, "the mark stands inside the text"
    ids = texts(model.config, (end + 1,))
    ids[0, mark] = 0
    pixels = images(model.config, 1)
    with torch.no_grad():
        theirs, ours = peer(pixels, ids), model(pixels, ids)
        layout = model.text.layout(ids, text_lengths(ids, model.config.text.end))
        seen_by_class = model.text.mask(layout.fit(ids, padding=0), layout)[0, 0, -1]
    before, after = slice(0, mark + 1), slice(mark + 1, end)
    assert relative(ours.logits[0, before], theirs["logits"][0, before]) < 1e-5
    assert relative(ours.logits[0, after], theirs["logits"][0, after]) > 1e-3
    # The class token sees the same in both: the start, and every key whose predecessor is not id 0.
    assert seen_by_class.tolist() == [True, *(ids[0, : end + 2] != 0).tolist()]
