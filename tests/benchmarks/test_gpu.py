import json
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command_line
from benchmarks import gpu
from benchmarks.gpu import PARTS, main
from benchmarks.stand_in import make_captions, write_flickr8k
from contracap.data.loader import evaluation_samples
from contracap.image_files import decode
from contracap.tokenizer import Tokenizer

SCRIPTS = {
    "wrong": "import sys; sys.exit('no such device')",
    "slow": "import pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text('{\"rows\": []}'); time.sleep(60)",
    "right": "import os; print(os.listdir(os.environ['CONTRACAP_DATA']))",
}


def test_failing_and_slow_parts_do_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(gpu, "IMAGES", 4)
    monkeypatch.setattr(gpu, "PARTS", {name: ("", 1 if name == "slow" else 20) for name in SCRIPTS})
    monkeypatch.setattr(
        gpu,
        "build_command",
        lambda name, out, **options: [sys.executable, "-c", SCRIPTS[name], str(out / f"{name}.json")],
    )
    assert main(["--out", str(tmp_path), "--limit", "3"]) == 1
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "wrong": "failed",
        "slow": "cut",
        "right": "passed",
    }
    assert parts["slow"]["result"] == {"rows": []} and "no such device" in parts["wrong"]["output"]
    assert "flickr8k" in parts["right"]["output"] and "no such device" in capsys.readouterr().out
    assert main(["--out", str(tmp_path), "--parts", "right"]) == 0


def test_limits_add_up_to_less_than_nine_minutes() -> None:
    assert sum(seconds for _, seconds in PARTS.values()) < 540


@pytest.mark.parametrize("name", [name for name, (command, _) in PARTS.items() if command != "pytest"])
def test_every_part_is_a_benchmark_that_runs_on_a_gpu(name: str) -> None:
    _, module, *rows = PARTS[name][0].split()
    benchmark = command_line.importlib.import_module(f"benchmarks.{module}").BENCHMARK
    assert benchmark.cuda and set(rows) - {"--rows"} <= (benchmark.rows | benchmark.cuda_rows).keys()


def test_stand_in_has_images_and_captions_of_one_token_a_word(tmp_path: Path) -> None:
    write_flickr8k(tmp_path, images=8)
    samples = list(evaluation_samples(tmp_path / "flickr8k/train"))
    assert len(samples) == 8 and decode(samples[0].image).shape == (3, 375, 500)
    tokenizer, captions = Tokenizer(), make_captions(seed=0)
    lengths = [len(text.split()) + 2 for text, _ in zip(captions, range(1000), strict=False)]
    assert 13.5 < sum(lengths) / 1000 < 14.6
    assert all(len(tokenizer.encode(text)) == len(text.split()) for text, _ in zip(captions, range(50), strict=False))


@pytest.mark.slow
def test_parts_pass_on_a_cpu_with_small_models(open_clip, tmp_path: Path) -> None:
    parts = ["parity", "feeding", "fsdp"]
    assert main(["--out", str(tmp_path), "--device", "cpu", "--small", "--limit", "200", "--parts", *parts]) == 0
    written = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert all(written[name]["result"]["rows"] for name in parts)
