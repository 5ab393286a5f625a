"""Trials of training, and of what it shares with captioning."""

from pathlib import Path

import pytest

from contracap import cli


def test_without_a_compiler_compiled_captions_are_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    (tmp_path / "image.png").touch()
    assert cli.main(["caption", str(tmp_path / "no-weights"), str(tmp_path / "image.png"), "--compiled"]) == 1
    assert "there is no /nonexistent" in capsys.readouterr().err
