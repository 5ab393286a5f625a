import pytest
import torch

from contracap.bench import memory
from contracap.bench.memory import captioning_loss_row, chunked, loss_memory, plain
from contracap.bench.timing import UnequalError

CPU = torch.device("cpu")


def test_both_losses_give_the_same_numbers() -> None:
    labels = torch.randint(0, 100, (50,), generator=torch.Generator().manual_seed(0))
    ours, theirs = (loss_memory(loss, labels, 100, 16, CPU, seed=0)[1] for loss in (chunked, plain))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours["captioning_loss"] > 1 and len(ours) == 3


class _InThisProcess:
    """Stands for an executor; memory is what `growth` says."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function, *arguments):
        self.outcome = function(*arguments)
        return self

    def result(self):
        return self.outcome


def row(monkeypatch: pytest.MonkeyPatch):
    growths = iter([5.0, 60.0])
    monkeypatch.setattr(memory, "ProcessPoolExecutor", _InThisProcess)
    monkeypatch.setattr(memory, "peak_growth", lambda work, device: (work(), next(growths))[1])
    return captioning_loss_row("loss", labels=torch.arange(8), vocab_size=8 * 2**14, width=2, device=CPU, seed=0)


def test_the_gradient_of_the_vocabulary_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = row(monkeypatch)
    assert (found.ours, found.peer, found.ratio) == (4.0, 59.0, 59 / 4)  # it takes 1 MiB


def test_unequal_losses_have_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "chunked", lambda states, vocabulary, labels: 1.01 * plain(states, vocabulary, labels))
    with pytest.raises(UnequalError, match=r"captioning_loss is .* 1.0e-02 apart"):
        row(monkeypatch)


@pytest.mark.slow
def test_ours_takes_a_small_part_of_the_memory() -> None:
    labels = torch.arange(8192)
    found = captioning_loss_row("loss", labels=labels, vocab_size=8192, width=64, device=CPU, seed=0)
    assert found.peer > 512  # two times rows x vocabulary, at the least
    assert found.ours < 64  # 512 rows of it are 16 MiB
