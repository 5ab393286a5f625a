from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from contracap.apps.bulk.image_batches import image_batches
from contracap.apps.bulk.inputs import Item
from contracap.image_files import decode
from contracap.images import ImageConfig, resize_and_crop
from tests.apps.bulk.conftest import picture

IMAGE = ImageConfig(size=32)


def test_batches_are_in_order_full_and_of_the_right_pixels() -> None:
    def items() -> Generator[Item, None, None]:
        for number in range(11):
            yield Item(name=str(number), source=b"broken" if number in (0, 4, 10) else picture(number))

    batches = list(image_batches(items(), IMAGE, batch_size=3, workers=4))
    assert [[item.name for item in batch.items] for batch in batches] == [list("0123"), list("4567"), ["8", "9", "10"]]
    assert [list(batch.broken) for batch in batches] == [[0], [0], [2]]
    for batch in batches:
        for item, pixels in zip(batch.usable, batch.pixels, strict=True):
            assert torch.equal(pixels, resize_and_crop(decode(item.content()), IMAGE))


def test_only_broken_images_make_a_batch_without_pixels() -> None:
    items = (Item(name=str(number), source=b"") for number in range(3))
    batches = list(image_batches(items, IMAGE, batch_size=2, workers=2))
    assert [batch.pixels.shape for batch in batches] == [(0, 3, 32, 32)] * 2
    assert [list(batch.broken) for batch in batches] == [[0, 1], [0]]


def test_an_error_of_the_items_ends_the_batches() -> None:
    def items() -> Generator[Item, None, None]:
        yield Item(name="0", source=picture(0))
        raise RuntimeError("listing")

    with pytest.raises(RuntimeError, match="listing"):
        list(image_batches(items(), IMAGE, batch_size=2, workers=2))


def test_a_file_that_goes_missing_is_broken(tmp_path: Path) -> None:
    items = (Item(name=name, source=tmp_path / name) for name in ("0.jpg",))
    (batch,) = image_batches(items, IMAGE, batch_size=2, workers=1)
    assert isinstance(batch.broken[0], FileNotFoundError)
