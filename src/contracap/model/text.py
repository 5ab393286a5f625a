"""The text side: a unimodal encoder with a class token, and a multimodal decoder on top of its token states."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import embedding, layer_norm, pad

from contracap.config import require_positive
from contracap.model.cache import Memory, Projected, Step, Unprojected
from contracap.model.packing import GRID, Grid, Packed, pack, pack_sharing
from contracap.model.transformer import CrossBlock, SelfBlock, Stack
from contracap.tokenizer import Lengths, text_lengths

IGNORED = -100  # a label that the captioning loss leaves out, as it does every negative one
ClsMask = Literal["legacy", "correct"]


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes of the text encoder."""

    context: int = 76
    """Longest text in tokens, start and end token included; the class token is added to it."""
    vocab_size: int = 49408
    """Tokens of the tokenizer; the last two are start and end."""
    width: int
    """Channels of each token."""
    layers: int
    """Transformer blocks."""
    heads: int
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward layers, relative to `width`."""
    pool: Literal["class_token", "end_token"] = "class_token"
    """Where the contrastive vector is read: at a class token after the text (CoCa), or at the end token (CLIP)."""
    cls_mask: ClsMask = "correct"
    """What the class token sees. `correct`: the text and itself. `legacy`, as the released weights were trained:
    the text, the first padding token after it, and itself only if the text fills the context."""

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
    """Self-attention blocks, each followed by a cross-attention block."""
    heads: int
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward layers, relative to the text width."""

    def __post_init__(self) -> None:
        require_positive(self, "layers", "heads", "mlp_ratio")


@dataclass(frozen=True)
class TokenStates:
    """A state for every token of packed texts but each text's last one, which nothing follows.

    Attributes:
        states: [rows width]; the rows after the texts' are padding.
        labels: [rows]; the token that follows each, `IGNORED` for padding.
        layout: which row belongs to which text.
    """

    states: Float[Tensor, "rows width"]
    labels: Int64[Tensor, "rows"]
    layout: Packed


