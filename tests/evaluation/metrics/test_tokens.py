import json
import re
from pathlib import Path

import pytest

from contracap.evaluation.metrics.java import JavaError, UnavailableError, find_java
from contracap.evaluation.metrics.tokens import choose_tokenizer, has_word, python_tokens, tokenize

from ..programs import needs_java, stand_in, without_java

BOTH = [pytest.param("python"), pytest.param("java", marks=needs_java)]

EXAMPLES = {
    "A man can't eat the man's dog's food, cannot he?": "a man ca n't eat the man 's dog 's food can not he",
    "(with a hat) [x] {y}": "-lrb- with a hat -rrb- -lsb- x -rsb- -lcb- y -rcb-",
    "stop !!! now": "stop !!! now",
    "10 ft. from a U.S. flag, Mr. Smith": "10 ft. from a u.s. flag mr. smith",
    "a man in a white t.": "a man in a white t.",
    "on 10-29-2011 a slip 'n' slide at 4:30pm": "on 10-29-2011 a slip 'n' slide at 4:30 pm",
    "“two” ‘cats’ \"play\" ``here''": "two cats play here",  # noqa: RUF001
    "25 1/2 street": "25\u00a01/2 street",
    "$5 & 10% #1 @home": "$ 5 & 10 % # 1 @home",
    "the colour grey": "the colour grey",
    "red/brown table -- with AT&T sign...": "red/brown table with at&t sign",
    "it's O'Connor's 5 o'clock d'oeuvre y'all": "it 's o'connor 's 5 o'clock d'oeuvre y' all",
    "shot<|endoftext|>A man": "shot < | endoftext | > a man",
    "": "",
    " . ": "",
}


@pytest.mark.parametrize("tokenizer", BOTH)
def test_captions_become_the_tokens_of_the_penn_treebank(tokenizer) -> None:
    assert dict(zip(EXAMPLES, tokenize(list(EXAMPLES), tokenizer), strict=True)) == EXAMPLES


def test_python_tokenizer_agrees_with_java_on_the_gold_pairs(data_folder: Path) -> None:
    pairs = json.loads((data_folder / "caption_metrics" / "ptb_tokenizer_pairs.json").read_text())
    made = tokenize([caption for caption, _ in pairs], "python")
    differing = sum(ours != gold for ours, (_, gold) in zip(made, pairs, strict=True))
    assert differing / len(pairs) <= 0.001


@needs_java
def test_java_tokenizer_gives_the_gold_pairs_but_for_final_letters(data_folder: Path) -> None:
    pairs = json.loads((data_folder / "caption_metrics" / "ptb_tokenizer_pairs.json").read_text())
    made = tokenize([caption for caption, _ in pairs], "java")
    differing = [caption for ours, (caption, gold) in zip(made, pairs, strict=True) if ours != gold]
    # Whether the dot of a final "t." stays depends on the caption after it, which is another one here.
    assert all(re.search(r" \w\.$", caption) for caption in differing)
    assert len(differing) <= 10


@pytest.mark.parametrize("tokenizer", BOTH)
def test_odd_characters_and_line_ends_move_no_other_caption(tokenizer) -> None:
    ends = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"]
    captions = ["caf\u00e9 \u65e5\u672c \U0001f600", "half a pair \ud83d", "x" * 5000]
    captions += [f"a dog{end}runs" for end in ends] + ["", "\n", "the last"]
    made = tokenize(captions, tokenizer)
    assert made[0].startswith("caf\u00e9 \u65e5\u672c")
    assert made[2:] == ["x" * 5000, *["a dog runs"] * len(ends), "", "", "the last"]
    assert tokenize([], tokenizer) == []


@pytest.mark.parametrize("tokenizer", BOTH)
def test_what_has_a_word_has_a_token_in_both_tokenizers_and_emoji_have_none(tokenizer) -> None:
    words = [*"a7\u00e9\u65e5\u0436\u0e01\u0905\u00bd(", "<br>", "\U0001f600 dog", "dog!!!"]
    emoji = ["\U0001f600", "\U0001f385 \U0001f381!", "\U0001d41a"]
    assert all(has_word([word]) for word in words)
    made = tokenize(words + emoji, tokenizer)
    assert all(made[: len(words)]) and (tokenizer == "python" or not any(made[len(words) :]))
    for caption in ("\U0001f600", "\u2764\ufe0f", "\u2603 \U0001f385!", "\U0001d41a", "...", "", "&nbsp;", "* *"):
        assert not has_word([caption, caption])


def test_a_model_that_writes_nothing_but_dots_gets_its_tokens() -> None:
    """Where each dot looks for the @ of an address behind all others, this takes minutes."""
    assert python_tokens("." * 60_000) == ["..."] * 20_000
    assert python_tokens("write to jane.doe+dog@a-b.example.org.")[2:] == ["jane.doe+dog@a-b.example.org", "."]


def test_without_java_the_python_tokenizer_is_taken(monkeypatch) -> None:
    without_java(monkeypatch)
    assert choose_tokenizer() == "python"
    assert tokenize(["It's a dog."]) == ["it 's a dog"]
    with pytest.raises(UnavailableError, match=r"needs a Java runtime .*jre-headless\. Or .*--tokenizer python$"):
        tokenize(["a dog"], "java")


def test_without_the_jar_the_message_says_what_to_install(monkeypatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, tmp_path, "")
    monkeypatch.setattr("contracap.evaluation.metrics.java.find_spec", lambda name: None)
    assert choose_tokenizer() == "python"
    with pytest.raises(UnavailableError, match=r"pip install 'contracap\[coco\]'"):
        tokenize(["a dog"], "java")


def test_a_tokenizer_out_of_step_is_refused(monkeypatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, tmp_path, "print('a dog\\na cat\\nrest')", jar=tmp_path / "tokenizer.jar")
    with pytest.raises(JavaError, match="tokenizer returned 3 lines for 2 captions; refusing to pair them"):
        tokenize(["a dog", "a cat"], "java")


def test_a_failing_tokenizer_says_why(monkeypatch, tmp_path: Path) -> None:
    body = "sys.exit('Error: could not find or load main class\\nmore')"
    stand_in(monkeypatch, tmp_path, body, jar=tmp_path / "tokenizer.jar")
    with pytest.raises(JavaError, match=r"exit status 1.*could not find or load main class$"):
        tokenize(["a dog"], "java")


def test_java_is_looked_for_in_java_home_first(monkeypatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, tmp_path / "home", "")
    assert find_java() == tmp_path / "home" / "bin" / "java"
    stand_in(monkeypatch, tmp_path / "path", "")
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "missing"))
    assert find_java() == tmp_path / "path" / "bin" / "java"


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 1\n", "no program"])
def test_a_java_that_only_says_that_there_is_none_is_none(monkeypatch, tmp_path: Path, text: str) -> None:
    without_java(monkeypatch)
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text(text)
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert find_java() is None


ODD = [
    *("नमस्ते दुनिया, एक कुत्ता", "தமிழ் மொழி", "cafe\u0301 n\u0303ame"),
    *("5 o’clock", "the man’s dog can’t", "rock ’n’ roll of the ’90s", "y’all d’oeuvre O’Connor’s"),  # noqa: RUF001
    *("m² of 20km²", "x³ ½ ①②", "a\u200bb", "a\u200db \ufeffc", "soft\xadhyphen", "nul\x00char \x01 \x7f", "a ‒ b ― c"),  # noqa: RUF001
]


@needs_java
def test_both_tokenizers_agree_on_signs_beyond_english() -> None:
    assert tokenize(ODD, "python") == tokenize(ODD, "java")
