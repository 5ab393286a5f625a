"""Recomputation and compilation of a model's transformer blocks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from contracap.model.compiling import allow_recompilations
from contracap.model.transformer import CrossAttentionBlock, SelfAttentionBlock

# Versions of one function. All stacks share one: vision, text and decoder, each with and without gradients, with and
# without autocast, and for other lengths, are more than the 8 that torch allows.
MAX_COMPILED = 64


def change_blocks(model: nn.Module, *, recompute: bool, compiled: bool) -> None:
    """Change how every transformer block of `model` runs. Results and parameters stay the same.

    Args:
        recompute: keep only the input of each block, and compute the rest again in the backward pass.
        compiled: compile each block with `torch.compile`. The blocks of a stack share one compiled function. It is
            compiled once more when the length of the texts first changes, and then serves every length.
    """
    if compiled:
        allow_recompilations(MAX_COMPILED)
    for block in model.modules():
        if isinstance(block, SelfAttentionBlock | CrossAttentionBlock):
            # Set on the instance, so that it runs after the hooks in which FSDP gathers parameters before each call.
            forward: Callable[..., Any] = block.forward
            if recompute:
                forward = _recompute(forward)
            if compiled:
                forward = torch.compile(forward)
            block.forward = forward


def _recompute(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        # A block draws nothing at random, so no generator needs to be put back.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
