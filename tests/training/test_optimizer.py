import itertools

import pytest

from contracap.model.sizes import SIZES
from contracap.pretrained import random_model
from contracap.training.optimizer import OptimizerConfig, build_optimizer, learning_rate_at
from contracap.training.parts import freeze


def test_rate_climbs_in_a_line_and_falls_along_a_cosine() -> None:
    config = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4)
    rates = [learning_rate_at(step, config, total_steps=104) for step in range(105)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[54] == pytest.approx(0.55)  # half way down
    assert rates[104] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[4:]))


def test_only_matrices_that_multiply_a_signal_decay() -> None:
    model, _ = random_model(SIZES["tiny"], seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay = {
        names[parameter]: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]
    }
    assert set(decay) == set(names.values())
    for name in (
        "vision.patch_embedding.weight",
        "text.blocks.0.attention.query_key_value.weight",
        "text.projection.weight",
        "pooler.pool.attention.query.weight",
        "decoder.vocabulary.weight",
    ):
        assert decay[name] == 0.3, name
    for name in (
        "logit_scale",
        "vision.class_token",
        "vision.position",
        "vision.norm_in.weight",
        "text.token_embedding.weight",
        "text.class_token",
        "pooler.pool.queries",
        "text.blocks.0.attention.query_key_value.bias",
        "decoder.norm_out.weight",
    ):
        assert decay[name] == 0.0, name


def test_all_matrices_decay_as_in_open_clip_if_asked_for() -> None:
    model, _ = random_model(SIZES["tiny"], seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3, decayed="matrices"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decaying = {names[each] for group in optimizer.param_groups if group["weight_decay"] for each in group["params"]}
    assert {"vision.position", "text.token_embedding.weight", "pooler.pool.queries"} < decaying
    assert not {"logit_scale", "text.class_token", "vision.norm_in.weight"} & decaying


def test_frozen_parts_are_named_by_whole_words() -> None:
    model, _ = random_model(SIZES["tiny"], seed=0)
    freeze(model, ["vision", "text.blocks.0"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"vision", "text"}
    assert all(name.startswith(("vision.", "text.blocks.0.")) for name in frozen)
    with pytest.raises(
        ValueError, match="begins with 'visio'; the parts are decoder, logit_scale, pooler, text, image"
    ):
        freeze(model, ["visio"])
    freeze(model, ["vision", "pooler", "text", "decoder", "logit_scale"])
    with pytest.raises(ValueError, match="nothing is left to train"):
        build_optimizer(model, OptimizerConfig())


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="min_learning_rate"):
        OptimizerConfig(learning_rate=1e-3, min_learning_rate=1e-2)
    with pytest.raises(ValueError, match=r"clip_norm is -1\.0; it must be at least 0"):
        OptimizerConfig(clip_norm=-1.0)
