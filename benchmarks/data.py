"""Speed of the data pipeline: from tar shards to batches and from texts to ids, next to open_clip's."""

import io
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from inspect import signature
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from jaxtyping import Float32, Int64
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.harness import Benchmark, Row, Run, UnequalError, Work, compare, data_path, in_fresh_process
from benchmarks.machine import peak_mib, threads
from benchmarks.peers import peer_module
from contracap.data.batch import Batch
from contracap.data.config import DataConfig
from contracap.data.loader import TrainingBatches, evaluation_samples, validation_batches
from contracap.data.shards import list_shards, write_shard
from contracap.images import AugmentationConfig, ImageConfig, normalise
from contracap.model.packing import pack
from contracap.tokenizer import PADDING, Tokenizer, text_lengths

PeerBatches = Iterable[tuple[Float32[Tensor, "batch 3 height width"], Int64[Tensor, "batch context"]]]
Side = Callable[[tuple[int, int]], int]  # max: the longer one, min: the shorter one

SAMPLES = 1024  # a multiple of the batch, so that both read whole epochs
BATCH = 64
SHARDS = 4
QUALITY = 90
IMAGE = ImageConfig(size=224)
AUGMENTATION = AugmentationConfig(crop_scale=(0.9, 1.0), flip=0.0)  # open_clip's defaults
CONTEXT = 76
PEER_MODEL = "coca_ViT-B-32"  # its tokenizer has that context
PIXEL_TOLERANCE = 2.01  # of 255: resizing rounds after each of its two passes, and normalising adds 0.01
CAPTIONS, TEXT_BATCH = 10_000, 1024
DRAWS = 100_000  # samples over which the memory of a worker is watched


def pipeline_row(run: Run, *, work: str, side: int, of: Side) -> Row:
    """The training pipelines over all samples, in computing time of one core."""
    with TemporaryDirectory() as folder, threads(1):
        shards = make_shards(Path(folder), side=side, of=of)
        batches, epoch = training_batches(shards, run.seed), SAMPLES // BATCH

        def checked_peer() -> tuple[Work, str]:
            training, validation = open_clip_batches(shards, run.seed)
            levels = largest_difference(shards, validation)
            if sorted_ids(batch.ids for batch in islice(batches, epoch)) != sorted_ids(ids for _, ids in training):
                raise UnequalError(f"{work}: an epoch of training has other token ids than open_clip's")
            size = sum(shard.stat().st_size for shard in shards.iterdir()) / SAMPLES / 1000
            note = (
                f"an epoch's token ids are equal, pixels of evaluation differ by {levels:.2f} of 255 at most "
                f"(allowed: {PIXEL_TOLERANCE}); {size:.0f} kB of tar a sample; our pixels stay uint8, open_clip's are "
                "normalised floats; computing time of the process"
            )
            return partial(exhaust, training), note

        return compare(
            work,
            run=run,
            ours=lambda: exhaust(islice(batches, epoch)),
            checked_peer=checked_peer,
            items=SAMPLES,
            unit="images/s per core",
            clock=time.process_time,
        )


def tokenizer_row(run: Run) -> Row:
    """Texts to ids without padding, on all cores, next to open_clip's tokenizer, which pads them."""
    captions = list(islice(flickr8k_captions(), CAPTIONS))
    tokenizer = Tokenizer(CONTEXT)
    groups = [captions[first : first + TEXT_BATCH] for first in range(0, len(captions), TEXT_BATCH)]

    def ours() -> None:
        for texts in groups:
            ids = tokenizer(texts)
            lengths = text_lengths(ids, tokenizer.end)
            layout = pack(lengths, lengths, device=ids.device)
            layout.unpad(layout.fit(ids, padding=PADDING))

    def checked_peer() -> tuple[Work, str]:
        peer = peer_module("open_clip").get_tokenizer(PEER_MODEL)
        for texts in groups:
            require_equal_ids(texts, tokenizer(texts), peer(texts))
        note = f"ids of {len(captions):,} captions are equal, in batches of {TEXT_BATCH}; wall time on all cores"
        return lambda: [peer(texts) for texts in groups], note

    return compare(
        "tokenise and pack", run=run, ours=ours, checked_peer=checked_peer, items=len(captions), unit="captions/s"
    )


def memory_row(run: Run) -> Row:
    """Growth of a data worker's peak memory from a tenth of the samples to all."""
    with TemporaryDirectory() as folder:
        shards = make_shards(Path(folder), side=256, of=min)
        tenth, half, whole = in_fresh_process(memory_peaks, shards, DRAWS, run.seed)
    return Row(
        work=f"memory growth of a worker over {DRAWS:,} samples",
        unit="MiB",
        ours=whole - tenth,
        note=f"peak resident memory after 10 %: {tenth:.1f} MiB, 50 %: {half:.1f} MiB, 100 %: {whole:.1f} MiB",
        reason="measured for ours only: it must not grow",
    )


def memory_peaks(shards: Path, draws: int, seed: int) -> list[float]:
    """Peak memory of this process, in MiB, after a tenth, a half and all of the training samples."""
    torch.set_num_threads(1)  # as in a worker of a loader
    batches, peaks = training_batches(shards, seed), []
    for share in (0.1, 0.4, 0.5):
        exhaust(islice(batches, round(draws / BATCH * share)))
        peaks.append(peak_mib(torch.device("cpu")))
    return peaks


