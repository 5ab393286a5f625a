from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from contracap.image import ImageConfig, ImageError
from contracap.processor import Processor
from contracap.tokenizer import Tokenizer


@pytest.fixture
def processor() -> Processor:
    return Processor(ImageConfig(size=32), Tokenizer(context=12))


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def test_paths_bytes_and_pillow_pictures_give_the_same_pixels(processor: Processor, picture, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    picture.save(path)
    pixels = processor.images([path, str(path), path.read_bytes(), picture])
    assert pixels.shape == (4, 3, 32, 32)
    assert pixels.dtype == torch.float32
    assert all(torch.equal(other, pixels[0]) for other in pixels)


def test_pixels_and_ids_equal_open_clip(open_clip: ModuleType, picture) -> None:
    processor = Processor(ImageConfig(), Tokenizer())
    expected = open_clip.image_transform(224, is_train=False)(picture)
    difference = (processor.images([picture])[0] - expected).abs() * torch.tensor(ImageConfig().std).reshape(3, 1, 1)
    assert difference.max() <= 1.001 / 255
    texts = ["a diagram", "a dog"]
    assert torch.equal(processor.texts(texts), open_clip.get_tokenizer("coca_ViT-B-32")(texts))


def test_a_picture_that_cannot_be_used_is_named(processor: Processor, picture, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(ImageError, match=r"broken\.jpg: "):
        processor.images([picture, broken])
    with pytest.raises(ImageError, match="picture 1: "):
        processor.images([picture, b"not a picture"])
    with pytest.raises(FileNotFoundError, match=r"missing\.jpg: no such picture file"):
        processor.images([tmp_path / "missing.jpg"])


def test_an_empty_list_gives_an_empty_batch(processor: Processor) -> None:
    assert processor.images([]).shape == (0, 3, 32, 32)
    assert processor.texts([]).shape == (0, 12)


def test_inference_mode_leaves_no_mark_on_later_pixels(processor: Processor, picture) -> None:
    with torch.inference_mode():
        processor.images([picture])
    weight = torch.ones(1, requires_grad=True)
    (processor.images([picture]) * weight).sum().backward()
    assert weight.grad is not None


def test_one_picture_instead_of_a_list_is_refused(processor: Processor) -> None:
    with pytest.raises(TypeError, match="takes a list of pictures"):
        processor.images("picture.jpg")
