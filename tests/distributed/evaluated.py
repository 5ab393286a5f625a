"""Ranks that train a model they share out, and evaluate it between steps: evaluated.py SHARDS OUT."""

import json
import sys
from pathlib import Path

import torch

from contracap.config import build
from contracap.evaluation.suite import EvaluationConfig, Suite
from contracap.parallel import ParallelConfig, started, whole, wrapped
from contracap.pretrained import load

if __name__ == "__main__":
    shards, out = sys.argv[1], Path(sys.argv[2])
    model, processor = load("tiny", weights="random", seed=0)
    tables = {"tasks": {"pairs": {"task": "retrieval", "data": shards}}, "captions": {"data": shards, "samples": 3}}
    config = build(EvaluationConfig, tables)
    suite = Suite(config, processor)
    found = {"alone": [dict(suite.run(model)), list(suite.captions)]}
    with started(torch.device("cpu")) as ranks:
        suite = Suite(config, processor, ranks)
        shared = wrapped(model, ParallelConfig(kind="fsdp"), ranks)

        def gradient_norm() -> float:
            torch.manual_seed(0)
            ids = processor.texts(["a red picture", "a green picture"])
            output = shared.model(torch.randn(2, 3, 32, 32), ids)
            (output.image_features.sum() + output.text_features.sum() + output.captions.states.sum()).backward()
            norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)).item()
            model.zero_grad()
            return norm

        norms = [gradient_norm()]
        for _ in range(2):
            found["shared"] = [dict(suite.run(model)), list(suite.captions)]
            norms.append(gradient_norm())
        (out / f"{ranks.rank}.json").write_text(json.dumps(found | {"norms": norms}))
