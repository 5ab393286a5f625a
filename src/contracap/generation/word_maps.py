"""Word maps: which patches of the image each word of a caption attended to."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from contracap.model.attention import CrossAttention
from contracap.model.coca import CoCa, evaluating
from contracap.model.pooler import AttentionalPool, ClassTokenPooler, MeanPooler, SharedPooler, TwoPoolers
from contracap.tokenizer import Tokenizer


@torch.inference_mode()
def attention_map(
    model: CoCa, pixels: Float[Tensor, "1 3 height width"], token_ids: Sequence[int]
) -> Float[Tensor, "tokens row column"]:
    """Return how much each token of a caption attended to each patch when it was predicted; each map sums to 1.

    The decoder's row before a token predicts it. The row's cross-attention, averaged over layers and heads, weights the
    caption tokens. The pooler's attention, averaged over heads, weights the image tokens in each caption token. The
    product of the two weights the image tokens. The class token of the image encoder has no place in the image, so its
    weight is dropped and the others are scaled to sum to 1. Attention inside the image encoder is not considered.

    Args:
        token_ids: as in `Caption.token_ids`, without start and end token.

    Raises: ValueError: if the model has no text decoder, or the caption is longer than the context.

    Source: "attention rollout" (arXiv 2005.00928), section 3, multiplies attention matrices over layers. There are no
        residuals here, because neither of the two attentions adds its input to its output.
    """
    decoder, side = model.require_decoder(), model.config.vision.image_size // model.config.vision.patch_size
    if not token_ids:
        return torch.empty(0, side, side)
    ids = torch.tensor([[model.config.text.end - 1, *token_ids]], device=model.device)
    blocks = list(decoder.cross_blocks)
    with evaluating(model), record_outputs(model.vision, *(block.attention.query for block in blocks)) as outputs:
        model.caption_states(pixels.to(model.device), ids)
        image_tokens, *queries = outputs
        caption_tokens = model.pooler.caption_tokens(image_tokens)
    layers = [
        attention_weights(
            block.attention, query.reshape(-1, query.shape[-1])[: len(token_ids)], block.memory_norm(caption_tokens)
        )
        for block, query in zip(blocks, queries, strict=True)
    ]
    weights = torch.stack(layers).mean(dim=0) @ pooler_weights(model.pooler, image_tokens)
    patches = weights[:, 1:]
    patches = patches / patches.sum(dim=1, keepdim=True)
    return rearrange(patches, "token (row column) -> token row column", row=side).float().cpu()


def pooler_weights(
    pooler: nn.Module, image_tokens: Float[Tensor, "1 image_token dim"]
) -> Float[Tensor, "caption_token image_token"]:
    """Return the weight of each image token in each caption token, averaged over the pooler's heads."""
    if isinstance(pooler, SharedPooler):
        return _pool_weights(pooler.pool, image_tokens, slice(1, None))
    if isinstance(pooler, MeanPooler | ClassTokenPooler):  # each caption token is an image token
        return torch.eye(image_tokens.shape[1], device=image_tokens.device, dtype=image_tokens.dtype)[pooler.first :]
    assert isinstance(pooler, TwoPoolers)
    return _pool_weights(pooler.caption_pool, pooler.norm_in(image_tokens), slice(None))


def _pool_weights(
    pool: AttentionalPool, image_tokens: Float[Tensor, "1 image_token dim"], queries: slice
) -> Float[Tensor, "query image_token"]:
    memory = pool.memory_norm(image_tokens)
    if pool.position is not None:
        memory = memory + pool.position
    return attention_weights(pool.attention, pool.attention.query(pool.query_norm(pool.queries[queries])), memory)


def attention_weights(
    attention: CrossAttention, query: Float[Tensor, "query width"], memory: Float[Tensor, "1 memory memory_width"]
) -> Float[Tensor, "query memory"]:
    """Return the attention of each query to each row of a normalised memory, averaged over heads."""
    key, _ = attention.key_value(memory[0]).chunk(2, dim=-1)
    query, key = (rearrange(rows, "row (head dim) -> head row dim", head=attention.heads) for rows in (query, key))
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=0)


@contextmanager
def record_outputs(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list to which the modules append their outputs, in the order of their calls."""
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
    """Return the words of a caption, each with the mean of its tokens' maps."""
    words, first = [], 0
    for last, token in enumerate(token_ids, start=1):
        if last == len(token_ids) or tokenizer.ends_word(token):
            words.append((tokenizer.decode(token_ids[first:last]), maps[first:last].mean(dim=0)))
            first = last
    return words
