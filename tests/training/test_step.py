import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from contracap.data.batch import Batch
from contracap.images import ImageConfig, normalise
from contracap.losses import LossConfig, contrastive_loss
from contracap.model.coca import CoCa, CoCaConfig
from contracap.model.sizes import SIZES
from contracap.parallel import ParallelModel, gather_rows
from contracap.parallel.sharding import Replica
from contracap.pretrained import random_model
from contracap.tokenizer import text_lengths
from contracap.training import step
from contracap.training.optimizer import OptimizerConfig, build_optimizer
from contracap.training.step import NonFiniteError, StepConfig, TrainingState, compute_losses, count_labels, train_step
from tests.model.tiny_models import POOLERS, tiny_mammut, with_pooler

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
    return TrainingState(
        model=model, optimizer=build_optimizer(model, CONFIG.optimizer), average=average, parallel=ParallelModel(model)
    )


def batch() -> Batch:
    """Eight images with texts of 3 to 10 tokens."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.zeros(8, 16, dtype=torch.int64)
    for row in range(8):
        ids[row, 0], ids[row, 2 + row] = TINY.text.end - 1, TINY.text.end
        ids[row, 1 : 2 + row] = torch.randint(1, 1000, (1 + row,), generator=draw)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), generator=draw, dtype=torch.uint8)
    lengths = text_lengths(ids, TINY.text.end)
    return Batch(pixels=pixels, ids=ids, lengths=lengths, keys=[str(row) for row in range(8)])


def numbers_of_step(state: TrainingState, config: StepConfig) -> dict[str, float]:
    return train_step(state, batch(), config).read()


def parameters(model: CoCa) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("config", [TINY, tiny_mammut(feed_forward_before_cross=False)], ids=["coca", "mammut"])
def test_both_losses_fall_when_a_batch_repeats(config: CoCaConfig) -> None:
    state, numbers = new_state(config), []
    for _ in range(30):
        numbers.append(numbers_of_step(state, CONFIG))
        state.step += 1
    for name in ("contrastive_loss", "captioning_loss", "loss"):
        assert numbers[-1][name] < 0.8 * numbers[0][name], name
    # Labels are the next tokens, not the inputs: at first nothing is known of them.
    assert numbers[0]["captioning_loss"] == pytest.approx(torch.tensor(1024.0).log().item(), rel=0.15)
    assert numbers[0]["loss"] == pytest.approx(numbers[0]["contrastive_loss"] + 2 * numbers[0]["captioning_loss"])


@pytest.mark.parametrize(
    ("contrastive", "captioning", "untouched"),
    [
        (0.0, 1.0, ("text.class_token", "text.projection", "pooler.projection", "logit_scale")),
        (1.0, 0.0, ("decoder",)),
    ],
)
def test_a_loss_of_weight_0_leaves_its_branch_alone(
    contrastive: float, captioning: float, untouched: tuple[str, ...]
) -> None:
    state = new_state()
    before = parameters(state.model)
    config = replace(CONFIG, loss=LossConfig(contrastive=contrastive, captioning=captioning))
    numbers = numbers_of_step(state, config)
    assert ("contrastive_loss" in numbers, "captioning_loss" in numbers) == (contrastive > 0, captioning > 0)
    changed = [name for name, parameter in state.model.named_parameters() if not torch.equal(parameter, before[name])]
    assert not any(name.startswith(untouched) for name in changed)
    assert any(name.startswith("vision.") for name in changed)


@pytest.mark.parametrize("config", [*map(with_pooler, POOLERS), tiny_mammut(), tiny_mammut(pool="mean")])
@pytest.mark.parametrize(("contrastive", "captioning"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_every_parameter_that_a_model_says_to_be_reached_has_a_gradient(
    config: CoCaConfig, contrastive: float, captioning: float
) -> None:
    state = new_state(config)
    model = state.model
    config = replace(CONFIG, loss=LossConfig(contrastive=contrastive, captioning=captioning))
    sum(
        compute_losses(model, batch(), config, num_labels=count_labels(batch()), parallel=ParallelModel(model)).values()
    ).backward()
    unreached = () if contrastive else tuple(model.only_for_contrastive())
    unreached += () if captioning else tuple(model.only_for_captioning())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(unreached), name


@pytest.mark.parametrize(("parts", "contrastive", "captioning"), [(4, 1.0, 2.0), (8, 1.0, 0.0), (2, 0.0, 1.0)])
def test_a_batch_in_parts_has_losses_and_gradients_of_the_batch_in_one(
    parts: int, contrastive: float, captioning: float
) -> None:
    config = replace(
        CONFIG,
        loss=LossConfig(contrastive=contrastive, captioning=captioning),
        optimizer=replace(CONFIG.optimizer, learning_rate=1.0, clip_norm=0.0, weight_decay=0.0),
    )
    states = []
    for accumulation in (1, parts):
        state = new_state()
        state.optimizer = torch.optim.SGD(
            state.model.parameters(), lr=1.0, fused=True
        )  # the weights tell the gradients
        numbers = numbers_of_step(state, replace(config, accumulation=accumulation))
        states.append((numbers, parameters(state.model)))
    (whole, expected), (accumulated, found) = states
    assert accumulated == pytest.approx(whole, rel=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_part_that_is_embedded_again_drops_the_same_patches() -> None:
    dropping = replace(TINY, vision=replace(TINY.vision, patch_dropout=0.5))
    config = replace(CONFIG, loss=LossConfig(contrastive=1.0, captioning=0.0), accumulation=4)
    numbers = numbers_of_step(new_state(dropping), config)
    model = new_state(dropping).model.train()
    torch.manual_seed(0)  # of seed 0 and step 0
    made = [
        model.contrastive_features(normalise(part.pixels, CONFIG.image), part.ids, part.lengths)
        for part in batch().split(4)
    ]
    images, texts = (torch.cat(features) for features in zip(*made, strict=True))
    loss = contrastive_loss(images, texts, logit_scale=model.logit_scale.exp())
    loss.backward()
    norm = torch.nn.utils.get_total_norm([each.grad for each in model.parameters() if each.grad is not None])
    assert numbers["contrastive_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert numbers["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_gradients_are_clipped_to_the_norm() -> None:
    config = replace(CONFIG, optimizer=replace(CONFIG.optimizer, clip_norm=1e-9, weight_decay=0.0))
    state = new_state()
    state.optimizer = build_optimizer(state.model, config.optimizer)
    before = parameters(state.model)
    assert numbers_of_step(state, config)["gradient_norm"] > 0.1  # before clipping
    moved = max((parameter - before[name]).abs().max().item() for name, parameter in state.model.named_parameters())
    assert moved < 1e-5  # a gradient far below epsilon moves next to nothing; unclipped, the rate itself: 1e-3


def test_logit_scale_stays_between_1_and_100() -> None:
    for value, expected in ((10.0, 100.0), (-3.0, 1.0)):
        state = new_state()
        torch.nn.init.constant_(state.model.logit_scale, value)
        assert numbers_of_step(state, CONFIG)["logit_scale"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_loss_that_is_not_finite_changes_nothing(steps_before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    state = new_state(averaged=True)
    for _ in range(steps_before):
        numbers_of_step(state, CONFIG)
    monkeypatch.setattr(step, "contrastive_loss", lambda *args, **how: contrastive_loss(*args, **how) * float("nan"))
    weights, average = parameters(state.model), {name: tensor.clone() for name, tensor in state.average.items()}
    moments = {parameter: copy.deepcopy(kept) for parameter, kept in state.optimizer.state.items()}
    with pytest.raises(NonFiniteError, match="loss nan"):
        numbers_of_step(state, replace(CONFIG, ema_decay=0.9))
    for name, parameter in state.model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert torch.equal(state.average[name], average[name])
        assert parameter.grad is None
        for moment, tensor in state.optimizer.state[parameter].items():
            before = moments[parameter][moment] if steps_before else torch.zeros_like(tensor)
            assert torch.equal(tensor, before), (name, moment)


def test_the_moving_average_follows_the_weights() -> None:
    state = new_state(averaged=True)
    before = parameters(state.model)
    numbers_of_step(state, replace(CONFIG, ema_decay=0.75))
    for name, parameter in state.model.named_parameters():
        torch.testing.assert_close(state.average[name], 0.75 * before[name] + 0.25 * parameter.detach())


def test_bf16_is_near_fp32_and_keeps_embeddings_in_fp32() -> None:
    fp32 = numbers_of_step(new_state(), CONFIG)
    bf16 = numbers_of_step(new_state(), replace(CONFIG, bf16=True))
    assert bf16["loss"] == pytest.approx(fp32["loss"], rel=0.02)
    assert bf16["loss"] != fp32["loss"]


def test_patch_dropout_repeats_with_the_seed_and_the_step() -> None:
    dropping = replace(TINY, vision=replace(TINY.vision, patch_dropout=0.5))
    first, again = (numbers_of_step(new_state(dropping), CONFIG) for _ in range(2))
    other = numbers_of_step(new_state(dropping), replace(CONFIG, seed=1))
    assert first == again
    assert first["loss"] != other["loss"]


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_on_a_gpu_gives_the_losses_of_one_on_the_cpu(bf16: bool) -> None:
    expected = numbers_of_step(new_state(), CONFIG)
    state = new_state()
    state.model.cuda()
    state.optimizer = build_optimizer(state.model, CONFIG.optimizer)
    found = numbers_of_step(state, replace(CONFIG, bf16=bf16))
    for name in ("contrastive_loss", "captioning_loss"):
        assert found[name] == pytest.approx(expected[name], rel=2e-2 if bf16 else 1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_step_by_ddp_on_one_rank_is_the_plain_step(device: str) -> None:
    plain, replicated = new_state(), new_state()
    for state in (plain, replicated):
        state.model.to(device)
        state.optimizer = build_optimizer(state.model, CONFIG.optimizer)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        replicated.parallel = ParallelModel(Replica(replicated.model), gather_rows)
        for _ in range(2):  # the second with the weights of the first
            expected = numbers_of_step(plain, CONFIG)
            assert numbers_of_step(replicated, CONFIG) == pytest.approx(expected, rel=1e-4)
    finally:
        dist.destroy_process_group()
