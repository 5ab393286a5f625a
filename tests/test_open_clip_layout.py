from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from contracap.images import ImageConfig
from contracap.pretrained import random_model, read_weights, save_open_clip, with_cls_mask
from contracap.pretrained.errors import WeightsError
from contracap.pretrained.fit import match_sizes, require_fit
from contracap.pretrained.open_clip_config import config_from_open_clip, config_to_open_clip, list_open_clip_problems
from contracap.pretrained.open_clip_names import from_open_clip, to_open_clip
from contracap.pretrained.positions import interpolate_positions
from contracap.pretrained.shapes import shapes_of
from tests.model.tiny_models import TINY, tiny_clip, with_pooler

EVERY_KIND = {
    "shared": with_pooler("shared"),
    "shared, one width": replace(TINY, vision=replace(TINY.vision, width=TINY.embed_dim)),
    "cascade": with_pooler("cascade"),
    "parallel": with_pooler("parallel"),
    "shared, positions": with_pooler("shared", positions=True),
    "cascade, positions": with_pooler("cascade", positions=True),
    "parallel, positions": with_pooler("parallel", positions=True),
    "clip": tiny_clip(),
}


@pytest.mark.parametrize("config", EVERY_KIND.values(), ids=EVERY_KIND.keys())
def test_weights_and_configuration_come_back_equal_from_open_clips_layout(config) -> None:
    state = random_model(config, seed=0)[0].state_dict()
    back = from_open_clip(to_open_clip(state, config), config)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert config_from_open_clip(config_to_open_clip(config)) == config


@pytest.mark.parametrize("positions", [False, True])
def test_open_clip_cannot_follow_positions_of_a_pooler(positions: bool) -> None:
    problems = list_open_clip_problems(with_pooler("shared", positions=positions))
    assert any("positions" in problem for problem in problems) == positions


def test_open_clip_files_mean_the_legacy_mask_unless_they_say_otherwise() -> None:
    model = config_to_open_clip(TINY)
    assert config_from_open_clip(model).text.cls_mask == "correct"
    del model["text_cfg"]["correct_cls_mask"]
    assert config_from_open_clip(model).text.cls_mask == "legacy"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop("text.cls_emb"), r"1 missing: text\.cls_emb"),
        (lambda tensors: tensors.update(logit_bias=torch.zeros(())), "1 extra: logit_bias"),
        (
            lambda tensors: tensors.update({"visual.proj": torch.zeros(32, 31)}),
            r"1 misshapen: visual\.proj is \[32, 31\], should be \[32, 32\]",
        ),
    ],
)
def test_a_wrong_key_is_named(damage, message: str) -> None:
    tensors = to_open_clip(random_model(TINY, seed=0)[0].state_dict(), TINY)
    damage(tensors)
    with pytest.raises(WeightsError, match=message):
        require_fit(tensors, TINY, ours=False)


def test_a_logit_scale_of_one_number_is_accepted(tmp_path: Path) -> None:
    state = random_model(TINY, seed=0)[0].state_dict()
    theirs = to_open_clip(state, TINY)
    theirs["logit_scale"] = theirs["logit_scale"].reshape(1)
    save_file(theirs, tmp_path / "model.safetensors")
    assert torch.equal(read_weights(tmp_path, size="tiny").state["logit_scale"], state["logit_scale"])


def test_a_size_is_found_by_its_shapes() -> None:
    tensors = to_open_clip(random_model(TINY, seed=0)[0].state_dict(), TINY)
    assert match_sizes(shapes_of(tensors)) == ["tiny"]
    del tensors["text.cls_emb"]
    assert match_sizes(shapes_of(tensors)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model["text_cfg"].update(hf_model_name="roberta-base"), "hf_model_name"),
        (lambda model: model["vision_cfg"].update(timm_model_name="convnext"), "timm_model_name"),
        (lambda model: model["text_cfg"].pop("width"), "width"),
        (lambda model: model["vision_cfg"].update(pool_type="avg"), "pool_type"),
        (lambda model: model["text_cfg"].update(no_causal_mask=True), "no_causal_mask"),
        (lambda model: model["vision_cfg"].update(layers=[3, 4, 6, 3]), "another kind of model"),
    ],
)
def test_a_configuration_of_another_kind_of_model_is_refused(change, message: str) -> None:
    model = config_to_open_clip(TINY)
    change(model)
    with pytest.raises(WeightsError, match=message):
        config_from_open_clip(model)


@pytest.mark.parametrize("name", ["vision.position", "pooler.pool.position", "pooler.caption_pool.position"])
def test_interpolated_positions_keep_the_class_token_and_the_grid(name: str) -> None:
    position, other = torch.randn(1 + 16, 8), torch.randn(17, 8)

    def interpolated(tensor: torch.Tensor, patches: int) -> torch.Tensor:
        fitted = interpolate_positions({name: tensor, "text.position": other}, patches=patches)
        assert fitted["text.position"] is other
        return fitted[name]

    assert torch.equal(interpolated(position, 16), position)
    larger = interpolated(position, 64)
    assert larger.shape == (65, 8)
    assert torch.equal(larger[0], position[0])
    flat = torch.cat([position[:1], torch.ones(16, 8)])
    torch.testing.assert_close(interpolated(flat, 36)[1:], torch.ones(36, 8))


@pytest.mark.parametrize("kind", ["cascade", "parallel"])
def test_two_poolers_as_in_open_clip_3_3_0_are_told_from_those_of_4_2(tmp_path: Path, kind: str) -> None:
    config = with_cls_mask(with_pooler(kind), "legacy")
    state = random_model(config, seed=0)[0].state_dict()
    save_open_clip(tmp_path, model=config, image=ImageConfig(size=32), state=state)
    assert read_weights(tmp_path).model == config
    tensors = to_open_clip(state, config) | {"visual.proj": torch.zeros(32, 32)}
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(WeightsError, match=r"as in open_clip 3\.3\.0, .*only those of open_clip 4\.2"):
        read_weights(tmp_path)
