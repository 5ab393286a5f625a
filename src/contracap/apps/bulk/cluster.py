"""Many shards on many machines, by Ray Data: it schedules the shards, and repeats those whose worker died.

Nothing here imports Ray before the work starts; it reads some of its settings from the environment then.
"""

import io
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import torch

from contracap.apps.bulk.cluster_config import CORES, ClusterConfig
from contracap.apps.bulk.folder import Folder
from contracap.apps.bulk.parts import BulkConfig, PartWriter, ShardOutcome, located, part_name, settings
from contracap.apps.bulk.settings import description
from contracap.model.coca import CoCa
from contracap.processor import Processor
from contracap.progress import logging_on, progress_bar

try:
    import fcntl
except ImportError:  # not on Windows, where folders of runs that were killed stay
    fcntl = None

ATTEMPTS = 4  # at a shard; one that takes its workers' memory would kill them for ever
BLOCKS = 10_000  # of shards, at most: Ray takes some milliseconds for each
PATIENCE = 5.0  # seconds for a cluster to answer in; Ray itself would wait for minutes, deaf to signals
SESSION_PREFIX = "contracap-ray-"
SETTLED = 60.0  # seconds after which a folder without a lock has lost its run: a younger one may be about to take it
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # else Ray tells its makers of each cluster it starts
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # else its C++ part warns of how its Python part starts workers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # as it will be in later versions, of which Ray warns otherwise
}


LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # else Ray listens at the machine's address, open to others


class BulkError(RuntimeError):
    """A run that cannot start, or cannot continue; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did: shards whose parts were there before, and the outcome of every other."""

    before: int
    outcomes: list[ShardOutcome]

    @property
    def broken(self) -> list[ShardOutcome]:
        """Outcomes of the shards without a part."""
        return [outcome for outcome in self.outcomes if outcome.problem]


def run(
    shards: Sequence[str],
    out: str,
    config: BulkConfig,
    model: CoCa,
    processor: Processor,
    *,
    weights: str,
    cluster: ClusterConfig = ClusterConfig(),
    progress: bool = True,
) -> Summary:
    """Writes the parts of all shards that have none in the folder `out`, which no other run may use meanwhile.

    The same call continues an interrupted run. Every worker gets the model from here.

    Args:
        weights: their name, for the readers of the parts.
        progress: whether a bar is shown on a terminal.

    Raises:
        BulkError: if Ray cannot start, or what is wrong with a worker is wrong with all: for one, a full disk.
        FolderError: if the folder belongs to a run with other weights or settings.
        ValueError: if the model cannot do what is wanted.
    """
    decided, described = settings(config, model, processor), description(weights, model, processor)
    metadata = {**described, "settings": decided}
    PartWriter(config, model, processor, metadata=metadata, threads=1)  # refused here, before there are workers
    folder = Folder(located(out))
    folder.check(decided)
    present, wanted = folder.names(), list(dict.fromkeys(map(located, shards)))
    todo = [shard for shard in wanted if part_name(shard) not in present]
    before = len(wanted) - len(todo)
    if not todo:
        return Summary(before=before, outcomes=[])
    try:
        with _ray(cluster) as ray:
            folder.claim(decided, described=described)
            folder.remove_partial()
            placing = _place(ray, cluster, len(todo))
            job = _Job(
                config=config,
                folder=folder.name,
                metadata=metadata,
                contents=ray.put((model.cpu(), processor)),
                ledger=ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Ledger).remote(),
            )
            if cluster.address and cluster.address.startswith("ray://"):
                outcomes = _outcomes_from_outside(todo, placing, job)
            else:
                outcomes = _outcomes(todo, placing, job, progress)
    except KeyboardInterrupt:
        done = sum(part_name(shard) in folder.names() for shard in wanted)
        raise KeyboardInterrupt(
            f"interrupted: {done} of {len(wanted)} shards are done; the same command continues"
        ) from None
    finally:  # what ends a run ends its workers, some of them in the middle of a part
        folder.remove_partial()
    return Summary(before=before, outcomes=outcomes)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What every worker is given. `contents`: Ray's reference of model and processor; `ledger`: its actor."""

    config: BulkConfig
    folder: str
    metadata: dict[str, Any]
    contents: Any
    ledger: Any


