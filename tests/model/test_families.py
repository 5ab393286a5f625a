"""Every family of plain CoCa and CLIP that open_clip 3.3.0 can build, at small widths, with the same random weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from contracap.model.coca import CoCa
from contracap.model.sizes import SIZES
from contracap.pretrained import load, read_weights
from contracap.pretrained.errors import WeightsError
from contracap.pretrained.fit import match_sizes
from contracap.pretrained.open_clip_config import config_from_open_clip, config_to_open_clip
from contracap.pretrained.open_clip_names import from_open_clip, to_open_clip
from contracap.pretrained.shapes import meta_state, shapes_of

from .tiny_models import relative

VISION = {"image_size": 32, "patch_size": 8, "width": 128, "layers": 2}
TEXT = {"context_length": 16, "vocab_size": 1024, "width": 64, "heads": 2, "layers": 2}
POOLER = {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2, "output_tokens": True}
COCA_TEXT = TEXT | {"embed_cls": True, "output_tokens": True}
CLIP = {"embed_dim": 64, "vision_cfg": VISION, "text_cfg": TEXT}
COCA = {
    "embed_dim": 64,
    "vision_cfg": VISION | POOLER,
    "text_cfg": COCA_TEXT,
    "multimodal_cfg": TEXT | {"attn_pooler_heads": 2},
    "custom_text": True,
}


def variant(config: dict[str, Any], *, vision: dict | None = None, text: dict | None = None, **rest: Any) -> dict:
    changed = config | {
        "vision_cfg": config["vision_cfg"] | (vision or {}),
        "text_cfg": config["text_cfg"] | (text or {}),
    }
    if "multimodal_cfg" in config:
        changed["multimodal_cfg"] = config["multimodal_cfg"] | (text or {})
    return changed | rest


FAMILIES = {
    "CLIP": CLIP,
    "CLIP of OpenAI": variant(CLIP, quick_gelu=True),
    "CLIP g: heads of width 88": variant(CLIP, vision={"width": 176, "head_width": 88, "mlp_ratio": 4.3637}),
    "CLIP bigG: heads of width 104": variant(CLIP, vision={"width": 208, "head_width": 104, "mlp_ratio": 4.9231}),
    "CLIP with a text module": variant(CLIP, custom_text=True),
    "CoCa": COCA,
    "CoCa without attentional pooling: coca_base": variant(
        COCA, embed_dim=48, vision={"attentional_pool": False, "width": 64, "head_width": 32}
    ),
    "CoCa with QuickGELU": variant(COCA, quick_gelu=True),
    "CoCa S and M: packed pooler": variant(COCA, vision={"width": 64, "head_width": 32}),
    "CoCa H: heads of width 80": variant(COCA, vision={"width": 160, "head_width": 80}),
    "CoCa at 336 pixels": variant(COCA, vision={"image_size": [48, 48]}),
    "CoCa with long texts": variant(COCA, text={"context_length": 40}),
}


def build_peer(open_clip: Any, config: dict) -> nn.Module:
    torch.manual_seed(0)
    kind = "CoCa" if "multimodal_cfg" in config else "CustomTextCLIP" if config.get("custom_text") else "CLIP"
    arguments = {name: value for name, value in config.items() if name != "custom_text"}
    peer = getattr(open_clip, kind)(**arguments, **({} if kind == "CoCa" else {"output_dict": True})).eval()
    for parameter in peer.parameters():  # open_clip leaves some uninitialised, and others zero
        if parameter.ndim:
            nn.init.normal_(parameter, std=0.05)
    return peer


@pytest.mark.parametrize("family", FAMILIES)
def test_features_logits_weights_and_configuration_equal_open_clips(open_clip, family: str) -> None:
    peer, config = build_peer(open_clip, FAMILIES[family]), config_from_open_clip(FAMILIES[family])
    state = {name: tensor for name, tensor in peer.state_dict().items() if not name.endswith("attn_mask")}
    if FAMILIES[family].get("custom_text") and config.decoder is None:
        state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    model = CoCa(config).eval()
    model.load_state_dict(from_open_clip(state, config))
    again = to_open_clip(model.state_dict(), config)
    assert again.keys() == state.keys() and all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert config_from_open_clip(config_to_open_clip(config)) == config

    ids = torch.zeros(3, config.text.context, dtype=torch.int64)
    for row, length in enumerate((2, 7, config.text.context)):
        ids[row, :length] = torch.randint(1, 1000, (length,))
        ids[row, 0], ids[row, length - 1] = config.text.end - 1, config.text.end
    pixels = torch.randn(3, 3, config.vision.image_size, config.vision.image_size)
    with torch.no_grad():
        ours, theirs = model(pixels, ids), peer(pixels, ids)
    assert relative(ours.image_features, theirs["image_features"]) < 1e-5
    assert relative(ours.text_features, theirs["text_features"]) < 1e-5
    if config.decoder:
        assert relative(ours.logits[1, :6], theirs["logits"][1, :6]) < 1e-5


@pytest.mark.parametrize(
    ("name", "patch_size", "image_size", "context"),
    [
        ("coca_ViT-S-32", 16, 224, 76),
        ("coca_ViT-L-14", 14, 336, 255),  # a context as of MobileCLIP2-CoCa
        ("ViT-bigG-14", 14, 224, 77),
    ],
)
def test_a_bare_file_is_recognised_at_its_own_patch_size_image_size_and_context(
    name: str, patch_size: int, image_size: int, context: int
) -> None:
    config = SIZES[name]
    vision = replace(config.vision, patch_size=patch_size, image_size=image_size)
    config = replace(config, vision=vision, text=replace(config.text, context=context))
    assert match_sizes(shapes_of(to_open_clip(meta_state(config), config))) == [name]


def test_a_bare_file_that_may_have_either_activation_must_be_told(tmp_path: Path, monkeypatch, open_clip) -> None:
    config = config_from_open_clip(CLIP)
    quick = config_from_open_clip(FAMILIES["CLIP of OpenAI"])
    monkeypatch.setitem(SIZES, "small", config)
    monkeypatch.setitem(SIZES, "small-quickgelu", quick)
    tensors = build_peer(open_clip, CLIP).state_dict()
    # Beside the weights, what other programs keep in the same file.
    masks = {"attn_mask": torch.zeros(16, 16), "context_length": torch.tensor(77), "logit_bias": torch.tensor(-10.0)}
    torch.save(
        {"state_dict": {f"module._orig_mod.{name}": each.half() for name, each in tensors.items()}}, tmp_path / "a.pt"
    )
    save_file({name: each.contiguous() for name, each in (tensors | masks).items()}, tmp_path / "b.safetensors")
    for file in ("a.pt", "b.safetensors"):
        with pytest.raises(WeightsError, match="fits small and small-quickgelu"):
            load(tmp_path / file)
        assert read_weights(tmp_path / file, size="small").model == config
        assert read_weights(tmp_path / file, size="small-quickgelu").model == quick


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("text_cfg", "pad_id", 1),
        ("text_cfg", "hf_tokenizer_name", "xlm-roberta-base"),
        ("text_cfg", "tokenizer_kwargs", {"strip_sep_token": True}),
        ("text_cfg", "proj_type", "none"),
        ("vision_cfg", "qk_norm", True),
        ("vision_cfg", "image_size", [32, 64]),
        (None, "init_logit_bias", -10.0),
        (None, "a_key_of_next_year", 1),
    ],
)
def test_what_could_change_a_result_and_is_not_understood_is_refused_by_name(part: str | None, key: str, value) -> None:
    config = variant(CLIP)
    (config[part] if part else config)[key] = value
    with pytest.raises(WeightsError, match=key):
        config_from_open_clip(config)
