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

from .logit_tables import START, VOCAB, Words, begin

TOKENIZER = Tokenizer(context=20, vocab_size=900)
PHRASES = ["red", "a red ball", "ball", "cube", "ball cube", "the", "7", "it's", "two 2 blue!", "re", "b"]


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 2), max_size=9), count=st.integers(1, 4))
def test_no_sequence_of_that_many_tokens_comes_twice(ids, count):
    text = [START, *ids]
    prompts, rules = empty_prompts(1, START), Rules(no_repeat_ngram=count)
    table = torch.zeros(1, 1, 12, dtype=torch.int64)
    table[0, 0, : len(text)] = torch.tensor(text)
    texts = PartialTexts(table, torch.zeros(1, 1, 12), len(text), torch.ones(1, dtype=torch.int64))
    scores = Constraints(prompts, Words(), max_tokens=12, min_tokens=0, rules=rules)(torch.zeros(1, 1, VOCAB), texts)
    runs = [text[place : place + count] for place in range(len(text) - count + 1)]
    for token in range(3):
        newest = [*text[len(text) - count + 1 :], token]
        assert (scores.scores[0, 0, token] == -math.inf) == (newest in runs)


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


@settings(max_examples=40, deadline=None)
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
