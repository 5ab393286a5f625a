"""The pre-norm residual blocks that every tower is made of."""

from collections.abc import Iterator
from typing import Generic, TypeVar, cast

from jaxtyping import Bool, Float
from torch import Tensor, nn

from contracap.model.attention import CrossAttention, SelfAttention
from contracap.model.cache import LayerCache, Memory, Projected
from contracap.model.packing import GRID, Grid

Block = TypeVar("Block", "SelfBlock", "CrossBlock")


class FeedForward(nn.Module):
    """Two linear layers around an exact (erf) GELU."""

    def __init__(self, width: int, mlp_ratio: float):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.expand = nn.Linear(width, hidden)
        self.activation = nn.GELU()
        self.contract = nn.Linear(hidden, width)

    def initialise(self, *, depth: int) -> None:
        """Fill the weights for a residual stream that `depth` blocks add to. Source: model.text.TextEncoder."""
        width = self.expand.in_features
        self.expand.reset_parameters()
        self.contract.reset_parameters()
        nn.init.normal_(self.expand.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.contract.weight, std=(width * 2 * depth) ** -0.5)

    def forward(self, tokens: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        return self.contract(self.activation(self.expand(tokens)))


class SelfBlock(nn.Module):
    """Self-attention, then feed-forward, each on a normalised copy and added back."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, mlp_ratio)

    def initialise(self, *, depth: int) -> None:
        """Fill what the block owns; `depth` is the number of blocks in its stack."""
        self.attention_norm.reset_parameters()
        self.attention.initialise(depth=depth)
        self.feed_forward_norm.reset_parameters()
        self.feed_forward.initialise(depth=depth)

    def forward(
        self,
        tokens: Float[Tensor, "*rows width"],
        *,
        layout: Grid = GRID,
        causal: bool = False,
        mask: Bool[Tensor, "batch 1 query key"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "*rows width"]:
        """Arguments as in `SelfAttention`."""
        tokens = tokens + self.attention(
            self.attention_norm(tokens), layout=layout, causal=causal, mask=mask, cache=cache
        )
        return tokens + self.feed_forward(self.feed_forward_norm(tokens))


class CrossBlock(nn.Module):
    """Cross-attention to the caption tokens, then a feed-forward of its own: a whole residual block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.memory_norm = nn.LayerNorm(width)
        self.attention = CrossAttention(width, heads, memory_width=width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, mlp_ratio)

    def initialise(self, *, depth: int) -> None:
        """Fill what the block owns; `depth` is the number of blocks in its stack."""
        for norm in (self.attention_norm, self.memory_norm, self.feed_forward_norm):
            norm.reset_parameters()
        self.attention.initialise(depth=depth)
        self.feed_forward.initialise(depth=depth)

    def project(self, memory: Float[Tensor, "images memory width"]) -> Projected:
        """This layer's keys and values of the caption tokens."""
        return self.attention.project(self.memory_norm(memory))

    def forward(
        self, tokens: Float[Tensor, "*rows width"], memory: Memory, *, layout: Grid = GRID
    ) -> Float[Tensor, "*rows width"]:
        """Arguments as in `CrossAttention`."""
        tokens = tokens + self.attention(self.attention_norm(tokens), memory, layout=layout)
        return tokens + self.feed_forward(self.feed_forward_norm(tokens))


class Stack(nn.ModuleList, Generic[Block]):
    """Blocks in their order; whoever owns them says how they are run."""

    def __iter__(self) -> Iterator[Block]:
        return cast(Iterator[Block], super().__iter__())

    def initialise(self) -> None:
        """Fill what the blocks own, for a residual stream as deep as the stack."""
        for block in self:
            block.initialise(depth=len(self))
