import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contracap.data.shards import write_shard

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> Path:
    """Two shards of 24 noisy images of one colour each, with three captions."""
    folder = tmp_path_factory.mktemp("colours")
    noise = np.random.default_rng(0)

    def record(index: int) -> tuple[str, dict[str, bytes]]:
        name, colour = list(COLOURS.items())[index % 4]
        pixels = np.clip(np.array(colour) + noise.integers(-25, 25, (40, 40, 3)), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        captions = [f"a {name} image", f"all of it is {name}", f"{name}"]
        return f"{index:04d}", {"png": file.getvalue(), "json": json.dumps({"captions": captions}).encode()}

    for shard in range(2):
        write_shard(folder / f"{shard:03d}.tar", (record(24 * shard + index) for index in range(24)))
    return folder


@pytest.fixture
def recipe_values(colours: Path, tmp_path: Path) -> dict:
    """A recipe of a few seconds, as plain values."""
    return {
        "size": "tiny",
        "steps": 8,
        "out": str(tmp_path / "run"),
        "log_every": 1,
        "data": {"train": str(colours), "validation": str(colours), "batch_size": 8, "shuffle_buffer": 16},
        "optimizer": {"warmup_steps": 2},
        "checkpoint": {"every": 4},
    }
