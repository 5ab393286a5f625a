"""Greedy decoding and the rules every strategy shares, on tables of logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contracap.generation import BeamSearch, Greedy

from .logit_tables import END, START, VOCAB, Table, begin, run, step


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


def test_a_batch_of_pictures_gives_what_each_gives_alone():
    table = Table(tuple(range(5)), seed=1)
    together = run(Greedy(9, 2), table)
    assert len({len(texts[0].token_ids) for texts in together}) > 1, "the pictures should end at different steps"
    assert together == [run(Greedy(9, 2), table.only(image))[0] for image in range(5)]


def test_log_probability_sums_the_tokens_and_the_end_and_the_score_is_their_mean():
    table = Table(tuple(range(20)), seed=2)
    for image, (found,) in enumerate(run(Greedy(6, 0), table)):
        ended = len(found.token_ids) < 5
        text = (*found.token_ids, END) if ended else found.token_ids
        total = sum(step(table, image, (START, *text[:place]), 0)[token] for place, token in enumerate(text))
        assert found.log_probability == pytest.approx(total, rel=1e-5)
        assert found.score == pytest.approx(total / len(text), rel=1e-5)


def test_end_token_is_forbidden_exactly_while_the_sequence_is_shorter_than_min_tokens():
    logits = torch.full((1, VOCAB), -5.0)
    logits[0, END] = 5.0
    for strategy in (Greedy(8, 4), BeamSearch(3, 8, 4)):
        search = begin(strategy, 1)
        while not search.finished.all():
            search.advance(logits.expand(*search.last.shape, -1))
        shortest = min(search.hypotheses()[0], key=lambda text: len(text.token_ids))
        assert len(shortest.token_ids) == 3  # with the start token: 4


def test_start_token_is_never_produced_and_id_zero_is_a_word():
    logits = torch.full((1, VOCAB), -5.0)
    logits[0, START], logits[0, 0] = 9.0, 5.0
    for strategy in (Greedy(6, 0), BeamSearch(2, 6, 0)):
        search = begin(strategy, 1)
        while not search.finished.all():
            search.advance(logits.expand(*search.last.shape, -1))
        assert search.hypotheses()[0][0].token_ids == (0, 0, 0, 0, 0)


def test_among_equal_tokens_the_lowest_id_wins():
    search = begin(Greedy(4, 4), 2)
    while not search.finished.all():
        search.advance(torch.zeros(2, 1, VOCAB))
    assert [texts[0].token_ids for texts in search.hypotheses()] == [(0, 0, 0), (0, 0, 0)]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_tokens": 1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"max_tokens": 4}, "min_tokens is 5, above max_tokens, 4"),
    ],
)
@pytest.mark.parametrize("strategy", [Greedy, BeamSearch])
def test_impossible_lengths_are_refused_by_name(strategy, settings, named):
    with pytest.raises(ValueError, match=named):
        strategy(**settings)


def test_defaults_are_those_of_the_release():
    assert (Greedy().max_tokens, Greedy().min_tokens) == (30, 5)
    assert BeamSearch() == BeamSearch(width=6, max_tokens=30, min_tokens=5, length_penalty=1.0)
