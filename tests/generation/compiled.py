"""Captions by compiled steps and by plain ones, two batches of each, and how often they were compiled: compiled.py."""

import json

import torch
from torch._dynamo.utils import counters

import contracap
from contracap.generation import BeamSearch, Captioner

if __name__ == "__main__":
    torch.manual_seed(0)
    model, processor = contracap.load("tiny", weights="random", seed=0)
    pixels = torch.randn(6, 3, 32, 32)
    found = {}
    for compiled in (False, True):
        captioner = Captioner(model, processor, compiled=compiled)
        found[str(compiled)] = [
            [text.token_ids for text in caption.alternatives]
            for half in (pixels[:3], pixels[3:])
            for caption in captioner.generate(half, BeamSearch(3, max_tokens=12), "a photo of")
        ]
    print(json.dumps({"captions": found, "graphs": counters["stats"]["unique_graphs"]}))
