"""The tab that says which of some labels fits an image."""

import gradio

from contracap.apps.demo.actions import Actions
from contracap.apps.demo.components import examples_input, image_input
from contracap.apps.demo.events import on_example, on_image
from contracap.apps.demo.examples import Examples


def classify_tab(actions: Actions, examples: Examples) -> None:
    """Add the tab to the page."""
    with gradio.Row(elem_classes="sides"):
        with gradio.Column(elem_classes="given"):
            image = image_input("Image")
            labels = gradio.Textbox("\n".join(examples.labels), label="Labels, one a line", lines=5)
            template = gradio.Textbox(
                "\n".join(examples.templates),
                label="Prompt, {} where the label goes; several prompts, one a line, are averaged",
                lines=len(examples.templates),
            )
            button = gradio.Button("Classify", variant="primary")
            shown_examples = examples_input(examples.images, image)
        with gradio.Column(elem_classes="shown"):
            probabilities = gradio.Label(label="Probabilities", num_top_classes=20)
    inputs, outputs = [image, labels, template], [probabilities]
    on_image(image, button, actions.classify, inputs, outputs, "classify")
    on_example(shown_examples, examples, actions.classify, inputs, outputs)
