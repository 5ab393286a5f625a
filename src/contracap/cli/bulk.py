"""The commands for many shards. They write one parquet file for each shard."""

from typing import TYPE_CHECKING, Annotated

from contracap.apps.bulk.cluster_config import ClusterConfig
from contracap.cli.flags import Flags, PathText, arg
from contracap.cli.messages import fail, say
from contracap.cli.options import Settings, Size, StrategyName, WeightsName
from contracap.extras import require_extra
from contracap.precision import EmbeddingDType, Precision
from contracap.wording import counted

if TYPE_CHECKING:
    from contracap.apps.bulk.parts import BulkConfig

Shards = Annotated[
    tuple[PathText, ...],
    arg(metavar="SHARDS [SHARDS ...]", help="A folder of tar shards, or shards; also URLs and {000..331}."),
]
Out = Annotated[
    PathText, arg(metavar="FOLDER", help="Folder for the parquet files, one for each shard; also s3:// or gs://.")
]
Cluster = Annotated[ClusterConfig, Flags]
BatchSize = Annotated[int, arg(help="Images in a batch.")]
BulkPrecision = Annotated[
    Precision, arg(help="Number format that the models compute in; auto is bf16 or fp16 on GPUs, fp32 on CPUs.")
]


def caption(
    weights: WeightsName,
    shards: Shards,
    /,
    *,
    out: Out,
    strategy: StrategyName = "beam",
    settings: Settings = (),
    prompt: Annotated[str, arg(metavar="TEXT", help="The beginning of each caption.")] = "",
    embed: Annotated[bool, arg(help="Write the embeddings of the images too.")] = False,
    dtype: Annotated[EmbeddingDType | None, arg(help="Number format of the embeddings; float32 by default.")] = None,
    cluster: Cluster = ClusterConfig(),
    batch_size: BatchSize = 64,
    precision: BulkPrecision = "auto",
    size: Size = None,
) -> int:
    """Write captions of tar shards on one machine or many. If interrupted, run the same command again to continue."""
    require_extra("ray", "ray", "pyarrow")
    from contracap.apps.bulk.parts import BulkConfig
    from contracap.generation.registry import build_strategy

    if dtype is not None and not embed:
        raise ValueError("--dtype is the number format of embeddings: give --embed too")
    config = BulkConfig(
        strategy=build_strategy(strategy, settings),
        prompt=prompt,
        embedding=dtype or "float32" if embed else None,
        precision=precision,
        batch_size=batch_size,
    )
    return _run(weights, shards, out, config, cluster, size)


def embed(
    weights: WeightsName,
    shards: Shards,
    /,
    *,
    out: Out,
    dtype: Annotated[EmbeddingDType, arg(help="Number format of the embeddings.")] = "float32",
    cluster: Cluster = ClusterConfig(),
    batch_size: BatchSize = 64,
    precision: BulkPrecision = "auto",
    size: Size = None,
) -> int:
    """Write embeddings of tar shards on one machine or many. If interrupted, run the same command again to continue."""
    require_extra("ray", "ray", "pyarrow")
    from contracap.apps.bulk.parts import BulkConfig

    config = BulkConfig(embedding=dtype, precision=precision, batch_size=batch_size)
    return _run(weights, shards, out, config, cluster, size)


def _run(
    weights: str, shards: tuple[str, ...], out: str, config: "BulkConfig", cluster: ClusterConfig, size: str | None
) -> int:
    from contracap.apps.bulk.cluster import run_on_cluster
    from contracap.apps.bulk.inputs import OTHER_IMAGE
    from contracap.apps.bulk.parts import NAMED
    from contracap.data.shards import list_shards
    from contracap.pretrained import load

    listed = list_shards(shards)
    model, processor = load(weights, size=size, device="cpu", precision="fp32")
    done = run_on_cluster(listed, out, config, model, processor, weights=weights, cluster=cluster)
    rows, unreadable = (sum(getattr(outcome, name) for outcome in done.outcomes) for name in ("rows", "unreadable"))
    before = f"; {counted(done.before, 'shard(s)')} had a file before" if done.before else ""
    images = f"{rows - unreadable:,} of {rows:,} images" if unreadable else counted(rows, "image(s)")
    say(f"{images} of {counted(len(done.outcomes) - len(done.broken), 'shard(s)')}{before}: {out}")
    if without := sum(outcome.without_image for outcome in done.outcomes):
        say(
            f"contracap: skipped {counted(without, 'sample(s) without an image, or with scattered files')}",
            to_stderr=True,
        )
    if others := sum(outcome.other_images for outcome in done.outcomes):
        say(f"contracap: skipped {counted(others, OTHER_IMAGE)}", to_stderr=True)
    for outcome in done.broken:
        fail(outcome.problem)
    if done.broken:
        fail(f"{len(done.broken)} of {counted(len(listed), 'shard(s)')} cannot be read and have no file in {out}")
    troubled = [outcome for outcome in done.outcomes if outcome.unreadable]
    for outcome in troubled[:NAMED]:
        more = max(0, outcome.unreadable - NAMED)
        named = outcome.first_unreadable + (f" and {more:,} more" if more else "")
        fail(f"{counted(outcome.unreadable, 'image(s)')} of {outcome.shard} cannot be read: {named}")
    if troubled:
        total = f"{counted(unreadable, 'image(s)')} of {counted(len(troubled), 'shard(s)')} cannot be read"
        fail(f"{total}; the column error in {out} says why")
    return 1 if done.broken or unreadable else 0
