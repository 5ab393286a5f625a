"""How long the metrics of captions take, beside those of pycocoevalcap on the same captions."""

import io
import os
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

from contracap.bench.timing import (
    LEAST_ROUNDS,
    Benchmark,
    Row,
    Work,
    compare,
    peer_module,
    require_equal,
    this_machine,
)
from contracap.evaluation.entries import Entry, read_entries
from contracap.evaluation.scores import CaptionScorer, MetricName

CAPTIONS = Path("caption_metrics") / "magic_coco_magic.json"  # those of a model for the test pictures of COCO
METRICS: tuple[MetricName, ...] = ("bleu", "rouge_l", "cider", "meteor")
TOLERANCE = 1e-9


def bench_score(*, rounds: int = LEAST_ROUNDS) -> Benchmark:
    """Time of the whole evaluation of one caption for each of 4,982 pictures, tokens and METEOR included.

    Raises:
        FileNotFoundError: if there are no captions in the folder that CONTRACAP_DATA names, or ../shared/data.
        UnavailableError: if there is no Java, or no pycocoevalcap.
        UnequalError: if a figure differs; nothing is timed then.
        ValueError: if there are too few rounds.
    """
    machine = this_machine()
    path = Path(os.environ.get("CONTRACAP_DATA") or "../shared/data") / CAPTIONS
    if not path.is_file():
        raise FileNotFoundError(f"no captions at {path}: set CONTRACAP_DATA to a folder with caption_metrics in it")
    entries = read_entries(path)
    return Benchmark(rows=[score_row(entries, rounds=rounds)], samples=len(entries), seed=0, machine=machine)


def score_row(entries: Sequence[Entry], *, rounds: int, clock: Callable[[], float] = time.perf_counter) -> Row:
    """All metrics of these captions, once from the texts to the figures.

    Raises: UnavailableError, UnequalError, ValueError: as `bench_score`.
    """
    scorer = CaptionScorer(metrics=METRICS, tokenizer="java")

    def ours() -> dict[str, float]:
        return scorer.score([entry.captions for entry in entries], [entry.prediction for entry in entries]).figures

    row = compare(
        f"caption metrics, {len(entries):,} pictures: {', '.join(METRICS)}",
        ours=ours,
        checked_peer=partial(checked_peer, entries, ours),
        items=len(entries),
        unit="pictures/s",
        rounds=rounds,
        clock=clock,
    )
    seconds = [f"{len(entries) / speed:.1f} s" for speed in (row.ours, row.peer) if speed]
    return replace(row, note="; ".join([*([row.note] if row.note else []), " and ".join(seconds)]))


def checked_peer(entries: Sequence[Entry], ours: Callable[[], dict[str, float]]) -> tuple[Work, str]:
    """The same by pycocoevalcap, and how far the figures agree.

    Raises:
        NoPeerError: if it cannot be imported.
        UnequalError: if a figure differs.
    """
    coco = partial(peer_module, package="'contracap[coco]'")
    tokenizer = coco("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer
    scorers = {
        "bleu": partial(coco("pycocoevalcap.bleu.bleu").Bleu, 4),
        "rouge_l": coco("pycocoevalcap.rouge.rouge").Rouge,
        "cider": coco("pycocoevalcap.cider.cider").Cider,
        "meteor": coco("pycocoevalcap.meteor.meteor").Meteor,
    }
    captions = {i: [{"caption": caption} for caption in entry.captions] for i, entry in enumerate(entries)}
    predictions = {i: [{"caption": entry.prediction}] for i, entry in enumerate(entries)}

    def theirs() -> dict[str, float]:
        figures = dict[str, float]()
        with redirect_stdout(io.StringIO()):
            tokens = tokenizer()
            written, hypotheses = tokens.tokenize(captions), tokens.tokenize(predictions)
            for metric in METRICS:
                score, _ = scorers[metric]().compute_score(written, hypotheses)
                if metric == "bleu":
                    figures |= {f"Bleu_{n}": value for n, value in enumerate(score, start=1)}
                else:
                    figures[{"rouge_l": "ROUGE_L", "cider": "CIDEr", "meteor": "METEOR"}[metric]] = score
        return figures

    return theirs, require_equal(ours(), theirs(), tolerance=TOLERANCE)
