"""Frozen dataclasses from TOML files and back: read, check, override, write. Knows no field of CoCa."""

import copy
import dataclasses
import difflib
import inspect
import json
import math
import re
import textwrap
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import pydantic

from contracap.files import read_regular

T = TypeVar("T")
MAX_FILE = 2**24  # bytes of a TOML file
MAX_SHOWN = 80  # characters of a value in a message


class SettingsHelp(Exception):
    """Asked for: every key with what it takes and means, as text."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what would do, for each of `problems`."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """A `cls` with these values, checked: types strictly (a whole number may stand for a float); unknown keys, NaN
    and infinity are refused.

    Args:
        cls: a dataclass; its fields may be dataclasses, unions with them, and sequences or mappings of them. A class
            attribute FORMER_KEYS may say what to do about dotted keys of earlier versions.
        values: plain values by field name, nested like the dataclasses. Fields that are left out keep their defaults.

    Raises:
        ConfigError: for every unknown key, with the nearest right one, every missing key and every wrong value.
    """
    unknown = list(_unknown_keys(cls, values, (), getattr(cls, "FORMER_KEYS", {})))
    if unknown:
        raise ConfigError(*unknown)
    endless = [f"'{key}' must be {wanted}, not {_short(number)}" for key, wanted, number in _endless(values, ())]
    if endless:
        raise ConfigError(*endless)
    try:
        return pydantic.TypeAdapter(cls).validate_json(json.dumps(values, default=_plain), strict=True)
    except pydantic.ValidationError as error:
        problems = [_problem(cls, details) for details in error.errors(include_url=False)]
        raise ConfigError(*dict.fromkeys(problems)) from None


def load_toml(path: str | Path, cls: type[T], overrides: Sequence[str] = ()) -> T:
    """The `cls` that a TOML file holds.

    Args:
        path: the file.
        cls: a dataclass, as in `build`.
        overrides: `key.path=value` each, applied in order. A value that is no TOML value is taken as a string.

    Raises:
        ConfigError: if the file is not TOML, an override is no assignment, or `build` refuses the outcome.
        FileNotFoundError: if there is no such file.
    """
    try:
        values = tomllib.loads(read_regular(path, MAX_FILE).decode("utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits
        raise ConfigError(f"{path} is not a TOML file: {error}") from None
    changed = copy.deepcopy(values)
    for override in overrides:
        assign(changed, override)
    try:
        return build(cls, changed)
    except ConfigError as error:
        in_file = _problems_of(cls, values) if overrides else error.problems
        told = [(f"{path}: " if each in in_file else "command line: ") + each for each in error.problems]
        raise ConfigError(*told) from None


def _problems_of(cls: type, values: Mapping[str, Any]) -> Sequence[str]:
    try:
        build(cls, values)
    except ConfigError as error:
        return error.problems
    return ()


def assign(values: dict[str, Any], override: str) -> None:
    """Put `key.path=value` into nested values. A value that is no TOML value is taken as a string.

    Raises:
        ConfigError: if it is no assignment, or the path leads through a value.
    """
    key, equals, text = override.partition("=")
    path = [name.strip() for name in key.split(".")]
    if not equals or not all(path):
        raise ConfigError(f"override {_short(override)} is not of the form key.path=value")
    table = values
    for depth, name in enumerate(path[:-1], start=1):
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {_short(override)}: '{'.'.join(path[:depth])}' is a value, not a table")
    table[path[-1]] = _toml_value(text.strip())


def require_positive(config: Any, *fields: str) -> None:
    """Raises: ValueError: if one of these numbers of a dataclass is not above 0."""
    for field in fields:
        if not getattr(config, field) > 0:
            raise ValueError(f"{field} is {getattr(config, field)}; it must be above 0")


def require_paths(config: Any, *fields: str) -> None:
    """Raises: ValueError: if one of these paths of a dataclass is empty, which would mean the working folder."""
    for field in fields:
        value = getattr(config, field)
        paths = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(path, str) and not path.strip() for path in paths):
            raise ValueError(f'{field} is empty (""): name a file or a folder; the working folder is .')


def require_count(name: str, value: Any, least: int, why: str, *, most: int = 10**6) -> None:
    """Raises: ValueError: unless `value` is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least} ({why}), not {value!r}")
    if value > most:
        raise ValueError(f"{name} must be at most {most:,} ({why}), not {value:,}")


