"""What several verbs take, and what they make of it."""

import dataclasses
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import tyro.conf
from tyro.conf import FlagCreatePairsOff
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from contracap.cli.errors import EmptyPathError, message
from contracap.config import field_docstrings, require_count
from contracap.files import try_place

if TYPE_CHECKING:
    from contracap.model.coca import CoCa
    from contracap.processor import Processor


MAX_BATCH = 2**16
MAX_WORKERS = 1024
KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def arg(*, help: str, metavar: str | None = None, name: str | None = None) -> Any:
    """tyro's `arg`, whose help says a default only where there is something to say."""
    return tyro.conf.arg(help=help, metavar=metavar, name=name, help_behavior_hint=_default)


def _default(value: str) -> str:
    return "" if value in ("", "''", "None", "False") else f"(default: {value})"


class PathText(str):
    """Annotates text that is a path or a URL: `registry` refuses an empty one, as it does for `Path`."""


registry = ConstructorRegistry()
"""How words of the command line become values, for all verbs."""


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
    """One of some words, or nothing: tyro's own rule names None among the choices, in an order that changes."""
    options = [option for option in get_args(wanted.type) if option is not NoneType]
    if len(options) != 1 or len(get_args(wanted.type)) != 2 or get_origin(options[0]) is not Literal:
        return None
    choices = get_args(options[0])
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(choices) + "}",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: value is None or value in choices,
        str_from_instance=lambda value: [str(value)],
        choices=choices,
    )


Flags = tyro.conf.arg(name="")
"""Annotates a dataclass, or a `Given`, whose fields are flags of the verb."""

FLAG_NAMES = {"settings": "set"}
"""Flags that are not called as the field is."""


class Given(dict[str, Any]):
    """The fields of a dataclass that were given as flags, for a verb that builds it later, or without them does
    something else. No flag is required."""

    of: ClassVar[type]

    def flags(self) -> list[str]:
        """Return the flags as they are typed."""
        words = {name: FLAG_NAMES.get(name, name).replace("_", "-") for name in self}
        return [f"--no-{words[name]}" if value is False else f"--{words[name]}" for name, value in self.items()]


@registry.struct_rule
def _dataclass_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Make a flag of each field of a dataclass."""
    if not dataclasses.is_dataclass(info.type) or not info.type.__module__.startswith("contracap."):
        return None
    defaults = {field.name: getattr(info.default, field.name) for field in dataclasses.fields(info.type)}
    return StructConstructorSpec(instantiate=info.type, fields=_flags(info.type, defaults))


@registry.struct_rule
def _given_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    if not isinstance(info.type, type) or not issubclass(info.type, Given):
        return None
    made, fields = info.type, dataclasses.fields(info.type.of)
    defaults = {field.name: None if field.default is dataclasses.MISSING else field.default for field in fields}

    def instantiate(**values: Any) -> Given:
        return made({name: value for name, value in values.items() if value != defaults[name]})

    return StructConstructorSpec(instantiate=instantiate, fields=_flags(made.of, defaults))


def _flags(cls: type, defaults: Mapping[str, Any]) -> tuple[StructFieldSpec, ...]:
    """A flag for each field. Its help is the docstring under the field; a text in `Annotated` is its metavar."""
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


WeightsName = Annotated[
    PathText,
    arg(
        metavar="WEIGHTS",
        help="A run or its checkpoint, a file, a folder, an hf-hub: name, or a release such as coca_ViT-L-14/mscoco.",
    ),
]
AllowCommands = Annotated[
    FlagCreatePairsOff[bool], arg(help="Run the commands of sources that begin with pipe:, with all your permissions.")
]
Size = Annotated[str | None, arg(metavar="NAME", help="The model's size, if the weights do not tell.")]
ResultFile = Annotated[Path | None, arg(metavar="OUT", help="File for the result.")]
_STRATEGY = arg(metavar="NAME", help="Decoding strategy for captions: greedy, beam, sample, legacy or rerank.")
StrategyName = Annotated[str, _STRATEGY]
OptionalStrategyName = Annotated[str | None, _STRATEGY]
Settings = Annotated[
    tuple[str, ...],
    arg(
        name="set",
        metavar="[KEY=VALUE ...]",
        help="Settings of the strategy, such as width=3 length_penalty=0; `--set help` lists them.",
    ),
]
Device = Annotated[
    str | None, arg(metavar="NAME", help="Such as cpu or cuda:1; the default is the GPU if there is one.")
]
Workers = Annotated[int | None, arg(metavar="N", help="Processes; the default is one for each core.")]


def worker_count(wanted: int | None) -> int:
    """Processes, by default one for each core.

    Raises: ValueError: if there are too many.
    """
    if wanted is None:
        return os.cpu_count() or 1
    require_count("--workers", wanted, 0, "processes", most=MAX_WORKERS)
    return wanted


def check_batch_size(wanted: int) -> None:
    """Raises: ValueError: if it is too small, or beyond any memory."""
    require_count("--batch-size", wanted, 1, "images at a time", most=MAX_BATCH)


def check_outputs(inputs: Iterable[str | Path | None], **outputs: Path | None) -> None:
    """Looks at the places of files that are written hours later, each under the name of its option.

    Args:
        inputs: paths, or names that may be none, as those of weights.

    Raises: ValueError: naming the option, if its file would take the place of an input or of another output, or cannot
        be written.
    """
    taken = {os.path.realpath(path) for path in inputs if path is not None}
    for option, path in outputs.items():
        if path is None:
            continue
        if os.path.realpath(path) in taken:
            raise ValueError(f"--{option} {path} would take the place of another file: name one of its own")
        taken.add(os.path.realpath(path))
        try:
            try_place(path)
        except OSError as error:
            raise ValueError(f"--{option} {path} cannot be written: {message(error)}") from None


def keep_few_kernels() -> None:
    """Called by servers before torch is imported: oneDNN's default, 1024, is hundreds of megabytes where batches are of
    all sizes."""
    os.environ.setdefault(KERNELS, "64")


def command_line() -> str:
    """The command line as it was typed."""
    return shlex.join(["contracap", *sys.argv[1:]])


def load_model(weights: str, size: str | None, *, device: str | None = None) -> "tuple[CoCa, Processor]":
    """Load any weights on a device, by default the GPU if there is one.

    Raises: ValueError: if there is no such device.
    """
    from contracap.pretrained import check_device, load_on_device

    check_device(device)
    return load_on_device(weights, size=size, device=device)
