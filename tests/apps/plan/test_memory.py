import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import contracap.apps.plan.memory
import contracap.model.attention
from contracap.apps.plan.memory import memory_parts
from contracap.apps.plan.parameters import Shares, checkpoint_bytes, count_parameters, planned_model, shares_of
from contracap.config import build
from contracap.data.batch import Batch
from contracap.images import ImageConfig
from contracap.losses import LossConfig
from contracap.model.coca import CoCa, CoCaConfig
from contracap.model.sizes import SIZES
from contracap.parallel import ParallelModel, ProcessGroup
from contracap.pretrained import random_model
from contracap.tokenizer import text_lengths
from contracap.training.checkpoint import CheckpointConfig, last_checkpoint, moving_average
from contracap.training.flops import TextLengths, tokens_of
from contracap.training.optimizer import OptimizerConfig, build_optimizer
from contracap.training.parts import freeze
from contracap.training.recipe import Recipe
from contracap.training.step import StepConfig, TrainingState, compute_losses, train_step
from contracap.training.writer import CheckpointWriter
from tests.model.tiny_models import TINY, tiny_clip, tiny_mammut, with_pooler

LENGTHS = (4, 8, 12, 16)
# So many that their own memory is projected, and what they make is not: the other way round than in TINY.
MANY_QUERIES = replace(TINY, pooler=replace(TINY.pooler, queries=32))
SAVED = ("weights in bf16", "activations", "vocabulary gradient")


def recipe(size: str = "tiny", **changes: object) -> Recipe:
    values = {"size": size, "steps": 200, "out": "runs/x", "data": {"train": "shards", "batch_size": 8}}
    return build(Recipe, values | changes)


def step_config(loss: LossConfig, *, bf16: bool = False) -> StepConfig:
    return StepConfig(
        loss=loss,
        optimizer=OptimizerConfig(),
        image=ImageConfig(size=32),
        total_steps=1000,
        bf16=bf16,
        accumulation=1,
        ema_decay=0.0,
        seed=0,
    )


def alone(model: CoCa) -> Shares:
    return shares_of(model, "ddp", gpus=1, per_machine=8)


def saved_for_backward(model: CoCa, loss: LossConfig, batch: Batch, *, bf16: bool) -> int:
    """Bytes of the tensors that torch keeps, each once, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        graph = compute_losses(model, batch, step_config(loss, bf16=bf16), num_labels=1, parallel=ParallelModel(model))
    assert graph
    return sum(storage.nbytes() for storage in kept.values())


def batch_of(rows: int) -> Batch:
    ids = torch.zeros(rows, 16, dtype=torch.int64)
    for row in range(rows):
        length = LENGTHS[row % len(LENGTHS)]
        ids[row, : length - 1], ids[row, length - 1] = 5, TINY.text.end
    lengths = text_lengths(ids, TINY.text.end)
    pixels = torch.zeros(rows, 3, 32, 32, dtype=torch.uint8)
    return Batch(pixels=pixels, ids=ids, lengths=lengths, keys=["key"] * rows)


def fused(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, **how: Any) -> Tensor:
    return scaled_dot_product_attention(
        query, key, value, attn_mask=how.get("mask"), is_causal=causal, scale=how.get("scale")
    )


@pytest.mark.parametrize(
    ("config", "loss", "bf16"),
    [
        (TINY, LossConfig(), True),
        (replace(TINY, text=replace(TINY.text, cls_mask="legacy")), LossConfig(), False),
        (replace(TINY, vision=replace(TINY.vision, patch_dropout=0.5)), LossConfig(), False),
        (with_pooler("cascade"), LossConfig(), False),
        (with_pooler("parallel"), LossConfig(), False),
        (with_pooler("class_token"), LossConfig(), True),
        (MANY_QUERIES, LossConfig(), True),
        (TINY, LossConfig(contrastive=0.0), False),
        (tiny_clip(), LossConfig(captioning=0.0), True),
        (tiny_mammut(), LossConfig(), False),
        (tiny_mammut(feed_forward_before_cross=False), LossConfig(contrastive=0.0), True),
    ],
    ids=[
        "bf16",
        "legacy",
        "patch dropout",
        "cascade",
        "parallel",
        "patches",
        "many queries, bf16",
        "captioning",
        "clip",
        "mammut",
        "small mammut, captioning, bf16",
    ],
)
def test_the_planned_activations_are_what_torch_saves(
    config: CoCaConfig, loss: LossConfig, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A GPU's kernel keeps no scores; on the CPU, bf16 would take one that does.
    monkeypatch.setattr(contracap.model.attention, "attend", fused)
    tokens = tokens_of(config, loss, TextLengths(mean=10.0, longest=16))
    model = random_model(config, seed=0)[0].train()
    for rows in (64, 128):
        parts = memory_parts(recipe(), model, alone(model), tokens, rows=float(rows), product=2 if bf16 else 4)
        planned = sum(parts.get(name, 0) for name in SAVED)
        planned += 2 * rows**2 * 4 * (loss.contrastive > 0)  # the scores of both directions
        assert planned == pytest.approx(saved_for_backward(model, loss, batch_of(rows), bf16=bf16), rel=0.05), rows


class Live(TorchDispatchMode):
    """Bytes of all tensors that are there at the same time, at most; those that are there before must be given."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, storage: int, size: int) -> None:
        self.known.remove(storage)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return made


