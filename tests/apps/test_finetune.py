"""`contracap finetune`: from a folder of images with texts to a fine-tuned captioner."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from contracap.apps.finetune import choose_recipe, hold_out
from contracap.data.loader import evaluation_samples
from contracap.model.sizes import SIZES
from contracap.pretrained import load
from contracap.training.recipe import load_recipe
from tests.conftest import COLOURS, Run
from tests.model.tiny_models import TINY, tiny_mammut, with_pooler

IMAGES = 30
FAST = (
    "steps=60",
    "validate_every=20",
    "evaluation.every=20",
    "checkpoint.every=20",
    "optimizer.warmup_steps=1",
    "optimizer.learning_rate=0.01",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of one colour, each with a text file."""
    folder, noise = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    for number in range(IMAGES):
        name, colour = list(COLOURS.items())[number % 4]
        pixels = np.clip(np.array(colour) + noise.integers(-25, 25, (40, 40, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"it is {name}\n")
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from contracap.cli import main

    out = tmp_path_factory.mktemp("finetune") / "out"
    assert main(["finetune", str(weights), str(folder), *FAST, "--out", str(out), "--quiet"]) == 0
    return out


def test_captions_improve_and_retrieval_is_equal_to_the_bit(finished: Path, folder: Path, weights: Path) -> None:
    figures = json.loads((finished / "results.json").read_text())["figures"]
    assert figures["after/CIDEr"] > figures["before/CIDEr"]
    assert figures["after/text_to_image_recall@5"] == figures["before/text_to_image_recall@5"]
    (before, processor), (after, _) = load(weights), load(finished / "run")
    pixels, ids = processor.images([folder / "0.png"]), processor.texts(["it is red"])
    with torch.inference_mode():
        assert torch.equal(before.encode_image(pixels), after.encode_image(pixels))
        assert torch.equal(before.encode_text(ids), after.encode_text(ids))


def test_held_out_images_are_not_trained_on(finished: Path) -> None:
    parts = [
        {sample.key for sample in evaluation_samples(finished / "data" / name)} for name in ("train", "validation")
    ]
    assert list(map(len, parts)) == [24, 6] and not set.intersection(*parts)


def test_the_page_shows_captions_before_and_after_and_the_recipe_trains_again(finished: Path, run: Run) -> None:
    page = (finished / "report.html").read_text()
    assert page.count("<figure>") == 6 and "reference: it is " in page
    again = load_recipe(finished / "recipe.toml", ["steps=2", f"out={finished / 'again'}", "optimizer.warmup_steps=1"])
    assert again.frozen == ("image", "pooler", "text", "logit_scale")
    status, _, error = run("train", finished / "recipe.toml", f"out={finished / 'again'}", *FAST, "steps=2", "--quiet")
    assert status == 0, error


def test_the_same_call_continues_and_a_finished_one_is_refused(
    finished: Path, folder: Path, weights: Path, run: Run
) -> None:
    (finished / "results.json").rename(finished / "moved.json")
    status, out, _ = run("finetune", weights, folder, *FAST, "--out", finished, "--quiet")
    assert status == 0 and "CIDEr" in out
    found, before = (json.loads((finished / name).read_text())["figures"] for name in ("results.json", "moved.json"))
    assert found == before
    status, _, error = run("finetune", weights, folder, *FAST, "--out", finished)
    assert status == 1 and "is there already" in error


def test_shards_are_used_as_they_are_and_the_last_is_held_out(colours: Path, tmp_path: Path) -> None:
    split = hold_out(colours, tmp_path / "data")
    assert (split.train, split.validation) == ((str(colours / "000.tar"),), (str(colours / "001.tar"),))
    assert (split.images, split.held_out) == (24, 24) and not (tmp_path / "data").exists()


@pytest.mark.parametrize("config", [TINY, with_pooler("cascade"), tiny_mammut(), SIZES["coca_ViT-L-14"]])
def test_a_recipe_describes_any_model(config, tmp_path: Path, colours: Path) -> None:
    recipe = choose_recipe(config, "weights", hold_out(colours, tmp_path), tmp_path)
    assert recipe.model_config == config
    assert recipe.optimizer.learning_rate == (1e-5 if config.text.width > 100 else 1e-4)
    assert bool(recipe.loss.contrastive) == config.is_mammut == (not recipe.frozen)


def test_too_few_images_and_a_model_that_cannot_write_are_refused(run: Run, weights: Path, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, "PNG")
    (tmp_path / "few").mkdir()
    for number in range(3):
        (tmp_path / "few" / f"{number}.png").write_bytes(file.getvalue())
        (tmp_path / "few" / f"{number}.txt").write_text("it is black")
    status, _, error = run("finetune", weights, tmp_path / "few", "--out", tmp_path / "out")
    assert status == 1 and "needs at least 20" in error
    assert not (tmp_path / "out" / "recipe.toml").exists()
