"""Texts while they are written, and the best of those that are finished."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.nn import functional

from contracap.generation.strategy import FinishedText, Prompts

CHUNK = 256  # scores that `stable_topk` compares at once; 128 to 256 was fastest for 6 beams of 49,408 tokens


@dataclass(frozen=True)
class PartialTexts:
    """The unfinished texts of a batch, which all have the same length.

    Attributes:
        ids: start token, prompt and generated tokens; columns from `length` on are unspecified.
        token_log_probs: the model's log-probability of each token; unspecified for the prompt.
        length: tokens of each text.
        prompt_lengths: tokens of each image's prompt, including the start token.
    """

    ids: Int64[Tensor, "batch text max_tokens"]
    token_log_probs: Float[Tensor, "batch text max_tokens"]
    length: int
    prompt_lengths: Int64[Tensor, "batch"]

    @classmethod
    def from_prompts(cls, prompts: Prompts, max_tokens: int) -> "PartialTexts":
        """Start one text per image with as many tokens as the shortest prompt has.

        Raises: ValueError: if a prompt leaves no room for a token.
        """
        prompts.check(max_tokens)
        ids = prompts.ids.new_zeros((len(prompts.ids), 1, max_tokens))
        ids[:, 0, : prompts.shortest] = prompts.ids[:, : prompts.shortest]
        return cls(ids, torch.zeros_like(ids, dtype=torch.float32), prompts.shortest, prompts.lengths)

    @classmethod
    def concatenate(cls, parts: Sequence["PartialTexts"]) -> "PartialTexts":
        """Join the texts of several searches of the same images."""
        first = parts[0]
        ids = torch.cat([part.ids for part in parts], dim=1)
        token_log_probs = torch.cat([part.token_log_probs for part in parts], dim=1)
        return cls(ids, token_log_probs, first.length, first.prompt_lengths)

    @property
    def last(self) -> Int64[Tensor, "batch text"]:
        """The newest token of each text."""
        return self.ids[:, :, self.length - 1]

    @property
    def is_full(self) -> bool:
        """True once the texts have reached `max_tokens`."""
        return self.length == self.ids.shape[2]

    @property
    def num_generated(self) -> Int64[Tensor, "batch"]:
        """Tokens after the prompt."""
        return (self.length - self.prompt_lengths).clamp(min=0)

    def append(
        self,
        token: Int64[Tensor, "batch new_text"],
        token_log_prob: Float[Tensor, "batch new_text"],
        parents: Int64[Tensor, "batch new_text"] | None = None,
    ) -> "PartialTexts":
        """Return texts that are one token longer.

        Args:
            parents: the text that each new text continues; None if each continues itself.
        """
        if parents is None:
            ids, token_log_probs = self.ids.clone(), self.token_log_probs.clone()
        else:
            ids, token_log_probs = select_rows(self.ids, parents), select_rows(self.token_log_probs, parents)
        ids[:, :, self.length] = token
        token_log_probs[:, :, self.length] = token_log_prob
        return PartialTexts(ids, token_log_probs, self.length + 1, self.prompt_lengths)

    def reorder(self, order: Int64[Tensor, "batch new_text"]) -> "PartialTexts":
        """Return these texts of each image, in this order."""
        ids, token_log_probs = select_rows(self.ids, order), select_rows(self.token_log_probs, order)
        return PartialTexts(ids, token_log_probs, self.length, self.prompt_lengths)

    def select(self, images: Int64[Tensor, "selected"]) -> "PartialTexts":
        """Return the texts of these images."""
        return PartialTexts(self.ids[images], self.token_log_probs[images], self.length, self.prompt_lengths[images])


class BestTexts:
    """The `count` best finished texts of each image, best first; of two equal scores the earlier text comes first."""

    def __init__(self, texts: PartialTexts, count: int):
        images, _, max_tokens = texts.ids.shape
        self.ids = texts.ids.new_zeros((images, count, max_tokens))
        self.token_log_probs = texts.token_log_probs.new_zeros((images, count, max_tokens))
        self.scores = texts.token_log_probs.new_full((images, count), -math.inf)
        self.lengths = torch.zeros_like(self.scores, dtype=torch.int64)
        self.prompt_lengths = texts.prompt_lengths

    def add(self, texts: PartialTexts, scores: Float[Tensor, "batch text"]) -> None:
        """Add texts as they are; a score of -inf leaves a text out."""
        count = self.scores.shape[1]
        self.scores, rows = stable_topk(torch.cat([self.scores, scores], dim=1), count)
        lengths = torch.full_like(scores, texts.length, dtype=torch.int64)
        self.lengths = torch.cat([self.lengths, lengths], dim=1).gather(1, rows)
        self.ids = select_rows(torch.cat([self.ids, texts.ids], dim=1), rows)
        self.token_log_probs = select_rows(torch.cat([self.token_log_probs, texts.token_log_probs], dim=1), rows)

    def select(self, images: Int64[Tensor, "selected"]) -> None:
        """Keep the texts of these images only."""
        for name in ("ids", "token_log_probs", "scores", "lengths", "prompt_lengths"):
            setattr(self, name, getattr(self, name)[images])

    def list_texts(self, end: int) -> list[list[FinishedText]]:
        """Return the texts of each image, best first: `count` of them, or fewer if fewer were added."""
        columns = (self.ids, self.token_log_probs, self.lengths, self.scores, self.prompt_lengths)
        return [
            [
                build_finished_text(ids[prompt_length:length], token_log_probs[prompt_length:length], score, end)
                for ids, token_log_probs, length, score in zip(*texts, strict=True)
                if score > -math.inf
            ]
            for *texts, prompt_length in zip(*(values.tolist() for values in columns), strict=True)
        ]


def build_finished_text(ids: list[int], token_log_probs: list[float], score: float, end: int) -> FinishedText:
    """Return a finished text; `ids` are its generated tokens, with or without the end token."""
    return FinishedText(
        token_ids=tuple(ids[:-1] if ids and ids[-1] == end else ids),
        log_probability=sum(token_log_probs, 0.0),
        score=score,
        token_log_probabilities=tuple(token_log_probs),
    )


def select_rows(
    table: Shaped[Tensor, "batch row column"], rows: Int64[Tensor, "batch new_row"]
) -> Shaped[Tensor, "batch new_row column"]:
    """Return the rows with these numbers, image by image."""
    return table.gather(1, rows[:, :, None].expand(-1, -1, table.shape[-1]))


def stable_topk(
    scores: Float[Tensor, "batch candidates"], count: int
) -> tuple[Float[Tensor, "batch count"], Int64[Tensor, "batch count"]]:
    """Return the `count` highest scores and their indices, best first; of two equal scores the lower index comes first.

    `torch.topk` does not specify the order of equal scores, and a stable sort of a whole vocabulary is slow. Only the
    `count` chunks with the highest maxima can hold a winner. Sorting those alone is as fast as `topk`.
    """
    if count > scores.shape[1]:
        raise ValueError(f"cannot take the {count} best of {scores.shape[1]} scores: ask for at most {scores.shape[1]}")
    chunks = functional.pad(scores, (0, -scores.shape[1] % CHUNK), value=-math.inf).unflatten(1, (-1, CHUNK))
    by_maximum = chunks.amax(dim=-1).sort(dim=1, descending=True, stable=True).indices
    chunk = by_maximum[:, :count].sort(dim=1).values
    values, indices = select_rows(chunks, chunk).flatten(1).sort(dim=1, descending=True, stable=True)
    values, indices = values[:, :count], indices[:, :count]
    return values, chunk.gather(1, indices // CHUNK) * CHUNK + indices % CHUNK
