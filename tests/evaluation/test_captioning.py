import copy
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contracap.data.shard_maker import make_shards
from contracap.evaluation import distributed
from contracap.evaluation.captioning import evaluate_captioning
from contracap.evaluation.metrics.clipscore import ClipScorer
from contracap.evaluation.metrics.java import UnavailableError
from contracap.evaluation.metrics.overlap import mean
from contracap.evaluation.metrics.scores import CaptionScorer
from contracap.evaluation.predictions import Prediction
from contracap.evaluation.result import Result
from contracap.generation.beam import BeamSearch
from contracap.generation.captioner import Captioner
from contracap.generation.reranking import ContrastiveReranking
from contracap.generation.sampling import Greedy, Sampling
from contracap.image_files import ImageError
from contracap.images import ImageConfig
from contracap.model.coca import CoCa
from contracap.model.sizes import SIZES
from contracap.parallel.process_group import ProcessGroup
from contracap.processor import Processor
from contracap.tokenizer import Tokenizer

from .programs import stand_in, without_java
from .test_distributed import Thread, in_threads
from .worlds import COLOURS, ColourModel, picture, sample
from .worlds import processor as colour_processor

COUNTED = ("bleu", "rouge_l", "cider")
ROUGE = CaptionScorer(metrics=("rouge_l",), tokenizer="python")


@pytest.fixture(scope="module")
def tiny() -> tuple[CoCa, Processor]:
    torch.manual_seed(0)
    config = SIZES["tiny"]
    model = CoCa(config)
    model.initialise()
    image = ImageConfig(size=config.vision.image_size)
    return model, Processor(image, Tokenizer(context=config.text.context, vocab_size=config.text.vocab_size))


@pytest.mark.parametrize(
    "strategy",
    [
        Greedy(10, 4),
        BeamSearch(width=2, max_tokens=10, min_tokens=4),
        Sampling(seed=1, max_tokens=10, min_tokens=4),
        ContrastiveReranking(of=Sampling(samples=2, max_tokens=10, min_tokens=4)),
    ],
)
def test_evaluator_scores_what_the_captioner_writes(tiny, strategy) -> None:
    model, processor = tiny
    samples = [sample(name, name, f"a {name} wall", f"all is {name}") for name in COLOURS]
    scorer = CaptionScorer(metrics=COUNTED, tokenizer="python")
    result = evaluate_captioning(model, processor, samples, strategy=strategy, scorer=scorer, batch_size=4)
    made = [caption.text for caption in Captioner(model, processor)([one.image for one in samples], strategy)]
    assert result.figures == scorer.score([one.captions for one in samples], made).figures
    assert [one.prediction for one in result.predictions] == made
    assert [one.key for one in result.predictions] == list(COLOURS)
    assert [one.cider for one in result.predictions] == result.per_sample["CIDEr"].values
    assert {name: mean(found.values) for name, found in result.per_sample.items()}.items() < result.figures.items()
    assert (result.samples, result.details["tokenizer"], result.reasons) == (6, "python", {})


def test_a_metric_that_cannot_run_is_refused_before_a_caption_is_written(monkeypatch, tiny) -> None:
    without_java(monkeypatch)
    model, processor = tiny
    samples = [sample("red", "red", "a red wall")]
    with pytest.raises(UnavailableError, match="METEOR needs a Java runtime"):
        CaptionScorer(metrics=("meteor",))
    result = evaluate_captioning(model, processor, samples, strategy=Greedy(10, 4))
    assert {"METEOR", "SPICE"} < set(result.reasons)


def test_clipscore_is_by_the_named_model_or_says_that_the_model_judges_itself(tiny) -> None:
    model, processor = tiny
    samples = [sample(name, name, f"a {name} wall") for name in COLOURS]
    pictures, written = [one.image for one in samples], [one.captions for one in samples]
    other = ClipScorer(ColourModel(), colour_processor(), name="colours")
    itself = ClipScorer(model, processor, name="the model that wrote the captions")
    for asked, judge in ((other, other), ("self", itself)):
        result = evaluate_captioning(model, processor, samples, strategy=Greedy(10, 4), scorer=ROUGE, clipscore=asked)
        clip, both = judge.score(pictures, [one.prediction for one in result.predictions], written)
        assert result.per_sample["CLIPScore"].values == pytest.approx(clip, abs=1e-6)
        assert result.figures["RefCLIPScore"] == pytest.approx(mean(both), abs=1e-6)
        assert result.details["clipscore_model"] == judge.name
        assert {one.cider for one in result.predictions} == {None}


