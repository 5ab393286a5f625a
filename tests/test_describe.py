"""classify and embed: what is in an image, without a text."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import contracap
from contracap.cli import main
from contracap.data.shards import write_shard


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "inside").mkdir(parents=True)
    for name, colour in (("a.png", "red"), ("b.png", "green"), ("inside/c.png", "blue")):
        Image.new("RGB", (40, 30), colour).save(folder / name)
    return folder


def test_classify_gives_each_image_the_softmax_over_its_labels(weights, images, tmp_path, capsys) -> None:
    labels = ["a red one", "a blue one", "a green one"]
    out = tmp_path / "labels.json"
    words = ["--labels", *labels, "--templates", "{}", "--json", str(out)]
    assert main(["classify", str(weights), str(images), *words]) == 0
    model, processor = contracap.load(weights)
    paths = [images / "a.png", images / "b.png", images / "inside" / "c.png"]
    with torch.inference_mode():
        scores = model.encode_image(processor.images(paths)) @ model.encode_text(processor.texts(labels)).T
        expected = (model.logit_scale.exp() * scores).softmax(dim=1)
    found = json.loads(out.read_text())["images"]
    assert [row["path"] for row in found] == [str(path) for path in paths]
    torch.testing.assert_close(
        torch.tensor([[row["probabilities"][label] for label in labels] for row in found]), expected
    )
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [(path, label) for path, label, _ in lines] == [
        (str(path), labels[best]) for path, best in zip(paths, expected.argmax(dim=1).tolist(), strict=True)
    ]


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_embed_writes_the_embeddings_of_encode_image(weights: Path, images: Path, tmp_path: Path, suffix: str) -> None:
    (images / "broken.png").write_bytes(b"no image")
    out = tmp_path / f"embeddings.{suffix}"
    assert main(["embed", str(weights), str(images), "--out", str(out), "--batch-size", "2"]) == 1  # the broken one
    if suffix == "npz":
        with np.load(out) as content:
            paths, embeddings = content["paths"].tolist(), content["embeddings"]
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        columns = parquet.read_table(out).to_pydict()
        paths, embeddings = columns["path"], np.array(columns["embedding"], dtype=np.float32)
    assert paths == [str(images / name) for name in ("a.png", "b.png", "inside/c.png")]
    model, processor = contracap.load(weights)
    with torch.inference_mode():
        expected = model.encode_image(processor.images(paths))
    torch.testing.assert_close(torch.from_numpy(embeddings), expected)


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_embed_replaces_no_file(weights: Path, images: Path, tmp_path: Path, capsys, suffix: str) -> None:
    out = tmp_path / f"e.{suffix}"
    out.write_bytes(b"mine")
    assert main(["embed", str(weights), str(images), "--out", str(out)]) == 1
    assert f"{out} is there already" in capsys.readouterr().err and out.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["embed", "W", "I", "--out", "x.txt"], ".npz"),
        (["embed", "W", "I", "--out", "x.npz", "--batch-size", "0"], "--batch-size"),
        (["embed", "W", "none.jpg", "--out", "x.npz"], "none.jpg"),
        (["classify", "W", "I", "--labels", "a", "--templates", "no place"], "no place"),
        (["classify", "W", "I", "--labels"], "label"),
    ],
)
def test_a_wrong_call_is_one_line_and_writes_nothing(
    arguments: list[str], word: str, weights: Path, images: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"W": str(weights), "I": str(images)}
    assert main([names.get(argument, argument) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["caption", "W", "images", "--format", "jsonl", "--overwrite", "--out", "images/a.png"],
        ["caption", "W", "list.txt", "--format", "jsonl", "--overwrite", "--out", "images/b.png"],
        ["caption", "W", "images", "--json", "images/b.png"],
        ["classify", "W", "images", "--labels", "a", "b", "--json", "images/inside/c.png"],
        ["caption", "W", "data/*.tar", "--format", "jsonl", "--overwrite", "--out", "data/0.tar"],
        ["evaluate", "W", "--task", "retrieval", "--data", "data", "--json", "data/0.tar"],
        ["shards", "show", "data", "--out", "data/0.tar"],
        ["caption", "data", "images", "--json", "data/model.safetensors"],
        ["weights", "convert", "data", "data/model.safetensors", "--to", "contracap"],
    ],
)
def test_no_output_takes_the_place_of_images_shards_or_weights_that_are_read(
    arguments: list[str], weights: Path, images: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("images/a.png\nimages/b.png\n")
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "0.tar", [("0", {"png": (images / "a.png").read_bytes(), "txt": b"a"})])
    shutil.copy(weights, tmp_path / "data" / "model.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert main([str(weights) if argument == "W" else argument for argument in arguments]) == 1
    assert re.search("would take the place of another|is the file to convert", capsys.readouterr().err)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
