import json
import re
import subprocess
from pathlib import Path

import pytest

from contracap.evaluation import tokens
from contracap.evaluation.tokens import TokenizationError, find_jar, find_java, tokenize

needs_java = pytest.mark.skipif(not (find_java() and find_jar()), reason="needs Java and pycocoevalcap: make setup")
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
def test_line_ends_inside_a_caption_move_no_other_caption(tokenizer) -> None:
    ends = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"]
    captions = [f"a dog{end}runs" for end in ends] + ["", "\n", "the last"]
    assert tokenize(captions, tokenizer) == ["a dog runs"] * len(ends) + ["", "", "the last"]


@pytest.mark.parametrize("tokenizer", BOTH)
def test_odd_characters_are_no_obstacle(tokenizer) -> None:
    made = tokenize(["caf\u00e9 \u65e5\u672c \U0001f600", "half a pair \ud83d", "x" * 5000, "the last"], tokenizer)
    assert made[0].startswith("caf\u00e9 \u65e5\u672c")
    assert made[2:] == ["x" * 5000, "the last"]


@pytest.mark.parametrize("tokenizer", BOTH)
def test_no_captions_give_no_tokens(tokenizer) -> None:
    assert tokenize([], tokenizer) == []


def test_without_java_the_python_tokenizer_is_taken(monkeypatch) -> None:
    monkeypatch.setattr(tokens, "find_java", lambda: None)
    assert tokens.available_tokenizer() == "python"
    assert tokenize(["It's a dog."]) == ["it 's a dog"]
    with pytest.raises(TokenizationError, match=r"needs a Java runtime .* apt install default-jre-headless"):
        tokenize(["a dog"], "java")


def test_without_the_jar_the_message_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(tokens, "find_java", lambda: Path("/usr/bin/java"))
    monkeypatch.setattr(tokens, "find_jar", lambda: None)
    with pytest.raises(TokenizationError, match=r"pip install 'contracap\[coco\]'"):
        tokenize(["a dog"], "java")


def answer(monkeypatch, returncode: int, stdout: bytes, stderr: bytes) -> None:
    """Lets the Java process answer this."""
    monkeypatch.setattr(tokens, "find_java", lambda: Path("java"))
    monkeypatch.setattr(tokens, "find_jar", lambda: Path("tokenizer.jar"))
    done = subprocess.CompletedProcess([], returncode, stdout, stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)


def test_a_tokenizer_out_of_step_is_refused(monkeypatch) -> None:
    answer(monkeypatch, 0, b"a dog\na cat\nrest\n", b"")
    with pytest.raises(TokenizationError, match="tokenizer returned 3 lines for 2 captions; refusing to pair them"):
        tokenize(["a dog", "a cat"], "java")


def test_a_failing_tokenizer_says_why(monkeypatch) -> None:
    answer(monkeypatch, 1, b"", b"Error: could not find or load main class\nmore\n")
    with pytest.raises(TokenizationError, match=r"exit status 1.*could not find or load main class$"):
        tokenize(["a dog"], "java")


def test_java_is_looked_for_in_java_home_first(monkeypatch, tmp_path: Path) -> None:
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.touch(mode=0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert find_java() == java
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "missing"))
    monkeypatch.setenv("PATH", "")
    assert find_java() is None