@pytest.mark.parametrize(("judge", "decoded"), [(None, 6), ("self", 6), ("colours", 12)])
def test_pictures_are_decoded_in_threads_for_the_judge_too_and_once_where_it_sees_the_same(
    tiny, judge: str | None, decoded: int
) -> None:
    model, processor = tiny
    pictures = list[int]()

    class Watched(Processor):
        def images(self, sources):
            assert threading.current_thread() is not threading.main_thread()
            pictures.append(len(sources))
            return super().images(sources)

    def watched(of: Processor) -> Processor:
        return Watched(of.image_config, of.tokenizer)

    other = ClipScorer(ColourModel(), watched(colour_processor()), name="colours")
    samples = [sample(name, name, f"a {name} wall") for name in COLOURS]
    asked = other if judge == "colours" else judge
    options = {"strategy": Greedy(10, 4), "scorer": ROUGE, "clipscore": asked, "batch_size": 4}
    evaluate_captioning(model, watched(processor), samples, **options)
    assert sum(pictures) == decoded


KARPATHY = """{"images": [
  {"filepath": "val2014", "filename": "0.png", "split": "test", "imgid": 0, "sentences": [{"raw": "A red wall."}]},
  {"filepath": "val2014", "filename": "1.png", "split": "val", "imgid": 1, "sentences": [{"raw": "A green wall."}]},
  {"filepath": "val2014", "filename": "2.png", "split": "test", "imgid": 2, "sentences": [{"raw": "Blue."}]}]}"""
NOCAPS = """{"images": [{"id": 0, "file_name": "0.png", "domain": "in-domain"},
  {"id": 1, "file_name": "1.png", "domain": "near-domain"}, {"id": 2, "file_name": "2.png", "domain": "near-domain"}],
  "annotations": [{"id": 0, "image_id": 0, "caption": "A red wall."},
  {"id": 1, "image_id": 1, "caption": "A green wall."}, {"id": 2, "image_id": 2, "caption": "Blue."}]}"""
TOKEN = "0.png#0\tA red wall .\n0.png#1\tAll is red .\n1.png#0\tA green wall .\n2.png#0\tBlue .\n"


@pytest.mark.parametrize(
    ("name", "text", "folder", "splits", "samples", "figures"),
    [
        ("dataset_coco.json", KARPATHY, "val2014", ("test",), 2, {"CIDEr"}),
        ("dataset_flickr8k.json", KARPATHY.replace('"filepath": "val2014", ', ""), "", ("test",), 2, {"CIDEr"}),
        ("Flickr8k.token.txt", TOKEN, "", (), 3, {"CIDEr"}),
        ("nocaps_val_4500_captions.json", NOCAPS, "", (), 3, {"CIDEr", "CIDEr_in", "CIDEr_near"}),
    ],
)
def test_what_the_annotations_of_a_data_set_say_is_evaluated(
    tiny, tmp_path: Path, name: str, text: str, folder: str, splits, samples: int, figures: set[str]
) -> None:
    model, processor = tiny
    (tmp_path / name).write_text(text)
    pictures = tmp_path / "pictures"
    (pictures / folder).mkdir(parents=True)
    for i, colour in enumerate(list(COLOURS.values())[:3]):
        (pictures / folder / f"{i}.png").write_bytes(picture(colour))
    make_shards(tmp_path / name, tmp_path / "shards", images=pictures, splits=splits)
    scorer = CaptionScorer(metrics=("cider",), tokenizer="python")
    result = evaluate_captioning(model, processor, tmp_path / "shards", strategy=Greedy(10, 4), scorer=scorer)
    assert set(result.figures) == figures  # null for a domain of one image
    assert result.samples == samples


