from types import ModuleType

import pytest

from benchmarks import zeroshot
from benchmarks.harness import Run, UnequalError
from benchmarks.zeroshot import Classifier, classifier_row, sharing_row


@pytest.fixture(autouse=True)
def small(small_open_clip: ModuleType, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setattr(zeroshot, "SIZE", "tiny")
    monkeypatch.setattr(zeroshot, "CLASSES", 3)
    monkeypatch.setattr(zeroshot, "PEER_CLASSES", 2)
    texts = Classifier(run).processor.texts  # open_clip's own ids are beyond a small vocabulary
    monkeypatch.setattr(small_open_clip, "get_tokenizer", lambda size: texts)


@pytest.mark.parametrize("row", [classifier_row, sharing_row])
def test_equal_classifiers_are_timed_and_others_are_not(row, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = row(run)
    assert found.ratio and "weights differ by" in found.note
    monkeypatch.setattr(Classifier, "build", lambda self, build=Classifier.build: build(self) + 2e-5)
    with pytest.raises(UnequalError):
        row(run)
