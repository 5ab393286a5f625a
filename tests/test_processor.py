import io
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from contracap.image_files import ImageError
from contracap.images import ImageConfig
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
    with pytest.raises(ImageError, match="image 1: "):
        processor.images([picture, b"not a picture"])
    with pytest.raises(FileNotFoundError, match=r"missing\.jpg: no such image file"):
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
    with pytest.raises(TypeError, match="takes a list of images"):
        processor.images("picture.jpg")


def test_arrays_tensors_and_urls_give_the_pixels_of_their_image(processor: Processor, picture, monkeypatch) -> None:
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    file = io.BytesIO()
    picture.save(file, "PNG")
    monkeypatch.setattr("contracap.processor.download", lambda url: file.getvalue() if url == "https://host/a" else b"")
    pixels = processor.images([picture, array, tensor, tensor / 255, array.astype(np.float32) / 255, "https://host/a"])
    assert all(torch.equal(other, pixels[0]) for other in pixels)
    grey = np.asarray(picture.convert("L"))
    assert torch.equal(*processor.images([grey, torch.from_numpy(grey.copy())[None]]))


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.full((4, 4, 3), 200.0),
        np.full((4, 4, 3), np.nan),
        torch.zeros(4, 4, 3),
    ],
)
def test_other_arrays_are_refused_by_their_number(processor: Processor, picture, wrong) -> None:
    with pytest.raises(ImageError, match="image 1: "):
        processor.images([picture, wrong])


def test_a_call_gives_what_the_model_is_called_with(processor: Processor, picture) -> None:
    inputs = processor(images=[picture], texts=["a dog", "a cat"])
    assert torch.equal(inputs["pixels"], processor.images([picture]))
    assert torch.equal(inputs["ids"], processor.texts(["a dog", "a cat"]))
    assert processor(texts="a dog").keys() == {"ids"}
