"""Training steps of ours and of open_clip's, with the same weights on the same batch."""

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.harness import Numbers, Run, data_path
from benchmarks.open_clip_models import legacy_config, open_clip_model
from benchmarks.peers import peer_module
from contracap.data.batch import Batch
from contracap.data.loader import evaluation_samples
from contracap.images import ImageConfig, normalise
from contracap.losses import LossConfig
from contracap.model.coca import CoCa
from contracap.model.sizes import find_size
from contracap.parallel import ParallelConfig, ParallelModel, ProcessGroup, parallelize
from contracap.pretrained import random_model
from contracap.tokenizer import Tokenizer, text_lengths
from contracap.training.optimizer import OptimizerConfig, build_optimizer
from contracap.training.start import precision_on
from contracap.training.step import LOGIT_SCALE_RANGE, StepConfig, TrainingState, train_step

Step = Callable[[], Numbers]  # updates the weights once; returns losses and gradient norm
Side = Literal["ours", "open_clip's"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}
JOINED = 20  # captions that make a text longer than any context
LOSS = LossConfig()
# Steps are repeated and compared: the update does all of its work, but hardly moves the weights.
OPTIMIZER = OptimizerConfig(learning_rate=1e-12, warmup_steps=0)


def precision(run: Run) -> Literal["fp32", "bf16"]:
    """Precision of the forward pass of both sides; weights and optimizer are float32."""
    return precision_on(run.device, "auto")


def tolerance(run: Run) -> float:
    """Allowed relative difference of losses and gradient norms."""
    return TOLERANCES[precision(run)]


class Ours:
    """Our model with random weights, and its step as the trainer takes it."""

    def __init__(self, size: str, run: Run):
        self.size, self.run = size, run
        self.model, processor = random_model(legacy_config(size), seed=run.seed)
        self.model.to(run.device)
        self.state = TrainingState(
            model=self.model,
            optimizer=build_optimizer(self.model, OPTIMIZER),
            average=None,
            parallel=ParallelModel(self.model),
        )
        self.config = StepConfig(
            loss=LOSS if self.model.config.decoder else replace(LOSS, captioning=0.0),
            optimizer=OPTIMIZER,
            image=processor.image_config,
            total_steps=1000,
            bf16=precision(run) == "bf16",
            accumulation=1,
            ema_decay=0.0,
            seed=run.seed,
        )

    def step(self, batch: Batch, *, parts: int = 1) -> Step:
        """A step on a batch, in some equal parts."""
        config = replace(self.config, accumulation=parts)
        return lambda: train_step(self.state, batch, config).read()

    def compiled_step(self, batch: Batch) -> Step:
        """The same with compiled blocks that share parameters and optimizer."""
        with torch.device("meta"):
            twin = CoCa(self.model.config)
        twin.load_state_dict(self.model.state_dict(keep_vars=True), assign=True)
        parallel = parallelize(twin, ParallelConfig(compile=True), ProcessGroup(device=self.run.device))
        state = replace(self.state, model=twin, parallel=parallel)
        return lambda: train_step(state, batch, self.config).read()


