from functools import partial

import pytest

from contracap.bench import retrieval
from contracap.bench.retrieval import (
    KS,
    ROWS,
    Embeddings,
    bench_retrieval,
    memory_row,
    ranking_of_clip_benchmark,
    recall_memory,
    recalls,
    time_row,
)
from contracap.bench.timing import NoPeerError, UnequalError


@pytest.mark.parametrize("side", ["clip_benchmark", "matrix"])
def test_the_peers_have_the_recalls_that_ours_has(side: retrieval.Side) -> None:
    if side == "clip_benchmark":
        pytest.importorskip("clip_benchmark")
    made = Embeddings.random(150, seed=1)
    found = recalls("ours", made)
    assert recalls(side, made) == pytest.approx(found, abs=1e-6)
    assert len(found) == 6 and 0.1 < found["text_to_image_recall@1"] < 0.95


def test_row_says_how_many_texts_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    row = time_row(images=30, peer="matrix", rounds=7, seed=0)
    assert row.work == "recall of 30 pictures x 150 texts, beside the N x N matrix and topk"
    assert row.unit == "texts/s" and row.ratio is not None and row.quartiles is not None
    assert "image_to_text_recall@10 differ by" in row.note


@pytest.mark.parametrize("row", [time_row, memory_row])
def test_sides_that_differ_have_no_row(monkeypatch: pytest.MonkeyPatch, row) -> None:
    monkeypatch.setattr(retrieval, "_in_fresh_process", recall_memory)
    wrong = {name: 0.9 * value for name, value in recalls("ours", Embeddings.random(30, seed=0)).items()}
    monkeypatch.setitem(retrieval.SIDES, "matrix", lambda made: wrong)
    with pytest.raises(UnequalError, match="recall@1 is"):
        row(images=30, peer="matrix", rounds=7, seed=0)


def test_without_clip_benchmark_ours_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def peer_module(name: str, package: str) -> None:
        raise NoPeerError(f"{name}: pip install {package}")

    monkeypatch.setattr(retrieval, "peer_module", peer_module)
    monkeypatch.setattr(retrieval, "_in_fresh_process", recall_memory)
    for row in (time_row, memory_row):
        found = row(images=30, peer="clip_benchmark", rounds=7, seed=0)
        assert (found.peer, found.ratio) == (None, None) and found.ours >= 0
        assert found.reason == "clip_benchmark.metrics.zeroshot_retrieval: pip install clip_benchmark"


def test_the_matrix_takes_memory_and_ours_does_not() -> None:
    row = memory_row(images=2000, peer="matrix", rounds=7, seed=0)
    assert row.peer is not None and row.peer > 2000 * 10_000 * 4 / 2**20  # MiB
    assert row.ours < row.peer


def test_only_rows_that_there_are_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no row 'huge' in this benchmark; the rows are coco, coco-matrix, large"):
        bench_retrieval(rows=["huge"])
    monkeypatch.setitem(ROWS, "small", partial(time_row, images=10, peer="matrix"))
    told = []
    benchmark = bench_retrieval(rows=["small"], report=told.append)
    assert list(benchmark.rows) == told and told[0].work.startswith("recall of 10 pictures")


def test_the_ranking_that_is_timed_is_the_one_that_the_peer_evaluates_by() -> None:
    made = Embeddings.random(40, seed=0)
    whole = recalls("clip_benchmark", made)
    ranked = ranking_of_clip_benchmark(made, 1.0)()
    assert [(each > 0).float().mean().item() for each in ranked] == [
        whole[f"{direction}_recall@{k}"] for k in KS for direction in ("text_to_image", "image_to_text")
    ]
    assert [len(each) for each in ranking_of_clip_benchmark(made, 0.1)()] == 3 * [20, 4]
    row = time_row(images=40, peer="clip_benchmark", share=0.1, rounds=7, seed=0)
    assert row.peer is not None and row.peer > 0 and "timed on 10% of the queries" in row.note
