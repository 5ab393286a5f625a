# ruff: noqa: RUF001
import pickle
import random
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contracap.data.shards import read_samples
from contracap.tokenizer import SPECIAL_STRINGS, Tokenizer, join_marks, text_lengths

# What the cleaning and the pattern of words trip over: entities (also escaped twice and three times), mojibake, emoji,
# CJK, letters of special lower case or case folding, control characters, HTML, letters of new Unicode versions.
MESSY = [
    *SPECIAL_STRINGS, "<START_OF_TEXT>", "<ſtart_of_text>", "</w>", "<br/>", "<p>a dog</p>", "&lt;b&gt;",
    "&amp;", "&amp;lt;", "&amp;amp;amp;", "AT&T", "&", "&eacute;", "&EACUTE;", "&copy", "&#39;",
    "&#x1F600;", "&#0;", "&nbsp;", "schÃ¶n", "âœ” OK", "lâ€™Ã©tÃ©", "ÃƒÂ©", "“quoted”", "it’s", "'ſ",
    "I'LL", "we've'd", "İstanbul", "ΑΣ", "ﬁsh", "ﬅ", "K", "ｆｕｌｌ", "é", "e\u0301", "\u0345", "👩‍👩‍👧",
    "😀", "🇨🇭", "犬が走る", "狗", "ไทย", "हिन्दी", "العربية", "\u0558", "\U0003d000", "\U0001246f", "½",
    "²", "٣", "\x00", "\x07", "\x0b", "\x0c", "\x1c", "\x1b[31m", "\x7f", "\x85", "\u200b", "\u2028",
    "\ufeff", "\t", "\r\n", "  ", "!", "!!!", "wow!;", "...", "1234", "3.14", "snake_case", "a", "dog",
    "!!<end_of_text>", "\ufffd",
]  # fmt: skip


@pytest.fixture(scope="session")
def oracle(open_clip: ModuleType):
    return open_clip.get_tokenizer("coca_ViT-B-32")


def assert_equals_oracle(oracle, texts: list[str], ours: torch.Tensor) -> None:
    different = [text for text, row, ids in zip(texts, ours, oracle(texts), strict=True) if not torch.equal(row, ids)]
    assert not different, different[:5]


def test_ids_equal_open_clip_on_real_captions(oracle, data_folder: Path) -> None:
    captions = [
        text
        for sample in read_samples(str(data_folder / "flickr8k" / "val" / "000000.tar"))
        for text in sample.captions
    ]
    assert len(captions) == 5000
    assert_equals_oracle(oracle, captions, Tokenizer()(captions))


def test_ids_equal_open_clip_on_messy_captions(oracle) -> None:
    choose = random.Random(0)
    captions = [choose.choice(["", " "]).join(choose.choices(MESSY, k=choose.randint(1, 8))) for _ in range(1500)]
    captions += MESSY + [text.encode().decode("latin-1") for text in MESSY]  # mojibake of each
    assert_equals_oracle(oracle, captions, Tokenizer()(captions))


@settings(max_examples=150, deadline=None)
@given(text=st.lists(st.text() | st.sampled_from(MESSY), max_size=6).map("".join))
def test_ids_equal_open_clip_on_any_unicode(oracle, text: str) -> None:
    tokenizer = Tokenizer()
    assert tokenizer.encode(text) == oracle.encode(text)
    assert torch.equal(tokenizer(text), oracle(text))


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_decoding_equals_open_clip(oracle, text: str) -> None:
    ids = oracle.encode(text.replace("<", ""))  # no special strings, which only we leave out
    assert Tokenizer().decode(ids) == oracle.decode(ids).strip()


def test_every_single_token_decodes_as_in_open_clip(oracle) -> None:
    tokenizer = Tokenizer()
    assert all(tokenizer.decode([token]) == oracle.decode([token]).strip() for token in range(tokenizer.start))


def test_default_vocabulary_has_the_ids_of_clip() -> None:
    tokenizer = Tokenizer()
    assert (tokenizer.context, tokenizer.vocab_size, tokenizer.start, tokenizer.end) == (76, 49408, 49406, 49407)
    assert tokenizer("A photo of a cat!")[0, :9].tolist() == [49406, 320, 1125, 539, 320, 2368, 256, 49407, 0]
    assert tokenizer.encode("wow!;") == [2781, 0, 282]


def test_a_smaller_vocabulary_keeps_the_first_merges() -> None:
    whole, small, bytes_only = Tokenizer(), Tokenizer(context=8, vocab_size=1000), Tokenizer(vocab_size=514)
    assert (small.start, small.end) == (998, 999)
    assert small.encode("a red circle") != bytes_only.encode("a red circle")
    for text in ("a small red circle above a striped square !", "犬 é", "x"):
        assert small.decode(small.encode(text)) == bytes_only.decode(bytes_only.encode(text)) == text
        assert max(small.encode(text)) < small.start
    # a token of both has the same id in both
    assert all(small.decode([token]) == whole.decode([token]) for token in range(small.start))


