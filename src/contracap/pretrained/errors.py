"""The error of weights that cannot be used."""

MAX_MESSAGE = 2_000  # characters; names in a file may be of any length


class WeightsError(ValueError):
    """Weights that cannot be used. The message is one printable line, even if it quotes the file."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class NonFiniteWeightsError(WeightsError):
    """Weights that hold NaN or infinity."""


def printable(text: str) -> str:
    """Return the text of a file, shortened, and with spaces for the characters that act on a terminal."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text[:MAX_MESSAGE])
    return shown if len(text) <= MAX_MESSAGE else f"{shown} ..."
