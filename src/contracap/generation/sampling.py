"""One sequence at a time: the likeliest token at each step, or one drawn by its probability."""

import hashlib
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from contracap.config import require_count
from contracap.generation.rules import NextTokens, Rules
from contracap.generation.strategy import MAX_ROWS, Hypothesis, Prompts, check_lengths, check_number
from contracap.generation.texts import Texts, best, finish_text
from contracap.tokenizer import Tokenizer

RESOLUTION = 2**48  # of the numbers drawn: as fine as a probability can matter, and below 1 also when multiplied


@dataclass(frozen=True)
class Greedy:
    """Always the likeliest next token (the lowest id among equals); the same ids as `BeamSearch(width=1)`.

    The score is the mean log-probability of a token.
    """

    max_tokens: int = 30
    """Longest sequence, start and end token included; a text without an end token stops there."""
    min_tokens: int = 5
    """The end token is forbidden while the sequence, start token included, is shorter than this."""
    rules: Rules = Rules()
    """What a text must and must not contain."""

    def __post_init__(self) -> None:
        check_lengths(self.max_tokens, self.min_tokens)

    @property
    def rows(self) -> int:
        """Rows a picture takes."""
        return 1

    def begin(self, prompts: Prompts, tokenizer: Tokenizer) -> "SingleSearch":
        """The state before the first step."""
        return SingleSearch(self, prompts, tokenizer)


@dataclass(frozen=True)
class Sampling:
    """Each next token drawn by its probability, for `samples` independent texts a picture, best first.

    The logits are divided by `temperature`; of the tokens that are not forbidden the `top_k` likeliest are kept; of
    these the fewest likeliest whose probabilities, made to sum to 1, reach `top_p`; of these the tokens at least
    `min_p` times as likely as the likeliest. One is drawn of what is left. Among equals the lower id is kept first.

    The score is the mean log-probability of a token: the model's own, of the whole vocabulary at temperature 1. What is
    drawn depends on the seed, the picture's number in the call, the sample's number and the length of the text, but not
    on the other pictures or the size of batches.

    Source: Fan et al. 2018 (arXiv 1805.04833) for top-k; Holtzman et al. 2020 (arXiv 1904.09751) for top-p; Nguyen et
        al. 2024 (arXiv 2407.01082) for min-p.
    """

    temperature: float = 1.0
    """Above 1 flattens the distribution, below 1 sharpens it."""
    top_k: int | None = None
    """Number of tokens kept; None keeps all."""
    top_p: float | None = None
    """Probability kept, above 0 and at most 1; None keeps all."""
    min_p: float | None = None
    """Least probability of a token relative to the likeliest one, from 0 to 1; None keeps all."""
    seed: int = 0
    """The same seed gives the same texts."""
    samples: int = 1
    """Texts for each image."""
    max_tokens: int = 30
    """Longest sequence, start and end token included; a text without an end token stops there."""
    min_tokens: int = 5
    """The end token is forbidden while the sequence, start token included, is shorter than this."""
    rules: Rules = Rules()
    """What a text must and must not contain."""

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 0.01, 100.0, "1 samples from the model as it is")
        if self.top_k is not None:
            require_count("top_k", self.top_k, 1, "tokens kept")
        if self.top_p is not None:
            check_number("top_p", self.top_p, 1e-6, 1.0, "probability kept")
        if self.min_p is not None:
            check_number("min_p", self.min_p, 0.0, 1.0, "probability relative to the likeliest token's")
        require_count("seed", self.seed, 0, "the same seed gives the same texts", most=2**63 - 1)
        require_count("samples", self.samples, 1, "texts a picture", most=MAX_ROWS)
        check_lengths(self.max_tokens, self.min_tokens)

    @property
    def rows(self) -> int:
        """Rows a picture takes."""
        return self.samples

    def begin(self, prompts: Prompts, tokenizer: Tokenizer) -> "SampleSearch":
        """The state before the first step."""
        return SampleSearch(self, prompts, tokenizer)


