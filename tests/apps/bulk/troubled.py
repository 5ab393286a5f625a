"""A run whose workers are in trouble: troubled.py TROUBLE WEIGHTS SHARDS OUT LOG. It says how it ended.

Each worker writes its process and the shard it begins to the file LOG."""

import os
import resource
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from contracap.apps.bulk import cluster, parts
from contracap.apps.bulk.cluster_config import ClusterConfig
from contracap.apps.bulk.ray_session import BulkError
from contracap.data.shards import list_shards
from contracap.generation import BeamSearch
from contracap.pretrained import load


def end(writer: parts.PartWriter, *args: object) -> None:
    """End as the system does where memory has run out, in the middle of a part."""
    os.kill(os.getpid(), signal.SIGKILL)


class TroubledWorker(cluster.Worker):
    """Dies of shard 1 once and of shard 3 each time, or is slow, or has no room on its disk."""

    def __call__(self, row: dict) -> dict:
        trouble, log = os.environ["TROUBLE"], Path(os.environ["TROUBLE_LOG"])
        attempts = log.read_text().count(f" {row['shard']}\n")
        with log.open("a") as lines:
            lines.write(f"{os.getpid()} {row['shard']}\n")
        if trouble == "slow":
            time.sleep(1)
        if trouble == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        deadly = row["shard"].endswith("003.tar") or (row["shard"].endswith("001.tar") and not attempts)
        if trouble == "death" and deadly:
            parts.PartWriter._results = end  # type: ignore[method-assign]
        return super().__call__(row)


def main(trouble: str, weights: str, shards: str, out: str, log: str) -> None:
    Path(log).touch()
    os.environ |= {"TROUBLE": trouble, "TROUBLE_LOG": log}  # for the workers, which Ray starts
    cluster.Worker = TroubledWorker  # type: ignore[misc]
    try:
        done = cluster.run_on_cluster(
            list_shards(shards),
            out,
            parts.BulkConfig(strategy=BeamSearch(width=2, max_tokens=12), batch_size=4),
            *load(weights),
            weights="tiny",
            cluster=ClusterConfig(workers=2),
        )
    except BulkError as error:
        sys.exit(str(error))
    print([asdict(outcome) for outcome in done.outcomes])


if __name__ == "__main__":
    from tests.apps.bulk.troubled import main  # whose worker has a module that the workers can import

    main(*sys.argv[1:])
