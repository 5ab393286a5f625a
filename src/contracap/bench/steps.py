"""Training steps of ours and of open_clip's, with the same weights on the same batch: what is timed and measured."""

import ctypes
import gc
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from contracap.bench.timing import peer_module, require_equal
from contracap.data.batch import Batch
from contracap.images import ImageConfig, normalise
from contracap.losses import LossConfig
from contracap.model.coca import CoCa, CoCaConfig
from contracap.model.sizes import find_size
from contracap.parallel import ParallelConfig, ProcessGroup, wrapped
from contracap.pretrained import random_model
from contracap.pretrained.names import to_open_clip
from contracap.tokenizer import Tokenizer, text_lengths
from contracap.training.optimizer import OptimizerConfig, build_optimizer
from contracap.training.step import LOGIT_SCALE_RANGE, StepConfig, TrainingState, train_step
from contracap.training.utilisation import ModelUtilisation, Peak, find_peak

Step = Callable[[slice], Mapping[str, float | Tensor]]  # trains on these rows of its batch; losses and gradient norm
WholeStep = Callable[[], Mapping[str, float | Tensor]]  # likewise on all of them
Ways = Mapping[str, Step]  # of one side to take the same step: "eager", and where it is asked for "compiled"
Precision = Literal["fp32", "bf16"]

CHECKED = 16  # samples of a batch, its first, on which the two sides are compared
TOLERANCES: Mapping[Precision, float] = {"fp32": 1e-4, "bf16": 2e-2}
JOINED = 20  # captions that make a text longer than any context
LOSS = LossConfig()
# Steps are repeated, and compared before and after: the update does all of its work, but moves no weight to speak of.
OPTIMIZER = OptimizerConfig(learning_rate=1e-12, warmup_steps=0)


@dataclass(kw_only=True)
class Setting:
    """What all rows share.

    Attributes:
        captions: that texts are drawn from.
        precision: of the forward pass, of both sides; weights and optimizer are float32.
        compiled: whether both sides are timed as `torch.compile` makes them, too.
        matmul: operations a second of a large product in this precision.
    """

    captions: Sequence[str]
    device: torch.device
    precision: Precision
    rounds: int
    seed: int
    compiled: bool = False
    matmul: float | None = None
    _pair: "Pair | None" = field(default=None, init=False, repr=False)

    def pair(self, size: str) -> "Pair":
        """Both sides of a size; kept until another size is asked for."""
        if self._pair is None or self._pair.size != size:
            self.release()
            self._pair = Pair(size, self)
        return self._pair

    def release(self) -> None:
        """Let the memory go that the models of the last row hold."""
        self._pair = None
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps what was freed, here up to 18 GB
            libc.malloc_trim(0)
        if self.compiled:
            torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def tolerance(self) -> float:
        """How far losses and gradient norms may be apart, as a share."""
        return TOLERANCES[self.precision]


class Ours:
    """Our model with random weights, and its step as the trainer takes it."""

    def __init__(self, size: str, setting: Setting):
        config = released(size)
        model, processor = random_model(config, seed=setting.seed)
        model.to(setting.device)
        self.model = model
        self.state = TrainingState(model=model, optimizer=build_optimizer(model, OPTIMIZER), average=None)
        self.config = StepConfig(
            loss=LOSS if config.decoder else replace(LOSS, captioning=0.0),
            optimizer=OPTIMIZER,
            image=processor.image_config,
            total_steps=1000,
            bf16=setting.precision == "bf16",
            accumulation=1,
            ema_decay=0.0,
            seed=setting.seed,
        )
        self._states = {"eager": self.state}
        if setting.compiled:
            self._states["compiled"] = _compiled(self.state, setting.device)

    def ways(self, batch: Batch) -> Ways:
        """Of taking a step on rows of this batch."""
        return {way: partial(self._step, state, batch) for way, state in self._states.items()}

    def accumulated_step(self, batch: Batch, *, parts: int) -> WholeStep:
        """A step on all of this batch, in so many parts."""
        config = replace(self.config, accumulation=parts)
        return lambda: train_step(self.state, batch, config).read()

    def _step(self, state: TrainingState, batch: Batch, rows: slice) -> Mapping[str, float]:
        state.optimizer.zero_grad()  # of a step that memory did not hold
        return train_step(state, batch[rows], self.config).read()


def _compiled(state: TrainingState, device: torch.device) -> TrainingState:
    """A state with the same parameters and optimizer, whose blocks are compiled."""
    with torch.device("meta"):
        twin = CoCa(state.model.config)
    twin.load_state_dict(state.model.state_dict(keep_vars=True), assign=True)
    return replace(state, model=twin, wrapped=wrapped(twin, ParallelConfig(compile=True), ProcessGroup(device=device)))


