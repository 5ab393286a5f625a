"""The beam search of open_clip's releases, which reproduces their published figures."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from contracap.generation.strategy import FinishedText, Prompts, check_lengths
from contracap.generation.texts import BestTexts, PartialTexts, stable_topk
from contracap.tokenizer import Tokenizer

WIDTH = 2  # the release has 6 beams in 3 groups, but nothing makes the groups differ


@dataclass(frozen=True)
class LegacyBeamSearch:
    """Search with 2 beams, ranked by sums of raw logits. open_clip calls it 6 beams in 3 groups.

    A step adds the logits to the sums and takes the best 4 continuations. If one of the first 2 is an end token, that
    text is finished and scores its sum / divisor; an end token after the first 2 is ignored. The best 2 continuations
    without an end token become the next beams.

    The 2 best finished texts are kept. An image stops once it has 2 and the worse is at least as good as the best of
    the 4 sums / divisor. Texts that reach `max_tokens` are finished as they are and score their sum / `max_tokens`.

    The divisor depends on the installed release of transformers. In 4.26.1, with which the figures of 2023 were
    made, it is the length without the end token; in 4.49 it includes the end token. The sums are not log-probabilities
    and depend on constants added to the logits: `BeamSearch` is the better search. Prompts and rules are not supported.

    Source: open_clip 3.3.0, `CoCa._generate_beamsearch`; `BeamSearchScorer` of transformers.
    """

    year: int
    """2023 for transformers 4.26.1, 2024 for 4.49."""
    max_tokens: int = 30
    """Longest sequence, start and end token included."""
    min_tokens: int = 5
    """The end token is forbidden while the sequence, start token included, is shorter than this."""

    def __post_init__(self) -> None:
        if self.year not in (2023, 2024):
            raise ValueError(f"year must be 2023 or 2024, not {self.year!r}")
        check_lengths(self.max_tokens, self.min_tokens)

    @property
    def num_texts(self) -> int:
        """Maximum number of texts per image."""
        return WIDTH

    def begin(self, prompts: Prompts, tokenizer: Tokenizer) -> "LegacyState":
        """Return the state before the first step.

        Raises: ValueError: if there is a prompt.
        """
        if (prompts.lengths != 1).any():
            raise ValueError("LegacyBeamSearch takes no prompts, as in the releases: use BeamSearch")
        return LegacyState(self, prompts, tokenizer)


class LegacyState:
    """The state of decoding one batch."""

    def __init__(self, strategy: LegacyBeamSearch, prompts: Prompts, tokenizer: Tokenizer):
        self.strategy, self.end = strategy, tokenizer.end
        self.texts = PartialTexts.from_prompts(prompts, strategy.max_tokens)
        self.scores = torch.zeros_like(self.texts.token_log_probs[:, :, 0])
        self.best_texts = BestTexts(self.texts, WIDTH)
        self.stopped = torch.zeros(len(prompts.ids), dtype=torch.bool, device=prompts.ids.device)

    @property
    def last(self) -> Int64[Tensor, "batch text"]:
        """The newest token of each text."""
        return self.texts.last

    @property
    def finished(self) -> Bool[Tensor, "batch"]:
        """True for images that have stopped."""
        return self.stopped | self.texts.is_full

    def advance(self, logits: Float[Tensor, "batch text vocab"]) -> Int64[Tensor, "batch beam"]:
        """Extend both beams by one token and keep the best; return the beam that each new beam continues."""
        vocab, length = logits.shape[-1], self.texts.length
        log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        logits = logits.float()
        if length < self.strategy.min_tokens:
            logits = logits.index_fill(-1, torch.tensor([self.end], device=logits.device), -math.inf)
        scores, indices = stable_topk((self.scores[:, :, None] + logits).flatten(1), 2 * WIDTH)
        parents, token = indices // vocab, indices % vocab
        texts = self.texts.append(token, log_probs.flatten(1).gather(1, indices), parents)

        has_ended = token == self.end
        is_accepted = has_ended & ~self.stopped[:, None]
        is_accepted[:, WIDTH:] = False
        divisor = length if self.strategy.year == 2023 else length + 1
        self.best_texts.add(texts, (scores / divisor).masked_fill(~is_accepted, -math.inf))
        worse = self.best_texts.scores[:, -1]
        self.stopped = self.stopped | ((worse > -math.inf) & (worse >= scores[:, 0] / divisor))

        self.scores, beams = stable_topk(scores.masked_fill(has_ended, -math.inf), WIDTH)
        self.texts = texts.reorder(beams)
        if self.texts.is_full:
            unfinished_scores = self.scores.masked_fill(self.stopped[:, None], -math.inf)
            self.best_texts.add(self.texts, unfinished_scores / self.strategy.max_tokens)
        return parents.gather(1, beams)

    def select(self, images: Int64[Tensor, "selected"]) -> None:
        """Keep these images only."""
        self.texts = self.texts.select(images)
        self.scores, self.stopped = self.scores[images], self.stopped[images]
        self.best_texts.select(images)

    def list_texts(self) -> list[list[FinishedText]]:
        """Return the 2 best texts of each image; the log-probabilities are the model's, the score is that of the
        release."""
        return self.best_texts.list_texts(self.end)
