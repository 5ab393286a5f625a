"""Beam search over log-probabilities, also in diverse groups and with forced phrases."""

import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from contracap.config import require_count
from contracap.generation.constraints import Constraints, NextTokenScores, Rules
from contracap.generation.phrases import ForcedPhrases
from contracap.generation.strategy import MAX_TEXTS, FinishedText, Prompts, check_lengths, check_number
from contracap.generation.texts import BestTexts, PartialTexts, stable_topk
from contracap.tokenizer import Tokenizer


@dataclass(frozen=True)
class BeamSearch:
    """Keep the `width` likeliest unfinished texts at each step; return the `width` best finished texts.

    A step takes the best 2 * `width` continuations of an image. Those among the first `width` that end are finished.
    The best `width` that do not end become the next beams. A text that reaches `max_tokens` is finished as it is. A
    finished text scores the sum of its log-probabilities / length ** `length_penalty`. The length counts the generated
    tokens: the end token if there is one, but not the start token or the prompt.

    An image stops once no beam can beat the worst of its `width` finished texts, so stopping never changes the result.
    Equal scores are ordered by beam, then by token id; an earlier finished text comes first. With `width` 1 the first
    end token finishes the image, which is greedy decoding.

    With several `groups`, each is a search of its own, `width` / `groups` wide. In every step the groups take turns. A
    token loses `diversity` for each beam of an earlier group that has just taken it. This affects the choice in this
    step, not the scores. The finished texts of all groups are ranked together; a text that several groups found counts
    once.

    With forced phrases, a step also considers their next tokens and the best continuation of each beam. The beams are
    divided evenly by how many tokens of the phrases a continuation holds.

    Source: `GenerationMixin._beam_search` of transformers 4.50 and later, with `early_stopping="never"`: the same
        lengths, candidates and finished texts. Its default, `early_stopping=False`, estimates what a beam can reach
        from its present length, and may stop before a longer and better text is found. Vijayakumar et al. 2016
        (arXiv 1610.02424), algorithm 1 with Hamming diversity, for groups; Hokamp and Liu 2017 (arXiv 1704.07138) and
        Post and Vilar 2018 (arXiv 1804.06609) for forced phrases.
    """

    width: int = 6
    """Beams of an image, and texts kept."""
    max_tokens: int = 30
    """Longest sequence, start and end token included."""
    min_tokens: int = 5
    """The end token is forbidden while the sequence, start token included, is shorter than this."""
    length_penalty: float = 1.0
    """Above 0 favours long texts, below 0 short ones; 1 ranks by the mean log-probability of a token."""
    groups: int = 1
    """Number of searches that the width is divided into."""
    diversity: float = 0.0
    """Nats that a token loses for each beam of an earlier group that took it; 0.5 is usual."""
    rules: Rules = Rules()
    """Words that a text must and must not contain, and its repetitions."""

    def __post_init__(self) -> None:
        require_count("width", self.width, 1, "beams of an image", most=MAX_TEXTS)
        check_lengths(self.max_tokens, self.min_tokens)
        check_number("length_penalty", self.length_penalty, -10.0, 10.0, "1 is usual")
        # A tensor of whole numbers cannot be raised to a negative whole number.
        object.__setattr__(self, "length_penalty", float(self.length_penalty))
        require_count("groups", self.groups, 1, "searches that the width is divided into")
        check_number("diversity", self.diversity, 0.0, 100.0, "nats; 0.5 is usual, with groups above 1")
        if self.width % self.groups:
            raise ValueError(
                f"width is {self.width}, which {self.groups} groups cannot share: use a multiple of {self.groups}"
            )
        if self.groups > 1 and self.diversity == 0:
            raise ValueError(f"groups is {self.groups}, but without diversity all find the same: set it above 0")
        if self.groups == 1 and self.diversity > 0:
            raise ValueError(f"diversity is {self.diversity:g}, but there is only one group: set groups above 1")

    @property
    def num_texts(self) -> int:
        """Maximum number of texts per image."""
        return self.width

    def begin(self, prompts: Prompts, tokenizer: Tokenizer) -> "BeamState":
        """Return the state before the first step."""
        return BeamState(self, prompts, tokenizer)


