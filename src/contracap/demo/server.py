"""Serving the page."""

import os
import socket
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import fastapi
import gradio
import uvicorn

from contracap.demo.actions import Actions
from contracap.demo.collection import Collection
from contracap.demo.page import CSS, build_page, theme
from contracap.model.coca import CoCa
from contracap.processor import Processor

LARGEST_UPLOAD = "20mb"  # a file


def listen(host: str, port: int) -> socket.socket:
    """The address, taken before anything else is done: an hour of loading must not end at a port in use.

    Raises: ValueError: if it cannot be had.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"cannot serve at {host} port {port}: {reason}; choose others with --host and --port"
        ) from None


def serve(model: CoCa, processor: Processor, *, address: socket.socket, pictures: Sequence[Path] | None) -> None:
    """Serve the page until interrupted. What visitors upload is deleted then, if not before.

    Args:
        pictures: to search in; they are embedded while the page is served.

    Raises: ValueError: if the model has no text decoder.
    """
    actions = Actions(model, processor)
    collection = Collection(actions, pictures) if pictures is not None else None
    with tempfile.TemporaryDirectory(prefix="contracap-demo-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        if collection is not None:
            threading.Thread(target=lambda: list(collection.fill()), daemon=True).start()
        host, port = address.getsockname()[:2]
        print(f"the page is at http://{f'[{host}]' if ':' in host else host}:{port}; Ctrl-C ends it", flush=True)
        config = uvicorn.Config(application(actions, collection), log_level="warning", timeout_graceful_shutdown=1)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[address])


def application(actions: Actions, collection: Collection | None) -> fastapi.FastAPI:
    """The page as a web application."""
    return gradio.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        build_page(actions, collection),
        path="/",
        max_file_size=LARGEST_UPLOAD,
        theme=theme(),
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
    )
