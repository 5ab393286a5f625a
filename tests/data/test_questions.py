import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from contracap.data.annotations import SourceError
from contracap.data.questions import Question, QuestionSamples, parse_questions
from contracap.data.samples import Sample
from contracap.data.shards import read_samples


def sample(**fields: Any) -> Sample:
    return Sample(key="7", image=b"", captions=(), fields=fields, shard="0.tar")


def write(folder: Path, *, version: str = "v2_", images: tuple[int, ...] = (42, 7), **answer: str) -> Path:
    """Files as VQAv2 and OK-VQA lay them out, about the images 42 and 7."""
    asked = [(420, 42, "what is it?"), (70, 7, "is it red?"), (421, 42, "how many?")]
    said = [
        {
            "question_id": number,
            "image_id": picture,
            "question_type": "what is",
            "answer_type": "other",
            "answers": [{"answer_id": i, "answer": f"answer {i % 2}", **answer} for i in range(1, 11)],
        }
        for number, picture, _ in asked
    ]
    put = [{"question_id": number, "image_id": picture, "question": text} for number, picture, text in asked]
    path = folder / f"{version}OpenEnded_mscoco_val2014_questions.json"
    path.write_text(json.dumps({"questions": put}))
    (folder / f"{version}mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": said}))
    (folder / "val2014").mkdir(exist_ok=True)
    for picture in images:
        (folder / "val2014" / f"COCO_val2014_{picture:012d}.jpg").write_bytes(b"picture %d" % picture)
    return path


@pytest.mark.parametrize(
    ("version", "answer"), [("v2_", {"answer_confidence": "yes"}), ("", {"raw_answer": "answering"})]
)
@pytest.mark.parametrize("pictures", ["", "val2014"])
def test_files_of_vqav2_and_ok_vqa_become_pictures_with_their_questions(
    tmp_path: Path, version: str, answer: dict[str, str], pictures: str
) -> None:
    path = write(tmp_path, version=version, **answer)
    samples = QuestionSamples(path, images=tmp_path / pictures if pictures else None)
    first, second = samples
    assert (first.key, first.image) == ("COCO_val2014_000000000042", b"picture 42")
    assert (second.key, second.shard) == ("COCO_val2014_000000000007", path.name)
    ten = ("answer 1", "answer 0") * 5
    assert parse_questions(first) == tuple(
        Question(text=text, answers=ten, question_type="what is", answer_type="other", identity=number)
        for number, text in ((420, "what is it?"), (421, "how many?"))
    )
    assert [question.text for question in parse_questions(second)] == ["is it red?"]
    assert [*samples] == [first, second]


def test_pictures_that_are_not_there_are_named_before_the_first_sample(tmp_path: Path) -> None:
    path = write(tmp_path, images=(42,))
    with pytest.raises(SourceError, match=r"asks about 2 images, of which 1 are not in .*: one is the image 7; name "):
        QuestionSamples(path)
    with pytest.raises(FileNotFoundError, match="no such source"):
        QuestionSamples(tmp_path / "other.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(SourceError, match="does not have the layout of vqa"):
        QuestionSamples(tmp_path / "list.json")


def test_a_single_answer_is_that_of_one_person() -> None:
    (question,) = parse_questions(sample(qa=[{"question": "is it?", "answer": "yes"}]))
    assert question == Question(text="is it?", answers=("yes",))


def test_a_type_of_null_is_none() -> None:
    (question,) = parse_questions(
        sample(qa=[{"question": "is it?", "answer": "yes", "question_type": None, "answer_type": None}])
    )
    assert (question.question_type, question.answer_type) == ("", "")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "sample 7 of 0.tar has no questions"),
        ({"qa": []}, "sample 7 of 0.tar has no questions"),
        ({"qa": ["is it?"]}, "question 0 of sample 7 of 0.tar is not an object"),
        (
            {"qa": [{"question": "is it?", "answer": "yes"}, {"question": "is it?", "answer": 1}]},
            "question 1 of sample 7 of 0.tar has answers that are not texts",
        ),
        ({"qa": [{"question": "is it?", "answers": [1]}]}, "answers must be a list of texts"),
        ({"qa": [{"question": " ", "answer": "yes"}]}, "question 0 of sample 7 of 0.tar has no text"),
    ],
)
def test_questions_that_are_not_as_they_should_be_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_questions(sample(**fields))


def test_easy_vqa_is_read_as_it_lies(data_folder: Path) -> None:
    samples = islice(read_samples(str(data_folder / "easy_vqa" / "train" / "000000.tar")), 500)
    asked = [question for sample in samples for question in parse_questions(sample)]
    answers = json.loads((data_folder / "easy_vqa" / "manifest.json").read_text())["answers"]
    assert len(asked) > 4500 and {answer for question in asked for answer in question.answers} == set(answers)
