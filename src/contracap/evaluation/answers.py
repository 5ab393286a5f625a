"""Answers to questions about images: written after the question, or chosen from a list."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from contracap.generation.captioner import Captioner
from contracap.generation.reranking import ContrastiveReranking
from contracap.generation.strategy import Strategy
from contracap.model.cache import KeysValues
from contracap.model.coca import CoCa, evaluating
from contracap.processor import Processor

QUESTIONS = 64  # answered at a time
ROWS = 256  # answers scored at a time


@dataclass(frozen=True, kw_only=True)
class PromptedQuestion:
    """A question about an image of a batch, as a prompt.

    Attributes:
        image: the index of the image in the batch.
        number: the number of the question among all; samples depend on it.
        prompt: the tokens of the question, without start and end token.
        sample: the name of the sample, for error messages.
    """

    image: int
    number: int
    prompt: tuple[int, ...]
    sample: str


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer, and its probability by the model."""

    text: str
    probability: float


Answerer = Callable[[CoCa, Processor, Tensor, Sequence[PromptedQuestion]], list[ScoredAnswer]]
"""Answers questions about the images of a batch."""


class AnswerWriter:
    """Writes answers after the prompt with a decoding strategy.

    The probability of an answer is that of its tokens and the end token, before any rules of the strategy.
    """

    def __init__(self, strategy: Strategy):
        """Raises: ValueError: for a strategy that ranks texts by how well they describe an image."""
        if isinstance(strategy, ContrastiveReranking):
            raise ValueError("an answer does not describe its image: use another strategy than rerank")
        self.strategy = strategy

    def __call__(
        self,
        model: CoCa,
        processor: Processor,
        pixels: Float[Tensor, "image 3 height width"],
        questions: Sequence[PromptedQuestion],
    ) -> list[ScoredAnswer]:
        """Return an answer to each question.

        Raises: ValueError: if the model cannot write, a question leaves no room, or numbers are not finite.
        """
        captioner, answers = Captioner(model, processor), dict[int, ScoredAnswer]()
        max_tokens = min(self.strategy.max_tokens, model.config.text.context)
        _check_room(questions, processor, max_tokens=max_tokens, answer_tokens=1)
        images = captioner.encode(pixels)
        by_length = sorted(range(len(questions)), key=lambda index: len(questions[index].prompt))
        for first in range(0, len(questions), QUESTIONS):  # of similar length: the prefill reads the shortest prompt
            indices = by_length[first : first + QUESTIONS]
            group = [questions[index] for index in indices]
            captions = captioner.write(
                images.select([question.image for question in group]),
                self.strategy,
                [question.prompt for question in group],
                [question.number for question in group],
            )
            for index, question, caption in zip(indices, group, captions, strict=True):
                text = processor.tokenizer.decode(caption.token_ids[len(question.prompt) :])
                answers[index] = ScoredAnswer(text, math.exp(caption.log_probability))
        return [answers[index] for index in range(len(questions))]


