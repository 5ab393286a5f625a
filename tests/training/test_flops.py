from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from contracap.losses import LossConfig, captioning_loss
from contracap.model.coca import CoCaConfig
from contracap.model.sizes import SIZES
from contracap.pretrained import random_model
from contracap.training.flops import BACKWARD, Texts, Tokens, block_flops, forward_flops, tokens_of
from tests.model.tiny_models import POOLERS, TINY, tiny_clip, with_pooler

FULL = Texts(mean=76.0, longest=76)
PARTS = [
    "image encoder",
    "pooler",
    "text encoder",
    "decoder self-attention",
    "decoder queries",
    "decoder keys and values",
    "decoder scores",
    "decoder feed-forward",
    "vocabulary",
]


def as_published(tokens: Tokens) -> Tokens:
    """With the last token in the decoder, too, which training leaves out."""
    return replace(tokens, decoder=76.0, decoder_columns=76.0)


@pytest.mark.parametrize(
    ("size", "parts", "forward", "whole", "training"),
    [
        ("coca_ViT-B-32", [8.82, 0.37, 5.96, 5.88, 0.96, 3.21, 0.48, 3.83, 3.85], 33.34, 100.0, 33.14),
        ("coca_ViT-L-14", [162.03, 1.61, 13.30, 13.12, 2.15, 7.22, 0.71, 8.61, 5.77], 214.52, 643.6, 214.12),
    ],
)
def test_a_padded_sample_of_coca_takes_the_published_operations(
    size: str, parts: list[float], forward: float, whole: float, training: float
) -> None:
    tokens = tokens_of(SIZES[size], LossConfig(), FULL)
    flops = forward_flops(SIZES[size], as_published(tokens))
    assert list(flops) == PARTS
    # 0.01: whether the projection of the picture belongs to the encoder or to the pooler is a matter of taste.
    assert [number / 1e9 for number in flops.values()] == pytest.approx(parts, abs=0.011)
    assert f"{sum(flops.values()) / 1e9:.2f}" == f"{forward:.2f}"
    assert f"{(1 + BACKWARD) * sum(flops.values()) / 1e9:.1f}" == f"{whole:.1f}"
    assert f"{sum(forward_flops(SIZES[size], tokens).values()) / 1e9:.2f}" == f"{training:.2f}"


@pytest.mark.parametrize(("size", "forward"), [("ViT-B-32", 14.78), ("ViT-L-14", 175.33)])
def test_a_padded_sample_of_clip_takes_the_published_operations(size: str, forward: float) -> None:
    tokens = tokens_of(SIZES[size], LossConfig(captioning=0.0), Texts(mean=77.0, longest=77))
    assert f"{sum(forward_flops(SIZES[size], tokens).values()) / 1e9:.2f}" == f"{forward:.2f}"


@pytest.mark.parametrize(
    ("size", "length", "forward"),
    [
        ("coca_ViT-B-32", 12, 15.61),
        ("coca_ViT-B-32", 16, 16.70),
        ("coca_ViT-B-32", 20, 17.79),
        ("coca_ViT-L-14", 12, 177.6),
        ("coca_ViT-L-14", 16, 179.9),
        ("coca_ViT-L-14", 20, 182.2),
    ],
)
def test_short_texts_without_fill_take_what_the_legacy_mask_needs(size: str, length: int, forward: float) -> None:
    config = replace(SIZES[size], text=replace(SIZES[size].text, cls_mask="legacy"))
    texts = Texts(mean=float(length), longest=length)
    tokens = replace(tokens_of(config, LossConfig(), texts), absorbed=False)
    assert sum(forward_flops(config, tokens).values()) / 1e9 == pytest.approx(forward, rel=3e-4)


@pytest.mark.parametrize(
    ("size", "rows", "projected", "absorbed"),
    [
        ("coca_ViT-B-32", 12, 3.28, 0.75),
        ("coca_ViT-B-32", 16, 3.31, 1.00),
        ("coca_ViT-B-32", 20, 3.33, 1.25),
        ("coca_ViT-B-32", 32, 3.41, 2.01),
        ("coca_ViT-B-32", 76, 3.68, 4.77),
        ("coca_ViT-L-14", 12, 7.33, 1.69),
        ("coca_ViT-L-14", 16, 7.37, 2.26),
        ("coca_ViT-L-14", 20, 7.41, 2.82),
        ("coca_ViT-L-14", 32, 7.52, 4.51),
        ("coca_ViT-L-14", 76, 7.93, 10.72),
    ],
)
def test_keys_values_and_scores_take_the_published_operations_projected_and_absorbed(
    size: str, rows: int, projected: float, absorbed: float
) -> None:
    config, texts = SIZES[size], Texts(mean=rows + 1.0, longest=rows + 1)
    fewest = tokens_of(config, LossConfig(), texts)
    for tokens, published in (
        (replace(fewest, absorbed=False), projected),
        (replace(fewest, absorbed=True), absorbed),
        (fewest, min(projected, absorbed)),
    ):
        flops = forward_flops(config, tokens)
        assert (flops["decoder keys and values"] + flops["decoder scores"]) / 1e9 == pytest.approx(published, abs=0.006)