@pytest.mark.parametrize("parts", [1, 4])
def test_the_planned_memory_is_the_peak_of_a_real_step(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contracap.apps.plan.memory, "CAPTION_CHUNK", 512)  # the loss's, on the CPU
    model = random_model(TINY, seed=0)[0]
    state = TrainingState(
        model=model, optimizer=build_optimizer(model, OptimizerConfig()), average=None, parallel=ParallelModel(model)
    )
    config = replace(step_config(LossConfig()), accumulation=parts)
    train_step(state, batch_of(4 * parts), config)  # makes the moments
    planned_for = recipe(data={"train": "shards", "batch_size": 8}, accumulation=parts)
    tokens = tokens_of(TINY, LossConfig(), TextLengths(mean=10.0, longest=16))
    for rows in (64, 128):
        batch = batch_of(parts * rows)
        moments = [value for kept in state.optimizer.state.values() for value in kept.values()]
        with Live([*model.parameters(), *moments, batch.pixels]) as live:
            train_step(state, batch, config)
        planned = memory_parts(planned_for, model, alone(model), tokens, rows=float(rows), product=4)
        assert sum(planned.values()) == pytest.approx(live.peak, rel=0.05), rows


def test_what_is_frozen_has_no_gradient_and_no_moments() -> None:
    whole, part = recipe(ema_decay=0.99), recipe(frozen=["vision"])
    tokens = tokens_of(TINY, LossConfig(), TextLengths(mean=10.0, longest=16))
    models = [planned_model(each) for each in (whole, part)]
    shares = [shares_of(model, "ddp", gpus=2, per_machine=8) for model in models]
    before, after = (
        memory_parts(each, model, share, tokens, rows=8.0, product=2)
        for each, model, share in zip((whole, part), models, shares, strict=True)
    )
    vision = count_parameters(models[1])["vision"]
    assert shares[0].trained - shares[1].trained == vision
    assert before["gradients"] - after["gradients"] == 4 * vision
    assert before["AdamW moments"] - after["AdamW moments"] == 8 * vision
    assert before["moving average"] == before["parameters"] == after["parameters"]
    assert "moving average" not in after


@pytest.mark.parametrize(("frozen", "averaged"), [((), True), (("vision",), False)])
def test_a_real_checkpoint_has_the_planned_size(frozen: tuple[str, ...], averaged: bool, tmp_path: Path) -> None:
    model, processor = random_model(SIZES["tiny"], seed=0)
    freeze(model, frozen)
    optimizer = build_optimizer(model, OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    state = TrainingState(
        model=model,
        optimizer=optimizer,
        average=moving_average(model) if averaged else None,
        parallel=ParallelModel(model),
    )
    with CheckpointWriter(
        tmp_path, CheckpointConfig(), image=processor.image_config, process_group=ProcessGroup()
    ) as writer:
        writer.save(state, data={})
    folder = last_checkpoint(tmp_path)
    real = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert checkpoint_bytes(planned_model(recipe(frozen=frozen)), averaged=averaged) == pytest.approx(real, rel=0.05)
