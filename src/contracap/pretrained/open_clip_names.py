"""Names of tensors in open_clip's files of CoCa, CLIP and MaMMUT: to ours and back."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from contracap.model.coca import CoCaConfig
from contracap.pretrained.shapes import meta_state

OPEN_CLIP_POSITIONS = "visual.positional_embedding"
LM_HEAD = "text.lm_head"  # of MaMMUT in open_clip 4.2
OF_TWO_POOLERS = "visual.attn_pool_contrastive.query"
PROJECTION = "visual.proj"


@dataclass(frozen=True)
class TensorNames:
    """Tensors of open_clip and of ours that hold the same numbers, when each side is stacked along dimension 0.

    Attributes:
        transposed: true for one tensor on each side, of which ours is the transpose.
        flattened: for one tensor on each side, of which ours has all dimensions after the first in one: their shape.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    transposed: bool = False
    flattened: tuple[int, ...] = ()


def name_table(config: CoCaConfig) -> list[TensorNames]:
    """Return the names of a model's tensors in open_clip 3.3.0; those of cascade and parallel poolers are of its 4.2,
    and those of MaMMUT are LAION's, or of 4.2 for a mean without padding.

    Positions of a pooler, which open_clip does not know, have a name of our own.

    Source: open_clip's state dicts; tests compare with the package.
    """
    text = "" if config.text.pool == "end_token" else "text."
    rows = [
        _same("logit_scale", "logit_scale"),
        _same("visual.class_embedding", "vision.class_token"),
        _same(OPEN_CLIP_POSITIONS, "vision.position"),
        TensorNames(
            ("visual.conv1.weight",),
            ("vision.patch_embedding.weight",),
            flattened=(config.vision.width, 3, config.vision.patch_size, config.vision.patch_size),
        ),
        *_norm("visual.ln_pre", "vision.norm_in"),
        *_self_blocks("visual.transformer.resblocks", "vision.blocks", config.vision.layers),
        *_pooler_rows(config),
        _same(f"{text}positional_embedding", "text.position"),
        _same(f"{text}token_embedding.weight", "text.token_embedding.weight"),
        *_norm(f"{text}ln_final", "text.norm_out"),
    ]
    if config.is_mammut:
        return rows + _mammut_rows(config)
    rows += [
        *_self_blocks(f"{text}transformer.resblocks", "text.blocks", config.text.layers),
        TensorNames((f"{text}text_projection",), ("text.projection.weight",), transposed=True),
    ]
    if config.text.pool == "class_token":
        rows.append(_same("text.cls_emb", "text.class_token"))
    if config.decoder is not None:
        rows += [
            *_self_blocks("text_decoder.resblocks", "decoder.self_blocks", config.decoder.layers),
            *_cross_blocks("text_decoder.cross_attn", config.decoder.cross_layers),
            *_norm("text_decoder.ln_final", "decoder.norm_out"),
            TensorNames(("text_decoder.text_projection",), ("decoder.vocabulary.weight",), transposed=True),
        ]
    return rows


def _mammut_rows(config: CoCaConfig) -> list[TensorNames]:
    """Return the names of a MaMMUT's blocks and matrices."""
    decoder = config.decoder
    assert decoder is not None
    without = set() if decoder.feed_forward_before_cross else set(range(0, decoder.layers, decoder.cross_every))
    return [
        *_self_blocks("text.resblocks", "text.blocks", decoder.layers, without_feed_forward=without),
        *_cross_blocks("text.cross_attn", decoder.cross_layers),
        TensorNames((vocabulary_name(config),), ("decoder.vocabulary.weight",), transposed=True),
        TensorNames(("map_viz2txt_kv",), ("pooler.caption_projection.weight",), transposed=True),
    ]


def vocabulary_name(config: CoCaConfig) -> str:
    """Return the name of a MaMMUT's vocabulary matrix. open_clip 4.2 renamed it when it took the padding out of the
    mean, so that each name goes with the defaults of its own program."""
    return LM_HEAD if config.text.pool == "mean" else "text.text_projection"


def from_open_clip(tensors: Mapping[str, Tensor], config: CoCaConfig) -> dict[str, Tensor]:
    """Return the tensors of an open_clip file, which must fit the model, under our names."""
    empty, state = meta_state(config), {}
    for row in name_table(config):
        if row.transposed:
            state[row.ours[0]] = tensors[row.theirs[0]].T.contiguous()
        elif row.flattened:
            state[row.ours[0]] = tensors[row.theirs[0]].flatten(1)
        else:
            state |= _restack(
                tensors, row.theirs, row.ours, [len(empty[name]) for name in row.ours if empty[name].ndim]
            )
    return {name: state[name] for name in empty}


