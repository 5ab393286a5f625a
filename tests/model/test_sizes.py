from pathlib import Path

import torch

from contracap.config import keys
from contracap.model.coca import CoCa
from contracap.model.sizes import PURPOSES, SIZES, find_size
from contracap.training.recipe import Recipe

DOCS = Path(__file__).parents[2] / "docs"


def row(name: str) -> str:
    config = find_size(name)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in CoCa(config).parameters())
    text = config.text
    return (
        f"| `{name}` | {config.vision.image_size} | {text.context} | {text.vocab_size:,} | {parameters / 1e6:.1f} | "
        f"{PURPOSES[name]} |"
    )


def test_page_has_the_facts_of_every_size() -> None:
    page = "\n".join(path.read_text() for path in DOCS.glob("*.md"))
    assert [name for name in SIZES if row(name) not in page] == []


def test_key_of_the_size_names_them_all() -> None:
    (means,) = [means for key, _, means in keys(Recipe) if key == "size"]
    assert [name for name in SIZES if name not in means] == []
