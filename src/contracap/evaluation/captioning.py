"""Captioning: captions a model writes, scored against those people wrote."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from contracap.evaluation.clipscore import ClipScorer
from contracap.evaluation.features import Source, picture_pixels, sample_batches
from contracap.evaluation.scores import CaptionScorer, domain_name
from contracap.evaluation.tokens import TokenizerName, has_word
from contracap.generation.beam import BeamSearch
from contracap.generation.captioner import Captioner
from contracap.generation.strategy import Strategy
from contracap.model.coca import CoCa
from contracap.processor import Processor


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model wrote for one picture.

    Attributes:
        captions: what people wrote.
        cider: of this picture within the set, from 0 to 10; None if CIDEr is not among the metrics.
    """

    key: str
    prediction: str
    captions: tuple[str, ...]
    cider: float | None


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
        predictions: the captions, in the order of the samples.
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
        clipscore: ClipScorer | Literal["self"] | None = None,
        batch_size: int = 16,
    ):
        """Evaluates on `source`.

        Args:
            strategy: how to decode; its `max_tokens` is cut to the model's context.
            metrics: which to compute; none means all but `cider_plain`, as far as they can run.
            tokenizer: by default Java's, where it can run.
            corenlp: folder with the parser of SPICE, CoreNLP 3.6.0; by default that of `CONTRACAP_CORENLP_DIR`.
            clipscore: judges captions and pictures; `self` means the model that writes the captions, which is no
                impartial judge of them.
            batch_size: pictures decoded at a time.

        Raises:
            UnavailableError: if a metric or the tokenizer is named and cannot run.
            ValueError: for a metric that there is not.
        """
        self.source, self.processor, self.strategy, self.batch_size = source, processor, strategy, batch_size
        self.scorer = CaptionScorer(metrics=metrics, tokenizer=tokenizer, corenlp=corenlp)
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
        captioner = Captioner(model, self.processor)
        judge = self.clipscore
        if judge == "self":
            judge = ClipScorer(model, self.processor, name="the model that wrote the captions")
        keys, captions, texts, domains = list[str](), list[tuple[str, ...]](), list[str](), list[str | None]()
        suits, suits_both = list[float](), list[float]()
        for batch in sample_batches(self.source, self.batch_size):
            for sample in batch:
                if not has_word(sample.captions):
                    raise ValueError(
                        f"sample {sample.key} of {sample.shard} has no caption with a word in it to compare with"
                    )
            pixels, numbers = picture_pixels(batch, self.processor), range(len(texts), len(texts) + len(batch))
            made = [one.text for one in captioner.generate(pixels, self.strategy, numbers=numbers)]
            written = [sample.captions for sample in batch]
            if judge is not None:
                clip, both = judge.score([sample.image for sample in batch], made, written)
                suits += clip
                suits_both += both
            keys += [sample.key for sample in batch]
            captions += written
            texts += made
            domains += [domain_name(sample.fields.get("domain")) for sample in batch]
        scores = self.scorer.score(captions, texts, domains=domains)
        if judge is not None:
            scores.add_clipscore(suits, suits_both, model=judge.name)
        self.samples, self.keys = len(texts), keys
        self.per_sample, self.reasons, self.details = scores.per_sample, scores.reasons, scores.details
        ciders = scores.per_sample.get("CIDEr") or [None] * len(texts)
        self.predictions = [
            Prediction(key=key, prediction=text, captions=written, cider=cider)
            for key, text, written, cider in zip(keys, texts, captions, ciders, strict=True)
        ]
        yield from scores.figures.items()
