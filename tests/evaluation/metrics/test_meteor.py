import json
import os
import threading
from pathlib import Path

import pytest

from contracap.evaluation.metrics import meteor
from contracap.evaluation.metrics.java import JavaError, UnavailableError
from contracap.evaluation.metrics.meteor import OPTIONS, Meteor, MeteorScores

from ..programs import needs_java, refusing, stand_in, without_java

# Answers as METEOR does: three numbers for an image, then how many words each caption has.
ECHO = """
for line in sys.stdin:
    kind, *parts = line.rstrip("\\n").split(" ||| ")
    if kind == "SCORE":
        print(len(parts), len(parts[-1].split()), flush=True)
    else:
        print(*(part.split()[1] for part in parts), 0.5, sep="\\n", flush=True)
"""


@needs_java
def test_meteor_equals_pycocoevalcap(monkeypatch) -> None:
    # All but the paraphrases, whose table takes seconds to read, and which none of these has.
    monkeypatch.setattr(meteor, "OPTIONS", (*OPTIONS, "-m", "exact stem synonym"))
    references = [
        ["a man is riding a brown horse on the beach", "someone rides a horse"],
        ["two cats sleep on a sofa"],
        ["a red bus"],
    ]
    with Meteor() as program:
        scores = program.score(references, ["a man rides a horse at the shore", "", "a red bus"])
    assert scores == MeteorScores(corpus=0.2893185837124105, images=[0.3328885725327551, 0.0, 1.0])


@needs_java
def test_separators_in_captions_are_no_separators() -> None:
    with Meteor() as program:
        scores = program.score([["a red ||| bus"], ["two cats"]], ["a ||| red bus|||", "two cats"])
    assert scores == MeteorScores(corpus=1.0, images=[1.0, 1.0])


def test_more_pictures_than_the_pipes_hold_are_scored(monkeypatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, tmp_path, ECHO, jar=tmp_path / "meteor.jar")
    references = [["word " * 200] * 3 for _ in range(1000)]  # 3 MB, and no one reads the first answers
    with Meteor() as program:
        scores = program.score(references, ["one two three"] * 1000)
    assert scores == MeteorScores(corpus=0.5, images=[3.0] * 1000)


def test_java_is_called_for_english_whatever_the_users_language(monkeypatch, tmp_path: Path) -> None:
    body = f"open({str(tmp_path / 'called')!r}, 'w').write(json.dumps(arguments))\n{ECHO}"
    stand_in(monkeypatch, tmp_path, body, jar=tmp_path / "meteor.jar")
    with Meteor() as program:
        program.score([["a dog"]], ["a dog"])
    called = json.loads((tmp_path / "called").read_text())
    assert {"-Xmx2G", "-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8"} < set(called)
    assert called[called.index("-jar") :] == ["-jar", str(tmp_path / "meteor.jar"), *meteor.OPTIONS]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit('\\nOutOfMemoryError: Java heap\\nat line 3')", r"exit status 1\): OutOfMemoryError: Java hea"),
        ("for line in sys.stdin: print('no', 'number', sep='\\n', flush=True)", "METEOR answered nonsense: .*no"),
        ("print('1 2', flush=True); sys.stdin.readline(); os._exit(3)", r"exit status 3.*before its answer 2"),
    ],
)
def test_a_failing_program_says_why(monkeypatch, tmp_path: Path, body: str, message: str) -> None:
    stand_in(monkeypatch, tmp_path, body, jar=tmp_path / "meteor.jar")
    with Meteor(timeout=60.0) as program, pytest.raises(JavaError, match=message):
        program.score([["a dog"], ["a cat"]], ["a dog", "a cat"])


def test_a_program_that_hangs_is_given_up(monkeypatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, tmp_path, "time.sleep(60)", jar=tmp_path / "meteor.jar")
    with Meteor(timeout=0.1) as program, pytest.raises(JavaError, match=r"no answer within 0\.1 seconds"):
        program.score([["a dog"]], ["a dog"])


def test_a_program_that_cannot_be_started_says_why(monkeypatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, tmp_path, ECHO, jar=tmp_path / "meteor.jar")
    program = Meteor()
    refusing(monkeypatch)
    with pytest.raises(JavaError, match=r"^METEOR could not be run: .*Cannot allocate memory"), program:
        pytest.fail("it was started")


def test_no_process_and_no_thread_is_left_behind(monkeypatch, tmp_path: Path) -> None:
    body = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\nprint('1 1', flush=True)\ntime.sleep(60)"
    stand_in(monkeypatch, tmp_path, body, jar=tmp_path / "meteor.jar")
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), Meteor() as program:
        assert program._ask(["SCORE ||| a dog ||| a dog"], 1) == ["1 1"]
        raise KeyboardInterrupt
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert threading.active_count() == before


def test_without_java_or_jar_the_message_says_what_to_install(monkeypatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        without_java(patch)
        with pytest.raises(UnavailableError, match=r"needs a Java runtime.*apt install .*--metrics bleu rouge_l cider"):
            Meteor()
    stand_in(monkeypatch, tmp_path, ECHO)
    monkeypatch.setattr("contracap.evaluation.metrics.java.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"needs pycocoevalcap: pip install 'contracap\[coco\]'"):
        Meteor()
