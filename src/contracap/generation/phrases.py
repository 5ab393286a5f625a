"""Banned and forced phrases. They are matched in the bytes of a text, so it does not matter how it is cut into tokens.

The text of a row is what the tokenizer reads, with one space before each word and one after the last complete word. A
phrase is a run of complete words, such as " red ball ". A token writes part of a word, or its last part and a space.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from contracap.tokenizer import END_OF_WORD, Tokenizer


class Vocabulary:
    """The bytes that each token writes; start and end token write none."""

    def __init__(self, tokenizer: Tokenizer):
        ending = END_OF_WORD.encode()
        self.tokenizer = tokenizer
        self.pieces = [
            piece.removesuffix(ending) + b" " if piece.endswith(ending) else piece for piece in tokenizer.pieces
        ]
        self.pieces += [b""] * (tokenizer.vocab_size - len(self.pieces))
        self.ids = {piece: token for token, piece in enumerate(self.pieces) if piece}

    @staticmethod
    @lru_cache(maxsize=2)
    def of(tokenizer: Tokenizer) -> "Vocabulary":
        """Return the vocabulary of a tokenizer, which is built once."""
        return Vocabulary(tokenizer)

    def text(self, ids: Sequence[int]) -> bytes:
        """Return the text that these tokens write."""
        return b" " + b"".join([self.pieces[token] for token in ids])

    def texts(self, ids: Int64[Tensor, "batch text length"]) -> list[list[bytes]]:
        """Return the text of each row."""
        return [[self.text(row) for row in rows] for rows in ids.tolist()]

    def phrase(self, words: str) -> list[bytes]:
        """Split a phrase into pieces, as the tokenizer does.

        Raises: ValueError: if it names the start or the end token.
        """
        pieces = [self.pieces[token] for token in self.tokenizer.encode(words)]
        if not all(pieces):
            raise ValueError(f"the phrase {words!r} names a special token: give words only")
        return pieces

    def mask(self, tokens: Sequence[int], device: torch.device) -> Tensor:
        """Return a mask of the vocabulary that is true for these tokens."""
        mask = torch.zeros(len(self.pieces), dtype=torch.bool, device=device)
        mask[torch.tensor(tokens, dtype=torch.int64, device=device)] = True
        return mask


class BannedPhrases:
    """Phrases that must not occur.

    A phrase may be completed by several tokens, each of which writes its last part. Such a token is forbidden where the
    text ends with the rest of the phrase.

    A model could evade a ban with tokens that the tokenizer would never put there, such as "red." for "red". These are
    forbidden too: white space, capital letters, a digit that does not end a word, and a change between letters, digits
    and other characters inside a word.
    """

    def __init__(self, phrases: Sequence[str], vocabulary: Vocabulary, device: torch.device):
        self.phrases = sorted({b" " + b"".join(vocabulary.phrase(phrase)) for phrase in phrases})
        self.endings = _endings(self.phrases, vocabulary)
        self.cut_endings = _endings([phrase[:-1] for phrase in self.phrases], vocabulary)
        # The complete words that a phrase may begin with: after them, not every word is allowed.
        self.beginnings = sorted({phrase[: space + 1] for phrase in self.phrases for space in _spaces(phrase)[1:-1]})
        unwritten = [token for token, piece in enumerate(vocabulary.pieces) if piece and not _is_written(piece)]
        self.unwritten = vocabulary.mask(unwritten, device)
        kinds = [_kind(piece[:1]) for piece in vocabulary.pieces]
        self.other_kinds = {
            kind: vocabulary.mask([token for token, other in enumerate(kinds) if other not in ("", kind)], device)
            for kind in ("letter", "digit", "other")
        }

    def forbid(self, scores: Float[Tensor, " vocab"], text: bytes, end: int, *, last: bool) -> None:
        """Forbid the tokens after `text` that would complete a phrase.

        Args:
            last: whether the text is cut after the next token, which then completes a word without a space.
        """
        endings = self.endings + self.cut_endings if last else self.endings
        forbidden = [token for beginning, token in endings if text.endswith(beginning)]
        if any(text.endswith(phrase[:-1]) for phrase in self.phrases):
            forbidden.append(end)
        scores[forbidden] = -math.inf
        scores.masked_fill_(self.unwritten, -math.inf)
        if not text.endswith(b" "):
            scores.masked_fill_(self.other_kinds[_kind(text[-1:])], -math.inf)

    def arises_between(self, text: bytes, words: bytes) -> bool:
        """Return whether a phrase arises where `words`, which hold none, are appended to `text`."""
        return any(phrase in text[-len(phrase) + 1 :] + words for phrase in self.phrases)


class ForcedPhrases:
    """Phrases that must occur.

    `tokens_needed` counts the tokens that a text still needs. A token is allowed if the room after it suffices for what
    the text then needs. A phrase begins after a complete word, and where it completes no banned phrase. If phrases of
    several words are banned, room for one more word is kept between the forced ones.

    Raises: ValueError: if a phrase cannot occur because it, or part of it, is banned.
    """

    def __init__(
        self, phrases: Sequence[str], vocabulary: Vocabulary, banned: BannedPhrases | None, device: torch.device
    ):
        self.vocabulary, self.banned = vocabulary, banned
        pieces = {b" " + b"".join(found): found for found in map(vocabulary.phrase, phrases)}
        for phrase in pieces:
            for other in banned.phrases if banned is not None else ():
                if other in phrase:
                    raise ValueError(
                        f"'{other.decode().strip()}' is banned and part of '{phrase.decode().strip()}', "
                        "which is forced: remove one of them"
                    )
        # A phrase that is part of another one occurs with it.
        self.phrases = [phrase for phrase in pieces if not any(phrase in other and phrase != other for other in pieces)]
        self.lengths = [len(pieces[phrase]) for phrase in self.phrases]
        # For each phrase and number of tokens written: how the text then ends, and the next token.
        self.steps = [
            [(b" " + b"".join(found[:written]), vocabulary.ids[piece]) for written, piece in enumerate(found)]
            for found in (pieces[phrase] for phrase in self.phrases)
        ]
        self.avoided = _endings(banned.beginnings, vocabulary) if banned is not None else []
        self.spare = 1 if self.avoided else 0
        closing = [token for token, piece in enumerate(vocabulary.pieces) if piece.endswith(b" ")]
        self.unfinished = ~vocabulary.mask(closing, device)

    def check_room(self, text: bytes, room: int) -> None:
        """Raises: ValueError: if `text` needs more than `room` tokens."""
        needed = self.tokens_needed(text)
        if needed > room:
            raise ValueError(
                f"the forced phrases take {needed} tokens, and max_tokens leaves room for {room}: "
                "raise max_tokens or force less"
            )

    def find_missing(self, text: bytes) -> list[int]:
        """Return the numbers of the phrases that `text` does not hold."""
        return [number for number, phrase in enumerate(self.phrases) if phrase not in text]

    def progress(self, text: bytes, number: int) -> list[int]:
        """Return how many tokens of a phrase the end of `text` may hold, most first; 0 where it may begin."""
        return [
            written
            for written, (beginning, _) in reversed(list(enumerate(self.steps[number])))
            if text.endswith(beginning)
            and not (
                self.banned is not None
                and self.banned.arises_between(text[: len(text) - len(beginning) + 1], self.phrases[number][1:])
            )
        ]

    def tokens_needed(self, text: bytes) -> int:
        """Return how many tokens must follow until every phrase has occurred."""
        missing = self.find_missing(text)
        if not missing:
            return 0
        written = max((count for number in missing for count in self.progress(text, number)), default=-1)
        return self._total(missing) - written  # -1: a word must end first

    def tokens_met(self, text: bytes) -> int:
        """Return how many tokens of the phrases `text` holds, counting the phrase that it has begun."""
        missing = self.find_missing(text)
        written = max((count for number in missing for count in self.progress(text, number)), default=0)
        return sum(self.lengths) - sum(self.lengths[number] for number in missing) + written

    def next_tokens(self, text: bytes) -> list[int]:
        """Return the tokens that begin or continue a phrase that `text` does not hold."""
        missing = self.find_missing(text)
        return sorted({self.steps[number][count][1] for number in missing for count in self.progress(text, number)})

    def forbid(self, scores: Float[Tensor, " vocab"], text: bytes, end: int, room: int) -> bool:
        """Forbid the tokens after `text` that leave too little room; `room` includes the next token.

        Returns: whether the room is so short that only the forced phrases decide what may come.
        """
        missing = self.find_missing(text)
        if not missing:
            return False
        scores[end] = -math.inf
        total = self._total(missing)
        if room - 1 > total:
            return False  # there will always be room
        pieces = self.vocabulary.pieces
        allowed = [token for token in self.next_tokens(text) if self.tokens_needed(text + pieces[token]) <= room - 1]
        allowed_scores = scores[allowed]
        if room - 1 == total:  # room for one more word, after which every phrase may begin
            scores.masked_fill_(self.unfinished, -math.inf)
            scores[[token for beginning, token in self.avoided if text.endswith(beginning)]] = -math.inf
        else:
            scores.fill_(-math.inf)
        scores[allowed] = allowed_scores
        return True

    def _total(self, missing: Sequence[int]) -> int:
        """Return the tokens of these phrases and of the spare words between them."""
        return sum(self.lengths[number] + self.spare for number in missing) - self.spare


@lru_cache(maxsize=16)
def compile_phrases(
    banned: tuple[str, ...], forced: tuple[str, ...], vocabulary: Vocabulary, device: torch.device
) -> tuple[BannedPhrases | None, ForcedPhrases | None]:
    """Prepare phrases for all batches that use them, which takes one pass over the vocabulary.

    Raises: ValueError: as `ForcedPhrases` does.
    """
    bans = BannedPhrases(banned, vocabulary, device) if banned else None
    return bans, ForcedPhrases(forced, vocabulary, bans, device) if forced else None


def _endings(phrases: Sequence[bytes], vocabulary: Vocabulary) -> list[tuple[bytes, int]]:
    """Return each way in which one token can complete a phrase: the text before it, and the token."""
    return [
        (phrase[:first], vocabulary.ids[phrase[first:]])
        for phrase in phrases
        for first in range(phrase.rindex(b" ", 0, len(phrase) - 1) + 1, len(phrase))
        if phrase[first:] in vocabulary.ids
    ]


def _spaces(phrase: bytes) -> list[int]:
    return [index for index, byte in enumerate(phrase) if byte == ord(" ")]


def _is_written(piece: bytes) -> bool:
    """Return whether the tokenizer ever writes a cleaned text with this piece."""
    inner = piece.removesuffix(b" ")
    return inner.split() == [inner] and inner == inner.lower() and not (inner.isdigit() and inner == piece)


def _kind(character: bytes) -> str:
    if not character.strip():
        return ""
    if character.isalpha() or character >= b"\x80":
        return "letter"
    return "digit" if character.isdigit() else "other"
