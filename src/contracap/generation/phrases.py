"""Banned and forced phrases, followed in the bytes of a text, so that it does not matter how it is cut into tokens.

The text of a row is written as the tokenizer reads it: a space in front, and one behind each word that is complete. A
phrase is a run of complete words, such as " red ball ". A token writes part of a word, or the end of one and its space.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from contracap.tokenizer import END_OF_WORD, Tokenizer


class Vocabulary:
    """What each token writes; the start and the end token write nothing."""

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
        """That of a tokenizer, made once."""
        return Vocabulary(tokenizer)

    def text(self, ids: Sequence[int]) -> bytes:
        """What these tokens write."""
        return b" " + b"".join([self.pieces[token] for token in ids])

    def texts(self, ids: Int64[Tensor, "images rows length"]) -> list[list[bytes]]:
        """What each row writes."""
        return [[self.text(row) for row in rows] for rows in ids.tolist()]

    def phrase(self, words: str) -> list[bytes]:
        """The pieces that the tokenizer writes a phrase with.

        Raises: ValueError: if it names the start or the end token.
        """
        pieces = [self.pieces[token] for token in self.tokenizer.encode(words)]
        if not all(pieces):
            raise ValueError(f"the phrase {words!r} names a special token; rules are about words")
        return pieces

    def mask(self, tokens: Sequence[int], device: torch.device) -> Tensor:
        """True at these tokens."""
        mask = torch.zeros(len(self.pieces), dtype=torch.bool, device=device)
        mask[torch.tensor(tokens, dtype=torch.int64, device=device)] = True
        return mask


class Banned:
    """Phrases that must not occur.

    For each way in which a token can end a phrase, the token is forbidden where the text holds the rest of it. So that
    "red." is no way around "red", tokens that the tokenizer would never put there are forbidden too: white space,
    capital letters, a digit that does not end a word, and a change between letters, digits and other signs inside one.
    """

    def __init__(self, phrases: Sequence[str], vocabulary: Vocabulary, device: torch.device):
        self.words = sorted({b" " + b"".join(vocabulary.phrase(phrase)) for phrase in phrases})
        self.endings = _endings(self.words, vocabulary)
        self.cut_endings = _endings([words[:-1] for words in self.words], vocabulary)
        # what a phrase may begin with: behind it, the next word is not free
        self.beginnings = sorted({words[: place + 1] for words in self.words for place in _spaces(words)[1:-1]})
        strange = [token for token, piece in enumerate(vocabulary.pieces) if piece and _is_strange(piece)]
        self.strange = vocabulary.mask(strange, device)
        kinds = [_kind(piece[:1]) for piece in vocabulary.pieces]
        self.other_kind = {
            here: vocabulary.mask([token for token, there in enumerate(kinds) if there not in ("", here)], device)
            for here in ("letter", "digit", "other")
        }

    def forbid(self, scores: Float[Tensor, " vocab"], text: bytes, end: int, *, last: bool) -> None:
        """Forbid the tokens after `text` that would complete a phrase.

        Args:
            last: whether the text is cut after the next token, which then completes a word without a space.
        """
        endings = self.endings + self.cut_endings if last else self.endings
        forbidden = [token for beginning, token in endings if text.endswith(beginning)]
        if any(text.endswith(words[:-1]) for words in self.words):
            forbidden.append(end)
        scores[forbidden] = -math.inf
        scores.masked_fill_(self.strange, -math.inf)
        if not text.endswith(b" "):
            scores.masked_fill_(self.other_kind[_kind(text[-1:])], -math.inf)

    def between(self, text: bytes, words: bytes) -> bool:
        """Whether a phrase would come about where `words`, which hold none, follow `text`."""
        return any(phrase in text[-len(phrase) + 1 :] + words for phrase in self.words)


class Forced:
    """Phrases that must occur.

    `need` counts the tokens that a text still wants; a token is allowed while the room behind it holds what the text
    wants then. A phrase begins after a complete word, and where nothing banned comes about; so where phrases of several
    words are banned, room for one more word is kept between the forced ones.

    Raises: ValueError: if a phrase cannot occur because it, or part of it, is banned.
    """

    def __init__(self, phrases: Sequence[str], vocabulary: Vocabulary, banned: Banned | None, device: torch.device):
        self.vocabulary, self.banned = vocabulary, banned
        pieces = {b" " + b"".join(found): found for found in map(vocabulary.phrase, phrases)}
        for words in pieces:
            for other in banned.words if banned is not None else ():
                if other in words:
                    raise ValueError(
                        f"'{other.decode().strip()}' is banned and part of '{words.decode().strip()}', "
                        "which is forced; take it out of the one or the other"
                    )
        # what is part of another phrase occurs with it
        self.words = [words for words in pieces if not any(words in other and words != other for other in pieces)]
        self.counts = [len(pieces[words]) for words in self.words]
        # for each phrase, what a text in the midst of it ends with, and the token that goes on
        self.steps = [
            [(b" " + b"".join(found[:done]), vocabulary.ids[piece]) for done, piece in enumerate(found)]
            for found in (pieces[words] for words in self.words)
        ]
        self.avoided = _endings(banned.beginnings, vocabulary) if banned is not None else []
        self.spare = 1 if self.avoided else 0
        closing = [token for token, piece in enumerate(vocabulary.pieces) if piece.endswith(b" ")]
        self.unfinished = ~vocabulary.mask(closing, device)

    def check_room(self, text: bytes, room: int) -> None:
        """Raises: ValueError: if what must follow `text` takes more than `room` tokens."""
        need = self.need(text)
        if need > room:
            raise ValueError(
                f"the forced phrases take {need} tokens, and max_tokens leaves room for {room}; "
                "raise max_tokens or force less"
            )

    def missing(self, text: bytes) -> list[int]:
        """The phrases that `text` does not hold."""
        return [number for number, words in enumerate(self.words) if words not in text]

    def places(self, text: bytes, number: int) -> list[int]:
        """How many tokens of a phrase the end of `text` may hold; 0 where it may begin; most first."""
        return [
            done
            for done, (beginning, _) in reversed(list(enumerate(self.steps[number])))
            if text.endswith(beginning)
            and not (
                self.banned is not None
                and self.banned.between(text[: len(text) - len(beginning) + 1], self.words[number][1:])
            )
        ]

    def need(self, text: bytes) -> int:
        """Tokens that must follow until every phrase has occurred."""
        missing = self.missing(text)
        if not missing:
            return 0
        begun = max((place for number in missing for place in self.places(text, number)), default=-1)
        return self._total(missing) - begun  # -1: a word must end before

    def met(self, text: bytes) -> int:
        """Tokens of the phrases that `text` holds, and of the one it is in the midst of."""
        missing = self.missing(text)
        begun = max((place for number in missing for place in self.places(text, number)), default=0)
        return sum(self.counts) - sum(self.counts[number] for number in missing) + begun

    def next(self, text: bytes) -> list[int]:
        """The tokens that begin or go on with a phrase that `text` does not hold."""
        missing = self.missing(text)
        return sorted({self.steps[number][place][1] for number in missing for place in self.places(text, number)})

    def forbid(self, scores: Float[Tensor, " vocab"], text: bytes, end: int, room: int) -> bool:
        """Forbid the tokens after `text` that leave too little room; `room` counts the next token.

        Returns: whether the room is so short that this decides what may come.
        """
        missing = self.missing(text)
        if not missing:
            return False
        scores[end] = -math.inf
        total = self._total(missing)
        if room - 1 > total:
            return False  # whatever comes, there will be room
        pieces = self.vocabulary.pieces
        allowed = [token for token in self.next(text) if self.need(text + pieces[token]) <= room - 1]
        kept = scores[allowed]
        if room - 1 == total:  # room for one more word, behind which every phrase may begin
            scores.masked_fill_(self.unfinished, -math.inf)
            scores[[token for beginning, token in self.avoided if text.endswith(beginning)]] = -math.inf
        else:
            scores.fill_(-math.inf)
        scores[allowed] = kept
        return True

    def _total(self, missing: Sequence[int]) -> int:
        """Tokens of these phrases, and of the words kept between them."""
        return sum(self.counts[number] + self.spare for number in missing) - self.spare


@lru_cache(maxsize=16)
def followed(
    banned: tuple[str, ...], forced: tuple[str, ...], vocabulary: Vocabulary, device: torch.device
) -> tuple[Banned | None, Forced | None]:
    """What follows these phrases in every batch, made once: it looks at all of the vocabulary.

    Raises: ValueError: as `Forced` does.
    """
    bans = Banned(banned, vocabulary, device) if banned else None
    return bans, Forced(forced, vocabulary, bans, device) if forced else None


def _endings(phrases: Sequence[bytes], vocabulary: Vocabulary) -> list[tuple[bytes, int]]:
    """Each way in which one token can end a phrase: what stands before it, and the token."""
    return [
        (words[:place], vocabulary.ids[words[place:]])
        for words in phrases
        for place in range(words.rindex(b" ", 0, len(words) - 1) + 1, len(words))
        if words[place:] in vocabulary.ids
    ]


def _spaces(words: bytes) -> list[int]:
    return [place for place, byte in enumerate(words) if byte == ord(" ")]


def _is_strange(piece: bytes) -> bool:
    """Whether the tokenizer never writes a text with it, for cleaned texts hold no such thing."""
    inner = piece.removesuffix(b" ")
    return inner.split() != [inner] or inner != inner.lower() or (inner.isdigit() and inner == piece)


def _kind(sign: bytes) -> str:
    if not sign.strip():
        return ""
    return "letter" if sign.isalpha() or sign >= b"\x80" else "digit" if sign.isdigit() else "other"
