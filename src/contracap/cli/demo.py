"""The command of the web page."""

import os
from pathlib import Path
from typing import Annotated

from contracap.cli.flags import arg
from contracap.cli.options import Model, ModelFlags, WeightsName, keep_few_kernels
from contracap.extras import require_extra


def demo(
    weights: WeightsName,
    /,
    *,
    host: Annotated[
        str, arg(help="Address to listen at; 0.0.0.0 makes the page reachable from other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, arg(help="Port; 0 takes any that is free.")] = 7860,
    pictures: Annotated[
        Path | None, arg(metavar="FOLDER", help="Folder of images that visitors can search, with its subfolders.")
    ] = None,
    model_flags: Model = ModelFlags(),
) -> None:
    """Serve a web page that captions, classifies and searches."""
    keep_few_kernels()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported; otherwise it reports to its makers
    require_extra("demo", "gradio", "fastapi", "starlette", "uvicorn", "h11", "python_multipart")
    from contracap.apps.demo.collection import images_under
    from contracap.apps.demo.server import serve
    from contracap.apps.web import bind

    found = images_under(pictures) if pictures is not None else None
    with bind(host, port) as address:
        model, processor = model_flags.load(weights)
        serve(model, processor, address=address, images=found, folder=pictures)
