import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from contracap.bench import score
from contracap.bench.score import bench_score, checked_peer, score_row
from contracap.bench.timing import NoPeerError, UnequalError
from contracap.evaluation.entries import read_entries
from contracap.evaluation.scores import CaptionScorer, Scores
from tests.evaluation.programs import needs_java

# pycocoevalcap leaves its pipes to the garbage collector.
leaves_files_open = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

ENTRIES = [
    {"captions": ["A red ball on the grass.", "a ball"], "prediction": "a red ball"},
    {"captions": ["Two cats on a sofa."], "prediction": "two cats on a bench"},
    {"captions": ["A man rides a horse."], "prediction": "a man on a horse"},
]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data with a few captions, and no METEOR, which takes seconds to begin."""
    path = tmp_path / "caption_metrics" / "magic_coco_magic.json"
    path.parent.mkdir()
    path.write_text(json.dumps(ENTRIES))
    monkeypatch.setenv("CONTRACAP_DATA", str(tmp_path))
    monkeypatch.setattr(score, "METRICS", ("bleu", "rouge_l", "cider"))
    return path


@needs_java
@leaves_files_open
def test_figures_are_compared_with_the_peers_before_the_clock_runs(data: Path) -> None:
    entries = read_entries(data)

    def ours() -> dict[str, float]:
        scorer = CaptionScorer(metrics=score.METRICS, tokenizer="java")
        return scorer.score([entry.captions for entry in entries], [entry.prediction for entry in entries]).figures

    _, note = checked_peer(entries, ours)
    assert note.startswith("Bleu_1, Bleu_2, Bleu_3, Bleu_4, ROUGE_L, CIDEr differ by ")
    other = [replace(entries[0], prediction="a blue ball"), *entries[1:]]
    with pytest.raises(UnequalError, match=r"Bleu_1 is .*, the peer's"):
        checked_peer(other, ours)


@needs_java
def test_the_row_says_how_long_all_captions_take(monkeypatch, data: Path) -> None:
    monkeypatch.setattr(CaptionScorer, "score", lambda *_, **__: Scores())
    monkeypatch.setattr(score, "checked_peer", lambda *_: (lambda: None, "equal"))
    ticks = iter(range(1000))
    row = score_row(read_entries(data), rounds=7, clock=lambda: float(next(ticks)))
    assert (row.ours, row.peer, row.ratio) == (3.0, 3.0, 1.0)
    assert row.note == "equal; 1.0 s and 1.0 s"


@needs_java
def test_without_the_peer_ours_is_timed_alone(monkeypatch, data: Path) -> None:
    def missing(name: str, package: str) -> None:
        raise NoPeerError("pycocoevalcap is not here")

    monkeypatch.setattr(CaptionScorer, "score", lambda *_, **__: Scores())
    monkeypatch.setattr(score, "peer_module", missing)
    row = bench_score().rows[0]
    assert (row.peer, row.reason) == (None, "pycocoevalcap is not here")


def test_a_peer_that_is_missing_is_told_with_the_extra_that_has_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.tokenizer.ptbtokenizer", None)
    with pytest.raises(NoPeerError, match=r"pycocoevalcap.* cannot be imported .*: pip install 'contracap\[coco\]'"):
        checked_peer([], dict)


def test_captions_that_are_missing_are_named(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONTRACAP_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="set CONTRACAP_DATA to a folder with caption_metrics in it"):
        bench_score()
