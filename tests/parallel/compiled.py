"""Losses and gradients of blocks as they are, compiled, and recomputed as well. Run as a program of its own: the hook
that checks shapes cannot be compiled."""

import json

import torch

from contracap.losses import captioning_loss, contrastive_loss
from contracap.model.coca import CoCa
from contracap.model.sizes import SIZES
from contracap.parallel import ParallelConfig, ProcessGroup, parallelize


def main() -> None:
    found = {}
    for name, config in {
        "plain": ParallelConfig(),
        "compiled": ParallelConfig(compile=True),
        "both": ParallelConfig(recompute="blocks", compile=True),
    }.items():
        torch.manual_seed(0)
        model = CoCa(SIZES["tiny"])
        model.initialise()
        shared = parallelize(model, config, ProcessGroup())
        numbers = []
        for length in (6, 9, 12):  # of texts: the second and third are new to what was compiled
            ids = torch.randint(1, 1000, (4, length))
            ids[:, 0], ids[:, -1] = 1022, 1023
            output = shared.model(torch.randn(4, 3, 32, 32), ids)
            vocabulary, captions = model.require_decoder().vocabulary.weight, output.caption_states
            captioning = captioning_loss(captions.states, vocabulary, labels=captions.labels, num_labels=10)
            contrastive = contrastive_loss(output.image_features, output.text_features, logit_scale=output.logit_scale)
            model.zero_grad()
            (captioning + contrastive).backward()
            norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
            numbers.append([captioning.item(), contrastive.item(), norm.item()])
        found[name] = numbers
    print(json.dumps(found))


if __name__ == "__main__":
    main()