@pytest.mark.parametrize("words", [73, 74, 75, 200])
def test_a_long_text_keeps_its_end_token(words: int) -> None:
    tokenizer = Tokenizer()
    row = tokenizer(" ".join(["dog"] * words))[0]
    length = min(words + 2, 76)
    assert row.shape == (76,)
    assert row[length - 1] == tokenizer.end
    assert (row[1 : length - 1] == tokenizer.encode("dog")[0]).all()
    assert (row[length:] == 0).all()


@pytest.mark.parametrize("bomb", ["&" + "amp;" * 400, "&" + "#xff06;" * 400, "\u00c3" + "\u0192" * 2000])
def test_the_time_of_a_text_grows_as_its_length(bomb: str) -> None:
    """Each is damaged as many times over as it has characters; a repair of all takes minutes."""
    tokenizer, begun = Tokenizer(), time.process_time()
    tokenizer(bomb * 500)
    tokenizer.encode(bomb * 8)
    assert time.process_time() - begun < 5


def test_blanks_before_a_text_do_not_count() -> None:
    assert torch.equal(Tokenizer()(" " * 100_000 + "a dog"), Tokenizer()("a dog"))


def test_a_list_gives_a_row_per_text() -> None:
    tokenizer = Tokenizer(context=6)
    rows = tokenizer(["a dog", "", "two very long dogs in a row"])
    assert rows.dtype == torch.int64
    assert rows.tolist() == [tokenizer(text)[0].tolist() for text in ("a dog", "", "two very long dogs in a row")]
    assert rows[1].tolist() == [tokenizer.start, tokenizer.end, 0, 0, 0, 0]
    assert tokenizer([]).shape == (0, 6)


def test_decoding_stops_at_the_end_token_and_skips_the_start() -> None:
    tokenizer = Tokenizer()
    assert tokenizer.decode(tokenizer("Two dogs,  running.")[0]) == "two dogs , running ."
    assert tokenizer.decode([tokenizer.end, 320]) == ""
    with pytest.raises(ValueError, match="token id 49408 is outside the vocabulary of 49408"):
        tokenizer.decode([49408])


def test_special_strings_in_a_text_are_the_special_ids_as_in_clip() -> None:
    tokenizer = Tokenizer(vocab_size=600)
    assert tokenizer.encode("<start_of_text>") == [tokenizer.start]
    assert tokenizer.encode("a<END_OF_TEXT>") == [*tokenizer.encode("a"), tokenizer.end]


def test_lengths_count_up_to_the_first_end_token() -> None:
    ids = torch.tensor([[8, 1, 9, 0], [8, 9, 9, 9], [8, 1, 2, 9], [8, 1, 2, 3], [9, 0, 0, 0]])
    assert text_lengths(ids, end=9).tolist() == [3, 2, 4, 4, 1]


def test_without_ftfy_ascii_gives_the_same_ids_and_other_text_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer()
    texts = ["A dog's  life\t(1/2)", "black &amp; white", "AT&T", "caf&eacute;", "a\r\nb\fc"]
    expected = tokenizer(texts)
    monkeypatch.setattr("contracap.tokenizer.ftfy", None)
    assert torch.equal(tokenizer(texts), expected)
    for text in ("café", "bell\x07"):
        with pytest.raises(ValueError, match="is not plain ASCII; install ftfy"):
            tokenizer(text)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"context": 1}, "context is 1"), ({"vocab_size": 513}, "514 to 49408")]
)
def test_impossible_sizes_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer(**arguments)


def test_a_tokenizer_survives_pickling() -> None:
    tokenizer = pickle.loads(pickle.dumps(Tokenizer(context=9, vocab_size=700)))
    assert (tokenizer.context, tokenizer.end) == (9, 699)
    assert tokenizer.decode(tokenizer("a dog")[0]) == "a dog"


def test_a_token_ends_its_word_where_a_space_may_follow() -> None:
    tokenizer = Tokenizer(vocab_size=1024)
    token_ids = tokenizer.encode("photographer at")
    assert len(token_ids) > 2
    texts = [tokenizer.decode(token_ids[: count + 1]) for count in range(len(token_ids))]
    ends = [text in ("photographer", "photographer at") for text in texts]
    assert [tokenizer.ends_word(token) for token in token_ids] == ends
    assert tokenizer.ends_word(tokenizer.start) and tokenizer.ends_word(tokenizer.end)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("a star , above it a circle .", "a star, above it a circle."),
        ("a man 's sign ( no . 2 4 ) : it isn 't red !", "a man's sign (no. 24): it isn't red!"),
        ("two dogs - one cat & 3 birds", "two dogs - one cat & 3 birds"),
        ("they 'll say ' hello ' 's", "they'll say ' hello ''s"),
        ("3 . 5 m at 1 0 : 3 0 , 1 / 2 of it", "3.5 m at 10:30, 1/2 of it"),
        ("", ""),
    ],
)
def test_a_text_has_no_blanks_where_people_write_none(raw: str, text: str) -> None:
    assert join_marks(raw) == text
