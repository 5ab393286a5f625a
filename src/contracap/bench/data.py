"""How fast data comes: from tar shards to batches, from texts to ids, each beside open_clip's way of doing it."""

import io
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
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

from contracap.bench.timing import (
    LEAST_ROUNDS,
    Benchmark,
    Row,
    UnequalError,
    Work,
    compare,
    peak_mib,
    peer_module,
    this_machine,
    threads,
)
from contracap.data.config import DataConfig
from contracap.data.loader import TrainingBatches, evaluation_samples, validation_batches
from contracap.data.shards import list_shards, write_shard
from contracap.images import AugmentationConfig, ImageConfig, normalise
from contracap.model.packing import pack
from contracap.tokenizer import FILL, Tokenizer, text_lengths

PeerBatches = Iterable[tuple[Float32[Tensor, "batch 3 height width"], Int64[Tensor, "batch context"]]]
Side = Callable[[tuple[int, int]], int]  # max: the longer one, min: the shorter one

BATCH = 64  # pictures
TEXT_BATCH = 1024
SHARDS = 4
QUALITY = 90
IMAGE = ImageConfig(size=224)
AUGMENTATION = AugmentationConfig(crop_scale=(0.9, 1.0), flip=0.0)  # open_clip's own when nothing is said
CONTEXT = 76
PEER_MODEL = "coca_ViT-B-32"  # whose tokenizer has that context
PIXEL_TOLERANCE = 2  # of 255: resizing rounds after each of its two passes
FLOAT_TOLERANCE = 0.01  # of 255: of normalising
CAPTIONS = 10_000
MARKS = 20  # times that the memory of a worker is read


def bench_data(*, rounds: int = LEAST_ROUNDS, samples: int = 1024, draws: int = 100_000, seed: int = 0) -> Benchmark:
    """Speed of reading, decoding and tokenising beside open_clip's, and the memory of a worker.

    Args:
        rounds: of each comparison.
        samples: pictures in the shards that are made for it from Flickr8k's, a multiple of the batch of 64.
        draws: samples over which a worker's memory is watched.

    Raises:
        FileNotFoundError: if there are no Flickr8k shards in the folder that CONTRACAP_DATA names, or ../shared/data.
        UnequalError: if a pipeline gives other ids or pixels than open_clip's; nothing is timed then.
        ValueError: if a number does not fit.
    """
    if samples < 1 or samples % BATCH:
        raise ValueError(f"samples is {samples}; it must be a multiple of {BATCH}, so that both read whole epochs")
    machine = this_machine()
    flickr8k = Path(os.environ.get("CONTRACAP_DATA") or "../shared/data") / "flickr8k" / "train"
    if not flickr8k.is_dir():
        raise FileNotFoundError(f"no pictures at {flickr8k}: set CONTRACAP_DATA to a folder with flickr8k in it")
    captions = [caption for sample in evaluation_samples(flickr8k) for caption in sample.captions]
    with TemporaryDirectory() as folder:
        large, small = Path(folder, "large"), Path(folder, "small")
        make_shards(large, flickr8k, samples=samples, side=500, of=max)
        make_shards(small, flickr8k, samples=samples, side=256, of=min)
        rows = [
            pipeline_row("tar to batch, 500x375 pictures", large, samples=samples, rounds=rounds, seed=seed),
            pipeline_row("tar to batch, 256-pixel pictures", small, samples=samples, rounds=rounds, seed=seed),
            tokenizer_row(captions[:CAPTIONS], rounds=rounds),
            memory_row(small, draws=draws, seed=seed),
        ]
    return Benchmark(rows=rows, samples=samples, seed=seed, machine=machine)


def make_shards(folder: Path, source: Path, *, samples: int, side: int, of: Side) -> None:
    """Shards of the first pictures of `source` with their first captions, resized to `side` pixels of the `of` side.

    Raises:
        ValueError: if `source` holds too few.
    """
    found = list(islice(evaluation_samples(source), samples))
    if len(found) < samples:
        raise ValueError(f"{source} holds {len(found)} pictures, {samples} are needed")
    for number in range(SHARDS):
        records = (
            (sample.key, {"jpg": _resized(sample.image, side, of), "txt": sample.captions[0].encode()})
            for sample in found[number::SHARDS]
        )
        write_shard(folder / f"{number:06}.tar", records)


def pipeline_row(work: str, shards: Path, *, samples: int, rounds: int, seed: int) -> Row:
    """The training pipelines over all `samples` of the shards, by the seconds that one core computes."""
    config = DataConfig(train=str(shards), batch_size=BATCH, streams=1, augmentation=AUGMENTATION)
    batches = iter(TrainingBatches(config, image=IMAGE, tokenizer=Tokenizer(CONTEXT), seed=seed))
    epoch = samples // BATCH

    def checked_peer() -> tuple[Work, str]:
        training, validation = _peer_batches(shards, samples=samples, seed=seed)
        levels = _largest_difference(shards, validation)
        if _sorted_ids(batch.ids for batch in islice(batches, epoch)) != _sorted_ids(ids for _, ids in training):
            raise UnequalError(f"{shards}: an epoch of training has other token ids than open_clip's")
        size = sum(shard.stat().st_size for shard in shards.iterdir()) / samples / 1000
        note = (
            f"an epoch's token ids are equal, pixels of evaluation differ by {levels:.2f} of 255 at most "
            f"(allowed: {PIXEL_TOLERANCE}); {size:.0f} kB of tar a sample; our pixels stay uint8, open_clip's are "
            "normalised floats; computing time of the process"
        )
        return lambda: _exhaust(training), note

    with threads(1):
        return compare(
            work,
            ours=lambda: _exhaust(islice(batches, epoch)),
            checked_peer=checked_peer,
            items=samples,
            unit="images/s per core",
            rounds=rounds,
            clock=time.process_time,
        )


