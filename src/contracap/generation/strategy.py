"""The interface between a decoding strategy and the decoding loop.

A `Strategy` is a frozen dataclass of settings. `Strategy.begin` returns a `DecodingState`: the state of decoding one
batch, which receives logits and never sees a model.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int64
from torch import Tensor

from contracap.config import require_count
from contracap.tokenizer import Tokenizer

MAX_TOKENS = 10_000
MAX_TEXTS = 1000  # texts of one image that are searched together


@dataclass(frozen=True, kw_only=True)
class FinishedText:
    """A text that a search has finished, in tokens.

    Attributes:
        token_ids: the generated tokens, without the start token, the prompt and the end token.
        log_probability: the sum of `token_log_probabilities`.
        score: ranks texts, higher is better; each strategy documents its own.
        token_log_probabilities: the model's log-probability of each generated token, in nats. The end token is
            included, unless `max_tokens` cut the text.
    """

    token_ids: tuple[int, ...]
    log_probability: float
    score: float
    token_log_probabilities: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True)
class Prompts:
    """The beginning of each image's text.

    Attributes:
        ids: the start token, then the prompt; columns after a prompt are unspecified.
        lengths: tokens of each prompt, including the start token: at least 1.
        numbers: the number of each image among all that are captioned together. Sampling depends on it, and not on
            the batch. None: the positions in this batch.
    """

    ids: Int64[Tensor, "batch longest"]
    lengths: Int64[Tensor, "batch"]
    numbers: Int64[Tensor, "batch"] | None = None

    @property
    def shortest(self) -> int:
        """Tokens of the shortest prompt: the length at which a search begins."""
        return int(self.lengths.min()) if len(self.lengths) else 1

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return int(self.lengths.max()) if len(self.lengths) else 1

    def check(self, max_tokens: int) -> None:
        """Check that each prompt leaves room for a token.

        Raises: ValueError: if one does not.
        """
        if self.longest >= max_tokens:
            raise ValueError(
                f"a prompt takes {self.longest} tokens, the start token included, and max_tokens is {max_tokens}: "
                "nothing can follow it; shorten the prompt or raise max_tokens"
            )


@runtime_checkable
class DecodingState(Protocol):
    """The state of decoding one batch.

    All texts have the same length. It starts at `Prompts.shortest` and grows by one in each step. Where a prompt is
    longer, its next token is the only possible one. Every image in the batch has the same number of texts.
    """

    @property
    def last(self) -> Int64[Tensor, "batch text"]:
        """The newest token of each text, which the model has not read yet."""
        ...

    @property
    def finished(self) -> Bool[Tensor, "batch"]:
        """True for images whose result is final; for all of them once the length is `max_tokens`."""
        ...

    def advance(self, logits: Float[Tensor, "batch text vocab"]) -> Int64[Tensor, "batch new_text"] | None:
        """Append one token to every text, given the logits after `last`.

        Returns: the text of its image that each new text continues; None if each continues itself. The number of texts
            may change: a search may begin with one text per image and expand in its first step.
        """
        ...

    def select(self, images: Int64[Tensor, "selected"]) -> None:
        """Keep these images only, given by their positions among those still in the batch."""
        ...

    def list_texts(self) -> list[list[FinishedText]]:
        """Return the finished texts of each image that is still in the batch, best first."""
        ...


@runtime_checkable
class Strategy(Protocol):
    """The settings of a way to decode: a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def max_tokens(self) -> int:
        """Longest sequence, including start and end token."""
        ...

    @property
    def num_texts(self) -> int:
        """Maximum number of texts per image."""
        ...

    def begin(self, prompts: Prompts, tokenizer: Tokenizer) -> DecodingState:
        """Return the state before the first step, on the device of the prompts.

        Raises: ValueError: if a prompt leaves no room, or the strategy does not support a prompt or rule.
        """
        ...


def check_lengths(max_tokens: int, min_tokens: int) -> None:
    """Check that `max_tokens` leaves room for a token, and that `min_tokens` is from 0 to `max_tokens`.

    Raises: ValueError: if not.
    """
    why = "it counts the whole sequence, start and end token included"
    require_count("max_tokens", max_tokens, 2, why, most=MAX_TOKENS)
    require_count("min_tokens", min_tokens, 0, "0 allows the end token from the first step")
    if min_tokens > max_tokens:
        raise ValueError(
            f"min_tokens is {min_tokens}, above max_tokens ({max_tokens}): lower min_tokens or raise max_tokens"
        )


def check_number(name: str, value: Any, least: float, most: float, why: str) -> None:
    """Check that `value` is a number from `least` to `most`.

    Raises: ValueError: if it is not; says `why`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"{name} must be a number from {least:g} to {most:g} ({why}), not {value!r}")
