"""The memory of one GPU in training, by what it holds."""

from collections.abc import Mapping

import torch
from torch import nn

from contracap.model.coca import CoCa, CoCaConfig
from contracap.plan.flops import Tokens
from contracap.recipe import Recipe
from contracap.training.optimizer import freeze

EXACT = 4  # bytes of a float32 number: weights, gradients, moments, the residual stream, what norms read
STATISTICS = 2 * EXACT  # mean and deviation, which a norm keeps of each row
MOMENTS = 2  # that AdamW keeps of each parameter
CAPTION_CHUNK = CONTRASTIVE_CHUNK = 4096  # rows and columns that `losses` scores at a time on a GPU
WEIGHTS_ENTRY, OPTIMIZER_ENTRY = 110, 5850  # bytes beside each parameter's numbers in a checkpoint's files, measured


def planned_model(recipe: Recipe) -> CoCa:
    """The recipe's model without memory behind it; what the run will not train requires no gradient."""
    with torch.device("meta"):
        model = CoCa(recipe.model_config)
    freeze(model, recipe.frozen)
    freeze(model, [] if recipe.loss.contrastive else model.only_for_contrastive())
    freeze(model, [] if recipe.loss.captioning else model.only_for_captioning())
    return model


def count_parameters(model: CoCa) -> Mapping[str, int]:
    """Parameters by part; the decoder's hold the vocabulary matrix."""
    counts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in model.named_children()}
    return counts | {"logit_scale": model.logit_scale.numel()}


