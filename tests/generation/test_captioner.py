"""The captioner with the tiny model: cached decoding against full forward passes, batches against single images."""

import io
import math

import pytest
import torch
from PIL import Image
from torch import Tensor

import contracap
from contracap.generation import BeamSearch, Captioner, ContrastiveReranking, Greedy, LegacyBeamSearch, Rules, Sampling
from contracap.generation.strategy import Prompts, Strategy
from contracap.image_files import ImageError
from contracap.model.coca import CoCa
from contracap.processor import Processor
from contracap.tokenizer import Tokenizer, join_marks

STRATEGIES = [
    Greedy(14, 3),
    BeamSearch(4, 14, 3),
    BeamSearch(4, 14, 3, groups=2, diversity=0.7),
    BeamSearch(3, 14, 3, rules=Rules(forced=("dog",), banned=("a",), no_repeat_ngram=2, repetition_penalty=1.2)),
    Sampling(samples=3, max_tokens=14, min_tokens=3),
    LegacyBeamSearch(2023, max_tokens=14, min_tokens=3),
]
PROMPTS = ["red", "a photo of", "", "of the", "x", "q w e r t y"]  # of 1 to 7 tokens


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
def images() -> list[Image.Image]:
    return [Image.new("RGB", (40, 50), colour) for colour in ("red", "green", "blue", "white", "black", "gray")]


def next_logits(model: CoCa, pixels: Tensor, held: Tensor, end: int) -> Tensor:
    """Logits after the tokens `held`, without any cache: a full forward pass over them and an end token."""
    ids = torch.cat([held, torch.full((len(held), 1), end)], dim=1)
    return model(pixels, ids).logits[:, held.shape[1] - 1]


@torch.no_grad()
def uncached(model: CoCa, pixels: Tensor, strategy: Strategy, tokenizer: Tokenizer, prompts: Prompts):
    search = strategy.begin(prompts, tokenizer)
    held = prompts.ids[:, None, : prompts.shortest - 1]
    while not search.finished.all():
        held = torch.cat([held, search.last[:, :, None]], dim=2)
        repeated = pixels.repeat_interleave(held.shape[1], dim=0)
        logits = next_logits(model, repeated, held.flatten(0, 1), tokenizer.end)
        rows = search.advance(logits.unflatten(0, held.shape[:2]))
        held = held if rows is None else held.gather(1, rows[:, :, None].expand(-1, -1, held.shape[2]))
    return search.list_texts()


@pytest.mark.parametrize(
    ("strategy", "dtype"), [*((strategy, torch.float32) for strategy in STRATEGIES), (STRATEGIES[1], torch.float64)]
)
def test_cached_decoding_equals_full_forward_also_after_beams_are_reordered(pair, images, strategy, dtype):
    model, processor = pair
    tokenizer, pixels = processor.tokenizer, processor.images(images).to(dtype)
    texts = [""] * len(images) if isinstance(strategy, LegacyBeamSearch) else PROMPTS
    begun = [[tokenizer.start, *tokenizer.encode(text)] for text in texts]
    longest = max(map(len, begun))
    ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in begun])
    prompts = Prompts(ids, torch.tensor([len(tokens) for tokens in begun]))
    model.to(dtype)
    try:
        captions = Captioner(model, processor).generate(pixels, strategy, texts)
        expected = uncached(model, pixels, strategy, tokenizer, prompts)
    finally:
        model.float()
    assert len({caption.token_ids for caption in captions}) > 1, "the model should look at the images"
    assert len({len(caption.token_ids) for caption in captions}) > 1, "some captions should end before others"
    for caption, hypotheses, tokens in zip(captions, expected, begun, strict=True):
        for text, hypothesis in zip(caption.alternatives, hypotheses, strict=True):
            assert text.token_ids == (*tokens[1:], *hypothesis.token_ids)
            assert text.log_probability == pytest.approx(hypothesis.log_probability, rel=1e-4)


def test_a_caption_begins_with_its_prompt_whose_tokens_do_not_count(pair, images):
    captioner = Captioner(*pair)
    prompt = tuple(captioner.processor.tokenizer.encode("a photo of"))
    assert len(prompt) == 4
    for caption in captioner(images, Greedy(14, 14), prompts="A photo  of"):
        assert caption.text.startswith("a photo of ") and caption.token_ids[:4] == prompt
        assert len(caption.token_ids) == 13 and len(caption.token_log_probabilities) == 9
        assert caption.log_probability == pytest.approx(sum(caption.token_log_probabilities), rel=1e-6)
        assert caption.score == pytest.approx(caption.log_probability / 9, rel=1e-6)


