"""What every decoding strategy shares with the engine that runs it.

A `Strategy` is a frozen record of settings. The `begin` of a `SearchStrategy` makes a `Search`: the state of decoding
one batch, which is fed logits and never sees a model.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from contracap.config import require_count
from contracap.tokenizer import Tokenizer

MAX_TOKENS = 10_000
MAX_ROWS = 1000  # texts of one image that are searched together


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """One finished text.

    Attributes:
        token_ids: what was generated, without the start token, the prompt and the end token.
        log_probability: the sum of `token_log_probabilities`.
        score: what ranks texts, higher is better; each strategy says what that is.
        token_log_probabilities: what the model gave each generated token, in nats; the end token included, which a text
            that `max_tokens` cut does not have.
    """

    token_ids: tuple[int, ...]
    log_probability: float
    score: float
    token_log_probabilities: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True)
class Prompts:
    """What the text of each picture begins with.

    Attributes:
        ids: the start token, then the prompt's; columns behind a prompt are unspecified.
        lengths: tokens of each prompt, the start token included: at least 1.
        numbers: the number of each picture among all that are captioned together: what sampling draws depends on it,
            not on the batch. None: their places in this batch.
    """

    ids: Int64[Tensor, "images longest"]
    lengths: Int64[Tensor, "images"]
    numbers: Int64[Tensor, "images"] | None = None

    @classmethod
    def empty(cls, images: int, start: int, device: torch.device | str = "cpu") -> "Prompts":
        """The start token alone, for each picture."""
        lengths = torch.ones(images, dtype=torch.int64, device=device)
        return cls(start * lengths[:, None], lengths)

    @property
    def shared(self) -> int:
        """Tokens of the shortest prompt: the length at which a search begins."""
        return int(self.lengths.min()) if len(self.lengths) else 1

    def check(self, max_tokens: int) -> None:
        """Raises: ValueError: if a prompt leaves no room for a token."""
        longest = int(self.lengths.max()) if len(self.lengths) else 1
        if longest >= max_tokens:
            raise ValueError(
                f"a prompt takes {longest} tokens, the start token included, and max_tokens is {max_tokens}: "
                "nothing can follow it; shorten the prompt or raise max_tokens"
            )


@runtime_checkable
class Search(Protocol):
    """The state of decoding one batch.

    All texts have one length, which starts at `Prompts.shared` and grows by one a step; while a prompt is longer, its
    next token is the only one possible. Every picture that is still in the search has the same number of rows.
    """

    @property
    def last(self) -> Int64[Tensor, "images rows"]:
        """The newest token of each row, the one the model has not seen yet."""
        ...

    @property
    def finished(self) -> Bool[Tensor, "images"]:
        """The pictures whose result cannot change any more: all of them once the length is `max_tokens`."""
        ...

    def advance(self, logits: Float[Tensor, "images rows vocab"]) -> Int64[Tensor, "images new_rows"] | None:
        """Append one token to every row, given the logits after `last`.

        Returns: for each new row the old row of its picture that it continues; None where each continues itself. Their
            number may change: a search may begin with one row a picture, and spread in its first step.
        """
        ...

    def keep(self, pictures: Int64[Tensor, "kept"]) -> None:
        """Forget all pictures but these (places among those still in it)."""
        ...

    def hypotheses(self) -> list[list[Hypothesis]]:
        """For each picture that is still in it its results, best first."""
        ...


@runtime_checkable
class Strategy(Protocol):
    """The settings of a way to decode, a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def max_tokens(self) -> int:
        """Longest sequence, start and end token included."""
        ...

    @property
    def rows(self) -> int:
        """Rows a picture takes at most."""
        ...


@runtime_checkable
class SearchStrategy(Strategy, Protocol):
    """A strategy that writes texts by a search of its own."""

    def begin(self, prompts: Prompts, tokenizer: Tokenizer) -> Search:
        """The state before the first step, on the device of the prompts.

        Raises: ValueError: if a prompt leaves no room, or the strategy cannot follow what was asked.
        """
        ...


def check_lengths(max_tokens: int, min_tokens: int) -> None:
    """Raises: ValueError: unless `max_tokens` leaves room for a token, and `min_tokens` is from 0 to `max_tokens`."""
    why = "it counts the whole sequence, start and end token included"
    require_count("max_tokens", max_tokens, 2, why, most=MAX_TOKENS)
    require_count("min_tokens", min_tokens, 0, "0 allows the end token from the first step")
    if min_tokens > max_tokens:
        raise ValueError(
            f"min_tokens is {min_tokens}, above max_tokens, {max_tokens}; lower the one or raise the other"
        )


def check_number(name: str, value: Any, least: float, most: float, why: str) -> None:
    """Raises: ValueError: unless `value` is a number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"{name} must be a number from {least:g} to {most:g} ({why}), not {value!r}")
