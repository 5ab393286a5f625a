import pytest
import torch
from torch import Tensor

from contracap.losses import captioning_loss, contrastive_loss
from contracap.model.attention import CrossAttention, attend
from contracap.model.coca import CoCa

from .tiny_models import POOLERS, TINY, images, perturbed, texts, with_pooler


def losses_and_gradients(model: CoCa, pixels: Tensor, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(pixels, ids)
    states, labels = output.caption_states.states, output.caption_states.labels
    captioning = captioning_loss(states, model.require_decoder().vocabulary.weight, labels=labels, num_labels=10)
    contrastive = contrastive_loss(output.image_features, output.text_features, logit_scale=output.logit_scale)
    (captioning + contrastive).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in gradients.items():
        if name.endswith("key_value.bias"):
            gradient[: len(gradient) // 2] = 0  # the gradient of a key's bias is 0 but for rounding
    return {"captioning": captioning.detach(), "contrastive": contrastive.detach(), **gradients}


@pytest.mark.parametrize("pooler", POOLERS)
def test_absorbed_cross_attention_gives_the_losses_and_gradients_of_projected(
    pooler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = perturbed(with_pooler(pooler))
    pixels, ids, found = images(5).double(), texts(2, 3, 9, 15, 16), {}
    for absorbed in (False, True):
        monkeypatch.setattr(CrossAttention, "is_absorbed_cheaper", lambda *_, absorbed=absorbed, **__: absorbed)
        found[absorbed] = losses_and_gradients(model, pixels, ids)
    for name, value in found[False].items():
        torch.testing.assert_close(
            found[True][name], value, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_contrastive_embedding_by_one_absorbed_query_equals_the_whole_poolers() -> None:
    model = perturbed(TINY)
    pixels, pool = images(5).double(), model.pooler.pool.attention
    assert pool.is_absorbed_cheaper(queries=1, memory=17) and not pool.is_absorbed_cheaper(queries=64, memory=17)
    torch.testing.assert_close(model.encode_image(pixels), model.encode_caption_tokens(pixels)[0])


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
