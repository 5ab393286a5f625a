"""Text encoder and text decoder: a unimodal encoder, and a multimodal decoder on top of its token states."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from contracap.config import require_positive
from contracap.model.cache import DecodingStep, KeysValues, Memory, NormalisedTokens
from contracap.model.packing import GRID, Layout, Packed, pack, pack_shared_prefixes
from contracap.model.transformer import Activation, CrossAttentionBlock, Stack, TransformerBlock
from contracap.tokenizer import Lengths, text_lengths

IGNORED = -100  # a label that the captioning loss ignores, like all negative ones
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
    activation: Activation = "gelu"
    """Of the text encoder and the decoder; `quick_gelu` for OpenAI's CLIP and the models trained after it."""
    pool: Literal["class_token", "end_token", "mean", "mean_with_padding"] = "class_token"
    """Where the contrastive embedding is read: at a class token after the text (CoCa), at the end token (CLIP), or as
    the mean of all tokens (MaMMUT), which see each other. With `mean_with_padding`, of openMaMMUT, every text is padded
    to the context, and the padding counts as tokens."""
    cls_mask: ClsMask = "correct"
    """What the class token attends to. `correct`: the text and itself. `legacy`, with which the released weights were
    trained: the text, the first padding token after it, and itself only if the text fills the context."""

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
    """Sizes of the text decoder: self-attention blocks with cross-attention blocks between them."""

    layers: int
    """Self-attention blocks."""
    heads: int
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward layers, relative to the text width."""
    shares_blocks: bool = False
    """The self-attention blocks are those of the text encoder, which run a second time (MaMMUT)."""
    cross_every: int = 1
    """A cross-attention block follows every n-th self-attention block, beginning with the first."""
    feed_forward_before_cross: bool = True
    """False: self-attention blocks before a cross-attention block have no feed-forward of their own, in both of their
    passes (small MaMMUTs)."""

    def __post_init__(self) -> None:
        require_positive(self, "layers", "heads", "mlp_ratio", "cross_every")
        if self.layers % self.cross_every:
            raise ValueError(
                f"decoder.layers {self.layers} is not a multiple of decoder.cross_every {self.cross_every}"
            )
        if not self.shares_blocks and (self.cross_every > 1 or not self.feed_forward_before_cross):
            raise ValueError("cross_every and feed_forward_before_cross are for a decoder that shares_blocks")

    @property
    def cross_layers(self) -> int:
        """Cross-attention blocks."""
        return self.layers // self.cross_every


@dataclass(frozen=True)
class TokenStates:
    """States of packed texts: one for each token except the last of each text, which has no next token.

    Attributes:
        states: [rows width]; padding rows come last.
        labels: [rows]; the next token, `IGNORED` for padding.
        layout: which row belongs to which text.
    """

    states: Float[Tensor, "rows width"]
    labels: Int64[Tensor, "rows"]
    layout: Packed


class TextEncoder(nn.Module):
    """Causal transformer over the text; a class token after the text gives the contrastive embedding.

    No token attends to the class token, so the token states are those of a causal language model and can be cached.
    Texts are packed: nothing is computed for padding. Their `lengths` (tokens, start and end included) come with the
    batch. If they are None, they are read from the ids, which waits for the device.

    Source: CoCa (arXiv 2205.01917), section 3.2, decoupled text decoder; initial values as CLIP's text tower.
    """

    def __init__(self, config: TextConfig, *, embed_dim: int):
        super().__init__()
        self.config = config
        has_class_token = config.pool == "class_token"
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.class_token = nn.Parameter(torch.empty(config.width)) if has_class_token else None
        self.position = nn.Parameter(torch.empty(config.context + has_class_token, config.width))
        self.blocks = Stack(
            TransformerBlock(config.width, config.heads, config.mlp_ratio, config.activation)
            for _ in range(config.layers)
        )
        self.norm_out = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, embed_dim, bias=False)

    def initialise(self) -> None:
        """Initialise the parameters."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=0.01)
        self.blocks.initialise()
        self.norm_out.reset_parameters()
        nn.init.normal_(self.projection.weight, std=self.config.width**-0.5)

    @property
    def only_for_contrastive(self) -> list[str]:
        """Name prefixes of the parameters that the captioning loss does not reach."""
        return ["norm_out", "projection", *(["class_token"] if self.class_token is not None else [])]

    @property
    def cached_layers(self) -> int:
        """Layers whose keys and values are cached in decoding."""
        return len(self.blocks)

    def forward(
        self, ids: Int64[Tensor, "batch position"], lengths: Lengths | None = None
    ) -> tuple[Float[Tensor, "batch embed"], TokenStates]:
        """Return the contrastive embedding, not of unit length, and the token states that the decoder reads.

        Raises: ValueError: if a text is longer than the context.
        """
        lengths = self.checked_lengths(ids, lengths)
        layout, caption_layout = self.layout(ids, lengths), self.caption_layout(ids, lengths)
        states = self.states(ids, layout)
        token_states = caption_layout.unpad(layout.pad(states)[:, : caption_layout.columns])
        return self.project(states, layout), TokenStates(token_states, next_tokens(ids, caption_layout), caption_layout)

    def contrastive(
        self, ids: Int64[Tensor, "batch position"], lengths: Lengths | None = None, *, share_prefixes: bool = False
    ) -> Float[Tensor, "batch embed"]:
        """Return the contrastive embedding alone. `share_prefixes`: compute common prefixes of texts once."""
        layout = self.layout(ids, self.checked_lengths(ids, lengths), share_prefixes=share_prefixes)
        return self.project(self.states(ids, layout), layout)

    def token_states(self, ids: Int64[Tensor, "batch position"], lengths: Lengths | None = None) -> TokenStates:
        """Return the token states alone, which need no class token."""
        caption_layout = self.caption_layout(ids, self.checked_lengths(ids, lengths))
        states = self.embed(caption_layout.fit(ids, padding=0), caption_layout)
        for block in self.blocks:
            states = block(states, layout=caption_layout, causal=True)
        return TokenStates(states, next_tokens(ids, caption_layout), caption_layout)

    def next_states(
        self, ids: Int64[Tensor, "batch position"], step: DecodingStep
    ) -> Float[Tensor, "batch position width"]:
        """Return the states of tokens that follow those in the caches of `step`."""
        states = self.embed(ids, GRID, step.positions)
        for block, cache in zip(self.blocks, step.text, strict=True):
            states = block(states, causal=step.causal, mask=step.mask, cache=cache)
        return states

    def checked_lengths(self, ids: Int64[Tensor, "batch position"], lengths: Lengths | None) -> Lengths:
        """Return the lengths, read from the ids if they are None.

        Raises: ValueError: if a text is longer than the context.
        """
        lengths = text_lengths(ids, self.config.end) if lengths is None else lengths
        if (longest := int(lengths.max())) > self.config.context:
            raise ValueError(
                f"a text has {longest} tokens; this model takes {self.config.context}, start and end included: "
                "shorten it"
            )
        return lengths

    def layout(self, ids: Int64[Tensor, "batch position"], lengths: Lengths, *, share_prefixes: bool = False) -> Packed:
        """Return the layout of each text's rows: its tokens, one padding token with `legacy`, then the class token."""
        rows = lengths
        if self.class_token is not None:
            rows = (lengths + 1).clip(max=self.config.context) if self.config.cls_mask == "legacy" else lengths
            rows = rows + 1
        if share_prefixes:
            return pack_shared_prefixes(ids.cpu().numpy(), lengths, rows, device=ids.device)
        return pack(lengths, rows, device=ids.device)

    def caption_layout(self, ids: Int64[Tensor, "batch position"], lengths: Lengths) -> Packed:
        """Return the layout of the rows that predict a next token: all tokens of each text except the last."""
        return pack(lengths - 1, lengths - 1, device=ids.device)

    def embed(
        self, ids: Int64[Tensor, "batch column"], layout: Layout, positions: Int64[Tensor, "column"] | None = None
    ) -> Float[Tensor, "*rows width"]:
        """Return the sum of token and position embeddings; `positions` default to 0, 1, 2 and so on."""
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        positions = layout.unpad(positions.expand_as(ids))
        return self.token_embedding(layout.unpad(ids)) + functional.embedding(positions, self.position)

    def states(self, ids: Int64[Tensor, "batch position"], layout: Packed) -> Float[Tensor, "rows width"]:
        """Return the states of all rows of `layout`, including the class token's."""
        ids = layout.fit(ids, padding=0)
        states, mask = self.embed(ids, layout), self.mask(ids, layout)
        if self.class_token is not None:
            last = repeat(self.class_token + self.position[-1], "width -> batch width", batch=len(ids))
            states = states.index_copy(0, layout.last_rows, last.to(states.dtype))
        for block in self.blocks:
            states = block(states, layout=layout, causal=mask is None, mask=mask)
        return states

    def project(self, states: Float[Tensor, "rows width"], layout: Packed) -> Float[Tensor, "batch embed"]:
        """Return the contrastive embedding, read at the last row of each text."""
        return self.projection(self.norm_out(states.index_select(0, layout.last_rows)))

    def mask(self, ids: Int64[Tensor, "batch column"], layout: Packed) -> Bool[Tensor, "batch 1 column column"] | None:
        """Return the attention mask, or None if attention is plainly causal. See `TextConfig.cls_mask`."""
        if self.class_token is None or self.config.cls_mask == "correct":
            return None
        # The release tested the id before each key, so the padding id 0 hides a key one position late: the class token
        # attends to one padding token, and not to itself. See docs/decisions/0003-cls-mask.md.
        shown = functional.pad(ids != 0, (1, -1), value=True)
        column = torch.arange(layout.columns, device=ids.device)
        is_class = column == layout.lengths[:, None] - 1
        seen = (column <= column[:, None]) & (shown[:, None, :] | ~is_class[:, :, None])
        return seen[:, None]


