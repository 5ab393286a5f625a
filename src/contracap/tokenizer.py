"""Text to token ids and back: CLIP's byte-pair encoding, cleaning of texts and special ids."""

import gzip
import html
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.resources import files
from itertools import chain, islice
from typing import Any

import numpy as np
import regex
import torch
from jaxtyping import Int64
from tokenizers.models import BPE
from torch import Tensor

MAX_REPAIRS = 32  # of a line: an ordinary one takes six, of which the last ones change nothing

try:
    import ftfy
except ImportError:
    ftfy = None
else:
    # Bytes that continue a character of UTF-8, in any encoding that ftfy knows. In mojibake at most three follow each
    # other; of a longer run ftfy repairs one in each pass.
    _CONTINUATIONS = {
        letter
        for encoding in ftfy.chardata.CHARMAP_ENCODINGS
        for letter in bytes(range(0x80, 0xC0)).decode(encoding, errors="ignore")
    }
    _BOMB = re.compile(f"[{re.escape(''.join(sorted(_CONTINUATIONS)))}]{{64}}")

    class _FewRepairs(ftfy.TextFixerConfig):
        """Settings of ftfy for one line, which switch some repairs off after MAX_REPAIRS. Each pass undoes one level of
        damage, and a text such as &amp;amp;amp; ... has as many levels as characters."""

        left = MAX_REPAIRS

        def __getattribute__(self, name: str) -> Any:
            if name in ("unescape_html", "decode_inconsistent_utf8"):
                self.left -= 1
                if self.left < 0:
                    return False
            return super().__getattribute__(name)


PADDING = 0  # follows the end token in a row; inside a text the same id is the token "!"
CLIP_VOCAB_SIZE = 49408
BYTE_SYMBOLS = 512  # each byte inside a word, and each byte that ends one
END_OF_WORD = "</w>"
SPECIAL_STRINGS = ("<start_of_text>", "<end_of_text>")

# Visible ASCII and white space: ftfy changes no such text unless it holds an HTML entity.
_PLAIN = re.compile(r"[\t\n\f\r -~]*")

_LINE = re.compile(r"[^\n]{0,4096}\n|[^\n]{1,4096}")  # or a piece of a long one, as ftfy's time grows with the square

# CLIP's own pattern of words, and one that finds the same in cleaned texts of ASCII alone, three times as fast.
_WORD = regex.compile(
    r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
_ASCII_WORD = re.compile(r"<start_of_text>|<end_of_text>|'(?:s|t|re|ve|m|ll|d)|[a-z]+|[0-9]|[^\sa-z0-9]+")
MAX_CHARACTERS = 2**16  # of a text that `encode` looks at
MAX_ROW_CHARACTERS = 4096  # read to fill a row. With a long context it is this many characters for each token:
MAX_TOKEN_CHARACTERS = 64
MAX_WORDS, LONGEST_WORD = 2**16, 64  # whose ids are remembered: some tens of megabytes at most


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
        """Return rows of start, text, end, then zeros. Of a longer text the first `context - 2` ids are kept.

        Raises: TypeError: if a text is not a string. ValueError: if it needs ftfy and ftfy is not installed.
        """
        texts = [texts] if isinstance(texts, str) else texts
        room = self.context - 2
        most = max(MAX_ROW_CHARACTERS, MAX_TOKEN_CHARACTERS * self.context)
        rows = [self._words.ids(clean(text, most))[:room] for text in texts]
        counts = np.array([len(row) for row in rows], dtype=np.int64)
        table = np.full((len(rows), self.context), PADDING, dtype=np.int64)
        table[:, 0] = self.start
        inside = np.arange(room) < counts[:, None]
        table[:, 1:-1][inside] = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(counts.sum()))
        table[np.arange(len(rows)), counts + 1] = self.end
        return torch.from_numpy(table)

    @property
    def pieces(self) -> Sequence[bytes]:
        """The bytes of each id below the start token; those that end a word close with `END_OF_WORD`."""
        return self._bytes

    def encode(self, text: str) -> list[int]:
        """Return the ids of the first MAX_CHARACTERS of a text, without start and end."""
        return self._words.ids(clean(text, MAX_CHARACTERS))

    def decode(self, ids: Iterable[int] | Int64[Tensor, " tokens"]) -> str:
        """Return the text up to the first end token, without the start token; bytes that are not UTF-8 become U+FFFD.

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
        """Return True if a new word follows this token."""
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
    """Return a decoded text as people write it: without blanks before punctuation and endings, and between digits.

    `a man 's sign ( no . 2 4 ) , red` becomes `a man's sign (no. 24), red`.
    """
    return _LOOSE.sub("", text)


class _Words:
    """Ids of cleaned texts, word by word. Most words are frequent, so their ids are remembered."""

    def __init__(self, model: BPE, specials: dict[str, list[int]]) -> None:
        """`specials`: the ids of special words."""
        self._model, self._specials = model, specials
        self._symbols = _byte_symbols()
        self._known = dict(specials)

    def ids(self, text: str) -> list[int]:
        """Return the ids of a whole text."""
        ids: list[int] = []
        for word in (_ASCII_WORD if text.isascii() else _WORD).findall(text):
            known = self._known.get(word)
            ids += self._learn(word) if known is None else known
        return ids

    def _learn(self, word: str) -> list[int]:
        if len(self._known) >= MAX_WORDS:
            self._known = dict(self._specials)
        symbols = "".join(self._symbols[byte] for byte in word.encode())
        ids = [token.id for token in self._model.tokenize(symbols)]
        if len(word) <= LONGEST_WORD:
            self._known[word] = ids
        return ids


Lengths = Int64[np.ndarray, " batch"]
"""Tokens of each text, start and end included. They are on the CPU, so that shapes do not wait for a device."""


def text_lengths(ids: Int64[Tensor, "batch context"], end: int) -> Lengths:
    """Return the tokens of each row up to and including its first `end` token; without one, the length of the row."""
    is_end = ids.cpu().numpy() == end
    return np.where(is_end.any(axis=1), is_end.argmax(axis=1) + 1, ids.shape[1])


def clean(text: str, most: int | None = None) -> str:
    """Repair mojibake, resolve HTML entities twice, collapse white space, lower the case: what CLIP saw in training.

    Args:
        most: number of characters that are cleaned; the rest is dropped.

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
    """Return the result of `ftfy.fix_text`, in a time proportional to the length of the text."""
    assert ftfy is not None
    lines, unescape = [], "auto"
    for line in _LINE.findall(text):
        if "<" in line:
            unescape = False  # in this line and the next ones, as ftfy does
        sound = _BOMB.search(html.unescape(html.unescape(line))) is None
        lines.append(ftfy.fix_text(line, _FewRepairs(unescape_html=unescape, fix_encoding=sound, explain=False)))
    return "".join(lines)


@lru_cache(maxsize=4)
def _vocabulary(vocab_size: int) -> tuple[_Words, list[bytes]]:
    """Return the encoding by the first merges, and the bytes of each id below the start token."""
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
    """Return a visible character for each byte: itself if Latin-1 shows it, otherwise one from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}
