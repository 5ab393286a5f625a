"""The recipes are held to what their heads say, and to their plans."""

import re
from pathlib import Path

import pytest

from contracap.apps.plan.planner import plan_run
from contracap.cli import main
from contracap.config import flatten, to_dict
from contracap.training.recipe import Recipe, load_recipe

FOLDER = Path(__file__).parents[3] / "recipes"
PLANNED = {path.stem: path for path in sorted(FOLDER.glob("*.toml")) if path.stem.startswith(("pretrain", "finetune"))}
assert len(PLANNED) == 11


def head(path: Path) -> str:
    return "".join(line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.startswith("#"))


@pytest.mark.parametrize("name", PLANNED)
def test_the_head_of_a_recipe_plans_it_without_a_warning(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = head(PLANNED[name])
    assert text.startswith(f"# contracap train recipes/{name}.toml\n")
    (command,) = re.findall(rf"^# contracap (plan recipes/{name}\.toml --gpus \d+ --gpu [\w-]+)", text, re.MULTILINE)
    verb, recipe, *options = command.split()
    assert main([verb, str(FOLDER.parent / recipe), *options]) == 0
    assert "warning:" not in capsys.readouterr().out


def test_long_runs_see_thirteen_billion_samples_and_twins_differ_in_the_captioning_loss_alone() -> None:
    long = {
        name: load_recipe(PLANNED[name]) for name in PLANNED if re.fullmatch("pretrain-laion2b-(coca|clip).*", name)
    }
    assert len(long) == 5
    for recipe in long.values():
        assert recipe.steps * recipe.data.batch_size == pytest.approx(13e9, rel=1e-3)
        assert (recipe.optimizer.learning_rate, recipe.optimizer.min_learning_rate) == (1e-3, 0.0)
    coca, clip = (long[f"pretrain-laion2b-{kind}-vit-l-14"] for kind in ("coca", "clip"))
    assert (coca.data, coca.optimizer, coca.steps) == (clip.data, clip.optimizer, clip.steps)
    assert coca.model_config.vision == clip.model_config.vision
    assert (coca.loss.contrastive, coca.loss.captioning, clip.loss.captioning) == (clip.loss.contrastive, 2.0, 0.0)


@pytest.mark.parametrize("size", ["b-32", "l-14"])
def test_a_revised_recipe_differs_from_the_release_in_three_settings(size: str) -> None:
    name = f"pretrain-laion2b-coca-vit-{size}"
    released, revised = (dict(flatten(to_dict(load_recipe(PLANNED[each])))) for each in (name, f"{name}-revised"))
    different = {key for key in released | revised if released.get(key) != revised.get(key)}
    assert different == {"out", "model.text.cls_mask", "optimizer.decayed", "optimizer.clip_norm"}


def test_the_short_run_goes_on_where_its_first_part_ends_at_a_tenth_of_the_cost() -> None:
    first, second = (load_recipe(PLANNED[f"pretrain-laion2b-short-{part}"]) for part in (1, 2))
    assert second.initialise_from == f"{first.out}/checkpoints/last"
    assert (first.model_config.vision.patches, second.model_config.vision.patches) == (64, 256)
    assert (first.data.captions.max_tokens, second.data.captions.max_tokens) == (16, None)
    seen = [recipe.steps * recipe.data.batch_size for recipe in (first, second)]
    assert seen == pytest.approx([2.56e9, 128e6], rel=1e-3)

    def hours(recipe: Recipe) -> float:
        return plan_run(recipe, gpus=64, gpu="a100-80g").figures["gpu_hours"]

    long = plan_run(load_recipe(PLANNED["pretrain-laion2b-coca-vit-l-14"]), gpus=480, gpu="a100-80g")
    assert hours(first) + hours(second) < 0.1 * long.figures["gpu_hours"]


def test_fine_tuning_has_the_settings_of_the_release() -> None:
    alone, both = (load_recipe(PLANNED[name]) for name in ("finetune-coco", "finetune-coco-both-losses"))
    for recipe in (alone, both):
        assert (recipe.data.batch_size, recipe.optimizer.learning_rate) == (128, 1e-5)
        assert recipe.initialise_from is not None and recipe.initialise_from.startswith("hf-hub:laion/CoCa-ViT-L-14")
        assert (recipe.optimizer.warmup_steps, recipe.optimizer.weight_decay) == (1000, 0.1)
    assert (alone.loss.contrastive, alone.loss.captioning) == (0.0, 1.0)
    assert alone.steps * 128 == pytest.approx(414_113, abs=128) and alone.data.captions.use == "all"
    assert both.loss.contrastive > 0 and both.loss.captioning > 0
