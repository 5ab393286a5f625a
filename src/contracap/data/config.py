"""What a run reads, and in which order."""

import math
from dataclasses import dataclass, field
from typing import Literal

from contracap.config import require_paths
from contracap.data.captions import CaptionConfig
from contracap.images import AugmentationConfig

MOST_STREAMS = 16  # unless the recipe says how many
MAX_BATCH = 2**30
MAX_BUFFER = 10**8  # samples
MAX_WORKERS = 1024  # of one rank


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One data set of a mixture.

    Attributes:
        shards: folders of tar shards, or shards.
        weight: how often it is drawn from, in proportion to the others; see `DataConfig.weighting`.
        replacement: draw whole shards at random, again and again, in place of epochs that hold each sample once.
    """

    shards: str | tuple[str, ...]
    weight: float = 1.0
    replacement: bool = False

    def __post_init__(self) -> None:
        require_paths(self, "shards")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight is {self.weight}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and in which order.

    Attributes:
        train: folders of tar shards, or shards; or a mixture, as a table of named sources.
        validation: likewise, without mixtures.
        batch_size: pictures with their captions in a step.
        weighting: what the weights of a mixture mean: the `probability` that a sample comes from the source, or how
            often each of its `samples` comes, so that large sources come more often.
        shuffle_buffer: samples that are shuffled together, all streams taken together. Twice as many encoded pictures
            are in memory: the next ones are read while these are used.
        streams: independent orders that fill each batch together, an equal part each. They decide the order, unlike
            the number of workers and ranks, which each read some of them: a multiple of every number of ranks that a
            run may have. By default the largest of 1, 2, 4, 8, 16 that divides the batch.
        workers: processes that read and decode, for each rank; 0: the calling one.
        epoch_end: how an epoch ends within a batch: the batch `continue`s with the next epoch; or an epoch has a whole
            number of batches, and the last samples `drop` out, or the first ones come again to `pad` the last batch.
        captions: which captions stand for a picture.
        length_buckets: batches of captions of about equal length, from those in the shuffle buffer. Epochs must have a
            whole number of batches then.
        augmentation: of the pictures.
        scaled_decoding: decode large JPEG pictures at a fraction of their size, no less than twice what the model
            sees: faster, with slightly other pixels.
        smallest_side: pictures with a shorter side, in pixels, are bad samples.
        max_bad_share: the run stops when more than this share of a thousand samples in a row of a stream is bad, or of
            an epoch is lost in broken shards.

    Raises:
        ValueError: if a number is out of range, or the streams do not divide the batch.
    """

    train: str | tuple[str, ...] | dict[str, SourceConfig]
    validation: str | tuple[str, ...] | None = None
    batch_size: int
    weighting: Literal["probability", "samples"] = "probability"
    shuffle_buffer: int = 10_000
    streams: int | None = None
    workers: int = 0
    epoch_end: Literal["continue", "drop", "pad"] = "continue"
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    length_buckets: bool = False
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    scaled_decoding: bool = False
    smallest_side: int = 8
    max_bad_share: float = 0.05

    def __post_init__(self) -> None:
        require_paths(self, "train", "validation")
        for name, least, most in (
            ("batch_size", 1, MAX_BATCH),
            ("shuffle_buffer", 1, MAX_BUFFER),
            ("workers", 0, MAX_WORKERS),
            ("smallest_side", 1, None),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, is {getattr(self, name)}")
            if most is not None and getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most:,}, is {getattr(self, name):,}")
        if self.streams is not None and (self.streams < 1 or self.batch_size % self.streams):
            raise ValueError(f"streams is {self.streams}; it must divide batch_size {self.batch_size}")
        if not 0 <= self.max_bad_share < 1:
            raise ValueError(f"max_bad_share is {self.max_bad_share}; it must be at least 0 and below 1")
        if self.epoch_end != "continue" and (isinstance(self.train, dict) or self.captions.use == "all"):
            raise ValueError(
                f"epoch_end = {self.epoch_end!r} needs one data set and one caption a picture, else nobody knows where "
                "an epoch ends: leave it out"
            )
        if self.length_buckets and self.epoch_end == "continue":
            raise ValueError("length_buckets needs epoch_end = 'drop' or 'pad', else streams drift apart")

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """The mixture; a single data set is one of its own, `train`."""
        return self.train if isinstance(self.train, dict) else {"train": SourceConfig(shards=self.train)}

    @property
    def training_paths(self) -> dict[str, str | tuple[str, ...]]:
        """The paths of the shards of each source, by the key that names them."""
        if isinstance(self.train, dict):
            return {f"data.train.{name}": source.shards for name, source in self.train.items()}
        return {"data.train": self.train}

    @property
    def stream_count(self) -> int:
        return math.gcd(self.batch_size, MOST_STREAMS) if self.streams is None else self.streams
