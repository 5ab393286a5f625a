"""Changes of the outputs when open_clip 3.3.0 reads a model whose mask or pooler positions it does not know."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from contracap.model.coca import CoCa, CoCaConfig
from contracap.pretrained.positions import POOLER_POSITIONS
from contracap.tokenizer import Tokenizer

TEXTS = (
    "a dog",
    "a photo of a cat.",
    "two children are playing football on the beach",
    "a red bus in front of an old stone church",
    "a man in a blue shirt rides his bicycle down a busy street while others watch",
    "close-up of a bowl of soup with fresh herbs, bread and a wooden spoon on a dark table",
    "sunset over the mountains",
    "an airport at night, seen from above",
)
IMAGES = 8


@dataclass(frozen=True)
class Change:
    """The largest and the mean change over all samples."""

    largest: float
    mean: float


def measure_open_clip_changes(config: CoCaConfig, state: Mapping[str, Tensor]) -> dict[str, Change]:
    """Return how far unit image and text embeddings of sample inputs move.

    The result is empty if nothing changes, or if open_clip lacks the pooler.
    """
    theirs = replace(
        config,
        pooler=replace(config.pooler, adds_positions=False),
        text=replace(config.text, cls_mask="legacy" if config.text.pool == "class_token" else config.text.cls_mask),
    )
    if theirs == config or config.pooler.kind in ("cascade", "parallel"):
        return {}
    models = [_model(each, state) for each in (config, theirs)]
    changes = {}
    with torch.no_grad():
        if config.pooler.adds_positions:
            pixels = _images(config.vision.image_size)
            ours, other = (model.encode_image(pixels) for model in models)
            changes["image embeddings"] = _change((ours - other).norm(dim=1))
        if config.text.cls_mask != theirs.text.cls_mask:
            ids = Tokenizer(config.text.context, config.text.vocab_size)(TEXTS)
            ours, other = (model.encode_text(ids) for model in models)
            changes["text embeddings"] = _change((ours - other).norm(dim=1))
    return changes


def _change(moved: Tensor) -> Change:
    return Change(float(moved.max()), float(moved.mean()))


def _model(config: CoCaConfig, state: Mapping[str, Tensor]) -> CoCa:
    with torch.device("meta"):
        model = CoCa(config)
    kept = {
        name: tensor for name, tensor in state.items() if config.pooler.adds_positions or name not in POOLER_POSITIONS
    }
    model.load_state_dict(kept, assign=True)
    return model.eval().float()


def _images(size: int) -> Float[Tensor, "image 3 size size"]:
    """Return blurred blots of colour, always the same."""
    blots = torch.randn(IMAGES, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return interpolate(blots, size=(size, size), mode="bicubic")
