"""METEOR 1.5, computed by its own program: exact, stem, synonym and paraphrase matches against the best reference.

The jar, its tables and the protocol (a line SCORE for each image, then one line EVAL for the set) are those of
`pycocoevalcap`, whose figures these equal.

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

from contracap.evaluation.metrics.java import LOCALE, JavaError, failure, java_and_jar, running
from contracap.evaluation.metrics.overlap import check

JAR = "meteor/meteor-1.5.jar"
# One thread for garbage: the default takes twice the memory, and the other core is for the other metrics.
COMMAND = ("-XX:+UseSerialGC", "-Xmx2G", *LOCALE, "-jar")
OPTIONS = ("-", "-", "-l", "en", "-norm", "-stdio")
SEPARATOR = "|||"


@dataclass(frozen=True, kw_only=True)
class MeteorScores:
    """METEOR from 0 to 1, of the set and of each image. The first is not the mean of the others: it is computed from
    summed counts."""

    corpus: float
    pictures: list[float]


class Meteor:
    """The program, from `with` to the end of the block. It reads its tables for some seconds, in which others can work:
    enter it first."""

    def __init__(self, *, timeout: float = 3600.0):
        """Finds the program.

        Args:
            timeout: seconds for one call of `score` (5,000 images take about ten).

        Raises:
            UnavailableError: if Java or the jar is missing.
        """
        java, jar = java_and_jar(JAR, what="METEOR", instead="Or leave it out: --metrics bleu rouge_l cider")
        self._command = [str(java), *COMMAND, str(jar), *OPTIONS]
        self._timeout = timeout

    def __enter__(self) -> "Meteor":
        """Starts the program.

        Raises: JavaError: if it cannot be run.
        """
        with running("METEOR"), ExitStack() as opened:
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
            with suppress(BrokenPipeError):  # of what was still to be sent
                cast(IO[bytes], file).close()

    def score(self, references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> MeteorScores:
        """Scores tokenized captions: `references[i]` are those of image i, `hypotheses[i]` is what a model wrote.
        Once: then the program has ended.

        Raises:
            ValueError: if an image has no reference or an empty one, or the two lengths differ.
            JavaError: if the program fails, is too slow, or does not answer line for line.
        """
        check(references, hypotheses)
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
            *pictures, corpus = map(float, self._ask([last], len(lines) + 1, last=True))
        except ValueError as error:
            if given_up.is_set():
                raise JavaError(f"METEOR gave no answer within {self._timeout:g} seconds") from None
            raise error if isinstance(error, JavaError) else JavaError(f"METEOR answered nonsense: {error}") from None
        finally:
            late.cancel()
            late.join()  # or else it might end the program of the next call
        return MeteorScores(corpus=corpus, pictures=pictures)

    def _give_up(self, given_up: Event) -> None:
        given_up.set()  # before the program ends, which others wait for
        self._process.kill()

    def _ask(self, lines: Sequence[str], answers: int, *, last: bool = False) -> list[str]:
        """Sends lines while it reads the answers: either pipe may be full. Behind the last lines the program ends."""
        stdin, stdout = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)
        sender = Thread(target=send, args=(stdin, lines), kwargs={"close": last}, daemon=True)
        sender.start()
        answered = []
        for _ in range(answers):
            line = stdout.readline().decode(errors="replace")
            if not line.endswith("\n"):
                raise self._ended([*answered, line.strip()], answers)
            answered.append(line.strip())
        sender.join()
        return answered

    def _ended(self, answered: Sequence[str], wanted: int) -> JavaError:
        status = self._process.wait()
        self._errors.seek(0)
        if written := self._errors.read().strip():
            return failure("METEOR", status, written)
        last = next(filter(None, reversed(answered)), "nothing")
        return JavaError(f"METEOR ended (exit status {status}) before its answer {wanted}; the last was: {last}")


def plain(caption: str) -> str:
    """The caption without what separates captions in the protocol. Words end at blanks only: one may hold another
    kind of space."""
    return " ".join(word for word in caption.replace(SEPARATOR, " ").split(" ") if word)


def send(file: IO[bytes], lines: Sequence[str], *, close: bool) -> None:
    """Writes lines; nobody may be there to read them, which is found at the other end."""
    with suppress(OSError, ValueError):
        file.writelines(f"{line}\n".encode(errors="replace") for line in lines)
        file.flush()
        if close:
            file.close()
