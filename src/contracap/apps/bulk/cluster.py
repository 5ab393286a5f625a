"""Many shards on many machines, by Ray Data: it schedules the shards, and repeats those whose worker died.

Nothing here imports Ray before the work starts; it reads some of its settings from the environment then.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any

import torch

from contracap.apps.bulk.cluster_config import CORES, ClusterConfig
from contracap.apps.bulk.output_config import describe_run
from contracap.apps.bulk.output_folder import Folder
from contracap.apps.bulk.parts import BulkConfig, PartWriter, ShardOutcome, absolute_name, part_config, part_name
from contracap.apps.bulk.ray_session import BulkError, ray_session
from contracap.model.coca import CoCa
from contracap.precision import Precision
from contracap.pretrained.devices import find_device, find_precision, place
from contracap.processor import Processor
from contracap.progress import logging_on, progress_bar

ATTEMPTS = 4  # at a shard; one that takes its workers' memory would kill them for ever
BLOCKS = 10_000  # of shards, at most: Ray takes some milliseconds for each


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Outcomes of a run: shards whose parts were there before, and the outcome of every other."""

    before: int
    outcomes: list[ShardOutcome]

    @property
    def broken(self) -> list[ShardOutcome]:
        """Outcomes of the shards without a part."""
        return [outcome for outcome in self.outcomes if outcome.problem]


def run_on_cluster(
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
    """Write the parts of all shards that have none in the folder `out`, which no other run may use meanwhile.

    The same call continues an interrupted run. Every worker gets the model from here.

    Args:
        weights: their name, for the readers of the parts.
        progress: whether a bar is shown on a terminal.

    Raises:
        BulkError: if Ray cannot start, or what is wrong with a worker is wrong with all: for one, a full disk.
        FolderError: if the folder belongs to a run with other weights or settings.
        ValueError: if the model cannot do what is wanted.
    """
    described, decided = describe_run(weights, model, processor), part_config(config, model, processor)
    PartWriter(config, model, processor, metadata=described, threads=1)  # refused here, before there are workers
    folder = Folder(absolute_name(out))
    folder.check({name: decided[name] for name in decided if (name, decided[name]) != ("precision", "auto")})
    present, wanted = folder.names(), list(dict.fromkeys(map(absolute_name, shards)))
    todo = [shard for shard in wanted if part_name(shard) not in present]
    before = len(wanted) - len(todo)
    if not todo:
        return Summary(before=before, outcomes=[])
    try:
        with ray_session(cluster) as ray:
            placing = _place(ray, cluster, len(todo))
            config = replace(config, precision=_find_precision(ray, placing, config.precision))
            decided = part_config(config, model, processor)
            folder.claim(decided, described=described)
            folder.remove_partial()
            job = Job(
                config=config,
                folder=folder.name,
                metadata={**described, "settings": decided},
                contents=ray.put((model.cpu(), processor)),
                ledger=ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Ledger).remote(),
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
class Job:
    """Work of every worker. `contents`: Ray's reference of model and processor; `ledger`: its actor."""

    config: BulkConfig
    folder: str
    metadata: dict[str, Any]
    contents: Any
    ledger: Any


@dataclass(frozen=True, kw_only=True)
class Placing:
    """Number of workers, and resources of each."""

    workers: int
    cores: int
    gpus: float


class Ledger:
    """Shards that the workers of a run have begun and ended, for those that repeat the work of one that died."""

    def __init__(self) -> None:
        self._begun, self._ended = Counter[str](), dict[str, ShardOutcome]()

    def begin(self, shard: str) -> ShardOutcome | None:
        """Count an attempt. Return the outcome instead if the shard is done, or was tried too often."""
        self._begun[shard] += 1
        if shard not in self._ended and self._begun[shard] > ATTEMPTS:
            died = f"{ATTEMPTS} workers died of it, perhaps for want of memory: lower --batch-size or --workers"
            return ShardOutcome(shard=shard, problem=f"cannot read shard {shard}: {died}")
        return self._ended.get(shard)

    def end(self, outcome: ShardOutcome) -> None:
        """Keep the outcome."""
        self._ended[outcome.shard] = outcome


class Worker:
    """A worker that holds the model, and turns a row with a shard's name into one with its outcome."""

    def __init__(self, job: Job, placing: Placing) -> None:
        self._job, self._placing = job, placing
        self._failure = ""

    @cached_property
    def _writer(self) -> PartWriter:
        import ray

        torch.set_num_threads(self._placing.cores)
        model, processor = ray.get(self._job.contents)
        device = find_device("cuda" if self._placing.gpus else "cpu")
        model = place(model, device=device, precision=self._job.config.precision)
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


def _outcomes_from_outside(shards: Sequence[str], placing: Placing, job: Job) -> list[ShardOutcome]:
    """Call `_outcomes` on a machine of the cluster: Ray Data cannot be led through Ray's client."""
    import ray

    try:
        return ray.get(ray.remote(num_cpus=0)(_outcomes).remote(shards, placing, job))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, BulkError):
            raise error.cause from None
        raise


def _outcomes(shards: Sequence[str], placing: Placing, job: Job, progress: bool = False) -> list[ShardOutcome]:
    """Return the outcome of every shard, in the order in which they end."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a shard may well take longer than the half hour that is allowed
    # A worker that dies is replaced, and gets its block again.
    rows = ray.data.from_items(
        [{"shard": shard} for shard in shards], override_num_blocks=min(len(shards), BLOCKS)
    ).map(
        Worker,  # pyrefly: ignore[bad-argument-type], which does not know of classes that Ray makes in its workers
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


def _place(ray: ModuleType, cluster: ClusterConfig, shards: int) -> Placing:
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    sizes = [(int(machine.get("CPU", 0)), float(machine.get("GPU", 0))) for machine in machines]
    gpus = cluster.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if any(count for _, count in sizes) else 0.0
    wanted = cluster.workers or sum(int(count / gpus) if gpus else cores // CORES for cores, count in sizes) or 1
    workers = min(wanted, shards)
    return Placing(workers=workers, cores=cores_each(sizes, workers, gpus), gpus=gpus)


def _find_precision(ray: ModuleType, placing: Placing, wanted: Precision) -> Precision:
    """Return the precision that the workers compute in; the GPUs may all be in other machines than this one."""
    if not placing.gpus:
        return find_precision(find_device("cpu"), wanted)
    if wanted != "auto":
        return wanted
    return ray.get(ray.remote(num_cpus=0, num_gpus=placing.gpus)(find_precision).remote(torch.device("cuda")))


def cores_each(machines: Sequence[tuple[int, float]], workers: int, gpus: float) -> int:
    """Return the largest number of cores for each worker, given the cores and GPUs of each machine; 1 if the workers
    do not fit yet."""

    def room(cores: int) -> int:
        return sum(min(have // cores, int(count / gpus) if gpus else have) for have, count in machines)

    most = max((cores for cores, _ in machines), default=0)
    return max((cores for cores in range(1, most + 1) if room(cores) >= workers), default=1)
