"""Words of messages: counts with their nouns, and text that is safe to show on a terminal."""


def counted(count: int, what: str) -> str:
    """A count and what it counts, whose `(s)` is for all counts but one: `3 links` for 3 and `link(s)`."""
    return f"{count:,} {what.replace('(s)', '' if count == 1 else 's')}"


def escaped(text: str) -> str:
    r"""The text with line breaks and control characters written as Python spells them, such as `\n` and `\x1b`."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode() for letter in text
    )
