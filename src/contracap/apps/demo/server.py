"""The web server of the page."""

import os
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

import fastapi
import gradio

from contracap.apps.demo.actions import Actions
from contracap.apps.demo.collection import Collection
from contracap.apps.demo.components import guard
from contracap.apps.demo.examples import find_examples
from contracap.apps.demo.limits import LimitVisitors
from contracap.apps.demo.page import CSS, build_page, build_theme
from contracap.apps.demo.uploads import MAX_IMAGE_MIB, Uploads
from contracap.apps.web import MIB, format_url, run_server
from contracap.model.coca import CoCa
from contracap.processor import Processor
from contracap.progress import in_thread

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
        images: paths to search in; they are embedded while the page is served.
        folder: that holds them; the page shows their names below it.

    Raises: ValueError: if the model has no text decoder.
    """
    actions = Actions(model, processor)
    collection = Collection(actions, images or (), folder=folder)
    with tempfile.TemporaryDirectory(prefix="contracap-demo-") as temporary, in_thread(collection.fill()):
        app = build_app(actions, collection if images is not None else None, Uploads(Path(temporary)))
        greeting = f"the page is at {format_url(address)}; Ctrl-C ends it"
        run_server(app, address, greeting=greeting, patience=PATIENCE, log_level="warning")


def build_app(actions: Actions, collection: Collection | None, uploads: Uploads) -> fastapi.FastAPI:
    """Build the page as a web application."""
    os.environ["GRADIO_TEMP_DIR"] = str(uploads.folder)
    page = build_page(actions, collection, find_examples(actions, collection, uploads))
    guard(page, uploads)
    app = fastapi.FastAPI(openapi_url=None, routes=uploads.routes, lifespan=uploads.lifespan)
    published = {str(fn.api_name) for fn in page.fns.values() if fn.api_visibility == "public"}
    app.add_middleware(LimitVisitors, published=published)
    return gradio.mount_gradio_app(
        app,
        page,
        path="/",
        max_file_size=MAX_IMAGE_MIB * MIB,
        theme=build_theme(),
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
    )
