import json
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest

from benchmarks import train_memory, train_steps
from benchmarks.harness import Run
from contracap.model import sizes
from contracap.model.pooler import PoolerConfig
from contracap.model.sizes import SIZES
from contracap.pretrained.open_clip_config import config_to_open_clip

TINY = SIZES["tiny"]
TINY_CLIP = replace(
    TINY, pooler=PoolerConfig(kind="class_token", queries=0), text=replace(TINY.text, pool="end_token"), decoder=None
)
CAPTIONS = ("a dog", "two dogs in the snow", "a cat on a mat &amp; a ball", "the sea")


@pytest.fixture
def run() -> Run:
    return Run(rounds=2)


@pytest.fixture(autouse=True)
def tiny_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.SIZES, "tiny-clip", TINY_CLIP)


@pytest.fixture
def captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few captions in place of Flickr8k's, and fp32 on every machine."""
    monkeypatch.setattr(train_steps, "flickr8k_captions", lambda: CAPTIONS)
    monkeypatch.setattr(train_steps, "precision_on", lambda device, wanted: "fp32")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process is started to measure memory."""
    monkeypatch.setattr(train_memory, "in_fresh_process", lambda function, *arguments: function(*arguments))


@pytest.fixture(scope="session")
def small_open_clip(open_clip: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """open_clip with the same small models."""
    folder = tmp_path_factory.mktemp("sizes")
    for name, config in {"tiny": TINY, "tiny-clip": TINY_CLIP}.items():
        legacy = replace(config, text=replace(config.text, cls_mask="legacy"))
        (folder / f"{name}.json").write_text(json.dumps(config_to_open_clip(legacy)))
    open_clip.add_model_config(folder)
    yield open_clip
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)
    open_clip.factory._rescan_model_configs()
