"""Constraints on the next token: lengths, prompts and rules, for every strategy."""

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import BeforeValidator
from torch import Tensor

from contracap.config import require_count
from contracap.generation.phrases import BannedPhrases, ForcedPhrases, Vocabulary, compile_phrases
from contracap.generation.strategy import Prompts, check_number
from contracap.generation.texts import PartialTexts
from contracap.tokenizer import Tokenizer, clean


def _as_tuple(phrases: object) -> object:
    return (phrases,) if isinstance(phrases, str) else tuple(phrases) if isinstance(phrases, list) else phrases


Phrases = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
"""Words or phrases; a setting may give a single one without a list around it, such as `rules.banned=word`."""


@dataclass(frozen=True)
class Rules:
    """Rules about the words of a text, for every strategy except `LegacyBeamSearch`.

    Rules apply to the whole text: the prompt and what was generated. If rules contradict each other, `forced` wins over
    `no_repeat_ngram`, and a prompt wins over all.

    Source: Keskar et al. 2019 (arXiv 1909.05858), section 4.1, for the penalty; for `forced` see `BeamSearch`.
    """

    repetition_penalty: float = 1.0
    """Logits of tokens that were generated before are divided by this if above 0, else multiplied. 1 changes
    nothing, 1.2 is usual. It affects which tokens are chosen and how beam search ranks texts; the reported
    log-probabilities stay the model's own."""
    no_repeat_ngram: int | None = None
    """No sequence of this many tokens occurs twice."""
    banned: Phrases = ()
    """Words or phrases that must not occur as whole words, however they are split into tokens. A word is what the
    tokenizer takes for one: a run of letters, a digit, or a run of other characters. Characters outside ASCII count as
    letters."""
    forced: Phrases = ()
    """Words or phrases that must occur as whole words. The text does not end before they do. Once it has only the
    room that they need, nothing else is written. Beam search looks for good places for them."""

    def __post_init__(self) -> None:
        check_number("repetition_penalty", self.repetition_penalty, 0.1, 10.0, "1 changes nothing")
        if self.no_repeat_ngram is not None:
            require_count("no_repeat_ngram", self.no_repeat_ngram, 1, "tokens of a sequence that must not repeat")
        for name in ("banned", "forced"):
            phrases = getattr(self, name)
            if not isinstance(phrases, list | tuple) or not all(isinstance(phrase, str) for phrase in phrases):
                raise ValueError(f'{name} must be a list of words or phrases, such as ["red ball"], not {phrases!r}')
            if not all(clean(phrase) for phrase in phrases):
                raise ValueError(f"{name} holds an empty phrase: {list(phrases)!r}; leave it out")
            object.__setattr__(self, name, tuple(phrases))


class NextTokenScores(NamedTuple):
    """Scores of each possible next token, in nats.

    Attributes:
        log_probs: the model's own.
        scores: the same after the repetition penalty; -inf for forbidden tokens. The others are not scaled up.
    """

    log_probs: Float[Tensor, "batch text vocab"]
    scores: Float[Tensor, "batch text vocab"]


