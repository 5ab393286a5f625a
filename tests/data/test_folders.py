import logging
from pathlib import Path

import pytest

from contracap.data.folders import class_folders
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


def test_a_picture_beside_the_folders_is_refused(tmp_path) -> None:
    make(tmp_path, "cat/1.jpg", "2.jpg")
    with pytest.raises(ValueError, match=r"2\.jpg lies beside the folders of the classes"):
        class_folders(tmp_path)


def test_a_folder_without_a_picture_is_refused(tmp_path) -> None:
    make(tmp_path, "cat/1.jpg", "dog/README.md")
    with pytest.raises(ValueError, match=r"dog holds no picture; fill or remove"):
        class_folders(tmp_path)


def test_other_files_beside_the_folders_are_named_in_one_line(tmp_path, caplog) -> None:
    make(tmp_path, "cat/1.jpg", "LICENSE", "labels.csv")
    with caplog.at_level(logging.WARNING, logger="contracap.data.folders"):
        assert len(list(evaluation_samples(tmp_path))) == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: passed over what is in no class folder: LICENSE, labels.csv"
    ]
