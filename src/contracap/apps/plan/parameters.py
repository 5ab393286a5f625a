"""The parameters of a planned run: how many there are, and how the GPUs share them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from contracap.model.coca import CoCa
from contracap.parallel import Kind, sharded_modules
from contracap.training.parts import freeze, freeze_unused
from contracap.training.recipe import Recipe

EXACT = 4  # bytes of a float32 number: weights, gradients, moments, the residual stream, what norms read
MOMENTS = 2  # that AdamW keeps of each parameter
WEIGHTS_ENTRY, OPTIMIZER_ENTRY = 110, 5850  # bytes in addition to each parameter's numbers in a checkpoint, measured


def planned_model(recipe: Recipe) -> CoCa:
    """The recipe's model without memory for its tensors; what the run will not train requires no gradient."""
    with torch.device("meta"):
        model = CoCa(recipe.model_config)
    freeze(model, recipe.frozen)
    freeze_unused(model, recipe.loss)
    return model


def count_parameters(model: CoCa) -> Mapping[str, int]:
    """Parameters by part; the decoder's hold the vocabulary matrix."""
    counts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in model.named_children()}
    return counts | {"logit_scale": model.logit_scale.numel()}


def checkpoint_bytes(model: CoCa, *, averaged: bool) -> int:
    """Bytes of a checkpoint: weights, the moments of what is trained, and the moving average where there is one."""
    weights = moments = 0
    for parameter in model.parameters():
        weights += parameter.numel() * EXACT + WEIGHTS_ENTRY
        moments += (parameter.numel() * EXACT * MOMENTS + OPTIMIZER_ENTRY) * parameter.requires_grad
    return weights * (1 + averaged) + moments


def snapshot_bytes(model: CoCa, shares: "Shares", *, averaged: bool) -> int:
    """Bytes that are copied off the first GPU for a checkpoint: all weights, and its own share of the moments."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    return (weights * (1 + averaged) + shares.trained * MOMENTS) * EXACT


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Parameters that travel together.

    Attributes:
        whole: numbers in all of them.
        trained: numbers in those that have a gradient.
        tensors: how many of them have a gradient.
        decoder: whether it is part of the decoder, which the contrastive branch does without.
        backward: whether it is fetched for the backward pass, too.
        twice: whether each loss has a pass of its own over it, as over the text encoder's blocks of a MaMMUT.
    """

    whole: int
    trained: int
    tensors: int
    decoder: bool = False
    backward: bool = True
    twice: bool = False


@dataclass(frozen=True, kw_only=True)
class Shares:
    """The shares of a model that GPUs hold.

    Attributes:
        gpus: all of them.
        shards: number of GPUs that hold one copy of the sharded parameters, in equal shares.
        per_machine: GPUs of a machine.
        copied: what every GPU holds whole: all of a model that is not sharded, else what is too small for it.
        root: what stays fetched from the forward pass to the backward pass; nothing where nothing is sharded.
        blocks: what is fetched for a pass and let go again, in the order of the passes.
    """

    gpus: int
    shards: int
    per_machine: int
    copied: Unit
    root: Unit
    blocks: tuple[Unit, ...]

    @property
    def shared(self) -> tuple[Unit, ...]:
        """Units that are sharded."""
        return (self.root, *self.blocks)

    @property
    def held(self) -> int:
        """Numbers of parameters on each GPU."""
        return self.copied.whole + sum(unit.whole for unit in self.shared) // self.shards

    @property
    def trained(self) -> int:
        """Numbers on each GPU of the parameters that have a gradient."""
        return self.copied.trained + sum(unit.trained for unit in self.shared) // self.shards


def shares_of(model: CoCa, kind: Kind, *, gpus: int, per_machine: int) -> Shares:
    """Compute the shares that `parallel.wrapped` gives each GPU of a model.

    FSDP2 cuts each parameter along its first dimension and pads it to equal shares, so that it travels with the
    padding. The backward pass leaves out an encoder that is frozen as a whole, but for its last block, which is fetched
    ahead of time.

    Torch's fake process group could build these shares, for any number of ranks in one process, but it is a private
    part of torch: the tests hold the formula to it, and to real ranks.

    Raises:
        ValueError: if the machines would have different numbers of GPUs under `hsdp`.
    """
    own = list(model.parameters())
    if kind == "ddp" or gpus == 1:
        return Shares(gpus=gpus, shards=1, per_machine=per_machine, copied=_unit(own, 1), root=_unit([], 1), blocks=())
    shards = min(gpus, per_machine) if kind == "hsdp" else gpus
    if gpus % shards:
        raise ValueError(
            f"gpus is {gpus}, but hsdp needs whole machines of {per_machine}: take a multiple, or say kind = 'fsdp'"
        )
    modules = sharded_modules(model)
    taken = {parameter for module in modules for parameter in module.parameters()} | {model.logit_scale}
    return Shares(
        gpus=gpus,
        shards=shards,
        per_machine=per_machine,
        copied=_unit([model.logit_scale], 1),
        root=_unit([parameter for parameter in own if parameter not in taken], shards),
        blocks=tuple(_blocks(model, modules, shards)),
    )


def _blocks(model: CoCa, modules: list[nn.Module], shards: int) -> Iterator[Unit]:
    frozen = {
        module
        for encoder in (model.vision, model.text)
        if not any(parameter.requires_grad for parameter in encoder.parameters())
        for module in encoder.modules()
    }
    decoder = set(model.decoder.modules()) if model.decoder is not None else set[nn.Module]()
    twice = set(model.text.modules()) if model.config.is_mammut else set[nn.Module]()
    for module, following in zip(modules, [*modules[1:], model], strict=True):
        unit = _unit(module.parameters(), shards)
        yield replace(
            unit,
            decoder=module in decoder,
            backward=not (module in frozen and following in frozen),
            twice=module in twice,
        )


def _unit(parameters: Iterable[nn.Parameter], shards: int) -> Unit:
    whole = trained = tensors = 0
    for parameter in parameters:
        rows = len(parameter) if parameter.dim() else 1
        padded = -(-rows // shards) * shards * (parameter.numel() // rows)
        whole += padded
        trained += padded * parameter.requires_grad
        tensors += parameter.requires_grad
    return Unit(whole=whole, trained=trained, tensors=tensors)
