"""What shards hold, counted before a run is paid for, and some of their samples as the trainer will see them."""

import hashlib
import io
import math
import warnings
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image
from torch import Tensor

from contracap.config import require_count
from contracap.data.captions import require_captions
from contracap.data.index import read_index
from contracap.data.shards import Record, Sample, SampleError, ShardError, list_shards, parse, records
from contracap.formats import FORMATS
from contracap.image_files import ImageError, ImageSizeError, decode
from contracap.images import AugmentationConfig, ImageConfig, augment
from contracap.progress import progress_bar
from contracap.tokenizer import Tokenizer

EXAMPLES = 5  # messages kept of each kind of skip
SHOWN_SIDE = 256  # longest side, in pixels, of the images that are kept to be shown
ASPECT_RATIOS = ("1:3", "1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1", "3:1")
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """How many samples or shards cannot be used for one reason, and what was said of the first `EXAMPLES`."""

    count: int = 0
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ShownSample:
    """One sample for a person to look at; both images are JPEG files.

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


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What `survey` found.

    Attributes:
        shards: how many there are.
        shards_read: how many of them were opened.
        complete: whether all was read, or the limit ended the reading.
        samples: those that were read, usable or not. All that follows is about these.
        total_samples: of all shards; None if the reading was not complete and no index tells.
        caption_lengths: captions by length: tokens, start and end included, not cut.
        captions_per_picture: samples by their number of captions.
        formats: images by format.
        shorter_sides: images by shorter side, pixels.
        aspect_ratios: images by the nearest of `ASPECT_RATIOS`, width to height.
        repeated_pictures: images whose file came before, byte for byte.
        repeated_captions: captions that came before, word for word.
        captions_of_lines: captions with line breaks in them, each of which may be several captions.
        skipped: by kind, what a trainer passes over.
        shown: samples drawn at random, in the order of the shards.
        image: what the crops were made for.
        context: tokens to which a model cuts captions.
        seed: of the draw and the crops.
    """

    shards: int
    shards_read: int
    complete: bool
    samples: int
    total_samples: int | None
    caption_lengths: dict[int, int]
    captions_per_picture: dict[int, int]
    formats: dict[str, int]
    shorter_sides: dict[int, int]
    aspect_ratios: dict[str, int]
    repeated_pictures: int
    repeated_captions: int
    captions_of_lines: int
    skipped: dict[str, Skipped]
    shown: tuple[ShownSample, ...]
    image: ImageConfig
    context: int
    seed: int

    @property
    def captions(self) -> int:
        return sum(self.caption_lengths.values())

    @property
    def cut_share(self) -> float:
        """The share of the captions that the context cuts."""
        return share(
            sum(count for length, count in self.caption_lengths.items() if length > self.context), self.captions
        )

    @property
    def pictures(self) -> int:
        return sum(self.formats.values())

    @property
    def enlarged_share(self) -> float:
        """The share of the images whose shorter side is below the model's."""
        small = sum(count for side, count in self.shorter_sides.items() if side < self.image.size)
        return share(small, self.pictures)


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
    """Reads shards and counts what is in them.

    Images are measured by their headers; only those of the samples that are drawn to be shown are decoded. Memory
    grows by 8 bytes an image and 8 a caption, the hashes that tell repetitions; images are not kept.

    Args:
        paths: a folder of shards, a shard, or several of them, local or remote.
        limit: samples to read, the first ones; by default all.
        sample_count: samples to draw.
        seed: of the draw and the crops.
        image: what the trainer makes images ready for.
        augmentation: how it crops and mirrors them.
        tokenizer: what measures and cuts captions; by default that of the released models.
        lines: each line of a `.txt` is a caption; else the whole is one.

    Raises:
        FileNotFoundError: if there are no shards.
        ValueError: if a number is too small, or an index beside the shards is broken.
    """
    if limit is not None:
        require_count("limit", limit, 1, "samples, from the first one on", most=10**12)
    require_count("samples", sample_count, 0, "samples on the page", most=10_000)
    require_count("seed", seed, 0, "of the samples and their crops", most=2**63 - 1)
    shards = list_shards(paths)
    told = indexed_samples(shards)
    tokenizer = tokenizer or Tokenizer()
    tally = _Tally(sample_count, seed, lines, tokenizer)
    complete = True
    known = [limit] if limit else []
    if told:
        known.append(told)
    with progress_bar(total=min(known, default=None), desc="reading", unit=" samples") as progress:
        for record in tally.records(shards):
            if tally.samples == limit:
                complete = False
                break
            tally.add(record)
            progress.update()
    shown = tuple(tally.shown(image, augmentation))
    return Survey(
        shards=len(shards),
        shards_read=tally.shards_read,
        complete=complete,
        samples=tally.samples,
        total_samples=tally.samples if complete else told,
        caption_lengths=_sorted(tally.caption_lengths),
        captions_per_picture=_sorted(tally.captions_per_picture),
        formats=dict(tally.formats.most_common()),
        shorter_sides=_sorted(tally.shorter_sides),
        aspect_ratios={ratio: tally.aspect_ratios[ratio] for ratio in ASPECT_RATIOS if tally.aspect_ratios[ratio]},
        repeated_pictures=_repeated(tally.pictures),
        repeated_captions=_repeated(tally.captions),
        captions_of_lines=tally.captions_of_lines,
        skipped=dict(sorted(tally.skipped.items())),
        shown=shown,
        image=image,
        context=tokenizer.context,
        seed=seed,
    )


def share(part: int, whole: int) -> float:
    """`part` of `whole`; nothing of nothing is 0."""
    return part / whole if whole else 0.0


