"""A recipe: one run, whole. Model, data, losses, optimizer and what happens when, as a TOML file says it."""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from contracap.config import ConfigError, build, load_toml, require_paths, to_dict
from contracap.data.config import DataConfig
from contracap.data.counts import indexed_captions, samples_in
from contracap.data.patterns import commands_in
from contracap.data.shards import list_shards
from contracap.evaluation.config import EvaluationConfig
from contracap.losses import LossConfig
from contracap.model.coca import CoCaConfig
from contracap.model.sizes import find_size
from contracap.parallel import ParallelConfig
from contracap.training.checkpoint import CHECKPOINTS, CheckpointConfig
from contracap.training.loggers import TENSORBOARD_FOLDER
from contracap.training.optimizer import OptimizerConfig
from contracap.training.recorder import METRICS_FILE

RECIPE_FILE = "recipe.toml"  # in a run's folder
RUN_PARTS = (CHECKPOINTS, METRICS_FILE, TENSORBOARD_FOLDER)  # one of which a run's folder has
MAX_STEPS = 10**12
logger = logging.getLogger(__name__)
Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. Fine-tuning, CLIP and caption-only training are recipes too."""

    size: str
    """Name of a size, such as `coca_ViT-B-32`; `contracap weights list` shows them all."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of the size to change, nested as in `CoCaConfig`: `model.vision.patch_dropout = 0.5`."""
    steps: int = 0
    """Updates of the weights; give this or `epochs`."""
    epochs: float | None = None
    """Passes over the samples of all sources, instead of `steps`; the samples are counted when the run starts."""
    out: str
    """The run folder."""
    seed: int = 0
    """Seed of the initial weights, the data order, augmentation and patch dropout."""
    resume: bool = False
    """Continue from the last checkpoint in the run folder, or start from scratch if there is none."""
    initialise_from: str | None = None
    """Weights to start from: anything `contracap.load` reads. Positions are interpolated to another image size."""
    initialise_parts: dict[str, str] = field(default_factory=dict)
    """Parts that start from weights of their own: `{ image = "ViT-L-14/openai", text = "ViT-L-14/openai" }`. Parts are
    named as in `frozen`. The rest comes from `initialise_from`, or is random."""
    frozen: tuple[str, ...] = ()
    """Parts that are not trained: `image`, `pooler`, `text`, `decoder` or `logit_scale`, or parameters by the start of
    their names, such as `text.token_embedding`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is CUDA if there is a GPU, else the CPU."""
    precision: Precision = "auto"
    """`bf16` runs the forward pass under autocast; weights and optimizer stay float32. `auto` is `bf16` where the
    device multiplies bf16 matrices in hardware, else `fp32`; the recipe in the run folder says which one was used."""
    accumulation: int = 1
    """Number of parts that a batch is split into, each with its own forward and backward pass. Losses and gradients
    are those of the whole batch. With a contrastive loss each part is embedded once more (GradCache)."""
    ema_decay: float = 0.0
    """Decay per step of the moving average of the weights; 0 keeps no average. Evaluation uses the weights themselves;
    to use the average, name its file: `RUN/checkpoints/last/average.safetensors`."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when a loss or gradient is NaN or infinite: `stop` the run, or `skip` the step."""
    log_every: int = 20
    """Steps between records in metrics.jsonl and TensorBoard."""
    validate_every: int = 0
    """Steps between passes over `data.validation`; 0 for none."""
    wandb: str | None = None
    """Project at Weights & Biases that also shows the run."""
    peak_tflops: float | None = None
    """Peak speed of one device in TFLOP/s, of which `mfu` is a share. Not needed for the GPUs that `contracap plan`
    knows."""
    stall_seconds: float = 300.0
    """Seconds after which a rank is reported that is stuck waiting for data or in a step, a checkpoint or an
    evaluation. The first step may take four times as long. 0 turns the watchdog off."""
    profile: bool = False
    """Write a trace of steps 13 to 15 on each rank, for Perfetto: `profile/rank-N.json.gz`."""
    data: DataConfig
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    FORMER_KEYS: ClassVar[Mapping[str, str]] = {
        "kernels": "delete it; texts are always packed, and cross-attention takes what needs fewer operations",
        "parallel.gather": "delete it; the rows of all ranks are always gathered at once",
        "loss.chunk": "delete it; the captioning loss scores 512 tokens at a time on a CPU, 4,096 elsewhere",
        "data.weighting": "delete it; for 'samples' multiply each source's weight by its number of samples",
        "data.epoch_end": "delete it; a batch always continues with the next epoch",
        "data.length_buckets": "delete it; texts are packed, so that batches need no equal lengths",
        "data.scaled_decoding": "delete it; `contracap shards make --shorter-side` makes large images smaller",
        "data.smallest_side": "delete it; the shorter side of an image must have 8 pixels",
        "optimizer.peak_rate": "it is optimizer.learning_rate now",
        "optimizer.final_rate": "it is optimizer.min_learning_rate now",
    }

    def __post_init__(self) -> None:
        require_paths(self, "out", "initialise_from")
        for part, name in self.initialise_parts.items():
            if not part.strip() or not name.strip():
                raise ValueError(f"initialise_parts: give the name of a part and its weights, not {part!r} = {name!r}")
        if self.epochs is not None and (self.steps or self.epochs <= 0):
            raise ValueError(f"epochs is {self.epochs} and steps {self.steps}: give one of them, above 0")
        if self.steps < 1 and self.epochs is None:
            raise ValueError("give steps (at least 1) or epochs")
        if self.steps > MAX_STEPS:
            raise ValueError(f"steps is {self.steps:,}; it must be at most {MAX_STEPS:,}")
        if self.log_every < 1:
            raise ValueError(f"log_every is {self.log_every}; it must be at least 1")
        if self.validate_every < 0:
            raise ValueError(f"validate_every is {self.validate_every}; it must be at least 1, or 0 for none")
        if self.accumulation < 1:
            raise ValueError(f"accumulation is {self.accumulation}; it must be at least 1")
        if self.data.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation is {self.accumulation}; it must divide data.batch_size {self.data.batch_size}"
            )
        if self.loss.contrastive and self.data.batch_size < 2:
            raise ValueError("the contrastive loss needs at least 2 pairs: raise data.batch_size")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to 2**32 - 1")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must be at least 0 and below 1")
        if self.validate_every and self.data.validation is None:
            raise ValueError("validate_every needs data.validation, the shards to validate on")
        if self.stall_seconds < 0:
            raise ValueError(f"stall_seconds is {self.stall_seconds}; it must be above 0, or 0 to watch nothing")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"peak_tflops is {self.peak_tflops}; it must be above 0")
        if self.wandb is not None and not self.wandb.strip():
            raise ValueError(f"wandb is {self.wandb!r}; give the project's name, or leave the key out")
        if self.evaluation.writes and self.model_config.decoder is None:
            raise ValueError(
                f"{self.size} has no decoder and writes no captions: leave evaluation.captions and tasks that write out"
            )
        if self.optimizer.warmup_steps >= self.steps and self.epochs is None:
            raise ValueError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} must be below steps {self.steps}: lower it"
            )
        if self.loss.captioning and self.model_config.decoder is None:
            raise ValueError(f"{self.size} has no decoder: set loss.captioning = 0, or take a coca size")

    @property
    def weights(self) -> list[str]:
        """Files or names of weights that the run starts from."""
        return [*([self.initialise_from] if self.initialise_from else []), *self.initialise_parts.values()]

    @property
    def commands(self) -> list[str]:
        """Shell commands (`pipe:`) whose output the run reads."""
        shards = [source.shards for source in self.data.sources.values()] + [self.data.validation or ()]
        shards += [task.data for task in self.evaluation.tasks.values()]
        shards += [self.evaluation.captions.data] if self.evaluation.captions is not None else []
        return [command for paths in shards for command in commands_in(paths)]

    @property
    def model_config(self) -> CoCaConfig:
        """The size, with the recipe's changes."""
        try:
            return build(CoCaConfig, merge(to_dict(find_size(self.size)), self.model))
        except ConfigError as error:
            raise ConfigError(*(f"in 'model': {problem}" for problem in error.problems)) from None


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe file or a run's folder, with `key.path=value` overrides; `epochs=N` there replaces the file's steps.
    In the recipe of a run folder `out` is that folder, wherever it was copied or moved to.

    Raises: ConfigError: naming the key, the value and what would do.
    """
    path = Path(path) / RECIPE_FILE if Path(path).is_dir() else Path(path)
    changed = {override.partition("=")[0].strip() for override in overrides}
    if "epochs" in changed and "steps" not in changed:
        overrides = [*overrides, "steps=0"]
    folder, recipe = path.absolute().parent, load_toml(path, Recipe, overrides)
    in_run = path.name == RECIPE_FILE and any((folder / name).exists() for name in RUN_PARTS)
    if not in_run or "out" in changed:
        return recipe
    if Path(recipe.out).absolute() != folder:
        logger.info("%s is in the folder of a run: out is that folder, not %s", path, recipe.out)
    return replace(recipe, out=str(folder))


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with every local path made absolute, so that it means the same in any working folder."""

    def absolute(paths: Any) -> Any:
        if isinstance(paths, str):
            is_local = "://" not in paths and not commands_in(paths)
            return os.path.abspath(paths) if is_local else paths
        return tuple(map(absolute, paths))

    data, evaluation = recipe.data, recipe.evaluation
    train = data.train
    if isinstance(train, dict):
        train = {name: replace(source, shards=absolute(source.shards)) for name, source in train.items()}
    else:
        train = absolute(train)
    validation = None if data.validation is None else absolute(data.validation)
    tasks = {name: replace(task, data=absolute(task.data)) for name, task in evaluation.tasks.items()}
    captions = evaluation.captions and replace(evaluation.captions, data=absolute(evaluation.captions.data))

    def absolute_weights(name: str) -> str:
        return os.path.abspath(name) if os.path.exists(name) else name  # else a name of released weights

    return replace(
        recipe,
        initialise_from=recipe.initialise_from and absolute_weights(recipe.initialise_from),
        initialise_parts={part: absolute_weights(name) for part, name in recipe.initialise_parts.items()},
        data=replace(data, train=train, validation=validation),
        evaluation=replace(evaluation, tasks=tasks, captions=captions),
    )


