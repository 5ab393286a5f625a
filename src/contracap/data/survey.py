"""Counts of what shards hold, and some of their samples as the trainer will see them."""

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from contracap.config import require_count
from contracap.data.captions import require_captions
from contracap.data.counts import indexed_samples
from contracap.data.samples import Record, Sample, SampleError, parse_record
from contracap.data.shards import ShardError, list_shards, read_records
from contracap.image_files import ImageError, decode, encode_jpeg, make_thumbnail, measure, require_trainable_size
from contracap.images import AugmentationConfig, ImageConfig, augment
from contracap.progress import progress_bar
from contracap.tokenizer import Tokenizer

EXAMPLES = 5  # messages kept of each kind of skip
SHOWN_SIDE = 256  # longest side, in pixels, of the images that are kept to be shown
ASPECT_RATIOS = ("1:3", "1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1", "3:1")


@dataclass(frozen=True, kw_only=True)
class SkipCount:
    """Number of samples or shards that cannot be used for one reason, and the messages of the first `EXAMPLES`."""

    count: int = 0
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ShownSample:
    """A sample for a person to look at; both images are JPEG files.

    Attributes:
        width, height: of the image, in pixels, when it is upright.
        original: the whole image, made smaller.
        crop: a random crop of it, as the trainer makes them.
    """

    key: str
    shard: str
    width: int
    height: int
    captions: tuple[str, ...]
    original: bytes
    crop: bytes


@dataclass(kw_only=True)
class Survey:
    """Results of `survey`.

    Attributes:
        image: configuration of the crops.
        context: tokens to which a model cuts captions.
        seed: of the draw and the crops.
        shards: how many there are.
        shards_read: how many of them were opened.
        complete: all was read; otherwise the limit ended the reading.
        samples: number of samples that were read, usable or not. All that follows is about these.
        total_samples: of all shards; None if the reading was not complete and no index tells.
        caption_lengths: captions by length: tokens, start and end included, not cut.
        captions_per_image: samples by their number of captions.
        formats: images by format.
        shorter_sides: images by shorter side, pixels.
        aspect_ratios: images by the nearest of `ASPECT_RATIOS`, width to height.
        captions_of_lines: captions with line breaks in them, each of which may be several captions.
        skipped: samples and shards that a trainer skips, by kind.
        shown: samples drawn at random, in the order of the shards.
    """

    image: ImageConfig
    context: int
    seed: int
    shards: int
    shards_read: int = 0
    complete: bool = True
    samples: int = 0
    total_samples: int | None = None
    caption_lengths: Counter[int] = field(default_factory=Counter)
    captions_per_image: Counter[int] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    shorter_sides: Counter[int] = field(default_factory=Counter)
    aspect_ratios: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(ASPECT_RATIOS, 0)))
    captions_of_lines: int = 0
    skipped: dict[str, SkipCount] = field(default_factory=dict)
    shown: tuple[ShownSample, ...] = ()
    image_hashes: "array[int]" = field(default_factory=lambda: array("Q"), repr=False)
    caption_hashes: "array[int]" = field(default_factory=lambda: array("Q"), repr=False)

    @property
    def images(self) -> int:
        return self.formats.total()

    @property
    def captions(self) -> int:
        return self.caption_lengths.total()

    @property
    def repeated_images(self) -> int:
        """Images whose file came before, byte for byte."""
        return _repeated(self.image_hashes)

    @property
    def repeated_captions(self) -> int:
        """Captions that came before, word for word."""
        return _repeated(self.caption_hashes)

    @property
    def cut_share(self) -> float:
        """Share of the captions that the context cuts."""
        cut = sum(count for length, count in self.caption_lengths.items() if length > self.context)
        return share(cut, self.captions)

    @property
    def enlarged_share(self) -> float:
        """Share of the images whose shorter side is below the model's."""
        small = sum(count for side, count in self.shorter_sides.items() if side < self.image.size)
        return share(small, self.images)

    def skip(self, kind: str, message: str) -> None:
        """Count a sample or a shard that cannot be used."""
        known = self.skipped.get(kind, SkipCount())
        self.skipped[kind] = SkipCount(count=known.count + 1, examples=(*known.examples, message)[:EXAMPLES])