@dataclass
class _Tally:
    """What is counted while shards are read, and a draw from their samples that is fair however many there are."""

    sample_count: int
    seed: int
    lines: bool
    tokenizer: Tokenizer
    shards_read: int = 0
    samples: int = 0
    captions_per_picture: Counter[int] = field(default_factory=Counter)
    caption_lengths: Counter[int] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    shorter_sides: Counter[int] = field(default_factory=Counter)
    aspect_ratios: Counter[str] = field(default_factory=Counter)
    captions_of_lines: int = 0
    pictures: "array[int]" = field(default_factory=lambda: array("Q"))  # hashes, as those of the captions
    captions: "array[int]" = field(default_factory=lambda: array("Q"))
    skipped: dict[str, Skipped] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._generator = np.random.default_rng(self.seed)
        self._drawn: list[tuple[int, Sample, int, int]] = []  # number, sample, width, height

    def records(self, shards: Iterable[str]) -> Iterator[Record]:
        """The records of all shards, as far as they can be read."""
        for shard in shards:
            self.shards_read += 1
            try:
                yield from records(shard)
            except ShardError as error:
                self._skip("broken_shard", str(error))

    def add(self, record: Record) -> None:
        self.samples += 1
        name = f"sample {record.key} of {record.shard}"
        try:
            sample = parse(record, lines=self.lines)
            self._add_captions(sample)
            width, height, kind = _measure(sample.image, name)
        except (SampleError, ImageError) as error:
            self._skip(error.kind, str(error))
            return
        self.formats[kind] += 1
        self.shorter_sides[min(width, height)] += 1
        self.aspect_ratios[_nearest_ratio(width, height)] += 1
        self.pictures.append(_hash(sample.image))
        self._draw(sample, width, height)

    def shown(self, image: ImageConfig, augmentation: AugmentationConfig) -> Iterator[ShownSample]:
        """The drawn samples; one that turns out broken counts as skipped."""
        for number, sample, width, height in sorted(self._drawn, key=lambda drawn: drawn[0]):
            try:
                pixels = decode(sample.image, name=f"sample {sample.key} of {sample.shard}")
            except ImageError as error:
                self._skip(error.kind, str(error))
                continue
            crop = augment(pixels, image, augmentation, np.random.default_rng([self.seed, number]))
            yield ShownSample(
                key=sample.key,
                shard=sample.shard,
                width=width,
                height=height,
                captions=sample.captions,
                original=_jpeg(pixels),
                crop=_jpeg(crop),
            )

    def _add_captions(self, sample: Sample) -> None:
        self.captions_per_picture[len(sample.captions)] += 1
        try:
            require_captions(sample)
        except SampleError as error:  # the image is measured, and may be shown, all the same
            self._skip(error.kind, str(error))
        for caption in sample.captions:
            self.captions_of_lines += len(caption.splitlines()) > 1
            self.caption_lengths[len(self.tokenizer.encode(caption)) + 2] += 1
            self.captions.append(_hash(caption.encode("utf-8", "surrogatepass")))

    def _draw(self, sample: Sample, width: int, height: int) -> None:
        """Reservoir sampling: the n-th image gets a place with probability `sample_count` / n, at another's cost."""
        drawn = (self.samples, sample, width, height)
        if len(self._drawn) < self.sample_count:
            self._drawn.append(drawn)
        elif (place := int(self._generator.integers(len(self.pictures)))) < self.sample_count:
            self._drawn[place] = drawn

    def _skip(self, kind: str, message: str) -> None:
        known = self.skipped.get(kind, Skipped())
        self.skipped[kind] = Skipped(count=known.count + 1, examples=(*known.examples, message)[:EXAMPLES])


def indexed_samples(shards: Sequence[str]) -> int | None:
    """How many samples local shards hold, from the indexes next to them; None if one lacks a shard, or the shard has
    changed."""
    paths = [Path(shard) for shard in shards]
    if not all(path.is_file() for path in paths):
        return None
    indexes = {folder: read_index(folder) for folder in {path.parent for path in paths}}
    entries = [indexes[path.parent].get(path.name) for path in paths]
    fresh = [entry for entry, path in zip(entries, paths, strict=True) if entry and entry.bytes == path.stat().st_size]
    return sum(entry.samples for entry in fresh) if len(fresh) == len(paths) else None


def _measure(image: bytes, name: str) -> tuple[int, int, str]:
    """Width and height of the image when upright, and its format, from the header alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(image)) as opened:
                (width, height), kind, orientation = opened.size, opened.format, 1
                with suppress(Exception):  # damaged EXIF data makes Pillow raise almost anything; the pixels are good
                    orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageSizeError(f"{name}: {error}") from error
    except Exception as error:  # damaged headers do so, too
        raise ImageError(f"{name}: not an image, or cut off within its header") from error
    if kind not in FORMATS:
        raise ImageError(f"{name}: {kind} is none of {', '.join(FORMATS)}")
    return (height, width, kind) if orientation in TURNED else (width, height, kind)


def _nearest_ratio(width: int, height: int) -> str:
    def distance(ratio: str) -> float:
        across, down = map(int, ratio.split(":"))
        return abs(math.log(width * down / (height * across)))

    return min(ASPECT_RATIOS, key=distance)


def _jpeg(pixels: UInt8[Tensor, "3 height width"]) -> bytes:
    picture, file = Image.fromarray(pixels.permute(1, 2, 0).numpy()), io.BytesIO()
    picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    picture.save(file, "jpeg", quality=85)
    return file.getvalue()


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def _repeated(hashes: "array[int]") -> int:
    return len(hashes) - len(np.unique(np.asarray(hashes)))


def _sorted(counts: Mapping[int, int]) -> dict[int, int]:
    return dict(sorted(counts.items()))
