"""What attention reads besides the tokens it is given: the picture, and keys and values of earlier tokens."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn


class LayerCache:
    """Keys and values of one self-attention layer, in memory set aside for `max_tokens` tokens.

    Attributes:
        length: tokens held so far.
    """

    def __init__(
        self, *, rows: int, heads: int, max_tokens: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ):
        self.keys = torch.empty(rows, heads, max_tokens, head_dim, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(
        self, keys: Float[Tensor, "rows head token dim"], values: Float[Tensor, "rows head token dim"]
    ) -> tuple[Float[Tensor, "rows head so_far dim"], Float[Tensor, "rows head so_far dim"]]:
        """Add the newest tokens and return everything held, newest last.

        Raises: ValueError: if the tokens do not fit.
        """
        start, end = self.length, self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(
                f"the cache holds {self.keys.shape[2]} tokens; {end} were asked for. Give a larger max_tokens."
            )
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reorder(self, rows: Int64[Tensor, "rows"]) -> None:
        """Let row i continue what row `rows[i]` held."""
        for held in (self.keys, self.values):
            held[:, :, : self.length] = held[rows, :, : self.length]


@dataclass(frozen=True)
class Projected:
    """A memory's keys and values, of one layer."""

    key: Float[Tensor, "images head memory dim"]
    value: Float[Tensor, "images head memory dim"]


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


@dataclass
class DecodingCache:
    """All that a decoding step reads besides its new tokens. Rows are picture-major: the beams of one picture are
    neighbours.

    Attributes:
        text: one cache per layer of the text encoder.
        decoder: one cache per self-attention layer of the text decoder.
        memory: per cross-attention layer, the caption tokens; held once per picture, whatever the number of its
            beams.
    """

    text: list[LayerCache]
    decoder: list[LayerCache]
    memory: list[Memory]

    @property
    def length(self) -> int:
        """Tokens held so far, the start token included."""
        return self.text[0].length

    def reorder(self, rows: Int64[Tensor, "rows"]) -> None:
        """Let row i continue what row `rows[i]` held; both must belong to the same picture."""
        for layer in [*self.text, *self.decoder]:
            layer.reorder(rows)
