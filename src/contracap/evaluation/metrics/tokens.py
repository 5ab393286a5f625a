"""Captions to Penn Treebank tokens, as the caption metrics of COCO use them.

There are two tokenizers: the Java `PTBTokenizer` of published figures, run from the jar of `pycocoevalcap`, and one in
Python for machines without Java. Both return lower case, tokens joined by one blank, without punctuation. They agree on
all but about one in 20,000 captions of COCO train2014, which was not used in writing the second. Hyphens outside Latin
scripts and rare signs differ. A result says which tokenizer was used, because scores may differ a little.

Source: coco-caption (tylin/coco-caption, commit 3a9afb26), the list of dropped tokens; Stanford CoreNLP 3.4.1.
"""

import re
import subprocess
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from contracap.evaluation.metrics.java import LOCALE, JavaError, failure, find_jar, find_java, java_and_jar, java_errors

TokenizerName = Literal["java", "python"]

JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
DROPPED = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)


def one_line(caption: str) -> str:
    """Return the caption on one line: a second line would move every later caption to the wrong image."""
    return " ".join(caption.splitlines())


def choose_tokenizer(wanted: TokenizerName | None = None) -> TokenizerName:
    """Return the wanted tokenizer, by default Java's if it can run.

    Raises:
        UnavailableError: if Java's is wanted and cannot.
    """
    if wanted == "java":
        java_tokenizer()
    return wanted or ("java" if find_java() and find_jar(JAR) else "python")


def tokenize(captions: Sequence[str], tokenizer: TokenizerName | None = None) -> list[str]:
    """Return the captions as tokens joined by one blank, in the same order.

    A token may hold a no-break space ("25 1/2" is one token); an empty caption stays empty.

    Raises:
        UnavailableError: if Java is asked for and missing.
        JavaError: if it cannot be run, fails, or returns another number of lines.
    """
    name = choose_tokenizer(tokenizer)
    lines = [one_line(caption) for caption in captions]
    if name == "java":
        tokens = [line.rstrip().split(" ") for line in java_lines(lines)]
    else:
        tokens = [python_tokens(line) for line in lines]
    return [" ".join(token for token in line if token not in DROPPED) for line in tokens]


def has_word(captions: Iterable[str]) -> bool:
    """Return True if the Python tokenizer finds a token with a letter or a digit in any of these captions.

    The Java tokenizer deletes emoji, everything above U+FFFF, and letters younger than itself. The last are few, and
    count here.
    """
    tokens = (token for caption in captions for token in python_tokens(one_line(caption)))
    return any(character.isalnum() and character <= "\uffff" for token in tokens for character in token)


def java_tokenizer() -> tuple[Path, Path]:
    """Return Java and the jar of its tokenizer.

    Raises:
        UnavailableError: if one of them is missing.
    """
    return java_and_jar(JAR, what="the Java tokenizer", instead="Or take the other one: --tokenizer python")


