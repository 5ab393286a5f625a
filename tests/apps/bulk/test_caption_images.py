import errno
import json
import multiprocessing
import os
import re
import signal
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import contracap
from contracap.cli import main
from contracap.data.shards import write_shard
from contracap.generation import Greedy
from contracap.model.sizes import SIZES
from contracap.pretrained import random_model, save
from tests.apps.bulk.conftest import fill, picture
from tests.conftest import Run

FILES = {"jsonl": "c.jsonl", "csv": "c.csv", "parquet": "c.parquet", "metadata": "pictures/metadata.jsonl"}
QUICK = ["--strategy", "greedy", "--set", "max_tokens=6"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `pictures`: 0.jpg to 4.jpg, and 5.jpg and 6.jpg in a subfolder."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "pictures", [f"{number}.jpg" for number in range(5)] + ["sub/5.jpg", "sub/6.jpg"])
    return tmp_path


@pytest.fixture
def caption(run: Run, varied_weights: Path) -> Run:
    """Captions images with a model that says something else of each, shortly."""

    def call(*arguments: object) -> tuple[int, str, str]:
        return run("caption", varied_weights, *arguments, *QUICK)

    return call


@pytest.fixture(scope="module")
def texts(varied_weights: Path) -> list[str]:
    """What the model says of the images."""
    captioner = contracap.Captioner(*contracap.load(varied_weights))
    return [each.text for each in captioner([picture(number) for number in range(7)], Greedy(max_tokens=6))]


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(path).to_pylist()
    if path.suffix == ".csv":
        import csv

        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("kind", FILES)
def test_each_format_holds_the_captions_in_the_order_of_the_images(
    caption: Run, varied_weights: Path, here: Path, texts: list[str], kind: str
) -> None:
    out = here / FILES[kind]
    words = ["--prefix", "sks, ", "--suffix", "!", "--batch-size", "3"]
    status, told, err = caption("pictures", "--out", out.relative_to(here), "--embed", *words)
    assert (status, err) == (0, "") and told.startswith("7 captions in ")
    rows = rows_of(out)
    names = ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "sub/5.jpg", "sub/6.jpg"]
    paths = names if kind == "metadata" else [f"pictures/{name}" for name in names]
    name, text = ("file_name", "text") if kind == "metadata" else ("path", "caption")
    assert [(row[name], row[text]) for row in rows] == [
        (path, f"sks, {said}!") for path, said in zip(paths, texts, strict=True)
    ]
    vectors = np.load("c.csv.npy") if kind == "csv" else np.array([row["embedding"] for row in rows], dtype=np.float32)
    model, processor = contracap.load(varied_weights)
    expected = model.encode_image(processor.images([picture(number) for number in range(7)])).detach().numpy()
    assert np.allclose(vectors, expected, atol=1e-5)
    assert not [file for file in files(here) if "partial" in file]


def test_side_cars_lie_beside_their_images(caption: Run, here: Path, texts: list[str]) -> None:
    assert caption("pictures", "--format", "sidecar", "--embed", "--ext", ".caption")[0] == 0
    for number in range(7):
        beside = here / "pictures" / ("sub" if number > 4 else "") / f"{number}.caption"
        assert beside.read_text(encoding="utf-8") == " ".join(texts[number].split()) + "\n"
        assert np.load(beside.with_suffix(".npy")).shape == (32,)


def test_images_with_captions_are_skipped_overwritten_or_added_to(caption: Run, here: Path) -> None:
    side_car = here / "pictures" / "1.txt"
    side_car.write_text("mine\n")
    call = ["pictures", "--format", "sidecar"]
    status, told, _ = caption(*call)
    assert status == 0 and told.startswith("6 captions") and "1 had one before" in told
    assert side_car.read_text() == "mine\n"
    assert caption(*call)[1].startswith("0 captions")
    assert caption(*call, "--append")[0] == 0
    assert len(side_car.read_text().splitlines()) == 2 and (here / "pictures" / "0.txt").read_text().count("\n") == 1
    assert caption(*call, "--overwrite")[1].startswith("7 captions")
    assert "mine" not in side_car.read_text()
    status, _, err = caption(*call, "--overwrite", "--append")
    assert status == 1 and "--overwrite and --append exclude each other" in err


