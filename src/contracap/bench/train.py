"""How fast a model learns, and in how much memory: training steps beside open_clip's, and the captioning loss."""

import gc
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from contracap.bench.memory import captioning_loss_row
from contracap.bench.timing import (
    LEAST_ROUNDS,
    Benchmark,
    Row,
    Work,
    compare,
    peer_module,
    require_equal,
    this_machine,
)
from contracap.data.batch import Batch
from contracap.data.loader import evaluation_samples
from contracap.image import ImageConfig, normalise
from contracap.losses import LossConfig
from contracap.model.coca import CoCa, CoCaConfig
from contracap.model.sizes import find_size
from contracap.model.weights import to_open_clip
from contracap.pretrained import random_model
from contracap.tokenizer import Tokenizer, lengths
from contracap.start import precision_on
from contracap.training.optimizer import OptimizerConfig, build_optimizer
from contracap.training.step import LOGIT_SCALE_RANGE, StepConfig, TrainingState, train_step

Step = Callable[[slice], Mapping[str, float | Tensor]]  # trains on these rows of its batch; losses and gradient norm
Device = Literal["cpu", "cuda"]

B_32, L_14, CLIP = "coca_ViT-B-32", "coca_ViT-L-14", "ViT-B-32"
BATCHES = {"cpu": {B_32: 16, L_14: 4}, "cuda": {B_32: 1024, L_14: 256}}
LOSS_BATCH = 256
CHECKED = 16  # samples of a batch, its first, on which the two sides are compared
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}
JOINED = 20  # captions that make a text longer than any context
LOSS = LossConfig()
OPTIMIZER = OptimizerConfig(peak_rate=1e-5, warmup_steps=0)  # a batch comes again and again: the rate is low


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all rows share.

    Attributes:
        captions: that texts are drawn from.
        precision: of the forward pass, of both sides; weights and optimizer are float32.
    """

    captions: Sequence[str]
    device: torch.device
    precision: Literal["fp32", "bf16"]
    rounds: int
    seed: int


@dataclass
class Passes:
    """A whole batch, in as few steps as memory holds.

    Attributes:
        batch: rows of it.
        parts: steps it takes; doubled when the device's memory is full, which the unmeasured round finds out.
    """

    step: Step
    batch: int
    parts: int = 1

    def __call__(self) -> None:
        while True:
            rows = self.batch // self.parts
            try:
                for first in range(0, self.batch, rows):
                    self.step(slice(first, first + rows))
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
                self.parts *= 2
            else:
                return


def bench_train(
    *, rounds: int = LEAST_ROUNDS, device: Device = "cpu", rows: Sequence[str] = (), seed: int = 0
) -> Benchmark:
    """Speed of a training step beside open_clip's, and the memory of the captioning loss.

    Args:
        rounds: of each comparison.
        device: of all rows; batches are larger on `cuda`.
        rows: which to measure, by their names in `ROWS`; none means all.

    Raises:
        FileNotFoundError: if there are no Flickr8k shards in the folder that CONTRACAP_DATA names, or ../shared/data.
        UnequalError: if a step gives other losses or another gradient norm than open_clip's; it is not timed then.
        ValueError: for a row that there is not, too few rounds, or `cuda` where torch finds none.
    """
    unknown = [name for name in rows if name not in ROWS]
    if unknown:
        raise ValueError(f"no row {unknown[0]!r} in this benchmark; the rows are {', '.join(ROWS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no CUDA device; say cpu")
    place = torch.device(device)
    setting = Setting(
        captions=flickr8k_captions(),
        device=place,
        precision=precision_on(place, "auto"),
        rounds=rounds,
        seed=seed,
    )
    machine = this_machine() | {"device": device, "precision": setting.precision}
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(place)
    measured = []
    for name in rows or ROWS:
        measured.append(ROWS[name](setting))
        gc.collect()  # the row's models, before the next row makes its own
    return Benchmark(rows=measured, samples=len(setting.captions), seed=seed, machine=machine)


def flickr8k_captions() -> list[str]:
    """Every caption of Flickr8k's training split but those with an exclamation mark, whose id open_clip may take for
    fill.

    Raises:
        FileNotFoundError: if there are no shards.
    """
    folder = Path(os.environ.get("CONTRACAP_DATA") or "../shared/data") / "flickr8k" / "train"
    if not folder.is_dir():
        raise FileNotFoundError(f"no captions at {folder}: set CONTRACAP_DATA to a folder with flickr8k in it")
    captions = [caption for sample in evaluation_samples(folder) for caption in sample.captions]
    return [caption for caption in captions if "!" not in caption]


def step_row(setting: Setting, *, size: str, full: bool) -> Row:
    """Our step on a batch beside open_clip's; `full`: on half of it, with texts that fill the context."""
    samples = BATCHES[setting.device.type][size] // (2 if full else 1)
    batch = make_batch(size, setting, samples=samples, full=full)
    model, ours = our_step(size, batch, setting)

    def checked_peer() -> tuple[Step, str]:
        peer = peer_step(size, model, batch, setting)
        return peer, agreement(ours, peer, size, setting)

    texts = f"texts of {batch.ids.shape[1]} tokens" if full else "Flickr8k captions"
    return compare_steps(f"{size} step, batch {len(batch)}, {texts}", ours, checked_peer, batch, setting)


