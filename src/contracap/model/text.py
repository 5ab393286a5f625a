"""The text side: a unimodal encoder with a class token, and a multimodal decoder on top of its token states."""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from contracap.model.cache import LayerCache
from contracap.model.transformer import CrossBlock, SelfBlock, Stack
from contracap.tokenizer import lengths


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
    cls_mask: Literal["legacy", "correct"] = "correct"

    def __post_init__(self) -> None:
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


class TextEncoder(nn.Module):
    """Causal transformer over the text; a class token behind the text reads it for the contrastive vector.

    No token sees the class token, so the token states are those of a plain causal language model, and can be cached.
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

    def fit(self, ids: Int64[Tensor, "batch tokens"]) -> Int64[Tensor, "batch fitted"]:
        """Cut or fill `ids` to the columns that matter: the longest text and one fill token, at most the context.

        Raises: ValueError: if a text is longer than the context.
        """
        context = self.config.context
        longest = int(lengths(ids, self.config.end).max())
        if longest > context:
            raise ValueError(f"a text has {longest} tokens; this model takes {context}, start and end included")
        columns = min(context, longest + 1)
        return torch.nn.functional.pad(ids, (0, max(0, columns - ids.shape[1])))[:, :columns]

    def token_states(
        self, ids: Int64[Tensor, "rows token"], caches: list[LayerCache] | None = None
    ) -> Float[Tensor, "rows token width"]:
        """States of the tokens, not normalised, without a class token; with `caches`, `ids` follow what those hold."""
        first = caches[0].length if caches else 0
        states = self.token_embedding(ids) + self.position[first : first + ids.shape[1]]
        for index, block in enumerate(self.blocks):
            states = block(states, causal=True, cache=caches[index] if caches else None)
        return states

    def forward(
        self, ids: Int64[Tensor, "batch token"]
    ) -> tuple[Float[Tensor, "batch embed"], Float[Tensor, "batch token width"]]:
        """Contrastive vector, not of unit length, and token states of texts that were made to `fit`."""
        if self.class_token is None:
            states = self.token_states(ids)
            ends = repeat(lengths(ids, self.config.end) - 1, "batch -> batch 1 width", width=states.shape[2])
            return self.projection(self.norm_out(states.gather(1, ends)[:, 0])), states
        tokens = self.token_embedding(ids) + self.position[: ids.shape[1]]
        last = repeat(self.class_token + self.position[-1], "width -> batch 1 width", batch=len(ids))
        states = torch.cat([tokens, last.to(tokens.dtype)], dim=1)
        class_keys = self.class_keys(ids)
        for block in self.blocks:
            states = block(states, causal=True, class_keys=class_keys)
        return self.projection(self.norm_out(states[:, -1])), states[:, :-1]

    def class_keys(self, ids: Int64[Tensor, "batch token"]) -> Bool[Tensor, "batch keys"]:
        """Where the class token looks: one column per token, and the last for itself. See `TextConfig.cls_mask`."""
        tokens = ids.shape[1]
        if self.config.cls_mask == "correct":
            visible = torch.arange(tokens, device=ids.device) < lengths(ids, self.config.end)[:, None]
            return torch.nn.functional.pad(visible, (0, 1), value=True)
        # The release tested the id before each key, so that the fill id 0 hides a key one place late; see
        # docs/decisions/0003-cls-mask.md.
        visible = torch.nn.functional.pad(ids != 0, (1, 0), value=True)
        if tokens < self.config.context:
            visible[:, -1] = False
        return visible


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
        self.vocabulary = nn.Linear(width, vocab_size, bias=False)

    def initialise(self) -> None:
        """Fill what the decoder owns, the vocabulary matrix by N(0, 1 / width)."""
        self.self_blocks.initialise()
        self.cross_blocks.initialise()
        self.norm_out.reset_parameters()
        nn.init.normal_(self.vocabulary.weight, std=self.vocabulary.in_features**-0.5)

    def project(self, caption_tokens: Float[Tensor, "images memory width"]) -> list[tuple[Tensor, Tensor]]:
        """Each cross-attention's keys and values of the caption tokens, [images head memory dim]."""
        return [block.project(caption_tokens) for block in self.cross_blocks]

    def forward(
        self,
        states: Float[Tensor, "rows token width"],
        memory: list[tuple[Tensor, Tensor]],
        caches: list[LayerCache] | None = None,
    ) -> Float[Tensor, "rows token width"]:
        """Normalised states, which `vocabulary` turns into logits; arguments as `project` and `token_states` make
        them."""
        for index, (self_block, cross_block) in enumerate(zip(self.self_blocks, self.cross_blocks, strict=True)):
            states = self_block(states, causal=True, cache=caches[index] if caches else None)
            states = cross_block(states, *memory[index])
        return self.norm_out(states)
