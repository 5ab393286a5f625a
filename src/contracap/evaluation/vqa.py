"""Visual question answering: answers of a model, beside those that people gave."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float32
from torch import Tensor

from contracap.data.annotations import read_list
from contracap.data.questions import Question, questions
from contracap.data.shards import Sample
from contracap.evaluation.answering import Asked, Chosen, Written
from contracap.evaluation.features import Source, picture_batches
from contracap.evaluation.overlap import mean
from contracap.evaluation.vqa_accuracy import accuracy
from contracap.generation.sampling import Greedy
from contracap.generation.strategy import Strategy
from contracap.model.coca import CoCa
from contracap.processor import Processor

PROMPT = "question: {} answer:"
# As many tokens as the context of the released models has, for the question counts; an answer may be a single word.
STRATEGY = Greedy(max_tokens=76, min_tokens=0)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A question, the model's answer, and the accuracy of it, from 0 to 1, where there are answers to compare with.

    Attributes:
        key: of the picture.
    """

    key: str
    question: Question
    prediction: str
    accuracy: float | None


class VQA:
    """Accuracy of answers to questions about pictures, by the rule of the VQA challenge, as a share from 0 to 1.

    The questions are the field `qa` of the samples. See `contracap.evaluation.vqa_accuracy`.

    Attributes:
        samples: pictures, once `run` has come to its end; likewise the others.
        per_sample: of each picture what its questions add to the accuracy.
        details: the number of questions, of answers to choose from, and the accuracy by types of questions and
            answers, where the data set has them.
        predictions: the answers, in the order of the questions.
    """

    def __init__(
        self,
        source: Source,
        processor: Processor,
        *,
        answers: Sequence[str] = (),
        prompt: str = PROMPT,
        strategy: Strategy = STRATEGY,
        strict: bool = True,
        batch_size: int = 16,
    ):
        """Evaluates on `source`.

        Args:
            answers: the model chooses the likeliest of these; without any, it writes.
            prompt: what a question is put into, at {}, before the answer follows.
            strategy: how an answer is written; its `max_tokens` counts the question, too, and is cut to the model's
                context.
            strict: as in `accuracy`.
            batch_size: pictures at a time, with all their questions.

        Raises:
            ValueError: if the prompt has no {}, an answer is named twice, or the strategy writes no answers.
        """
        if "{}" not in prompt:
            raise ValueError(f"the prompt {prompt!r} has no {{}} for the question")
        self.source, self.processor, self.prompt = source, processor, prompt
        self.strict, self.batch_size = strict, batch_size
        self.answer = Chosen(answers) if answers else Written(strategy)
        self.samples = 0
        self.keys: list[str] = []
        self.per_sample: dict[str, list[float]] = {}
        self.reasons: dict[str, str] = {}
        self.details: dict[str, Any] = {}
        self.predictions: list[Answered] = []

    def run(self, model: CoCa) -> Iterator[tuple[str, float]]:
        """The accuracy, if every question has answers to compare with.

        Raises:
            ValueError: if the model cannot write, a sample has no questions or cannot be read, or a question leaves no
                room for an answer.
        """
        keys, sums, predictions = list[str](), list[float](), list[Answered]()
        self.reasons = {}
        with picture_batches(self.source, self.processor, self.batch_size) as batches:
            for batch, pixels in batches:
                asked = [questions(sample) for sample in batch]
                made = iter(self._answers(model, pixels, batch, asked, first=len(predictions)))
                for sample, about in zip(batch, asked, strict=True):
                    answered = [self._answered(sample, question, next(made)) for question in about]
                    keys.append(sample.key)
                    sums.append(sum(answer.accuracy or 0.0 for answer in answered))
                    predictions += answered
        self.samples, self.keys, self.predictions = len(keys), keys, predictions
        self.per_sample = {}
        self.details = {"questions": len(predictions)}
        if isinstance(self.answer, Chosen):
            self.details["answers"] = len(self.answer.answers)
        known = [answer.accuracy for answer in predictions if answer.accuracy is not None]
        if len(known) < len(predictions):
            self.reasons["accuracy"] = (
                f"{len(predictions) - len(known):,} of the questions have no answers to compare with"
            )
            return
        for kind in ("question_type", "answer_type"):
            if found := self._by_type(kind):
                self.details[f"accuracy_by_{kind}"] = found
        self.per_sample = {"accuracy": [total * len(keys) / len(predictions) for total in sums]}
        yield "accuracy", mean(known)

    def _answers(
        self,
        model: CoCa,
        pixels: Float32[Tensor, "batch 3 height width"],
        batch: Sequence[Sample],
        asked: Sequence[Sequence[Question]],
        *,
        first: int,
    ) -> list[str]:
        flat = [(picture, question) for picture, about in enumerate(asked) for question in about]
        prompts = [
            Asked(
                picture=picture,
                number=number,
                prompt=self._prompt(question),
                name=f"sample {batch[picture].key} of {batch[picture].shard}",
            )
            for number, (picture, question) in enumerate(flat, start=first)
        ]
        return self.answer(model, self.processor, pixels, prompts)

    def _prompt(self, question: Question) -> tuple[int, ...]:
        tokenizer = self.processor.tokenizer
        prompt = tuple(tokenizer.encode(self.prompt.replace("{}", question.text)))
        if tokenizer.start in prompt or tokenizer.end in prompt:
            raise ValueError(
                f"the question {question.text!r} names the start or the end token, which stand around a text"
            )
        return prompt

    def _answered(self, sample: Sample, question: Question, prediction: str) -> Answered:
        right = accuracy(prediction, question.answers, strict=self.strict) if question.answers else None
        return Answered(key=sample.key, question=question, prediction=prediction, accuracy=right)

    def _by_type(self, kind: str) -> dict[str, float]:
        found = defaultdict[str, list[float]](list)
        for answer in self.predictions:
            found[getattr(answer.question, kind)].append(answer.accuracy or 0.0)
        return {name: mean(values) for name, values in sorted(found.items()) if name}


def load_answers(path: str | Path) -> tuple[str, ...]:
    """Answers to choose from: a JSON list of texts, or a JSON object with a list `answers`.

    Raises: ValueError: if the file holds no such list.
    """
    return read_list(Path(path), "answers")
