import re
from pathlib import Path

from contracap.cli import main
from contracap.model.sizes import PURPOSES, SIZES
from contracap.pretrained.find import RELEASED

DOCS = Path(__file__).parents[2] / "docs"


def test_list_and_page_have_the_facts_of_every_size_and_release(capsys) -> None:
    assert main(["weights", "list"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SIZES)
    assert sorted(name for line in lines for name in re.findall(r"[\w-]+/\w+", line)) == sorted(RELEASED)
    page = "\n".join(path.read_text() for path in DOCS.glob("*.md"))
    for line in lines:
        name, millions, pixels, _, tokens = line.split()[:5]
        vocabulary = f"{SIZES[name].text.vocab_size:,}"
        assert f"| `{name}` | {pixels} | {tokens} | {vocabulary} | {millions} | {PURPOSES[name]} |" in page
