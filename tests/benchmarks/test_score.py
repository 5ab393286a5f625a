import json
from pathlib import Path

import pytest

from benchmarks import score
from benchmarks.harness import Run, UnequalError
from contracap.evaluation.metrics.scores import CaptionScorer
from tests.evaluation.programs import needs_java

ENTRIES = [
    {"captions": ["A red ball on the grass.", "a ball"], "prediction": "a red ball"},
    {"captions": ["Two cats on a sofa."], "prediction": "two cats on a bench"},
    {"captions": ["A man rides a horse."], "prediction": "a man on a horse"},
]


@needs_java
# pycocoevalcap leaves its pipes to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_other_figures_than_pycocoevalcap_s_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / score.CAPTIONS
    path.parent.mkdir()
    path.write_text(json.dumps(ENTRIES))
    monkeypatch.setenv("CONTRACAP_DATA", str(tmp_path))
    monkeypatch.setattr(score, "METRICS", ("bleu", "rouge_l", "cider"))  # METEOR takes seconds to begin
    score.entries.cache_clear()
    scorer = CaptionScorer(metrics=score.METRICS, tokenizer="java")
    figures = scorer.score(
        [entry.captions for entry in score.entries()], [entry.prediction for entry in score.entries()]
    ).figures
    _, note = score.checked_peer(lambda: figures)
    assert note.startswith("Bleu_1, Bleu_2, Bleu_3, Bleu_4, ROUGE_L, CIDEr differ by ")
    with pytest.raises(UnequalError, match="CIDEr"):
        score.checked_peer(lambda: figures | {"CIDEr": 1.001 * figures["CIDEr"]})
    score.entries.cache_clear()


def test_captions_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTRACAP_DATA", str(tmp_path))
    score.entries.cache_clear()
    with pytest.raises(FileNotFoundError, match="CONTRACAP_DATA"):
        score.score_row(Run())
