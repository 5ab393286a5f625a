"""Tables with rows, cells and separators that people have."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracap.data.annotations import SourceError
from contracap.data.datasets.tables import cell_captions
from contracap.data.shard_maker import make_shards
from contracap.data.sources import SourceContents, read_source
from tests.data.test_shard_maker import picture, read
from tests.data.test_sources import pairs, skips, write, write_parquet

ROWS = 100
BAD = 50  # the row, from 0, that is wrong


def rows(bad: str, row: str) -> str:
    return "".join(bad if number == BAD else row.format(number) for number in range(ROWS))


def found(source: SourceContents) -> tuple[int, list[str]]:
    return len(source.entries), [kind for _, kind in skips(source)]


@pytest.mark.parametrize(
    ("suffix", "head", "row", "bad", "kind"),
    [
        ("csv", "image,caption\n", "{}.jpg,a square\n", 'x.jpg,"a 5" square"\n', "bad_row"),
        ("csv", "image,caption\n", "{}.jpg,a square\n", 'x.jpg,"a square\n', "bad_row"),
        ("csv", "image;caption\n", "{}.jpg;a square\n", "x.jpg;a;b\n", "bad_row"),
        ("csv", "image,caption\n", "{}.jpg,a square\n", "x.jpg,caf\udce9\n", "broken_text"),
        ("tsv", "image\tcaption\n", "{}.jpg\ta square\n", "x.jpg\n", "bad_row"),
        ("jsonl", "", '{{"image": "{}.jpg", "caption": "a square"}}\n', '{"image": "x', "bad_row"),
        ("jsonl", "", '{{"image": "{}.jpg", "caption": "a square"}}\n', '{"image": "caf\udce9"}\n', "broken_text"),
        ("jsonl", "", '{{"image": "{}.jpg", "caption": "a square"}}\n', '{"image": 7, "caption": ""}\n', "no_picture"),
        ("token", "", "{}.jpg#0\ta square\n", "x.jpg#0\tcaf\udce9\n", "broken_text"),
    ],
)
def test_one_bad_row_is_skipped_and_the_others_are_read(
    tmp_path: Path, suffix: str, head: str, row: str, bad: str, kind: str
) -> None:
    text = head + rows(bad if bad.endswith("\n") else f"{bad}\n", row)
    path = tmp_path / f"t.{suffix}"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert found(read_source(path)) == (ROWS - 1, [kind])


@pytest.mark.parametrize("bad", [{"image": 7, "caption": "a"}, 7, {"caption": "a"}])
def test_one_bad_value_of_a_json_list_is_skipped(tmp_path: Path, bad: Any) -> None:
    good = [{"image": f"{number}.jpg", "caption": "a square"} for number in range(ROWS)]
    source = read_source(write(tmp_path / "t.json", [*good[:BAD], bad, *good[BAD:]]))
    assert len(source.entries) == ROWS and len(source.skipped) == 1


@pytest.mark.parametrize("bad", [{"id": 7}, 7, {"id": 7, "file_name": None}])
def test_one_bad_image_or_annotation_of_coco_is_skipped(tmp_path: Path, bad: Any) -> None:
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(3)]
    said = [{"image_id": number, "caption": "a square"} for number in range(3)]
    source = read_source(write(tmp_path / "c.json", {"images": [*images, bad], "annotations": [*said, bad]}))
    assert found(source) == (3, ["bad_row", "bad_row"])


def test_text_that_is_not_utf8_in_parquet_is_one_skipped_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    captions = [b"a square"] * 10
    captions[5] = b"caf\xe9"
    text = pyarrow.Array.from_buffers(pyarrow.string(), 10, pyarrow.array(captions).buffers())
    table = pyarrow.table({"image": [f"{number}.jpg" for number in range(10)], "caption": text})
    parquet.write_table(table, tmp_path / "t.parquet")
    assert found(read_source(tmp_path / "t.parquet")) == (9, ["bad_row"])


def test_damaged_group_of_a_parquet_file_is_told_and_the_others_are_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    names = {"image": [f"{number}.jpg" for number in range(30)], "caption": [f"square {n}" for n in range(30)]}
    parquet.write_table(pyarrow.table(names), path, row_group_size=10, compression="gzip")
    with parquet.ParquetFile(path) as file:
        column = file.metadata.row_group(1).column(1)
        start, size = column.dictionary_page_offset or column.data_page_offset, column.total_compressed_size
    content = bytearray(path.read_bytes())
    content[start + 8 : start + size] = b"\xff" * (size - 8)
    path.write_bytes(content)
    source = read_source(path)
    assert len(source.entries) == 20 and "10 rows cannot be read" in source.skipped[0].message


@pytest.mark.parametrize("written", ['["one", "two"]', "['one', 'two']", "['one' 'two']", "['one'\n 'two']"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_list_in_a_cell_is_several_captions(tmp_path: Path, written: str, suffix: str) -> None:
    if suffix == "jsonl":
        text = json.dumps({"filename": "a.jpg", "raw": written})
    else:
        quoted = written.replace('"', '""')
        text = f'raw,sentids,split,filename,img_id\n"{quoted}","[0, 1]",train,a.jpg,0\n'
    assert pairs(read_source(write(tmp_path / f"t.{suffix}", text))) == [("a.jpg", ("one", "two"))]


@pytest.mark.parametrize("written", ["[a red square]", '["a", 3]', "['a' and 'b']", "[sic]", "['\\x']"])
def test_text_in_brackets_that_is_not_a_list_stays_a_caption(tmp_path: Path, written: str) -> None:
    assert pairs(read_source(write(tmp_path / "t.tsv", f"image\tcaption\na.jpg\t{written}\n"))) == [
        ("a.jpg", (written,))
    ]


@settings(max_examples=20, deadline=None)
@given(captions=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1, max_size=4))
def test_list_that_python_wrote_is_read_back(tmp_path_factory: pytest.TempPathFactory, captions: list[str]) -> None:
    path = tmp_path_factory.mktemp("lists") / "t.jsonl"
    write(path, json.dumps({"image": "a.jpg", "caption": str(captions)}))
    expected = tuple(text.strip() for text in captions if text.strip())
    assert pairs(read_source(path)) == ([("a.jpg", expected)] if expected else [])


@pytest.mark.parametrize("delimiter", ["\t", ",", ";", "|"])
@pytest.mark.parametrize("suffix", ["tsv", "CSV"])
def test_separator_is_found_out_whatever_the_suffix(tmp_path: Path, delimiter: str, suffix: str) -> None:
    lines = [["id, of all", "Image", "caption"], ["1", "a.jpg", "one"]]
    if delimiter == ",":
        lines[0][0] = "id"
    text = "\ufeff\n" + "".join(delimiter.join(line) + "\r\n" for line in lines)
    assert pairs(read_source(write(tmp_path / f"t.{suffix}", text))) == [("a.jpg", ("one",))]


def test_table_in_utf16_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image\tcaption\na.jpg\tein Maß\n", encoding="utf-16")
    assert pairs(read_source(tmp_path / "t.csv")) == [("a.jpg", ("ein Maß",))]


def test_message_about_columns_quotes_them_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"'my  image', 'a\\tb'"):
        read_source(write(tmp_path / "t.csv", '"my  image","a\tb"\n1,2\n'), kind="table")


def test_blanks_around_names_and_urls_are_not_part_of_them(tmp_path: Path) -> None:
    text = 'image, caption\n a.jpg , "one, two"\n https://x.org/1.jpg ,three\n'
    source = read_source(write(tmp_path / "t.csv", text))
    assert [(item.path, item.captions) for item in source.entries] == [
        (str(tmp_path / "a.jpg"), ("one, two",)),
        ("https://x.org/1.jpg", ("three",)),
    ]


def test_json_lines_under_the_suffix_of_json_are_read(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"image": f"{number}.jpg", "caption": "a"}) for number in range(2))
    assert len(read_source(write(tmp_path / "t.json", lines)).entries) == 2


def test_images_in_parquet_are_read_from_every_group_and_in_every_shape(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "file.jpg").write_bytes(picture(7))
    shapes = [{"bytes": picture(number), "path": "same.jpg"} for number in range(5)]
    shapes += [{"bytes": None, "path": "file.jpg"}, {"bytes": None, "path": None}, None]
    write_rows = [{"image": shape, "text": f"caption {number}"} for number, shape in enumerate(shapes)]
    (tmp_path / "data").mkdir()
    from pyarrow import Table, parquet

    table = Table.from_pylist(write_rows)
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    made = make_shards(tmp_path / "t.parquet", tmp_path / "out", samples_per_shard=3)
    assert (made.samples, made.skipped) == (6, {"no_picture": 2})
    assert [sample.image for sample in read(tmp_path / "out")] == [*map(picture, range(5)), picture(7)]


def test_parquet_files_of_a_folder_are_read_by_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number in range(2):
            (tmp_path / "data").mkdir(exist_ok=True)
            row = {"image": {"bytes": picture(number), "path": None}, "caption": f"{split} {number}"}
            write_parquet(tmp_path / "data" / f"{split}-{number:05}-of-00002.parquet", [row])
    (tmp_path / "README.md").write_text("a data set")
    source = read_source(tmp_path, splits=("train",))
    assert [item.captions for item in source.entries] == [("train 0",), ("train 1",)]
    assert len(read_source(tmp_path).entries) == 4
    with pytest.raises(SourceError, match="no Parquet file of the split dev"):
        read_source(tmp_path, splits=("dev",))
    made = make_shards(tmp_path, tmp_path / "out", splits=("test",))
    assert made.samples == 2


@settings(max_examples=30, deadline=None)
@given(content=st.binary(max_size=200), suffix=st.sampled_from(["csv", "tsv", "json", "jsonl", "txt", "parquet"]))
def test_any_bytes_are_a_table_or_one_line(tmp_path_factory, content: bytes, suffix: str) -> None:
    path = tmp_path_factory.mktemp("bytes") / f"t.{suffix}"
    for start in (b"", b"image,caption\n", b"\xff\xfe"):
        path.write_bytes(start + content)
        try:
            read_source(path)
        except SourceError as error:
            assert "\n" not in str(error)


def test_numbers_and_depth_that_json_cannot_take_are_one_line(tmp_path: Path) -> None:
    for text in ("9" * 10_000, "[" * 100_000):
        with pytest.raises(SourceError, match="not JSON"):
            read_source(write(tmp_path / "t.json", text))


def test_empty_caption_does_not_hide_one_in_another_column(tmp_path: Path) -> None:
    text = "image,caption,text,label\na.jpg,,one,7\nb.jpg,two,three,8\n"
    source = read_source(write(tmp_path / "t.csv", text))
    assert pairs(source) == [("a.jpg", ("one",)), ("b.jpg", ("two",))]
    assert [item.fields for item in source.entries] == [{"label": "7"}, {"text": "three", "label": "8"}]


def test_separators_at_the_end_and_the_line_of_excel_spoil_no_row(tmp_path: Path) -> None:
    text = "sep=;\nimage;caption\na.jpg;one;\nb.jpg;two;;\n"
    assert pairs(read_source(write(tmp_path / "t.csv", text))) == [("a.jpg", ("one",)), ("b.jpg", ("two",))]


def test_name_that_no_file_can_have_is_one_missing_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(0))
    names = ["x" * 5000 + ".jpg", "nul\0.jpg", "a.jpg", "\ud83d.jpg"]
    lines = [json.dumps({"image": name, "caption": "one", "captions": ["two"]}) for name in names]
    made = make_shards(write(tmp_path / "t.jsonl", "\n".join(lines)), tmp_path / "out")
    assert (made.samples, made.skipped) == (1, {"missing_file": 3})
    assert read(tmp_path / "out")[0].fields["other_captions"] == ["two"]


@pytest.mark.parametrize(
    ("written", "captions"),
    [("[]", ()), ("[None]", ()), ("['a', nan]", ("a",)), ("('a', 'b')", ("a", "b")), ('[{"raw": "a"}]', ("a",))],
)
def test_lists_with_missing_values_tuples_and_objects_are_lists(written: str, captions: tuple[str, ...]) -> None:
    assert cell_captions(written) == captions


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="'caption'"):
        read_source(write(tmp_path / "t.csv", "image,caption,caption\na.jpg,a,b\n"))


def test_spellings_of_a_path_are_one_image(tmp_path: Path) -> None:
    rows = f"image,caption\na.jpg,1\n./a.jpg,2\n{tmp_path}/a.jpg,3\n"
    assert pairs(read_source(write(tmp_path / "t.csv", rows))) == [("a.jpg", ("1", "2", "3"))]


@pytest.mark.parametrize("head", [b"\x1f\x8b\x08", b"ARROW1", b"FEA1", b"PAR1"])
def test_format_of_no_kind_is_refused_with_what_to_do(tmp_path: Path, head: bytes) -> None:
    (path := tmp_path / "t.x").write_bytes(head)
    with pytest.raises(SourceError, match=r"unpack|\.parquet"):
        read_source(path, kind="table")
