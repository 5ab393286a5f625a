"""The text side: a unimodal encoder with a class token, and a multimodal decoder on top of its token states."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import embedding, layer_norm, pad

from contracap.config import require_positive
from contracap.model.cache import Memory, Projected, Step, Unprojected
from contracap.model.layout import GRID, Grid, Packed, pack, share, unpacked
from contracap.model.linear import Linear
from contracap.model.transformer import CrossBlock, SelfBlock, Stack
from contracap.tokenizer import lengths

ClsMask = Literal["legacy", "correct"]


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes of the text encoder.

    Attributes:
        context: longest text in tokens, start and end included; the class token comes on top.
        vocab_size: tokens of the tokenizer; the last two are start and end.
        pool: where the contrastive vector is read: at a class token after the text (CoCa), or at the end token (CLIP).
        cls_mask: what the class token sees. `correct`: the text and itself. `legacy`, as the released weights were
            trained: the text, the first fill token after it, and itself only if the text fills the context.
    """

    context: int = 76
    vocab_size: int = 49408
    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0
    pool: Literal["class_token", "end_token"] = "class_token"
    cls_mask: ClsMask = "correct"

    def __post_init__(self) -> None:
        require_positive(self, "context", "vocab_size", "width", "layers", "heads", "mlp_ratio")
        if self.width % self.heads:
            raise ValueError(f"text width {self.width} is not a multiple of its {self.heads} heads")

    @property
    def end(self) -> int:
        """Id of the end token."""
        return self.vocab_size - 1


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of the text decoder: `layers` self-attention blocks, each followed by a cross-attention block."""

    layers: int
    heads: int
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        require_positive(self, "layers", "heads", "mlp_ratio")


class TextEncoder(nn.Module):
    """Causal transformer over the text; a class token behind the text reads it for the contrastive vector.

    No token sees the class token, so the token states are those of a plain causal language model, and can be cached.
    Attributes:
        packs: whether texts are packed, without fill; else each takes the rows of one that fills the context.

    Source: CoCa (arXiv 2205.01917), section 3.2, decoupled text decoder; initial values as CLIP's text tower.
    """

    def __init__(self, config: TextConfig, *, embed_dim: int):
        super().__init__()
        self.config = config
        self.packs = True
        has_class_token = config.pool == "class_token"
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.class_token = nn.Parameter(torch.empty(config.width)) if has_class_token else None
        self.position = nn.Parameter(torch.empty(config.context + has_class_token, config.width))
        self.blocks = Stack(SelfBlock(config.width, config.heads, config.mlp_ratio) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.width)
        self.projection = Linear(config.width, embed_dim, bias=False)

    def initialise(self) -> None:
        """Fill what the encoder owns."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=0.01)
        self.blocks.initialise()
        self.norm_out.reset_parameters()
        nn.init.normal_(self.projection.weight, std=self.config.width**-0.5)

    def lengths(self, ids: Int64[Tensor, "batch tokens"]) -> Int64[Tensor, "batch"]:
        """Tokens of each text, start and end included; on the CPU, where shapes are made of them.

        Raises: ValueError: if a text is longer than the context.
        """
        counted = lengths(ids, self.config.end).cpu()
        if (longest := int(counted.max())) > self.config.context:
            raise ValueError(
                f"a text has {longest} tokens; this model takes {self.config.context}, start and end included"
            )
        return counted

    def layout(self, ids: Int64[Tensor, "batch tokens"], *, shares: bool = False) -> Packed:
        """The rows of each text: its tokens, with `legacy` one fill token, then the class token.

        Args:
            shares: texts that begin alike share the rows of that beginning; not for states that differ by picture.

        Raises: ValueError: if a text is longer than the context.
        """
        tokens = rows = self.lengths(ids)
        if self.class_token is not None:
            if self.config.cls_mask == "legacy":
                rows = (rows + 1).clamp(max=self.config.context)
            rows = rows + 1
        if shares and self.packs:
            return share(ids.cpu(), tokens, rows, device=ids.device)
        return self.pack(rows, columns=len(self.position), device=ids.device)

    def pack(self, rows: Int64[Tensor, "batch"], *, columns: int, device: torch.device) -> Packed:
        """The layout of texts with so many rows each; `columns` are those of a text that fills the context."""
        return pack(rows, device=device) if self.packs else unpacked(rows, columns=columns, device=device)

    def embed(
        self, ids: Int64[Tensor, "batch column"], layout: Grid, positions: Int64[Tensor, "column"] | None = None
    ) -> Float[Tensor, "*rows width"]:
        """Token and position; the columns' `positions` are 0, 1, 2 and so on, if not given."""
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        positions = layout.collect(positions.expand_as(ids))
        return self.token_embedding(layout.collect(ids)) + embedding(positions, self.position)

    def token_states(self, ids: Int64[Tensor, "batch column"], layout: Grid = GRID) -> Float[Tensor, "*rows width"]:
        """States of the tokens, not normalised, without a class token."""
        states = self.embed(ids, layout)
        for block in self.blocks:
            states = block(states, layout=layout, causal=True)
        return states

    def next_states(self, ids: Int64[Tensor, "images column"], step: Step) -> Float[Tensor, "images column width"]:
        """States of tokens that follow others."""
        states = self.embed(ids, GRID, step.positions)
        for block, cache in zip(self.blocks, step.text, strict=True):
            states = block(states, causal=step.causal, mask=step.mask, cache=cache)
        return states

    def forward(
        self, ids: Int64[Tensor, "batch tokens"], layout: Packed
    ) -> tuple[Float[Tensor, "batch embed"], Float[Tensor, "rows width"]]:
        """Contrastive vector, not of unit length, and states of all rows of `layout`, which is that of `ids`."""
        behind = torch.arange(ids.shape[1], device=ids.device) >= lengths(ids, self.config.end)[:, None]
        ids = layout.fit(ids.masked_fill(behind, 0), fill=0)
        states, mask = self.embed(ids, layout), self.mask(ids, layout)
        if self.class_token is not None:
            last = repeat(self.class_token + self.position[-1], "width -> batch width", batch=len(ids))
            states = states.index_copy(0, layout.ends, last.to(states.dtype))
        for block in self.blocks:
            states = block(states, layout=layout, causal=mask is None, mask=mask)
        return self.projection(self.norm_out(states.index_select(0, layout.ends))), states

    def mask(self, ids: Int64[Tensor, "batch column"], layout: Packed) -> Bool[Tensor, "batch 1 column column"] | None:
        """What each row sees; None if that is what comes before it and itself. See `TextConfig.cls_mask`."""
        if self.class_token is None or self.config.cls_mask == "correct":
            return None
        # The release tested the id before each key, so that the class token sees one fill token, and not itself: the
        # fill id 0 hides a key one place late. See docs/decisions/0003-cls-mask.md.
        shown = pad(ids != 0, (1, -1), value=True)
        column = torch.arange(layout.columns, device=ids.device)
        is_class = column == layout.lengths[:, None] - 1
        seen = (column <= column[:, None]) & (shown[:, None, :] | ~is_class[:, :, None])
        return seen[:, None]