def to_open_clip(state: Mapping[str, Tensor], config: CoCaConfig) -> dict[str, Tensor]:
    """Return our tensors under open_clip's names and in its shapes; `from_open_clip` gives them back bit-equal."""
    converted = {}
    for row in name_table(config):
        if row.transposed:
            converted[row.theirs[0]] = state[row.ours[0]].T.contiguous()
        elif row.flattened:
            converted[row.theirs[0]] = state[row.ours[0]].reshape(row.flattened)
        else:
            total = sum(len(state[name]) for name in row.ours if state[name].ndim)
            converted |= _restack(state, row.ours, row.theirs, [total // len(row.theirs)] * len(row.theirs))
    return converted


def _restack(
    tensors: Mapping[str, Tensor], source: tuple[str, ...], target: tuple[str, ...], target_rows: list[int]
) -> dict[str, Tensor]:
    """Stack the source tensors and split the stack into the target's; a single one stays as it is."""
    if len(source) == len(target) == 1:
        return {target[0]: tensors[source[0]]}
    parts = torch.cat([tensors[name] for name in source]).split(target_rows)
    return {name: part.clone() for name, part in zip(target, parts, strict=True)}


def _same(theirs: str, ours: str) -> TensorNames:
    return TensorNames((theirs,), (ours,))


def _norm(theirs: str, ours: str) -> list[TensorNames]:
    return [_same(f"{theirs}.{part}", f"{ours}.{part}") for part in ("weight", "bias")]


def _feed_forward(theirs: str, ours: str) -> list[TensorNames]:
    return [
        *_norm(f"{theirs}.ln_2", f"{ours}.feed_forward_norm"),
        *_norm(f"{theirs}.mlp.c_fc", f"{ours}.feed_forward.expand"),
        *_norm(f"{theirs}.mlp.c_proj", f"{ours}.feed_forward.contract"),
    ]


def _self_blocks(
    theirs: str, ours: str, layers: int, *, without_feed_forward: Collection[int] = ()
) -> list[TensorNames]:
    rows = []
    for index in range(layers):
        their, our = f"{theirs}.{index}", f"{ours}.{index}"
        rows += [
            *_norm(f"{their}.ln_1", f"{our}.attention_norm"),
            _same(f"{their}.attn.in_proj_weight", f"{our}.attention.query_key_value.weight"),
            _same(f"{their}.attn.in_proj_bias", f"{our}.attention.query_key_value.bias"),
            *_norm(f"{their}.attn.out_proj", f"{our}.attention.out"),
            *([] if index in without_feed_forward else _feed_forward(their, our)),
        ]
    return rows


def _cross_blocks(theirs: str, layers: int) -> list[TensorNames]:
    rows = []
    for index in range(layers):
        their, our = f"{theirs}.{index}", f"decoder.cross_blocks.{index}"
        rows += [
            *_norm(f"{their}.ln_1", f"{our}.attention_norm"),
            *_norm(f"{their}.ln_1_kv", f"{our}.memory_norm"),
            *_packed_cross_attention(f"{their}.attn", f"{our}.attention"),
            *_feed_forward(their, our),
        ]
    return rows


def _packed_cross_attention(theirs: str, ours: str) -> list[TensorNames]:
    return [
        TensorNames((f"{theirs}.in_proj_weight",), (f"{ours}.query.weight", f"{ours}.key_value.weight")),
        TensorNames((f"{theirs}.in_proj_bias",), (f"{ours}.query.bias", f"{ours}.key_value.bias")),
        *_norm(f"{theirs}.out_proj", f"{ours}.out"),
    ]


def _attentional_pool(theirs: str, ours: str, *, packed: bool, positions: bool) -> list[TensorNames]:
    attention = _packed_cross_attention(f"{theirs}.attn", f"{ours}.attention")
    if not packed:  # torch's attention keeps three matrices when the memory has another width than the queries
        attention[0:1] = [
            _same(f"{theirs}.attn.q_proj_weight", f"{ours}.attention.query.weight"),
            TensorNames(
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


def _pooler_rows(config: CoCaConfig) -> list[TensorNames]:
    same_width, positions = config.vision.width == config.embed_dim, config.pooler.adds_positions
    projection = TensorNames(("visual.proj",), ("pooler.projection.weight",), transposed=True)
    if not config.pooler.has_queries:
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
