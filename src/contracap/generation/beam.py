"""Beam search over log-probabilities, also in diverse groups and around forced phrases."""

import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from contracap.config import require_count
from contracap.generation.phrases import Forced
from contracap.generation.rules import Next, NextTokens, Rules
from contracap.generation.strategy import MAX_ROWS, Hypothesis, Prompts, check_lengths, check_number
from contracap.generation.texts import Finished, Texts, best
from contracap.tokenizer import Tokenizer


@dataclass(frozen=True)
class BeamSearch:
    """Keep the `width` likeliest beginnings at each step, return the `width` best finished texts.

    A step looks at the best 2 * `width` continuations of a picture. Those among the first `width` that end are
    finished, and the best `width` that do not end go on. A text that reaches `max_tokens` is finished as it stands.
    A finished text scores the sum of its log-probabilities / length ** `length_penalty`; length counts the generated
    tokens: the end token where there is one, not the start token or the prompt.

    A picture stops once no beginning can still beat the worst of its `width` finished texts, so stopping never changes
    the result. Among equals the better beam, then the lower token id, then the earlier finished text comes first. With
    `width` 1 the first end token closes the picture: that is greedy decoding.

    With `groups` above 1, each is a search of its own, `width` / `groups` wide, and they take their steps one after
    another: a token that earlier groups have just gone on with loses `diversity` for each of their beams that did, in
    the choice of this step alone. The finished texts of all are ranked together, one that several found counts once.

    Where phrases are forced, continuations by their next tokens and the best of each beam are looked at as well, and
    the places are shared out evenly over how many tokens of the phrases a continuation has met.

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
    """What a text must and must not contain."""

    def __post_init__(self) -> None:
        require_count("width", self.width, 1, "beams of a picture", most=MAX_ROWS)
        check_lengths(self.max_tokens, self.min_tokens)
        check_number("length_penalty", self.length_penalty, -10.0, 10.0, "1 is usual")
        object.__setattr__(self, "length_penalty", float(self.length_penalty))  # whole powers cannot be negative
        require_count("groups", self.groups, 1, "searches that the width is divided into")
        check_number("diversity", self.diversity, 0.0, 100.0, "nats; 0.5 is usual, with groups above 1")
        if self.width % self.groups:
            raise ValueError(f"width is {self.width} and groups {self.groups}; the groups must divide the width")
        if (self.groups > 1) != (self.diversity > 0):
            raise ValueError(
                f"groups is {self.groups} and diversity {self.diversity:g}; several groups need a diversity above 0, "
                "without it all find the same, and a diversity needs several groups"
            )

    @property
    def rows(self) -> int:
        """Rows a picture takes at most."""
        return self.width

    def begin(self, prompts: Prompts, tokenizer: Tokenizer) -> "Beams":
        """The state before the first step."""
        return Beams(self, prompts, tokenizer)


class Beams:
    """The state of one batch: the searches of all groups, side by side."""

    def __init__(self, strategy: BeamSearch, prompts: Prompts, tokenizer: Tokenizer):
        self.strategy, self.end = strategy, tokenizer.end
        self.texts = Texts.begin(prompts, strategy.max_tokens)
        self.next_tokens = NextTokens(
            prompts,
            tokenizer,
            max_tokens=strategy.max_tokens,
            min_tokens=strategy.min_tokens,
            rules=strategy.rules,
        )
        self.groups = [
            Group(strategy, self.texts, self.next_tokens.forced, tokenizer.end) for _ in range(strategy.groups)
        ]

    @property
    def last(self) -> Int64[Tensor, "images rows"]:
        """The newest token of each row."""
        return self.texts.last

    @property
    def finished(self) -> Bool[Tensor, "images"]:
        """The pictures that cannot find anything better."""
        return torch.stack([group.finished for group in self.groups]).all(dim=0) | self.texts.full

    def advance(self, logits: Float[Tensor, "images rows vocab"]) -> Int64[Tensor, "images new_rows"]:
        """Spread every beam by one token and keep the best; returns the row that each new row continues."""
        scores = self.next_tokens(logits, self.texts)
        first, taken, parents = 0, None, []
        for group in self.groups:
            rows = group.texts.ids.shape[1]
            own = Next(*(values[:, first : first + rows] for values in scores))
            penalty = None if taken is None else self.strategy.diversity * taken[:, None]
            chosen = group.advance(own, penalty)
            parents.append(first + chosen)
            first += rows if logits.shape[1] > 1 else 0  # at first all groups share one row
            if len(self.groups) > 1:
                taken = group.taken(logits.shape[-1]) + (0 if taken is None else taken)
        self.texts = Texts.side_by_side([group.texts for group in self.groups])
        return torch.cat(parents, dim=1)

    def keep(self, pictures: Int64[Tensor, "kept"]) -> None:
        """Forget all other pictures."""
        self.texts = self.texts.of(pictures)
        self.next_tokens.keep(pictures)
        for group in self.groups:
            group.keep(pictures)

    def hypotheses(self) -> list[list[Hypothesis]]:
        """For each picture its finished texts, best first: `width` of them, fewer only where fewer were found."""
        results = []
        for found in zip(*(group.kept.hypotheses(self.end) for group in self.groups), strict=True):
            texts = {text.token_ids: text for texts in reversed(found) for text in reversed(texts)}
            results.append(sorted(reversed(texts.values()), key=lambda text: -text.score))
        return results


class Group:
    """One beam search in a batch: live beams and finished texts of each picture, both best first."""

    def __init__(self, strategy: BeamSearch, texts: Texts, forced: Forced | None, end: int):
        self.strategy, self.forced, self.end = strategy, forced, end
        self.width = strategy.width // strategy.groups
        self.texts = texts
        self.sums = torch.zeros_like(texts.gains[:, :, 0])
        self.kept = Finished(texts, self.width)
        self.finished = torch.zeros(len(texts.ids), dtype=torch.bool, device=texts.ids.device)

    def advance(self, scores: Next, penalty: Float[Tensor, "images 1 vocab"] | None) -> Int64[Tensor, "images width"]:
        """Spread every live beam by one token and keep the best; returns the row that each new row continues.

        Args:
            penalty: what each token loses in the choice, not in the sums.
        """
        width, (_, rows, vocab) = self.width, scores.choice.shape
        totals = (self.sums[:, :, None] + scores.choice).flatten(1)
        ranked = totals if penalty is None else (totals.unflatten(1, (rows, vocab)) - penalty).flatten(1)
        if ranked.shape[1] < 2 * width:  # fewer continuations than are looked at
            ranked = functional.pad(ranked, (0, 2 * width - ranked.shape[1]), value=-math.inf)
        ranks, places = best(ranked, 2 * width)
        places = places.clamp(max=totals.shape[1] - 1)
        if self.forced is not None:
            ranks, places = self._with_forced(self.forced, ranked[:, : totals.shape[1]], ranks, places)
        sums = totals.gather(1, places).masked_fill(ranks == -math.inf, -math.inf)
        parents, token = places // vocab, places % vocab
        gains = scores.log_probabilities.flatten(1).gather(1, places)
        texts = self.texts.grown(token, gains, parents)

        closed = (token == self.end) | texts.full
        accepted = closed & ~self.finished[:, None]
        accepted[:, width:] = False
        length = texts.generated.clamp(min=1)[:, None]
        reached = sums / length**self.strategy.length_penalty
        self.kept.add(texts, reached.masked_fill(~accepted, -math.inf))

        order = torch.arange(0.0, -ranks.shape[1], -1.0, device=ranks.device)
        first, chosen = best(order.masked_fill(closed | (ranks == -math.inf), -math.inf), width)
        self.sums = sums.gather(1, chosen).masked_fill(first == -math.inf, -math.inf)
        self.texts = texts.chosen(chosen)
        self._stop()
        return parents.gather(1, chosen)

    def taken(self, vocab: int) -> Float[Tensor, "images vocab"]:
        """How many live beams have just gone on with each token."""
        counts = self.sums.new_zeros((len(self.sums), vocab))
        return counts.scatter_add_(1, self.texts.last, (self.sums > -math.inf).float())

    def keep(self, pictures: Int64[Tensor, "kept"]) -> None:
        """Forget all other pictures."""
        self.texts = self.texts.of(pictures)
        self.sums, self.finished = self.sums[pictures], self.finished[pictures]
        self.kept.keep(pictures)

    def _with_forced(
        self,
        forced: Forced,
        ranked: Float[Tensor, "images totals"],
        ranks: Float[Tensor, "images best"],
        places: Int64[Tensor, "images best"],
    ) -> tuple[Float[Tensor, "images candidates"], Int64[Tensor, "images candidates"]]:
        """The continuations to look at: the best, those by the next tokens of forced phrases, the best of each beam.

        A bank holds those that have met equally many tokens of the phrases. They come in turns: the best that is left
        of each bank, the likeliest bank first.
        """
        rows = self.texts.ids.shape[1]
        vocab = ranked.shape[1] // rows
        written = forced.vocabulary.texts(self.texts.ids[:, :, : self.texts.length])
        likeliest = ranked.unflatten(1, (rows, vocab)).argmax(dim=-1).tolist()
        more = []
        for texts, tokens, known in zip(written, likeliest, places.tolist(), strict=True):
            wanted = [
                row * vocab + token
                for row, (text, token_of_row) in enumerate(zip(texts, tokens, strict=True))
                for token in {token_of_row, *forced.next(text)}
            ]
            more.append(sorted(set(wanted) - set(known)))
        most = max(map(len, more))
        table = torch.tensor([[*extra, *[-1] * (most - len(extra))] for extra in more]).to(places)
        table = table.view(len(more), most)
        extra = ranked.gather(1, table.clamp(min=0)).masked_fill(table < 0, -math.inf)
        ranks, places = torch.cat([ranks, extra], dim=1), torch.cat([places, table.clamp(min=0)], dim=1)

        orders = []
        for texts, image_ranks, image_places in zip(written, ranks.tolist(), places.tolist(), strict=True):
            banks: dict[float, list[int]] = {}
            for number in sorted(range(len(image_ranks)), key=lambda number: -image_ranks[number]):
                row, token = divmod(image_places[number], vocab)
                met = forced.met(texts[row] + forced.vocabulary.pieces[token])
                banks.setdefault(met if image_ranks[number] > -math.inf else math.inf, []).append(number)
            impossible = banks.pop(math.inf, [])
            turns = itertools.chain.from_iterable(itertools.zip_longest(*banks.values()))
            orders.append([number for number in turns if number is not None] + impossible)
        order = torch.tensor(orders).to(places)
        return ranks.gather(1, order), places.gather(1, order)

    def _stop(self) -> None:
        """Mark the pictures whose live beams can no longer beat the worst text kept.

        A sum only falls. So the best a beam can reach is its present sum, at the length that flatters it most: the
        longest for a penalty above 0, else the next.
        """
        penalty, texts = self.strategy.length_penalty, self.texts
        longest = self.strategy.max_tokens - texts.prompted
        generated = longest if penalty > 0 else (texts.generated + 1).clamp(max=longest)
        self.finished = self.finished | (self.sums.amax(dim=1) / generated**penalty <= self.kept.scores[:, -1])
        if self.width == 1:
            self.finished = self.finished | (self.kept.scores[:, 0] > -math.inf)
