"""Train open_clip's CoCa or CLIP on Flickr8k, for as long as recipes/flickr8k-cpu.toml takes on the same cores.

    python runs/flickr8k_open_clip.py coca 15 data/flickr8k

Model, tokenizer and losses are open_clip's. contracap decodes and augments the images, and the clock stops meanwhile,
which favours open_clip. Afterwards the weights are converted, and contracap measures the model (tests check that both
compute the same outputs). The precision is the one that contracap would choose on this machine.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn

from contracap import Greedy
from contracap.data.loader import evaluation_samples
from contracap.evaluation.captioning import evaluate_captioning
from contracap.evaluation.metrics.scores import CaptionScorer
from contracap.evaluation.retrieval import evaluate_retrieval
from contracap.image_files import decode
from contracap.images import AugmentationConfig, augment, normalise
from contracap.pretrained import random_model
from contracap.pretrained.open_clip_config import config_from_open_clip
from contracap.pretrained.open_clip_names import from_open_clip
from contracap.training.start import precision_on

sys.modules.setdefault("torchvision._meta_registrations", ModuleType("torchvision._meta_registrations"))
import open_clip  # noqa: E402

BATCH, WIDTH, LAYERS, WARMUP = 128, 256, 6, 0.1
TOWER = {"width": WIDTH, "heads": WIDTH // 64, "layers": LAYERS}
VISION = {"image_size": 128, "patch_size": 16, "width": WIDTH, "head_width": 64, "layers": LAYERS}
CONFIGS = {
    "clip": {
        "embed_dim": WIDTH,
        "vision_cfg": VISION,
        "text_cfg": {"context_length": 77, "vocab_size": 49408, **TOWER},
    },
    "coca": {
        "embed_dim": WIDTH,
        "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": WIDTH // 64, "output_tokens": True},
        "text_cfg": {"context_length": 76, "vocab_size": 49408, "embed_cls": True, "output_tokens": True, **TOWER},
        "multimodal_cfg": {"context_length": 76, "vocab_size": 49408, "attn_pooler_heads": WIDTH // 64, **TOWER},
        "custom_text": True,
    },
}


def main(kind: str, minutes: float, data: Path, learning_rate: float) -> None:
    torch.manual_seed(0)
    config = CONFIGS[kind]
    if kind == "coca":
        theirs: nn.Module = open_clip.CoCa(**{name: value for name, value in config.items() if name != "custom_text"})
        nn.init.normal_(theirs.text_decoder.text_projection, std=WIDTH**-0.5)  # left uninitialised there
    else:
        theirs = open_clip.CLIP(**config)
    tokenizer = open_clip.SimpleTokenizer(context_length=theirs.context_length)
    loss = open_clip.CoCaLoss(2.0, 1.0, pad_id=0) if kind == "coca" else open_clip.ClipLoss()
    decayed = [value for value in theirs.parameters() if value.ndim > 1]
    others = [value for value in theirs.parameters() if value.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98), eps=1e-6
    )
    ours = config_from_open_clip(config)
    model, processor = random_model(ours, seed=0)
    generator = np.random.default_rng(0)
    train = [(decode(sample.image), sample.captions) for sample in evaluation_samples(data / "train")]
    augmentation = AugmentationConfig(crop_scale=(0.35, 1.0), flip=0.5)
    bf16 = precision_on(torch.device("cpu"), "auto") == "bf16"
    spent, steps, limit = 0.0, 0, minutes * 60
    order: list[int] = []
    while spent < limit:
        if len(order) < BATCH:
            order = list(generator.permutation(len(train)))
        rows, order = [train[index] for index in order[:BATCH]], order[BATCH:]
        crops = torch.stack([augment(pixels, processor.image_config, augmentation, generator) for pixels, _ in rows])
        pixels = normalise(crops, processor.image_config)
        captions = [own[generator.integers(len(own))] for _, own in rows]
        begun = time.perf_counter()
        done = spent / limit
        rate = learning_rate * (
            min(1.0, (done + 0.002) / WARMUP) if done < WARMUP else 0.5 * (1 + math.cos(math.pi * done))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = theirs(pixels, tokenizer(captions))
            if kind == "clip":
                outputs = dict(zip(("image_features", "text_features", "logit_scale"), outputs, strict=True))
            total = sum(loss(**outputs, output_dict=True).values())
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            theirs.logit_scale.clamp_(0, math.log(100))
        spent += time.perf_counter() - begun
        steps += 1
        if steps % 10 == 0:
            print(
                f"{steps} steps, {spent:.0f} s, loss {total.item():.3f}, {steps * BATCH / spent:.1f} samples/s",
                flush=True,
            )
    model.load_state_dict(from_open_clip(theirs.state_dict(), ours))
    metrics = dict(evaluate_retrieval(model, processor, data / "val").figures)
    if kind == "coca":
        scorer = CaptionScorer(metrics=["cider"])
        captions = evaluate_captioning(model, processor, data / "val", strategy=Greedy(), scorer=scorer)
        metrics["CIDEr"] = captions.figures["CIDEr"]
    print(json.dumps({"kind": kind, "steps": steps, "samples": steps * BATCH, "seconds": spent, "metrics": metrics}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(CONFIGS))
    parser.add_argument("minutes", type=float, help="training time, without decoding and augmentation")
    parser.add_argument("data", type=Path, help="folder with the shards of Flickr8k in train and val")
    parser.add_argument("learning_rate", type=float, nargs="?", default=1e-3, help="the highest (default: 1e-3)")
    arguments = parser.parse_args()
    main(arguments.kind, arguments.minutes, arguments.data, arguments.learning_rate)