class TextEncoder(nn.Module):
    """Causal transformer over the text; a class token after the text reads it for the contrastive vector.

    No token sees the class token, so the token states are those of a plain causal language model, and can be cached.
    Texts are packed: no padding is computed. Their `lengths` (tokens, start and end included) come with the batch;
    where they are not given they are read from the ids, which waits for the device.

    Source: CoCa (arXiv 2205.01917), section 3.2, decoupled text decoder; initial values as CLIP's text tower.
    """

    def __init__(self, config: TextConfig, *, embed_dim: int):
        super().__init__()
        self.config = config
        has_class_token = config.pool == "class_token"
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.class_token = nn.Parameter(torch.empty(config.width)) if has_class_token else None
        self.position = nn.Parameter(torch.empty(config.context + has_class_token, config.width))
        self.blocks = Stack(SelfBlock(config.width, config.heads, config.mlp_ratio) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, embed_dim, bias=False)

    def initialise(self) -> None:
        """Fill what the encoder owns."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=0.01)
        self.blocks.initialise()
        self.norm_out.reset_parameters()
        nn.init.normal_(self.projection.weight, std=self.config.width**-0.5)

    def forward(
        self, ids: Int64[Tensor, "batch tokens"], lengths: Lengths | None = None
    ) -> tuple[Float[Tensor, "batch embed"], TokenStates]:
        """Contrastive vector, not of unit length, and the states that the decoder goes on from.

        Raises: ValueError: if a text is longer than the context.
        """
        lengths = self.checked_lengths(ids, lengths)
        layout, captions = self.layout(ids, lengths), self.caption_layout(ids, lengths)
        states = self.states(ids, layout)
        token_states = captions.unpad(layout.pad(states)[:, : captions.columns])
        return self.project(states, layout), TokenStates(token_states, next_tokens(ids, captions), captions)

    def contrastive(
        self, ids: Int64[Tensor, "batch tokens"], lengths: Lengths | None = None, *, sharing: bool = False
    ) -> Float[Tensor, "batch embed"]:
        """The contrastive vector alone. `sharing`: beginnings that texts have in common are computed once."""
        layout = self.layout(ids, self.checked_lengths(ids, lengths), sharing=sharing)
        return self.project(self.states(ids, layout), layout)

    def token_states(self, ids: Int64[Tensor, "batch tokens"], lengths: Lengths | None = None) -> TokenStates:
        """The token states alone, for which no class token is needed."""
        captions = self.caption_layout(ids, self.checked_lengths(ids, lengths))
        states = self.embed(captions.fit(ids, padding=0), captions)
        for block in self.blocks:
            states = block(states, layout=captions, causal=True)
        return TokenStates(states, next_tokens(ids, captions), captions)

    def next_states(self, ids: Int64[Tensor, "images column"], step: Step) -> Float[Tensor, "images column width"]:
        """States of tokens that follow those in the caches of `step`."""
        states = self.embed(ids, GRID, step.positions)
        for block, cache in zip(self.blocks, step.text, strict=True):
            states = block(states, causal=step.causal, mask=step.mask, cache=cache)
        return states

    def checked_lengths(self, ids: Int64[Tensor, "batch tokens"], lengths: Lengths | None) -> Lengths:
        """The lengths, read from the ids if they are not given.

        Raises: ValueError: if a text is longer than the context.
        """
        lengths = text_lengths(ids, self.config.end) if lengths is None else lengths
        if (longest := int(lengths.max())) > self.config.context:
            raise ValueError(
                f"a text has {longest} tokens; this model takes {self.config.context}, start and end included"
            )
        return lengths

    def layout(self, ids: Int64[Tensor, "batch tokens"], lengths: Lengths, *, sharing: bool = False) -> Packed:
        """The rows of each text: its tokens, with `legacy` one token of padding, then the class token."""
        rows = lengths
        if self.class_token is not None:
            rows = (lengths + 1).clip(max=self.config.context) if self.config.cls_mask == "legacy" else lengths
            rows = rows + 1
        if sharing:
            return pack_sharing(ids.cpu().numpy(), lengths, rows, device=ids.device)
        return pack(lengths, rows, device=ids.device)

    def caption_layout(self, ids: Int64[Tensor, "batch tokens"], lengths: Lengths) -> Packed:
        """The rows of each text that predict its next token: all tokens but the last."""
        return pack(lengths - 1, lengths - 1, device=ids.device)

    def embed(
        self, ids: Int64[Tensor, "batch column"], layout: Grid, positions: Int64[Tensor, "column"] | None = None
    ) -> Float[Tensor, "*rows width"]:
        """Token and position; the columns' `positions` are 0, 1, 2 and so on, if not given."""
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        positions = layout.unpad(positions.expand_as(ids))
        return self.token_embedding(layout.unpad(ids)) + embedding(positions, self.position)

    def states(self, ids: Int64[Tensor, "batch tokens"], layout: Packed) -> Float[Tensor, "rows width"]:
        """States of all rows of `layout`, the class token's included."""
        ids = layout.fit(ids, padding=0)
        states, mask = self.embed(ids, layout), self.mask(ids, layout)
        if self.class_token is not None:
            last = repeat(self.class_token + self.position[-1], "width -> batch width", batch=len(ids))
            states = states.index_copy(0, layout.last_rows, last.to(states.dtype))
        for block in self.blocks:
            states = block(states, layout=layout, causal=mask is None, mask=mask)
        return states

    def project(self, states: Float[Tensor, "rows width"], layout: Packed) -> Float[Tensor, "batch embed"]:
        """The contrastive vector, read at the last row of each text."""
        return self.projection(self.norm_out(states.index_select(0, layout.last_rows)))

    def mask(self, ids: Int64[Tensor, "batch column"], layout: Packed) -> Bool[Tensor, "batch 1 column column"] | None:
        """What each row sees; None if that is what comes before it and itself. See `TextConfig.cls_mask`."""
        if self.class_token is None or self.config.cls_mask == "correct":
            return None
        # The release tested the id before each key, so that the class token sees one token of padding, and not itself:
        # the padding id 0 hides a key one place late. See docs/decisions/0003-cls-mask.md.
        shown = pad(ids != 0, (1, -1), value=True)
        column = torch.arange(layout.columns, device=ids.device)
        is_class = column == layout.lengths[:, None] - 1
        seen = (column <= column[:, None]) & (shown[:, None, :] | ~is_class[:, :, None])
        return seen[:, None]


