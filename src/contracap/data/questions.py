"""Questions about images: those in a sample, and the files of VQAv2 and OK-VQA as samples."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracap.data.annotations import SourceError
from contracap.data.samples import Sample
from contracap.data.sources import read_source
from contracap.files import read_regular


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about an image, and people's answers.

    Attributes:
        answers: one of each person; none in a test set.
        question_type, answer_type: as the data set has them; empty where it has none.
        identity: its `question_id` in the data set; None where it has none.
    """

    text: str
    answers: tuple[str, ...]
    question_type: str = ""
    answer_type: str = ""
    identity: int | str | None = None


def parse_questions(sample: Sample) -> tuple[Question, ...]:
    """Return the questions of a sample: objects in its field `qa` with `question`, and maybe `answers` or `answer`.

    Raises:
        ValueError: if there is none, or one has another layout; names the sample.
    """
    entries = sample.fields.get("qa")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{sample.name} has no questions: the field qa must be a list of them")
    return tuple(_question(entry, f"question {i} of {sample.name}") for i, entry in enumerate(entries))


class QuestionSamples:
    """The images that a file of VQAv2 or OK-VQA asks about, in its order. The file is read once, each image when its
    turn comes.

    The answers are next to it under the data set's own name: to `v2_OpenEnded_mscoco_val2014_questions.json` belongs
    `v2_mscoco_val2014_annotations.json`; a test set has none. Of OK-VQA's two forms of an answer, `answer` counts, as
    in its own evaluation.
    """

    def __init__(self, path: str | Path, *, images: str | Path | None = None):
        """Read the file.

        Args:
            images: the folder of images, such as `COCO_val2014_000000000042.jpg`, maybe in subfolders; by default
                the file's own.

        Raises:
            FileNotFoundError: if the file or the folder does not exist.
            SourceError: if the file has another layout, or a question lacks its image, or
                its answers where others have them.
        """
        source = read_source(path, kind="vqa", images=images)
        for skipped in source.skipped:
            raise SourceError(f"{path}: {skipped.source}: {skipped.message}")
        missing = [entry for entry in source.entries if not Path(entry.path).is_file()]
        if missing:
            identity, folder = missing[0].fields["image_id"], Path(missing[0].path).parent
            raise SourceError(
                f"{path} asks about {len(source.entries)} images, of which {len(missing)} are not in {folder}: "
                f"one is the image {identity}; name their folder after the file"
            )
        self._entries, self._name = source.entries, Path(path).name

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Sample]:
        """Yield every image once, with its questions in the field `qa`."""
        for entry in self._entries:
            file = Path(entry.path)
            yield Sample(key=file.stem, image=read_regular(file), captions=(), fields=entry.fields, shard=self._name)


def _question(entry: Any, name: str) -> Question:
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is not an object with question and answer: {entry!r:.60}")
    answers = entry.get("answers") or [entry[one] for one in ("answer",) if entry.get(one) is not None]
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{name} has answers that are not texts: answers must be a list of texts, or answer a text")
    text = entry.get("question")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name} has no text: question must be one")
    return Question(
        text=text,
        answers=tuple(answers),
        question_type=str(entry.get("question_type") or ""),
        answer_type=str(entry.get("answer_type") or ""),
        identity=entry.get("question_id"),
    )
