"""What attention reads besides the tokens it is given: the picture, and keys and values of earlier tokens."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn


@dataclass(frozen=True)
class Projected:
    """A memory's keys and values, of one layer."""

    key: Float[Tensor, "images head memory dim"]
    value: Float[Tensor, "images head memory dim"]

    def of(self, pictures: Int64[Tensor, "chosen"]) -> "Projected":
        """Of these pictures alone."""
        return Projected(self.key[pictures], self.value[pictures])


@dataclass(frozen=True)
class Unprojected:
    """A memory of which no keys and values are made.

    Attributes:
        tokens: each scaled to mean 0 and deviation 1, the same for all layers.
        norm: of the layer that reads it; its gain and shift are still to be applied.
    """

    tokens: Float[Tensor, "images memory memory_width"]
    norm: nn.LayerNorm


Memory = Projected | Unprojected


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of earlier tokens in one self-attention layer. Each token of each text has a slot of its own.

    Attributes:
        slots: where the next tokens go.
    """

    keys: Float[Tensor, "images head slot dim"]
    values: Float[Tensor, "images head slot dim"]
    slots: Int64[Tensor, "column"]

    def append(
        self, keys: Float[Tensor, "images head column dim"], values: Float[Tensor, "images head column dim"]
    ) -> None:
        """Put the next tokens where they go."""
        self.keys.index_copy_(2, self.slots, keys)
        self.values.index_copy_(2, self.slots, values)


@dataclass(frozen=True)
class Step:
    """What the text side reads in one step of decoding, besides its new tokens and the picture.

    Attributes:
        positions: of the new tokens.
        text: one cache per layer of the text encoder.
        decoder: one cache per self-attention layer of the text decoder.
        mask: the slots that each column sees; None if that is all of them, or with `causal` those up to its own.
        causal: whether the columns are one text's tokens, one after the other.
    """

    positions: Int64[Tensor, "column"]
    text: list[LayerCache]
    decoder: list[LayerCache]
    mask: Bool[Tensor, "images 1 column slot"] | None
    causal: bool


class DecodingCache:
    """The texts that are being written about each picture of a batch: they have one length, and begin with a prompt
    that those of a picture share.

    Keys and values are written once, and never moved or copied for another text: when a text goes on from another
    one, as beams do, it only sees other slots.

    Attributes:
        memory: per cross-attention layer, the caption tokens; once for each picture.
        length: tokens of each text so far.
    """

    def __init__(
        self,
        memory: list[Projected],
        text: list[tuple[Tensor, Tensor]],
        decoder: list[tuple[Tensor, Tensor]],
        *,
        whole: bool = False,
    ):
        """
        Args:
            text, decoder: keys and values of each layer, [images head slot dim], finite.
            whole: whether each step reads all slots, those without a token masked, so that all steps have the same
                shapes.
        """
        self.memory, self._text, self._decoder, self._whole = memory, text, decoder, whole
        keys = text[0][0]
        self.length = 0
        self._used = 0
        self._sees = torch.zeros(len(keys), 1, keys.shape[2], dtype=torch.bool, device=keys.device)

    def step(self, columns: int) -> Step:
        """Make room for new tokens: at first those of the prompt, later one for each text of a picture.

        Raises: ValueError: if there is no room.
        """
        begins, first, self._used = self.length == 0, self._used, self._used + columns
        if self._used > self._sees.shape[2]:
            raise ValueError(
                f"the cache holds {self._sees.shape[2]} tokens a picture; {self._used} were asked for. Give a larger "
                "max_tokens."
            )
        slots = torch.arange(first, self._used, device=self._sees.device)
        if begins:
            self._sees[:, :, slots] = True
            positions, self.length = slots, columns
        else:
            self._sees[:, torch.arange(columns, device=slots.device), slots] = True
            positions, self.length = torch.full_like(slots, self.length), self.length + 1
        shown = self._sees.shape[2] if self._whole and not begins else self._used

        def parts(layers: list[tuple[Tensor, Tensor]]) -> list[LayerCache]:
            if self._whole and not begins:  # themselves: a part of them would not be known to stay in place
                return [LayerCache(keys, values, slots) for keys, values in layers]
            return [LayerCache(keys[:, :, :shown], values[:, :, :shown], slots) for keys, values in layers]

        sees_all = begins or (self._sees.shape[1] == 1 and not self._whole)
        mask = None if sees_all else self._sees[:, None, :, :shown]
        return Step(positions, parts(self._text), parts(self._decoder), mask, causal=begins)

    def follow(self, texts: Int64[Tensor, "images text"]) -> None:
        """Let each picture's text i go on from what its text `texts[:, i]` was; their number may change."""
        self._sees = self._sees.gather(1, texts[:, :, None].expand(-1, -1, self._sees.shape[2]))

    def restart(self, memory: list[Projected]) -> None:
        """Forget all texts; as many other pictures take the place of those at hand, in the same memory."""
        for held, new in zip(self.memory, memory, strict=True):
            held.key.copy_(new.key)
            held.value.copy_(new.value)
        for keys, values in (*self._text, *self._decoder):  # a NaN would be seen behind a mask, too
            keys.zero_()
            values.zero_()
        self.length = self._used = 0
        self._sees = torch.zeros_like(self._sees[:, :1])

    def stay_in_place(self) -> None:
        """Tell `torch.compile` that keys and values stay where they are, so that CUDA graphs may write them."""
        for tensors in (*self._text, *self._decoder, *((layer.key, layer.value) for layer in self.memory)):
            for tensor in tensors:
                torch._dynamo.mark_static_address(tensor)

    def keep(self, pictures: Int64[Tensor, "chosen"]) -> None:
        """Forget all other pictures."""
        self.memory = [layer.of(pictures) for layer in self.memory]
        self._text, self._decoder = (
            [(keys[pictures], values[pictures]) for keys, values in layers] for layers in (self._text, self._decoder)
        )
        self._sees = self._sees[pictures]
