import errno
import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from contracap import cli
from contracap.config import build, to_toml
from contracap.data import batch_maker
from contracap.images import ImageConfig
from contracap.parallel import ParallelModel, ProcessGroup
from contracap.pretrained import load, random_model, read_weights
from contracap.training import trainer, writer
from contracap.training.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    checkpoint_steps,
    last_checkpoint,
    moving_average,
    restore_checkpoint,
)
from contracap.training.optimizer import build_optimizer
from contracap.training.recipe import Recipe
from contracap.training.recorder import Recorder, read_metrics
from contracap.training.run_folder import lock_folder
from contracap.training.shutdown import Interrupted, shutdown_signal
from contracap.training.step import TrainingState, train_step
from contracap.training.trainer import train
from contracap.training.writer import CheckpointWriter

from .interference import assert_same_weights, at_step, losses
from .test_step import CONFIG, TINY, batch

SMALL = replace(
    TINY,
    vision=replace(TINY.vision, layers=1),
    text=replace(TINY.text, layers=1),
    decoder=replace(TINY.decoder, layers=1),
)


def new_state(seed: int = 0) -> TrainingState:
    model, _ = random_model(SMALL, seed=seed)
    return TrainingState(
        model=model,
        optimizer=build_optimizer(model, CONFIG.optimizer),
        average=moving_average(model),
        parallel=ParallelModel(model),
    )


def advance(state: TrainingState) -> None:
    train_step(state, batch(), CONFIG)
    state.step += 1


def tensors(state: TrainingState) -> dict[str, Tensor]:
    """Copies of everything that a step changes."""
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    found = {f"weights.{name}": parameter for name, parameter in state.model.named_parameters()}
    found |= {f"average.{name}": tensor for name, tensor in (state.average or {}).items()}
    for parameter, moments in state.optimizer.state.items():
        found |= {f"{kind}.{names[parameter]}": tensor for kind, tensor in moments.items()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def writing(folder: Path, **config: Any) -> CheckpointWriter:
    return CheckpointWriter(
        folder, CheckpointConfig(**config), image=ImageConfig(size=32), process_group=ProcessGroup()
    )


def full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """What writes waits for this."""
    go, save = threading.Event(), writer.dcp.save

    def waits(*args: Any, **kwargs: Any) -> Any:
        assert go.wait(timeout=60)
        return save(*args, **kwargs)

    monkeypatch.setattr(writer.dcp, "save", waits)
    return go


def test_steps_while_a_checkpoint_is_written_do_not_change_it(tmp_path: Path, held: threading.Event) -> None:
    state = new_state()
    for _ in range(2):
        advance(state)
    before = tensors(state)
    with writing(tmp_path) as saving:
        saving.save(state, {"place": 7})
        for _ in range(2):
            advance(state)
        assert last_checkpoint(tmp_path) is None  # it was not waited for
        held.set()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in tensors(state).items() if "weights" in name)
    checkpoint = last_checkpoint(tmp_path)
    restored = new_state(seed=1)
    restored.model.load_state_dict(read_weights(checkpoint).state)
    assert restore_checkpoint(checkpoint, restored) == {"place": 7}
    assert restored.step == 2
    after = tensors(restored)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_checkpoint_waits_for_the_one_before(tmp_path: Path, held: threading.Event) -> None:
    state = new_state()
    with writing(tmp_path) as saving:
        saving.save(state, {})
        state.step = 1
        second = threading.Thread(target=saving.save, args=(state, {}))
        second.start()
        second.join(timeout=0.2)
        assert second.is_alive()
        held.set()
        second.join()
    assert checkpoint_steps(tmp_path) == [0, 1]


@pytest.mark.parametrize(
    ("config", "left"),
    [
        ({"every": 2, "keep": 2}, [6, 8]),
        ({"every": 2, "keep": 1, "keep_every": 4}, [0, 4, 8]),
    ],
)
def test_the_newest_checkpoints_stay_and_those_kept_for_good(
    tmp_path: Path, config: dict, left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer.dcp, "save", lambda *args, **kwargs: None)
    state = new_state()
    with writing(tmp_path, **config) as saving:
        for state.step in range(0, 10, 2):
            saving.save(state, {})
    assert checkpoint_steps(tmp_path) == left
    assert last_checkpoint(tmp_path).name == "step-00000008"


def test_checkpoints_kept_for_good_are_among_those_written() -> None:
    with pytest.raises(ValueError, match=r"keep_every is 30; it must be a multiple of checkpoint\.every 20, or 0"):
        CheckpointConfig(every=20, keep_every=30)


