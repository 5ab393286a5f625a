"""Attention of a sequence to itself and to another one, by `scaled_dot_product_attention`."""

from contextlib import nullcontext

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from contracap.model.cache import LayerCache
from contracap.model.layout import GRID, Grid


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def initialise(self, *, depth: int) -> None:
        """Fill the weights for a residual stream that `depth` blocks add to. Source: model.text.TextEncoder."""
        width = self.out.in_features
        nn.init.normal_(self.query_key_value.weight, std=width**-0.5)
        nn.init.normal_(self.out.weight, std=(width * 2 * depth) ** -0.5)
        nn.init.zeros_(self.query_key_value.bias)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        tokens: Float[Tensor, "*rows width"],
        *,
        layout: Grid = GRID,
        causal: bool = False,
        mask: Bool[Tensor, "batch 1 query key"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "*rows width"]:
        """Attend within each sequence.

        Args:
            layout: how the sequences lie in `tokens`.
            causal: each token sees itself and what comes before.
            mask: given in place of `causal`; true where a token looks.
            cache: keys and values of earlier tokens, which these follow; they are appended to it.
        """
        query, key, value = rearrange(
            layout.spread(self.query_key_value(tokens)),
            "batch column (part head dim) -> part batch head column dim",
            part=3,
            head=self.heads,
        )
        if cache is not None:
            first = cache.length == 0
            key, value = cache.append(key, value)
            if not first and query.shape[2] > 1:
                raise ValueError("tokens that follow others in a cache must be given one at a time")
            causal = first
        attended = attend(query, key, value, causal=causal, mask=mask)
        return self.out(layout.collect(rearrange(attended, "batch head column dim -> batch column (head dim)")))


class CrossAttention(nn.Module):
    """Multi-head attention of a sequence, or of learned queries, to a memory of another width."""

    def __init__(self, width: int, heads: int, *, memory_width: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(memory_width, 2 * width)
        self.out = nn.Linear(width, width)

    def initialise(self, *, depth: int) -> None:
        """Fill the weights for a residual stream that `depth` blocks add to. Source: model.text.TextEncoder."""
        width, memory_width = self.out.in_features, self.key_value.in_features
        nn.init.normal_(self.query.weight, std=width**-0.5)
        nn.init.normal_(self.key_value.weight, std=memory_width**-0.5)
        nn.init.normal_(self.out.weight, std=(width * 2 * depth) ** -0.5)
        for linear in (self.query, self.key_value, self.out):
            nn.init.zeros_(linear.bias)

    def project(
        self, memory: Float[Tensor, "images memory memory_width"]
    ) -> tuple[Float[Tensor, "images head memory dim"], Float[Tensor, "images head memory dim"]]:
        """Keys and values of a memory, once for all the queries that will read it."""
        key, value = rearrange(
            self.key_value(memory),
            "images memory (part head dim) -> part images head memory dim",
            part=2,
            head=self.heads,
        )
        return key, value

    def forward(
        self,
        queries: Float[Tensor, "*rows width"],
        key: Float[Tensor, "images head memory dim"],
        value: Float[Tensor, "images head memory dim"],
        *,
        layout: Grid = GRID,
    ) -> Float[Tensor, "*rows width"]:
        """Attend to projected memory. Sequences that share a picture (its beams, neighbours) share its memory,
        uncopied. `layout` is how they lie in `queries`."""
        grid = layout.spread(self.query(queries))
        query = rearrange(
            grid,
            "(images beam) column (head dim) -> images head (beam column) dim",
            images=len(key),
            head=self.heads,
        )
        attended = rearrange(
            attend(query, key, value),
            "images head (beam column) dim -> (images beam) column (head dim)",
            column=grid.shape[1],
        )
        return self.out(layout.collect(attended))


def attend(
    query: Float[Tensor, "batch head token dim"],
    key: Float[Tensor, "batch head key dim"],
    value: Float[Tensor, "batch head key dim"],
    *,
    causal: bool = False,
    mask: Bool[Tensor, "batch 1 token key"] | None = None,
) -> Float[Tensor, "batch head token dim"]:
    """`scaled_dot_product_attention`, by the kernel that is fastest: see docs/performance.md."""
    # On the CPU the fused kernel's backward pass in bf16 takes 2.5 to 4 times as long as plain matrix products.
    plain = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