def test_no_caption_is_added_to_a_side_car_of_another_encoding(caption: Run, here: Path) -> None:
    encodings = ("utf-16", "utf-16-le", "latin-1")
    before = [f"é{'' if code == 'latin-1' else 'ж'}\n".encode(code) for code in encodings] + [
        "abc\n".encode("utf-16-be")
    ]
    for number, content in enumerate(before):
        (here / "pictures" / f"{number}.txt").write_bytes(content)
    call = ["pictures", "--format", "sidecar", "--embed"]
    status, told, err = caption(*call, "--append")
    assert status == 1 and told.startswith("3 captions") and err.count("is not UTF-8") == err.count("\n") == 4
    assert [(here / "pictures" / f"{number}.txt").read_bytes() for number in range(4)] == before
    assert len(list((here / "pictures").rglob("*.npy"))) == 3
    assert caption(*call, "--overwrite")[0] == 0 and (here / "pictures" / "0.txt").read_text(encoding="utf-8")


def test_broken_images_are_listed_at_the_end_and_tell_the_status(caption: Run, here: Path) -> None:
    (here / "pictures" / "0.jpg").write_bytes(b"\xff\xd8 cut")
    (here / "pictures" / "3.jpg").write_bytes(b"")
    (here / "list.txt").write_text("pictures/1.jpg\npictures/none.jpg\n")
    write_shard(here / "0.tar", [("a", {"jpg": picture(0)}), ("b", {"txt": b"no picture"})])
    status, told, err = caption("pictures", "list.txt", "0.tar", "--out", "c.jsonl", "--json", "result.json")
    assert status == 1 and "3 cannot be used" in told
    lines = err.splitlines()
    assert len(lines) == 3 and all(line.startswith("contracap: error: ") for line in lines)
    assert all(word in line for word, line in zip(("0.jpg", "3.jpg", "none.jpg"), lines, strict=True))
    assert [row["path"] for row in rows_of(here / "c.jsonl")] == [
        *(f"pictures/{name}.jpg" for name in ("1", "2", "4", "sub/5", "sub/6")),
        "0.tar/a",
    ]
    result = json.loads((here / "result.json").read_text())
    assert result["samples"] == 7 and result["figures"]["unreadable"] == 3  # 1.jpg was met twice
    (here / "pictures" / "0.jpg").write_bytes(picture(0))
    status, told, err = caption("pictures", "--out", "c.jsonl")
    assert status == 1 and told.startswith("1 caption ") and err.count("\n") == 1
    assert rows_of(here / "c.jsonl")[-1]["path"] == "pictures/0.jpg"


@pytest.mark.parametrize("kind", ["csv", "metadata"])
def test_names_with_bytes_that_are_no_text_are_told_apart_and_recognised(caption: Run, here: Path, kind: str) -> None:
    folder = here / os.fsdecode(b"pictures\xff") if kind == "metadata" else here / "named"
    fill(folder, [os.fsdecode(name) for name in (b"a\xff.jpg", b"a\xfe.jpg", b"a\\xff.jpg")])
    write_shard(here / "0.tar", [(os.fsdecode(b"b\xff"), {"jpg": picture(3)}), ("b\\xff", {"jpg": picture(4)})])
    out = folder / "metadata.jsonl" if kind == "metadata" else here / FILES[kind]
    paths, count = ([folder], 3) if kind == "metadata" else ([folder, "0.tar"], 5)
    for told in (f"{count} captions", "0 captions"):
        status, said, err = caption(*paths, "--out", out)
        assert (status, err) == (0, "") and said.startswith(told)
    found = [row["file_name" if kind == "metadata" else "path"] for row in rows_of(out)]
    assert len(set(found)) == len(found) == count


@pytest.fixture
def waiting(here: Path) -> Path:
    """Three batches of four images."""
    return fill(here / "waiting", [f"{number:03}.jpg" for number in range(12)])


def kill(arguments: list[object], begun: Callable[[], bool]) -> None:
    """Begin a run whose third batch never ends, in a process of its own, and kill it once it has done something."""
    generate, batches = contracap.Captioner.generate, count(1)

    def hold(*given: Any) -> Any:
        if next(batches) == 3:
            time.sleep(600)
        return generate(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contracap.Captioner, "generate", hold)
        command = ["caption", *map(str, arguments), *QUICK]
        process = multiprocessing.get_context("fork").Process(target=main, args=(command,))
        process.start()
    end = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < end and not begun():
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and begun()


def committed(partial: Path) -> bool:
    """Whether a journal has rows that nothing can take from it: SQLite takes back what its own journal holds."""
    undo = partial.with_name(f"{partial.name}-journal")
    if not partial.exists() or not partial.stat().st_size:
        return False
    return not undo.exists() or not undo.read_bytes()[:8].strip(b"\0")


