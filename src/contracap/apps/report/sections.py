"""What an evaluator found, beyond its figures: pictures with their captions, retrieval, confusions."""

from collections import Counter
from collections.abc import Iterator, Sequence

from contracap.apps.page import Html, gallery, heat_table, paragraph, table, text
from contracap.apps.report.grids import best_pictures, best_texts, caption_grid, picture_grid
from contracap.apps.report.pictures import chosen_samples, shown
from contracap.evaluation.captioning import Captioning, Prediction
from contracap.evaluation.result import Evaluator
from contracap.evaluation.retrieval import Retrieval
from contracap.evaluation.zeroshot import ZeroShot

QUERIES = 8  # of each direction of retrieval
CARDS = 5  # captions of each kind
MOST_CLASSES = 25  # of a whole confusion matrix
MOST_PAIRS = 20  # of one with more classes


def sections_of(evaluator: Evaluator) -> Iterator[Html]:
    """Parts of the page for an evaluator that has run; of a kind that is not known here, none."""
    if isinstance(evaluator, Retrieval):
        yield from retrieved(evaluator)
    elif isinstance(evaluator, Captioning):
        yield from captioned(evaluator)
    elif isinstance(evaluator, ZeroShot) and evaluator.labels:  # pictures of several classes have none
        yield from confused(evaluator.classes, evaluator.labels, evaluator.predictions)


def retrieved(evaluator: Retrieval) -> Iterator[Html]:
    """What is found for some texts and some pictures, spread over the data."""
    features = evaluator.features
    assert features is not None  # it has run
    images = spread(len(features.images), QUERIES)
    first_texts = {image: text for text, image in reversed(list(enumerate(features.image_of_text.tolist())))}
    pictures = best_pictures(features, [first_texts[image] for image in images])
    texts = best_texts(features, images)
    samples = chosen_samples(evaluator.source, {*images, *(image for each in pictures for image in each.candidates)})
    yield paragraph(
        f"For {len(images)} captions the best of all {len(features.images):,} pictures. Green: the caption's own "
        "picture; red: another one in the first place."
    )
    yield picture_grid(features, pictures, samples)
    yield paragraph(f"For their pictures the best of all {len(features.captions):,} captions.")
    yield caption_grid(features, texts, samples)


def captioned(evaluator: Captioning) -> Iterator[Html]:
    """The best, the median and the worst captions by CIDEr."""
    predictions = evaluator.predictions
    if any(prediction.cider is None for prediction in predictions):
        yield paragraph(
            "Without CIDEr, which was not measured, nobody knows which captions are the best and the worst."
        )
        return
    order = sorted(range(len(predictions)), key=lambda row: -(predictions[row].cider or 0.0))
    count = min(CARDS, max(1, len(order) // 3))
    middle = (len(order) - count) // 2
    kinds = {"Best": order[:count], "Median": order[middle : middle + count], "Worst": order[-count:]}
    samples = chosen_samples(evaluator.source, {row for rows in kinds.values() for row in rows})
    yield paragraph("Captions by their CIDEr, which is printed times 100; below each what people wrote.")
    for kind, rows in kinds.items():
        yield Html(f"<h3>{kind}</h3>\n")
        yield gallery((shown(samples[row]), _beneath(predictions[row])) for row in rows)


def confused(classes: Sequence[str], labels: Sequence[int], predictions: Sequence[int]) -> Iterator[Html]:
    """How often each class is taken for each other: all of them, or of many classes the pairs most often confused."""
    counts = Counter(zip(labels, predictions, strict=True))
    if len(classes) <= MOST_CLASSES:
        yield paragraph("In each row the pictures of one class, and what they are taken for.")
        matrix = [[counts[label, taken] for taken in range(len(classes))] for label in range(len(classes))]
        yield heat_table("class", classes, matrix)
        return
    of_class = Counter(labels)
    wrong = [(pair, count) for pair, count in counts.most_common() if pair[0] != pair[1]][:MOST_PAIRS]
    yield paragraph(f"Of {len(classes)} classes the pairs that are most often confused.")
    yield table(
        ("class", "taken for", "pictures", "of the class"),
        [
            (classes[label], classes[taken], f"{count:,}", f"{100 * count / of_class[label]:.1f} %")
            for (label, taken), count in wrong
        ],
        numbers=(2, 3),
    )


def _beneath(prediction: Prediction) -> Html:
    """What was written for a picture, how it scored, and what people wrote."""
    references = "".join(f"<li>{text(caption)}</li>" for caption in prediction.captions)
    return Html(
        f'<b>{text(prediction.prediction)}</b> <span class="faint">{100 * (prediction.cider or 0.0):.0f}</span>'
        f"<ul>{references}</ul>"
    )


def spread(count: int, most: int) -> list[int]:
    """Up to `most` places out of `count`, evenly spread."""
    return sorted({place * count // most for place in range(most)}) if count > most else list(range(count))
