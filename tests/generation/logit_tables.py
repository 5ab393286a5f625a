"""A language model that is a table: random logits for each beginning of a tiny vocabulary."""

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from contracap.generation import BeamSearch
from contracap.generation.sampling import Hypothesis, Search, Strategy

WORDS = 3  # ids 0 to 2; then the start and the end token
START, END, VOCAB = WORDS, WORDS + 1, WORDS + 2


@dataclass(frozen=True)
class Table:
    """Logits after each beginning, for each picture; the larger the `spread`, the surer the model."""

    images: tuple[int, ...]
    seed: int
    spread: float = 2.0

    def logits(self, image: int, beginning: tuple[int, ...]) -> Tensor:
        number = 0
        for token in (image, *beginning):
            number = number * 31 + token + 1
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        return self.spread * torch.randn(VOCAB, generator=generator)

    def only(self, image: int) -> "Table":
        """The table of one picture alone."""
        return replace(self, images=(image,))


def run(strategy: Strategy, table: Table) -> list[list[Hypothesis]]:
    """Decode as the captioner does; `held` stands for the key/value cache and shows each row's beginning."""
    search: Search = strategy.begin(len(table.images), start=START, end=END, device=torch.device("cpu"))
    held: list[tuple[int, ...]] = [()] * (len(table.images) * strategy.beams)
    while not search.done:
        held = [(*beginning, token) for beginning, token in zip(held, search.last.tolist(), strict=True)]
        logits = [table.logits(table.images[row // strategy.beams], beginning) for row, beginning in enumerate(held)]
        rows = search.advance(torch.stack(logits))
        if rows is not None:
            held = [held[row] for row in rows.tolist()]
    return search.hypotheses()


def step(table: Table, image: int, beginning: tuple[int, ...], min_tokens: int) -> list[float]:
    """Log-probabilities of the next token, -inf where it is forbidden, computed apart from the package."""
    logits = table.logits(image, beginning).double().tolist()
    total = math.log(sum(math.exp(value) for value in logits))
    values = [value - total for value in logits]
    values[START] = -math.inf
    if len(beginning) < min_tokens:
        values[END] = -math.inf
    return values


def every_text(table: Table, image: int, strategy: BeamSearch) -> list[Hypothesis]:
    """All texts there are, best first."""
    found = []
    for generated in range(1, strategy.max_tokens):
        for words in itertools.product(range(WORDS), repeat=generated - 1):
            closings = range(VOCAB) if generated == strategy.max_tokens - 1 else [END]
            for last in closings:
                if last == START:
                    continue
                text = (*words, last)
                total = sum(
                    step(table, image, (START, *text[:place]), strategy.min_tokens)[token]
                    for place, token in enumerate(text)
                )
                if total > -math.inf:
                    inner = words if last == END else text
                    score = total / generated**strategy.length_penalty
                    found.append(Hypothesis(token_ids=inner, log_probability=total, score=score))
    return sorted(found, key=lambda text: -text.score)


def plain_beam_search(table: Table, image: int, strategy: BeamSearch) -> list[Hypothesis]:
    """Beam search in plain Python, to the longest length, without stopping early."""
    width = strategy.width
    live = [((START,), 0.0)]
    kept: list[Hypothesis] = []
    while live:
        spread = [
            ((*beginning, token), total + value)
            for beginning, total in live
            for token, value in enumerate(step(table, image, beginning, strategy.min_tokens))
            if value > -math.inf
        ]
        spread = sorted(spread, key=lambda one: -one[1])[: 2 * width]
        live = []
        for rank, (text, total) in enumerate(spread):
            if text[-1] != END and len(text) < strategy.max_tokens:
                live.append((text, total))
            elif rank < width:
                inner = text[1:-1] if text[-1] == END else text[1:]
                score = total / (len(text) - 1) ** strategy.length_penalty
                kept.append(Hypothesis(token_ids=inner, log_probability=total, score=score))
        live = live[:width]
    return sorted(kept, key=lambda text: -text.score)[:width]
