import json
import math
import pickle
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import contracap
from contracap.images import ImageConfig
from contracap.model.sizes import SIZES
from contracap.pretrained import load, random_model, read_weights, save_open_clip, write_weights
from contracap.pretrained.errors import WeightsError
from contracap.pretrained.find import WEIGHT_FILES, find_weights
from contracap.pretrained.open_clip_names import to_open_clip
from contracap.pretrained.shapes import meta_state, shapes_of
from contracap.pretrained.tensors import METADATA_KEY

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
    write_weights(tmp_path / "model.safetensors", model=TINY, image=IMAGE, state=state)
    for name in (tmp_path / "model.safetensors", tmp_path, str(tmp_path)):
        model, processor = load(name)
        assert model.config == TINY
        assert processor.image_config == IMAGE
        assert_holds(model, state)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_state_dict_of_our_own_names_is_read_by_its_shapes_or_by_a_size(tmp_path: Path, state) -> None:
    torch.save(state, tmp_path / "tiny.pt")
    torch.save({"model": state}, tmp_path / "checkpoint.pt")
    for name, size in (("tiny.pt", None), ("checkpoint.pt", "tiny")):
        found = read_weights(tmp_path / name, size=size)
        assert (found.layout, found.model) == ("contracap", TINY)
        assert_holds(load(tmp_path / name, size=size)[0], state)
    other = {**state, "logit_scale": torch.zeros(3)}
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="fits no known size"):
        load(tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="1 misshapen: logit_scale"):
        load(tmp_path / "other.pt", size="tiny")


def test_open_clips_folder_is_read_and_written(tmp_path: Path, state) -> None:
    save_open_clip(tmp_path / "hub", model=LEGACY, image=IMAGE, state=state)
    model, processor = load(tmp_path / "hub")
    assert model.config == LEGACY
    assert processor.image_config == IMAGE
    assert_holds(model, state)


def test_a_bare_file_is_matched_against_the_sizes(tmp_path: Path, state) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(to_open_clip(state, TINY), path)
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
    ids[0, :6] = torch.tensor([1022, 7, 0, 8, 9, 1023])  # id 0 inside: docs/decisions/0003-cls-mask.md
    with torch.no_grad():
        assert (peer.encode_text(ids, normalize=True) - ours.encode_text(ids)).norm() > 0.01


