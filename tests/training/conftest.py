import shutil
from pathlib import Path

import pytest

from contracap.config import build
from contracap.training.recipe import Recipe
from contracap.training.trainer import train

# What a run can be told to do besides: it may change nothing of the training.
WATCHING = {"validate_every": 4, "peak_tflops": 0.5, "profile": True}


@pytest.fixture
def whole_values(recipe_values: dict) -> dict:
    """The recipe of `whole`, but for what is watched on the way."""
    return recipe_values | {
        "precision": "fp32",
        "ema_decay": 0.9,
        "accumulation": 2,
        "model": {
            "vision": {"patch_dropout": 0.5, "layers": 1},
            "text": {"layers": 1},
            "decoder": {"layers": 1},
        },
    }


@pytest.fixture(scope="session")
def whole_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def whole(whole_values: dict, whole_folder: Path, colours: Path) -> Path:
    """The folder of a run of eight steps that nothing interrupts, and that is watched in all ways. Not to be changed:
    `finished` is a copy."""
    if not (whole_folder / "checkpoints" / "step-00000008").exists():
        shard = str(colours / "000.tar")
        tasks, captions = {"pairs": {"task": "retrieval", "data": shard}}, {"data": shard, "samples": 2}
        values = whole_values | WATCHING | {"out": str(whole_folder), "precision": "auto"}
        values["data"] = values["data"] | {"validation": shard}
        values["evaluation"] = {"every": 4, "tasks": tasks, "captions": captions}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.cpu.get_capabilities", dict, raising=False)
            train(build(Recipe, values))
    return whole_folder


@pytest.fixture
def finished(whole: Path, whole_values: dict) -> dict:
    """A recipe that resumes a copy of `whole`."""
    shutil.copytree(whole, whole_values["out"], symlinks=True)
    return whole_values | {"resume": True}
