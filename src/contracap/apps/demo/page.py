"""The page itself: what it shows and which button does what. It asks for nothing beyond its own server."""

import html
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

import gradio

from contracap.apps.demo.actions import Actions, Captioned
from contracap.apps.demo.collection import Collection, Match
from contracap.apps.demo.examples import Examples
from contracap.apps.demo.inputs import examples_input, image_input, images_input, number_input
from contracap.apps.demo.settings import LENGTHS, NAMES, OWN, RULES, Amount, Choice, Setting, chosen
from contracap.apps.page import table

WAITING = 100  # visitors in the queue, beyond whom nobody is let in
STATE_SECONDS = 2  # from one look at how many images can be searched to the next
MAX_SEARCHED = 200  # images that a visitor searches
CSS = """
.gradio-container { max-width: 76rem !important; }
footer { display: none !important; }
.sides { display: grid; gap: 1rem; grid-template: "given shown" auto "set shown" 1fr / minmax(0, 2fr) minmax(0, 3fr); }
.given { grid-area: given; } .shown { grid-area: shown; } .set { grid-area: set; }
@media (max-width: 48rem) { .sides { grid-template: "given" "shown" "set" / minmax(0, 1fr); } }
.given .image-frame img { width: 100%; height: 100%; object-fit: contain; }
#caption textarea { font-size: 1.35rem; line-height: 1.35; }
.gallery-of .grid-wrap { max-height: none; height: auto; }
.gallery-of .grid-container { grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)) !important; }
.gallery-of .thumbnail-lg { aspect-ratio: auto; height: auto; }
.gallery-of .thumbnail-lg > img { aspect-ratio: 1; height: auto; }
.gallery-of .thumbnail-lg .caption-label { position: static; max-width: none; border: 0; overflow-wrap: anywhere;
  white-space: normal; }
.examples img { aspect-ratio: 1; object-fit: contain !important; }
.wide { overflow-x: auto; }
.wide table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide table, .wide tr { border-style: none !important; }
.wide th, .wide td { padding: .3rem .5rem; text-align: left; border-style: solid !important;
  border-width: 0 0 1px !important; border-color: var(--border-color-primary) !important; }
.wide th { font-weight: 600; color: var(--body-text-color-subdued); vertical-align: bottom; }
.wide .number { text-align: right; }
"""
PROGRESS = gradio.Progress()  # gradio puts that of the event in its place
logger = logging.getLogger(__name__)


def theme() -> gradio.themes.Base:
    """Plain, in the visitor's own fonts: gradio's themes name some that a browser would fetch."""
    return gradio.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def clearly(action: Callable[..., Any]) -> Callable[..., Any]:
    """The action with its errors told to the visitor; what is a mistake of ours goes to the log."""

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
        raise gradio.Error(html.escape(message), print_exception=False)

    return told


def build_page(actions: Actions, collection: Collection | None, examples: Examples) -> gradio.Blocks:
    """The page. Without a collection, visitors search what they upload."""
    # One event at a time, whichever button it comes from: they share the model's cores.
    alone = {"concurrency_id": "model", "concurrency_limit": 1}
    with gradio.Blocks(title="contracap", analytics_enabled=False) as page:
        gradio.Markdown("# contracap\nCaptions, classes and searches by one model, a contrastive captioner.")
        with gradio.Tab("Caption"):
            _caption_tab(actions, examples, alone)
        with gradio.Tab("Classify"):
            _classify_tab(actions, examples, alone)
        with gradio.Tab("Search"):
            state = _search_tab(actions, collection, alone)
        if collection is not None:
            page.load(lambda: collection.state, None, state, queue=False, api_visibility="private")
    return page.queue(max_size=WAITING)


def _caption_tab(actions: Actions, examples: Examples, alone: dict[str, Any]) -> None:
    with gradio.Row(elem_classes="sides"):
        with gradio.Column(elem_classes="given"):
            image = image_input("Image")
            button = gradio.Button("Caption", variant="primary")
            shown_examples = examples_input(examples.images, image)
        with gradio.Column(elem_classes="set"):
            strategy = gradio.Dropdown([(NAMES[name], name) for name in OWN], value="beam", label="Strategy")
            common, asked_of_all = (*LENGTHS, *RULES), []
            own: dict[str, list[Any]] = {}
            groups = []
            for name, settings in OWN.items():
                with gradio.Group(visible=name == "beam") as group:
                    own[name] = [_ask(setting) for setting in settings]
                groups.append(group)
            context = actions.model.config.text.context
            with gradio.Group():
                asked_of_all += [_ask(_within(setting, context)) for setting in LENGTHS]
                prompt = gradio.Textbox("", label="The caption begins with", placeholder="a photo of")
            with gradio.Accordion("Repetition, and words to use or not", open=False):
                asked_of_all += [_ask(setting) for setting in RULES]
        with gradio.Column(elem_classes="shown"):
            text = gradio.Textbox(label="Caption", lines=2, elem_id="caption", interactive=False)
            alternatives = gradio.HTML()
            word = gradio.Radio(
                [],
                label="Where each word looked",
                info="On the part of the image that the model sees; yellow is most.",
            )
            maps = _gallery("maps", format="png")

    def caption(path: str | None, name: str, begins: str, *answers: Any) -> tuple[Any, ...]:
        first, *groups = _split(answers, [len(common), *map(len, OWN.values())])
        settings = chosen(name, (*common, *OWN[name]), [*first, *dict(zip(OWN, groups, strict=True))[name]])
        return _shown(actions.caption(path, name, settings, begins or ""))

    inputs = [image, strategy, prompt, *asked_of_all, *(part for parts in own.values() for part in parts)]
    outputs = [text, alternatives, word, maps]
    _on_image(image, button, caption, inputs, outputs, "caption", alone)
    _on_example(shown_examples, examples, caption, inputs, outputs, alone)
    strategy.change(
        lambda name: [gradio.update(visible=name == other) for other in OWN],
        strategy,
        groups,
        queue=False,
        api_visibility="private",
    )
    word.input(
        lambda number: gradio.update(selected_index=number),
        word,
        maps,
        queue=False,
        api_visibility="private",
    )


