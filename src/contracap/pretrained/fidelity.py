"""Changes of the outputs when open_clip 3.3.0 reads a model whose mask or pooler positions it does not know."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from contracap.model.coca import CoCa, CoCaConfig, unit
from contracap.pretrained.positions import POOLER_POSITIONS
from contracap.tokenizer import Tokenizer, text_lengths

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


def changes_in_open_clip(config: CoCaConfig, state: Mapping[str, Tensor]) -> dict[str, Change]:
    """Return the changes on sample inputs by name; none if nothing changes, or if open_clip lacks the pooler.

    They are distances of unit image and text embeddings, and the share of the class token's attention that goes to
    other places, for each layer, head and text.
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
            changes["image embedding"] = _change((ours - other).norm(dim=1))
        if config.text.cls_mask != theirs.text.cls_mask:
            (ours, seen), (other, seen_by_other) = (_read_texts(model) for model in models)
            changes["text embedding"] = _change((ours - other).norm(dim=1))
            changes["class token's attention"] = _change((seen - seen_by_other).abs().sum(dim=-1) / 2)
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


def _read_texts(model: CoCa) -> tuple[Float[Tensor, "text embed"], Float[Tensor, "layer text head place"]]:
    """Return the embeddings of the texts, and the attention of their class tokens to each place and, last, itself."""
    config, shares = model.config.text, []
    ids = Tokenizer(config.context, config.vocab_size)(TEXTS)
    layout = model.text.layout(ids, text_lengths(ids, config.end))
    last = layout.lengths - 1
    mask = model.text.mask(layout.fit(ids, padding=0), layout)

    def watch(attention, arguments, _) -> None:
        query, key, _ = rearrange(
            layout.pad(attention.query_key_value(arguments[0])),
            "text column (part head dim) -> part text head column dim",
            part=3,
            head=attention.heads,
        )
        text = torch.arange(len(ids))
        scores = torch.einsum("thd,thcd->thc", query[text, :, last] * query.shape[-1] ** -0.5, key)
        columns = torch.arange(layout.columns)
        seen = columns <= last[:, None] if mask is None else mask[text, 0, last]
        share = scores.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1)
        placed = share.new_zeros(*share.shape[:2], config.context + 1)
        placed[..., : layout.columns] = share.masked_fill((columns == last[:, None])[:, None], 0)
        placed[..., -1] = share[text, :, last]
        shares.append(placed)

    hooks = [block.attention.register_forward_hook(watch) for block in model.text.blocks]
    embedding = model.text.contrastive(ids)
    for hook in hooks:
        hook.remove()
    return unit(embedding), torch.stack(shares)