def survey(
    paths: str | Path | Sequence[str | Path],
    *,
    limit: int | None = None,
    sample_count: int = 48,
    seed: int = 0,
    image: ImageConfig = ImageConfig(),
    augmentation: AugmentationConfig = AugmentationConfig(),
    tokenizer: Tokenizer | None = None,
    lines: bool = True,
) -> Survey:
    """Read shards and count what is in them.

    Images are measured by their headers. Only those of the samples to be shown are decoded. Each image and caption
    takes 8 bytes of memory, for the hash that finds repetitions.

    Args:
        paths: a folder of shards, a shard, or several of them, local or remote.
        limit: samples to read, the first ones; by default all.
        sample_count: samples to draw.
        seed: of the draw and the crops.
        image: configuration of the trainer's images.
        augmentation: how the trainer crops and mirrors them.
        tokenizer: measures captions; its context cuts them. By default that of the released models.
        lines: each line of a `.txt` is a caption; otherwise the whole text is one.

    Raises:
        FileNotFoundError: if there are no shards.
        ValueError: if a number is too small, or an index next to the shards is broken.
    """
    if limit is not None:
        require_count("limit", limit, 1, "samples, from the first one on", most=10**12)
    require_count("samples", sample_count, 0, "samples on the page", most=10_000)
    require_count("seed", seed, 0, "of the samples and their crops", most=2**63 - 1)
    shards = list_shards(paths)
    indexed, tokenizer = indexed_samples(shards), tokenizer or Tokenizer()
    found = Survey(image=image, context=tokenizer.context, seed=seed, shards=len(shards))
    reader = _Reader(found, tokenizer, lines, sample_count)
    known = [samples for samples in (limit, indexed) if samples]
    with progress_bar(total=min(known, default=None), desc="reading", unit=" samples") as progress:
        for record in reader.records(shards):
            if found.samples == limit:
                found.complete = False
                break
            reader.add(record)
            progress.update()
    found.total_samples = found.samples if found.complete else indexed
    found.shown = tuple(reader.shown(augmentation))
    found.formats = Counter(dict(found.formats.most_common()))
    found.aspect_ratios = +found.aspect_ratios  # without those that no image has
    found.skipped = dict(sorted(found.skipped.items()))
    return found


def share(part: int, whole: int) -> float:
    """Return `part` / `whole`, or 0 if both are 0."""
    return part / whole if whole else 0.0


class _Reader:
    """Reads records into a survey, and draws some of their samples at random."""

    def __init__(self, found: Survey, tokenizer: Tokenizer, lines: bool, sample_count: int) -> None:
        self._found, self._tokenizer, self._lines, self._sample_count = found, tokenizer, lines, sample_count
        self._generator = np.random.default_rng(found.seed)
        self._drawn: list[tuple[int, Sample, int, int]] = []  # number, sample, width, height

    def records(self, shards: Iterable[str]) -> Iterator[Record]:
        """Yield the records of all shards, as far as they can be read."""
        for shard in shards:
            self._found.shards_read += 1
            try:
                yield from read_records(shard)
            except ShardError as error:
                self._found.skip("broken_shard", str(error))

    def add(self, record: Record) -> None:
        """Count a record."""
        found = self._found
        found.samples += 1
        try:
            sample = parse_record(record, lines=self._lines)
            self._add_captions(sample)
            width, height, kind = measure(sample.image, sample.name)
            require_trainable_size(height, width, sample.name)
        except (SampleError, ImageError) as error:
            found.skip(error.kind, str(error))
            return
        found.formats[kind] += 1
        found.shorter_sides[min(width, height)] += 1
        found.aspect_ratios[_nearest_ratio(width, height)] += 1
        found.image_hashes.append(_hash(sample.image))
        self._draw(sample, width, height)

    def shown(self, augmentation: AugmentationConfig) -> Iterator[ShownSample]:
        """Yield the drawn samples; a broken one counts as skipped."""
        for number, sample, width, height in sorted(self._drawn, key=lambda drawn: drawn[0]):
            try:
                pixels = decode(sample.image, name=sample.name)
            except ImageError as error:
                self._found.skip(error.kind, str(error))
                continue
            generator = np.random.default_rng([self._found.seed, number])
            crop = augment(pixels, self._found.image, augmentation, generator)
            yield ShownSample(
                key=sample.key,
                shard=sample.shard,
                width=width,
                height=height,
                captions=sample.captions,
                original=encode_jpeg(make_thumbnail(pixels, SHOWN_SIDE)),
                crop=encode_jpeg(make_thumbnail(crop, SHOWN_SIDE)),
            )

    def _add_captions(self, sample: Sample) -> None:
        found = self._found
        found.captions_per_image[len(sample.captions)] += 1
        try:
            require_captions(sample)
        except SampleError as error:  # the image is measured, and may be shown, all the same
            found.skip(error.kind, str(error))
        for caption in sample.captions:
            found.captions_of_lines += len(caption.splitlines()) > 1
            found.caption_lengths[len(self._tokenizer.encode(caption)) + 2] += 1
            found.caption_hashes.append(_hash(caption.encode("utf-8", "surrogatepass")))

    def _draw(self, sample: Sample, width: int, height: int) -> None:
        """Draw by reservoir sampling: the n-th image replaces another with probability `sample_count` / n."""
        drawn = (self._found.samples, sample, width, height)
        if len(self._drawn) < self._sample_count:
            self._drawn.append(drawn)
        elif (place := int(self._generator.integers(self._found.images))) < self._sample_count:
            self._drawn[place] = drawn


def _nearest_ratio(width: int, height: int) -> str:
    def distance(ratio: str) -> float:
        across, down = map(int, ratio.split(":"))
        return abs(math.log(width * down / (height * across)))

    return min(ASPECT_RATIOS, key=distance)


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def _repeated(hashes: "array[int]") -> int:
    return len(hashes) - len(np.unique(np.asarray(hashes)))
