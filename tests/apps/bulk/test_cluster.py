import ast
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from contracap.apps.bulk.cluster import ATTEMPTS, Ledger, cores_each
from contracap.apps.bulk.parts import ShardOutcome, part_name
from contracap.apps.bulk.ray_session import SESSION_PREFIX, session_folder
from contracap.cli import main
from contracap.data.shards import read_records, write_shard
from contracap.generation import BeamSearch, Captioner
from contracap.model.coca import CoCa
from contracap.processor import Processor
from tests.apps.bulk.worlds import picture, rows, write_shards, write_weights

ROOT = Path(__file__).parents[3]
TROUBLED = ["-m", "tests.apps.bulk.troubled"]


def expected_captions(model: CoCa, processor: Processor, shard: str) -> list[str]:
    pictures = [record.members["jpg"] for record in read_records(shard)]
    return [caption.text for caption in Captioner(model, processor)(pictures, BeamSearch(width=2, max_tokens=12))]


def captions(out: Path, shard: str) -> list[str]:
    return [row["caption"] for row in rows(out, shard)]


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts Python in a process group of its own, which ends with the test."""
    started = []

    def call(*arguments: object) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
        )
        started.append(process)
        return process

    yield call
    for process in started:
        process.kill()
        process.communicate()
        for pid in session_of(process.pid):
            os.kill(pid, signal.SIGKILL)


def session_of(session: int) -> list[int]:
    """The processes that a driver started, and theirs: Ray's leave its group, but not its session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def await_end(processes: Callable[[], Iterable[int]]) -> None:
    until = time.monotonic() + 60
    while left := list(processes()):
        assert time.monotonic() < until, f"processes outlived the run: {left}"
        time.sleep(0.2)


@pytest.mark.slow
def test_a_run_writes_what_captioner_and_model_say_and_lists_what_is_broken(start, tmp_path: Path, capsys) -> None:
    model, processor = write_weights(tmp_path / "tiny.safetensors")
    shards = write_shards(tmp_path / "shards", 3, 10)
    write_shard(tmp_path / "more" / "000.tar", [("a", {"jpg": picture(90)}), ("b", {"jpg": b"nothing"})])
    (tmp_path / "more" / "broken.tar").write_bytes(b"garbage" * 500)
    call = ["-m", "contracap", "bulk", "caption", tmp_path / "tiny.safetensors", tmp_path / "shards", tmp_path / "more"]
    call += ["--out", tmp_path / "out", "--set", "width=2", "max_tokens=12", "--embed", "--workers", 2]
    done = start(*call)
    out, complaints = done.communicate()
    assert done.returncode == 1
    assert out == f"31 of 32 images of 4 shards: {tmp_path / 'out'}\n"
    broken = tmp_path / "more" / "broken.tar"
    assert without_progress(complaints) == [
        f"contracap: error: cannot read shard {broken}: invalid header at byte 0",
        f"contracap: error: 1 of 5 shards cannot be read and have no file in {tmp_path / 'out'}",
        f"contracap: error: 1 image of {tmp_path / 'more' / '000.tar'} cannot be read: b",
        f"contracap: error: 1 image of 1 shard cannot be read; the column error in {tmp_path / 'out'} says why",
    ]
    more = str(tmp_path / "more" / "000.tar")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*map(part_name, [*shards, more]), "_bulk.json"}
    for shard in shards:
        assert captions(tmp_path / "out", shard) == expected_captions(model, processor, shard)
        pictures = [record.members["jpg"] for record in read_records(shard)]
        with torch.no_grad():
            embeddings = model.encode_image(processor.images(pictures)).numpy()
        found = np.array([row["embedding"] for row in rows(tmp_path / "out", shard)])
        assert np.abs(found - embeddings).max() < 1e-5

    await_end(lambda: session_of(done.pid))

    broken.unlink()
    assert main([*map(str, call[2:])]) == 0  # nothing is left to do, and Ray is not started
    assert capsys.readouterr().out == f"0 images of 0 shards; 4 shards had a file before: {tmp_path / 'out'}\n"


