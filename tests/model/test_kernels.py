"""Each way of computing gives the same numbers."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from contracap.losses import captioning_loss, contrastive_loss
from contracap.model.attention import CrossAttention, attend
from contracap.model.cache import Unprojected
from contracap.model.coca import CoCa, KernelConfig
from contracap.model.sizes import SIZES

PLAIN = KernelConfig(text="padded", cross_attention="projected")


def batch(model: CoCa) -> tuple[Tensor, Tensor]:
    """Texts of 2 tokens to the whole context, with fill behind them."""
    context, end = model.config.text.context, model.config.text.end
    ids = torch.randint(1, end - 1, (5, context))
    for row, length in enumerate((2, 3, 9, context - 1, context)):
        ids[row, length - 1] = end
        ids[row, length:] = 0
    return torch.randn(5, 3, 32, 32, dtype=torch.float64), ids


def losses_and_gradients(model: CoCa, kernels: KernelConfig, pixels: Tensor, ids: Tensor) -> dict[str, Tensor]:
    model.use(kernels)
    model.zero_grad()
    made = model.features(pixels, ids, contrastive=True, captioning=True)
    captioning = captioning_loss(
        made.caption_states, model.require_decoder().vocabulary.weight, labels=made.caption_labels, tokens=10
    )
    contrastive = contrastive_loss(made.image_features, made.text_features, logit_scale=model.logit_scale.exp())
    (captioning + contrastive).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in gradients.items():
        if name.endswith("key_value.bias"):
            gradient[: len(gradient) // 2] = 0  # of a key's bias: 0 but for rounding
    return {"captioning": captioning.detach(), "contrastive": contrastive.detach(), **gradients}


@pytest.mark.parametrize("pooler", ["shared", "cascade", "parallel"])
@pytest.mark.parametrize("cls_mask", ["legacy", "correct"])
def test_every_kernel_gives_the_losses_and_gradients_of_the_plain_ones(pooler: str, cls_mask: str) -> None:
    torch.manual_seed(0)
    config = SIZES["tiny"]
    config = replace(config, pooler=replace(config.pooler, kind=pooler), text=replace(config.text, cls_mask=cls_mask))
    model = CoCa(config)
    model.initialise()
    for parameter in model.parameters():  # gains and biases that tell one layer from another
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.double()
    pixels, ids = batch(model)
    expected = losses_and_gradients(model, PLAIN, pixels, ids)
    for text in ("packed", "padded"):
        for cross_attention in ("auto", "projected", "absorbed"):
            found = losses_and_gradients(model, KernelConfig(text=text, cross_attention=cross_attention), pixels, ids)
            for name, value in expected.items():
                torch.testing.assert_close(
                    found[name], value, rtol=1e-10, atol=1e-12, msg=partial(str, f"{name} {text} {cross_attention}")
                )


def test_contrastive_embedding_by_one_absorbed_query_equals_the_whole_poolers() -> None:
    torch.manual_seed(0)
    model = CoCa(SIZES["tiny"]).double()
    model.initialise()
    pixels, _ = batch(model)
    pool = model.pooler.pool.attention
    assert pool.absorbs(queries=1, memory=17) and not pool.absorbs(queries=64, memory=17)
    torch.testing.assert_close(model.encode_image(pixels), model.encode_caption_tokens(pixels)[0])


def test_auto_absorbs_texts_shorter_than_where_the_operations_are_equal() -> None:
    for size, longest in (("coca_ViT-B-32", 56), ("coca_ViT-L-14", 54)):
        config = SIZES[size]
        with torch.device("meta"):
            attention = CrossAttention(config.text.width, config.decoder.heads, memory_width=config.embed_dim)
        assert attention.absorbs(queries=longest, memory=255)
        assert not attention.absorbs(queries=longest + 1, memory=255)


def test_padded_texts_are_computed_to_the_context() -> None:
    torch.manual_seed(0)
    model = CoCa(SIZES["tiny"])
    ids = torch.tensor([[1022, 5, 1023], [1022, 1023, 0]])
    assert len(model.text.layout(ids).cells) < 34 and len(model.caption_layout(ids).cells) < 30
    model.use(PLAIN)
    assert len(model.text.layout(ids).cells) == 2 * 17 and len(model.caption_layout(ids).cells) == 2 * 15


@pytest.mark.parametrize("causal", [True, False])
def test_plain_products_of_bf16_equal_the_fused_kernel(causal: bool) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 7, 16).bfloat16()
    mask = None if causal else torch.rand(2, 1, 7, 7) < 0.7
    if mask is not None:
        mask |= torch.eye(7, dtype=torch.bool)
    fused = attend(query.float(), key.float(), value.float(), causal=causal, mask=mask)
    plain = attend(query.requires_grad_(), key, value, causal=causal, mask=mask)
    torch.testing.assert_close(plain.float(), fused, rtol=0, atol=2e-2)


def test_absorbed_attention_to_a_memory_equals_attention_to_its_keys_and_values() -> None:
    torch.manual_seed(0)
    attention = CrossAttention(16, 2, memory_width=12).double()
    attention.initialise(depth=1)
    norm = torch.nn.LayerNorm(12).double()
    memory, queries = torch.randn(3, 5, 12, dtype=torch.float64), torch.randn(3, 4, 16, dtype=torch.float64)
    tokens = torch.nn.functional.layer_norm(memory, (12,))
    torch.testing.assert_close(
        attention(queries, Unprojected(tokens, norm)), attention(queries, attention.project(norm(memory)))
    )


@pytest.mark.parametrize("reading", ["legacy", "correct", "end_token"])
def test_texts_that_share_their_beginnings_have_the_embeddings_and_gradients_of_each_alone(reading: str) -> None:
    torch.manual_seed(0)
    text = SIZES["tiny"].text
    text = replace(text, pool="end_token") if reading == "end_token" else replace(text, cls_mask=reading)
    model = CoCa(replace(SIZES["tiny"], text=text))
    model.initialise()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.double()
    context, end = text.context, text.end
    ids = torch.randint(1, end - 1, (1, context)).repeat(8, 1)
    for row, length in enumerate((3, 5, 5, 9, context - 1, context, context, 5)):  # two texts twice
        ids[row, length - 1 :] = end
        ids[row, length:] = 0 if row != 7 else 6  # behind a text anything may stand
    ids[3, 6], ids[4, 0] = 1, 2
    weights = torch.randn(8, model.config.embed_dim, dtype=torch.float64)
    found = []
    for texts in (ids[None], ids[:, None]):
        model.zero_grad()
        embeddings = torch.cat([model.encode_text(each) for each in texts])
        (embeddings * weights).sum().backward()
        found.append([embeddings, *(part.grad for part in model.text.parameters())])
    for together, alone in zip(*found, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
