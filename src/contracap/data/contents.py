"""The encoded images of items: from files, from the web, from Parquet files and from tar shards."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from contracap.data.annotations import Refused, SourceError
from contracap.data.datasets.parquet import parquet_images
from contracap.data.shards import SAMPLE_SUFFIXES, SampleError, ShardError, parse, records, texts_in
from contracap.data.sources import Item, find_image
from contracap.download import DownloadError, download
from contracap.files import read_regular

RECAPTION = "recaption"  # the field for captions that were written for samples of shards
DOWNLOADS = 16  # at a time, in each worker


def contents(items: Sequence[Item], *, lines: bool) -> Iterator[tuple[Item, bytes | Refused]]:
    """The items with their encoded images. Those from the web are fetched side by side, ahead of their use.

    Args:
        lines: of samples of shards, each line of the `.txt` is a caption; else the whole is one.
    """
    if items[0].inside is not None:
        for _, part in groupby(items, lambda item: item.picture):
            found = list(part)
            yield from _in_shard(found, lines) if items[0].inside.row is None else _in_table(found)
    elif any("://" in item.picture for item in items):
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            yield from zip(items, pool.map(_content, items), strict=True)
    else:
        yield from ((item, _content(item)) for item in items)


def _in_table(items: Sequence[Item]) -> Iterator[tuple[Item, bytes | Refused]]:
    """Items whose images are in a Parquet file, or named there in place of the bytes."""
    table, places = Path(items[0].picture), [item.inside for item in items if item.inside is not None]
    rows = [place.row for place in places if place.row is not None]
    waiting = iter(items)
    try:
        for found in parquet_images(table, places[0].key, rows):
            item = next(waiting)
            if isinstance(found, str):
                yield item, _content(replace(item, picture=found if "://" in found else str(table.parent / found)))
            elif found is None:
                yield item, Refused(source=item.source, kind="no_picture", message="neither bytes nor a path")
            else:
                yield item, found
    except SourceError as error:
        yield from ((item, Refused(source=item.source, kind="unreadable_file", message=str(error))) for item in waiting)


def _in_shard(items: Sequence[Item], lines: bool) -> Iterator[tuple[Item, bytes | Refused]]:
    """Items that are samples of one shard. Their captions become the field `recaption` next to the sample's own, and
    stand for them where it has none."""
    waiting = {item.inside.key: item for item in items if item.inside is not None}
    message = "no such sample in the shard"
    try:
        for record in records(items[0].picture, suffixes=SAMPLE_SUFFIXES):
            item = waiting.pop(record.key, None)
            if item is None:
                continue
            try:
                sample = parse(record, lines=lines)
            except SampleError as error:
                yield item, Refused(source=item.source, kind=error.kind, message=str(error))
                continue
            before = sample.fields.get(RECAPTION)
            recaptions = [*texts_in(before), *item.captions]
            fields = {**sample.fields, **item.fields, RECAPTION: recaptions}
            yield replace(item, captions=sample.captions or item.captions, fields=fields), sample.image
    except ShardError as error:
        message = str(error)
    yield from (
        (item, Refused(source=item.source, kind="missing_sample", message=message)) for item in waiting.values()
    )


def _content(item: Item) -> bytes | Refused:
    try:
        if "://" in item.picture:
            return download(item.picture)
        path = find_image(item)
        if path is None:
            return Refused(source=item.source, kind="missing_file", message=f"no such file: {item.picture}")
        return read_regular(path)
    except DownloadError as error:
        return Refused(source=item.source, kind=error.kind, message=str(error))
    except OSError as error:
        return Refused(source=item.source, kind="unreadable_file", message=str(error))