def test_a_hub_name_is_downloaded_by_the_hubs_library(tmp_path: Path, state, monkeypatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    save_open_clip(tmp_path, model=LEGACY, image=IMAGE, state=state)
    asked = []

    def download(repository: str, name: str, *, revision: str | None) -> str:
        asked.append((repository, revision))
        if not (tmp_path / name).exists():
            raise EntryNotFoundError(name)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model, _ = load("hf-hub:someone/coca@v2")
    assert_holds(model, state)
    assert set(asked) == {("someone/coca", "v2")}
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(WeightsError, match="hf-hub:someone/coca holds no weights"):
        load("hf-hub:someone/coca")


def fill_cache(repository: str, folder: Path, files: dict[str, Path], absent: tuple[str, ...] = ()) -> None:
    cached = folder / f"models--{repository.replace('/', '--')}"
    for name in ("refs", "snapshots/abc", ".no_exist/abc"):
        (cached / name).mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    for name, source in files.items():
        (cached / "snapshots" / "abc" / name).write_bytes(source.read_bytes())
    for name in absent:
        (cached / ".no_exist" / "abc" / name).touch()


def test_what_the_hubs_cache_holds_is_loaded_offline(tmp_path: Path, state, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    write_weights(tmp_path / "ours.safetensors", model=TINY, image=IMAGE, state=state)
    save_open_clip(tmp_path / "theirs", model=LEGACY, image=IMAGE, state=state)
    torch.save(to_open_clip(state, TINY), tmp_path / "pickle.bin")
    configuration = {"open_clip_config.json": tmp_path / "theirs" / "open_clip_config.json"}
    for name, files, absent in (
        ("a/pickle", configuration | {"open_clip_pytorch_model.bin": tmp_path / "pickle.bin"}, ()),
        ("a/ours", {"model.safetensors": tmp_path / "ours.safetensors"}, ("open_clip_config.json",)),
        ("a/unmarked", {"model.safetensors": tmp_path / "ours.safetensors"}, ()),
        ("laion/CoCa-ViT-B-32-laion2B-s13B-b90k", {"open_clip_pytorch_model.bin": tmp_path / "pickle.bin"}, ()),
    ):
        fill_cache(name, tmp_path / "cache", files, absent)
        assert_holds(load(f"hf-hub:{name}")[0], state)
    assert_holds(load("coca_ViT-B-32/laion2b")[0], state)
    with pytest.raises(WeightsError, match="the hub does not answer"):
        load("hf-hub:a/nothing")
    fill_cache("a/data", tmp_path / "cache", {}, ("open_clip_config.json", *WEIGHT_FILES))
    with pytest.raises(WeightsError, match="hf-hub:a/data holds no weights"):
        load("hf-hub:a/data")


def test_a_run_stands_for_its_last_checkpoint(tmp_path: Path, state, caplog) -> None:
    checkpoints = tmp_path / "quickstart" / "run" / "checkpoints"
    for step in (9, 10):
        filled = {name: torch.full_like(tensor, step) for name, tensor in state.items()}
        write_weights(checkpoints / f"step-{step}" / "model.safetensors", model=TINY, image=IMAGE, state=filled)
    (checkpoints / "step-11.partial").mkdir()
    folders = (checkpoints, checkpoints.parent, tmp_path / "quickstart")
    for folder in folders:
        assert (load(folder)[0].logit_scale).item() == 10
        assert str(checkpoints / "step-10") in caplog.messages[-1]
    (checkpoints / "last").symlink_to("step-9")
    for folder in folders:
        assert (load(folder)[0].logit_scale).item() == 9


def test_a_folder_of_one_file_means_it_and_of_several_asks(tmp_path: Path, state) -> None:
    write_weights(tmp_path / "mine.safetensors", model=TINY, image=IMAGE, state=state)
    assert_holds(load(tmp_path)[0], state)
    write_weights(tmp_path / "other.safetensors", model=TINY, image=IMAGE, state=state)
    with pytest.raises(WeightsError, match=r"mine\.safetensors or .*other\.safetensors"):
        load(tmp_path)


def test_an_average_with_the_weights_is_left_out(tmp_path: Path, state) -> None:
    theirs = to_open_clip(state, TINY)
    average = {f"ema_model.{name}": tensor + 1 for name, tensor in theirs.items()}
    torch.save(average | {f"model.{name}": tensor for name, tensor in theirs.items()}, tmp_path / "both.pt")
    torch.save({"state_dict_ema": {"n_averaged": torch.tensor(3), **average}}, tmp_path / "average.pt")
    assert_holds(load(tmp_path / "both.pt")[0], state)
    assert load(tmp_path / "average.pt")[0].logit_scale == state["logit_scale"] + 1


def test_a_vocabulary_that_no_tokenizer_has_is_said_with_the_files_name(tmp_path: Path) -> None:
    config = replace(TINY, text=replace(TINY.text, vocab_size=50000))
    state = {name: torch.zeros(shape) for name, shape in shapes_of(meta_state(config)).items()}
    write_weights(tmp_path / "large.safetensors", model=config, image=IMAGE, state=state)
    with pytest.raises(WeightsError, match=r"large\.safetensors: .*50000"):
        load(tmp_path / "large.safetensors")


def test_a_checkpoint_of_a_released_size_keeps_the_mask_it_was_trained_with(tmp_path: Path, monkeypatch, state) -> None:
    monkeypatch.setitem(SIZES, "tiny", LEGACY)
    write_weights(tmp_path / "model.safetensors", model=TINY, image=IMAGE, state=state)
    for model, _ in (load(tmp_path), load("tiny", weights=tmp_path)):
        assert model.config == TINY


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
    write_weights(tmp_path / "lacking.safetensors", model=TINY, image=IMAGE, state=state)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "null.safetensors", metadata={METADATA_KEY: "null"})
    state["logit_scale"] = torch.tensor(math.nan)
    write_weights(tmp_path / "nan.safetensors", model=TINY, image=IMAGE, state=state)
    (tmp_path / "text.txt").write_text("weights")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "cut.safetensors": "not a readable safetensors file",
        "lacking.safetensors": "1 missing: logit_scale",
        "null.safetensors": "its configuration cannot be used: not a JSON object",
        "nan.safetensors": "logit_scale holds NaN or infinity",
        "other.safetensors": "fits no known size: name one with --size: coca_ViT-B-32",
        "text.txt": "neither safetensors nor a file of torch",
        "empty": "holds no weights; looked for open_clip_model.safetensors",
        "nowhere": "neither a file, a folder",
    }.items():
        with pytest.raises(WeightsError, match=message) as caught:
            load(tmp_path / name)
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("coca_ViT-B-32", "a size, not weights: give coca_ViT-B-32/laion2b, coca_ViT-B-32/mscoco, a file"),
        ("coca_ViT-B32", "did you mean 'coca_ViT-B-32/"),
        ("hf-hub:a/b/c", "write hf-hub:organisation/name"),
    ],
)
def test_a_name_without_weights_is_answered_with_one_that_has_them(name: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        find_weights(name)


def test_a_size_and_weights_that_contradict_each_other_are_refused(tmp_path: Path, state) -> None:
    write_weights(tmp_path / "tiny.safetensors", model=TINY, image=IMAGE, state=state)
    with pytest.raises(WeightsError, match="holds another model than scenes"):
        load("scenes", weights=tmp_path / "tiny.safetensors")
    save_file(to_open_clip(state, TINY), tmp_path / "foreign.safetensors")
    with pytest.raises(WeightsError, match="missing"):
        load("scenes", weights=tmp_path / "foreign.safetensors")
    with pytest.raises(WeightsError, match="goes with a size"):
        load(tmp_path / "tiny.safetensors", weights="random")
    with pytest.raises(WeightsError, match="size="):
        load("tiny", weights="random", size="scenes")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("interpolation", "nearest", "interpolation 'nearest' is not supported"),
        ("mode", "L", "mode = 'L'"),
        ("size", [32, 48], r"size = \[32, 48\]"),
        ("resize_mode", "longest", "resize"),
        ("a_key_of_next_year", 1, "a_key_of_next_year = 1"),
    ],
)
def test_preparation_that_is_not_ours_is_refused(tmp_path: Path, state, key: str, value, message: str) -> None:
    save_open_clip(tmp_path, model=LEGACY, image=IMAGE, state=state)
    path = tmp_path / "open_clip_config.json"
    values = json.loads(path.read_text())
    values["preprocess_cfg"][key] = value
    path.write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path)


def test_a_saved_model_loads_as_it_was(tmp_path: Path) -> None:
    model, processor = contracap.load("tiny", weights="random", seed=3)
    contracap.save(tmp_path / "mine.safetensors", model, processor)
    again, its_processor = contracap.load(tmp_path / "mine.safetensors")
    assert again.config == model.config and its_processor.image_config == processor.image_config
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(WeightsError, match=r"must end in \.safetensors"):
        contracap.save(tmp_path / "mine.bin", model, processor)


def test_weights_that_do_not_fit_the_disk_are_an_error_with_the_files_name(tmp_path: Path) -> None:
    model, processor = contracap.load("tiny", weights="random")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            contracap.save(tmp_path / "out.safetensors", model, processor)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == f"File too large: {tmp_path / 'out.safetensors'}"
    assert list(tmp_path.iterdir()) == []
