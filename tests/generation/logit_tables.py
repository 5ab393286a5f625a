"""A language model that is a table: random logits for each beginning of a tiny vocabulary."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from contracap.generation import BeamSearch
from contracap.generation.strategy import Hypothesis, Prompts, Search, Strategy
from contracap.tokenizer import Tokenizer

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


class Words(Tokenizer):
    """The tokenizer of these tables: each id a word of one letter, but for the start and the end token."""

    def __init__(self) -> None:
        self.start, self.end, self.vocab_size = START, END, VOCAB

    @property
    def pieces(self) -> Sequence[bytes]:
        return [f"{chr(ord('a') + word)}</w>".encode() for word in range(WORDS)]

    def encode(self, text: str) -> list[int]:
        return [ord(word) - ord("a") for word in text.split()]


def prompts_of(prompts: Sequence[Sequence[int]]) -> Prompts:
    """Prompts of these words, filled up with an id that no vocabulary has."""
    longest = max(map(len, prompts)) + 1
    ids = [[START, *prompt, *[10**6] * (longest - 1 - len(prompt))] for prompt in prompts]
    return Prompts(torch.tensor(ids), torch.tensor([len(prompt) + 1 for prompt in prompts]))


def begin(strategy: Strategy, images: int, prompts: Prompts | None = None) -> Search:
    """The state before the first step, without a prompt if none is given."""
    return strategy.begin(Prompts.empty(images, START) if prompts is None else prompts, Words())


def run(
    strategy: Strategy, table: Table, prompts: Prompts | None = None, *, compact: bool = False
) -> list[list[Hypothesis]]:
    """Decode as the captioner does; `held` stands for the key/value cache and shows each row's beginning.

    `compact` takes finished pictures out of the batch at once.
    """
    images = list(range(len(table.images)))
    prompts = Prompts.empty(len(images), START) if prompts is None else prompts
    search = begin(strategy, len(images), prompts)
    shared = prompts.ids[:, : prompts.shared - 1]
    held = [[tuple(ids)] for ids in shared.tolist()]
    results: dict[int, list[Hypothesis]] = {}
    while images:
        finished = search.finished.tolist()
        if all(finished) or (compact and any(finished)):
            found = search.hypotheses()
            results |= {image: texts for image, texts, ended in zip(images, found, finished, strict=True) if ended}
            places = [place for place, ended in enumerate(finished) if not ended]
            search.keep(torch.tensor(places, dtype=torch.int64))
            images, held = [images[place] for place in places], [held[place] for place in places]
            continue
        last = search.last.tolist()
        held = [
            [(*beginning, token) for beginning, token in zip(rows, tokens, strict=True)]
            for rows, tokens in zip(held, last, strict=True)
        ]
        logits = [
            torch.stack([table.logits(table.images[image], beginning) for beginning in rows])
            for image, rows in zip(images, held, strict=True)
        ]
        parents = search.advance(torch.stack(logits))
        if parents is not None:
            held = [[rows[row] for row in chosen] for rows, chosen in zip(held, parents.tolist(), strict=True)]
        assert search.last.shape == (len(images), len(held[0])) and len(held[0]) <= strategy.rows
    return [results[image] for image in range(len(table.images))]


def step(table: Table, image: int, beginning: tuple[int, ...], min_tokens: int) -> list[float]:
    """Log-probabilities of the next token, -inf where it is forbidden, computed apart from the package."""
    logits = table.logits(image, beginning).double().tolist()
    total = math.log(sum(math.exp(value) for value in logits))
    values = [value - total for value in logits]
    values[START] = -math.inf
    if len(beginning) < min_tokens:
        values[END] = -math.inf
    return values


def text_of(ids: Sequence[int], gains: Sequence[float], score: float) -> Hypothesis:
    return Hypothesis(
        token_ids=tuple(ids), log_probability=sum(gains), score=score, token_log_probabilities=tuple(gains)
    )


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
                gains = [
                    step(table, image, (START, *text[:place]), strategy.min_tokens)[token]
                    for place, token in enumerate(text)
                ]
                total = sum(gains)
                if total > -math.inf:
                    inner = words if last == END else text
                    score = total / generated**strategy.length_penalty
                    found.append(text_of(inner, gains, score))
    return sorted(found, key=lambda text: -text.score)


def plain_beam_search(table: Table, image: int, strategy: BeamSearch) -> list[Hypothesis]:
    """Beam search in plain Python, to the longest length, without stopping early."""
    width = strategy.width
    live: list[tuple[tuple[int, ...], list[float]]] = [((START,), [])]
    kept: list[Hypothesis] = []
    while live:
        spread = [
            ((*beginning, token), [*gains, value])
            for beginning, gains in live
            for token, value in enumerate(step(table, image, beginning, strategy.min_tokens))
            if value > -math.inf
        ]
        spread = sorted(spread, key=lambda one: -sum(one[1]))[: 2 * width]
        live = []
        for rank, (text, gains) in enumerate(spread):
            if text[-1] != END and len(text) < strategy.max_tokens:
                live.append((text, gains))
            elif rank < width:
                inner = text[1:-1] if text[-1] == END else text[1:]
                score = sum(gains) / (len(text) - 1) ** strategy.length_penalty
                kept.append(text_of(inner, gains, score))
        live = live[:width]
    return sorted(kept, key=lambda text: -text.score)[:width]
