"""The arithmetic of one sample: how many rows it gives each part of the model, and what they cost.

A multiplication and its addition are two operations, and a backward pass takes twice the forward pass. Norms,
activations and softmax are not counted, as is usual; attention counts the whole square, also where it is causal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from contracap.losses import LossConfig
from contracap.model.coca import CoCa, CoCaConfig

TOWERS = {"image encoder": "vision", "text encoder": "text"}  # fed data alone: frozen as a whole, they go forward only
BACKWARD = 2  # forward passes that a backward pass takes: one product for the inputs, one for the weights


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Lengths of the captions, in tokens, start and end included.

    Attributes:
        mean: what linear layers compute, whose rows hold no fill.
        longest: of a batch; the grid that attention works on has so many columns.
    """

    mean: float
    longest: int


class Pool(NamedTuple):
    """Queries that attend to a memory once; `absorbed` as in `Tokens`."""

    queries: float
    memory: float
    memory_width: int
    absorbed: bool


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What one sample gives each part of the model in training; all in the mean, so these are no whole numbers.

    Attributes:
        image: tokens of the picture: those patches that are kept, and the class token.
        pools: what the pooler computes.
        memory: caption tokens that the decoder reads.
        encoder: rows of the text encoder.
        encoder_columns: likewise on attention's grid.
        decoder: rows of the text decoder, each with a label; 0 where there is no captioning loss.
        decoder_columns: likewise on attention's grid.
        absorbed: whether cross-attention leaves the memory as it is, and takes the products that would make keys and
            values of it into its queries and outputs.
        contrastive: whether there are embeddings to project to.
    """

    image: float
    pools: tuple[Pool, ...]
    memory: float
    encoder: float
    encoder_columns: float
    decoder: float
    decoder_columns: float
    absorbed: bool
    contrastive: bool


def tokens_of(config: CoCaConfig, loss: LossConfig, texts: Texts) -> Tokens:
    """The rows of a sample whose caption is of mean length. Source: model.text.TextEncoder.layout, for the text."""
    vision, text = config.vision, config.text
    captioning, contrastive = loss.captioning > 0, loss.contrastive > 0
    image = 1.0 + max(1, round(vision.patches * (1.0 - vision.patch_dropout)))
    decoder, decoder_columns = (texts.mean - 1, texts.longest - 1.0) if captioning else (0.0, 0.0)

    def encoder_rows(tokens: float) -> float:
        if not contrastive:
            return tokens - 1
        if text.pool == "end_token":
            return tokens
        return 1 + (min(tokens + 1, float(text.context)) if text.cls_mask == "legacy" else tokens)

    memory = float(config.pooler.queries - (config.pooler.kind == "shared")) if captioning else 0.0
    absorbed = False
    if config.decoder is not None and captioning:
        absorbed = _absorbs(config.decoder.heads, decoder_columns, text.width, memory, text.width)
    return Tokens(
        image=image,
        pools=tuple(_pools(config, image, captioning=captioning, contrastive=contrastive)),
        memory=memory,
        encoder=encoder_rows(texts.mean),
        encoder_columns=encoder_rows(float(texts.longest)),
        decoder=decoder,
        decoder_columns=decoder_columns,
        absorbed=absorbed,
        contrastive=contrastive,
    )


def _pools(config: CoCaConfig, image: float, *, captioning: bool, contrastive: bool) -> list[Pool]:
    kind, queries, width, embed = (
        config.pooler.kind,
        float(config.pooler.queries),
        config.vision.width,
        config.embed_dim,
    )

    def pool(queries: float, memory: float, memory_width: int, *, adds_positions: bool = False) -> Pool:
        absorbed = _absorbs(config.pooler.heads, queries, embed, memory, memory_width)
        return Pool(queries, memory, memory_width, absorbed and not adds_positions)

    if kind == "class_token":
        return []
    placed = config.pooler.adds_positions
    if kind == "shared":
        return [pool((queries - 1) * captioning + contrastive, image, width, adds_positions=placed)]
    caption = [pool(queries, image, width, adds_positions=placed)] if captioning or kind == "cascade" else []
    one = pool(1.0, queries, embed) if kind == "cascade" else pool(1.0, image, width)
    return caption + [one] * contrastive


def _absorbs(heads: int, queries: float, width: int, memory: float, memory_width: int) -> bool:
    """Source: model.attention.CrossAttention.absorbs."""
    costs = [
        _attention_flops(heads, queries, queries, width, memory, memory_width, absorbed=absorbed)
        for absorbed in (False, True)
    ]
    return costs[1] < costs[0]


def _attention_flops(
    heads: int, rows: float, columns: float, width: int, memory: float, memory_width: int, *, absorbed: bool
) -> float:
    """Of cross-attention what lies between its queries and its outputs: keys and values, then scores and sums.
    Absorbed, rows take the products in place of the memory, and each head reads all of its width."""
    if absorbed:
        return 4 * rows * width * memory_width + 4 * columns * heads * memory * memory_width
    return 4 * memory * memory_width * width + 4 * columns * memory * width


def forward_flops(config: CoCaConfig, tokens: Tokens) -> Mapping[str, float]:
    """Operations of one sample's forward pass, by part; the contrastive loss is left out, a few thousandths of it."""
    vision, text, embed = config.vision, config.text, config.embed_dim
    image = 2 * (tokens.image - 1) * 3 * vision.patch_size**2 * vision.width
    pooler = encoder = 0.0
    for pool in tokens.pools:
        asked, read = pool.queries, (pool.memory, pool.memory_width)
        pooler += 4 * asked * embed**2
        pooler += _attention_flops(config.pooler.heads, asked, asked, embed, *read, absorbed=pool.absorbed)
    if tokens.contrastive:
        pooled = {"shared": embed, "class_token": vision.width}.get(config.pooler.kind, 0)
        pooler += 2 * pooled * embed
        encoder += 2 * text.width * embed
    blocks = dict(block_flops(config, tokens))
    parts = {"image encoder": image + blocks.pop("image encoder"), "pooler": pooler}
    parts["text encoder"] = encoder + blocks.pop("text encoder")
    if config.decoder is None or not tokens.decoder:
        return parts
    layers, width = config.decoder.layers, text.width
    if not tokens.absorbed:  # before the blocks
        blocks["decoder keys and values"] = layers * 4 * tokens.memory * width**2
    return parts | blocks | {"vocabulary": 2 * tokens.decoder * width * text.vocab_size}


