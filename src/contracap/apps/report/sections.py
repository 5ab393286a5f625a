"""Parts of the page beyond the figures: images with their captions, retrieval, confusions."""

from collections import Counter
from collections.abc import Iterator, Sequence

from contracap.apps.html_page import Html, gallery, heat_table, paragraph, table, text
from contracap.apps.report.grids import best_images, best_texts, caption_grid, image_grid
from contracap.apps.report.thumbnails import read_wanted_samples, thumbnail_tag
from contracap.evaluation.features import Source
from contracap.evaluation.predictions import Prediction
from contracap.evaluation.result import Result
from contracap.evaluation.retrieval import Features
from contracap.evaluation.zeroshot import ChosenClasses
from contracap.wording import counted

QUERIES = 8  # of each direction of retrieval
CARDS = 5  # captions of each kind
MAX_CLASSES = 25  # of a whole confusion matrix
MAX_PAIRS = 20  # of one with more classes


def sections_of(result: Result, data: Source) -> Iterator[Html]:
    """Parts of the page for what was measured on `data`; none for a kind of predictions that is not known here."""
    predictions = result.predictions
    if isinstance(predictions, Features):
        yield from retrieval_parts(predictions, data)
    elif isinstance(predictions, ChosenClasses):
        yield from confusion_parts(predictions.classes, predictions.labels, predictions.predictions)
    elif predictions and isinstance(predictions[0], Prediction):
        yield from caption_parts(predictions, data)


def retrieval_parts(features: Features, data: Source) -> Iterator[Html]:
    """Show what is found for some texts and some images, spread over the data."""
    images = spread(len(features.images), QUERIES)
    first_texts = {image: text for text, image in reversed(list(enumerate(features.image_of_text.tolist())))}
    images_found = best_images(features, [first_texts[image] for image in images])
    texts = best_texts(features, images)
    samples = read_wanted_samples(data, {*images, *(image for each in images_found for image in each.candidates)})
    yield paragraph(
        f"The best of {counted(len(features.images), 'image(s)')} for {counted(len(images), 'caption(s)')}. "
        "Green: the caption's own image; red: another image in the first place."
    )
    yield image_grid(features, images_found, samples)
    yield paragraph(f"The best of {counted(len(features.captions), 'caption(s)')} for their images.")
    yield caption_grid(features, texts, samples)


def caption_parts(predictions: Sequence[Prediction], data: Source) -> Iterator[Html]:
    """Show the best, the median and the worst captions by CIDEr."""
    if any(prediction.cider is None for prediction in predictions):
        yield paragraph("CIDEr was not computed, so captions cannot be ranked.")
        return
    order = sorted(range(len(predictions)), key=lambda row: -(predictions[row].cider or 0.0))
    count = min(CARDS, max(1, len(order) // 3))
    middle = (len(order) - count) // 2
    kinds = {"Best": order[:count], "Median": order[middle : middle + count], "Worst": order[-count:]}
    samples = read_wanted_samples(data, {row for rows in kinds.values() for row in rows})
    yield paragraph("Captions by their CIDEr, times 100; below each, its references.")
    for kind, rows in kinds.items():
        yield Html(f"<h3>{kind}</h3>\n")
        yield gallery((thumbnail_tag(samples[row]), _beneath(predictions[row])) for row in rows)


def confusion_parts(classes: Sequence[str], labels: Sequence[int], predictions: Sequence[int]) -> Iterator[Html]:
    """Show how often each class is taken for each other: all, or of many classes the pairs most often confused."""
    counts = Counter(zip(labels, predictions, strict=True))
    if len(classes) <= MAX_CLASSES:
        yield paragraph("A row for each class: its images by predicted class.")
        matrix = [[counts[label, taken] for taken in range(len(classes))] for label in range(len(classes))]
        yield heat_table("class", classes, matrix)
        return
    of_class = Counter(labels)
    wrong = [(pair, count) for pair, count in counts.most_common() if pair[0] != pair[1]][:MAX_PAIRS]
    yield paragraph(f"The most frequent confusions among {len(classes)} classes.")
    yield table(
        ("class", "predicted", "images", "share of the class"),
        [
            (classes[label], classes[taken], f"{count:,}", f"{100 * count / of_class[label]:.1f} %")
            for (label, taken), count in wrong
        ],
        numbers=(2, 3),
    )


def _beneath(prediction: Prediction) -> Html:
    """Return the caption of an image, its score, and its references."""
    references = "".join(f"<li>{text(caption)}</li>" for caption in prediction.captions)
    return Html(
        f'<b>{text(prediction.prediction)}</b> <span class="faint">{100 * (prediction.cider or 0.0):.0f}</span>'
        f"<ul>{references}</ul>"
    )


def spread(count: int, most: int) -> list[int]:
    """Return up to `most` places out of `count`, evenly spread."""
    return sorted({place * count // most for place in range(most)}) if count > most else list(range(count))
