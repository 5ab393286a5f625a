"""All caption metrics of a set of captions that can run here."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from contracap.evaluation.metrics.java import JavaError, UnavailableError
from contracap.evaluation.metrics.meteor import Meteor
from contracap.evaluation.metrics.overlap import bleu, check_hypotheses, cider, mean, rouge_l
from contracap.evaluation.metrics.spice import MEMORY, Spice
from contracap.evaluation.metrics.tokens import TokenizerName, choose_tokenizer, tokenize

MetricName = Literal["bleu", "rouge_l", "cider", "meteor", "spice", "cider_plain"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
USUAL = METRICS[:5]
ONE_IMAGE = "CIDEr weighs words by how rare they are among the images: it needs at least 2"


def metric_names(names: Iterable[str]) -> tuple[MetricName, ...]:
    """Return the metrics of these names: those of `METRICS`, or of figures such as `CIDEr` and `Bleu_4`, in any case.

    Raises: ValueError: for an unknown metric.
    """
    found = dict[MetricName, None]()
    for name in (part.strip() for text in names for part in text.split(",")):
        metric = re.sub("^bleu_?[1-4]$", "bleu", name.lower().replace("-", "_"))
        if metric not in METRICS:
            raise ValueError(f"no metric {name!r}; the metrics are {', '.join(METRICS)}")
        found[metric] = None
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of captions against their references.

    Attributes:
        figures: name to value.
        per_sample: the values of each image, for figures that are means over images.
        reasons: why a figure could not be computed.
        details: further keys of the result, such as the tokenizer.
    """

    figures: dict[str, float] = field(default_factory=dict)
    per_sample: dict[str, list[float]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def add_clipscore(self, clip: list[float], both: list[float], *, model: str) -> None:
        """Add CLIPScore and RefCLIPScore of each image, and the name of the model that computed them."""
        self.per_sample.update({"CLIPScore": clip, "RefCLIPScore": both})
        self.figures.update({"CLIPScore": mean(clip), "RefCLIPScore": mean(both)})
        self.details["clipscore_model"] = model


class CaptionScorer:
    """Computes Bleu_1 to Bleu_4, ROUGE_L, CIDEr (which is CIDEr-D), METEOR and SPICE of captions.

    Attributes:
        tokenizer: its tokenizer; if nobody asked for it and it fails, Python's is used.
        reasons: why some of the usual figures cannot be computed here.
    """

    def __init__(
        self,
        *,
        metrics: Sequence[str] = (),
        tokenizer: TokenizerName | None = None,
        corenlp: str | Path | None = None,
        spice_memory: str = MEMORY,
    ):
        """Find the programs that the metrics need, before hours of work.

        Args:
            metrics: metrics to compute; by default all that can run, except `cider_plain`.
            tokenizer: by default Java's if it can run.
            corenlp: folder with the parser of SPICE, CoreNLP 3.6.0; by default that of `CONTRACAP_CORENLP_DIR`.
            spice_memory: the most memory that SPICE may use, in the form of Java's option -Xmx.

        Raises: UnavailableError, JavaError: if a metric or the tokenizer is named and cannot run. ValueError: for an
            unknown metric.
        """
        metrics = metric_names(metrics)
        self.tokenizer = choose_tokenizer(tokenizer)
        self._tokenizer_named = tokenizer is not None
        self.reasons: dict[str, str] = {}
        self._metrics = set(metrics or USUAL)
        self._meteor: Meteor | None = None
        self._spice: Spice | None = None
        if "meteor" in self._metrics:
            try:
                self._meteor = Meteor()
            except UnavailableError as error:
                self._leave_out("METEOR", error, named="meteor" in metrics)
        if "spice" in self._metrics:
            try:
                self._spice = Spice(corenlp, memory=spice_memory)
            except (JavaError, UnavailableError) as error:
                self._leave_out("SPICE", error, named="spice" in metrics)

    def _leave_out(self, figure: str, error: JavaError | UnavailableError, *, named: bool) -> None:
        if named:
            raise error
        self.reasons[figure] = str(error)

    def score(
        self,
        references: Sequence[Sequence[str]],
        predictions: Sequence[str],
        *,
        domains: Sequence[str | None] = (),
        keys: Sequence[str] = (),
    ) -> Scores:
        """Tokenize and score captions.

        If a program fails, only its own figure is missing, with a reason: the captions may have taken hours to write.

        Args:
            references: for each image the captions that people wrote; those without a word are left out.
            predictions: for each image the caption to score.
            domains: for each image the part of the set that it belongs to, such as `near`, or None. Each part gets
                figures of its own, such as `CIDEr_near`, as if it were the whole set.
            keys: names of the images in errors; by default their numbers.

        Raises: ValueError: if an image has no reference with a word in it, or the lengths differ. JavaError: if the
            tokenizer was named and fails.
        """
        with ThreadPoolExecutor(1) as beside, ExitStack() as programs:
            reasons, meteor = dict(self.reasons), None
            if self._meteor is not None:
                try:
                    meteor = programs.enter_context(self._meteor)  # loads while others work
                except JavaError as error:
                    reasons["METEOR"] = str(error)
            written, hypotheses, details = self._tokens(references, predictions)
            for place, captions in enumerate(written):
                if not captions:
                    name, by = keys[place] if keys else f"{place} (counted from 0)", details["tokenizer"]
                    raise ValueError(f"image {name} has no reference in which the tokenizer ({by}) finds a word")
            check_hypotheses(written, hypotheses)
            later = beside.submit(meteor.score, written, hypotheses) if meteor else None
            scores = Scores(reasons=reasons, details=details)
            self._add_counted(scores, written, hypotheses)
            if later:
                try:
                    scores.figures["METEOR"] = later.result().corpus
                except JavaError as error:
                    scores.reasons["METEOR"] = str(error)
        if self._spice:
            self._add_spice(scores, self._spice, written, hypotheses)
        scores.figures.update({name: mean(values) for name, values in scores.per_sample.items()})
        if any(domains):
            self._add_domains(scores, written, hypotheses, domains)
        return scores

    def _tokens(
        self, references: Sequence[Sequence[str]], predictions: Sequence[str]
    ) -> tuple[list[list[str]], list[str], dict[str, Any]]:
        """Return the tokens of the references and of the predictions, and the details about the tokenizer."""
        captions = [*predictions, *(caption for written in references for caption in written)]
        details: dict[str, Any] = {"tokenizer": self.tokenizer}
        try:
            tokens = iter(tokenize(captions, self.tokenizer))
        except (JavaError, UnavailableError) as error:
            if self._tokenizer_named:
                raise
            tokens = iter(tokenize(captions, "python"))
            details = {"tokenizer": "python", "tokenizer_reason": str(error)}
        hypotheses = [next(tokens) for _ in predictions]
        written = [[next(tokens) for _ in captions] for captions in references]
        return [[caption for caption in captions if caption.strip()] for captions in written], hypotheses, details

    def _add_counted(self, scores: Scores, written: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> None:
        """Add BLEU, ROUGE_L and CIDEr."""
        if "bleu" in self._metrics:
            counted = bleu(written, hypotheses)
            scores.figures.update({f"Bleu_{n}": value for n, value in enumerate(counted.scores, start=1)})
            scores.details["bleu_stats"] = {
                "testlen": counted.hypothesis_length,
                "reflen": counted.reference_length,
                "guess": list(counted.guessed),
                "correct": list(counted.correct),
            }
        if "rouge_l" in self._metrics:
            scores.per_sample["ROUGE_L"] = rouge_l(written, hypotheses)
        for name in ("CIDEr", "CIDEr_plain"):
            if name.lower() not in self._metrics:
                continue
            if len(hypotheses) < 2:
                scores.reasons[name] = ONE_IMAGE
            else:
                scores.per_sample[name] = cider(written, hypotheses, plain=name == "CIDEr_plain")

    def _add_spice(
        self, scores: Scores, spice: Spice, written: Sequence[Sequence[str]], hypotheses: Sequence[str]
    ) -> None:
        """Add SPICE. If an image has no score, the mean is null and `reasons` says why, as in coco-caption."""
        try:
            values = spice.score(written, hypotheses)
        except JavaError as error:
            scores.reasons["SPICE"] = str(error)
            return
        broken = [i for i, value in enumerate(values) if math.isnan(value)]
        if broken:
            scores.reasons["SPICE"] = f"SPICE has no score for image {broken[0]} (counted from 0), so none for the set"
        else:
            scores.per_sample["SPICE"] = values

    def _add_domains(
        self,
        scores: Scores,
        written: Sequence[Sequence[str]],
        hypotheses: Sequence[str],
        domains: Sequence[str | None],
    ) -> None:
        places: Mapping[str, list[int]] = defaultdict(list)
        for i, domain in enumerate(domains):
            if domain:
                places[domain].append(i)
        for domain, own in places.items():
            if "cider" in self._metrics:
                if len(own) < 2:
                    scores.reasons[f"CIDEr_{domain}"] = ONE_IMAGE
                else:
                    found = cider([written[i] for i in own], [hypotheses[i] for i in own])
                    scores.figures[f"CIDEr_{domain}"] = mean(found)
            if "SPICE" in scores.per_sample:
                scores.figures[f"SPICE_{domain}"] = mean(scores.per_sample["SPICE"][i] for i in own)
        scores.details["domains"] = {
            "pictures": {domain: len(own) for domain, own in places.items()},
            "cider": "of each domain: how rare an n-gram is comes from the references of that domain alone",
        }


def domain_name(value: object) -> str | None:
    """Return the part of NoCaps that a field `domain` names: `near` for `near-domain`, None for other values."""
    found = value.removesuffix("-domain") if isinstance(value, str) else ""
    return found if found and found != value else None
