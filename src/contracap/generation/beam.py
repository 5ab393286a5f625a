"""Beam search over log-probabilities. It is fed logits and never sees a model."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.nn import functional

from contracap.generation.sampling import (
    Hypothesis,
    check_count,
    check_lengths,
    inner_tokens,
    next_log_probabilities,
)

CHUNK = 256  # scores looked at together by `best`; 128 to 256 was fastest for 6 beams of 49,408 tokens


@dataclass(frozen=True)
class BeamSearch:
    """Keep the `width` likeliest beginnings at each step, return the `width` best finished texts.

    A step looks at the best 2 * `width` continuations of a picture. Those among the first `width` that end are
    finished, and the best `width` that do not end go on. A text that reaches `max_tokens` is finished as it stands.
    A finished text scores the sum of its log-probabilities / length ** `length_penalty`; length counts the generated
    tokens: the end token where there is one, not the start token.

    A picture stops once no beginning can still beat the worst of its `width` finished texts, so stopping never changes
    the result. Among equals the better beam, then the lower token id, then the earlier finished text comes first. With
    `width` 1 the first end token closes the picture: that is greedy decoding.

    Attributes:
        width: beams of a picture, and texts kept.
        max_tokens: longest sequence, start and end token included.
        min_tokens: the end token is forbidden while the sequence, start token included, is shorter than this.
        length_penalty: above 0 favours long texts, below 0 short ones; 1 ranks by the mean log-probability of a token.

    Source: `GenerationMixin._beam_search` of transformers 4.50 and later, with `early_stopping="never"`: the same
        lengths, candidates and finished texts. Its default, `early_stopping=False`, estimates what a beam can reach
        from its present length, and may stop before a longer and better text is found.
    """

    width: int = 6
    max_tokens: int = 30
    min_tokens: int = 5
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        check_count("width", self.width, 1, "beams of a picture")
        check_lengths(self.max_tokens, self.min_tokens)
        penalty = self.length_penalty
        if isinstance(penalty, bool) or not isinstance(penalty, (int, float)) or not -10 <= penalty <= 10:
            raise ValueError(f"length_penalty must be a number from -10 to 10 (1 is usual), not {penalty!r}")

    @property
    def beams(self) -> int:
        """Rows a picture takes."""
        return self.width

    def begin(self, images: int, *, start: int, end: int, device: torch.device) -> "Beams":
        """The state before the first step."""
        return Beams(self, images, start=start, end=end, device=device)


class Beams:
    """The state of one batch: live beams and finished texts of each picture, both best first."""

    def __init__(self, strategy: BeamSearch, images: int, *, start: int, end: int, device: torch.device):
        self.strategy, self.start, self.end = strategy, start, end
        width = strategy.width
        self.length = 1
        self.tokens = torch.full((images, width, strategy.max_tokens), end, device=device)
        self.tokens[:, :, 0] = start
        self.sums = torch.full((images, width), -math.inf, device=device)
        self.sums[:, 0] = 0.0  # all beams begin alike: only the first may spread
        self.kept_tokens = self.tokens.clone()
        self.kept_lengths = torch.zeros((images, width), dtype=torch.int64, device=device)
        self.kept_sums = torch.full_like(self.sums, -math.inf)
        self.kept_scores = torch.full_like(self.sums, -math.inf)
        self.finished = torch.zeros(images, dtype=torch.bool, device=device)

    @property
    def last(self) -> Int64[Tensor, "rows"]:
        """The newest token of each row."""
        return self.tokens[:, :, self.length - 1].flatten()

    @property
    def done(self) -> bool:
        """Whether no picture can find anything better."""
        return self.length == self.strategy.max_tokens or bool(self.finished.all())

    def advance(self, logits: Float[Tensor, "rows vocab"]) -> Int64[Tensor, "rows"]:
        """Spread every live beam by one token and keep the best; returns the row that each row continues."""
        images, width = self.sums.shape
        vocab = logits.shape[-1]
        log_probabilities = next_log_probabilities(
            logits, start=self.start, end=self.end, length=self.length, min_tokens=self.strategy.min_tokens
        )
        totals = self.sums[:, :, None] + log_probabilities.unflatten(0, (images, width))
        sums, places = best(totals.flatten(1), 2 * width)
        parents, token = places // vocab, places % vocab
        tokens = rows_of(self.tokens, parents)
        tokens[:, :, self.length] = token
        self.length += 1

        closed = (token == self.end) | (self.length == self.strategy.max_tokens)
        accepted = closed[:, :width] & ~self.finished[:, None]
        self._keep(tokens[:, :width], sums[:, :width].masked_fill(~accepted, -math.inf))

        self.sums, chosen = best(sums.masked_fill(closed, -math.inf), width)
        self.tokens = rows_of(tokens, chosen)
        self._stop()
        first_row = torch.arange(images, device=places.device)[:, None] * width
        return (first_row + parents.gather(1, chosen)).flatten()

    def _keep(self, tokens: Int64[Tensor, "image width token"], sums: Float[Tensor, "image width"]) -> None:
        """Merge the texts that ended in this step (sum above -inf) with those kept before."""
        generated = self.length - 1
        scores = sums / generated**self.strategy.length_penalty
        self.kept_scores, chosen = best(torch.cat([self.kept_scores, scores], dim=1), sums.shape[1])
        self.kept_sums = torch.cat([self.kept_sums, sums], dim=1).gather(1, chosen)
        lengths = torch.cat([self.kept_lengths, torch.full_like(self.kept_lengths, generated)], dim=1)
        self.kept_lengths = lengths.gather(1, chosen)
        self.kept_tokens = rows_of(torch.cat([self.kept_tokens, tokens], dim=1), chosen)

    def _stop(self) -> None:
        """Mark the pictures whose live beams can no longer beat the worst text kept.

        A sum only falls. So the best a beam can reach is its present sum, at the length that flatters it most: the
        longest for a penalty above 0, else the next.
        """
        penalty = self.strategy.length_penalty
        generated = self.strategy.max_tokens - 1 if penalty > 0 else self.length
        self.finished |= self.sums[:, 0] / generated**penalty <= self.kept_scores[:, -1]
        if self.strategy.width == 1:
            self.finished |= self.kept_scores[:, 0] > -math.inf

    def hypotheses(self) -> list[list[Hypothesis]]:
        """For each picture its finished texts, best first: `width` of them, fewer only where fewer exist."""
        kept = (self.kept_tokens, self.kept_lengths, self.kept_sums, self.kept_scores)
        return [
            [
                Hypothesis(token_ids=inner_tokens(ids, generated, self.end), log_probability=total, score=score)
                for ids, generated, total, score in zip(*texts, strict=True)
                if score > -math.inf
            ]
            for texts in zip(*(values.tolist() for values in kept), strict=True)
        ]


def rows_of(
    table: Shaped[Tensor, "image row column"], rows: Int64[Tensor, "image chosen"]
) -> Shaped[Tensor, "image chosen column"]:
    """The rows of `table` that `rows` names, picture by picture."""
    return table.gather(1, rows[:, :, None].expand(-1, -1, table.shape[-1]))


def best(
    scores: Float[Tensor, "image candidates"], count: int
) -> tuple[Float[Tensor, "image count"], Int64[Tensor, "image count"]]:
    """The `count` best scores and their places, best first; among equals the lower place.

    `torch.topk` leaves the choice among equals open, and a stable sort of a whole vocabulary is slow. But only the
    `count` chunks with the best maxima can hold a winner; sorting these alone is as fast as `topk`.
    """
    if count > scores.shape[1]:
        raise ValueError(f"{count} candidates were asked for, there are {scores.shape[1]}")
    chunks = functional.pad(scores, (0, -scores.shape[1] % CHUNK), value=-math.inf).unflatten(1, (-1, CHUNK))
    by_maximum = chunks.amax(dim=-1).sort(dim=1, descending=True, stable=True).indices
    chunk = by_maximum[:, :count].sort(dim=1).values
    values, places = rows_of(chunks, chunk).flatten(1).sort(dim=1, descending=True, stable=True)
    values, places = values[:, :count], places[:, :count]
    return values, chunk.gather(1, places // CHUNK) * CHUNK + places % CHUNK
