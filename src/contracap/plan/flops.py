"""The arithmetic of one sample: how many rows it gives each part of the model, and what they cost.

A multiplication and its addition are two operations, and a backward pass takes twice the forward pass. Norms,
activations and softmax are not counted, as is usual; attention counts the whole square, also where it is causal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from contracap.losses import LossConfig
from contracap.model.coca import CoCaConfig

CrossAttentionKernel = Literal["auto", "projected", "absorbed"]
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
    """Queries that attend to a memory once."""

    queries: float
    memory: float
    memory_width: int


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


def tokens_of(
    config: CoCaConfig, loss: LossConfig, texts: Texts, *, cross_attention: CrossAttentionKernel = "projected"
) -> Tokens:
    """The rows of a sample whose caption is of mean length. Source: model.text.TextEncoder.layout, for the text.

    Args:
        cross_attention: `auto` is what costs fewer operations.
    """
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
    absorbed = cross_attention == "absorbed"
    if cross_attention == "auto" and config.decoder is not None:
        width, heads = text.width, config.decoder.heads
        absorbed = decoder_columns * (width + (heads - 1) * memory) < memory * width
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
    kind, queries, width = config.pooler.kind, float(config.pooler.queries), config.vision.width
    if kind == "class_token":
        return []
    if kind == "shared":
        return [Pool((queries - 1) * captioning + contrastive, image, width)]
    caption = [Pool(queries, image, width)] if captioning or kind == "cascade" else []
    one = Pool(1.0, queries, config.embed_dim) if kind == "cascade" else Pool(1.0, image, width)
    return caption + [one] * contrastive


def forward_flops(config: CoCaConfig, tokens: Tokens) -> Mapping[str, float]:
    """Operations of one sample's forward pass, by part; the contrastive loss is left out, a few thousandths of it."""
    vision, text, embed = config.vision, config.text, config.embed_dim
    image = 2 * (tokens.image - 1) * 3 * vision.patch_size**2 * vision.width
    pooler = encoder = 0.0
    for pool in tokens.pools:
        pooler += 4 * pool.queries * embed**2 + 4 * pool.memory * (pool.memory_width + pool.queries) * embed
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


def _self_block(rows: float, columns: float, width: int, hidden: int) -> float:
    """Projections and feed-forward by rows, attention by the grid."""
    return rows * (8 * width**2 + 4 * width * hidden) + 4 * columns**2 * width