def count_trained(model: CoCa) -> int:
    """Parameters that have a gradient."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def saved_bytes(config: CoCaConfig, tokens: Tokens, *, product: int) -> Mapping[str, float]:
    """Bytes of one sample's tensors that the forward pass keeps for the backward pass, by part of the model.

    What is counted: each norm's input with two statistics a row, each linear layer's input, the queries, keys and
    values of attention with its output and a normaliser for each row and head (kernels that hold no scores), and the
    hidden layer of a feed-forward before and after its activation.

    Args:
        product: bytes of a number in matrix products: 2 under bf16 autocast, 4 in float32.
    """
    vision, text, embed = config.vision, config.text, config.embed_dim
    patches = (tokens.image - 1) * 3 * vision.patch_size**2 * product
    image = tokens.image * (vision.width * EXACT + STATISTICS)  # the norm before the blocks
    image += vision.layers * (
        _attention(tokens.image, tokens.image, vision.width, vision.heads, product)
        + _feed_forward(tokens.image, vision.width, vision.mlp_ratio, product)
    )
    parts = {"image encoder": patches + image, "pooler": _pooler(config, tokens, product)}
    mask = tokens.encoder_columns**2 * product * (text.pool == "class_token" and text.cls_mask == "legacy")
    parts["text encoder"] = text.layers * (
        _attention(tokens.encoder, tokens.encoder_columns, text.width, text.heads, product)
        + tokens.encoder * text.width * product  # attention's output, collected from the grid into rows
        + _feed_forward(tokens.encoder, text.width, text.mlp_ratio, product)
        + mask
    )
    if config.decoder is None or not tokens.decoder:
        return parts
    rows, columns, width, decoder = tokens.decoder, tokens.decoder_columns, text.width, config.decoder
    memory = tokens.memory * embed
    feed_forward = _feed_forward(rows, width, decoder.mlp_ratio, product)
    self_attention = _attention(rows, columns, width, decoder.heads, product) + rows * width * product
    cross_attention = (
        _norm(rows, width)
        + 2 * rows * width * product  # before the queries, and before the output
        + columns * (2 * width * product + decoder.heads * EXACT)
        + tokens.memory * STATISTICS
        + 3 * memory * product
    )
    head = _norm(rows, width) + rows * width * product  # the captioning loss keeps the gradient of its states
    parts["decoder"] = decoder.layers * (self_attention + cross_attention + 2 * feed_forward) + head + memory * EXACT
    return parts


def _norm(rows: float, width: int) -> float:
    return rows * (width * EXACT + STATISTICS)


def _attention(rows: float, columns: float, width: int, heads: int, product: int) -> float:
    """A norm, and self-attention, whose output is kept once where rows are a grid."""
    return _norm(rows, width) + rows * width * product + columns * (4 * width * product + heads * EXACT)


def _feed_forward(rows: float, width: int, ratio: float, product: int) -> float:
    return _norm(rows, width) + rows * (width + 2 * int(width * ratio)) * product


def _pooler(config: CoCaConfig, tokens: Tokens, product: int) -> float:
    embed, kind, width = config.embed_dim, config.pooler.kind, config.vision.width
    total = 0.0 if kind == "shared" else _norm(tokens.image, width)  # a norm of their own, before whatever pools
    for pool in tokens.pools:
        total += _norm(pool.memory, pool.memory_width) + pool.memory * (pool.memory_width + 2 * embed) * product
        total += pool.queries * (3 * embed * product + config.pooler.heads * EXACT)
        if kind == "shared":
            total += _norm(pool.queries, embed)
    return total


def memory_parts(
    recipe: Recipe, model: CoCa, tokens: Tokens, *, rows: float, gpus: int, product: int
) -> Mapping[str, float]:
    """Bytes that one GPU holds at the fullest moment, when a forward pass ends; every GPU holds the whole model.

    Gradients are there throughout if a batch has several parts, or GPUs share it, whose buckets they lie in; else they
    come as activations go, and only what is larger than those counts. What is frozen has no gradients and no moments;
    its activations are counted as if it were trained.

    Args:
        model: as `planned_model` makes it.
        rows: samples of a forward pass on this GPU.
        gpus: that share the contrastive loss.
        product: as in `saved_bytes`.
    """
    config, parameters, trained = model.config, sum(count_parameters(model).values()), count_trained(model)
    multiplied = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    vocabulary = config.text.width * config.text.vocab_size * (tokens.decoder > 0)
    if model.decoder is not None:
        multiplied -= model.decoder.vocabulary.weight.numel()
    activations = rows * sum(saved_bytes(config, tokens, product=product).values())
    room = 0.0 if gpus > 1 or recipe.accumulation > 1 else activations
    parts = {
        "parameters": parameters * EXACT,
        "gradients": max(0.0, trained * EXACT - room),
        "AdamW moments": trained * EXACT * MOMENTS,
        "moving average": parameters * EXACT * (recipe.ema_decay > 0),
        "weights in bf16": multiplied * product * (product < EXACT),
        "pictures": recipe.accumulation * rows * 3 * config.vision.image_size**2,
        "activations": activations,
        "vocabulary gradient": vocabulary * EXACT,
        "captioning scores": captioning_scores(config, tokens, rows=rows, product=product),
        "contrastive scores": contrastive_scores(config, rows=rows, gpus=gpus) if tokens.contrastive else 0,
    }
    return {name: float(size) for name, size in parts.items() if size}


def captioning_scores(config: CoCaConfig, tokens: Tokens, *, rows: float, product: int) -> float:
    """Bytes of a chunk's scores, of their shares in float32, and of the vocabulary matrix and its newest gradient as
    they are multiplied."""
    chunk = min(float(CAPTION_CHUNK), tokens.decoder * rows)
    narrow = product < EXACT
    matrix = 2 * config.text.width * config.text.vocab_size * product * (narrow and chunk > 0)
    return chunk * config.text.vocab_size * (product + EXACT * narrow) + matrix


def contrastive_scores(config: CoCaConfig, *, rows: float, gpus: int) -> float:
    """Bytes of both directions' scores for a chunk of columns, of their shares, and of the features of all GPUs."""
    columns = rows * gpus
    return (2 * 2 * rows * min(columns, float(CONTRASTIVE_CHUNK)) + 2 * columns * config.embed_dim) * EXACT


def checkpoint_bytes(model: CoCa, *, averaged: bool) -> int:
    """Bytes of a checkpoint: weights, the moments of what is trained, and the moving average where there is one."""
    weights = moments = 0
    for parameter in model.parameters():
        weights += parameter.numel() * EXACT + WEIGHTS_ENTRY
        moments += (parameter.numel() * EXACT * MOMENTS + OPTIMIZER_ENTRY) * parameter.requires_grad
    return weights * (1 + averaged) + moments
