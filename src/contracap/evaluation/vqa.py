"""Visual question answering: answers of a model, compared with those of people."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracap.data.annotations import read_list
from contracap.data.questions import Question, parse_questions
from contracap.data.samples import Sample
from contracap.evaluation.answers import AnswerChooser, Answerer, AnswerWriter, PromptedQuestion, ScoredAnswer
from contracap.evaluation.features import Source, pixel_batches
from contracap.evaluation.metrics.overlap import mean
from contracap.evaluation.metrics.vqa_accuracy import accuracy
from contracap.evaluation.predictions import write_list
from contracap.evaluation.result import Result
from contracap.generation.sampling import Greedy
from contracap.model.coca import CoCa
from contracap.processor import ImageSource, Processor
from contracap.tokenizer import Tokenizer

PROMPT = "question: {} answer:"
# The whole context of the released models, because the question counts; an answer may be a single word.
STRATEGY = Greedy(max_tokens=76, min_tokens=0)
ANSWER_WRITER = AnswerWriter(STRATEGY)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's answer to a question.

    Attributes:
        key: the key of the image.
        probability: of the answer, by the model.
        accuracy: from 0 to 1; None if there are no answers to compare with.
    """

    key: str
    question: Question
    prediction: str
    probability: float
    accuracy: float | None


def evaluate_vqa(
    model: CoCa,
    processor: Processor,
    data: Source,
    *,
    answerer: Answerer = ANSWER_WRITER,
    prompt: str = PROMPT,
    strict: bool = True,
    batch_size: int = 16,
    on_predictions: Callable[[Sequence[Answer]], object] = lambda _: None,
) -> Result[list[Answer]]:
    """Return the accuracy of answers to questions about images, from 0 to 1, by the rule of the VQA challenge, and the
    `calibration_error` of their probabilities.

    The questions are the field `qa` of the samples. The predictions are in the order of the questions. The value of
    an image is the part of the accuracy that its questions contribute.

    Args:
        answerer: gives the answers; by default the model writes them.
        prompt: the text before an answer, with {} where the question goes.
        strict: as in `metrics.vqa_accuracy.accuracy`.
        batch_size: images at a time, with all their questions.
        on_predictions: called with all answers.

    Raises: ValueError: if the prompt has no {}, the model cannot write, a sample has no questions or cannot be read, or
        a question leaves no room for an answer.
    """
    check_prompt(prompt)
    keys, sums, predictions = list[str](), list[float](), list[Answer]()
    with pixel_batches(data, processor, batch_size) as batches:
        for batch, pixels in batches:
            by_image = [parse_questions(sample) for sample in batch]
            flat = [(image, question) for image, own in enumerate(by_image) for question in own]
            prompted = [
                PromptedQuestion(
                    image=image,
                    number=number,
                    prompt=_encode_prompt(processor.tokenizer, prompt, question),
                    sample=f"sample {batch[image].key} of {batch[image].shard}",
                )
                for number, (image, question) in enumerate(flat, start=len(predictions))
            ]
            given = iter(answerer(model, processor, pixels, prompted))
            for sample, own in zip(batch, by_image, strict=True):
                answers = [_compare(sample, question, next(given), strict) for question in own]
                keys.append(sample.key)
                sums.append(sum(each.accuracy or 0.0 for each in answers))
                predictions += answers
    on_predictions(predictions)
    choices = {"answers": len(answerer.answers)} if isinstance(answerer, AnswerChooser) else {}
    details: dict[str, Any] = {"questions": len(predictions), **choices}
    known = [each.accuracy for each in predictions if each.accuracy is not None]
    if missing := len(predictions) - len(known):
        reason = f"{missing:,} of the questions have no answers to compare with"
        return Result.of_samples(keys, {}, predictions=predictions, details=details, reasons={"accuracy": reason})
    for kind in ("question_type", "answer_type"):
        if found := _by_type(predictions, kind):
            details[f"accuracy_by_{kind}"] = found
    return Result.of_samples(
        keys,
        {
            "accuracy": mean(known),
            "calibration_error": calibration_error([each.probability for each in predictions], known),
        },
        per_sample={"accuracy": [total * len(keys) / len(predictions) for total in sums]},
        predictions=predictions,
        details=details,
    )


