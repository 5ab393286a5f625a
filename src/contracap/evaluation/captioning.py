"""Captioning: captions that a model writes, scored against those that people wrote."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from jaxtyping import Float32
from torch import Tensor

from contracap.data.samples import Sample
from contracap.data.workers import prepare_ahead
from contracap.evaluation.distributed import run_on_every_rank, run_on_rank_0
from contracap.evaluation.features import Source, image_pixels, open_source, sample_batches, with_progress
from contracap.evaluation.metrics.clipscore import ClipScorer
from contracap.evaluation.metrics.scores import CaptionScorer, Scores, domain_name
from contracap.evaluation.metrics.tokens import has_word
from contracap.evaluation.predictions import Prediction
from contracap.evaluation.result import Result
from contracap.generation.beam import BeamSearch
from contracap.generation.captioner import Captioner
from contracap.generation.strategy import Strategy
from contracap.model.coca import CoCa
from contracap.parallel.process_group import ProcessGroup
from contracap.processor import Processor


def evaluate_captioning(
    model: CoCa,
    processor: Processor,
    data: Source,
    *,
    strategy: Strategy = BeamSearch(),
    scorer: CaptionScorer | None = None,
    clipscore: ClipScorer | Literal["self"] | None = None,
    batch_size: int = 16,
    process_group: ProcessGroup = ProcessGroup(),
    on_predictions: Callable[[Sequence[Prediction]], object] = lambda _: None,
) -> Result[list[Prediction]]:
    """Caption the images and score the captions.

    If samples have the field `domain` of NoCaps, each domain has figures of its own, such as CIDEr_near and SPICE_near.

    Args:
        strategy: the decoding strategy; its `max_tokens` is limited to the model's context.
        scorer: computes the metrics; by default all that can run here.
        clipscore: judges captions and images; `self` means the model that writes the captions, which is not an
            impartial judge of them.
        batch_size: images captioned at a time.
        process_group: the ranks that run this together. All write every caption, since they may share the model;
            rank 0 computes the metrics for all.
        on_predictions: called with all captions before they are scored: a metric may take hours, and fail.

    Raises: ValueError: if the model cannot caption, an image has no caption with a word in it or cannot be read, or a
        metric fails.
    """
    scorer = scorer or CaptionScorer()
    judge = ClipScorer(model, processor, name="the model that wrote the captions") if clipscore == "self" else clipscore
    write = partial(_write_captions, model, processor, data, strategy=strategy, judge=judge, batch_size=batch_size)
    predictions, clip, both = run_on_every_rank(process_group, write)
    on_predictions(predictions)

    def score() -> Scores:
        scores = scorer.score(
            [one.captions for one in predictions],
            [one.prediction for one in predictions],
            domains=[one.domain for one in predictions],
            keys=[one.key for one in predictions],
        )
        if judge is not None:
            scores.add_clipscore(clip, both, model=judge.name)
        return scores

    scores = run_on_rank_0(process_group, score)
    if ciders := scores.per_sample.get("CIDEr"):
        predictions = [replace(one, cider=cider) for one, cider in zip(predictions, ciders, strict=True)]
    return Result.of_samples(
        [one.key for one in predictions],
        scores.figures,
        per_sample=scores.per_sample,
        predictions=predictions,
        details={"captions": sum(len(one.captions) for one in predictions), **scores.details},
        reasons=scores.reasons,
    )


def _write_captions(
    model: CoCa, processor: Processor, data: Source, *, strategy: Strategy, judge: ClipScorer | None, batch_size: int
) -> tuple[list[Prediction], list[float], list[float]]:
    """Return all captions, and CLIPScore and RefCLIPScore of each if there is a judge."""
    captioner = Captioner(model, processor)
    predictions, clip, both = list[Prediction](), list[float](), list[float]()

    def pixels_of(
        samples: Sequence[Sample],
    ) -> tuple[Float32[Tensor, "batch 3 size size"], Float32[Tensor, "batch 3 judged judged"]]:
        """Return the pixels for the model and those for the judge, which may be the same."""
        pixels = image_pixels(samples, processor)
        if judge is None or judge.processor.image_config == processor.image_config:
            return pixels, pixels
        return pixels, image_pixels(samples, judge.processor)

    samples = open_source(data)
    with prepare_ahead(pixels_of, sample_batches(samples, batch_size)) as batches:
        for batch, (pixels, judged) in with_progress(batches, samples):
            for sample in batch:
                if not has_word(sample.captions):
                    why = f" ({sample.problem})" if sample.problem else ""
                    raise ValueError(f"{sample.name} has no caption with a word in it to compare with{why}")
            numbers = range(len(predictions), len(predictions) + len(batch))
            written = [one.raw_text for one in captioner.generate(pixels, strategy, numbers=numbers)]
            if judge is not None:
                found = judge.score(judged, written, [sample.captions for sample in batch])
                clip += found[0]
                both += found[1]
            for sample, text in zip(batch, written, strict=True):
                predictions.append(
                    Prediction(
                        key=sample.key,
                        prediction=text,
                        captions=sample.captions,
                        image_name=_image_name(sample),
                        domain=domain_name(sample.fields.get("domain")),
                    )
                )
    return predictions, clip, both


def _image_name(sample: Sample) -> str | None:
    """Return the name that the image had before it was put in a shard; None if the shard does not tell."""
    name = sample.fields.get("image_name", sample.fields.get("source"))  # with both, `source` is another column
    return name if isinstance(name, str) else None
