"""Pre-norm residual blocks, which all towers are built from."""

from collections.abc import Iterator
from typing import Generic, Literal, TypeVar, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from contracap.model.attention import CrossAttention, SelfAttention
from contracap.model.cache import KeysValues, LayerCache, Memory
from contracap.model.packing import GRID, Layout

Activation = Literal["gelu", "quick_gelu"]
Block = TypeVar("Block", "SelfAttentionBlock", "TransformerBlock", "CrossAttentionBlock")


class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU, with which their CLIP models were trained."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return x * torch.sigmoid(1.702 * x)


class FeedForward(nn.Module):
    """Two linear layers around an activation: the exact (erf) GELU, or `QuickGELU`."""

    def __init__(self, width: int, mlp_ratio: float, activation: Activation):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.expand = nn.Linear(width, hidden)
        self.activation = QuickGELU() if activation == "quick_gelu" else nn.GELU()
        self.contract = nn.Linear(hidden, width)

    def initialise(self, *, depth: int) -> None:
        """Initialise the weights for a residual stream of `depth` blocks, as `initialize_parameters` of openai/CLIP."""
        width = self.expand.in_features
        self.expand.reset_parameters()
        self.contract.reset_parameters()
        nn.init.normal_(self.expand.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.contract.weight, std=(width * 2 * depth) ** -0.5)

    def forward(self, tokens: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        return self.contract(self.activation(self.expand(tokens)))


class SelfAttentionBlock(nn.Module):
    """Self-attention with a norm before it and a residual connection, without feed-forward."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)

    def initialise(self, *, depth: int) -> None:
        """Initialise the parameters of the block; `depth` is the number of blocks in its stack."""
        self.attention_norm.reset_parameters()
        self.attention.initialise(depth=depth)

    def forward(
        self,
        tokens: Float[Tensor, "*rows width"],
        *,
        layout: Layout = GRID,
        causal: bool = False,
        mask: Bool[Tensor, "batch 1 query key"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "*rows width"]:
        """Attend within each sequence; arguments as in `SelfAttention`."""
        return tokens + self.attention(
            self.attention_norm(tokens), layout=layout, causal=causal, mask=mask, cache=cache
        )


class TransformerBlock(SelfAttentionBlock):
    """Self-attention, then feed-forward, each with a norm before it and a residual connection."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: Activation = "gelu"):
        super().__init__(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, mlp_ratio, activation)

    def initialise(self, *, depth: int) -> None:
        """Initialise the parameters of the block; `depth` is the number of blocks in its stack."""
        super().initialise(depth=depth)
        self.feed_forward_norm.reset_parameters()
        self.feed_forward.initialise(depth=depth)

    def forward(
        self,
        tokens: Float[Tensor, "*rows width"],
        *,
        layout: Layout = GRID,
        causal: bool = False,
        mask: Bool[Tensor, "batch 1 query key"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "*rows width"]:
        """Attend within each sequence, then transform each token; arguments as in `SelfAttention`."""
        tokens = super().forward(tokens, layout=layout, causal=causal, mask=mask, cache=cache)
        return tokens + self.feed_forward(self.feed_forward_norm(tokens))


class CrossAttentionBlock(nn.Module):
    """Cross-attention to the caption tokens, then feed-forward, each with a norm before it and a residual."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: Activation = "gelu"):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.memory_norm = nn.LayerNorm(width)
        self.attention = CrossAttention(width, heads, memory_width=width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, mlp_ratio, activation)

    def initialise(self, *, depth: int) -> None:
        """Initialise the parameters of the block; `depth` is the number of blocks in its stack."""
        for norm in (self.attention_norm, self.memory_norm, self.feed_forward_norm):
            norm.reset_parameters()
        self.attention.initialise(depth=depth)
        self.feed_forward.initialise(depth=depth)

    def project(self, caption_tokens: Float[Tensor, "batch caption_token width"]) -> KeysValues:
        """Return this layer's keys and values of the caption tokens."""
        return self.attention.project(self.memory_norm(caption_tokens))

    def forward(
        self, tokens: Float[Tensor, "*rows width"], caption_tokens: Memory, *, layout: Layout = GRID
    ) -> Float[Tensor, "*rows width"]:
        """Attend to the caption tokens; `layout` as in `CrossAttention`."""
        tokens = tokens + self.attention(self.attention_norm(tokens), caption_tokens, layout=layout)
        return tokens + self.feed_forward(self.feed_forward_norm(tokens))


class Stack(nn.ModuleList, Generic[Block]):
    """A list of blocks; their owner calls them."""

    def __iter__(self) -> Iterator[Block]:
        return cast(Iterator[Block], super().__iter__())

    def initialise(self) -> None:
        """Initialise the blocks for a residual stream as deep as the stack."""
        for block in self:
            block.initialise(depth=len(self))
