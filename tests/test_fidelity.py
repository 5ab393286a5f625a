"""What `weights convert` says of models that open_clip cannot follow."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contracap.cli import main
from contracap.images import ImageConfig
from contracap.model.sizes import SIZES
from contracap.pretrained import random_model, with_cls_mask, write_weights
from contracap.pretrained.fidelity import TEXTS, measure_open_clip_changes
from contracap.pretrained.open_clip_config import list_open_clip_problems

TINY = SIZES["tiny"]


@pytest.mark.parametrize("size", ["coca_ViT-B-32", "coca_ViT-L-14"])
def test_open_clip_can_follow_what_is_trained_at_the_released_sizes(size: str) -> None:
    assert not list_open_clip_problems(SIZES[size])


def test_the_loss_of_fidelity_is_what_both_masks_give(tmp_path: Path, capsys) -> None:
    model, processor = random_model(TINY, seed=0)
    state = {name: 5 * tensor if "attention" in name else tensor for name, tensor in model.state_dict().items()}
    changes = measure_open_clip_changes(TINY, state)
    embeddings = []
    for mask in ("correct", "legacy"):
        model, _ = random_model(with_cls_mask(TINY, mask), seed=0)
        model.load_state_dict(state)
        with torch.no_grad():
            embeddings.append(model.encode_text(processor.texts(list(TEXTS))))
    moved = (embeddings[0] - embeddings[1]).norm(dim=1)
    assert changes["text embeddings"].largest == pytest.approx(moved.max().item(), rel=1e-3)
    assert changes["text embeddings"].mean == pytest.approx(moved.mean().item(), rel=1e-3)
    assert "image embeddings" not in changes

    write_weights(tmp_path / "model.safetensors", model=TINY, image=ImageConfig(size=32), state=state)
    assert main(["weights", "convert", str(tmp_path / "model.safetensors"), str(tmp_path / "out")]) == 0
    error = capsys.readouterr().err
    assert f"{changes['text embeddings'].largest:.4f}" in error


def test_nothing_moves_in_a_model_that_open_clip_can_follow() -> None:
    config = with_cls_mask(TINY, "legacy")
    assert measure_open_clip_changes(config, random_model(config, seed=0)[0].state_dict()) == {}


def test_positions_of_a_pooler_move_the_image_embedding() -> None:
    config = replace(with_cls_mask(TINY, "legacy"), pooler=replace(TINY.pooler, adds_positions=True))
    changes = measure_open_clip_changes(config, random_model(config, seed=0)[0].state_dict())
    assert changes.keys() == {"image embeddings"} and changes["image embeddings"].largest > 0
