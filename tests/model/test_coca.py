from dataclasses import replace

import numpy as np
import pytest
import torch

from contracap.model.coca import CoCa, CoCaConfig
from contracap.model.sizes import SIZES, find_size
from contracap.pretrained import random_model

from .tiny_models import POOLERS, POOLERS_WITH_QUERIES, TINY, images, texts, tiny_clip, with_pooler


@pytest.mark.parametrize(
    ("name", "image", "text", "decoder"),
    [("coca_ViT-B-32", 89_164_032, 63_428_608, 100_967_424), ("coca_ViT-L-14", 306_724_864, 123_651_072, 208_074_240)],
)
def test_released_sizes_have_their_published_parameter_counts(name: str, image: int, text: int, decoder: int) -> None:
    with torch.device("meta"):
        model = CoCa(SIZES[name])

    def count(*parts) -> int:
        return sum(parameter.numel() for part in parts for parameter in part.parameters())

    assert (count(model.vision, model.pooler), count(model.text), count(model.decoder)) == (image, text, decoder)


@pytest.mark.parametrize(
    "config",
    [*map(with_pooler, POOLERS), with_pooler("shared", positions=True), tiny_clip()],
    ids=[*POOLERS, "positions", "clip"],
)
def test_initialise_leaves_no_value_unset(config: CoCaConfig) -> None:
    model = CoCa(config)
    tensors = [*model.parameters(), *model.buffers()]
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(float("nan"))
    model.initialise()
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_decoder_starts_with_the_text_towers_statistics() -> None:
    torch.manual_seed(0)
    model = CoCa(SIZES["flickr8k"])
    model.initialise()
    width, layers = model.config.text.width, model.config.decoder.layers
    assert model.decoder.vocabulary.weight.std().item() == pytest.approx(width**-0.5, rel=0.02)
    for block in [*model.decoder.self_blocks, *model.decoder.cross_blocks]:
        assert block.attention.out.weight.std().item() == pytest.approx((width * 2 * layers) ** -0.5, rel=0.02)
        assert block.feed_forward.expand.weight.std().item() == pytest.approx((2 * width) ** -0.5, rel=0.02)


@pytest.mark.parametrize("kind", POOLERS)
def test_each_branch_of_a_pooler_equals_both_together(kind: str) -> None:
    model, _ = random_model(with_pooler(kind), seed=0)
    tokens = model.vision(images(3))
    contrastive, caption_tokens = model.pooler(tokens)
    torch.testing.assert_close(model.pooler.contrastive(tokens), contrastive)
    torch.testing.assert_close(model.pooler.caption_tokens(tokens), caption_tokens)
    count = {"shared": TINY.pooler.queries - 1, "class_token": TINY.vision.patches}.get(kind, TINY.pooler.queries)
    assert caption_tokens.shape == (3, count, TINY.text.width)


@pytest.mark.parametrize("kind", POOLERS_WITH_QUERIES)
@pytest.mark.parametrize(("positions", "same"), [(False, True), (True, False)])
def test_only_a_pooler_with_positions_tells_places_apart(kind: str, positions: bool, same: bool) -> None:
    model, _ = random_model(with_pooler(kind, positions=positions), seed=0)
    tokens = model.vision(images(1))
    exchanged = tokens.clone()
    exchanged[:, [3, 9]] = tokens[:, [9, 3]]
    before, after = (model.pooler.caption_tokens(each) for each in (tokens, exchanged))
    assert torch.allclose(before, after, atol=1e-5) == same


@pytest.mark.parametrize("kind", POOLERS_WITH_QUERIES)
def test_each_query_starts_at_the_place_of_its_number(kind: str) -> None:
    config = SIZES["scenes"]
    model, _ = random_model(replace(config, pooler=replace(config.pooler, kind=kind)), seed=0)
    tokens = torch.randn(1, 10, 192, generator=torch.Generator().manual_seed(0))
    first = 1 if kind == "shared" else 0  # query 0 of a shared pooler makes no caption token
    for place in range(first, 10):
        changed = tokens.clone()
        changed[:, place] = -tokens[:, place]
        before, after = (model.pooler.caption_tokens(each) for each in (tokens, changed))
        assert (after - before).norm(dim=2).argmax() == place - first


def test_cascade_reads_caption_tokens_and_parallel_does_not() -> None:
    for kind, expected in (("cascade", True), ("parallel", False)):
        model, _ = random_model(with_pooler(kind), seed=0)
        model.encode_image(images(2)).sum().backward()
        assert (model.pooler.caption_pool.queries.grad is not None) == expected


def test_one_branch_or_given_lengths_give_the_same() -> None:
    model, _ = random_model(TINY, seed=0)
    pixels, ids = images(3), texts(4, 7, 5)
    both, features, captions = (
        model(pixels, ids),
        model.contrastive_features(pixels, ids),
        model.caption_states(pixels, ids),
    )
    torch.testing.assert_close(features, (both.image_features, both.text_features))
    counted = captions.labels >= 0
    torch.testing.assert_close(captions.states[counted], both.caption_states.states[counted])
    assert torch.equal(captions.labels, both.caption_states.labels)
    given = model(pixels, ids, np.array([4, 7, 5]))  # lengths, otherwise read from the ids
    assert torch.equal(given.text_features, both.text_features) and torch.equal(given.logits, both.logits)


