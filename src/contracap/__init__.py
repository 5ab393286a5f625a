"""Contrastive captioners (CoCa): one model that captions, classifies and retrieves.

Names are imported when they are first used: `import contracap` alone does not import torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contracap.evaluation.task import evaluate
    from contracap.generation.beam import BeamSearch
    from contracap.generation.captioner import Captioner
    from contracap.generation.constraints import Rules
    from contracap.generation.legacy import LegacyBeamSearch
    from contracap.generation.reranking import ContrastiveReranking
    from contracap.generation.sampling import Greedy, Sampling
    from contracap.pretrained import load, save
    from contracap.training.recipe import load_recipe
    from contracap.training.trainer import train

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # huggingface_hub reads it as it is imported

__version__ = "0.1.0"
__all__ = [
    "BeamSearch",
    "Captioner",
    "ContrastiveReranking",
    "Greedy",
    "LegacyBeamSearch",
    "Rules",
    "Sampling",
    "__version__",
    "evaluate",
    "load",
    "load_recipe",
    "save",
    "train",
]

_HOMES = {
    "BeamSearch": "contracap.generation.beam",
    "Captioner": "contracap.generation.captioner",
    "ContrastiveReranking": "contracap.generation.reranking",
    "Greedy": "contracap.generation.sampling",
    "LegacyBeamSearch": "contracap.generation.legacy",
    "Rules": "contracap.generation.constraints",
    "Sampling": "contracap.generation.sampling",
    "evaluate": "contracap.evaluation.task",
    "load": "contracap.pretrained",
    "load_recipe": "contracap.training.recipe",
    "save": "contracap.pretrained",
    "train": "contracap.training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
