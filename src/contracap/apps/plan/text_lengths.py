"""Lengths of the captions that a run reads."""

from collections import Counter
from pathlib import Path

from contracap.data.config import DataConfig
from contracap.data.index import read_index
from contracap.data.shards import list_shards
from contracap.training.flops import TextLengths


def caption_texts(data: DataConfig, context: int) -> TextLengths | None:
    """Return the lengths in the indexes next to local shards, cut to the context; None if there is no index.

    They are counted in tokens of CLIP's tokenizer, and all captions count the same, also in a weighted mixture.

    Raises: IndexFileError: if an index cannot be read.
    """
    counts: Counter[int] = Counter()
    for source in data.sources.values():
        for path in [source.shards] if isinstance(source.shards, str) else source.shards:
            counts += _caption_lengths(path)
    if not counts:
        return None
    cut = [(min(length, context), count) for length, count in counts.items()]
    mean = sum(length * count for length, count in cut) / counts.total()
    return TextLengths(mean=mean, longest=max(length for length, _ in cut))


def _caption_lengths(path: str) -> Counter[int]:
    counts: Counter[int] = Counter()
    if "://" in path or path.startswith("pipe:"):  # a plan reads nothing from afar
        return counts
    try:
        shards = {Path(shard) for shard in list_shards(path)}
    except FileNotFoundError:  # a plan may come before its data
        return counts
    for folder in {shard.parent for shard in shards}:
        for entry in read_index(folder).values():
            if folder / entry.name in shards:
                counts.update(entry.caption_lengths)
    return counts
