"""Captioning: captions a model writes, scored against those people wrote."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float32
from torch import Tensor

from contracap.data.shards import Sample
from contracap.data.workers import prepared
from contracap.evaluation.clipscore import ClipScorer
from contracap.evaluation.distributed import run_on_every_rank, run_on_rank_0
from contracap.evaluation.features import Source, picture_pixels, sample_batches, with_progress
from contracap.evaluation.scores import CaptionScorer, Scores, domain_name
from contracap.evaluation.spice import MEMORY
from contracap.evaluation.tokens import TokenizerName, has_word
from contracap.generation.beam import BeamSearch
from contracap.generation.captioner import Captioner
from contracap.generation.strategy import Strategy
from contracap.model.coca import CoCa
from contracap.parallel.process_group import ProcessGroup
from contracap.processor import Processor


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model wrote for one picture.

    Attributes:
        captions: what people wrote.
        cider: of this picture within the set, from 0 to 10; None if CIDEr is not among the metrics, or not yet known.
        domain: part of NoCaps that the picture belongs to, such as `near`.
    """

    key: str
    prediction: str
    captions: tuple[str, ...]
    cider: float | None = None
    domain: str | None = None


class Captioning:
    """Bleu_1 to Bleu_4, ROUGE_L, CIDEr (CIDEr-D), METEOR and SPICE of the captions that a model writes.

    Samples with the field `domain` of NoCaps give figures of each domain too: CIDEr_in, CIDEr_near, CIDEr_out, likewise
    of SPICE.

    Attributes:
        samples: pictures, once `run` has come to its end; likewise the others.
        keys: of the samples.
        per_sample: ROUGE_L, CIDEr and others that are means, of each picture.
        reasons: metrics that cannot run here, as METEOR without Java, with the reason.
        details: which tokenizer was used, and the counts behind BLEU.
        predictions: the captions, in the order of the samples, as soon as all are written.
    """

    def __init__(
        self,
        source: Source,
        processor: Processor,
        *,
        strategy: Strategy = BeamSearch(),
        metrics: Sequence[str] = (),
        tokenizer: TokenizerName | None = None,
        corenlp: str | Path | None = None,
        spice_memory: str = MEMORY,
        clipscore: ClipScorer | Literal["self"] | None = None,
        batch_size: int = 16,
        process_group: ProcessGroup = ProcessGroup(),
    ):
        """Evaluates on `source`.

        Args:
            strategy: how to decode; its `max_tokens` is cut to the model's context.
            metrics: which to compute; none means all but `cider_plain`, as far as they can run.
            tokenizer: by default Java's, where it can run.
            corenlp: folder with the parser of SPICE, CoreNLP 3.6.0; by default that of `CONTRACAP_CORENLP_DIR`.
            spice_memory: the most that SPICE may use, as Java's option -Xmx takes it.
            clipscore: judges captions and pictures; `self` means the model that writes the captions, which is no
                impartial judge of them.
            batch_size: pictures decoded at a time.
            process_group: the ranks that run this together. All write every caption, since they may share the model;
                rank 0 computes the metrics for all.

        Raises:
            UnavailableError: if a metric or the tokenizer is named and cannot run.
            ValueError: for a metric that there is not.
        """
        self.source, self.processor, self.strategy, self.batch_size = source, processor, strategy, batch_size
        self.process_group = process_group
        self.scorer = CaptionScorer(metrics=metrics, tokenizer=tokenizer, corenlp=corenlp, spice_memory=spice_memory)
        self.clipscore: ClipScorer | Literal["self"] | None = clipscore
        self.samples = 0
        self.keys: list[str] = []
        self.per_sample: dict[str, list[float]] = {}
        self.reasons = dict(self.scorer.reasons)
        self.details: dict[str, Any] = {}
        self.predictions: list[Prediction] = []

    def run(self, model: CoCa) -> Iterator[tuple[str, float]]:
        """Name and value of each figure.

        Raises:
            ValueError: if the model cannot caption, a picture has no caption with a word in it or cannot be read, or a
                metric fails.
        """
        judge = self.clipscore
        if judge == "self":
            judge = ClipScorer(model, self.processor, name="the model that wrote the captions")
        self.predictions, clip, both = run_on_every_rank(self.process_group, lambda: self._write(model, judge))

        def score() -> Scores:
            scores = self.scorer.score(
                [one.captions for one in self.predictions],
                [one.prediction for one in self.predictions],
                domains=[one.domain for one in self.predictions],
                keys=[one.key for one in self.predictions],
            )
            if judge is not None:
                scores.add_clipscore(clip, both, model=judge.name)
            return scores

        scores = run_on_rank_0(self.process_group, score)
        self.samples, self.keys = len(self.predictions), [one.key for one in self.predictions]
        self.per_sample, self.reasons = scores.per_sample, scores.reasons
        self.details = {"captions": sum(len(one.captions) for one in self.predictions)} | scores.details
        if ciders := scores.per_sample.get("CIDEr"):
            self.predictions = [replace(one, cider=cider) for one, cider in zip(self.predictions, ciders, strict=True)]
        yield from scores.figures.items()

    def _write(self, model: CoCa, judge: ClipScorer | None) -> tuple[list[Prediction], list[float], list[float]]:
        """All captions, and where there is a judge CLIPScore and RefCLIPScore of each."""
        captioner = Captioner(model, self.processor)
        written, clip, both = list[Prediction](), list[float](), list[float]()

        def pixels_of(
            samples: Sequence[Sample],
        ) -> tuple[Float32[Tensor, "batch 3 size size"], Float32[Tensor, "batch 3 judged judged"]]:
            """What the model is fed, and the judge, which may well be fed the same."""
            pixels = picture_pixels(samples, self.processor)
            if judge is None or judge.processor.image_config == self.processor.image_config:
                return pixels, pixels
            return pixels, picture_pixels(samples, judge.processor)

        with prepared(pixels_of, sample_batches(self.source, self.batch_size)) as batches:
            for batch, (pixels, judged) in with_progress(batches, self.source):
                for sample in batch:
                    if not has_word(sample.captions):
                        why = f" ({sample.problem})" if sample.problem else ""
                        raise ValueError(f"{sample.name} has no caption with a word in it to compare with{why}")
                numbers = range(len(written), len(written) + len(batch))
                made = [one.raw_text for one in captioner.generate(pixels, self.strategy, numbers=numbers)]
                if judge is not None:
                    found = judge.score(judged, made, [sample.captions for sample in batch])
                    clip += found[0]
                    both += found[1]
                for sample, text in zip(batch, made, strict=True):
                    domain = domain_name(sample.fields.get("domain"))
                    written.append(Prediction(key=sample.key, prediction=text, captions=sample.captions, domain=domain))
        return written, clip, both
