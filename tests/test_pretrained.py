import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import contracap
from contracap.image import ImageConfig
from contracap.model.sizes import SIZES
from contracap.model.weights import WeightsError, to_open_clip
from contracap.pretrained import load, random_model, read_weights, save, save_open_clip

TINY = SIZES["tiny"]
LEGACY = replace(TINY, text=replace(TINY.text, cls_mask="legacy"))
IMAGE = ImageConfig(size=32, mean=(0.5, 0.5, 0.5), resize="squash")


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return random_model(TINY, seed=1)[0].state_dict()


def assert_holds(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_random_weights_come_only_when_asked_for_and_repeat_with_their_seed() -> None:
    with pytest.raises(WeightsError, match="weights='random'"):
        load("tiny")
    first, processor = contracap.load("tiny", weights="random", seed=3)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert_holds(load("tiny", weights="random", seed=3)[0], first.state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    assert not first.training
    assert processor.texts(["a dog"]).shape == (1, 16)
    other, _ = load("tiny", weights="random", seed=4)
    assert not torch.equal(other.text.token_embedding.weight, first.text.token_embedding.weight)


def test_our_own_file_says_everything_itself(tmp_path: Path, state) -> None:
    save(tmp_path / "model.safetensors", model=TINY, image=IMAGE, state=state)
    for name in (tmp_path / "model.safetensors", tmp_path, str(tmp_path)):
        model, processor = load(name)
        assert model.config == TINY
        assert processor.image_config == IMAGE
        assert_holds(model, state)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_open_clips_folder_is_read_and_written(tmp_path: Path, state) -> None:
    save_open_clip(tmp_path / "hub", model=LEGACY, image=IMAGE, state=state)
    model, processor = load(tmp_path / "hub")
    assert model.config == LEGACY
    assert processor.image_config == IMAGE
    assert_holds(model, state)


@pytest.mark.parametrize("ending", ["safetensors", "bin", "pt"])
def test_a_bare_file_is_matched_against_the_sizes(tmp_path: Path, state, ending: str) -> None:
    path = tmp_path / f"weights.{ending}"
    tensors = to_open_clip(state, TINY)
    if ending == "safetensors":
        save_file(tensors, path)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}}, path)
    for model, _ in (load(path), load("tiny", weights=path)):
        assert model.config == LEGACY
        assert_holds(model, state)


def test_open_clip_reads_what_we_wrote(tmp_path: Path, open_clip) -> None:
    model, processor = load("tiny", weights="random", seed=0)
    config = replace(LEGACY, text=replace(LEGACY.text, context=16))
    save_open_clip(tmp_path, model=config, image=processor.image_config, state=model.state_dict())
    peer = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    ours, _ = load(tmp_path)
    ids = torch.zeros(1, 16, dtype=torch.int64)
    ids[0, :4] = torch.tensor([1022, 7, 8, 1023])
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        theirs, output = peer(pixels, ids), ours(pixels, ids)
    torch.testing.assert_close(output.image_features, theirs["image_features"])
    torch.testing.assert_close(output.text_features, theirs["text_features"])
    torch.testing.assert_close(output.logits[:, :3], theirs["logits"][:, :3])


def test_a_hub_name_is_downloaded_by_the_hubs_library(tmp_path: Path, state, monkeypatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    save_open_clip(tmp_path, model=LEGACY, image=IMAGE, state=state)
    asked = []

    def download(repository: str, name: str, *, revision: str | None) -> str:
        asked.append((repository, revision))
        if not (tmp_path / name).exists():
            raise EntryNotFoundError(name)
        return str(tmp_path / name)

    def offline(*_, **__) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model, _ = load("hf-hub:someone/coca@v2")
    assert_holds(model, state)
    assert set(asked) == {("someone/coca", "v2")}
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(WeightsError, match="the hub does not answer"):
        load("hf-hub:someone/coca")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(WeightsError, match="hf-hub:someone/coca holds no weights"):
        load("hf-hub:someone/coca")


class Malice:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("malice-was-run"),))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pt").write_bytes(pickle.dumps({"x": Malice()}))
    with pytest.raises(WeightsError, match=r"weights\.pt is not a file of plain tensors"):
        load(tmp_path / "weights.pt")
    assert not Path("malice-was-run").exists()


def test_what_is_wrong_with_a_file_is_said_with_its_name(tmp_path: Path, state) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    del state["logit_scale"]
    save(tmp_path / "lacking.safetensors", model=TINY, image=IMAGE, state=state)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.txt").write_text("weights")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "cut.safetensors": "not a readable safetensors file",
        "lacking.safetensors": "1 missing: logit_scale",
        "other.safetensors": "fits no size exactly; name one: coca_ViT-B-32",
        "text.txt": "neither safetensors nor a file of torch",
        "empty": "holds no weights; looked for open_clip_model.safetensors",
        "nowhere": "neither a file, a folder",
    }.items():
        with pytest.raises(WeightsError, match=message) as caught:
            load(tmp_path / name)
        assert name in str(caught.value)


def test_a_size_and_weights_that_contradict_each_other_are_refused(tmp_path: Path, state) -> None:
    save(tmp_path / "tiny.safetensors", model=TINY, image=IMAGE, state=state)
    with pytest.raises(WeightsError, match="holds another model than scenes"):
        load("scenes", weights=tmp_path / "tiny.safetensors")
    save_file(to_open_clip(state, TINY), tmp_path / "foreign.safetensors")
    with pytest.raises(WeightsError, match="missing"):
        load("scenes", weights=tmp_path / "foreign.safetensors")
    with pytest.raises(WeightsError, match="goes with a size"):
        load(tmp_path / "tiny.safetensors", weights="random")


def test_preparation_that_is_not_ours_is_refused(tmp_path: Path, state) -> None:
    save_open_clip(tmp_path, model=LEGACY, image=IMAGE, state=state)
    path = tmp_path / "open_clip_config.json"
    values = json.loads(path.read_text())
    values["preprocess_cfg"]["interpolation"] = "nearest"
    path.write_text(json.dumps(values))
    with pytest.raises(WeightsError, match="interpolation 'nearest' is not supported"):
        read_weights(tmp_path)
