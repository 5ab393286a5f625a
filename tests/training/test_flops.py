from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from contracap.losses import LossConfig, captioning_loss
from contracap.model.coca import CoCaConfig
from contracap.model.sizes import SIZES
from contracap.pretrained import random_model
from contracap.training.flops import TextLengths, count_flops, tokens_of
from tests.model.tiny_models import POOLERS, TINY, tiny_clip, tiny_mammut, with_pooler

FULL = TextLengths(mean=76.0, longest=76)


def gflop(size: str, texts: TextLengths, *, mask: str = "correct", captioning: float = 2.0) -> float:
    config = SIZES[size]
    config = replace(config, text=replace(config.text, cls_mask=mask))
    return sum(count_flops(config, LossConfig(captioning=captioning), texts).parts.values()) / 1e9


def test_a_sample_of_the_whole_context_takes_the_published_operations() -> None:
    counted = count_flops(SIZES["coca_ViT-L-14"], LossConfig(), FULL).parts
    # 0.01: whether the projection of the image belongs to the encoder or to the pooler is a matter of taste.
    for part, published in {"image encoder": 162.03, "pooler": 1.61, "text encoder": 13.30}.items():
        assert counted[part] / 1e9 == pytest.approx(published, abs=0.011)
    assert sum(counted.values()) / 1e9 == pytest.approx(214.12, abs=0.005)


def test_a_sample_of_clip_takes_the_published_operations() -> None:
    assert gflop("ViT-B-32", TextLengths(mean=77.0, longest=77), captioning=0.0) == pytest.approx(14.78, abs=0.005)


def test_a_sample_of_sixteen_tokens_takes_the_published_operations() -> None:
    counted = gflop("coca_ViT-L-14", TextLengths(mean=16.0, longest=16), mask="legacy")
    assert counted == pytest.approx(174.65, abs=0.005)


@pytest.mark.parametrize(("size", "rows"), [("coca_ViT-B-32", 56), ("coca_ViT-L-14", 54)])
def test_texts_are_absorbed_up_to_the_published_break_even(size: str, rows: int) -> None:
    config = SIZES[size]
    absorbed = [
        tokens_of(config, LossConfig(), TextLengths(mean=4.0, longest=longest)).absorbed
        for longest in (rows + 1, rows + 2)
    ]
    assert absorbed == [True, False]


def test_a_mean_length_counts_linear_layers_and_the_longest_text_counts_attention() -> None:
    uniform, mixed = TextLengths(mean=10.0, longest=10), TextLengths(mean=10.0, longest=20)
    between = TextLengths(mean=10.5, longest=20)
    assert gflop("flickr8k", uniform) < gflop("flickr8k", mixed) < gflop("flickr8k", between)


def test_what_is_computed_again_is_all_but_the_ends_of_the_parts() -> None:
    counted = count_flops(SIZES["coca_ViT-L-14"], LossConfig(), TextLengths(mean=16.0, longest=16))
    left = {part: flops - counted.blocks.get(part, 0.0) for part, flops in counted.parts.items()}
    assert left["image encoder"] == pytest.approx(2 * 256 * 3 * 14**2 * 1024)  # patches
    assert left["text encoder"] == pytest.approx(2 * 768**2)  # the projection
    assert left["decoder self-attention"] == pytest.approx(0, abs=1)
    assert left["decoder cross-attention"] == pytest.approx(0, abs=1)  # the caption tokens are not projected


OTHERWISE = replace(TINY, text=replace(TINY.text, cls_mask="legacy"), vision=replace(TINY.vision, patch_dropout=0.5))
MANY_QUERIES = replace(TINY, pooler=replace(TINY.pooler, queries=32))  # so many that their memory is projected


@pytest.mark.parametrize(
    ("config", "loss"),
    [
        *((config, LossConfig()) for config in (*map(with_pooler, POOLERS), tiny_mammut(), OTHERWISE, MANY_QUERIES)),
        *((config, LossConfig(captioning=0.0)) for config in (TINY, tiny_clip(), tiny_mammut())),
        *((config, LossConfig(contrastive=0.0)) for config in (TINY, tiny_mammut())),
    ],
    ids=lambda value: f"{value.contrastive:g}:{value.captioning:g}" if isinstance(value, LossConfig) else "model",
)
def test_the_parts_are_all_that_a_pass_of_real_tensors_takes(config: CoCaConfig, loss: LossConfig) -> None:
    length, rows = 7, 64
    ids = torch.zeros(rows, config.text.context, dtype=torch.int64)
    ids[:, : length - 1], ids[:, length - 1] = 5, config.text.end
    pixels = torch.zeros(rows, 3, config.vision.image_size, config.vision.image_size)
    model = random_model(config, seed=0)[0].train().requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's fused kernel is not counted
        if not loss.captioning:
            model.contrastive_features(pixels, ids)
        else:
            captions = model(pixels, ids).caption_states if loss.contrastive else model.caption_states(pixels, ids)
            matrix = model.require_decoder().vocabulary.weight
            captioning_loss(captions.states, matrix, labels=captions.labels, num_labels=1)
    counted = count_flops(config, loss, TextLengths(mean=float(length), longest=length)).parts
    assert counter.get_total_flops() == pytest.approx(rows * sum(counted.values()), rel=1e-9)


def test_forward_and_backward_take_three_times_the_forward_pass() -> None:
    ids = torch.zeros(64, 16, dtype=torch.int64)
    ids[:, :6], ids[:, 6] = 5, TINY.text.end
    model = random_model(TINY, seed=0)[0].train()
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        output = model(torch.zeros(64, 3, 32, 32), ids)
        matrix = model.require_decoder().vocabulary.weight
        loss = captioning_loss(output.caption_states.states, matrix, labels=output.caption_states.labels, num_labels=1)
        (loss + output.image_features.sum() + output.text_features.sum()).backward()
    planned = count_flops(TINY, LossConfig(), TextLengths(mean=7.0, longest=7)).parts
    to_pixels = 2 * 16 * 3 * 8**2 * 48  # nobody asks for a gradient of the images
    in_place = planned["vocabulary"]  # torch does not count what is added to the matrix's gradient in place
    assert counter.get_total_flops() == pytest.approx(64 * (3 * sum(planned.values()) - to_pixels - in_place), rel=1e-3)
