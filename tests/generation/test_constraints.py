"""Rules on tables of logits, and on the real tokenizer with logits that want to break them."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contracap.generation import BeamSearch, Greedy, Rules, Sampling
from contracap.generation.constraints import Constraints
from contracap.generation.strategy import Prompts
from contracap.generation.texts import PartialTexts
from contracap.tokenizer import Tokenizer
from tests.generation.logit_tables import empty_prompts

from .logit_tables import END, START, VOCAB, Words, begin, prompts_of

TOKENIZER = Tokenizer(context=20, vocab_size=900)
PHRASES = ["red", "a red ball", "ball", "cube", "ball cube", "the", "7", "it's", "two 2 blue!", "re", "b"]


def constraints(rules: Rules, prompts: Prompts, min_tokens: int = 0, max_tokens: int = 12) -> Constraints:
    return Constraints(prompts, Words(), max_tokens=max_tokens, min_tokens=min_tokens, rules=rules)


def texts_of(*ids: list[int], prompted: int = 1) -> PartialTexts:
    rows = torch.tensor([ids])
    texts = PartialTexts.from_prompts(empty_prompts(1, START), 12)
    table = torch.zeros(1, len(ids), 12, dtype=torch.int64)
    table[:, :, : rows.shape[2]] = rows
    return PartialTexts(
        table, torch.zeros(1, len(ids), 12), rows.shape[2], torch.full_like(texts.prompt_lengths, prompted)
    )


def test_forbidden_tokens_leave_the_other_probabilities_as_the_model_gave_them():
    logits = torch.randn(1, 2, VOCAB, dtype=torch.float64)
    before = logits.clone()
    scores = constraints(Rules(), empty_prompts(1, START), min_tokens=5)(logits, texts_of([START, 0], [START, 1]))
    assert scores.scores.dtype == torch.float32
    assert (scores.scores[..., [START, END]] == -math.inf).all()
    torch.testing.assert_close(scores.scores[..., :START], torch.log_softmax(logits, -1).float()[..., :START])
    assert torch.equal(logits, before)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_generated_tokens():
    logits = torch.tensor([[[2.0, -1.0, 0.5, 0.1, 1.0]]])
    rules, texts = Rules(repetition_penalty=2.0), texts_of([START, 2, 0, 1, 0], prompted=2)
    scores = constraints(rules, empty_prompts(1, START))(logits, texts)
    expected = torch.log_softmax(torch.tensor([1.0, -2.0, 0.5, 0.1, 1.0]), dim=-1)  # id 2 is the prompt's
    torch.testing.assert_close(scores.scores[0, 0, [0, 1, 2, 4]], expected[[0, 1, 2, 4]])
    torch.testing.assert_close(scores.log_probs[0, 0], torch.log_softmax(logits[0, 0], dim=-1))


@pytest.mark.parametrize("strategy", [Greedy, BeamSearch])
def test_a_penalty_changes_the_words_and_not_the_probabilities_that_are_reported(strategy):
    logits = torch.tensor([2.0, 1.9, 1.0, -9.0, -9.0])
    found = []
    for penalty in (1.0, 5.0):
        search = begin(strategy(max_tokens=4, min_tokens=4, rules=Rules(repetition_penalty=penalty)), 1)
        while not search.finished.all():
            search.advance(logits.expand(*search.last.shape, -1))
        found.append(search.list_texts()[0][0])
    assert found[0].token_ids == (0, 0, 0) and set(found[1].token_ids) == {0, 1, 2}
    expected = torch.log_softmax(logits, dim=-1)[list(found[1].token_ids)]
    assert found[1].token_log_probabilities == pytest.approx(expected.tolist(), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 2), max_size=9), count=st.integers(1, 4))
def test_no_sequence_of_that_many_tokens_comes_twice(ids, count):
    text = [START, *ids]
    scores = constraints(Rules(no_repeat_ngram=count), empty_prompts(1, START))(
        torch.zeros(1, 1, VOCAB), texts_of(text)
    )
    runs = [text[place : place + count] for place in range(len(text) - count + 1)]
    for token in range(3):
        newest = [*text[len(text) - count + 1 :], token]
        assert (scores.scores[0, 0, token] == -math.inf) == (newest in runs)


def test_a_prompts_tokens_are_the_only_ones_possible_whatever_the_rules():
    rules = Rules(banned=("b",), no_repeat_ngram=1, forced=("c",))
    prompts = prompts_of([[1, 1], [0]])
    texts = PartialTexts.from_prompts(prompts, 12)
    scores = constraints(rules, prompts)(torch.randn(2, 1, VOCAB), texts).scores
    assert scores.shape == (2, 1, VOCAB) and texts.length == 2
    assert scores[0, 0].tolist() == [-math.inf, 0.0, *[-math.inf] * 3]
    assert scores[1, 0, 1] == -math.inf and scores[1, 0, 2] > -math.inf


class Wanting:
    """Logits that depend on the text and want the pieces of some phrases, however they are cut."""

    def __init__(self, seed: int, phrases: list[str]):
        self.seed = seed
        wanted = " ".join(phrases).encode()
        pieces = [piece.removesuffix(b"</w>") for piece in TOKENIZER.pieces]
        self.bonus = torch.tensor([6.0 if piece.lower() in wanted else 0.0 for piece in pieces] + [0.0, 4.0])

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        rows = []
        for text in ids.flatten(0, 1).tolist():
            generator = torch.Generator().manual_seed(hash((self.seed, *text)) % 2**63)
            rows.append(2 * torch.randn(TOKENIZER.vocab_size, generator=generator) + self.bonus)
        return torch.stack(rows).unflatten(0, ids.shape[:2])


def words(text: str) -> list[str]:
    """As a reader sees them; broken characters count as letters."""
    return re.findall(r"(?:[^\W\d_]|\ufffd)+|\d|(?:[^\w\s\ufffd]|_)+", text)


def holds(text: list[str], phrase: list[str]) -> bool:
    return any(text[place : place + len(phrase)] == phrase for place in range(len(text)))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    banned=st.lists(st.sampled_from(PHRASES), max_size=4),
    forced=st.lists(st.sampled_from(PHRASES), max_size=2),
    ngram=st.sampled_from([None, 1, 2]),
    strategy=st.sampled_from([Greedy, Sampling, BeamSearch]),
    prompt=st.sampled_from(["", "a", "one big"]),
)
def test_forced_phrases_always_occur_and_banned_never(seed, banned, forced, ngram, strategy, prompt):
    rules = Rules(banned=tuple(banned), forced=tuple(forced), no_repeat_ngram=ngram)
    ids = torch.tensor([[TOKENIZER.start, *TOKENIZER.encode(prompt)]])
    if any(holds(words(one), words(other)) for one in forced for other in banned):
        with pytest.raises(ValueError, match=r"is banned and part of .* which is forced"):
            strategy(rules=rules).begin(Prompts(ids, torch.tensor([ids.shape[1]])), TOKENIZER)
        return
    wanting = Wanting(seed, [*banned, *PHRASES])
    search = strategy(max_tokens=26, min_tokens=3, rules=rules).begin(
        Prompts(ids, torch.tensor([ids.shape[1]])), TOKENIZER
    )
    while not search.finished.all():
        search.advance(wanting(search.texts.ids[:, :, : search.texts.length]))
    (found,) = search.list_texts()
    assert found and all(math.isfinite(text.score) for text in found)
    for text in found:
        shown = words(TOKENIZER.decode([*ids[0].tolist(), *text.token_ids]))
        assert not any(holds(shown, words(phrase)) for phrase in banned)
        assert all(holds(shown, words(phrase)) for phrase in forced)


@pytest.mark.parametrize(
    ("text", "next_piece", "allowed"),
    [
        ("a re", b"d</w>", False),
        ("a re", b"d", True),
        ("a ha", b"d</w>", True),
        ("a bo re", b"d</w>", False),
        ("bo", b"red</w>", True),  # "bored" where "bo" did not end
    ],
)
def test_a_banned_word_is_found_however_it_is_cut(text, next_piece, allowed):
    rules, pieces = Rules(banned=("red",)), list(TOKENIZER.pieces)
    head, _, tail = text.rpartition(" ")
    ids = [TOKENIZER.start, *TOKENIZER.encode(head)]
    ids += [pieces.index(bytes([byte])) for byte in tail.encode()]
    if next_piece not in pieces:
        pytest.skip("no such token in this small vocabulary")
    token = pieces.index(next_piece)
    prompts = Prompts(torch.tensor([ids]), torch.tensor([len(ids)]))
    scorer = Constraints(prompts, TOKENIZER, max_tokens=20, min_tokens=0, rules=rules)
    scores = scorer(torch.zeros(1, 1, TOKENIZER.vocab_size), PartialTexts.from_prompts(prompts, 20))
    assert (scores.scores[0, 0, token] > -math.inf) == allowed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number from 0.1 to 10"),
        ({"no_repeat_ngram": 0}, "no_repeat_ngram must be an integer of at least 1"),
        ({"banned": ("",)}, "banned holds an empty phrase"),
        ({"forced": ("a", "  ")}, "forced holds an empty phrase"),
    ],
)
def test_impossible_rules_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        Rules(**settings)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (Rules(forced=("a b c a b c",)), "the forced phrases take 6 tokens, and max_tokens leaves room for 5"),
        (Rules(forced=("a b",), banned=("a b",)), "'a b' is banned and part of 'a b', which is forced"),
        (Rules(forced=("a b c",), banned=("b c",)), "'b c' is banned and part of 'a b c', which is forced"),
    ],
)
@pytest.mark.parametrize("strategy", [Greedy, Sampling, BeamSearch])
def test_rules_that_cannot_be_kept_are_refused_before_the_first_step(strategy, rules, message):
    with pytest.raises(ValueError, match=message):
        begin(strategy(max_tokens=6, min_tokens=2, rules=rules), 2)


def test_a_special_token_is_no_word():
    with pytest.raises(ValueError, match="names a special token"):
        Greedy(rules=Rules(banned=("<end_of_text>",))).begin(empty_prompts(1, TOKENIZER.start), TOKENIZER)
