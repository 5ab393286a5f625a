"""Words of messages: counts with their nouns, and text that is safe to show on a terminal."""


def counted(count: int, what: str) -> str:
    """Return a count with its noun: `3 links` for 3 and `link(s)`, `1 link` for 1."""
    return f"{count:,} {what.replace('(s)', '' if count == 1 else 's')}"


def escaped(text: str) -> str:
    r"""Return the text with line breaks and control characters escaped as in Python, such as `\n` and `\x1b`."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode() for letter in text
    )


def text_problem(error: Exception) -> str:
    """Return why bytes are not text, or a text is not JSON or TOML; Python's reason where that is clear."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"not {error.encoding.upper()} text (byte 0x{error.object[error.start]:02x}): save it as UTF-8"
    return str(error)
