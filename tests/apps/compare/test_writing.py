"""The files of a comparison, and the verb."""

import json
import sys
from pathlib import Path

import pytest

from contracap.apps.compare.comparison import compare
from contracap.apps.compare.writing import write_comparison
from contracap.cli import main
from tests.apps.compare.worlds import result

HITS = [1.0] * 30 + [0.0] * 10
FEWER = [1.0] * 20 + [0.0] * 20
FILES = {"compare.svg", "compare.png", "compare.html", "compare.md", "compare.csv", "compare.tex", "results.json"}
pytest.importorskip("matplotlib")


def written(path: Path, values: list[float]) -> str:
    result({"cifar10/acc1": values, "imagenet/acc1": values}).write(path)
    return str(path)


def test_the_verb_writes_a_figure_a_page_tables_and_a_result(tmp_path: Path, capsys) -> None:
    a, b = written(tmp_path / "coca" / "results.json", HITS), written(tmp_path / "clip" / "results.json", FEWER)
    assert main(["compare", a, b, "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert "| cifar10/acc1 | 75.00 | 50.00 | +25.00 |" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["figures"] == {"cifar10/acc1": 0.25, "imagenet/acc1": 0.25}
    assert content["names"] == ["coca", "clip"]
    assert content["command"].startswith("contracap")
    assert content["versions"] and content["samples"] == 4 and content["seed"] == 0


def test_a_result_that_is_compared_is_never_overwritten(tmp_path: Path, capsys) -> None:
    a, b = written(tmp_path / "results.json", HITS), written(tmp_path / "clip.json", FEWER)
    before = Path(a).read_bytes()
    for first, second in ((a, b), (b, a)):
        assert main(["compare", first, second, "--out", str(tmp_path)]) == 1
        assert f"{a} would take the place of a result that is compared" in capsys.readouterr().err
    assert Path(a).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "clip.json"}


def test_the_page_asks_the_network_for_nothing_and_escapes_names_and_the_same_results_give_the_same_bytes(
    tmp_path: Path,
) -> None:
    evil = "<script>x</script>"
    comparison = compare([result({evil: HITS})], [result({evil: FEWER})], names=("<b>caf\udce9", "B"))
    for folder in ("first", "second"):
        write_comparison(comparison, tmp_path / folder, command="compare caf\udce9.json")
    for name in FILES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    html = (tmp_path / "first" / "compare.html").read_text(encoding="utf-8")
    assert "<script" not in html and "<b>caf" not in html and "http" not in html
    assert 'src="data:image/svg+xml;base64,' in html
    assert "caf\\udce9" in (tmp_path / "first" / "compare.md").read_text(encoding="utf-8")  # no text: spelled out
    written = json.loads((tmp_path / "first" / "results.json").read_text(encoding="utf-8"))
    assert written["command"] == "compare caf\udce9.json"


def test_where_nothing_can_be_drawn_the_tables_and_the_page_are_written(tmp_path: Path, capsys) -> None:
    for name in ("a", "b"):
        result({}, {"SPICE": None, "seconds": 3.0}).write(tmp_path / f"{name}.json")
    out = tmp_path / "out"
    out.mkdir()
    (out / "compare.png").write_bytes(b"of an earlier call")
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == FILES - {"compare.svg", "compare.png"}
    html = (out / "compare.html").read_text(encoding="utf-8")
    assert "There is nothing to draw: no score has a value in both." in html and "<img" not in html
    assert "no figure: no score has a value in both" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("other", "words"),
    [("{", "is not JSON"), ('{"samples": 1, "figures": {"CIDEr": 1}}', "nothing in common"), (None, "No such file")],
)
def test_wrong_input_is_one_line_and_leaves_nothing(tmp_path: Path, capsys, other: str | None, words: str) -> None:
    a, b = written(tmp_path / "a.json", HITS), tmp_path / "b.json"
    if other is not None:
        b.write_text(other)
    assert main(["compare", a, str(b), "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("contracap: error: ")
    assert words in line
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    a, b = written(tmp_path / "a.json", HITS), written(tmp_path / "b.json", FEWER)
    assert main(["compare", a, b, "--out", str(tmp_path / "out")]) == 1
    assert "pip install 'contracap[figures]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
