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


def test_captioning_loss_is_the_token_mean_of_what_is_valid() -> None:
    states, vocabulary = torch.randn(2, 3, 4), torch.randn(9, 4)
    labels = torch.tensor([[1, 2, 8], [8, 0, 0]])
    valid = torch.tensor([[True, True, True], [True, False, False]])
    loss = captioning_loss(states, vocabulary, labels=labels, valid=valid, tokens=valid.sum())
    rows = (states @ vocabulary.T).log_softmax(-1)
    by_hand = -(rows[0, 0, 1] + rows[0, 1, 2] + rows[0, 2, 8] + rows[1, 0, 8]) / 4
    torch.testing.assert_close(loss, by_hand)
    states[1, 1:] = float("nan")  # what is not valid is never read
    torch.testing.assert_close(captioning_loss(states, vocabulary, labels=labels, valid=valid, tokens=4), by_hand)


def test_parts_of_a_batch_add_up_to_its_captioning_loss() -> None:
    states, vocabulary, labels = torch.randn(4, 3, 4), torch.randn(9, 4), torch.randint(0, 9, (4, 3))
    valid = torch.tensor([[True, True, True], [True, False, False], [True, True, False], [True, True, True]])
    whole = captioning_loss(states, vocabulary, labels=labels, valid=valid, tokens=9)
    parts = [
        captioning_loss(states[part], vocabulary, labels=labels[part], valid=valid[part], tokens=9)
        for part in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_loss_weights_that_train_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="one must be above 0"):
        LossConfig(contrastive=0.0, captioning=0.0)
    with pytest.raises(ValueError, match="must not be negative"):
        LossConfig(contrastive=-1.0)
