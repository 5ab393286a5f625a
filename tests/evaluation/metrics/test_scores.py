import json
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest

from contracap.evaluation.metrics.java import JavaError, UnavailableError, find_jar
from contracap.evaluation.metrics.overlap import cider, mean
from contracap.evaluation.metrics.scores import CaptionScorer, domain_name
from contracap.evaluation.metrics.spice import CORENLP_JARS

from ..programs import needs_java, refusing, stand_in, without_java

COUNTED = ("bleu", "rouge_l", "cider")
FIGURES = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
NAMES = ["magic_coco_magic.json", "magic_flickr30k_zerocap.json"]
PICTURES = [["a red ball on the grass"], ["two cats on a sofa"], ["a man rides a horse", "a rider"]]
WRITTEN = ["a red ball", "two cats on a bench", "a man on a horse"]


def published(folder: Path, name: str) -> tuple[list[list[str]], list[str], dict]:
    """Captions, predictions and the scores they have."""
    entries = json.loads((folder / "caption_metrics" / name).read_text())
    expected = json.loads((folder / "caption_metrics" / "expected.json").read_text())["results"][name]
    return [entry["captions"] for entry in entries], [entry["prediction"] for entry in entries], expected


@pytest.mark.parametrize(
    ("name", "metrics", "tokenizer", "digits"),
    [
        pytest.param(NAMES[0], (*COUNTED, "meteor"), "java", 1e-9, marks=[needs_java, pytest.mark.slow]),
        pytest.param(NAMES[1], COUNTED, "java", 1e-9, marks=needs_java),
        pytest.param(NAMES[1], COUNTED, "python", 1e-3),
    ],
)
def test_published_captions_get_their_published_scores(data_folder: Path, name, metrics, tokenizer, digits) -> None:
    captions, predictions, expected = published(data_folder, name)
    scores = CaptionScorer(metrics=metrics, tokenizer=tokenizer).score(captions, predictions)
    assert {*scores.figures} == {*FIGURES} | ({"METEOR"} if "meteor" in metrics else set())
    assert scores.figures == pytest.approx({figure: expected[figure] for figure in scores.figures}, abs=digits)
    assert scores.details["tokenizer"] == tokenizer
    if tokenizer == "java":
        assert scores.details["bleu_stats"] == expected["bleu_stats"]
    for figure in ("ROUGE_L", "CIDEr"):
        assert mean(scores.per_sample[figure]) == scores.figures[figure]


