"""Text to token ids and back: CLIP's byte-pair encoding, its cleaning of texts and its special ids."""

import gzip
import html
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.resources import files
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from tokenizers import Regex
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as Steps
from torch import Tensor

MAX_REPAIRS = 32  # of a line: an ordinary one takes six, of which the last ones change nothing

try:
    import ftfy
except ImportError:
    ftfy = None
else:
    # Bytes that go on a character of UTF-8, in any encoding that ftfy knows. Of mojibake at most three follow each
    # other; of a longer run ftfy takes one a pass.
    _GOING_ON = {
        letter
        for encoding in ftfy.chardata.CHARMAP_ENCODINGS
        for letter in bytes(range(0x80, 0xC0)).decode(encoding, errors="ignore")
    }
    _BOMB = re.compile(f"[{re.escape(''.join(sorted(_GOING_ON)))}]{{64}}")

    class _FewRepairs(ftfy.TextFixerConfig):
        """Settings of ftfy for one line. Some repairs undo one level of damage a pass, of which a text such as
        &amp;amp;amp; ... has as many as it has characters: after MAX_REPAIRS they are off."""

        left = MAX_REPAIRS

        def __getattribute__(self, name: str) -> Any:
            if name in ("unescape_html", "decode_inconsistent_utf8"):
                self.left -= 1
                if self.left < 0:
                    return False
            return super().__getattribute__(name)


FILL = 0  # what follows the end token in a row; inside a text the same id is the token "!"
CLIP_VOCAB_SIZE = 49408
BYTE_SYMBOLS = 512  # each byte inside a word, and each byte that ends one
END_OF_WORD = "</w>"
SPECIAL_STRINGS = ("<start_of_text>", "<end_of_text>")

# Visible ASCII and white space: ftfy changes no such text unless it holds an HTML entity.
_PLAIN = re.compile(r"[\t\n\f\r -~]*")

_LINE = re.compile(r"[^\n]{0,4096}\n|[^\n]{1,4096}")  # or a piece of a long one, as ftfy's time grows with the square

# Letters and numbers of the newest Unicode versions, first and last of each range: the tables inside the tokenizers
# library do not hold them yet, those of the regex library (2026.11), on which CLIP's own pattern runs, do.
_NEW_LETTERS = (
    "558-558 58b-58c 88f-88f c5c-c5c cdc-cdc 208f-208f 209d-209f a7ce-a7cf a7d2-a7d2 a7d4-a7d4 a7dd-a7dd a7e2-a7e2 "
    "a7f1-a7f1 ab6c-ab6d 107bb-107bf 10940-10959 10ec5-10ec7 10ed9-10eee 11b0a-11b0a 11db0-11ddb 11df1-11df1 "
    "16ea0-16eb8 16ebb-16ed3 16ff2-16ff3 187f8-187ff 18cd6-18cda 18d09-18d20 18d80-18df2 18e00-19191 191a0-191d2 "
    "1b123-1b128 1b168-1b168 1d6a6-1d6a6 1df1f-1df24 1df2b-1df81 1df90-1df96 1dfcd-1dfff 1e6c0-1e6de 1e6e0-1e6e2 "
    "1e6e4-1e6e5 1e6e7-1e6ed 1e6f0-1e6f4 1e6fe-1e6ff 2b73a-2b73f 2b81e-2b81e 2cea2-2cead 323b0-33479 3d000-3fc3f"
)
_NEW_NUMBERS = "11de0-11de9 1246f-1246f 12475-1247f 12550-12686 16ff4-16ff6"

# CLIP's words, in cleaned texts of ASCII alone: the same as the tokenizers library finds with `_pattern`, sooner.
_ASCII_WORD = re.compile(r"<start_of_text>|<end_of_text>|'(?:s|t|re|ve|m|ll|d)|[a-z]+|[0-9]|[^\sa-z0-9]+")
MAX_CHARACTERS = 2**16  # of a text that `encode` looks at
MAX_ROW_CHARACTERS = 4096  # that are looked at to fill a row, or with a long context so many for each of its tokens:
MAX_TOKEN_CHARACTERS = 64
MOST_WORDS, LONGEST_WORD = 2**16, 64  # whose ids are remembered: some tens of megabytes at most


