"""The arithmetic of one sample: the rows that it has in each part of the model, and the operations that they take.

torch counts the operations, on a model whose tensors have no values: a multiplication and its addition are two. As
usual, norms, activations and softmax are not counted, and causal attention counts the whole square.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from contracap.losses import LossConfig
from contracap.model.attention import CrossAttention
from contracap.model.coca import CoCa, CoCaConfig
from contracap.model.packing import ROWS
from contracap.model.transformer import CrossAttentionBlock, SelfAttentionBlock

SAMPLES = 64 * ROWS  # counted together, so that packed rows need no padding
TOWERS = {
    "image encoder": "vision",
    "text encoder": "text",
}  # nothing before them is trained: frozen as a whole, they need no backward pass
BACKWARD = 2  # forward passes per backward pass: one product for the inputs, one for the weights


@dataclass(frozen=True, kw_only=True)
class TextLengths:
    """Lengths of the captions, in tokens, start and end included.

    Attributes:
        mean: mean length; linear layers compute no padding.
        longest: longest text of a batch: the number of columns of attention's grid.
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
    """Mean numbers of rows per sample in each part of the model, in training. They need not be whole.

    Attributes:
        image: tokens of the image: the patches that are kept, and the class token.
        pools: the pooler's queries and what they read.
        memory: caption tokens that the decoder reads.
        encoder: rows of the text encoder.
        encoder_columns: columns of its attention's grid.
        decoder: rows of the text decoder, each with a label; 0 without a captioning loss.
        decoder_columns: columns of its attention's grid.
        absorbed: cross-attention leaves the memory unprojected.
        contrastive: there is a contrastive loss, and therefore embeddings.
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


def tokens_of(config: CoCaConfig, loss: LossConfig, texts: TextLengths) -> Tokens:
    """Return the rows of a sample with a caption of mean length. Source: `TextEncoder.layout`."""
    vision, text = config.vision, config.text
    captioning, contrastive = loss.captioning > 0, loss.contrastive > 0
    image = 1.0 + max(1, round(vision.patches * (1.0 - vision.patch_dropout)))
    decoder, decoder_columns = (texts.mean - 1, texts.longest - 1.0) if captioning else (0.0, 0.0)

    def encoder_rows(tokens: float) -> float:
        if not contrastive:
            return 0.0 if config.is_mammut else tokens - 1
        if text.pool == "mean_with_padding":
            return float(text.context)
        if text.pool != "class_token":
            return tokens
        return 1 + (min(tokens + 1, float(text.context)) if text.cls_mask == "legacy" else tokens)

    queries = config.pooler.queries - (config.pooler.kind == "shared")
    without_queries = {"mean": image, "mean_of_patches": image - 1, "class_token": image - 1}
    caption_tokens = without_queries.get(config.pooler.kind, float(queries))
    memory = caption_tokens if captioning else 0.0
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

    if not config.pooler.has_queries:
        return []
    placed = config.pooler.adds_positions
    if kind == "shared":
        return [pool((queries - 1) * captioning + contrastive, image, width, adds_positions=placed)]
    caption = [pool(queries, image, width, adds_positions=placed)] if captioning or kind == "cascade" else []
    one = pool(1.0, queries, embed) if kind == "cascade" else pool(1.0, image, width)
    return caption + [one] * contrastive


def _absorbs(heads: int, queries: float, width: int, memory: float, memory_width: int) -> bool:
    with torch.device("meta"):
        attention = CrossAttention(width, heads, memory_width=memory_width)
    return attention.is_absorbed_cheaper(queries=round(queries), memory=round(memory))


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of one sample's forward pass.

    Attributes:
        parts: by part of the model, without the contrastive loss, which is a few thousandths of the total.
        blocks: the same for the transformer blocks alone, which activation checkpointing computes again.
    """

    parts: Mapping[str, float]
    blocks: Mapping[str, float]


@lru_cache(maxsize=64)
def count_flops(config: CoCaConfig, loss: LossConfig, texts: TextLengths) -> Flops:
    """Count the operations of a forward pass in training, for the losses of weight above 0."""
    with torch.device("meta"):
        model = CoCa(config).train().requires_grad_(False)
        pixels = torch.empty(SAMPLES, 3, config.vision.image_size, config.vision.image_size)
        ids = torch.empty(SAMPLES, texts.longest, dtype=torch.int64)
    batch = (pixels, ids, _lengths(texts))
    counter = FlopCounterMode(display=False)
    if not loss.captioning:  # under the name `forward`, so that the counts are named after the model
        vars(model)["forward"] = model.contrastive_features
    elif not loss.contrastive:
        vars(model)["forward"] = model.caption_states
    with counter, sdpa_kernel(SDPBackend.MATH):
        output = model(*batch)
        if loss.captioning:
            captions = output.caption_states if loss.contrastive else output
            model.require_decoder().vocabulary(captions.states)
    counted = {name: sum(counts.values()) / SAMPLES for name, counts in counter.get_flop_counts().items()}

    def of(module: str) -> float:
        """Return the FLOPs of the module, or of those of its submodules that were called directly."""
        name = f"CoCa.{module}"
        within = [each for each in counted if each == name or each.startswith(f"{name}.")]
        outermost = (each for each in within if not any(each.startswith(f"{other}.") for other in within))
        return sum((counted[each] for each in outermost), 0.0)

    blocks = dict.fromkeys(("image encoder", "text encoder", "decoder self-attention", "decoder cross-attention"), 0.0)
    for name, module in model.named_modules():
        if isinstance(module, SelfAttentionBlock | CrossAttentionBlock):
            part = {"vision": "image encoder", "text": "text encoder"}.get(name.partition(".")[0])
            of_decoder = (
                "decoder self-attention" if isinstance(module, SelfAttentionBlock) else "decoder cross-attention"
            )
            blocks[part or of_decoder] += counted.get(f"CoCa.{name}", 0.0)
    text, self_attention = of("text"), of("decoder.self_blocks")
    if config.is_mammut:
        text = text if loss.contrastive else 0.0
        self_attention = of("text.blocks") - text  # the second pass
        blocks["text encoder"] -= self_attention
        blocks["decoder self-attention"] += self_attention
    parts = {"image encoder": of("vision"), "pooler": 0.0, "text encoder": text}
    if loss.captioning:
        parts["decoder self-attention"] = self_attention
        parts["decoder cross-attention"] = of("decoder") - self_attention
        parts["vocabulary"] = of("decoder.vocabulary")
    parts["pooler"] = counted["Global"] - sum(parts.values())
    return Flops(parts=parts, blocks={part: flops for part, flops in blocks.items() if part in parts})


def _lengths(texts: TextLengths) -> np.ndarray:
    """Return lengths with this mean (to 1 / 128), one of which is the longest."""
    total = round(texts.mean * SAMPLES / ROWS) * ROWS
    lengths = np.full(SAMPLES, (total - texts.longest) // (SAMPLES - 1))
    lengths[0] = texts.longest
    lengths[1 : 1 + total - int(lengths.sum())] += 1
    return lengths


def training_flops(model: CoCa, forward: Mapping[str, float]) -> Mapping[str, float]:
    """Return the operations of forward and backward pass by part, given those of the forward pass. A tower that is
    frozen as a whole has no backward pass."""
    frozen = {
        part
        for part, name in TOWERS.items()
        if not any(parameter.requires_grad for parameter in model.get_submodule(name).parameters())
    }
    return {part: (1 if part in frozen else 1 + BACKWARD) * flops for part, flops in forward.items()}
