"""ProcessGroup that train a model they share out, and evaluate it between steps: evaluated.py SHARDS OUT."""

import json
import sys
from pathlib import Path

import torch

from contracap.config import build
from contracap.evaluation.config import EvaluationConfig
from contracap.evaluation.result import Evaluator
from contracap.evaluation.suite import build_suite
from contracap.model.coca import CoCa
from contracap.parallel import ParallelConfig, full_tensor, parallelize, start_process_group
from contracap.pretrained import load


def measured(suite: Evaluator, model: CoCa) -> list[object]:
    result = suite(model)
    return [result.figures, result.predictions]


if __name__ == "__main__":
    shards, out = sys.argv[1], Path(sys.argv[2])
    model, processor = load("tiny", weights="random", seed=0)
    tables = {"tasks": {"pairs": {"task": "retrieval", "data": shards}}, "captions": {"data": shards, "samples": 3}}
    config = build(EvaluationConfig, tables)
    suite = build_suite(config, processor)
    found = {"alone": measured(suite, model)}
    with start_process_group(torch.device("cpu")) as process_group:
        suite = build_suite(config, processor, process_group)
        shared = parallelize(model, ParallelConfig(kind="fsdp"), process_group)

        def gradient_norm() -> float:
            torch.manual_seed(0)
            ids = processor.texts(["a red image", "a green image"])
            output = shared.model(torch.randn(2, 3, 32, 32), ids)
            (output.image_features.sum() + output.text_features.sum() + output.caption_states.states.sum()).backward()
            norm = full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)).item()
            model.zero_grad()
            return norm

        norms = [gradient_norm()]
        for _ in range(2):
            found["shared"] = measured(suite, model)
            norms.append(gradient_norm())
        (out / f"{process_group.rank}.json").write_text(json.dumps(found | {"norms": norms}))