def block_flops(config: CoCaConfig, tokens: Tokens) -> Mapping[str, float]:
    """Likewise of the transformer blocks alone, which is what a backward pass computes again if it has to."""
    vision, text, decoder = config.vision, config.text, config.decoder
    hidden = int(vision.width * vision.mlp_ratio)
    image = vision.layers * _self_block(tokens.image, tokens.image, vision.width, hidden)
    hidden = int(text.width * text.mlp_ratio)
    encoder = text.layers * _self_block(tokens.encoder, tokens.encoder_columns, text.width, hidden)
    parts = {"image encoder": image, "text encoder": encoder}
    if decoder is None or not tokens.decoder:
        return parts
    width, layers, hidden = text.width, decoder.layers, int(text.width * decoder.mlp_ratio)
    memories = decoder.heads if tokens.absorbed else 1  # as wide as the text: one for each head, or all heads' one
    return parts | {
        "decoder self-attention": layers * _self_block(tokens.decoder, tokens.decoder_columns, width, hidden),
        "decoder queries": layers * 4 * tokens.decoder * width**2,
        "decoder keys and values": layers * 4 * tokens.decoder * width**2 * tokens.absorbed,
        "decoder scores": layers * 4 * tokens.decoder_columns * memories * tokens.memory * width,
        "decoder feed-forward": layers * 4 * tokens.decoder * width * hidden,
    }


def training_flops(model: CoCa, forward: Mapping[str, float]) -> Mapping[str, float]:
    """Operations of forward and backward pass by part, from those of the forward pass. A tower that is frozen as a
    whole is spared the backward pass."""
    frozen = {
        part
        for part, name in TOWERS.items()
        if not any(parameter.requires_grad for parameter in model.get_submodule(name).parameters())
    }
    return {part: (1 if part in frozen else 1 + BACKWARD) * flops for part, flops in forward.items()}


def _self_block(rows: float, columns: float, width: int, hidden: int) -> float:
    """Projections and feed-forward by rows, attention by the grid."""
    return rows * (8 * width**2 + 4 * width * hidden) + 4 * columns**2 * width