class Tokenizer:
    """CLIP's tokenizer: equal to open_clip 3.3.0's for the default `vocab_size`.

    A smaller `vocab_size` keeps the first merges only, which is a valid, smaller byte-pair encoding: 512 byte symbols,
    `vocab_size - 514` merges, the start and the end token. The strings "<start_of_text>" and "<end_of_text>" inside a
    text give the special ids themselves, as they do in CLIP.

    Source: Radford et al. 2021 (arXiv 2103.00020), section 2.4; merges and pattern from https://github.com/openai/CLIP.
    """

    def __init__(self, context: int = 76, vocab_size: int = CLIP_VOCAB_SIZE) -> None:
        """`context`: ids in a row, start and end included.

        Raises: ValueError: if the context has no room for start and end, or the vocabulary is not 514 to 49408 large.
        """
        if context < 2:
            raise ValueError(f"tokenizer context is {context}; it must be at least 2, for the start and the end token")
        if not BYTE_SYMBOLS + 2 <= vocab_size <= CLIP_VOCAB_SIZE:
            raise ValueError(
                f"tokenizer vocab_size is {vocab_size}; it must be {BYTE_SYMBOLS + 2} to {CLIP_VOCAB_SIZE}"
            )
        self.context = context
        self.vocab_size = vocab_size
        self.start = vocab_size - 2
        self.end = vocab_size - 1
        self._words, self._bytes = _vocabulary(vocab_size)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[int, int]]:
        return Tokenizer, (self.context, self.vocab_size)

    def __call__(self, texts: str | Sequence[str]) -> Int64[Tensor, "batch context"]:
        """Rows of start, text, end, then zeros; of a longer text the first `context - 2` ids are kept.

        Raises: TypeError: if a text is not a string. ValueError: if it needs ftfy and ftfy is not installed.
        """
        texts = [texts] if isinstance(texts, str) else texts
        room = self.context - 2
        most = max(MAX_ROW_CHARACTERS, MAX_TOKEN_CHARACTERS * self.context)
        rows = [self._words.ids(clean(text, most))[:room] for text in texts]
        counts = np.array([len(row) for row in rows], dtype=np.int64)
        table = np.full((len(rows), self.context), FILL, dtype=np.int64)
        table[:, 0] = self.start
        inside = np.arange(room) < counts[:, None]
        table[:, 1:-1][inside] = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(counts.sum()))
        table[np.arange(len(rows)), counts + 1] = self.end
        return torch.from_numpy(table)

    @property
    def pieces(self) -> Sequence[bytes]:
        """The bytes of each id below the start token; `END_OF_WORD` closes those that end a word."""
        return self._bytes

    def encode(self, text: str) -> list[int]:
        """Ids of the whole text, without start and end; of a text with more than MAX_CHARACTERS, of so many."""
        return self._words.ids(clean(text, MAX_CHARACTERS))

    def decode(self, ids: Iterable[int] | Int64[Tensor, " tokens"]) -> str:
        """Text of `ids` up to the first end token, without the start token; bytes that are not UTF-8 become U+FFFD.

        Raises: ValueError: if an id is outside the vocabulary.
        """
        pieces = []
        for token in map(int, ids):
            if token == self.end:
                break
            if token == self.start:
                continue
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
            pieces.append(self._bytes[token])
        return b"".join(pieces).decode("utf-8", errors="replace").replace(END_OF_WORD, " ").strip()

    def ends_word(self, token: int) -> bool:
        """Whether a text goes on with a new word after this token."""
        return token >= self.start or self._bytes[token].endswith(END_OF_WORD.encode())


_LOOSE = re.compile(
    r"""(?x)
    \ + (?= [.,!?;:)\]}%] | '(?:s|t|m|d|re|ve|ll)\b )  # what follows a word directly
    | (?<= [(\[{] ) \ +                               # what stands before one
    | (?<= \b\d ) \ (?= \d\b )                        # each digit is a token
    | (?<= \d\ [.:/] ) \ (?= \d ) | (?<= \d ) \ (?= /\ \d )  # 3.5, 10:30, 1/2
    """
)


def join_marks(text: str) -> str:
    """A decoded text as people write it: without blanks before punctuation and endings, and between digits.

    `a man 's sign ( no . 2 4 ) , red` becomes `a man's sign (no. 24), red`.
    """
    return _LOOSE.sub("", text)


