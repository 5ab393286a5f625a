"""Greedy decoding and sampling: each text is written on its own, token by token."""

import hashlib
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from contracap.config import require_count
from contracap.generation.constraints import Constraints, Rules
from contracap.generation.strategy import MAX_TEXTS, FinishedText, Prompts, check_lengths, check_number
from contracap.generation.texts import PartialTexts, build_finished_text, stable_topk
from contracap.tokenizer import Tokenizer

RESOLUTION = 2**48  # of the random numbers: finer than any probability that matters, and exact when multiplied


@dataclass(frozen=True)
class Greedy:
    """Take the likeliest next token (the lowest id among equals); gives the same ids as `BeamSearch(width=1)`.

    The score is the mean log-probability of a token.
    """

    max_tokens: int = 30
    """Longest sequence, start and end token included; a text without an end token stops there."""
    min_tokens: int = 5
    """The end token is forbidden while the sequence, start token included, is shorter than this."""
    rules: Rules = Rules()
    """Words that a text must and must not contain, and its repetitions."""

    def __post_init__(self) -> None:
        check_lengths(self.max_tokens, self.min_tokens)

    @property
    def num_texts(self) -> int:
        """Number of texts per image."""
        return 1

    def begin(self, prompts: Prompts, tokenizer: Tokenizer) -> "GreedyState":
        """Return the state before the first step."""
        return GreedyState(self, prompts, tokenizer)


