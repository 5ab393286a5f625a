import math

import pytest
import torch

from contracap.losses import LossConfig, captioning_loss, contrastive_loss


def test_contrastive_loss_of_matching_orthogonal_pairs_is_the_closed_form() -> None:
    features = torch.eye(4)
    loss = contrastive_loss(features, features, logit_scale=torch.tensor(10.0))
    assert loss.item() == pytest.approx(math.log(1 + 3 * math.exp(-10.0)), abs=1e-6)


def test_contrastive_loss_is_symmetric_and_mixed_up_pairs_cost_more() -> None:
    images, texts = (torch.nn.functional.normalize(torch.randn(5, 8), dim=-1) for _ in range(2))
    scale = torch.tensor(14.0)
    torch.testing.assert_close(
        contrastive_loss(images, texts, logit_scale=scale), contrastive_loss(texts, images, logit_scale=scale)
    )
    assert contrastive_loss(images, images, logit_scale=scale) < contrastive_loss(
        images, images.roll(1, 0), logit_scale=scale
    )


def test_captioning_loss_is_the_token_mean_of_what_has_a_label() -> None:
    states, vocabulary = torch.randn(5, 4), torch.randn(9, 4)
    loss = captioning_loss(states, vocabulary, labels=torch.tensor([1, 2, 8, -100, 8]), tokens=4)
    rows = (states @ vocabulary.T).log_softmax(-1)
    torch.testing.assert_close(loss, -(rows[0, 1] + rows[1, 2] + rows[2, 8] + rows[4, 8]) / 4)


def captions(rows: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States, vocabulary and labels in float64, a few rows of fill among them."""
    states, vocabulary = torch.randn(rows, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    labels = torch.randint(0, 9, (rows,))
    labels[3::4] = -100
    return states.requires_grad_(), vocabulary.requires_grad_(), labels


def test_parts_of_a_batch_add_up_to_its_captioning_loss() -> None:
    states, vocabulary, labels = captions()
    parts = [
        captioning_loss(states[part], vocabulary, labels=labels[part], tokens=6) for part in (slice(0, 5), slice(5, 11))
    ]
    torch.testing.assert_close(sum(parts), captioning_loss(states, vocabulary, labels=labels, tokens=6))


def test_loss_weights_that_train_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="one must be above 0"):
        LossConfig(contrastive=0.0, captioning=0.0)
    with pytest.raises(ValueError, match="must not be negative"):
        LossConfig(contrastive=-1.0)