def tokenizer_row(captions: Sequence[str], *, rounds: int) -> Row:
    """Texts to ids that lie row after row, on all cores, beside open_clip's tokenizer, which leaves the fill in."""
    tokenizer = Tokenizer(CONTEXT)
    groups = [captions[first : first + TEXT_BATCH] for first in range(0, len(captions), TEXT_BATCH)]

    def ours() -> None:
        for texts in groups:
            ids = tokenizer(texts)
            lengths = text_lengths(ids, tokenizer.end)
            layout = pack(lengths, lengths, device=ids.device)
            layout.unpad(layout.fit(ids, padding=FILL))

    def checked_peer() -> tuple[Work, str]:
        peer = peer_module("open_clip").get_tokenizer(PEER_MODEL)
        for texts in groups:
            for text, row, peer_row in zip(texts, tokenizer(texts), peer(texts), strict=True):
                if not torch.equal(row, peer_row):
                    raise UnequalError(f"caption {text!r}: token ids differ from open_clip's")
        note = f"ids of {len(captions):,} captions are equal, in batches of {TEXT_BATCH}; wall time on all cores"
        return lambda: [peer(texts) for texts in groups], note

    return compare(
        "tokenise and pack",
        ours=ours,
        checked_peer=checked_peer,
        items=len(captions),
        unit="captions/s",
        rounds=rounds,
    )


def memory_row(shards: Path, *, draws: int, seed: int) -> Row:
    """How much the peak memory of a process that makes batches grows from a tenth of `draws` samples to all."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh_process:
        peaks = fresh_process.submit(memory_peaks, shards, draws=draws, seed=seed).result()
    tenth, half, whole = (peaks[round(MARKS * share) - 1] for share in (0.1, 0.5, 1))
    return Row(
        work=f"memory growth of a worker over {draws:,} samples",
        unit="MiB",
        ours=whole - tenth,
        note=f"peak resident memory after 10 %: {tenth:.1f} MiB, 50 %: {half:.1f} MiB, 100 %: {whole:.1f} MiB",
        reason="asked of ours alone: that it stays flat",
    )


def memory_peaks(shards: Path, *, draws: int, seed: int) -> list[float]:
    """Peak resident memory of this process, in MiB, after each twentieth of `draws` training samples."""
    torch.set_num_threads(1)  # as in a worker of a loader
    config = DataConfig(train=str(shards), batch_size=BATCH, streams=1, augmentation=AUGMENTATION)
    batches = iter(TrainingBatches(config, image=IMAGE, tokenizer=Tokenizer(CONTEXT), seed=seed))
    peaks = []
    for _ in range(MARKS):
        _exhaust(islice(batches, max(1, draws // BATCH // MARKS)))
        peaks.append(peak_mib())
    return peaks


def _peer_batches(shards: Path, *, samples: int, seed: int) -> tuple[PeerBatches, PeerBatches]:
    """An epoch of open_clip's training batches, and all of its evaluation batches, as its own trainer makes them."""
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
        train_num_samples=samples,
        val_num_samples=samples,
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


def _largest_difference(shards: Path, validation: PeerBatches) -> float:
    """Between the pixels of evaluation, ours and open_clip's, in levels of 255.

    Raises:
        UnequalError: if it is more than allowed, or the token ids of a picture differ.
    """
    ours = validation_batches(str(shards), batch_size=BATCH, image=IMAGE, tokenizer=Tokenizer(CONTEXT))
    levels = 255 * torch.tensor(IMAGE.std).reshape(3, 1, 1)
    largest = 0.0
    for batch, (pixels, ids) in zip(ours, validation, strict=True):
        for key, row, peer_row in zip(batch.keys, _filled(batch.ids), ids, strict=True):
            if not torch.equal(row, peer_row):
                raise UnequalError(f"{key} of {shards}: token ids differ from open_clip's")
        difference = float(((normalise(batch.pixels, IMAGE) - pixels).abs() * levels).max())
        if difference > PIXEL_TOLERANCE + FLOAT_TOLERANCE:
            raise UnequalError(
                f"{batch.keys[0]} and the {BATCH - 1} pictures behind it in {shards}: pixels of evaluation differ "
                f"from open_clip's by up to {difference:.2f} of 255, allowed is {PIXEL_TOLERANCE}"
            )
        largest = max(largest, difference)
    return largest


def _filled(ids: Int64[Tensor, "batch tokens"]) -> Int64[Tensor, "batch context"]:
    return pad(ids, (0, CONTEXT - ids.shape[1]), value=FILL)


def _sorted_ids(batches: Iterable[Int64[Tensor, "batch tokens"]]) -> list[list[int]]:
    return sorted(row for ids in batches for row in _filled(ids).tolist())


def _exhaust(batches: Iterable[object]) -> None:
    for _ in batches:
        pass


def _resized(jpeg: bytes, side: int, of: Side) -> bytes:
    picture = Image.open(io.BytesIO(jpeg)).convert("RGB")
    width, height = (round(length * side / of(picture.size)) for length in picture.size)
    file = io.BytesIO()
    picture.resize((width, height), Image.Resampling.LANCZOS).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