def next_tokens(ids: Int64[Tensor, "batch tokens"], captions: Packed) -> Int64[Tensor, "rows"]:
    """The token after each row's, `IGNORED` for padding."""
    return captions.unpad(captions.fit(ids[:, 1:], padding=IGNORED))


class TextDecoder(nn.Module):
    """Multimodal half of the text side: token states attend to themselves and, layer by layer, to the caption tokens.

    Deviation from the paper, as in the released models: each cross-attention is a block with a feed-forward of its own.
    """

    def __init__(self, config: DecoderConfig, text: TextConfig):
        super().__init__()
        self.config, self.context, width = config, text.context, text.width
        self.self_blocks = Stack(SelfBlock(width, config.heads, config.mlp_ratio) for _ in range(config.layers))
        self.cross_blocks = Stack(CrossBlock(width, config.heads, config.mlp_ratio) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(width)
        self.vocabulary = nn.Linear(width, text.vocab_size, bias=False)

    def initialise(self) -> None:
        """Fill what the decoder owns, the vocabulary matrix by N(0, 1 / width)."""
        self.self_blocks.initialise()
        self.cross_blocks.initialise()
        self.norm_out.reset_parameters()
        nn.init.normal_(self.vocabulary.weight, std=self.vocabulary.in_features**-0.5)

    def forward(self, token_states: TokenStates, caption_tokens: Float[Tensor, "images memory width"]) -> TokenStates:
        """The same rows, each now with the image in it, and normalised: `vocabulary` turns them into logits."""
        layout = token_states.layout
        states = token_states.states
        for self_block, cross_block, memory in zip(
            self.self_blocks, self.cross_blocks, self.memories(caption_tokens, layout.columns), strict=True
        ):
            states = self_block(states, layout=layout, causal=True)
            states = cross_block(states, memory, layout=layout)
        return replace(token_states, states=self.norm_out(states))

    def next_states(
        self, states: Float[Tensor, "images column width"], memories: Sequence[Projected], step: Step
    ) -> Float[Tensor, "images column width"]:
        """The same for tokens that follow those in the caches of `step`."""
        for self_block, cross_block, memory, cache in zip(
            self.self_blocks, self.cross_blocks, memories, step.decoder, strict=True
        ):
            states = self_block(states, causal=step.causal, mask=step.mask, cache=cache)
            states = cross_block(states, memory)
        return self.norm_out(states)

    def logits(self, captions: TokenStates) -> Float[Tensor, "batch positions vocabulary"]:
        """Scores on the grid of the whole context but its last position; row i scores token i + 1."""
        scores = captions.layout.pad(self.vocabulary(captions.states.to(self.vocabulary.weight.dtype)))
        return pad(scores, (0, 0, 0, self.context - 1 - scores.shape[1]))

    def project(self, caption_tokens: Float[Tensor, "images memory width"]) -> list[Projected]:
        """Each cross-attention's keys and values of the caption tokens, for as many passes as are to come."""
        return [block.project(caption_tokens) for block in self.cross_blocks]

    def memories(self, caption_tokens: Float[Tensor, "images memory width"], columns: int) -> list[Memory]:
        """What each cross-attention reads in one pass over texts of so many columns: keys and values, or the caption
        tokens themselves. See `CrossAttention`."""
        first = next(iter(self.cross_blocks))
        if not first.attention.absorbs(queries=columns, memory=caption_tokens.shape[1]):
            return list(self.project(caption_tokens))
        tokens = layer_norm(caption_tokens, caption_tokens.shape[-1:], eps=first.memory_norm.eps)
        return [Unprojected(tokens, block.memory_norm) for block in self.cross_blocks]
