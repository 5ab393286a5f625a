"""What a model wrote, as files for other programs."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from contracap.evaluation.captioning import Captioning, Prediction
from contracap.evaluation.result import Evaluator
from contracap.evaluation.vqa import VQA, Answered
from contracap.files import write_text


def write_predictions(path: str | Path, evaluator: Evaluator) -> None:
    """Writes a JSON list, an entry a line, whole or not at all; nothing if the evaluator has no predictions.

    Captions are in the layout that `contracap score` reads, with the key as `image_name` where no other picture has it;
    answers in that of VQA's results, `question_id` and
    `answer`. Where not all questions have ids, each has the picture's `key` and its `number` among the picture's, from
    0.
    """
    entries = list[dict[str, Any]]()
    if isinstance(evaluator, Captioning):
        keys = Counter(one.key for one in evaluator.predictions)
        entries = [_caption(one, named=keys[one.key] == 1) for one in evaluator.predictions]
    elif isinstance(evaluator, VQA):
        entries = list(_answers(evaluator.predictions))
    if entries:
        write_text(path, "[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n")


def _caption(one: Prediction, *, named: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"image_name": one.key} if named else {}
    entry |= {"captions": one.captions, "prediction": one.prediction}
    return entry | ({"domain": f"{one.domain}-domain"} if one.domain else {})


def _answers(found: Sequence[Answered]) -> Iterator[dict[str, Any]]:
    named, numbers = all(one.question.identity is not None for one in found), Counter[str]()
    for one in found:
        place = {"question_id": one.question.identity} if named else {"key": one.key, "number": numbers[one.key]}
        yield place | {"answer": one.prediction}
        numbers[one.key] += 1
