"""Pictures to sentences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from contracap.generation.beam import BeamSearch
from contracap.generation.reranking import shortened
from contracap.generation.strategy import Hypothesis, Prompts, Strategy, check_count
from contracap.model.coca import CoCa, evaluating
from contracap.processor import Processor


@dataclass(frozen=True, kw_only=True)
class Caption:
    """One sentence for one picture.

    Attributes:
        text: the sentence.
        token_ids: its ids, between the start and the end token, neither included.
        score: what ranked it, higher is better: `log_probability` / length ** length penalty for beam search,
            `log_probability` / length for greedy decoding; length counts the tokens and the end token.
        log_probability: sum over its tokens and the end token, in nats; a text that `max_tokens` cut has no end token.
        alternatives: the n best for this picture, best first; the first is this caption itself. Beam search gives its
            width of them, greedy decoding one. Alternatives have no alternatives of their own.
    """

    text: str
    token_ids: tuple[int, ...]
    score: float
    log_probability: float
    alternatives: tuple["Caption", ...] = field(default=(), repr=False)


class Captioner:
    """Writes captions with a model and the processor that was loaded with it.

    Raises: ValueError: if the model has no text decoder (a CLIP), or the processor's vocabulary is not the model's.
    """

    def __init__(self, model: CoCa, processor: Processor):
        model.require_decoder()
        tokens, known = processor.tokenizer.vocab_size, model.config.text.vocab_size
        if tokens != known:
            raise ValueError(
                f"the processor's vocabulary has {tokens} tokens, the model's {known}; "
                "use the pair that contracap.load gives"
            )
        self.model, self.processor = model, processor

    def __call__(
        self, sources: Sequence[Any], strategy: Strategy = BeamSearch(), batch_size: int = 16
    ) -> list[Caption]:
        """A caption for each picture (PIL image, path or bytes), in order.

        Args:
            strategy: `BeamSearch(...)` or `Greedy(...)`; its `max_tokens` is cut to the model's context.
            batch_size: pictures at a time; does not change the captions.

        Raises:
            ValueError: if a setting is wrong, or the model gives numbers that are not finite.
            ImageError: if a picture cannot be read; names it.
        """
        if isinstance(sources, (str, bytes)) or not isinstance(sources, Sequence):
            raise ValueError(f"give a list of pictures, such as [picture], not {type(sources).__name__}")
        check_count("batch_size", batch_size, 1, "pictures at a time")
        strategy = self._checked(strategy)
        captions: list[Caption] = []
        for first in range(0, len(sources), batch_size):
            captions += self.generate(self.processor.images(sources[first : first + batch_size]), strategy)
        return captions

    @torch.inference_mode()
    def generate(
        self, pixels: Float[Tensor, "batch 3 height width"], strategy: Strategy = BeamSearch()
    ) -> list[Caption]:
        """A caption for each picture of one batch, as `processor.images` gives it.

        Raises: ValueError: if a setting is wrong, or the model gives numbers that are not finite.
        """
        strategy = self._checked(strategy)
        model, tokenizer = self.model, self.processor.tokenizer
        weight = next(model.vision.parameters())
        with evaluating(model):
            _, caption_tokens = model.encode_caption_tokens(pixels.to(weight))
            images, rows = len(pixels), strategy.rows
            cache = model.start_decoding(caption_tokens, beams=rows, max_tokens=strategy.max_tokens)
            search = strategy.begin(Prompts.empty(images, tokenizer.start, weight.device), tokenizer)
            first_row = torch.arange(images, device=weight.device)[:, None] * rows
            while not search.finished.all():
                now = search.last.shape[1]
                logits = model.decode(search.last.expand(images, rows).reshape(-1, 1), cache)
                parents = search.advance(logits.unflatten(0, (images, rows))[:, :now])
                if parents is not None:
                    cache.reorder((first_row + parents).flatten())
        return [self._caption(hypotheses) for hypotheses in search.hypotheses()]

    def _checked(self, strategy: Strategy) -> Strategy:
        """The strategy, as far as this model can follow it."""
        if isinstance(strategy, type) or not isinstance(strategy, Strategy):
            raise ValueError(f"the strategy must be one such as Greedy() or BeamSearch(width=6), not {strategy!r}")
        return shortened(strategy, self.model.config.text.context)

    def _caption(self, hypotheses: list[Hypothesis]) -> Caption:
        if not hypotheses or not math.isfinite(hypotheses[0].score):
            raise ValueError(
                "the model's logits are not finite (NaN or infinite): its weights are broken, or the pixels are"
            )
        alternatives = tuple(
            Caption(
                text=self.processor.tokenizer.decode(found.token_ids),
                token_ids=found.token_ids,
                score=found.score,
                log_probability=found.log_probability,
            )
            for found in hypotheses
        )
        return replace(alternatives[0], alternatives=alternatives)
