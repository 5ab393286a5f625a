import json
import math
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from contracap.evaluation.metrics.java import JavaError, UnavailableError, find_java
from contracap.evaluation.metrics.spice import CORENLP_JARS, Spice

from ..programs import needs_java, stand_in, without_java

MODULES = "if arguments == ['--list-modules']: print('jdk.compiler@17'); sys.exit()\n"
# Answers with the share of the references' words that the caption has, and tells nothing of captions without words.
SHARES = MODULES + (
    """
program, asked, answered = arguments[-3:]
open(os.path.join(KEPT, "called"), "w").write(json.dumps([arguments, os.getcwd()]))
print("Loading", file=sys.stderr)
scores = []
for entry in json.load(open(asked)):
    found = set(entry["test"].split())
    wanted = {word for caption in entry["refs"] for word in caption.split()}
    f = len(found & wanted) / len(wanted) if found else None
    scores.append({"image_id": entry["image_id"], "scores": {"All": {"f": f, "pr": 1.0}}})
json.dump(scores[::-1], open(answered, "w"))
"""
)

# The program's classes as Spice's own Java calls them, with a scorer that scores the first image .25.
STUBS = {
    "SpiceArguments": "public class SpiceArguments { String[] given; SpiceArguments(String[] given) { "
    "this.given = given; } }",
    "SpiceStats": "public class SpiceStats { public String toJSONString() { "
    'return "[{\\"image_id\\": 0, \\"scores\\": {\\"All\\": {\\"f\\": 0.25}}}]"; } }',
    "SpiceScorer": "public class SpiceScorer { public SpiceStats stats; SpiceScorer() {} "
    "public void scoreBatch(SpiceArguments arguments) { "
    'if (!arguments.given[1].equals("-silent") || arguments.given.length != 2) throw new RuntimeException("-"); '
    "stats = new SpiceStats(); } }",
}