def clip_row(setting: Setting) -> Row:
    """Our step of a CoCa beside open_clip's step of a CLIP with the same towers, on the same pictures and texts."""
    samples = BATCHES[setting.device.type][B_32]
    batch, clip_batch = (make_batch(size, setting, samples=samples, full=False) for size in (B_32, CLIP))
    model, ours = our_step(B_32, batch, setting)

    def checked_peer() -> tuple[Step, str]:
        coca_note = agreement(ours, peer_step(B_32, model, batch, setting), B_32, setting)
        clip_model, our_clip = our_step(CLIP, clip_batch, setting)
        peer = peer_step(CLIP, clip_model, clip_batch, setting)
        return peer, f"{coca_note}; {agreement(our_clip, peer, CLIP, setting)}"

    work = f"{B_32} step against open_clip's CLIP {CLIP} step, batch {samples} (ratio: CLIP's time by ours)"
    row = compare_steps(work, ours, checked_peer, batch, setting)
    if row.ratio is None:
        return row
    return replace(row, note=f"our CoCa step takes {1 / row.ratio:.2f} times a CLIP step; {row.note}")


def compare_steps(
    work: str, ours: Step, checked_peer: Callable[[], tuple[Step, str]], batch: Batch, setting: Setting
) -> Row:
    """The row of two steps, which says what texts they were timed on; each goes over the batch in as many parts as the
    device's memory needs."""
    sides = {"ours": Passes(ours, len(batch))}

    def checked_passes() -> tuple[Work, str]:
        peer, note = checked_peer()
        sides["open_clip's"] = Passes(peer, len(batch))
        return sides["open_clip's"], note

    def clock() -> float:
        if setting.device.type == "cuda":
            torch.cuda.synchronize(setting.device)
        return time.perf_counter()

    row = compare(
        work,
        ours=sides["ours"],
        checked_peer=checked_passes,
        items=len(batch),
        unit="samples/s",
        rounds=setting.rounds,
        clock=clock,
    )
    split = [f"{whose} in {side.parts} steps, for want of memory" for whose, side in sides.items() if side.parts > 1]
    return replace(row, note="; ".join([*filter(None, [row.note]), *split, describe(batch)]))


def loss_memory_row(setting: Setting) -> Row:
    """Memory that the captioning loss and its gradients take, on the labels of a batch of captions."""
    config = find_size(B_32).text
    batch = make_batch(B_32, setting, samples=LOSS_BATCH, full=False)
    ends = lengths(batch.ids, config.end).tolist()
    row = captioning_loss_row(
        f"captioning loss, memory beyond inputs and weight gradient, batch {LOSS_BATCH}, {B_32}",
        labels=torch.cat([ids[1:end] for ids, end in zip(batch.ids, ends, strict=True)]).cpu(),
        vocab_size=config.vocab_size,
        width=config.width,
        device=setting.device,
        seed=setting.seed,
    )
    return replace(row, note=f"{row.note}; {describe(batch)}")


ROWS: dict[str, Callable[[Setting], Row]] = {
    "b-32": partial(step_row, size=B_32, full=False),
    "b-32-full": partial(step_row, size=B_32, full=True),
    "b-32-clip": clip_row,
    "l-14": partial(step_row, size=L_14, full=False),
    "l-14-full": partial(step_row, size=L_14, full=True),
    "loss-memory": loss_memory_row,
}