class SingleSearch:
    """Sequences that do not compete: each goes on with the token that `choose` picks, here the likeliest."""

    def __init__(self, strategy: Greedy | Sampling, prompts: Prompts, tokenizer: Tokenizer):
        self.end, self.rows = tokenizer.end, strategy.rows
        self.texts = Texts.begin(prompts, strategy.max_tokens)
        self.next_tokens = NextTokens(
            prompts,
            tokenizer,
            max_tokens=strategy.max_tokens,
            min_tokens=strategy.min_tokens,
            rules=strategy.rules,
        )
        images, device = len(prompts.ids), prompts.ids.device
        self.ended = torch.zeros((images, 1), dtype=torch.bool, device=device)
        self.generated = torch.zeros((images, 1), dtype=torch.int64, device=device)
        self.sums = torch.zeros((images, 1), device=device)

    @property
    def last(self) -> Int64[Tensor, "images rows"]:
        """The newest token of each row."""
        return self.texts.last

    @property
    def finished(self) -> Bool[Tensor, "images"]:
        """The pictures whose texts have their end tokens, or are full."""
        return self.ended.all(dim=1) | self.texts.full

    def advance(self, logits: Float[Tensor, "images rows vocab"]) -> Int64[Tensor, "images new_rows"] | None:
        """Append the chosen token to every text that has not ended; the first step spreads to all samples."""
        log_probabilities, choice = self.next_tokens(logits, self.texts)
        spread = None
        if logits.shape[1] < self.rows:
            spread = torch.zeros((len(logits), self.rows), dtype=torch.int64, device=logits.device)
            log_probabilities, choice = (values.expand(-1, self.rows, -1) for values in (log_probabilities, choice))
            self.ended, self.generated, self.sums = (
                values.repeat(1, self.rows) for values in (self.ended, self.generated, self.sums)
            )
        token = torch.where(self.ended, self.end, self.choose(choice))
        gain = log_probabilities.gather(-1, token[..., None]).squeeze(-1)
        writing = ~self.ended & (self.texts.prompted <= self.texts.length)[:, None]
        allowed = choice.gather(-1, token[..., None]).squeeze(-1) > -math.inf  # else nothing was
        self.sums = self.sums + gain.masked_fill(~allowed, -math.inf).masked_fill(~writing, 0.0)
        self.generated = self.generated + writing
        self.ended = self.ended | (token == self.end)
        self.texts = self.texts.grown(token, gain, spread)
        return spread

    def choose(self, choice: Float[Tensor, "images rows vocab"]) -> Int64[Tensor, "images rows"]:
        """The next token of each row."""
        return choice.max(dim=-1).indices  # the first among equals

    def keep(self, pictures: Int64[Tensor, "kept"]) -> None:
        """Forget all other pictures."""
        self.texts = self.texts.of(pictures)
        self.next_tokens.keep(pictures)
        self.ended, self.generated, self.sums = (values[pictures] for values in (self.ended, self.generated, self.sums))

    def hypotheses(self) -> list[list[Hypothesis]]:
        """For each picture its texts, best first; equals in the order they were drawn."""
        scores = self.sums / self.generated
        tables = (self.texts.ids, self.texts.gains, self.generated, scores, self.texts.prompted)
        results = []
        for *rows, first in zip(*(values.tolist() for values in tables), strict=True):
            texts = [
                finish_text(ids[first : first + count], gains[first : first + count], score, self.end)
                for ids, gains, count, score in zip(*rows, strict=True)
            ]
            results.append(sorted(texts, key=lambda text: -text.score))
        return results


class SampleSearch(SingleSearch):
    """Sequences that go on with tokens drawn by their probability."""

    def __init__(self, strategy: Sampling, prompts: Prompts, tokenizer: Tokenizer):
        super().__init__(strategy, prompts, tokenizer)
        self.strategy = strategy
        numbers = range(len(prompts.ids)) if prompts.numbers is None else prompts.numbers.tolist()
        drawn = [uniform(strategy.seed, number, strategy.samples, strategy.max_tokens) for number in numbers]
        self.drawn = torch.stack(drawn).to(prompts.ids.device)

    def choose(self, choice: Float[Tensor, "images rows vocab"]) -> Int64[Tensor, "images rows"]:
        """Draw the next token of each row."""
        return draw(choice, self.drawn[:, :, self.texts.length], self.strategy)

    def keep(self, pictures: Int64[Tensor, "kept"]) -> None:
        """Forget all other pictures."""
        super().keep(pictures)
        self.drawn = self.drawn[pictures]


def uniform(seed: int, number: int, samples: int, count: int) -> Float64[Tensor, "samples count"]:
    """For the picture of this number, random numbers from 0 to below 1: the same on every device, and for a sample the
    same whatever the other counts are."""
    drawn = []
    for sample in range(samples):
        digest = hashlib.blake2b(f"{seed} {number} {sample}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") // 2)
        drawn.append(torch.randint(RESOLUTION, (count,), generator=generator).double() / RESOLUTION)
    return torch.stack(drawn)


def draw(
    choice: Float[Tensor, "images rows vocab"], uniform: Float64[Tensor, "images rows"], strategy: Sampling
) -> Int64[Tensor, "images rows"]:
    """The token whose stretch of the cumulative distribution `uniform` falls into."""
    scores = (choice / strategy.temperature).flatten(0, 1)
    tokens = None
    if strategy.top_k is not None and strategy.top_k < scores.shape[1]:
        scores, tokens = best(scores, strategy.top_k)
    elif strategy.top_p is not None:
        scores, tokens = scores.sort(dim=1, descending=True, stable=True)
    probabilities = torch.softmax(scores, dim=1, dtype=torch.float64)
    if strategy.top_p is not None and strategy.top_p < 1:
        before = probabilities.cumsum(dim=1) - probabilities
        probabilities = probabilities.masked_fill(before >= strategy.top_p, 0.0)
    if strategy.min_p is not None:
        least = strategy.min_p * probabilities.amax(dim=1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    cumulative = probabilities.cumsum(dim=1)
    target = uniform.reshape(-1, 1) * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True).clamp(max=scores.shape[1] - 1)
    token = place if tokens is None else tokens.gather(1, place)
    return token.view(choice.shape[:2])
