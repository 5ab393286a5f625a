"""Names as people have them."""

from pathlib import Path

from contracap.cli import main


def test_every_picture_is_captioned_whatever_its_name(trial, weights: Path, capsys) -> None:
    folder = trial("names")
    assert main(["caption", str(weights), str(folder), "--strategy", "greedy"]) == 0
    visible = [path for path in folder.rglob("*.*") if path.is_file() and not path.name.startswith(".")]
    assert len(capsys.readouterr().out.splitlines()) == len(visible)
