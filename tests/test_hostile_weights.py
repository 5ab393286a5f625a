"""Files of weights that mean harm: each is read or refused by one clear line, soon, without much memory."""

import io
import json
import pickle
import random
import resource
import signal
import struct
import zipfile
from collections.abc import Iterator
from copy import deepcopy
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from contracap.config import to_dict
from contracap.images import ImageConfig
from contracap.model.coca import CoCaConfig
from contracap.model.sizes import SIZES
from contracap.pretrained import load, random_model, save_open_clip, with_cls_mask, write_weights
from contracap.pretrained.errors import WeightsError
from contracap.pretrained.open_clip_names import to_open_clip
from contracap.pretrained.tensors import read_tensors
from tests.model.tiny_models import tiny_mammut

TINY = SIZES["tiny"]
SECONDS = 20  # for one file, on a busy machine
SPARE = 2**30  # bytes of address space beyond what the process has
VALUES: list[object] = [
    0, -1, -2, 1, 3, 10**6, 2**31, 2**63, 10**30, 10**400, 0.5, -4.0, 1e308, float("nan"), float("inf"), True, None,
    "", "12", "\x1b[31mred", [], [2], {}, {"a": 1}, [[[[]]]],
]  # fmt: skip


@pytest.fixture(autouse=True)
def bounds() -> Iterator[None]:
    """A test that hangs, or wants more memory than a tiny model needs, fails."""

    def late(*_: object) -> None:
        pytest.fail(f"not read within {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return random_model(TINY, seed=0)[0].state_dict()


def is_read(path: Path) -> bool:
    """Whether a file is read. If not, it was refused as a user wants it."""
    signal.alarm(SECONDS)
    try:
        load(path)
    except WeightsError as error:
        assert str(error).isprintable() and len(str(error)) < 5000 and path.name in str(error)
        return False
    finally:
        signal.alarm(0)
    return True


def places(values: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in values.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from places(value, (*path, name))


def put(values: dict, path: tuple[str, ...], value: object) -> dict:
    changed = inner = deepcopy(values)
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return changed


def changed(values: dict) -> Iterator[dict]:
    """Each value of a configuration in turn, replaced by a hostile one, and each size by more of them."""
    shuffled = random.Random(0).sample(VALUES, len(VALUES))
    for path, value in zip(places(values), cycle(shuffled), strict=False):
        yield put(values, path, value)
    for path in places(values):
        if path[-1] in ("layers", "heads", "width", "mlp_ratio", "image_size", "patch_size"):
            for value in (0, -2, 10**12, 1e300):
                yield put(values, path, value)


def test_configurations_of_our_own_that_mean_harm(tmp_path: Path, state) -> None:
    path = tmp_path / "model.safetensors"
    values = {"model": to_dict(TINY), "image": to_dict(ImageConfig(size=32))}
    each_changed = list(changed(values))
    assert len(each_changed) > 60
    for each in each_changed:
        save_file(state, path, metadata={"contracap": json.dumps(each)})
        is_read(path)
    for text in ("[" * 50_000, '{"model":' * 9_000, "1" * 90_000, "nan", "[]", '"x"', "{}", "x" * 10**6, "\x1b[2J"):
        save_file(state, path, metadata={"contracap": text})
        assert not is_read(path)


@pytest.mark.parametrize(
    "model",
    [with_cls_mask(TINY, "legacy"), tiny_mammut(feed_forward_before_cross=False)],
    ids=["coca", "mammut"],
)
def test_configurations_of_open_clip_that_mean_harm(tmp_path: Path, model: CoCaConfig) -> None:
    state = random_model(model, seed=0)[0].state_dict()
    save_open_clip(tmp_path, model=model, image=ImageConfig(size=32), state=state)
    path = tmp_path / "open_clip_config.json"
    values = json.loads(path.read_text())
    assert is_read(tmp_path / "open_clip_model.safetensors")
    each_changed = list(changed(values))
    assert len(each_changed) > 60
    for each in each_changed:
        path.write_text(json.dumps(each))
        is_read(tmp_path)
    for content in (b"[" * 50_000, b"\xff\xfe", b"", b"[]", b" " * 10**6 + b"{}", b'{"model_cfg": 5}', b"9" * 9999):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="open_clip_config"):
            load(tmp_path)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(32, 32, dtype=torch.uint16),
        torch.zeros(32, 32, dtype=torch.complex64),
        torch.zeros(32, 32, dtype=torch.float8_e4m3fn),
        torch.zeros(0),
        torch.zeros(32, 32, 1, 1),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tensor.ndim}",
)
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_tensors_of_another_kind(tmp_path: Path, state, tensor: torch.Tensor, ending: str) -> None:
    path, tensors = tmp_path / f"model.{ending}", {**to_open_clip(state, TINY), "text.text_projection": tensor}
    save_file(tensors, path) if ending == "safetensors" else torch.save(tensors, path)
    assert not is_read(path)
    if ending == "safetensors":
        write_weights(path, model=TINY, image=ImageConfig(size=32), state={**state, "text.projection.weight": tensor})
        assert not is_read(path)


