"""Speed of the caption metrics, next to pycocoevalcap on the same captions."""

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache, partial

from benchmarks.harness import Benchmark, Row, Run, Work, compare, data_path, require_equal
from benchmarks.peers import peer_module
from contracap.evaluation.metrics.scores import CaptionScorer, MetricName
from contracap.evaluation.predictions import Prediction, read_predictions

CAPTIONS = "caption_metrics/magic_coco_magic.json"  # a model's captions of COCO's test images
METRICS: tuple[MetricName, ...] = ("bleu", "rouge_l", "cider", "meteor")
TOLERANCE = 1e-9


@cache
def entries() -> Sequence[Prediction]:
    """One caption for each of 4,982 images, with COCO's captions."""
    return read_predictions(data_path(CAPTIONS))


def score_row(run: Run) -> Row:
    """The whole evaluation, from texts to figures, tokenizer and METEOR included.

    Raises:
        UnavailableError: without Java or pycocoevalcap's jars.
    """
    scorer = CaptionScorer(metrics=METRICS, tokenizer="java")

    def ours() -> dict[str, float]:
        return scorer.score([entry.captions for entry in entries()], [entry.prediction for entry in entries()]).figures

    row = compare(
        f"caption metrics, {len(entries()):,} images: {', '.join(METRICS)}",
        run=run,
        ours=ours,
        checked_peer=partial(checked_peer, ours),
        items=len(entries()),
        unit="pictures/s",
    )
    seconds = " and ".join(f"{len(entries()) / speed:.1f} s" for speed in (row.ours, row.peer) if speed)
    return replace(row, note="; ".join(filter(None, [row.note, seconds])))


def checked_peer(ours: Callable[[], dict[str, float]]) -> tuple[Work, str]:
    """The same by pycocoevalcap, and how far the figures agree."""
    coco = partial(peer_module, package="'contracap[coco]'")
    tokenizer = coco("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer
    scorers = {
        "bleu": partial(coco("pycocoevalcap.bleu.bleu").Bleu, 4),
        "rouge_l": coco("pycocoevalcap.rouge.rouge").Rouge,
        "cider": coco("pycocoevalcap.cider.cider").Cider,
        "meteor": coco("pycocoevalcap.meteor.meteor").Meteor,
    }
    captions = {i: [{"caption": caption} for caption in entry.captions] for i, entry in enumerate(entries())}
    predictions = {i: [{"caption": entry.prediction}] for i, entry in enumerate(entries())}

    def theirs() -> dict[str, float]:
        figures = dict[str, float]()
        with redirect_stdout(io.StringIO()):
            tokens = tokenizer()
            references, hypotheses = tokens.tokenize(captions), tokens.tokenize(predictions)
            for metric in METRICS:
                score, _ = scorers[metric]().compute_score(references, hypotheses)
                if metric == "bleu":
                    figures |= {f"Bleu_{n}": value for n, value in enumerate(score, start=1)}
                else:
                    figures[{"rouge_l": "ROUGE_L", "cider": "CIDEr", "meteor": "METEOR"}[metric]] = score
        return figures

    return theirs, require_equal(ours(), theirs(), tolerance=TOLERANCE)


BENCHMARK = Benchmark(rows={"metrics": score_row}, samples=lambda: len(entries()))