def _gallery(name: str, *, format: str) -> gradio.Gallery:
    """Images in rows of four, for looking at alone."""
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


def _shown(captioned: Captioned) -> tuple[Any, ...]:
    """What the caption tab shows: the text, the table, the words to choose from, their maps."""
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


def _classify_tab(actions: Actions, examples: Examples, alone: dict[str, Any]) -> None:
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
    _on_image(image, button, actions.classify, inputs, outputs, "classify", alone)
    _on_example(shown_examples, examples, actions.classify, inputs, outputs, alone)


def _search_tab(actions: Actions, collection: Collection | None, alone: dict[str, Any]) -> gradio.Markdown:
    """The tab; returns where it says how many images can be searched."""
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
            found = _gallery("found", format="jpeg")

    def read(paths: Sequence[str], progress: gradio.Progress = PROGRESS) -> tuple[Collection, str]:
        if len(paths) > MAX_SEARCHED:
            raise ValueError(f"these are {len(paths):,} images; the page searches at most {MAX_SEARCHED} uploaded ones")
        uploaded = Collection(actions, paths)
        for done in uploaded.fill():
            progress((done, uploaded.total), desc="reading images", unit="images")
        return uploaded, uploaded.state

    def search_text(wanted: str, uploaded: Collection | None = None) -> tuple[Any, str]:
        searched = _given(collection or uploaded)
        return _matches(searched.search_text(wanted or "")), searched.state

    def search_image(path: str | None, uploaded: Collection | None = None) -> tuple[Any, str]:
        searched = _given(collection or uploaded)
        return _matches(searched.search_image(path)), searched.state

    own = gradio.State()
    if collection is not None:
        timer = gradio.Timer(STATE_SECONDS)
        timer.tick(
            lambda: (collection.state, gradio.Timer(active=collection.unread > 0)),
            None,
            [state, timer],
            queue=False,
            api_visibility="private",
            show_progress="hidden",
        )
    if files is not None:
        files.change(clearly(read), files, [own, state], api_name="read", **alone)
    gradio.on(
        [by_text.click, text.submit],
        clearly(search_text),
        [text, own],
        [found, state],
        api_name="search_text",
        **alone,
    )
    _on_image(image, by_image, search_image, [image, own], [found, state], "search_picture", alone)
    return state


def _given(collection: Collection | None) -> Collection:
    if collection is None or not collection.total:
        raise ValueError("there is nothing to search in yet: upload some images")
    return collection


def _on_image(
    image: gradio.Image,
    button: gradio.Button,
    action: Callable[..., Any],
    inputs: list[Any],
    outputs: list[Any],
    name: str,
    alone: dict[str, Any],
) -> None:
    """Act once there is an image, the first input, and again at a button."""

    def act_on(path: str | None, *others: Any) -> Any:
        return action(path, *others) if path is not None else gradio.skip()  # it was taken away

    button.click(clearly(action), inputs, outputs, api_name=name, **alone)
    image.input(clearly(act_on), inputs, outputs, api_visibility="private", **alone)


def _on_example(
    shown: gradio.Dataset | None,
    examples: Examples,
    action: Callable[..., Any],
    inputs: list[Any],
    outputs: list[Any],
    alone: dict[str, Any],
) -> None:
    """Put the example that is chosen in place of the image, the first input, and act on it."""
    if shown is not None:
        shown.click(
            clearly(lambda number: str(examples.images[number])),
            shown,
            inputs[0],
            queue=False,
            api_visibility="private",
        ).success(clearly(action), inputs, outputs, api_visibility="private", **alone)


def _matches(matches: Sequence[Match]) -> list[tuple[Any, str]]:
    return [(match.image, f"{match.score:.3f} {match.name}") for match in matches]


def _ask(setting: Setting) -> Any:
    """The input for a setting."""
    if isinstance(setting, Amount):
        return number_input(
            setting.label, low=setting.low, high=setting.high, step=setting.step, default=setting.default
        )
    if isinstance(setting, Choice):
        return gradio.Radio(list(setting.values), value=setting.default, label=setting.label)
    return gradio.Textbox("", label=setting.label, placeholder="cat, a photo of")


def _within(setting: Amount, context: int) -> Amount:
    """A length of texts that this model can write."""
    return replace(setting, high=min(setting.high, context), default=min(setting.default, context))


def _split(values: Sequence[Any], counts: Sequence[int]) -> list[Sequence[Any]]:
    """The values in groups of so many."""
    groups, first = [], 0
    for count in counts:
        groups.append(values[first : first + count])
        first += count
    return groups
