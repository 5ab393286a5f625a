"""The captioner with the tiny model: cached decoding against full forward passes, batches against single pictures."""

import io
import math

import pytest
import torch
from PIL import Image
from torch import Tensor

import contracap
from contracap.generation import BeamSearch, Captioner, Greedy
from contracap.generation.strategy import Prompts, Strategy
from contracap.image import ImageError
from contracap.model.coca import CoCa
from contracap.processor import Processor
from contracap.tokenizer import Tokenizer

STRATEGIES = [Greedy(14, 3), BeamSearch(4, 14, 3), BeamSearch(3, 14, 2, -1.0)]


@pytest.fixture(scope="module")
def pair() -> tuple[CoCa, Processor]:
    """A tiny model, changed so that it writes different things about different colours, and ends some of them."""
    model, processor = contracap.load("tiny", weights="random", seed=0)
    assert model.decoder is not None
    with torch.no_grad():
        model.decoder.vocabulary.weight *= 2.0
        model.decoder.vocabulary.weight[processor.tokenizer.end] *= 6.0
        for name, weight in model.decoder.cross_blocks.named_parameters():
            if name.endswith("attention.out.weight"):
                weight *= 20.0
    return model, processor


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (40, 50), colour) for colour in ("red", "green", "blue", "white", "black", "gray")]


def next_logits(model: CoCa, pixels: Tensor, held: Tensor, end: int) -> Tensor:
    """Logits after the tokens `held`, without any cache: a full forward pass over them and an end token."""
    ids = torch.cat([held, torch.full((len(held), 1), end)], dim=1)
    return model(pixels, ids).logits[:, held.shape[1] - 1]


@torch.no_grad()
def uncached(model: CoCa, pixels: Tensor, strategy: Strategy, tokenizer: Tokenizer):
    search = strategy.begin(Prompts.empty(len(pixels), tokenizer.start), tokenizer)
    held = torch.empty(len(pixels), 1, 0, dtype=torch.int64)
    while not search.finished.all():
        held = torch.cat([held, search.last[:, :, None]], dim=2)
        repeated = pixels.repeat_interleave(held.shape[1], dim=0)
        logits = next_logits(model, repeated, held.flatten(0, 1), tokenizer.end)
        rows = search.advance(logits.unflatten(0, held.shape[:2]))
        held = held if rows is None else held.gather(1, rows[:, :, None].expand(-1, -1, held.shape[2]))
    return search.hypotheses()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cached_decoding_equals_full_forward_also_after_beams_are_reordered(pair, pictures, strategy, dtype):
    model, processor = pair
    pixels = processor.images(pictures).to(dtype)
    model.to(dtype)
    try:
        captions = Captioner(model, processor).generate(pixels, strategy)
        expected = uncached(model, pixels, strategy, processor.tokenizer)
    finally:
        model.float()
    assert len({caption.token_ids for caption in captions}) > 1, "the model should look at the pictures"
    assert len({len(caption.token_ids) for caption in captions}) > 1, "some captions should end before others"
    for caption, hypotheses in zip(captions, expected, strict=True):
        assert [text.token_ids for text in caption.alternatives] == [text.token_ids for text in hypotheses]
        for text, hypothesis in zip(caption.alternatives, hypotheses, strict=True):
            assert text.log_probability == pytest.approx(hypothesis.log_probability, rel=1e-4)


@torch.no_grad()
def test_greedy_ids_are_the_argmax_of_a_teacher_forced_forward(pair, pictures):
    model, processor = pair
    start, end = processor.tokenizer.start, processor.tokenizer.end
    pixels = processor.images(pictures)
    for index, caption in enumerate(Captioner(model, processor)(pictures, Greedy(14, 5))):
        text = [start, *caption.token_ids, end]
        values = torch.log_softmax(model(pixels[index : index + 1], torch.tensor([text])).logits[0], dim=-1)
        values[:, start] = -math.inf
        values[:4, end] = -math.inf
        steps = min(len(text) - 1, 13)
        assert values[:steps].argmax(dim=-1).tolist() == text[1 : steps + 1]
        total = sum(values[place, text[place + 1]].item() for place in range(steps))
        assert caption.log_probability == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_batch_of_pictures_gives_what_single_pictures_give(pair, pictures, strategy):
    captioner = Captioner(*pair)
    single = captioner(pictures, strategy, batch_size=1)
    for batch_size in (4, 6):
        for one, other in zip(single, captioner(pictures, strategy, batch_size=batch_size), strict=True):
            assert [text.token_ids for text in one.alternatives] == [text.token_ids for text in other.alternatives]
            assert one.score == pytest.approx(other.score, rel=1e-4)


