"""Losses and gradients of blocks as they are, compiled, and recomputed as well. Run as a program of its own: the hook
that checks shapes cannot be compiled."""

import json
from functools import partial

import torch
import torch._dynamo
from torch import Tensor

from contracap.losses import captioning_loss, contrastive_loss
from contracap.model.coca import CoCa
from contracap.model.sizes import SIZES
from contracap.parallel import ParallelConfig, ParallelModel, ProcessGroup, parallelize

LENGTHS = (6, 9, 12)  # of texts: the second and third are new to what was compiled


def tiny(config: ParallelConfig) -> tuple[CoCa, ParallelModel]:
    torch.manual_seed(0)
    model = CoCa(SIZES["tiny"])
    model.initialise()
    return model, parallelize(model, config, ProcessGroup())


def texts(rows: int, length: int) -> Tensor:
    ids = torch.randint(1, 1000, (rows, length))
    ids[:, 0], ids[:, -1] = 1022, 1023
    return ids


def numbers(config: ParallelConfig) -> list[list[float]]:
    """Both losses and the norm of the gradients, for each length of the texts."""
    (model, shared), found = tiny(config), []
    for length in LENGTHS:
        ids = texts(4, length)
        output = shared.model(torch.randn(4, 3, 32, 32), ids)
        vocabulary, captions = model.require_decoder().vocabulary.weight, output.caption_states
        captioning = captioning_loss(captions.states, vocabulary, labels=captions.labels, num_labels=10)
        contrastive = contrastive_loss(output.image_features, output.text_features, logit_scale=output.logit_scale)
        model.zero_grad()
        (captioning + contrastive).backward()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        found.append([captioning.item(), contrastive.item(), norm.item()])
    return found


def train_validate_evaluate() -> None:
    """Compile as often as is allowed; fails where torch would run blocks as they are."""
    torch.compile = partial(torch.compile, backend="eager")  # the same versions, in seconds
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    model, shared = tiny(ParallelConfig(compile=True))
    for length in LENGTHS:
        for how in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            for bf16 in (False, True):
                with how(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    shared.model(torch.randn(2, 3, 32, 32), texts(2, length))
                    model.encode_image(torch.randn(2, 3, 32, 32))


if __name__ == "__main__":
    configs = {"plain": {}, "compiled": {"compile": True}, "both": {"recompute": "blocks", "compile": True}}
    print(json.dumps({name: numbers(ParallelConfig(**config)) for name, config in configs.items()}))
    torch._dynamo.reset()
    train_validate_evaluate()
