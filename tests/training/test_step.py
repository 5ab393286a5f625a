from dataclasses import replace

import pytest
import torch

from contracap.data.batch import Batch
from contracap.image import ImageConfig
from contracap.losses import LossConfig
from contracap.model.coca import CoCa
from contracap.model.sizes import SIZES
from contracap.pretrained import random_model
from contracap.training.optimizer import OptimizerConfig, build_optimizer
from contracap.training.step import NonFiniteError, StepConfig, TrainingState, count_labels, losses, train_step

TINY = SIZES["tiny"]
CONFIG = StepConfig(
    loss=LossConfig(),
    optimizer=OptimizerConfig(warmup_steps=0),
    image=ImageConfig(size=32),
    total_steps=100,
    bf16=False,
    accumulation=1,
    ema_decay=0.0,
    seed=0,
)


def new_state(config=TINY, *, averaged: bool = False) -> TrainingState:
    model, _ = random_model(config, seed=0)
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()} if averaged else None
    return TrainingState(model=model, optimizer=build_optimizer(model, CONFIG.optimizer), average=average)


def batch() -> Batch:
    """Eight pictures with texts of 3 to 10 tokens."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.zeros(8, 16, dtype=torch.int64)
    for row in range(8):
        ids[row, 0], ids[row, 2 + row] = TINY.text.end - 1, TINY.text.end
        ids[row, 1 : 2 + row] = torch.randint(1, 1000, (1 + row,), generator=draw)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), generator=draw, dtype=torch.uint8)
    return Batch(pixels=pixels, ids=ids, keys=[str(row) for row in range(8)])


def parameters(model: CoCa) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_both_losses_fall_when_a_batch_repeats() -> None:
    state, numbers = new_state(), []
    for _ in range(30):
        numbers.append(train_step(state, batch(), CONFIG))
        state.step += 1
    for name in ("contrastive_loss", "captioning_loss", "loss"):
        assert numbers[-1][name] < 0.8 * numbers[0][name], name
    # Labels are the next tokens, not the inputs: at first nothing is known of them.
    assert numbers[0]["captioning_loss"] == pytest.approx(torch.tensor(1024.0).log().item(), rel=0.15)
    assert numbers[0]["loss"] == pytest.approx(numbers[0]["contrastive_loss"] + 2 * numbers[0]["captioning_loss"])


@pytest.mark.parametrize(
    ("loss", "untouched"),
    [
        (
            LossConfig(contrastive=0.0, captioning=1.0),
            ["text.class_token", "text.projection", "pooler.projection", "logit_scale"],
        ),
        (LossConfig(contrastive=1.0, captioning=0.0), ["decoder"]),
    ],
)
def test_a_loss_of_weight_0_leaves_its_branch_alone(loss: LossConfig, untouched: list[str]) -> None:
    state = new_state()
    before = parameters(state.model)
    numbers = train_step(state, batch(), replace(CONFIG, loss=loss))
    assert ("contrastive_loss" in numbers) == (loss.contrastive > 0)
    assert ("captioning_loss" in numbers) == (loss.captioning > 0)
    for name, parameter in state.model.named_parameters():
        left_alone = name.startswith(tuple(untouched))
        if left_alone:
            assert torch.equal(parameter, before[name]), name
    changed = [name for name, parameter in state.model.named_parameters() if not torch.equal(parameter, before[name])]
    assert any(name.startswith("vision.") for name in changed)


@pytest.mark.parametrize("kind", ["shared", "cascade", "parallel"])
@pytest.mark.parametrize(("contrastive", "captioning"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_every_parameter_that_a_model_says_to_be_reached_has_a_gradient(
    kind: str, contrastive: float, captioning: float
) -> None:
    state = new_state(replace(TINY, pooler=replace(TINY.pooler, kind=kind)))
    model = state.model
    config = replace(CONFIG, loss=LossConfig(contrastive=contrastive, captioning=captioning))
    tokens = count_labels(batch().ids, TINY.text.end)
    sum(losses(model, batch(), config, tokens=tokens).values()).backward()
    unreached = () if contrastive else tuple(model.only_for_contrastive())
    unreached += () if captioning else tuple(model.only_for_captioning())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(unreached), name


def test_accumulated_captioning_equals_the_whole_batch() -> None:
    loss = LossConfig(contrastive=0.0, captioning=1.0)
    whole, parts = new_state(), new_state()
    numbers = train_step(whole, batch(), replace(CONFIG, loss=loss))
    accumulated = train_step(parts, batch(), replace(CONFIG, loss=loss, accumulation=4))
    assert accumulated["captioning_loss"] == pytest.approx(numbers["captioning_loss"], rel=1e-6)
    assert accumulated["gradient_norm"] == pytest.approx(numbers["gradient_norm"], rel=1e-5)


def test_accumulated_contrast_is_the_mean_over_the_parts() -> None:
    loss = LossConfig(contrastive=1.0, captioning=0.0)
    accumulated = train_step(new_state(), batch(), replace(CONFIG, loss=loss, accumulation=2))
    halves = [train_step(new_state(), half, replace(CONFIG, loss=loss)) for half in batch().split(2)]
    assert accumulated["contrastive_loss"] == pytest.approx(
        sum(half["contrastive_loss"] for half in halves) / 2, rel=1e-5
    )


def test_gradients_are_clipped_to_the_norm() -> None:
    config = replace(CONFIG, optimizer=replace(CONFIG.optimizer, clip_norm=1e-9, weight_decay=0.0))
    state = new_state()
    state.optimizer = build_optimizer(state.model, config.optimizer)
    before = parameters(state.model)
    assert train_step(state, batch(), config)["gradient_norm"] > 0.1  # before clipping
    moved = max((parameter - before[name]).abs().max().item() for name, parameter in state.model.named_parameters())
    assert moved < 1e-5  # a gradient far below epsilon moves next to nothing; unclipped, the rate itself: 1e-3


def test_logit_scale_stays_between_1_and_100() -> None:
    for value, expected in ((10.0, 100.0), (-3.0, 1.0)):
        state = new_state()
        torch.nn.init.constant_(state.model.logit_scale, value)
        assert train_step(state, batch(), CONFIG)["logit_scale"] == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    state = new_state()
    with torch.no_grad():
        state.model.vision.class_token[0] = float("nan")
    before = parameters(state.model)
    with pytest.raises(NonFiniteError, match="loss nan"):
        train_step(state, batch(), CONFIG)
    for name, parameter in state.model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num())
        assert parameter.grad is None
    assert not state.optimizer.state


def test_the_moving_average_follows_the_weights() -> None:
    state = new_state(averaged=True)
    before = parameters(state.model)
    train_step(state, batch(), replace(CONFIG, ema_decay=0.75))
    for name, parameter in state.model.named_parameters():
        torch.testing.assert_close(state.average[name], 0.75 * before[name] + 0.25 * parameter.detach())


def test_bf16_is_near_fp32_and_keeps_embeddings_in_fp32() -> None:
    fp32 = train_step(new_state(), batch(), CONFIG)
    bf16 = train_step(new_state(), batch(), replace(CONFIG, bf16=True))
    assert bf16["loss"] == pytest.approx(fp32["loss"], rel=0.02)
    assert bf16["loss"] != fp32["loss"]


def test_patch_dropout_repeats_with_the_seed_and_the_step() -> None:
    dropping = replace(TINY, vision=replace(TINY.vision, patch_dropout=0.5))
    first, again = (train_step(new_state(dropping), batch(), CONFIG) for _ in range(2))
    other = train_step(new_state(dropping), batch(), replace(CONFIG, seed=1))
    assert first == again
    assert first["loss"] != other["loss"]


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_on_a_gpu_gives_the_losses_of_one_on_the_cpu(bf16: bool) -> None:
    expected = train_step(new_state(), batch(), CONFIG)
    state = new_state()
    state.model.cuda()
    state.optimizer = build_optimizer(state.model, CONFIG.optimizer)
    found = train_step(state, batch(), replace(CONFIG, bf16=bf16))
    for name in ("contrastive_loss", "captioning_loss"):
        assert found[name] == pytest.approx(expected[name], rel=2e-2 if bf16 else 1e-4)
