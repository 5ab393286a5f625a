from dataclasses import replace

import pytest
import torch

from contracap.model.coca import CoCa, CoCaConfig
from contracap.model.sizes import SIZES, find_size
from contracap.pretrained import random_model

from .tiny_models import POOLERS, TINY, tiny_clip, with_pooler


def texts(*lengths: int) -> torch.Tensor:
    ids = torch.zeros(len(lengths), TINY.text.context, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, 0] = TINY.text.end - 1
        ids[row, 1 : length - 1] = torch.arange(1, length - 1) + 10 * row
        ids[row, length - 1] = TINY.text.end
    return ids


def pictures(count: int) -> torch.Tensor:
    return torch.randn(count, 3, TINY.vision.image_size, TINY.vision.image_size)


@pytest.mark.parametrize(
    ("name", "image", "text", "decoder"),
    [
        ("coca_ViT-B-32", 89_164_032, 63_428_608, 100_967_424),
        ("coca_ViT-L-14", 306_724_864, 123_651_072, 208_074_240),
    ],
)
def test_released_sizes_have_their_published_parameter_counts(name: str, image: int, text: int, decoder: int) -> None:
    with torch.device("meta"):
        model = CoCa(SIZES[name])

    def count(*parts) -> int:
        return sum(parameter.numel() for part in parts for parameter in part.parameters())

    assert (count(model.vision, model.pooler), count(model.text), count(model.decoder)) == (image, text, decoder)


