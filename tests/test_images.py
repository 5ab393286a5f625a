from types import ModuleType

import numpy as np
import pytest
import torch
from PIL.Image import Resampling

from contracap.image_files import decode
from contracap.images import (
    LONGEST_RATIO,
    AugmentationConfig,
    ImageConfig,
    augment,
    normalise,
    random_crop,
    resize_and_crop,
)

from .image_samples import largest_difference, rows, scene

SIZES = [
    (500, 375), (375, 500), (224, 224), (225, 224), (299, 301), (640, 227), (1200, 900), (223, 223), (100, 80), (7, 5),
    (1, 1), (1000, 3), (1, 300), (2001, 41),
]  # fmt: skip


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_evaluation_pixels_equal_open_clip(open_clip: ModuleType, width: int, height: int) -> None:
    image = scene(width, height)
    config = ImageConfig()
    expected = open_clip.image_transform(224, is_train=False)(image)
    expected = (expected * torch.tensor(config.std)[:, None, None] + torch.tensor(config.mean)[:, None, None]) * 255
    assert largest_difference(resize_and_crop(decode(image), config), expected.round()) <= 1


@pytest.mark.parametrize("size", [32, 97, 256])
def test_other_sizes_equal_open_clip(open_clip: ModuleType, size: int) -> None:
    image = scene(301, 211)
    transform = open_clip.image_transform(size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    pixels = resize_and_crop(decode(image), ImageConfig(size=size))
    assert pixels.shape == (3, size, size)
    assert largest_difference(pixels, 255 * transform(image)) <= 1.001


def test_squashing_equals_pillow() -> None:
    image = scene(301, 99)
    pixels = resize_and_crop(decode(image), ImageConfig(size=64, resize="squash"))
    assert largest_difference(pixels, rows(image.resize((64, 64), Resampling.BICUBIC))) <= 1


def test_an_absurdly_long_image_needs_no_absurd_memory() -> None:
    length = 3000 * LONGEST_RATIO
    image = torch.zeros(3, 1, length, dtype=torch.uint8)
    image[:, :, length // 2 - 600 : length // 2 + 600] = 200
    assert (resize_and_crop(image, ImageConfig(size=16)) == 200).all()
    assert (resize_and_crop(image.transpose(1, 2), ImageConfig(size=16)) == 200).all()


def test_a_random_crop_equals_pillow_crop_then_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    image = scene(301, 211)
    for box in [(0, 0, 211, 301), (5, 7, 150, 133), (100, 200, 3, 90), (210, 300, 1, 1)]:
        monkeypatch.setattr("contracap.images.random_crop", lambda *_, box=box: box)
        pixels = augment(decode(image), ImageConfig(size=64), AugmentationConfig(), np.random.default_rng(0))
        top, left, height, width = box
        expected = image.crop((left, top, left + width, top + height)).resize((64, 64), Resampling.BICUBIC)
        assert largest_difference(pixels, rows(expected)) <= 1


def test_random_crops_have_the_area_and_ratio_asked_for() -> None:
    height, width = 200, 300
    augmentation = AugmentationConfig(crop_scale=(0.3, 0.5), crop_ratio=(0.5, 2.0))
    generator = np.random.default_rng(0)
    crops = np.array([random_crop(height, width, augmentation, generator) for _ in range(3000)])
    tops, lefts, heights, widths = crops.T
    areas, ratios = heights * widths / (height * width), widths / heights
    assert tops.min() >= 0 and lefts.min() >= 0
    assert (tops + heights).max() <= height and (lefts + widths).max() <= width
    assert 0.295 < areas.min() < 0.31 and 0.49 < areas.max() < 0.505
    assert 0.48 < ratios.min() < 0.56 and 1.8 < ratios.max() < 2.05
    assert abs(areas.mean() - 0.4) < 0.01
    assert (tops == 0).any() and (tops + heights == height).any()


def test_random_crops_follow_the_distribution_of_torchvision(open_clip: ModuleType) -> None:
    from torchvision.transforms import RandomResizedCrop

    image, scale, ratio = torch.zeros(3, 120, 200), (0.4, 1.0), (3 / 4, 4 / 3)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(4000)])
    generator, augmentation = np.random.default_rng(0), AugmentationConfig(crop_scale=scale, crop_ratio=ratio)
    ours = np.array([random_crop(120, 200, augmentation, generator) for _ in range(4000)])
    for column in range(4):
        deciles = np.linspace(0, 1, 11)
        assert np.abs(np.quantile(ours[:, column], deciles) - np.quantile(theirs[:, column], deciles)).max() <= 5


@pytest.mark.parametrize(("shape", "box"), [((10, 400), (0, 193, 10, 13)), ((400, 10), (193, 0, 13, 10))])
def test_a_image_of_an_impossible_ratio_is_cropped_in_its_centre(
    shape: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    height, width = shape
    assert random_crop(height, width, AugmentationConfig(), np.random.default_rng(0)) == box


def test_augmentation_is_a_function_of_the_generator() -> None:
    image, config = decode(scene(301, 211)), ImageConfig(size=32)
    augmentation = AugmentationConfig(crop_scale=(0.2, 1.0), flip=0.5)
    crops = [augment(image, config, augmentation, np.random.default_rng([1, draw])) for draw in (0, 0, 1)]
    assert torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], crops[2])


def test_flip_is_the_probability_of_a_mirror_image() -> None:
    image, config = decode(scene(32, 32)), ImageConfig(size=32)
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    generator = np.random.default_rng(0)
    for probability in (0.0, 0.3, 1.0):
        augmentation = AugmentationConfig(flip=probability, **whole)
        crops = [augment(image, config, augmentation, generator) for _ in range(300)]
        mirrored = sum(torch.equal(crop, image.flip(2)) for crop in crops)
        assert mirrored + sum(torch.equal(crop, image) for crop in crops) == 300
        assert abs(mirrored / 300 - probability) < 0.08


def test_normalised_pixels_are_those_of_the_formula() -> None:
    config = ImageConfig()
    pixels = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 1, 1)
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (config.mean, config.std))
    result = normalise(pixels, config)
    assert result.dtype == torch.float32
    assert largest_difference(result, (pixels.double() / 255 - mean) / std) < 2e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageConfig(size=0), "image size is 0"),
        (lambda: ImageConfig(std=(1.0, 0.0, 1.0)), "each must be above 0"),
        (lambda: AugmentationConfig(crop_scale=(0.0, 1.0)), "crop_scale is"),
        (lambda: AugmentationConfig(crop_scale=(0.9, 0.5)), "crop_scale is"),
        (lambda: AugmentationConfig(crop_ratio=(2.0, 1.0)), "crop_ratio is"),
        (lambda: AugmentationConfig(flip=1.5), "flip is 1.5"),
    ],
)
def test_impossible_settings_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
