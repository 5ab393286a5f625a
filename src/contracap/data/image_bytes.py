"""The encoded images of entries: from files, from the web, from Parquet files and from tar shards."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from contracap.data.annotations import Entry, SkippedEntry, SourceError
from contracap.data.datasets.parquet import parquet_images
from contracap.data.samples import SAMPLE_SUFFIXES, SampleError, parse_record, texts_in
from contracap.data.shards import ShardError, read_records
from contracap.data.sources import find_image
from contracap.download import DownloadError, download
from contracap.files import read_regular

RECAPTION = "recaption"  # the field for captions that were written for samples of shards
DOWNLOADS = 16  # at a time, in each worker


def read_images(entries: Sequence[Entry], *, lines: bool) -> Iterator[tuple[Entry, bytes | SkippedEntry]]:
    """Yield the entries with their encoded images. Images from the web are fetched in parallel, ahead of their use.

    Args:
        lines: of samples of shards, each line of the `.txt` is a caption; otherwise the whole text is one.
    """
    if entries[0].inside is not None:
        for path, group in groupby(entries, lambda entry: entry.path):
            part = list(group)
            yield from _from_shard(path, part, lines) if entries[0].inside.row is None else _from_table(path, part)
    elif any("://" in entry.path for entry in entries):
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            yield from zip(entries, pool.map(_read_image, entries), strict=True)
    else:
        yield from ((entry, _read_image(entry)) for entry in entries)


def _from_table(table: str, entries: Sequence[Entry]) -> Iterator[tuple[Entry, bytes | SkippedEntry]]:
    """Yield entries with the images that a Parquet file holds or names."""
    places = [entry.inside for entry in entries if entry.inside is not None]
    rows = [place.row for place in places if place.row is not None]
    remaining = iter(entries)
    try:
        for image in parquet_images(Path(table), places[0].key, rows):
            entry = next(remaining)
            if isinstance(image, str):
                path = image if "://" in image else str(Path(table).parent / image)
                image = _read_image(replace(entry, path=path))
            elif image is None:
                image = _skip(entry, "no_picture", "neither bytes nor a path")
            yield entry, image
    except SourceError as error:
        for entry in remaining:
            yield entry, _skip(entry, "unreadable_file", str(error))


def _from_shard(shard: str, entries: Sequence[Entry], lines: bool) -> Iterator[tuple[Entry, bytes | SkippedEntry]]:
    """Yield the samples of a shard that entries name. The entry's captions become the field `recaption`, and the
    captions of a sample without any."""
    remaining = {entry.inside.key: entry for entry in entries if entry.inside is not None}
    message = "no such sample in the shard"
    try:
        for record in read_records(shard, suffixes=SAMPLE_SUFFIXES):
            entry = remaining.pop(record.key, None)
            if entry is None:
                continue
            try:
                sample = parse_record(record, lines=lines)
            except SampleError as error:
                yield entry, _skip(entry, error.kind, str(error))
                continue
            recaptions = [*texts_in(sample.fields.get(RECAPTION)), *entry.captions]
            fields = {**sample.fields, **entry.fields, RECAPTION: recaptions}
            yield replace(entry, captions=sample.captions or entry.captions, fields=fields), sample.image
    except ShardError as error:
        message = str(error)
    for entry in remaining.values():
        yield entry, _skip(entry, "missing_sample", message)


def _read_image(entry: Entry) -> bytes | SkippedEntry:
    try:
        if "://" in entry.path:
            return download(entry.path)
        path = find_image(entry)
        return _skip(entry, "missing_file", f"no such file: {entry.path}") if path is None else read_regular(path)
    except DownloadError as error:
        return _skip(entry, error.kind, str(error))
    except OSError as error:
        return _skip(entry, "unreadable_file", str(error))


def _skip(entry: Entry, kind: str, message: str) -> SkippedEntry:
    return SkippedEntry(source=entry.name, kind=kind, message=message)
