import io

import torch
from PIL import Image

from contracap.apps.report.grids import best_images, best_texts, caption_grid, image_grid
from contracap.apps.report.sections import caption_parts, confusion_parts, spread
from contracap.apps.report.thumbnails import SIDE, encode_thumbnail, read_wanted_samples
from contracap.data.samples import Sample
from contracap.evaluation.predictions import Prediction
from contracap.evaluation.retrieval import Features
from tests.evaluation.worlds import sample


def features() -> Features:
    """Three images with two captions each; the first caption of each is its own, the second the next one's."""
    images = torch.eye(3)
    return Features(
        images=images,
        texts=images[[0, 1, 1, 2, 2, 0]],
        image_of_text=torch.tensor([0, 0, 1, 1, 2, 2]),
        keys=["a", "b", "c"],
        captions=[f"caption {number}" for number in range(6)],
    )


SAMPLES = dict(enumerate([sample("a", "red"), sample("b", "green"), sample("c", "blue")]))


def test_images_are_ranked_by_score_and_the_right_one_is_marked() -> None:
    right, wrong = best_images(features(), [0, 1])
    assert (right.candidates, right.right) == ((0, 1, 2), (True, False, False))
    assert (wrong.candidates, wrong.right) == ((1, 0, 2), (False, True, False))  # equal ones in the order of the data
    html = image_grid(features(), [right, wrong], SAMPLES)
    assert html.count('class="good"') == 2
    assert html.count('class="bad"') == 1  # only in the first place


def test_texts_are_ranked_by_score_and_every_right_one_is_ticked() -> None:
    (found,) = best_texts(features(), [1])
    assert found.candidates == (1, 2, 0, 3, 4)
    assert found.right == (False, True, False, True, False)
    html = caption_grid(features(), [found], SAMPLES)
    assert html.count("✓") == 2
    assert html.count("✗") == 3


def test_best_median_and_worst_captions_are_those_by_cider() -> None:
    samples = [sample(f"key{number}", "red", "a person wrote") for number in range(30)]
    predictions = [
        Prediction(key=f"key{number}", prediction=f"written {number}", captions=("a person wrote",), cider=float(score))
        for number, score in enumerate([*range(15), *range(29, 14, -1)])
    ]
    html = "".join(caption_parts(predictions, samples))
    best, median, worst = (part for part in html.split("<h3>")[1:])
    assert "<b>written 15</b>" in best and "2900" in best  # times 100
    assert "<b>written 14</b>" in median
    assert "<b>written 0</b>" in worst
    assert all(part.count("<figure>") == 5 for part in (best, median, worst))


def test_few_captions_stand_in_one_kind_each() -> None:
    samples = [sample(f"key{number}", "red", "a person wrote") for number in range(3)]
    predictions = [
        Prediction(key=f"key{number}", prediction=f"written {number}", captions=("x",), cider=float(number))
        for number in range(3)
    ]
    html = "".join(caption_parts(predictions, samples))
    assert [html.count(f"<b>written {number}</b>") for number in range(3)] == [1, 1, 1]


def test_a_confusion_matrix_counts_each_pair() -> None:
    html = "".join(confusion_parts(("cat", "dog"), [0, 0, 0, 1], [0, 1, 1, 1]))
    cells = [part.split("</td>")[0].rpartition(">")[2] for part in html.split("<td")[1:]]
    assert cells == ["1", "2", "", "1"]
    assert "--share:0.667" in html


def test_of_many_classes_the_most_confused_pairs_are_listed() -> None:
    classes = [f"class {number}" for number in range(100)]
    html = "".join(confusion_parts(classes, [7, 7, 7, 8, 9], [7, 50, 50, 9, 9]))
    rows = html.split("<tr>")[2:]
    assert len(rows) == 2
    assert "class 7</td><td>class 50" in rows[0] and "66.7 %" in rows[0]
    assert "class 8</td><td>class 9" in rows[1] and "100.0 %" in rows[1]


def test_a_large_image_becomes_a_small_jpeg_and_a_drawn_one_stays() -> None:
    file = io.BytesIO()
    Image.effect_noise((800, 400), 50).save(file, "PNG")
    small = encode_thumbnail(file.getvalue())
    with Image.open(io.BytesIO(small)) as picture:
        assert picture.format == "JPEG"
        assert picture.size == (SIDE, SIDE // 2)
    drawn = sample("a", "red").image
    assert encode_thumbnail(drawn) == drawn


def test_only_the_chosen_samples_are_kept() -> None:
    samples: list[Sample] = [sample(f"key{number}", "red") for number in range(200)]
    found = read_wanted_samples(samples, [150, 3])
    assert {row: each.key for row, each in found.items()} == {150: "key150", 3: "key3"}


def test_places_are_spread_over_the_data() -> None:
    assert spread(1000, 4) == [0, 250, 500, 750]
    assert spread(3, 8) == [0, 1, 2]
