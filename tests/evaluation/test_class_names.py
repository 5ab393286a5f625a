import json
from hashlib import sha256
from types import ModuleType

import pytest

from contracap.evaluation.class_names import main_name, published_names, published_set

from .oracles import clip_benchmark_literal, clip_benchmark_table

BY_NAME = {  # sets whose data have their classes in the order of the names: how many, and the digest of the list
    "cifar10": (10, "bb3914949cecedee"),
    "cifar100": (100, "fbe8ad23bbaf2496"),
    "food101": (101, "9c0eeb5a368baacb"),
    "sun397": (397, "dd1277b1cfcf09ba"),
    "fgvc_aircraft": (100, "e1c9e72060e63d52"),
    "dtd": (47, "681d23b9cd3c2ede"),
    "stl10": (10, "08b234ce7b11dbd3"),
    "renderedsst2": (2, "2e61aa7558046c2c"),
    "vtab/resisc45": (45, "5433d6c078c12b52"),
}
IN_OTHER_ORDER = {  # of the names as the data sets have them
    "cars": (196, "93d089469409bbd0"),
    "objectnet": (113, "6f31c7eebfd7cd1d"),
    "vtab/flowers": (102, "f5a3bda044faf55b"),
}
NUMBERS = {  # sets of VTAB whose classes have numbers alone
    "vtab/dsprites_label_x_position": 32,
    "vtab/dsprites_label_orientation": 40,
    "vtab/smallnorb_label_azimuth": 18,
    "vtab/smallnorb_label_elevation": 9,
}


def test_names_equal_clip_benchmark_in_content_and_order() -> None:
    expected = clip_benchmark_table("en_classnames.json")
    expected["vtab/caltech101"] = expected.pop("caltech101_vtab")
    assert len(expected) == 17
    for name, classes in expected.items():
        assert list(published_set(name).classes) == classes, name
    assert list(published_set("voc2007").classes) == clip_benchmark_literal("voc2007", "object_categories")


def test_templates_equal_clip_benchmark_in_content_and_order() -> None:
    expected = clip_benchmark_table("en_zeroshot_classification_templates.json")
    del expected["dummy"]
    for name, templates in expected.items():
        for spelling in (name, f"vtab/{name}", f"wds/vtab/{name}"):  # it looks for a name without its prefix, too
            found = list(published_set(spelling).templates)
            assert found == [text.replace("{c}", "{}") for text in templates], spelling


def test_imagenet_equals_open_clip(open_clip: ModuleType) -> None:
    assert list(published_set("imagenet1k").classes) == list(open_clip.IMAGENET_CLASSNAMES)
    for name, templates in (
        ("imagenet1k", open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("imagenet-simple", open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        assert list(published_set(name).templates) == [template("{}") for template in templates]
    assert [len(published_set(name).templates) for name in ("imagenet1k", "imagenet-simple")] == [80, 7]


@pytest.mark.parametrize("letter", "aro")
def test_part_of_imagenet_is_the_one_that_clip_benchmark_takes(letter: str) -> None:
    wanted = set(clip_benchmark_literal("builder", f"imagenet_{letter}_wnids"))
    whole = zip(
        published_set("imagenet1k").classes, clip_benchmark_literal("builder", "all_imagenet_wordnet_ids"), strict=True
    )
    assert list(published_set(f"imagenet-{letter}").classes) == [name for name, identity in whole if identity in wanted]
    assert published_set(f"imagenet-{letter}").templates == published_set("imagenet1k").templates


def test_every_set_of_vtab_plus_has_names_and_templates() -> None:
    names = clip_benchmark_literal("builder", "dataset_collection")["vtab+"]
    assert len(names) == 36
    for name in names:
        found = published_set(name)
        assert len(found.classes) >= 2 and found.templates and found.origin, name


def test_sets_named_by_their_data_have_all_their_classes_once_and_in_order() -> None:
    for name, (count, digest) in (BY_NAME | IN_OTHER_ORDER).items():
        classes = published_set(name).classes
        assert len(classes) == len(set(classes)) == count, name
        assert sha256("\n".join(classes).encode()).hexdigest()[:16] == digest, name
    for name in BY_NAME:
        assert list(published_set(name).classes) == sorted(published_set(name).classes), name
    for name, count in NUMBERS.items():
        assert published_set(name).classes == tuple(map(str, range(count))), name


def test_cifar10_has_the_names_of_the_data(data_folder) -> None:
    manifest = json.loads((data_folder / "cifar10" / "manifest.json").read_text())
    assert list(published_set("cifar10").classes) == manifest["classes"]


def test_vtab_has_names_of_its_own_for_two_sets() -> None:
    for name, place, classes in (
        ("flowers", 92, ("ball moss", "air plant")),
        ("caltech101", 0, ("accordion", "background")),
    ):
        assert tuple(published_set(of + name).classes[place] for of in ("vtab/", "")) == classes
    assert published_set("vtab/cifar10") == published_set("cifar10")


@pytest.mark.parametrize(
    ("name", "main"),
    [
        *(("wds/flowers", "flowers"), ("wds/vtab/flowers", "vtab/flowers"), ("wds/vtab/cifar10", "cifar10")),
        *(("wds/imagenet_sketch", "imagenet1k"), ("voc2007_multilabel", "voc2007")),
    ],
)
def test_names_of_the_same_set_have_one_main_name(name: str, main: str) -> None:
    assert main_name(name) == main
    assert published_set(name) == published_set(main)


def test_every_template_has_one_place_for_the_name() -> None:
    for name in published_names():
        assert all(template.count("{}") == 1 for template in published_set(name).templates), name


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"called 'cifar-10'; the nearest are cifar10, .*"):
        published_set("cifar-10")
    with pytest.raises(
        ValueError, match=r"called 'qqq'; some are imagenet1k, cifar10, food101, all are in .*classes; "
    ):
        published_set("qqq")
    for name in (
        "",
        "vtab/",
        "flowers_vtab",
        "tfds/cifar10",
        "../classes/cifar10",
        "imagenet",
        "./cifar10",
        "flowers.json",
    ):
        assert main_name(name) is None