def keys(cls: type, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str, str]]:
    """Dotted key, what it must be with its default, and what it means, of every field of a dataclass and of those in
    it; what it means stands under `Attributes:` in its docstring."""
    hints, told = get_type_hints(cls), _told(cls)
    for field in dataclasses.fields(cls):
        inside, key = _dataclass_of(hints[field.name]), ".".join((*path, field.name))
        if dataclasses.is_dataclass(field.default):  # one of several, as a strategy that another contains
            inside = type(field.default)
        if inside is not None and field.default is not None:
            yield from keys(inside, (*path, field.name))
            continue
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = "needed" if needed else "none by default"
        if field.default not in (dataclasses.MISSING, None):
            default = f"default {_toml_text(_plain(field.default))}"
        yield key, f"{_words(hints[field.name])}; {default}", told.get(field.name, "")
        held = [each for _, each, _ in _items(hints[field.name], {"NAME": None})]
        for each in (inside, *map(_dataclass_of, held)):
            if each is not None:
                yield from keys(each, (*path, field.name) if each is inside else (*path, field.name, "NAME"))


def keys_text(cls: type) -> str:
    """Every key with what it takes and means, for a terminal and for the docs."""
    return "\n\n".join(
        "\n    ".join([key, *textwrap.wrap(takes, 76), *textwrap.wrap(means, 76)]) for key, takes, means in keys(cls)
    )


def _told(cls: type) -> dict[str, str]:
    """The text of each attribute in a docstring."""
    text = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    ([a-z_0-9, ]+): (.*(?:\n(?:        .*|$))*)", text, re.MULTILINE)
    return {name: " ".join(words.split()) for names, words in entries for name in names.split(", ")}


def to_dict(config: Any) -> dict[str, Any]:
    """The plain values of a dataclass, None left out: `build(type(config), to_dict(config)) == config`.

    Raises:
        ConfigError: if a field is None whose default is something else, which plain values cannot say.
    """
    return _plain(config)


def to_toml(config: Any) -> str:
    """The text that `load_toml` reads back as an equal dataclass."""
    return "\n".join(_toml_lines(to_dict(config), ())) + "\n"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            if getattr(value, field.name) is None and field.default is not None:
                name = f"{type(value).__name__}.{field.name}"
                raise ConfigError(f"{name} is None but its default is not: give the field the default None to store it")
        values = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: _plain(item) for name, item in values.items() if item is not None}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)  # paths; dates that a TOML file may hold where a string was meant


# --- what was wrong ---------------------------------------------------------------------------------------------------


def _dataclass_of(hint: Any) -> Any:
    """The only dataclass among a hint's alternatives, else None."""
    alternatives = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    found = [alternative for alternative in alternatives if dataclasses.is_dataclass(alternative)]
    return found[0] if len(found) == 1 else None