def test_a_killed_run_continues_as_if_nothing_had_happened(
    caption: Run, varied_weights: Path, here: Path, waiting: Path
) -> None:
    call: list[object] = ["waiting", "--batch-size", "4", "--out"]
    kill([varied_weights, *call, "c.csv"], lambda: committed(here / "c.csv.partial"))
    assert (here / "c.csv.partial").exists() and not (here / "c.csv").exists()
    status, told, _ = caption(*call, "c.csv")
    made, before = int(told.split()[0]), int(re.findall(r"(\d+) had one before", told)[0])
    assert status == 0 and made + before == 12 and before in (4, 8)
    assert caption(*call, "whole.csv")[0] == 0
    assert rows_of(here / "c.csv") == rows_of(here / "whole.csv") and len(rows_of(here / "c.csv")) == 12
    assert not [file for file in files(here) if "partial" in file]


def test_side_cars_of_a_killed_run_are_whole_and_the_next_one_makes_the_others(
    caption: Run, varied_weights: Path, here: Path, waiting: Path
) -> None:
    call: list[object] = ["waiting", "--batch-size", "4", "--format", "sidecar"]
    kill([varied_weights, *call], (waiting / "003.txt").exists)
    made = {path: path.stat().st_mtime_ns for path in waiting.glob("*.txt")}
    assert 4 <= len(made) < 12 and {path.read_text().count("\n") for path in made} == {1}
    assert caption(*call)[1].startswith(f"{12 - len(made)} captions")
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())
    assert len(list(waiting.glob("*.txt"))) == 12


