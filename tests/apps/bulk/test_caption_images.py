import errno
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import contracap
from contracap.cli import main
from contracap.data.shards import write_shard
from contracap.model.sizes import SIZES
from contracap.pretrained import random_model, save
from tests.apps.bulk.conftest import fill, picture
from tests.conftest import Run

FILES = {"jsonl": "c.jsonl", "csv": "c.csv", "parquet": "c.parquet", "metadata": "pictures/metadata.jsonl"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `pictures`: 0.jpg to 4.jpg, and 5.jpg and 6.jpg in a subfolder."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "pictures", [f"{number}.jpg" for number in range(5)] + ["sub/5.jpg", "sub/6.jpg"])
    return tmp_path


@pytest.fixture(scope="module")
def texts(weights: Path) -> list[str]:
    """What the weights say of the images."""
    captioner = contracap.Captioner(*contracap.load(weights))
    return [caption.text for caption in captioner([picture(number) for number in range(7)])]


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
    run: Run, weights: Path, here: Path, texts: list[str], kind: str
) -> None:
    out = here / FILES[kind]
    words = ["--prefix", "sks, ", "--suffix", "!", "--batch-size", "3"]
    status, told, err = run("caption", weights, "pictures", "--out", out.relative_to(here), "--embed", *words)
    assert (status, err) == (0, "") and told.startswith("7 captions in ")
    rows = rows_of(out)
    names = [f"pictures/{name}" for name in ("0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "sub/5.jpg", "sub/6.jpg")]
    if kind == "metadata":
        names = [name.removeprefix("pictures/") for name in names]
    name, text = ("file_name", "text") if kind == "metadata" else ("path", "caption")
    assert [(row[name], row[text]) for row in rows] == [
        (at, f"sks, {said}!") for at, said in zip(names, texts, strict=True)
    ]
    vectors = np.load("c.csv.npy") if kind == "csv" else np.array([row["embedding"] for row in rows], dtype=np.float32)
    model, processor = contracap.load(weights)
    expected = model.encode_image(processor.images([picture(number) for number in range(7)])).detach().numpy()
    assert np.allclose(vectors, expected, atol=1e-5)
    assert not [file for file in files(here) if "partial" in file]


def test_side_cars_lie_beside_their_images(run: Run, weights: Path, here: Path, texts: list[str]) -> None:
    assert run("caption", weights, "pictures", "--format", "sidecar", "--embed")[0] == 0
    for number in range(7):
        beside = here / "pictures" / ("sub" if number > 4 else "") / f"{number}.txt"
        assert beside.read_text(encoding="utf-8") == " ".join(texts[number].split()) + "\n"
        assert np.load(beside.with_suffix(".npy")).shape == (32,)
    assert run("caption", weights, "pictures/sub", "--format", "sidecar", "--ext", ".caption")[0] == 0
    assert (here / "pictures" / "sub" / "5.caption").exists()


def test_images_with_captions_are_skipped_overwritten_or_added_to(run: Run, weights: Path, here: Path) -> None:
    side_car = here / "pictures" / "1.txt"
    side_car.write_text("mine\n")
    call = ["caption", weights, "pictures", "--format", "sidecar", "--strategy", "greedy"]
    status, told, _ = run(*call)
    assert status == 0 and told.startswith("6 captions") and "1 had one before" in told
    assert side_car.read_text() == "mine\n"
    assert run(*call)[1].startswith("0 captions")
    assert run(*call, "--append")[0] == 0
    assert len(side_car.read_text().splitlines()) == 2 and (here / "pictures" / "0.txt").read_text().count("\n") == 1
    assert run(*call, "--overwrite")[1].startswith("7 captions")
    assert "mine" not in side_car.read_text()
    status, _, err = run(*call, "--overwrite", "--append")
    assert status == 1 and "--overwrite and --append exclude each other" in err


def test_no_caption_is_added_to_a_side_car_of_another_encoding(run: Run, weights: Path, here: Path) -> None:
    encodings = ("utf-16", "utf-16-le", "latin-1")
    before = [f"é{'' if code == 'latin-1' else 'ж'}\n".encode(code) for code in encodings] + [
        "abc\n".encode("utf-16-be")
    ]
    for number, content in enumerate(before):
        (here / "pictures" / f"{number}.txt").write_bytes(content)
    call = ["caption", weights, "pictures", "--format", "sidecar", "--embed", "--strategy", "greedy"]
    status, told, err = run(*call, "--append")
    assert status == 1 and told.startswith("3 captions") and err.count("is not UTF-8") == err.count("\n") == 4
    assert [(here / "pictures" / f"{number}.txt").read_bytes() for number in range(4)] == before
    assert len(list((here / "pictures").rglob("*.npy"))) == 3
    assert run(*call, "--overwrite")[0] == 0 and (here / "pictures" / "0.txt").read_text(encoding="utf-8")


def test_images_that_would_share_a_side_car_are_listed_each_time(run: Run, weights: Path, here: Path) -> None:
    (here / "pictures" / "1.png").write_bytes(picture(1, "PNG"))
    for told in ("7 captions", "0 captions"):
        status, out, err = run("caption", weights, "pictures", "--format", "sidecar", "--strategy", "greedy")
        assert status == 1 and out.startswith(told) and err.count("\n") == 1
        assert "pictures/1.png: 1.jpg has the same side-car, 1.txt" in err


def test_broken_images_are_listed_at_the_end_and_tell_the_status(run: Run, weights: Path, here: Path) -> None:
    (here / "pictures" / "0.jpg").write_bytes(b"\xff\xd8 cut")
    (here / "pictures" / "3.jpg").write_bytes(b"")
    (here / "list.txt").write_text("pictures/1.jpg\npictures/none.jpg\n")
    write_shard(here / "0.tar", [("a", {"jpg": picture(0)}), ("b", {"txt": b"no picture"})])
    call = ["caption", weights, "pictures", "list.txt", "0.tar", "--strategy", "greedy"]
    status, told, err = run(*call, "--out", "c.jsonl", "--json", "result.json")
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
    status, told, err = run("caption", weights, "pictures", "--strategy", "greedy", "--out", "c.jsonl")
    assert status == 1 and told.startswith("1 caption ") and err.count("\n") == 1
    assert rows_of(here / "c.jsonl")[-1]["path"] == "pictures/0.jpg"


@pytest.mark.parametrize("kind", FILES)
def test_names_with_bytes_that_are_no_text_are_told_apart_and_recognised(
    run: Run, weights: Path, here: Path, kind: str
) -> None:
    folder = here / os.fsdecode(b"pictures\xff") if kind == "metadata" else here / "named"
    fill(folder, [os.fsdecode(name) for name in (b"a\xff.jpg", b"a\xfe.jpg", b"a\\xff.jpg")])
    write_shard(here / "0.tar", [(os.fsdecode(b"b\xff"), {"jpg": picture(3)}), ("b\\xff", {"jpg": picture(4)})])
    out = folder / "metadata.jsonl" if kind == "metadata" else here / FILES[kind]
    paths, count = ([folder], 3) if kind == "metadata" else ([folder, "0.tar"], 5)
    for told in (f"{count} captions", "0 captions"):
        status, said, err = run("caption", weights, *paths, "--out", out, "--strategy", "greedy")
        assert (status, err) == (0, "") and said.startswith(told)
    found = [row["file_name" if kind == "metadata" else "path"] for row in rows_of(out)]
    assert len(set(found)) == len(found) == count


WAITING = 32


@pytest.fixture
def waiting(here: Path) -> Path:
    """So many images that a run is not done when its first batch of four is."""
    return fill(here / "waiting", [f"{number:03}.jpg" for number in range(WAITING)])


def stopped(arguments: list[object], begun: Callable[[], bool], number: int) -> tuple[int, str]:
    """Status and stderr of a run that gets a signal once it has done something."""
    command = [sys.executable, "-m", "contracap", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end and not begun():
        time.sleep(0.02)
    assert process.poll() is None and begun()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def committed(partial: Path) -> bool:
    """Whether a journal has rows that nothing can take from it: SQLite takes back what its own journal holds."""
    undo = partial.with_name(f"{partial.name}-journal")
    if not partial.exists() or not partial.stat().st_size:
        return False
    return not undo.exists() or not undo.read_bytes()[:8].strip(b"\0")


def test_a_killed_run_continues_as_if_nothing_had_happened(run: Run, weights: Path, here: Path, waiting: Path) -> None:
    call: list[object] = ["caption", weights, "waiting", "--batch-size", "4", "--out"]
    status, err = stopped([*call, "c.csv"], lambda: committed(here / "c.csv.partial"), signal.SIGKILL)
    assert (status, err) == (-9, "")
    assert (here / "c.csv.partial").exists() and not (here / "c.csv").exists()
    status, told, _ = run(*call, "c.csv")
    made, before = int(told.split()[0]), int(re.findall(r"(\d+) had one before", told)[0])
    assert status == 0 and made + before == WAITING and made and before >= 4
    assert run(*call, "whole.csv")[0] == 0
    rows, whole = rows_of(here / "c.csv"), rows_of(here / "whole.csv")
    assert [(row["path"], row["caption"]) for row in rows] == [(row["path"], row["caption"]) for row in whole]
    assert len(rows) == WAITING and not [file for file in files(here) if "partial" in file]


def test_side_cars_of_a_killed_run_are_whole_and_the_next_one_makes_the_others(
    run: Run, weights: Path, here: Path, waiting: Path
) -> None:
    call: list[object] = ["caption", weights, "waiting", "--batch-size", "4", "--format", "sidecar"]
    stopped(call, lambda: (waiting / "003.txt").exists(), signal.SIGKILL)
    made = {path: path.stat().st_mtime_ns for path in waiting.glob("*.txt")}
    assert 4 <= len(made) < WAITING and {path.read_text().count("\n") for path in made} == {1}
    assert run(*call)[1].startswith(f"{WAITING - len(made)} captions")
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())
    assert len(list(waiting.glob("*.txt"))) == WAITING


def test_a_full_disk_is_one_line_and_keeps_what_was_done(
    run: Run, weights: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == "3.txt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    call = ["caption", weights, "pictures", "--format", "sidecar", "--strategy", "greedy", "--batch-size", "2"]
    status, out, err = run(*call)
    assert (status, out, err) == (1, "", "contracap: error: No space left on device: pictures/3.txt\n")
    assert sorted(path.name for path in (here / "pictures").glob("*.txt")) == ["0.txt", "1.txt", "2.txt"]
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert run(*call)[1].startswith("4 captions")


def test_images_come_from_urls_lists_shards_and_patterns_at_once(
    run: Run, weights: Path, here: Path, texts: list[str], address: str
) -> None:
    (here / "list.txt").write_text(f"{address}/pictures/0.jpg\npictures/1.jpg\n")
    write_shard(here / "2.tar", [("a", {"jpg": picture(2), "txt": b"old"})])
    paths = ["list.txt", "*.tar", f"{address}/pictures/3.jpg", "**/4.jpg"]
    status, out, _ = run("caption", weights, *paths)
    names = [f"{address}/pictures/0.jpg", "pictures/1.jpg", "2.tar/a", f"{address}/pictures/3.jpg", "pictures/4.jpg"]
    said = [" ".join(text.split()) for text in texts[:5]]
    assert status == 0 and out == "".join(f"{at}\t{text}\n" for at, text in zip(names, said, strict=True))


@pytest.mark.parametrize("is_shown", [False, True])
def test_what_is_waited_for_is_told(
    run: Run, weights: Path, here: Path, caplog: pytest.LogCaptureFixture, monkeypatch, is_shown: bool
) -> None:
    (here / "list.txt").write_text("pictures/0.jpg\nhttp://silent/a.jpg\n")
    monkeypatch.setattr("contracap.apps.bulk.inputs.download", lambda url: time.sleep(1.2) or picture(1))
    monkeypatch.setattr("contracap.progress.PAUSE", 0.5)
    if is_shown:
        monkeypatch.setattr("tqdm.std.DisableOnWriteError.isatty", lambda self: True, raising=False)
    status, _, err = run("caption", weights, "list.txt", "--out", "c.csv", "--strategy", "greedy")
    told = err if is_shown else caplog.text
    assert status == 0 and re.search(r"waiting for http://silent/a\.jpg \(a URL is given up after 60 s", told)
    assert is_shown or "1 image is done" in told


def test_wrong_calls_are_one_line_and_write_nothing(run: Run, weights: Path, here: Path) -> None:
    clip = here / "clip.safetensors"
    model, processor = random_model(SIZES["ViT-B-32"].__class__(**clip_fields()), seed=0)
    save(clip, model, processor)
    (here / "file").write_text("")
    (here / "t.csv").write_text("path,caption\n")
    (here / "dangling.jpg").symlink_to("gone.jpg")
    write_shard(here / "0.tar", [("a", {"jpg": picture(0)})])
    before = files(here)
    none = here / "none.safetensors"  # what is wrong is told before weights are looked for
    calls: list[tuple[list[object], str]] = [
        ([none, "none.jpg"], "no such image or folder: none.jpg"),
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
        ([none, "pictures", "--append"], "--append is for captions in files"),
        ([none, "pictures", "--batch-size", "0"], "--batch-size must be an integer of at least 1"),
        ([none, "pictures", "--workers", "0"], "--workers must be an integer of at least 1"),
        ([none, "pictures", "--strategy", "beem", "--out", "c.csv"], "'beem'"),
        ([none, "pictures", "--set", "width=0", "--out", "c.csv"], "width must be an integer of at least 1"),
        ([none, "pictures", "--out", "c.csv"], "no weights at"),
        ([clip, "pictures", "--out", "c.csv"], "decoder"),
    ]
    for arguments, message in calls:
        status, out, err = run("caption", *arguments)
        assert (status, out, err.count("\n")) == (1, "", 1) and message in err, (arguments, err)
        assert files(here) == before, arguments


def clip_fields() -> dict[str, Any]:
    """A tiny model without pooler queries and decoder."""
    from dataclasses import fields, replace

    tiny, clip = SIZES["tiny"], SIZES["ViT-B-32"]
    config = replace(tiny, pooler=clip.pooler, decoder=clip.decoder, text=replace(tiny.text, pool=clip.text.pool))
    return {field.name: getattr(config, field.name) for field in fields(config)}


def test_metadata_lies_in_the_folder_if_there_is_one(run: Run, weights: Path, here: Path) -> None:
    assert run("caption", weights, "pictures", "--format", "metadata")[0] == 0
    assert [row["file_name"] for row in rows_of(here / "pictures" / "metadata.jsonl")][-1] == "sub/6.jpg"
    status, _, err = run("caption", weights, "pictures", "pictures/sub", "--format", "metadata")
    assert status == 1 and "--out FILE" in err


def test_captions_begin_with_the_prompt_which_must_fit_the_model(run: Run, weights: Path, here: Path) -> None:
    status, out, _ = run("caption", weights, "pictures", "--prompt", "a photo of", "--prefix", "sks ")
    assert status == 0 and out.count("\n") == 7
    assert all(line.split("\t")[1].startswith("sks a photo of") for line in out.splitlines())
    before = files(here)
    for where in (["--out", "c.csv"], ["--format", "sidecar"]):
        status, out, err = run("caption", weights, "pictures", *where, "--prompt", "a photo of " * 9)
        assert (status, out, err.count("\n")) == (1, "", 1) and "prompt" in err
        assert files(here) == before


@pytest.mark.parametrize("where", [["--out", "c.csv"], ["--format", "sidecar"]])
def test_captions_of_other_settings_are_refused_and_the_line_says_what_to_do(
    run: Run, weights: Path, here: Path, where: list[str]
) -> None:
    call = ["caption", weights, "pictures", *where, "--strategy", "greedy"]
    assert run(*call, "--limit", 2)[0] == 0
    for change, said in (
        (["--prompt", "a"], "settings: prompt: '' -> 'a'. "),
        (["--set", "max_tokens=9"], "settings: strategy.max_tokens: 30 -> 9. "),
    ):
        status, out, err = run(*call, *change)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert said in err and "--append" in err and "--overwrite" in err
    assert run(*call, "--limit", 3)[1].startswith("1 caption ")
    assert run(*call, "--prompt", "a", "--append", "--limit", 3)[1].startswith("3 captions")
    assert run(*call, "--prompt", "b", "--overwrite")[1].startswith("7 captions")
    assert run(*call, "--prompt", "b")[1].startswith("0 captions")


@pytest.mark.parametrize(
    ("first", "then", "out"),
    [
        (["pictures/0.jpg", "pictures/1.jpg"], ["pictures"], []),
        (["list.txt"], ["pictures/*.jpg"], ["--out", "texts"]),
        (["pictures"], ["pictures/sub"], []),
        (["pictures/sub"], ["pictures"], []),
    ],
)
def test_side_cars_of_other_settings_are_refused_however_the_images_are_named(
    run: Run, weights: Path, here: Path, first: list[str], then: list[str], out: list[str]
) -> None:
    (here / "list.txt").write_text("pictures/0.jpg\npictures/1.jpg\n")
    call = ["--format", "sidecar", "--strategy", "greedy", *out]
    assert run("caption", weights, *first, *call)[0] == 0
    status, _, err = run("caption", weights, *then, *call, "--prompt", "a")
    assert (status, err.count("\n")) == (1, 1) and "prompt: '' -> 'a'" in err
    err = run("caption", weights, *then, "--format", "sidecar", *out)[2]
    assert "strategy greedy, now beam" in err
    assert run("caption", weights, *then, *call)[0] == 0


def test_all_spellings_of_a_path_have_one_row_with_the_first(run: Run, weights: Path, here: Path) -> None:
    first, others = (
        "pictures/0.jpg",
        ["./pictures/0.jpg", str(here / "pictures" / "0.jpg"), "pictures/../pictures/0.jpg"],
    )
    call = ["--out", "c.csv", "--strategy", "greedy", "--batch-size", 2]
    assert run("caption", weights, first, *others, *call)[0] == 0
    assert [row["path"] for row in rows_of(here / "c.csv")] == [first]
    assert run("caption", weights, *reversed(others), *call)[1].startswith("0 captions")


@pytest.mark.parametrize("length", [239, 240, 255])
def test_an_output_may_be_called_as_long_as_names_may_be(run: Run, weights: Path, here: Path, length: int) -> None:
    out = "é" + "c" * (length - 6) + ".csv"
    call = ["caption", weights, "pictures", "--out", out, "--strategy", "greedy"]
    assert run(*call, "--limit", 2)[0] == 0
    status, _, err = run(*call, "--prompt", "a")
    assert status == 1 and "prompt: '' -> 'a'" in err
    assert run(*call)[1].startswith("5 captions") and len(rows_of(here / out)) == 7


@pytest.mark.parametrize("where", [["--out", "c.csv"], ["--format", "sidecar"]])
@pytest.mark.parametrize("existing", [[], ["--overwrite"]])
def test_repeated_lines_of_a_list_are_told(
    run: Run, weights: Path, here: Path, where: list[str], existing: list[str]
) -> None:
    (here / "list.txt").write_text("pictures/0.jpg\npictures/1.jpg\n" * 2)
    call = ["caption", weights, "list.txt", *where, *existing, "--strategy", "greedy", "--batch-size"]
    for size in ("1", "4"):
        told = run(*call, size, *([] if existing or size == "1" else ["--overwrite"]))[1]
        assert told.startswith("2 captions") and "images/s, 2 repeated in the list" in told
    if not existing:
        assert re.search(
            r"^0 captions, (2 had one before, 2 repeated in the list|4 had one before)", run(*call, "4")[1]
        )


def test_side_cars_may_lie_in_a_folder_of_their_own(run: Run, weights: Path, here: Path) -> None:
    fill(here / "more", ["0.jpg", "x.jpg"])
    call = ["caption", weights, "pictures", "more/*.jpg", "--format", "sidecar", "--strategy", "greedy"]
    call += ["--out", "texts"]
    status, out, err = run(*call)
    assert status == 1 and out.startswith("8 captions") and "has the same side-car, 0.txt" in err
    made = {path.relative_to(here / "texts").as_posix() for path in (here / "texts").rglob("*.txt")}
    assert made == {*(f"{number}.txt" for number in range(5)), "sub/5.txt", "sub/6.txt", "x.txt"}
    assert not list((here / "pictures").rglob("*.txt"))
    assert run(*call)[1].startswith("0 captions")


def test_a_call_may_take_the_first_images_and_no_subfolders_quietly(run: Run, weights: Path, here: Path) -> None:
    call = ["caption", weights, "pictures", "--strategy", "greedy", "--device", "cpu"]
    assert len(run(*call, "--limit", 3)[1].splitlines()) == 3
    assert len(run(*call, "--no-recursive")[1].splitlines()) == 5
    assert run(*call, "--quiet", "--out", "c.csv") == (0, "", "")
    for wrong in ("cuda:7", "warp"):
        status, _, err = run("caption", "none", "pictures", "--device", wrong)
        assert (status, err.count("\n")) == (1, 1) and f"no device '{wrong}'" in err


@pytest.mark.parametrize(("device", "minor"), [("null", 3), ("full", 7), ("stdout", 0)])
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


def test_an_output_may_not_take_the_place_of_an_input(run: Run, weights: Path, here: Path) -> None:
    content = (here / "pictures" / "0.jpg").read_bytes()
    for option in (["--format", "csv", "--overwrite", "--out"], ["--json"]):
        status, _, err = run("caption", weights, "pictures/0.jpg", *option, "pictures/0.jpg")
        assert status == 1 and "would take the place" in err
    assert (here / "pictures" / "0.jpg").read_bytes() == content
