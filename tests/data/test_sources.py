import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracap.data.annotations import Entry, SourceError
from contracap.data.sources import SourceContents, read_source

PAIRS = [("a.jpg", ("one", "two")), ("b.png", ("three",))]


def write(path: Path, content: Any) -> Path:
    """A file with this text, or with this as JSON; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def pairs(source: SourceContents) -> list[tuple[str, tuple[str, ...]]]:
    return [(item.name, item.captions) for item in source.entries]


def skips(source: SourceContents) -> list[tuple[str, str]]:
    return [(skipped.source, skipped.kind) for skipped in source.skipped]


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def test_folder_takes_the_lines_beside_each_picture(tmp_path: Path) -> None:
    for name in ("b.png", "a.b.JPG", "sub/c.webp", "sub/none.jpg", "notes.md", ".hidden.jpg", ".trash/d.jpg"):
        write(tmp_path / name, "")
    write(tmp_path / "a.b.txt", "\ufeffone\r\n\n two \n")
    write(tmp_path / "b.caption", "three")
    write(tmp_path / "sub" / "c.txt", "four")
    write(tmp_path / "sub" / "c.caption", "not this")
    source = read_source(tmp_path)
    assert source.kind == "folder"
    assert pairs(source) == [("a.b.JPG", ("one", "two")), ("b.png", ("three",)), ("sub/c.webp", ("four",))]
    assert [item.path for item in source.entries] == [str(tmp_path / item.name) for item in source.entries]
    assert skips(source) == [("sub/none.jpg", "no_caption")]


ROWS = [
    {"id": "7", "Image_Path": "a.jpg", "TEXT": "one"},
    {"id": "8", "Image_Path": "b.png", "TEXT": "three"},
    {"id": "9", "Image_Path": "a.jpg", "TEXT": "two"},
]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_rows_of_a_table_with_the_same_picture_are_one_item(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"table.{suffix}"
    if suffix == "parquet":
        write_parquet(path, ROWS)
    elif suffix == "jsonl":
        write(path, "\n".join(map(json.dumps, ROWS)))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "Image_Path", "TEXT"], delimiter="," if suffix == "csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    source = read_source(path)
    assert source.kind == "table"
    assert source.entries == [
        Entry(name="a.jpg", path=str(tmp_path / "a.jpg"), captions=("one", "two"), fields={"id": "7"}),
        Entry(name="b.png", path=str(tmp_path / "b.png"), captions=("three",), fields={"id": "8"}),
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_caption_cell_may_be_a_list(tmp_path: Path, suffix: str) -> None:
    rows = [{"file_name": "a.jpg", "captions": ["one", " ", "two"]}, {"file_name": "b.png", "captions": ["three"]}]
    path = tmp_path / f"table.{suffix}"
    write_parquet(path, rows) if suffix == "parquet" else write(path, "\n".join(map(json.dumps, rows)))
    assert pairs(read_source(path)) == PAIRS


def test_table_may_name_urls_absolute_paths_and_columns_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "photo,url,alt\nhttps://x.org/1.jpg,u,one\n/data/2.jpg,u,two\n../3.jpg,u,three\n")
    source = read_source(path, image_column="photo", caption_columns=("alt",), images=tmp_path)
    assert [item.path for item in source.entries] == ["https://x.org/1.jpg", "/data/2.jpg", str(tmp_path / "../3.jpg")]
    assert [item.fields for item in source.entries] == [{"url": "u"}] * 3


def test_rows_that_cannot_be_used_are_refused_with_their_place(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", "image,caption\na.jpg,A dog, running\n,lost\nb.jpg,\nc.jpg,good\n")
    source = read_source(table)
    assert pairs(source) == [("c.jpg", ("good",))]
    assert skips(source) == [("t.csv, line 2", "bad_row"), ("t.csv, row 2", "no_picture"), ("b.jpg", "no_caption")]
    lines = write(tmp_path / "t.jsonl", '{"image": "a.jpg", "caption": "one"}\n{"image": \n[1]\n\n{"image": null}\n')
    assert skips(read_source(lines)) == [
        ("t.jsonl, line 2", "bad_row"),
        ("t.jsonl, line 3", "bad_row"),
        ("t.jsonl, row 4", "no_picture"),
    ]


@settings(max_examples=15, deadline=None)
@given(captions=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r")).map(str.strip), min_size=1))
def test_any_caption_survives_a_csv_table(tmp_path_factory: pytest.TempPathFactory, captions: list[str]) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *((f"{i}.jpg", text) for i, text in enumerate(captions))])
    expected = [(f"{i}.jpg", (text,)) for i, text in enumerate(captions) if text]
    assert pairs(read_source(path)) == expected


def coco() -> dict[str, Any]:
    return {
        "images": [{"id": 5, "file_name": "a.jpg", "height": 4}, {"id": 3, "file_name": "b.png", "height": 5}],
        "annotations": [
            {"id": 1, "image_id": 5, "caption": "one\n"},
            {"id": 2, "image_id": 3, "caption": "three"},
            {"id": 3, "image_id": 5, "caption": "two"},
        ],
    }


def test_coco_captions_are_gathered_by_picture(tmp_path: Path) -> None:
    pictures = tmp_path / "train2014"
    pictures.mkdir()
    source = read_source(write(tmp_path / "captions.json", coco()), images=pictures)
    assert source.kind == "coco"
    assert pairs(source) == PAIRS
    assert source.entries[0] == Entry(
        name="a.jpg", path=str(pictures / "a.jpg"), captions=("one", "two"), fields={"id": 5, "height": 4}
    )


def karpathy() -> dict[str, Any]:
    def image(folder: str, name: str, split: str) -> dict[str, Any]:
        sentences = [{"raw": f"the first of {name}", "tokens": []}, {"raw": f"another of {name}"}]
        names = {"filepath": folder, "filename": name, "split": split, "cocoid": 7}
        return names | {"sentences": sentences, "sentids": [1]}

    places = (("train2014", "a.jpg", "train"), ("val2014", "b.jpg", "val"), ("val2014", "c.jpg", "restval"))
    return {"images": [image(*place) for place in places], "dataset": "coco"}


def test_karpathy_splits_are_selected(tmp_path: Path) -> None:
    path = write(tmp_path / "dataset_coco.json", karpathy())
    source = read_source(path, splits=("train", "restval"))
    assert source.kind == "karpathy"
    assert pairs(source) == [
        ("train2014/a.jpg", ("the first of a.jpg", "another of a.jpg")),
        ("val2014/c.jpg", ("the first of c.jpg", "another of c.jpg")),
    ]
    assert source.entries[1].fields == {"split": "restval", "cocoid": 7}
    assert len(read_source(path).entries) == 3
    with pytest.raises(SourceError, match=r"dataset_coco\.json has no images in the split test; .* val, restval"):
        read_source(path, splits=("test",))
    document = karpathy()
    for image in document["images"]:  # as those of Flickr
        del image["filepath"]
    of_flickr = read_source(write(tmp_path / "d.json", document)).entries
    assert [item.name for item in of_flickr] == ["a.jpg", "b.jpg", "c.jpg"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("Flickr8k.token.txt", "a.jpg#0\tone\na.jpg#1\ttwo\nb.png#0\tthree\n"),
        ("results_20130124.token", "a.jpg#0\tone\na.jpg#1\ttwo\nb.png#0\tthree"),
        ("captions.txt", "image,caption\na.jpg,one\na.jpg,two\nb.png,three\n"),
        (
            "results.csv",
            "image_name| comment_number| comment\r\na.jpg| 0| one\r\na.jpg| 4   two\r\nb.png| 0| three\r\n",
        ),
    ],
)
def test_flickr_captions_are_read_in_all_their_layouts(tmp_path: Path, name: str, content: str) -> None:
    source = read_source(write(tmp_path / name, content))
    assert (source.kind, pairs(source), source.skipped) == ("flickr", PAIRS, [])


def test_flickr_line_without_a_caption_number_is_refused(tmp_path: Path) -> None:
    source = read_source(write(tmp_path / "f.token", "a.jpg#0\tone\nb.jpg two\n"))
    assert skips(source) == [("f.token, line 2", "bad_row")]


def vqa(folder: Path, answers: Sequence[int] = (0, 1, 2)) -> Path:
    asked = [(9, "what is it?"), (12, "is it red?"), (9, "how many?")]
    questions = [{"question_id": i, "image_id": image, "question": text} for i, (image, text) in enumerate(asked)]
    annotations = [
        {
            "question_id": i,
            "image_id": asked[i][0],
            "question_type": "what",
            "answer_type": "other",
            "multiple_choice_answer": f"answer {i}",
            "answers": [{"answer": f"answer {i}", "answer_id": 1}, {"answer": "another", "answer_id": 2}],
        }
        for i in answers
    ]
    write(folder / "v2_mscoco_train2014_annotations.json", {"annotations": annotations})
    return write(folder / "v2_OpenEnded_mscoco_train2014_questions.json", {"questions": questions})


def test_questions_and_answers_are_gathered_by_picture(tmp_path: Path) -> None:
    for number in (9, 12):
        write(tmp_path / "train2014" / f"COCO_train2014_{number:012}.jpg", "")
    source = read_source(vqa(tmp_path), images=tmp_path)
    assert (source.kind, source.skipped) == ("vqa", [])
    assert [item.name for item in source.entries] == [
        f"train2014/COCO_train2014_{number:012}.jpg" for number in (9, 12)
    ]
    assert source.entries[0].captions == ()
    types = {"question_type": "what", "answer_type": "other"}
    assert source.entries[0].fields == {
        "image_id": 9,
        "qa": [
            {
                "question_id": i,
                "question": text,
                "answer": f"answer {i}",
                "answers": [f"answer {i}", "another"],
                **types,
            }
            for i, text in ((0, "what is it?"), (2, "how many?"))
        ],
    }


def test_question_without_its_answer_is_refused_and_one_with_two_pictures_an_error(tmp_path: Path) -> None:
    source = read_source(vqa(tmp_path, answers=(0, 2)))
    assert [item.fields["image_id"] for item in source.entries] == [9]
    ((name, kind),) = skips(source)
    assert "question 1 of v2_" in name and kind == "no_answer"
    vqa(tmp_path)
    write(tmp_path / "a_9.jpg", "")
    write(tmp_path / "b_0009.jpg", "")
    with pytest.raises(SourceError, match=r"image 9 .* may be a_9\.jpg or b_0009\.jpg"):
        read_source(vqa(tmp_path))


@pytest.mark.parametrize(
    ("content", "lacks"),
    [
        ({"questions": []}, "it lacks 'annotations'"),
        ({"annotations": [{"question_id": 0}]}, "it lacks 'answers'"),
        ({"annotations": [{"answers": [{"answer": "red"}]}]}, "it lacks 'question_id'"),
        ({"annotations": [{"question_id": 0, "answers": []}]}, "list index out of range"),
        ([], "list indices must be integers"),
    ],
)
def test_answers_of_another_layout_are_named_and_not_the_questions(tmp_path: Path, content: object, lacks: str) -> None:
    questions = vqa(tmp_path)
    write(tmp_path / "v2_mscoco_train2014_annotations.json", content)
    said = rf"mscoco_train2014_annotations\.json does not have the layout of answers of vqa: {lacks}"
    with pytest.raises(SourceError, match=said):
        read_source(questions)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_imagefolder_names_start_at_their_metadata(tmp_path: Path, suffix: str) -> None:
    rows = [{"file_name": "a.jpg", "text": "one", "n": "1"}, {"file_name": "x/b.jpg", "text": "two", "n": "2"}]
    (tmp_path / "train").mkdir()
    path = tmp_path / "train" / f"metadata.{suffix}"
    if suffix == "parquet":
        write_parquet(path, rows)
    elif suffix == "jsonl":
        write(path, "\n".join(map(json.dumps, rows)))
    else:
        write(path, "file_name,text,n\na.jpg,one,1\nx/b.jpg,two,2\n")
    write(tmp_path / "train" / "a.jpg", "")
    source = read_source(tmp_path)
    assert source.kind == "imagefolder"
    assert pairs(source) == [("train/a.jpg", ("one",)), ("train/x/b.jpg", ("two",))]
    assert source.entries[1].path == str(tmp_path / "train/x/b.jpg")
    assert source.entries[1].fields == {"n": "2"}


@pytest.mark.parametrize("name", ["../a.jpg", "x/../../a.jpg", "/etc/a.jpg"])
def test_names_that_lead_out_of_the_pictures_folder_are_refused(tmp_path: Path, name: str) -> None:
    document = coco()
    document["images"][0]["file_name"] = name
    assert skips(read_source(write(tmp_path / "c.json", document))) == [(name, "unsafe_path")]
    write(tmp_path / "m" / "metadata.jsonl", {"file_name": name, "text": "one"})
    assert [skipped.kind for skipped in read_source(tmp_path / "m").skipped] == ["unsafe_path"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "a,b\n1,2\n", r"x\.csv has no column image or .* but 'a', 'b': name .* --image-column"),
        ("x.csv", "image,b\n1,2\n", "no column caption or text .* --caption-column"),
        ("x.csv", "", "holds nothing"),
        ("x.parquet", "no parquet", r"x\.parquet is not a Parquet file, or broken"),
        ("x.json", "{", r"x\.json is not JSON"),
        ("x.json", b'[{"image": "a.jpg", "caption": "caf\xe9"}]', r"x\.json.*UTF-8"),
        ("x.json", "[1]", r"cannot tell what .*x\.json is; looked for .* --kind"),
        ("x.json", {"images": [], "annotations": [{"caption": "x"}]}, "layout of coco: it lacks 'image_id'"),
        ("x.json", {"images": [{"sentences": 3, "split": "a", "filename": "b"}]}, "layout of karpathy: "),
        ("x.txt", "any text", "cannot tell what"),
        ("x/readme.md", "any text", "neither images nor a metadata file"),
    ],
)
def test_wrong_source_is_one_line_that_says_what_was_looked_for(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    write(tmp_path / name, content) if not isinstance(content, bytes) else (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message) as error:
        read_source(tmp_path / name.split("/")[0])
    assert "\n" not in str(error.value)


KEYS = ["images", "annotations", "questions", "sentences", "file_name", "id", "image_id", "question_id", "answers"]
VALUES = st.recursive(
    st.none() | st.integers(0, 1) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, "raw", "caption", "split"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None)
@given(document=st.dictionaries(st.sampled_from(KEYS[:3]), VALUES), answers=VALUES)
def test_any_json_is_a_source_or_one_line(tmp_path_factory, document: dict[str, Any], answers: Any) -> None:
    folder = tmp_path_factory.mktemp("json")
    write(folder / "annotations.json", {"annotations": answers})
    try:
        read_source(write(folder / "questions.json", document))
    except SourceError as error:
        assert "\n" not in str(error)


def test_absent_source_or_pictures_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such source: .*nothing\.json"):
        read_source(tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError, match=r"no such folder of images: .*nowhere"):
        read_source(write(tmp_path / "c.json", coco()), images=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": ("train",)}, "--split is for karpathy, table; .* is read as coco"),
        ({"image_column": "x"}, "--image-column is for table"),
        ({"caption_columns": ("x",)}, "--caption-column is for table, imagefolder"),
    ],
)
def test_option_that_does_not_apply_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read_source(write(tmp_path / "c.json", coco()), **options)


def test_missing_pyarrow_is_one_line_that_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.parquet", "")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'contracap\[data\]'"):
        read_source(path)


def test_absolute_paths_do_not_hide_where_the_relative_ones_start(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "tables").mkdir()
    for name in ("one.jpg", "two.jpg"):
        (tmp_path / name).touch()
    table = tmp_path / "tables" / "t.csv"
    table.write_text(f"image,caption\n{tmp_path}/one.jpg,a\ntwo.jpg,b\n")
    monkeypatch.chdir(tmp_path)
    contents = read_source(table)
    assert [Path(entry.path).name for entry in contents.entries] == ["one.jpg", "two.jpg"]
    assert all(Path(entry.path).is_file() for entry in contents.entries)
