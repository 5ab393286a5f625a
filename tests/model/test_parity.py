"""The released architecture against open_clip 3.3.0, with the same random weights."""

from dataclasses import replace

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

TEXT_LENGTHS = (2, 3, 20, 75, 76)


def released(name: str) -> CoCaConfig:
    """The size as the released weights mean it."""
    config = SIZES[name]
    return replace(config, text=replace(config.text, cls_mask="legacy"))


def peer_and_ours(open_clip, name: str, *, correct: bool = False) -> tuple[nn.Module, CoCa]:
    torch.manual_seed(0)
    peer = open_clip.create_model(name).eval()
    if hasattr(peer, "text_decoder"):  # left uninitialised there
        nn.init.normal_(peer.text_decoder.text_projection, std=peer.text_decoder.text_projection.shape[0] ** -0.5)
    config = released(name)
    if correct:
        peer.text.correct_cls_mask = True
        config = with_cls_mask(SIZES[name], "correct")
    model = CoCa(config).eval()
    model.load_state_dict(from_open_clip(peer.state_dict(), config))
    return peer, model


@pytest.fixture(scope="module")
def b_32(open_clip) -> tuple[nn.Module, CoCa]:
    return peer_and_ours(open_clip, "coca_ViT-B-32")


def texts(config: CoCaConfig, lengths: tuple[int, ...] = TEXT_LENGTHS) -> torch.Tensor:
    """Texts of these many tokens, without an inner id 0."""
    ids = torch.zeros(len(lengths), config.text.context, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, 0] = config.text.end - 1
        ids[row, 1 : length - 1] = torch.randint(1, 49000, (length - 2,))
        ids[row, length - 1] = config.text.end
    return ids


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def assert_same_outputs(peer: nn.Module, model: CoCa, ids: torch.Tensor) -> None:
    pixels = torch.randn(len(ids), 3, 224, 224)
    with torch.no_grad():
        theirs, ours = peer(pixels, ids), model(pixels, ids)
    assert relative(ours.image_features, theirs["image_features"]) < 1e-5
    assert relative(ours.text_features, theirs["text_features"]) < 1e-5
    assert ours.logits.shape == theirs["logits"].shape == (len(ids), 75, 49408)
    torch.testing.assert_close(ours.logit_scale, theirs["logit_scale"])
    for row, length in enumerate(TEXT_LENGTHS):
        assert relative(ours.logits[row, : length - 1], theirs["logits"][row, : length - 1]) < 1e-5


def test_coca_b_32_equals_open_clip(b_32) -> None:
    peer, model = b_32
    assert_same_outputs(peer, model, texts(model.config))


@pytest.mark.slow
def test_coca_l_14_equals_open_clip(open_clip) -> None:
    peer, model = peer_and_ours(open_clip, "coca_ViT-L-14")
    assert_same_outputs(peer, model, texts(model.config))


def test_correct_cls_mask_equals_open_clip(open_clip) -> None:
    peer, model = peer_and_ours(open_clip, "coca_ViT-B-32", correct=True)
    assert_same_outputs(peer, model, texts(model.config))


@pytest.mark.parametrize("name", ["ViT-B-32", pytest.param("ViT-L-14", marks=pytest.mark.slow)])
def test_clip_equals_open_clip(open_clip, name: str) -> None:
    peer, model = peer_and_ours(open_clip, name)
    ids, pixels = texts(model.config), torch.randn(5, 3, 224, 224)
    with torch.no_grad():
        image_features, text_features, _ = peer(pixels, ids)
        ours = model(pixels, ids)
    assert relative(ours.image_features, nn.functional.normalize(image_features, dim=-1)) < 1e-5
    assert relative(ours.text_features, nn.functional.normalize(text_features, dim=-1)) < 1e-5
    assert ours.logits is None


def test_losses_and_gradients_equal_open_clip(b_32) -> None:
    from open_clip.loss import CoCaLoss

    peer, model = b_32  # neither has dropout
    ids, pixels = texts(model.config), torch.randn(5, 3, 224, 224)
    theirs = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)(**peer(pixels, ids), output_dict=True)
    (theirs["contrastive_loss"] + theirs["caption_loss"]).backward()
    ours = model(pixels, ids)
    contrastive = contrastive_loss(ours.image_features, ours.text_features, logit_scale=ours.logit_scale)
    captioning = captioning_loss(
        ours.caption_states.states,
        model.decoder.vocabulary.weight,
        labels=ours.caption_states.labels,
        tokens=sum(length - 1 for length in TEXT_LENGTHS),
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


@pytest.mark.parametrize("name", ["coca_ViT-B-32", "coca_ViT-L-14"])
def test_open_clip_configuration_is_ours(open_clip, name: str) -> None:
    assert config_from_open_clip(open_clip.get_model_config(name)) == released(name)


def test_id_0_inside_a_text_hides_nothing_from_the_decoder_unlike_in_open_clip_3_3_0(open_clip, b_32) -> None:
    """The mark "!" in a run of punctuation is id 0, which open_clip takes for padding.

    The code that trained the released weights (2023) hid the key after it from the class token alone; 3.3.0 hides it
    from every later token, so that its caption logits change from there on. Ours follow 2023.
    """
    peer, model = b_32
    ids = open_clip.get_tokenizer("coca_ViT-B-32")(["wow!; what a goal"])
    mark = ids[0].tolist().index(0)
    assert ids[0, mark + 1] != 0, "the mark stands inside the text"
    end = ids[0].tolist().index(49407)
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        theirs, ours = peer(pixels, ids), model(pixels, ids)
        layout = model.text.layout(ids, text_lengths(ids, model.config.text.end))
        seen_by_class = model.text.mask(layout.fit(ids, padding=0), layout)[0, 0, -1]
    before, after = slice(0, mark + 1), slice(mark + 1, end)
    assert relative(ours.logits[0, before], theirs["logits"][0, before]) < 1e-5
    assert relative(ours.logits[0, after], theirs["logits"][0, after]) > 1e-3
    # The class token sees the same in both: the start, and every key whose predecessor is not id 0.
    assert seen_by_class.tolist() == [True, *(ids[0, : end + 2] != 0).tolist()]