class OpenClip:
    """open_clip's model with the weights of ours, and the step of its trainer with our optimizer and clipping.

    Raises:
        MissingPeerError: if open_clip is not installed.
    """

    def __init__(self, size: str, ours: CoCa, run: Run):
        self.model = open_clip_model(size, ours, output_dict=True).to(run.device).train()
        open_clip = peer_module("open_clip")
        if ours.decoder is None:
            self.loss = open_clip.ClipLoss()
        else:
            self.loss = open_clip.CoCaLoss(caption_loss_weight=LOSS.captioning, clip_loss_weight=LOSS.contrastive)
        self.optimizer = build_open_clip_optimizer(self.model)
        self.autocast = partial(torch.autocast, run.device.type, dtype=torch.bfloat16, enabled=precision(run) == "bf16")

    def step(self, batch: Batch, *, parts: int = 1) -> Step:
        """A step on a batch, in some equal parts."""
        return self._accumulated_step(batch, parts) if parts > 1 else self._whole_step(self.model, batch)

    def compiled_step(self, batch: Batch) -> Step:
        """The same, compiled as open_clip's --torchcompile does it."""
        return self._whole_step(torch.compile(self.model), batch)

    def _whole_step(self, model: Callable[..., Any], batch: Batch) -> Step:
        pixels = open_clip_pixels(batch)

        def step() -> Numbers:
            self.optimizer.zero_grad()
            with self.autocast():
                losses = self.loss(**model(pixels, batch.ids), output_dict=True)
                total = torch.stack(list(losses.values())).sum()
            total.backward()
            return self._update(losses)

        return step

    def _accumulated_step(self, batch: Batch, parts: int) -> Step:
        """The outputs of all parts are kept, logits included. Then each part is computed again, and the loss is that
        of the whole batch.

        Source: open_clip_train/train.py of open_clip 3.3.0, `accum_freq` above 1.
        """
        rows = len(batch) // parts
        inputs = list(zip(open_clip_pixels(batch).split(rows), batch.ids.split(rows), strict=True))

        def step() -> Numbers:
            kept: list[dict[str, Tensor]] = []
            for pixels, ids in inputs:
                with torch.no_grad(), self.autocast():
                    outputs = self.model(pixels, ids)
                    del outputs["logit_scale"]
                    kept.append(outputs)
            self.optimizer.zero_grad()
            for number, (pixels, ids) in enumerate(inputs):
                with self.autocast():
                    outputs = self.model(pixels, ids)
                    scale = outputs.pop("logit_scale")
                    joined = {
                        name: torch.cat([each[name] for each in [*kept[:number], outputs, *kept[number + 1 :]]])
                        for name in outputs
                    }
                    losses = self.loss(**joined, logit_scale=scale, output_dict=True)
                    del joined
                    total = torch.stack(list(losses.values())).sum()
                total.backward()
            # The loss of each part contains the whole gradient of the scale. open_clip leaves it so; we divide it.
            self.model.logit_scale.grad /= parts
            return self._update(losses)

        return step

    def _update(self, losses: Mapping[str, Tensor]) -> Numbers:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.model.logit_scale.clamp_(*LOGIT_SCALE_RANGE)
        numbers = {"contrastive_loss": losses["contrastive_loss"].detach() / LOSS.contrastive, "gradient_norm": norm}
        if "caption_loss" in losses:
            numbers["captioning_loss"] = losses["caption_loss"].detach() / LOSS.captioning
        return numbers


def make_side(side: Side, size: str, run: Run) -> Ours | OpenClip:
    """One of the two with the same weights, alone on the device."""
    return (
        Ours(size, run) if side == "ours" else OpenClip(size, random_model(legacy_config(size), seed=run.seed)[0], run)
    )


def build_open_clip_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of open_clip's trainer with the settings of ours."""
    return torch.optim.AdamW(
        [
            {"params": [each for each in model.parameters() if each.ndim < 2], "weight_decay": 0.0},
            {
                "params": [each for each in model.parameters() if each.ndim >= 2],
                "weight_decay": OPTIMIZER.weight_decay,
            },
        ],
        lr=OPTIMIZER.learning_rate,
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.epsilon,
        fused=True,
    )


def open_clip_pixels(batch: Batch) -> Tensor:
    """Normalised floats, as from open_clip's data pipeline."""
    return normalise(batch.pixels, ImageConfig(size=batch.pixels.shape[-1]))


@cache
def flickr8k_captions() -> tuple[str, ...]:
    """Captions of Flickr8k's training split, without those with an exclamation mark: open_clip takes its id for
    padding."""
    samples = evaluation_samples(data_path("flickr8k/train"))
    return tuple(caption for sample in samples for caption in sample.captions if "!" not in caption)


def make_batch(size: str, run: Run, *, samples: int, full: bool = False) -> Batch:
    """Random pixels with captions, or with texts that fill the context; the same texts for every size."""
    config = find_size(size)
    chooser = random.Random(run.seed)
    texts = [" ".join(chooser.choices(flickr8k_captions(), k=JOINED if full else 1)) for _ in range(samples)]
    side = config.vision.image_size
    generator = torch.Generator().manual_seed(run.seed)
    pixels = torch.randint(0, 256, (samples, 3, side, side), generator=generator, dtype=torch.uint8)
    ids = Tokenizer(config.text.context, config.text.vocab_size)(texts)
    lengths, keys = text_lengths(ids, config.text.end), [str(row) for row in range(samples)]
    return Batch(pixels=pixels, ids=ids, lengths=lengths, keys=keys).to(run.device)


def describe_texts(batch: Batch) -> str:
    """Count the texts of the batch by their number of tokens."""
    counts = batch.lengths
    listed = ", ".join(f"{length}: {count}" for length, count in sorted(Counter(counts).items()))
    return f"texts by their tokens, {sum(counts) / len(counts):.1f} on average: {listed}"
