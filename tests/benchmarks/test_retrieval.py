import pytest

from benchmarks import retrieval
from benchmarks.harness import Run, UnequalError
from benchmarks.retrieval import KS, MATRIX, PEER, Embeddings, memory_row, ranked, ranking_of_clip_benchmark, time_row


@pytest.fixture(autouse=True)
def clip_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("clip_benchmark")
    monkeypatch.setattr(retrieval, "in_fresh_process", lambda function, *arguments: function(*arguments))


@pytest.mark.parametrize(("row", "peer"), [(time_row, PEER), (memory_row, MATRIX)])
def test_equal_recalls_are_compared_and_others_are_not(row, peer, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = row(run, images=30, peer=peer)
    assert found.peer is not None and "image_to_text_recall@10 differ by" in found.note
    wrong = {name: 0.9 * value for name, value in ranked("ours", Embeddings.random(30, seed=0)).items()}
    monkeypatch.setattr(retrieval, "compute_recall", lambda *_: wrong)
    with pytest.raises(UnequalError, match="recall@1"):
        row(run, images=30, peer=peer)


def test_the_ranking_that_is_timed_is_the_one_that_clip_benchmark_evaluates_by(run: Run) -> None:
    made = Embeddings.random(40, seed=0)
    whole = ranked(PEER, made)
    found = ranking_of_clip_benchmark(made, 1.0)()
    assert [(each > 0).float().mean().item() for each in found] == [
        whole[f"{direction}_recall@{k}"] for k in KS for direction in ("text_to_image", "image_to_text")
    ]
    assert [len(each) for each in ranking_of_clip_benchmark(made, 0.1)()] == 3 * [20, 4]
    assert "10% of the queries" in time_row(run, images=40, peer=PEER, share=0.1).note
