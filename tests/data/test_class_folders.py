import logging
from pathlib import Path
from unicodedata import normalize

import pytest

from contracap.data.class_folders import class_folders
from contracap.data.loader import evaluation_samples
from contracap.data.shards import write_shard


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def test_folders_sorted_by_name_are_the_classes(tmp_path) -> None:
    make(tmp_path, "dog/2.jpg", "dog/deep/1.PNG", "Zebra/a.webp", "cat/3.jpeg", "cat/notes.txt", ".git/config")
    found = list(evaluation_samples(tmp_path))
    assert [(sample.key, sample.fields["label"]) for sample in found] == [
        ("Zebra/a.webp", 0),  # capital letters come first, as in torchvision's ImageFolder
        ("cat/3.jpeg", 1),
        ("dog/2.jpg", 2),
        ("dog/deep/1.PNG", 2),
    ]
    assert [sample.image for sample in found] == [sample.key.encode() for sample in found]


def test_samples_equal_torchvisions_image_folder(tmp_path, open_clip) -> None:
    from torchvision.datasets import ImageFolder

    make(tmp_path, *(f"{name}/{number}.png" for name in ("b_2", "B", "a", "b 1") for number in (10, 9, 1)))
    expected = [(Path(path).relative_to(tmp_path).as_posix(), label) for path, label in ImageFolder(tmp_path).samples]
    assert [(sample.key, sample.fields["label"]) for sample in evaluation_samples([tmp_path])] == expected


def test_a_folder_with_shards_is_no_folder_of_classes(tmp_path) -> None:
    make(tmp_path, "cat/1.jpg")
    write_shard(tmp_path / "0.tar", [("x", {"jpg": b"picture", "cls": b"4"})])
    assert class_folders(tmp_path) is None
    assert [sample.fields["label"] for sample in evaluation_samples(tmp_path)] == [4]


def test_folders_of_shards_are_no_folders_of_classes(tmp_path) -> None:
    write_shard(tmp_path / "train" / "0.tar", [("x", {"jpg": b"picture", "cls": b"4"})])
    make(tmp_path, "val/README.md")
    assert class_folders(tmp_path) is None
    with pytest.raises(FileNotFoundError, match=r"no shards \(.*\) in the folder"):
        next(evaluation_samples(tmp_path))


def test_an_empty_path_is_not_the_working_folder(tmp_path, monkeypatch) -> None:
    make(tmp_path, "cat/1.jpg")
    monkeypatch.chdir(tmp_path)
    assert len(list(evaluation_samples("."))) == 1
    for path in ("", [""], ["", "."]):
        assert class_folders(path) is None
        with pytest.raises(FileNotFoundError, match="the path of the shards is empty"):
            next(evaluation_samples(path))


@pytest.mark.parametrize(
    ("name", "words"),
    [("2.jpg", r"2\.jpg is not in the folder of a class"), ("dog/README.md", "dog holds no image; fill")],
)
def test_a_picture_beside_the_folders_and_a_folder_without_one_are_refused(tmp_path, name: str, words: str) -> None:
    make(tmp_path, "cat/1.jpg", name)
    with pytest.raises(ValueError, match=words):
        class_folders(tmp_path)


def test_other_files_beside_the_folders_are_named_in_one_line(tmp_path, caplog) -> None:
    make(tmp_path, "cat/1.jpg", "LICENSE", "labels.csv")
    with caplog.at_level(logging.WARNING, logger="contracap.data.class_folders"):
        assert len(list(evaluation_samples(tmp_path))) == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: skipped what is in no class folder: LICENSE, labels.csv"
    ]


def matched(folder: Path, *classes: str) -> list[tuple[str, int]]:
    folders = class_folders(folder)
    assert folders is not None
    folders.match(classes)
    return [(sample.key.partition("/")[0], sample.fields["label"]) for sample in folders]


@pytest.mark.parametrize("numbers", [range(12), (2, 10)])
def test_folders_called_by_numbers_are_the_places_of_the_classes(tmp_path, numbers) -> None:
    make(tmp_path, *(f"{number}/a.jpg" for number in numbers))
    assert [sample.key[:-6] for sample in evaluation_samples(tmp_path)] == list(map(str, numbers))
    assert matched(tmp_path, *(f"class {number}" for number in range(12))) == [(str(n), n) for n in numbers]


def test_folders_called_as_the_classes_are_matched_by_name_in_any_order_and_form_of_accents(tmp_path) -> None:
    cafe = normalize("NFD", "café")
    make(tmp_path, "cat/a.jpg", "Sea_lion/a.jpg", f"{cafe}/a.jpg")
    found = matched(tmp_path, normalize("NFC", "café"), "sea lion", "cat", "bird")
    assert found == [("Sea_lion", 1), (cafe, 0), ("cat", 2)]


def test_folders_with_other_names_are_matched_by_order_which_is_stated(tmp_path, caplog) -> None:
    make(tmp_path, "n01/a.jpg", "n02/a.jpg")
    assert matched(tmp_path, "tench", "goldfish") == [("n01", 0), ("n02", 1)]
    assert "n02 is 'goldfish'" in caplog.text


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        ("cat puppy", ("puppy", "puma")),  # one is called as a class at another place
        ("cat puppy", ("cat",)),
        ("cat puppy", ("cat", "dog", "bird")),
        ("cat dog puppy", ("dog", "dog", "wolf")),
    ],
)
def test_folders_that_fit_neither_by_name_nor_by_order_are_refused(tmp_path, folders: str, classes) -> None:
    make(tmp_path, *(f"{name}/a.jpg" for name in folders.split()))
    with pytest.raises(ValueError, match="name the classes as the folders"):
        matched(tmp_path, *classes)