def test_a_later_word_changes_no_earlier_logit_and_the_image_changes_all() -> None:
    model, _ = random_model(TINY, seed=0)
    pixels, ids = images(1), texts(8)
    changed = ids.clone()
    changed[0, 5] = 500
    before, after = model(pixels, ids).logits[0], model(pixels, changed).logits[0]
    torch.testing.assert_close(before[:5], after[:5])
    assert not torch.allclose(before[5], after[5])
    other = model(images(1), ids).logits[0]
    assert all(not torch.allclose(before[row], other[row]) for row in range(7))


def test_patch_dropout_is_for_training_only() -> None:
    model, _ = random_model(replace(TINY, vision=replace(TINY.vision, patch_dropout=0.5)), seed=0)
    pixels = images(2)
    assert model.vision(pixels).shape[1] == 17
    torch.testing.assert_close(model.encode_image(pixels), model.encode_image(pixels))
    model.train()
    assert model.vision(pixels).shape[1] == 9
    assert not torch.allclose(model.encode_image(pixels), model.encode_image(pixels))


def test_cached_decoding_equals_full_forward_also_where_texts_continue_others_and_images_leave() -> None:
    model, _ = random_model(TINY, seed=0)
    model.double()
    _, caption_tokens = model.encode_caption_tokens(images(3).double())
    cache = model.new_cache(model.decoder.project(caption_tokens), prompt=3, num_texts=4, max_tokens=10)
    texts_so_far = torch.randint(1, 1000, (3, 1, 3))  # a prompt of three tokens, another for each image
    logits = model.prefill(texts_so_far[:, 0], cache)
    for length, rows in enumerate(
        [(0, 0, 0), (2, 0, 0), (1, 2, 1, 0), (3, 3, 1, 2), (0, 1, 2, 3), (2, 1), (0, 0, 1)], 3
    ):
        for text in range(texts_so_far.shape[1]):
            ended = torch.nn.functional.pad(texts_so_far[:, text], (0, 1), value=TINY.text.end)
            states = model.text.token_states(ended, np.full(len(ended), length + 1))
            expected = model.decoder.logits(model.decoder(states, caption_tokens))[:, length - 1]
            torch.testing.assert_close(logits[:, text].double(), expected, rtol=1e-5, atol=1e-6)
        assert cache.length == length
        parents = torch.tensor([rows, rows[::-1], rows])[: len(caption_tokens)]
        if length == 6:
            kept = torch.tensor([0, 2])
            cache.select(kept)
            texts_so_far, caption_tokens, parents = texts_so_far[kept], caption_tokens[kept], parents[kept]
        cache.reorder(parents)
        continued = texts_so_far.gather(1, parents[:, :, None].expand(-1, -1, length))
        newest = torch.randint(1, 1000, (*parents.shape, 1))
        texts_so_far = torch.cat([continued, newest], dim=2)
        logits = model.decode(newest[:, :, 0], cache)
    with pytest.raises(ValueError, match="larger max_tokens"):
        for _ in range(5):
            model.decode(newest[:, :, 0], cache)


def test_what_does_not_fit_a_model_is_refused() -> None:
    model, clip = random_model(TINY, seed=0)[0], random_model(tiny_clip(), seed=0)[0]
    assert clip(images(1), texts(4)).logits is None
    with pytest.raises(ValueError, match="no text decoder"):
        clip.encode_caption_tokens(images(1))
    with pytest.raises(ValueError, match="this model takes 32 x 32"):
        model.encode_image(torch.randn(1, 3, 40, 40))
    with pytest.raises(ValueError, match="17 tokens; this model takes 16"):
        model.encode_text(torch.full((1, 17), 5))


def test_impossible_sizes_are_refused() -> None:
    positions = with_pooler("shared", positions=True)
    with pytest.raises(ValueError, match=r"patch_dropout is 0\.5, but .*: set vision\.patch_dropout to 0"):
        replace(positions, vision=replace(positions.vision, patch_dropout=0.5))
    with pytest.raises(ValueError, match=r"class_token pooler has no queries"):
        replace(tiny_clip().pooler, adds_positions=True)
    with pytest.raises(ValueError, match="caption tokens of its own width"):
        replace(TINY, embed_dim=40)
    with pytest.raises(ValueError, match=r"'class_token', vision\.width 48 must equal text\.width 32"):
        replace(TINY, pooler=tiny_clip().pooler)
    with pytest.raises(ValueError, match="not a multiple"):
        replace(TINY.vision, patch_size=7)
    with pytest.raises(ValueError, match=r"unknown size 'coca'.* tiny: .contracap weights list"):
        find_size("coca")