def ask_about(
    model: CoCa,
    processor: Processor,
    image: ImageSource,
    questions: Sequence[str],
    *,
    answerer: Answerer = ANSWER_WRITER,
    prompt: str = PROMPT,
) -> list[ScoredAnswer]:
    """Return the answers to questions about one image, with their probabilities.

    Raises:
        FileNotFoundError, ImageError, DownloadError: if the image cannot be used.
        ValueError: as `evaluate_vqa` does.
    """
    check_prompt(prompt)
    pixels = processor.images([image])
    prompted = [
        PromptedQuestion(
            image=0,
            number=number,
            prompt=_encode_prompt(processor.tokenizer, prompt, Question(text=question, answers=())),
            sample="the image",
        )
        for number, question in enumerate(questions)
    ]
    return answerer(model, processor, pixels, prompted)


def check_prompt(prompt: str) -> str:
    """Raises: ValueError: if the prompt has no place for the question."""
    if "{}" not in prompt:
        raise ValueError(f"the prompt {prompt!r} has no {{}} for the question")
    return prompt


def _encode_prompt(tokenizer: Tokenizer, prompt: str, question: Question) -> tuple[int, ...]:
    tokens = tuple(tokenizer.encode(prompt.replace("{}", question.text)))
    if tokenizer.start in tokens or tokenizer.end in tokens:
        raise ValueError(f"the question {question.text!r} names the start or the end token, which stand around a text")
    return tokens


def _compare(sample: Sample, question: Question, given: ScoredAnswer, strict: bool) -> Answer:
    value = accuracy(given.text, question.answers, strict=strict) if question.answers else None
    return Answer(
        key=sample.key, question=question, prediction=given.text, probability=given.probability, accuracy=value
    )


def calibration_error(probabilities: Sequence[float], accuracies: Sequence[float], *, bins: int = 15) -> float:
    """Return the expected calibration error: how far probabilities are from accuracies, on average over the answers.

    Answers are put into equal bins of their probability. The gap of a bin is between its mean probability and its mean
    accuracy.

    Source: Guo et al. (arXiv 1706.04599), equation 3.
    """
    gaps = defaultdict[int, float](float)
    for probability, value in zip(probabilities, accuracies, strict=True):
        gaps[min(bins - 1, int(probability * bins))] += probability - value
    return sum(map(abs, gaps.values())) / len(probabilities)


def _by_type(predictions: Sequence[Answer], kind: str) -> dict[str, float]:
    found = defaultdict[str, list[float]](list)
    for answer in predictions:
        found[getattr(answer.question, kind)].append(answer.accuracy or 0.0)
    return {name: mean(values) for name, values in sorted(found.items()) if name}


def write_answers(path: str | Path, answers: Sequence[Answer]) -> None:
    """Write answers in the layout of VQA's results, with `question_id` and `answer`; a whole file or none.

    If a question has no id, each answer has the `key` of its image and the `number` of its question, from 0.
    """
    named, numbers, entries = all(one.question.identity is not None for one in answers), Counter[str](), list[Any]()
    for one in answers:
        place = {"question_id": one.question.identity} if named else {"key": one.key, "number": numbers[one.key]}
        entries.append(place | {"answer": one.prediction})
        numbers[one.key] += 1
    write_list(path, entries)


def load_answers(path: str | Path) -> tuple[str, ...]:
    """Return answers to choose from, of a file with a JSON list, or with an object that has a list `answers`.

    Raises: ValueError: if the file holds no such list.
    """
    return read_list(Path(path), "answers")
