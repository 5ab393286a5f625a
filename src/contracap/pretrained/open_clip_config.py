"""open_clip's model configurations: to ours and back."""

from collections.abc import Mapping
from dataclasses import asdict

from contracap.config import ConfigError, build
from contracap.model.coca import CoCaConfig
from contracap.model.text import TextConfig
from contracap.pretrained.errors import WeightsError


def config_from_open_clip(model: Mapping) -> CoCaConfig:
    """Return the configuration that the `model_cfg` of an `open_clip_config.json` describes.

    It means the legacy CLS mask unless it says otherwise.

    Raises: WeightsError: if it describes a model of another kind.
    """
    try:
        vision, text, decoder = model["vision_cfg"], model["text_cfg"], model.get("multimodal_cfg")
        _require_plain(model, vision, text)
        kinds = {True: "shared", False: "class_token", "cascade": "cascade", "parallel": "parallel"}
        has_class_token = bool(text.get("embed_cls", False))
        values = {
            "embed_dim": model["embed_dim"],
            "vision": {
                "image_size": vision["image_size"],
                "patch_size": vision["patch_size"],
                "width": vision["width"],
                "layers": vision["layers"],
                "heads": vision["width"] // vision.get("head_width", 64),
                "mlp_ratio": vision.get("mlp_ratio", 4.0),
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


def _require_plain(model: Mapping, vision: Mapping, text: Mapping) -> None:
    """Raises: WeightsError: for a setting that plain CoCa and CLIP models do not have."""
    for section, name, plain in (
        (model, "quick_gelu", (False,)),
        (model, "custom_text", (True, False)),
        (vision, "timm_model_name", (None,)),
        (vision, "ls_init_value", (None,)),
        (vision, "pool_type", ("tok",)),
        (vision, "final_ln_after_pool", (False,)),
        (vision, "no_ln_pre", (False,)),
        (vision, "pos_embed_type", ("learnable",)),
        (vision, "act_kwargs", (None, {})),
        (vision, "norm_kwargs", (None, {})),
        (text, "hf_model_name", (None,)),
        (text, "ls_init_value", (None,)),
        (text, "pool_type", ("argmax",)),
        (text, "no_causal_mask", (False,)),
        (text, "act_kwargs", (None, {})),
        (text, "norm_kwargs", (None, {})),
    ):
        if section.get(name, plain[0]) not in plain:
            raise WeightsError(
                f"{name} = {section[name]!r} in its configuration: only plain CoCa and CLIP models can be read"
            )


def not_for_open_clip(config: CoCaConfig) -> list[str]:
    """Return the differences between a model of this configuration and what open_clip 3.3.0 can build."""
    problems = {
        "it refuses the key correct_cls_mask of its configuration; without the key the class token sees one place "
        "else (train with model.text.cls_mask = 'legacy' to avoid it)": config.text.pool == "class_token"
        and config.text.cls_mask == "correct",
        f"its {config.pooler.kind} pooler is another one": config.pooler.kind in ("cascade", "parallel"),
        "its pooler adds no positions, and it refuses the key attn_pooler_positions": config.pooler.adds_positions,
        "its tokenizer has 49408 ids only": config.text.vocab_size != TextConfig.vocab_size,
    }
    return [problem for problem, holds in problems.items() if holds]


def config_to_open_clip(config: CoCaConfig) -> dict:
    """Return the `model_cfg` of open_clip for a configuration."""
    vision, text, pooler = asdict(config.vision), asdict(config.text), config.pooler
    if config.vision.width % config.vision.heads or config.text.width % config.text.heads:
        raise WeightsError("open_clip needs widths that its heads divide")
    model: dict = {
        "embed_dim": config.embed_dim,
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