class BeamState:
    """The state of decoding one batch: the searches of all groups side by side."""

    def __init__(self, strategy: BeamSearch, prompts: Prompts, tokenizer: Tokenizer):
        self.strategy, self.end = strategy, tokenizer.end
        self.texts = PartialTexts.from_prompts(prompts, strategy.max_tokens)
        self.constraints = Constraints(
            prompts,
            tokenizer,
            max_tokens=strategy.max_tokens,
            min_tokens=strategy.min_tokens,
            rules=strategy.rules,
        )
        self.groups = [
            BeamGroup(strategy, self.texts, self.constraints.forced, tokenizer.end) for _ in range(strategy.groups)
        ]

    @property
    def last(self) -> Int64[Tensor, "batch text"]:
        """The newest token of each text."""
        return self.texts.last

    @property
    def finished(self) -> Bool[Tensor, "batch"]:
        """True for images that cannot find a better text."""
        return torch.stack([group.finished for group in self.groups]).all(dim=0) | self.texts.is_full

    def advance(self, logits: Float[Tensor, "batch text vocab"]) -> Int64[Tensor, "batch new_text"]:
        """Extend every beam by one token and keep the best; return the beam that each new beam continues."""
        all_scores = self.constraints(logits, self.texts)
        first, token_counts, parents = 0, None, []
        for group in self.groups:
            num_beams = group.texts.ids.shape[1]
            scores = NextTokenScores(*(values[:, first : first + num_beams] for values in all_scores))
            penalty = None if token_counts is None else self.strategy.diversity * token_counts[:, None]
            parents.append(first + group.advance(scores, penalty))
            first += num_beams if logits.shape[1] > 1 else 0  # in the first step all groups share one text
            if len(self.groups) > 1:
                token_counts = group.token_counts(logits.shape[-1]) + (0 if token_counts is None else token_counts)
        self.texts = PartialTexts.concatenate([group.texts for group in self.groups])
        return torch.cat(parents, dim=1)

    def select(self, images: Int64[Tensor, "selected"]) -> None:
        """Keep these images only."""
        self.texts = self.texts.select(images)
        self.constraints.select(images)
        for group in self.groups:
            group.select(images)

    def list_texts(self) -> list[list[FinishedText]]:
        """Return the finished texts of each image, best first: `width` of them, or fewer if fewer were found."""
        results = []
        for found in zip(*(group.best_texts.list_texts(self.end) for group in self.groups), strict=True):
            unique = {text.token_ids: text for texts in reversed(found) for text in reversed(texts)}
            results.append(sorted(reversed(unique.values()), key=lambda text: -text.score))
        return results


