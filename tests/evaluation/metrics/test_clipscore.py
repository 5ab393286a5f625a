import pytest
import torch

from contracap.evaluation.metrics.clipscore import ClipScorer
from contracap.image_files import ImageError
from contracap.model.sizes import SIZES
from contracap.pretrained import random_model

from ..worlds import COLOURS, ColourModel, picture, processor

NAMES = list(COLOURS)
PICTURES = [picture(COLOURS[name]) for name in NAMES]


@pytest.fixture(scope="module")
def judge() -> ClipScorer:
    return ClipScorer(ColourModel(), processor(), name="colours")


def test_scores_are_those_of_the_paper_for_a_random_model() -> None:
    model, own = random_model(SIZES["tiny"], seed=0)
    captions = [f"a {name} wall" for name in NAMES]
    references = [[f"all {name}", f"{name} paint", "a wall"][: 1 + i % 3] for i, name in enumerate(NAMES)]
    clip, both = ClipScorer(model, own, name="tiny").score(PICTURES, captions, references)
    with torch.inference_mode():
        model.eval()
        images = model.encode_image(own.images(PICTURES))
        for i, caption in enumerate(captions):
            text = model.encode_text(own.texts(["A photo depicts " + caption]))[0]
            written = model.encode_text(own.texts(["A photo depicts " + one for one in references[i]]))
            score = 2.5 * max(float(images[i] @ text), 0)
            nearest = max(float((written @ text).max()), 0)
            assert clip[i] == pytest.approx(score, abs=1e-6)
            assert both[i] == pytest.approx(2 * score * nearest / (score + nearest) if score else 0, abs=1e-6)
    assert min(clip) == 0 < max(clip)


def test_cosines_are_in_full_precision_where_the_model_is_not(judge: ClipScorer) -> None:
    inputs = PICTURES, [f"a {name} wall" for name in NAMES], [[f"a {name} wall"] for name in reversed(NAMES)]
    expected = judge.score(*inputs)
    assert len(set(expected[1])) > 1
    with torch.autocast("cpu", torch.bfloat16):
        assert judge.score(*inputs) == expected


def test_scores_do_not_depend_on_the_batch(judge: ClipScorer, monkeypatch) -> None:
    captions, written = [f"a {name} wall" for name in NAMES], [["a red wall"], ["blue", "green"]] * 3
    whole = judge.score(PICTURES, captions, written)
    monkeypatch.setattr("contracap.evaluation.metrics.clipscore.BATCH", 4)
    for ours, expected in zip(judge.score(PICTURES, captions, written), whole, strict=True):
        assert ours == pytest.approx(expected, abs=1e-6)


def test_a_broken_picture_is_an_error(judge: ClipScorer) -> None:
    with pytest.raises(ImageError, match="image 1"):
        judge.score([PICTURES[0], b"no picture"], ["a", "b"], [["a"], ["b"]])
