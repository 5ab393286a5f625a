"""The release's beam search against its description, written out slowly and apart from the package."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracap.generation import LegacyBeamSearch

from .logit_tables import END, START, VOCAB, Table, begin, prompts_of, run


def described(table: Table, image: int, strategy: LegacyBeamSearch) -> list[tuple[float, tuple[int, ...]]]:
    """Score and whole sequence, end token included, of the texts kept, best first."""
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, (START,)), (-1e9, (START,))]
    kept: list[tuple[float, tuple[int, ...]]] = []
    done = False
    length = 1
    while length < strategy.max_tokens and not done:
        divisor = {2023: length, 2024: length + 1}[strategy.year]
        continued = []
        for total, text in beams:
            logits = table.logits(image, text).double().tolist()
            if length < 5:
                logits[END] = -math.inf
            continued += [(total + logits[token], (*text, token)) for token in range(VOCAB)]
        top = sorted(continued, reverse=True)[:4]
        beams = []
        for rank, (total, text) in enumerate(top):
            if text[-1] == END:
                if rank < 2:
                    kept = sorted([*kept, (total / divisor, text)], reverse=True)[:2]
            elif len(beams) < 2:
                beams.append((total, text))
        done = len(kept) == 2 and kept[1][0] >= top[0][0] / divisor
        length += 1
    if not done:
        kept = sorted([*kept, *((total / strategy.max_tokens, text) for total, text in beams)], reverse=True)[:2]
    return kept


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    year=st.sampled_from([2023, 2024]),
    max_tokens=st.integers(6, 30),
    spread=st.sampled_from([0.5, 2.0, 5.0]),
    shift=st.sampled_from([-2.0, 0.0, 2.0]),
)
def test_ids_and_scores_are_those_of_the_description(seed, year, max_tokens, spread, shift):
    class Shifted(Table):
        def logits(self, image, beginning):
            return super().logits(image, beginning) + shift

    strategy, table = LegacyBeamSearch(year, max_tokens), Shifted((0, 1, 2), seed, spread)
    for image, found in enumerate(run(strategy, table)):
        expected = described(table, image, strategy)
        assert len(found) == len(expected)
        for text, (score, ids) in zip(found, expected, strict=True):
            assert text.token_ids == (ids[1:-1] if ids[-1] == END else ids[1:])
            assert text.score == pytest.approx(score, rel=1e-4, abs=1e-5)
            generated = ids[1 : 1 + len(text.token_log_probabilities)]
            expected_gains = [
                table.logits(image, ids[: place + 1]).log_softmax(dim=-1)[token].item()
                for place, token in enumerate(generated)
            ]
            assert text.token_log_probabilities == pytest.approx(expected_gains, rel=1e-4, abs=1e-5)
            assert text.log_probability == pytest.approx(sum(expected_gains), rel=1e-4)


def test_what_the_release_did_not_have_is_refused():
    with pytest.raises(ValueError, match="LegacyBeamSearch takes no prompts"):
        begin(LegacyBeamSearch(2023), 2, prompts_of([[0], []]))
    with pytest.raises(ValueError, match="year must be 2023 or 2024, not 2025"):
        LegacyBeamSearch(2025)