def make_batch(size: str, setting: Setting, *, samples: int, full: bool) -> Batch:
    """Random pixels with captions, or with several joined to fill the context; on the device.

    The texts are the same for every size.
    """
    config = find_size(size)
    chooser = random.Random(setting.seed)
    texts = [" ".join(chooser.choices(setting.captions, k=JOINED if full else 1)) for _ in range(samples)]
    side = config.vision.image_size
    generator = torch.Generator().manual_seed(setting.seed)
    pixels = torch.randint(0, 256, (samples, 3, side, side), generator=generator, dtype=torch.uint8)
    ids = Tokenizer(config.text.context, config.text.vocab_size)(texts)
    return Batch(pixels=pixels, ids=ids, keys=[str(row) for row in range(samples)]).to(setting.device)


def describe(batch: Batch) -> str:
    """How many texts of the batch have how many tokens, start and end included."""
    end = int(batch.ids.max())  # the last id of every vocabulary
    counts = Counter(lengths(batch.ids, end).tolist())
    mean = sum(length * count for length, count in counts.items()) / len(batch)
    listed = ", ".join(f"{length}: {count}" for length, count in sorted(counts.items()))
    return f"texts by their tokens, {mean:.1f} on average: {listed}"


def released(size: str) -> CoCaConfig:
    """The size as open_clip's models are: with the legacy mask of the class token."""
    config = find_size(size)
    return replace(config, text=replace(config.text, cls_mask="legacy"))


def our_step(size: str, batch: Batch, setting: Setting) -> tuple[CoCa, Step]:
    """A model with random weights, and its step as the trainer makes it."""
    config = released(size)
    model, processor = random_model(config, seed=setting.seed)
    model.to(setting.device)
    state = TrainingState(model=model, optimizer=build_optimizer(model, OPTIMIZER), average=None)
    step_config = StepConfig(
        loss=LOSS if config.decoder else replace(LOSS, captioning=0.0),
        optimizer=OPTIMIZER,
        image=processor.image_config,
        total_steps=1000,
        bf16=setting.precision == "bf16",
        accumulation=1,
        ema_decay=0.0,
        seed=setting.seed,
    )

    def step(rows: slice) -> Mapping[str, float]:
        part = Batch(pixels=batch.pixels[rows], ids=batch.ids[rows], keys=batch.keys[rows])
        numbers = train_step(state, part, step_config)
        state.step += 1
        return numbers

    return model, step


def peer_step(size: str, model: CoCa, batch: Batch, setting: Setting) -> Step:
    """open_clip's model with the weights of `model`, and the step of its trainer, but for optimizer and clipping,
    which are ours.

    Raises:
        NoPeerError: if open_clip is not installed.
    """
    open_clip = peer_module("open_clip")
    peer = open_clip.create_model(size, load_weights=False, output_dict=True)
    peer.load_state_dict(to_open_clip(model.state_dict(), model.config))
    peer.to(setting.device).train()
    if model.decoder is None:
        loss = open_clip.ClipLoss()
    else:
        loss = open_clip.CoCaLoss(caption_loss_weight=LOSS.captioning, clip_loss_weight=LOSS.contrastive)
    flat = [parameter for parameter in peer.parameters() if parameter.ndim < 2]
    matrices = [parameter for parameter in peer.parameters() if parameter.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": flat, "weight_decay": 0.0}, {"params": matrices, "weight_decay": OPTIMIZER.weight_decay}],
        lr=OPTIMIZER.peak_rate,
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.epsilon,
        fused=True,
    )
    pixels = normalise(batch.pixels, ImageConfig(size=batch.pixels.shape[-1]))
    bf16 = setting.precision == "bf16"

    def step(rows: slice) -> Mapping[str, Tensor]:
        with torch.autocast(setting.device.type, dtype=torch.bfloat16, enabled=bf16):
            losses = loss(**peer(pixels[rows], batch.ids[rows]), output_dict=True)
            total = torch.stack(list(losses.values())).sum()
        total.backward()
        norm = nn.utils.clip_grad_norm_(peer.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            peer.logit_scale.clamp_(*LOGIT_SCALE_RANGE)
        found = {"contrastive_loss": losses["contrastive_loss"].detach() / LOSS.contrastive, "gradient_norm": norm}
        if "caption_loss" in losses:
            found["captioning_loss"] = losses["caption_loss"].detach() / LOSS.captioning
        return found

    return step


def agreement(ours: Step, peer: Step, size: str, setting: Setting) -> str:
    """How far a step of both agrees, with the same weights.

    Raises:
        UnequalError: if not within the tolerance of the precision.
    """
    rows = slice(0, CHECKED)
    note = require_equal(ours(rows), peer(rows), tolerance=TOLERANCES[setting.precision])
    return f"{size} in {setting.precision}: {note}"
