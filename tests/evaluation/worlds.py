"""Small worlds for the evaluators: images of one colour each, and a model that knows the colours."""

import io
import json

import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contracap.data.samples import Sample
from contracap.images import ImageConfig
from contracap.model.coca import CoCa
from contracap.model.sizes import SIZES
from contracap.processor import Processor
from contracap.tokenizer import Tokenizer

COLOURS = {
    "red": (250, 20, 20),
    "green": (20, 250, 20),
    "blue": (20, 20, 250),
    "yellow": (250, 250, 20),
    "cyan": (20, 250, 250),
    "magenta": (250, 20, 250),
}


def processor() -> Processor:
    return Processor(ImageConfig(size=8), Tokenizer(context=16, vocab_size=1024))


def picture(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (10, 10), colour).save(file, "PNG")
    return file.getvalue()


def sample(key: str, colour: str, *captions: str, **fields) -> Sample:
    return Sample(key=key, image=picture(COLOURS[colour]), captions=captions, fields=fields, shard="shard.tar")


def record(key: str, colour: str, **fields) -> tuple[str, dict[str, bytes]]:
    """The same for `write_shard`."""
    return key, {"png": picture(COLOURS[colour]), "json": json.dumps(fields).encode()}


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(part.numel() for part in tree_leaves(made) if isinstance(part, Tensor))])
        return made


class ColourModel(CoCa):
    """Embeds an image by its mean colour and a text by the colour word in it (a text without one: by nothing)."""

    def __init__(self) -> None:
        super().__init__(SIZES["tiny"])
        tokenizer = Tokenizer(context=16, vocab_size=1024)
        config = processor().image_config
        mean, std = torch.tensor(config.mean), torch.tensor(config.std)
        self.words = [tokenizer.encode(f" {name}") for name in COLOURS]
        self.embeddings = normalize((torch.tensor(list(COLOURS.values())) / 255 - mean) / std, dim=-1)

    def encode_image(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3"]:
        assert not self.training
        return normalize(pixels.mean(dim=(2, 3)), dim=-1)

    def encode_text(self, ids: Int64[Tensor, "batch token"]) -> Float[Tensor, "batch 3"]:
        rows = []
        for row in ids.tolist():
            found = [i for i, word in enumerate(self.words) if str(word)[1:-1] in str(row)]
            rows.append(self.embeddings[found[0]] if found else torch.zeros(3))
        return torch.stack(rows)
