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


def test_waves_are_equally_loud_on_pictures_that_fade_with_frequency() -> None:
    """Grey noise whose amplitude falls as 1 / frequency, as in natural images."""
    frequency = torch.hypot(torch.fft.fftfreq(32)[:, None], torch.fft.fftfreq(32)).clamp(min=1 / 32)
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.randn(2000, 32, 32, dtype=torch.complex64, generator=generator) / frequency
    grey = torch.fft.ifft2(spectrum).real[:, 8:16, 8:16]
    patches = (grey / grey.std()).flatten(1).repeat(1, 3)
    loud = (patches @ cosine_patches(CONFIG).T).std(0)
    heard = loud[loud > 1e-4]
    assert 20 < len(heard) < 64  # the waves of colour say nothing of grey
    assert heard.max() < 3 * heard.min()


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