@pytest.fixture
def corenlp(tmp_path: Path) -> Path:
    """A folder with jars of the right names, and nothing in them."""
    folder = tmp_path / "corenlp"
    folder.mkdir()
    for name in CORENLP_JARS:
        with zipfile.ZipFile(folder / name, "w") as jar:
            jar.writestr("empty", "")
    return folder


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The jar of SPICE in a package of its own."""
    jar = tmp_path / "spice" / "spice-1.0.jar"
    (jar.parent / "lib").mkdir(parents=True)
    (jar.parent / "lib" / "guava-19.0.jar").touch()
    jar.touch()
    return jar


def test_scores_come_back_in_the_order_of_the_pictures_nan_where_there_is_none(
    monkeypatch, tmp_path: Path, corenlp, package
) -> None:
    stand_in(monkeypatch, tmp_path, SHARES.replace("KEPT", repr(str(tmp_path))), jar=package)
    before = sorted(package.parent.rglob("*"))
    scores = Spice(corenlp, memory="4g").score(
        [["a red café"], ["two cats"], ["a dog"], ["a dog"]], ["a red bus", "cats", "a dog", ""]
    )
    assert scores[:3] == [pytest.approx(2 / 3), 0.5, 1.0] and math.isnan(scores[3])
    (called, folder) = json.loads((tmp_path / "called").read_text())
    assert {"-Xmx4g", "-Duser.language=en", "-Duser.country=US"} < set(called)
    jars = called[called.index("-cp") + 1].split(":")
    assert [Path(jar).name for jar in jars] == ["spice-1.0.jar", "guava-19.0.jar", *CORENLP_JARS]
    assert "-cache" not in called and "-out" not in called
    assert not Path(folder).exists()  # and nothing is left in the package
    assert sorted(package.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print('INFO\\nException in main: No heap', file=sys.stderr); sys.exit(1)", "1.*: Exception.*No h"),
        ("open(arguments[-1], 'w').write('[]')", "SPICE returned scores of 0 images for 1; refusing to pair them"),
        ("open(arguments[-1], 'w').write('oh')", "SPICE answered nonsense: JSONDecodeError"),
        ("time.sleep(60)", r"SPICE gave no answer within 0\.5 seconds"),
    ],
)
def test_a_failing_program_says_why(monkeypatch, tmp_path: Path, corenlp, package, body: str, message: str) -> None:
    stand_in(monkeypatch, tmp_path, MODULES + body, jar=package)
    with pytest.raises(JavaError, match=message):
        Spice(corenlp, timeout=0.5 if "sleep" in body else 60.0).score([["a dog"]], ["a dog"])


def test_a_folder_that_cannot_be_made_is_the_programs_failure(monkeypatch, tmp_path: Path, corenlp, package) -> None:
    stand_in(monkeypatch, tmp_path, MODULES, jar=package)
    program = Spice(corenlp)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(JavaError, match=r"^SPICE could not be run: .*No such file or directory"):
        program.score([["a dog"]], ["a dog"])


def test_what_is_missing_is_said_with_where_to_get_it(monkeypatch, tmp_path: Path, corenlp, package) -> None:
    with monkeypatch.context() as patch:
        without_java(patch)
        with pytest.raises(
            UnavailableError, match=r"^SPICE needs a Java runtime .*--metrics bleu rouge_l cider meteor$"
        ):
            Spice(corenlp)
    stand_in(monkeypatch, tmp_path, MODULES, jar=package)
    monkeypatch.delenv("CONTRACAP_CORENLP_DIR", raising=False)
    for given, looked in ((tmp_path / "bin", tmp_path / "bin"), (None, package.parent / "lib")):
        with pytest.raises(UnavailableError, match=r"CoreNLP 3\.6\.0.*--corenlp-dir") as found:
            Spice(given)
        assert str(looked) in str(found.value)
        assert len(str(found.value)) < 120 + len(str(looked))
    monkeypatch.setenv("CONTRACAP_CORENLP_DIR", str(corenlp))
    Spice()
    with pytest.raises(ValueError, match="memory for SPICE is '8 gigabytes'"):
        Spice(memory="8 gigabytes")
    stand_in(monkeypatch, tmp_path, "print('java.base@17')")
    with pytest.raises(UnavailableError, match=r"SPICE needs a JDK.*apt install default-jdk-headless"):
        Spice()


def test_the_jars_of_the_package_serve_where_pycocoevalcap_has_fetched_them(monkeypatch, tmp_path, corenlp, package):
    stand_in(monkeypatch, tmp_path, SHARES.replace("KEPT", repr(str(tmp_path))), jar=package)
    monkeypatch.delenv("CONTRACAP_CORENLP_DIR", raising=False)
    for name in CORENLP_JARS:
        shutil.copy(corenlp / name, package.parent / "lib")
    assert Spice().score([["a dog"]], ["a dog"]) == [1.0]


@needs_java
def test_the_real_program_runs_until_it_misses_its_parser(corenlp: Path) -> None:
    with pytest.raises(JavaError, match=r"SPICE failed .*NoClassDefFoundError: edu/stanford/nlp/"):
        Spice(corenlp).score([["a dog"]], ["a dog"])


@pytest.mark.skipif(not (find_java() and shutil.which("javac")), reason="needs a JDK")
def test_the_scores_are_asked_of_the_program_without_its_own_output(monkeypatch, tmp_path: Path, corenlp) -> None:
    sources = tmp_path / "edu" / "anu" / "spice"
    sources.mkdir(parents=True)
    for name, text in STUBS.items():
        (sources / f"{name}.java").write_text(f"package edu.anu.spice; {text}")
    subprocess.run(["javac", *map(str, sources.glob("*.java"))], check=True, cwd=tmp_path)
    jar = tmp_path / "spice-1.0.jar"
    with zipfile.ZipFile(jar, "w") as archive:
        for file in sources.glob("*.class"):
            archive.write(file, file.relative_to(tmp_path))
    monkeypatch.setattr("contracap.evaluation.metrics.java.find_jar", lambda name: jar)
    assert Spice(corenlp).score([["a dog"]], ["a dog"]) == [0.25]
