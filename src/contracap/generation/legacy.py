"""The beam search of open_clip's releases, for the sake of their published figures."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from contracap.generation.strategy import Hypothesis, Prompts, check_lengths
from contracap.generation.texts import Finished, Texts, best
from contracap.tokenizer import Tokenizer

WIDTH = 2  # 6 beams in 3 groups there; nothing tells the groups apart, so they stay alike


@dataclass(frozen=True)
class LegacyBeamSearch:
    """What open_clip calls 6 beams in 3 groups: 2 beams, ranked by sums of raw logits.

    A step adds the logits to the sums and looks at the best 4 continuations. An end token among the first 2 closes a
    text, which scores its sum / divisor; one behind them is passed over; the others go on. The 2 best texts are kept. A
    picture stops once 2 exist and the worse is no worse than the best of the 4 sums / divisor. Texts that reach
    `max_tokens` are finished as they stand and score their sum / `max_tokens`.

    The divisor depends on the release of transformers beside it: the length before the end token in 4.26.1, with which
    the figures of 2023 were made, the length with it in 4.49. The sums are no log-probabilities and depend on constants
    added to the logits; `BeamSearch` is the better search. Prompts and rules it does not know.

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
    def rows(self) -> int:
        """Rows a picture takes at most."""
        return WIDTH

    def begin(self, prompts: Prompts, tokenizer: Tokenizer) -> "LegacyBeams":
        """The state before the first step.

        Raises: ValueError: if there is a prompt.
        """
        if (prompts.lengths != 1).any():
            raise ValueError("LegacyBeamSearch takes no prompts, the releases had none; use BeamSearch")
        return LegacyBeams(self, prompts, tokenizer)


class LegacyBeams:
    """The state of one batch."""

    def __init__(self, strategy: LegacyBeamSearch, prompts: Prompts, tokenizer: Tokenizer):
        self.strategy, self.end = strategy, tokenizer.end
        self.texts = Texts.begin(prompts, strategy.max_tokens)
        self.sums = torch.zeros_like(self.texts.gains[:, :, 0])
        self.kept = Finished(self.texts, WIDTH)
        self.stopped = torch.zeros(len(prompts.ids), dtype=torch.bool, device=prompts.ids.device)

    @property
    def last(self) -> Int64[Tensor, "images rows"]:
        """The newest token of each row."""
        return self.texts.last

    @property
    def finished(self) -> Bool[Tensor, "images"]:
        """The pictures that have stopped."""
        return self.stopped | self.texts.full

    def advance(self, logits: Float[Tensor, "images rows vocab"]) -> Int64[Tensor, "images width"]:
        """Spread both beams by one token and keep the best; returns the row that each new row continues."""
        vocab, length = logits.shape[-1], self.texts.length
        log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        logits = logits.float()
        if length < self.strategy.min_tokens:
            logits = logits.index_fill(-1, torch.tensor([self.end], device=logits.device), -math.inf)
        sums, places = best((self.sums[:, :, None] + logits).flatten(1), 2 * WIDTH)
        parents, token = places // vocab, places % vocab
        texts = self.texts.grown(token, log_probabilities.flatten(1).gather(1, places), parents)

        ended = token == self.end
        accepted = ended & ~self.stopped[:, None]
        accepted[:, WIDTH:] = False
        divisor = length if self.strategy.year == 2023 else length + 1
        self.kept.add(texts, (sums / divisor).masked_fill(~accepted, -math.inf))
        worse = self.kept.scores[:, -1]
        self.stopped = self.stopped | ((worse > -math.inf) & (worse >= sums[:, 0] / divisor))

        self.sums, chosen = best(sums.masked_fill(ended, -math.inf), WIDTH)
        self.texts = texts.chosen(chosen)
        if self.texts.full:
            open_sums = self.sums.masked_fill(self.stopped[:, None], -math.inf)
            self.kept.add(self.texts, open_sums / self.strategy.max_tokens)
        return parents.gather(1, chosen)

    def keep(self, pictures: Int64[Tensor, "kept"]) -> None:
        """Forget all other pictures."""
        self.texts = self.texts.of(pictures)
        self.sums, self.stopped = self.sums[pictures], self.stopped[pictures]
        self.kept.keep(pictures)

    def hypotheses(self) -> list[list[Hypothesis]]:
        """For each picture its 2 best texts; the log-probabilities are the model's, the score is the rule's."""
        return self.kept.hypotheses(self.end)