def test_a_small_file_cannot_hold_large_tensors(tmp_path: Path) -> None:
    torch.save({"logit_scale": torch.zeros(1).expand(2**40)}, tmp_path / "stride.pt")
    torch.save({"logit_scale": torch.zeros(4, device="meta")}, tmp_path / "meta.pt")
    torch.save({"logit_scale": torch.zeros(10**6).to_sparse()}, tmp_path / "sparse.pt")
    packed, plain = io.BytesIO(), io.BytesIO()
    torch.save({"logit_scale": torch.zeros(10**7)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    (tmp_path / "bomb.pt").write_bytes(packed.getvalue())
    with zipfile.ZipFile(tmp_path / "names.pt", "w") as target:
        target.writestr("archive/data.pkl", b"\x80\x02" + b"(" * 2**24)
    for name in ("stride", "meta", "sparse", "bomb", "names"):
        assert not is_read(tmp_path / f"{name}.pt")


def test_damaged_files(tmp_path: Path, state) -> None:
    sources = {"model.safetensors": tmp_path / "a.safetensors", "model.pt": tmp_path / "a.pt"}
    write_weights(sources["model.safetensors"], model=TINY, image=ImageConfig(size=32), state=state)
    torch.save(to_open_clip(state, TINY), sources["model.pt"])
    draw = random.Random(0)
    for name, source in sources.items():
        whole, path = source.read_bytes(), tmp_path / name
        for _ in range(40):
            place, length = draw.randrange(len(whole)), draw.choice([0, 1, 8, 100, len(whole)])
            bytes_ = b"" if draw.random() < 0.3 else draw.randbytes(min(length, 8))
            head = draw.random() < 0.5  # where the structure is
            place = place % 2_000 if head else place
            path.write_bytes(whole[:place] + bytes_ + whole[place + length :])
            signal.alarm(SECONDS)
            try:
                read_tensors(path)
            except WeightsError as error:
                assert str(error).isprintable() and "weights_only" not in str(error)
            signal.alarm(0)


def test_names_and_structures_that_mean_harm(tmp_path: Path, state) -> None:
    path, tensor, theirs = tmp_path / "model.pt", torch.zeros(1), to_open_clip(state, TINY)
    circle: dict = {}
    circle["state_dict"] = circle
    contents: list[object] = [
        circle, {}, [], 5, None, "text", tensor, [tensor], {"state_dict": [tensor]}, {1: tensor}, {"\x1b[31m": tensor},
        {"x" * 10**5: tensor}, {"." * 10**5 + "logit_scale": tensor}, {"module.a": tensor, "a": tensor + 1},
        {**theirs, "\x1b]0;title\x07": tensor}, {**theirs, None: tensor}, {"\x1b[31mepoch": 3},
        {f"{number}.logit_scale": tensor for number in range(1000)}, {"state_dict": {"state_dict": {"state_dict": 1}}},
    ]  # fmt: skip
    for content in contents:
        torch.save(content, path)
        assert not is_read(path)
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    header = b'{"a":{"dtype":"F32","shape":[9999999999],"data_offsets":[0,4]}}'
    for raw in (
        b"\x80\x02" + b"]" * 9_000 + b"a" * 8_999 + b".",
        b"\x80\x02" + b"(" * 10**4,
        pickle.dumps(range),
        struct.pack("<Q", len(header)) + header + bytes(4),
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 60_000) + b"{" + b'"a":{' * 9_999,
        b"",
        b"\x00" * 4096,
        b"PK\x03\x04" + b"\x00" * 500,
        b"GGUF" + b"\x01" * 300,
    ):
        path.write_bytes(raw)
        assert not is_read(path)


def test_a_long_pickle_of_the_old_format_is_refused_before_it_is_read(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "old.pt"
    state = {"logit_scale": torch.ones(()), "weight": torch.arange(6.0)}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_tensors(path)[0]["weight"], state["weight"])
    monkeypatch.setattr("contracap.pretrained.tensors.MAX_STRUCTURE", 10_000)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("reads it"))
    torch.save(state | {str(number): number for number in range(1000)}, path, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(path, "a") as archive:  # at its end, where zipfile looks for it, and torch does not
        archive.writestr("x", b"")
    with pytest.raises(WeightsError, match="names and shapes take more than 10000 bytes"):
        read_tensors(path)
