"""Gradio's inputs, made to hand on what they get: what is wrong with it is then said by this package, in one line.

Gradio's own open every image before the page's code sees it, so that a broken one ends as a traceback, as does a
number out of its bounds. Here `image_files.decode` opens images, which knows their limits. The inputs are changed one
by one, not by subclasses, for which gradio writes files into the package's folder.

gradio copies everything in a value that looks like a file, or a URL, to where the page hands it out: any file of the
server. So `guard` checks every value first.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gradio
from gradio.components import Component

from contracap.apps.demo.strategy_settings import Amount
from contracap.apps.demo.uploads import Uploads

IMAGE_HEIGHT, FILES_HEIGHT = 320, 160  # pixels
# Values that the browser may send for an input, other than None and uploads. An input that is not listed takes none.
PLAIN: Mapping[str, type | tuple[type, ...]] = {
    "textbox": str,
    "dropdown": str,
    "radio": (str, int),
    "slider": (int, float),
    "dataset": int,
}
Input = TypeVar("Input", bound=Component)


def image_input(label: str) -> gradio.Image:
    """Return an input for an image: uploaded, pasted or taken with the camera. It passes on a path, or None."""
    made = gradio.Image(
        label=label, type="filepath", sources=["upload", "clipboard", "webcam"], height=IMAGE_HEIGHT, buttons=[]
    )
    return hand_on(made, lambda payload: payload.path if payload is not None else None)


def images_input(label: str) -> gradio.File:
    """Return an input for several uploaded images; passed on as the paths of their files."""
    made = gradio.File(label=label, file_count="multiple", file_types=["image"], height=FILES_HEIGHT)
    return hand_on(made, lambda payload: [file.path for file in payload or []])


def examples_input(images: Sequence[Path], image: gradio.Image) -> gradio.Dataset | None:
    """Return images to choose from, of which the number is passed on; None if there are none."""
    if not images:
        return None
    samples = [[str(path)] for path in images]
    label, classes = "Or one of these", "examples"
    return gradio.Dataset(components=[image], samples=samples, type="index", label=label, elem_classes=classes)


def number_input(setting: Amount) -> gradio.Slider:
    """Return an input for a number, whose bounds are for the browser."""
    made = gradio.Slider(setting.low, setting.high, setting.default, step=setting.step, label=setting.label, buttons=[])
    return hand_on(made, lambda payload: payload)


def build_gallery(name: str, *, format: str) -> gradio.Gallery:
    """Return a gallery of images in rows of four, which nobody can change."""
    return gradio.Gallery(
        show_label=False,
        columns=4,
        height="auto",
        object_fit="contain",
        format=format,
        buttons=[],
        elem_classes="gallery-of",
        elem_id=name,
    )


def hand_on(component: Input, preprocess: Callable[[Any], Any]) -> Input:
    """Have an input pass on what `preprocess` makes of what the browser sent."""
    setattr(component, "preprocess", preprocess)  # noqa: B010 - the type checker knows that it is a method
    return component


def guard(page: gradio.Blocks, uploads: Uploads) -> None:
    """Look at each value that a visitor sends before gradio takes it, whichever route it comes by."""
    preprocess = page.preprocess_data

    async def guarded(block_fn: Any, inputs: list[Any], *others: Any, **named: Any) -> list[Any]:
        if len(inputs) != len(block_fn.inputs):
            error = f"This takes {len(block_fn.inputs)} values, not {len(inputs)}."
            raise gradio.Error(error, print_exception=False)
        looked_at = [check_value(*pair, uploads) for pair in zip(block_fn.inputs, inputs, strict=True)]
        return await preprocess(block_fn, looked_at, *others, **named)

    setattr(page, "preprocess_data", guarded)  # noqa: B010
    page.has_launched = True  # else gradio's own check of paths is off; a page that is mounted is never launched


def check_value(component: Component, value: Any, uploads: Uploads) -> Any:
    """Return the value, if it is one for this input.

    Raises: gradio.Error: if it is not.
    """
    name = component.get_block_name()
    if value is None or component.stateful:  # gradio has states itself
        return None
    if name == "image":
        return check_upload(value, uploads)
    if name == "file":
        return [check_upload(item, uploads) for item in value] if isinstance(value, list) else refuse(component)
    if isinstance(value, PLAIN.get(name, ())) and not (isinstance(value, float) and not math.isfinite(value)):
        return value
    return refuse(component)


def check_upload(value: Any, uploads: Uploads) -> dict[str, Any]:
    """Return an uploaded file as gradio has it, and nothing else that came with it.

    Raises: gradio.Error: if it is anything else.
    """
    path = uploads.find(value.get("path")) if isinstance(value, dict) else None
    if path is None:
        raise gradio.Error("Upload the image itself: this page fetches nothing.", print_exception=False)
    return {"path": str(path), "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}


def refuse(component: Component) -> Any:
    """Raises: gradio.Error: a line that names the input."""
    raise gradio.Error(f"This is not a valid value for “{component.label}”.", print_exception=False)
