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


@pytest.mark.parametrize("decayed", ["linear", "matrices"])
def test_only_matrices_that_multiply_a_signal_decay_or_all_as_in_open_clip(decayed: str) -> None:
    model, _ = random_model(SIZES["tiny"], seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3, decayed=decayed))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {group["weight_decay"]: {names[each] for each in group["params"]} for group in optimizer.param_groups}
    assert groups.keys() == {0.3, 0.0} and groups[0.3] | groups[0.0] == set(names.values())
    always = ["vision.patch_embedding", "text.blocks.0.attention.query_key_value", "text.projection"]
    always += ["pooler.pool.attention.query", "decoder.vocabulary"]
    never = ["logit_scale", "vision.norm_in.weight", "text.class_token", "decoder.norm_out.weight"]
    never += ["vision.class_token", "text.blocks.0.attention.query_key_value.bias"]
    assert {f"{name}.weight" for name in always} < groups[0.3] and set(never) < groups[0.0]
    assert {"vision.position", "text.token_embedding.weight", "pooler.pool.queries"} < groups[
        0.3 if decayed == "matrices" else 0.0
    ]


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
