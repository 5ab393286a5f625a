"""The README, and the pages on captions and on evaluation, are held to the tree and to the package."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from contracap.cli import main
from contracap.pretrained import load, save, save_open_clip

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + "".join(
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("captioning", "evaluation")
)
PYTHON = re.findall(r"```python\n(.*?)```", PAGES, flags=re.DOTALL)
COMMANDS = re.findall(r"^    (?:\.venv/bin/)?contracap (.*)$", PAGES, flags=re.MULTILINE)


def test_the_tree_names_every_file_of_the_package() -> None:
    tracked = subprocess.run(["git", "ls-files", "src", "recipes", "docs"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    tree = README[README.index("## The tree") :]
    files = [Path(line) for line in tracked.stdout.split()]
    skipped = {"py.typed"}
    named_by_folder = {"vocabulary", "decisions", "classes"}
    missing = [
        str(file)
        for file in files
        if file.name not in skipped
        and not named_by_folder & set(file.parts)
        and not (file.name == "__init__.py" and len(file.parts) > 3)
        and f" {file.name} " not in tree
        and f" {file} " not in tree
    ]
    assert not missing


@pytest.fixture
def a_finished_quickstart(tmp_path: Path, monkeypatch) -> Path:
    """What the README's lines need: a run's checkpoint, a drawn picture, a photograph, released weights."""
    monkeypatch.chdir(tmp_path)
    model, processor = load("tiny", weights="random", seed=0)
    checkpoint = Path("quickstart/run/checkpoints/last/model.safetensors")
    save(checkpoint, model, processor)
    for name in ("quickstart/sample.png", "photograph.jpg"):
        Image.new("RGB", (60, 50), "orange").save(name)
    save_open_clip(Path("hub"), model=model.config, image=processor.image_config, state=model.state_dict())
    return tmp_path


def test_python_blocks_run(a_finished_quickstart: Path, monkeypatch, capsys) -> None:
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda _, name, **__: str(a_finished_quickstart / "hub" / name)
    )
    assert len(PYTHON) == 3
    for block in PYTHON:
        exec(compile(block, "README.md", "exec"), {})
    assert "over a small red plain circle" in capsys.readouterr().out


def test_the_caption_command_runs(a_finished_quickstart: Path, capsys) -> None:
    command = next(command for command in COMMANDS if command.startswith("caption "))
    assert main(command.split()) == 0
    assert capsys.readouterr().out.startswith("quickstart/sample.png\t")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood_though_its_weights_and_shards_are_missing(
    command: str, a_finished_quickstart: Path, capsys
) -> None:
    (a_finished_quickstart / "recipes").symlink_to(ROOT / "recipes")
    assert main(shlex.split(command)) in (0, 1)  # what cannot be parsed ends the process with 2
    assert len(capsys.readouterr().err.splitlines()) <= 1


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 14
