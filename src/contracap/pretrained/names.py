"""Foreign weight names to ours and back: the layout of open_clip's CoCa and CLIP files, and the shape checks of
every load."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor

from contracap.model.coca import CoCa, CoCaConfig
from contracap.model.sizes import SIZES

POOLER_POSITIONS = ("pooler.pool.position", "pooler.caption_pool.position")
IMAGE_POSITIONS = ("vision.position", *POOLER_POSITIONS)  # a row for each image token, the class token's first
OPEN_CLIP_POSITIONS = "visual.positional_embedding"


Shapes = Mapping[str, torch.Size]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_MESSAGE = 2_000  # characters; names in a file may be of any length


class WeightsError(ValueError):
    """Weights that do not fit the model they were meant for. The message is one printable line, whatever the file says
    in it."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """What a file says, without what would act on a terminal, and not without end."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text[:MAX_MESSAGE])
    return shown if len(text) <= MAX_MESSAGE else f"{shown} ..."


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
        _same(OPEN_CLIP_POSITIONS, "vision.position"),
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
    require_fit(theirs, config, ours=False)
    empty, state = meta_state(config), {}
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


def require_fit(tensors: Mapping[str, Tensor], config: CoCaConfig, *, ours: bool) -> None:
    """Check the names, shapes and types of the tensors of a file, in our layout or in open_clip's.

    Raises: WeightsError: naming what does not fit.
    """
    if problems := differences(config, shapes_of(tensors), ours=ours):
        raise WeightsError("the weights do not fit: " + "; ".join(problems))
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise WeightsError(f"{name} is {tensor.dtype}: weights are float16, bfloat16, float32 or float64")


def differences(config: CoCaConfig, found: Shapes, *, ours: bool = False) -> list[str]:
    """How tensors of these shapes differ from those of a model; empty when all agree.

    Raises: WeightsError: if the model cannot be built.
    """
    layers = config.vision.layers + config.text.layers + (config.decoder.layers if config.decoder else 0)
    if layers > len(found):  # of each there are several; nothing is built for what a file cannot hold
        return [f"the configuration has {layers} layers, and there are {len(found)} tensors"]
    return key_differences(found, _shapes(config, ours))


@lru_cache(maxsize=64)
def _shapes(config: CoCaConfig, ours: bool) -> Shapes:
    state = meta_state(config)
    return shapes_of(state if ours else to_open_clip(state, config))


def require_same_keys(found: Shapes, expected: Shapes) -> None:
    """Raises: WeightsError: naming the keys (five of each kind) that are missing, extra or misshapen."""
    if problems := key_differences(found, expected):
        raise WeightsError("the weights do not fit: " + "; ".join(problems))


def key_differences(found: Shapes, expected: Shapes, shown: int = 5) -> list[str]:
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
    """The model's tensors without their memory: names and shapes.

    Raises: WeightsError: if there can be no tensors of these sizes.
    """
    try:
        with torch.device("meta"):
            return CoCa(config).state_dict()
    except (RuntimeError, OverflowError, TypeError) as error:  # torch's words on numbers beyond 64 bits
        raise WeightsError(f"its configuration has sizes that no model can have: {error}") from None


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


def match_sizes(found: Shapes, *, ours: bool = False) -> list[str]:
    """Return the sizes of the table that these names and shapes fit, at their own image size, patch size and context.

    There may be several, because shapes do not tell the activation.
    """
    return [
        name
        for name, config in SIZES.items()
        if not differences(at_own_lengths(config, found, ours=ours), found, ours=ours)
    ]


def at_own_lengths(config: CoCaConfig, found: Shapes, *, ours: bool = False) -> CoCaConfig:
    """Return the configuration at the patch size, image size and context that the tensors of a file are for."""
    text = "" if ours or config.text.pool == "end_token" else "text."
    patch = found.get("vision.patch_embedding.weight" if ours else "visual.conv1.weight") or (0, 0)
    patch_size = math.isqrt(patch[1] // 3) if ours else patch[-1]
    positions = found.get("text.position" if ours else f"{text}positional_embedding") or (0,)
    context = positions[0] - (config.text.pool == "class_token")
    if patch_size < 1 or context < 1:
        return config
    vision = replace(config.vision, patch_size=patch_size, image_size=patch_size)
    fitted = replace(config, vision=vision, text=replace(config.text, context=context))
    return at_own_grid(fitted, found, ours=ours)


def at_own_grid(config: CoCaConfig, found: Shapes, *, ours: bool = False) -> CoCaConfig:
    """The configuration at the image size that the positions of a file are for, if they are of a square of patches."""
    shape = found.get(IMAGE_POSITIONS[0] if ours else OPEN_CLIP_POSITIONS) or (0,)
    side = math.isqrt(max(0, shape[0] - 1))
    if not side or side**2 + 1 != shape[0]:
        return config
    return replace(config, vision=replace(config.vision, image_size=side * config.vision.patch_size))


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
