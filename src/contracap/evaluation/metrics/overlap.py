"""Caption metrics that count shared words: BLEU, ROUGE_L and CIDEr of tokenized captions, in float64.

In all functions, `references[i]` are the captions of image i that people wrote, and `hypotheses[i]` is a model's. All
are tokens joined by blanks, as `tokens.tokenize` returns them. The figures equal those of `pycocoevalcap` 1.2.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LONGEST = 4  # words in the longest n-gram of BLEU and CIDEr
TINY, SMALL = 1e-15, 1e-9  # the smoothing of coco-caption's BLEU
RECALL_WEIGHT = 1.2  # beta of ROUGE_L
LENGTH_SPREAD = 6.0  # words; sigma of CIDEr-D's length penalty

NGram = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Bleu:
    """BLEU of a set of captions, and its counts.

    Attributes:
        scores: Bleu_1 to Bleu_4, from 0 to 1.
        hypothesis_length: words in all hypotheses.
        reference_length: words in the references that are nearest in length, one for each image; of two, the shorter.
        guessed: number of n-grams in the hypotheses, n = 1 to 4.
        correct: number of those that a reference has too; each counts at most as often as in one reference.
    """

    scores: tuple[float, ...]
    hypothesis_length: int
    reference_length: int
    guessed: tuple[int, ...]
    correct: tuple[int, ...]


def bleu(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Bleu:
    """Return BLEU of the whole set, which is not a mean over images.

    Raises:
        ValueError: if an image has no reference or an empty one, or the two lengths differ.
    """
    check_hypotheses(references, hypotheses)
    hypothesis_length = reference_length = 0
    guessed, correct = [0] * LONGEST, [0] * LONGEST
    for captions, hypothesis in zip(references, hypotheses, strict=True):
        length = len(hypothesis.split())
        hypothesis_length += length
        reference_length += min((len(caption.split()) for caption in captions), key=lambda n: (abs(n - length), n))
        most: Counter[NGram] = Counter()
        for caption in captions:
            most |= count_ngrams(caption)
        for n in range(LONGEST):
            guessed[n] += max(0, length - n)
        for ngram, count in count_ngrams(hypothesis).items():
            correct[len(ngram) - 1] += min(count, most[ngram])

    ratio = (hypothesis_length + TINY) / (reference_length + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n in range(LONGEST):
        product *= (correct[n] + TINY) / (guessed[n] + SMALL)
        scores.append(product ** (1 / (n + 1)) * brevity)
    return Bleu(
        scores=tuple(scores),
        hypothesis_length=hypothesis_length,
        reference_length=reference_length,
        guessed=tuple(guessed),
        correct=tuple(correct),
    )


def rouge_l(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> list[float]:
    """Return ROUGE_L of each image, from 0 to 1; the figure of a set is their mean.

    The best precision and the best recall may come from different references.

    Raises:
        ValueError: if an image has no reference or an empty one, or the two lengths differ.
    """
    check_hypotheses(references, hypotheses)
    scores = []
    for captions, hypothesis in zip(references, hypotheses, strict=True):
        # Tokens end at blanks only, so "25\u00a01/2" is one; an empty hypothesis is one empty token.
        words = hypothesis.split(" ")
        shared = [(common_length(words, caption.split(" ")), len(caption.split(" "))) for caption in captions]
        precision = max(common / len(words) for common, _ in shared)
        recall = max(common / length for common, length in shared)
        weight = RECALL_WEIGHT**2
        scores.append((1 + weight) * precision * recall / (recall + weight * precision) if precision else 0.0)
    return scores


def cider(references: Sequence[Sequence[str]], hypotheses: Sequence[str], *, plain: bool = False) -> list[float]:
    """Return CIDEr-D of each image, from 0 to 10; the figure of a set, which is printed as CIDEr, is their mean.

    The references given here tell how rare an n-gram is. So a score depends on the whole set, an image alone scores 0,
    and two systems can be compared only on the same images.

    Args:
        plain: leave out clipped counts and the length penalty, which the D stands for. Such scores are higher, and must
            not be called CIDEr.

    Raises:
        ValueError: if an image has no reference or an empty one, or the two lengths differ.
    """
    check_hypotheses(references, hypotheses)
    counted = [[count_ngrams(caption) for caption in captions] for captions in references]
    images_with = Counter(ngram for captions in counted for ngram in set().union(*captions))
    rarity = {ngram: math.log(len(references)) - math.log(count) for ngram, count in images_with.items()}
    unseen = math.log(len(references)) if references else 0.0

    def weigh(counts: Counter[NGram]) -> "WeightedNGrams":
        weights: list[dict[NGram, float]] = [{} for _ in range(LONGEST)]
        for ngram, count in counts.items():
            weights[len(ngram) - 1][ngram] = count * rarity.get(ngram, unseen)
        norms = [math.sqrt(sum(weight * weight for weight in by_length.values())) for by_length in weights]
        return WeightedNGrams(weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2))

    scores = []
    for captions, hypothesis in zip(counted, hypotheses, strict=True):
        written = weigh(count_ngrams(hypothesis))
        total = sum(similarity(written, weigh(caption), plain=plain) for caption in captions)
        scores.append(10 * total / LONGEST / len(captions))
    return scores


@dataclass(frozen=True)
class WeightedNGrams:
    """A caption in CIDEr: the weights of its n-grams by n, the norms of these vectors, and its number of bigrams."""

    weights: list[dict[NGram, float]]
    norms: list[float]
    bigrams: int


def similarity(hypothesis: WeightedNGrams, reference: WeightedNGrams, *, plain: bool) -> float:
    """Return the sum over n of clipped cosines, times the penalty of lengths in bigrams; if `plain`, of cosines."""
    total = 0.0
    for n in range(LONGEST):
        norms = hypothesis.norms[n] * reference.norms[n]
        if norms:
            theirs = reference.weights[n]
            shared = ((weight, theirs[ngram]) for ngram, weight in hypothesis.weights[n].items() if ngram in theirs)
            total += sum((ours if plain else min(ours, their)) * their for ours, their in shared) / norms
    if plain:
        return total
    return total * math.exp(-((hypothesis.bigrams - reference.bigrams) ** 2) / (2 * LENGTH_SPREAD**2))


def count_ngrams(caption: str) -> Counter[NGram]:
    """Return the counts of all runs of one to four words."""
    words = caption.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1))


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence. The rows of the dynamic programme are bits of an integer.

    Source: Hyyrö, Bit-parallel LCS-length computation revisited (2004).
    """
    places: dict[str, int] = {}
    for i, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << i
    every = (1 << len(first)) - 1
    row = every
    for word in second:
        common = row & places.get(word, 0)
        row = ((row + common) | (row - common)) & every
    return len(first) - row.bit_count()


def mean(scores: Iterable[float]) -> float:
    """Return the mean. The sum is exact, so the order of the images does not matter."""
    scores = list(scores)
    return math.fsum(scores) / len(scores)


def check_hypotheses(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> None:
    """Raises: ValueError: if these cannot be compared."""
    if not hypotheses:
        raise ValueError("there is no caption to score")
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} images have references, {len(hypotheses)} have a caption to score")
    for i, captions in enumerate(references):
        if not captions:
            raise ValueError(f"image {i} (counted from 0) has no reference caption")
        if not all(caption.strip() for caption in captions):
            raise ValueError(f"image {i} (counted from 0) has an empty reference caption; leave it out")
