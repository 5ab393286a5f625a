import random
import re
from hashlib import sha256

import pytest

from contracap.evaluation.metrics.vqa_accuracy import CONTRACTIONS, accuracy, normalise_answer


def by_the_letter(prediction: str, answers: list[str]) -> float:
    """Section 9 of the definitions, step by step, and each person after the other."""

    def blanks(text: str) -> str:
        return text.replace("\n", " ").replace("\t", " ").strip()

    def punctuation(text: str) -> str:
        out = text
        for mark in ';/[]"{}()=+\\_-><@`,?!':
            beside_blank = (mark + " ") in text or (" " + mark) in text
            if beside_blank or re.search(r"\d,\d", text):
                out = "".join(letter for letter in out if letter != mark)
            else:
                out = "".join(" " if letter == mark else letter for letter in out)
        kept, deleted = [], 0
        for place, letter in enumerate(out):
            if letter == "." and deleted < 32 and not out[place + 1 : place + 2].isdecimal():
                deleted += 1
            else:
                kept.append(letter)
        return "".join(kept)

    def words(text: str) -> str:
        numbers = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
        numbers |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
        found = []
        for word in text.lower().split():
            word = numbers.get(word, word)
            if word not in ("a", "an", "the"):
                found.append(CONTRACTIONS.get(word, word))
        return " ".join(found)

    prediction, answers = blanks(prediction), [blanks(answer) for answer in answers]
    if any(answer != answers[0] for answer in answers):
        prediction, answers = words(punctuation(prediction)), [words(punctuation(answer)) for answer in answers]
    shares = []
    for i in range(len(answers)):
        others = [answer for j, answer in enumerate(answers) if j != i]
        shares.append(min(1, sum(other == prediction for other in others) / 3))
    return sum(shares) / len(shares)


@pytest.mark.parametrize(("equal", "worth"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)])
def test_equal_answers_of_ten_are_worth_what_the_challenge_says(equal: int, worth: float) -> None:
    assert accuracy("dog", ["dog"] * equal + ["cat"] * (10 - equal)) == pytest.approx(worth)


CASES = {  # as the official code gives them, step by step
    "Black.": "black",
    "the dog": "dog",
    "A": "",
    "None": "0",
    "TEN": "10",
    "twenty-one": "twenty 1",  # a mark between letters is a blank; the number behind it counts
    "yes, sir": "yes sir",  # a mark beside a blank is deleted
    "yes,sir": "yes sir",
    "black/white": "black white",
    "black/white , red": "black white red",
    "black - white/red": "black white red",
    "- 1-2": "12",  # wherever the mark stands, once it stands beside a blank
    "1,000": "1000",
    "1,000-2": "10002",  # digit, comma, digit: every mark is deleted
    "a-b 1,0": "ab 10",
    "٣,٤ a-b": "٣٤ ab",  # digits of any script are digits
    "٣.٣": "٣.٣",
    "3.5": "3.5",
    "3.": "3",
    ".5": ".5",
    "u.s.": "us",
    "5.a.5": "5a.5",
    "12:30": "12:30",
    "$5 & 10%": "$5 & 10%",
    "dont": "don't",
    "Don't": "don't",
    "Im": "im",  # of the table, but never met
    "Ive": "ive",
    "id've": "id've",
    "somebody'd": "somebodyd",
    "somebodyd've": "somebody'd've",
    "ow's'at": "'ow's'at",
    "yall'd've": "y'all'd've",
    "let's": "let's",
    "  the   a an  ": "",
    "what?!": "what",
    "(left)": "left",
    "back\\slash": "back slash",
    "a_b": "b",  # an article once the mark is a blank
    "snow-board": "snow board",
}


def test_answers_are_normalised_as_the_official_code_does() -> None:
    assert {answer: normalise_answer(answer) for answer in CASES} == CASES


def test_at_most_32_dots_are_deleted() -> None:
    assert normalise_answer("." * 32 + "x") == "x"
    assert normalise_answer("." * 40 + "x") == "." * 8 + "x"


def test_unanimous_answers_are_compared_as_they_stand() -> None:
    assert accuracy("Black.", ["black"] * 10) == 0
    assert accuracy("Black.", ["black"] * 10, strict=False) == 1
    assert accuracy("\tblack\n", [" black "] * 10) == 1
    assert accuracy("Black.", ["black"] * 9 + ["dark"]) == 1  # not unanimous
    assert accuracy("black", ["Black"] * 10) == 0
    assert accuracy("two", ["2"] * 5 + ["two"] * 5) == 1


def test_table_is_that_of_the_official_code() -> None:
    lines = "\n".join(f"{before} {after}" for before, after in sorted(CONTRACTIONS.items()))
    digest = "b847028bf993545e795d0f95864b82668b85d531cc6ee3525ae719909a2d1e54"  # of the table in vqaEval.py, a013f004
    assert sha256(lines.encode()).hexdigest() == digest


PIECES = ["dog", "Dog", "the", "a", "one", "None", "10", "1,000", "3.5", "dont", "somebody'd", "it's", " ", " "]
PIECES += ["-", "/"]
PIECES += [",", ".", "...", "!", "?", "(", ")", "_", "\\", "\t", "\n", ":", "$", "'", '"', "@", "`", "é", "٣", "٣,٤"]


@pytest.mark.parametrize("seed", range(5))
def test_accuracy_equals_the_rule_by_the_letter(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(100):
        few = ["".join(draw.choices(PIECES, k=draw.randint(0, 6))) for _ in range(draw.randint(1, 3))]
        few += ["".join(draw.choices(PIECES, k=2))]
        answers = draw.choices(few, k=10)
        for prediction in {*few, answers[0].upper(), f" {answers[1]}."}:
            assert accuracy(prediction, answers) == pytest.approx(by_the_letter(prediction, answers), abs=1e-12)


def test_a_single_answer_has_to_be_met_and_few_can_make_1() -> None:
    assert (accuracy("red", ["red"]), accuracy("red", ["blue"])) == (1, 0)
    assert accuracy("red", ["red", "red"]) == accuracy("red", ["red"] * 3) == accuracy("red", ["red"] * 4) == 1
    assert accuracy("red", ["red", "blue"]) == 0.5  # the one who said so has nobody to agree with
    with pytest.raises(ValueError, match="no answer to compare with"):
        accuracy("red", [])
