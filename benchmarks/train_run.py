"""The step within a run: fed by the data pipeline, and sharded by FSDP."""

import copy
import os
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager

import torch
import torch.distributed as dist

from benchmarks.harness import Row, Run, alternate, compare, data_path, require_equal
from benchmarks.train_steps import Ours, Step, make_batch, precision
from contracap.data.batch import Batch
from contracap.data.config import DataConfig
from contracap.data.loader import TrainingBatches
from contracap.parallel import ParallelConfig, ProcessGroup
from contracap.parallel.sharding import shard
from contracap.tokenizer import Tokenizer
from contracap.training.optimizer import build_optimizer
from contracap.training.step import TrainingState, train_step

MAX_WORKERS = 16
BUFFER = 1000  # samples
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}  # under FSDP the norms compute in bf16, too


def feeding_row(run: Run, *, size: str, samples: int) -> Row:
    """Our training pipeline, from Flickr8k's shards to the device, next to the eager step that it feeds. The ratio is
    how many times faster the pipeline is, if nothing else uses the CPU."""
    size, samples = run.size(size), run.count(samples, small=8)
    ours, workers = Ours(size, run), min(MAX_WORKERS, len(os.sched_getaffinity(0)))
    with closing(read_batches(ours, run, samples=samples, workers=workers)) as batches:
        (reading,) = alternate(lambda: next(batches).to(run.device), rounds=run.rounds, clock=run.clock)
        batch = next(batches).to(run.device)
    (training,) = alternate(ours.step(batch), rounds=run.rounds, clock=run.clock)
    read, trained = (samples * run.rounds / sum(seconds) for seconds in (reading, training))
    return Row(
        work=f"data pipeline next to the {size} step that it feeds, batch {samples}",
        unit="samples/s",
        ours=read,
        peer=trained,
        ratio=read / trained,
        note=f"{workers} workers; JPEG images of 500x375; the peer is our eager step in {precision(run)}; means",
    )


def read_batches(ours: Ours, run: Run, *, samples: int, workers: int) -> Generator[Batch, None, None]:
    """Yield training batches for a model, as a recipe's run reads them."""
    config = DataConfig(
        train=str(data_path("flickr8k/train")), batch_size=samples, shuffle_buffer=BUFFER, workers=workers
    )
    text = ours.model.config.text
    tokenizer = Tokenizer(text.context, text.vocab_size)
    yield from TrainingBatches(config, image=ours.config.image, tokenizer=tokenizer, seed=run.seed)


def fsdp_row(run: Run, *, size: str, samples: int) -> Row:
    """Our eager step by FSDP on one rank, next to the plain one.

    Raises:
        UnequalError: if losses or gradient norm differ.
    """
    size, samples = run.size(size), run.count(samples, small=8)
    ours, batch = Ours(size, run), make_batch(size, run, samples=samples)
    plain = ours.step(batch)
    with one_rank(run.device) as process_group:
        sharded = sharded_step(ours, batch, process_group)
        return compare(
            f"{size} step by FSDP on one rank, batch {samples}",
            run=run,
            ours=sharded,
            checked_peer=lambda: (plain, require_equal(sharded(), plain(), tolerance=TOLERANCES[precision(run)])),
            items=samples,
            unit="samples/s",
        )


@contextmanager
def one_rank(device: torch.device) -> Iterator[ProcessGroup]:
    """Be the only rank of a process group, for the duration of the block."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    try:
        yield ProcessGroup(device=device)
    finally:
        dist.destroy_process_group()


def sharded_step(ours: Ours, batch: Batch, process_group: ProcessGroup) -> Step:
    """Return the step of a copy of our model that FSDP shards over the ranks of the process group."""
    model = copy.deepcopy(ours.model)
    parallel = shard(model, ParallelConfig(kind="fsdp"), process_group, bf16=ours.config.bf16)
    optimizer = build_optimizer(model, ours.config.optimizer)
    state = TrainingState(model=model, optimizer=optimizer, average=None, parallel=parallel)
    return lambda: train_step(state, batch, ours.config).read()
