import math

import pytest
import torch

from contracap.losses import LossConfig, captioning_loss, contrastive_loss


def test_contrastive_loss_of_matching_orthogonal_pairs_is_the_closed_form() -> None:
    features = torch.eye(4)
    loss = contrastive_loss(features, features, logit_scale=torch.tensor(10.0))
    assert loss.item() == pytest.approx(math.log(1 + 3 * math.exp(-10.0)), abs=1e-6)


def captions(rows: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States, vocabulary and labels in float64, a few rows of fill among them."""
    generator = torch.Generator().manual_seed(rows)
    states, vocabulary = (torch.randn(n, 4, dtype=torch.float64, generator=generator) for n in (rows, 9))
    labels = torch.randint(0, 9, (rows,), generator=generator)
    labels[3::4] = -100
    return states.requires_grad_(), vocabulary.requires_grad_(), labels


def plain(states: torch.Tensor, vocabulary: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(states @ vocabulary.T, labels, reduction="sum") / 6


@pytest.mark.parametrize("chunk", [1, 7, 11, 512, None])
@pytest.mark.parametrize("rows", [1, 11])
def test_captioning_loss_in_chunks_is_plain_cross_entropy(chunk: int | None, rows: int) -> None:
    states, vocabulary, labels = captions(rows)
    loss = captioning_loss(states, vocabulary, labels=labels, num_labels=6, chunk=chunk)
    expected = plain(states, vocabulary, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(3 * loss, (states, vocabulary)),
        torch.autograd.grad(3 * expected, (states, vocabulary)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(
            captioning_loss(states, vocabulary, labels=labels, num_labels=6, chunk=chunk),
            expected,
            rtol=1e-12,
            atol=1e-12,
        )


def test_a_frozen_side_of_the_captioning_loss_gets_no_gradient_and_changes_none() -> None:
    states, vocabulary, labels = captions()
    expected = torch.autograd.grad(plain(states, vocabulary, labels), (states, vocabulary))
    frozen = captioning_loss(states, vocabulary.detach(), labels=labels, num_labels=6)
    torch.testing.assert_close(torch.autograd.grad(frozen, states)[0], expected[0])
    frozen = captioning_loss(states.detach(), vocabulary, labels=labels, num_labels=6)
    torch.testing.assert_close(torch.autograd.grad(frozen, vocabulary)[0], expected[1])
    assert not captioning_loss(states.detach(), vocabulary.detach(), labels=labels, num_labels=6).requires_grad


def test_rows_without_a_label_are_not_read() -> None:
    states, vocabulary, labels = captions()
    filled = states.detach().clone()
    filled[labels < 0] = float("nan")
    filled.requires_grad_()
    loss = captioning_loss(filled, vocabulary, labels=labels, num_labels=6)
    torch.testing.assert_close(loss, plain(states, vocabulary, labels))
    assert torch.equal(torch.autograd.grad(loss, filled)[0][labels < 0], torch.zeros(2, 4, dtype=torch.float64))
    nothing = captioning_loss(filled, vocabulary, labels=torch.full_like(labels, -100), num_labels=6)
    nothing.backward()
    assert nothing == 0
    assert not vocabulary.grad.any()


def test_captioning_loss_stands_unlikely_tokens() -> None:
    states, vocabulary = torch.tensor([[1.0]]), torch.tensor([[0.0], [900.0]])
    assert captioning_loss(states, vocabulary, labels=torch.tensor([0]), num_labels=1).item() == 900.0


def test_captioning_loss_under_autocast_multiplies_in_bf16_and_sums_in_fp32() -> None:
    states, vocabulary, labels = (tensor.detach() for tensor in captions())
    states, vocabulary = states.float().requires_grad_(), vocabulary.float().requires_grad_()
    expected = torch.autograd.grad(plain(states, vocabulary, labels), (states, vocabulary))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = captioning_loss(states, vocabulary, labels=labels, num_labels=6, chunk=4)
        logits = torch.nn.functional.linear(states, vocabulary)
    by_hand = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum") / 6
    assert loss.dtype == torch.float32
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(loss, by_hand)
    for ours, theirs in zip(torch.autograd.grad(loss, (states, vocabulary)), expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="torch has it from 2.13 on")
def test_captioning_loss_equals_torchs_own() -> None:
    states, vocabulary, labels = (tensor.detach() for tensor in captions())
    states, vocabulary = states.float().requires_grad_(), vocabulary.float().requires_grad_()
    ours = captioning_loss(states, vocabulary, labels=labels, num_labels=1, chunk=4)
    theirs = torch.nn.functional.linear_cross_entropy(states, vocabulary, labels, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    for gradient, expected in zip(
        torch.autograd.grad(ours, (states, vocabulary)), torch.autograd.grad(theirs, (states, vocabulary)), strict=True
    ):
        torch.testing.assert_close(gradient, expected)


def test_parts_of_a_batch_add_up_to_its_captioning_loss() -> None:
    states, vocabulary, labels = captions()
    parts = [
        captioning_loss(states[part], vocabulary, labels=labels[part], num_labels=6)
        for part in (slice(0, 5), slice(5, 11))
    ]
    torch.testing.assert_close(sum(parts), captioning_loss(states, vocabulary, labels=labels, num_labels=6))


def test_loss_weights_that_train_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="one must be above 0"):
        LossConfig(contrastive=0.0, captioning=0.0)
    with pytest.raises(ValueError, match="must not be negative"):
        LossConfig(contrastive=-1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
def test_captioning_loss_on_a_gpu_is_plain_cross_entropy(bf16: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    states, vocabulary = (torch.randn(n, 64, generator=generator).cuda().requires_grad_() for n in (5000, 1000))
    labels = torch.randint(0, 1000, (5000,), generator=generator).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=bf16):
        loss = captioning_loss(states, vocabulary, labels=labels, num_labels=5000)
    expected = torch.nn.functional.cross_entropy(states @ vocabulary.T, labels)
    tolerance = 2e-2 if bf16 else 1e-4
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0.0)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (states, vocabulary)),
        torch.autograd.grad(expected, (states, vocabulary)),
        strict=True,
    ):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()
