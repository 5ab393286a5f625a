"""The parts of a model: which of them train, and which abilities their training can change."""

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from contracap.losses import LossConfig
from contracap.model.coca import CoCa

# The name of a part in recipes, where the model has another one.
MODULES = {"image": "vision"}


def is_in_part(name: str, part: str) -> bool:
    """Return whether a parameter belongs to a part: `image`, `pooler`, `text`, `decoder`, `logit_scale`, or a longer
    start of parameter names, which ends at a dot."""
    first, dot, rest = part.partition(".")
    return f"{name}.".startswith(f"{MODULES.get(first, first)}{dot}{rest}.")


def part_of(name: str) -> str:
    """Return the name of a parameter's part, as recipes have it."""
    module = name.split(".")[0]
    return next((part for part, other in MODULES.items() if other == module), module)


def require_parts(model: nn.Module, parts: Iterable[str], *, key: str) -> None:
    """Raises: ValueError: if a part has no parameters; names the key of the recipe and the parts."""
    names = [name for name, _ in model.named_parameters()]
    for part in parts:
        if not any(is_in_part(name, part) for name in names):
            known = ", ".join(dict.fromkeys(map(part_of, sorted(names))))
            raise ValueError(f"{key}: no parameter's name begins with {part!r}; the parts are {known}")


def freeze(model: nn.Module, parts: Iterable[str]) -> None:
    """Freeze every parameter of these parts, as in `is_in_part`.

    Raises: ValueError: if a part has no parameters.
    """
    parts = tuple(parts)
    require_parts(model, parts, key="frozen")
    for name, parameter in model.named_parameters():
        if any(is_in_part(name, part) for part in parts):
            parameter.requires_grad_(False)


def freeze_unused(model: CoCa, loss: LossConfig) -> None:
    """Freeze the parameters that only a loss of weight 0 would train."""
    freeze(model, [] if loss.contrastive else model.only_for_contrastive())
    freeze(model, [] if loss.captioning else model.only_for_captioning())


def changes_retrieval(model: CoCa) -> bool:
    """Return whether a parameter that trains can change the order in which images and texts are ranked.

    If none can, both embeddings stay equal to the bit.
    """
    return _trains_outside(model, ["logit_scale", *model.only_for_captioning()])


def changes_captions(model: CoCa) -> bool:
    """Return whether a parameter that trains can change the captions."""
    return model.decoder is not None and _trains_outside(model, model.only_for_contrastive())


def _trains_outside(model: CoCa, parts: Iterable[str]) -> bool:
    parts = tuple(parts)
    return any(
        parameter.requires_grad and not any(is_in_part(name, part) for part in parts)
        for name, parameter in model.named_parameters()
    )


def describe_parts(model: CoCa, learning_rate_factors: Mapping[str, float]) -> list[str]:
    """Return lines that say which parts train and which are frozen, and what the training can change.

    Args:
        learning_rate_factors: as in `OptimizerConfig`.
    """
    trained, frozen = Counter[str](), Counter[str]()
    for name, parameter in model.named_parameters():
        (trained if parameter.requires_grad else frozen)[part_of(name)] += parameter.numel()
    abilities = {"retrieval": changes_retrieval(model)}
    if model.decoder is not None:
        abilities["captions"] = changes_captions(model)
    changed, kept = (
        [ability for ability, changes in abilities.items() if changes == wanted] for wanted in (True, False)
    )
    factors = ", ".join(f"{part} x {factor:g}" for part, factor in learning_rate_factors.items())
    return [
        f"trains: {_list_parameters(trained)}{f'; learning rates: {factors}' if factors else ''}",
        *([f"frozen: {_list_parameters(frozen)}"] if frozen else []),
        f"can change: {' and '.join(changed) or 'neither retrieval nor captions'}"
        + (f"; {' and '.join(kept)} cannot change" if kept and changed else ""),
    ]


def _list_parameters(parameters: Mapping[str, int]) -> str:
    """List parts and their millions of parameters, those of a single number last."""
    large = ", ".join(f"{part} {count / 1e6:,.2f}" for part, count in parameters.items() if count > 1)
    single = [part for part, count in parameters.items() if count == 1]
    return ", ".join([*([f"{large} million parameters"] if large else []), *single])
