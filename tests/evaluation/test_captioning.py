import copy
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contracap.data.shard_maker import make_shards
from contracap.evaluation import distributed
from contracap.evaluation.captioning import evaluate_captioning
from contracap.evaluation.metrics.clipscore import ClipScorer
from contracap.evaluation.metrics.overlap import mean
from contracap.evaluation.metrics.scores import CaptionScorer
from contracap.evaluation.predictions import Prediction
from contracap.evaluation.result import Result
from contracap.generation.beam import BeamSearch
from contracap.generation.captioner import Captioner
from contracap.generation.reranking import ContrastiveReranking
from contracap.generation.sampling import Greedy, Sampling
from contracap.images import ImageConfig
from contracap.model.coca import CoCa
from contracap.model.sizes import SIZES
from contracap.parallel.process_group import ProcessGroup
from contracap.processor import Processor
from contracap.tokenizer import Tokenizer

from .programs import stand_in
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
        BeamSearch(width=2, max_tokens=10, min_tokens=4),
        ContrastiveReranking(of=Sampling(samples=2, seed=1, max_tokens=10, min_tokens=4)),
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


NOCAPS = """{"images": [{"id": 0, "file_name": "0.png", "domain": "in-domain"},
  {"id": 1, "file_name": "1.png", "domain": "near-domain"}, {"id": 2, "file_name": "2.png", "domain": "near-domain"}],
  "annotations": [{"id": 0, "image_id": 0, "caption": "A red wall."},
  {"id": 1, "image_id": 1, "caption": "A green wall."}, {"id": 2, "image_id": 2, "caption": "Blue."}]}"""


def test_what_the_annotations_of_a_data_set_say_is_evaluated_in_its_domains(tiny, tmp_path: Path) -> None:
    model, processor = tiny
    (tmp_path / "nocaps_val_4500_captions.json").write_text(NOCAPS)
    (tmp_path / "pictures").mkdir()
    for i, colour in enumerate(list(COLOURS.values())[:3]):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(picture(colour))
    shards = tmp_path / "shards"
    make_shards(tmp_path / "nocaps_val_4500_captions.json", shards, images=tmp_path / "pictures", splits=())
    scorer = CaptionScorer(metrics=("cider",), tokenizer="python")
    result = evaluate_captioning(model, processor, shards, strategy=Greedy(10, 4), scorer=scorer)
    assert set(result.figures) == {"CIDEr", "CIDEr_in", "CIDEr_near"}  # null for a domain of one image
    assert result.samples == 3


@pytest.mark.parametrize("captions", [(), ("...", " !", "\U0001f600\U0001f385")])
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
        time.sleep(0.4)
        scored.append(1)
        return score(self, *inputs, **more)

    monkeypatch.setattr(CaptionScorer, "score", slow)
    monkeypatch.setattr(Thread, "all_gather", lambda self, value: said.append(self.rank) or all_gather(self, value))
    monkeypatch.setattr(distributed, "KEEPALIVE_SECONDS", 0.05)
    for result in in_threads(3, lambda thread: together(tiny, samples, thread)):
        assert (result, result.predictions) == (alone, alone.predictions)
    assert len(scored) == 1
    assert said.count(0) == said.count(1) == said.count(2) > 5


def test_a_metric_that_fails_in_the_first_process_ends_all(monkeypatch, tiny) -> None:
    good = [sample(name, name, f"a {name} wall") for name in COLOURS]

    def fail(*_: object, **__: object) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(CaptionScorer, "score", fail)
    first, second = in_threads(2, lambda thread: together(tiny, good, thread))
    assert isinstance(first, OSError)
    assert isinstance(second, ValueError) and str(second) == "rank 0: no memory"