@dataclass(frozen=True)
class Sampling:
    """Draw each next token by its probability, for `samples` independent texts per image, best first.

    The logits are divided by `temperature`. Then `top_k`, `top_p` and `min_p` filter the tokens that are not forbidden,
    in this order. `top_k` keeps the likeliest tokens. `top_p` keeps the fewest likeliest of them whose probabilities,
    scaled to a sum of 1, reach it. `min_p` keeps those at least this many times as likely as the likeliest. Among
    equally likely tokens the lower id is kept first.

    The score is the mean log-probability of a token under the model itself, at temperature 1 and without filters. What
    is drawn depends on the seed, the image's number in the call, the sample's number and the length of the text. It
    does not depend on the other images or the batch size.

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
    """Words that a text must and must not contain, and its repetitions."""

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 0.01, 100.0, "1 samples from the model as it is")
        if self.top_k is not None:
            require_count("top_k", self.top_k, 1, "tokens kept")
        if self.top_p is not None:
            check_number("top_p", self.top_p, 1e-6, 1.0, "probability kept")
        if self.min_p is not None:
            check_number("min_p", self.min_p, 0.0, 1.0, "probability relative to the likeliest token's")
        require_count("seed", self.seed, 0, "the same seed gives the same texts", most=2**63 - 1)
        require_count("samples", self.samples, 1, "texts per image", most=MAX_TEXTS)
        check_lengths(self.max_tokens, self.min_tokens)

    @property
    def num_texts(self) -> int:
        """Number of texts per image."""
        return self.samples

    def begin(self, prompts: Prompts, tokenizer: Tokenizer) -> "SamplingState":
        """Return the state before the first step."""
        return SamplingState(self, prompts, tokenizer)


class GreedyState:
    """The state of decoding texts that do not compete: each continues with the token that `choose` returns."""

    def __init__(self, strategy: Greedy | Sampling, prompts: Prompts, tokenizer: Tokenizer):
        self.end, self.num_texts = tokenizer.end, strategy.num_texts
        self.texts = PartialTexts.from_prompts(prompts, strategy.max_tokens)
        self.constraints = Constraints(
            prompts,
            tokenizer,
            max_tokens=strategy.max_tokens,
            min_tokens=strategy.min_tokens,
            rules=strategy.rules,
        )
        images, device = len(prompts.ids), prompts.ids.device
        self.ended = torch.zeros((images, 1), dtype=torch.bool, device=device)
        self.num_generated = torch.zeros((images, 1), dtype=torch.int64, device=device)
        self.log_probs = torch.zeros((images, 1), device=device)

    @property
    def last(self) -> Int64[Tensor, "batch text"]:
        """The newest token of each text."""
        return self.texts.last

    @property
    def finished(self) -> Bool[Tensor, "batch"]:
        """True for images whose texts have all ended or reached `max_tokens`."""
        return self.ended.all(dim=1) | self.texts.is_full

    def advance(self, logits: Float[Tensor, "batch text vocab"]) -> Int64[Tensor, "batch new_text"] | None:
        """Append a token to every text that has not ended; the first step expands one text to all samples."""
        log_probs, scores = self.constraints(logits, self.texts)
        parents = None
        if logits.shape[1] < self.num_texts:
            parents = torch.zeros((len(logits), self.num_texts), dtype=torch.int64, device=logits.device)
            log_probs, scores = (values.expand(-1, self.num_texts, -1) for values in (log_probs, scores))
            self.ended, self.num_generated, self.log_probs = (
                values.repeat(1, self.num_texts) for values in (self.ended, self.num_generated, self.log_probs)
            )
        token = torch.where(self.ended, self.end, self.choose(scores))
        token_log_prob = log_probs.gather(-1, token[..., None]).squeeze(-1)
        is_allowed = scores.gather(-1, token[..., None]).squeeze(-1) > -math.inf  # false only if every token is not
        is_generated = ~self.ended & (self.texts.prompt_lengths <= self.texts.length)[:, None]
        self.log_probs = self.log_probs + token_log_prob.masked_fill(~is_allowed, -math.inf).masked_fill(
            ~is_generated, 0.0
        )
        self.num_generated = self.num_generated + is_generated
        self.ended = self.ended | (token == self.end)
        self.texts = self.texts.append(token, token_log_prob, parents)
        return parents

    def choose(self, scores: Float[Tensor, "batch text vocab"]) -> Int64[Tensor, "batch text"]:
        """Return the next token of each text."""
        return scores.max(dim=-1).indices  # the first among equals

    def select(self, images: Int64[Tensor, "selected"]) -> None:
        """Keep these images only."""
        self.texts = self.texts.select(images)
        self.constraints.select(images)
        self.ended, self.num_generated, self.log_probs = (
            values[images] for values in (self.ended, self.num_generated, self.log_probs)
        )

    def list_texts(self) -> list[list[FinishedText]]:
        """Return the texts of each image, best first; texts of equal score in the order of their samples."""
        scores, texts = self.log_probs / self.num_generated, self.texts
        columns = (texts.ids, texts.token_log_probs, self.num_generated, scores, texts.prompt_lengths)
        results = []
        for *rows, first in zip(*(values.tolist() for values in columns), strict=True):
            found = [
                build_finished_text(ids[first : first + count], token_log_probs[first : first + count], score, self.end)
                for ids, token_log_probs, count, score in zip(*rows, strict=True)
            ]
            results.append(sorted(found, key=lambda text: -text.score))
        return results


class SamplingState(GreedyState):
    """The state of decoding texts whose tokens are drawn by their probability."""

    def __init__(self, strategy: Sampling, prompts: Prompts, tokenizer: Tokenizer):
        super().__init__(strategy, prompts, tokenizer)
        self.strategy = strategy
        numbers = range(len(prompts.ids)) if prompts.numbers is None else prompts.numbers.tolist()
        uniform = [uniform_numbers(strategy.seed, number, strategy.samples, strategy.max_tokens) for number in numbers]
        self.uniform = torch.stack(uniform).to(prompts.ids.device)

    def choose(self, scores: Float[Tensor, "batch text vocab"]) -> Int64[Tensor, "batch text"]:
        """Draw the next token of each text."""
        return draw_tokens(scores, self.uniform[:, :, self.texts.length], self.strategy)

    def select(self, images: Int64[Tensor, "selected"]) -> None:
        """Keep these images only."""
        super().select(images)
        self.uniform = self.uniform[images]


def uniform_numbers(seed: int, number: int, samples: int, count: int) -> Float64[Tensor, "samples count"]:
    """Return random numbers from 0 to below 1 for the image of this number.

    They are the same on every device. Those of one sample do not depend on `samples`.
    """
    rows = []
    for sample in range(samples):
        digest = hashlib.blake2b(f"{seed} {number} {sample}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") // 2)
        rows.append(torch.randint(RESOLUTION, (count,), generator=generator).double() / RESOLUTION)
    return torch.stack(rows)


def draw_tokens(
    scores: Float[Tensor, "batch text vocab"], uniform: Float64[Tensor, "batch text"], strategy: Sampling
) -> Int64[Tensor, "batch text"]:
    """Return the tokens at which the cumulative distributions pass the numbers in `uniform`."""
    logits = (scores / strategy.temperature).flatten(0, 1)
    tokens = None
    if strategy.top_k is not None and strategy.top_k < logits.shape[1]:
        logits, tokens = stable_topk(logits, strategy.top_k)
    elif strategy.top_p is not None:
        logits, tokens = logits.sort(dim=1, descending=True, stable=True)
    probabilities = torch.softmax(logits, dim=1, dtype=torch.float64)
    if strategy.top_p is not None and strategy.top_p < 1:
        before = probabilities.cumsum(dim=1) - probabilities
        probabilities = probabilities.masked_fill(before >= strategy.top_p, 0.0)
    if strategy.min_p is not None:
        minimum = strategy.min_p * probabilities.amax(dim=1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < minimum, 0.0)
    cumulative = probabilities.cumsum(dim=1)
    target = uniform.reshape(-1, 1) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[1] - 1)
    token = index if tokens is None else tokens.gather(1, index)
    return token.view(scores.shape[:2])
