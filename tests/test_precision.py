"""The device and precision in which a model is used."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import contracap
from contracap.data.shards import write_shard
from contracap.generation import BeamSearch, Captioner, Greedy
from contracap.model.coca import CoCa
from contracap.model.onednn import HAS_ONEDNN
from contracap.pretrained.devices import convert, place
from contracap.pretrained.errors import WeightsError
from contracap.processor import Processor

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="this torch has no oneDNN")


def in_precision(name: str) -> tuple[CoCa, Processor]:
    return contracap.load("tiny", weights="random", seed=3, device="cpu", precision=name)


def half() -> CoCa:
    """A model whose parameters are bf16, as on a GPU."""
    model, _ = in_precision("fp32")
    convert(model, torch.bfloat16)
    return model


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with three images."""
    (tmp_path / "images").mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def shards(images: Path, tmp_path: Path) -> Path:
    """A shard of the images, with captions."""
    samples = [
        (file.stem, {"png": file.read_bytes(), "txt": f"image {file.stem}".encode()})
        for file in sorted(images.iterdir())
    ]
    write_shard(tmp_path / "0.tar", samples)
    return tmp_path / "0.tar"


@pytest.fixture
def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 32, 32, generator=generator)


@needs_onednn
@pytest.mark.parametrize("make", [lambda: in_precision("bf16")[0], half], ids=["cpu", "gpu"])
@torch.inference_mode()
def test_embeddings_and_scale_are_float32_in_bf16_and_close_to_those_in_fp32(make, pixels: Tensor) -> None:
    (exact, processor), model = in_precision("fp32"), make()
    texts = processor.texts(["a red circle", "a blue square"])
    for ours, theirs in (
        (model.encode_image(pixels), exact.encode_image(pixels)),
        (model.encode_text(texts), exact.encode_text(texts)),
    ):
        assert ours.dtype == torch.float32
        assert not torch.equal(ours, theirs)
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=0)
    assert torch.equal(model.logit_scale, exact.logit_scale)


@needs_onednn
@pytest.mark.parametrize(
    ("make", "strategy"),
    [(lambda: in_precision("bf16")[0], BeamSearch(max_tokens=12)), (half, Greedy(max_tokens=12))],
    ids=["cpu", "gpu"],
)
@torch.inference_mode()
def test_scores_of_bf16_captions_are_those_of_their_tokens(make, strategy, pixels: Tensor) -> None:
    """What the cache has computed step by step equals one pass over the whole text."""
    model, (_, processor) = make(), in_precision("fp32")
    for image, caption in zip(pixels, Captioner(model, processor).generate(pixels, strategy), strict=True):
        ids = torch.tensor([[processor.tokenizer.start, *caption.token_ids]])
        logits = model(image[None], ids).logits[0, : ids.shape[1] - 1].float()
        whole = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
        assert caption.log_probability == pytest.approx(float(whole), abs=0.3)


@needs_onednn
@torch.no_grad()
def test_a_model_in_bf16_can_be_copied_and_follows_its_weights(pixels: Tensor) -> None:
    model, _ = in_precision("bf16")
    before = model.encode_image(pixels)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(copied.encode_image(pixels), before)
    other, _ = contracap.load("tiny", weights="random", seed=4, device="cpu", precision="bf16")
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.encode_image(pixels), other.encode_image(pixels))


def test_rounded_weights_are_not_saved(tmp_path: Path) -> None:
    _, processor = in_precision("fp32")
    with pytest.raises(WeightsError, match="load with precision='fp32'"):
        contracap.save(tmp_path / "m.safetensors", half(), processor)


@needs_onednn
def test_a_model_in_bf16_is_saved_as_it_was_loaded(tmp_path: Path) -> None:
    model, processor = in_precision("bf16")
    contracap.save(tmp_path / "m.safetensors", model, processor)
    again, _ = contracap.load(tmp_path / "m.safetensors")
    exact, _ = in_precision("fp32")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in exact.state_dict().items())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"device": "cuda:77"}, "this machine has no device 'cuda:77'"),
        ({"device": "meta"}, "this machine has no device 'meta'"),
        ({"device": "hpu"}, "this machine has no device 'hpu'"),
        ({"device": "mkldnn"}, "this machine has no device 'mkldnn'"),
        ({"precision": "fp16"}, "'fp16' does not work on this CPU"),
    ],
)
def test_what_the_machine_cannot_do_is_one_line(asked: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contracap.load("tiny", weights="random", **{"device": "cpu"} | asked)


@needs_onednn
def test_a_compiled_captioner_is_not_in_bf16_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="compiled steps compute in fp32"):
        Captioner(*in_precision("bf16"), compiled=True)


def test_auto_on_a_cpu_is_fp32() -> None:
    model, _ = contracap.load("tiny", weights="random", device="cpu")
    assert model.precision == "fp32" and model.logit_scale.dtype == torch.float32


@needs_onednn
@pytest.mark.parametrize(
    "words",
    [
        ["caption", "{weights}", "{images}", "--out", "{out}/c.jsonl", "--strategy", "greedy"],
        ["classify", "{weights}", "{images}", "--labels", "red", "blue"],
        ["embed", "{weights}", "{images}", "--out", "{out}/e.npz"],
        ["evaluate", "{weights}", "--task", "retrieval", "--data", "{shards}"],
    ],
    ids=lambda words: words[0],
)
def test_every_verb_computes_in_the_precision_asked_for(
    run, weights: Path, images: Path, shards: Path, tmp_path: Path, monkeypatch, words: list[str]
) -> None:
    seen = []
    monkeypatch.setattr(
        "contracap.pretrained.models.place", lambda model, **asked: seen.append(asked) or place(model, **asked)
    )
    names = {"weights": weights, "images": images, "shards": shards, "out": tmp_path}
    status, _, err = run(*(word.format(**names) for word in words), "--precision", "bf16", "--device", "cpu")
    assert status == 0, err
    assert seen == [{"device": CPU, "precision": "bf16"}]


@needs_onednn
def test_an_output_goes_on_in_no_other_precision(run, weights: Path, images: Path, tmp_path: Path) -> None:
    words = ("caption", weights, images, "--out", tmp_path / "c.jsonl", "--strategy", "greedy", "--device", "cpu")
    assert run(*words)[0] == 0
    (images / "another.png").write_bytes(next(images.glob("*.*")).read_bytes())
    status, _, err = run(*words, "--precision", "bf16")
    assert status == 1 and "precision: 'fp32' -> 'bf16'" in err
