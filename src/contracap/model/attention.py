"""Attention of a sequence to itself and to another one, by `scaled_dot_product_attention`."""

from contextlib import nullcontext

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from contracap.model.cache import LayerCache


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
        tokens: Float[Tensor, "batch token width"],
        *,
        causal: bool = False,
        class_keys: Bool[Tensor, "batch token"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch token width"]:
        """Attend within `tokens`.

        Args:
            causal: each token sees itself and what comes before.
            class_keys: given when the last row of `tokens` is a class token that no other row sees; true where it
                looks.
            cache: keys and values of earlier tokens, which these follow; they are appended to it.
        """
        query, key, value = rearrange(
            self.query_key_value(tokens),
            "batch token (part head dim) -> part batch head token dim",
            part=3,
            head=self.heads,
        )
        if cache is not None:
            first = cache.length == 0
            key, value = cache.append(key, value)
            if not first and query.shape[2] > 1:
                raise ValueError("tokens that follow others in a cache must be given one at a time")
            causal = first
        if class_keys is None:
            attended = attend(query, key, value, causal=causal)
        else:
            before = attend(query[:, :, :-1], key[:, :, :-1], value[:, :, :-1], causal=causal)
            seen = rearrange(class_keys, "batch key -> batch 1 1 key")
            last = attend(query[:, :, -1:], key, value, mask=seen)
            attended = torch.cat([before, last], dim=2)
        return self.out(rearrange(attended, "batch head token dim -> batch token (head dim)"))


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
        queries: Float[Tensor, "rows token width"],
        key: Float[Tensor, "images head memory dim"],
        value: Float[Tensor, "images head memory dim"],
    ) -> Float[Tensor, "rows token width"]:
        """Attend to projected memory. Rows that share a picture (its beams, neighbours in `rows`) share its memory,
        uncopied."""
        images = len(key)
        query = rearrange(
            self.query(queries),
            "(images beam) token (head dim) -> images head (beam token) dim",
            images=images,
            head=self.heads,
        )
        attended = attend(query, key, value)
        return self.out(
            rearrange(
                attended, "images head (beam token) dim -> (images beam) token (head dim)", token=queries.shape[1]
            )
        )


def attend(
    query: Float[Tensor, "batch head token dim"],
    key: Float[Tensor, "batch head key dim"],
    value: Float[Tensor, "batch head key dim"],
    *,
    causal: bool = False,
    mask: Bool[Tensor, "batch 1 1 key"] | None = None,
) -> Float[Tensor, "batch head token dim"]:
    """`scaled_dot_product_attention`, by the kernel that is fastest: see docs/performance.md."""
    # On the CPU the fused kernel's backward pass in bf16 takes 2.5 to 4 times as long as plain matrix products.
    plain = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
