"""A survey of shards for a person's eyes: lines for a terminal, and a page where a wrong pairing shows."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from contracap.apps.html_page import Html, bars, charts, image_tag, page, pairs, paragraph, table, text
from contracap.data.survey import EXAMPLES, Survey, share
from contracap.files import write_text
from contracap.wording import counted, escaped

SIDE_BINS = (1, 8, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 512, 640, 768, 1024, 1536, 2048, 4096)
BAR = 40  # characters of the longest bar on the terminal


def survey_lines(survey: Survey) -> list[str]:
    """The numbers of a survey, for a terminal."""
    lines = [f"{name:10}{words}" for name, words in _rows(survey)]
    lines += [f"  {kind}: {skipped.examples[0]}" for kind, skipped in survey.skipped.items()]
    for title, counts in _histograms(survey).items():
        longest = max(counts.values())
        lines += ["", title]
        for name, count in counts.items():
            lines.append(f"{name:>10}  {'#' * math.ceil(BAR * count / longest):{BAR}} {count:,}")
    return [escaped(line) for line in lines]  # names come from the shards


def write_page(survey: Survey, path: str | Path) -> None:
    """Write a survey as one HTML file that needs no network, whole or not at all."""
    drawn = [bars(title, counts) for title, counts in _histograms(survey).items()]
    skipped = [(kind, f"{found.count:,}", _listed(found.examples)) for kind, found in survey.skipped.items()]
    cards = [
        (
            image_tag(shown.crop, alt=f"crop of {shown.key}"),
            image_tag(shown.original, alt=f"whole of {shown.key}"),
            shown.captions or ("(no caption)",),
            f"{shown.key} · {shown.shard.rpartition('/')[2]} · {shown.width} x {shown.height}",
        )
        for shown in survey.shown
    ]
    sections = {"": [paragraph(_extent(survey)), table(("", ""), _rows(survey)), charts(drawn)]}
    if skipped:
        sections["Skipped"] = [
            paragraph(f"What training skips, with the messages of the first {EXAMPLES} of each kind."),
            table(("kind", "count", "examples"), skipped, numbers=(1,)),
        ]
    sections["Samples"] = [
        paragraph(
            f"{counted(len(cards), 'sample(s)')}, drawn with seed {survey.seed}. Left: a random crop of "
            f"{survey.image.size} pixels, as the trainer makes them. Right: the whole image."
        ),
        pairs(cards),
    ]
    write_text(path, page("contracap shards show", sections))


def _rows(survey: Survey) -> list[tuple[str, str]]:
    """Return what there is, in words, by name."""
    shards, samples, captions = f"{survey.shards:,}", f"{survey.samples:,}", f"{survey.captions:,}"
    if not survey.complete:
        shards += f", {survey.shards_read:,} of them opened"
        total = "an unknown number" if survey.total_samples is None else f"{survey.total_samples:,}"
        samples = f"the first {samples} of {total}; what follows is about these"
    if survey.captions_per_image:
        fewest, most = min(survey.captions_per_image), max(survey.captions_per_image)
        captions += f", {fewest if fewest == most else f'{fewest} to {most}'} an image"
    if survey.captions_of_lines:
        captions += f"; {survey.captions_of_lines:,} have line breaks: if each line is a caption, store them as a list"
    formats = ", ".join(f"{name} {count:,}" for name, count in survey.formats.items())
    skipped = ", ".join(f"{kind} {found.count:,}" for kind, found in survey.skipped.items())
    return [
        ("shards", shards),
        ("samples", samples),
        ("captions", f"{captions}; {_percent(survey.cut_share)} are cut by a context of {survey.context} tokens"),
        (
            "images",
            f"{formats or 'none'}; {_percent(survey.enlarged_share)} are smaller than {survey.image.size} pixels",
        ),
        (
            "repeated",
            f"{survey.repeated_images:,} images ({_percent(share(survey.repeated_images, survey.images))}), "
            f"{survey.repeated_captions:,} captions ({_percent(share(survey.repeated_captions, survey.captions))})",
        ),
        ("skipped", skipped or "none"),
    ]


def _extent(survey: Survey) -> str:
    """Say what was counted and what was only sampled."""
    extent = "Every sample of every shard was read."
    if not survey.complete:
        extent = f"Only the first {counted(survey.samples, 'sample(s)')} were read; all numbers are about these."
    return (
        f"{extent} Sizes come from image headers. Only the samples shown below were decoded, so damaged pixel data "
        "elsewhere goes unnoticed. 'Repeated' counts exact duplicates."
    )


def _histograms(survey: Survey) -> dict[str, dict[str, int]]:
    """Bars by title, where there are any."""
    histograms = {
        "caption length, tokens": _binned(survey.caption_lengths, length_bins(survey.context)),
        "shorter side, pixels": _binned(survey.shorter_sides, SIDE_BINS),
        "width : height, the nearest of these": survey.aspect_ratios,
    }
    return {title: counts for title, counts in histograms.items() if counts}


def length_bins(context: int) -> list[int]:
    """Return the first lengths of bins, in tokens; the last one holds what the context cuts."""
    return [*range(1, context + 1, 4), context + 1]


def _binned(counts: Mapping[int, int], starts: Sequence[int]) -> dict[str, int]:
    """Counts in bins that begin at `starts`, without the empty ones at both ends."""
    found = [0] * len(starts)
    for value, count in counts.items():
        found[bisect_right(starts, value) - 1] += count
    names = [*(f"{start}-{end - 1}" for start, end in pairwise(starts)), f"{starts[-1]}+"]
    filled = [place for place, count in enumerate(found) if count]
    bins = list(zip(names, found, strict=True))
    return dict(bins[filled[0] : filled[-1] + 1]) if filled else {}


def _listed(messages: Sequence[str]) -> Html:
    return Html("<br>".join(text(message) for message in messages))


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"
