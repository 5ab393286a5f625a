"""Visual question answering: answers of a model, beside those that people gave."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracap.data.annotations import read_list
from contracap.data.questions import Question, questions
from contracap.data.samples import Sample
from contracap.evaluation.answering import Answering, Asked, Chosen, Written
from contracap.evaluation.features import Source, picture_batches
from contracap.evaluation.metrics.overlap import mean
from contracap.evaluation.metrics.vqa_accuracy import accuracy
from contracap.evaluation.predictions import write_list
from contracap.evaluation.result import Result
from contracap.generation.sampling import Greedy
from contracap.generation.strategy import Strategy
from contracap.model.coca import CoCa
from contracap.processor import Processor
from contracap.tokenizer import Tokenizer

PROMPT = "question: {} answer:"
# The whole context of the released models, because the question counts; an answer may be a single word.
STRATEGY = Greedy(max_tokens=76, min_tokens=0)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A question, the model's answer, and the accuracy of it, from 0 to 1, where there are answers to compare with.

    Attributes:
        key: of the image.
    """

    key: str
    question: Question
    prediction: str
    accuracy: float | None


def evaluate_vqa(
    model: CoCa,
    processor: Processor,
    data: Source,
    *,
    answer: Answering | None = None,
    prompt: str = PROMPT,
    strict: bool = True,
    batch_size: int = 16,
    on_predictions: Callable[[Sequence[Answered]], object] = lambda _: None,
) -> Result:
    """Return the accuracy of answers to questions about images, by the rule of the VQA challenge, from 0 to 1.

    The questions are the field `qa` of the samples. See `metrics.vqa_accuracy`. The predictions are a list
    of `Answered`, in the order of the questions; each image's value is what its questions add to the accuracy.

    Args:
        answer: how the model answers, as `answering` gives it; by default it writes.
        prompt: what a question is put into, at {}, before the answer follows.
        strict: as in `accuracy`.
        batch_size: images at a time, with all their questions.
        on_predictions: called with all answers.

    Raises:
        ValueError: if the prompt has no {}, the model cannot write, a sample has no questions or cannot be read, or a
            question leaves no room for an answer.
    """
    check_prompt(prompt)
    answer = answer or answering()
    keys, sums, predictions = list[str](), list[float](), list[Answered]()
    with picture_batches(data, processor, batch_size) as batches:
        for batch, pixels in batches:
            about = [questions(sample) for sample in batch]
            flat = [(picture, question) for picture, own in enumerate(about) for question in own]
            asked = [
                Asked(
                    picture=picture,
                    number=number,
                    prompt=_prompt(processor.tokenizer, prompt, question),
                    name=f"sample {batch[picture].key} of {batch[picture].shard}",
                )
                for number, (picture, question) in enumerate(flat, start=len(predictions))
            ]
            texts = iter(answer(model, processor, pixels, asked))
            for sample, own in zip(batch, about, strict=True):
                answered = [_answered(sample, question, next(texts), strict) for question in own]
                keys.append(sample.key)
                sums.append(sum(each.accuracy or 0.0 for each in answered))
                predictions += answered
    on_predictions(predictions)
    details: dict[str, Any] = {"questions": len(predictions)}
    if isinstance(answer, Chosen):
        details["answers"] = len(answer.answers)
    known = [each.accuracy for each in predictions if each.accuracy is not None]
    if missing := len(predictions) - len(known):
        reason = f"{missing:,} of the questions have no answers to compare with"
        return Result.of_samples(keys, {}, predictions=predictions, details=details, reasons={"accuracy": reason})
    for kind in ("question_type", "answer_type"):
        if found := _by_type(predictions, kind):
            details[f"accuracy_by_{kind}"] = found
    return Result.of_samples(
        keys,
        {"accuracy": mean(known)},
        per_sample={"accuracy": [total * len(keys) / len(predictions) for total in sums]},
        predictions=predictions,
        details=details,
    )


def answering(answers: Sequence[str] = (), strategy: Strategy = STRATEGY) -> Answering:
    """Return what answers questions: the choice of the likeliest of `answers`, or without any the strategy, whose
    `max_tokens` counts the question, too, and is cut to the model's context.

    Raises: ValueError: if an answer is named twice, or the strategy writes no answers.
    """
    return Chosen(answers) if answers else Written(strategy)


def check_prompt(prompt: str) -> str:
    """Raises: ValueError: if the prompt has no place for the question."""
    if "{}" not in prompt:
        raise ValueError(f"the prompt {prompt!r} has no {{}} for the question")
    return prompt


def _prompt(tokenizer: Tokenizer, prompt: str, question: Question) -> tuple[int, ...]:
    tokens = tuple(tokenizer.encode(prompt.replace("{}", question.text)))
    if tokenizer.start in tokens or tokenizer.end in tokens:
        raise ValueError(f"the question {question.text!r} names the start or the end token, which stand around a text")
    return tokens


def _answered(sample: Sample, question: Question, prediction: str, strict: bool) -> Answered:
    right = accuracy(prediction, question.answers, strict=strict) if question.answers else None
    return Answered(key=sample.key, question=question, prediction=prediction, accuracy=right)


def _by_type(predictions: Sequence[Answered], kind: str) -> dict[str, float]:
    found = defaultdict[str, list[float]](list)
    for answer in predictions:
        found[getattr(answer.question, kind)].append(answer.accuracy or 0.0)
    return {name: mean(values) for name, values in sorted(found.items()) if name}


def write_answers(path: str | Path, answers: Sequence[Answered]) -> None:
    """Write answers in the layout of VQA's results, `question_id` and `answer`, whole or not at all. If a question has
    no id, each answer has the image's `key` and the `number` of the question among those of the image, from 0."""
    named, numbers, entries = all(one.question.identity is not None for one in answers), Counter[str](), list[Any]()
    for one in answers:
        place = {"question_id": one.question.identity} if named else {"key": one.key, "number": numbers[one.key]}
        entries.append(place | {"answer": one.prediction})
        numbers[one.key] += 1
    write_list(path, entries)


def load_answers(path: str | Path) -> tuple[str, ...]:
    """Answers to choose from: a JSON list of texts, or a JSON object with a list `answers`.

    Raises: ValueError: if the file holds no such list.
    """
    return read_list(Path(path), "answers")
