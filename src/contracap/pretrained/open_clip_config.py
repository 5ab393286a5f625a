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


def config_from_open_clip(model: Mapping) -> CoCaConfig:
    """Return the sizes in the `model_cfg` of an `open_clip_config.json`.

    A class token has the legacy mask unless the configuration says otherwise.

    Raises: WeightsError: if it describes a model of another kind, or holds a value that is not understood.
    """
    try:
        vision, text, decoder = model["vision_cfg"], model["text_cfg"], model.get("multimodal_cfg")
        for section, known in ((model, MODEL), (vision, VISION), (text, TEXT), (decoder or {}, DECODER)):
            _require_understood(section, known)
        activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
        kinds = {True: "shared", False: "class_token", "cascade": "cascade", "parallel": "parallel"}
        has_class_token, width = bool(text.get("embed_cls", False)), vision["width"]
        values = {
            "embed_dim": model["embed_dim"],
            "vision": {
                "image_size": _side(vision["image_size"]),
                "patch_size": vision["patch_size"],
                "width": width,
                "layers": vision["layers"],
                "heads": width // vision.get("head_width", 64),
                "mlp_ratio": vision.get("mlp_ratio", 4.0),
                "activation": activation,
            },
            "pooler": {
                "kind": kinds[vision.get("attentional_pool", False)],
                "queries": vision.get("attn_pooler_queries", 256) if vision.get("attentional_pool") else 0,
                "heads": vision.get("attn_pooler_heads", 8),
                "adds_positions": vision.get("attn_pooler_positions", False),
            },
            "text": {
                "context": text["context_length"],
                "vocab_size": text["vocab_size"],
                "width": text["width"],
                "layers": text["layers"],
                "heads": text["heads"],
                "mlp_ratio": text.get("mlp_ratio", 4.0),
                "activation": activation,
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
        raise WeightsError(f"its configuration lacks or misnames {missing}: not a CoCa or CLIP of open_clip") from None
    except (TypeError, AttributeError, ArithmeticError, ConfigError) as error:
        raise WeightsError(f"its configuration is of another kind of model than a CoCa or CLIP: {error}") from None


def _require_understood(section: Mapping, known: Mapping) -> None:
    """Raises: WeightsError: naming the first key or value that could change a result in a way unknown here."""
    for name, value in section.items():
        if name not in known or (known[name] is not ANY and value not in known[name]):
            raise WeightsError(f"{name} = {value!r} in its configuration: only plain CoCa and CLIP models can be read")


def _side(size: int | Sequence[int]) -> int:
    """Return the side of a square, which may be given as height and width."""
    if isinstance(size, int):
        return size
    height, width = size
    if height != width:
        raise WeightsError(f"image_size = {size!r} in its configuration: only square images can be read")
    return height


def not_for_open_clip(config: CoCaConfig) -> list[str]:
    """Return the differences between a model of this configuration and what open_clip 3.3.0 can build."""
    problems = {
        "it refuses the key correct_cls_mask of its configuration, and without the key its class token attends to "
        "other tokens (train with model.text.cls_mask = 'legacy' to avoid it)": config.text.pool == "class_token"
        and config.text.cls_mask == "correct",
        f"its {config.pooler.kind} pooler is another one": config.pooler.kind in ("cascade", "parallel"),
        "its pooler adds no positions, and it refuses the key attn_pooler_positions": config.pooler.adds_positions,
        "its tokenizer has 49408 ids only": config.text.vocab_size != TextConfig.vocab_size,
        "its image and text encoder have the same activation": config.vision.activation != config.text.activation,
    }
    return [problem for problem, holds in problems.items() if holds]


def config_to_open_clip(config: CoCaConfig) -> dict:
    """Return the `model_cfg` of open_clip for a configuration."""
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
    if pooler.kind != "class_token":
        model["vision_cfg"] |= {
            "attentional_pool": True if pooler.kind == "shared" else pooler.kind,
            "attn_pooler_queries": pooler.queries,
            "attn_pooler_heads": pooler.heads,
            "output_tokens": True,
        }
        if pooler.adds_positions:
            model["vision_cfg"]["attn_pooler_positions"] = True
    if config.text.pool == "class_token":
        model["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
        if config.text.cls_mask == "correct":
            model["text_cfg"]["correct_cls_mask"] = True
        model["custom_text"] = True
    if config.decoder:
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