@dataclass(frozen=True, kw_only=True)
class _Placing:
    """How many workers, and what each takes."""

    workers: int
    cores: int
    gpus: float


class _Ledger:
    """What the workers of a run have begun and ended, for those that repeat the work of one that died."""

    def __init__(self) -> None:
        self._begun, self._ended = Counter[str](), dict[str, ShardOutcome]()

    def begin(self, shard: str) -> ShardOutcome | None:
        """Counts an attempt; returns the outcome if there is to be none, because of an earlier one or of too many."""
        self._begun[shard] += 1
        if shard not in self._ended and self._begun[shard] > ATTEMPTS:
            died = f"{ATTEMPTS} workers died of it, perhaps for want of memory: lower --batch-size or --workers"
            return ShardOutcome(shard=shard, problem=f"cannot read shard {shard}: {died}")
        return self._ended.get(shard)

    def end(self, outcome: ShardOutcome) -> None:
        """Keeps the outcome."""
        self._ended[outcome.shard] = outcome


class _Worker:
    """Holds the model, and makes a row with the outcome of one with the name of a shard."""

    def __init__(self, job: _Job, placing: _Placing) -> None:
        self._job, self._placing = job, placing
        self._failure = ""

    @cached_property
    def _writer(self) -> PartWriter:
        import ray

        torch.set_num_threads(self._placing.cores)
        model, processor = ray.get(self._job.contents)
        model = model.to("cuda" if self._placing.gpus else "cpu")
        return PartWriter(self._job.config, model, processor, metadata=self._job.metadata, threads=self._placing.cores)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """After an error that is not the shard's, `failure` says what is wrong, and no further shard is tried."""
        import ray

        outcome = ShardOutcome(shard=row["shard"])
        try:
            if not self._failure:
                outcome = ray.get(self._job.ledger.begin.remote(row["shard"]))
                if outcome is None:
                    outcome = self._writer.write(row["shard"], Folder(self._job.folder))
                    ray.get(self._job.ledger.end.remote(outcome))
        except (OSError, ValueError, torch.OutOfMemoryError) as error:
            outcome, self._failure = ShardOutcome(shard=row["shard"]), str(error) or type(error).__name__
        return {**asdict(outcome), "failure": self._failure}


def _outcomes_from_outside(shards: Sequence[str], placing: _Placing, job: _Job) -> list[ShardOutcome]:
    """Call `_outcomes` on a machine of the cluster: Ray Data cannot be led through Ray's client."""
    import ray

    try:
        return ray.get(ray.remote(num_cpus=0)(_outcomes).remote(shards, placing, job))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, BulkError):
            raise error.cause from None
        raise


def _outcomes(shards: Sequence[str], placing: _Placing, job: _Job, progress: bool = False) -> list[ShardOutcome]:
    """Return the outcome of every shard, in the order in which they end."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a shard may well take longer than the half hour that is allowed
    # A worker that dies is replaced, and gets its block again.
    rows = ray.data.from_items(
        [{"shard": shard} for shard in shards], override_num_blocks=min(len(shards), BLOCKS)
    ).map(
        _Worker,  # pyrefly: ignore[bad-argument-type], which does not know of classes that Ray makes in its workers
        fn_constructor_args=(job, placing),
        compute=ray.data.ActorPoolStrategy(size=placing.workers, max_tasks_in_flight_per_actor=1),
        num_cpus=placing.cores,
        num_gpus=placing.gpus,
    )
    outcomes = list[ShardOutcome]()
    bar = progress_bar(desc=f"0 of {len(shards)} shards", unit=" images", disable=not progress)
    try:
        with logging_on(bar):
            for row in rows.iter_rows():
                if failure := row.pop("failure"):
                    raise BulkError(f"stopped at {row['shard']}: {failure}")
                outcomes.append(ShardOutcome(**row))
                bar.set_description(f"{len(outcomes)} of {len(shards)} shards", refresh=False)
                bar.update(outcomes[-1].rows)
    except ray.exceptions.RayTaskError:  # a mistake of ours, with the traceback of the worker
        raise
    except ray.exceptions.RayError as error:
        raise BulkError(
            f"Ray cannot continue: {(str(error).strip() or type(error).__name__).splitlines()[-1]}"
        ) from error
    finally:
        bar.close()
    return outcomes


@contextmanager
def _ray(cluster: ClusterConfig) -> Generator[ModuleType, None, None]:
    """Ray, quiet, at the cluster's address or started here; it ends with the run."""
    if cluster.address is not None:
        _require_answer(cluster.address)
    for name, value in (ENVIRONMENT | (LOOPBACK if cluster.address is None else {})).items():
        os.environ.setdefault(name, value)
    import ray
    import ray.data

    ending = ExitStack()
    options: dict[str, Any] = {"address": cluster.address}
    if cluster.address is None:
        cores = max(cluster.workers or 1, os.cpu_count() or 1)
        options = {"address": "local", "num_cpus": cores, "include_dashboard": False}
        options["_temp_dir"] = ending.enter_context(_session_folder())
    ends = signal.getsignal(signal.SIGTERM)
    try:
        with _no_stderr(), _no_dashboard():  # stderr: its C++ part says there how much it will say
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        where = f"join the cluster at {cluster.address}" if cluster.address else "start Ray"
        ending.close()
        raise BulkError(f"cannot {where}: {error}") from None
    if callable(ends):  # what SIGTERM does here, as Ctrl-C, instead of Ray's own way out, which says nothing
        signal.signal(signal.SIGTERM, ends)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what ends a run is said once, by us
    said = io.StringIO()  # that workers died; not worth a word where the run ends with an error of its own
    with ending, redirect_stdout(said):
        try:
            yield ray
        except (BulkError, KeyboardInterrupt):
            ray.shutdown()
            said.truncate(0)
            raise
        finally:
            ray.shutdown()
            sys.stderr.write(said.getvalue())


