import json
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from contracap.bench import steps
from contracap.bench.steps import Setting
from contracap.bench.timing import NoPeerError
from contracap.model import sizes
from contracap.model.pooler import PoolerConfig
from contracap.model.sizes import SIZES
from contracap.pretrained.open_clip import config_to_open_clip

TINY = SIZES["tiny"]
TINY_CLIP = replace(
    TINY, pooler=PoolerConfig(kind="class_token", queries=0), text=replace(TINY.text, pool="end_token"), decoder=None
)


@pytest.fixture(autouse=True)
def tiny_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.SIZES, "tiny-clip", TINY_CLIP)


@pytest.fixture(scope="session")
def small_peers(open_clip: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """open_clip knows the same small models."""
    folder = tmp_path_factory.mktemp("sizes")
    for name, config in {"tiny": TINY, "tiny-clip": TINY_CLIP}.items():
        legacy = replace(config, text=replace(config.text, cls_mask="legacy"))
        (folder / f"{name}.json").write_text(json.dumps(config_to_open_clip(legacy)))
    open_clip.add_model_config(folder)
    yield
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)
    open_clip.factory._rescan_model_configs()


@pytest.fixture
def no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    def peer_module(name: str) -> None:
        raise NoPeerError(f"{name} is not here")

    monkeypatch.setattr(steps, "peer_module", peer_module)


@pytest.fixture
def setting() -> Setting:
    captions = ("a dog", "two dogs in the snow", "a cat on a mat &amp; a ball", "the sea")
    return Setting(captions=captions, device=torch.device("cpu"), precision="fp32", rounds=7, seed=0)
