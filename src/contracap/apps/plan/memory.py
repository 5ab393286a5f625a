"""The memory of one GPU in training, by what it holds."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from contracap.apps.plan.parameters import EXACT, MOMENTS, Shares
from contracap.losses import CAPTION_CHUNK, CONTRASTIVE_CHUNK
from contracap.model.coca import CoCa, CoCaConfig
from contracap.training.flops import Tokens
from contracap.training.recipe import Recipe

STATISTICS = 2 * EXACT  # mean and deviation, which a norm keeps of each row


def saved_bytes(config: CoCaConfig, tokens: Tokens, *, product: int, recompute: bool = False) -> Mapping[str, float]:
    """Bytes of one sample's tensors that the forward pass keeps for the backward pass, by part of the model.

    What is counted: each norm's input with two statistics a row, each linear layer's input, the queries, keys and
    values of attention with its output and a normaliser for each row and head (kernels that hold no scores), and the
    hidden layer of a feed-forward before and after its activation.

    Args:
        product: bytes of a number in matrix products: 2 under bf16 autocast, 4 in float32.
        recompute: whether blocks keep their input alone; the backward pass then has all of one block at a time, of
            which the largest is counted.
    """
    vision = config.vision
    image, text = _image_stack(config, tokens, product), _text_stack(config, tokens, product)
    decoder, decoder_rest = _decoder(config, tokens, product)
    patches = (tokens.image - 1) * 3 * vision.patch_size**2 * product
    norm = tokens.image * (vision.width * EXACT + STATISTICS)  # before the blocks
    parts = {
        "image encoder": patches + (norm + image.saved(recompute)),
        "pooler": _pooler(config, tokens, product),
        "text encoder": text.saved(recompute),
    }
    if decoder:
        parts["decoder"] = sum([*(stack.saved(recompute) for stack in decoder), *decoder_rest])
    largest = max(stack.block for stack in (image, text, *decoder))
    return parts | ({"block in hand": largest} if recompute else {})


class _Stack(NamedTuple):
    """Equal blocks, one after the other.

    Attributes:
        rows, width: of a block's input.
        block: bytes that a block keeps.
    """

    layers: int
    rows: float
    width: int
    block: float

    def saved(self, recompute: bool) -> float:
        return self.layers * (self.rows * self.width * EXACT if recompute else self.block)


def _image_stack(config: CoCaConfig, tokens: Tokens, product: int) -> _Stack:
    vision, rows = config.vision, tokens.image
    block = _attention(rows, rows, vision.width, vision.heads, product)
    return _Stack(
        vision.layers, rows, vision.width, block + _feed_forward(rows, vision.width, vision.mlp_ratio, product)
    )


def _text_stack(config: CoCaConfig, tokens: Tokens, product: int) -> _Stack:
    text, rows = config.text, tokens.encoder
    masked = text.pool == "mean" or (text.pool == "class_token" and text.cls_mask == "legacy")
    collected = text.pool != "mean_with_padding"  # attention's output, from the grid into rows
    block = (
        _attention(rows, tokens.encoder_columns, text.width, text.heads, product)
        + rows * text.width * product * collected
        + _feed_forward(rows, text.width, text.mlp_ratio, product) * _feed_forward_share(config)
        + tokens.encoder_columns**2 * product * masked
    )
    return _Stack(text.layers, rows, text.width, block)


def _feed_forward_share(config: CoCaConfig) -> float:
    """Return the share of the text encoder's blocks that have a feed-forward; it is below 1 for small MaMMUTs."""
    if config.decoder is None or config.decoder.feed_forward_before_cross:
        return 1.0
    return 1 - config.decoder.cross_layers / config.decoder.layers


def _decoder(config: CoCaConfig, tokens: Tokens, product: int) -> tuple[list[_Stack], list[float]]:
    """Return the decoder's blocks, and the bytes of all else that it keeps; nothing if it does not run."""
    if config.decoder is None or not tokens.decoder:
        return [], []
    rows, columns, width, decoder = tokens.decoder, tokens.decoder_columns, config.text.width, config.decoder
    memory = tokens.memory * width
    feed_forward = _feed_forward(rows, width, decoder.mlp_ratio, product)
    self_attention = _attention(rows, columns, width, decoder.heads, product) + rows * width * product
    cross_attention = (
        _norm(rows, width)
        + 2 * rows * width * product  # before the queries, and before the output
        + columns * decoder.heads * EXACT
    )
    once, each = memory * EXACT, tokens.memory * STATISTICS + 3 * memory * product  # norm, keys and values
    if tokens.absorbed:  # one normalised memory for all layers; queries, which then are as wide for each head
        once, each = once + tokens.memory * STATISTICS + memory * product, 0.0
        cross_attention += rows * width * product
        # What is asked and what is read, on the grid, and the latter in rows.
        cross_attention += (2 * columns + rows) * decoder.heads * width * product
    else:
        cross_attention += columns * 2 * width * product
    gradient = rows * width * product  # of its states, which the captioning loss keeps
    stacks = [
        _Stack(decoder.layers, rows, width, self_attention + feed_forward * _feed_forward_share(config)),
        _Stack(decoder.cross_layers, rows, width, cross_attention + feed_forward),
    ]
    return stacks, [decoder.cross_layers * each, once, _norm(rows, width), gradient]


def _norm(rows: float, width: int) -> float:
    return rows * (width * EXACT + STATISTICS)