def make_shards(folder: Path, *, side: int, of: Side) -> Path:
    """Write the first images of Flickr8k with their first captions, resized to `side` pixels of the `of` side."""
    found = list(islice(evaluation_samples(data_path("flickr8k/train")), SAMPLES))
    for number in range(SHARDS):
        records = (
            (sample.key, {"jpg": resized(sample.image, side, of), "txt": sample.captions[0].encode()})
            for sample in found[number::SHARDS]
        )
        write_shard(folder / f"{number:06}.tar", records)
    return folder


def flickr8k_captions() -> Iterator[str]:
    """All captions of the training split."""
    for sample in evaluation_samples(data_path("flickr8k/train")):
        yield from sample.captions


def training_batches(shards: Path, seed: int) -> Iterator[Batch]:
    """Our training pipeline, as in a recipe."""
    config = DataConfig(train=str(shards), batch_size=BATCH, streams=1, augmentation=AUGMENTATION)
    return iter(TrainingBatches(config, image=IMAGE, tokenizer=Tokenizer(CONTEXT), seed=seed))


def open_clip_batches(shards: Path, seed: int) -> tuple[PeerBatches, PeerBatches]:
    """An epoch of training batches and all evaluation batches, as open_clip's own trainer makes them."""
    open_clip, data = peer_module("open_clip"), peer_module("open_clip_train.data")
    tariterators = peer_module("webdataset.tariterators")
    # webdataset 1.0 marks the end of a shard by an empty member, which open_clip 3.3.0 stumbles over.
    if "eof_value" in signature(tariterators.tar_file_expander).parameters:
        vars(data)["tar_file_expander"] = partial(tariterators.tar_file_expander, eof_value=None)
    urls = "::".join(list_shards(shards))
    transforms = [
        open_clip.image_transform(IMAGE.size, is_train=training, mean=IMAGE.mean, std=IMAGE.std)
        for training in (True, False)
    ]
    arguments = SimpleNamespace(
        train_data=urls,
        val_data=urls,
        train_num_samples=SAMPLES,
        val_num_samples=SAMPLES,
        train_data_upsampling_factors=None,
        dataset_type="webdataset",
        dataset_resampled=False,
        imagenet_val=None,
        imagenet_v2=None,
        batch_size=BATCH,
        workers=0,
        world_size=1,
        seed=seed,
    )
    made = data.get_data(arguments, transforms, tokenizer=open_clip.get_tokenizer(PEER_MODEL))
    return made["train"].dataloader, made["val"].dataloader


def largest_difference(shards: Path, validation: PeerBatches) -> float:
    """Largest difference between our evaluation pixels and open_clip's, in levels of 255.

    Raises:
        UnequalError: if it is above the tolerance, or token ids differ.
    """
    ours = validation_batches(str(shards), batch_size=BATCH, image=IMAGE, tokenizer=Tokenizer(CONTEXT))
    levels = 255 * torch.tensor(IMAGE.std).reshape(3, 1, 1)
    largest = 0.0
    for batch, (pixels, ids) in zip(ours, validation, strict=True):
        require_equal_ids(batch.keys, padded(batch.ids), ids)
        difference = float(((normalise(batch.pixels, IMAGE) - pixels).abs() * levels).max())
        if difference > PIXEL_TOLERANCE:
            raise UnequalError(
                f"evaluation pixels of {batch.keys[0]} and the next {BATCH - 1} images differ from open_clip's by up "
                f"to {difference:.2f} of 255, allowed is {PIXEL_TOLERANCE}"
            )
        largest = max(largest, difference)
    return largest


def require_equal_ids(names: Sequence[str], ours: Int64[Tensor, "text context"], peer: Tensor) -> None:
    """Raises: UnequalError: naming the first text whose ids differ."""
    for name, row, peer_row in zip(names, ours, peer, strict=True):
        if not torch.equal(row, peer_row):
            raise UnequalError(f"{name!r}: token ids differ from open_clip's")


def padded(ids: Int64[Tensor, "batch tokens"]) -> Int64[Tensor, "batch context"]:
    """The ids padded to the context length."""
    return pad(ids, (0, CONTEXT - ids.shape[1]), value=PADDING)


def sorted_ids(batches: Iterable[Int64[Tensor, "batch tokens"]]) -> list[list[int]]:
    """All texts of some batches in an order that does not depend on that of the samples."""
    return sorted(row for ids in batches for row in padded(ids).tolist())


def exhaust(batches: Iterable[object]) -> None:
    """Read all batches."""
    deque(batches, maxlen=0)


def resized(jpeg: bytes, side: int, of: Side) -> bytes:
    """The image with its `of` side scaled to `side` pixels."""
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    width, height = (round(length * side / of(image.size)) for length in image.size)
    file = io.BytesIO()
    image.resize((width, height), Image.Resampling.LANCZOS).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


BENCHMARK = Benchmark(
    rows={
        "large": partial(pipeline_row, work="tar to batch, 500x375 images", side=500, of=max),
        "small": partial(pipeline_row, work="tar to batch, 256-pixel images", side=256, of=min),
        "tokenizer": tokenizer_row,
        "memory": memory_row,
    },
    samples=lambda: SAMPLES,
)
