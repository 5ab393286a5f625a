import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, kind: str = "JPEG") -> bytes:
    """A noisy image that no other seed gives."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def fill(folder: Path, names: list[str]) -> Path:
    """A folder of images, each different."""
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(seed))
    return folder