class _Words:
    """Ids of cleaned texts, word by word. Most words come again and again, so what each gives is remembered."""

    def __init__(self, model: BPE, specials: dict[str, list[int]]) -> None:
        """`specials`: words that have ids of their own."""
        self._model, self._specials = model, specials
        self._split = Steps(
            [Split(Regex(_pattern()), "removed", invert=True), ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        self._known = dict(specials)

    def ids(self, text: str) -> list[int]:
        """Those of a whole text."""
        if text.isascii():
            words = _ASCII_WORD.findall(text)
        else:
            words = [word for word, _ in self._split.pre_tokenize_str(text)]
        ids: list[int] = []
        for word in words:
            known = self._known.get(word)
            ids += self._learn(word) if known is None else known
        return ids

    def _learn(self, word: str) -> list[int]:
        if len(self._known) >= MOST_WORDS:
            self._known = dict(self._specials)
        ids = [token.id for token in self._model.tokenize(word)]
        if len(word) <= LONGEST_WORD:
            self._known[word] = ids
        return ids


Lengths = Int64[np.ndarray, " batch"]
"""Tokens of each text, start and end included: on the CPU, so that no shape that is made of them waits for a device."""


def text_lengths(ids: Int64[Tensor, "batch context"], end: int) -> Lengths:
    """Tokens of each row up to and including its first `end` token; the row's whole length where it has none."""
    is_end = ids.cpu().numpy() == end
    return np.where(is_end.any(axis=1), is_end.argmax(axis=1) + 1, ids.shape[1])


def clean(text: str, most: int | None = None) -> str:
    """Repair mojibake, resolve HTML entities twice, collapse white space, lower the case: what CLIP saw in training.

    Args:
        most: characters of the text that are cleaned; what follows them is dropped.

    Raises: TypeError: if `text` is not a string. ValueError: if the text is not plain ASCII and ftfy is not installed.
    """
    if not isinstance(text, str):
        raise TypeError(f"a text must be a string, not {type(text).__name__}: {text!r:.60}")
    if most is not None and len(text) > most:
        text = text.lstrip()[:most]
    plain = _PLAIN.fullmatch(text) is not None
    if ftfy is None and not plain:
        raise ValueError(f"text {text!r:.60} is not plain ASCII; install ftfy, which repairs such texts as CLIP does")
    if ftfy is not None and not (plain and "&" not in text):
        text = _repair(text)
    text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


def _repair(text: str) -> str:
    """What `ftfy.fix_text` makes of it, in a time that grows as its length."""
    assert ftfy is not None
    lines, unescape = [], "auto"
    for line in _LINE.findall(text):
        if "<" in line:
            unescape = False  # here and in what follows, as ftfy does
        sound = _BOMB.search(html.unescape(html.unescape(line))) is None
        lines.append(ftfy.fix_text(line, _FewRepairs(unescape_html=unescape, fix_encoding=sound, explain=False)))
    return "".join(lines)


@lru_cache(maxsize=4)
def _vocabulary(vocab_size: int) -> tuple[_Words, list[bytes]]:
    """The encoding by the first merges, and the bytes of each id below the start token."""
    symbols = _byte_symbols()
    packed = files("contracap").joinpath("vocabulary", "clip_merges.txt.gz")
    with packed.open("rb") as file, gzip.open(file, "rt", encoding="utf-8") as lines:
        first = 1  # line 0 names the version
        kept = islice(lines, first, first + vocab_size - BYTE_SYMBOLS - 2)
        merges = [(left, right) for left, right in (line.split() for line in kept)]
    # CLIP numbers its byte symbols in the order of the characters that stand for them
    words = sorted(symbols.values())
    words = [*words, *(word + END_OF_WORD for word in words), *(left + right for left, right in merges)]
    model = BPE(
        vocab={word: number for number, word in enumerate(words)}, merges=merges, end_of_word_suffix=END_OF_WORD
    )
    specials = {special: [vocab_size - 2 + place] for place, special in enumerate(SPECIAL_STRINGS)}
    byte_of = {symbol: byte for byte, symbol in symbols.items()}
    return _Words(model, specials), [bytes(byte_of[character] for character in word) for word in words]


def _byte_symbols() -> dict[int, str]:
    """A visible character for each byte: itself where it is one in Latin-1, else one from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


def _pattern() -> str:
    """CLIP's pattern of words. It ignores case: in lower-case texts U+017F then counts as an s, U+0345 as no word."""

    def ranges(text: str) -> str:
        return "".join("-".join(chr(int(bound, 16)) for bound in pair.split("-")) for pair in text.split())

    letter, number = rf"\p{{L}}{ranges(_NEW_LETTERS)}", rf"\p{{N}}{ranges(_NEW_NUMBERS)}"
    specials = r"<[s\u017f]tart_of_text>|<end_of_text>"
    return rf"{specials}|'[s\u017f]|'t|'re|'ve|'m|'ll|'d|[{letter}]+|[{number}]|[^\s{letter}{number}\u0345]+"