def test_greedy_equals_a_beam_of_one(pair, pictures):
    captioner = Captioner(*pair)
    greedy, beam = captioner(pictures, Greedy(14, 3)), captioner(pictures, BeamSearch(1, 14, 3))
    assert [caption.token_ids for caption in greedy] == [caption.token_ids for caption in beam]


def test_a_caption_is_the_first_of_its_alternatives(pair, pictures):
    model, processor = pair
    for caption in Captioner(model, processor)(pictures, BeamSearch(5, 12, 3)):
        first = caption.alternatives[0]
        assert len(caption.alternatives) == 5 and first.alternatives == ()
        assert (caption.text, caption.token_ids, caption.score, caption.log_probability) == (
            first.text,
            first.token_ids,
            first.score,
            first.log_probability,
        )
        assert caption.score == max(text.score for text in caption.alternatives)
        assert caption.text == processor.tokenizer.decode(caption.token_ids)
        assert not {processor.tokenizer.start, processor.tokenizer.end} & set(caption.token_ids)
        assert 2 <= len(caption.token_ids) <= 11


def test_pictures_may_be_paths_bytes_or_pil_and_none_at_all(pair, pictures, tmp_path):
    captioner = Captioner(*pair)
    path, memory = tmp_path / "one.png", io.BytesIO()
    pictures[0].save(path)
    pictures[0].save(memory, "png")
    texts = [caption.text for caption in captioner([pictures[0], path, str(path), memory.getvalue()], Greedy(8, 3))]
    assert len(set(texts)) == 1
    assert captioner([]) == []


def test_the_default_is_beam_search_and_max_tokens_is_cut_to_the_models_context(pair, pictures):
    model, _ = pair
    captioner = Captioner(*pair)
    within = captioner(pictures[:2], BeamSearch(max_tokens=model.config.text.context))
    assert model.config.text.context < BeamSearch().max_tokens
    assert captioner(pictures[:2]) == captioner(pictures[:2], BeamSearch(max_tokens=500)) == within


def test_training_mode_is_left_as_it_was_and_not_used(pair, pictures):
    model, processor = pair
    captioner, expected = Captioner(model, processor), Captioner(model, processor)(pictures[:1], Greedy(8))
    model.train()
    model.text.eval()
    try:
        assert captioner(pictures[:1], Greedy(8)) == expected
        assert model.training and model.vision.training and not model.text.training
    finally:
        model.eval()


def test_a_model_without_a_decoder_is_refused():
    model, processor = contracap.load("tiny", weights="random", seed=0)
    model.decoder = None
    with pytest.raises(ValueError, match="decoder"):
        Captioner(model, processor)


def test_a_processor_of_another_vocabulary_is_refused(pair):
    model, processor = pair
    with pytest.raises(ValueError, match="vocabulary has 2048 tokens, the model's 1024"):
        Captioner(model, Processor(processor.image_config, Tokenizer(context=16, vocab_size=2048)))


def test_wrong_arguments_are_refused_in_one_clear_line(pair, pictures):
    captioner = Captioner(*pair)
    with pytest.raises(ValueError, match="batch_size must be"):
        captioner(pictures, batch_size=0)
    with pytest.raises(ValueError, match="the strategy must be one such as"):
        captioner(pictures, BeamSearch)  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match="give a list of pictures"):
        captioner(pictures[0].tobytes())


def test_an_unreadable_picture_is_named(pair, tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        Captioner(*pair)([path])


@pytest.mark.parametrize("strategy", [Greedy(8), BeamSearch(3, 8)])
def test_broken_weights_are_an_error_not_a_caption(pictures, strategy):
    model, processor = contracap.load("tiny", weights="random", seed=0)
    assert model.decoder is not None
    torch.nn.init.constant_(model.decoder.vocabulary.weight, math.nan)
    with pytest.raises(ValueError, match="not finite"):
        Captioner(model, processor)(pictures[:1], strategy)
