"""The tab that captions an image and shows where each word looked."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import gradio

from contracap.apps.demo.actions import Actions, Captioned
from contracap.apps.demo.components import build_gallery, examples_input, image_input, number_input
from contracap.apps.demo.events import SILENT, on_example, on_image
from contracap.apps.demo.examples import Examples
from contracap.apps.demo.strategy_settings import (
    LENGTHS,
    NAMES,
    RULES,
    SETTINGS_OF,
    Amount,
    Choice,
    Setting,
    read_settings,
)
from contracap.apps.html_page import table

COMMON = (*LENGTHS, *RULES)  # settings of every strategy


class StrategyInputs:
    """Inputs for a strategy and its settings. Those of other strategies are hidden."""

    def __init__(self, context: int) -> None:
        self.strategy = gradio.Dropdown([(NAMES[name], name) for name in SETTINGS_OF], value="beam", label="Strategy")
        self._own, groups = list[list[Any]](), []
        for name, settings in SETTINGS_OF.items():
            with gradio.Group(visible=name == "beam") as group:
                self._own.append([_ask(setting) for setting in settings])
            groups.append(group)
        with gradio.Group():
            self._common = [_ask(_within(setting, context)) for setting in LENGTHS]
            self.prompt = gradio.Textbox("", label="The caption begins with", placeholder="a photo of")
        with gradio.Accordion("Repetition, and words to use or not", open=False):
            self._common += [_ask(setting) for setting in RULES]
        self.strategy.change(
            lambda name: [gradio.update(visible=name == other) for other in SETTINGS_OF],
            self.strategy,
            groups,
            **SILENT,
        )

    @property
    def settings(self) -> list[Any]:
        """Inputs of the settings of all strategies."""
        return [*self._common, *chain(*self._own)]

    def read(self, name: str, answers: Sequence[Any]) -> dict[str, Any]:
        """Return the settings of one strategy from the answers of all inputs.

        Raises: ValueError: if an answer is out of its bounds.
        """
        left = iter(answers)
        common, *own = (list(islice(left, len(group))) for group in (self._common, *self._own))
        return read_settings(
            name, (*COMMON, *SETTINGS_OF[name]), [*common, *dict(zip(SETTINGS_OF, own, strict=True))[name]]
        )


def caption_tab(actions: Actions, examples: Examples) -> None:
    """Add the tab to the page."""
    with gradio.Row(elem_classes="sides"):
        with gradio.Column(elem_classes="given"):
            image = image_input("Image")
            button = gradio.Button("Caption", variant="primary")
            shown_examples = examples_input(examples.images, image)
        with gradio.Column(elem_classes="set"):
            chosen = StrategyInputs(actions.model.config.text.context)
        with gradio.Column(elem_classes="shown"):
            text = gradio.Textbox(label="Caption", lines=2, elem_id="caption", interactive=False)
            alternatives = gradio.HTML()
            word = gradio.Radio(
                [],
                label="Where each word looked",
                info="On the part of the image that the model sees; yellow is most.",
            )
            maps = build_gallery("maps", format="png")

    def caption(path: str | None, name: str, begins: str, *answers: Any) -> tuple[Any, ...]:
        return _shown(actions.caption(path, name, chosen.read(name, answers), begins or ""))

    inputs = [image, chosen.strategy, chosen.prompt, *chosen.settings]
    outputs = [text, alternatives, word, maps]
    on_image(image, button, caption, inputs, outputs, "caption")
    on_example(shown_examples, examples, caption, inputs, outputs)
    word.input(lambda number: gradio.update(selected_index=number), word, maps, **SILENT)


def _shown(captioned: Captioned) -> tuple[Any, ...]:
    """Return what the tab shows: the text, the table, the words to choose from, their maps."""
    caption = captioned.caption
    rows = [
        (found.text, f"{found.score:.3f}", f"{found.log_probability:.2f}")
        for found in caption.alternatives or (caption,)
    ]
    words = [(word, number) for number, (word, _) in enumerate(captioned.words)]
    maps = [(heat, word) for word, heat in captioned.words]
    return (
        caption.text,
        table(("alternatives, best first", "score", "log-probability"), rows, numbers=(1, 2)),
        gradio.update(choices=words, value=None),
        gradio.update(value=maps, selected_index=None),
    )


def _ask(setting: Setting) -> Any:
    """Add the input for a setting."""
    if isinstance(setting, Amount):
        return number_input(setting)
    if isinstance(setting, Choice):
        return gradio.Radio(list(setting.values), value=setting.default, label=setting.label)
    return gradio.Textbox("", label=setting.label, placeholder="cat, a photo of")


def _within(setting: Amount, context: int) -> Amount:
    """Limit a length to texts that this model can write."""
    return replace(setting, high=min(setting.high, context), default=min(setting.default, context))
