"""Inputs of attention other than the new tokens: caption tokens, and the keys and values of earlier tokens."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn


@dataclass(frozen=True)
class KeysValues:
    """Keys and values of what one cross-attention layer reads: caption tokens, or image tokens in the pooler."""

    key: Float[Tensor, "batch head memory dim"]
    value: Float[Tensor, "batch head memory dim"]

    def select(self, images: Int64[Tensor, "selected"]) -> "KeysValues":
        """Return the keys and values of these images."""
        return KeysValues(self.key[images], self.value[images])


@dataclass(frozen=True)
class NormalisedTokens:
    """Tokens that a cross-attention layer reads without making keys and values of them.

    Attributes:
        tokens: normalised to mean 0 and variance 1, the same for all layers.
        norm: the norm of the layer that reads it; its weight and bias are still to be applied.
    """

    tokens: Float[Tensor, "batch memory memory_width"]
    norm: nn.LayerNorm


Memory = KeysValues | NormalisedTokens  # what a cross-attention layer reads, as in `torch.nn.TransformerDecoder`


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of earlier tokens in one self-attention layer. Each token of each text has its own slot.

    Attributes:
        slots: where the next tokens go.
    """

    keys: Float[Tensor, "batch head slot dim"]
    values: Float[Tensor, "batch head slot dim"]
    slots: Int64[Tensor, "position"]

    def append(
        self, keys: Float[Tensor, "batch head position dim"], values: Float[Tensor, "batch head position dim"]
    ) -> None:
        """Write keys and values of the next tokens to their slots."""
        self.keys.index_copy_(2, self.slots, keys)
        self.values.index_copy_(2, self.slots, values)


@dataclass(frozen=True)
class DecodingStep:
    """Inputs of the text encoder and decoder in one decoding step, other than the new tokens and the caption tokens.

    Attributes:
        positions: the positions of the new tokens.
        text: one cache per layer of the text encoder; none if the decoder runs those layers.
        decoder: one cache per self-attention layer of the text decoder.
        mask: true for the slots that each new token sees. None: all of them or, with `causal`, those up to its own.
        causal: the new tokens follow each other in one text, as in prefill. Otherwise each belongs to another text.
    """

    positions: Int64[Tensor, "position"]
    text: list[LayerCache]
    decoder: list[LayerCache]
    mask: Bool[Tensor, "batch 1 position slot"] | None
    causal: bool


class DecodingCache:
    """Keys and values of all texts that are being written about each image of a batch.

    The texts of an image share one axis of slots. The prompt, which they share too, comes first. In each decoding step,
    position j of the input is the newest token of text j; its mask says which slots text j sees. A beam that continues
    another one gets that one's mask, so keys and values are never moved or copied. All texts have the same length.

    Attributes:
        projected: keys and values of the caption tokens in each cross-attention layer, once per image.
        length: tokens of each text so far.
    """

    def __init__(
        self,
        projected: list[KeysValues],
        text: list[tuple[Tensor, Tensor]],
        decoder: list[tuple[Tensor, Tensor]],
        *,
        fixed_shapes: bool = False,
    ):
        """
        Args:
            text, decoder: finite keys and values of each layer, [batch head slot dim].
            fixed_shapes: let each decoding step read all slots, with empty ones masked.
        """
        self.projected, self._text, self._decoder = projected, text, decoder
        self._fixed_shapes = fixed_shapes
        keys = decoder[0][0]
        self.length = 0
        self._used = 0
        # [batch text slot]; one text until `reorder` brings more.
        self._visible = torch.zeros(len(keys), 1, keys.shape[2], dtype=torch.bool, device=keys.device)

    def add_prompt(self, length: int) -> DecodingStep:
        """Reserve slots for the prompt, which all texts of an image share."""
        slots = self._reserve(length)
        self._visible[:, :, slots] = True
        self.length = length
        text, decoder = self._layers(slots, shown=self._used)
        return DecodingStep(slots, text, decoder, mask=None, causal=True)

    def add_tokens(self, num_texts: int) -> DecodingStep:
        """Reserve slots for one more token of each text."""
        slots = self._reserve(num_texts)
        self._visible[:, torch.arange(num_texts, device=slots.device), slots] = True
        positions = torch.full_like(slots, self.length)
        self.length += 1
        shown = self._visible.shape[2] if self._fixed_shapes else self._used
        text, decoder = self._layers(slots, shown=shown)
        sees_all = num_texts == 1 and not self._fixed_shapes
        mask = None if sees_all else self._visible[:, None, :, :shown]
        return DecodingStep(positions, text, decoder, mask, causal=False)

    def _reserve(self, count: int) -> Int64[Tensor, "position"]:
        """Return the next slots.

        Raises: ValueError: if too few are left.
        """
        first, self._used = self._used, self._used + count
        num_slots = self._visible.shape[2]
        if self._used > num_slots:
            raise ValueError(
                f"the cache holds {num_slots} tokens per image, but {self._used} are needed: give a larger max_tokens"
            )
        return torch.arange(first, self._used, device=self._visible.device)

    def _layers(self, slots: Int64[Tensor, "position"], shown: int) -> tuple[list[LayerCache], list[LayerCache]]:
        """Return the first `shown` slots of each layer of the text encoder, and of the text decoder."""

        def layer(keys: Tensor, values: Tensor) -> LayerCache:
            if shown < keys.shape[2]:
                keys, values = keys[:, :, :shown], values[:, :, :shown]
            return LayerCache(keys, values, slots)  # not a view, if whole: torch.compile knows the tensor as static

        return [layer(*each) for each in self._text], [layer(*each) for each in self._decoder]

    def reorder(self, parents: Int64[Tensor, "batch new_text"]) -> None:
        """Let text i of each image continue its former text `parents[:, i]`; the number of texts may change."""
        self._visible = self._visible.gather(1, parents[:, :, None].expand(-1, -1, self._visible.shape[2]))

    def select(self, images: Int64[Tensor, "selected"]) -> None:
        """Keep these images only."""
        self.projected = [layer.select(images) for layer in self.projected]
        self._text, self._decoder = (
            [(keys[images], values[images]) for keys, values in layers] for layers in (self._text, self._decoder)
        )
        self._visible = self._visible[images]

    def restart(self, projected: list[KeysValues]) -> None:
        """Forget all texts, and copy the caption tokens of equally many other images over the present ones."""
        for present, new in zip(self.projected, projected, strict=True):
            present.key.copy_(new.key)
            present.value.copy_(new.value)
        for keys, values in (*self._text, *self._decoder):  # NaN passes through a mask
            keys.zero_()
            values.zero_()
        self.length = self._used = 0
        self._visible = torch.zeros_like(self._visible[:, :1])

    def mark_static(self) -> None:
        """Tell `torch.compile` that keys and values keep their addresses, so that CUDA graphs may write to them."""
        for tensors in (*self._text, *self._decoder, *((layer.key, layer.value) for layer in self.projected)):
            for tensor in tensors:
                torch._dynamo.mark_static_address(tensor)
