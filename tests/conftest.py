import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from contracap.cli import main
from contracap.data.shards import write_shard
from contracap.evaluation.metrics import meteor
from contracap.model.sizes import SIZES
from contracap.pretrained import random_model, write_weights

ROOT = Path(__file__).parents[1]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}
Run = Callable[..., tuple[int, str, str]]

# The models of the tests are too small for more, and threads that wait for each other crawl on a busy machine.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for child processes
# A shell lets what it starts in the background ignore SIGINT, and so would the programs that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def meteor_without_its_tables(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR matches equal words only, save in slow tests: reading its tables takes seconds."""
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(meteor, "OPTIONS", (*meteor.OPTIONS, "-m", "exact"))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with flickr8k, cifar10 and caption_metrics: CONTRACAP_DATA, else ../shared/data."""
    folder = Path(os.environ.get("CONTRACAP_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}: set CONTRACAP_DATA to a folder with flickr8k, cifar10 and caption_metrics")
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the tiny model's random weights."""
    return write_tiny(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="session")
def varied_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a model that writes different things about different images."""
    return write_tiny(tmp_path_factory.mktemp("varied"), attention=20)


def write_tiny(folder: Path, attention: float = 1) -> Path:
    model, processor = random_model(SIZES["tiny"], seed=0)
    state = {
        name: weight * attention if "cross_blocks" in name and name.endswith("attention.out.weight") else weight
        for name, weight in model.state_dict().items()
    }
    path = folder / "tiny.safetensors"
    write_weights(path, model=model.config, image=processor.image_config, state=state)
    return path


@pytest.fixture(scope="session")
def open_clip() -> ModuleType:
    """The real open_clip, the oracle; `make setup` installs it. In CI it must be there."""
    # Its torchvision is a CUDA build, whose operators cannot be registered beside the CPU build of torch.
    sys.modules.setdefault("torchvision._meta_registrations", ModuleType("torchvision._meta_registrations"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if os.environ.get("CI"):
            import open_clip

            return open_clip
        return pytest.importorskip("open_clip", reason="open_clip is not installed: make setup", exc_type=ImportError)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a verb: exit status, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            status = int(exit.code or 0)
        output = capsys.readouterr()
        return status, output.out, output.err

    return call


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
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


@pytest.fixture(scope="module")
def s3() -> Iterator[None]:
    """A local S3 server, at which fsspec and others look for buckets."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            environment.setenv(name, value)
        yield
    server.stop()