def with_steps(recipe: Recipe) -> Recipe:
    """Return the recipe with its epochs converted to steps. Samples are counted, if no index has their number.

    Raises: ConfigError: if the epochs make no valid recipe, or each caption is a sample and no index counts them.
    """
    if recipe.epochs is None:
        return recipe
    shards = [list_shards(paths, key=key) for key, paths in recipe.data.training_paths.items()]
    samples = sum(sum(samples_in(each)) for each in shards)
    if recipe.data.captions.use == "all":
        captions = list(map(indexed_captions, shards))
        if None in captions or not recipe.data.captions.lines or recipe.data.captions.weights:
            raise ConfigError(
                "epochs cannot be counted if data.captions.use is 'all' and no index has the number of captions: "
                "give steps, or run `contracap shards index FOLDER`"
            )
        samples = sum(filter(None, captions))
    batch_size = recipe.data.batch_size
    steps = math.ceil(recipe.epochs * samples / batch_size)
    try:
        return replace(recipe, epochs=None, steps=steps)
    except ValueError as error:
        epochs = "1 epoch" if recipe.epochs == 1 else f"{recipe.epochs:g} epochs"
        verb, found = "is" if recipe.epochs == 1 else "are", f"{samples:,} sample{'s' * (samples != 1)}"
        said = f"{epochs} of {found} {verb} {steps:,} step{'s' * (steps != 1)}: {error}"
        if batch_size > samples:
            said = f"data.batch_size {batch_size:,} exceeds the {found}: lower it ({said})"
        raise ConfigError(said) from None


def merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with some of them changed."""
    return dict(values) | {
        name: merge(values[name], change)
        if isinstance(change, Mapping) and isinstance(values.get(name), Mapping)
        else change
        for name, change in changes.items()
    }
