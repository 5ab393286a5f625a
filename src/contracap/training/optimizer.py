"""AdamW: which parameters decay, and the learning rate of each at each step."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from contracap.training.parts import is_in_part, require_parts


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = 1e-3
    """Highest learning rate, reached after `warmup_steps`."""
    min_learning_rate: float = 0.0
    """Learning rate at the end of the cosine."""
    learning_rate_factors: dict[str, float] = field(default_factory=dict)
    """Factors of the learning rate of parts, named as in `frozen`: `{ pooler = 25.0 }`, as the paper fine-tunes. The
    first that names a parameter counts; all others have a factor of 1."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """Decay of the weights that `decayed` selects."""
    decayed: Literal["linear", "matrices"] = "linear"
    """`linear`: only the weights of linear layers decay. `matrices`: all tensors with two or more dimensions do, also
    embeddings, positions and queries, as in open_clip."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of AdamW's averages of the gradient and of its square."""
    epsilon: float = 1e-6
    """Term added to AdamW's denominator."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 does not clip."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(
                "the learning rates must be 0 <= min_learning_rate <= learning_rate, with learning_rate above 0; "
                f"they are {self.min_learning_rate} and {self.learning_rate}"
            )
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        for part, factor in self.learning_rate_factors.items():
            if not 0 < factor < math.inf:
                raise ValueError(f"learning_rate_factors.{part} is {factor}; it must be above 0; to fix it, use frozen")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {list(self.betas)}; each must be at least 0 and below 1")
        if self.epsilon <= 0:
            raise ValueError(f"epsilon is {self.epsilon}; it must be above 0")


def learning_rate_at(step: int, config: OptimizerConfig, *, total_steps: int) -> float:
    """Return the learning rate at `step` (steps tried, from 0): linear warm-up, then half a cosine.

    Deviation from the paper, whose rate decays linearly: open_clip trains with a cosine.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return (
        config.min_learning_rate
        + (config.learning_rate - config.min_learning_rate) * (1 + math.cos(math.pi * done)) / 2
    )


def decays(module: nn.Module, name: str, parameter: nn.Parameter, config: OptimizerConfig) -> bool:
    """Return whether weight decay applies to the parameter `name` of `module`."""
    if config.decayed == "matrices":
        return parameter.ndim >= 2
    return name == "weight" and isinstance(module, nn.Linear)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over the parameters that require gradients, in groups that have the same weight decay and the same
    factor of the learning rate.

    Raises: ValueError: if nothing is left to train, or a factor is given for a part that the model does not have.
    """
    require_parts(model, config.learning_rate_factors, key="optimizer.learning_rate_factors")
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                factor = _factor(f"{prefix}.{name}".removeprefix("."), config)
                groups.setdefault((decays(module, name, parameter, config), factor), []).append(parameter)
    if not any(groups.values()):
        raise ValueError("every parameter is frozen: nothing is left to train")
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": config.weight_decay if decaying else 0.0}
            for (decaying, _), parameters in groups.items()
            if parameters
        ],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        fused=True,
    )


def group_factors(model: nn.Module, optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> list[float]:
    """Return the factor of the learning rate of each group of `build_optimizer`. The groups themselves do not hold it,
    because what they hold is part of the format of checkpoints."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [_factor(names[group["params"][0]], config) for group in optimizer.param_groups]


def _factor(name: str, config: OptimizerConfig) -> float:
    factors = (factor for part, factor in config.learning_rate_factors.items() if is_in_part(name, part))
    return next(factors, 1.0)
