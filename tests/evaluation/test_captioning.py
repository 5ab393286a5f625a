import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contracap.evaluation import tokens
from contracap.evaluation.captioning import Captioning, score
from contracap.evaluation.tokens import find_jar, find_java
from contracap.generation.beam import BeamSearch
from contracap.generation.captioner import Captioner
from contracap.generation.sampling import Greedy
from contracap.image import ImageConfig
from contracap.model.coca import CoCa
from contracap.model.sizes import SIZES
from contracap.processor import Processor
from contracap.tokenizer import Tokenizer

from .worlds import COLOURS, sample

needs_java = pytest.mark.skipif(not (find_java() and find_jar()), reason="needs Java and pycocoevalcap: make setup")
FIGURES = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]


@pytest.fixture(scope="module")
def tiny() -> tuple[CoCa, Processor]:
    torch.manual_seed(0)
    config = SIZES["tiny"]
    model = CoCa(config)
    model.initialise()
    image = ImageConfig(size=config.vision.image_size)
    return model, Processor(image, Tokenizer(context=config.text.context, vocab_size=config.text.vocab_size))


@pytest.mark.parametrize(
    "name", [pytest.param("magic_coco_magic.json", marks=pytest.mark.slow), "magic_flickr30k_zerocap.json"]
)
@pytest.mark.parametrize(
    ("tokenizer", "digits"), [pytest.param("java", 1e-9, marks=needs_java), pytest.param("python", 1e-3)]
)
def test_published_captions_get_their_published_scores(data_folder: Path, name, tokenizer, digits: float) -> None:
    folder = data_folder / "caption_metrics"
    entries = json.loads((folder / name).read_text())
    expected = json.loads((folder / "expected.json").read_text())["results"][name]
    captions, predictions = zip(*((entry["captions"], entry["prediction"]) for entry in entries), strict=True)
    scores = score(captions, predictions, tokenizer=tokenizer)
    assert list(scores.figures) == FIGURES
    for figure in FIGURES:
        assert scores.figures[figure] == pytest.approx(expected[figure], abs=digits)
    assert scores.details["tokenizer"] == tokenizer
    if tokenizer == "java":
        assert scores.details["bleu_stats"] == expected["bleu_stats"]


def test_references_without_a_word_are_left_out() -> None:
    with_empty = score([["a red ball", ".", ""], ["two cats"]], ["a ball", "two cats"], tokenizer="python")
    assert with_empty == score([["a red ball"], ["two cats"]], ["a ball", "two cats"], tokenizer="python")
    with pytest.raises(ValueError, match=r"picture 1 .* no reference"):
        score([["a red ball"], ["..."]], ["a ball", "two cats"], tokenizer="python")


@pytest.mark.parametrize("strategy", [Greedy(10, 4), BeamSearch(width=2, max_tokens=10, min_tokens=4)])
def test_evaluator_scores_what_the_captioner_writes(tiny, strategy) -> None:
    model, processor = tiny
    samples = [sample(name, name, f"a {name} wall", f"all is {name}") for name in COLOURS]
    evaluator = Captioning(samples, processor, strategy=strategy, tokenizer="python", batch_size=4)
    figures = dict(evaluator.run(model))
    made = [caption.text for caption in Captioner(model, processor)([one.image for one in samples], strategy)]
    assert [one.prediction for one in evaluator.predictions] == made
    assert [one.key for one in evaluator.predictions] == list(COLOURS)
    assert figures == score([one.captions for one in samples], made, tokenizer="python").figures
    assert evaluator.samples == 6
    assert evaluator.details["tokenizer"] == "python"
    assert set(evaluator.reasons) == {"METEOR", "SPICE"}


def test_perfect_captions_get_full_marks() -> None:
    captions = [[f"a {name} ball on the {name} grass"] for name in COLOURS]
    figures = score(captions, [written for (written,) in captions], tokenizer="python").figures
    assert figures == pytest.approx(dict.fromkeys(FIGURES[:5], 1.0) | {"CIDEr": 10.0})


def test_without_java_the_figures_come_out_and_say_so(monkeypatch) -> None:
    monkeypatch.setattr(tokens, "find_java", lambda: None)
    scores = score([["a red ball"], ["two cats"]], ["a ball", "two cats"])
    assert scores.tokenizer == scores.details["tokenizer"] == "python"
    assert list(scores.figures) == FIGURES


def test_a_picture_without_captions_is_named(tiny) -> None:
    model, processor = tiny
    with pytest.raises(ValueError, match=r"sample red of shard\.tar has no caption"):
        dict(Captioning([sample("red", "red")], processor).run(model))


def test_a_model_without_a_decoder_is_refused(tiny) -> None:
    _, processor = tiny
    clip = CoCa(replace(SIZES["tiny"], decoder=None))
    with pytest.raises(ValueError, match="no text decoder"):
        dict(Captioning([sample("red", "red", "a red wall")], processor).run(clip))