@pytest.mark.parametrize("part", ["write_weights", "dcp.save", "os.replace"])
def test_what_cannot_be_written_is_said_at_the_next_step_and_the_last_good_checkpoint_stays(
    tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = new_state()
    with pytest.raises(CheckpointError) as caught, writing(tmp_path) as saving, monkeypatch.context() as patch:
        saving.save(state, {})
        saving.wait()
        assert not saving.failed
        patch.setattr(f"contracap.training.writer.{part}", full)
        state.step = 1
        saving.save(state, {})
        while not saving.failed:
            time.sleep(0.01)
        saving.wait()
    good, failed = tmp_path / "step-00000000", tmp_path / "step-00000001"
    assert str(caught.value) == (
        f"{failed} cannot be written: No space left on device. Last good checkpoint: {good}. "
        "Put that right, then continue with resume=true"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", good.name]
    assert load(tmp_path / "last")


class Killed(BaseException):
    """Nothing cleans up behind it."""


@pytest.mark.parametrize("before", [False, True])
def test_a_kill_at_any_moment_of_a_write_leaves_a_run_that_goes_on(
    tmp_path: Path, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, rmtree, kills, left = os.replace, shutil.rmtree, 0, 0
    state, restored = new_state(), new_state()

    def dying(action: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                if action is rmtree:
                    next(path for path in args[0].rglob("*") if path.is_file()).unlink()
                raise Killed
            action(*args, **kwargs)

        return run

    def save(folder: Path, step: int) -> None:
        state.step = step
        with writing(folder, keep=1) as saving:
            saving.save(state, {})

    save(tmp_path / "first", 1)
    monkeypatch.setattr(writer.os, "replace", dying(rename))
    monkeypatch.setattr(writer.shutil, "rmtree", dying(rmtree))
    while True:
        folder = tmp_path / str(kills)
        if before:
            shutil.copytree(tmp_path / "first", folder, symlinks=True)
        left = kills + 1
        try:
            save(folder, 2)
            break
        except Killed:
            kills += 1
        left, found = 0, last_checkpoint(folder)
        assert found is not None or not before
        if found is not None:
            assert restore_checkpoint(found, restored) == {} and read_weights(found).state
        save(folder, 3)
        assert sorted(path.name for path in folder.iterdir()) == ["last", "step-00000003"]
    assert kills >= (4 if before else 2)  # and what torch does


def test_without_a_link_a_run_goes_on_from_the_newest_checkpoint(finished: dict) -> None:
    last = Path(finished["out"]) / "checkpoints" / "last"
    last.unlink()
    shutil.copytree(last.with_name("step-00000004"), last)  # a copy that followed links
    train(build(Recipe, finished | {"steps": 9}))
    assert last.is_symlink() and last.resolve().name == "step-00000009"
    assert [step for step, *_ in losses(Path(finished["out"]))] == list(range(1, 10))


def test_what_cannot_be_deleted_is_warned_of_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(path: Path, **kwargs: Any) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    state = new_state()
    with writing(tmp_path, keep=1) as saving:
        with monkeypatch.context() as patch:
            patch.setattr(writer.shutil, "rmtree", busy)
            for state.step in range(3):
                saving.save(state, {})
            saving.wait()
        assert f"{tmp_path / 'step-00000001'} cannot be deleted: Device or resource busy: " in caplog.text
        assert checkpoint_steps(tmp_path) == [2]
        assert len(list(tmp_path.iterdir())) == 4  # with two that are hidden
        state.step = 3
        saving.save(state, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-00000003"]


def test_a_checkpoint_before_the_first_step_counts_none(tmp_path: Path) -> None:
    first, restored = new_state(), new_state(seed=1)
    with writing(tmp_path) as saving:
        saving.save(first, {})
    restored.model.load_state_dict(read_weights(tmp_path / "last").state)
    restore_checkpoint(tmp_path / "last", restored)
    plain = new_state()
    for state in (plain, first, restored):
        advance(state)
    expected = tensors(plain)
    assert {float(moments["step"]) for moments in plain.optimizer.state.values()} == {1.0}
    for state in (first, restored):
        assert all(
            torch.equal(tensor, expected[name]) for name, tensor in tensors(state).items() if "average" not in name
        )


def test_a_failed_checkpoint_stops_the_run_before_the_next_one(recipe_values: dict, monkeypatch) -> None:
    calls = iter(range(10))
    write = writer.write_weights
    monkeypatch.setattr(
        writer, "write_weights", lambda *args, **kwargs: (full if next(calls) else write)(*args, **kwargs)
    )
    with pytest.raises(CheckpointError, match=r"step-00000004 cannot be written: No space .*: \S+/step-00000002\. Put"):
        train(build(Recipe, recipe_values | {"steps": 1000, "checkpoint": {"every": 2}}))
    assert len(read_metrics(Path(recipe_values["out"]))) <= 6


def test_a_run_whose_folder_vanishes_stops_and_says_so(
    recipe_values: dict, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(recipe_values["out"])
    at_step(monkeypatch, 3, lambda: shutil.rmtree(folder))
    (tmp_path / "recipe.toml").write_text(to_toml(build(Recipe, recipe_values | {"steps": 1000})))
    assert cli.main(["train", str(tmp_path / "recipe.toml")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"contracap: error: {folder}: the run cannot continue: No such file or directory: ")
    assert "Last good checkpoint: none yet." in error
    assert not folder.exists()


def test_records_that_cannot_be_written_stop_the_run_and_the_last_good_checkpoint_is_named(
    recipe_values: dict, monkeypatch
) -> None:
    record = Recorder.record

    def fills(self: Recorder, step: int, *args: Any) -> None:
        record(self, step, *args)
        if step == 3:
            full()

    monkeypatch.setattr(Recorder, "record", fills)
    with pytest.raises(
        CheckpointError,
        match=r"run: the run cannot continue: No space left on device\. Last .*: \S+/step-00000002\. Put",
    ):
        train(build(Recipe, recipe_values | {"checkpoint": {"every": 2}}))


def test_a_run_that_is_asked_to_end_does_so_behind_a_checkpoint_with_a_status_of_its_own(
    whole: Path, whole_values: dict, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, handlers = writer.dcp.save, [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    values, folder = whole_values | {"resume": True}, Path(whole_values["out"])
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: signal.raise_signal(signal.SIGUSR1))

        def asked_again(*args: Any, **kwargs: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return save(*args, **kwargs)

        patch.setattr(writer.dcp, "save", asked_again)
        (tmp_path / "recipe.toml").write_text(to_toml(build(Recipe, values)))
        assert cli.main(["train", str(tmp_path / "recipe.toml")]) == 75
    checkpoints = folder / "checkpoints"
    *_, error = capsys.readouterr().err.splitlines()
    assert error == (
        "contracap: error: interrupted after step 3 of 8: the same command continues from "
        f"{checkpoints / 'step-00000003'}"
    )
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == handlers
    resumed = train(build(Recipe, values))
    for file in ("model.safetensors", "average.safetensors"):
        assert_same_weights(resumed, whole / "checkpoints" / "last", file)
    assert losses(folder) == losses(whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_waits_for_data_ends_behind_a_checkpoint_and_goes_on_with_the_next_sample(
    whole: Path, whole_values: dict, monkeypatch, workers: int
) -> None:
    values = whole_values | {"data": whole_values["data"] | {"workers": workers}}
    decode, calls = batch_maker.decode, iter(range(1000))

    def stands_still(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 8 * 3 + 2:
            time.sleep(60)
        return decode(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(batch_maker, "decode", stands_still)
        at_step(patch, 3, lambda: threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start())
        with pytest.raises(Interrupted, match=r"after step 3 of 8: the same command with resume=true continues from"):
            train(build(Recipe, values))
    train(build(Recipe, values | {"steps": 8, "resume": True}))
    assert losses(Path(values["out"])) == losses(whole)


def test_a_run_that_has_not_begun_ends_at_once_and_leaves_nothing(recipe_values: dict, monkeypatch) -> None:
    monkeypatch.setattr("contracap.training.trainer.initial_model", lambda *args: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match="before a step was done: the same command begins again"):
        train(build(Recipe, recipe_values))
    assert not Path(recipe_values["out"]).exists()


def test_the_first_ctrl_c_ends_a_run_behind_a_checkpoint_and_the_second_one_at_once(
    recipe_values: dict, monkeypatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "validation_losses", lambda *args: pytest.fail("evaluates first"))
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted, match="interrupted after step 2 of 8"):
            train(build(Recipe, recipe_values | {"validate_every": 2}))
    assert "Ctrl-C again ends at once" in capfd.readouterr().err
    twice = [signal.SIGINT, signal.SIGINT]
    at_step(monkeypatch, 3, lambda: [signal.raise_signal(number) for number in twice])
    with pytest.raises(KeyboardInterrupt):
        train(build(Recipe, recipe_values | {"resume": True}))


def test_two_runs_at_once_in_a_folder_are_refused(recipe_values: dict) -> None:
    folder = Path(recipe_values["out"])
    held, told = os.pipe()
    if (other := os.fork()) == 0:
        try:  # an error must not go on as a second test run
            with lock_folder(folder):
                os.write(told, b"!")
                time.sleep(60)
        finally:
            os._exit(1)
    try:
        os.read(held, 1)
        with pytest.raises(CheckpointError, match=f"another run is at work there .process {other} "):
            train(build(Recipe, recipe_values))
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    with lock_folder(folder):  # the lock goes with the process
        pass


@pytest.mark.parametrize("existed", [True, False])
def test_a_run_that_fails_early_removes_only_a_folder_of_its_own(recipe_values: dict, existed: bool) -> None:
    folder = Path(recipe_values["out"])
    if existed:
        folder.mkdir(parents=True)
    with pytest.raises(FileNotFoundError):
        train(build(Recipe, recipe_values | {"data": {"train": "none", "batch_size": 8}}))
    assert folder.exists() == existed


def test_shutdown_signal_while_the_optimizer_is_read_blames_no_checkpoint(finished: dict, monkeypatch) -> None:
    monkeypatch.setattr(dcp.FileSystemReader, "read_data", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match=r"the same command continues from .*step-00000008"):
        train(build(Recipe, finished | {"steps": 9}))


def test_of_several_ranks_one_tells_of_the_end(capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with shutdown_signal():
        signal.raise_signal(signal.SIGINT)
    assert not capfd.readouterr().err


def test_a_run_whose_last_checkpoint_cannot_be_written_is_no_success(recipe_values: dict, monkeypatch) -> None:
    ended: list[Any] = []
    monkeypatch.setattr(Recorder, "__exit__", lambda self, kind, *_: ended.append(kind))
    monkeypatch.setattr(writer, "write_weights", full)
    with pytest.raises(CheckpointError, match="step-00000003 cannot be written: No space left"):
        train(build(Recipe, recipe_values | {"steps": 3}))
    assert ended == [CheckpointError]


def test_a_run_that_is_asked_to_end_in_its_last_step_is_done(recipe_values: dict, monkeypatch) -> None:
    at_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGTERM))
    assert train(build(Recipe, recipe_values | {"steps": 3})).name == "step-00000003"


def test_workers_of_the_data_stay_when_all_processes_are_asked_to_end(recipe_values: dict, monkeypatch) -> None:
    def ask_all() -> None:
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            os.kill(int(child), signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    at_step(monkeypatch, 2, ask_all)
    with pytest.raises(Interrupted, match="interrupted after step 2 of 8"):
        train(build(Recipe, recipe_values | {"data": recipe_values["data"] | {"workers": 2}}))


class Planted:
    """A pickle of it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("where", ["metadata", "values", "paths"])
def test_a_planted_checkpoint_runs_no_code(tmp_path: Path, monkeypatch, where: str) -> None:
    state, ran = new_state(), tmp_path / "ran"
    advance(state)
    with CheckpointWriter(tmp_path, CheckpointConfig(), image=CONFIG.image, process_group=ProcessGroup()) as writer:
        if where == "values":
            state.optimizer.param_groups[0]["eps"] = Planted(ran)
        writer.save(state, {"data": 1})
    checkpoint = tmp_path / "step-00000001"
    metadata = checkpoint / "optimizer" / ".metadata"
    if where == "metadata":
        metadata.write_bytes(pickle.dumps(Planted(ran)))
    if where == "paths":
        metadata.write_bytes(metadata.read_bytes().replace(b"__0_0.distcp", b"/dev/urandom"))
    with pytest.raises(CheckpointError, match=r"step-00000001 cannot be resumed from: [^\n]*$"):
        restore_checkpoint(checkpoint, new_state())
    assert not ran.exists()


def test_a_part_that_is_no_regular_file_or_damaged_is_refused_in_words_of_our_own(tmp_path: Path) -> None:
    state = new_state()
    advance(state)
    with CheckpointWriter(tmp_path, CheckpointConfig(), image=CONFIG.image, process_group=ProcessGroup()) as writer:
        writer.save(state, {"data": 1})
    checkpoint = tmp_path / "step-00000001"
    (tensors,) = checkpoint.glob("optimizer/*.distcp")
    for path, said in ((tensors, "damaged"), (checkpoint / "optimizer" / ".metadata", "damaged")):
        path.write_bytes(b"\x80\x04nothing" + bytes(path.stat().st_size))
        with pytest.raises(CheckpointError, match=said) as refused:
            restore_checkpoint(checkpoint, new_state())
        assert "Pytorch" not in str(refused.value) and "Unpickling" not in str(refused.value)
    for name, plant in (("optimizer/.metadata", os.mkfifo), ("position.json", os.mkfifo)):
        (checkpoint / name).unlink()
        plant(checkpoint / name)
        with pytest.raises(CheckpointError, match="named pipe"):
            restore_checkpoint(checkpoint, new_state())
    (checkpoint / "position.json").unlink()
    (checkpoint / "position.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="device"):
        restore_checkpoint(checkpoint, new_state())
