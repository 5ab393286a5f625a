"""The contrastive captioner: vision encoder, pooler, text encoder and text decoder."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import normalize

from contracap.config import require_positive
from contracap.model.cache import DecodingCache, DecodingStep, KeysValues
from contracap.model.mammut import MammutTextDecoder, MammutTextEncoder
from contracap.model.pooler import PoolerConfig, build_pooler
from contracap.model.text import DecoderConfig, TextConfig, TextDecoder, TextEncoder, TokenStates
from contracap.model.vision import VisionConfig, VisionEncoder
from contracap.tokenizer import Lengths

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)


@dataclass(frozen=True, kw_only=True)
class CoCaConfig:
    """Sizes of a contrastive captioner: a CoCa; without a decoder, a CLIP; with one that shares blocks, a MaMMUT."""

    embed_dim: int
    """Width of the contrastive embedding, and of the caption tokens unless they are the patches."""
    vision: VisionConfig
    pooler: PoolerConfig = field(default_factory=PoolerConfig)
    text: TextConfig
    decoder: DecoderConfig | None = None

    def __post_init__(self) -> None:
        require_positive(self, "embed_dim")
        if self.pooler.has_queries and self.embed_dim % self.pooler.heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of the pooler's {self.pooler.heads} heads")
        if self.pooler.adds_positions and self.vision.patch_dropout:
            raise ValueError(
                f"vision.patch_dropout is {self.vision.patch_dropout}, but pooler.adds_positions needs every patch: "
                "set vision.patch_dropout to 0"
            )
        require_family(self)
        if self.decoder is None:
            return
        if self.text.width % self.decoder.heads:
            raise ValueError(
                f"text width {self.text.width} is not a multiple of the decoder's {self.decoder.heads} heads"
            )
        name = "vision.width" if self.pooler.kind == "class_token" else "embed_dim"
        width = self.vision.width if self.pooler.kind == "class_token" else self.embed_dim
        if width != self.text.width:
            raise ValueError(
                "the decoder reads caption tokens of its own width: with pooler.kind "
                f"{self.pooler.kind!r}, {name} {width} must equal text.width {self.text.width}"
            )

    @property
    def is_mammut(self) -> bool:
        """True if one text stack serves as encoder and decoder."""
        return self.decoder is not None and self.decoder.shares_blocks


def require_family(config: CoCaConfig) -> None:
    """Raises: ValueError: if only some parts are those of a MaMMUT."""
    parts = (config.text.pool.startswith("mean"), config.pooler.kind.startswith("mean"), config.is_mammut)
    if any(parts) and not all(parts):
        raise ValueError(
            "a MaMMUT has a mean for pooler.kind and for text.pool, and decoder.shares_blocks; other models have none "
            f"of them: these are {config.pooler.kind!r}, {config.text.pool!r} and {config.is_mammut}"
        )
    text, decoder = config.text, config.decoder
    if decoder is None or not decoder.shares_blocks:
        return
    for name in ("layers", "heads", "mlp_ratio"):
        if getattr(text, name) != getattr(decoder, name):
            raise ValueError(
                f"a decoder that shares_blocks has those of the text encoder: decoder.{name} {getattr(decoder, name)} "
                f"must equal text.{name} {getattr(text, name)}"
            )


@dataclass(frozen=True)
class CoCaOutput:
    """The result of a forward pass.

    Attributes:
        image_features: contrastive embeddings of the images: [batch embed], unit rows.
        text_features: contrastive embeddings of the texts: [batch embed], unit rows.
        caption_states: the decoder's states, and the labels for the captioning loss; without a decoder, the text
            encoder's states.
        logit_scale: scalar, already exponentiated.
    """

    image_features: Float[Tensor, "batch embed"]
    text_features: Float[Tensor, "batch embed"]
    caption_states: TokenStates
    logit_scale: Float[Tensor, ""]
    decoder: TextDecoder | None = field(repr=False)

    @cached_property
    def logits(self) -> Float[Tensor, "batch position vocab"] | None:
        """[batch context-1 vocabulary], computed on first use; None without a decoder.

        Row i scores token i + 1. Rows after the text are unspecified.
        """
        if self.decoder is None:
            return None
        with torch.set_grad_enabled(self.caption_states.states.requires_grad):
            return self.decoder.logits(self.caption_states)


class CoCa(nn.Module):
    """A contrastive captioner on one device. Source: CoCa (arXiv 2205.01917), laid out as the released open_clip
    models.

    Attributes:
        precision: in which it computes, as in `pretrained.devices`.
    """

    precision = "fp32"

    def __init__(self, config: CoCaConfig):
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.pooler = build_pooler(
            config.pooler,
            embed_dim=config.embed_dim,
            vision_width=config.vision.width,
            image_tokens=config.vision.tokens,
        )
        self.text, self.decoder = build_text(config.text, config.decoder, embed_dim=config.embed_dim)
        self.logit_scale = nn.Parameter(torch.empty(()))

    def initialise(self) -> None:
        """Set every parameter to its initial value, drawn from torch's global generator."""
        self.vision.initialise()
        self.pooler.initialise()
        self.text.initialise()
        if self.decoder is not None:
            self.decoder.initialise()
        nn.init.constant_(self.logit_scale, INITIAL_LOGIT_SCALE)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.logit_scale.device

    def forward(
        self,
        pixels: Float[Tensor, "batch 3 height width"],
        ids: Int64[Tensor, "batch position"],
        lengths: Lengths | None = None,
    ) -> CoCaOutput:
        """Return both embeddings and the states of the captions, for matching images and texts.

        Args:
            lengths: tokens of each text, start and end included, as in `Batch`. If None, they are read from the ids,
                which waits for the device.

        Raises: ValueError: if a text is longer than the context.
        Source: CoCa (arXiv 2205.01917), figure 2 and section 3.2.
        """
        image_tokens = self.vision(pixels)
        image_embedding, caption_tokens = self.pooler(image_tokens)
        text_embedding, token_states = self.text(ids, lengths)
        caption_states = self.decoder(token_states, caption_tokens) if self.decoder else token_states
        return CoCaOutput(
            unit(image_embedding), unit(text_embedding), caption_states, self.logit_scale.exp(), self.decoder
        )

    def contrastive_features(
        self,
        pixels: Float[Tensor, "batch 3 height width"],
        ids: Int64[Tensor, "batch position"],
        lengths: Lengths | None = None,
    ) -> tuple[Float[Tensor, "batch embed"], Float[Tensor, "batch embed"]]:
        """Return `image_features` and `text_features` of a forward pass, without computing the captions."""
        return unit(self.pooler.contrastive(self.vision(pixels))), unit(self.text.contrastive(ids, lengths))

    def caption_states(
        self,
        pixels: Float[Tensor, "batch 3 height width"],
        ids: Int64[Tensor, "batch position"],
        lengths: Lengths | None = None,
    ) -> TokenStates:
        """Return `caption_states` of a forward pass, without computing the embeddings."""
        caption_tokens = self.pooler.caption_tokens(self.vision(pixels))
        return self.require_decoder()(self.text.token_states(ids, lengths), caption_tokens)

    def encode_image(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch embed"]:
        """Return the contrastive embeddings of normalised images, unit rows."""
        return unit(self.pooler.contrastive(self.vision(pixels)))

    def encode_text(self, ids: Int64[Tensor, "batch position"]) -> Float[Tensor, "batch embed"]:
        """Return the contrastive embeddings of texts, unit rows; a text ends at its first end token.

        A common prefix of several texts is computed once, so encode prompts of the same template together.

        Raises: ValueError: if a text is longer than the context.
        """
        return unit(self.text.contrastive(ids, share_prefixes=True))

    def encode_caption_tokens(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch embed"], Float[Tensor, "batch caption_token dim"]]:
        """Return contrastive embeddings (unit rows) and caption tokens of images from one pass."""
        self.require_decoder()
        embedding, caption_tokens = self.pooler(self.vision(pixels))
        return unit(embedding), caption_tokens

    def new_cache(
        self,
        projected: list[KeysValues],
        *,
        prompt: int,
        num_texts: int,
        max_tokens: int,
        fixed_shapes: bool = False,
    ) -> DecodingCache:
        """Return an empty cache for decoding up to `num_texts` texts per image.

        Args:
            projected: the result of `TextDecoder.project`.
            prompt: tokens that `prefill` will read, including the start token.
            max_tokens: longest text, including the prompt.
            fixed_shapes: as in `DecodingCache`.

        Raises: ValueError: if `max_tokens` exceeds the context.
        """
        decoder, text = self.require_decoder(), self.config.text
        if max_tokens > text.context:
            raise ValueError(f"max_tokens is {max_tokens}; this model's context is {text.context} tokens")
        slots, keys = prompt + num_texts * (max_tokens - prompt), projected[0].key

        def empty(layers: int, heads: int) -> list[tuple[Tensor, Tensor]]:
            size = (len(keys), heads, slots, text.width // heads)
            return [(keys.new_zeros(size), keys.new_zeros(size)) for _ in range(layers)]

        return DecodingCache(
            projected,
            empty(self.text.cached_layers, text.heads),
            empty(decoder.config.layers, decoder.config.heads),
            fixed_shapes=fixed_shapes,
        )

    def prefill(self, ids: Int64[Tensor, "batch position"], cache: DecodingCache) -> Float[Tensor, "batch 1 vocab"]:
        """Read the prompts into an empty cache; return float32 logits of the token that follows."""
        return self.next_logits(ids, cache.projected, cache.add_prompt(ids.shape[1]))

    def decode(self, ids: Int64[Tensor, "batch text"], cache: DecodingCache) -> Float[Tensor, "batch text vocab"]:
        """Read the newest token of each text into the cache; return float32 logits of the token that follows."""
        return self.next_logits(ids, cache.projected, cache.add_tokens(ids.shape[1]))

    def next_logits(
        self, ids: Int64[Tensor, "batch position"], projected: list[KeysValues], step: DecodingStep
    ) -> Float[Tensor, "batch text vocab"]:
        """Do the work of `prefill` and `decode` on tensors alone, so that it can be compiled."""
        decoder = self.require_decoder()
        states = decoder.next_states(self.text.next_states(ids, step), projected, step)
        states = states[:, -1:] if step.causal else states
        return decoder.vocabulary(states.to(decoder.vocabulary.weight.dtype)).float()

    def only_for_contrastive(self) -> list[str]:
        """Return name prefixes of the parameters that the captioning loss does not reach."""
        parts = {"text": self.text.only_for_contrastive, "pooler": self.pooler.only_for_contrastive}
        return ["logit_scale", *(f"{part}.{name}" for part, names in parts.items() for name in names)]

    def only_for_captioning(self) -> list[str]:
        """Return name prefixes of the parameters that the contrastive loss does not reach."""
        names = [f"pooler.{name}" for name in self.pooler.only_for_captioning]
        return names + (["decoder"] if self.decoder is not None else [])

    def require_decoder(self) -> TextDecoder:
        """Return the text decoder.

        Raises: ValueError: if the model is a CLIP, which has none.
        """
        if self.decoder is None:
            raise ValueError(
                "this model has no text decoder (it is a CLIP), so it cannot caption: load or train a coca size"
            )
        return self.decoder


def build_text(
    text: TextConfig, decoder: DecoderConfig | None, *, embed_dim: int
) -> tuple[TextEncoder, TextDecoder | None]:
    """Return a text encoder, and a decoder if there is one; both of a MaMMUT if they share blocks."""
    if decoder is not None and decoder.shares_blocks:
        encoder = MammutTextEncoder(text, decoder)
        return encoder, MammutTextDecoder(decoder, encoder)
    return TextEncoder(text, embed_dim=embed_dim), TextDecoder(decoder, text) if decoder is not None else None


def unit(embedding: Float[Tensor, "batch embed"]) -> Float[Tensor, "batch embed"]:
    """Scale rows to length 1, in float32 or higher precision."""
    return normalize(embedding.to(torch.promote_types(embedding.dtype, torch.float32)), dim=-1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode (no patch dropout); afterwards restore the mode of each module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