def test_captions_follow_weights_that_change_in_any_way(pair, images):
    model, processor = pair
    captioner, vocabulary = Captioner(model, processor), model.decoder.vocabulary.weight
    before, kept = captioner(images[:2], Greedy(8)), vocabulary.detach().clone()
    try:
        vocabulary.data.copy_(vocabulary.data.roll(7, dims=0))
        assert captioner(images[:2], Greedy(8)) == Captioner(model, processor)(images[:2], Greedy(8)) != before
    finally:
        vocabulary.data.copy_(kept)


def test_rules_that_leave_no_token_are_an_error_for_every_strategy(pair, images):
    captioner, rules = Captioner(*pair), Rules(banned=("x",))
    with pytest.MonkeyPatch.context() as patch:
        forbid_all = "contracap.generation.phrases.BannedPhrases.forbid"
        patch.setattr(forbid_all, lambda self, scores, *rest, **more: scores.fill_(-math.inf))
        for strategy in (Greedy(8, rules=rules), BeamSearch(2, 8, rules=rules), Sampling(max_tokens=8, rules=rules)):
            with pytest.raises(ValueError, match="no text was found"):
                captioner(images[:1], strategy)


def test_the_embedding_of_a_caption_is_that_of_its_image(pair, images):
    model, processor = pair
    captions = Captioner(model, processor)(images, Greedy(8), batch_size=4)
    with torch.no_grad():
        expected = model.encode_image(processor.images(images))
    torch.testing.assert_close(torch.stack([caption.embedding for caption in captions]), expected, rtol=0, atol=1e-6)


def test_reranking_ranks_what_was_written_by_the_cosine_of_text_and_image(pair, images):
    model, processor = pair
    captioner, sampling = Captioner(model, processor), Sampling(samples=5, max_tokens=12)
    drawn, ranked = captioner(images, sampling), captioner(images, ContrastiveReranking(sampling))
    moved = 0
    for before, after in zip(drawn, ranked, strict=True):
        assert {text.token_ids for text in before.alternatives} == {text.token_ids for text in after.alternatives}
        with torch.no_grad():
            start, end = [processor.tokenizer.start], [processor.tokenizer.end]
            rows = [torch.tensor([start + list(text.token_ids) + end]) for text in after.alternatives]
            texts = torch.cat([model.encode_text(row) for row in rows])
        cosines = (texts @ after.embedding).tolist()
        assert [text.score for text in after.alternatives] == pytest.approx(cosines, abs=1e-5)
        assert cosines == sorted(cosines, reverse=True) and after.score == pytest.approx(cosines[0], abs=1e-5)
        moved += before.token_ids != after.token_ids
    assert moved


def test_a_caption_is_the_first_of_its_alternatives(pair, images):
    model, processor = pair
    for caption in Captioner(model, processor)(images, BeamSearch(5, 12, 3)):
        first = caption.alternatives[0]
        assert len(caption.alternatives) == 5 and first.alternatives == ()
        for name in ("text", "token_ids", "score", "log_probability"):
            assert getattr(caption, name) == getattr(first, name)
        assert caption.score == max(text.score for text in caption.alternatives)
        assert caption.raw_text == processor.tokenizer.decode(caption.token_ids)
        assert caption.text == join_marks(caption.raw_text)
        assert not {processor.tokenizer.start, processor.tokenizer.end} & set(caption.token_ids)
        assert 2 <= len(caption.token_ids) <= 11


def test_images_may_be_paths_bytes_or_pil_and_none_at_all(pair, images, tmp_path):
    captioner = Captioner(*pair)
    path, memory = tmp_path / "one.png", io.BytesIO()
    images[0].save(path)
    images[0].save(memory, "png")
    texts = [caption.text for caption in captioner([images[0], path, str(path), memory.getvalue()], Greedy(8, 3))]
    assert len(set(texts)) == 1
    assert captioner([]) == []
    for strategy in STRATEGIES:
        assert captioner.generate(captioner.processor.images(images)[:0], strategy) == []


def test_the_default_is_beam_search_and_max_tokens_is_cut_to_the_models_context(pair, images):
    model, _ = pair
    captioner = Captioner(*pair)
    within = captioner(images[:1], BeamSearch(max_tokens=model.config.text.context))
    assert model.config.text.context < BeamSearch().max_tokens
    assert captioner(images[:1]) == captioner(images[:1], BeamSearch(max_tokens=500)) == within


