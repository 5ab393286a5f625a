"""What a model wrote, as files for other programs."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from contracap.evaluation.captioning import Prediction
from contracap.evaluation.vqa import Answered
from contracap.files import write_text


def write_predictions(path: str | Path, predictions: Sequence[Prediction | Answered]) -> None:
    """Write captions or answers as a JSON list, an entry a line, whole or not at all.

    Captions have the layout that `contracap score` reads, with the key as `image_name` where no other picture has it.
    Answers have that of VQA's results, `question_id` and `answer`; where not all questions have ids, each has the
    picture's `key` and its `number` among the picture's questions, from 0.
    """
    keys = Counter(one.key for one in predictions)
    entries = [_caption(one, named=keys[one.key] == 1) for one in predictions if isinstance(one, Prediction)]
    entries += _answers([one for one in predictions if isinstance(one, Answered)])
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
