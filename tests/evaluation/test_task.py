from pathlib import Path

import pytest

import contracap
from contracap.config import ConfigError, build
from contracap.data.shards import write_shard
from contracap.evaluation.config import TaskConfig
from contracap.evaluation.metrics.spice import CORENLP_JARS
from contracap.evaluation.suite import measure_tasks
from contracap.evaluation.task import build_evaluator, seed_of
from contracap.generation import BeamSearch, ContrastiveReranking, Sampling
from contracap.pretrained import load

from .programs import stand_in
from .worlds import processor, record


def task(*settings: str, **given) -> TaskConfig:
    return TaskConfig(**{"task": "captioning", "data": "x", **given}, settings=settings)


def test_texts_are_as_long_as_the_task_has_them_whatever_the_strategy() -> None:
    for name, more in (("greedy", ()), ("beam", ()), ("sample", ()), ("legacy", ("year=2023",)), (None, ())):
        caption, answer = (task(*more, strategy=name, task=kind).build_strategy() for kind in ("captioning", "vqa"))
        assert (caption.max_tokens, caption.min_tokens) == (30, 5)
        assert (answer.max_tokens, answer.min_tokens) == (76, 0)
        short = task(*more, "max_tokens=20", "min_tokens=2", strategy=name, task="vqa").build_strategy()
        assert (short.max_tokens, short.min_tokens) == (20, 2)
    assert task("of.width=3", strategy="rerank").build_strategy().of == BeamSearch(width=3)
    assert task("of.max_tokens=20", strategy="rerank").build_strategy() == ContrastiveReranking(
        of=Sampling(samples=8, max_tokens=20)
    )


def test_metrics_are_named_in_any_case_one_or_several() -> None:
    for names, metrics in ((["CIDEr"], ("cider",)), (["Bleu_4,METEOR"], ("bleu", "meteor")), ("ROUGE-L", ("rouge_l",))):
        assert build(TaskConfig, {"task": "captioning", "data": "x", "metrics": names}).metrics == metrics
    for wrong in (["cidr"], [3], 3):
        with pytest.raises(ConfigError, match="metric"):
            build(TaskConfig, {"task": "captioning", "data": "x", "metrics": wrong})


def test_an_answer_is_not_reranked(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [record("0", "red", qa=[{"question": "is it?", "answer": "yes"}])])
    with pytest.raises(ValueError, match="another strategy than rerank"):
        build_evaluator(task(task="vqa", data=str(tmp_path), strategy="rerank"), processor())


def test_the_tokenizer_and_the_memory_of_spice_are_those_that_were_asked_for(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "0.tar", [record("0", "red", captions=["a red wall"])])
    for name in CORENLP_JARS:
        (tmp_path / name).touch()
    stand_in(monkeypatch, tmp_path, "print('jdk.compiler')", jar=tmp_path / CORENLP_JARS[0])
    given = {"tokenizer": "python", "spice_memory": "3g", "corenlp_dir": str(tmp_path), "metrics": ["spice"]}
    values = {"task": "captioning", "data": str(tmp_path / "data"), **given}
    config = build(TaskConfig, values)
    made = list[dict]()
    monkeypatch.setattr("contracap.evaluation.task.CaptionScorer", lambda **options: made.append(options))
    build_evaluator(config, processor())
    build_evaluator(build(TaskConfig, values | {"tokenizer": "java", "spice_memory": "8g"}), processor())
    assert [(options["tokenizer"], options["spice_memory"]) for options in made] == [("python", "3g"), ("java", "8g")]
    with pytest.raises(ConfigError, match="'tokenizer' must be one of 'java', 'python'"):
        build(TaskConfig, values | {"tokenizer": "perl"})


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
    write_shard(tmp_path / "0.tar", [record("red", "red", captions=["a red wall"])])
    model, own = load("tiny", weights="random", seed=0)
    config = task("seed=3", "max_tokens=6", data=str(tmp_path), metrics=("rouge_l",), strategy="sample")
    assert build_evaluator(config, own)(model).seed == 3
    assert measure_tasks({"a": config}, model, own, command="contracap evaluate x").seed == 3
    assert measure_tasks({"a": config}, model, own, command="contracap study x", seed=5).seed == 5


def test_evaluate_in_python_gives_the_figures_of_the_verb(weights: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [record(name, name, captions=[f"a {name} one"]) for name in ("red", "blue")])
    model, own = load(weights)
    result = contracap.evaluate(model, own, task="retrieval", data=tmp_path)
    config = task(task="retrieval", data=str(tmp_path))
    assert result.figures == build_evaluator(config, own)(model).figures
    assert result.details["asked"] == {"task": "retrieval", "data": [str(tmp_path)]}
    with pytest.raises(ConfigError, match="unknown key 'classe'; did you mean 'classes'"):
        contracap.evaluate(model, own, task="zeroshot", data=tmp_path, classe="imagenet1k")
