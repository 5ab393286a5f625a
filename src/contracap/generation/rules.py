"""What may come next: the lengths, prompts and rules that every strategy obeys."""

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import BeforeValidator
from torch import Tensor

from contracap.config import require_count
from contracap.generation.phrases import Banned, Forced, Vocabulary, followed
from contracap.generation.strategy import Prompts, check_number
from contracap.generation.texts import Texts
from contracap.tokenizer import Tokenizer, clean


def _as_tuple(phrases: object) -> object:
    return (phrases,) if isinstance(phrases, str) else tuple(phrases) if isinstance(phrases, list) else phrases


Phrases = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
"""Words or phrases; in a setting, such as `rules.banned=word`, one may stand without a list around it."""


@dataclass(frozen=True)
class Rules:
    """What a text must and must not hold, for every strategy that takes rules.

    A text, for these rules, is the prompt and what was generated. Where rules contradict each other, `forced` goes
    before `no_repeat_ngram`, and a prompt before all.

    Source: Keskar et al. 2019 (arXiv 1909.05858), section 4.1, for the penalty; for `forced` see `BeamSearch`.
    """

    repetition_penalty: float = 1.0
    """Logits of tokens that were generated before are divided by this if above 0, else multiplied. 1 changes
    nothing, 1.2 is usual. It affects which tokens are chosen and how beam search ranks texts; the reported
    log-probabilities stay the model's own."""
    no_repeat_ngram: int | None = None
    """No sequence of this many tokens occurs twice."""
    banned: Phrases = ()
    """Words or phrases that must not occur as whole words, however they are split into tokens. A word is one to the
    tokenizer: a run of letters, a digit, or a run of other characters. Everything outside ASCII counts as letters."""
    forced: Phrases = ()
    """Words or phrases that must occur as whole words. The text does not end before they do, and once only the room
    they need is left, nothing else is written. Beam search looks for good places for them."""

    def __post_init__(self) -> None:
        check_number("repetition_penalty", self.repetition_penalty, 0.1, 10.0, "1 changes nothing")
        if self.no_repeat_ngram is not None:
            require_count("no_repeat_ngram", self.no_repeat_ngram, 1, "tokens that must not come twice in a row")
        for name in ("banned", "forced"):
            phrases = getattr(self, name)
            if not isinstance(phrases, list | tuple) or not all(isinstance(phrase, str) for phrase in phrases):
                raise ValueError(f'{name} must be a list of words or phrases, such as ["red ball"], not {phrases!r}')
            if not all(clean(phrase) for phrase in phrases):
                raise ValueError(f"{name} holds an empty phrase: {list(phrases)!r}; leave it out")
            object.__setattr__(self, name, tuple(phrases))


class Next(NamedTuple):
    """Scores of each possible next token, in nats.

    Attributes:
        log_probabilities: the model's own.
        choice: the same, penalised if there is a penalty; -inf where a token is forbidden. The rest is not scaled up.
    """

    log_probabilities: Float[Tensor, "images rows vocab"]
    choice: Float[Tensor, "images rows vocab"]