class Peer:
    """open_clip's model with the weights of ours, and the step of its trainer, but for optimizer and clipping, which
    are ours.

    Raises:
        NoPeerError: if open_clip is not installed.
    """

    def __init__(self, size: str, ours: CoCa, setting: Setting):
        open_clip = peer_module("open_clip")
        self.model = open_clip.create_model(size, load_weights=False, output_dict=True)
        self.model.load_state_dict(to_open_clip(ours.state_dict(), ours.config))
        self.model.to(setting.device).train()
        if ours.decoder is None:
            self.loss = open_clip.ClipLoss()
        else:
            self.loss = open_clip.CoCaLoss(caption_loss_weight=LOSS.captioning, clip_loss_weight=LOSS.contrastive)
        flat = [parameter for parameter in self.model.parameters() if parameter.ndim < 2]
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim >= 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": flat, "weight_decay": 0.0}, {"params": matrices, "weight_decay": OPTIMIZER.weight_decay}],
            lr=OPTIMIZER.learning_rate,
            betas=OPTIMIZER.betas,
            eps=OPTIMIZER.epsilon,
            fused=True,
        )
        self._calls = {"eager": self.model}
        if setting.compiled:
            self._calls["compiled"] = torch.compile(self.model)  # as its --torchcompile does
        self._autocast = partial(
            torch.autocast, setting.device.type, dtype=torch.bfloat16, enabled=setting.precision == "bf16"
        )

    def ways(self, batch: Batch) -> Ways:
        """Of taking a step on rows of this batch."""
        pixels = peer_pixels(batch)
        return {way: partial(self._step, call, pixels, batch) for way, call in self._calls.items()}

    def _step(self, call: nn.Module, pixels: Tensor, batch: Batch, rows: slice) -> Mapping[str, Tensor]:
        self.optimizer.zero_grad()
        with self._autocast():
            losses = self.loss(**call(pixels[rows], batch.ids[rows]), output_dict=True)
            total = torch.stack(list(losses.values())).sum()
        total.backward()
        return self._updated(losses)

    def accumulated_step(self, batch: Batch, *, parts: int) -> WholeStep:
        """A step on all of this batch, in so many parts.

        Outputs of all parts are kept, logits included; then each part is computed again, and the loss is that of all.
        Source: open_clip_train/train.py of open_clip 3.3.0, `accum_freq` above 1.
        """
        pixels = peer_pixels(batch)
        rows = [slice(first, first + len(batch) // parts) for first in range(0, len(batch), len(batch) // parts)]

        def step() -> Mapping[str, Tensor]:
            kept: list[dict[str, Tensor]] = []
            for part in rows:
                with torch.no_grad(), self._autocast():
                    outputs = self.model(pixels[part], batch.ids[part])
                    del outputs["logit_scale"]
                    kept.append(outputs)
            self.optimizer.zero_grad()
            for number, part in enumerate(rows):
                with self._autocast():
                    outputs = self.model(pixels[part], batch.ids[part])
                    scale = outputs.pop("logit_scale")
                    joined = {
                        name: torch.cat([each[name] for each in [*kept[:number], outputs, *kept[number + 1 :]]])
                        for name in outputs
                    }
                    losses = self.loss(**joined, logit_scale=scale, output_dict=True)
                    del joined
                    total = torch.stack(list(losses.values())).sum()
                total.backward()
            # Every part's loss has all of it. open_clip leaves it so; divided, both sides have the same gradient.
            self.model.logit_scale.grad /= parts
            return self._updated(losses)

        return step

    def _updated(self, losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.model.logit_scale.clamp_(*LOGIT_SCALE_RANGE)
        found = {"contrastive_loss": losses["contrastive_loss"].detach() / LOSS.contrastive, "gradient_norm": norm}
        if "caption_loss" in losses:
            found["captioning_loss"] = losses["caption_loss"].detach() / LOSS.captioning
        return found


class Pair:
    """Our model of a size, and open_clip's with the same weights."""

    def __init__(self, size: str, setting: Setting):
        self.size, self.setting = size, setting
        self.ours = Ours(size, setting)
        self._peer: Peer | None = None

    def checked_peer(self, batch: Batch) -> tuple[Ways, str]:
        """open_clip's ways on this batch, and how far an eager step on its first rows agrees with ours.

        Raises:
            NoPeerError: if open_clip is not installed.
            UnequalError: if it does not agree within the tolerance of the precision.
        """
        self._peer = self._peer or Peer(self.size, self.ours.model, self.setting)
        ways, rows = self._peer.ways(batch), slice(0, CHECKED)
        note = require_equal(
            self.ours.ways(batch)["eager"](rows), ways["eager"](rows), tolerance=self.setting.tolerance
        )
        return ways, f"{self.size} in {self.setting.precision}: {note}"


def released(size: str) -> CoCaConfig:
    """The size as open_clip's models are: with the legacy mask of the class token."""
    config = find_size(size)
    return replace(config, text=replace(config.text, cls_mask="legacy"))


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
    lengths, keys = text_lengths(ids, config.text.end), [str(row) for row in range(samples)]
    return Batch(pixels=pixels, ids=ids, lengths=lengths, keys=keys).to(setting.device)


def peer_pixels(batch: Batch) -> Tensor:
    """As open_clip's data pipeline gives them: normalised floats."""
    return normalise(batch.pixels, ImageConfig(size=batch.pixels.shape[-1]))


def describe(batch: Batch) -> str:
    """How many texts of the batch have how many tokens, start and end included."""
    counts = Counter(batch.lengths.tolist())
    listed = ", ".join(f"{length}: {count}" for length, count in sorted(counts.items()))
    return f"texts by their tokens, {batch.lengths.mean():.1f} on average: {listed}"


def describe_limit(model: CoCa, batch: Batch, samples_per_second: float, setting: Setting) -> str:
    """What share of the device's rate our step reaches: that of a product in the same run, and of the data sheet."""
    peaks = []
    if setting.matmul is not None:
        peaks.append(
            Peak(flops=setting.matmul, source=f"a product of 2048 rows and columns here in {setting.precision}")
        )
    stated = find_peak(setting.device, bf16=setting.precision == "bf16", stated=None)
    if stated is not None:
        peaks.append(stated)
    tokens = float(batch.lengths.mean())
    shares = [
        f"{ModelUtilisation(model, LOSS, peak)(samples_per_second, tokens):.1%} of {peak.flops / 1e12:.4g} TFLOP/s "
        f"({peak.source})"
        for peak in peaks
    ]
    return f"ours computes, by the plan's counting, {' and '.join(shares)}" if shares else ""
