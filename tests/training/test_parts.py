"""Which parts of a model train, and what that can change."""

import pytest
import torch

from contracap.losses import LossConfig
from contracap.model.coca import CoCa
from contracap.pretrained import random_model
from contracap.training.optimizer import OptimizerConfig, build_optimizer, group_factors
from contracap.training.parts import changes_captions, changes_retrieval, describe_parts, freeze, freeze_unused
from tests.model.tiny_models import TINY, images, texts, tiny_clip, tiny_mammut, with_pooler

BOTH = LossConfig()


def frozen(config, *parts: str, loss: LossConfig = BOTH) -> CoCa:
    model, _ = random_model(config, seed=0)
    freeze(model, parts)
    freeze_unused(model, loss)
    return model


@pytest.mark.parametrize(
    ("parts", "loss", "retrieval", "captions"),
    [
        ((), BOTH, True, True),
        ((), LossConfig(contrastive=0.0), True, True),  # the encoders train
        (("image", "pooler", "text"), LossConfig(contrastive=0.0), False, True),
        (("image", "pooler", "text", "logit_scale"), BOTH, False, True),
        (("image", "pooler", "text", "decoder"), BOTH, False, False),
        (("image", "text"), BOTH, True, True),  # the pooler is not of the image encoder
        (("image", "decoder"), LossConfig(captioning=0.0), True, True),
    ],
)
def test_what_training_can_change_is_what_it_changes(parts, loss: LossConfig, retrieval: bool, captions: bool) -> None:
    model = frozen(TINY, *parts, loss=loss)
    assert (changes_retrieval(model), changes_captions(model)) == (retrieval, captions)
    pixels, ids = images(2), texts(4, 9)
    before = model(pixels, ids)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    after = model(pixels, ids)
    same = [torch.equal(getattr(before, name), getattr(after, name)) for name in ("image_features", "text_features")]
    assert all(same) != retrieval and torch.equal(before.logits, after.logits) != captions


def test_only_the_decoder_of_two_poolers_is_apart_from_retrieval() -> None:
    assert changes_retrieval(frozen(with_pooler("cascade"), "image", "text"))
    parallel = frozen(with_pooler("parallel"), "image", "text", "pooler.contrastive_pool", "pooler.norm_in")
    assert not changes_retrieval(parallel) and changes_captions(parallel)
    assert changes_retrieval(frozen(tiny_mammut(), "image", "pooler"))  # one stack reads and writes


def test_parts_and_abilities_are_told() -> None:
    lines = describe_parts(frozen(TINY, "image", "pooler", "text", loss=LossConfig(contrastive=0.0)), {"decoder": 2.0})
    assert lines == [
        "trains: decoder 0.08 million parameters; learning rates: decoder x 2",
        "frozen: image 0.07, pooler 0.01, text 0.06 million parameters, logit_scale",
        "can change: captions; retrieval cannot change",
    ]
    assert describe_parts(frozen(tiny_clip()), {})[-1] == "can change: retrieval"


def test_learning_rates_differ_by_part() -> None:
    config = OptimizerConfig(learning_rate_factors={"pooler.projection": 5.0, "pooler": 25.0, "image": 0.5})
    model = frozen(TINY)
    optimizer = build_optimizer(model, config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    factors = {
        names[parameter]: factor
        for group, factor in zip(optimizer.param_groups, group_factors(model, optimizer, config), strict=True)
        for parameter in group["params"]
    }
    assert factors.keys() == set(names.values())
    assert factors["pooler.projection.weight"] == 5.0 and factors["pooler.pool.queries"] == 25.0
    assert (
        factors["vision.class_token"] == 0.5 and factors["decoder.vocabulary.weight"] == factors["logit_scale"] == 1.0
    )
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {0.0, config.weight_decay}


def test_impossible_parts_are_refused() -> None:
    model = frozen(TINY)
    for wrong in ("imag", "vision.block", "pooler.", ""):
        with pytest.raises(ValueError, match="the parts are"):
            freeze(model, [wrong])
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate_factors: no parameter.*'poler'"):
        build_optimizer(model, OptimizerConfig(learning_rate_factors={"poler": 2.0}))
    with pytest.raises(ValueError, match=r"learning_rate_factors\.text is 0\.0"):
        OptimizerConfig(learning_rate_factors={"text": 0.0})
