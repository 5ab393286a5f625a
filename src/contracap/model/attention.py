"""Multi-head self-attention and cross-attention."""

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from contracap.model.cache import KeysValues, LayerCache, Memory, NormalisedTokens
from contracap.model.packing import GRID, Layout


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def initialise(self, *, depth: int) -> None:
        """Initialise the weights for a residual stream of `depth` blocks, as `initialize_parameters` of openai/CLIP."""
        width = self.out.in_features
        nn.init.normal_(self.query_key_value.weight, std=width**-0.5)
        nn.init.normal_(self.out.weight, std=(width * 2 * depth) ** -0.5)
        nn.init.zeros_(self.query_key_value.bias)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        tokens: Float[Tensor, "*rows width"],
        *,
        layout: Layout = GRID,
        causal: bool = False,
        mask: Bool[Tensor, "batch 1 query key"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "*rows width"]:
        """Attend within each sequence.

        Args:
            layout: how the sequences are stored in `tokens`.
            causal: each token sees itself and earlier ones.
            mask: replaces `causal`; true where a query may attend to a key.
            cache: keys and values of earlier tokens; those of `tokens` are added to it.
        """
        query, key, value = rearrange(
            layout.pad(self.query_key_value(tokens)),
            "batch column (part head dim) -> part batch head column dim",
            part=3,
            head=self.heads,
        )
        if cache is not None:
            cache.append(key, value)
            key, value = cache.keys, cache.values
        attended = attend(query, key, value, causal=causal, mask=mask)
        return self.out(layout.unpad(rearrange(attended, "batch head column dim -> batch column (head dim)")))


class CrossAttention(nn.Module):
    """Multi-head attention of a sequence, or of learned queries, to a memory.

    The memory is what queries read, as in `torch.nn.TransformerDecoder`: image tokens in the pooler, caption tokens in
    the decoder. There are two ways to compute it. With `KeysValues`, each row of the memory is projected to keys and
    values. With `NormalisedTokens`, the projections are multiplied into queries and outputs instead, which is less work
    for short texts.
    """

    def __init__(self, width: int, heads: int, *, memory_width: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(memory_width, 2 * width)
        self.out = nn.Linear(width, width)

    def initialise(self, *, depth: int) -> None:
        """Initialise the weights for a residual stream of `depth` blocks, as `initialize_parameters` of openai/CLIP."""
        width, memory_width = self.out.in_features, self.key_value.in_features
        nn.init.normal_(self.query.weight, std=width**-0.5)
        nn.init.normal_(self.key_value.weight, std=memory_width**-0.5)
        nn.init.normal_(self.out.weight, std=(width * 2 * depth) ** -0.5)
        for linear in (self.query, self.key_value, self.out):
            nn.init.zeros_(linear.bias)

    def is_absorbed_cheaper(self, *, queries: int, memory: int) -> bool:
        """Return whether `NormalisedTokens` takes fewer operations, for these numbers of queries and rows of memory."""
        width, memory_width = self.key_value.out_features // 2, self.key_value.in_features
        # Per image, half of the operations: keys and scores. Values and weighted sums take the same.
        projected = memory * memory_width * width + queries * memory * width
        absorbed = queries * width * memory_width + queries * self.heads * memory * memory_width
        return absorbed < projected

    def project(self, memory: Float[Tensor, "batch memory memory_width"]) -> KeysValues:
        """Project a memory to keys and values, once for all queries."""
        key, value = rearrange(
            self.key_value(memory),
            "batch memory (part head dim) -> part batch head memory dim",
            part=2,
            head=self.heads,
        )
        return KeysValues(key, value)

    def forward(
        self, queries: Float[Tensor, "*rows width"], memory: Memory, *, layout: Layout = GRID
    ) -> Float[Tensor, "*rows width"]:
        """Attend to a memory. `layout` says how the sequences are stored in `queries`."""
        if isinstance(memory, NormalisedTokens):
            return self.out(self._absorbed(self.query(queries), memory, layout))
        query = rearrange(
            layout.pad(self.query(queries)), "batch column (head dim) -> batch head column dim", head=self.heads
        )
        attended = attend(query, memory.key, memory.value)
        return self.out(layout.unpad(rearrange(attended, "batch head column dim -> batch column (head dim)")))

    def _absorbed(
        self, query: Float[Tensor, "*rows width"], memory: NormalisedTokens, layout: Layout
    ) -> Float[Tensor, "*rows width"]:
        """Attend to the rows of the memory instead of keys and values, with queries of the same width.

        A score q (W_k (g x + b) + c) equals (g W_k^T q) x plus a term that does not depend on x, which softmax ignores.
        A sum of p (W_v (g x + b) + c) equals W_v g (sum of p x) + W_v b + c, because the weights p add up to 1.
        """
        key_matrix, value_matrix = self.key_value.weight.chunk(2)
        gain, shift = memory.norm.weight, memory.norm.bias
        # Keys and values share one conversion, and gradients of all layers are summed in the type of the tokens.
        tokens = memory.tokens.to(query.dtype)
        wide = einsum(
            rearrange(query, "... (head dim) -> ... head dim", head=self.heads),
            rearrange(key_matrix * gain, "(head dim) memory_width -> head dim memory_width", head=self.heads),
            "... head dim, head dim memory_width -> ... head memory_width",
        )
        grid = layout.pad(wide.flatten(-2))
        attended = plain_attention(  # no fused kernel supports heads as wide as the memory
            rearrange(
                grid,
                "batch column (head memory_width) -> batch 1 (column head) memory_width",
                head=self.heads,
            ),
            tokens[:, None],
            tokens[:, None],
            scale=(query.shape[-1] // self.heads) ** -0.5,
        )
        sums = layout.unpad(attended.reshape(grid.shape))
        values = einsum(
            rearrange(sums, "... (head memory_width) -> ... head memory_width", head=self.heads),
            rearrange(value_matrix * gain, "(head dim) memory_width -> head dim memory_width", head=self.heads),
            "... head memory_width, head dim memory_width -> ... head dim",
        )
        constant = value_matrix @ shift + self.key_value.bias.chunk(2)[1]
        return values.flatten(-2) + constant


def attend(
    query: Float[Tensor, "batch head token dim"],
    key: Float[Tensor, "batch head key dim"],
    value: Float[Tensor, "batch head key dim"],
    *,
    causal: bool = False,
    mask: Bool[Tensor, "batch 1 token key"] | None = None,
) -> Float[Tensor, "batch head token dim"]:
    """Call `scaled_dot_product_attention`, or plain matrix products where those are faster: docs/performance.md."""
    # On the CPU the fused kernel's backward pass in bf16 takes 2.5 to 4 times as long as plain matrix products.
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad:
        if causal:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        return plain_attention(query, key, value, mask=mask, scale=query.shape[-1] ** -0.5)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)


def plain_attention(
    query: Float[Tensor, "batch head token dim"],
    key: Float[Tensor, "batch head key dim"],
    value: Float[Tensor, "batch head key dim"],
    *,
    mask: Bool[Tensor, "batch 1 token key"] | Bool[Tensor, "token key"] | None = None,
    scale: float,
) -> Float[Tensor, "batch head token dim"]:
    """Compute attention by matrix products, with all scores in memory."""
    scores = (query * scale) @ key.mT
    if mask is not None:
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ value
