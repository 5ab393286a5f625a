"""The contrastive captioner: the parts joined."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from contracap.config import require_positive
from contracap.model.attention import CrossAttention, CrossKernel
from contracap.model.cache import DecodingCache, Projected, Step
from contracap.model.layout import Packed
from contracap.model.pooler import PoolerConfig, build_pooler
from contracap.model.text import DecoderConfig, TextConfig, TextDecoder, TextEncoder
from contracap.model.vision import VisionConfig, VisionEncoder

IGNORED = -100  # a label that the captioning loss leaves out, as it does every negative one
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)


@dataclass(frozen=True, kw_only=True)
class CoCaConfig:
    """Sizes of a contrastive captioner; without a decoder it is a CLIP.

    Attributes:
        embed_dim: width of the contrastive embedding and of the caption tokens.
    """

    embed_dim: int
    vision: VisionConfig
    pooler: PoolerConfig = field(default_factory=PoolerConfig)
    text: TextConfig
    decoder: DecoderConfig | None = None

    def __post_init__(self) -> None:
        require_positive(self, "embed_dim")
        if self.pooler.kind != "class_token" and self.embed_dim % self.pooler.heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of the pooler's {self.pooler.heads} heads")
        if self.pooler.adds_positions and self.vision.patch_dropout:
            raise ValueError(
                "pooler.adds_positions needs every patch at its place: set vision.patch_dropout to 0, "
                f"it is {self.vision.patch_dropout}"
            )
        if self.decoder is None:
            return
        if self.pooler.kind == "class_token":
            raise ValueError("a decoder needs caption tokens; pooler.kind 'class_token' makes none: use 'shared'")
        if self.text.width % self.decoder.heads:
            raise ValueError(
                f"text width {self.text.width} is not a multiple of the decoder's {self.decoder.heads} heads"
            )
        if self.embed_dim != self.text.width:
            raise ValueError(
                "the decoder reads caption tokens of its own width: "
                f"embed_dim {self.embed_dim} must equal text.width {self.text.width}"
            )


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """How the same numbers are computed, up to rounding; no part of what a model is.

    Attributes:
        text: `packed`: no fill is computed, each text is as long as it is. `padded`: every text fills the context.
        cross_attention: what `CrossAttention.kernel` says: `projected`, `absorbed`, or by `auto` what takes fewer
            operations for the texts at hand.
    """

    text: Literal["packed", "padded"] = "packed"
    cross_attention: CrossKernel = "auto"


@dataclass
class CoCaOutput:
    """What a forward pass gives.

    Attributes:
        image_features: [batch embed], unit rows.
        text_features: [batch embed], unit rows.
        logit_scale: scalar, already exponentiated.
        logits: [batch context-1 vocabulary]; row i scores token i + 1, rows beyond the text are unspecified. None
            without a decoder.
    """

    image_features: Float[Tensor, "batch embed"]
    text_features: Float[Tensor, "batch embed"]
    logit_scale: Float[Tensor, ""]
    logits: Float[Tensor, "batch positions vocabulary"] | None


@dataclass
class TrainingFeatures:
    """What the losses read; None where a branch was skipped.

    Attributes:
        image_features, text_features: [batch embed], unit rows, float32.
        caption_states: [rows width], a row for each token but the last of each text, text after text, and some that
            fill up their number; the vocabulary matrix turns a row into scores of the token after it.
        caption_labels: [rows]; that token, `IGNORED` for the fill.
    """

    image_features: Float[Tensor, "batch embed"] | None = None
    text_features: Float[Tensor, "batch embed"] | None = None
    caption_states: Float[Tensor, "rows width"] | None = None
    caption_labels: Int64[Tensor, "rows"] | None = None


class CoCa(nn.Module):
    """A contrastive captioner on one device. Source: CoCa (arXiv 2205.01917), laid out as the released open_clip
    models."""

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
        self.text = TextEncoder(config.text, embed_dim=config.embed_dim)
        self.decoder = (
            TextDecoder(config.decoder, width=config.text.width, vocab_size=config.text.vocab_size)
            if config.decoder
            else None
        )
        self.logit_scale = nn.Parameter(torch.empty(()))

    def use(self, kernels: KernelConfig) -> None:
        """Compute in this way from now on; without a call, as `KernelConfig()` says."""
        self.text.packs = kernels.text == "packed"
        for module in self.modules():
            if isinstance(module, CrossAttention):
                module.kernel = kernels.cross_attention

    def initialise(self) -> None:
        """Fill every parameter with its initial value, from torch's global generator."""
        self.vision.initialise()
        self.pooler.initialise()
        self.text.initialise()
        if self.decoder is not None:
            self.decoder.initialise()
        nn.init.constant_(self.logit_scale, INITIAL_LOGIT_SCALE)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.logit_scale.device

    def encode_image(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch embed"]:
        """Contrastive embedding of normalised pictures, unit rows."""
        return unit(self.pooler.contrastive(self.vision(pixels)))

    def encode_text(self, ids: Int64[Tensor, "batch tokens"]) -> Float[Tensor, "batch embed"]:
        """Contrastive embedding of texts, unit rows; a text ends at its first end token.

        What texts have in common at their beginning is computed once: prompts that follow one template are best
        encoded together.

        Raises: ValueError: if a text is longer than the context.
        """
        embedding, _ = self.text(ids, self.text.layout(ids, shares=True))
        return unit(embedding)

    def encode_caption_tokens(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch embed"], Float[Tensor, "batch memory embed"]]:
        """Contrastive embedding (unit rows) and caption tokens of pictures, from one pass."""
        self.require_decoder()
        embedding, caption_tokens = self.pooler(self.vision(pixels))
        return unit(embedding), caption_tokens

    def forward(self, pixels: Float[Tensor, "batch 3 height width"], ids: Int64[Tensor, "batch tokens"]) -> CoCaOutput:
        """Both embeddings and, with a decoder, the caption logits of each text given its picture.

        Raises: ValueError: if a text is longer than the context.
        """
        features = self.features(pixels, ids, contrastive=True, captioning=self.decoder is not None)
        assert features.image_features is not None and features.text_features is not None  # both were wanted
        logits = None
        if self.decoder is not None:
            logits = self.caption_layout(ids).spread(self.decoder.vocabulary(features.caption_states))
            logits = pad(logits, (0, 0, 0, self.config.text.context - 1 - logits.shape[1]))
        return CoCaOutput(features.image_features, features.text_features, self.logit_scale.exp(), logits)

    def features(
        self,
        pixels: Float[Tensor, "batch 3 height width"],
        ids: Int64[Tensor, "batch tokens"],
        *,
        contrastive: bool,
        captioning: bool,
    ) -> TrainingFeatures:
        """What the wanted losses read; the other branch is not computed.

        Raises: ValueError: if a text is longer than the context.
        """
        if not captioning:  # the parts of encode_text and encode_image: FSDP takes a call of these for a whole pass
            text_embedding, _ = self.text(ids, self.text.layout(ids))
            image_embedding = self.pooler.contrastive(self.vision(pixels))
            return TrainingFeatures(image_features=unit(image_embedding), text_features=unit(text_embedding))
        # Layouts first: they wait for the ids, and so for whatever the device was given before.
        decoder, captions, texts = self.require_decoder(), self.caption_layout(ids), self.text.layout(ids)
        features = TrainingFeatures(caption_labels=captions.collect(captions.fit(ids[:, 1:], fill=IGNORED)))
        image_tokens = self.vision(pixels)
        if contrastive:
            image_embedding, caption_tokens = self.pooler(image_tokens)
            text_embedding, states = self.text(ids, texts)
            features.image_features, features.text_features = unit(image_embedding), unit(text_embedding)
            states = captions.collect(texts.spread(states)[:, : captions.columns])
        else:
            caption_tokens = self.pooler.caption_tokens(image_tokens)
            states = self.text.token_states(captions.fit(ids, fill=0), captions)
        features.caption_states = decoder(states, decoder.memory(caption_tokens, columns=captions.columns), captions)
        return features

    def caption_layout(self, ids: Int64[Tensor, "batch tokens"]) -> Packed:
        """The rows of the decoder: each token of a text but the last, which nothing follows."""
        return self.text.pack(self.text.lengths(ids) - 1, columns=self.config.text.context - 1, device=ids.device)

    def start_decoding(
        self,
        memory: list[Projected],
        *,
        prompt: int,
        texts: int,
        max_tokens: int,
        whole: bool = False,
    ) -> DecodingCache:
        """A cache for the texts that are to be written about each picture, at most `texts` at a time.

        Args:
            memory: the caption tokens as `TextDecoder.project` gives them.
            prompt: tokens that they begin with, the start token included; given to the first call of `decode`.
            max_tokens: of a text, its prompt included.
            whole: as in `DecodingCache`.

        Raises: ValueError: if `max_tokens` exceeds the context.
        """
        decoder, text = self.require_decoder(), self.config.text
        if max_tokens > text.context:
            raise ValueError(f"max_tokens is {max_tokens}; this model's context is {text.context} tokens")
        slots, keys = prompt + texts * (max_tokens - prompt), memory[0].key

        def empty(layers: int, heads: int) -> list[tuple[Tensor, Tensor]]:
            size = (len(keys), heads, slots, text.width // heads)
            return [(keys.new_zeros(size), keys.new_zeros(size)) for _ in range(layers)]

        return DecodingCache(
            memory,
            empty(text.layers, text.heads),
            empty(decoder.config.layers, decoder.config.heads),
            whole=whole,
        )

    def decode(
        self, ids: Int64[Tensor, "images column"], cache: DecodingCache
    ) -> Float[Tensor, "images text vocabulary"]:
        """Add tokens to the texts in the cache, and score what follows them; float32 logits.

        Args:
            ids: in the first call the prompt, which gives one text of logits; later the newest token of each text.
        """
        return self.score(ids, cache.memory, cache.step(ids.shape[1]))

    def score(
        self, ids: Int64[Tensor, "images column"], memory: list[Projected], step: Step
    ) -> Float[Tensor, "images text vocabulary"]:
        """What `decode` does, of tensors alone."""
        decoder = self.require_decoder()
        states = decoder(self.text.next_states(ids, step), memory, step=step)
        return decoder.vocabulary(states[:, -1:] if step.causal else states).float()

    def only_for_contrastive(self) -> list[str]:
        """Beginnings of the names of the parameters that the captioning loss does not reach."""
        pool = "pooler.contrastive_pool" if self.config.pooler.kind in ("cascade", "parallel") else "pooler.projection"
        names = ["logit_scale", "text.norm_out", "text.projection", pool]
        return names + (["text.class_token"] if self.config.text.pool == "class_token" else [])

    def only_for_captioning(self) -> list[str]:
        """Beginnings of the names of the parameters that the contrastive loss does not reach."""
        pools = ["pooler.caption_pool"] if self.config.pooler.kind == "parallel" else []
        return pools + (["decoder"] if self.decoder is not None else [])

    def require_decoder(self) -> TextDecoder:
        """The text decoder.

        Raises: ValueError: if the model is a CLIP, which has none.
        """
        if self.decoder is None:
            raise ValueError(
                "this model has no text decoder (it is a CLIP): it cannot caption; load or train a coca size"
            )
        return self.decoder


def unit(embedding: Float[Tensor, "batch embed"]) -> Float[Tensor, "batch embed"]:
    """Rows of length 1, at least in float32."""
    return normalize(embedding.to(torch.promote_types(embedding.dtype, torch.float32)), dim=-1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode (no patch dropout); afterwards each module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
