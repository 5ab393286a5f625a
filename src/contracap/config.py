"""Frozen dataclasses from TOML files and back: read, check, override, write."""

import ast
import copy
import dataclasses
import difflib
import inspect
import json
import textwrap
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import pydantic
import tomli_w

from contracap.files import read_regular
from contracap.wording import text_problem

T = TypeVar("T")
MAX_FILE = 2**24  # bytes of a TOML file
MAX_SHOWN = 80  # characters of a value in a message
STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class SettingsHelp(Exception):
    """Raised if the list of settings is asked for. The message is that list."""


class ConfigError(ValueError):
    """A configuration that cannot be used. Each of `problems` names a key and says what to do."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """Return a `cls` with these values. Types are strict, though an integer may stand for a float; unknown keys,
    NaN and infinity are refused.

    Args:
        cls: a dataclass; its fields may be dataclasses, unions with them, and sequences or mappings of them. A class
            attribute FORMER_KEYS may say what to do about dotted keys of earlier versions.
        values: plain values by field name, nested like the dataclasses. Fields that are left out keep their defaults.

    Raises:
        ConfigError: for every unknown key, with the nearest right one, every missing key and every wrong value.
    """
    try:
        return _adapter(cls).validate_json(json.dumps([values], default=to_dict))[0]  # in JSON a list may be a tuple
    except pydantic.ValidationError as error:
        raise ConfigError(*_problems(cls, error)) from None


@cache
def _adapter(cls: type) -> Any:
    """Return the checker of a list of these: pydantic accepts STRICT for a list of dataclasses, but not for one."""
    return pydantic.TypeAdapter(list[cls], config=STRICT)


def load_toml(path: str | Path, cls: type[T], overrides: Sequence[str] = ()) -> T:
    """Return the `cls` that a TOML file describes.

    Args:
        path: the file.
        cls: a dataclass, as in `build`.
        overrides: `key.path=value` each, applied in order. A value that is not TOML is taken as a string.

    Raises:
        ConfigError: if the file is not TOML, an override is not an assignment, or `build` refuses the outcome.
        FileNotFoundError: if there is no such file.
    """
    try:
        values = tomllib.loads(read_regular(path, MAX_FILE).decode("utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except (ValueError, RecursionError) as error:  # ValueError: also for numbers with thousands of digits
        raise ConfigError(f"{path} is not a TOML file: {text_problem(error)}") from None
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
    """Put `key.path=value` into nested values. A value that is not TOML is taken as a string.

    Raises:
        ConfigError: if it is not an assignment, or the path leads through a value.
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
    """Raises: ValueError: unless `value` is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least} ({why}), not {value!r}")
    if value > most:
        raise ValueError(f"{name} must be at most {most:,} ({why}), not {value:,}")


def list_keys(cls: type, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str, str]]:
    """Yield the dotted key, the type with the default, and the meaning of every field of a dataclass and of those
    inside it. The meaning is the docstring under the field."""
    hints, meanings = get_type_hints(cls), field_docstrings(cls)
    for field in dataclasses.fields(cls):
        inside, key = _dataclass_of(hints[field.name]), ".".join((*path, field.name))
        if dataclasses.is_dataclass(field.default):  # one of several, as a strategy that another contains
            inside = type(field.default)
        if inside is not None and field.default is not None:
            yield from list_keys(inside, (*path, field.name))
            continue
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = "required" if needed else "default: none"
        if field.default not in (dataclasses.MISSING, None):
            default = f"default: {json.dumps(to_dict(field.default))}"
        yield key, f"{_words(hints[field.name])}, {default}", meanings.get(field.name, "")
        for each in (inside, *map(_dataclass_of, _items(hints[field.name]))):
            if each is not None:
                yield from list_keys(each, (*path, field.name) if each is inside else (*path, field.name, "NAME"))


def keys_text(cls: type) -> str:
    """Return every key with its type, default and meaning, for a terminal and for the docs."""
    return "\n\n".join(
        "\n    ".join([key, *textwrap.wrap(takes, 76), *textwrap.wrap(means, 76)])
        for key, takes, means in list_keys(cls)
    )


@cache
def field_docstrings(cls: type) -> Mapping[str, str]:
    """Return the docstring below each field, on one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
    }


