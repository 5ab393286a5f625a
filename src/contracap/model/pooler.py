"""Attentional pooling: learned queries turn image tokens into the contrastive embedding and the caption tokens."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from contracap.config import require_positive
from contracap.model.attention import CrossAttention
from contracap.model.cache import NormalisedTokens


@dataclass(frozen=True, kw_only=True)
class PoolerConfig:
    """Pooling of image tokens to one contrastive embedding and a sequence of caption tokens."""

    kind: Literal["shared", "cascade", "parallel", "class_token", "mean", "mean_of_patches"] = "shared"
    """`shared`: one pooler whose query 0 is contrastive and whose other queries are the caption tokens (the
    released layout). `cascade`: a contrastive query on top of all caption tokens (the paper's). `parallel`: a
    contrastive query next to them (the paper's). `class_token`: no queries, CLIP's vector, and the patches are the
    caption tokens (open_clip's `coca_base`). `mean`: no queries, the mean of all image tokens, which are the caption
    tokens too (MaMMUT); `mean_of_patches` leaves out the class token."""
    queries: int = 256
    """Learned queries; in a `shared` pooler the contrastive one is among them."""
    heads: int = 8
    """Attention heads."""
    adds_positions: bool = False
    """Add learned positions to the normalised image tokens before they are pooled to caption tokens. Positions help a
    small model to tell which of two objects is where; the released models have none. See
    docs/decisions/0005-positions-in-the-pooler.md."""

    def __post_init__(self) -> None:
        require_positive(self, "heads")
        least = {"shared": 2, "cascade": 1, "parallel": 1}.get(self.kind, 0)
        if self.queries < least:
            raise ValueError(f"pooler.queries is {self.queries}: a {self.kind} pooler needs at least {least}")
        if self.adds_positions and not self.has_queries:
            raise ValueError(
                f"pooler.adds_positions is true, but a {self.kind} pooler has no queries to read them: set it to false"
            )

    @property
    def has_queries(self) -> bool:
        """True if learned queries attend to the image tokens."""
        return self.kind in ("shared", "cascade", "parallel")


class AttentionalPool(nn.Module):
    """Learned queries attend to a memory once, without residual connection or feed-forward.

    Args:
        positions: number of learned positions, one per row of the memory; None for none. Deviation from DETR (arXiv
            2005.12872), which adds positions to the keys alone: here they are added to the values too.

    Source: Set Transformer (arXiv 1810.00825).
    """

    def __init__(self, width: int, *, queries: int, heads: int, memory_width: int, positions: int | None = None):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(queries, width))
        self.query_norm = nn.LayerNorm(width)
        self.memory_norm = nn.LayerNorm(memory_width)
        self.attention = CrossAttention(width, heads, memory_width=memory_width)
        self.position = nn.Parameter(torch.empty(positions, memory_width)) if positions is not None else None

    def initialise(self) -> None:
        """Initialise the parameters; with positions, query i starts by attending to position i.

        Source: docs/decisions/0005-positions-in-the-pooler.md.
        """
        nn.init.normal_(self.queries)
        self.query_norm.reset_parameters()
        self.memory_norm.reset_parameters()
        self.attention.initialise(depth=1)
        if self.position is not None:
            nn.init.normal_(self.position)
            key = self.attention.key_value.weight[: self.queries.shape[1]]
            with torch.no_grad():
                key.mul_(2)
                self.attention.query.weight.mul_(2)
                placed = self.position[: len(self.queries)] @ key.T @ self.attention.query.weight
                self.queries[: len(placed)].copy_(placed)

    def forward(
        self, memory: Float[Tensor, "batch memory memory_width"], selected: slice = slice(None)
    ) -> Float[Tensor, "batch query width"]:
        """Return the outputs of the selected queries, each of which is independent of the others."""
        queries = repeat(self.query_norm(self.queries[selected]), "query width -> batch query width", batch=len(memory))
        if self.position is None and self.attention.is_absorbed_cheaper(
            queries=queries.shape[1], memory=memory.shape[1]
        ):
            tokens = layer_norm(memory, memory.shape[-1:], eps=self.memory_norm.eps)
            return self.attention(queries, NormalisedTokens(tokens, self.memory_norm))
        memory = self.memory_norm(memory)
        return self.attention(
            queries, self.attention.project(memory if self.position is None else memory + self.position)
        )


class Pooler(nn.Module, ABC):
    """The interface of all poolers.

    Attributes:
        only_for_contrastive, only_for_captioning: names of the parts that only one of the losses reaches.
    """

    only_for_contrastive: tuple[str, ...] = ("projection",)
    only_for_captioning: tuple[str, ...] = ()

    @abstractmethod
    def initialise(self) -> None:
        """Initialise the parameters."""

    @abstractmethod
    def contrastive(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch embed"]:
        """Return the contrastive embedding alone, not of unit length."""

    @abstractmethod
    def caption_tokens(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch caption_token width"]:
        """Return the caption tokens alone, as wide as the decoder."""

    @abstractmethod
    def forward(
        self, tokens: Float[Tensor, "batch token dim"]
    ) -> tuple[Float[Tensor, "batch embed"], Float[Tensor, "batch caption_token width"]]:
        """Return the contrastive embedding and the caption tokens."""


class SharedPooler(Pooler):
    """One pool: query 0 is projected to the contrastive embedding, the outputs of the others are the caption tokens."""

    def __init__(self, config: PoolerConfig, *, embed_dim: int, vision_width: int, positions: int | None):
        super().__init__()
        self.pool = AttentionalPool(
            embed_dim,
            queries=config.queries,
            heads=config.heads,
            memory_width=vision_width,
            positions=positions,
        )
        self.norm_out = nn.LayerNorm(embed_dim)
        self.projection = nn.Linear(embed_dim, embed_dim, bias=False)

    def initialise(self) -> None:
        self.pool.initialise()
        self.norm_out.reset_parameters()
        nn.init.normal_(self.projection.weight, std=self.projection.in_features**-0.5)

    def contrastive(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch embed"]:
        """Return the contrastive embedding, using one query only."""
        return self.projection(self.norm_out(self.pool(tokens, slice(0, 1)))[:, 0])

    def caption_tokens(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch caption_token width"]:
        return self.norm_out(self.pool(tokens, slice(1, None)))

    def forward(
        self, tokens: Float[Tensor, "batch token dim"]
    ) -> tuple[Float[Tensor, "batch embed"], Float[Tensor, "batch caption_token width"]]:
        pooled = self.norm_out(self.pool(tokens))
        return self.projection(pooled[:, 0]), pooled[:, 1:]


class TwoPoolers(Pooler):
    """The poolers of the paper: one for the caption tokens, and one with a single query for the contrastive embedding.

    In a cascade, that query reads the caption tokens; in parallel, it reads the image tokens. Image tokens are
    normalised before the pools, and there is no projection after them.

    Source: CoCa (arXiv 2205.01917), section 3.2, attentional poolers.
    """

    def __init__(self, config: PoolerConfig, *, embed_dim: int, vision_width: int, positions: int | None):
        super().__init__()
        self.cascade = config.kind == "cascade"
        self.only_for_contrastive = ("contrastive_pool",)
        self.only_for_captioning = () if self.cascade else ("caption_pool",)
        self.norm_in = nn.LayerNorm(vision_width)
        self.caption_pool = AttentionalPool(
            embed_dim,
            queries=config.queries,
            heads=config.heads,
            memory_width=vision_width,
            positions=positions,
        )
        self.contrastive_pool = AttentionalPool(
            embed_dim, queries=1, heads=config.heads, memory_width=embed_dim if self.cascade else vision_width
        )

    def initialise(self) -> None:
        self.norm_in.reset_parameters()
        self.caption_pool.initialise()
        self.contrastive_pool.initialise()

    def contrastive(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch embed"]:
        """Return the contrastive embedding alone, for which a cascade must pool the caption tokens first."""
        tokens = self.norm_in(tokens)
        return self.contrastive_pool(self.caption_pool(tokens) if self.cascade else tokens)[:, 0]

    def caption_tokens(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch caption_token width"]:
        return self.caption_pool(self.norm_in(tokens))

    def forward(
        self, tokens: Float[Tensor, "batch token dim"]
    ) -> tuple[Float[Tensor, "batch embed"], Float[Tensor, "batch caption_token width"]]:
        tokens = self.norm_in(tokens)
        caption_tokens = self.caption_pool(tokens)
        return self.contrastive_pool(caption_tokens if self.cascade else tokens)[:, 0], caption_tokens


class ClassTokenPooler(Pooler):
    """The pooler of CLIP: the class token, normalised and projected. The caption tokens are the normalised patches.

    Source: CLIP (arXiv 2103.00020), laid out as open_clip, whose `coca_base` has a decoder that reads the patches.
    """

    first = 1  # the first image token among the caption tokens

    def __init__(self, *, embed_dim: int, vision_width: int):
        super().__init__()
        self.norm_out = nn.LayerNorm(vision_width)
        self.projection = nn.Linear(vision_width, embed_dim, bias=False)

    def initialise(self) -> None:
        self.norm_out.reset_parameters()
        nn.init.normal_(self.projection.weight, std=self.projection.in_features**-0.5)

    def contrastive(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch embed"]:
        return self.projection(self.norm_out(tokens[:, 0]))

    def caption_tokens(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch patch dim"]:
        return self.norm_out(tokens[:, 1:])

    def forward(
        self, tokens: Float[Tensor, "batch token dim"]
    ) -> tuple[Float[Tensor, "batch embed"], Float[Tensor, "batch patch dim"]]:
        return self.contrastive(tokens), self.caption_tokens(tokens)


class MeanPooler(Pooler):
    """The pooler of MaMMUT: the mean of the image tokens, normalised and projected. The caption tokens are the image
    tokens, projected.

    Args:
        first: the first image token that counts: 0 for all of them, 1 for the patches alone.

    Source: MaMMUT (arXiv 2303.16839), section 3, laid out as openMaMMUT.
    """

    only_for_contrastive = ("norm_out", "projection")
    only_for_captioning = ("caption_projection",)

    def __init__(self, *, embed_dim: int, vision_width: int, first: int):
        super().__init__()
        self.first = first
        self.norm_out = nn.LayerNorm(vision_width)
        self.projection = nn.Linear(vision_width, embed_dim, bias=False)
        self.caption_projection = nn.Linear(vision_width, embed_dim, bias=False)

    def initialise(self) -> None:
        self.norm_out.reset_parameters()
        for linear in (self.projection, self.caption_projection):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def contrastive(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch embed"]:
        return self.projection(self.norm_out(tokens[:, self.first :].mean(dim=1)))

    def caption_tokens(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch caption_token width"]:
        return self.caption_projection(tokens[:, self.first :])

    def forward(
        self, tokens: Float[Tensor, "batch token dim"]
    ) -> tuple[Float[Tensor, "batch embed"], Float[Tensor, "batch caption_token width"]]:
        return self.contrastive(tokens), self.caption_tokens(tokens)


def build_pooler(config: PoolerConfig, *, embed_dim: int, vision_width: int, image_tokens: int) -> Pooler:
    """Return a pooler of `config.kind` for images of `image_tokens` tokens."""
    if config.kind == "class_token":
        return ClassTokenPooler(embed_dim=embed_dim, vision_width=vision_width)
    if config.kind in ("mean", "mean_of_patches"):
        return MeanPooler(embed_dim=embed_dim, vision_width=vision_width, first=int(config.kind == "mean_of_patches"))
    pooler = SharedPooler if config.kind == "shared" else TwoPoolers
    positions = image_tokens if config.adds_positions else None
    return pooler(config, embed_dim=embed_dim, vision_width=vision_width, positions=positions)
