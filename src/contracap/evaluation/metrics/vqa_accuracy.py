"""Accuracy of an answer among those that people gave, by the rules of the VQA challenge.

Source: GT-Vision-Lab/VQA, commit a013f004, PythonEvaluationTools/vqaEvaluation/vqaEval.py. Its slips are kept, because
published figures have them.
"""

import re
from collections.abc import Sequence

MARKS = ';/[]"{}()=+\\_-><@`,?!'  # apostrophe, colon, $, % and & stay
COMMA_IN_NUMBER = re.compile(r"\d,\d")  # digits of any script
DOT = re.compile(r"\.(?!\d)")
MAX_DOTS = 32  # dots that are deleted: meant as a flag, but read as a count
ARTICLES = ("a", "an", "the")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(DIGITS)}
_CONTRACTED = """
    aint ain't, arent aren't, cant can't, couldve could've, couldnt couldn't, couldn'tve couldn't've,
    couldnt've couldn't've, didnt didn't, doesnt doesn't, dont don't, hadnt hadn't, hadnt've hadn't've,
    hadn'tve hadn't've, hasnt hasn't, havent haven't, hed he'd, hed've he'd've, he'dve he'd've, hes he's, howd how'd,
    howll how'll, hows how's, Id've I'd've, I'dve I'd've, Im I'm, Ive I've, isnt isn't, itd it'd, itd've it'd've,
    it'dve it'd've, itll it'll, let's let's, maam ma'am, mightnt mightn't, mightnt've mightn't've,
    mightn'tve mightn't've, mightve might've, mustnt mustn't, mustve must've, neednt needn't, notve not've,
    oclock o'clock, oughtnt oughtn't, ow's'at 'ow's'at, 'ows'at 'ow's'at, 'ow'sat 'ow's'at, shant shan't,
    shed've she'd've, she'dve she'd've, she's she's, shouldve should've, shouldnt shouldn't,
    shouldnt've shouldn't've, shouldn'tve shouldn't've, somebody'd somebodyd, somebodyd've somebody'd've,
    somebody'dve somebody'd've, somebodyll somebody'll, somebodys somebody's, someoned someone'd,
    someoned've someone'd've, someone'dve someone'd've, someonell someone'll, someones someone's,
    somethingd something'd, somethingd've something'd've, something'dve something'd've, somethingll something'll,
    thats that's, thered there'd, thered've there'd've, there'dve there'd've, therere there're, theres there's,
    theyd they'd, theyd've they'd've, they'dve they'd've, theyll they'll, theyre they're, theyve they've, twas 'twas,
    wasnt wasn't, wed've we'd've, we'dve we'd've, weve we've, werent weren't, whatll what'll, whatre what're,
    whats what's, whatve what've, whens when's, whered where'd, wheres where's, whereve where've, whod who'd,
    whod've who'd've, who'dve who'd've, wholl who'll, whos who's, whove who've, whyll why'll, whyre why're,
    whys why's, wont won't, wouldve would've, wouldnt wouldn't, wouldnt've wouldn't've, wouldn'tve wouldn't've,
    yall y'all, yall'll y'all'll, y'allll y'all'll, yall'd've y'all'd've, y'alld've y'all'd've, y'all'dve y'all'd've,
    youd you'd, youd've you'd've, you'dve you'd've, youll you'll, youre you're, youve you've
"""
CONTRACTIONS = {  # those with a capital letter are never met: texts are lower-case by then
    before: after for before, after in (pair.split() for pair in _CONTRACTED.split(","))
}


def accuracy(prediction: str, answers: Sequence[str], *, strict: bool = True) -> float:
    """Return the accuracy of an answer, from 0 to 1.

    Each person is left out in turn: the answer scores a third for each of the others who gave it, at most 1, and the
    scores are averaged. Of ten people, 0, 1, 2, 3 or 4 with this answer give 0, 0.3, 0.6, 0.9 or 1. With fewer than
    four people, all the others must have given it for a 1.

    Args:
        answers: the answers of several people to one question.
        strict: if all people agree, compare answers without normalising them, as the challenge does: `Black.` is wrong
            if all said `black`. Otherwise all are normalised.

    Raises: ValueError: if there is no answer.
    """
    if not answers:
        raise ValueError("there is no answer to compare with")
    prediction, given = _one_line(prediction), [_one_line(answer) for answer in answers]
    if len(set(given)) > 1 or not strict:
        prediction, given = normalise_answer(prediction), [normalise_answer(answer) for answer in given]
    people, equal = len(given), given.count(prediction)
    if people == 1:
        return float(equal)
    enough = min(3, people - 1)
    said_so, said_other = min(1.0, (equal - 1) / enough), min(1.0, equal / enough)
    return (equal * said_so + (people - equal) * said_other) / people


def normalise_answer(answer: str) -> str:
    """Return the answer in lower case, without punctuation and articles, with digits for numbers up to ten and
    apostrophes in contractions.

    A mark is deleted if the answer has it next to a blank anywhere, or has a comma between digits. Otherwise it becomes
    a blank.
    """
    text, has_number = answer, COMMA_IN_NUMBER.search(answer) is not None
    for mark in MARKS:
        text = text.replace(mark, "" if has_number or f"{mark} " in answer or f" {mark}" in answer else " ")
    words = DOT.sub("", text, count=MAX_DOTS).lower().split()
    words = [word for word in (NUMBERS.get(word, word) for word in words) if word not in ARTICLES]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
