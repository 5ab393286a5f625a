import random
from collections.abc import Iterable

from contracap.training.spikes import WARM_UP, Spike, Spikes

KEYS = ["a", "b"]


def found(losses: Iterable[float], norms: Iterable[float] | None = None) -> list[Spike]:
    spikes, losses = Spikes(), list(losses)
    looked = (
        spikes.find(step, {"loss": loss, "gradient_norm": norm, "logit_scale": 14.0}, KEYS)
        for step, (loss, norm) in enumerate(zip(losses, norms or [1.0] * len(losses), strict=True), start=1)
    )
    return [spike for spike in looked if spike is not None]


def noisy(count: int, level: float = 2.0, width: float = 0.1) -> list[float]:
    noise = random.Random(0)
    return [noise.gauss(level, width) for _ in range(count)]


def test_noise_around_a_falling_loss_is_no_spike() -> None:
    assert not found(level + 8 * 0.99**step for step, level in enumerate(noisy(3000)))


def test_a_step_far_above_the_others_is_found_with_its_keys() -> None:
    (spike,) = found([*noisy(200), 4.0, *noisy(200)])
    assert spike.step == 201 and spike.keys == KEYS
    assert spike.numbers["loss"] == 4.0 and abs(spike.usual["loss"] - 2.0) < 0.1
    assert spike.reason.startswith("loss 4, usually 2.0") or spike.reason.startswith("loss 4, usually 1.9")


def test_a_gradient_alone_can_be_the_spike() -> None:
    (spike,) = found([2.0] * 300, [*noisy(250, 1.0), 30.0, *noisy(49, 1.0)])
    assert spike.step == 251 and spike.reason.startswith("gradient_norm 30, usually ")


def test_nothing_is_unusual_during_the_warm_up() -> None:
    assert not found([*noisy(WARM_UP - 1), 50.0])
    assert len(found([*noisy(WARM_UP), 50.0])) == 1


def test_a_single_spike_hides_no_later_one() -> None:
    assert [spike.step for spike in found([*noisy(200), 1e6, *noisy(30), 5.0, *noisy(30)])] == [201, 232]


def test_a_level_that_stays_becomes_usual() -> None:
    steps = [spike.step for spike in found([*noisy(200), *noisy(200, 6.0)])]
    assert steps[0] == 201 and steps[-1] < 215


def test_a_number_that_never_moved_may_still_move_a_little() -> None:
    assert not found([2.0] * 200 + [2.01])
    assert found([2.0] * 200 + [2.2])
