"""What files say about pictures: tables, Flickr token files, COCO and Karpathy JSON, questions and answers.

The readers give an entry for each row, line or picture, in the order of the file. Which entries mean the same picture,
and where it lies, is for `data.sources` to find out.
"""

import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from sys import intern
from typing import Any

# Usual names of columns, in the order of preference; upper and lower case are the same.
PICTURE_COLUMNS = ("image", "image_path", "path", "file", "file_name", "filepath", "url")
CAPTION_COLUMNS = ("caption", "text", "captions", "title")

TABLE_HEAD = "image,caption"  # of Kaggle's captions.txt, which is a CSV file
BARS_HEAD = "image_name|"  # of Kaggle's results.csv, in one line of which the second bar is missing
BARS = re.compile(r"(?P<picture>[^|]+)\| *\d+ *\|?(?P<caption>.*)")
TOKEN = re.compile(r"(?P<picture>.+)#\d+\t(?P<caption>.*)")


class SourceError(ValueError):
    """A source that cannot be read; the message names it and says what would do."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a source says about a picture: its name as it stands there, captions, and whatever else."""

    picture: str
    captions: tuple[str, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Refused:
    """What gives no sample: its name in the source, the kind it is counted under, and why."""

    source: str
    kind: str
    message: str


def read_table(
    path: Path, *, picture_columns: Sequence[str] = PICTURE_COLUMNS, caption_columns: Sequence[str] = CAPTION_COLUMNS
) -> Iterator[Entry | Refused]:
    """The rows of a CSV, TSV, Parquet or JSON-lines file; the columns besides the two become fields.

    Raises:
        SourceError: if the file is not what its suffix says, lacks the columns, or has pictures that are no names.
    """
    picture_column = caption_column = None
    for number, row in enumerate(_rows(path), 1):
        if isinstance(row, Refused):
            yield row
            continue
        picture_column = picture_column or _column(path, row, picture_columns, "pictures, --image-column")
        caption_column = caption_column or _column(path, row, caption_columns, "captions, --caption-column")
        picture, captions = row.pop(picture_column, None), row.pop(caption_column, None)
        if picture is None or picture == "":
            message = f"the column {picture_column} is empty"
            yield Refused(source=f"{path.name}, row {number}", kind="no_picture", message=message)
        elif isinstance(picture, str):
            yield Entry(picture=picture, captions=texts(captions), fields=row)
        else:
            raise SourceError(
                f"{path}, row {number}: the column {picture_column} holds {type(picture).__name__}, not paths or URLs; "
                "store the pictures as files, or name another column with --image-column"
            )


def read_flickr(path: Path) -> Iterator[Entry | Refused]:
    """The captions of a Flickr8k or Flickr30k file, a line each.

    Three layouts: `name.jpg#0`, a tab, the caption; Kaggle's `captions.txt` with the head `image,caption`; Kaggle's
    `results.csv` with the head `image_name| comment_number| comment`.

    Raises:
        SourceError: if the file is no text.
    """
    head, *rest = lines = read_text(path).split("\n")
    if head.startswith(TABLE_HEAD):
        yield from read_table(path)
        return
    first, lines, pattern = (2, rest, BARS) if head.startswith(BARS_HEAD) else (1, lines, TOKEN)
    for number, line in enumerate(lines, first):
        found = pattern.fullmatch(line)
        if found is not None:
            yield Entry(picture=found["picture"], captions=texts(found["caption"]))
        elif line:
            message = "not a picture, a number and a caption"
            yield Refused(source=f"{path.name}, line {number}", kind="bad_row", message=message)


def read_coco(document: dict[str, Any]) -> Iterator[Entry]:
    """The pictures of COCO captions JSON, in the order of its `images`."""
    captions = defaultdict[Any, list[str]](list)
    for annotation in document["annotations"]:
        captions[annotation["image_id"]].extend(texts(annotation["caption"]))
    for image in document["images"]:
        fields = {name: value for name, value in image.items() if name != "file_name"}
        yield Entry(picture=str(image["file_name"]), captions=tuple(captions[image["id"]]), fields=fields)


def read_karpathy(path: Path, document: dict[str, Any], splits: Sequence[str] = ()) -> Iterator[Entry]:
    """The pictures of Karpathy's `dataset_*.json` in these splits, or in all.

    Raises:
        SourceError: if a split has no picture.
    """
    found = Counter(image["split"] for image in document["images"])
    for split in splits:
        if split not in found:
            raise SourceError(f"{path} has no pictures in the split {split}; its splits are {', '.join(found)}")
    for image in document["images"]:
        if not splits or image["split"] in splits:
            folder = image.get("filepath")  # Flickr's files have none
            captions = texts([sentence["raw"] for sentence in image["sentences"]])
            used = ("filepath", "filename", "sentences", "sentids")
            fields = {name: value for name, value in image.items() if name not in used}
            name = f"{folder}/{image['filename']}" if folder else str(image["filename"])
            yield Entry(picture=name, captions=captions, fields=fields)


def read_vqa(path: Path, document: dict[str, Any], pictures: Iterable[str]) -> Iterator[Entry]:
    """The pictures that the questions of a VQA file are about, with the field `qa`: a list of objects with `question`,
    `answer` (the most common one), `answers`, `question_id`, and the types of both where they are known. Ids match by
    number, also where one file has them as texts.

    Args:
        path: the questions, such as `v2_OpenEnded_mscoco_train2014_questions.json`; the answers lie next to them, as
            `v2_mscoco_train2014_annotations.json`. Without that file, as in a test set, they have none.
        document: what `path` holds.
        pictures: names of picture files. The id of a picture is the number at the end of its name, or its name.

    Raises:
        SourceError: if a question has no answer where others have, there are two pictures with one id, or the file of
            answers is not what it should be.
    """
    beside = path.with_name(path.name.replace("OpenEnded_", "").replace("questions", "annotations"))
    answers = _answers(beside) if beside != path and beside.is_file() else None
    named = defaultdict[Any, list[str]](list)
    for name in pictures:
        stem = PurePosixPath(name).stem
        number = re.search(r"\d+$", stem)
        for identity in {stem, int(number[0])} if number else {stem}:
            named[identity].append(name)
    asked = defaultdict[Any, list[dict[str, Any]]](list)
    for question in document["questions"]:
        identity = question["question_id"]
        if answers is not None and _number(identity) not in answers:
            raise SourceError(f"question {identity} of {path.name} has no answer in {beside.name}")
        asked[_number(question["image_id"])].append(
            {"question_id": identity, "question": question["question"], **(answers or {}).get(_number(identity), {})}
        )
    for identity, questions in asked.items():
        names = named.get(identity, [str(identity)])
        if len(names) > 1:
            raise SourceError(
                f"picture {identity} of {path.name} may be {names[0]} or {names[1]}: name one folder, with --pictures, "
                "or behind the file where there is no such option"
            )
        yield Entry(picture=names[0], fields={"image_id": identity, "qa": questions})


def texts(value: Any) -> tuple[str, ...]:
    """The captions that a cell holds, a text or a list of them, without those that are empty or no text."""
    found = value if isinstance(value, list) else [value]
    stripped = (text.strip() for text in found if isinstance(text, str))
    return tuple(text for text in stripped if text)


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, without a byte order mark.

    Raises:
        SourceError: if it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text: {error}") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        SourceError: if it is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON: {error}") from None


