"""From logits to the next token, one sequence a picture; and what every decoding strategy shares.

A strategy (`Greedy`, `beam.BeamSearch`) is a frozen record of settings. Its `begin` makes a `Search`: the state of one
batch, which is fed logits and never sees a model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """One finished sequence.

    Attributes:
        token_ids: what was generated, without the start and the end token.
        log_probability: sum over the generated tokens, the end token included where there is one, in nats.
        score: what ranks hypotheses, higher is better.
    """

    token_ids: tuple[int, ...]
    log_probability: float
    score: float


@runtime_checkable
class Search(Protocol):
    """The state of decoding one batch. Rows are picture-major: the beams of one picture are neighbours."""

    @property
    def last(self) -> Int64[Tensor, "rows"]:
        """The newest token of each row, the one the model has not seen yet."""
        ...

    @property
    def done(self) -> bool:
        """Whether every picture has its result."""
        ...

    def advance(self, logits: Float[Tensor, "rows vocab"]) -> Int64[Tensor, "rows"] | None:
        """Append one token to every row, given the logits after `last`.

        Returns: the row that each row continues, for the cache to follow; None where each continues itself.
        """
        ...

    def hypotheses(self) -> list[list[Hypothesis]]:
        """For each picture its results, best first."""
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
    def beams(self) -> int:
        """Rows a picture takes."""
        ...

    def begin(self, images: int, *, start: int, end: int, device: torch.device) -> Search:
        """The state before the first step, for a batch of `images` pictures whose sequences hold the start token."""
        ...


@dataclass(frozen=True)
class Greedy:
    """Always the likeliest next token (the lowest id among equals); the same ids as `BeamSearch(width=1)`.

    Attributes:
        max_tokens: longest sequence, start and end token included; a text without an end token stops there.
        min_tokens: the end token is forbidden while the sequence, start token included, is shorter than this.
    """

    max_tokens: int = 30
    min_tokens: int = 5

    def __post_init__(self) -> None:
        check_lengths(self.max_tokens, self.min_tokens)

    @property
    def beams(self) -> int:
        """Rows a picture takes."""
        return 1

    def begin(self, images: int, *, start: int, end: int, device: torch.device) -> "SingleSearch":
        """The state before the first step."""
        return SingleSearch(
            images,
            choose=lambda log_probabilities: log_probabilities.max(dim=-1).indices,  # the first among equals
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            start=start,
            end=end,
            device=device,
        )


class SingleSearch:
    """One sequence a picture; `choose` picks each next token from its log-probabilities.

    Nothing competes here: the score is the mean log-probability of a token, as for `BeamSearch` with length penalty 1.
    """

    def __init__(
        self,
        images: int,
        *,
        choose: Callable[[Tensor], Tensor],
        max_tokens: int,
        min_tokens: int,
        start: int,
        end: int,
        device: torch.device,
    ):
        self.choose, self.min_tokens, self.start, self.end = choose, min_tokens, start, end
        self.tokens = torch.full((images, max_tokens), end, device=device)
        self.tokens[:, 0] = start
        self.length = 1
        self.generated = torch.zeros(images, dtype=torch.int64, device=device)
        self.log_probability = torch.zeros(images, dtype=torch.float32, device=device)
        self.finished = torch.zeros(images, dtype=torch.bool, device=device)

    @property
    def last(self) -> Int64[Tensor, "rows"]:
        """The newest token of each row."""
        return self.tokens[:, self.length - 1]

    @property
    def done(self) -> bool:
        """Whether every picture has its end token or is full."""
        return self.length == self.tokens.shape[1] or bool(self.finished.all())

    def advance(self, logits: Float[Tensor, "rows vocab"]) -> None:
        """Append the chosen token to every row that has not ended."""
        log_probabilities = next_log_probabilities(
            logits, start=self.start, end=self.end, length=self.length, min_tokens=self.min_tokens
        )
        token = torch.where(self.finished, self.end, self.choose(log_probabilities))
        gained = log_probabilities.gather(-1, token[:, None]).squeeze(-1)
        self.log_probability += gained.masked_fill(self.finished, 0.0)
        self.generated += ~self.finished
        self.tokens[:, self.length] = token
        self.finished |= token == self.end
        self.length += 1

    def hypotheses(self) -> list[list[Hypothesis]]:
        """For each picture its one result."""
        score = self.log_probability / self.generated
        rows = zip(
            self.tokens.tolist(), self.generated.tolist(), self.log_probability.tolist(), score.tolist(), strict=True
        )
        return [
            [Hypothesis(token_ids=inner_tokens(ids, count, self.end), log_probability=total, score=mean)]
            for ids, count, total, mean in rows
        ]


def next_log_probabilities(
    logits: Float[Tensor, "rows vocab"], *, start: int, end: int, length: int, min_tokens: int
) -> Float[Tensor, "rows vocab"]:
    """Log-probabilities of the next token in float32, -inf where it is forbidden.

    Forbidden are a second start token, and the end token while the sequence of `length` tokens is shorter than
    `min_tokens`. The rest is not scaled up: it stays what the model gave. Id 0 is a word like any other, not fill.
    """
    log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    log_probabilities[:, start] = -math.inf
    if length < min_tokens:
        log_probabilities[:, end] = -math.inf
    return log_probabilities


def inner_tokens(ids: list[int], generated: int, end: int) -> tuple[int, ...]:
    """The first `generated` ids after the start token, without the end token that may close them."""
    inner = ids[1 : generated + 1]
    return tuple(inner[:-1] if inner and inner[-1] == end else inner)


def check_lengths(max_tokens: int, min_tokens: int) -> None:
    """Raises: ValueError: unless `max_tokens` leaves room for a token, and `min_tokens` is from 0 to `max_tokens`."""
    check_count("max_tokens", max_tokens, 2, "it counts the whole sequence, start and end token included")
    check_count("min_tokens", min_tokens, 0, "0 allows the end token from the first step")
    if min_tokens > max_tokens:
        raise ValueError(
            f"min_tokens is {min_tokens}, above max_tokens, {max_tokens}; lower the one or raise the other"
        )


def check_count(name: str, value: int, least: int, why: str) -> None:
    """Raises: ValueError: unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least} ({why}), not {value!r}")
