"""Serving the page."""

import os
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import fastapi
import gradio

from contracap.apps.demo.actions import Actions
from contracap.apps.demo.collection import Collection
from contracap.apps.demo.examples import find_examples
from contracap.apps.demo.inputs import guard
from contracap.apps.demo.limits import LimitVisitors
from contracap.apps.demo.page import CSS, build_page, theme
from contracap.apps.demo.uploads import MAX_IMAGE_MIB, Uploads
from contracap.apps.web import MIB, run, url
from contracap.model.coca import CoCa
from contracap.processor import Processor

PATIENCE = 1  # seconds; a page that is open would never end by itself


def serve(
    model: CoCa,
    processor: Processor,
    *,
    address: socket.socket,
    images: Sequence[Path] | None,
    folder: Path | None = None,
) -> None:
    """Serve the page until SIGINT or SIGTERM. What visitors upload is deleted then, if not before.

    Args:
        images: to search in; they are embedded while the page is served.
        folder: that holds them; the page shows their names below it.

    Raises: ValueError: if the model has no text decoder.
    """
    actions = Actions(model, processor)
    collection = Collection(actions, images or (), folder=folder)
    with tempfile.TemporaryDirectory(prefix="contracap-demo-") as temporary, _filling(collection):
        app = application(actions, collection if images is not None else None, Uploads(Path(temporary)))
        greeting = f"the page is at {url(address)}; Ctrl-C ends it"
        run(app, address, greeting=greeting, patience=PATIENCE, log_level="warning")


@contextmanager
def _filling(collection: Collection) -> Iterator[None]:
    """Fills the collection meanwhile, in a thread that ends with this, after the batch it is at."""
    ended = threading.Event()

    def fill() -> None:
        for _ in collection.fill():
            if ended.is_set():
                break

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def application(actions: Actions, collection: Collection | None, uploads: Uploads) -> fastapi.FastAPI:
    """The page as a web application."""
    os.environ["GRADIO_TEMP_DIR"] = str(uploads.folder)
    page = build_page(actions, collection, find_examples(actions, collection, uploads))
    guard(page, uploads)
    app = fastapi.FastAPI(openapi_url=None, routes=uploads.routes, lifespan=uploads.tidied)
    published = {str(fn.api_name) for fn in page.fns.values() if fn.api_visibility == "public"}
    app.add_middleware(LimitVisitors, published=published)
    return gradio.mount_gradio_app(
        app,
        page,
        path="/",
        max_file_size=MAX_IMAGE_MIB * MIB,
        theme=theme(),
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
    )
