"""The quickstart: right captions are told from wrong ones, and the command line does it all."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import contracap.apps.quickstart
import contracap.training.trainer
from contracap.apps.quickstart import (
    TARGETS,
    evaluate_scene_captions,
    find_recipe,
    quickstart,
)
from contracap.data.drawing import scene_records
from contracap.data.grammar import make_caption
from contracap.data.samples import Sample
from contracap.data.scenes import PAIRS, random_scene, twin_scenes
from contracap.evaluation.result import Result
from contracap.pretrained import load
from contracap.tokenizer import Tokenizer, text_lengths
from contracap.training.recipe import load_recipe
from contracap.training.recorder import read_metrics
from contracap.training.shutdown import Interrupted

NAMES = {
    "caption_accuracy",
    "zeroshot_color",
    "zeroshot_shape",
    "text_to_image_recall@1",
    "image_to_text_recall@1",
    "seconds",
}
FEW = {"TWIN_SCENES": 24, "SINGLE_SCENES": 40}
SHORT = ("steps=3", "data.batch_size=8", "data.shuffle_buffer=8", "optimizer.warmup_steps=1", "log_every=1")


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> tuple[Path, Result]:
    """A run of three steps, which SIGTERM ends in its first step and the same call finishes."""
    out = tmp_path_factory.mktemp("quickstart")
    record = contracap.training.trainer.Recorder.record
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FEW.items():
            patch.setattr(contracap.apps.quickstart, name, value)
        with patch.context() as interrupted:
            interrupted.setattr(
                contracap.training.trainer.Recorder,
                "record",
                lambda *given: signal.raise_signal(signal.SIGTERM) or record(*given),
            )
            with pytest.raises(Interrupted, match=r"the same command continues from .*step-"):
                quickstart(out, SHORT, command="contracap quickstart")
        drawn = {path: path.stat().st_mtime_ns for path in (out / "scenes").rglob("*")}
        result = quickstart(out, SHORT, command="contracap quickstart")
    assert {path: path.stat().st_mtime_ns for path in (out / "scenes").rglob("*")} == drawn != {}
    return out, result


def test_an_interrupted_quickstart_continues_from_its_checkpoint(short) -> None:
    out, result = short
    assert result.figures["seconds"] is None and "interrupted" in result.reasons["seconds"]
    assert [record["step"] for record in read_metrics(out / "run")] == [1, 2, 3]


def test_results_have_the_promised_names(short) -> None:
    out, _ = short
    content = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert content["figures"].keys() == NAMES
    assert content["chance"].keys() == NAMES - {"seconds"}
    assert content["command"]
    assert content["seed"] == 0
    assert "torch" in content["versions"]


def test_the_run_is_one_of_the_ordinary_trainer(short) -> None:
    out, _ = short
    assert load_recipe(out / "run" / "recipe.toml").steps == 3
    model, processor = load(out / "run" / "checkpoints" / "last")
    assert processor.images([out / "sample.png"]).shape[-1] == model.config.vision.image_size


def test_the_page_shows_everything_and_needs_no_network(short) -> None:
    out, _ = short
    html = (out / "report.html").read_text(encoding="utf-8")
    for heading in ("Captions", "Wrong captions", "Retrieval", "The run"):
        assert f"<h2>{heading}</h2>" in html
    assert html.count("<svg") >= 2
    assert html.count("data:image/png;base64,") > 20
    assert "http" not in html


def test_a_folder_that_holds_a_quickstart_is_left_alone(short) -> None:
    out, _ = short
    before = (out / "results.json").read_bytes()
    with pytest.raises(ValueError, match="is there already"):
        quickstart(out, SHORT, command="contracap quickstart")
    assert (out / "results.json").read_bytes() == before


def test_the_recipe_is_found_and_names_an_ordinary_run() -> None:
    recipe = load_recipe(find_recipe())
    assert recipe.data.augmentation.flip == 0.0  # left would become right
    assert recipe.loss.captioning > 0 < recipe.loss.contrastive


def test_no_caption_is_cut_by_the_context_of_the_size() -> None:
    """A caption that is cut could never be right."""
    recipe = load_recipe(find_recipe())
    _, processor = load(recipe.size, weights="random", seed=0)
    generator = np.random.default_rng(0)
    captions = [make_caption(random_scene(generator, PAIRS, objects=2), generator) for _ in range(1000)]
    roomy = Tokenizer(context=100, vocab_size=processor.tokenizer.vocab_size)
    assert text_lengths(roomy(captions), roomy.end).max() <= processor.tokenizer.context


def test_only_the_whole_truth_counts_as_a_right_caption(monkeypatch) -> None:
    model, processor = load("scenes", weights="random", seed=0)
    scenes = twin_scenes(np.random.default_rng(0), 4)
    records = scene_records(scenes, np.random.default_rng(0), size=32, captions=1)
    samples = [
        Sample(
            key=key,
            image=members["png"],
            captions=tuple(json.loads(members["json"])["captions"]),
            fields={},
            shard="made here",
        )
        for key, members in records
    ]
    written = [samples[0].captions[0], samples[0].captions[0], "a red thing", samples[3].captions[0]]

    class Writer:
        def __init__(self, *_) -> None: ...

        def __call__(self, sources, *_, **__):
            return [type("Caption", (), {"text": words}) for words in written[: len(sources)]]

    monkeypatch.setattr("contracap.apps.quickstart.Captioner", Writer)
    result = evaluate_scene_captions(model, processor, samples)
    assert result.figures == {"caption_accuracy": 0.5}
    # the second is the first's twin
    assert [correct for _, correct in result.predictions] == [True, False, False, True]


def test_a_wrong_override_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stepz"):
        quickstart(tmp_path / "out", ["stepz=3"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_quickstart_reaches_its_targets(tmp_path: Path) -> None:
    threads = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "contracap", "quickstart", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=threads)
    assert done.returncode == 0, done.stderr
    assert "recall@1" in done.stdout
    figures = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["figures"]
    assert not [name for name in NAMES - {"seconds"} if figures[name] < TARGETS[name]], figures


def test_scenes_that_were_not_all_drawn_are_drawn_anew(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "scenes.partial" / "train").mkdir(parents=True)
    (tmp_path / "scenes.partial" / "train" / "000099.tar").write_bytes(b"of another call")

    def trained(recipe) -> Path:
        assert [path.name for path in (tmp_path / "scenes" / "train").iterdir()] == ["000000.tar"]
        raise Interrupted("here")

    monkeypatch.setattr("contracap.apps.quickstart.train", trained)
    for name, value in FEW.items():
        monkeypatch.setattr(contracap.apps.quickstart, name, value)
    with pytest.raises(Interrupted, match="here"):
        quickstart(tmp_path, SHORT)
