"""The text side of MaMMUT: one stack of blocks that reads a text in two ways.

The contrastive pass lets all tokens see each other, and averages them. The captioning pass is causal, and a
cross-attention block follows every n-th block.

Source: MaMMUT (arXiv 2303.16839), section 3, laid out as openMaMMUT (arXiv 2506.04598).
"""

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from contracap.model.cache import DecodingStep
from contracap.model.packing import GRID, pack
from contracap.model.text import DecoderConfig, TextConfig, TextDecoder, TextEncoder, TokenStates, next_tokens
from contracap.model.transformer import CrossAttentionBlock, SelfAttentionBlock, Stack, TransformerBlock
from contracap.tokenizer import Lengths


class MammutTextEncoder(TextEncoder):
    """Token embeddings, the stack, and its contrastive pass. The captioning pass, `MammutTextDecoder`, starts from the
    token embeddings. It has no projection: embeddings are as wide as the stack."""

    def __init__(self, config: TextConfig, decoder: DecoderConfig):
        super().__init__(config, embed_dim=config.width)
        del self.projection
        block = config.width, config.heads, config.mlp_ratio, config.activation
        self.blocks = Stack[SelfAttentionBlock](
            TransformerBlock(*block)
            if decoder.feed_forward_before_cross or layer % decoder.cross_every
            else SelfAttentionBlock(config.width, config.heads)
            for layer in range(config.layers)
        )

    def initialise(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)
        self.blocks.initialise()
        self.norm_out.reset_parameters()

    @property
    def only_for_contrastive(self) -> list[str]:
        return []

    @property
    def cached_layers(self) -> int:
        return 0

    def forward(
        self, ids: Int64[Tensor, "batch position"], lengths: Lengths | None = None
    ) -> tuple[Float[Tensor, "batch embed"], TokenStates]:
        lengths = self.checked_lengths(ids, lengths)
        return self.contrastive(ids, lengths), self.token_states(ids, lengths)

    def contrastive(
        self, ids: Int64[Tensor, "batch position"], lengths: Lengths | None = None, *, share_prefixes: bool = False
    ) -> Float[Tensor, "batch embed"]:
        """Return the contrastive embedding alone. `share_prefixes` is ignored: each token depends on all others."""
        lengths = self.checked_lengths(ids, lengths)
        if self.config.pool == "mean":
            return self.mean_of_tokens(ids, lengths)
        ids = pack(lengths, lengths, device=ids.device).fit(ids, padding=0)
        states = self.embed(functional.pad(ids, (0, self.config.context - ids.shape[1])), GRID)
        for block in self.blocks:
            states = block(states)
        return self.norm_out(states).mean(dim=1)

    def mean_of_tokens(self, ids: Int64[Tensor, "batch position"], lengths: Lengths) -> Float[Tensor, "batch embed"]:
        """Return the mean of the text's own tokens, which see no padding."""
        layout = pack(lengths, lengths, device=ids.device)
        is_token = torch.arange(layout.columns, device=ids.device) < layout.lengths[:, None]
        mask = repeat(is_token, "batch key -> batch 1 query key", query=layout.columns)
        states = self.embed(layout.fit(ids, padding=0), layout)
        for block in self.blocks:
            states = block(states, layout=layout, mask=mask)
        states = layout.pad(self.norm_out(states)) * rearrange(is_token, "batch column -> batch column 1")
        return states.sum(dim=1) / layout.lengths[:, None]

    def token_states(self, ids: Int64[Tensor, "batch position"], lengths: Lengths | None = None) -> TokenStates:
        """Return the token embeddings, from which the captioning pass starts."""
        caption_layout = self.caption_layout(ids, self.checked_lengths(ids, lengths))
        states = self.embed(caption_layout.fit(ids, padding=0), caption_layout)
        return TokenStates(states, next_tokens(ids, caption_layout), caption_layout)

    def next_states(
        self, ids: Int64[Tensor, "batch position"], step: DecodingStep
    ) -> Float[Tensor, "batch position width"]:
        """Return the token embeddings of the next tokens."""
        return self.embed(ids, GRID, step.positions)


class MammutTextDecoder(TextDecoder):
    """The captioning pass over the blocks of the text encoder, with cross-attention blocks of its own."""

    def __init__(self, config: DecoderConfig, encoder: MammutTextEncoder):
        nn.Module.__init__(self)
        text = encoder.config
        self.config, self.context = config, text.context
        # As plain attributes, so that their parameters are registered once: with the encoder.
        vars(self).update(self_blocks=encoder.blocks, norm_out=encoder.norm_out)
        block = text.width, config.heads, config.mlp_ratio, text.activation
        self.cross_blocks = Stack(CrossAttentionBlock(*block) for _ in range(config.cross_layers))
        self.vocabulary = nn.Linear(text.width, text.vocab_size, bias=False)

    def initialise(self) -> None:
        self.cross_blocks.initialise()
        nn.init.normal_(self.vocabulary.weight, std=self.vocabulary.in_features**-0.5)
