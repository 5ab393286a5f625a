"""Values of the command line: tyro's rules for paths and choices, and flags from the fields of dataclasses."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import tyro.conf
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from contracap.cli.messages import EmptyPathError
from contracap.config import field_docstrings


def arg(*, help: str, metavar: str | None = None, name: str | None = None) -> Any:
    """Describe an argument. The help shows its default, unless that is empty, None or False."""
    return tyro.conf.arg(help=help, metavar=metavar, name=name, help_behavior_hint=_default)


def _default(value: str) -> str:
    return "" if value in ("", "''", "None", "False") else f"(default: {value})"


class PathText(str):
    """A path or a URL. `registry` refuses an empty one, as it does for `Path`."""


registry = ConstructorRegistry()
"""The rules by which all commands turn words of the command line into values."""


PLAIN: dict[Any, tuple[str, str]] = {int: ("N", "an integer"), float: ("X", "a number"), str: ("TEXT", "a string")}
"""Types of values, with their names in the help and in messages."""


@registry.primitive_rule
def _plain_rule(wanted: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Read numbers and texts as tyro does, with shorter names in the help and shorter messages."""
    plain = _without_none(wanted.type)
    if plain not in PLAIN:
        return None
    metavar, kind = PLAIN[plain]

    def from_words(words: Sequence[str]) -> Any:
        try:
            return plain(words[0])
        except ValueError:
            raise ValueError(f"{words[0]!r} is not {kind}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=from_words,
        is_instance=lambda value: isinstance(value, wanted.type | int if plain is float else wanted.type),
        str_from_instance=lambda value: [str(value)],
    )


def _without_none(type_: Any) -> Any:
    """Return the type T for `T | None`, and any other type as it is."""
    options = [option for option in get_args(type_) if option is not NoneType]
    return options[0] if NoneType in get_args(type_) and len(options) == 1 else type_


@registry.primitive_rule
def _path_rule(wanted: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[str | Path] | None:
    if wanted.type not in (Path, PathText):
        return None
    make = wanted.type

    def from_words(words: Sequence[str]) -> str | Path:
        if not words[0].strip():  # `Path("")` is the working folder, which nobody named
            raise EmptyPathError('a path is empty (""): name a file or a folder; the working folder is .')
        return make(words[0])

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=from_words,
        is_instance=lambda value: isinstance(value, make),
        str_from_instance=lambda value: [str(value)],
    )


@registry.primitive_rule
def _optional_choice_rule(wanted: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[str | None] | None:
    """Read one of several words. tyro's own rule also offers None, and its order of the choices changes."""
    choice = _without_none(wanted.type)
    if choice is wanted.type or get_origin(choice) is not Literal:
        return None
    choices = get_args(choice)
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(choices) + "}",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: value is None or value in choices,
        str_from_instance=lambda value: [str(value)],
        choices=choices,
    )


Flags = tyro.conf.arg(name="")
"""Annotates a dataclass, or a `GivenFlags`, whose fields are flags of the command."""

FLAG_NAMES = {"settings": "set"}
"""Flags whose name differs from that of the field."""


class GivenFlags(dict[str, Any]):
    """The fields of `config_class` whose flags were given. No flag is required: the command builds the class later."""

    config_class: ClassVar[type]

    def flags(self) -> list[str]:
        """Return the flags as a user types them."""
        words = {name: FLAG_NAMES.get(name, name).replace("_", "-") for name in self}
        return [f"--no-{words[name]}" if value is False else f"--{words[name]}" for name, value in self.items()]


@registry.struct_rule
def _dataclass_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Make a flag for each field of a dataclass."""
    if not dataclasses.is_dataclass(info.type) or not info.type.__module__.startswith("contracap."):
        return None
    defaults = {field.name: getattr(info.default, field.name) for field in dataclasses.fields(info.type)}
    return StructConstructorSpec(instantiate=info.type, fields=_flags(info.type, defaults))


@registry.struct_rule
def _given_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    if not isinstance(info.type, type) or not issubclass(info.type, GivenFlags):
        return None
    given, fields = info.type, dataclasses.fields(info.type.config_class)
    defaults = {field.name: None if field.default is dataclasses.MISSING else field.default for field in fields}

    def instantiate(**values: Any) -> GivenFlags:
        return given({name: value for name, value in values.items() if value != defaults[name]})

    return StructConstructorSpec(instantiate=instantiate, fields=_flags(given.config_class, defaults))


def _flags(cls: type, defaults: Mapping[str, Any]) -> tuple[StructFieldSpec, ...]:
    """Return a flag for each field. The docstring below the field is the help, a text in `Annotated` the metavar."""
    help = field_docstrings(cls)
    fields = list[StructFieldSpec]()
    for name, hint in get_type_hints(cls, include_extras=True).items():
        type_, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        several = [option for option in get_args(type_) if get_origin(option) is tuple]
        type_ = several[0] if several else type_  # one value or several: here always a list
        type_ = type_ | None if defaults[name] is None else type_
        metavar = next((note for note in notes if isinstance(note, str)), None)
        described = arg(help=help[name], name=FLAG_NAMES.get(name), metavar=metavar)
        flag: Any = Annotated[type_, *(note for note in notes if note is not metavar), described]
        fields.append(StructFieldSpec(name=name, type=flag, default=defaults[name]))
    return tuple(fields)
