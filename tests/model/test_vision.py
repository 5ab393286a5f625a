from dataclasses import replace

import pytest
import torch

from contracap.model.vision import VisionEncoder, cosine_patches
from tests.model.tiny_models import TINY

CONFIG = replace(TINY.vision, patch_size=8, width=64)


def test_patches_start_as_orthogonal_waves_the_mean_first() -> None:
    waves = cosine_patches(CONFIG)
    assert waves.shape == (64, 3 * 8 * 8)
    products = waves @ waves.T
    torch.testing.assert_close(products, torch.diag(products.diagonal()), atol=1e-5, rtol=0)
    torch.testing.assert_close(waves[0], waves[0, :1].expand(192))


def test_the_first_waves_read_brightness_red_against_green_and_yellow_against_blue() -> None:
    encoder = VisionEncoder(CONFIG)
    encoder.initialise()
    red, green, blue = torch.eye(3)
    for color, heard in ((red + green + blue, 0), (red - green, 1), (red + green - 2 * blue, 2)):
        patch = color[:, None, None].expand(3, 8, 8).flatten()  # as `forward` flattens it
        loud = encoder.patch_embedding(patch).abs()
        means = [row for row, wave in enumerate(cosine_patches(CONFIG)) if wave.reshape(3, 64).std(1).max() < 1e-6]
        assert loud.argmax() == means[heard]
        assert (loud > 1e-4).sum() == 1


@pytest.mark.parametrize(("patch", "waves"), [(8, 64), (4, 48)])
def test_rows_that_no_wave_fills_are_random(patch: int, waves: int) -> None:
    config = replace(CONFIG, patch_size=patch)
    encoder = VisionEncoder(config)
    encoder.initialise()
    rows = encoder.patch_embedding.weight
    assert torch.equal(rows[:waves], cosine_patches(config))
    assert rows.shape == (64, 3 * patch**2) and (rows[waves:].abs().amax(1) > 0).all()
