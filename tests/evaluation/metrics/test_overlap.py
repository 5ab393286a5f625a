import math
import random

import pytest

from contracap.evaluation.metrics.overlap import bleu, cider, mean, rouge_l

from ..oracles import reference

WORDS = "a man dog red ball on the grass with two cats runs jumps over small bench".split()  # noqa: SIM905


def written(seed: int, pictures: int = 60, shortest: int = 0) -> tuple[list[list[str]], list[str]]:
    """Random token strings: one to five references an image and something near one of them."""
    draw = random.Random(seed)
    references, hypotheses = [], []
    for _ in range(pictures):
        captions = [" ".join(draw.choices(WORDS, k=draw.randint(1, 14))) for _ in range(draw.randint(1, 5))]
        words = [word if draw.random() < 0.7 else draw.choice(WORDS) for word in draw.choice(captions).split()]
        references.append(captions)
        hypotheses.append(" ".join(words[: draw.randint(shortest, 14)]))
    return references, hypotheses


def peer_scores(metric, references: list[list[str]], hypotheses: list[str]):
    arguments = {"verbose": 0} if type(metric).__name__ == "Bleu" else {}
    return metric.compute_score(dict(enumerate(references)), {i: [h] for i, h in enumerate(hypotheses)}, **arguments)


@pytest.mark.parametrize("seed", range(2))
def test_bleu_of_set_and_of_each_picture_equals_pycocoevalcap(seed: int) -> None:
    peer = reference("pycocoevalcap.bleu.bleu")
    references, hypotheses = written(seed)
    corpus, pictures = peer_scores(peer.Bleu(4), references, hypotheses)
    assert bleu(references, hypotheses).scores == pytest.approx(corpus, rel=1e-12)
    single = [
        bleu([captions], [hypothesis]).scores for captions, hypothesis in zip(references, hypotheses, strict=True)
    ]
    for n in range(4):
        assert [scores[n] for scores in single] == pytest.approx(pictures[n], rel=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_rouge_l_equals_pycocoevalcap(seed: int) -> None:
    peer = reference("pycocoevalcap.rouge.rouge")
    references, hypotheses = written(seed)
    corpus, pictures = peer_scores(peer.Rouge(), references, hypotheses)
    assert rouge_l(references, hypotheses) == pytest.approx(list(pictures), rel=1e-12)
    assert mean(rouge_l(references, hypotheses)) == pytest.approx(corpus, rel=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_cider_equals_pycocoevalcap(seed: int) -> None:
    peer = reference("pycocoevalcap.cider.cider")
    references, hypotheses = written(seed)
    corpus, pictures = peer_scores(peer.Cider(), references, hypotheses)
    assert cider(references, hypotheses) == pytest.approx(list(pictures), rel=1e-10, abs=1e-12)
    assert mean(cider(references, hypotheses)) == pytest.approx(corpus, rel=1e-10)


@pytest.mark.parametrize("shortest", [0, 4])
def test_bleu_equals_sacrebleu(shortest: int) -> None:
    peer = reference("sacrebleu")
    references, hypotheses = written(7, shortest=shortest)
    most = max(map(len, references))
    streams = [[captions[i] if i < len(captions) else None for captions in references] for i in range(most)]
    for n, score in enumerate(bleu(references, hypotheses).scores, start=1):
        metric = peer.BLEU(tokenize="none", smooth_method="none", max_ngram_order=n, force=True)
        assert score == pytest.approx(metric.corpus_score(hypotheses, streams).score / 100, rel=1e-6)


def test_cider_of_one_picture_is_zero() -> None:
    assert cider([["a red ball"]], ["a red ball"]) == [0.0]


def test_cider_does_not_depend_on_the_order_of_the_pictures() -> None:
    references, hypotheses = written(3)
    order = random.Random(0).sample(range(len(references)), len(references))
    scores = cider(references, hypotheses)
    shuffled = cider([references[i] for i in order], [hypotheses[i] for i in order])
    assert shuffled == [scores[i] for i in order]
    assert mean(shuffled) == mean(scores)


def plain_cider(references: list[list[str]], hypotheses: list[str]) -> list[float]:
    """The definition, word for word: cosines of the vectors of counts times rarity, means over references and n."""

    def counts(caption: str, n: int) -> dict[str, int]:
        words = caption.split()
        ngrams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        return {ngram: ngrams.count(ngram) for ngram in ngrams}

    def vector(caption: str, n: int) -> dict[str, float]:
        weights = {}
        for ngram, count in counts(caption, n).items():
            pictures = sum(any(ngram in counts(one, n) for one in captions) for captions in references)
            weights[ngram] = count * math.log(len(references) / max(1, pictures))
        return weights

    def cosine(first: dict[str, float], second: dict[str, float]) -> float:
        lengths = [math.sqrt(sum(value**2 for value in vector.values())) for vector in (first, second)]
        product = sum(value * second.get(ngram, 0.0) for ngram, value in first.items())
        return product / math.prod(lengths) if all(lengths) else 0.0

    scores = []
    for captions, hypothesis in zip(references, hypotheses, strict=True):
        found = [cosine(vector(hypothesis, n), vector(caption, n)) for caption in captions for n in range(1, 5)]
        scores.append(10 * sum(found) / len(found))
    return scores


def test_plain_cider_equals_its_definition() -> None:
    references, hypotheses = written(4, pictures=12)
    assert cider(references, hypotheses, plain=True) == pytest.approx(plain_cider(references, hypotheses), rel=1e-9)


def test_rouge_l_keeps_a_number_with_its_fraction_together() -> None:
    assert rouge_l([["25\u00a01/2 dogs"]], ["25 1/2 dogs"])[0] < 1
    assert bleu([["25\u00a01/2 dogs"]], ["25 1/2 dogs"]).correct == (3, 2, 1, 0)


@pytest.mark.parametrize("metric", [bleu, rouge_l, cider])
@pytest.mark.parametrize(
    ("references", "hypotheses", "message"),
    [
        ([["a"], ["b", " "]], ["a", "b"], r"image 1 .* empty reference"),
        ([[]], ["a"], "image 0 .* no reference"),
        ([["a"]], ["a", "b"], "1 images have references, 2"),
        ([], [], "no caption to score"),
    ],
)
def test_what_cannot_be_scored_is_refused(metric, references, hypotheses, message) -> None:
    with pytest.raises(ValueError, match=message):
        metric(references, hypotheses)
