import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch

from contracap.evaluation.features import pixel_batches
from contracap.evaluation.result import Result
from contracap.evaluation.retrieval import evaluate_retrieval
from contracap.evaluation.zeroshot import evaluate_zeroshot
from contracap.image_files import ImageError
from contracap.processor import Processor

from .test_distributed import CountingModel
from .worlds import COLOURS, processor, sample

SAMPLES = [sample(name, name, f"a {name} wall", label=label) for label, name in enumerate(COLOURS)]
EVALUATIONS = [evaluate_retrieval, partial(evaluate_zeroshot, classes=[*COLOURS])]


def test_image_batches_are_the_samples_in_order_as_the_processor_has_them() -> None:
    with pixel_batches(SAMPLES, processor(), 4) as batches:
        (first, pixels), (second, more) = batches
    assert [*first, *second] == SAMPLES and len(first) == 4
    assert torch.equal(torch.cat([pixels, more]), processor().images([each.image for each in SAMPLES]))


@pytest.mark.parametrize("evaluate", EVALUATIONS)
def test_the_next_pictures_are_decoded_while_the_model_works(evaluate: Callable[..., Result]) -> None:
    decoded = threading.Event()

    class Watched(Processor):
        def images(self, sources):
            if sources[0] == SAMPLES[2].image:
                decoded.set()
            return super().images(sources)

    class Waiting(CountingModel):
        def encode_image(self, pixels):
            assert decoded.wait(30)
            return super().encode_image(pixels)

    watched = Watched(processor().image_config, processor().tokenizer)
    result = evaluate(Waiting(), watched, SAMPLES, batch_size=2)
    assert result == evaluate(CountingModel(), processor(), SAMPLES, batch_size=6)


@pytest.mark.parametrize("evaluate", EVALUATIONS)
def test_a_picture_that_cannot_be_read_is_named_in_its_place_and_no_thread_is_left(
    evaluate: Callable[..., Result],
) -> None:
    samples = [sample(str(number), name, "a wall", label=0) for number, name in enumerate(COLOURS)]
    object.__setattr__(samples[3], "image", b"no picture")
    model, threads = CountingModel(), threading.active_count()
    with pytest.raises(ImageError, match=r"^sample 3 of shard\.tar: "):
        evaluate(model, processor(), samples, batch_size=2)
    assert model.pictures == [2]
    assert threading.active_count() == threads
