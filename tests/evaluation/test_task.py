from pathlib import Path

from contracap.data.shards import write_shard
from contracap.evaluation.suite import measure_tasks
from contracap.evaluation.task import TaskConfig, build_evaluator, measure_task, seed_of
from contracap.pretrained import load

from .worlds import COLOURS, record


def task(*settings: str, **given) -> TaskConfig:
    return TaskConfig(**{"task": "captioning", "data": "x", **given}, settings=settings)


def test_the_seed_is_that_of_what_is_drawn() -> None:
    drawn, reranked = task("seed=7", strategy="sample"), task("of.seed=7", strategy="rerank")
    assert seed_of(drawn) == seed_of(reranked) == seed_of(drawn, reranked, task()) == 7
    assert seed_of(task(strategy="sample")) == seed_of(task(task="vqa", strategy="sample")) == 0
    beams = task("of.width=3", strategy="rerank")
    retrieval = TaskConfig(task="retrieval", data="x")
    for nothing_drawn in (task(), task(strategy="greedy"), task(task="vqa"), beams, retrieval):
        assert seed_of(nothing_drawn) is None
    assert seed_of(drawn, task("seed=8", strategy="sample")) is None


def test_results_tell_the_seed(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [record(name, name, captions=[f"a {name} wall"]) for name in COLOURS])
    model, processor = load("tiny", weights="random", seed=0)
    config = TaskConfig(
        task="captioning", data=str(tmp_path), metrics=("rouge_l",), strategy="sample", settings=("seed=3",)
    )
    evaluator = build_evaluator(config, processor)
    assert measure_task(config, evaluator, model, command="contracap evaluate x").seed == 3
    assert measure_tasks({"a": config}, model, processor, command="contracap evaluate x").seed == 3
    assert measure_tasks({"a": config}, model, processor, command="contracap study x", seed=5).seed == 5