class Constraints:
    """Scores the next token of each text of a batch. Id 0 is a word like any other, not padding.

    A second start token is forbidden, and so is the end token while the sequence is shorter than `min_tokens`. The
    rules may forbid more. Inside a prompt, its next token has log-probability 0 and all others are forbidden.

    Raises: ValueError: if the rules contradict each other or need more room than there is.
    """

    def __init__(self, prompts: Prompts, tokenizer: Tokenizer, *, max_tokens: int, min_tokens: int, rules: Rules):
        self.prompts, self.rules = prompts, rules
        self.start, self.end = tokenizer.start, tokenizer.end
        self.max_tokens, self.min_tokens = max_tokens, min_tokens
        self.longest_prompt = prompts.longest
        self.banned: BannedPhrases | None = None
        self.forced: ForcedPhrases | None = None
        if rules.banned or rules.forced:
            self.vocabulary = Vocabulary.of(tokenizer)
            self.banned, self.forced = compile_phrases(rules.banned, rules.forced, self.vocabulary, prompts.ids.device)
            if self.forced is not None:
                for ids, length in zip(prompts.ids.tolist(), prompts.lengths.tolist(), strict=True):
                    self.forced.check_room(self.vocabulary.text(ids[:length]), max_tokens - length)

    def __call__(self, logits: Float[Tensor, "batch text vocab"], texts: PartialTexts) -> NextTokenScores:
        """Return the scores of the token after each text."""
        length, rules = texts.length, self.rules
        log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        scores = log_probs.clone()
        if rules.repetition_penalty != 1:
            scores = torch.log_softmax(self._penalise(logits.float(), texts), dim=-1)
        scores[..., self.start] = -math.inf
        if length < self.min_tokens:
            scores[..., self.end] = -math.inf
        repeats = None
        if rules.no_repeat_ngram is not None:
            repeats = repeating_tokens(texts.ids[:, :, :length], rules.no_repeat_ngram, logits.shape[-1])
        if self.banned is not None or self.forced is not None:
            self._apply_phrases(scores, texts, repeats)
        elif repeats is not None:
            scores.masked_fill_(repeats, -math.inf)
        if length < self.longest_prompt:
            scores = self._follow_prompts(scores, length)
        return NextTokenScores(log_probs, scores)

    def select(self, images: Int64[Tensor, "selected"]) -> None:
        """Keep these images only."""
        self.prompts = Prompts(self.prompts.ids[images], self.prompts.lengths[images])

    def _penalise(
        self, logits: Float[Tensor, "batch text vocab"], texts: PartialTexts
    ) -> Float[Tensor, "batch text vocab"]:
        ids = texts.ids[:, :, : texts.length]
        is_generated = torch.arange(texts.length, device=ids.device) >= texts.prompt_lengths[:, None, None]
        penalty = self.rules.repetition_penalty
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        return torch.where(occurring_tokens(ids, is_generated.expand_as(ids), logits.shape[-1]), penalised, logits)

    def _apply_phrases(
        self, scores: Float[Tensor, "batch text vocab"], texts: PartialTexts, repeats: Tensor | None
    ) -> None:
        """Forbid what the phrases forbid, and repeated sequences where no forced phrase is urgent."""
        room = self.max_tokens - texts.length
        written = self.vocabulary.texts(texts.ids[:, :, : texts.length])
        prompt_lengths = self.prompts.lengths.tolist()
        for image, rows in enumerate(written):
            if prompt_lengths[image] > texts.length:
                continue  # `_follow_prompts` decides
            for row, text in enumerate(rows):
                row_scores = scores[image, row]
                if self.banned is not None:
                    self.banned.forbid(row_scores, text, self.end, last=room == 1)
                is_urgent = self.forced is not None and self.forced.forbid(row_scores, text, self.end, room)
                if repeats is not None and not is_urgent:
                    row_scores.masked_fill_(repeats[image, row], -math.inf)

    def _follow_prompts(
        self, scores: Float[Tensor, "batch text vocab"], length: int
    ) -> Float[Tensor, "batch text vocab"]:
        """Allow the next token of each prompt that goes on, and no other."""
        in_prompt = self.prompts.lengths > length
        token = self.prompts.ids[:, length].masked_fill(~in_prompt, 0)
        index = token[:, None, None].expand(-1, scores.shape[1], 1)
        prompt_scores = torch.full_like(scores, -math.inf).scatter_(-1, index, 0.0)
        return torch.where(in_prompt[:, None, None], prompt_scores, scores)


def repeating_tokens(
    ids: Int64[Tensor, "batch text length"], count: int, vocab: int
) -> Bool[Tensor, "batch text vocab"]:
    """Mark the tokens that would complete a sequence of `count` tokens that the text already holds."""
    if ids.shape[2] < count:
        return torch.zeros(*ids.shape[:2], vocab, dtype=torch.bool, device=ids.device)
    windows = ids.unfold(2, count, 1)
    newest = ids[:, :, ids.shape[2] - count + 1 :]
    is_repeated = (windows[..., :-1] == newest[:, :, None]).all(dim=-1)
    return occurring_tokens(windows[..., -1], is_repeated, vocab)


def occurring_tokens(
    ids: Int64[Tensor, "batch text count"], mask: Bool[Tensor, "batch text count"], vocab: int
) -> Bool[Tensor, "batch text vocab"]:
    """Mark the tokens that occur where `mask` is true."""
    counts = torch.zeros(*ids.shape[:2], vocab, device=ids.device)
    return counts.scatter_add_(-1, ids, mask.float()) > 0
