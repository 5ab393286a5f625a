"""The tab that searches images by a text or by another image."""

from collections.abc import Sequence
from typing import Any

import gradio

from contracap.apps.demo.actions import Actions
from contracap.apps.demo.collection import Collection, Match
from contracap.apps.demo.components import build_gallery, image_input, images_input
from contracap.apps.demo.events import ONE_AT_A_TIME, SILENT, on_image, report_errors

STATE_SECONDS = 2  # from one look at how many images can be searched to the next
MAX_SEARCHED = 200  # images that a visitor searches
PROGRESS = gradio.Progress()  # gradio puts that of the event in its place


def search_tab(actions: Actions, collection: Collection | None) -> gradio.Markdown:
    """Add the tab to the page. Return where it says how many images can be searched."""
    with gradio.Row(elem_classes="sides"):
        with gradio.Column(elem_classes="given"):
            files = None
            if collection is None:
                files = images_input("Images to search in")
                gradio.Markdown("`contracap demo WEIGHTS --pictures FOLDER` searches a folder instead.")
            text = gradio.Textbox(label="Text", placeholder="what the image shows")
            by_text = gradio.Button("Search by text", variant="primary")
            image = image_input("Or an image")
            by_image = gradio.Button("Search by image")
        with gradio.Column(elem_classes="shown"):
            state = gradio.Markdown()
            found = build_gallery("found", format="jpeg")

    def read(paths: Sequence[str], progress: gradio.Progress = PROGRESS) -> tuple[Collection, str]:
        if len(paths) > MAX_SEARCHED:
            raise ValueError(f"these are {len(paths):,} images; the page searches at most {MAX_SEARCHED} uploaded ones")
        uploaded = Collection(actions, paths)
        for done in uploaded.fill():
            progress((done, uploaded.total), desc="reading images", unit="images")
        return uploaded, uploaded.state

    def search_text(wanted: str, uploaded: Collection | None = None) -> tuple[Any, str]:
        searched = _require_images(collection or uploaded)
        return _matches(searched.search_text(wanted or "")), searched.state

    def search_image(path: str | None, uploaded: Collection | None = None) -> tuple[Any, str]:
        searched = _require_images(collection or uploaded)
        return _matches(searched.search_image(path)), searched.state

    own = gradio.State()
    if collection is not None:
        timer = gradio.Timer(STATE_SECONDS)
        timer.tick(
            lambda: (collection.state, gradio.Timer(active=collection.unread > 0)),
            None,
            [state, timer],
            **SILENT,
            show_progress="hidden",
        )
    if files is not None:
        files.change(report_errors(read), files, [own, state], api_name="read", **ONE_AT_A_TIME)
    gradio.on(
        [by_text.click, text.submit],
        report_errors(search_text),
        [text, own],
        [found, state],
        api_name="search_text",
        **ONE_AT_A_TIME,
    )
    on_image(image, by_image, search_image, [image, own], [found, state], "search_picture")
    return state


def _require_images(collection: Collection | None) -> Collection:
    if collection is None or not collection.total:
        raise ValueError("there is nothing to search in yet: upload some images")
    return collection


def _matches(matches: Sequence[Match]) -> list[tuple[Any, str]]:
    return [(match.image, f"{match.score:.3f} {match.name}") for match in matches]
