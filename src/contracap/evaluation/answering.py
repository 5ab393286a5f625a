"""Answers to questions about images: written after the question, or chosen from a list."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from contracap.generation.captioner import Captioner
from contracap.generation.reranking import split
from contracap.generation.strategy import Strategy
from contracap.model.cache import Projected
from contracap.model.coca import CoCa, evaluating
from contracap.processor import Processor

QUESTIONS = 64  # answered at a time
ROWS = 256  # answers scored at a time


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question about one of the images at hand.

    Attributes:
        image: its place.
        number: of the question among all; what sampling draws depends on it.
        prompt: the tokens of the question, those of the start and the end not among them.
        name: of the sample, for messages.
    """

    picture: int
    number: int
    prompt: tuple[int, ...]
    name: str


# Answers questions about the images of a batch.
Answering = Callable[[CoCa, Processor, Tensor, Sequence[Asked]], list[str]]


class Written:
    """Answers are what a strategy writes after the prompt."""

    def __init__(self, strategy: Strategy):
        """Raises: ValueError: for a strategy that ranks texts by how well they describe an image."""
        if split(strategy)[1]:
            raise ValueError("an answer does not describe its image: use another strategy than rerank")
        self.strategy = strategy

    def __call__(
        self, model: CoCa, processor: Processor, pixels: Float[Tensor, "image 3 height width"], asked: Sequence[Asked]
    ) -> list[str]:
        """Return an answer to each question.

        Raises: ValueError: if the model cannot write, a question leaves no room, or numbers are not finite.
        """
        captioner, found = Captioner(model, processor), [""] * len(asked)
        room = min(self.strategy.max_tokens, model.config.text.context)
        _check_room(asked, processor, most=room, answer=1)
        images = captioner.encode(pixels)
        by_length = sorted(range(len(asked)), key=lambda place: len(asked[place].prompt))
        for first in range(0, len(asked), QUESTIONS):  # the tokens that all their prompts have take one step
            places = by_length[first : first + QUESTIONS]
            group = [asked[place] for place in places]
            captions = captioner.write(
                images.select([question.picture for question in group]),
                self.strategy,
                [question.prompt for question in group],
                [question.number for question in group],
            )
            for place, question, caption in zip(places, group, captions, strict=True):
                found[place] = processor.tokenizer.decode(caption.token_ids[len(question.prompt) :])
        return found


class Chosen:
    """Answers are the likeliest of a list: by the sum of the log-probabilities of their tokens and the end token, which
    is how likely the model is to give this answer and no other. Of equal ones the first is chosen."""

    def __init__(self, answers: Sequence[str]):
        """Raises: ValueError: if there is no answer, or one is named twice."""
        if not answers:
            raise ValueError("there are no answers to choose from")
        if repeated := [answer for answer, number in Counter(answers).items() if number > 1]:
            raise ValueError(f"the answer {repeated[0]!r} is named twice among those to choose from")
        self.answers = tuple(answers)

    def __call__(
        self, model: CoCa, processor: Processor, pixels: Float[Tensor, "image 3 height width"], asked: Sequence[Asked]
    ) -> list[str]:
        """An answer to each question.

        Raises: ValueError: if the model cannot write, an answer has no text, a question leaves no room, or numbers are
            not finite.
        """
        scores = self.log_probabilities(model, processor, pixels, asked)
        if not scores.isfinite().all():
            raise ValueError("the model's logits are not finite (NaN or infinite): its weights are broken")
        return [self.answers[best] for best in scores.argmax(dim=1).tolist()]

    @torch.inference_mode()
    def log_probabilities(
        self, model: CoCa, processor: Processor, pixels: Float[Tensor, "image 3 height width"], asked: Sequence[Asked]
    ) -> Float32[Tensor, "question answer"]:
        """Return that of each answer after each question, in nats, on the CPU; each image is encoded once."""
        tokens = self._tokens(processor)
        decoder, most = model.require_decoder(), model.config.text.context
        _check_room(asked, processor, most=most, answer=max(map(len, tokens)) + 1)  # and the end
        by_length = torch.tensor(sorted(range(len(tokens)), key=lambda number: len(tokens[number])))
        found = torch.empty(len(asked), len(tokens))
        with evaluating(model):
            _, caption_tokens = model.encode_caption_tokens(pixels.to(next(model.vision.parameters())))
            projected = decoder.project(caption_tokens)
            for group in _alike(asked, most=max(1, ROWS // len(tokens))):
                pictures = torch.tensor([asked[place].picture for place in group], device=model.device)
                selected = [layer.select(pictures) for layer in projected]
                prompt = torch.tensor([(processor.tokenizer.start, *asked[place].prompt) for place in group])
                for some in by_length.split(ROWS):  # they take as many steps as the longest of them
                    answers = [tokens[number] for number in some]
                    scores = _scored(model, selected, prompt.to(model.device), answers, end=processor.tokenizer.end)
                    found[torch.tensor(group)[:, None], some] = scores.cpu()
        return found

    def _tokens(self, processor: Processor) -> list[list[int]]:
        tokens = [processor.tokenizer.encode(answer) for answer in self.answers]
        for answer, ids in zip(self.answers, tokens, strict=True):
            if not ids:
                raise ValueError(f"the answer {answer!r} has no text")
        return tokens


def _check_room(asked: Sequence[Asked], processor: Processor, *, most: int, answer: int) -> None:
    for question in asked:
        needed = 1 + len(question.prompt) + answer  # the start token, too
        if needed > most:
            raise ValueError(
                f"{question.name}: the question {processor.tokenizer.decode(question.prompt)!r:.60} leaves no room for "
                f"an answer: both take {needed} tokens, and the model's context, or max_tokens, is {most}"
            )


def _scored(
    model: CoCa,
    caption_tokens: list[Projected],
    prompt: Int64[Tensor, "question column"],
    texts: list[list[int]],
    *,
    end: int,
) -> Float32[Tensor, "question text"]:
    """Sums of the log-probabilities of each text and the end token, after each prompt."""
    (questions, columns), steps = prompt.shape, max(map(len, texts)) + 1
    ids = torch.full((steps, len(texts)), end, device=prompt.device)
    for number, text in enumerate(texts):
        ids[: len(text), number] = torch.tensor(text, device=ids.device)
    lengths = torch.tensor([len(text) + 1 for text in texts], device=ids.device)
    cache = model.new_cache(caption_tokens, prompt=columns, rows=len(texts), max_tokens=columns + steps - 1)
    log_probs = model.prefill(prompt, cache).log_softmax(dim=-1)
    scores = log_probs[:, 0, ids[0]]
    cache.reorder(prompt.new_zeros(questions, len(texts)))  # every text continues the prompt
    for step in range(1, steps):
        log_probs = model.decode(ids[step - 1].expand(questions, -1), cache).log_softmax(dim=-1)
        token_log_probs = log_probs.gather(2, ids[step].expand(questions, -1)[:, :, None]).squeeze(2)
        scores = scores + token_log_probs.masked_fill(step >= lengths, 0.0)
    return scores


def _alike(asked: Sequence[Asked], *, most: int) -> Iterator[list[int]]:
    """Places of questions whose prompts have one length, at most so many together."""
    places = defaultdict[int, list[int]](list)
    for place, question in enumerate(asked):
        places[len(question.prompt)].append(place)
    for group in places.values():
        yield from (group[first : first + most] for first in range(0, len(group), most))
