"""What holds for every strategy: batches, prompts and images that leave the batch change no result."""

import pytest
import torch

from contracap.generation import BeamSearch, Greedy, LegacyBeamSearch, Rules, Sampling
from contracap.generation.registry import build_strategy

from .logit_tables import START, Table, begin, prompts_of, run

IMAGES = tuple(range(6))
WITH_PROMPTS = [
    Greedy(9, 5, Rules(forced=("c b",), banned=("a a",))),
    Sampling(seed=3, samples=3, max_tokens=9, min_tokens=2),
    Sampling(0.7, top_k=3, top_p=0.9, samples=2, max_tokens=9, min_tokens=2, rules=Rules(no_repeat_ngram=2)),
    BeamSearch(4, 9, 2, 0.5),
    BeamSearch(6, 9, 2, groups=3, diversity=1.0),
    BeamSearch(4, 9, 2, rules=Rules(forced=("c b", "a"), repetition_penalty=1.5)),
]
PROMPTS = [[], [0, 1], [2], [1, 1, 1], [], [2, 0]]


@pytest.mark.parametrize("strategy", WITH_PROMPTS, ids=str)
def test_prompts_of_mixed_length_give_what_each_gives_alone(strategy):
    table = Table(IMAGES, seed=1)
    together = run(strategy, table, prompts_of(PROMPTS))
    assert len({len(texts[0].token_ids) for texts in together}) > 1, "the texts should end at different steps"
    for image in IMAGES:
        alone = run(strategy, table.only(image), prompts_of([PROMPTS[image]], [image]))
        assert alone == [together[image]]


@pytest.mark.parametrize("strategy", [*WITH_PROMPTS, LegacyBeamSearch(2023, 12), LegacyBeamSearch(2024, 12)], ids=str)
def test_images_that_leave_the_batch_when_they_are_finished_change_no_result(strategy):
    table = Table(IMAGES, seed=2, spread=4.0)
    prompts = None if isinstance(strategy, LegacyBeamSearch) else prompts_of(PROMPTS)
    assert run(strategy, table, prompts, compact=True) == run(strategy, table, prompts)


@pytest.mark.parametrize("strategy", [Greedy(4, 2), Sampling(max_tokens=4, min_tokens=2), BeamSearch(3, 4, 2)])
def test_a_prompt_that_leaves_no_room_is_refused(strategy):
    with pytest.raises(ValueError, match="a prompt takes 4 tokens, the start token included, and max_tokens is 4"):
        begin(strategy, 2, prompts_of([[], [0, 1, 2]]))


def test_searches_begin_with_one_row_per_image_and_expand_in_their_first_step():
    for strategy in (
        Sampling(samples=3),
        BeamSearch(4),
        BeamSearch(4, groups=2, diversity=1.0),
        LegacyBeamSearch(2023),
    ):
        search = begin(strategy, 2)
        assert search.last.tolist() == [[START], [START]]
        parents = search.advance(torch.randn(2, 1, 5))
        assert parents is not None and parents.tolist() == [[0] * strategy.num_texts] * 2
        assert search.last.shape == (2, strategy.num_texts)


def test_one_phrase_in_a_setting_needs_no_list():
    assert build_strategy("greedy", ["rules.banned=word"]) == Greedy(rules=Rules(banned=("word",)))
    assert build_strategy("greedy", ["rules.forced=['a b', 'c']"]) == Greedy(rules=Rules(forced=("a b", "c")))
