"""Where in the picture a caption's words come from."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from contracap.model.attention import CrossAttention
from contracap.model.coca import CoCa, evaluating
from contracap.model.pooler import AttentionalPool, SharedPooler, TwoPoolers
from contracap.tokenizer import Tokenizer


@torch.inference_mode()
def attention_map(
    model: CoCa, pixels: Float[Tensor, "1 3 height width"], token_ids: Sequence[int]
) -> Float[Tensor, "tokens row column"]:
    """How much each token of a caption looked at each patch of its picture, when it was chosen; each map sums to 1.

    A token is chosen by the decoder's row before it. That row's cross-attention, the mean over layers and heads, says
    how much of each caption token it read; the pooler's attention, the mean over heads, how much of each image token
    went into that caption token. The product of the two is what the row read of each image token. The share of the
    image encoder's class token, which has no place in the picture, is left out, and what remains is divided by its
    sum. What the image encoder itself moves between patches is not followed.

    Args:
        token_ids: as in `Caption.token_ids`: between the start and the end token, neither included.

    Raises: ValueError: if the model has no text decoder, or the caption is longer than the context.

    Source: the product of attention matrices over layers is "attention rollout" (arXiv 2005.00928), section 3, here
        without residuals, for neither of the two attentions adds its input to what it reads.
    """
    decoder, side = model.require_decoder(), model.config.vision.image_size // model.config.vision.patch_size
    if not token_ids:
        return torch.empty(0, side, side)
    ids = torch.tensor([[model.config.text.end - 1, *token_ids]], device=model.device)
    blocks = list(decoder.cross_blocks)
    with evaluating(model), outputs_of(model.vision, *(block.attention.query for block in blocks)) as outputs:
        model.captions(pixels.to(model.logit_scale), ids)
        image_tokens, *queries = outputs
        caption_tokens = model.pooler.caption_tokens(image_tokens)
    layers = [
        shares(block.attention, query.reshape(-1, query.shape[-1])[: len(token_ids)], block.memory_norm(caption_tokens))
        for block, query in zip(blocks, queries, strict=True)
    ]
    read = torch.stack(layers).mean(dim=0) @ pooling_shares(model.pooler, image_tokens)
    patches = read[:, 1:]
    patches = patches / patches.sum(dim=1, keepdim=True)
    return rearrange(patches, "token (row column) -> token row column", row=side).float().cpu()


def pooling_shares(pooler: nn.Module, image_tokens: Float[Tensor, "1 token dim"]) -> Float[Tensor, "query token"]:
    """How much of each image token goes into each caption token, the mean over the pooler's heads."""
    if isinstance(pooler, SharedPooler):
        return _pooled(pooler.pool, image_tokens, slice(1, None))
    assert isinstance(pooler, TwoPoolers)  # of the other kinds only CLIP's is left, which has no caption tokens
    return _pooled(pooler.caption_pool, pooler.norm_in(image_tokens), slice(None))


def _pooled(pool: AttentionalPool, tokens: Float[Tensor, "1 token dim"], chosen: slice) -> Float[Tensor, "query token"]:
    memory = pool.memory_norm(tokens)
    if pool.position is not None:
        memory = memory + pool.position
    return shares(pool.attention, pool.attention.query(pool.query_norm(pool.queries[chosen])), memory)


def shares(
    attention: CrossAttention, query: Float[Tensor, "query width"], memory: Float[Tensor, "1 memory memory_width"]
) -> Float[Tensor, "query memory"]:
    """How much of each row of a memory each query reads, the mean over heads; `memory` is normalised already."""
    key, _ = attention.key_value(memory[0]).chunk(2, dim=-1)
    query, key = (rearrange(rows, "row (head dim) -> head row dim", head=attention.heads) for rows in (query, key))
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=0)


@contextmanager
def outputs_of(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """A list that fills, in the order in which the modules are called, with what they give."""
    outputs: list[Tensor] = []
    hooks = [module.register_forward_hook(lambda _module, _args, output: outputs.append(output)) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def word_maps(
    tokenizer: Tokenizer, token_ids: Sequence[int], maps: Float[Tensor, "tokens row column"]
) -> list[tuple[str, Float[Tensor, "row column"]]]:
    """The words of a caption, each with the mean of its tokens' maps."""
    words, first = [], 0
    for last, token in enumerate(token_ids, start=1):
        if last == len(token_ids) or tokenizer.ends_word(token):
            words.append((tokenizer.decode(token_ids[first:last]), maps[first:last].mean(dim=0)))
            first = last
    return words