class NextTokens:
    """Scores what may come next in each row of a batch. Id 0 is a word like any other, not fill.

    Forbidden are a second start token, the end token while the sequence is shorter than `min_tokens`, and what the
    rules forbid. While a prompt goes on, its next token has log-probability 0 and all others are forbidden.

    Raises: ValueError: if the rules contradict each other or need more room than there is.
    """

    def __init__(self, prompts: Prompts, tokenizer: Tokenizer, *, max_tokens: int, min_tokens: int, rules: Rules):
        self.prompts, self.rules = prompts, rules
        self.start, self.end = tokenizer.start, tokenizer.end
        self.max_tokens, self.min_tokens = max_tokens, min_tokens
        self.longest = int(prompts.lengths.max()) if len(prompts.lengths) else 1
        self.banned: Banned | None = None
        self.forced: Forced | None = None
        if rules.banned or rules.forced:
            self.vocabulary = Vocabulary.of(tokenizer)
            self.banned, self.forced = followed(rules.banned, rules.forced, self.vocabulary, prompts.ids.device)
            if self.forced is not None:
                pairs = zip(prompts.ids.tolist(), prompts.lengths.tolist(), strict=True)
                for ids, length in pairs:
                    self.forced.check_room(self.vocabulary.text(ids[:length]), max_tokens - length)

    def __call__(self, logits: Float[Tensor, "images rows vocab"], texts: Texts) -> Next:
        """The scores after each text."""
        length, rules = texts.length, self.rules
        log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        choice = log_probabilities.clone()
        if rules.repetition_penalty != 1:
            choice = torch.log_softmax(self._penalised(logits.float(), texts), dim=-1)
        choice[..., self.start] = -math.inf
        if length < self.min_tokens:
            choice[..., self.end] = -math.inf
        repeated = None
        if rules.no_repeat_ngram is not None:
            repeated = repeating(texts.ids[:, :, :length], rules.no_repeat_ngram, logits.shape[-1])
        if self.banned is not None or self.forced is not None:
            self._phrases(choice, texts, repeated)
        elif repeated is not None:
            choice.masked_fill_(repeated, -math.inf)
        if length < self.longest:
            choice = self._prompted(choice, length)
        return Next(log_probabilities, choice)

    def keep(self, pictures: Int64[Tensor, "kept"]) -> None:
        """Forget all pictures but these."""
        self.prompts = Prompts(self.prompts.ids[pictures], self.prompts.lengths[pictures])

    def _penalised(
        self, logits: Float[Tensor, "images rows vocab"], texts: Texts
    ) -> Float[Tensor, "images rows vocab"]:
        ids = texts.ids[:, :, : texts.length]
        generated = torch.arange(texts.length, device=ids.device) >= texts.prompted[:, None, None]
        penalty = self.rules.repetition_penalty
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        return torch.where(marked(ids, generated.expand_as(ids), logits.shape[-1]), penalised, logits)

    def _phrases(self, choice: Float[Tensor, "images rows vocab"], texts: Texts, repeated: Tensor | None) -> None:
        """Forbid what `banned` and `forced` forbid, and with them what repeats, as far as `forced` lets it."""
        room = self.max_tokens - texts.length
        written = self.vocabulary.texts(texts.ids[:, :, : texts.length])
        prompted = self.prompts.lengths.tolist()
        for image, rows in enumerate(written):
            if prompted[image] > texts.length:
                continue  # the prompt decides
            for row, text in enumerate(rows):
                scores = choice[image, row]
                if self.banned is not None:
                    self.banned.forbid(scores, text, self.end, last=room == 1)
                urgent = self.forced is not None and self.forced.forbid(scores, text, self.end, room)
                if repeated is not None and not urgent:
                    scores.masked_fill_(repeated[image, row], -math.inf)

    def _prompted(self, choice: Float[Tensor, "images rows vocab"], length: int) -> Float[Tensor, "images rows vocab"]:
        inside = self.prompts.lengths > length
        token = self.prompts.ids[:, length].masked_fill(~inside, 0)
        index = token[:, None, None].expand(-1, choice.shape[1], 1)
        only = torch.full_like(choice, -math.inf).scatter_(-1, index, 0.0)
        return torch.where(inside[:, None, None], only, choice)


def repeating(ids: Int64[Tensor, "images rows length"], count: int, vocab: int) -> Bool[Tensor, "images rows vocab"]:
    """Tokens that would end a sequence of `count` tokens which the row already holds."""
    if ids.shape[2] < count:
        return torch.zeros(*ids.shape[:2], vocab, dtype=torch.bool, device=ids.device)
    windows = ids.unfold(2, count, 1)
    newest = ids[:, :, ids.shape[2] - count + 1 :]
    again = (windows[..., :-1] == newest[:, :, None]).all(dim=-1)
    return marked(windows[..., -1], again, vocab)


def marked(
    ids: Int64[Tensor, "images rows count"], here: Bool[Tensor, "images rows count"], vocab: int
) -> Bool[Tensor, "images rows vocab"]:
    """The ids that stand anywhere `here`."""
    counts = torch.zeros(*ids.shape[:2], vocab, device=ids.device)
    return counts.scatter_add_(-1, ids, here.float()) > 0
