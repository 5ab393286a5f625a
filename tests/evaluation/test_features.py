import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch

from contracap.evaluation.features import picture_batches
from contracap.evaluation.result import Evaluator
from contracap.evaluation.retrieval import Retrieval
from contracap.evaluation.zeroshot import ZeroShot
from contracap.images import ImageError
from contracap.processor import Processor

from .test_distributed import CountingModel
from .worlds import COLOURS, processor, sample

SAMPLES = [sample(name, name, f"a {name} wall", label=label) for label, name in enumerate(COLOURS)]
EVALUATORS = [Retrieval, partial(ZeroShot, classes=[*COLOURS])]


def test_picture_batches_are_the_samples_in_order_as_the_processor_has_them() -> None:
    with picture_batches(SAMPLES, processor(), 4) as batches:
        (first, pixels), (second, more) = batches
    assert [*first, *second] == SAMPLES and len(first) == 4
    assert torch.equal(torch.cat([pixels, more]), processor().images([each.image for each in SAMPLES]))


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_the_next_pictures_are_decoded_while_the_model_works(evaluator: Callable[..., Evaluator]) -> None:
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
    figures = dict(evaluator(SAMPLES, watched, batch_size=2).run(Waiting()))
    assert figures == dict(evaluator(SAMPLES, processor(), batch_size=6).run(CountingModel()))


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_a_picture_that_cannot_be_read_is_named_in_its_place_and_no_thread_is_left(
    evaluator: Callable[..., Evaluator],
) -> None:
    samples = [sample(str(number), name, "a wall", label=0) for number, name in enumerate(COLOURS)]
    object.__setattr__(samples[3], "image", b"no picture")
    model, threads = CountingModel(), threading.active_count()
    with pytest.raises(ImageError, match=r"^sample 3 of shard\.tar: "):
        dict(evaluator(samples, processor(), batch_size=2).run(model))
    assert model.pictures == [2]
    assert threading.active_count() == threads
