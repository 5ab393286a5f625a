from dataclasses import replace

import pytest
import torch
from torch.nn.functional import pad

from contracap.pretrained import random_model

from .tiny_models import TINY, images, perturbed, texts

READINGS = {
    "correct": TINY,
    "legacy": replace(TINY, text=replace(TINY.text, cls_mask="legacy")),
    "end_token": replace(TINY, text=replace(TINY.text, pool="end_token")),
}


@pytest.mark.parametrize("reading", READINGS)
def test_packed_texts_give_what_each_gives_alone(reading: str) -> None:
    model, lengths = perturbed(READINGS[reading]), (2, 16, 3, 9, 15, 2)
    ids, pixels = texts(*lengths), images(6).double()
    ids[3, 4] = 0  # inside a text, id 0 is a token

    def outcome(rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        output = model(pixels[rows], ids[rows])
        counted = output.caption_states.labels >= 0
        return output.text_features, output.caption_states.states[counted], output.caption_states.labels[counted]

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
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    logits = model(pixels, ids).logits
    for row, length in enumerate(lengths):
        expected = model(pixels[row : row + 1], ids[row : row + 1]).logits[0, : length - 1]
        torch.testing.assert_close(logits[row, : length - 1], expected, rtol=1e-10, atol=1e-12)
    assert logits.shape == (6, 15, 1024)
    assert logits.isfinite().all()


@pytest.mark.parametrize("reading", READINGS)
def test_texts_that_share_their_beginnings_have_the_embeddings_and_gradients_of_each_alone(reading: str) -> None:
    model = perturbed(READINGS[reading])
    context, end = TINY.text.context, TINY.text.end
    ids = torch.randint(1, end - 1, (1, context)).repeat(8, 1)
    for row, length in enumerate((3, 5, 5, 9, context - 1, context, context, 5)):  # two texts twice
        ids[row, length - 1 :] = end
        ids[row, length:] = 0 if row != 7 else 6  # after a text anything may stand
    ids[3, 6], ids[4, 0] = 1, 2
    weights = torch.randn(8, TINY.embed_dim, dtype=torch.float64)
    found = []
    for groups in (ids[None], ids[:, None]):
        model.zero_grad()
        embeddings = torch.cat([model.encode_text(group) for group in groups])
        (embeddings * weights).sum().backward()
        found.append([embeddings, *(part.grad for part in model.text.parameters())])
    for together, alone in zip(*found, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("padding", [0, TINY.text.end])
def test_what_stands_after_the_texts_changes_nothing(reading: str, padding: int) -> None:
    model, _ = random_model(READINGS[reading], seed=0)
    ids, pixels = texts(2, 5, 9), images(3)
    after = torch.arange(ids.shape[1]) >= torch.tensor([[2], [5], [9]])
    padded_ids = pad(ids.masked_fill(after, padding), (0, 7), value=padding)
    with torch.no_grad():
        trimmed, padded = model(pixels, ids[:, :9]), model(pixels, padded_ids)
    assert torch.equal(trimmed.text_features, padded.text_features)
    assert torch.equal(trimmed.logits, padded.logits)


def test_no_padding_is_computed_beyond_a_multiple_of_rows() -> None:
    model, _ = random_model(TINY, seed=0)
    rows = []
    model.text.blocks[0].feed_forward.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    for ids in (texts(16, *[3] * 29), texts(5), texts(4, 6)):
        model.text(ids)
    # 17 + 29 x 4 rows with the class tokens, padded; a few texts are never more than their grid
    assert rows == [192, 6, 14]


def test_what_texts_begin_with_is_computed_once() -> None:
    model, _ = random_model(TINY, seed=0)
    rows = []
    model.text.blocks[0].feed_forward.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    ids = texts(*[12] * 40)
    ids[:, :10] = ids[0, :10]  # what differs is one token, and the end token and the class token after it
    model.encode_text(ids)
    assert rows == [192]  # 10 + 40 x 3, padded; 40 x 13 without