@pytest.mark.parametrize(("size", "rows"), [("coca_ViT-B-32", 56), ("coca_ViT-L-14", 54)])
def test_texts_are_absorbed_up_to_the_published_break_even(size: str, rows: int) -> None:
    config = SIZES[size]
    absorbed = [
        tokens_of(config, LossConfig(), Texts(mean=4.0, longest=longest)).absorbed for longest in (rows + 1, rows + 2)
    ]
    assert absorbed == [True, False]


@pytest.mark.parametrize(("size", "forward"), [("coca_ViT-B-32", 14.34), ("coca_ViT-L-14", 174.65)])
def test_a_sample_of_sixteen_tokens_takes_the_published_operations(size: str, forward: float) -> None:
    config = replace(SIZES[size], text=replace(SIZES[size].text, cls_mask="legacy"))
    tokens = tokens_of(config, LossConfig(), Texts(mean=16.0, longest=16))
    assert sum(forward_flops(config, tokens).values()) / 1e9 == pytest.approx(forward, abs=0.005)


def test_what_is_computed_again_is_all_but_the_ends_of_the_parts() -> None:
    config = SIZES["coca_ViT-L-14"]
    for absorbed in (False, True):
        tokens = replace(tokens_of(config, LossConfig(), FULL), absorbed=absorbed)
        forward, blocks = forward_flops(config, tokens), block_flops(config, tokens)
        left = sum(forward.values()) - sum(blocks.values())
        patches, projection = 2 * 256 * 3 * 14**2 * 1024, 2 * 768**2
        keys = 0 if absorbed else forward["decoder keys and values"]
        assert left == pytest.approx(patches + forward["pooler"] + projection + forward["vocabulary"] + keys)


MODELS = {f"coca {kind}": with_pooler(kind) for kind in POOLERS} | {"clip": tiny_clip()}
LEGACY = replace(TINY, text=replace(TINY.text, cls_mask="legacy"))
DROPPING = replace(TINY, vision=replace(TINY.vision, patch_dropout=0.5))
MANY_QUERIES = replace(TINY, pooler=replace(TINY.pooler, queries=32))  # so many that their memory is projected


@pytest.mark.parametrize("length", [4, 7])  # the first is so short that the caption tokens are not projected
@pytest.mark.parametrize(
    ("config", "loss"),
    [
        *((config, LossConfig()) for config in [*MODELS.values(), LEGACY, DROPPING, MANY_QUERIES] if config.decoder),
        *((config, LossConfig(captioning=0.0)) for config in MODELS.values()),
        *((config, LossConfig(contrastive=0.0)) for config in MODELS.values() if config.decoder),
    ],
    ids=lambda value: f"{value.contrastive:g}:{value.captioning:g}" if isinstance(value, LossConfig) else "model",
)
def test_torch_counts_the_planned_operations(config: CoCaConfig, loss: LossConfig, length: int) -> None:
    rows = 64  # so many that there is no padding
    ids = torch.zeros(rows, config.text.context, dtype=torch.int64)
    ids[:, : length - 1], ids[:, length - 1] = 5, config.text.end
    pixels = torch.zeros(rows, 3, config.vision.image_size, config.vision.image_size)
    model = random_model(config, seed=0)[0].train().requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's fused kernel is not counted
        if not loss.captioning:
            model.contrastive_features(pixels, ids)
        else:
            captions = model(pixels, ids).captions if loss.contrastive else model.captions(pixels, ids)
            matrix = model.require_decoder().vocabulary.weight
            captioning_loss(captions.states, matrix, labels=captions.labels, tokens=1)
    planned = forward_flops(config, tokens_of(config, loss, Texts(mean=float(length), longest=length)))
    assert counter.get_total_flops() == pytest.approx(rows * sum(planned.values()), rel=1e-9)


def test_forward_and_backward_take_three_times_the_forward_pass() -> None:
    ids = torch.zeros(64, 16, dtype=torch.int64)
    ids[:, :6], ids[:, 6] = 5, TINY.text.end
    model = random_model(TINY, seed=0)[0].train()
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        output = model(torch.zeros(64, 3, 32, 32), ids)
        matrix = model.require_decoder().vocabulary.weight
        loss = captioning_loss(output.captions.states, matrix, labels=output.captions.labels, tokens=1)
        (loss + output.image_features.sum() + output.text_features.sum()).backward()
    planned = forward_flops(TINY, tokens_of(TINY, LossConfig(), Texts(mean=7.0, longest=7)))
    to_pixels = 2 * 16 * 3 * 8**2 * 48  # nobody asks for a gradient of the pictures
    in_place = planned["vocabulary"]  # torch does not count what is added to the matrix's gradient in place
    assert counter.get_total_flops() == pytest.approx(64 * (3 * sum(planned.values()) - to_pixels - in_place), rel=1e-3)
