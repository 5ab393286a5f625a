"""open_clip's models with the weights of ours."""

from dataclasses import replace
from typing import Any

from benchmarks.peers import peer_module
from contracap.model.coca import CoCa, CoCaConfig
from contracap.model.sizes import find_size
from contracap.pretrained.open_clip_config import config_to_open_clip
from contracap.pretrained.open_clip_names import to_open_clip


def legacy_config(size: str) -> CoCaConfig:
    """A size as open_clip's models are: with the legacy mask of the class token."""
    config = find_size(size)
    return replace(config, text=replace(config.text, cls_mask="legacy"))


def open_clip_model(size: str, ours: CoCa, **options: object) -> Any:
    """open_clip's model of a size with the weights of ours.

    Raises:
        MissingPeerError: if open_clip is not installed.
    """
    open_clip = peer_module("open_clip")
    if size in open_clip.list_models():
        with ours.device:  # drawing the weights takes seconds on a CPU
            model = open_clip.create_model(size, load_weights=False, device=ours.device, **options)
    else:  # a small one of ours
        config = config_to_open_clip(ours.config)
        model = open_clip.CoCa(**{name: value for name, value in config.items() if name != "custom_text"})
    model.load_state_dict(to_open_clip(ours.state_dict(), ours.config))
    return model
