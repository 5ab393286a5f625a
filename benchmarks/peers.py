"""The tools that we are compared with, imported if they are installed."""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch


class MissingPeerError(ImportError):
    """The peer is not installed; the message says what to install."""


def peer_module(name: str, package: str = "open_clip_torch") -> ModuleType:
    """Import a module of the peer.

    Raises:
        MissingPeerError: if it cannot be imported; `package` is what to install.
    """
    try:
        with _stand_ins(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit this torch
        raise MissingPeerError(f"{name} cannot be imported ({error}): pip install {package}") from error


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Put empty modules in the place of two that open_clip imports and nothing here calls, if the real ones fail."""
    absent = []
    if torch.version.cuda is None:  # CUDA operators of torchvision, which this torch cannot register
        absent.append("torchvision._meta_registrations")
    if importlib.util.find_spec("pandas") is None:  # for lists of images in CSV files
        absent.append("pandas")
    added = [name for name in absent if name not in sys.modules]
    # with a spec, which torch's compiler reads from every module
    sys.modules.update({name: importlib.util.module_from_spec(ModuleSpec(name, None)) for name in added})
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]
