"""The run that is planned: a recipe on some GPUs, with what every part of the plan is computed from."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from contracap.apps.plan.memory import memory_parts
from contracap.apps.plan.parameters import EXACT, Shares, shares_of
from contracap.apps.plan.traffic import Collective, collectives_of
from contracap.model.coca import CoCa
from contracap.training.flops import TextLengths, Tokens, tokens_of
from contracap.training.gpus import Gpu
from contracap.training.recipe import Recipe

USABLE = 0.92  # share of a GPU's memory; CUDA, buffers between GPUs and gaps between tensors take the rest: estimated
MAX_ROWS = 2**20


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A recipe on some GPUs.

    Attributes:
        model: as `planned_model` makes it; it depends on neither the batch nor the GPUs.
        gpus_per_machine: these reach each other faster, and have one copy of the model together under `hsdp`.
        efficiency: share of the GPU's dense peak that forward and backward pass reach.
    """

    recipe: Recipe
    model: CoCa
    texts: TextLengths
    gpu: Gpu
    gpus: int
    gpus_per_machine: int
    efficiency: float

    @property
    def product(self) -> int:
        """Bytes of a number in matrix products."""
        return EXACT if self.recipe.precision == "fp32" else 2

    @property
    def peak(self) -> float:
        """Operations a second of a GPU's dense peak at this precision."""
        return self.gpu.fp32 if self.recipe.precision == "fp32" else self.gpu.bf16

    @property
    def rate(self) -> float:
        """Operations a second that forward and backward pass reach."""
        return self.efficiency * self.peak

    @property
    def samples(self) -> float:
        """Samples of a step on each GPU."""
        return self.recipe.data.batch_size / self.gpus

    @property
    def rows(self) -> float:
        """Samples of a forward pass on each GPU."""
        return self.samples / self.recipe.accumulation

    @cached_property
    def tokens(self) -> Tokens:
        """Rows that a sample gives each part of the model."""
        return tokens_of(self.recipe.model_config, self.recipe.loss, self.texts)

    @cached_property
    def shares(self) -> Shares:
        """Parameters of each GPU."""
        kind = self.recipe.parallel.kind
        return shares_of(self.model, kind, gpus=self.gpus, per_machine=self.gpus_per_machine)

    @cached_property
    def collectives(self) -> Sequence[Collective]:
        """Collectives of a step."""
        return collectives_of(self.recipe, self.shares, rows=self.samples, product=self.product)

    @property
    def usable_memory(self) -> float:
        """Bytes of a GPU that tensors can have."""
        return USABLE * self.gpu.memory

    def memory(self, rows: float) -> Mapping[str, float]:
        """Return the bytes on each GPU by part, for a number of samples in a forward pass."""
        return memory_parts(self.recipe, self.model, self.shares, self.tokens, rows=rows, product=self.product)

    @property
    def fits(self) -> bool:
        """True if a step has the memory it takes."""
        return sum(self.memory(self.rows).values()) <= self.usable_memory

    @cached_property
    def max_rows(self) -> int:
        """Largest number of samples in a forward pass that fits."""
        needed = range(1, MAX_ROWS)
        return bisect_right(needed, self.usable_memory, key=lambda rows: sum(self.memory(float(rows)).values()))