@pytest.mark.parametrize(
    "config",
    [*map(with_pooler, POOLERS), *(with_pooler(kind, positions=True) for kind in POOLERS), tiny_clip()],
    ids=[*POOLERS, *(f"{kind}, positions" for kind in POOLERS), "clip"],
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
    tokens = model.vision(pictures(3))
    contrastive, caption_tokens = model.pooler(tokens)
    torch.testing.assert_close(model.pooler.contrastive(tokens), contrastive)
    torch.testing.assert_close(model.pooler.caption_tokens(tokens), caption_tokens)
    queries = TINY.pooler.queries - (kind == "shared")
    assert caption_tokens.shape == (3, queries, TINY.embed_dim)


@pytest.mark.parametrize("kind", POOLERS)
@pytest.mark.parametrize(("positions", "same"), [(False, True), (True, False)])
def test_only_a_pooler_with_positions_tells_places_apart(kind: str, positions: bool, same: bool) -> None:
    model, _ = random_model(with_pooler(kind, positions=positions), seed=0)
    tokens = model.vision(pictures(1))
    exchanged = tokens.clone()
    exchanged[:, [3, 9]] = tokens[:, [9, 3]]
    before, after = (model.pooler.caption_tokens(each) for each in (tokens, exchanged))
    assert torch.allclose(before, after, atol=1e-5) == same


@pytest.mark.parametrize("kind", POOLERS)
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


def test_positions_and_patch_dropout_exclude_each_other() -> None:
    config = with_pooler("shared", positions=True)
    with pytest.raises(ValueError, match=r"set vision\.patch_dropout to 0, it is 0\.5"):
        replace(config, vision=replace(config.vision, patch_dropout=0.5))


def test_a_pooler_without_caption_tokens_refuses_positions() -> None:
    with pytest.raises(ValueError, match=r"class_token pooler has no caption tokens"):
        with_pooler("class_token", positions=True)


def test_cascade_reads_caption_tokens_and_parallel_does_not() -> None:
    for kind, expected in (("cascade", True), ("parallel", False)):
        model, _ = random_model(with_pooler(kind), seed=0)
        model.encode_image(pictures(2)).sum().backward()
        assert (model.pooler.caption_pool.queries.grad is not None) == expected


READINGS = {
    "correct": TINY,
    "legacy": replace(TINY, text=replace(TINY.text, cls_mask="legacy")),
    "end_token": replace(TINY, text=replace(TINY.text, pool="end_token")),
}


@pytest.mark.parametrize("reading", READINGS)
def test_texts_of_several_lengths_give_what_each_gives_alone(reading: str) -> None:
    model, _ = random_model(READINGS[reading], seed=0)
    model.double().requires_grad_(True)
    ids, pixels = texts(2, 16, 3, 9, 15, 2), pictures(6).double()
    ids[3, 4] = 0  # inside a text, id 0 is a token

    def outcome(rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        features = model.features(pixels[rows], ids[rows], contrastive=True, captioning=True)
        counted = features.caption_labels >= 0
        return features.text_features, features.caption_states[counted], features.caption_labels[counted]

    def gradients(text_features: torch.Tensor, states: torch.Tensor) -> list[torch.Tensor]:
        parameters = [
            parameter for name, parameter in model.named_parameters() if name.startswith(("text", "decoder."))
        ]
        outcome = (text_features * torch.arange(32)).sum() + (states.square() * torch.arange(32)).sum()
        made = torch.autograd.grad(outcome, parameters, allow_unused=True)
        return [torch.zeros(()) if gradient is None else gradient for gradient in made]

    together = outcome(slice(None))
    alone = [torch.cat(parts) for parts in zip(*(outcome(slice(row, row + 1)) for row in range(6)), strict=True)]
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert together[2].tolist() == [token for row in ids.tolist() for token in row[1 : row.index(TINY.text.end) + 1]]
    for ours, expected in zip(gradients(*together[:2]), gradients(*alone[:2]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
    logits = model(pixels, ids).logits
    for row, length in enumerate((2, 16, 3, 9, 15, 2)):
        expected = model(pixels[row : row + 1], ids[row : row + 1]).logits[0, : length - 1]
        torch.testing.assert_close(logits[row, : length - 1], expected, rtol=1e-10, atol=1e-12)
    assert logits.shape == (6, 15, 1024)
    assert logits.isfinite().all()


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("fill", [0, 7, TINY.text.end])
def test_what_stands_behind_the_texts_changes_nothing(reading: str, fill: int) -> None:
    model, _ = random_model(READINGS[reading], seed=0)
    ids, pixels = texts(2, 5, 9), pictures(3)
    behind = torch.arange(ids.shape[1]) >= torch.tensor([[2], [5], [9]])
    filled_ids = torch.nn.functional.pad(ids.masked_fill(behind, fill), (0, 7), value=fill)
    with torch.no_grad():
        trimmed, filled = model(pixels, ids[:, :9]), model(pixels, filled_ids)
    assert torch.equal(trimmed.text_features, filled.text_features)
    assert torch.equal(trimmed.logits, filled.logits)


def test_no_fill_is_computed_beyond_a_multiple_of_rows() -> None:
    model, _ = random_model(TINY, seed=0)
    rows = []
    model.text.blocks[0].feed_forward.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    for ids in (texts(16, *[3] * 29), texts(5), texts(4, 6)):
        model.text(ids, model.text.layout(ids))
    # 17 + 29 x 4 rows with the class tokens, filled up; a few texts are never more than their grid
    assert rows == [192, 6, 14]


def test_what_texts_begin_with_is_computed_once() -> None:
    model, _ = random_model(TINY, seed=0)
    rows = []
    model.text.blocks[0].feed_forward.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    ids = texts(*[12] * 40)
    ids[:, :10] = ids[0, :10]  # what differs is one token, and the end token and the class token behind it
    model.encode_text(ids)
    assert rows == [192]  # 10 + 40 x 3, filled up; 40 x 13 without


def test_correct_mask_reads_lengths_and_not_the_fill_id() -> None:
    model, _ = random_model(TINY, seed=0)
    plain, filled = texts(6), texts(6)
    filled[0, 6:] = 77  # behind the end token anything may stand
    torch.testing.assert_close(model.encode_text(filled), model.encode_text(plain))
    inner = texts(6)
    inner[0, 2] = 0  # inside a text, id 0 is a token like any other
    layout = model.text.layout(inner)
    assert layout.columns == 7
    assert model.text.mask(layout.fit(inner, fill=0), layout) is None


def test_legacy_class_token_sees_the_first_fill_token_and_itself_only_in_a_full_text() -> None:
    model, _ = random_model(READINGS["legacy"], seed=0)
    ids = texts(6, 15, 16)
    layout = model.text.layout(ids)
    short, nearly, full = model.text.mask(layout.fit(ids, fill=0), layout)[:, 0]
    assert short[7].tolist() == [True] * 7 + [False] * 10
    assert nearly[16].tolist() == [True] * 16 + [False]
    assert full[16].tolist() == [True] * 17
    assert torch.equal(short[:7], torch.ones(7, 17).tril().bool())  # and no token sees the class token


def test_skipped_branches_give_the_same_as_both() -> None:
    model, _ = random_model(TINY, seed=0)
    pixels, ids = pictures(3), texts(4, 7, 5)
    both = model.features(pixels, ids, contrastive=True, captioning=True)
    contrastive = model.features(pixels, ids, contrastive=True, captioning=False)
    captioning = model.features(pixels, ids, contrastive=False, captioning=True)
    counted = both.caption_labels >= 0
    torch.testing.assert_close(contrastive.image_features, both.image_features)
    torch.testing.assert_close(contrastive.text_features, both.text_features)
    torch.testing.assert_close(captioning.caption_states[counted], both.caption_states[counted])
    assert torch.equal(captioning.caption_labels, both.caption_labels)
    assert contrastive.caption_states is None
    assert captioning.image_features is None


def test_a_later_word_changes_no_earlier_logit_and_the_picture_changes_all() -> None:
    model, _ = random_model(TINY, seed=0)
    pixels, ids = pictures(1), texts(8)
    changed = ids.clone()
    changed[0, 5] = 500
    before, after = model(pixels, ids).logits[0], model(pixels, changed).logits[0]
    torch.testing.assert_close(before[:5], after[:5])
    assert not torch.allclose(before[5], after[5])
    other = model(pictures(1), ids).logits[0]
    assert all(not torch.allclose(before[row], other[row]) for row in range(7))


def test_patch_dropout_is_for_training_only() -> None:
    model, _ = random_model(replace(TINY, vision=replace(TINY.vision, patch_dropout=0.5)), seed=0)
    pixels = pictures(2)
    assert model.vision(pixels).shape[1] == 17
    torch.testing.assert_close(model.encode_image(pixels), model.encode_image(pixels))
    model.train()
    assert model.vision(pixels).shape[1] == 9
    assert not torch.allclose(model.encode_image(pixels), model.encode_image(pixels))


def test_cached_decoding_equals_full_forward_also_where_texts_go_on_from_others_and_pictures_leave() -> None:
    model, _ = random_model(TINY, seed=0)
    model.double()
    _, caption_tokens = model.encode_caption_tokens(pictures(3).double())
    cache = model.start_decoding(model.decoder.project(caption_tokens), prompt=3, texts=4, max_tokens=10)
    texts_so_far = torch.randint(1, 1000, (3, 1, 3))  # a prompt of three tokens, another for each picture
    logits = model.decode(texts_so_far[:, 0], cache)
    for length, rows in enumerate(
        [(0, 0, 0), (2, 0, 0), (1, 2, 1, 0), (3, 3, 1, 2), (0, 1, 2, 3), (2, 1), (0, 0, 1)], 3
    ):
        for text in range(texts_so_far.shape[1]):
            states = model.text.token_states(texts_so_far[:, text])
            full = model.decoder(states, model.decoder.project(caption_tokens))
            expected = model.decoder.vocabulary(full)[:, -1]
            torch.testing.assert_close(logits[:, text].double(), expected, rtol=1e-5, atol=1e-6)
        assert cache.length == length
        chosen = torch.tensor([rows, rows[::-1], rows])[: len(caption_tokens)]
        if length == 6:
            kept = torch.tensor([0, 2])
            cache.keep(kept)
            texts_so_far, caption_tokens, chosen = texts_so_far[kept], caption_tokens[kept], chosen[kept]
        cache.follow(chosen)
        continued = texts_so_far.gather(1, chosen[:, :, None].expand(-1, -1, length))
        newest = torch.randint(1, 1000, (*chosen.shape, 1))
        texts_so_far = torch.cat([continued, newest], dim=2)
        logits = model.decode(newest[:, :, 0], cache)
    with pytest.raises(ValueError, match="larger max_tokens"):
        for _ in range(5):
            model.decode(newest[:, :, 0], cache)


def test_clip_cannot_caption_and_says_so() -> None:
    model, _ = random_model(tiny_clip(), seed=0)
    assert model(pictures(1), texts(4)).logits is None
    with pytest.raises(ValueError, match="no text decoder"):
        model.encode_caption_tokens(pictures(1))


def test_a_text_longer_than_the_context_is_refused() -> None:
    model, _ = random_model(TINY, seed=0)
    with pytest.raises(ValueError, match="17 tokens; this model takes 16"):
        model.encode_text(torch.full((1, 17), 5))


def test_pictures_of_another_size_are_refused() -> None:
    model, _ = random_model(TINY, seed=0)
    with pytest.raises(ValueError, match="this model takes 32 x 32"):
        model.encode_image(torch.randn(1, 3, 40, 40))


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="caption tokens of its own width"):
        replace(TINY, embed_dim=40)
    with pytest.raises(ValueError, match="makes none"):
        with_pooler("class_token")
    with pytest.raises(ValueError, match="not a multiple"):
        replace(TINY.vision, patch_size=7)
    with pytest.raises(ValueError, match="unknown size 'coca'"):
        find_size("coca")
