"""Configuration of a run's data and their order."""

import math
from dataclasses import dataclass, field

from contracap.config import require_paths
from contracap.data.captions import CaptionConfig
from contracap.images import AugmentationConfig

MAX_STREAMS = 16  # unless the recipe says how many
MAX_BATCH = 2**30
MAX_BUFFER = 10**8  # samples
MAX_WORKERS = 1024  # of one rank


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A data set of a mixture."""

    shards: str | tuple[str, ...]
    """Tar shards, or folders of tar shards."""
    weight: float = 1.0
    """How often the source is drawn from, relative to the others; their sizes do not matter."""
    replacement: bool = False
    """Draw whole shards at random, again and again, instead of epochs that contain each sample once."""

    def __post_init__(self) -> None:
        require_paths(self, "shards")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight is {self.weight}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data of a run and their order.

    Raises:
        ValueError: if a number is out of range, or the streams do not divide the batch.
    """

    train: str | tuple[str, ...] | dict[str, SourceConfig]
    """Tar shards, or folders of tar shards; or a mixture, as a table of named sources."""
    validation: str | tuple[str, ...] | None = None
    """Tar shards, or folders of tar shards, without mixtures."""
    batch_size: int
    """Images in a step, over all ranks, each with a caption."""
    shuffle_buffer: int = 10_000
    """Samples that are shuffled together, over all streams. Twice as many encoded images are in memory, because the
    next ones are read while these are used."""
    streams: int | None = None
    """Independent orders that each supply an equal part of every batch. They determine the order of the data; the
    numbers of workers and ranks do not. Use a multiple of every number of ranks that the run may have. The default
    is the largest of 1, 2, 4, 8 and 16 that divides the batch."""
    workers: int = 0
    """Processes that read and decode, on each rank; 0 reads in the training process."""
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    max_bad_share: float = 0.05
    """The run stops when more than this share of about a thousand recent samples of a stream is bad, or of an
    epoch is lost in broken shards."""

    def __post_init__(self) -> None:
        require_paths(self, "train", "validation")
        for name, least, most in (
            ("batch_size", 1, MAX_BATCH),
            ("shuffle_buffer", 1, MAX_BUFFER),
            ("workers", 0, MAX_WORKERS),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, is {getattr(self, name)}")
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most:,}, is {getattr(self, name):,}")
        if self.streams is not None and (self.streams < 1 or self.batch_size % self.streams):
            raise ValueError(f"streams is {self.streams}; it must divide batch_size {self.batch_size}")
        if not 0 <= self.max_bad_share < 1:
            raise ValueError(f"max_bad_share is {self.max_bad_share}; it must be at least 0 and below 1")

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """Return the mixture by the keys of the recipe; a single data set is a mixture of one."""
        if isinstance(self.train, dict):
            return {f"data.train.{name}": source for name, source in self.train.items()}
        return {"data.train": SourceConfig(shards=self.train)}

    @property
    def training_paths(self) -> dict[str, str | tuple[str, ...]]:
        """Return the paths of each source's shards, by their key in the recipe."""
        return {key: source.shards for key, source in self.sources.items()}

    @property
    def stream_count(self) -> int:
        return math.gcd(self.batch_size, MAX_STREAMS) if self.streams is None else self.streams
