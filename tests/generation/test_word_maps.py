"""Attention maps, against an attention written out."""

import pytest
import torch
from torch import Tensor

from contracap.generation.word_maps import attention_map, word_maps
from contracap.model.attention import CrossAttention
from contracap.model.coca import CoCa, CoCaConfig
from contracap.pretrained import random_model
from contracap.tokenizer import Tokenizer
from tests.model.tiny_models import POOLERS, POOLERS_WITH_QUERIES, TINY, tiny_clip, with_pooler

CAPTION = (5, 700, 13, 400)


def sharp_model(config: CoCaConfig) -> CoCa:
    """Random weights whose attentions are far from even."""
    model, _ = random_model(config, seed=3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("attention.query.weight", "attention.key_value.weight")):
                weight *= 3.0
    return model


def softmax(scores: Tensor) -> Tensor:
    powers = (scores - scores.max()).exp()
    return powers / powers.sum()


def read_by_one(attention, query: Tensor, memory: Tensor) -> Tensor:
    """What one query row reads of each row of a memory, head by head."""
    width = attention.out.in_features
    dim = width // attention.heads
    key = memory @ attention.key_value.weight[:width].T + attention.key_value.bias[:width]
    query = attention.query.weight @ query + attention.query.bias
    heads = [slice(head * dim, (head + 1) * dim) for head in range(attention.heads)]
    return torch.stack([softmax(key[:, part] @ query[part] / dim**0.5) for part in heads]).mean(dim=0)


@torch.no_grad()
def written_out(model: CoCa, pixels: Tensor, token_ids: tuple[int, ...]) -> Tensor:
    """The maps token by token, from a pass over the decoder's blocks, one after another."""
    tokens = model.vision(pixels)
    kind = model.config.pooler.kind
    pooled = torch.eye(len(tokens[0]))[1:]  # each caption token is a patch
    if kind in POOLERS_WITH_QUERIES:
        pool = model.pooler.pool if kind == "shared" else model.pooler.caption_pool
        image_tokens = tokens[0] if kind == "shared" else model.pooler.norm_in(tokens[0])
        memory = pool.memory_norm(image_tokens) + (0 if pool.position is None else pool.position)
        queries = pool.query_norm(pool.queries)[1 if kind == "shared" else 0 :]
        pooled = torch.stack([read_by_one(pool.attention, query, memory) for query in queries])
    caption_tokens = model.pooler.caption_tokens(tokens)
    end = model.config.text.end
    states = model.text.token_states(torch.tensor([[end - 1, *token_ids[:-1], end]])).states[None, : len(token_ids)]
    maps = torch.zeros(len(token_ids), pooled.shape[1])
    blocks = list(zip(model.decoder.self_blocks, model.decoder.cross_blocks, strict=True))
    for self_block, cross_block in blocks:
        states = self_block(states, causal=True)
        for row, state in enumerate(cross_block.attention_norm(states[0])):
            read = read_by_one(cross_block.attention, state, cross_block.memory_norm(caption_tokens[0]))
            maps[row] += read @ pooled / len(blocks)
        states = cross_block(states, cross_block.project(caption_tokens))
    return maps[:, 1:] / maps[:, 1:].sum(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("kind", "positions", "absorbed"), [*((kind, False, False) for kind in POOLERS), ("shared", True, True)]
)
def test_maps_equal_attention_written_out_and_sum_to_one(kind, positions, absorbed, monkeypatch):
    monkeypatch.setattr(CrossAttention, "is_absorbed_cheaper", lambda *_, **__: absorbed)
    model = sharp_model(with_pooler(kind, positions=positions))
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    maps = attention_map(model, pixels, CAPTION)
    assert maps.shape == (4, 4, 4)
    assert maps.sum(dim=(1, 2)) == pytest.approx(1.0, abs=1e-5)
    assert maps.std() > 0.01, "the maps should be far from even"
    torch.testing.assert_close(maps.flatten(1), written_out(model, pixels, CAPTION), rtol=1e-4, atol=1e-6)


def test_a_caption_as_long_as_the_context_has_maps_and_none_has_none():
    model, _ = random_model(TINY, seed=0)
    pixels = torch.zeros(1, 3, 32, 32)
    assert attention_map(model, pixels, range(1, 16)).shape == (15, 4, 4)  # the start token before them, no end token
    assert attention_map(model, pixels, ()).shape == (0, 4, 4)
    with pytest.raises(ValueError, match="16, start and end included"):
        attention_map(model, pixels, range(1, 17))


def test_a_model_without_a_decoder_is_told_so():
    model, _ = random_model(tiny_clip(), seed=0)
    with pytest.raises(ValueError, match="no text decoder"):
        attention_map(model, torch.zeros(1, 3, 32, 32), CAPTION)


def test_a_word_of_several_tokens_has_the_mean_of_their_maps():
    tokenizer = Tokenizer(context=16, vocab_size=1024)
    token_ids = tokenizer.encode("a photographer, resting")
    assert len(token_ids) > 4, "some words should be of several tokens"
    maps = torch.rand(len(token_ids), 2, 3)
    words = word_maps(tokenizer, token_ids, maps)
    assert [word for word, _ in words] == ["a", "photographer", ",", "resting"]
    pieces = len(tokenizer.encode("photographer"))
    torch.testing.assert_close(words[1][1], maps[1 : 1 + pieces].mean(dim=0))


def test_a_word_that_the_caption_breaks_off_is_a_word():
    tokenizer = Tokenizer(context=16, vocab_size=1024)
    token_ids = tokenizer.encode("photographer")[:-1]
    words = word_maps(tokenizer, token_ids, torch.rand(len(token_ids), 2, 2))
    assert [word for word, _ in words] == [tokenizer.decode(token_ids)]
