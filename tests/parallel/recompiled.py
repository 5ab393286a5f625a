"""Compiled blocks that train, validate and evaluate, as often as is allowed: fails where torch would run them as they
are. Run as a program of its own, like compiled.py."""

from functools import partial

import torch
import torch._dynamo

from contracap.model.coca import CoCa
from contracap.model.sizes import SIZES
from contracap.parallel import ParallelConfig, ProcessGroup, parallelize

if __name__ == "__main__":
    torch.compile = partial(torch.compile, backend="eager")  # the same versions, in seconds
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    model = CoCa(SIZES["tiny"])
    model.initialise()
    shared = parallelize(model, ParallelConfig(compile=True), ProcessGroup())
    pixels = torch.randn(2, 3, 32, 32)
    for length in (6, 9, 12):
        ids = torch.randint(1, 1000, (2, length))
        ids[:, 0], ids[:, -1] = 1022, 1023
        for how in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            for bf16 in (False, True):
                with how(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    shared.model(pixels, ids)
                    model.encode_image(pixels)