def _attention(rows: float, columns: float, width: int, heads: int, product: int) -> float:
    """A norm, and self-attention, whose output is kept once where rows are a grid."""
    return _norm(rows, width) + rows * width * product + columns * (4 * width * product + heads * EXACT)


def _feed_forward(rows: float, width: int, ratio: float, product: int) -> float:
    return _norm(rows, width) + rows * (width + 2 * int(width * ratio)) * product


def _pooler(config: CoCaConfig, tokens: Tokens, product: int) -> float:
    embed, kind, width = config.embed_dim, config.pooler.kind, config.vision.width
    if kind in ("mean", "mean_of_patches"):
        return _norm(1.0, width) + (1 + tokens.memory) * width * product
    total = 0.0 if kind == "shared" else _norm(tokens.image, width)  # a norm of their own, before the pooling
    for pool in tokens.pools:
        total += _norm(pool.memory, pool.memory_width) + pool.memory * pool.memory_width * product
        total += pool.queries * (3 * embed * product + config.pooler.heads * EXACT)
        if pool.absorbed:  # what is asked of the memory and what is read of it, both as wide as it is for each head
            total += 2 * pool.queries * config.pooler.heads * pool.memory_width * product
        else:
            total += pool.memory * 2 * embed * product
        if kind == "shared":
            total += _norm(pool.queries, embed)
    return total


def memory_parts(
    recipe: Recipe, model: CoCa, shares: Shares, tokens: Tokens, *, rows: float, product: int
) -> Mapping[str, float]:
    """Bytes that one GPU holds at the fullest moment, when a forward pass ends.

    What comes only as activations go counts as far as it is larger than those: gradients, unless they lie in the
    buckets in which GPUs that hold all of a model average them, or several parts of a batch add to them; and, where a
    model is sharded, what it takes to reduce the gradients of the root. A batch in parts has its contrastive loss
    before the first of them. What is frozen has no gradients and no moments; its activations are counted as if it were
    trained.

    Args:
        model: as `planned_model` makes it.
        rows: samples of a forward pass on this GPU.
        product: as in `saved_bytes`.
    """
    config, parts = model.config, recipe.accumulation
    recompute = recipe.parallel.recompute == "blocks"
    activations = rows * sum(saved_bytes(config, tokens, product=product, recompute=recompute).values())
    gradients = shares.trained * EXACT
    if parts > 1 and shares.blocks:  # not reduced until the last part, so all of them are on every GPU
        gradients += sum(unit.trained for unit in shares.shared) * EXACT
    elif parts == 1 and (shares.blocks or shares.gpus == 1):
        gradients = max(0.0, gradients - activations)
    scores = contrastive_scores(config, rows=parts * rows, gpus=shares.gpus) if tokens.contrastive else 0.0
    counted = {
        "parameters": shares.held * EXACT,
        "gradients": gradients,
        "AdamW moments": shares.trained * EXACT * MOMENTS,
        "moving average": shares.held * EXACT * (recipe.ema_decay > 0),
        **(_fetched(shares, activations, product) if shares.blocks else _cast(model, product)),
        "images": parts * rows * 3 * config.vision.image_size**2,
        "activations": activations,
        "vocabulary gradient": config.text.width * config.text.vocab_size * (tokens.decoder > 0) * EXACT,
        "captioning scores": captioning_scores(config, tokens, rows=rows, product=product),
        "contrastive scores": scores if parts == 1 else max(0.0, scores - activations),
        "gradients of features": 2 * parts * rows * config.embed_dim * EXACT * (parts > 1 and tokens.contrastive),
    }
    return {name: float(size) for name, size in counted.items() if size}


def _cast(model: CoCa, product: int) -> Mapping[str, float]:
    """Return the bytes of autocast's copies of linear layers' weights, without the captioning loss's vocabulary."""
    multiplied = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    if model.decoder is not None:
        multiplied -= model.decoder.vocabulary.weight.numel()
    return {"weights in bf16": float(multiplied * product * (product < EXACT))}


def _fetched(shares: Shares, activations: float, product: int) -> Mapping[str, float]:
    """The root, a block in use, the next one, and the buffer that this comes in; then gradients, which wait until those
    of the block, or in the end of the root, are all there, and are copied into the buffer that they are reduced in."""
    root, block = shares.root, max(shares.blocks, key=lambda unit: unit.whole)
    return {
        "fetched parameters": float((root.whole + 3 * block.whole) * product),
        "gradients on their way": max(
            float(block.trained * (product + EXACT)), root.trained * (product + EXACT) - activations
        ),
    }


def captioning_scores(config: CoCaConfig, tokens: Tokens, *, rows: float, product: int) -> float:
    """Bytes of a chunk's scores, of their shares in float32, and of the vocabulary matrix and its newest gradient as
    they are multiplied."""
    scored = min(float(CAPTION_CHUNK), tokens.decoder * rows)
    narrow = product < EXACT
    matrix = 2 * config.text.width * config.text.vocab_size * product * (narrow and scored > 0)
    return scored * config.text.vocab_size * (product + EXACT * narrow) + matrix


def contrastive_scores(config: CoCaConfig, *, rows: float, gpus: int) -> float:
    """Bytes of both directions' scores for a chunk of columns, of their shares, and of the features of all GPUs."""
    columns = rows * gpus
    return (2 * 2 * rows * min(columns, float(CONTRASTIVE_CHUNK)) + 2 * columns * config.embed_dim) * EXACT
