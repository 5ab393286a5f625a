import os
import signal
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

from contracap.evaluation.metrics import meteor
from contracap.model.sizes import SIZES
from contracap.pretrained import random_model, write_weights

ROOT = Path(__file__).parents[1]

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
