"""The captioner: images to captions."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from contracap.config import require_count
from contracap.generation.beam import BeamSearch
from contracap.generation.decoding import DecodingLoop
from contracap.generation.reranking import ContrastiveReranking
from contracap.generation.strategy import FinishedText, Prompts, Strategy
from contracap.model.coca import CoCa, evaluating
from contracap.processor import Processor
from contracap.tokenizer import join_marks
from contracap.wording import counted


@dataclass(frozen=True, kw_only=True)
class Caption(FinishedText):
    """A finished text in words, with the image that it is about.

    Attributes:
        text: the sentence, including the prompt, with normal punctuation: "a star, above it a circle".
        raw_text: the same with a space after every word and punctuation mark, as open_clip prints it: "a star , above
            it a circle". Metrics use this one.
        token_ids: ids of the prompt and the generated tokens, without start and end token.
        embedding: contrastive embedding of the image, as `encode_image` returns it; float32, on the CPU.
        alternatives: the n best captions of this image, best first; the first is this one. Alternatives have no
            alternatives of their own.
    """

    text: str
    raw_text: str = field(repr=False)
    embedding: Float[Tensor, "embed"] = field(repr=False, compare=False)
    alternatives: tuple["Caption", ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class EncodedImages:
    """Contrastive embeddings and caption tokens of images."""

    embeddings: Float[Tensor, "batch embed"]
    caption_tokens: Float[Tensor, "batch caption_token width"]

    def select(self, images: Sequence[int]) -> "EncodedImages":
        """Return these images; an image may be repeated."""
        return EncodedImages(self.embeddings[images], self.caption_tokens[images])


class Captioner:
    """Writes captions with a model and its processor.

    Args:
        compiled: as in `DecodingLoop`: faster steps after a slow first batch.

    Raises:
        ValueError: if the model has no text decoder (a CLIP), the processor's vocabulary is not the model's, or a
            compiled model is in bf16 on a CPU.
    """

    def __init__(self, model: CoCa, processor: Processor, *, compiled: bool = False):
        model.require_decoder()
        tokens, known = processor.tokenizer.vocab_size, model.config.text.vocab_size
        if tokens != known:
            raise ValueError(
                f"the processor's vocabulary has {tokens} tokens, the model's {known}: "
                "use a model and a processor from the same call of contracap.load"
            )
        if compiled and model.precision == "bf16" and model.device.type == "cpu":
            raise ValueError("compiled steps compute in fp32 on a CPU: leave out --precision bf16, or --compiled")
        self.model, self.processor = model, processor
        self.decoding = DecodingLoop(model, compiled=compiled)

    def __call__(
        self,
        sources: Sequence[Any],
        strategy: Strategy = BeamSearch(),
        batch_size: int = 16,
        prompts: str | Sequence[str] = "",
    ) -> list[Caption]:
        """Return a caption for each image (PIL image, path or bytes), in order.

        Args:
            strategy: such as `BeamSearch(...)`; its `max_tokens` is limited to the model's context.
            batch_size: images at a time; does not change the captions.
            prompts: the beginning of the captions, such as "a photo of": one for all images, or one for each.

        Raises:
            ValueError: if a setting is wrong, a prompt leaves no room for a caption, or the model's logits are not
                finite.
            ImageError: if an image cannot be read; names it.
        """
        if isinstance(sources, (str, bytes)) or not isinstance(sources, Sequence):
            raise ValueError(f"the images must be a list, such as [image], not {type(sources).__name__}")
        require_count("batch_size", batch_size, 1, "images at a time")
        self._limit(strategy)
        prompt_ids = self._encode_prompts(prompts, len(sources))
        captions: list[Caption] = []
        for first in range(0, len(sources), batch_size):
            last = first + batch_size
            pixels = self.processor.images(sources[first:last])
            numbers = range(first, first + len(pixels))
            captions += self.write(self.encode(pixels), strategy, prompt_ids[first:last], numbers)
        return captions

    def generate(
        self,
        pixels: Float[Tensor, "batch 3 height width"],
        strategy: Strategy = BeamSearch(),
        prompts: str | Sequence[str] = "",
        numbers: Sequence[int] | None = None,
        before_step: Callable[[], object] = lambda: None,
    ) -> list[Caption]:
        """Return a caption for each image of one batch, as returned by `processor.images`.

        Args:
            numbers: one per image; samples depend on them and the seed. By default the positions in the batch.
            before_step: called before each token; an exception that it raises ends decoding.

        Raises: ValueError: as `__call__` does.
        """
        if pixels.ndim != 4:
            raise ValueError(f"pixels must be [batch 3 height width], not {list(pixels.shape)}")
        numbers = range(len(pixels)) if numbers is None else numbers
        if len(numbers) != len(pixels):
            raise ValueError(
                f"{counted(len(numbers), 'number(s)')} for {counted(len(pixels), 'image(s)')}: give one for each"
            )
        self._limit(strategy)
        prompt_ids = self._encode_prompts(prompts, len(pixels))
        return self.write(self.encode(pixels), strategy, prompt_ids, numbers, before_step) if len(pixels) else []

    def check(self, strategy: Strategy, prompt: str = "") -> None:
        """Check that this model can use the strategy and the prompt.

        Raises: ValueError: if it cannot.
        """
        tokenizer = self.processor.tokenizer
        prompts = _pad_prompts(self._encode_prompts(prompt, 1), [0], start=tokenizer.start, device=self.model.device)
        self._limit(strategy).begin(prompts, tokenizer)

    @torch.inference_mode()
    def encode(self, pixels: Float[Tensor, "batch 3 height width"]) -> EncodedImages:
        """Return the embeddings and caption tokens of normalised images."""
        with evaluating(self.model):
            return EncodedImages(*self.model.encode_caption_tokens(pixels.to(self.model.device)))

    @torch.inference_mode()
    def write(
        self,
        images: EncodedImages,
        strategy: Strategy,
        prompt_ids: Sequence[Sequence[int]],
        numbers: Sequence[int],
        before_step: Callable[[], object] = lambda: None,
    ) -> list[Caption]:
        """Return a caption for each image.

        Args:
            prompt_ids: the tokens of each prompt, without the start token.
            numbers, before_step: as in `generate`.

        Raises: ValueError: as `__call__` does.
        """
        strategy = self._limit(strategy)
        model, tokenizer = self.model, self.processor.tokenizer
        prompts = _pad_prompts(prompt_ids, numbers, start=tokenizer.start, device=model.device)
        with evaluating(model):
            found = self.decoding.run(images.caption_tokens, strategy, prompts, tokenizer, before_step)
            embeddings = images.embeddings.float().cpu()
            captions = [
                self._make_captions(texts, prompt, embedding)
                for texts, prompt, embedding in zip(found, prompt_ids, embeddings, strict=True)
            ]
            if isinstance(strategy, ContrastiveReranking):
                captions = self._rerank(captions)
        return [replace(alternatives[0], alternatives=tuple(alternatives)) for alternatives in captions]

    def _limit(self, strategy: Strategy) -> Strategy:
        """Return the strategy, limited to this model's context."""
        if isinstance(strategy, type) or not isinstance(strategy, Strategy):
            raise ValueError(f"the strategy must be an object such as BeamSearch(width=6), not {strategy!r}")
        max_tokens = min(strategy.max_tokens, self.model.config.text.context)
        if isinstance(strategy, ContrastiveReranking):
            return replace(strategy, of=replace(strategy.of, max_tokens=max_tokens))
        return replace(strategy, max_tokens=max_tokens)

    def _encode_prompts(self, prompts: str | Sequence[str], images: int) -> list[list[int]]:
        """Return the tokens of each image's prompt, without the start token."""
        if isinstance(prompts, bytes) or not isinstance(prompts, Sequence):
            raise ValueError(f"the prompts must be a text, or a list with one for each image, not {prompts!r}")
        texts = [prompts] * images if isinstance(prompts, str) else list(prompts)
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"a prompt must be a text, not {wrong[0]!r}; the empty text is no prompt")
        if len(texts) != images:
            given = f"{counted(len(texts), 'prompt(s)')} for {counted(images, 'image(s)')}"
            raise ValueError(f"{given}: give one for all, or one for each")
        tokenizer = self.processor.tokenizer
        prompt_ids = [tokenizer.encode(text) for text in texts]
        for text, ids in zip(texts, prompt_ids, strict=True):
            if tokenizer.start in ids or tokenizer.end in ids:
                raise ValueError(f"the prompt {text!r} names the start or the end token: remove it")
        return prompt_ids

    def _make_captions(
        self, texts: list[FinishedText], prompt: Sequence[int], embedding: Float[Tensor, "embed"]
    ) -> list[Caption]:
        """Turn the finished texts about one image into captions."""
        if not texts or not math.isfinite(texts[0].score):
            raise ValueError(
                "no text was found. Either the logits are not finite (NaN or infinite): check the weights and pixels. "
                "Or the rules and lengths allow no text: relax them"
            )
        captions = []
        for each in texts:
            token_ids = (*prompt, *each.token_ids)
            raw_text = self.processor.tokenizer.decode(token_ids)
            values = vars(each) | {"token_ids": token_ids, "raw_text": raw_text, "text": join_marks(raw_text)}
            captions.append(Caption(**values, embedding=embedding))
        return captions

    def _rerank(self, captions: list[list[Caption]]) -> list[list[Caption]]:
        """Rank the captions of each image by the cosine of text and image embedding."""
        tokenizer, context = self.processor.tokenizer, self.model.config.text.context
        ids = torch.full((sum(map(len, captions)), context), tokenizer.end)
        for row, caption in zip(ids, itertools.chain.from_iterable(captions), strict=True):
            tokens = caption.token_ids[: context - 2]  # leaves room for start and end token
            row[: len(tokens) + 1] = torch.tensor([tokenizer.start, *tokens])
        text_embeddings = self.model.encode_text(ids.to(self.model.device)).float().cpu()
        ranked = []
        for alternatives, embeddings in zip(captions, text_embeddings.split(list(map(len, captions))), strict=True):
            cosines = (embeddings @ alternatives[0].embedding).tolist()
            scored = (replace(caption, score=cosine) for caption, cosine in zip(alternatives, cosines, strict=True))
            ranked.append(sorted(scored, key=lambda caption: -caption.score))
        return ranked


def _pad_prompts(
    prompt_ids: Sequence[Sequence[int]], numbers: Sequence[int], *, start: int, device: torch.device
) -> Prompts:
    """Put a start token before each prompt, and pad them to one length."""
    longest = max((len(tokens) for tokens in prompt_ids), default=0) + 1
    ids = torch.full((len(prompt_ids), longest), start)
    for row, tokens in zip(ids, prompt_ids, strict=True):
        row[1 : len(tokens) + 1] = torch.tensor(tokens, dtype=torch.int64)
    lengths = torch.tensor([len(tokens) + 1 for tokens in prompt_ids], dtype=torch.int64)
    return Prompts(*(values.to(device) for values in (ids, lengths, torch.tensor(numbers, dtype=torch.int64))))
