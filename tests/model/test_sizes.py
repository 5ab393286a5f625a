import re
from pathlib import Path

import torch

from contracap.cli import main
from contracap.model.coca import CoCa
from contracap.model.sizes import PURPOSES, SIZES, find_size
from contracap.pretrained.find import RELEASED

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


def test_list_shows_every_size_and_release(capsys) -> None:
    assert main(["weights", "list"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SIZES)
    assert sorted(name for line in lines for name in re.findall(r"[\w-]+/\w+", line)) == sorted(RELEASED)
