"""The table of sizes: facts of the released models, and small ones for laptops and tests."""

from dataclasses import replace

from contracap.model.coca import CoCaConfig
from contracap.model.pooler import PoolerConfig
from contracap.model.text import DecoderConfig, TextConfig
from contracap.model.vision import VisionConfig

_VISION_B_32 = VisionConfig(image_size=224, patch_size=32, width=768, layers=12, heads=12)
_VISION_L_14 = VisionConfig(image_size=224, patch_size=14, width=1024, layers=24, heads=16)
_TEXT_B = TextConfig(width=512, layers=12, heads=8)
_TEXT_L = TextConfig(width=768, layers=12, heads=12)
_CLASS_TOKEN = PoolerConfig(kind="class_token", queries=0)

SIZES: dict[str, CoCaConfig] = {
    # The mask and the vocabulary of the release, so that open_clip can read what is trained at these sizes:
    # docs/decisions/0006-released-sizes-convert.md.
    "coca_ViT-B-32": CoCaConfig(
        embed_dim=512,
        vision=_VISION_B_32,
        text=replace(_TEXT_B, cls_mask="legacy"),
        decoder=DecoderConfig(layers=12, heads=8),
    ),
    "coca_ViT-L-14": CoCaConfig(
        embed_dim=768,
        vision=_VISION_L_14,
        text=replace(_TEXT_L, cls_mask="legacy"),
        decoder=DecoderConfig(layers=12, heads=12),
    ),
    # CLIP of the same sizes, as open_clip names them: no decoder, text read at the end token, 77 tokens.
    "ViT-B-32": CoCaConfig(
        embed_dim=512, vision=_VISION_B_32, pooler=_CLASS_TOKEN, text=replace(_TEXT_B, context=77, pool="end_token")
    ),
    "ViT-L-14": CoCaConfig(
        embed_dim=768, vision=_VISION_L_14, pooler=_CLASS_TOKEN, text=replace(_TEXT_L, context=77, pool="end_token")
    ),
    # Photographs on a laptop: the Flickr8k recipe.
    "flickr8k": CoCaConfig(
        embed_dim=192,
        vision=VisionConfig(image_size=96, patch_size=16, width=192, layers=4, heads=4),
        pooler=PoolerConfig(queries=17, heads=4),
        text=TextConfig(context=40, vocab_size=6144, width=192, layers=2, heads=4),
        decoder=DecoderConfig(layers=2, heads=4),
    ),
    # The drawn scenes of the quickstart.
    "scenes": CoCaConfig(
        embed_dim=128,
        vision=VisionConfig(image_size=72, patch_size=24, width=192, layers=2, heads=4),
        pooler=PoolerConfig(queries=10, heads=4, adds_positions=True),
        text=TextConfig(context=28, vocab_size=6144, width=128, layers=2, heads=4),
        decoder=DecoderConfig(layers=2, heads=4),
    ),
    # Tests.
    "tiny": CoCaConfig(
        embed_dim=32,
        vision=VisionConfig(image_size=32, patch_size=8, width=48, layers=2, heads=2),
        pooler=PoolerConfig(queries=5, heads=2),
        text=TextConfig(context=16, vocab_size=1024, width=32, layers=2, heads=2),
        decoder=DecoderConfig(layers=2, heads=2),
    ),
}

PURPOSES = {
    "coca_ViT-B-32": "the released CoCa",
    "coca_ViT-L-14": "the large released CoCa",
    "ViT-B-32": "CLIP without captions",
    "ViT-L-14": "large CLIP without captions",
    "flickr8k": "photographs on a laptop",
    "scenes": "drawings of the quickstart",
    "tiny": "for tests",
}


def describe_size(name: str) -> str:
    """Describe the purpose and inputs of a size, as in `for tests, 32 pixels, 16 tokens`."""
    config = SIZES[name]
    return f"{PURPOSES[name]}, {config.vision.image_size} pixels, {config.text.context} tokens"


def find_size(name: str) -> CoCaConfig:
    """Return the row `name` of the table.

    Raises: ValueError: if there is none.
    """
    if name not in SIZES:
        sizes = "; ".join(f"{each} ({describe_size(each)})" for each in SIZES)
        raise ValueError(f"unknown size {name!r}; the sizes are {sizes}")
    return SIZES[name]