def _items(hint: Any, value: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, hint and value of everything inside a sequence or a mapping."""
    alternatives = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for alternative in alternatives:
        origin, arguments = get_origin(alternative), get_args(alternative)
        if origin in (list, tuple) and isinstance(value, Sequence) and not isinstance(value, str) and arguments:
            yield from ((str(index), arguments[0], item) for index, item in enumerate(value))
        elif origin in (dict, Mapping) and isinstance(value, Mapping) and len(arguments) == 2:
            yield from ((str(key), arguments[1], item) for key, item in value.items())


def _endless(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str, float]]:
    """Key, what would do, and value of each number that is NaN or infinite, as these pass every comparison that checks
    a range, or half of them; and of each whole number that others cannot hold."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _endless(item, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _endless(item, (*path, str(index)))
    elif isinstance(value, float) and not math.isfinite(value):
        yield ".".join(path), "a finite number", value
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield ".".join(path), "below 2**63", value


def _unknown_keys(hint: Any, value: Any, path: tuple[str, ...], former: Mapping[str, str]) -> Iterator[str]:
    """A line for each; `former`: dotted keys of earlier versions, and what to do about them."""
    cls = _dataclass_of(hint)
    if cls is not None and isinstance(value, Mapping):
        hints = get_type_hints(cls)
        names = [field.name for field in dataclasses.fields(cls) if field.init]
        for key, item in value.items():
            if key in names:
                yield from _unknown_keys(hints[key], item, (*path, key), former)
            elif (dotted := ".".join((*path, str(key)))) in former:
                yield f"key '{dotted}' is of an earlier version: {former[dotted]}"
            else:
                close = difflib.get_close_matches(str(key)[:MAX_SHOWN], names, n=1)
                near = [*_leaves(cls, str(key), path), *(".".join((*path, name)) for name in close)]
                right = f"did you mean '{near[0]}'?" if near else f"the keys here are {', '.join(names)}"
                yield f"unknown key {_short('.'.join((*path, str(key))))}; {right}"
    else:
        for name, item_hint, item in _items(hint, value):
            yield from _unknown_keys(item_hint, item, (*path, name), former)


def _leaves(cls: type, name: str, path: tuple[str, ...]) -> Iterator[str]:
    """The dotted keys of this name in the tables inside."""
    for key, hint in get_type_hints(cls).items():
        inside = _dataclass_of(hint)
        if inside is not None:
            if name in get_type_hints(inside):
                yield ".".join((*path, key, name))
            yield from _leaves(inside, name, (*path, key))


def _problem(cls: type, details: Any) -> str:
    """One line for one of pydantic's findings: the dotted key, what it must be, and what it is."""
    path: list[str] = []
    hint: Any = cls
    for step in details["loc"]:
        holder = _dataclass_of(hint)
        hints = get_type_hints(holder) if holder is not None else {}
        if get_origin(hint) is dict:
            hints = {step: get_args(hint)[1]}
        if step not in hints:
            break  # an index, or pydantic's word for one alternative of a union
        path.append(str(step))
        hint = hints[step]
    key = ".".join(path)
    if details["type"] == "missing" and path and details["loc"][-1] == path[-1]:
        return f"key '{key}' is missing"
    if details["type"] == "value_error":
        message = str(details["ctx"]["error"])
        return f"'{key}': {message}" if key else message
    return f"'{key}' must be {_words(hint)}, not {_short(details['input'])}"


def _short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 4]} ..."


def _words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_words(alternative) for alternative in get_args(hint) if alternative is not type(None))
    if get_origin(hint) in (tuple, list):
        items = [_words(argument) for argument in get_args(hint) if argument is not ...]
        alike = ... in get_args(hint) or len(items) == 1
        return f"a list, each {items[0]}" if alike else f"a list ({', '.join(items)})"
    if dataclasses.is_dataclass(hint) or hint is dict or get_origin(hint) is dict:
        return "a table"
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    return plain.get(hint, getattr(hint, "__name__", str(hint)))


# --- TOML values ------------------------------------------------------------------------------------------------------


def _toml_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # no TOML; thousands of digits, or of brackets
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _toml_lines(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """Values first, then the tables inside, each under its own header."""
    tables = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    yield from (f"{_toml_key(key)} = {_toml_text(value)}" for key, value in table.items() if key not in tables)
    for key, value in tables.items():
        yield ""
        yield f"[{'.'.join(map(_toml_key, (*path, key)))}]"
        yield from _toml_lines(value, (*path, key))


def _toml_key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else _toml_text(key)


def _toml_text(value: Any) -> str:
    if isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ConfigError(f"{value!r} is no text that a TOML file can hold")
        # JSON's escapes are TOML's too, but for delete, which TOML wants escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(key)} = {_toml_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(_toml_text, value)) + "]"
    return repr(value)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys such as `a.b` of nested mappings, with their values."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
