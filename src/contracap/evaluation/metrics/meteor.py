"""METEOR 1.5, computed by its own program: exact, stem, synonym and paraphrase matches against the best reference.

The jar, its tables and the protocol are those of `pycocoevalcap`, and so are the figures. The protocol has a line SCORE
for each image, then one line EVAL for the set.

Source: Denkowski and Lavie, Meteor Universal (2014).
"""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from subprocess import PIPE, Popen
from tempfile import TemporaryFile
from threading import Event, Thread, Timer
from types import TracebackType
from typing import IO, cast

from contracap.evaluation.metrics.java import LOCALE, JavaError, failure, java_and_jar, java_errors
from contracap.evaluation.metrics.overlap import check_hypotheses

JAR = "meteor/meteor-1.5.jar"
# One garbage-collection thread: the default takes twice the memory, and other metrics use the other core.
COMMAND = ("-XX:+UseSerialGC", "-Xmx2G", *LOCALE, "-jar")
OPTIONS = ("-", "-", "-l", "en", "-norm", "-stdio")
SEPARATOR = "|||"


@dataclass(frozen=True, kw_only=True)
class MeteorScores:
    """METEOR from 0 to 1, of the set and of each image. That of the set is not a mean: it comes from summed counts."""

    corpus: float
    images: list[float]


class Meteor:
    """A context that runs the program. It reads its tables for some seconds: enter it first, and work meanwhile."""

    def __init__(self, *, timeout: float = 3600.0):
        """Find the program.

        Args:
            timeout: seconds for one call of `score` (5,000 images take about ten).

        Raises:
            UnavailableError: if Java or the jar is missing.
        """
        java, jar = java_and_jar(JAR, what="METEOR", instead="Or leave it out: --metrics bleu rouge_l cider")
        self._command = [str(java), *COMMAND, str(jar), *OPTIONS]
        self._timeout = timeout

    def __enter__(self) -> "Meteor":
        """Start the program.

        Raises: JavaError: if it cannot be run.
        """
        with java_errors("METEOR"), ExitStack() as opened:
            self._errors = opened.enter_context(TemporaryFile())  # not a pipe, which would fill if nobody reads it
            self._process = Popen(self._command, stdin=PIPE, stdout=PIPE, stderr=self._errors)
            opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(BrokenPipeError):  # the lines that were not sent yet
                cast(IO[bytes], file).close()

    def score(self, references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> MeteorScores:
        """Score tokenized captions; then the program ends, so call it once.

        Args:
            references: for each image the captions that people wrote.
            hypotheses: for each image the caption of a model.

        Raises:
            ValueError: if an image has no reference or an empty one, or the two lengths differ.
            JavaError: if the program fails, is too slow, or does not answer line for line.
        """
        check_hypotheses(references, hypotheses)
        given_up = Event()
        late = Timer(self._timeout, self._give_up, args=[given_up])
        late.start()
        try:
            lines = [
                f" {SEPARATOR} ".join(["SCORE", *map(plain, captions), plain(hypothesis)])
                for captions, hypothesis in zip(references, hypotheses, strict=True)
            ]
            counts = self._ask(lines, len(lines))
            last = f" {SEPARATOR} ".join(["EVAL", *counts])
            *images, corpus = map(float, self._ask([last], len(lines) + 1, last=True))
        except ValueError as error:
            if given_up.is_set():
                raise JavaError(f"METEOR gave no answer within {self._timeout:g} seconds") from None
            raise error if isinstance(error, JavaError) else JavaError(f"METEOR answered nonsense: {error}") from None
        finally:
            late.cancel()
            late.join()  # otherwise it might end the program of the next call
        return MeteorScores(corpus=corpus, images=images)

    def _give_up(self, given_up: Event) -> None:
        given_up.set()  # set before the program ends, which `score` waits for
        self._process.kill()

    def _ask(self, lines: Sequence[str], answers: int, *, last: bool = False) -> list[str]:
        """Send lines while reading answers, since either pipe may be full. After the last lines the program ends."""
        stdin, stdout = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)
        sender = Thread(target=send, args=(stdin, lines), kwargs={"close": last}, daemon=True)
        sender.start()
        answered = []
        for _ in range(answers):
            line = stdout.readline().decode(errors="replace")
            if not line.endswith("\n"):
                raise self._end_error([*answered, line.strip()], answers)
            answered.append(line.strip())
        sender.join()
        return answered

    def _end_error(self, answered: Sequence[str], wanted: int) -> JavaError:
        status = self._process.wait()
        self._errors.seek(0)
        if written := self._errors.read().strip():
            return failure("METEOR", status, written)
        last = next(filter(None, reversed(answered)), "nothing")
        return JavaError(f"METEOR ended (exit status {status}) before its answer {wanted}; the last was: {last}")


def plain(caption: str) -> str:
    """Return the caption without the protocol's separator. Only blanks end words: a word may hold another space."""
    return " ".join(word for word in caption.replace(SEPARATOR, " ").split(" ") if word)


def send(file: IO[bytes], lines: Sequence[str], *, close: bool) -> None:
    """Write lines. If the reader has gone, the other end reports it."""
    with suppress(OSError, ValueError):
        file.writelines(f"{line}\n".encode(errors="replace") for line in lines)
        file.flush()
        if close:
            file.close()