class AnswerChooser:
    """Chooses the likeliest answer of a list; the first among equals.

    The log-probability of an answer is the sum over its tokens and the end token: how likely the model is to give this
    answer and no other. The probability of the chosen one is its share among the answers of the list.
    """

    def __init__(self, answers: Sequence[str]):
        """Raises: ValueError: if there is no answer, or one is named twice."""
        if not answers:
            raise ValueError("there are no answers to choose from")
        if repeated := [answer for answer, number in Counter(answers).items() if number > 1]:
            raise ValueError(f"the answer {repeated[0]!r} is named twice among those to choose from")
        self.answers = tuple(answers)

    def __call__(
        self,
        model: CoCa,
        processor: Processor,
        pixels: Float[Tensor, "image 3 height width"],
        questions: Sequence[PromptedQuestion],
    ) -> list[ScoredAnswer]:
        """Return an answer to each question.

        Raises: ValueError: if the model cannot write, an answer has no text, a question leaves no room, or numbers are
            not finite.
        """
        scores = self.log_probabilities(model, processor, pixels, questions)
        if not scores.isfinite().all():
            raise ValueError("the model's logits are not finite (NaN or infinite): its weights are broken")
        probabilities, best = scores.double().softmax(dim=1).max(dim=1)
        chosen = zip(best.tolist(), probabilities.tolist(), strict=True)
        return [ScoredAnswer(self.answers[number], probability) for number, probability in chosen]

    @torch.inference_mode()
    def log_probabilities(
        self,
        model: CoCa,
        processor: Processor,
        pixels: Float[Tensor, "image 3 height width"],
        questions: Sequence[PromptedQuestion],
    ) -> Float32[Tensor, "question answer"]:
        """Return the log-probability of each answer after each question, in nats, on the CPU.

        Raises: ValueError: as `__call__` does.
        """
        tokens, start, end = self._encode(processor), processor.tokenizer.start, processor.tokenizer.end
        decoder, context = model.require_decoder(), model.config.text.context
        _check_room(questions, processor, max_tokens=context, answer_tokens=max(map(len, tokens)) + 1)
        by_length = torch.tensor(sorted(range(len(tokens)), key=lambda number: len(tokens[number])))
        found = torch.empty(len(questions), len(tokens))
        with evaluating(model):
            _, caption_tokens = model.encode_caption_tokens(pixels.to(model.device))
            projected = decoder.project(caption_tokens)
            for group in _group_by_length(questions, most=max(1, ROWS // len(tokens))):
                images = torch.tensor([questions[index].image for index in group], device=model.device)
                selected = [layer.select(images) for layer in projected]
                prompt = torch.tensor([(start, *questions[index].prompt) for index in group], device=model.device)
                for numbers in by_length.split(ROWS):  # of similar length: steps go on until the longest has ended
                    scores = _score_texts(model, selected, prompt, [tokens[number] for number in numbers], end=end)
                    found[torch.tensor(group)[:, None], numbers] = scores.cpu()
        return found

    def _encode(self, processor: Processor) -> list[list[int]]:
        tokens = [processor.tokenizer.encode(answer) for answer in self.answers]
        for answer, ids in zip(self.answers, tokens, strict=True):
            if not ids:
                raise ValueError(f"the answer {answer!r} has no text")
        return tokens


def _check_room(
    questions: Sequence[PromptedQuestion], processor: Processor, *, max_tokens: int, answer_tokens: int
) -> None:
    for question in questions:
        needed = 1 + len(question.prompt) + answer_tokens  # with the start token
        if needed > max_tokens:
            text = processor.tokenizer.decode(question.prompt)
            raise ValueError(
                f"{question.sample}: the question {text!r:.60} leaves no room for an answer: both take {needed} "
                f"tokens, and the model's context, or max_tokens, is {max_tokens}"
            )


def _score_texts(
    model: CoCa,
    projected: list[KeysValues],
    prompt: Int64[Tensor, "question column"],
    texts: list[list[int]],
    *,
    end: int,
) -> Float32[Tensor, "question text"]:
    """Return the sum of the log-probabilities of each text and the end token, after each prompt."""
    (questions, columns), steps = prompt.shape, max(map(len, texts)) + 1
    ids = torch.full((steps, len(texts)), end, device=prompt.device)
    for number, text in enumerate(texts):
        ids[: len(text), number] = torch.tensor(text, device=ids.device)
    lengths = torch.tensor([len(text) + 1 for text in texts], device=ids.device)
    cache = model.new_cache(projected, prompt=columns, num_texts=len(texts), max_tokens=columns + steps - 1)
    log_probs = model.prefill(prompt, cache).log_softmax(dim=-1)
    scores = log_probs[:, 0, ids[0]]
    cache.reorder(prompt.new_zeros(questions, len(texts)))  # each text continues the prompt
    for step in range(1, steps):
        log_probs = model.decode(ids[step - 1].expand(questions, -1), cache).log_softmax(dim=-1)
        token_log_probs = log_probs.gather(2, ids[step].expand(questions, -1)[:, :, None]).squeeze(2)
        scores = scores + token_log_probs.masked_fill(step >= lengths, 0.0)
    return scores


def _group_by_length(questions: Sequence[PromptedQuestion], *, most: int) -> Iterator[list[int]]:
    """Yield the indices of at most `most` questions whose prompts have the same length."""
    groups = defaultdict[int, list[int]](list)
    for index, question in enumerate(questions):
        groups[len(question.prompt)].append(index)
    for group in groups.values():
        yield from (group[first : first + most] for first in range(0, len(group), most))
