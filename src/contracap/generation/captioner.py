"""Pictures to sentences."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from contracap.config import require_count
from contracap.generation.beam import BeamSearch
from contracap.generation.engine import Engine
from contracap.generation.reranking import split
from contracap.generation.strategy import Hypothesis, Prompts, SearchStrategy, Strategy
from contracap.model.coca import CoCa, evaluating
from contracap.processor import Processor
from contracap.tokenizer import join_marks
from contracap.wording import counted


@dataclass(frozen=True, kw_only=True)
class Caption(Hypothesis):
    """One finished text about one image, as words.

    Attributes:
        text: the sentence, with the prompt that it begins with, written as people do: "a star, above it a circle".
        raw_text: the same with a blank after every word and mark, as the vocabulary has them and as open_clip prints
            it: "a star , above it a circle". Figures are of this one.
        token_ids: its ids with those of the prompt, between the start and the end token, neither included.
        embedding: of the picture, from the same pass: what `encode_image` gives; float32, on the CPU.
        alternatives: the n best for this picture, best first; the first is this caption itself. Alternatives have no
            alternatives of their own.
    """

    text: str
    raw_text: str = field(repr=False)
    embedding: Float[Tensor, "embed"] = field(repr=False, compare=False)
    alternatives: tuple["Caption", ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class EncodedImages:
    """What the model reads of some images: an embedding of each, and the tokens that captions are written from."""

    embeddings: Float[Tensor, "image embed"]
    caption_tokens: Float[Tensor, "image token dim"]

    def select(self, rows: Sequence[int]) -> "EncodedImages":
        """Return these images; one may come several times."""
        return EncodedImages(self.embeddings[rows], self.caption_tokens[rows])


class Captioner:
    """Writes captions with a model and the processor that was loaded with it.

    Args:
        compiled: as in `Engine`: faster steps after a slow first batch.

    Raises: ValueError: if the model has no text decoder (a CLIP), or the processor's vocabulary is not the model's.
    """

    def __init__(self, model: CoCa, processor: Processor, *, compiled: bool = False):
        model.require_decoder()
        tokens, known = processor.tokenizer.vocab_size, model.config.text.vocab_size
        if tokens != known:
            raise ValueError(
                f"the processor's vocabulary has {tokens} tokens, the model's {known}; "
                "use the pair that contracap.load gives"
            )
        self.model, self.processor = model, processor
        self.engine = Engine(model, compiled=compiled)

    def __call__(
        self,
        sources: Sequence[Any],
        strategy: Strategy = BeamSearch(),
        batch_size: int = 16,
        prompts: str | Sequence[str] = "",
    ) -> list[Caption]:
        """A caption for each picture (PIL image, path or bytes), in order.

        Args:
            strategy: such as `BeamSearch(...)`; its `max_tokens` is cut to the model's context.
            batch_size: pictures at a time; does not change the captions.
            prompts: what the captions begin with, such as "a photo of": one for all pictures, or one for each.

        Raises:
            ValueError: if a setting is wrong, a prompt leaves no room for a caption, or the model gives numbers that
                are not finite.
            ImageError: if a picture cannot be read; names it.
        """
        if isinstance(sources, (str, bytes)) or not isinstance(sources, Sequence):
            raise ValueError(f"give a list of pictures, such as [picture], not {type(sources).__name__}")
        require_count("batch_size", batch_size, 1, "pictures at a time")
        self._split(strategy)
        begun = self._begun(prompts, len(sources))
        captions: list[Caption] = []
        for first in range(0, len(sources), batch_size):
            last = first + batch_size
            pixels = self.processor.images(sources[first:last])
            numbers = range(first, first + len(pixels))
            captions += self.write(self.encode(pixels), strategy, begun[first:last], numbers)
        return captions

    def generate(
        self,
        pixels: Float[Tensor, "batch 3 height width"],
        strategy: Strategy = BeamSearch(),
        prompts: str | Sequence[str] = "",
        numbers: Sequence[int] | None = None,
        go_on: Callable[[], object] = lambda: None,
    ) -> list[Caption]:
        """A caption for each picture of one batch, as `processor.images` gives it.

        Args:
            numbers: of the pictures; what is sampled depends on the seed and on these alone. By default their places.
            go_on: called before each token; what it raises ends the work.

        Raises: ValueError: as a call does.
        """
        if pixels.ndim != 4:
            raise ValueError(f"pixels must be [batch 3 height width], not {list(pixels.shape)}")
        numbers = range(len(pixels)) if numbers is None else numbers
        if len(numbers) != len(pixels):
            raise ValueError(
                f"{counted(len(numbers), 'number(s)')} for {counted(len(pixels), 'image(s)')}: give one for each"
            )
        self._split(strategy)
        begun = self._begun(prompts, len(pixels))
        return self.write(self.encode(pixels), strategy, begun, numbers, go_on) if len(pixels) else []

    def check(self, strategy: Strategy, prompt: str = "") -> None:
        """Raises: ValueError: if this model cannot write so, whatever the picture."""
        tokenizer = self.processor.tokenizer
        prompts = _prompts(self._begun(prompt, 1), [0], start=tokenizer.start, device=self.model.device)
        writer, _ = self._split(strategy)
        writer.begin(prompts, tokenizer)

    @torch.inference_mode()
    def encode(self, pixels: Float[Tensor, "image 3 height width"]) -> EncodedImages:
        """Return what `write` reads of the images."""
        with evaluating(self.model):
            return EncodedImages(*self.model.encode_caption_tokens(pixels.to(next(self.model.vision.parameters()))))

    @torch.inference_mode()
    def write(
        self,
        images: EncodedImages,
        strategy: Strategy,
        begun: Sequence[Sequence[int]],
        numbers: Sequence[int],
        go_on: Callable[[], object] = lambda: None,
    ) -> list[Caption]:
        """Return a caption for each image.

        Args:
            begun: the tokens of each prompt, without the start token.
            numbers, go_on: as in `generate`.

        Raises: ValueError: as a call does.
        """
        writer, is_reranked = self._split(strategy)
        model, tokenizer = self.model, self.processor.tokenizer
        prompts = _prompts(begun, numbers, start=tokenizer.start, device=model.device)
        with evaluating(model):
            found = self.engine.write(images.caption_tokens, writer, prompts, tokenizer, go_on)
            texts = [
                self._texts(hypotheses, prompt, embedding)
                for hypotheses, prompt, embedding in zip(found, begun, images.embeddings.float().cpu(), strict=True)
            ]
            if is_reranked:
                texts = self._reranked(texts)
        return [replace(alternatives[0], alternatives=tuple(alternatives)) for alternatives in texts]

    def _split(self, strategy: Strategy) -> tuple[SearchStrategy, bool]:
        """Return what writes, as far as this model's context reaches, and whether its texts are ranked again."""
        if isinstance(strategy, type) or not isinstance(strategy, Strategy):
            raise ValueError(f"the strategy must be one such as Greedy() or BeamSearch(width=6), not {strategy!r}")
        writer, is_reranked = split(strategy)
        context = self.model.config.text.context
        return replace(writer, max_tokens=min(writer.max_tokens, context)), is_reranked

    def _begun(self, prompts: str | Sequence[str], pictures: int) -> list[list[int]]:
        """The tokens that each caption begins with, behind the start token."""
        texts = [prompts] * pictures if isinstance(prompts, str) else list(prompts)
        if len(texts) != pictures:
            given = f"{counted(len(texts), 'prompt(s)')} for {counted(pictures, 'image(s)')}"
            raise ValueError(f"{given}: give one for all, or one for each")
        tokenizer = self.processor.tokenizer
        begun = [tokenizer.encode(text) for text in texts]
        for text, ids in zip(texts, begun, strict=True):
            if tokenizer.start in ids or tokenizer.end in ids:
                raise ValueError(f"the prompt {text!r} names the start or the end token, which stand around a caption")
        return begun

    def _texts(
        self, hypotheses: list[Hypothesis], prompt: Sequence[int], embedding: Float[Tensor, "embed"]
    ) -> list[Caption]:
        if not hypotheses or not math.isfinite(hypotheses[0].score):
            raise ValueError(
                "no text was found: the model's logits are not finite (NaN or infinite), since its weights are broken "
                "or the pixels are; or the rules and lengths leave no text"
            )
        decode = self.processor.tokenizer.decode
        raw = [decode([*prompt, *found.token_ids]) for found in hypotheses]
        return [
            Caption(
                text=join_marks(text),
                raw_text=text,
                **vars(found) | {"token_ids": (*prompt, *found.token_ids)},
                embedding=embedding,
            )
            for found, text in zip(hypotheses, raw, strict=True)
        ]

    def _reranked(self, texts: list[list[Caption]]) -> list[list[Caption]]:
        """The texts about each picture, by the cosine of their embeddings to its own."""
        tokenizer, context = self.processor.tokenizer, self.model.config.text.context
        ids = torch.full((sum(map(len, texts)), context), tokenizer.end)
        for row, text in zip(ids, (text for alternatives in texts for text in alternatives), strict=True):
            kept = text.token_ids[: context - 2]  # the end token stands in the last place at the latest
            row[: len(kept) + 1] = torch.tensor([tokenizer.start, *kept])
        embeddings = self.model.encode_text(ids.to(self.model.device)).float().cpu()
        ranked = []
        for alternatives, own in zip(texts, embeddings.split([len(found) for found in texts]), strict=True):
            cosines = (own @ alternatives[0].embedding).tolist()
            scored = (replace(text, score=cosine) for text, cosine in zip(alternatives, cosines, strict=True))
            ranked.append(sorted(scored, key=lambda text: -text.score))
        return ranked


def _prompts(begun: Sequence[Sequence[int]], numbers: Sequence[int], *, start: int, device: torch.device) -> Prompts:
    longest = max((len(tokens) for tokens in begun), default=0) + 1
    ids = torch.full((len(begun), longest), start)
    for row, tokens in zip(ids, begun, strict=True):
        row[1 : len(tokens) + 1] = torch.tensor(tokens, dtype=torch.int64)
    lengths = torch.tensor([len(tokens) + 1 for tokens in begun], dtype=torch.int64)
    return Prompts(*(values.to(device) for values in (ids, lengths, torch.tensor(numbers, dtype=torch.int64))))
