"""How a model's transformer blocks run: once more in the backward pass, compiled, or as they are."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from contracap.model.transformer import CrossBlock, SelfBlock

MAX_COMPILED = 64  # versions of one function


def change_blocks(model: nn.Module, *, recompute: bool, compiled: bool) -> None:
    """Let every transformer block of `model` run so, from now on; what it computes and its parameters stay the same.

    Args:
        recompute: in the backward pass, what lies between a block's input and output, instead of keeping it.
        compiled: by `torch.compile`, block by block: those of a stack are alike, so that one is compiled for all, and
            once more when texts of another length come; from then on for every length.
    """
    if compiled:
        _allow_recompilations()
    for block in model.modules():
        if isinstance(block, SelfBlock | CrossBlock):
            # On the instance, so that it runs after the hooks by which FSDP fetches parameters before each call.
            forward: Callable[..., Any] = block.forward
            if recompute:
                forward = _recomputed(forward)
            if compiled:
                forward = torch.compile(forward)
            block.forward = forward


def _allow_recompilations() -> None:
    """Beyond its limit, torch runs a function as it is and says nothing.

    It counts by function, and one serves all stacks: vision, text and decoder, each with and without gradients, under
    autocast and not, and for other lengths, are more than the 8 it allows.
    """
    import torch._dynamo  # takes seconds

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILED)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        # A block draws nothing at random, so no generator needs to be put back.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
