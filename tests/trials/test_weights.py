"""Weights as training programs, hubs and browsers leave them."""

from pathlib import Path

import pytest
import torch

from contracap import load
from contracap.cli import main
from contracap.data.config import DataConfig
from contracap.pretrained import read_weights
from contracap.pretrained.errors import WeightsError
from contracap.pretrained.open_clip_names import to_open_clip
from contracap.pretrained.tensors import read_tensors
from contracap.training.initial_model import initial_model
from contracap.training.optimizer import OptimizerConfig
from contracap.training.recipe import Recipe


def assert_same_weights(path: Path, plain: Path) -> None:
    model, _ = load(path)
    expected = torch.load(plain, weights_only=True)
    found = to_open_clip(model.state_dict(), model.config)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "name",
    [
        "plain.pt",
        "wrapped.pt",
        "module.pt",
        "orig_mod.pt",
        "module_orig_mod.pt",
        "orig_mod_module.pt",
        "module.safetensors",
        "orig_mod.safetensors",
        "under_model.pt",
        "under_model_state_dict.pt",
        "with_ema.pt",
        "lightning.ckpt",
        "lightning.pt",
        "open_clip_2.pt",
        "open_clip_3.pt",
        "folder",
        "logs/run",
        "logs/run/checkpoints",
    ],
)
def test_every_layout_gives_the_same_weights(trial, name: str) -> None:
    folder = trial("weights")
    assert_same_weights(folder / name, folder / "plain.pt")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("lfs.safetensors", "git lfs pull"),
        ("lfs.bin", "git lfs pull"),
        ("html.bin", "web page"),
        ("with_namespace.pt", "argparse.Namespace"),
        ("cut.safetensors", "cut off"),
        ("cut.pt", "cut off"),
    ],
)
def test_what_is_not_weights_is_called_what_it_is(trial, capsys, name: str, word: str) -> None:
    path = trial("weights") / name
    assert main(["weights", "inspect", str(path)]) == 1
    error = capsys.readouterr().err
    assert word in error and str(path) in error and error.count("\n") == 1
    assert "weights_only" not in error and "\x1b" not in error


def test_a_file_for_larger_images_is_read_at_their_size(trial) -> None:
    path = trial("weights") / "larger_pictures.pt"
    model, processor = load(path)
    assert model.config.vision.image_size == processor.image_config.size == 64
    features = model.encode_image(torch.zeros(1, 3, 64, 64))
    assert features.isfinite().all()


def test_a_run_that_starts_from_it_interpolates_the_positions_to_its_own_image_size(trial) -> None:
    recipe = Recipe(
        size="tiny",
        steps=1,
        out="none",
        initialise_from=str(trial("weights") / "larger_pictures.pt"),
        data=DataConfig(train="none", batch_size=2),
        optimizer=OptimizerConfig(warmup_steps=0),
    )
    model, image = initial_model(recipe)
    assert model.vision.position.shape == (1 + 16, 48) and image.size == 32


def test_a_configuration_for_another_grid_says_so(trial, tmp_path: Path) -> None:
    folder = trial("weights")
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes((folder / "larger_pictures.pt").read_bytes())
    (tmp_path / "open_clip_config.json").write_bytes((folder / "folder" / "open_clip_config.json").read_bytes())
    with pytest.raises(WeightsError, match="only the grid of the image positions differs"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["half.safetensors", "bfloat16.safetensors"])
def test_other_precisions_are_read(trial, name: str) -> None:
    model, _ = load(trial("weights") / name)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["plain.pt", "module.safetensors"])
def test_tensors_of_a_file_lie_in_memory_as_torch_allocates_it(trial, name: str) -> None:
    for tensors in (read_tensors(trial("weights") / name)[0], read_weights(trial("weights") / name).state):
        assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors.values())
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == len(tensors)
        sizes = (
            (tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()) for tensor in tensors.values()
        )
        assert all(stored == needed for stored, needed in sizes)


@pytest.mark.parametrize("name", ["plain", "mark", "extra-keys"])
def test_a_configuration_of_open_clip_is_read(trial, name: str) -> None:
    model, _ = load(trial("configs") / name)
    assert model.config.text.vocab_size == 1024


@pytest.mark.parametrize(
    ("name", "word"), [("cut", "open_clip_config.json"), ("bilinear", "'bilinear'"), ("no-vocab-size", "vocab_size")]
)
def test_a_configuration_that_cannot_be_used_is_named(trial, capsys, name: str, word: str) -> None:
    assert main(["weights", "convert", str(trial("configs") / name), "out.safetensors"]) == 1
    error = capsys.readouterr().err
    assert word in error and "open_clip_config.json" in error and error.count("\n") == 1
