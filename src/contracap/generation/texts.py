"""Texts while they are written, the best of those that are finished, and how the best are found."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.nn import functional

from contracap.generation.strategy import Hypothesis, Prompts

CHUNK = 256  # scores looked at together by `best`; 128 to 256 was fastest for 6 beams of 49,408 tokens


@dataclass(frozen=True)
class Texts:
    """The texts of one batch as far as they are written; all have one length.

    Attributes:
        ids: start token, prompt and what was generated; columns from `length` on are unspecified.
        gains: the model's log-probability of each token; those of prompts are unspecified.
        length: tokens of each text.
        prompted: tokens of each picture's prompt, the start token included.
    """

    ids: Int64[Tensor, "images rows max_tokens"]
    gains: Float[Tensor, "images rows max_tokens"]
    length: int
    prompted: Int64[Tensor, "images"]

    @classmethod
    def begin(cls, prompts: Prompts, max_tokens: int) -> "Texts":
        """One row a picture: what all prompts have columns for.

        Raises: ValueError: if a prompt leaves no room for a token.
        """
        prompts.check(max_tokens)
        ids = prompts.ids.new_zeros((len(prompts.ids), 1, max_tokens))
        ids[:, 0, : prompts.shared] = prompts.ids[:, : prompts.shared]
        return cls(ids, torch.zeros_like(ids, dtype=torch.float32), prompts.shared, prompts.lengths)

    @classmethod
    def side_by_side(cls, parts: Sequence["Texts"]) -> "Texts":
        """The rows of all parts."""
        first = parts[0]
        ids, gains = torch.cat([part.ids for part in parts], dim=1), torch.cat([part.gains for part in parts], dim=1)
        return cls(ids, gains, first.length, first.prompted)

    @property
    def last(self) -> Int64[Tensor, "images rows"]:
        """The newest token of each."""
        return self.ids[:, :, self.length - 1]

    @property
    def full(self) -> bool:
        """Whether no token fits any more."""
        return self.length == self.ids.shape[2]

    @property
    def generated(self) -> Int64[Tensor, "images"]:
        """Tokens behind the prompt."""
        return (self.length - self.prompted).clamp(min=0)

    def grown(
        self,
        token: Int64[Tensor, "images new"],
        gain: Float[Tensor, "images new"],
        parents: Int64[Tensor, "images new"] | None = None,
    ) -> "Texts":
        """Each new text is the one `parents` names, by default the one in its place, and one more token."""
        ids, gains = (self.ids.clone(), self.gains.clone()) if parents is None else self._rows(parents)
        ids[:, :, self.length] = token
        gains[:, :, self.length] = gain
        return Texts(ids, gains, self.length + 1, self.prompted)

    def chosen(self, rows: Int64[Tensor, "images new"]) -> "Texts":
        """These rows of each picture."""
        return Texts(*self._rows(rows), self.length, self.prompted)

    def of(self, pictures: Int64[Tensor, "kept"]) -> "Texts":
        """Those of these pictures."""
        return Texts(self.ids[pictures], self.gains[pictures], self.length, self.prompted[pictures])

    def _rows(self, rows: Int64[Tensor, "images new"]) -> tuple[Tensor, Tensor]:
        return rows_of(self.ids, rows), rows_of(self.gains, rows)


class Finished:
    """The `count` best finished texts of each picture, best first; among equals the earlier one stays ahead."""

    def __init__(self, texts: Texts, count: int):
        images, _, max_tokens = texts.ids.shape
        self.ids = texts.ids.new_zeros((images, count, max_tokens))
        self.gains = texts.gains.new_zeros((images, count, max_tokens))
        self.scores = texts.gains.new_full((images, count), -math.inf)
        self.lengths = torch.zeros_like(self.scores, dtype=torch.int64)
        self.prompted = texts.prompted

    def add(self, texts: Texts, scores: Float[Tensor, "images rows"]) -> None:
        """Enter texts as they stand, but for those whose score is -inf."""
        count = self.scores.shape[1]
        self.scores, chosen = best(torch.cat([self.scores, scores], dim=1), count)
        lengths = torch.full_like(scores, texts.length, dtype=torch.int64)
        self.lengths = torch.cat([self.lengths, lengths], dim=1).gather(1, chosen)
        self.ids = rows_of(torch.cat([self.ids, texts.ids], dim=1), chosen)
        self.gains = rows_of(torch.cat([self.gains, texts.gains], dim=1), chosen)

    def keep(self, pictures: Int64[Tensor, "kept"]) -> None:
        """Forget the texts of all other pictures."""
        for name in ("ids", "gains", "scores", "lengths", "prompted"):
            setattr(self, name, getattr(self, name)[pictures])

    def hypotheses(self, end: int) -> list[list[Hypothesis]]:
        """For each picture its texts, best first: `count` of them, fewer only where fewer were entered."""
        kept = (values.tolist() for values in (self.ids, self.gains, self.lengths, self.scores, self.prompted))
        return [
            [
                finish_text(ids[prompted:length], gains[prompted:length], score, end)
                for ids, gains, length, score in zip(*texts, strict=True)
                if score > -math.inf
            ]
            for *texts, prompted in zip(*kept, strict=True)
        ]


def finish_text(ids: list[int], gains: list[float], score: float, end: int) -> Hypothesis:
    """A result of generated tokens, which the end token may close."""
    inner = ids[:-1] if ids and ids[-1] == end else ids
    return Hypothesis(
        token_ids=tuple(inner), log_probability=sum(gains, 0.0), score=score, token_log_probabilities=tuple(gains)
    )


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
