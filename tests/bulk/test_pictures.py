import threading
import time
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from contracap.bulk import pictures
from contracap.bulk.inputs import Item
from contracap.bulk.pictures import in_threads, picture_batches
from contracap.image import ImageConfig, decode, resize_and_crop
from tests.bulk.conftest import picture

IMAGE = ImageConfig(size=32)


def numbered(count: int, taken: list[int]) -> Generator[Item, None, None]:
    for number in range(count):
        taken.append(number)
        yield Item(name=str(number), source=picture(number))


def test_batches_are_in_order_full_and_of_the_right_pixels() -> None:
    def items() -> Generator[Item, None, None]:
        for number in range(11):
            yield Item(name=str(number), source=b"broken" if number in (0, 4, 10) else picture(number))

    batches = list(picture_batches(items(), IMAGE, batch_size=3, workers=4))
    assert [[item.name for item in batch.items] for batch in batches] == [list("0123"), list("4567"), ["8", "9", "10"]]
    assert [list(batch.broken) for batch in batches] == [[0], [0], [2]]
    for batch in batches:
        for item, pixels in zip(batch.usable, batch.pixels, strict=True):
            assert torch.equal(pixels, resize_and_crop(decode(item.content()), IMAGE))


def test_only_broken_pictures_make_a_batch_without_pixels() -> None:
    items = (Item(name=str(number), source=b"") for number in range(3))
    batches = list(picture_batches(items, IMAGE, batch_size=2, workers=2))
    assert [batch.pixels.shape for batch in batches] == [(0, 3, 32, 32)] * 2
    assert [list(batch.broken) for batch in batches] == [[0, 1], [0]]


def test_no_more_items_are_taken_than_are_soon_needed() -> None:
    taken = list[int]()
    read = in_threads(lambda item: item.name, numbered(1000, taken), workers=2, ahead=5)
    for number in range(20):
        item, future = next(read)
        assert item.name == future.result() == str(number)
    time.sleep(0.1)
    assert 20 <= len(taken) <= 20 + 5 + 1
    read.close()
    before = len(taken)
    time.sleep(0.05)
    assert len(taken) == before


def test_stopping_ends_the_threads_and_closes_the_items() -> None:
    closed, threads = threading.Event(), threading.active_count()

    def items() -> Generator[Item, None, None]:
        try:
            yield from numbered(1000, [])
        finally:
            closed.set()

    read = in_threads(lambda item: item.name, items(), workers=3, ahead=2)
    next(read)
    read.close()
    assert closed.is_set() and threading.active_count() == threads


def test_a_thread_that_waits_for_a_silent_server_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "PATIENCE", 0.05)
    answer = threading.Event()
    read = in_threads(lambda item: item.name == "0" or answer.wait(30), numbered(9, []), workers=2, ahead=4)
    next(read)
    begun = time.monotonic()
    read.close()
    assert time.monotonic() - begun < 5
    answer.set()


def test_an_error_of_the_items_or_of_our_own_is_raised_and_not_taken_for_a_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def items() -> Generator[Item, None, None]:
        yield Item(name="0", source=picture(0))
        raise RuntimeError("listing")

    with pytest.raises(RuntimeError, match="listing"):
        list(picture_batches(items(), IMAGE, batch_size=2, workers=2))
    monkeypatch.setattr(pictures, "decode", lambda *_, **__: {}["none"])
    with pytest.raises(KeyError):
        list(picture_batches(numbered(3, []), IMAGE, batch_size=2, workers=2))


def test_a_file_that_goes_missing_is_broken(tmp_path: Path) -> None:
    items = (Item(name=name, source=tmp_path / name) for name in ("0.jpg",))
    (batch,) = picture_batches(items, IMAGE, batch_size=2, workers=1)
    assert isinstance(batch.broken[0], FileNotFoundError)
