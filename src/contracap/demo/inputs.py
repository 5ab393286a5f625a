"""Gradio's inputs, made to hand on what they get: what is wrong with it is then said by this package, in one line.

Gradio's own open every picture before the page's code sees it, so that a broken one ends as a traceback, as does a
number out of its bounds; and they fetch a file from the web where a request names an address. Here `image.decode` opens
pictures, which knows their limits, and nothing is fetched. The inputs are changed one by one, not by subclasses, for
which gradio writes files into the package's folder.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import gradio
from gradio.components import Component

PICTURE_HEIGHT, FILES_HEIGHT = 320, 160  # pixels
Input = TypeVar("Input", bound=Component)


def picture_input(label: str) -> gradio.Image:
    """A picture that is uploaded, pasted or taken with the camera; passed on as the path of its file, or None."""
    made = gradio.Image(
        label=label, type="filepath", sources=["upload", "clipboard", "webcam"], height=PICTURE_HEIGHT, buttons=[]
    )
    return handing_on(made, lambda payload: payload.path if payload is not None else None)


def pictures_input(label: str) -> gradio.File:
    """Several uploaded pictures; passed on as the paths of their files."""
    made = gradio.File(label=label, file_count="multiple", file_types=["image"], height=FILES_HEIGHT)
    return handing_on(made, lambda payload: [file.path for file in payload or []])


def number_input(
    label: str, *, low: int | float, high: int | float, step: int | float, default: int | float
) -> gradio.Slider:
    """A number, whose bounds are for the browser."""
    made = gradio.Slider(low, high, default, step=step, label=label, buttons=[])
    return handing_on(made, lambda payload: payload)


def handing_on(component: Input, preprocess: Callable[[Any], Any]) -> Input:
    """The input, handing on what `preprocess` makes of what the browser sent, and fetching nothing."""
    for name, method in (("preprocess", preprocess), ("async_move_resource_to_block_cache", path_of)):
        setattr(component, name, method)
    return component


async def path_of(path: str | Path | None) -> str | None:
    """The path of an uploaded file; gradio has made sure that it is one, unless it is an address.

    Raises: gradio.Error: if it is an address.
    """
    if path is None or "://" in str(path):
        raise gradio.Error("Upload the picture itself: this page fetches nothing.", print_exception=False)
    return str(path)