def test_folders_of_other_runs_stay_while_they_may_be_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders = {name: tmp_path / f"{SESSION_PREFIX}{name}" for name in ("left", "begun")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "lock").touch()
    os.utime(folders["left"], (0, 0))
    with session_folder() as own:
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted((Path(own).name, folders["begun"].name))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace")
def test_a_run_on_this_machine_reaches_no_other_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_weights(tmp_path / "tiny.safetensors")
    write_shards(tmp_path / "shards", 1, 2)
    (scratch := Path(tempfile.mkdtemp())).joinpath(
        f"{SESSION_PREFIX}killed"
    ).mkdir()  # short, as sockets' names must be
    (scratch / f"{SESSION_PREFIX}killed" / "lock").touch()
    os.utime(scratch / f"{SESSION_PREFIX}killed", (0, 0))
    monkeypatch.setenv("TMPDIR", str(scratch))
    call = [sys.executable, "-m", "contracap", "bulk", "embed", tmp_path / "tiny.safetensors", tmp_path / "shards"]
    trace = ["strace", "-f", "-qq", "-e", "trace=connect", "-o", tmp_path / "trace"]
    done = subprocess.run([*trace, *call, "--out", tmp_path / "out"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    reached = set(re.findall(r'(?:inet_addr\(|AF_INET6, )"([^"]+)"', (tmp_path / "trace").read_text()))
    assert reached and {address.removeprefix("::ffff:") for address in reached} <= {"127.0.0.1", "::1"}
    assert os.listdir(scratch) == []
    scratch.rmdir()


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_nothing_and_a_shard_that_kills_workers_only_itself(
    start, tmp_path: Path
) -> None:
    model, processor = write_weights(tmp_path / "tiny.safetensors")
    shards = write_shards(tmp_path / "shards", 6, 10)
    log = tmp_path / "log"
    run = start(*TROUBLED, "death", tmp_path / "tiny.safetensors", tmp_path / "shards", tmp_path / "out", log)
    out, complaints = run.communicate()
    assert run.returncode == 0, complaints
    outcomes = {values["shard"]: ShardOutcome(**values) for values in ast.literal_eval(out)}
    poison = shards[3]
    assert f"{ATTEMPTS} workers died of it" in outcomes.pop(poison).problem
    healthy = [shard for shard in shards if shard != poison]
    assert outcomes == {shard: ShardOutcome(shard=shard, rows=10) for shard in healthy}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*map(part_name, healthy), "_bulk.json"}
    for shard in healthy:
        assert captions(tmp_path / "out", shard) == expected_captions(model, processor, shard)
    begun = Counter(line.partition(" ")[2] for line in log.read_text().splitlines())
    others = [shards[number] for number in (0, 2, 4, 5)]
    assert begun == {**dict.fromkeys(others, 1), shards[1]: 2, poison: ATTEMPTS + 1}


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_without_repeating_or_losing_a_shard(start, tmp_path: Path) -> None:
    model, processor = write_weights(tmp_path / "tiny.safetensors")
    shards = write_shards(tmp_path / "shards", 8, 10)
    out, log = tmp_path / "out", tmp_path / "log"
    call = [tmp_path / "tiny.safetensors", tmp_path / "shards", out, log]
    killed = start(*TROUBLED, "slow", *call)
    until = time.monotonic() + 120
    while len(list(out.glob("*.parquet"))) < 2:
        assert killed.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    workers = {int(line.split()[0]) for line in log.read_text().splitlines()}
    await_end(lambda: workers.intersection(session_of(killed.pid)))  # two agents of Ray stay, and do nothing
    (out / ".000-0.parquet.abc.partial").write_bytes(b"half")
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.parquet")}
    assert 2 <= len(before) < 8

    log.unlink()
    run = start(*TROUBLED, "slow", *call)
    printed, complaints = run.communicate()
    assert run.returncode == 0, complaints
    assert len(ast.literal_eval(printed)) == len(log.read_text().splitlines()) == 8 - len(before)
    after = {file.name: file.stat().st_mtime_ns for file in out.glob("*.parquet")}
    assert {name: after[name] for name in before} == before
    assert {file.name for file in out.iterdir()} == {*map(part_name, shards), "_bulk.json"}
    for shard in shards:
        assert captions(out, shard) == expected_captions(model, processor, shard)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_line_and_no_part(start, tmp_path: Path) -> None:
    write_weights(tmp_path / "tiny.safetensors")
    write_shards(tmp_path / "shards", 3, 10)
    out, log = tmp_path / "out", tmp_path / "log"
    run = start(*TROUBLED, "full", tmp_path / "tiny.safetensors", tmp_path / "shards", out, log)
    _, complaints = run.communicate()
    assert run.returncode == 1
    (complaint,) = [line for line in complaints.splitlines() if " of 3 shards: " not in line]  # those tell of progress
    assert "File too large" in complaint and complaint.startswith("stopped at ")
    assert {file.name for file in out.iterdir()} == {"_bulk.json"}


def test_other_weights_in_the_same_folder_are_refused_before_ray_starts(tmp_path: Path, capsys) -> None:
    write_weights(tmp_path / "tiny.safetensors")
    write_shards(tmp_path / "shards", 1, 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "_bulk.json").write_text(
        '{"settings": {"weights_sha256": "0", "strategy": null, "embedding": "float32"}}'
    )
    status = main(
        ["bulk", "embed", str(tmp_path / "tiny.safetensors"), str(tmp_path / "shards"), "--out", str(tmp_path / "out")]
    )
    assert status == 1
    assert "holds a run with other settings: weights_sha256: '0' -> " in capsys.readouterr().err
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"_bulk.json"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "widht=3"], "widht"),
        (["--batch-size", "0"], "batch_size must be an integer of at least 1"),
        (["--gpus-per-worker", "1.5"], "gpus_per_worker is 1.5"),
        (["--dtype", "float16"], "give --embed too"),
        (["--prompt", "a photo of " * 9], "prompt"),
    ],
)
def test_a_wrong_setting_is_one_line_and_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    write_weights(tmp_path / "tiny.safetensors")
    write_shards(tmp_path / "shards", 1, 1)
    call = ["bulk", "caption", tmp_path / "tiny.safetensors", tmp_path / "shards", "--out", tmp_path / "out"]
    assert main([*map(str, call), *arguments]) == 1
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("address", ["ray://127.0.0.1:{port}", "127.0.0.1:port"])
def test_a_cluster_that_does_not_answer_is_one_line_and_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr("contracap.cli.bulk.require_extra", lambda *names: None)
    monkeypatch.setitem(sys.modules, "ray", None)  # nothing is asked of Ray, which would wait
    write_weights(tmp_path / "tiny.safetensors")
    write_shards(tmp_path / "shards", 1, 1)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        address = address.format(port=nobody.getsockname()[1])
        call = ["bulk", "embed", tmp_path / "tiny.safetensors", tmp_path / "shards", "--out", tmp_path / "out"]
        assert main([*map(str, call), "--address", address]) == 1
    complaint = capsys.readouterr().err
    assert f"cannot join the cluster at {address}: " in complaint and complaint.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("package", "extra"), [("ray", "ray"), ("pyarrow", "ray")])
