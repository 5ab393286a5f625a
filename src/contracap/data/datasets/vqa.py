"""Questions and answers about images, in the layout of VQAv2."""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from sys import intern
from typing import Any

from contracap.data.annotations import Entry, SkippedEntry, SourceError, number_or_text, read_each, read_json

logger = logging.getLogger(__name__)


def read_vqa(path: Path, document: Any, images: Iterable[str]) -> Iterator[Entry | SkippedEntry]:
    """Yield the images that a VQA file asks about. Their field `qa` is a list of objects with `question`, `answer` (the
    most common one), `answers`, `question_id`, and the types of both where they are known.

    Args:
        path: the questions, such as `v2_OpenEnded_mscoco_train2014_questions.json`; the answers are next to them, as
            `v2_mscoco_train2014_annotations.json`. Of a test set there are none.
        document: content of `path`.
        images: names of image files. The id of an image is the number at the end of its name, or its name.

    Raises:
        SourceError: if two images have one id, or a file is not what it should be.
    """
    beside = path.with_name(path.name.replace("OpenEnded_", "").replace("questions", "annotations"))
    answers = _answers(beside) if beside != path and beside.is_file() else None
    if answers is None:
        logger.warning(f"{path.name} is read without answers: there is no *_annotations.json next to it")
    named = defaultdict[Any, list[str]](list)
    for name in images:
        stem = PurePosixPath(name).stem
        number = re.search(r"\d+$", stem)
        for identity in {stem, int(number[0])} if number else {stem}:
            named[identity].append(name)
    asked = defaultdict[Any, list[dict[str, Any]]](list)

    def ask(question: Any) -> SkippedEntry | None:
        identity, image = (number_or_text(question[name]) for name in ("question_id", "image_id"))
        answer = {} if answers is None else answers.get(identity)
        if answer is None:
            message = f"it has no answer in {beside.name}"
            return SkippedEntry(source=f"question {identity} of {path.name}", kind="no_answer", message=message)
        asked[image].append({"question_id": question["question_id"], "question": question["question"], **answer})
        return None

    yield from filter(None, read_each(path, document, "questions", ask, layout="vqa"))
    for identity, questions in asked.items():
        names = named.get(identity, [str(identity)])
        if len(names) > 1:
            raise SourceError(
                f"image {identity} of {path.name} may be {names[0]} or {names[1]}: name the folder of one of them"
            )
        yield Entry(name=names[0], fields={"image_id": identity, "qa": questions})


def _answers(path: Path) -> dict[Any, dict[str, Any]]:
    """Return the answers in a VQA file by the id of their question."""
    found = dict[Any, dict[str, Any]]()

    def keep(annotation: Any) -> None:
        answers = [intern(answer["answer"]) for answer in annotation["answers"]]  # few differ: each is kept once
        kept = {name: annotation[name] for name in ("question_type", "answer_type") if name in annotation}
        usual = annotation.get("multiple_choice_answer") or Counter(answers).most_common(1)[0][0]
        found[number_or_text(annotation["question_id"])] = {"answer": usual, "answers": answers, **kept}

    for _ in read_each(path, read_json(path), "annotations", keep, layout="answers of vqa"):
        pass  # a question whose answers cannot be read is skipped as one without any
    return found