def _require_answer(address: str) -> None:
    """Raises: BulkError: if nothing listens at an address that names a machine and a port."""
    try:
        place = urlsplit(address if "://" in address else f"//{address}")
        if place.hostname and place.port:
            socket.create_connection((place.hostname, place.port), timeout=PATIENCE).close()
    except (OSError, ValueError) as error:
        raise BulkError(f"cannot join the cluster at {address}: {error}") from None


@contextmanager
def _session_folder() -> Generator[str, None, None]:
    """A temporary folder for Ray's sockets and logs. Those of runs that were killed are removed, too."""
    if fcntl is not None:
        for left in Path(gettempdir()).glob(f"{SESSION_PREFIX}*"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > SETTLED:
                    with (left / "lock").open("ab") as lock:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its run has ended
                        shutil.rmtree(left, ignore_errors=True)
    with (
        TemporaryDirectory(prefix=SESSION_PREFIX, ignore_cleanup_errors=True) as folder,
        Path(folder, "lock").open("ab") as lock,
    ):
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


@contextmanager
def _no_dashboard() -> Generator[None, None, None]:
    """Ray starts without the process of its dashboard. Without any dashboard it would still ask the metadata servers of
    AWS, Azure and Google where it runs, though its usage statistics are off."""
    from ray._private import services

    start = services.start_api_server
    services.start_api_server = lambda *arguments, **named: ("", None)  # pyrefly: ignore[bad-assignment]
    try:
        yield
    finally:
        services.start_api_server = start


@contextmanager
def _no_stderr() -> Generator[None, None, None]:
    """Nothing reaches stderr, from whatever library."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _place(ray: ModuleType, cluster: ClusterConfig, shards: int) -> _Placing:
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    sizes = [(int(machine.get("CPU", 0)), float(machine.get("GPU", 0))) for machine in machines]
    gpus = cluster.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if any(count for _, count in sizes) else 0.0
    wanted = cluster.workers or sum(int(count / gpus) if gpus else cores // CORES for cores, count in sizes) or 1
    workers = min(wanted, shards)
    return _Placing(workers=workers, cores=cores_each(sizes, workers, gpus), gpus=gpus)


def cores_each(machines: Sequence[tuple[int, float]], workers: int, gpus: float) -> int:
    """The most cores that so many workers can have each, on machines with so many cores and GPUs; 1 if there is no room
    for all of them yet."""

    def room(cores: int) -> int:
        return sum(min(have // cores, int(count / gpus) if gpus else have) for have, count in machines)

    most = max((cores for cores, _ in machines), default=0)
    return max((cores for cores in range(1, most + 1) if room(cores) >= workers), default=1)