class BeamGroup:
    """One beam search in a batch: beams and finished texts of each image, both best first."""

    def __init__(self, strategy: BeamSearch, texts: PartialTexts, forced: ForcedPhrases | None, end: int):
        self.strategy, self.forced, self.end = strategy, forced, end
        self.width = strategy.width // strategy.groups
        self.texts = texts
        self.scores = torch.zeros_like(texts.token_log_probs[:, :, 0])
        self.best_texts = BestTexts(texts, self.width)
        self.finished = torch.zeros(len(texts.ids), dtype=torch.bool, device=texts.ids.device)

    def advance(
        self, next_token: NextTokenScores, penalty: Float[Tensor, "batch 1 vocab"] | None
    ) -> Int64[Tensor, "batch beam"]:
        """Extend every beam by one token and keep the best; return the beam that each new beam continues.

        Args:
            penalty: subtracted from each token's score in the choice, but not in the scores of the beams.
        """
        width, (_, num_beams, vocab) = self.width, next_token.scores.shape
        all_scores = (self.scores[:, :, None] + next_token.scores).flatten(1)
        all_priorities = (
            all_scores if penalty is None else (all_scores.unflatten(1, (num_beams, vocab)) - penalty).flatten(1)
        )
        if all_priorities.shape[1] < 2 * width:  # fewer continuations than a step takes
            all_priorities = functional.pad(all_priorities, (0, 2 * width - all_priorities.shape[1]), value=-math.inf)
        priorities, indices = stable_topk(all_priorities, 2 * width)
        indices = indices.clamp(max=all_scores.shape[1] - 1)
        if self.forced is not None:
            priorities, indices = self._add_forced(
                self.forced, all_priorities[:, : all_scores.shape[1]], priorities, indices
            )
        scores = all_scores.gather(1, indices).masked_fill(priorities == -math.inf, -math.inf)
        parents, token = indices // vocab, indices % vocab
        texts = self.texts.append(token, next_token.log_probs.flatten(1).gather(1, indices), parents)

        has_ended = (token == self.end) | texts.is_full
        is_accepted = has_ended & ~self.finished[:, None]
        is_accepted[:, width:] = False
        length = texts.num_generated.clamp(min=1)[:, None]
        final_scores = scores / length**self.strategy.length_penalty
        self.best_texts.add(texts, final_scores.masked_fill(~is_accepted, -math.inf))

        order = torch.arange(0.0, -priorities.shape[1], -1.0, device=priorities.device)
        selected, beams = stable_topk(order.masked_fill(has_ended | (priorities == -math.inf), -math.inf), width)
        self.scores = scores.gather(1, beams).masked_fill(selected == -math.inf, -math.inf)
        self.texts = texts.reorder(beams)
        self._update_finished()
        return parents.gather(1, beams)

    def token_counts(self, vocab: int) -> Float[Tensor, "batch vocab"]:
        """Return how many beams have just taken each token."""
        counts = self.scores.new_zeros((len(self.scores), vocab))
        return counts.scatter_add_(1, self.texts.last, (self.scores > -math.inf).float())

    def select(self, images: Int64[Tensor, "selected"]) -> None:
        """Keep these images only."""
        self.texts = self.texts.select(images)
        self.scores, self.finished = self.scores[images], self.finished[images]
        self.best_texts.select(images)

    def _add_forced(
        self,
        forced: ForcedPhrases,
        all_priorities: Float[Tensor, "batch continuations"],
        priorities: Float[Tensor, "batch best"],
        indices: Int64[Tensor, "batch best"],
    ) -> tuple[Float[Tensor, "batch candidates"], Int64[Tensor, "batch candidates"]]:
        """Add the next tokens of forced phrases and the best continuation of each beam, and order all candidates.

        Candidates that hold equally many tokens of the phrases form a bank. The banks take turns, that of the best
        candidate first; in each turn a bank gives its best remaining candidate.
        """
        num_beams = self.texts.ids.shape[1]
        vocab = all_priorities.shape[1] // num_beams
        written = forced.vocabulary.texts(self.texts.ids[:, :, : self.texts.length])
        likeliest = all_priorities.unflatten(1, (num_beams, vocab)).argmax(dim=-1).tolist()
        added = []
        for texts, tokens, known in zip(written, likeliest, indices.tolist(), strict=True):
            wanted = {
                beam * vocab + token
                for beam, (text, likeliest_token) in enumerate(zip(texts, tokens, strict=True))
                for token in (likeliest_token, *forced.next_tokens(text))
            }
            added.append(torch.tensor(sorted(wanted - set(known)), dtype=torch.int64))
        added_indices = pad_sequence(added, batch_first=True, padding_value=-1).to(indices)
        added_priorities = all_priorities.gather(1, added_indices.clamp(min=0)).masked_fill(
            added_indices < 0, -math.inf
        )
        priorities = torch.cat([priorities, added_priorities], dim=1)
        indices = torch.cat([indices, added_indices.clamp(min=0)], dim=1)

        orders = []
        for texts, image_priorities, image_indices in zip(written, priorities.tolist(), indices.tolist(), strict=True):
            banks: dict[float, list[int]] = {}
            for candidate in sorted(range(len(image_priorities)), key=lambda candidate: -image_priorities[candidate]):
                beam, token = divmod(image_indices[candidate], vocab)
                met = forced.tokens_met(texts[beam] + forced.vocabulary.pieces[token])
                banks.setdefault(met if image_priorities[candidate] > -math.inf else math.inf, []).append(candidate)
            impossible = banks.pop(math.inf, [])
            turns = itertools.chain.from_iterable(itertools.zip_longest(*banks.values()))
            orders.append([candidate for candidate in turns if candidate is not None] + impossible)
        order = torch.tensor(orders).to(indices)
        return priorities.gather(1, order), indices.gather(1, order)

    def _update_finished(self) -> None:
        """Mark the images whose beams can no longer beat the worst finished text.

        The score of a beam only falls. So the best it can reach is its present score at the most favourable length: the
        longest for a penalty above 0, else the next.
        """
        penalty, texts = self.strategy.length_penalty, self.texts
        longest = self.strategy.max_tokens - texts.prompt_lengths
        length = longest if penalty > 0 else (texts.num_generated + 1).clamp(max=longest)
        best = self.scores.amax(dim=1) / length**penalty
        self.finished = self.finished | (best <= self.best_texts.scores[:, -1])
        if self.width == 1:
            self.finished = self.finished | (self.best_texts.scores[:, 0] > -math.inf)
