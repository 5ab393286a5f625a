"""Greedy decoding, sampling and the lengths every strategy keeps, on tables of logits."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contracap.generation import BeamSearch, Greedy, Sampling
from tests.generation.logit_tables import empty_prompts

from .logit_tables import END, START, Table, Words, every_text, run, step


def plain_greedy(table, image, strategy):
    text = [START]
    while len(text) < strategy.max_tokens and text[-1] != END:
        values = step(table, image, tuple(text), strategy.min_tokens)
        text.append(values.index(max(values)))
    return tuple(text[1:-1] if text[-1] == END else text[1:])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), max_tokens=st.integers(2, 8), min_tokens=st.integers(0, 8))
def test_greedy_takes_the_likeliest_allowed_token_and_equals_a_beam_of_one(seed, max_tokens, min_tokens):
    table, lengths = Table(tuple(range(3)), seed), (max_tokens, min(min_tokens, max_tokens))
    found = run(Greedy(*lengths), table)
    beams = run(BeamSearch(1, *lengths), table)
    for image in range(3):
        assert found[image][0].token_ids == plain_greedy(table, image, Greedy(*lengths))
        assert found[image] == beams[image]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_tokens": 1}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"max_tokens": 4}, "min_tokens is 5, above max_tokens \\(4\\)"),
    ],
)
@pytest.mark.parametrize("strategy", [Greedy, BeamSearch, Sampling])
def test_impossible_lengths_are_refused_by_name(strategy, settings, named):
    with pytest.raises(ValueError, match=named):
        strategy(**settings)


def test_defaults_are_those_of_the_release():
    assert (Greedy().max_tokens, Greedy().min_tokens) == (30, 5)
    assert BeamSearch() == BeamSearch(width=6, max_tokens=30, min_tokens=5, length_penalty=1.0)


class Wide(Words):
    """40 tokens."""

    def __init__(self) -> None:
        self.start, self.end, self.vocab_size = 38, 39, 40


def truth(logits: list[float], strategy: Sampling) -> list[float]:
    """The distribution to draw from, in plain Python."""
    weights = {token: math.exp(value / strategy.temperature) for token, value in enumerate(logits) if token != 38}
    kept = sorted(weights, key=lambda token: -weights[token])[: strategy.top_k]
    total, reached, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if strategy.top_p is None or reached < strategy.top_p * total:
            nucleus.append(token)
        reached += weights[token]
    most = max(weights.values())
    final = [token for token in nucleus if weights[token] >= (strategy.min_p or 0.0) * most]
    total = sum(weights[token] for token in final)
    return [weights[token] / total if token in final else 0.0 for token in range(len(logits))]


def assert_distributed(counts: list[int], probabilities: list[float]) -> None:
    """Chi-square: within 4 standard deviations of its mean; nothing where nothing may be."""
    total = sum(counts)
    assert all(count == 0 for count, probability in zip(counts, probabilities, strict=True) if probability == 0)
    cells = [(count, total * value) for count, value in zip(counts, probabilities, strict=True) if value > 0]
    freedom = len(cells) - 1
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    assert statistic <= freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("settings", "images", "samples"),
    [
        ({"temperature": 0.6}, 10, 1_000),
        ({"top_k": 7}, 10, 1_000),
        ({"top_p": 0.8}, 10, 1_000),
        ({"min_p": 0.2}, 10, 1_000),
        ({"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.1}, 10, 1_000),
        ({}, 10_000, 1),
    ],
    ids=str,
)
def test_tokens_are_drawn_by_their_probabilities(settings, images, samples):
    logits = 1.5 * torch.randn(40, generator=torch.Generator().manual_seed(1))
    strategy = Sampling(samples=samples, max_tokens=2, min_tokens=0, seed=5, **settings)
    search = strategy.begin(empty_prompts(images, 38), Wide())
    search.advance(logits.expand(images, 1, -1))
    counts = torch.bincount(search.last.flatten(), minlength=40).tolist()
    assert_distributed(counts, truth(logits.double().tolist(), strategy))


def test_whole_texts_are_drawn_by_their_probabilities():
    table, found = Table((0,), seed=2, spread=0.7), []
    for seed in range(4):
        found += run(Sampling(samples=1000, seed=seed, max_tokens=4, min_tokens=0), table)[0]
    probabilities = {}
    for text in every_text(table, 0, BeamSearch(1, 4, 0)):
        ids = (*text.token_ids, END) if len(text.token_ids) < 3 else text.token_ids
        product = 1.0
        for place, token in enumerate(ids):
            values = [math.exp(value) for value in step(table, 0, (START, *ids[:place]), 0)]
            product *= values[token] / sum(values)
        probabilities[text.token_ids] = product
    assert sum(probabilities.values()) == pytest.approx(1)
    counts = Counter(text.token_ids for text in found)
    assert_distributed([counts[ids] for ids in probabilities], list(probabilities.values()))


def test_a_seed_gives_the_same_texts_again_and_another_seed_others():
    table = Table(tuple(range(4)), seed=3)
    texts = [run(Sampling(seed=seed, samples=2, max_tokens=8), table) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_samples_of_one_image_and_of_equal_images_are_independent():
    class Alike(Table):
        def logits(self, image, beginning):
            return super().logits(0, beginning)

    found = run(Sampling(samples=20, max_tokens=8), Alike((0, 1), seed=4, spread=0.5))
    assert len({text.token_ids for text in found[0]}) > 10
    assert found[0] != found[1]


def test_a_samples_text_depends_neither_on_how_many_there_are_nor_on_the_room_behind_it():
    table = Table((0, 1, 2), seed=5)
    few, many = (run(Sampling(samples=samples, max_tokens=8), table) for samples in (2, 5))
    assert all(set(some) <= set(more) for some, more in zip(few, many, strict=True))
    roomy = run(Sampling(samples=2, max_tokens=20), table)
    for short, long in zip(few, roomy, strict=True):
        assert {text for text in long if len(text.token_ids) < 7} <= set(short)
        assert {text.token_ids[:7] for text in long} == {text.token_ids for text in short}


def test_samples_are_ranked_by_the_models_mean_log_probability_whatever_the_temperature():
    table = Table((0, 1), seed=6)
    for image, texts in enumerate(run(Sampling(3.0, samples=6, max_tokens=7, min_tokens=2), table)):
        assert [text.score for text in texts] == sorted((text.score for text in texts), reverse=True)
        for text in texts:
            ids = (*text.token_ids, END) if len(text.token_ids) < 6 else text.token_ids
            gains = [step(table, image, (START, *ids[:place]), 2)[token] for place, token in enumerate(ids)]
            assert text.token_log_probabilities == pytest.approx(gains, rel=1e-4)
            assert text.score == pytest.approx(sum(gains) / len(gains), rel=1e-4)


def test_top_k_of_one_is_greedy():
    table = Table(tuple(range(5)), seed=7)
    assert run(Sampling(top_k=1, max_tokens=9, min_tokens=2), table) == run(Greedy(9, 2), table)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("temperature", 0.0), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.1)),
        *(("min_p", -0.1), ("seed", -1), ("samples", 0)),
    ],
)
def test_impossible_settings_of_sampling_are_refused_by_name(setting, value):
    with pytest.raises(ValueError, match=f"{setting} must be"):
        Sampling(**{setting: value})
