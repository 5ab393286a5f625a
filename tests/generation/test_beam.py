"""Beam search against exhaustive search and against plain Python, on tables of logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contracap.generation import BeamSearch, Greedy, Rules
from contracap.generation.texts import CHUNK, stable_topk

from .logit_tables import VOCAB, Table, begin, every_text, plain_beam_search, prompts_of, run

penalties = st.sampled_from([-2.0, -0.5, 0.0, 0.6, 1.0, 2.0])


def assert_same(found, expected):
    assert [text.token_ids for text in found] == [text.token_ids for text in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, rel=1e-4, abs=1e-5)
        assert one.score == pytest.approx(other.score, rel=1e-4, abs=1e-4)
        assert one.token_log_probabilities == pytest.approx(other.token_log_probabilities, rel=1e-4, abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    width=st.integers(2, 5),
    max_tokens=st.integers(2, 9),
    min_tokens=st.integers(0, 6),
    penalty=penalties,
    spread=st.sampled_from([0.5, 2.0, 6.0]),
)
def test_narrow_beam_that_stops_early_equals_a_plain_search_that_does_not(
    seed, width, max_tokens, min_tokens, penalty, spread
):
    strategy = BeamSearch(width, max_tokens, min(min_tokens, max_tokens), penalty)
    table = Table(tuple(range(2)), seed, spread)
    for image, found in enumerate(run(strategy, table)):
        assert_same(found, plain_beam_search(table, image, strategy))


RULES = [
    Rules(),
    Rules(repetition_penalty=1.7),
    Rules(no_repeat_ngram=2),
    Rules(banned=("a b", "c c")),
    Rules(forced=("a b", "c")),
    Rules(banned=("b",), forced=("c a", "a"), repetition_penalty=0.8),
]


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rules=st.sampled_from(RULES),
    penalty=penalties,
    min_tokens=st.integers(0, 5),
    lengths=st.lists(st.integers(0, 1), min_size=2, max_size=2),
)
def test_wide_beam_with_rules_and_prompts_of_mixed_length_equals_exhaustive_search(
    seed, rules, penalty, min_tokens, lengths
):
    wide = BeamSearch(150, 5, min_tokens, penalty, rules=rules)
    prompts = [tuple((0, 2)[(seed >> place) % 2] for place in range(length)) for length in lengths]
    table = Table(tuple(range(len(lengths))), seed)
    expected = [every_text(table, image, wide, prompt) for image, prompt in enumerate(prompts)]
    for found, texts in zip(run(wide, table, prompts_of(prompts)), expected, strict=True):
        assert_same(found, texts[:150])  # none where the rules and lengths leave none


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from([(4, 2), (6, 3), (3, 3), (6, 2), (8, 2)]),
    diversity=st.sampled_from([0.3, 1.0, 5.0]),
    max_tokens=st.integers(2, 8),
    min_tokens=st.integers(0, 6),
    penalty=penalties,
    spread=st.sampled_from([0.5, 2.0, 6.0]),
)
def test_diverse_groups_equal_a_plain_search_in_groups(seed, shape, diversity, max_tokens, min_tokens, penalty, spread):
    width, groups = shape
    strategy = BeamSearch(width, max_tokens, min(min_tokens, max_tokens), penalty, groups, diversity)
    table = Table(tuple(range(2)), seed, spread)
    for image, found in enumerate(run(strategy, table)):
        assert_same(found, plain_beam_search(table, image, strategy))


def test_forced_phrases_are_looked_for_from_the_start_although_others_are_likelier():
    class Reluctant(Table):
        """Ends at once after "a b", but hardly ever writes "a"."""

        def logits(self, image, beginning):
            scores = {(0, 1): [-8.0, -8.0, -8.0, -8.0, 8.0]}.get(beginning[-2:], [-3.0, 1.0, 2.0, -8.0, -8.0])
            return torch.tensor([-8.0, 8.0, -8.0, -8.0, -8.0] if beginning[-1] == 0 else scores)

    rules = Rules(forced=("a b",))
    (narrow,) = run(BeamSearch(1, 12, 3, 0.0, rules=rules), Reluctant((0,), 0))
    (greedy,) = run(Greedy(12, 3, rules), Reluctant((0,), 0))
    (wider,) = run(BeamSearch(2, 12, 3, 0.0, rules=rules), Reluctant((0,), 0))
    assert narrow[0].token_ids == greedy[0].token_ids == (2,) * 9 + (0, 1), "one beam writes it when it must"
    assert wider[0].token_ids == (0, 1), "two have a place for the phrase, though the likeliest two words are others"


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.1])
def test_search_stops_before_the_longest_length_where_it_can(penalty):
    strategy = BeamSearch(3, 200, 0, penalty)
    search = begin(strategy, 1)
    logits = torch.tensor([[0.0, -9.0, -9.0, -9.0, 9.0]])
    steps = 0
    while not search.finished.all():
        search.advance(logits.expand(*search.last.shape, -1))
        steps += 1
    assert steps < 10


def test_equals_are_ranked_by_beam_then_by_token():
    strategy = BeamSearch(4, 3, 3)
    search = begin(strategy, 1)
    while not search.finished.all():
        search.advance(torch.zeros(*search.last.shape, VOCAB))
    assert [text.token_ids for text in search.list_texts()[0]] == [(0, 0), (0, 1), (0, 2), (1, 0)]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    columns=st.integers(1, 3 * CHUNK + 5),
    count=st.integers(1, 12),
    levels=st.sampled_from([2, 5, 10**6]),
)
def test_stable_topk_equals_a_stable_sort(seed, columns, count, levels):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (3, columns), generator=generator).float()
    scores[scores == 0] = -torch.inf
    count = min(count, columns)
    values, places = stable_topk(scores, count)
    expected = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :count])
    assert torch.equal(places, expected.indices[:, :count])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        *(({"width": 0}, "width"), ({"width": True}, "width"), ({"length_penalty": 99.0}, "length_penalty")),
        *(({"length_penalty": float("nan")}, "length_penalty"), ({"groups": 0}, "groups")),
        *(({"diversity": -1.0}, "diversity"), ({"groups": 4, "diversity": 1.0}, "groups")),
        *(({"groups": 3, "diversity": 0.0}, "groups"), ({"groups": 1, "diversity": 1.0}, "groups")),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_by_name(settings, named):
    with pytest.raises(ValueError, match=named):
        BeamSearch(**settings)
