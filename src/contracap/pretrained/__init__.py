"""Models from weights files and back.

`models` loads and saves models. `weights` reads and writes files in our layout and in open_clip's, with
`open_clip_names` and `open_clip_config`. `find` turns a name into a file, `tensors` reads a file of any program,
`fit` checks that its tensors fit a model, and `devices` decides where and in which precision the model computes.
"""

from contracap.pretrained.find import find_weights
from contracap.pretrained.models import load, processor_for, random_model, save
from contracap.pretrained.weights import Weights, read_weights, save_open_clip, with_cls_mask, write_weights

__all__ = [
    "Weights",
    "find_weights",
    "load",
    "processor_for",
    "random_model",
    "read_weights",
    "save",
    "save_open_clip",
    "with_cls_mask",
    "write_weights",
]
