"""The image encoder: a vision transformer that returns all tokens."""

import math
from dataclasses import dataclass

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import normalize

from contracap.config import require_positive
from contracap.model.transformer import Activation, Stack, TransformerBlock

# Scales of the patch embedding's initial rows. On photographs, each output is then about as large as its position.
PATCH_GAIN = 1.65
COLOR_GAIN = 5.0
LOWEST_FREQUENCY = 0.35  # used for the mean, whose frequency is 0


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of the image encoder."""

    image_size: int
    """Height and width of an image in pixels."""
    patch_size: int
    """Height and width of a patch in pixels."""
    width: int
    """Channels of each token."""
    layers: int
    """Transformer blocks."""
    heads: int
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward layers, relative to `width`."""
    activation: Activation = "gelu"
    """`quick_gelu` for OpenAI's CLIP and the models trained after it."""
    patch_dropout: float = 0.0
    """Share of the patches dropped in each training step (FLIP, arXiv 2212.00794); none in evaluation."""

    def __post_init__(self) -> None:
        require_positive(self, "image_size", "patch_size", "width", "layers", "heads", "mlp_ratio")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"vision width {self.width} is not a multiple of its {self.heads} heads")
        if not 0.0 <= self.patch_dropout < 1.0:
            raise ValueError(f"patch_dropout is {self.patch_dropout}: it must be at least 0 and below 1")

    @property
    def patches(self) -> int:
        """Patches per image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Tokens per image: the class token and the patches."""
        return 1 + self.patches


class VisionEncoder(nn.Module):
    """Pre-norm transformer over patches and a class token.

    Source: ViT (arXiv 2010.11929), with CLIP's norm before the blocks.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.width, bias=False)
        self.class_token = nn.Parameter(torch.empty(config.width))
        self.position = nn.Parameter(torch.empty(config.tokens, config.width))
        self.norm_in = nn.LayerNorm(config.width)
        self.blocks = Stack(
            TransformerBlock(config.width, config.heads, config.mlp_ratio, config.activation)
            for _ in range(config.layers)
        )

    def initialise(self) -> None:
        """Initialise the parameters."""
        self.patch_embedding.reset_parameters()
        waves = cosine_patches(self.config)
        with torch.no_grad():
            self.patch_embedding.weight[: len(waves)].copy_(waves)
        nn.init.normal_(self.class_token, std=self.config.width**-0.5)
        nn.init.normal_(self.position, std=0.5)
        self.norm_in.reset_parameters()
        self.blocks.initialise()

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch token dim"]:
        """Return the tokens of normalised images, the class token first."""
        size = self.config.image_size
        if pixels.shape[2:] != (size, size):
            raise ValueError(
                f"the images have {pixels.shape[2]} x {pixels.shape[3]} pixels; this model takes {size} x {size}: "
                "resize them, as its processor does"
            )
        patches = rearrange(
            pixels.to(self.class_token.dtype),
            "batch channel (row height) (column width) -> batch (row column) (channel height width)",
            height=self.config.patch_size,
            width=self.config.patch_size,
        )
        kept = self.kept_patches(patches)
        patches = select_patches(patches, kept)
        position = select_patches(self.position[1:].expand(len(pixels), -1, -1), kept)
        first = repeat(self.class_token + self.position[0], "dim -> batch 1 dim", batch=len(pixels))
        tokens = self.norm_in(torch.cat([first, self.patch_embedding(patches) + position], dim=1))
        for block in self.blocks:
            tokens = block(tokens)
        return tokens

    def kept_patches(self, patches: Float[Tensor, "batch patch pixels"]) -> Int64[Tensor, "batch kept"] | None:
        """Return a random subset of each image's patches in training with patch dropout; otherwise None, for all."""
        if not self.training or not self.config.patch_dropout:
            return None
        kept = max(1, round(patches.shape[1] * (1.0 - self.config.patch_dropout)))
        return torch.rand(patches.shape[:2], device=patches.device).topk(kept, dim=1).indices


def select_patches(
    patches: Float[Tensor, "batch patch dim"], kept: Int64[Tensor, "batch kept"] | None
) -> Float[Tensor, "batch _ dim"]:
    """Return the kept patches of each image."""
    if kept is None:
        return patches
    return patches.gather(1, repeat(kept, "batch kept -> batch kept dim", dim=patches.shape[2]))


def cosine_patches(config: VisionConfig) -> Float[Tensor, "kept pixels"]:
    """Return initial rows of the patch embedding, each a two-dimensional cosine wave in one colour direction.

    Waves of low frequency come first; colour waves are ordered by twice their frequency, as JPEG subsamples. In
    natural images, amplitude is inversely proportional to frequency. Colour differences have a fifth of the amplitude
    of brightness. The rows compensate for both, so edges and hues start with the same weight as the mean brightness.
    There are at most `width` rows, and fewer if a patch has fewer pixels.

    Deviation from ViT's random rows: see docs/decisions/0004-initial-values.md.
    Source: D. J. Field, J. Opt. Soc. Am. A 4 (1987), for the fall of the spectrum; D. L. Ruderman et al., J. Opt. Soc.
    Am. A 15 (1998), for the colour directions.
    """
    side = config.patch_size
    numbers = torch.arange(side, dtype=torch.float32)
    waves = normalize(torch.cos(math.pi / side * numbers[:, None] * (numbers + 0.5)), dim=1)  # frequency, place
    colors = normalize(torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]), dim=1)
    frequency = torch.hypot(numbers[:, None], numbers).clamp(min=LOWEST_FREQUENCY)
    rows = einsum(colors, waves, waves, "color rgb, u row, v column -> color u v rgb row column")
    gain = rearrange(torch.tensor([1.0, COLOR_GAIN, COLOR_GAIN]), "color -> color 1 1") * frequency
    order = (rearrange(torch.tensor([1.0, 2.0, 2.0]), "color -> color 1 1") * frequency).flatten().argsort(stable=True)
    rows = rows * rearrange(gain * PATCH_GAIN / side, "color u v -> color u v 1 1 1")
    return rearrange(rows, "color u v rgb row column -> (color u v) (rgb row column)")[order[: config.width]]
