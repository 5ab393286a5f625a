"""The image encoder: a vision transformer that returns every token."""

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int64
from torch import Tensor, nn

from contracap.model.transformer import SelfBlock, Stack


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of the image encoder, in pixels, channels and counts."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0
    patch_dropout: float = 0.0
    """Share of the patches left out of each training step (FLIP, arXiv 2212.00794); none in evaluation."""

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"vision width {self.width} is not a multiple of its {self.heads} heads")
        if not 0.0 <= self.patch_dropout < 1.0:
            raise ValueError(f"patch_dropout is {self.patch_dropout}; it must be at least 0 and below 1")

    @property
    def patches(self) -> int:
        """Patches per picture."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Tokens per picture: the class token and the patches."""
        return 1 + self.patches


class VisionEncoder(nn.Module):
    """Patches and a class token through pre-norm blocks. Source: ViT (arXiv 2010.11929), with CLIP's norm before the
    blocks."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.width, bias=False)
        self.class_token = nn.Parameter(torch.empty(config.width))
        self.position = nn.Parameter(torch.empty(config.tokens, config.width))
        self.norm_in = nn.LayerNorm(config.width)
        self.blocks = Stack(SelfBlock(config.width, config.heads, config.mlp_ratio) for _ in range(config.layers))

    def initialise(self) -> None:
        """Fill what the encoder owns."""
        self.patch_embedding.reset_parameters()
        nn.init.normal_(self.class_token, std=self.config.width**-0.5)
        with torch.no_grad():
            self.position.copy_(sine_positions(self.config))
        self.norm_in.reset_parameters()
        self.blocks.initialise()

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch token dim"]:
        """Tokens of normalised pictures, the class token first."""
        size = self.config.image_size
        if images.shape[2:] != (size, size):
            raise ValueError(
                f"pictures are {images.shape[2]} x {images.shape[3]} pixels; this model takes {size} x {size}"
            )
        patches = rearrange(
            images,
            "batch channel (row height) (column width) -> batch (row column) (channel height width)",
            height=self.config.patch_size,
            width=self.config.patch_size,
        )
        kept = self.kept_patches(patches)
        patches, position = pick(patches, kept), pick(self.position[1:].expand(len(images), -1, -1), kept)
        first = repeat(self.class_token + self.position[0], "dim -> batch 1 dim", batch=len(images))
        tokens = self.norm_in(torch.cat([first, self.patch_embedding(patches) + position], dim=1))
        for block in self.blocks:
            tokens = block(tokens)
        return tokens

    def kept_patches(self, patches: Float[Tensor, "batch patch pixels"]) -> Int64[Tensor, "batch kept"] | None:
        """In training with patch dropout, a random subset for each picture; else None, for all."""
        if not self.training or not self.config.patch_dropout:
            return None
        kept = max(1, round(patches.shape[1] * (1.0 - self.config.patch_dropout)))
        return torch.rand(patches.shape[:2], device=patches.device).topk(kept, dim=1).indices


def pick(
    rows: Float[Tensor, "batch row dim"], kept: Int64[Tensor, "batch kept"] | None
) -> Float[Tensor, "batch _ dim"]:
    """The kept rows of each picture."""
    return rows if kept is None else rows.gather(1, repeat(kept, "batch kept -> batch kept dim", dim=rows.shape[2]))


def sine_positions(config: VisionConfig) -> Float[Tensor, "token dim"]:
    """Initial positions: sines and cosines of row and column, half of the channels each, amplitude 0.5; class token 0.

    Deviation from CLIP, whose small random positions a small model needs many samples to find: see
    docs/decisions/0004-initial-values.md.
    Source: MoCo v3 (arXiv 2104.02057), section 4, for the sines.
    """
    side, waves = config.image_size // config.patch_size, -(-config.width // 4)
    places = torch.arange(side, dtype=torch.float32)
    angles = places[:, None] * 100.0 ** (-torch.arange(waves) / waves)
    along = 0.5 * torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = (
        repeat(along, "row wave -> (row column) wave", column=side),
        repeat(along, "column wave -> (row column) wave", row=side),
    )
    patches = torch.cat([rows, columns], dim=1)[:, : config.width]
    return torch.cat([torch.zeros(1, config.width), patches])