class TextDecoder(nn.Module):
    """Multimodal half of the text side: token states attend to themselves and, layer by layer, to the caption tokens.

    Deviation from the paper, as in the released models: each cross-attention is a block with a feed-forward of its own.
    """

    def __init__(self, config: DecoderConfig, *, width: int, vocab_size: int):
        super().__init__()
        self.config = config
        self.self_blocks = Stack(SelfBlock(width, config.heads, config.mlp_ratio) for _ in range(config.layers))
        self.cross_blocks = Stack(CrossBlock(width, config.heads, config.mlp_ratio) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(width)
        self.vocabulary = Linear(width, vocab_size, bias=False)

    def initialise(self) -> None:
        """Fill what the decoder owns, the vocabulary matrix by N(0, 1 / width)."""
        self.self_blocks.initialise()
        self.cross_blocks.initialise()
        self.norm_out.reset_parameters()
        nn.init.normal_(self.vocabulary.weight, std=self.vocabulary.in_features**-0.5)

    def project(self, caption_tokens: Float[Tensor, "images memory width"]) -> list[Projected]:
        """Each cross-attention's keys and values of the caption tokens, for as many passes as are to come."""
        return [block.project(caption_tokens) for block in self.cross_blocks]

    def memory(self, caption_tokens: Float[Tensor, "images memory width"], *, columns: int) -> list[Memory]:
        """What each cross-attention reads in one pass over texts of so many columns: keys and values, or the caption
        tokens themselves. See `CrossAttention`."""
        first = next(iter(self.cross_blocks))
        if not first.attention.absorbs(queries=columns, memory=caption_tokens.shape[1]):
            return list(self.project(caption_tokens))
        tokens = layer_norm(caption_tokens, caption_tokens.shape[-1:], eps=first.memory_norm.eps)
        return [Unprojected(tokens, block.memory_norm) for block in self.cross_blocks]

    def forward(
        self,
        states: Float[Tensor, "*rows width"],
        memory: Sequence[Memory],
        layout: Grid = GRID,
        step: Step | None = None,
    ) -> Float[Tensor, "*rows width"]:
        """Normalised states, which `vocabulary` turns into logits.

        Args:
            states: as `token_states`, or with a `step` `next_states`, makes them.
            memory: as `memory` or `project` makes it.
        """
        caches = step.decoder if step else [None] * len(self.self_blocks)
        causal, mask = (step.causal, step.mask) if step else (True, None)
        for self_block, cross_block, read, cache in zip(
            self.self_blocks, self.cross_blocks, memory, caches, strict=True
        ):
            states = self_block(states, layout=layout, causal=causal, mask=mask, cache=cache)
            states = cross_block(states, read, layout=layout)
        return self.norm_out(states)
