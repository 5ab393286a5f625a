import pytest

from contracap.apps.report.curves import MAX_POINTS, average_neighbours, draw_curves


def polylines(html: str) -> list[int]:
    """Points of each curve."""
    return [len(part.split('"')[0].split()) for part in html.split('points="')[1:]]


def test_a_long_curve_has_few_points_and_the_same_mean() -> None:
    points = [(float(step), float(step % 7)) for step in range(6000)]
    few = average_neighbours(points)
    assert len(few) == MAX_POINTS
    assert sum(y for _, y in few) / len(few) == pytest.approx(sum(y for _, y in points) / 6000)
    assert few[0][0] == 9.5  # the middle of the first twenty
    assert average_neighbours(points[:MAX_POINTS]) == points[:MAX_POINTS]
    assert average_neighbours([]) == []


def test_training_and_validation_losses_share_a_chart() -> None:
    records = [{"step": 1, "contrastive_loss": 2.0}, {"step": 2, "validation_contrastive_loss": 1.5}]
    html = draw_curves(records)
    assert html.count("<svg") == 1
    assert polylines(html) == [1, 1]
    assert html.count('r="3"') == 2  # a line of one point would not be seen


def test_numbers_that_were_not_finite_are_no_points() -> None:
    records = [{"step": step, "contrastive_loss": None if step == 2 else 1.0} for step in (1, 2, 3)]
    assert polylines(draw_curves(records)) == [2]


def test_recalls_of_one_direction_share_a_chart_and_single_figures_have_none() -> None:
    recall = {f"flickr8k/text_to_image_recall@{k}": 0.1 for k in (1, 5, 10)}
    records = [{"step": step, **recall} for step in (1, 2)]
    records.append({"step": 3, "cifar10/acc1": 0.5, "skipped/no_caption": 3.0})
    html = draw_curves(records)
    assert html.count("<svg") == 1
    assert polylines(html) == [2, 2, 2]
    assert "@10" in html


def test_a_page_says_that_points_are_means() -> None:
    records = [{"step": step, "gradient_norm": 1.0} for step in range(3 * MAX_POINTS)]
    assert "averages 3 records" in draw_curves(records)
    assert "mean of" not in draw_curves(records[:10])
