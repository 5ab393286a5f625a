"""Sources of images with captions as people have them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contracap.cli import main
from contracap.data.samples import Sample
from contracap.data.shard_maker import make_shards
from contracap.data.shards import list_shards, read_samples

Made = tuple[dict[str, tuple[str, ...]], dict[str, int]]


def captions_of(out: Path) -> dict[str, tuple[str, ...]]:
    return {str(sample.fields["source"]): sample.captions for sample in samples_of(out)}


def samples_of(out: Path) -> list[Sample]:
    return [sample for shard in list_shards(out) for sample in read_samples(shard)]


@pytest.fixture
def make(trial: Callable[[str], Path], tmp_path: Path) -> Callable[..., Made]:
    """What `shards make` makes of a trial: captions by the names of images, and how many of each kind it left out."""

    def run(case: str, name: str, **options: Any) -> Made:
        made = make_shards(trial(case) / name, tmp_path / "out", **options)
        return captions_of(tmp_path / "out"), made.skipped

    return run


def numbered(*words: str, name: str = "images/{}.jpg") -> dict[str, tuple[str, ...]]:
    return {name.format(number): (text,) for number, text in enumerate(words) if text}


FOUR = ("a red square", "a green square", "a blue square", "a yellow square")


@pytest.mark.parametrize(
    ("name", "captions", "skipped"),
    [
        ("lonequote.tsv", ('"a red square', *FOUR[1:3], 'a 5" square'), {}),
        ("quotes.tsv", (FOUR[0], '"the best" green square', FOUR[2]), {}),
        ("backslash.csv", (FOUR[0], "", FOUR[2]), {"bad_row": 1}),
        ("open_clip-tabs.csv", FOUR, {}),
        ("semicolons.csv", FOUR, {}),
        ("blip_train.json", FOUR, {}),
    ],
)
def test_table_is_read_whatever_separates_its_cells_and_wherever_quotes_stand(
    make: Callable[..., Made], name: str, captions: tuple[str, ...], skipped: dict[str, int]
) -> None:
    assert make("tables", name) == (numbered(*captions), skipped)


def test_slashes_of_windows_lead_to_the_images(make: Callable[..., Made]) -> None:
    assert make("tables", "windows.csv") == (numbered(*FOUR, name="images\\{}.jpg"), {})


def test_several_captions_of_blip_and_names_of_kohya_without_suffix(make: Callable[..., Made], tmp_path: Path) -> None:
    assert make("tables", "blip_test.json")[0]["images/0.jpg"] == ("a red square", "a red square again")
    shutil.rmtree(tmp_path / "out")
    assert make("tables", "kohya_meta_cap.json") == (numbered(*FOUR, name="images/{}"), {})
    shutil.rmtree(tmp_path / "out")
    assert make("coco", "lavis.json") == ({"val2014/0.jpg": ("a",)}, {})


def test_table_without_names_of_columns_is_told_to_need_them(make: Callable[..., Made]) -> None:
    with pytest.raises(ValueError, match=r"'images/0\.jpg', 'a red square'.* line above"):
        make("tables", "headless.tsv")


def test_name_in_other_unicode_form_finds_its_file(make: Callable[..., Made]) -> None:
    (captions,) = make("tables", "nfc.csv")[0].values()
    assert captions == ("a red square",)


def test_source_of_the_table_itself_is_kept(make: Callable[..., Made], tmp_path: Path) -> None:
    make("tables", "source-column.csv")
    found = [(sample.fields["source"], sample.fields["image_name"]) for sample in samples_of(tmp_path / "out")]
    assert found == [("flickr", "images/0.jpg"), ("coco", "images/1.jpg")]


def test_images_in_parquet_are_read(make: Callable[..., Made]) -> None:
    assert make("tables", "hf-bytes.parquet") == (numbered(*FOUR, name="{}.jpg"), {})


def test_odd_columns_become_json_that_others_read(make: Callable[..., Made], tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    assert make("tables", "odd-columns.parquet") == (numbered(*FOUR), {})
    from tarfile import open as open_tar

    with open_tar(tmp_path / "out" / "00000.tar") as archive:
        texts = [archive.extractfile(name).read() for name in archive.getnames() if name.endswith(".json")]  # type: ignore
    similar = [json.loads(text, parse_constant=refuse)["similarity"] for text in texts]
    assert similar == [0.3, None, None, None]


def test_table_that_caption_wrote_elsewhere_finds_the_images_of_the_working_folder(
    trial: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    table = Path("sub", "c.csv")
    monkeypatch.chdir(tmp_path)
    names = [os.path.relpath(trial("tables") / "images" / f"{number}.jpg") for number in range(2)]
    table.write_text("path,caption,score\n" + "".join(f"{name},a square,0.5\n" for name in names))
    assert make_shards(table, tmp_path / "out").samples == 2


def test_flickr_tables_of_kaggle_are_read(make: Callable[..., Made], tmp_path: Path) -> None:
    assert make("flickr", "results.csv")[0]["images/0.jpg"] == ("A red square .", "A dog runs .")
    shutil.rmtree(tmp_path / "out")
    assert make("flickr", "captions.txt")[0]["images/1.jpg"] == ('"A green square" , said the man .',)


def test_metadata_may_call_the_images_image(make: Callable[..., Made]) -> None:
    found, skipped = make("imagefolder", "image-column")
    assert (list(found), skipped) == (["train/0.jpg", "train/1.jpg"], {})


def test_image_without_a_row_and_annotation_without_an_image_are_counted(make, trial, tmp_path: Path, capsys) -> None:
    assert make("imagefolder", "some-missing") == ({"train/0.jpg": ("a red square",)}, {"image_without_row": 1})
    assert (
        main(["shards", "make", str(trial("coco") / "orphans.json"), "--out", str(tmp_path / "coco"), "--workers", "0"])
        == 0
    )
    assert "skipped 2: annotation_without_image" in capsys.readouterr().out


def test_coco_ids_match_as_numbers_and_as_texts(make: Callable[..., Made]) -> None:
    assert make("coco", "ids-of-two-kinds.json") == (numbered("x", "x", "x", name="{}.jpg"), {})


def test_images_without_annotations_are_told_to_lack_them(make: Callable[..., Made]) -> None:
    with pytest.raises(ValueError, match="layout of coco: it lacks 'annotations'"):
        make("coco", "image_info_test2017.json")


def test_captions_beside_images_are_read_by_all_conventions(make: Callable[..., Made]) -> None:
    found, skipped = make("sidecars", "")
    one = ("a red square",)
    expected = {name: one for name in ("plain", "bom", "utf16", "full-name", "upper", "caption", "json")}
    expected["crlf"] = ("a red square", "second")
    expected["paragraphs"] = ("The picture shows a red square.", "It stands on white.")
    assert found == {f"{name}.png": captions for name, captions in expected.items()}
    assert skipped == {"broken_text": 1, "no_caption": 3}


def test_text_file_may_be_one_caption(make: Callable[..., Made]) -> None:
    found = make("sidecars", "", caption_lines=False)[0]
    assert found["paragraphs.png"] == ("The picture shows a red square.\n\nIt stands on white.",)


@pytest.mark.parametrize(("name", "questions"), [("whole", 3), ("strings", 2), ("test", 2), ("partly", 1)])
def test_questions_become_samples_with_or_without_answers(make, tmp_path: Path, name: str, questions: int) -> None:
    make("vqa", f"{name}_questions.json")
    asked = [question for sample in samples_of(tmp_path / "out") for question in sample.fields["qa"]]
    assert len(asked) == questions
    assert all(("answers" in question) == (name != "test") for question in asked)


def test_image_with_bytes_that_are_not_text_in_its_name_becomes_a_sample(trial, tmp_path: Path) -> None:
    folder = tmp_path / "names"
    shutil.copytree(trial("names"), folder)
    images = [path for path in folder.rglob("*.*") if path.is_file() and not path.name.startswith(".")]
    for path in images:
        path.with_suffix(".txt").write_text("a square")
    assert make_shards(folder, tmp_path / "out").samples == len(images)
    assert any("caf\\udce9" in str(sample.fields["source"]) for sample in samples_of(tmp_path / "out"))
