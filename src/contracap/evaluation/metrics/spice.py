"""SPICE: the agreement of captions in objects, attributes and relations, computed by its own program.

The program is in `pycocoevalcap`. Its parser, CoreNLP 3.6.0, is not, and is never downloaded. Another version gives
other scores.

Source: Anderson et al., SPICE: Semantic Propositional Image Caption Evaluation (arXiv 1607.08822).
"""

import json
import math
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from contracap.evaluation.metrics.java import LOCALE, JavaError, UnavailableError, failure, java_and_jar, java_errors
from contracap.evaluation.metrics.overlap import check_hypotheses

JAR = "spice/spice-1.0.jar"
CORENLP_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
CORENLP_VARIABLE = "CONTRACAP_CORENLP_DIR"
MEMORY = "8g"
INSTEAD = "Or leave it out: --metrics bleu rouge_l cider meteor"

# The program's own option -out lays out its JSON with a JavaScript engine, which Java has not had since version 15, and
# -cache reaches into Java's own classes, which version 16 forbids. So neither is used: this asks for the scores.
PROGRAM = """
import edu.anu.spice.SpiceArguments;
import edu.anu.spice.SpiceScorer;
import java.nio.file.Files;
import java.nio.file.Paths;

public class Scores {
    public static void main(String[] files) throws Exception {
        var arguments = SpiceArguments.class.getDeclaredConstructor(String[].class);
        var scorer = SpiceScorer.class.getDeclaredConstructor();
        arguments.setAccessible(true);
        scorer.setAccessible(true);
        var spice = scorer.newInstance();
        spice.scoreBatch(arguments.newInstance((Object) new String[] {files[0], "-silent"}));
        Files.write(Paths.get(files[1]), spice.stats.toJSONString().getBytes("UTF-8"));
    }
}
"""


class Spice:
    """Runs the program with its parser."""

    def __init__(self, corenlp: str | Path | None = None, *, memory: str = MEMORY, timeout: float = 6 * 3600.0):
        """Find the program.

        Args:
            corenlp: folder with the two jars of CoreNLP 3.6.0; by default that of `CONTRACAP_CORENLP_DIR`.
            memory: the most memory that Java may use, in the form of its option -Xmx.
            timeout: seconds for one call of `score`.

        Raises:
            UnavailableError: if Java, its compiler or a jar is missing.
            JavaError: if Java cannot be run.
            ValueError: if `memory` has another form.
        """
        if not re.fullmatch(r"[1-9]\d*[kKmMgG]", memory):
            raise ValueError(
                f"memory for SPICE is {memory!r}; it must be a number with k, m or g after it, such as {MEMORY}"
            )
        java, jar = java_and_jar(JAR, what="SPICE", instead=INSTEAD)
        lib = jar.parent / "lib"
        given = corenlp or os.environ.get(CORENLP_VARIABLE)
        folders = [*([Path(given)] if given else []), lib]
        found = [next((path for folder in folders if (path := folder / name).is_file()), None) for name in CORENLP_JARS]
        parser = [path for path in found if path is not None]
        if len(parser) < len(CORENLP_JARS):
            raise UnavailableError(
                f"SPICE needs CoreNLP 3.6.0, which is not in {folders[0]}: --corenlp-dir DIR "
                "(docs/evaluation.md says where to get it)"
            )
        with java_errors("SPICE"):
            modules = subprocess.run([java, "--list-modules"], capture_output=True, check=False).stdout
        if b"jdk.compiler" not in modules:
            raise UnavailableError(
                f"SPICE needs a JDK, Java 11 or later with its compiler; {java} has none. "
                f"Debian/Ubuntu: apt install default-jdk-headless. {INSTEAD}"
            )
        jars = [jar, *sorted(lib.glob("*.jar")), *parser]
        class_path = os.pathsep.join(str(path.resolve()) for path in jars)
        self._command = [str(java), f"-Xmx{memory}", *LOCALE, "-cp", class_path]
        self._timeout = timeout

    def score(self, references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> list[float]:
        """Return SPICE of each image, from 0 to 1, of tokenized captions; the figure of a set is their mean.

        NaN stands for an image without a score.

        Raises:
            ValueError: if an image has no reference or an empty one, or the two lengths differ.
            JavaError: if the program cannot be run, fails, is too slow, or leaves out images.
        """
        check_hypotheses(references, hypotheses)
        images = [
            {"image_id": i, "test": hypothesis, "refs": list(captions)}
            for i, (captions, hypothesis) in enumerate(zip(references, hypotheses, strict=True))
        ]
        with java_errors("SPICE"), TemporaryDirectory(prefix="contracap-spice-") as folder:
            program, asked, answered = (Path(folder, name) for name in ("Scores.java", "captions.json", "scores.json"))
            program.write_text(PROGRAM, encoding="utf-8")
            asked.write_text(json.dumps(images), encoding="utf-8")
            command = [*self._command, str(program), str(asked), str(answered)]
            try:
                done = subprocess.run(command, cwd=folder, capture_output=True, timeout=self._timeout, check=False)
            except subprocess.TimeoutExpired:
                raise JavaError(f"SPICE gave no answer within {self._timeout:g} seconds") from None
            if done.returncode != 0 or not answered.is_file():
                raise failure("SPICE", done.returncode, error_lines(done.stderr))
            return read_scores(answered.read_text(encoding="utf-8"), len(images))


def error_lines(written: bytes) -> bytes:
    """Return the output of the program from its first error on; before that it tells what it loads."""
    lines = written.splitlines()
    first = next((i for i, line in enumerate(lines) if re.search(rb"Exception|Error|error:", line)), 0)
    return b"\n".join(lines[first:])


def read_scores(text: str, images: int) -> list[float]:
    """Return the F-score of each image in the output of the program.

    Raises:
        JavaError: if it has another layout, or other images.
    """
    try:
        found: dict[int, Any] = {entry["image_id"]: entry["scores"]["All"]["f"] for entry in json.loads(text)}
    except (ValueError, LookupError, TypeError) as error:
        raise JavaError(f"SPICE answered nonsense: {error!r}") from None
    if sorted(found) != list(range(images)):
        raise JavaError(f"SPICE returned scores of {len(found)} images for {images}; refusing to pair them")
    return [math.nan if found[i] is None else float(found[i]) for i in range(images)]
