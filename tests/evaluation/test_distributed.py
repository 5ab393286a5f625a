import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

from contracap.config import build
from contracap.data.shards import write_shard
from contracap.evaluation import retrieval
from contracap.evaluation.config import EvaluationConfig
from contracap.evaluation.distributed import run_on_every_rank
from contracap.evaluation.metrics import ranking
from contracap.evaluation.metrics.ranking import find_positions
from contracap.evaluation.result import Result
from contracap.evaluation.retrieval import Features, evaluate_retrieval
from contracap.evaluation.suite import build_suite
from contracap.image_files import ImageError
from contracap.parallel.process_group import ProcessGroup

from .test_retrieval import embeddings
from .worlds import COLOURS, ColourModel, processor, record, sample


@dataclass(frozen=True)
class Meeting:
    """Where threads that stand for ranks exchange values; one that does not come breaks it."""

    barrier: Barrier
    values: dict[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Thread(ProcessGroup):
    meeting: Meeting

    def all_gather(self, value: Any) -> list[Any]:
        self.meeting.values[self.rank] = pickle.dumps(value)
        self.meeting.barrier.wait()
        values = [pickle.loads(self.meeting.values[rank]) for rank in range(self.world_size)]
        self.meeting.barrier.wait()
        return values


def in_threads(count: int, work: Callable[[Thread], Any]) -> list[Any]:
    """What `work` gives in each thread, or the error that ended it."""
    meeting = Meeting(Barrier(count, timeout=20))

    def outcome(rank: int) -> Any:
        try:
            return work(Thread(rank=rank, world_size=count, meeting=meeting))
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(outcome, range(count)))


@pytest.mark.parametrize("count", [2, 5])
def test_places_counted_in_shares_are_those_of_one_process(monkeypatch, count: int) -> None:
    monkeypatch.setattr(ranking, "SIDE", 64)
    images, texts, owner = embeddings(50, (3, 6), seed=0)
    expected = [places.tolist() for places in find_positions(images, texts, owner)]
    for found in in_threads(count, lambda thread: find_positions(images, texts, owner, thread)):
        assert [places.tolist() for places in found] == expected


class CountingModel(ColourModel):
    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[int] = []
        self.texts = 0

    def encode_image(self, pixels):
        self.pictures.append(len(pixels))
        return super().encode_image(pixels)

    def encode_text(self, ids):
        self.texts += 1
        return super().encode_text(ids)


@pytest.mark.parametrize("count", [2, 3])
def test_recall_in_shares_is_that_of_one_process_to_the_bit(count: int) -> None:
    samples = [sample(f"{a}-{b}", a, f"a {b} wall", f"{a} and {b}") for a, b in combinations(COLOURS, 2)]

    def evaluate(**shares: Any) -> tuple[Result, CountingModel]:
        model = CountingModel()
        return evaluate_retrieval(model, processor(), samples, batch_size=4, **shares), model

    alone, _ = evaluate()
    rounds, text_rounds = -(-4 // count), -(-8 // count)  # 15 images are 4 batches, 30 texts are 8
    for found, model in in_threads(count, lambda thread: evaluate(process_group=thread)):
        assert found == alone
        assert torch.equal(found.predictions.images, alone.predictions.images)
        assert torch.equal(found.predictions.texts, alone.predictions.texts)
        assert (len(model.pictures), model.texts) == (rounds, text_rounds)  # the same number in every process


def test_a_picture_that_one_process_cannot_read_ends_all() -> None:
    samples = [sample(str(i), colour, f"a {colour} wall") for i, colour in enumerate([*COLOURS] * 2)]
    object.__setattr__(samples[5], "image", b"no picture")  # of the second batch of four

    def work(thread: Thread) -> None:
        evaluate_retrieval(ColourModel(), processor(), samples, batch_size=4, process_group=thread)

    first, second = in_threads(2, work)
    assert isinstance(first, ValueError) and str(first).startswith("rank 1: sample 5 of shard.tar: ")
    assert isinstance(second, ImageError) and str(second).startswith("sample 5 of shard.tar: ")


def test_an_accelerator_of_one_process_that_is_full_ends_all_at_once(monkeypatch) -> None:
    samples = [sample(str(i), colour, f"a {colour} wall") for i, colour in enumerate(COLOURS)]
    here = threading.local()
    embed = retrieval.embed_pairs

    class Images(torch.Tensor):
        def to(self, *_: Any) -> torch.Tensor:
            if here.rank == 1:
                raise RuntimeError("out of memory")
            return self.as_subclass(torch.Tensor)

    def embedded(*arguments: Any, **keywords: Any) -> Features:
        found = embed(*arguments, **keywords)
        return replace(found, images=found.images.as_subclass(Images))

    monkeypatch.setattr(retrieval, "embed_pairs", embedded)

    def work(thread: Thread) -> tuple[str, list[int]]:
        here.rank = thread.rank
        evaluate = partial(evaluate_retrieval, ColourModel(), processor(), samples, process_group=thread)
        with pytest.raises((RuntimeError, ValueError)) as error:
            run_on_every_rank(thread, evaluate)  # as a suite does
        return f"{error.type.__name__}: {error.value}", thread.all_gather(thread.rank)  # which is again in step

    said = [f"{name}: out of memory" for name in ("ValueError: rank 1", "RuntimeError", "ValueError: rank 1")]
    assert in_threads(3, work) == [(each, [0, 1, 2]) for each in said]


def test_a_task_that_fails_in_one_process_fails_in_all_and_leaves_the_next_one_alone(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [record("0", "red", captions=["red"], label=0)])
    (tmp_path / "classes.json").write_text('["red", "green"]')
    classes = {"task": "zeroshot", "data": str(tmp_path), "classes": str(tmp_path / "classes.json")}
    tasks = {"classes": classes, "pairs": {"task": "retrieval", "data": str(tmp_path)}}

    class Torn(ColourModel):
        """Stands for trouble that one rank has alone."""

        def encode_text(self, ids):
            raise OSError("disk gone")

    def work(thread: Thread) -> Result:
        suite = build_suite(build(EvaluationConfig, {"tasks": tasks}), processor(), thread)
        return suite((Torn() if thread.rank == 0 else ColourModel()).eval())

    first, second = in_threads(2, work)
    assert first.reasons == {"classes": "disk gone", "pairs": "disk gone"}
    assert second.reasons == {"classes": "rank 0: disk gone", "pairs": "rank 0: disk gone"}