def test_a_full_disk_is_one_line_and_keeps_what_was_done(
    caption: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == "3.txt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    call = ["pictures", "--format", "sidecar", "--batch-size", "2"]
    status, out, err = caption(*call)
    assert (status, out, err) == (1, "", "contracap: error: No space left on device: pictures/3.txt\n")
    assert sorted(path.name for path in (here / "pictures").glob("*.txt")) == ["0.txt", "1.txt", "2.txt"]
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert caption(*call)[1].startswith("4 captions")


def test_what_is_waited_for_is_told(
    caption: Run, here: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "list.txt").write_text("pictures/0.jpg\nhttp://silent/a.jpg\n")
    monkeypatch.setattr("contracap.apps.bulk.inputs.download", lambda url: time.sleep(1.2) or picture(1))
    monkeypatch.setattr("contracap.progress.PAUSE", 0.5)
    assert caption("list.txt", "--out", "c.csv")[0] == 0
    assert "waiting for http://silent/a.jpg (a URL is given up after 60 s" in caplog.text
    assert "1 image is done" in caplog.text


def test_wrong_calls_are_one_line_and_write_nothing(run: Run, here: Path) -> None:
    clip = here / "clip.safetensors"
    save(clip, *random_model(replace(SIZES["tiny"], decoder=None), seed=0))
    (here / "file").write_text("")
    (here / "t.csv").write_text("path,caption\n")
    (here / "dangling.jpg").symlink_to("gone.jpg")
    write_shard(here / "0.tar", [("a", {"jpg": picture(0)})])
    before = files(here)
    none = here / "none.safetensors"  # what is wrong is told before weights are looked for
    calls: list[tuple[list[object], str]] = [
        ([none, "0.tar", "--format", "sidecar"], "side-cars are for local image files only"),
        ([none, "pictures", "--out", "file/c.csv"], "Not a directory: file"),
        ([none, "pictures", "--out", "c.xml"], "cannot tell the format of c.xml"),
        ([none, "pictures", "--format", "csv", "--out", "c.jsonl"], "--format csv does not go with --out c.jsonl"),
        (
            [none, "--set", "max_tokens=8", "list.txt"],
            "'list.txt' is not a setting (name=value): put paths before --set",
        ),
        ([none, "t.csv"], "t.csv is a table"),
        ([none, "-"], "stdin is not read"),
        ([none, "dangling.jpg"], "dangling.jpg is a broken link"),
        ([none, "pictures", "--format", "csv"], "name it with --out FILE"),
        ([none, "pictures", "--format", "sidecar", "--out", "c.csv"], "--out c.csv is one file"),
        ([none, "pictures", "--format", "metadata", "--out", "new/metadata.jsonl"], "no file in the folder of"),
        ([none, "pictures", "--ext", ".caption"], "--ext is for --format sidecar"),
        ([none, "pictures", "--embed"], "--embed is for captions in files"),
        ([none, "pictures", "--batch-size", "0"], "--batch-size must be an integer of at least 1"),
        ([none, "pictures", "--out", "c.csv"], "no weights at"),
        ([clip, "pictures", "--out", "c.csv"], "decoder"),
    ]
    for arguments, message in calls:
        status, out, err = run("caption", *arguments)
        assert (status, out, err.count("\n")) == (1, "", 1) and message in err, (arguments, err)
        assert files(here) == before, arguments


def test_metadata_lies_in_the_folder_if_there_is_one(caption: Run, here: Path) -> None:
    assert caption("pictures", "--format", "metadata")[0] == 0
    assert [row["file_name"] for row in rows_of(here / "pictures" / "metadata.jsonl")][-1] == "sub/6.jpg"
    status, _, err = caption("pictures", "pictures/sub", "--format", "metadata")
    assert status == 1 and "--out FILE" in err


def test_captions_begin_with_the_prompt_which_must_fit_the_model(run: Run, varied_weights: Path, here: Path) -> None:
    call = ["caption", varied_weights, "pictures", "--strategy", "greedy"]
    status, out, _ = run(*call, "--prompt", "a photo of", "--prefix", "sks ")
    assert status == 0 and out.count("\n") == 7
    assert all(line.split("\t")[1].startswith("sks a photo of") for line in out.splitlines())
    before = files(here)
    for where in (["--out", "c.csv"], ["--format", "sidecar"]):
        status, out, err = run(*call, *where, "--prompt", "a photo of " * 9)
        assert (status, out, err.count("\n")) == (1, "", 1) and "prompt" in err
        assert files(here) == before


@pytest.mark.parametrize("where", [["--out", "c.csv"], ["--format", "sidecar"]])
def test_captions_of_other_settings_are_refused_and_the_line_says_what_to_do(
    caption: Run, run: Run, varied_weights: Path, here: Path, where: list[str]
) -> None:
    assert caption("pictures/sub", *where, "--limit", 1)[0] == 0
    greedy = ["--strategy", "greedy", "--set"]
    for change, said in (
        ([*greedy, "max_tokens=6", "--prompt", "a"], "settings: prompt: '' -> 'a'. "),
        ([*greedy, "max_tokens=9"], "settings: strategy.max_tokens: 6 -> 9. "),
        ([], "strategy greedy, now beam"),
    ):
        status, out, err = run("caption", varied_weights, "pictures/sub", *where, *change)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert said in err and "--append" in err and "--overwrite" in err
    call = ["pictures/sub", *where]
    assert caption(*call)[1].startswith("1 caption ")
    assert caption(*call, "--prefix", "a", "--append")[1].startswith("2 captions")
    assert caption(*call, "--prefix", "b", "--overwrite")[1].startswith("2 captions")
    assert caption(*call, "--prefix", "b")[1].startswith("0 captions")


@pytest.mark.parametrize(
    ("first", "then", "out"), [("list.txt", "pictures/*.jpg", ["--out", "texts"]), ("pictures/sub", "pictures", [])]
)
def test_side_cars_of_other_settings_are_refused_however_the_images_are_named(
    caption: Run, here: Path, first: str, then: str, out: list[str]
) -> None:
    (here / "list.txt").write_text("pictures/0.jpg\npictures/1.jpg\n")
    assert caption(first, "--format", "sidecar", *out)[0] == 0
    status, _, err = caption(then, "--format", "sidecar", *out, "--prompt", "a")
    assert (status, err.count("\n")) == (1, 1) and "prompt: '' -> 'a'" in err
    assert caption(then, "--format", "sidecar", *out)[0] == 0


def test_all_spellings_of_a_path_have_one_row_with_the_first(caption: Run, here: Path) -> None:
    first = "pictures/0.jpg"
    others = ["./pictures/0.jpg", str(here / "pictures" / "0.jpg"), "pictures/../pictures/0.jpg"]
    assert caption(first, *others, "--out", "c.csv", "--batch-size", 2)[0] == 0
    assert [row["path"] for row in rows_of(here / "c.csv")] == [first]
    assert caption(*reversed(others), "--out", "c.csv")[1].startswith("0 captions")


@pytest.mark.parametrize("length", [239, 240])
def test_an_output_may_be_called_as_long_as_names_may_be(caption: Run, here: Path, length: int) -> None:
    out = "é" + "c" * (length - 6) + ".csv"
    assert caption("pictures", "--out", out, "--limit", 1)[0] == 0
    status, _, err = caption("pictures", "--out", out, "--prompt", "a")
    assert status == 1 and "prompt: '' -> 'a'" in err
    assert caption("pictures", "--out", out, "--limit", 2)[1].startswith("1 caption ") and len(rows_of(here / out)) == 2


@pytest.mark.parametrize("where", [["--out", "c.csv"], ["--format", "sidecar"]])
def test_repeated_lines_of_a_list_are_told(caption: Run, here: Path, where: list[str]) -> None:
    (here / "list.txt").write_text("pictures/0.jpg\npictures/1.jpg\n" * 2)
    for size in ("1", "4"):
        told = caption("list.txt", *where, "--overwrite", "--batch-size", size)[1]
        assert told.startswith("2 captions") and "images/s, 2 repeated in the list" in told
    assert re.search(
        r"^0 captions, (2 had one before, 2 repeated in the list|4 had one before)", caption("list.txt", *where)[1]
    )


def test_side_cars_may_lie_in_a_folder_of_their_own(caption: Run, here: Path) -> None:
    fill(here / "more", ["0.jpg", "x.jpg"])
    call = ["pictures", "more/*.jpg", "--format", "sidecar", "--out", "texts"]
    status, out, err = caption(*call)
    assert status == 1 and out.startswith("8 captions") and "has the same side-car, 0.txt" in err
    made = {path.relative_to(here / "texts").as_posix() for path in (here / "texts").rglob("*.txt")}
    assert made == {*(f"{number}.txt" for number in range(5)), "sub/5.txt", "sub/6.txt", "x.txt"}
    assert not list((here / "pictures").rglob("*.txt"))
    assert caption(*call)[1].startswith("0 captions")


@pytest.mark.parametrize("existing", ["--overwrite", "--append", None])
def test_a_list_of_images_does_not_become_the_side_car_of_one(caption: Run, here: Path, existing: str | None) -> None:
    (here / "0.jpg").write_bytes((here / "pictures/0.jpg").read_bytes())
    (here / "0.txt").write_text("0.jpg\npictures/1.jpg\n")
    status, out, err = caption("0.txt", "--format", "sidecar", *([existing] if existing else []))
    assert status == 1 and out.startswith("1 caption") and "0.txt, which is read" in err
    assert (here / "0.txt").read_text() == "0.jpg\npictures/1.jpg\n"


def test_a_call_may_take_the_first_images_and_no_subfolders_quietly(caption: Run, here: Path) -> None:
    assert len(caption("pictures", "--limit", 3, "--device", "cpu")[1].splitlines()) == 3
    assert len(caption("pictures", "--no-recursive")[1].splitlines()) == 5
    assert caption("pictures", "--quiet", "--out", "c.csv") == (0, "", "")
    for wrong in ("cuda:7", "warp"):
        status, _, err = caption("pictures", "--device", wrong)
        assert (status, err.count("\n")) == (1, 1) and f"no device '{wrong}'" in err


@pytest.mark.parametrize(("device", "minor"), [("full", 7), ("stdout", 0)])
def test_an_output_that_is_not_a_file_is_never_read_nor_replaced(
    weights: Path, here: Path, device: str, minor: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """/dev/full gives zeros without end, and was read as if it were captions."""
    out = here / device if minor else Path("/dev/stdout")
    if minor:  # as the real ones, which a failure here must not cost the machine
        try:
            os.mknod(out, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
            out.open("rb").close()
        except PermissionError:
            pytest.skip("only root makes devices, and not everywhere")
    call = ["caption", weights, "pictures/0.jpg", "--format", "jsonl", "--out", out, "--strategy", "greedy"]
    assert main(list(map(str, call))) == (1 if device == "full" else 0)
    told, err = capfd.readouterr()
    if device == "full":
        assert err == f"contracap: error: No space left on device: {out}\n"
    else:
        assert err.startswith("1 caption ") and err.count("\n") == 1
    assert out.is_char_device() if minor else json.loads(told.splitlines()[0])["path"] == "pictures/0.jpg"
    assert not [name for folder in (here, "/dev") for name in os.listdir(folder) if "partial" in name]


def test_an_output_may_not_take_the_place_of_an_input(caption: Run, here: Path) -> None:
    content = (here / "pictures" / "0.jpg").read_bytes()
    for option in (["--format", "csv", "--overwrite", "--out"], ["--json"]):
        status, _, err = caption("pictures/0.jpg", *option, "pictures/0.jpg")
        assert status == 1 and "would take the place" in err
    assert (here / "pictures" / "0.jpg").read_bytes() == content