def test_a_missing_package_is_one_line_that_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str, extra: str
) -> None:
    def find_spec(name: str) -> Any:
        return None if name == package else object()

    monkeypatch.setattr("contracap.extras.find_spec", find_spec)
    assert main(["bulk", "embed", "weights", "shards", "--out", "out"]) == 1
    assert capsys.readouterr().err.endswith(f"needs the package {package}: pip install 'contracap[{extra}]'\n")


def test_the_ledger_gives_up_a_shard_that_never_ends_and_knows_one_that_did() -> None:
    ledger, done = Ledger(), ShardOutcome(shard="a", rows=3)
    assert ledger.begin("a") is None
    ledger.end(done)
    assert [ledger.begin("a") for _ in range(ATTEMPTS + 1)] == [done] * (ATTEMPTS + 1)
    assert [ledger.begin("b") for _ in range(ATTEMPTS)] == [None] * ATTEMPTS
    assert "workers died of it" in getattr(ledger.begin("b"), "problem", "")


@pytest.mark.parametrize(
    ("machines", "workers", "gpus", "cores"),
    [
        ([(16, 0.0)], 4, 0.0, 4),
        ([(16, 0.0)], 5, 0.0, 3),
        ([(4, 0.0), (60, 0.0)], 2, 0.0, 30),  # 32 each would leave the small machine, and one worker, out
        ([(64, 0.0), (96, 8.0), (96, 8.0)], 16, 1.0, 12),  # a head without GPUs has no worker
        ([(96, 8.0)], 16, 0.5, 6),
        ([(8, 1.0)], 4, 1.0, 1),  # no room yet
        ([], 4, 0.0, 1),
    ],
)
def test_workers_share_the_cores_of_the_machines_they_fit(machines, workers, gpus, cores) -> None:
    assert cores_each(machines, workers, gpus) == cores


def without_progress(err: str) -> list[str]:
    """Lines of an error output, without those that a slow machine prints in the meantime."""
    return [line for line in err.splitlines() if "images/s" not in line]


@pytest.mark.slow
def test_a_run_that_sigterm_ends_says_what_is_done(start, tmp_path: Path) -> None:
    write_weights(tmp_path / "tiny.safetensors")
    write_shards(tmp_path / "shards", 20, 20)
    call = ["-m", "contracap", "bulk", "caption", tmp_path / "tiny.safetensors", tmp_path / "shards"]
    run = start(*call, "--out", tmp_path / "out", "--workers", 1)
    until = time.monotonic() + 120
    while not list((tmp_path / "out").glob("*.parquet")) and time.monotonic() < until:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=60)
    (line,) = without_progress(err)
    assert (run.returncode, out) == (143, ""), err
    assert "of 20 shards are done; the same command continues" in line
    await_end(lambda: session_of(run.pid))
