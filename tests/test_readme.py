"""What the README and the docs tell a reader to type or to open works: links, commands, Python, recipes."""

import contextlib
import functools
import io
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import contracap
from contracap import cli
from contracap.pretrained import load, save
from contracap.training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
TEXTS = {
    path: path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("runs/*.md")])
}
GUIDES = {
    path: text for path, text in TEXTS.items() if path.name not in ("CHANGELOG.md", "log.md")
}  # those are history
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^    .*$", re.MULTILINE)
COMMAND = re.compile(r"^ *(?:\$ |\.venv/bin/|torchrun .*-m |python -m )*contracap ([a-z].*?)(?:  +#.*)?$", re.MULTILINE)


def prose(text: str) -> str:
    return INDENTED.sub("", FENCED.sub("", text))


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (path.name, block) for path, text in GUIDES.items() for kind, block in FENCED.findall(text) if kind == language
    ]


def commands() -> list[tuple[str, str]]:
    """The page and the words after `contracap`, of each line of code that is a command."""
    code = {
        path.name: "\n".join([*INDENTED.findall(text), *(block for _, block in FENCED.findall(text))])
        for path, text in GUIDES.items()
    }
    found = {command: page for page, lines in code.items() for command in COMMAND.findall(lines)}
    return [(page, command) for command, page in found.items()]


def mentions() -> list[tuple[str, str]]:
    """The same of commands in a sentence, which may leave out what a verb needs."""
    found = {
        " ".join(mention.split()): path.name
        for path, text in GUIDES.items()
        for mention in re.findall(r"`contracap ([a-z][^`]*)`", prose(text))
    }
    return [(page, mention) for mention, page in found.items()]


def targets(text: str) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", prose(text))
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)", text, re.MULTILINE)


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_work(verbs: cli.Commands) -> cli.Commands:
    """The same verbs, which parse what they are given and do nothing."""

    def parse_only(verb: Callable) -> Callable:
        return functools.wraps(verb)(lambda *_, **__: 0)

    return {
        name: cli.Group(verb.help, without_work(verb.commands)) if isinstance(verb, cli.Group) else parse_only(verb)
        for name, verb in verbs.items()
    }


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_a_file_and_a_heading(path: Path) -> None:
    for target in targets(TEXTS[path]):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            linked = (path.parent / name).resolve() if name else path
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), target


def test_the_readme_is_short() -> None:
    assert len(TEXTS[ROOT / "README.md"].split()) <= 900


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_parse(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "COMMANDS", without_work(cli.COMMANDS))
    assert cli.main(shlex.split(command)) == 0


@pytest.mark.parametrize(("page", "mention"), mentions())
def test_verbs_and_flags_in_sentences_exist(page: str, mention: str) -> None:
    words = mention.split()
    options = help_of(*(words[:2] if isinstance(cli.COMMANDS.get(words[0]), cli.Group) else words[:1]))
    assert options.startswith("usage: ")
    assert [word for word in words if word.startswith("--") and word not in options] == []


@functools.cache
def help_of(*verb: str) -> str:
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
        cli.main([*verb, "--help"])
    return out.getvalue()


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_benchmarks_and_make_targets_exist(path: Path) -> None:
    names = re.findall(r"python -m benchmarks ([a-z]\w*)", GUIDES[path])
    assert [name for name in names if not (ROOT / "benchmarks" / f"{name}.py").is_file()] == []
    known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"(?:`|^ *)make ([a-z-]+)", GUIDES[path], re.MULTILINE)) <= set(known)


@pytest.mark.parametrize(("page", "block"), blocks("python"))
def test_python_parses_and_names_what_exists(page: str, block: str) -> None:
    compile(block, page, "exec")
    assert set(re.findall(r"\bcontracap\.([A-Za-z]\w*)\(", block)) <= set(contracap.__all__)


@pytest.mark.parametrize(("page", "block"), blocks("toml"))
def test_toml_parses_and_whole_recipes_load(page: str, block: str, tmp_path: Path) -> None:
    if "size" in tomllib.loads(block):
        (tmp_path / "recipe.toml").write_text(block, encoding="utf-8")
        load_recipe(tmp_path / "recipe.toml")


def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save("quickstart/run/checkpoints/last/model.safetensors", *load("tiny", weights="random", seed=0))
    Image.new("RGB", (60, 50), "orange").save("quickstart/sample.png")
    for page, block in blocks("python"):
        if page == "README.md":
            exec(compile(block, page, "exec"), {})
