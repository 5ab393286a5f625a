"""Captioning: captions a model writes, scored against those people wrote."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from contracap.evaluation.features import Source, picture_pixels, sample_batches
from contracap.evaluation.overlap import Bleu, bleu, cider, mean, rouge_l
from contracap.evaluation.tokens import TokenizerName, available_tokenizer, tokenize
from contracap.generation.beam import BeamSearch
from contracap.generation.captioner import Captioner
from contracap.generation.strategy import Strategy
from contracap.model.coca import CoCa
from contracap.processor import Processor

UNAVAILABLE = {
    "METEOR": "METEOR is not computed by this version of contracap",
    "SPICE": "SPICE is not computed by this version of contracap",
}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How well captions match their references.

    Attributes:
        tokenizer: which one made the tokens.
        bleu: of the whole set.
        rouge_l, cider: of each picture; the figure of the set is the mean.
    """

    tokenizer: TokenizerName
    bleu: Bleu
    rouge_l: list[float]
    cider: list[float]

    @property
    def figures(self) -> dict[str, float]:
        """The figures by their names in results."""
        scores = {f"Bleu_{n}": score for n, score in enumerate(self.bleu.scores, start=1)}
        return scores | {"ROUGE_L": mean(self.rouge_l), "CIDEr": mean(self.cider)}

    @property
    def details(self) -> dict[str, Any]:
        """What stands beside the figures in a result."""
        counts = {
            "testlen": self.bleu.hypothesis_length,
            "reflen": self.bleu.reference_length,
            "guess": list(self.bleu.guessed),
            "correct": list(self.bleu.correct),
        }
        return {"tokenizer": self.tokenizer, "bleu_stats": counts}


def score(
    references: Sequence[Sequence[str]], predictions: Sequence[str], *, tokenizer: TokenizerName | None = None
) -> Scores:
    """Scores raw captions: tokenizes all of them in one go, then counts.

    Args:
        references: for each picture the captions people wrote; those without a word are left out.
        predictions: for each picture what is to be scored.
        tokenizer: by default Java's, where it can run.

    Raises:
        ValueError: if a picture has no reference with a word in it, the two lengths differ, or the tokenizer fails.
    """
    tokenizer = tokenizer or available_tokenizer()
    tokens = iter(tokenize([*predictions, *(caption for captions in references for caption in captions)], tokenizer))
    hypotheses = [next(tokens) for _ in predictions]
    written = [[next(tokens) for _ in captions] for captions in references]
    written = [[caption for caption in captions if caption.strip()] for captions in written]
    return Scores(
        tokenizer=tokenizer,
        bleu=bleu(written, hypotheses),
        rouge_l=rouge_l(written, hypotheses),
        cider=cider(written, hypotheses),
    )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model wrote for one picture.

    Attributes:
        captions: what people wrote.
        cider: of this picture within the set, from 0 to 10.
    """

    key: str
    prediction: str
    captions: tuple[str, ...]
    cider: float


class Captioning:
    """Bleu_1 to Bleu_4, ROUGE_L and CIDEr (CIDEr-D) of the captions that a model writes.

    Attributes:
        samples: pictures, once `run` has come to its end; likewise the others.
        reasons: METEOR and SPICE, which are not computed.
        details: which tokenizer was used, and the counts behind BLEU.
        predictions: the captions, in the order of the samples.
    """

    def __init__(
        self,
        source: Source,
        processor: Processor,
        *,
        strategy: Strategy = BeamSearch(),
        tokenizer: TokenizerName | None = None,
        batch_size: int = 16,
    ):
        """Evaluates on `source`.

        Args:
            strategy: how to decode; its `max_tokens` is cut to the model's context.
            tokenizer: by default Java's, where it can run.
            batch_size: pictures decoded at a time.
        """
        self.source, self.processor, self.strategy = source, processor, strategy
        self.tokenizer, self.batch_size = tokenizer or available_tokenizer(), batch_size
        self.samples = 0
        self.keys: list[str] = []
        self.per_sample: dict[str, list[float]] = {}
        self.reasons = dict(UNAVAILABLE)
        self.details: dict[str, Any] = {}
        self.predictions: list[Prediction] = []

    def run(self, model: CoCa) -> Iterator[tuple[str, float]]:
        """Name and value of each figure.

        Raises:
            ValueError: if the model cannot caption, a picture has no caption or cannot be read, or the tokenizer fails.
        """
        captioner = Captioner(model, self.processor)
        keys, captions, texts = [], [], []
        for batch in sample_batches(self.source, self.batch_size):
            for sample in batch:
                if not sample.captions:
                    raise ValueError(f"sample {sample.key} of {sample.shard} has no caption to compare with")
            made = captioner.generate(picture_pixels(batch, self.processor), self.strategy)
            keys += [sample.key for sample in batch]
            captions += [sample.captions for sample in batch]
            texts += [caption.text for caption in made]
        scores = score(captions, texts, tokenizer=self.tokenizer)
        self.samples, self.details = len(texts), scores.details
        self.predictions = [
            Prediction(key=key, prediction=text, captions=written, cider=cider)
            for key, text, written, cider in zip(keys, texts, captions, scores.cider, strict=True)
        ]
        yield from scores.figures.items()