def java_lines(lines: Sequence[str], *, timeout: float = 600.0) -> list[str]:
    """Return the tokens of each line by Java's PTBTokenizer, in one process without files.

    Args:
        lines: texts without line ends.
        timeout: seconds until the process is given up (200,000 captions take about two).
    """
    java, jar = java_tokenizer()
    if not lines:
        return []
    command = [str(java), *LOCALE, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-encoding", "UTF-8", "-preserveLines", "-lowerCase"]
    text = "".join(line + "\n" for line in lines).encode("utf-8", errors="replace")
    try:
        with java_errors("the Java tokenizer"):
            done = subprocess.run(command, input=text, capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise JavaError(f"the Java tokenizer gave no answer within {timeout:g} seconds") from None
    if done.returncode != 0:
        raise failure("the Java tokenizer", done.returncode, done.stderr)
    answer = done.stdout.decode("utf-8").split("\n")
    if answer[-1] == "":
        answer.pop()
    if len(answer) != len(lines):
        raise JavaError(f"tokenizer returned {len(answer)} lines for {len(lines)} captions; refusing to pair them")
    return answer


# Measured on the Java tokenizer: after these the dot is part of the token, wherever they stand ...
ABBREVIATIONS = """
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri
    mr mrs ms messrs dr drs prof st ste mt ave blvd rd rt ct sq ft bldg mme mlle msgr
    gen sgt capt lt col cpl pfc pvt maj adm cmdr comdr gov govs rep reps sen sens pres supt rev hon sr jr esq
    co cos inc corp ltd bros assn dept univ mfg plc bhd intl natl asst atty insp det
    ala ariz calif colo conn fla ga ind kan kans ky md mich minn mo mont neb nev okla penn tenn va vt wis wisc wyo
    etc al seq vs cf ph est tel ext
"""
# ... after these only when they begin with a capital (otherwise they are words) ...
CAPITALISED_ABBREVIATIONS = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
# ... and after these before a number.
NUMBER_ABBREVIATIONS = "no nos op fig figs pp art"
# A dot after a single letter ends the sentence if one of these follows. (Java looks beyond the end of the line for it:
# what it makes of a caption that ends in "t." depends on the next caption. The Python tokenizer does not.)
SENTENCE_STARTS = """
    A After An As At But He Her Here I If In It Many One Our She So Some That The Their Then There These They This
    We What When While You
"""

# Words that keep their apostrophe, and words written as one that are two tokens (the split is at the blank).
APOSTROPHE_WORDS = "'n' 'n 'em 'til 'till 'cause ol' dunkin' somethin' ma'am c'mon e'er ne'er o'er ev'ry nat'l"
JOINED_WORDS = "can|not gon|na got|ta wan|na gim|me lem|me 't|is 't|was more|'n"

REPLACED = {
    "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'", "&nbsp;": "",
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "½": "1/2", "¼": "1/4", "¾": "3/4", "£": "#", "€": "$", "¢": "cents", "…": "...",
    **dict.fromkeys('"“”„«»', "''"), **dict.fromkeys("‘’‚‹›", "'"), **dict.fromkeys("‒–—―", "--"),  # noqa: RUF001
}  # fmt: skip


def either(words: str) -> str:
    """Return a pattern of the words, in any case, longer ones first."""
    choices = sorted((re.escape(word) for word in words.split()), key=len, reverse=True)
    return "(?i:" + "|".join(choices) + ")"


def split_pattern(pair: str) -> str:
    first, second = pair.split("|")
    return rf"(?i:{first}(?={second}\b))"


def characters(*categories: str) -> str:
    """Return the characters of these Unicode categories, for a character class of a pattern."""
    found = (chr(code) for code in range(0x80, 0x10000))
    return "".join(character for character in found if unicodedata.category(character) in categories)


MARKS = characters("Mn", "Mc")  # vowel signs of Devanagari, for one: parts of words, though not for `\w`
NUMBERS = characters("No")  # such as ²: tokens of their own, though part of words for `\w`
SEPARATORS = {ord(character): " " for character in characters("Cc", "Cf") + "\x7f"} | {
    code: " " for code in range(0x20) if not chr(code).isspace()
}
SEPARATORS[0xAD] = ""  # a soft hyphen

LETTERS = rf"[^\W\d_{NUMBERS}]"
WORD = rf"(?:[^\W_{NUMBERS}]|[{MARKS}])+(?:_[^\W_{NUMBERS}]+)*"
NEGATION = rf"(?i:n't)(?!{LETTERS})"
CLITIC = re.compile(r"(?i:n't|'(?:s|m|d|re|ve|ll)|''|')")
FACE = re.compile(r"[<>]?[:;=][-']?(?:[()]|[DPp](?!\w))|\^_\^")
TOKEN = re.compile(
    "|".join(
        [
            rf"(?!{either(JOINED_WORDS.replace('|', ''))}\b)[A-Za-z]++(?=[\s,]|$)",  # a plain word: first, for speed
            r"</?[A-Za-z!?][^<>]*>",  # markup
            r"&(?:amp|lt|gt|quot|apos|nbsp);",
            r"(?i:https?)://[^\s\"<>|()]*[^\s\"<>|().,;:!?-]",
            r"[\w.+-]{0,64}\w@[\w-]+(?:\.[\w-]+)*\w",  # electronic mail; without a bound, many dots take minutes
            r"@[A-Za-z_]\w*|#[A-Za-z][A-Za-z0-9]*",
            FACE.pattern,
            r"(?:\d+[ -])?\d+/\d+(?![\w/-])",  # 25 1/2
            r"(?:(?<!\w)[-+])?\d+(?:[.,:]\d+)+",  # 1,000 or 4:30 or 11.01.2009
            r"[-+]?\.\d+",
            r"(?<![\w-])[-+]\d+(?!\w)",
            r"(?<!\w)'\d\ds?(?![\w'])",  # '70s
            rf"(?<!\w){either(APOSTROPHE_WORDS)}(?!\w)",
            *(rf"(?<!\w){split_pattern(pair)}" for pair in JOINED_WORDS.split()),
            rf"{LETTERS}+?(?={NEGATION})",  # do in don't
            NEGATION,
            r"(?i:'(?:s|m|d|re|ve|ll))(?!\w)",
            rf"(?i:(?<!\w)y'(?={LETTERS}))",  # y' all
            rf"(?i:[dol]'){LETTERS}{{2,}}",  # o'clock, d'oeuvre
            rf"(?i:{LETTERS}+[aeiouy]'[aeiou]{LETTERS}*)",
            r"(?i:ph\.d\.)(?!\w)",
            rf"{LETTERS}(?:\.{LETTERS})+\.(?!\w)(?:-{WORD})*",  # U.S., U.S.-made
            rf"{LETTERS}[^\W_]*(?:\.{LETTERS}[^\W_]*)+(?:-{WORD})*",  # statefarm.com, road.A
            rf"(?:{either(ABBREVIATIONS)}|{'|'.join(CAPITALISED_ABBREVIATIONS.split())})\.",
            rf"{either(NUMBER_ABBREVIATIONS)}\.(?=\s*\d)",
            rf"{LETTERS}\.(?!\s+(?:{'|'.join(SENTENCE_STARTS.split())})\s)",
            rf"{WORD}(?:-{WORD})*\.(?=[,;:])",
            r"[A-Z]+&[A-Z]+",
            r"(?:US|HK|NZ|[AC])\$",
            rf"{WORD}(?:[-/]{WORD})*",
            r"\.{3}|-{2,}|[!?]{2,}|\*{2,}|\#{2,}|_{2,}|<<|>>|''|``",
            r"\S",
        ]
    )
)


def python_tokens(line: str) -> list[str]:
    """Return the tokens of one line in lower case, with punctuation."""
    tokens, line = [], line.translate(SEPARATORS)
    for match in TOKEN.finditer(line.replace("\u2019", "'")):
        token = match.group()
        if len(token) > 1 and "'" in token and not CLITIC.fullmatch(token):
            token = line[match.start() : match.end()]  # in other words the mark stays as it is
        if len(token) > 1 and token.startswith("--"):
            token = "--"
        elif FACE.fullmatch(token):
            token = token.replace("(", "-lrb-").replace(")", "-rrb-")
        token = REPLACED.get(token, token)
        if token:
            tokens.append(token.replace(" ", "\u00a0").lower())
    return tokens
