"""The start of a run: checks of its inputs, its device and precision."""

import os
from pathlib import Path
from typing import Literal

import torch

from contracap.config import flatten, to_dict
from contracap.data.patterns import commands_in
from contracap.data.shards import list_shards
from contracap.model.compiling import require_compiler
from contracap.parallel import ParallelError
from contracap.pretrained import find_weights
from contracap.pretrained.devices import multiplies_bf16
from contracap.pretrained.find import is_of_hub
from contracap.training.checkpoint import CheckpointError
from contracap.training.recipe import RECIPE_FILE, Precision, Recipe, load_recipe, with_absolute_paths

# Keys that may change when a run is resumed. They change its updates by rounding only, with three exceptions: `steps`
# stretches the cosine; with another `device` or `accumulation` (or number of ranks), other patches are dropped. Of
# `data.train` only the folder may change: names and sample counts of the shards are compared where the data resumes.
MAY_CHANGE_ON_RESUME = (
    "resume",
    "out",
    "steps",
    "device",
    "accumulation",
    "nonfinite",
    "log_every",
    "validate_every",
    "wandb",
    "peak_tflops",
    "stall_seconds",
    "profile",
    "checkpoint",
    "parallel",
    "evaluation",
    "data.validation",
    "data.workers",
    "data.max_bad_share",
    "data.train",
)


def check_inputs(recipe: Recipe, world_size: int) -> None:
    """Check what a run needs of this machine, before anything is read from elsewhere, built or counted.

    Raises:
        FileNotFoundError, WeightsError: if data or weights at a local path are missing.
        CompilerError: if blocks are to be compiled, and there is no compiler.
        ParallelError: if the pixels of a batch do not fit into the memory.
    """
    used = dict(recipe.data.training_paths)
    if recipe.validate_every and recipe.data.validation is not None:
        used["data.validation"] = recipe.data.validation
    if recipe.evaluation.captions:
        used["evaluation.captions.data"] = recipe.evaluation.captions.data
    for key, paths in used.items():
        local = [path for path in ([paths] if isinstance(paths, str) else paths) if "://" not in path]
        local = [path for path in local if not commands_in(path)]
        if local or not paths:
            list_shards(local, key=key)
    for name, task in recipe.evaluation.tasks.items():
        for path in [task.data] if isinstance(task.data, str) else task.data:
            if not any(sign in path for sign in ("://", "pipe:", "{")) and not os.path.exists(path):
                raise FileNotFoundError(f"task {name}: no such file or folder: {path}")
    for weights in recipe.weights:
        if not is_of_hub(weights):
            find_weights(weights)
    if recipe.parallel.compile:
        require_compiler()
    pixels = 3 * recipe.model_config.vision.image_size**2 * recipe.data.batch_size // world_size
    if hasattr(os, "sysconf") and pixels > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        raise ParallelError(
            f"data.batch_size is {recipe.data.batch_size:,}, whose pixels take {pixels / 2**30:,.0f} GiB on each of "
            f"{world_size} ranks; this machine has {memory / 2**30:,.0f} GiB: lower it, or take more ranks"
        )


def require_same_run(folder: Path, recipe: Recipe) -> Recipe | None:
    """Return the recipe of the run in `folder`; None if the folder has none.

    Raises: CheckpointError: if that recipe has other settings; names them.
    """
    stored = folder / RECIPE_FILE
    if not stored.is_file():
        return None
    earlier = load_recipe(stored)
    before, now = (dict(flatten(to_dict(with_absolute_paths(each)))) for each in (earlier, recipe))
    changed = [
        f"{key} was {before.get(key)} and is now {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and not f"{key}.".startswith(tuple(f"{free}." for free in MAY_CHANGE_ON_RESUME))
    ]
    if changed:
        raise CheckpointError(
            f"{folder} was run with another recipe: {'; '.join(changed)}. Resume with its own {stored}"
        )
    return earlier


def precision_on(device: torch.device, wanted: Precision) -> Literal["fp32", "bf16"]:
    """Return the precision of a run on this device. `auto` is bf16 if the hardware multiplies bf16 matrices; a CPU that
    does not takes 20 to 400 times as long (docs/performance.md)."""
    if wanted != "auto":
        return wanted
    return "bf16" if multiplies_bf16(device) else "fp32"


def device_of(recipe: Recipe) -> torch.device:
    """Return the device of the recipe.

    Raises: ParallelError: if it is CUDA, and torch finds none.
    """
    cuda = torch.cuda.is_available()
    if recipe.device == "cuda" and not cuda:
        raise ParallelError("device = 'cuda', but torch finds no CUDA device; say device=cpu or auto")
    return torch.device("cuda" if recipe.device == "cuda" or (recipe.device == "auto" and cuda) else "cpu")
