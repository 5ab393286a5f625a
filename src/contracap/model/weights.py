"""Foreign weight names to ours and back: the layout of open_clip's CoCa and CLIP files, and the shape checks of
every load."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from contracap.model.coca import CoCa, CoCaConfig
from contracap.model.pooler import PoolerConfig
from contracap.model.sizes import SIZES
from contracap.model.text import DecoderConfig, TextConfig
from contracap.model.vision import VisionConfig

IMAGE_POSITIONS = ("vision.position", "pooler.pool.position", "pooler.caption_pool.position")  # a row for each patch


class WeightsError(ValueError):
    """Weights that do not fit the model they were meant for."""


@dataclass(frozen=True)
class Row:
    """Tensors of the foreign layout beside ours: stacked along dimension 0, both sides hold the same numbers.

    Attributes:
        transposed: one tensor on each side, ours the transpose of theirs.
        flattened: one tensor on each side, ours theirs with every dimension but the first made one; their shape.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    transposed: bool = False
    flattened: tuple[int, ...] = ()


def open_clip_rows(config: CoCaConfig) -> list[Row]:
    """How open_clip 3.3.0 names the tensors of a model; cascade and parallel poolers as its 4.2 line does; a pooler's
    positions, which it does not know, by a name of our own.

    Source: the key table in open_clip's own state dicts, checked by tests against the package.
    """
    text = "text." if config.text.pool == "class_token" else ""
    rows = [
        _same("logit_scale", "logit_scale"),
        _same("visual.class_embedding", "vision.class_token"),
        _same("visual.positional_embedding", "vision.position"),
        Row(
            ("visual.conv1.weight",),
            ("vision.patch_embedding.weight",),
            flattened=(config.vision.width, 3, config.vision.patch_size, config.vision.patch_size),
        ),
        *_norm("visual.ln_pre", "vision.norm_in"),
        *_self_blocks("visual.transformer.resblocks", "vision.blocks", config.vision.layers),
        *_pooler_rows(config),
        _same(f"{text}positional_embedding", "text.position"),
        _same(f"{text}token_embedding.weight", "text.token_embedding.weight"),
        *_self_blocks(f"{text}transformer.resblocks", "text.blocks", config.text.layers),
        *_norm(f"{text}ln_final", "text.norm_out"),
        Row((f"{text}text_projection",), ("text.projection.weight",), transposed=True),
    ]
    if config.text.pool == "class_token":
        rows.append(_same("text.cls_emb", "text.class_token"))
    if config.decoder is not None:
        layers = config.decoder.layers
        rows += _self_blocks("text_decoder.resblocks", "decoder.self_blocks", layers)
        for index in range(layers):
            theirs, ours = f"text_decoder.cross_attn.{index}", f"decoder.cross_blocks.{index}"
            rows += [
                *_norm(f"{theirs}.ln_1", f"{ours}.attention_norm"),
                *_norm(f"{theirs}.ln_1_kv", f"{ours}.memory_norm"),
                *_packed_cross_attention(f"{theirs}.attn", f"{ours}.attention"),
                *_feed_forward(theirs, ours),
            ]
        rows += _norm("text_decoder.ln_final", "decoder.norm_out")
        rows.append(Row(("text_decoder.text_projection",), ("decoder.vocabulary.weight",), transposed=True))
    return rows


def from_open_clip(tensors: Mapping[str, Tensor], config: CoCaConfig) -> dict[str, Tensor]:
    """Tensors of an open_clip file under our names.

    Raises: WeightsError: naming every key that is missing, extra or of another shape than `config` asks for.
    """
    theirs = dict(tensors)
    if "logit_scale" in theirs and theirs["logit_scale"].shape == (1,):
        theirs["logit_scale"] = theirs["logit_scale"].reshape(())
    empty = meta_state(config)
    require_same_keys(shapes_of(theirs), shapes_of(to_open_clip(empty, config)))
    state = {}
    for row in open_clip_rows(config):
        if row.transposed:
            state[row.ours[0]] = theirs[row.theirs[0]].T.contiguous()
        elif row.flattened:
            state[row.ours[0]] = theirs[row.theirs[0]].flatten(1)
        else:
            state |= _restacked(
                theirs, row.theirs, row.ours, [len(empty[name]) for name in row.ours if empty[name].ndim]
            )
    return {name: state[name] for name in empty}


