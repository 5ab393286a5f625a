"""The table of sizes: facts of the released models, and small ones for laptops and tests."""

from dataclasses import replace

from contracap.model.coca import CoCaConfig
from contracap.model.pooler import PoolerConfig
from contracap.model.text import DecoderConfig, TextConfig
from contracap.model.transformer import Activation
from contracap.model.vision import VisionConfig


def _vision(width: int, layers: int, patch_size: int, *, head_width: int = 64, mlp_ratio: float = 4.0) -> VisionConfig:
    return VisionConfig(
        image_size=224,
        patch_size=patch_size,
        width=width,
        layers=layers,
        heads=width // head_width,
        mlp_ratio=mlp_ratio,
    )


_VISION_B_32, _VISION_B_16 = _vision(768, 12, 32), _vision(768, 12, 16)
_VISION_L_14, _VISION_H_14 = _vision(1024, 24, 14), _vision(1280, 32, 14, head_width=80)


def _coca(vision: VisionConfig, width: int, layers: int = 12) -> CoCaConfig:
    """A CoCa as released: heads of width 64 in the texts, the release's mask and vocabulary, so that open_clip can read
    what is trained at this size. See docs/decisions/0006-released-sizes-convert.md."""
    heads = width // 64
    return CoCaConfig(
        embed_dim=width,
        vision=vision,
        text=TextConfig(width=width, layers=layers, heads=heads, cls_mask="legacy"),
        decoder=DecoderConfig(layers=layers, heads=heads),
    )


def _clip(vision: VisionConfig, width: int, layers: int = 12, *, activation: Activation = "gelu") -> CoCaConfig:
    """A CLIP as open_clip has it: no decoder, text read at the end token, 77 tokens."""
    return CoCaConfig(
        embed_dim=width,
        vision=replace(vision, activation=activation),
        pooler=PoolerConfig(kind="class_token", queries=0),
        text=TextConfig(
            context=77, width=width, layers=layers, heads=width // 64, activation=activation, pool="end_token"
        ),
    )


def _mammut(letter: str, patch_size: int) -> CoCaConfig:
    """A MaMMUT of LAION's scaling study: S, M and most of B have fewer feed-forwards."""
    width, layers, text_width = {
        "S": (384, 12, 384),
        "M": (512, 12, 512),
        "B": (768, 12, 768 if patch_size == 16 else 512),
        "L": (1024, 24, 768),
        "H": (1280, 32, 1024),
    }[letter]
    text_layers, heads = 24 if letter == "H" else 12, text_width // 64
    return CoCaConfig(
        embed_dim=text_width,
        vision=_vision(width, layers, patch_size, head_width=80 if letter == "H" else 64),
        pooler=PoolerConfig(kind="mean", queries=0),
        text=TextConfig(context=77, width=text_width, layers=text_layers, heads=heads, pool="mean_with_padding"),
        decoder=DecoderConfig(
            layers=text_layers,
            heads=heads,
            shares_blocks=True,
            cross_every=2,
            feed_forward_before_cross=text_width >= 768,
        ),
    )


SIZES: dict[str, CoCaConfig] = {
    "coca_ViT-B-32": _coca(_VISION_B_32, 512),
    "coca_ViT-L-14": _coca(_VISION_L_14, 768),
    # LAION's scaling study (arXiv 2506.04598).
    "coca_ViT-S-32": _coca(_vision(384, 12, 32), 384),
    "coca_ViT-M-32": _coca(_vision(512, 12, 32), 512),
    "coca_ViT-B-16": _coca(_VISION_B_16, 768),
    "coca_ViT-H-14": _coca(_VISION_H_14, 1024, 24),
    **{
        f"mammut_ViT-{letter}-{patch_size}": _mammut(letter, patch_size)
        for letter in "SMBLH"
        for patch_size in (32, 16, 14)
    },
    "ViT-B-32": _clip(_VISION_B_32, 512),
    "ViT-B-16": _clip(_VISION_B_16, 512),
    "ViT-L-14": _clip(_VISION_L_14, 768),
    "ViT-H-14": _clip(_VISION_H_14, 1024, 24),
    "ViT-g-14": _clip(_vision(1408, 40, 14, head_width=88, mlp_ratio=4.3637), 1024, 24),
    "ViT-bigG-14": _clip(_vision(1664, 48, 14, head_width=104, mlp_ratio=4.9231), 1280, 32),
    # OpenAI's models, and others that were trained after them.
    "ViT-B-32-quickgelu": _clip(_VISION_B_32, 512, activation="quick_gelu"),
    "ViT-B-16-quickgelu": _clip(_VISION_B_16, 512, activation="quick_gelu"),
    "ViT-L-14-quickgelu": _clip(_VISION_L_14, 768, activation="quick_gelu"),
    "ViT-H-14-quickgelu": _clip(_VISION_H_14, 1024, 24, activation="quick_gelu"),
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
    "coca_ViT-S-32": "small CoCa of LAION's scaling study",
    "coca_ViT-M-32": "medium CoCa of LAION's scaling study",
    "coca_ViT-B-16": "base CoCa of LAION's scaling study",
    "coca_ViT-H-14": "huge CoCa of LAION's scaling study",
    **{
        f"mammut_ViT-{letter}-{patch_size}": f"{word} MaMMUT of LAION's scaling study"
        for letter, word in zip("SMBLH", ("small", "medium", "base", "large", "huge"), strict=True)
        for patch_size in (32, 16, 14)
    },
    "mammut_ViT-L-14": "the released openMaMMUT",
    "ViT-B-32": "CLIP without captions",
    "ViT-B-16": "CLIP with smaller patches",
    "ViT-L-14": "large CLIP",
    "ViT-H-14": "huge CLIP",
    "ViT-g-14": "giant CLIP",
    "ViT-bigG-14": "the largest CLIP",
    "ViT-B-32-quickgelu": "CLIP as OpenAI trained it",
    "ViT-B-16-quickgelu": "OpenAI's CLIP with smaller patches",
    "ViT-L-14-quickgelu": "OpenAI's large CLIP",
    "ViT-H-14-quickgelu": "huge CLIP of DFN",
    "flickr8k": "photographs on a laptop",
    "scenes": "drawings of the quickstart",
    "tiny": "for tests",
}


def find_size(name: str) -> CoCaConfig:
    """Return the row `name` of the table.

    Raises: ValueError: if there is none.
    """
    if name not in SIZES:
        raise ValueError(
            f"unknown size {name!r}; the sizes are {', '.join(SIZES)}: `contracap weights list` tells more"
        )
    return SIZES[name]
