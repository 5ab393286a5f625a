"""A language model that is a table: random logits for each beginning of a tiny vocabulary."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from contracap.generation import BeamSearch, Rules
from contracap.generation.strategy import DecodingState, FinishedText, Prompts, Strategy
from contracap.tokenizer import Tokenizer

WORDS = 3  # ids 0 to 2; then the start and the end token
START, END, VOCAB = WORDS, WORDS + 1, WORDS + 2


@dataclass(frozen=True)
class Table:
    """Logits after each beginning, for each image; the larger the `spread`, the surer the model."""

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
        """The table of one image alone."""
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


def prompts_of(prompts: Sequence[Sequence[int]], numbers: Sequence[int] | None = None) -> Prompts:
    """Prompts of these words, filled up with an id that no vocabulary has."""
    longest = max(map(len, prompts)) + 1
    ids = [[START, *prompt, *[10**6] * (longest - 1 - len(prompt))] for prompt in prompts]
    lengths = torch.tensor([len(prompt) + 1 for prompt in prompts])
    return Prompts(torch.tensor(ids), lengths, None if numbers is None else torch.tensor(numbers))


def empty_prompts(images: int, start: int) -> Prompts:
    """Prompts that hold the start token alone."""
    lengths = torch.ones(images, dtype=torch.int64)
    return Prompts(start * lengths[:, None], lengths)


def begin(strategy: Strategy, images: int, prompts: Prompts | None = None) -> DecodingState:
    """The state before the first step, without a prompt if none is given."""
    return strategy.begin(empty_prompts(images, START) if prompts is None else prompts, Words())


def run(
    strategy: Strategy, table: Table, prompts: Prompts | None = None, *, compact: bool = False
) -> list[list[FinishedText]]:
    """Decode as the captioner does; `held` stands for the key/value cache and shows each row's beginning.

    `compact` takes finished images out of the batch at once.
    """
    images = list(range(len(table.images)))
    prompts = empty_prompts(len(images), START) if prompts is None else prompts
    search = begin(strategy, len(images), prompts)
    shared = prompts.ids[:, : prompts.shortest - 1]
    held = [[tuple(ids)] for ids in shared.tolist()]
    results: dict[int, list[FinishedText]] = {}
    while images:
        finished = search.finished.tolist()
        if all(finished) or (compact and any(finished)):
            found = search.list_texts()
            results |= {image: texts for image, texts, ended in zip(images, found, finished, strict=True) if ended}
            places = [place for place, ended in enumerate(finished) if not ended]
            search.select(torch.tensor(places, dtype=torch.int64))
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
        assert search.last.shape == (len(images), len(held[0])) and len(held[0]) <= strategy.num_texts
    return [results[image] for image in range(len(table.images))]


@lru_cache(2**14)
def step(table: Table, image: int, beginning: tuple[int, ...], min_tokens: int) -> list[float]:
    """Log-probabilities of the next token, -inf where it is forbidden, computed apart from the package."""
    logits = table.logits(image, beginning).double().tolist()
    total = math.log(sum(math.exp(value) for value in logits))
    values = [value - total for value in logits]
    values[START] = -math.inf
    if len(beginning) < min_tokens:
        values[END] = -math.inf
    return values


def text_of(ids: Sequence[int], gains: Sequence[float], score: float) -> FinishedText:
    return FinishedText(
        token_ids=tuple(ids), log_probability=sum(gains, 0.0), score=score, token_log_probabilities=tuple(gains)
    )


@lru_cache(2**14)
def penalised(table: Table, image: int, beginning: tuple[int, ...], strategy: BeamSearch, prompted: int) -> list[float]:
    """As `step`, after the repetition penalty of the generated tokens."""
    logits, penalty = table.logits(image, beginning).double().tolist(), strategy.rules.repetition_penalty
    for token in set(beginning[prompted:]):
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    total = math.log(sum(math.exp(value) for value in logits))
    forbidden = step(table, image, beginning, strategy.min_tokens)
    return [value - total if other > -math.inf else other for value, other in zip(logits, forbidden, strict=True)]


def obeys(words: tuple[int, ...], rules: Rules) -> bool:
    """Whether a whole text, prompt included, keeps the rules."""
    text = " " + " ".join(chr(ord("a") + word) for word in words) + " "
    count = rules.no_repeat_ngram or 0
    runs = [words[place : place + count] for place in range(len(words) - count + 1)] if count else []
    return (
        not any(f" {phrase} " in text for phrase in rules.banned)
        and all(f" {phrase} " in text for phrase in rules.forced)
        and len(set(runs)) == len(runs)
    )


def every_text(table: Table, image: int, strategy: BeamSearch, prompt: tuple[int, ...] = ()) -> list[FinishedText]:
    """All texts there are that keep the rules, best first."""
    found, first = [], (START, *prompt)
    room = strategy.max_tokens - len(first)
    for generated in range(1, room + 1):
        for words in itertools.product(range(WORDS), repeat=generated - 1):
            for last in range(VOCAB) if generated == room else [END]:
                text = (*words, last)
                inner = words if last == END else text
                if last == START or not obeys((*prompt, *inner), strategy.rules):
                    continue
                beginnings = [(*first, *text[:place]) for place in range(generated)]
                gains = [
                    step(table, image, beginning, strategy.min_tokens)[token]
                    for beginning, token in zip(beginnings, text, strict=True)
                ]
                ranks = [
                    penalised(table, image, beginning, strategy, len(first))[token]
                    for beginning, token in zip(beginnings, text, strict=True)
                ]
                if sum(gains) > -math.inf:
                    found.append(text_of(inner, gains, sum(ranks) / generated**strategy.length_penalty))
    return sorted(found, key=lambda text: -text.score)


def plain_beam_search(table: Table, image: int, strategy: BeamSearch) -> list[FinishedText]:
    """Beam search, also in groups, in plain Python, to the longest length, without stopping early."""
    width = strategy.width // strategy.groups
    live: list[list[tuple[tuple[int, ...], list[float]]]] = [[((START,), [])] for _ in range(strategy.groups)]
    kept: list[list[FinishedText]] = [[] for _ in range(strategy.groups)]
    for length in range(2, strategy.max_tokens + 1):
        taken: list[int] = []
        for group in range(strategy.groups):
            spread = [
                ((*beginning, token), [*gains, value])
                for beginning, gains in live[group]
                for token, value in enumerate(step(table, image, beginning, strategy.min_tokens))
                if value > -math.inf
            ]
            spread.sort(key=lambda one: strategy.diversity * taken.count(one[0][-1]) - sum(one[1]))
            live[group] = []
            for rank, (text, gains) in enumerate(spread[: 2 * width]):
                if text[-1] != END and length < strategy.max_tokens:
                    live[group].append((text, gains))
                elif rank < width and not (width == 1 and kept[group]):
                    inner = text[1:-1] if text[-1] == END else text[1:]
                    kept[group].append(text_of(inner, gains, sum(gains) / (length - 1) ** strategy.length_penalty))
            live[group] = live[group][:width]
            taken += [text[-1] for text, _ in live[group]]
    best = [sorted(texts, key=lambda text: -text.score)[:width] for texts in kept]
    different = {text.token_ids: text for texts in best for text in texts}
    return sorted(different.values(), key=lambda text: -text.score)
