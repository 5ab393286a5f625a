"""Paths as users write them: braces that stand for several names, and shell commands."""

import math
import re
from collections.abc import Iterable
from itertools import product

from contracap.config import ConfigError

MAX_NAMES = 10**7  # that one pattern may stand for
RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")  # int() refuses thousands of digits
CONSENT = "if that is what you want, say --allow-commands (in Python: allow_commands=True)"


def expand(pattern: str) -> list[str]:
    """Return the names that a pattern stands for, in the shell's order. A name without braces stands for itself.

    Args:
        pattern: with any number of ranges `{00000..00331}`, whose leading zeros are kept, and lists `{train,val}`.

    Raises:
        ValueError: if a brace holds neither, holds another brace or is not closed; if names are joined by `::`; or if
            there are more than `MAX_NAMES`.
    """
    if re.search(r"\.(tar|tar\.gz|tgz)::", pattern):
        raise ValueError(f"{pattern!r}: names of shards cannot be joined by '::'; give a list of names")
    parts = re.split(r"\{([^{}]*)\}", pattern)
    if any(brace in literal for literal in parts[::2] for brace in "{}"):
        raise ValueError(f"{pattern!r}: every {{ needs its }}, and none may hold another")
    choices = [_choices(part, pattern) if number % 2 else [part] for number, part in enumerate(parts)]
    if math.prod(map(len, choices)) > MAX_NAMES:
        raise _too_many(pattern)
    return ["".join(chosen) for chosen in product(*choices)]


def commands_in(paths: str | Iterable[str]) -> list[str]:
    """Return the paths that are shell commands, `pipe:` and a command, after braces are expanded."""
    found = []
    for path in [paths] if isinstance(paths, str) else paths:
        try:
            names = [path] if path.startswith("pipe:") else expand(path)
        except ValueError:  # a wrong pattern is not opened either
            names = []
        found += [name for name in names if name.startswith("pipe:")]
    return found


def require_consent(paths: str | Iterable[str], allow: bool, advice: str = CONSENT) -> None:
    """Check the paths that a file names, which others may have written, before any of them is opened.

    Raises: ConfigError: if one is a shell command and commands are not allowed.
    """
    if not allow and (commands := commands_in(paths)):
        raise ConfigError(f"a path runs a shell command, {commands[0]!r}: {advice}")


def _too_many(pattern: str) -> ValueError:
    return ValueError(f"{pattern!r} stands for more than {MAX_NAMES:,} names: give a folder, or fewer")


def _choices(inside: str, pattern: str) -> list[str]:
    """Return the names that a brace stands for."""
    if bounds := RANGE.fullmatch(inside):
        first, last = map(int, bounds.groups())
        step = 1 if first <= last else -1
        numbers = range(first, last + step, step)
        if len(numbers) > MAX_NAMES:
            raise _too_many(pattern)
        padded = any(bound.startswith("0") and len(bound) > 1 for bound in bounds.groups())
        width = max(map(len, bounds.groups())) if padded else 0
        return [str(number).zfill(width) for number in numbers]
    items = inside.split(",")
    if len(items) == 1 or any(RANGE.fullmatch(item) for item in items):
        raise ValueError(
            f"{pattern!r}: {{{inside}}} is neither a range such as {{00000..00331}} nor a list such as {{train,val}}"
        )
    return items
