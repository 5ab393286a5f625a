"""Mixtures of the weights before and after fine-tuning, and the curve of both skills."""

import json
from pathlib import Path

import pytest
import torch

from contracap.apps.sweep import Sweep
from contracap.model.sizes import SIZES
from contracap.pretrained import load, random_model, read_weights, write_weights
from tests.conftest import Run
from tests.model.tiny_models import with_pooler

TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Weights of the same size, from two seeds."""
    folder = tmp_path_factory.mktemp("ends")
    for seed in (0, 1):
        model, processor = random_model(TINY, seed=seed)
        path = folder / f"{seed}.safetensors"
        write_weights(path, model=TINY, image=processor.image_config, state=model.state_dict())
    return folder / "0.safetensors", folder / "1.safetensors"


def test_a_mixture_lies_on_the_line_between_both_weights(run: Run, ends: tuple[Path, Path], tmp_path: Path) -> None:
    before, after = (read_weights(end).state for end in ends)
    for alpha in (0.0, 0.25, 1.0):
        out = tmp_path / f"{alpha}.safetensors"
        status, said, _ = run("weights", "mix", *ends, "--alpha", alpha, "--out", out)
        assert status == 0 and str(out) in said
        mixed, _ = load(out)
        for name, tensor in mixed.state_dict().items():
            expected = before[name].double() + alpha * (after[name].double() - before[name].double())
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)
            assert alpha not in (0.0, 1.0) or torch.equal(tensor, (before, after)[int(alpha)][name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--alpha", "1.5"], "alpha is 1.5; it must be from 0"),
        (["--alpha", "nan"], "alpha is nan"),
        (["--out", "mixed.pt"], "does not end in .safetensors"),
        (["--out", "START"], "would take the place of another file"),
        (["FINETUNED", "other"], r"different models: model.pooler.kind is shared and cascade"),
    ],
)
def test_mixtures_that_cannot_be_are_refused_before_anything_is_written(
    run: Run, ends: tuple[Path, Path], tmp_path: Path, change: list[str], message: str
) -> None:
    other = tmp_path / "other.safetensors"
    model, processor = random_model(with_pooler("cascade"), seed=0)
    write_weights(other, model=model.config, image=processor.image_config, state=model.state_dict())
    call = {"START": ends[0], "FINETUNED": ends[1], "--out": tmp_path / "mixed.safetensors"}
    key, value = change
    call[key] = {"START": ends[0], "other": other}.get(value, value)
    start, finetuned = call.pop("START"), call.pop("FINETUNED")
    status, _, error = run("weights", "mix", start, finetuned, *(word for pair in call.items() for word in pair))
    assert status == 1 and message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


@pytest.fixture
def tasks(colours: Path, tmp_path: Path) -> Path:
    file = tmp_path / "tasks.toml"
    file.write_text(
        f'[tasks.captions]\ntask = "captioning"\ndata = "{colours}"\nstrategy = "greedy"\nmetrics = ["cider"]\n'
        f'[tasks.pairs]\ntask = "retrieval"\ndata = "{colours}"\n'
    )
    return file


def test_a_sweep_measures_both_skills_along_the_line(
    run: Run, ends: tuple[Path, Path], tasks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    status, said, _ = run("weights", "sweep", *ends, "--tasks", tasks, "--alphas", 0, 0.5, 1, "--out", out)
    assert status == 0 and said.count("<- knee") == 1
    found = json.loads((out / "sweep.json").read_text())
    assert found["alphas"] == [0, 0.5, 1]
    assert (found["new"], found["kept"]) == ("captions/CIDEr", "pairs/text_to_image_recall@5")
    for end, place in ((ends[0], 0), (ends[1], 2)):
        result = tmp_path / "result.json"
        assert run("evaluate", end, "--tasks", tasks, "--json", result)[0] == 0
        for name, value in json.loads(result.read_text())["figures"].items():
            assert found["figures"][name][place] == pytest.approx(value, abs=1e-9)
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG") and b"</svg>" in (out / "sweep.svg").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alphas", "0", "1"], "at least one between"),
        (["--alphas", "1", "0.5", "0"], "must rise from 0 to 1"),
        (["--alphas", "0", "0.5", "1", "--kept", "pairs/acc1"], "--kept: no task has the figure pairs/acc1; there are"),
    ],
)
def test_sweeps_that_cannot_be_are_refused(
    run: Run, ends: tuple[Path, Path], tasks: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    status, _, error = run("weights", "sweep", *ends, "--tasks", tasks, *arguments, "--out", tmp_path / "sweep")
    assert status == 1 and message in error
    assert not (tmp_path / "sweep" / "sweep.json").exists()


def test_the_knee_is_the_point_farthest_beyond_the_line_between_the_ends() -> None:
    figures = {"new": [0.0, 8.0, 9.0, 10.0], "kept": [0.9, 0.8, 0.5, 0.1]}
    assert Sweep(alphas=[0.0, 0.4, 0.7, 1.0], figures=figures, new="new", kept="kept").knee == 0.4
    flat = {"new": [1.0, 1.0, 1.0], "kept": [1.0, 1.0, 1.0]}
    assert Sweep(alphas=[0.0, 0.5, 1.0], figures=flat, new="new", kept="kept").knee == 0.0