def test_training_mode_is_left_as_it_was_and_not_used(pair, images):
    model, processor = pair
    captioner, expected = Captioner(model, processor), Captioner(model, processor)(images[:1], Greedy(8))
    model.train()
    model.text.eval()
    try:
        assert captioner(images[:1], Greedy(8)) == expected
        assert model.training and model.vision.training and not model.text.training
    finally:
        model.eval()


@pytest.mark.parametrize("strategy", [BeamSearch(3, 14, 0), Sampling(top_k=3, samples=2, max_tokens=14, min_tokens=0)])
def test_batches_and_images_that_leave_them_change_no_caption(pair, images, strategy, monkeypatch):
    sizes, next_logits = [], CoCa.next_logits
    monkeypatch.setattr(
        CoCa, "next_logits", lambda self, ids, *rest: sizes.append(len(ids)) or next_logits(self, ids, *rest)
    )
    captioner = Captioner(*pair)
    left = captioner(images, strategy)
    assert 0 < sizes[-1] < 6 and sizes == sorted(sizes, reverse=True)
    others = []
    monkeypatch.setattr("contracap.generation.decoding.CHECK_EVERY", {"cpu": 4})
    others.append(captioner(images, strategy, batch_size=4))
    monkeypatch.setattr("contracap.generation.decoding.MIN_LEAVING", 2.0)
    sizes.clear()
    others.append(captioner(images, strategy))
    assert set(sizes) == {6}
    for captions in others:
        for one, other in zip(left, captions, strict=True):
            assert [text.token_ids for text in one.alternatives] == [text.token_ids for text in other.alternatives]
            assert one.score == pytest.approx(other.score, rel=1e-4)


@pytest.mark.parametrize("strategy", [BeamSearch(3, 10, 3), Greedy(10, 3)])
def test_decoding_with_fixed_shapes_writes_the_same_and_survives_an_image_that_is_not_finite(pair, images, strategy):
    plain, fixed = Captioner(*pair), Captioner(*pair)
    fixed.decoding.compiled = True  # the shapes alone, without the compiler
    pixels = plain.processor.images(images)
    expected, found = [], []
    for half in (pixels[:3], pixels[3:]):
        expected += [caption.alternatives for caption in plain.generate(half, strategy, "a")]
        found += [caption.alternatives for caption in fixed.generate(half, strategy, "a")]
        with pytest.raises(ValueError, match="not finite"):
            fixed.generate(half * math.nan, strategy, "a")
    for ours, theirs in zip(found, expected, strict=True):
        assert [text.token_ids for text in ours] == [text.token_ids for text in theirs]


def test_what_cannot_be_captioned_is_refused(pair, images, tmp_path):
    captioner, pixels = Captioner(*pair), pair[1].images(images)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        captioner([tmp_path / "broken.jpg"])
    for call in (lambda prompt: captioner.check(Greedy(14), prompt), lambda prompt: captioner(images, prompts=prompt)):
        with pytest.raises(ValueError, match="'a <end_of_text> b' names the start or the end token"):
            call("a <end_of_text> b")
    with pytest.raises(ValueError, match=r"a prompt takes 15 tokens.* max_tokens is 14: nothing can follow"):
        captioner(images, Greedy(14), prompts=" ".join("abcdefghijklmn"))
    with pytest.raises(ValueError, match="2 prompts for 6 images: give one for all, or one for each"):
        captioner(images, Greedy(14), prompts=["a", "b"])
    with pytest.raises(ValueError, match="2 numbers for 6 images: give one for each"):
        captioner.generate(pixels, Greedy(8), numbers=[0, 1])
    with pytest.raises(ValueError, match="batch_size must be"):
        captioner(images, batch_size=0)
    with pytest.raises(ValueError, match="the strategy must be an object such as"):
        captioner(images, BeamSearch)  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match="the images must be a list"):
        captioner(images[0].tobytes())


def test_a_model_that_does_not_fit_or_is_broken_is_refused(images):
    model, processor = contracap.load("tiny", weights="random", seed=0)
    with pytest.raises(ValueError, match="vocabulary has 2048 tokens, the model's 1024"):
        Captioner(model, Processor(processor.image_config, Tokenizer(context=16, vocab_size=2048)))
    torch.nn.init.constant_(model.require_decoder().vocabulary.weight, math.nan)
    for strategy in (Greedy(8), BeamSearch(3, 8)):
        with pytest.raises(ValueError, match="not finite"):
            Captioner(model, processor)(images[:1], strategy)
    model.decoder = None
    with pytest.raises(ValueError, match="decoder"):
        Captioner(model, processor)
