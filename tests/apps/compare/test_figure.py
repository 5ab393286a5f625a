"""The figure of a comparison, looked at before it is a file."""

import warnings
from typing import Any

import pytest

from contracap.apps.compare.comparison import compare
from contracap.apps.compare.figure import draw_panel, make_figure
from tests.apps.compare.worlds import result

pytest.importorskip("matplotlib")
HITS = [1.0] * 30 + [0.0] * 10
FEWER = [1.0] * 20 + [0.0] * 20
LONG = ("CoCa large, patches of 14, finetuned", "CLIP-ViT-L-14-laion2b-s32b-b82k")


def figure(names: tuple[str, str] = ("A", "B"), tasks: int = 2, task: str = "task{}") -> Any:
    values = {f"{task.format(number)}/text_to_image_recall@5": HITS for number in range(tasks)}
    made = make_figure(compare([result(values)], [result(dict.fromkeys(values, FEWER))], names=names))
    made.canvas.draw()
    return made


@pytest.mark.parametrize("tasks", [1, 9])
def test_long_names_leave_both_panels_two_inches(tasks: int) -> None:
    made = figure(LONG, tasks, "a task with a name that goes on and on, number {}")
    labels = [text.get_text() for text in made.axes[0].get_yticklabels()]
    assert len(set(labels)) == tasks
    for axes in made.axes:
        assert made.get_figwidth() * axes.get_position().width >= 2
    (legend,) = made.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= made.bbox.x1 and box.y1 <= made.bbox.y1
    for axes in made.axes:
        for text in (axes._left_title, axes.xaxis.label, *axes.get_yticklabels()):
            extent = text.get_window_extent()
            assert not extent.overlaps(box)
            assert extent.x0 >= 0 and extent.x1 <= made.bbox.x1


def test_names_are_drawn_as_they_are_written_and_without_a_warning() -> None:
    comparison = compare(
        [result({r"a$\frac$/acc1": HITS})], [result({r"a$\frac$/acc1": FEWER})], names=(r"x$\frac$", "_y \N{DOG}\n日")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw_panel(comparison).png
        made = make_figure(comparison)
        made.canvas.draw()
    assert [text.get_text() for text in made.legends[0].get_texts()] == [r"x$\frac$", "_y \ufffd \ufffd"]
    assert [text.get_text() for text in made.axes[0].get_yticklabels()] == [r"a$\frac$, acc@1"]


def test_bars_are_coloured_by_the_corrected_test_as_the_table_is() -> None:
    values = {f"task{number}/acc1": [1.0] * 8 + [0.0] * 12 for number in range(20)}
    fewer = dict.fromkeys(values, [1.0] * 2 + [0.0] * 18)
    one = compare([result({"task0/acc1": values["task0/acc1"]})], [result({"task0/acc1": fewer["task0/acc1"]})])
    many = compare([result(values)], [result(fewer)])
    colours = [make_figure(comparison).axes[1].patches[0].get_facecolor() for comparison in (one, many)]
    assert one.rows[0].p_holm < 0.05 < many.rows[0].p_holm
    assert many.rows[0].low > 0
    assert colours[0] != colours[1]
