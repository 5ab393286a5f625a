"""What the page's buttons do, with the tiny model and without gradio."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import contracap
from contracap.apps.demo.actions import SHOWN, Actions
from contracap.apps.demo.collection import Collection, images_under
from contracap.apps.demo.examples import find_examples
from contracap.apps.demo.overlay import overlay
from contracap.apps.demo.strategy_settings import (
    LENGTHS,
    NAMES,
    RULES,
    SETTINGS_OF,
    Amount,
    Choice,
    Phrases,
    read_settings,
)
from contracap.apps.demo.uploads import Uploads
from contracap.data.scenes import COLORS
from contracap.evaluation.zeroshot import build_classifier
from contracap.generation import BeamSearch, Captioner
from contracap.generation.registry import STRATEGIES
from contracap.pretrained import random_model
from tests.apps.demo.uploads import bad_uploads, picture
from tests.model.tiny_models import tiny_clip


@pytest.fixture(scope="module")
def actions() -> Actions:
    return Actions(*contracap.load("tiny", weights="random", seed=0))


def test_a_caption_is_the_captioners_and_each_of_its_words_has_a_map(actions: Actions, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    made = actions.caption(str(path), "beam", {"width": 3, "max_tokens": 9})
    expected = Captioner(actions.model, actions.processor)([path], BeamSearch(width=3, max_tokens=9))[0]
    assert made.caption.text == expected.text and len(made.caption.alternatives) == 3
    assert " ".join(word for word, _ in made.words) == expected.text
    assert {heat.size for _, heat in made.words} == {made.seen.size} == {(SHOWN, SHOWN)}


def test_a_caption_goes_on_from_its_prompt_whose_words_have_maps_too(actions: Actions, tmp_path: Path) -> None:
    made = actions.caption(str(picture(tmp_path / "a.png")), "greedy", prompt=" A photo of")
    assert made.caption.text.startswith("a photo of ")
    assert [word for word, _ in made.words][:3] == ["a", "photo", "of"]


@pytest.mark.parametrize("name", SETTINGS_OF)
def test_every_strategy_writes_with_the_settings_that_the_page_begins_with(actions, tmp_path, name) -> None:
    settings = (*LENGTHS, *RULES, *SETTINGS_OF[name])
    answers = ["" if isinstance(setting, Phrases) else setting.default for setting in settings]
    made = actions.caption(str(picture(tmp_path / "a.png")), name, read_settings(name, settings, answers))
    alternatives = {"beam": 6, "greedy": 1, "sample": 1, "rerank": 8, "legacy": 2}[name]
    assert made.caption.text and len(made.caption.alternatives) == alternatives
    assert list(NAMES) == list(SETTINGS_OF) and set(SETTINGS_OF) == set(STRATEGIES)


def test_a_bad_image_is_named_without_its_folder(actions: Actions, tmp_path: Path) -> None:
    for path, said in bad_uploads(tmp_path).values():
        with pytest.raises(ValueError, match=f"^{said}"):
            actions.caption(str(path), "greedy")


def test_probabilities_follow_the_models_own_temperature(actions: Actions, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    found = actions.classify(str(path), "red\n\n green \nred\n", "a {}.\nthe {}")
    assert list(found) == ["red", "green"] and sum(found.values()) == pytest.approx(1)
    with torch.inference_mode():
        image = actions.model.encode_image(actions.processor.images([path]))[0]
        weights = build_classifier(actions.model, actions.processor, ["red", "green"], ["a {}.", "the {}"])
        scores = actions.model.logit_scale.exp() * weights @ image
    assert list(found.values()) == pytest.approx(scores.softmax(dim=0).tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("labels", "template", "said"),
    [
        ("\n ", "a {}", "no labels"),
        ("red", "a photo", "no {}"),
        ("red", "", "templates"),
        ("x" * 70_000, "{}", "characters"),
        ("x\n" * 2, "{}", None),
    ],
)
def test_labels_and_prompts_that_cannot_be_used_are_refused(actions, tmp_path, labels, template, said) -> None:
    path = str(picture(tmp_path / "a.png"))
    if said is None:
        assert actions.classify(path, labels, template) == {"x": 1.0}
        return
    with pytest.raises(ValueError, match=said):
        actions.classify(path, labels, template)


def test_no_image_and_no_decoder_are_told(actions: Actions) -> None:
    with pytest.raises(ValueError, match="there is no image yet"):
        actions.caption(None, "greedy")
    with pytest.raises(ValueError, match="no text decoder"):
        Actions(*random_model(tiny_clip(), seed=0))


def test_a_collection_finds_a_image_by_itself_and_counts_what_it_skipped(actions: Actions, tmp_path: Path) -> None:
    folder = tmp_path / "pictures" / "deep"
    folder.mkdir(parents=True)
    paths = [picture(folder / f"{number:02d}.png", seed=number) for number in range(20)]
    (folder / "19.png").write_text("no image")
    (folder / "notes.txt").write_text("no image either")
    picture(folder / ".hidden.png")
    found = images_under(tmp_path)
    assert found == paths
    collection = Collection(actions, found, folder=tmp_path)
    assert list(collection.fill()) == [16, 20]
    assert collection.state == "19 images to search; 1 skipped, for they cannot be read."
    assert collection.skipped[0].startswith("19.png: not an image")
    best, *others = collection.search_image(str(paths[7]))
    assert best.name == "pictures/deep/07.png" and best.score == pytest.approx(1, abs=1e-4)
    assert len(others) == 11 and others[0].score < best.score - 1e-4


def test_a_text_search_ranks_by_the_cosine(actions: Actions, tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{number}.png", seed=number) for number in range(5)]
    collection = Collection(actions, paths)
    list(collection.fill())
    with torch.inference_mode():
        text = actions.model.encode_text(actions.processor.texts(["a red circle"]))[0]
        cosines = actions.model.encode_image(actions.processor.images(paths)) @ text
    order = cosines.argsort(descending=True).tolist()
    matches = collection.search_text("a red circle")
    assert matches[0].image.size == (320, 240)  # whole
    assert [match.name for match in matches] == [f"{place}.png" for place in order]
    assert [match.score for match in matches] == pytest.approx(cosines[order].tolist(), abs=1e-5)


def test_examples_are_drawn_for_the_model_of_drawn_scenes_and_otherwise_taken_from_the_folder(
    actions: Actions, tmp_path: Path
) -> None:
    uploads = Uploads(tmp_path / "page")
    drawn = find_examples(Actions(*contracap.load("scenes", weights="random", seed=0)), None, uploads)
    assert tuple(drawn.labels) == COLORS and len(drawn.images) == 4
    assert find_examples(actions, None, uploads).images == []
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "00.png").write_text("no image")
    paths = [folder / "00.png", *(picture(folder / f"{number:02d}.png", seed=number) for number in range(1, 9))]
    found = find_examples(actions, Collection(actions, paths), uploads)
    assert [path.name for path in found.images] == ["01.png", "02.png", "03.png", "04.png"]
    assert all(uploads.find(str(path)) == path for path in (*drawn.images, *found.images))
    assert actions.classify(str(found.images[0]), "\n".join(found.labels), "\n".join(found.templates))
    assert not set(found.labels) & set(COLORS)


def test_a_collection_can_be_searched_before_it_is_full(actions: Actions, tmp_path: Path) -> None:
    collection = Collection(actions, [picture(tmp_path / f"{number:02d}.png", seed=number) for number in range(18)])
    with pytest.raises(ValueError, match="nothing to search in: 0 images to search; 18 still to be read"):
        collection.search_text("red")
    next(collection.fill())
    assert len(collection.search_text("red")) == 12
    assert collection.state == "16 images to search; 2 still to be read."
    with pytest.raises(ValueError, match="nothing to search for"):
        collection.search_text("  ")


def test_captions_and_maps_are_the_same_while_a_collection_fills(actions: Actions, tmp_path: Path) -> None:
    path = str(picture(tmp_path / "mine.png"))
    alone = actions.caption(path, "greedy", {"max_tokens": 6})
    collection = Collection(actions, [picture(tmp_path / f"{number}.png", seed=number) for number in range(32)])
    filling = threading.Thread(target=lambda: list(collection.fill()))
    filling.start()
    together = 0
    while filling.is_alive():
        made = actions.caption(path, "greedy", {"max_tokens": 6})
        assert made.caption.token_ids == alone.caption.token_ids
        assert [heat.tobytes() for _, heat in made.words] == [heat.tobytes() for _, heat in alone.words]
        together += 1
    filling.join()
    assert together and collection.searchable == 32


def test_a_folder_without_images_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no images"):
        images_under(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        images_under(tmp_path / "none")


def test_an_overlay_is_lightest_where_the_heat_is_greatest() -> None:
    heat = torch.zeros(4, 4)
    heat[1, 2] = 0.3
    made = np.asarray(overlay(torch.full((3, 64, 64), 128, dtype=torch.uint8), heat)).sum(axis=2)
    row, column = np.unravel_index(made.argmax(), made.shape)
    assert 16 <= row < 32 and 32 <= column < 48
    even = np.asarray(overlay(torch.full((3, 64, 64), 128, dtype=torch.uint8), torch.ones(4, 4)))
    assert len(np.unique(even.reshape(-1, 3), axis=0)) == 1


def test_settings_that_are_off_or_empty_are_left_out() -> None:
    settings = (
        Amount("width", "Beams", 1, 12, 1, 6),
        Amount("top_k", "Top-k", 0, 200, 1, 0, off=0),
        Amount("temperature", "Temperature", 0.1, 2, 0.05, 1),
        Choice("year", "Year", (2023, 2024), 2023),
        Phrases("rules.banned", "Words"),
    )
    some = {"width": 4, "temperature": 0.5, "year": 2024}
    assert read_settings("beam", settings, [4.0, 0, 0.5, 2024, ""]) == some
    assert read_settings("rerank", settings, [4.0, 0, 0.5, 2024, ""]) == {"of": some}
    assert read_settings("beam", settings, [4, 5, 1, 2023, "a cat, , dog"])["rules"] == {"banned": ("a cat", "dog")}
    assert isinstance(read_settings("beam", settings, [4.0, 5.0, 1, 2023, ""])["top_k"], int)


@pytest.mark.parametrize("answer", [0, 13, None, "many", True, float("nan")])
def test_a_number_out_of_its_bounds_is_refused(answer) -> None:
    with pytest.raises(ValueError, match=r"^Beams is .*; it must be a number from 1 to 12$"):
        read_settings("beam", (Amount("width", "Beams", 1, 12, 1, 6),), [answer])
