"""The command line. Commands import torch inside their functions, so that `--help` answers at once."""

import difflib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from io import TextIOWrapper

try:
    from tyro.conf import DisallowNone
    from tyro.extras import SubcommandApp
except ModuleNotFoundError:
    sys.exit("contracap: error: the command line needs the package tyro: pip install tyro")

from contracap import __version__
from contracap.cli import bulk
from contracap.cli.ask import ask
from contracap.cli.caption import caption
from contracap.cli.compare import compare, report
from contracap.cli.demo import demo
from contracap.cli.describe import classify, embed
from contracap.cli.flags import registry
from contracap.cli.measure import evaluate
from contracap.cli.messages import fail, is_for_the_user, message, one_interruption, verbosity
from contracap.cli.runs import finetune, plan, quickstart, study, train
from contracap.cli.score import score
from contracap.cli.serve import serve
from contracap.cli.shards import index, make, show
from contracap.cli.weights import convert, inspect, mix, show_sizes, sweep
from contracap.config import ConfigError, SettingsHelp

BROKEN_PIPE = 141  # a shell's status for a program that SIGPIPE ended
CANNOT_PARSE = 2

Commands = Mapping[str, "Callable[..., int | None] | Group"]


@dataclass(frozen=True)
class Group:
    """Commands under a common word."""

    help: str
    commands: Commands


COMMANDS: Commands = {
    "quickstart": quickstart,
    "train": train,
    "finetune": finetune,
    "study": study,
    "evaluate": evaluate,
    "score": score,
    "compare": compare,
    "report": report,
    "caption": caption,
    "ask": ask,
    "classify": classify,
    "embed": embed,
    "demo": demo,
    "serve": serve,
    "plan": plan,
    "bulk": Group(
        "Captions and embeddings of many tar shards, on one machine or many.",
        {"caption": bulk.caption, "embed": bulk.embed},
    ),
    "shards": Group(
        "Make tar shards from any source, index them, and look at them.", {"make": make, "index": index, "show": show}
    ),
    "weights": Group(
        "Look into weights files, convert them to and from open_clip's layout, and mix them.",
        {"list": show_sizes, "inspect": inspect, "convert": convert, "mix": mix, "sweep": sweep},
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 1 for wrong input, or 75 if the same command can continue.

    The status is 2 if the call cannot be parsed, 130 or 143 after Ctrl-C or SIGTERM, and 141 if the reader of stdout
    has gone, as with `| head`.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")  # here, because `catch_warnings` does not work in threads
    logging.basicConfig(format="%(message)s")
    for stream in (sys.stdout, sys.stderr):  # the name of a file may hold bytes that are not text
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            with one_interruption() as interrupted:
                try:
                    return _run(arguments)
                except BaseException as error:  # a lock that the signal met half-way may raise an error of its own
                    if (status := interrupted(error)) is None:
                        raise
                    words = str(error) if isinstance(error, KeyboardInterrupt) else ""  # the command's own, if any
                    if isinstance(error, OSError):  # such as a full disk, while it cleaned up
                        words = f"interrupted: {message(error)}"
                    return fail(words or "interrupted", status=status)
        finally:
            verbosity.take([])
            sys.stdout.flush()  # otherwise a closed pipe is found as the interpreter exits
    except BrokenPipeError as error:
        return BROKEN_PIPE if _reader_has_gone() else fail(message(error))


def _run(arguments: Sequence[str] | None) -> int:
    arguments = verbosity.take(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--version"]:
        print(f"contracap {__version__}")
        return 0
    if (problem := _unknown_command(COMMANDS, arguments)) is not None:
        return fail(problem, status=CANNOT_PARSE)
    if twice := _given_twice(arguments):
        return fail(f"{twice} is given twice: give it once, with all its values after it", status=CANNOT_PARSE)
    if change := _change_as_option(arguments):
        noun = "study" if arguments[0] == "study" else "recipe"
        return fail(f"changes to a {noun} are written KEY=VALUE: {change}", status=CANNOT_PARSE)
    try:
        status = _app(COMMANDS).cli(
            prog="contracap",
            description="Contrastive captioners: train, caption, classify, retrieve, evaluate. All commands also "
            "accept --quiet (only results and errors) and --verbose (tracebacks and debug logs). "
            "`contracap --version` prints the version.",
            args=arguments,
            config=(DisallowNone,),
            registry=registry,
        )
    except SettingsHelp as asked:
        print(asked)
        return 0
    except BrokenPipeError:
        raise
    except Exception as error:
        errors = error.exceptions if isinstance(error, ExceptionGroup) else [error]
        if not all(map(is_for_the_user, errors)):
            raise
        if verbosity.verbose:
            traceback.print_exc()
        problems = [
            text for each in errors for text in (each.problems if isinstance(each, ConfigError) else [message(each)])
        ]
        return max(fail(problem, status=getattr(error, "exit_status", 1)) for problem in problems)
    return status or 0


def _app(commands: Commands) -> SubcommandApp:
    app = SubcommandApp()
    for name, command in commands.items():
        if isinstance(command, Group):
            app.command(_app(command.commands), name=name, help=command.help)
        else:
            app.command(name=name)(command)
    return app


def _given_twice(arguments: Sequence[str]) -> str | None:
    """Return the first option that is repeated: only its last value would count."""
    options = [word.partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--") and word != "--"]
    return next((option for place, option in enumerate(options) if option in options[:place]), None)


def _change_as_option(arguments: Sequence[str]) -> str | None:
    """Return KEY=VALUE if an option that the command does not have was meant as a change to a recipe or a study."""
    command = COMMANDS.get(arguments[0]) if arguments else None
    if not callable(command) or "overrides" not in (parameters := signature(command).parameters):
        return None
    options = [
        "--help",
        *(f"--{each.name}".replace("_", "-") for each in parameters.values() if each.kind == each.KEYWORD_ONLY),
    ]
    for word, value in zip(arguments, [*arguments[1:], "--"], strict=True):
        option, equals, given = word.partition("=")
        if not option.startswith("--") or difflib.get_close_matches(option.replace("_", "-"), options, n=1, cutoff=0.8):
            continue
        key = option.removeprefix("--").replace("-", "_")
        if equals and key:
            return f"{key}={given}"
        if not value.startswith("--"):
            return value if "=" in value else f"{key}={value}"
    return None


def _unknown_command(commands: Commands, arguments: Sequence[str], before: str = "contracap") -> str | None:
    """Return an error message if the first word is neither a command nor an option."""
    if not arguments or arguments[0].startswith("-"):
        return None
    name = arguments[0]
    if f"{before} {name}" == "contracap bench":
        return "benchmarks need a checkout: python -m benchmarks NAME"
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        right = f"did you mean {near[0]!r}?" if near else f"{before} has {', '.join(commands)}"
        return f"unknown command {name!r}: {right}"
    command = commands[name]
    return _unknown_command(command.commands, arguments[1:], f"{before} {name}") if isinstance(command, Group) else None


def _reader_has_gone() -> bool:
    """Return True if nobody reads stdout; then the rest of the output goes to the null device."""
    try:
        print(flush=True)  # stdout may be unbuffered, and hold nothing that a flush alone would write
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
