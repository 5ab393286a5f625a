"""Caption metrics that count shared words: BLEU, ROUGE_L and CIDEr of tokenized captions, in float64.

Everywhere: `references[i]` are the captions of image i, `hypotheses[i]` is what a model wrote for it, all of them
tokens joined by blanks as `tokens.tokenize` returns them. The figures equal those of `pycocoevalcap` 1.2.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LONGEST = 4  # words in the longest n-gram of BLEU and CIDEr
TINY, SMALL = 1e-15, 1e-9  # all the smoothing that coco-caption's BLEU has
RECALL_WEIGHT = 1.2  # beta of ROUGE_L
LENGTH_SPREAD = 6.0  # words; sigma of CIDEr-D's length penalty

NGram = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Bleu:
    """BLEU of a set of captions and the counts it rests on.

    Attributes:
        scores: Bleu_1 to Bleu_4, from 0 to 1.
        hypothesis_length: words of all hypotheses.
        reference_length: words of, for each image, the reference nearest in length (the shorter of two).
        guessed: n-grams in the hypotheses, n = 1 to 4.
        correct: those that a reference has too, each as often as the reference that has it most often.
    """

    scores: tuple[float, ...]
    hypothesis_length: int
    reference_length: int
    guessed: tuple[int, ...]
    correct: tuple[int, ...]


def bleu(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Bleu:
    """Corpus BLEU. Not the mean over images: for one image's score give one image.

    Raises:
        ValueError: if an image has no reference or an empty one, or the two lengths differ.
    """
    check(references, hypotheses)
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
    """ROUGE_L of each image, from 0 to 1; the figure of a set is their mean.

    The best precision and the best recall may come from different references.

    Raises:
        ValueError: if an image has no reference or an empty one, or the two lengths differ.
    """
    check(references, hypotheses)
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
    """CIDEr-D of each image, from 0 to 10; the figure of a set, which is printed as CIDEr, is their mean.

    How rare an n-gram is comes from the references given here: an image's score depends on the whole set, one
    image alone scores 0, and two systems compare on the same images only.

    Args:
        plain: without what the D stands for, clipped counts and the length penalty. Such scores are higher, and must
            not be called CIDEr.

    Raises:
        ValueError: if an image has no reference or an empty one, or the two lengths differ.
    """
    check(references, hypotheses)
    counted = [[count_ngrams(caption) for caption in captions] for captions in references]
    pictures_with = Counter(ngram for captions in counted for ngram in set().union(*captions))
    rarity = {ngram: math.log(len(references)) - math.log(count) for ngram, count in pictures_with.items()}
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
    """A caption as CIDEr sees it: weights of its n-grams by n, the norms of these vectors, the number of bigrams."""

    weights: list[dict[NGram, float]]
    norms: list[float]
    bigrams: int


def similarity(hypothesis: WeightedNGrams, reference: WeightedNGrams, *, plain: bool) -> float:
    """Clipped cosines, summed over n, times the length penalty (lengths are counted in bigrams); cosines if `plain`."""
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
    """How often each run of one to four words occurs."""
    words = caption.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1))


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, the dynamic programme's rows kept as the bits of an integer.

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
    """The mean, summed without rounding, so that the order of the images does not matter."""
    scores = list(scores)
    return math.fsum(scores) / len(scores)


def check(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> None:
    """Raises: ValueError: if these cannot be scored against each other."""
    if not hypotheses:
        raise ValueError("there is no caption to score")
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} images have references, {len(hypotheses)} have a caption to score")
    for i, captions in enumerate(references):
        if not captions:
            raise ValueError(f"image {i} (counted from 0) has no reference caption")
        if not all(caption.strip() for caption in captions):
            raise ValueError(f"image {i} (counted from 0) has an empty reference caption; leave it out")
