"""The command line. Whatever needs torch is imported inside the verbs, so that `--help` answers at once."""

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

try:
    from tyro.conf import DisallowNone
    from tyro.extras import SubcommandApp
except ModuleNotFoundError:
    sys.exit("contracap: error: the command line needs the package tyro: pip install tyro")

from contracap.cli import bulk
from contracap.cli.caption import caption
from contracap.cli.compare import compare, report
from contracap.cli.demo import demo
from contracap.cli.errors import fail, is_for_the_user, message
from contracap.cli.measure import bench, evaluate
from contracap.cli.runs import plan, quickstart, study, train
from contracap.cli.score import score
from contracap.cli.serve import serve
from contracap.cli.shards import index, make, show
from contracap.cli.weights import convert, inspect

BROKEN_PIPE = 141  # what a shell says of a program that SIGPIPE ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status: 0, 1 for wrong input, or 75 where the same call can go on. A call that
    cannot be parsed exits with 2, one whose reader has gone, as with `| head`, with 141."""
    for stream in (sys.stdout, sys.stderr):  # the name of a file may hold bytes that are no text
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # else a reader that has gone is found as the interpreter ends
    except BrokenPipeError as error:
        return BROKEN_PIPE if _reader_has_gone() else fail(message(error))


def _run(arguments: Sequence[str] | None) -> int:
    weights = SubcommandApp()
    weights.command(inspect)
    weights.command(convert)
    shards = SubcommandApp()
    for verb in (make, index, show):
        shards.command(verb)
    many = SubcommandApp()
    many.command(bulk.caption)
    many.command(bulk.embed)
    app = SubcommandApp()
    for verb in (quickstart, train, study, evaluate, score, compare, report, caption, demo, serve, plan, bench):
        app.command(verb)
    app.command(many, name="bulk", help="Captions and embeddings of many tar shards, on one machine or many.")
    app.command(shards, name="shards", help="Make tar shards of any source, index them, and look at them.")
    app.command(
        weights, name="weights", help="Look into weights files, and convert them to and from open_clip's layout."
    )
    try:
        status = app.cli(
            prog="contracap",
            description="Contrastive captioners: train, caption, classify, retrieve, evaluate.",
            args=arguments,
            config=(DisallowNone,),
        )
    except KeyboardInterrupt:
        return fail("interrupted", status=130)
    except BrokenPipeError:
        raise
    except Exception as error:
        if not is_for_the_user(error):
            raise
        return fail(message(error), status=getattr(error, "exit_status", 1))
    return status or 0


def _reader_has_gone() -> bool:
    """Whether nobody reads stdout; what is still to be written then goes nowhere, without a complaint."""
    try:
        print(flush=True)  # stdout may be unbuffered, and hold nothing that a flush alone would write
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
