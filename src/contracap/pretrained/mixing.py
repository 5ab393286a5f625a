"""Weights between two models of the same configuration, such as one before and after fine-tuning.

Source: WiSE-FT (arXiv 2109.01903).
"""

from dataclasses import replace

from contracap.config import flatten, to_dict
from contracap.pretrained.errors import WeightsError
from contracap.pretrained.weights import Weights


def mix_weights(start: Weights, end: Weights, *, alpha: float) -> Weights:
    """Return (1 - alpha) start + alpha end, tensor by tensor; at 0 and 1 those are equal to one of them.

    Raises:
        ValueError: if alpha is outside 0 to 1.
        WeightsError: if they are not of the same model, or take other images.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it must be from 0, the first weights, to 1, the second")
    require_same_model(start, end)
    state = {
        name: (1.0 - alpha) * tensor.float() + alpha * end.state[name].float() for name, tensor in start.state.items()
    }
    return replace(start, state=state)


def require_same_model(start: Weights, end: Weights) -> None:
    """Raises: WeightsError: naming a setting in which two models differ."""
    first, second = (
        dict(flatten({"model": to_dict(each.model), "image": to_dict(each.image)})) for each in (start, end)
    )
    for key in first.keys() | second.keys():
        if first.get(key) != second.get(key):
            raise WeightsError(
                f"{start.path} and {end.path} are different models: {key} is {first.get(key)} and {second.get(key)}"
            )
