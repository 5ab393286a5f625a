"""open_clip's model configurations: to ours and back."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from contracap.config import ConfigError, build
from contracap.model.coca import CoCaConfig
from contracap.model.text import TextConfig
from contracap.pretrained.errors import WeightsError

ANY = object()  # a value that changes no result here
# Values of a configuration that are understood, the default first. What is not listed is refused by name.
MODEL = {
    "embed_dim": ANY,
    "vision_cfg": ANY,
    "text_cfg": ANY,
    "multimodal_cfg": ANY,
    "quick_gelu": (False, True),
    "custom_text": ANY,
    "output_dict": ANY,
    "cast_dtype": ANY,
    "init_logit_scale": ANY,
    "init_logit_bias": (None,),
    "nonscalar_logit_scale": (False,),
    "pad_id": (0,),
}
BLOCK = {
    "ls_init_value": (None,),
    "act_kwargs": (None, {}),
    "norm_kwargs": (None, {}),
    "block_type": (None, "default"),
    "qk_norm": (False,),
    "scaled_cosine_attn": (False,),
    "scale_heads": (False,),
    "scale_attn_inner": (False,),
    "scale_attn": (False,),
    "scale_fc": (False,),
    "final_ln_after_pool": (False,),
    "output_tokens": ANY,
}
VISION = BLOCK | {
    "image_size": ANY,
    "patch_size": ANY,
    "width": ANY,
    "layers": ANY,
    "head_width": ANY,
    "mlp_ratio": ANY,
    "patch_dropout": ANY,  # of their training
    "attentional_pool": (False, True, "cascade", "parallel"),
    "attn_pooler_queries": ANY,
    "attn_pooler_heads": ANY,
    "attn_pooler_positions": ANY,
    "no_ln_pre": (False,),
    "pos_embed_type": ("learnable",),
    "pool_type": ("tok",),
    "timm_model_name": (None, ""),
    "timm_model_pretrained": ANY,
    "timm_pool": ANY,
    "timm_proj": ANY,
    "timm_proj_bias": ANY,
    "timm_drop": ANY,
    "timm_drop_path": ANY,
}
TEXT = BLOCK | {
    "context_length": ANY,
    "vocab_size": ANY,
    "width": ANY,
    "heads": ANY,
    "layers": ANY,
    "mlp_ratio": ANY,
    "embed_cls": ANY,
    "correct_cls_mask": ANY,
    "pad_id": (0,),
    "eos_id": ANY,  # of another pool_type
    "no_causal_mask": (False,),
    "pool_type": ("argmax",),
    "proj_bias": (False,),
    "proj_type": ("linear",),
    "hf_tokenizer_name": (None, ""),
    "tokenizer_mode": (None,),
    "tokenizer_kwargs": (None, {}),
    "hf_model_name": (None, ""),
    "hf_model_pretrained": ANY,
    "hf_proj_type": ANY,
    "hf_pooler_type": ANY,
}
DECODER = TEXT | {"dim_head": ANY, "n_queries": ANY, "attn_pooler_heads": ANY}
MAMMUT_VISION = VISION | {
    "attentional_pool": (False,),
    "pool_type": ("avg_all", "avg"),
    "final_ln_after_pool": (True,),
}
MAMMUT_TEXT = DECODER | {
    "embed_cls": (False,),
    "correct_cls_mask": (None, False),
    "cross_attn_ratio": ANY,
    "has_mlp": (True, False),
    "does_full_decoding": (True,),
    "is_multimodal_decoder": ANY,
    "token_average_pool": ANY,
}
# open_clip 4.2 has the text side in another section, with other values. A linear projection is not read.
MAMMUT_TEXT_4_2 = MAMMUT_TEXT | {
    "pool_type": ("avg", "avg_all"),
    "use_pad_mask": (True, False),
    "proj_type": ("none",),
    "bos_id": ANY,
}


def config_from_open_clip(model: Mapping) -> CoCaConfig:
    """Return the sizes in the `model_cfg` of an `open_clip_config.json`.

    A class token has the legacy mask unless the configuration says otherwise.

    Raises: WeightsError: if it describes a model of another kind, or holds a value that is not understood.
    """
    try:
        if "cross_attn_ratio" in model.get("text_cfg", model.get("multimodal_cfg", {})):
            return build(CoCaConfig, _mammut_values(model))
        vision, text, decoder = model["vision_cfg"], model["text_cfg"], model.get("multimodal_cfg")
        for section, known in ((model, MODEL), (vision, VISION), (text, TEXT), (decoder or {}, DECODER)):
            _require_understood(section, known)
        activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
        has_class_token = bool(text.get("embed_cls", False))
        values = {
            "embed_dim": model["embed_dim"],
            "vision": _vision_values(vision, activation),
            "pooler": _pooler_values(vision),
            "text": _text_values(text, activation)
            | {
                "pool": "class_token" if has_class_token else "end_token",
                "cls_mask": "correct" if text.get("correct_cls_mask") or not has_class_token else "legacy",
            },
        }
        if decoder:
            values["decoder"] = {
                "layers": decoder["layers"],
                "heads": decoder["heads"],
                "mlp_ratio": decoder.get("mlp_ratio", 4.0),
            }
        return build(CoCaConfig, values)
    except KeyError as missing:
        raise WeightsError(
            f"its configuration lacks or misnames {missing}: not a CoCa, CLIP or MaMMUT of open_clip"
        ) from None
    except (TypeError, AttributeError, ArithmeticError, ConfigError) as error:
        raise WeightsError(
            f"its configuration is of another kind of model than a CoCa, CLIP or MaMMUT: {error}"
        ) from None


def _vision_values(vision: Mapping, activation: str) -> dict:
    return {
        "image_size": _side(vision["image_size"]),
        "patch_size": vision["patch_size"],
        "width": vision["width"],
        "layers": vision["layers"],
        "heads": vision["width"] // vision.get("head_width", 64),
        "mlp_ratio": vision.get("mlp_ratio", 4.0),
        "activation": activation,
    }


def _pooler_values(vision: Mapping) -> dict:
    kind = vision.get("attentional_pool", False)
    if not kind:
        return {"kind": "class_token", "queries": 0}
    return {
        "kind": "shared" if kind is True else kind,
        "queries": vision.get("attn_pooler_queries", 256),
        "heads": vision.get("attn_pooler_heads", 8),
        "adds_positions": vision.get("attn_pooler_positions", False),
    }


def _text_values(text: Mapping, activation: str) -> dict:
    sizes = {name: text[name] for name in ("vocab_size", "width", "layers", "heads")}
    return sizes | {
        "context": text["context_length"],
        "mlp_ratio": text.get("mlp_ratio", 4.0),
        "activation": activation,
    }


def _mammut_values(model: Mapping) -> dict:
    """Return our values for the configuration of a MaMMUT, of LAION's fork (`text_cfg`) or of open_clip 4.2
    (`multimodal_cfg`)."""
    of_fork = "text_cfg" in model
    vision, text = model["vision_cfg"], model["text_cfg" if of_fork else "multimodal_cfg"]
    for section, known in (
        (model, MODEL | {"multimodal_cfg": (None,)} if of_fork else MODEL),
        (vision, MAMMUT_VISION),
        (text, MAMMUT_TEXT if of_fork else MAMMUT_TEXT_4_2),
    ):
        _require_understood(section, known)
    required = {name: vision[name] for name in ("pool_type", "final_ln_after_pool")}
    with_padding = of_fork or text.get("pool_type", "avg") == "avg_all"
    if not of_fork and text.get("use_pad_mask", True) == with_padding:
        raise WeightsError(
            f"pool_type = {text.get('pool_type', 'avg')!r} with use_pad_mask = {with_padding} in its configuration: "
            "padding must count in the mean and in attention, or in neither"
        )
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    values = _text_values(text, activation)
    return {
        "embed_dim": model["embed_dim"],
        "vision": _vision_values(vision, activation),
        "pooler": {"kind": "mean" if required["pool_type"] == "avg_all" else "mean_of_patches", "queries": 0},
        "text": values | {"pool": "mean_with_padding" if with_padding else "mean"},
        "decoder": {name: values[name] for name in ("layers", "heads", "mlp_ratio")}
        | {
            "shares_blocks": True,
            "cross_every": text["cross_attn_ratio"],
            "feed_forward_before_cross": text.get("has_mlp", True),
        },
    }


def _require_understood(section: Mapping, known: Mapping) -> None:
    """Raises: WeightsError: naming the first key or value that could change a result in a way unknown here."""
    for name, value in section.items():
        if name not in known or (known[name] is not ANY and value not in known[name]):
            raise WeightsError(
                f"{name} = {value!r} in its configuration: only plain CoCa, CLIP and MaMMUT models can be read"
            )


def _side(size: int | Sequence[int]) -> int:
    """Return the side of a square, which may be given as height and width."""
    if isinstance(size, int):
        return size
    height, width = size
    if height != width:
        raise WeightsError(f"image_size = {size!r} in its configuration: only square images can be read")
    return height


def list_open_clip_problems(config: CoCaConfig) -> list[str]:
    """Return the properties of a model of this configuration that open_clip 3.3.0 cannot load."""
    if config.is_mammut:
        program = "open_clip 4.2" if config.text.pool == "mean" else "LAION's fork open_clip_mammut"
        return [f"a MaMMUT; {program} can"]
    problems = {
        "`correct_cls_mask` (to avoid it, train with model.text.cls_mask = 'legacy')": config.text.pool == "class_token"
        and config.text.cls_mask == "correct",
        f"a {config.pooler.kind} pooler": config.pooler.kind in ("cascade", "parallel"),
        "`attn_pooler_positions`": config.pooler.adds_positions,
        f"a vocabulary of other than {TextConfig.vocab_size} ids": config.text.vocab_size != TextConfig.vocab_size,
        "image and text encoders with different activations": config.vision.activation != config.text.activation,
    }
    return [problem for problem, holds in problems.items() if holds]


def config_to_open_clip(config: CoCaConfig) -> dict:
    """Return the `model_cfg` of open_clip for a configuration. A MaMMUT's is LAION's, or that of open_clip 4.2 if its
    mean leaves out the padding."""
    vision, text, pooler = asdict(config.vision), asdict(config.text), config.pooler
    if config.vision.width % config.vision.heads or config.text.width % config.text.heads:
        raise WeightsError("open_clip needs widths that its heads divide")
    model: dict = {
        "embed_dim": config.embed_dim,
        **({"quick_gelu": True} if config.vision.activation == "quick_gelu" else {}),
        "vision_cfg": {name: vision[name] for name in ("image_size", "layers", "width", "patch_size", "mlp_ratio")}
        | {"head_width": config.vision.width // config.vision.heads},
        "text_cfg": {"context_length": config.text.context}
        | {name: text[name] for name in ("vocab_size", "width", "heads", "layers", "mlp_ratio")},
    }
    if config.is_mammut:
        return _with_mammut_keys(model, config)
    if pooler.has_queries:
        model["vision_cfg"] |= {
            "attentional_pool": True if pooler.kind == "shared" else pooler.kind,
            "attn_pooler_queries": pooler.queries,
            "attn_pooler_heads": pooler.heads,
        }
        if pooler.adds_positions:
            model["vision_cfg"]["attn_pooler_positions"] = True
    if config.text.pool == "class_token":
        model["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
        if config.text.cls_mask == "correct":
            model["text_cfg"]["correct_cls_mask"] = True
        model["custom_text"] = True
    if config.decoder:
        model["vision_cfg"]["output_tokens"] = True
        model["multimodal_cfg"] = {
            "context_length": config.text.context,
            "vocab_size": config.text.vocab_size,
            "width": config.text.width,
            "heads": config.decoder.heads,
            "layers": config.decoder.layers,
            "mlp_ratio": config.decoder.mlp_ratio,
            "attn_pooler_heads": pooler.heads,
        }
    return model


def _with_mammut_keys(model: dict, config: CoCaConfig) -> dict:
    """Return a configuration of a MaMMUT, given the keys that all models have."""
    decoder, of_fork = config.decoder, config.text.pool == "mean_with_padding"
    assert decoder is not None
    model["vision_cfg"] |= {
        "pool_type": "avg_all" if config.pooler.kind == "mean" else "avg",
        "final_ln_after_pool": True,
        "output_tokens": True,
    }
    text = model.pop("text_cfg") | {"cross_attn_ratio": decoder.cross_every}
    if not decoder.feed_forward_before_cross:
        text["has_mlp"] = False
    if of_fork:
        return model | {"text_cfg": text | {"output_tokens": True, "does_full_decoding": True}, "custom_text": True}
    return model | {"multimodal_cfg": text}