@needs_java
@pytest.mark.slow
def test_the_captions_of_coco_captions_demo_get_their_published_scores(data_folder: Path) -> None:
    path = data_folder / "caption_metrics" / "captions_val2014_fakecap_results.json"
    if not path.is_file():
        pytest.skip(f"no {path}; it is in the repository tylin/coco-caption, under results")
    predictions = {entry["image_id"]: entry["caption"] for entry in json.loads(path.read_text())}
    captions = defaultdict(list)
    with zipfile.ZipFile(find_jar("spice/spice-1.0.jar")) as jar:
        for annotation in json.loads(jar.read("coco/annotations/captions_val2014.json"))["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
    scorer = CaptionScorer(metrics=(*COUNTED, "meteor", "cider_plain"), tokenizer="java")
    scores = scorer.score([captions[image] for image in predictions], list(predictions.values()))
    published = {"Bleu_1": 0.5794, "Bleu_2": 0.404391, "Bleu_3": 0.278536, "Bleu_4": 0.190829, "ROUGE_L": 0.396253}
    published |= {"CIDEr": 0.599791, "METEOR": 0.195255, "CIDEr_plain": 0.711060}
    assert scores.figures == pytest.approx(published, abs=5.1e-7)
    counts = {"guess": [9893, 8893, 7893, 6893], "correct": [5732, 2510, 1043, 423]}
    assert scores.details["bleu_stats"] == {"testlen": 9893, "reflen": 9855, **counts}


def test_references_without_a_word_are_left_out() -> None:
    scorer = CaptionScorer(metrics=COUNTED, tokenizer="python")
    with_empty = scorer.score([["a red ball", ".", ""], ["two cats"]], ["a ball", "two cats"])
    assert with_empty == scorer.score([["a red ball"], ["two cats"]], ["a ball", "two cats"])
    with pytest.raises(ValueError, match=r"image 1 .* no reference"):
        scorer.score([["a red ball"], ["..."]], ["a ball", "two cats"])


def test_without_java_the_rest_comes_out_and_meteor_and_spice_say_why(monkeypatch) -> None:
    without_java(monkeypatch)
    scores = CaptionScorer().score(PICTURES, WRITTEN)
    assert scores.details["tokenizer"] == "python"
    assert list(scores.figures) == FIGURES
    assert scores.reasons["METEOR"].startswith("METEOR needs a Java runtime (8 or later")
    assert scores.reasons["SPICE"].startswith("SPICE needs a Java runtime (8 or later")
    for metric in ("meteor", "spice"):  # which is named, and refused before anything is scored
        with pytest.raises(UnavailableError, match=f"^{metric.upper()} needs a Java runtime"):
            CaptionScorer(metrics=("bleu", metric))
    with pytest.raises(UnavailableError, match="the Java tokenizer needs a Java runtime"):
        CaptionScorer(metrics=COUNTED, tokenizer="java")


# All programs at once: METEOR's protocol on standard input, SPICE's files, and no tokenizer.
ALL = """
if arguments == ["--list-modules"]: sys.exit(print("jdk.compiler"))
if "-stdio" in arguments:
    for line in sys.stdin:
        parts = line.split(" ||| ")
        print(*(["1 1"] if parts[0] == "SCORE" else ["0.25"] * (len(parts) - 1) + ["0.75"]), sep="\\n", flush=True)
else:
    entries = json.load(open(arguments[-2]))
    scores = [{"image_id": e["image_id"], "scores": {"All": {"f": SCORES[e["image_id"]]}}} for e in entries]
    json.dump(scores, open(arguments[-1], "w"))
"""


@pytest.fixture
def corenlp(tmp_path: Path) -> Path:
    for name in CORENLP_JARS:
        (tmp_path / name).touch()
    return tmp_path


def test_meteor_is_of_the_set_and_spice_the_mean_of_its_pictures(monkeypatch, corenlp: Path) -> None:
    stand_in(monkeypatch, corenlp, ALL.replace("SCORES", "[0.0, 0.5, 0.25]"), jar=corenlp / CORENLP_JARS[0])
    scores = CaptionScorer(tokenizer="python", corenlp=corenlp).score(PICTURES, WRITTEN)
    assert scores.figures["METEOR"] == 0.75
    assert scores.figures["SPICE"] == 0.25
    assert set(scores.per_sample) == {"ROUGE_L", "CIDEr", "SPICE"}
    assert scores.reasons == {}


def test_a_set_with_a_picture_without_spice_has_none_and_says_which(monkeypatch, corenlp: Path) -> None:
    stand_in(monkeypatch, corenlp, ALL.replace("SCORES", "[0.0, None, 0.25]"), jar=corenlp / CORENLP_JARS[0])
    scorer = CaptionScorer(metrics=("spice",), tokenizer="python", corenlp=corenlp)
    scores = scorer.score(PICTURES, WRITTEN)
    assert scores.figures == scores.per_sample == {}
    assert scores.reasons == {"SPICE": "SPICE has no score for image 1 (counted from 0), so none for the set"}


def test_a_program_that_fails_costs_its_own_figure_only(monkeypatch, corenlp: Path) -> None:
    body = "if arguments == ['--list-modules']: sys.exit(print('jdk.compiler'))\nsys.exit('Error: no heap')"
    stand_in(monkeypatch, corenlp, body, jar=corenlp / CORENLP_JARS[0])
    scorer = CaptionScorer(metrics=("rouge_l", "meteor", "spice"), tokenizer="python", corenlp=corenlp)
    scores = scorer.score(PICTURES, WRITTEN)
    assert list(scores.figures) == ["ROUGE_L"]
    assert scores.reasons == {name: f"{name} failed (exit status 1): Error: no heap" for name in ("METEOR", "SPICE")}


def test_a_program_that_cannot_be_started_costs_its_own_figure_only(monkeypatch, corenlp: Path) -> None:
    stand_in(monkeypatch, corenlp, ALL, jar=corenlp / CORENLP_JARS[0])
    metrics = ("rouge_l", "meteor", "spice")
    scorer = CaptionScorer(metrics=metrics, corenlp=corenlp)
    assert scorer.tokenizer == "java"
    refusing(monkeypatch)
    scores = scorer.score(PICTURES, WRITTEN)
    assert list(scores.figures) == ["ROUGE_L"]
    said = "could not be run: [Errno 12] Cannot allocate memory"
    assert scores.reasons == {name: f"{name} {said}" for name in ("METEOR", "SPICE")}
    assert scores.details == {"tokenizer": "python", "tokenizer_reason": f"the Java tokenizer {said}"}
    assert CaptionScorer(tokenizer="python", corenlp=corenlp).reasons == {"SPICE": f"SPICE {said}"}
    with pytest.raises(JavaError, match="SPICE could not be run"):
        CaptionScorer(metrics=("spice",), tokenizer="python", corenlp=corenlp)


def test_a_tokenizer_that_nobody_named_and_that_fails_costs_nothing(monkeypatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, tmp_path, "sys.exit('Error: no heap')", jar=tmp_path / "tokenizer.jar")
    scorer = CaptionScorer(metrics=COUNTED)
    assert scorer.tokenizer == "java"
    scores = scorer.score(PICTURES, WRITTEN)
    assert scores.figures == CaptionScorer(metrics=COUNTED, tokenizer="python").score(PICTURES, WRITTEN).figures
    assert scores.details["tokenizer"] == "python"
    assert scores.details["tokenizer_reason"] == "the Java tokenizer failed (exit status 1): Error: no heap"
    with pytest.raises(JavaError, match="no heap"):
        CaptionScorer(metrics=COUNTED, tokenizer="java").score(PICTURES, WRITTEN)


def test_each_domain_is_scored_as_if_it_were_the_whole_set(monkeypatch, corenlp: Path) -> None:
    stand_in(monkeypatch, corenlp, ALL.replace("SCORES", "[0.0, 0.5, 0.25]"), jar=corenlp / CORENLP_JARS[0])
    scorer = CaptionScorer(metrics=("cider", "spice"), tokenizer="python", corenlp=corenlp)
    scores = scorer.score(PICTURES, WRITTEN, domains=["near", None, "near"])
    alone = cider([PICTURES[0], PICTURES[2]], [WRITTEN[0], WRITTEN[2]])
    assert scores.figures["CIDEr_near"] == mean(alone) != scores.figures["CIDEr"]
    assert scores.figures["SPICE_near"] == 0.125
    assert scores.details["domains"]["pictures"] == {"near": 2}
    scores = scorer.score(PICTURES, WRITTEN, domains=["in", "near", "near"])
    assert "CIDEr_in" not in scores.figures and "at least 2" in scores.reasons["CIDEr_in"]
    assert [domain_name(value) for value in ("in-domain", "near-domain", "example.org", 3, None)] == [
        "in", "near", None, None, None,
    ]  # fmt: skip
