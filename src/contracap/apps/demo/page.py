"""The page itself: three tabs. It asks for nothing beyond its own server."""

import gradio

from contracap.apps.demo.actions import Actions
from contracap.apps.demo.caption_tab import caption_tab
from contracap.apps.demo.classify_tab import classify_tab
from contracap.apps.demo.collection import Collection
from contracap.apps.demo.events import SILENT
from contracap.apps.demo.examples import Examples
from contracap.apps.demo.search_tab import search_tab

WAITING = 100  # visitors in the queue, beyond whom nobody is let in
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


def build_theme() -> gradio.themes.Base:
    """Return a plain theme, in the visitor's own fonts: gradio's themes name some that a browser would fetch."""
    return gradio.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def build_page(actions: Actions, collection: Collection | None, examples: Examples) -> gradio.Blocks:
    """Build the page. Without a collection, visitors search what they upload."""
    with gradio.Blocks(title="contracap", analytics_enabled=False) as page:
        gradio.Markdown("# contracap\nCaptions, classes and searches by one model, a contrastive captioner.")
        with gradio.Tab("Caption"):
            caption_tab(actions, examples)
        with gradio.Tab("Classify"):
            classify_tab(actions, examples)
        with gradio.Tab("Search"):
            state = search_tab(actions, collection)
        if collection is not None:
            page.load(lambda: collection.state, None, state, **SILENT)
    return page.queue(max_size=WAITING)