def next_tokens(ids: Int64[Tensor, "batch position"], caption_layout: Packed) -> Int64[Tensor, "rows"]:
    """Return the token after each row's, `IGNORED` for padding."""
    return caption_layout.unpad(caption_layout.fit(ids[:, 1:], padding=IGNORED))


class TextDecoder(nn.Module):
    """Multimodal decoder: self-attention over the token states, and cross-attention to the caption tokens, by turns.

    Deviation from the paper, as in the released models: each cross-attention block has its own feed-forward.
    """

    def __init__(self, config: DecoderConfig, text: TextConfig):
        super().__init__()
        self.config, self.context, width = config, text.context, text.width
        block = width, config.heads, config.mlp_ratio, text.activation
        self.self_blocks = Stack(TransformerBlock(*block) for _ in range(config.layers))
        self.cross_blocks = Stack(CrossAttentionBlock(*block) for _ in range(config.cross_layers))
        self.norm_out = nn.LayerNorm(width)
        self.vocabulary = nn.Linear(width, text.vocab_size, bias=False)

    def initialise(self) -> None:
        """Initialise the parameters, the vocabulary matrix from N(0, 1 / width)."""
        self.self_blocks.initialise()
        self.cross_blocks.initialise()
        self.norm_out.reset_parameters()
        nn.init.normal_(self.vocabulary.weight, std=self.vocabulary.in_features**-0.5)

    def forward(
        self, token_states: TokenStates, caption_tokens: Float[Tensor, "batch caption_token width"]
    ) -> TokenStates:
        """Return normalised states of the same rows, from which `vocabulary` computes logits."""
        layout = token_states.layout
        states = token_states.states
        prepared = self.prepare(caption_tokens, columns=layout.columns)
        for number, block in enumerate(self.self_blocks):
            states = block(states, layout=layout, causal=True)
            if number % self.config.cross_every == 0:
                cross = number // self.config.cross_every
                states = self.cross_blocks[cross](states, prepared[cross], layout=layout)
        return replace(token_states, states=self.norm_out(states))

    def next_states(
        self, states: Float[Tensor, "batch position width"], projected: Sequence[KeysValues], step: DecodingStep
    ) -> Float[Tensor, "batch position width"]:
        """Return the states of tokens that follow those in the caches of `step`."""
        for number, (block, cache) in enumerate(zip(self.self_blocks, step.decoder, strict=True)):
            states = block(states, causal=step.causal, mask=step.mask, cache=cache)
            if number % self.config.cross_every == 0:
                cross = number // self.config.cross_every
                states = self.cross_blocks[cross](states, projected[cross])
        return self.norm_out(states)

    def logits(self, caption_states: TokenStates) -> Float[Tensor, "batch position vocab"]:
        """Return logits for all positions of the context except the last; row i scores token i + 1."""
        scores = caption_states.layout.pad(self.vocabulary(caption_states.states.to(self.vocabulary.weight.dtype)))
        return functional.pad(scores, (0, 0, 0, self.context - 1 - scores.shape[1]))

    def project(self, caption_tokens: Float[Tensor, "batch caption_token width"]) -> list[KeysValues]:
        """Return the keys and values of the caption tokens in each cross-attention layer, for many decoding steps."""
        return [block.project(caption_tokens) for block in self.cross_blocks]

    def prepare(self, caption_tokens: Float[Tensor, "batch caption_token width"], *, columns: int) -> list[Memory]:
        """Return what each cross-attention layer reads in one pass over texts of this many columns.

        It is keys and values, or the caption tokens themselves: see `CrossAttention`.
        """
        first = next(iter(self.cross_blocks))
        if not first.attention.is_absorbed_cheaper(queries=columns, memory=caption_tokens.shape[1]):
            return list(self.project(caption_tokens))
        tokens = functional.layer_norm(caption_tokens, caption_tokens.shape[-1:], eps=first.memory_norm.eps)
        return [NormalisedTokens(tokens, block.memory_norm) for block in self.cross_blocks]
