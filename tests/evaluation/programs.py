"""A stand-in for Java: a program in Python that takes its place in JAVA_HOME."""

import errno
import sys
from pathlib import Path

import pytest

from contracap.evaluation.metrics import java
from contracap.evaluation.metrics.java import find_jar, find_java

needs_java = pytest.mark.skipif(
    not (find_java() and find_jar("tokenizer/stanford-corenlp-3.4.1.jar")),
    reason="needs Java and pycocoevalcap: make setup",
)


def stand_in(monkeypatch: pytest.MonkeyPatch, home: Path, body: str, *, jar: Path | None = None) -> None:
    """From now on Java is this: `arguments` are those it is called with. Its jars are all `jar`, or the real ones."""
    program = home / "bin" / "java"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(
        f"#!{sys.executable} -IS\nimport json, os, sys, time\narguments = sys.argv[1:]\n"
        f"if arguments == ['-version']: sys.exit()\n{body}"
    )
    program.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(home))
    if jar is not None:
        monkeypatch.setattr(java, "find_jar", lambda name: jar)


def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the system starts no program: there is no memory for one."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("subprocess.run", refuse)
    monkeypatch.setattr("contracap.evaluation.metrics.meteor.Popen", refuse)


def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on there is none."""
    monkeypatch.setenv("JAVA_HOME", "/nowhere")
    monkeypatch.setenv("PATH", "/nowhere")