def to_dict(config: Any) -> Any:
    """Return the plain values of a dataclass, None left out: `build(type(config), to_dict(config)) == config`.

    Raises:
        ConfigError: if a field is None whose default is something else, which plain values cannot say.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        for field in dataclasses.fields(config):
            if getattr(config, field.name) is None and field.default is not None:
                name = f"{type(config).__name__}.{field.name}"
                raise ConfigError(f"{name} is None but its default is not: give the field the default None to store it")
        values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        return {name: to_dict(value) for name, value in values.items() if value is not None}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    if config is None or isinstance(config, bool | int | float | str):
        return config
    return str(config)  # paths; dates that a TOML file may hold where a string was meant


def to_toml(config: Any) -> str:
    """Return the text that `load_toml` reads back as an equal dataclass.

    Raises: ConfigError: if a string cannot be written as UTF-8.
    """
    text = tomli_w.dumps(to_dict(config))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = error.object[max(0, error.start - 20) : error.end + 20]
        raise ConfigError(f"{near!r} is not text that a TOML file can hold") from None
    return text


# --- error messages ---------------------------------------------------------------------------------------------------


def _alternatives(hint: Any) -> list[Any]:
    """Return the types of a union, without None."""
    of = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [alternative for alternative in of if alternative is not type(None)]


def _dataclass_of(hint: Any) -> Any:
    """Return the only dataclass among the alternatives of a hint, else None."""
    found = [alternative for alternative in _alternatives(hint) if dataclasses.is_dataclass(alternative)]
    return found[0] if len(found) == 1 else None


def _items(hint: Any, *, of: tuple[type, ...] = (list, tuple, dict)) -> list[Any]:
    """Return the hints of the items, of each alternative that is a sequence or a mapping."""
    held = [alternative for alternative in _alternatives(hint) if get_origin(alternative) in of]
    return [get_args(alternative)[1 if get_origin(alternative) is dict else 0] for alternative in held]


def _follow(cls: type, place: Sequence[str | int]) -> tuple[tuple[str, ...], Any]:
    """Return the keys that lead to the place of an error, and the hint there."""
    path, hint, steps = list[str](), cast(Any, cls), iter(place)
    for step in steps:
        if len(_alternatives(hint)) > 1:  # pydantic names the alternative that it tried
            step = next(steps, None)
        if step is None:
            break
        path.append(str(step))
        holders = [get_type_hints(each) for each in _alternatives(hint) if dataclasses.is_dataclass(each)]
        items = _items(hint, of=(dict,) if isinstance(step, str) else (list, tuple))
        hint = next(iter([*(hints[step] for hints in holders if step in hints), *items]), None)
    return tuple(path), hint


def _problems(cls: type, error: pydantic.ValidationError) -> list[str]:
    """Return one line for each problem: the dotted key, what it must be, and what it is."""
    found = [(details, *_follow(cls, details["loc"][1:])) for details in error.errors(include_url=False)]
    unknown = [each for each in found if each[0]["type"] == "unexpected_keyword_argument"]  # or misspelt, so missing
    problems = list[str]()
    for details, path, hint in unknown or found:
        # If one alternative of a union has a problem inside, only that is told.
        if not any(len(deeper) > len(path) and deeper[: len(path)] == path for _, deeper, _ in found):
            problems += _problem(cls, details, path, hint).splitlines()  # a dataclass may tell several
    return list(dict.fromkeys(problems))


def _problem(cls: type, details: Any, path: tuple[str, ...], hint: Any) -> str:
    key, kind = ".".join(path), details["type"]
    if kind == "unexpected_keyword_argument":
        return _unknown_key(cls, path, details["loc"][1:-1])
    if kind == "missing" and isinstance(details["loc"][-1], int):  # a list that is too short
        key, hint = ".".join(path[:-1]), _follow(cls, details["loc"][1:-1])[1]
    elif kind == "missing":
        return f"key '{key}' is missing"
    if kind == "json_invalid":  # of what we wrote ourselves
        return "a string is not valid UTF-8"
    if kind == "value_error":
        message = str(details["ctx"]["error"])
        return f"'{key}': {message}" if key else message
    wanted = "a finite number" if kind == "finite_number" else _words(hint)
    return f"'{key}' must be {wanted}, not {_short(details['input'])}"


def _unknown_key(cls: type, path: tuple[str, ...], holder_place: Sequence[str | int]) -> str:
    former = getattr(cls, "FORMER_KEYS", {})
    if (key := ".".join(path)) in former:
        return f"key '{key}' is of an earlier version: {former[key]}"
    holder = _dataclass_of(_follow(cls, holder_place)[1])
    names = [field.name for field in dataclasses.fields(holder) if field.init]
    close = difflib.get_close_matches(path[-1][:MAX_SHOWN], names, n=1)
    near = [*_leaves(holder, path[-1], path[:-1]), *(".".join((*path[:-1], name)) for name in close)]
    right = f"did you mean '{near[0]}'?" if near else f"the keys here are {', '.join(names)}"
    return f"unknown key {_short(key)}; {right}"


def _leaves(cls: type, name: str, path: tuple[str, ...]) -> Iterator[str]:
    """Yield the dotted keys of this name in nested tables."""
    for key, hint in get_type_hints(cls).items():
        inside = _dataclass_of(hint)
        if inside is not None:
            if name in get_type_hints(inside):
                yield ".".join((*path, key, name))
            yield from _leaves(inside, name, (*path, key))


def _short(value: Any) -> str:
    """Return a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 4]} ..."


def _words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_words, _alternatives(hint)))
    if get_origin(hint) in (tuple, list):
        items = [_words(argument) for argument in get_args(hint) if argument is not ...]
        alike = ... in get_args(hint) or len(items) == 1
        return f"a list, each {items[0]}" if alike else f"a list ({', '.join(items)})"
    if dataclasses.is_dataclass(hint) or hint is dict or get_origin(hint) is dict:
        return "a table"
    plain = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    return plain.get(hint, getattr(hint, "__name__", str(hint)))


def _toml_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # no TOML; thousands of digits, or of brackets
        return text
    return parsed["value"] if len(parsed) == 1 else text


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of nested mappings, such as `a.b`, with their values."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