@pytest.mark.parametrize("captions", [(), ("...", " !"), ("\U0001f600\U0001f385", "\u2764")])
def test_a_picture_without_a_word_is_named_before_a_caption_is_written(monkeypatch, tiny, captions) -> None:
    model, processor = tiny
    monkeypatch.setattr(Captioner, "generate", lambda *_, **__: pytest.fail("wrote a caption"))
    samples = [sample("red", "red", "a red wall"), sample("blue", "blue", *captions)]
    with pytest.raises(ValueError, match=r"sample blue of shard\.tar has no caption with a word"):
        evaluate_captioning(model, processor, samples)


def test_a_picture_in_whose_captions_java_finds_no_word_is_named(monkeypatch, tiny, tmp_path: Path) -> None:
    model, processor = tiny
    stand_in(monkeypatch, tmp_path, "for line in sys.stdin: print()", jar=tmp_path / "tokenizer.jar")
    samples, kept = [sample("red", "red", "a red wall")], list[Prediction]()
    scorer = CaptionScorer(metrics=COUNTED, tokenizer="java")
    options = {"strategy": Greedy(10, 4), "scorer": scorer, "on_predictions": kept.extend}
    with pytest.raises(ValueError, match=r"^image red has no reference in which the tokenizer \(java\) finds"):
        evaluate_captioning(model, processor, samples, **options)
    assert [one.key for one in kept] == ["red"]


def test_a_model_without_a_decoder_is_refused(tiny) -> None:
    _, processor = tiny
    clip = CoCa(replace(SIZES["tiny"], decoder=None))
    with pytest.raises(ValueError, match="no text decoder"):
        evaluate_captioning(clip, processor, [sample("red", "red", "a red wall")])


def together(tiny, samples, thread: ProcessGroup) -> Result:
    """The result in a thread, which has a model of its own."""
    model, processor = copy.deepcopy(tiny[0]), tiny[1]
    scorer, strategy = CaptionScorer(metrics=COUNTED, tokenizer="python"), Greedy(10, 4)
    return evaluate_captioning(
        model, processor, samples, strategy=strategy, scorer=scorer, clipscore="self", process_group=thread
    )


def test_the_first_process_computes_the_metrics_for_all_and_does_not_fall_silent(monkeypatch, tiny) -> None:
    samples = [sample(name, name, f"a {name} wall", domain="near-domain") for name in COLOURS]
    alone = together(tiny, samples, ProcessGroup())
    scored, said = [], []
    score, all_gather = CaptionScorer.score, Thread.all_gather

    def slow(self: CaptionScorer, *inputs, **more):
        time.sleep(0.5)
        scored.append(1)
        return score(self, *inputs, **more)

    monkeypatch.setattr(CaptionScorer, "score", slow)
    monkeypatch.setattr(Thread, "all_gather", lambda self, value: said.append(self.rank) or all_gather(self, value))
    monkeypatch.setattr(distributed, "KEEPALIVE_SECONDS", 0.05)
    for result in in_threads(3, lambda thread: together(tiny, samples, thread)):
        assert (result, result.predictions) == (alone, alone.predictions)
    assert len(scored) == 1
    assert said.count(0) == said.count(1) == said.count(2) > 5


def test_what_fails_in_one_process_ends_all(monkeypatch, tiny) -> None:
    good = [sample(name, name, f"a {name} wall") for name in COLOURS]
    broken = [*good[:5], sample("torn", "red", "a red wall")]
    object.__setattr__(broken[5], "image", b"no picture")

    def one_is_broken(thread: Thread) -> Result:
        return together(tiny, broken if thread.rank == 1 else good, thread)

    first, second = in_threads(2, one_is_broken)
    assert isinstance(second, ImageError)
    assert isinstance(first, ValueError) and str(first).startswith("rank 1: sample torn of shard.tar: ")

    def fail(*_: object, **__: object) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(CaptionScorer, "score", fail)
    first, second = in_threads(2, lambda thread: together(tiny, good, thread))
    assert isinstance(first, OSError)
    assert isinstance(second, ValueError) and str(second) == "rank 0: no memory"
