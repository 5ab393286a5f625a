"""Events of the page: what a visitor's action starts, and how errors reach the visitor."""

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import gradio

from contracap.apps.demo.examples import Examples
from contracap.apps.html_page import text

# Whichever button they come from, events share the model's cores.
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
SILENT: dict[str, Any] = {"queue": False, "api_visibility": "private"}  # events of the page alone, which need no model
logger = logging.getLogger(__name__)


def report_errors(action: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an action so that its errors are told to the visitor; a mistake of ours goes to the log."""

    @wraps(action)
    def told(*arguments: Any) -> Any:
        try:
            return action(*arguments)
        except (ValueError, OSError) as error:
            message = str(error)
        except Exception:
            logger.exception("the page cannot do what a visitor asked")
            message = "Something went wrong here; the server's log has it."
        # Gradio takes the message for HTML, and a visitor's own file names stand in it.
        raise gradio.Error(text(message), print_exception=False)

    return told


def on_image(
    image: gradio.Image,
    button: gradio.Button,
    action: Callable[..., Any],
    inputs: list[Any],
    outputs: list[Any],
    name: str,
) -> None:
    """Act once there is an image, the first input, and again at a button."""

    def act_on(path: str | None, *others: Any) -> Any:
        return action(path, *others) if path is not None else gradio.skip()  # it was taken away

    button.click(report_errors(action), inputs, outputs, api_name=name, **ONE_AT_A_TIME)
    image.input(report_errors(act_on), inputs, outputs, api_visibility="private", **ONE_AT_A_TIME)


def on_example(
    shown: gradio.Dataset | None,
    examples: Examples,
    action: Callable[..., Any],
    inputs: list[Any],
    outputs: list[Any],
) -> None:
    """Put the example that is chosen in place of the image, the first input, and act on it."""
    if shown is not None:
        shown.click(
            report_errors(lambda number: str(examples.images[number])),
            shown,
            inputs[0],
            **SILENT,
        ).success(report_errors(action), inputs, outputs, api_visibility="private", **ONE_AT_A_TIME)
