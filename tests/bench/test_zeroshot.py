from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from contracap.bench import timing, zeroshot
from contracap.bench.caption_pair import Setting
from contracap.bench.timing import NoPeerError, UnequalError, Work
from contracap.bench.zeroshot import Peer, Side, bench_zeroshot, classifier_row, require_equal_rows, sharing_row

SETTING = Setting(device=torch.device("cpu"), rounds=7, seed=0)


@pytest.fixture
def small_peer(small_peers: None, open_clip: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Side("tiny", SETTING, classes=1).processor.texts  # open_clip's own ids are beyond a small vocabulary
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda size: texts)


def test_all_classes_are_compared_and_ten_of_them_timed_for_open_clip(small_peer: None, monkeypatch) -> None:
    built = []

    def counted(self: Peer, names: Sequence[str], build=Peer.build) -> Tensor:
        built.append(len(names))
        return build(self, names)

    def two_and_three_seconds(*works: Work, rounds: int, clock: object) -> list[list[float]]:
        assert [tuple(work().shape) for work in works] == [(20, 32), (10, 32)]
        return [[2.0] * rounds, [3.0] * rounds]

    monkeypatch.setattr(Peer, "build", counted)
    monkeypatch.setattr(timing, "in_turns", two_and_three_seconds)
    row = classifier_row(SETTING, size="tiny", classes=20)
    assert built == [20, 10]
    assert row.work == "tiny, classifier of 20 classes x 80 prompts"
    assert row.note.startswith("weights differ by ") and "open_clip timed on 10 of the classes" in row.note
    assert (row.ours, row.peer, row.ratio) == (1600 / 2, 1600 / 6, 3)


def test_other_weights_are_noticed_before_anything_is_timed(small_peer: None, monkeypatch) -> None:
    def untimed(*works, **kwargs) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(timing, "in_turns", untimed)
    monkeypatch.setattr(Peer, "build", lambda self, names, build=Peer.build: build(self, names) + 2e-5)
    with pytest.raises(UnequalError, match=r"the classifiers are 2\.0e-05 apart, allowed is 1e-05"):
        classifier_row(SETTING, size="tiny", classes=3)


def test_without_open_clip_ours_is_timed_alone(monkeypatch) -> None:
    def absent(name: str) -> None:
        raise NoPeerError(f"{name} is not here")

    monkeypatch.setattr(zeroshot, "peer_module", absent)
    row = classifier_row(SETTING, size="tiny", classes=3)
    assert (row.peer, row.ratio, row.reason) == (None, None, "open_clip is not here") and row.ours > 0


def test_sharing_computes_fewer_rows_to_the_same_end() -> None:
    row = sharing_row(SETTING, size="tiny", classes=3)
    shared, whole, context = (float(part.split(" ")[0]) for part in row.note.split("; ")[1].split(", "))
    assert shared < 0.8 * whole < 0.8 * context and context == 17
    assert row.note.startswith("weights differ by ")


def test_classifiers_that_are_not_numbers_are_not_equal() -> None:
    with pytest.raises(UnequalError, match="nan apart"):
        require_equal_rows(torch.full((2, 3), torch.nan), torch.zeros(2, 3))


def test_a_row_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="no row 'clasifier' in this benchmark; the rows are classifier, sharing"):
        bench_zeroshot(rows=("clasifier",))