def other_layout(path: Path, layout: str, error: Exception) -> SourceError:
    """What to raise at JSON of another layout, from the error that it makes a reader run into."""
    problem = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
    return SourceError(f"{path} does not have the layout of {layout}: {problem}")


def read_list(path: Path, name: str) -> tuple[str, ...]:
    """The texts of a `.txt` file, one a line, or of a JSON file, which holds a list of them, or an object with such a
    list under a name.

    Raises:
        SourceError: if the file holds no such list, or one of its texts is empty.
    """
    content = read_text(path).strip().split("\n") if path.suffix.lower() == ".txt" else read_json(path)
    found = content.get(name) if isinstance(content, dict) else content
    if not isinstance(found, list) or not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise SourceError(
            f"{path} holds no {name}; give a JSON list of texts, an object with a list `{name}`, or a .txt with one a "
            "line"
        )
    return tuple(text.strip() if path.suffix.lower() == ".txt" else text for text in found)


def _number(identity: Any) -> Any:
    """An id that is a number written as a text, as that number."""
    return int(identity) if isinstance(identity, str) and re.fullmatch("[0-9]{1,18}", identity) else identity


def _answers(path: Path) -> dict[Any, dict[str, Any]]:
    """What a VQA file of answers says about each question, by its id."""
    found = {}
    try:
        for annotation in read_json(path)["annotations"]:
            answers = [intern(answer["answer"]) for answer in annotation["answers"]]  # few differ: each is kept once
            kept = {name: annotation[name] for name in ("question_type", "answer_type") if name in annotation}
            usual = annotation.get("multiple_choice_answer") or Counter(answers).most_common(1)[0][0]
            found[_number(annotation["question_id"])] = {"answer": usual, "answers": answers, **kept}
    except (LookupError, TypeError, AttributeError) as error:
        raise other_layout(path, "answers of vqa", error) from error
    return found


def _column(path: Path, row: dict[str, Any], wanted: Sequence[str], purpose: str) -> str:
    """The first of the wanted columns that a row has."""
    there = {name.lower(): name for name in reversed(row)}
    for name in wanted:
        if name.lower() in there:
            return there[name.lower()]
    raise SourceError(
        f"{path} has no column {' or '.join(wanted)}, but {', '.join(row)}: name the one with the {purpose}"
    )


def _rows(path: Path) -> Iterator[dict[str, Any] | Refused]:
    match path.suffix.lower():
        case ".parquet":
            return _parquet_rows(path)
        case ".jsonl":
            return _json_rows(path)
        case ".tsv":
            return _csv_rows(path, "\t")
        case _:
            return _csv_rows(path, ",")


def _csv_rows(path: Path, delimiter: str) -> Iterator[dict[str, Any] | Refused]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            head = next(reader, [])
            for cells in reader:
                if len(cells) == len(head):
                    yield dict(zip(head, cells, strict=True))
                elif cells:  # most likely a caption with a delimiter and without quotes, which would be cut
                    message = f"{len(cells)} cells under {len(head)} columns"
                    yield Refused(source=f"{path.name}, line {reader.line_num}", kind="bad_row", message=message)
        except UnicodeDecodeError as error:
            raise SourceError(f"{path} is not UTF-8 text: {error}") from None
        except csv.Error as error:
            raise SourceError(f"{path}, line {reader.line_num}: {error}") from None


def _json_rows(path: Path) -> Iterator[dict[str, Any] | Refused]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            row = None
        if isinstance(row, dict):
            yield row
        else:
            yield Refused(source=f"{path.name}, line {number}", kind="bad_row", message="not a JSON object")


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise SourceError(f"to read {path} pyarrow is needed: pip install 'contracap[data]'") from None
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except ArrowException as error:
        raise SourceError(f"{path} is not a Parquet file, or broken: {error}") from None