def to_open_clip(state: Mapping[str, Tensor], config: CoCaConfig) -> dict[str, Tensor]:
    """Our tensors under open_clip's names and in its shapes; bit-equal after `from_open_clip`."""
    converted = {}
    for row in open_clip_rows(config):
        if row.transposed:
            converted[row.theirs[0]] = state[row.ours[0]].T.contiguous()
        elif row.flattened:
            converted[row.theirs[0]] = state[row.ours[0]].reshape(row.flattened)
        else:
            total = sum(len(state[name]) for name in row.ours if state[name].ndim)
            converted |= _restacked(state, row.ours, row.theirs, [total // len(row.theirs)] * len(row.theirs))
    return converted


def require_same_keys(found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> None:
    """Raises: WeightsError: naming the keys (five of each kind) that are missing, extra or misshapen."""
    if problems := key_differences(found, expected):
        raise WeightsError("the weights do not fit: " + "; ".join(problems))


def key_differences(found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], shown: int = 5) -> list[str]:
    """One text per kind of difference, with the first `shown` keys; empty when all agree."""
    kinds = {
        "missing": [name for name in expected if name not in found],
        "extra": [name for name in found if name not in expected],
        "misshapen": [
            f"{name} is {list(found[name])}, should be {list(expected[name])}"
            for name in expected
            if name in found and tuple(found[name]) != tuple(expected[name])
        ],
    }
    return [
        f"{len(names)} {kind}: {', '.join(names[:shown])}"
        + (f" and {len(names) - shown} more" if len(names) > shown else "")
        for kind, names in kinds.items()
        if names
    ]


def meta_state(config: CoCaConfig) -> dict[str, Tensor]:
    """The model's tensors without memory behind them: names and shapes."""
    with torch.device("meta"):
        return CoCa(config).state_dict()


def interpolate_positions(state: Mapping[str, Tensor], *, patches: int) -> dict[str, Tensor]:
    """The weights with the positions of every patch resized, bicubic over the grid, to `patches` in a square.

    The class token's position, which comes first, stays.
    """
    return {
        name: _interpolate(tensor, patches=patches) if name in IMAGE_POSITIONS else tensor
        for name, tensor in state.items()
    }


def _interpolate(position: Tensor, *, patches: int) -> Tensor:
    old, new = math.isqrt(len(position) - 1), math.isqrt(patches)
    if old == new:
        return position
    grid = rearrange(position[1:].float(), "(row column) width -> 1 width row column", row=old)
    grid = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([position[:1], rearrange(grid, "1 width row column -> (row column) width").to(position.dtype)])


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shape of each tensor."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def match_size(found: Mapping[str, torch.Size]) -> str | None:
    """The size of the table whose open_clip names and shapes are exactly these."""
    for name, config in SIZES.items():
        if not key_differences(found, shapes_of(to_open_clip(meta_state(config), config))):
            return name
    return None


def config_from_open_clip(model: Mapping) -> CoCaConfig:
    """Sizes from the `model_cfg` of an `open_clip_config.json`. Its files mean the legacy CLS mask unless they say
    otherwise.

    Raises: WeightsError: if it describes a model of another kind.
    """
    try:
        vision, text, decoder = model["vision_cfg"], model["text_cfg"], model.get("multimodal_cfg")
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
        kinds: dict[bool | str, Literal["shared", "cascade", "parallel", "class_token"]] = {
            True: "shared",
            False: "class_token",
            "cascade": "cascade",
            "parallel": "parallel",
        }
        has_class_token = bool(text.get("embed_cls", False))
        return CoCaConfig(
            embed_dim=model["embed_dim"],
            vision=VisionConfig(
                image_size=vision["image_size"],
                patch_size=vision["patch_size"],
                width=vision["width"],
                layers=vision["layers"],
                heads=vision["width"] // vision.get("head_width", 64),
                mlp_ratio=vision.get("mlp_ratio", 4.0),
            ),
            pooler=PoolerConfig(
                kind=kinds[vision.get("attentional_pool", False)],
                queries=vision.get("attn_pooler_queries", 256) if vision.get("attentional_pool") else 0,
                heads=vision.get("attn_pooler_heads", 8),
                adds_positions=vision.get("attn_pooler_positions", False),
            ),
            text=TextConfig(
                context=text["context_length"],
                vocab_size=text["vocab_size"],
                width=text["width"],
                layers=text["layers"],
                heads=text["heads"],
                mlp_ratio=text.get("mlp_ratio", 4.0),
                pool="class_token" if has_class_token else "end_token",
                cls_mask="correct" if text.get("correct_cls_mask") or not has_class_token else "legacy",
            ),
            decoder=DecoderConfig(
                layers=decoder["layers"], heads=decoder["heads"], mlp_ratio=decoder.get("mlp_ratio", 4.0)
            )
            if decoder
            else None,
        )
    except KeyError as missing:
        raise WeightsError(f"its configuration lacks or misnames {missing}: not a CoCa or CLIP of open_clip") from None
    except (TypeError, AttributeError) as error:
        raise WeightsError(f"its configuration is of another kind of model than a CoCa or CLIP: {error}") from None


def not_for_open_clip(config: CoCaConfig) -> list[str]:
    """What open_clip 3.3.0 cannot follow in a model of this configuration; one text each."""
    problems = {
        "it refuses correct_cls_mask, the class token's correct mask": config.text.pool == "class_token"
        and config.text.cls_mask == "correct",
        f"its {config.pooler.kind} pooler is another one": config.pooler.kind in ("cascade", "parallel"),
        "its pooler adds no positions": config.pooler.adds_positions,
        "its tokenizer has 49408 ids only": config.text.vocab_size != TextConfig.vocab_size,
    }
    return [problem for problem, holds in problems.items() if holds]


def config_to_open_clip(config: CoCaConfig) -> dict:
    """The `model_cfg` that says these sizes to open_clip."""
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


def _restacked(
    tensors: Mapping[str, Tensor], source: tuple[str, ...], target: tuple[str, ...], target_rows: list[int]
) -> dict[str, Tensor]:
    """Stack the source tensors and cut the stack into the target's; one to one, the tensor itself."""
    if len(source) == len(target) == 1:
        return {target[0]: tensors[source[0]]}
    parts = torch.cat([tensors[name] for name in source]).split(target_rows)
    return {name: part.clone() for name, part in zip(target, parts, strict=True)}


def _same(theirs: str, ours: str) -> Row:
    return Row((theirs,), (ours,))


def _norm(theirs: str, ours: str) -> list[Row]:
    return [_same(f"{theirs}.{part}", f"{ours}.{part}") for part in ("weight", "bias")]


def _feed_forward(theirs: str, ours: str) -> list[Row]:
    return [
        *_norm(f"{theirs}.ln_2", f"{ours}.feed_forward_norm"),
        *_norm(f"{theirs}.mlp.c_fc", f"{ours}.feed_forward.expand"),
        *_norm(f"{theirs}.mlp.c_proj", f"{ours}.feed_forward.contract"),
    ]


def _self_blocks(theirs: str, ours: str, layers: int) -> list[Row]:
    rows = []
    for index in range(layers):
        their, our = f"{theirs}.{index}", f"{ours}.{index}"
        rows += [
            *_norm(f"{their}.ln_1", f"{our}.attention_norm"),
            _same(f"{their}.attn.in_proj_weight", f"{our}.attention.query_key_value.weight"),
            _same(f"{their}.attn.in_proj_bias", f"{our}.attention.query_key_value.bias"),
            *_norm(f"{their}.attn.out_proj", f"{our}.attention.out"),
            *_feed_forward(their, our),
        ]
    return rows


def _packed_cross_attention(theirs: str, ours: str) -> list[Row]:
    return [
        Row((f"{theirs}.in_proj_weight",), (f"{ours}.query.weight", f"{ours}.key_value.weight")),
        Row((f"{theirs}.in_proj_bias",), (f"{ours}.query.bias", f"{ours}.key_value.bias")),
        *_norm(f"{theirs}.out_proj", f"{ours}.out"),
    ]


def _attentional_pool(theirs: str, ours: str, *, packed: bool, positions: bool) -> list[Row]:
    attention = _packed_cross_attention(f"{theirs}.attn", f"{ours}.attention")
    if not packed:  # torch's attention keeps three matrices when the memory has another width than the queries
        attention[0:1] = [
            _same(f"{theirs}.attn.q_proj_weight", f"{ours}.attention.query.weight"),
            Row(
                (f"{theirs}.attn.k_proj_weight", f"{theirs}.attn.v_proj_weight"),
                (f"{ours}.attention.key_value.weight",),
            ),
        ]
    return [
        _same(f"{theirs}.query", f"{ours}.queries"),
        *_norm(f"{theirs}.ln_q", f"{ours}.query_norm"),
        *_norm(f"{theirs}.ln_k", f"{ours}.memory_norm"),
        *([_same(f"{theirs}.positional_embedding", f"{ours}.position")] if positions else []),
        *attention,
    ]


def _pooler_rows(config: CoCaConfig) -> list[Row]:
    same_width, positions = config.vision.width == config.embed_dim, config.pooler.adds_positions
    projection = Row(("visual.proj",), ("pooler.projection.weight",), transposed=True)
    if config.pooler.kind == "class_token":
        return [*_norm("visual.ln_post", "pooler.norm_out"), projection]
    if config.pooler.kind == "shared":
        pool = _attentional_pool("visual.attn_pool", "pooler.pool", packed=same_width, positions=positions)
        return [*pool, *_norm("visual.ln_post", "pooler.norm_out"), projection]
    packed = same_width or config.pooler.kind == "cascade"
    return [
        *_norm("visual.ln_post", "pooler.norm_in"),
        *_attentional_pool("visual.attn_pool", "pooler.caption_pool", packed=same_width, positions=positions),
        *_attentional_pool("visual.attn_pool_contrastive", "pooler.contrastive_pool", packed=packed, positions=False),
    ]
