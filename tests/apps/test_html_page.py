"""The page: self-contained, escaped, and readable by a parser."""

import base64
import io
from html.parser import HTMLParser

import pytest
from PIL import Image

from contracap.apps.html_page import (
    Html,
    bars,
    chart,
    charts,
    drawing,
    gallery,
    heat_table,
    image_tag,
    page,
    pairs,
    paragraph,
    table,
    text,
    verdict,
)

EVIL = '<script>alert("&")</script>'
VOID = {"meta", "img", "br", "line", "circle", "polyline", "rect"}


class Tags(HTMLParser):
    """Collects tags and attributes, and fails at a tag that is closed in the wrong place."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs


def read(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    tags.close()
    assert not tags.open
    return tags


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "png")
    return file.getvalue()


@pytest.fixture
def whole_page() -> str:
    shown = image_tag(png(), alt=EVIL, good=False)
    return page(
        EVIL,
        {
            "": [paragraph(EVIL), table((EVIL, "n"), [(EVIL, "1"), (verdict(EVIL, good=True), shown)], numbers=(1,))],
            EVIL: [gallery([(shown, EVIL), (image_tag(png(), alt="fine"), verdict("right", good=True))])],
            "pairs": [pairs([(shown, shown, [EVIL, EVIL], EVIL)])],
            "heat": [heat_table(EVIL, [EVIL, "b"], [[1, 2], [0, 0]])],
            "curves": [charts([chart(EVIL, {EVIL: [(0.0, 1.0), (10.0, 0.5)]}, across=EVIL), bars(EVIL, {EVIL: 3})])],
        },
    )


def test_whatever_comes_from_outside_is_escaped(whole_page: str) -> None:
    assert "<script" not in whole_page
    assert "script" not in read(whole_page).seen
    assert whole_page.count("&lt;script&gt;") >= 14


def test_the_page_asks_the_network_for_nothing(whole_page: str) -> None:
    tags = read(whole_page)
    sources = [value for name, value in tags.attributes if name in ("src", "href", "srcset", "action")]
    assert sources
    assert all(value and value.startswith("data:image/png;base64,") for value in sources)
    assert not {"script", "link", "iframe"} & set(tags.seen)
    assert "http" not in whole_page
    assert "url(" not in whole_page
    assert "@import" not in whole_page


def test_what_is_html_already_is_not_escaped_twice() -> None:
    assert text(text("a & b")) == "a &amp; b"
    assert "<b>" in table(("x",), [(Html("<b>y</b>"),)])


def test_an_image_and_a_drawing_keep_their_bytes() -> None:
    for shown, content in ((image_tag(png(), alt="red"), png()), (drawing(b"<svg/>", alt=EVIL), b"<svg/>")):
        read(shown)
        assert base64.b64decode(shown.split("base64,")[1].split('"')[0]) == content


def test_a_curve_runs_through_its_points() -> None:
    drawn = chart("loss", {"loss": [(0.0, 4.0), (50.0, 2.0), (100.0, 0.0)]}, across="step")
    line = drawn.split('points="')[1].split('"')[0]
    places = [tuple(map(float, pair.split(","))) for pair in line.split()]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x0 < x1 < x2
    assert y0 < y1 < y2  # SVG counts downwards
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)


@pytest.mark.parametrize("points", [[(0.0, 1.0)], [(0.0, 0.0), (1.0, 0.0)], [(5.0, -2.0), (6.0, 1e-6)]])
def test_flat_and_lonely_curves_can_be_drawn(points: list[tuple[float, float]]) -> None:
    read(chart("loss", {"loss": points}, across="step"))


def test_points_that_are_not_finite_are_left_out() -> None:
    drawn = chart("loss", {"loss": [(0.0, 1.0), (1.0, float("nan")), (2.0, 0.5)]}, across="step")
    assert "nan" not in drawn
    assert len(drawn.split('points="')[1].split('"')[0].split()) == 2


def test_bars_are_as_long_as_their_counts_and_tell_them() -> None:
    drawn = bars("size", {"small": 500, "none": 0, "large": 1000})
    read(drawn)
    widths = [float(part.split('width="')[1].split('"')[0]) for part in drawn.split("<rect")[1:]]
    assert widths == pytest.approx([widths[2] / 2, 0, widths[2]], abs=0.1)
    assert all(f">{words}</text>" in drawn for words in ("small", "none", "large", "500", "0", "1,000"))


def test_a_chart_refuses_no_points_and_too_many_curves() -> None:
    with pytest.raises(ValueError, match="no point"):
        chart("loss", {"loss": [(0.0, float("nan"))]}, across="step")
    with pytest.raises(ValueError, match="no bar"):
        bars("size", {})
    with pytest.raises(ValueError, match="up to three"):
        chart("loss", {str(number): [(0.0, 1.0)] for number in range(4)}, across="step")
